"""What a person at a terminal, or a log, gets to see beside the result: progress and errors, on stderr."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ProgressCall = Callable[[int, int, str], None]
QUIET_SECONDS = 30.0  # off a terminal: at most so long without a line
BUG_STATUS = 70  # EX_SOFTWARE of sysexits.h: no mistake of the user, and no flag that does not exist


@contextlib.contextmanager
def errors_as_paragraphs() -> Iterator[None]:
    """Turn an error into one paragraph on stderr and an exit status; with `--debug`, let it through.

    A mistake of the user is a `TiedMoeError`, or what the machine refuses: a file, the network, a package that is not
    installed, memory. Everything else is a bug of ours and says so.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        if os.environ.get("TIEDMOE_DEBUG", "0") not in ("", "0"):
            raise
        from transformers_tiedmoe.errors import TiedMoeError

        message = " ".join(str(error).split())
        if isinstance(error, (TiedMoeError, OSError, ImportError)):
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(1) from None
        if isinstance(error, MemoryError):
            print(f"error: the memory of this machine does not suffice ({message or 'MemoryError'}); `tiedmoe plan` "
                  "says what a conversion takes", file=sys.stderr)  # fmt: skip
            raise typer.Exit(1) from None
        print(
            f"error: this is a bug in tiedmoe, not a mistake of yours: {type(error).__name__}: {message}; please "
            "report it with what `tiedmoe --debug COMMAND ...` prints (or TIEDMOE_DEBUG=1 in the environment)",
            file=sys.stderr,
        )
        raise typer.Exit(BUG_STATUS) from None


@contextlib.contextmanager
def show_progress(is_main: bool = True) -> Iterator[ProgressCall]:
    """Yield `progress(done, total, what)`: a bar on a terminal, lines elsewhere, nothing but in the first process.

    `what` is "stage" or "stage, detail".
    """
    console = Console(stderr=True)
    if not is_main:
        yield lambda done, total, what: None
    elif console.is_terminal:
        with _bar(console) as progress:
            yield progress
    else:
        with _lines() as progress:
            yield progress


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[ProgressCall]:
    """Show a progress bar from the first call on, and fill it when the command succeeds."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console)

    def progress(done: int, total: int, what: str) -> None:
        if not bar.tasks:
            bar.add_task(what)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total, description=what)

    try:
        yield progress
        if bar.tasks:
            bar.update(bar.task_ids[0], completed=bar.tasks[0].total, description="done")
    finally:
        if bar.tasks:
            bar.stop()


@contextlib.contextmanager
def _lines(seconds: float = QUIET_SECONDS) -> Iterator[ProgressCall]:
    """Print lines instead of a bar; a thread prints one in time even while a call takes long."""
    lines, ended = _Lines(seconds), threading.Event()

    def watch() -> None:
        while not ended.wait(min(1.0, seconds)):
            lines.tell_if_due()

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield lines
        if lines.text:
            lines(1, 1, "done")
    finally:
        ended.set()
        watcher.join()


class _Lines:
    """Prints a line when a stage begins, and again when `seconds` have passed without one."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.stage = self.text = ""
        self.start = self.told = time.monotonic()
        self.stderr, self.lock = sys.stderr, threading.Lock()

    def __call__(self, done: int, total: int, what: str) -> None:
        stage = what.partition(", ")[0]
        with self.lock:
            is_new, self.stage = stage != self.stage, stage
            self.text = f"{done / total:4.0%}  {what}" if total else f"      {what}"
            if is_new:
                self._tell()

    def tell_if_due(self) -> None:
        """Repeat where the command is if nothing was printed for too long."""
        with self.lock:
            if self.text and time.monotonic() - self.told >= self.seconds:
                self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        print(f"{self.told - self.start:5.0f} s {self.text}", file=self.stderr, flush=True)

"""The folder `.OUTPUT.partial` beside OUTPUT: what a conversion has done so far, so that it can be killed and started again.

    lock, pid        one process at a time
    journal.jsonl    first what is being made of what; then a line for everything that is finished, with its hash
    output/          the files so far; takes OUTPUT's name in one rename
    work/            results that took long (a computed pool), for the same command started again

After an error nothing is left of it; after a kill or Ctrl-C everything is, and the same command goes on with it.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from .checkpoint.writer import Planned, check_output, write_file
from .errors import ConversionError
from .journal import FILES, JOURNAL, append, file_digest, flush, partial_folder, read_journal, was_renamed

LOCK, PID, STORED = "lock", "pid", "work"
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class Work:
    """A conversion's working folder; `open_work` makes one.

    Attributes:
        folder: where the output's files are written.
        files: the finished ones, `{name: {"bytes": …, "xxh3_128": …}}`.
        report: what `complete` was given, by this run or by one that was killed after it; None before.
        num_resumed: how many files an earlier run had finished.
    """

    def __init__(self, partial: Path, entries: list[dict[str, Any]]):
        self.folder, self._stored, self._journal = partial / FILES, partial / STORED, partial / JOURNAL
        self.files = {entry["file"]: entry["written"] for entry in entries if "file" in entry}
        self._results = {entry["stored"]: entry for entry in entries if "stored" in entry}
        self.report: dict[str, Any] | None = entries[-1].get("complete")
        for name in [name for name, written in self.files.items() if file_digest(self.folder / name) != written]:
            del self.files[name]  # it is made again
            self.report = None
        self.num_resumed = len(self.files)
        self.folder.mkdir(exist_ok=True)
        self._stored.mkdir(exist_ok=True)

    def finish(self, file: str, written: dict[str, Any]) -> None:
        """Note that `file` is complete and on the disk; `written` as `file_digest` gives it."""
        self.files[file] = written
        append(self._journal, {"file": file, "written": written})

    def complete(self, report: dict[str, Any]) -> None:
        """Note that every file is there and verified: all that is left to do is the rename."""
        for path in [*self.folder.rglob("*"), self.folder]:
            flush(path)
        append(self._journal, {"complete": report})
        self.report = report

    def store(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        """Keep a result that took long until the output is complete, for a run after a kill.

        Args:
            name: a plain file name without suffix.
            tensors: by any names.
            metadata: JSON-able.
        """
        path = self._stored / f"{name}.safetensors"
        planned = [Planned(key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()]
        planned.sort(key=lambda each: -each.dtype.itemsize)
        written = write_file(path, planned, lambda each: [tensors[each.target]])
        flush(path)
        flush(self._stored)
        self._results[name] = {"stored": name, "written": written, "metadata": dict(metadata or {})}
        append(self._journal, self._results[name])

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The tensors and metadata that `store` kept under `name`, checked by their hash; None where there are none."""
        entry, path = self._results.get(name), self._stored / f"{name}.safetensors"
        if entry is None or file_digest(path) != entry["written"]:
            return None
        return load_file(path), entry["metadata"]


@contextlib.contextmanager
def open_work(output: Path, identity: dict[str, Any]) -> Iterator[Work]:
    """The working folder of `output`, which becomes it when the block ends well.

    An error removes the folder; a kill or Ctrl-C leaves it, and the next run with the same `identity` goes on with it.

    Args:
        output: as `check_output` returns it.
        identity: what decides the output's bytes, JSON-able, one mapping per aspect: recipe, source, versions, ...

    Raises:
        ConversionError: another process works on `output`, or what was begun there has another identity; the disk is full or
            cannot be written.
    """
    partial = partial_folder(output)
    if partial.is_symlink():
        raise ConversionError(f"{partial} is a link; expected a folder of ours, or nothing: remove it")
    made = [str(parent) for parent in output.parents if not parent.exists()]
    with _explained(output):
        try:
            partial.mkdir(parents=True, exist_ok=True)
            lock = _acquire(partial, output)
        except OSError:
            _remove_parents(made)
            raise
        try:
            entries = _begin(partial, output, json.loads(json.dumps(identity)), made)
            try:
                if was_renamed(output):
                    yield _RenamedWork(partial, entries)
                else:
                    work = Work(partial, entries)
                    yield work
                    assert work.report is not None, "nobody said that the work is complete"
                    if output.is_dir():
                        output.rmdir()  # empty, or this fails
                    work.folder.rename(output)
                    flush(output.parent)
                _remove(
                    partial, FILES, STORED, PID, LOCK, JOURNAL
                )  # until the journal is gone, the same command finishes this
            except Exception:
                _remove(partial, FILES, STORED, PID, JOURNAL, LOCK)  # nobody else may begin while something is left
                _remove_parents(entries[0]["made"])
                raise
        finally:
            lock.release()


class _RenamedWork(Work):
    """The work of a run that was killed between the rename and the end: nothing is left to do."""

    def __init__(self, partial: Path, entries: list[dict[str, Any]]):
        self.report = entries[-1]["complete"]
        self.files = {entry["file"]: entry["written"] for entry in entries if "file" in entry}
        self.num_resumed = len(self.files)


def _begin(partial: Path, output: Path, identity: dict[str, Any], made: list[str]) -> list[dict[str, Any]]:
    """The journal's entries, those of an earlier run if it made the same."""
    entries = read_journal(partial)
    if entries and was_renamed(output) and entries[0]["identity"] != identity:
        _remove(partial, STORED, PID, LOCK, JOURNAL)
        check_output(output)  # says that it holds something else
    if entries:
        _check_identity(entries[0]["identity"], identity, partial, output)
        return entries
    _remove(partial, FILES, STORED, JOURNAL)
    append(partial / JOURNAL, {"identity": identity, "made": made})
    return read_journal(partial)


def _acquire(partial: Path, output: Path) -> FileLock:
    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError) as error:  # the latter: the other one has just finished and removes the folder
        try:
            pid = f" (process {(partial / PID).read_text().strip()})"
        except OSError:
            pid = ""
        raise ConversionError(
            f"another process{pid} is writing {output}; expected to be the only one: wait until it is done, or choose "
            "another output"
        ) from error
    (partial / PID).write_text(f"{os.getpid()}\n")
    return lock


def _check_identity(begun: dict[str, Any], identity: dict[str, Any], partial: Path, output: Path) -> None:
    """Raise unless the unfinished work is the one that was asked for; says what differs."""
    for aspect, asked in identity.items():
        found = begun.get(aspect, {})
        if found == asked:
            continue
        names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
        differences = ", ".join(f"{name} was {found.get(name)!r} and is {asked.get(name)!r}" for name in names[:3])
        begin = f"{partial} holds unfinished work on {output}"
        if aspect == "source":
            raise ConversionError(
                f"{begin}, whose source has changed since: {differences}; expected the same source: restore it to go on, or "
                "delete that folder to start anew"
            )
        raise ConversionError(
            f"{begin} that differs in its {aspect}: {differences}; expected the same: repeat the old command to go on, or "
            "delete that folder to start anew"
        )


def _remove(partial: Path, *names: str) -> None:
    """Delete what is in the working folder, in this order, and the folder itself if nothing is left."""
    for name in names:
        path = partial / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        partial.rmdir()


def _remove_parents(made: list[str]) -> None:
    for parent in made:  # the deepest first
        with contextlib.suppress(OSError):
            Path(parent).rmdir()


@contextlib.contextmanager
def _explained(output: Path) -> Iterator[None]:
    """What a disk can do wrong, as an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ConversionError(
                f"the disk of {output} is full; nothing is left of the attempt. Free some space, or choose an output on "
                "another disk, and run the same command again"
            ) from error
        if error.errno in FORBIDDEN:
            raise ConversionError(f"cannot write {output}: {error.strerror}; choose another output folder") from error
        raise

"""The command `tiedmoe`: plan, convert, verify, untie, heal, demo. Only glue: each command is a call of the Python API.

Progress and errors go to stderr; stdout holds the result and, with `--json`, one JSON object and nothing else. Exit
status: 0, 1 after a mistake of the user (one paragraph, no traceback), 2 after a flag that does not exist, 130 after
Ctrl-C.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import datasets
import transformers
import typer
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .flags import with_flags

ProgressCall = Callable[[int, int, str], None]


@dataclass(frozen=True)
class UntieConfig:
    """The arguments of `tiedmoe_conversion.untie`."""

    source: str = field(metadata={"help": "Folder or hub id of a tied checkpoint."})
    output: str = field(metadata={"help": "The folder to write; it must be new or empty."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weight file to write."})


@dataclass(frozen=True)
class VerifyConfig:
    """The arguments of `tiedmoe_conversion.verify_folder`."""

    output: str = field(metadata={"help": "Folder of a tied checkpoint."})
    source: str | None = field(
        default=None, metadata={"help": "What it was made of: a folder or hub id to compare with."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a source on the Hub."})


def main() -> None:
    """Entry point of the console script."""
    build_app()()


def build_app() -> typer.Typer:
    """The typer application; the dataclasses behind its flags, the conversion's too, are imported only here."""
    from tiedmoe_conversion import ConversionRecipe
    from tiedmoe_demo import DemoConfig

    from .training.heal import HealConfig

    app = typer.Typer(
        name="tiedmoe",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help=_HELP,
    )
    app.callback()(common_options)
    two_folders = ("source", "output")
    for command, config_class, arguments, example in (
        (plan, ConversionRecipe, two_folders, "tiedmoe plan allenai/OLMoE-1B-7B-0924 tied --method union"),
        (
            convert,
            ConversionRecipe,
            two_folders,
            "tiedmoe convert allenai/OLMoE-1B-7B-0924 tied --calibration text.txt",
        ),
        (verify, VerifyConfig, ("output",), "tiedmoe verify tied --source allenai/OLMoE-1B-7B-0924"),
        (untie, UntieConfig, two_folders, "tiedmoe untie tied untied"),
        (heal, HealConfig, ("model",), "tiedmoe heal tied --data text.txt --output healed --max-steps 500"),
        (demo, DemoConfig, (), "tiedmoe demo --output demo"),
    ):
        has_recipe = config_class is ConversionRecipe
        callback = with_flags(_Run(command, config_class), config_class, arguments, is_optional=has_recipe)
        app.command(command.__name__, help=command.__doc__, epilog=f"Example: {example}")(callback)
    return app


_HELP = "Tie the experts of a trained Mixture-of-Experts model: plan, convert, verify, heal."


def common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before the command."""
    if debug:
        os.environ["TIEDMOE_DEBUG"] = "1"


def plan(recipe, progress: ProgressCall) -> tuple[dict, Any]:
    """Print what a conversion would do, without reading a tensor.

    Parameters and bytes before and after, the groups, and the peak memory of the conversion.
    """
    from tiedmoe_conversion import make_plan, preview

    if recipe.budget is not None or recipe.max_loss is not None:
        found = preview(recipe)
        return found.summary(), str(found)
    made = make_plan(recipe)
    return made.summary(), made


def convert(recipe, progress: ProgressCall) -> tuple[dict, Any]:
    """Tie the experts of a checkpoint: groups of consecutive layers read one pool.

    SOURCE is a folder or a hub id, OUTPUT a new or empty folder, which is complete or not there.
    """
    from tiedmoe_conversion import convert

    report = convert(recipe, progress, Console(stderr=True).print)
    shown: list[Any] = [*report["notes"], f"The tied model is in {recipe.output}."]
    return report, Group(*([measurement_table(report["measured"])] if "measured" in report else []), *shown)


def verify(config: VerifyConfig, progress: ProgressCall) -> tuple[dict, Any]:
    """Check a tied checkpoint: hashes, names, shapes, finite values, a load by the Auto class; with --source its numbers too."""
    from tiedmoe_conversion import verify_folder

    progress(0, 1, "verifying")
    report = verify_folder(config.output, config.source, config.revision)
    table = Table("check", "found")
    for name, found in _flat(report):
        table.add_row(name, found)
    return report, Group(table, f"{config.output} is sound.")


def _flat(report: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested report, as text."""
    for name, value in report.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", "none" if value in ([], {}) else str(value)


def untie(config: UntieConfig, progress: ProgressCall) -> tuple[dict, Any]:
    """Write a tied checkpoint back as its family's own, which needs no tiedmoe to be loaded."""
    from tiedmoe_conversion import untie

    report = untie(config.source, config.output, max_shard_size=config.max_shard_size, progress=progress)
    return report, f"The untied model is in {config.output}."


def heal(config, progress: ProgressCall) -> tuple[dict, Any]:
    """Train a tied model for a short while, and measure held-out perplexity before and after.

    Start the same command again to continue a run that was killed. For several devices put `accelerate launch -m
    transformers_tiedmoe.cli` in the place of `tiedmoe`.
    """
    from accelerate import PartialState

    from .training.heal import heal

    report = heal(config, progress)
    gc.collect()  # DDP, which must not outlive the process group: freed last, it would wait for threads that wait for it
    PartialState().destroy_process_group()
    table = Table("held out", "loss", "perplexity")
    for when in ("before", "after"):
        table.add_row(when, f"{report[when]['loss']:.4f}", f"{report[when]['perplexity']:.2f}")
    done = f"{report['steps']} steps in {report['seconds']:.0f} s. The healed model is in {config.output}."
    return report, Group(table, done)


def demo(config, progress: ProgressCall) -> tuple[dict, Any]:
    """Run the main job on a small model: train a source, tie it, heal it, and report what it saved and what it cost."""
    from tiedmoe_demo import comparison_table, run_demo

    report = run_demo(config, progress)
    return report, Group(comparison_table(report), f"The report is in {Path(config.output) / 'report.md'}.")


def measurement_table(measured: dict) -> Table:
    """What `tiedmoe_conversion.calibration.measure` returns, for people."""
    slots, experts = measured["dead_slots"].values(), measured["dead_experts"].values()
    table = Table(f"on {measured['tokens']:,} held-out tokens", "source", "tied")
    table.add_row("loss", f"{measured['loss_before']:.4f}", f"{measured['loss_after']:.4f}")
    table.add_row("experts chosen as by the source", "", f"{measured['routing_agreement']['mean']:.1%}")
    total = sum(each["of"] for each in slots)
    table.add_row(
        "slots that no token chose", *(f"{sum(each[k] for each in slots)} of {total}" for k in ("source", "tied"))
    )
    dead = sum(each["dead"] for each in experts)
    table.add_row("pool experts that no token reached", "", f"{dead} of {sum(each['of'] for each in experts)}")
    return table


class _Run:
    """A command with its config, its progress bar and what to print where."""

    def __init__(self, command: Callable, config_class: Any):
        self.command = command
        self.config_class = config_class

    def __call__(self, given: dict, as_json: bool, recipe: Path | None) -> None:
        # Under `accelerate launch` every process runs the command, and the first one speaks.
        is_main = os.environ.get("RANK", "0") == "0"
        datasets.disable_progress_bars()  # one bar at a time: ours says what is being done
        transformers.logging.disable_progress_bar()
        # Whatever libraries print belongs to the progress, not to the result.
        with _errors_as_paragraph(), contextlib.redirect_stdout(sys.stderr), _progress_bar(is_main) as progress:
            config = self._config(given, recipe)
            result, text = self.command(config, progress)
        if as_json and is_main:
            print(json.dumps(result, indent=2))
        elif is_main:
            Console().print(text)

    def _config(self, given: dict, recipe: Path | None) -> Any:
        if recipe is not None:
            return self.config_class.from_yaml(recipe, **given)
        # A recipe says which of its fields are missing; elsewhere typer requires them.
        return getattr(self.config_class, "from_dict", lambda fields: self.config_class(**fields))(given)


@contextlib.contextmanager
def _errors_as_paragraph() -> Iterator[None]:
    """A user's mistake becomes one paragraph on stderr and exit status 1."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TIEDMOE_DEBUG"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None


@contextlib.contextmanager
def _progress_bar(is_main: bool) -> Iterator[ProgressCall]:
    """A bar on stderr that appears with the first `progress(done, total, what)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not is_main)

    def progress(done: int, total: int, what: str) -> None:
        if not bar.tasks:
            bar.add_task(what)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total, description=what)

    try:
        yield progress
    finally:
        if bar.tasks:
            bar.stop()


if __name__ == "__main__":
    main()

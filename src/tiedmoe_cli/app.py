"""The commands, each a call of the Python API, and the typer application made of them.

Progress and errors go to stderr; stdout holds the result and, with `--json`, one JSON object and nothing else. Exit
status: 0; 1 after a mistake of the user (one paragraph, no traceback); 2 after a flag that does not exist; 70 after a
bug of ours (one paragraph; the traceback with `--debug`); 130 after Ctrl-C.
"""

import contextlib
import gc
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from .flags import FileOption, with_flags
from .terminal import ProgressCall, errors_as_paragraphs, show_progress

EXAMPLE_SOURCE = "allenai/OLMoE-1B-7B-0924"


@dataclass(frozen=True)
class UntieConfig:
    """The arguments of `tiedmoe_conversion.untie`."""

    source: str = field(metadata={"help": "Folder or hub id of a tied checkpoint."})
    output: str = field(metadata={"help": "The folder to write; it must be new or empty."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weight file to write."})
    top_k: int | None = field(
        default=None, metadata={"help": "After soft routing: experts per token of the output, in every layer."}
    )
    data: str | None = field(
        default=None, metadata={"help": "After soft routing: text to measure on what a fixed top-k costs."}
    )


@dataclass(frozen=True)
class VerifyConfig:
    """The arguments of `tiedmoe_conversion.verify_folder`."""

    output: str = field(metadata={"help": "Folder of a tied checkpoint."})
    source: str | None = field(
        default=None, metadata={"help": "What it was made of: a folder or hub id to compare with."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a source on the Hub."})


@dataclass(frozen=True)
class RecipesConfig:
    """The arguments of `tiedmoe recipes`."""

    name: str | None = field(default=None, metadata={"help": "The recipe to print; without it, all are listed."})


@dataclass(frozen=True)
class Command:
    """A function of this module as a command of the shell.

    Attributes:
        run: called as `run(config, progress)`; returns the result for `--json`, and without it what to print: a text,
            something for rich, or a list of these.
        config_class: `module:class` of the dataclass that its flags are made from; imported when the command is
            called.
        example: a command line for the help.
        arguments: fields that are given by position.
        file_option: a flag that names a file of fields, read by the class's `from_yaml(file, **given)`.
        parse: `module:function` that makes the arguments of the words after the command by itself, help included.
        is_light: it needs neither torch nor transformers.
    """

    run: Callable[[Any, ProgressCall], tuple[Any, Any]]
    config_class: str
    example: str
    arguments: tuple[str, ...] = ()
    file_option: FileOption | None = None
    parse: str | None = None
    is_light: bool = False

    @property
    def name(self) -> str:
        """The command's name in the shell."""
        return self.run.__name__

    def add_to(self, app: typer.Typer, callback: Callable) -> None:
        """Register it as a command of `app` that calls `callback`."""
        app.command(self.name, help=self.run.__doc__, epilog=f"Example: {self.example}")(callback)

    def __call__(self, given: Any, as_json: bool, file: str | None) -> None:
        """Run with the fields that the user gave, and print the result."""
        # Under `accelerate launch` every process runs the command, and the first one speaks.
        is_main = os.environ.get("RANK", "0") == "0"
        # Whatever libraries print belongs to the progress, not to the result.
        with errors_as_paragraphs(), contextlib.redirect_stdout(sys.stderr), show_progress(is_main) as progress:
            if not self.is_light:
                _silence_libraries()
            result, text = self.run(self._config(given, file), progress)
        if as_json and is_main:
            print(json.dumps(result, indent=2))
        elif is_main:
            for shown in text if isinstance(text, list) else [text]:
                # A text is for copying: as it is, without markup and without being wrapped.
                print(shown) if isinstance(shown, str) else Console().print(shown)

    def _config(self, given: Any, file: str | None) -> Any:
        config_class = pkgutil.resolve_name(self.config_class)
        if isinstance(given, config_class):  # parsed already
            return given
        if file is not None:
            return config_class.from_yaml(file, **given)
        # A recipe says which of its fields are missing; elsewhere typer requires them.
        return getattr(config_class, "from_dict", lambda fields: config_class(**fields))(given)


class Commands(TyperGroup):
    """The group of all commands; a command's flags are made when it is called, as some need torch to be imported."""

    def resolve_command(self, ctx, args):
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else _with_flags(_commands()[name]), rest


def main() -> None:
    """Entry point of the console script."""
    build_app()()


def build_app() -> typer.Typer:
    """Make the typer application."""
    app = typer.Typer(name="tiedmoe", cls=Commands, no_args_is_help=True, help=_HELP, **_PLAIN)
    app.callback()(common_options)
    for command in _commands().values():
        command.add_to(app, lambda: None)  # with its flags only when it is called: see Commands
    return app


_HELP = "Tie the experts of a trained Mixture-of-Experts model: plan, convert, verify, heal, audit."
_PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


def _with_flags(command: Command) -> Any:
    """Return the click command with its flags."""
    app = typer.Typer(**_PLAIN)
    if command.parse is not None:
        app.command(
            command.name,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )(_parsed(command))
        return typer.main.get_command(app)
    config_class = pkgutil.resolve_name(command.config_class)
    command.add_to(app, with_flags(command, config_class, command.arguments, command.file_option))
    return typer.main.get_command(app)


def _parsed(command: Command) -> Callable:
    """Make the callback of a command that parses its own arguments."""

    def callback(context: typer.Context) -> None:
        words = [word for word in context.args if word != "--json"]
        with errors_as_paragraphs():
            config = pkgutil.resolve_name(command.parse or "")(words)
        command(config, "--json" in context.args, None)

    return callback


def _commands() -> dict[str, Command]:
    """Return every command by name, in the order of the help."""
    recipe = "tiedmoe_conversion.recipe:ConversionRecipe"
    recipe_option = FileOption("recipe", "A recipe that ships with the package, by name, or a YAML file with these "
                               "fields; what is given here wins.", "NAME_OR_FILE")  # fmt: skip
    two_folders = ("source", "output")
    listed = (
        Command(
            plan, "tiedmoe_conversion.plan_options:PlanOptions", f"tiedmoe plan {EXAMPLE_SOURCE} tied --method union",
            two_folders, recipe_option,
        ),
        Command(
            convert, recipe, f"tiedmoe convert {EXAMPLE_SOURCE} tied --calibration text.txt", two_folders,
            recipe_option,
        ),
        Command(
            verify, "tiedmoe_cli.app:VerifyConfig", f"tiedmoe verify tied --source {EXAMPLE_SOURCE}", ("output",)
        ),
        Command(untie, "tiedmoe_cli.app:UntieConfig", "tiedmoe untie tied untied", two_folders),
        Command(
            heal, "transformers_tiedmoe.training.arguments:TiedMoeTrainingArguments",
            "tiedmoe heal tied --data text.txt --output healed --max-steps 500",
            parse="transformers_tiedmoe.training.arguments:parse_arguments",
        ),
        Command(
            audit, "transformers_tiedmoe.audit.config:AuditConfig",
            f"tiedmoe audit {EXAMPLE_SOURCE} tied healed --data text.txt --output audit", ("models",),
        ),
        Command(
            card, "transformers_tiedmoe.cards:CardConfig", "tiedmoe card healed --audit audit --output healed",
            ("model",),
        ),
        Command(demo, "tiedmoe_demo.config:DemoConfig", "tiedmoe demo --output demo"),
        Command(
            recipes, "tiedmoe_cli.app:RecipesConfig", "tiedmoe recipes olmoe-g4-75", ("name",), is_light=True
        ),
    )  # fmt: skip
    return {command.name: command for command in listed}


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"tiedmoe {version('transformers-tiedmoe')}")
        raise typer.Exit


def common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options that stand before the command."""
    if debug:
        os.environ["TIEDMOE_DEBUG"] = "1"


def plan(options, progress: ProgressCall) -> tuple[dict, Any]:
    """Print what a conversion would do, without reading a tensor.

    Parameters and bytes before and after, the groups, and the peak memory of the conversion. With --gpus also what
    training takes on so many, before and after.
    """
    from tiedmoe_conversion import make_plan, preview
    from tiedmoe_conversion.display import show_training
    from transformers_tiedmoe.audit.scaling import predict

    if options.chooses_groups:
        found = preview(options.recipe)
        return found.summary(), str(found)
    made = make_plan(options.recipe)
    if options.gpus is None:
        return made.summary(), made
    training = {}
    for done, (name, config) in enumerate((("source", made.source.model.config), ("tied", made.config))):
        progress(done, 2, "predicting training")
        training[name] = predict(config, [options.gpus])
    return made.summary() | {"training": training}, [made, show_training(training)]


def convert(recipe, progress: ProgressCall) -> tuple[dict, Any]:
    """Tie the experts of a checkpoint: groups of consecutive layers read one pool.

    SOURCE is a folder or a hub id, OUTPUT a new or empty folder, which is complete or not there.
    """
    from tiedmoe_conversion import convert
    from tiedmoe_conversion.display import show_measured

    report = convert(recipe, progress, Console(stderr=True).print)
    kind = "softly routed" if recipe.ties_nothing else "tied"
    shown: list[Any] = [*report["notes"], f"The {kind} model is in {recipe.output}."]
    return report, [*([show_measured(report["measured"])] if "measured" in report else []), *shown]


def verify(config: VerifyConfig, progress: ProgressCall) -> tuple[dict, Any]:
    """Check a tied checkpoint: hashes, names, shapes, finite values, a load; with --source its numbers too."""
    from tiedmoe_conversion import verify_folder

    progress(0, 1, "verifying")
    report = verify_folder(config.output, config.source, config.revision)
    table = Table("check", "found")
    for name, found in _flat(report):
        table.add_row(name, found)
    return report, [table, f"{config.output} is sound."]


def _flat(report: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of a nested report: the names that lead there, and the value as text."""
    for name, value in report.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield f"{prefix}{name}", "none" if value in ([], {}) else str(value)


def untie(config: UntieConfig, progress: ProgressCall) -> tuple[dict, Any]:
    """Write a tied checkpoint back as its family's own, which needs no tiedmoe to be loaded."""
    from tiedmoe_conversion import untie
    from tiedmoe_conversion.display import show_baked

    report = untie(**vars(config), progress=progress)
    return report, [
        *([show_baked(report["baked"])] if "baked" in report else []),
        f"The untied model is in {config.output}.",
    ]


def heal(config, progress: ProgressCall) -> tuple[dict, Any]:
    """Train a tied model for a short while, and measure held-out perplexity before and after.

    Start the same command again to continue a run that was killed. For several devices put `accelerate launch -m
    transformers_tiedmoe.cli` in the place of `tiedmoe`.
    """
    from accelerate import PartialState

    from transformers_tiedmoe.training.heal import heal

    report = heal(config, progress)
    # DDP must not outlive the process group: freed last, it would wait for threads that wait for it.
    gc.collect()
    PartialState().destroy_process_group()
    table = Table("held out", "loss", "perplexity")
    for when in ("before", "after"):
        table.add_row(when, f"{report[when]['loss']:.4f}", f"{report[when]['perplexity']:.2f}")
    done = f"{report['steps']} steps in {report['seconds']:.0f} s. The healed model is in {config.output_dir}."
    shown = [table, *([_experts_used(report["active_experts"])] if report.get("active_experts") else [])]
    return report, [*shown, *(f"warning: {each}" for each in report["warnings"]), done]


def _experts_used(layers: list[dict]) -> Table:
    """Show what tokens used under soft routing, layer by layer and in all."""
    table = Table("layer", "mass k", "experts used", "p50", "p95", "p99", "MFLOPs a token", "dead")
    for each in layers:
        quantiles = (f"{each[name]:.0f}" for name in ("p50", "p95", "p99"))
        row = (str(each["layer"]), f"{each['k']:.2f}", f"{each['mean']:.2f}", *quantiles)
        table.add_row(*row, f"{each['flops'] / 1e6:.4g}", str(each["dead"]))
    total = {name: sum(each[name] for each in layers) for name in ("k", "mean", "flops", "dead")}
    row = ("all", f"{total['k']:.2f}", f"{total['mean']:.2f}", "", "", "")
    table.add_row(*row, f"{total['flops'] / 1e6:.4g}", str(total["dead"]))
    return table


def audit(config, progress: ProgressCall) -> tuple[dict, Any]:
    """Say where the compute, memory and quality of models go: any transformers MoE, tied or not, or several.

    MODELS are folders or hub ids. OUTPUT gets report.html, report.md, audit.json and the figures. A killed audit goes
    on with the same command.
    """
    from tiedmoe_conversion.suggested import tied_by
    from transformers_tiedmoe.audit.report import terminal
    from transformers_tiedmoe.audit.run import audit
    from transformers_tiedmoe.audit.schema import Audit

    found = audit(config, progress, tied_by)
    where = [f"The report is {Path(config.output) / 'report.html'}."] if config.output else []
    return found, [*terminal(Audit.model_validate(found)), *where]


def card(config, progress: ProgressCall) -> tuple[dict, Any]:
    """Render the model card of any saved model, with what an audit found: print it, or write it with --output.

    Upload the folder with `hf upload ACCOUNT/MODEL FOLDER`.
    """
    from transformers_tiedmoe.cards import write_card

    written = write_card(config)
    return written, f"The card is in {Path(config.output) / 'README.md'}." if written["files"] else written["card"]


def demo(config, progress: ProgressCall) -> tuple[dict, Any]:
    """Run the main job on a small model: train a source, tie it, heal it, and report what it saved and cost."""
    from tiedmoe_demo import comparison_table, run_demo

    report = run_demo(config, progress)
    folder = Path(config.output)
    reports = f"The report is in {folder / 'report.md'}, the audit in {folder / 'audit' / 'report.html'}."
    return report, [comparison_table(report), reports]


def recipes(config: RecipesConfig, progress: ProgressCall) -> tuple[Any, Any]:
    """List the recipes that ship with the package, for `convert --recipe NAME`; with NAME, print one."""
    from tiedmoe_conversion.recipes import read_recipe, shipped_recipes

    if config.name is not None:
        text = read_recipe(config.name)
        return {"name": config.name, "recipe": text}, text.strip()
    listed = shipped_recipes()
    widths = [max(len(each[key]) for each in listed) for key in ("name", "method")]
    lines = (
        f"{each['name']:{widths[0]}}  {each['method']:{widths[1]}}  {each['parameters']}\n    {each['summary']}"
        for each in listed
    )
    return listed, "\n".join(lines)


def _silence_libraries() -> None:
    """Switch the bars of datasets and transformers off: one bar at a time, and ours says what is being done."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()

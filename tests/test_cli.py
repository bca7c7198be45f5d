import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from checkpoints import make_text, save_source, save_tied
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tiedmoe_conversion
from tiedmoe_cli import app as cli
from tiedmoe_cli import terminal
from tiedmoe_cli.flags import FileOption, with_flags
from tiedmoe_conversion import ConversionRecipe
from tiedmoe_conversion.plan_options import PlanOptions
from tiedmoe_demo import DemoConfig
from transformers_tiedmoe.audit.config import AuditConfig
from transformers_tiedmoe.cards import CardConfig
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments

RECIPES = Path(tiedmoe_conversion.__file__).parent / "recipes"
COMMANDS = {
    "plan": PlanOptions,
    "convert": ConversionRecipe,
    "verify": cli.VerifyConfig,
    "untie": cli.UntieConfig,
    "heal": TiedMoeTrainingArguments,
    "audit": AuditConfig,
    "card": CardConfig,
    "demo": DemoConfig,
    "recipes": cli.RecipesConfig,
}


@pytest.fixture(scope="module")
def app():
    return cli.build_app()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_tied(tmp_path_factory.mktemp("tied"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text())
    return str(path)


@pytest.fixture
def tiedmoe(app):
    """Run a command in this process; returns the result, whose stdout and stderr are apart."""

    def invoke(*arguments, status=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
        return result

    return invoke


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_field_of_the_dataclass_and_an_example(command, tiedmoe):
    out = " ".join(tiedmoe(command, "--help").stdout.split())
    assert f"Example: tiedmoe {command}" in out
    every = " ".join(tiedmoe(command, "--help-all").stdout.split()) if command == "heal" else out
    bases = [
        base for base in COMMANDS[command].__mro__ if base.__module__.startswith(("tiedmoe", "transformers_tied"))
    ]
    own = {name for base in bases for name in vars(base).get("__annotations__", ())}
    for each in dataclasses.fields(COMMANDS[command]):
        if each.name not in own:  # Trainer's own
            assert f"--{each.name} " in every or f"--{each.name}," in every, each.name
            continue
        assert f"--{each.name.replace('_', '-')}" in out or each.name.upper() in out, each.name
        assert each.metadata["help"].split()[0] in out
    assert "--json" in out


def test_help_lists_the_commands_that_there_are(tiedmoe):
    lines = tiedmoe("--help").stdout.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == list(COMMANDS)
    assert "tiedmoe " + metadata.version("transformers-tiedmoe") == tiedmoe("--version").stdout.strip()


@pytest.mark.parametrize("arguments", ["--help", "--version", "recipes", "recipes olmoe-g4-75", "plan --help",
                                       "convert --help", "verify --help", "untie --help", "demo --help"])  # fmt: skip
def test_help_needs_neither_torch_nor_transformers(arguments):
    """What takes seconds to import is imported when a command works."""
    code = (
        "import sys, tiedmoe_cli\n"
        "try: tiedmoe_cli.build_app()(sys.argv[1:])\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == "[]\n"


ROOT = Path(__file__).parents[1]


def documented_commands():
    """The commands of the code blocks of README and docs, and of the help's examples, as arguments."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    texts += [command.epilog.removeprefix("Example: ") for command in cli.build_app().registered_commands]
    lines = "\n".join(texts).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tiedmoe ")]


@pytest.mark.parametrize("arguments", documented_commands(), ids=" ".join)
def test_documented_commands_are_valid(arguments, monkeypatch):
    """Every flag exists and every recipe is one; what the commands do with them is for other tests."""
    seen = []
    for name, config_class in COMMANDS.items():

        def command(config, progress, config_class=config_class):
            """Only look."""
            assert isinstance(config, config_class)
            seen.append(config)
            return {}, ""

        command.__name__ = name
        monkeypatch.setattr(cli, name, command)
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert len(seen) == 1


def test_audit_takes_several_models_and_texts(monkeypatch, tiedmoe):
    seen = []

    def audit(config, progress):
        """Only look."""
        seen.append(config)
        return {}, ""

    monkeypatch.setattr(cli, "audit", audit)
    tiedmoe("audit", "a", "b", "--data", "x.txt,code=y.jsonl", "--data", "org/set:part", "--output", "out")
    assert seen[0].models == ["a", "b"]
    assert seen[0].texts == {"x": "x.txt", "code": "y.jsonl", "set": "org/set:part"}


def test_audit_of_memory_alone_prints_json_or_a_summary(source, tied, tiedmoe):
    found = json.loads(tiedmoe("audit", source, tied, "--memory-only", "--json").stdout)
    assert [each["memory"]["parameters"]["total"]["unique"] > 0 for each in found["models"]] == [True, True]
    out = tiedmoe("audit", source, "--memory-only").stdout
    assert Path(source).name in out


def test_plan_prints_and_writes_nothing(source, tmp_path, tiedmoe):
    output = tmp_path / "tied"
    result = tiedmoe("plan", source, output, "--skip-first", 1, "--skip-last", 1, "--method", "average")
    assert "layers that keep their own experts: 0, 3" in result.stdout
    assert not output.exists()


def test_plan_for_gpus_predicts_source_and_tied(source, tmp_path, tiedmoe):
    options = ("--groups", "[[1, 2]]", "--method", "average", "--gpus", 4)
    found = json.loads(tiedmoe("plan", source, tmp_path / "tied", *options, "--json").stdout)["training"]
    sent = {name: {row["name"]: row["communicated_bytes"] for row in rows} for name, rows in found.items()}
    assert sent["source"].keys() == sent["tied"].keys() == {"DDP", "FSDP2", "FSDP2 + EP 4"}
    assert sent["tied"]["FSDP2"] < sent["source"]["FSDP2"]
    assert sent["tied"]["FSDP2 + EP 4"] == sent["source"]["FSDP2 + EP 4"]  # of which experts have no part
    error = tiedmoe(
        "plan", source, tmp_path / "x", "--budget", 0.9, "--calibration", "x", "--gpus", 4, status=1
    ).stderr
    assert "gpus=4 is given beside budget or max_loss" in " ".join(error.split())


def test_convert_and_untie_give_what_auto_classes_load(source, tmp_path, tiedmoe):
    tied, untied = tmp_path / "tied", tmp_path / "untied"
    result = tiedmoe("convert", source, tied, "--groups", "[[1, 2]]", "--method", "union", "--json")
    report = json.loads(result.stdout)
    assert report["groups"] == [[1, 2]]
    assert report["method"] == "union"
    json.loads(tiedmoe("untie", tied, untied, "--json").stdout)
    ids = torch.arange(8).view(1, -1)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (source, tied, untied)]
    assert [model.config.model_type for model in models] == ["olmoe", "tiedmoe", "olmoe"]
    with torch.no_grad():
        expected, *found = [model(ids).logits for model in models]
    assert all(torch.equal(logits, expected) for logits in found)


def test_verify_compares_with_the_source(source, tmp_path, tiedmoe):
    tiedmoe("convert", source, tmp_path / "tied", "--groups", "[[1, 2]]", "--method", "average")
    report = json.loads(tiedmoe("verify", tmp_path / "tied", "--source", source, "--json").stdout)
    assert report["source"]["changed_tensors"] == []
    assert "is sound" in " ".join(tiedmoe("verify", tmp_path / "tied").stdout.split())
    weights = tmp_path / "tied" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    error = tiedmoe("verify", tmp_path / "tied", status=1).stderr
    assert "model.safetensors is" in error
    assert "convert it again" in " ".join(error.split())


def test_paths_are_printed_as_they_are(source, tmp_path, tiedmoe):
    """Neither wrapped at 80 columns nor read as rich's markup."""
    output = tmp_path / ("[red]a b" * 20)
    arguments = ("--groups", "[[1, 2]]", "--method", "average", "--max-shard-size", "1MB")
    out = tiedmoe("convert", source, output, *arguments).stdout
    assert out.splitlines()[-1] == f"The tied model is in {output}."
    assert tiedmoe("verify", output).stdout.splitlines()[-1] == f"{output} is sound."


CALIBRATION = ("--calibration-tokens", 128, "--calibration-block-size", 16)


def test_convert_by_budget_prints_the_curve_and_what_it_cost(source, text, tmp_path, tiedmoe):
    options = ("--skip-first", 0, "--skip-last", 0, "--method", "select", "--calibration", text, *CALIBRATION)
    result = tiedmoe("convert", source, tmp_path / "tied", "--budget", 0.92, *options)
    assert "loss added on held-out text" in result.stderr
    assert "slots that no token chose" in result.stdout
    result = tiedmoe("convert", source, tmp_path / "again", "--budget", 0.92, *options, "--json")
    report = json.loads(result.stdout)
    assert report["choice"]["curve"][report["choice"]["chosen"]]["fraction"] <= 0.92
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "text.txt", "tied"]


def test_plan_of_a_budget_says_what_is_possible(source, text, tmp_path, tiedmoe):
    options = ("--skip-first", 0, "--skip-last", 0, "--method", "select", "--calibration", text)
    found = json.loads(tiedmoe("plan", source, tmp_path / "tied", "--budget", 0.92, *options, "--json").stdout)
    assert found["candidates"] == 3
    error = tiedmoe("plan", source, tmp_path / "tied", "--budget", 0.2, *options, status=1).stderr
    nearest = float(" ".join(error.split()).split("the nearest that can is ")[1].split(",")[0])
    assert found["least_fraction"] <= nearest < found["least_fraction"] + 1e-3


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        (["--pool-experts", "1.5x"], {"pool_experts": "1.5x"}),
        (["--pool-experts", "6"], {"pool_experts": 6}),
        (["--pool-experts", "[6, 7]"], {"pool_experts": (6, 7)}),
        (["--then", "prefit"], {"then": ({"prefit": {}},)}),
        (
            ["--then", "[{prefit: {steps: 3}}, least_squares]"],
            {"then": ({"prefit": {"steps": 3}}, {"least_squares": {}})},
        ),
        (["--residual-rank", "8"], {"residual_rank": 8}),
    ],
)
def test_chains_and_pool_sizes_on_the_command_line(flags, fields, monkeypatch):
    seen = []

    def convert(recipe, progress):
        """Only look."""
        seen.append(recipe)
        return {}, ""

    monkeypatch.setattr(cli, "convert", convert)
    app = cli.build_app()
    arguments = ["convert", "in", "out", "--method", "prototype", "--calibration", "austen", *flags]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name, value in fields.items():
        assert getattr(seen[0], name) == value


def test_recipe_file_gives_the_fields_and_flags_override_it(source, tmp_path, tiedmoe):
    recipe = tmp_path / "recipe.yaml"
    ConversionRecipe(source=source, output="elsewhere", skip_first=1, skip_last=0, method="select").to_yaml(recipe)
    summary = json.loads(tiedmoe("plan", "--recipe", recipe, "--json").stdout)
    assert summary["groups"] == [[1, 2], [3]]
    assert (summary["method"], summary["output"]) == ("select", "elsewhere")
    # 2 is the default of --skip-last and 1 is not: what counts is that they were given
    summary = json.loads(tiedmoe("plan", source, "here", "--recipe", recipe, "--skip-last", "2", "--json").stdout)
    assert summary["groups"] == [[1]]
    assert (summary["method"], summary["output"]) == ("select", "here")


def test_method_options_are_yaml(source, tmp_path, tiedmoe):
    arguments = ["plan", source, "out", "--skip-first", 1, "--skip-last", 1, "--method", "select", "--method-options"]
    assert json.loads(tiedmoe(*arguments, "layer: last", "--json").stdout)["method_options"] == {"layer": "last"}
    assert json.loads(tiedmoe(*arguments, '{"layer": 1}', "--json").stdout)["method_options"] == {"layer": 1}
    assert "is no YAML" in tiedmoe(*arguments, "{layer", status=2).stderr


def test_heal_prints_json_and_nothing_else_on_stdout(tied, text, tmp_path, tiedmoe):
    output = tmp_path / "healed"
    arguments = [
        "heal",
        tied,
        "--data",
        text,
        "--output",
        output,
        "--max-steps",
        3,
        "--block-size",
        16,
        "--eval-steps",
        2,
    ]
    result = tiedmoe(*arguments, "--json")
    report = json.loads(result.stdout)
    assert report["steps"] == 3
    assert report == json.loads((output / "heal.json").read_text())
    assert report["config"]["lora"] is False
    assert "evaluating" in result.stderr
    assert "error: output" in tiedmoe(*arguments, status=1).stderr
    table = tiedmoe(*arguments, "--overwrite", "--lora").stdout
    assert "before" in table
    assert f"{report['before']['perplexity']:.2f}" in table


def test_heal_that_ends_worse_than_it_began_is_an_error(tied, text, tmp_path, tiedmoe):
    output = tmp_path / "healed"
    arguments = ["heal", tied, "--data", text, "--output", output, "--max-steps", 2, "--block-size", 16]
    arguments += ["--learning-rate", 30, "--overwrite"]
    error = " ".join(tiedmoe(*arguments, status=1).stderr.split())
    assert "error: the model is worse than before: its held-out loss was 5.7664 and is" in error
    assert json.loads((output / "heal.json").read_text())["is_worse"]
    shown = " ".join(tiedmoe(*arguments, "--allow-worse").stdout.split())
    assert "warning: the model is worse than before" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "error: the recipe has no source and no output"),
        (["convert", "no-such-folder/x/y", "out", "--method", "average"], "error: no-such-folder/x/y does not exist"),
        (["convert", "{source}", "out"], "error: method 'least_squares' needs calibration text"),
        (["plan", "{source}", "out", "--group-size", "0"], "error: group_size=0"),
        (["plan", "--recipe", "nothing.yaml"], "error: cannot read the recipe nothing.yaml"),
        (["untie", "{source}", "out"], "error: "),
        (["heal", "{source}", "--data", "nothing.txt", "--output", "out"], "error: no file or folder nothing.txt"),
        (["heal", "{source}", "--data", "x", "--output", "out", "--max-steps", "0"], "error: max_steps=0"),
        (["heal", "no/such/model", "--data", "x", "--output", "out"], "error: "),
        (["demo", "--output", "{source}"], "error: {source} holds something that is not a demo"),
    ],
)
def test_a_mistake_is_one_paragraph_and_status_1(arguments, message, source, tmp_path, monkeypatch, tiedmoe):
    monkeypatch.chdir(tmp_path)
    result = tiedmoe(*[argument.replace("{source}", source) for argument in arguments], status=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(message.replace("{source}", source))
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGE = {
    "weights": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tok*")],
    "type": lambda folder: write_config(folder, num_hidden_layers="four"),
    "top-k": lambda folder: write_config(folder, num_experts_per_tok=99),
    "width": lambda folder: write_config(folder, hidden_size=20),
    "code": lambda folder: write_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"}),
    "no config": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_no_bug_of_ours(damage, source, tied, text, tmp_path, tiedmoe, monkeypatch):
    """And nobody is asked whether its code may be run."""
    folders = [shutil.copytree(folder, tmp_path / name) for name, folder in (("source", source), ("tied", tied))]
    for folder in folders:
        DAMAGE[damage](folder)
    monkeypatch.setattr("builtins.input", None)
    untied, bad = folders
    heal = ("--data", text, "--output", tmp_path / "healed", "--block-size", 16, "--max-steps", 1)
    commands = [("heal", bad, *heal)]
    if damage in ("weights", "tokenizer"):
        commands.append(("heal", tied, *heal, "--teacher", untied))
    if "tokenizer" not in damage:
        commands.append(("plan", untied, tmp_path / "out", "--method", "average", "--skip-first", 1, "--skip-last", 1))
    for command in commands:
        (line,) = [line for line in tiedmoe(*command, status=1).stderr.splitlines() if line.startswith("error: ")]
        assert any(str(path) in line or path.name in line for path in folders) or "pool 0 has 4 experts" in line, line
        assert not (tmp_path / "healed" / "config.json").exists()


@pytest.mark.parametrize("is_debug", [False, True])
def test_a_bug_says_that_it_is_one_and_has_a_status_of_its_own(is_debug, source, monkeypatch, app):
    def plan(recipe, progress):
        raise RuntimeError("the size of tensor a\nmust match")

    monkeypatch.setattr(cli, "plan", plan)
    monkeypatch.setenv("TIEDMOE_DEBUG", "1" if is_debug else "0")
    result = CliRunner().invoke(app, ["plan", source, "out", "--method", "union"])
    if is_debug:
        assert isinstance(result.exception, RuntimeError)
        return
    assert result.exit_code == 70
    (line,) = result.stderr.splitlines()
    assert "a bug in tiedmoe" in line
    assert "RuntimeError: the size of tensor a must match" in line
    assert "tiedmoe --debug" in line


def test_too_little_memory_is_no_bug(source, monkeypatch, tiedmoe):
    def plan(recipe, progress):
        raise MemoryError

    monkeypatch.setattr(cli, "plan", plan)
    assert "memory of this machine" in tiedmoe("plan", source, "out", "--method", "union", status=1).stderr


BOMB = "[" + ", ".join(["&a [1, 1]", *(f"&{b} [{f'*{a}, ' * 9}]" for a, b in zip("abcdefgh", "bcdefghi"))]) + "]"


@pytest.mark.parametrize("flag", ["--groups", "--method-options", "--pool-experts", "--then"])
@pytest.mark.parametrize(("value", "message"), [(BOMB, "alias"), ("[" * 3000, "nests more than 32 deep")])
def test_yaml_of_a_flag_is_bounded(flag, value, message, source, tiedmoe):
    start = time.monotonic()
    error = tiedmoe("plan", source, "out", flag, value, status=2).stderr
    assert message in " ".join(error.replace("│", " ").split())
    assert time.monotonic() - start < 5


def test_progress_off_a_terminal_is_a_line_a_stage_and_one_after_a_while(capsys):
    with terminal._lines(seconds=0.05) as progress:
        for done in range(50):
            progress(done, 100, f"healing, loss {done}")
        time.sleep(0.3)
        progress(1, 1, "evaluating")
    lines = [line.split(" s ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "  0%  healing, loss 0"
    repeated = lines[1:-2]
    assert set(repeated) == {" 49%  healing, loss 49"}
    assert 2 <= len(repeated) <= 8
    assert lines[-2:] == ["100%  evaluating", "100%  done"]


def test_progress_on_a_terminal_ends_at_100_percent():
    def shown_last(error=None):
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        with contextlib.suppress(KeyboardInterrupt), terminal._bar(console) as progress:
            progress(1, 4, "working")
            if error:
                raise error
        return re.findall(r"\d+%", console.file.getvalue())[-1]

    assert shown_last() == "100%"
    assert shown_last(KeyboardInterrupt()) == "25%"


def test_shipped_recipes_are_listed_and_given_by_name(tmp_path, tiedmoe, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = json.loads(tiedmoe("recipes", "--json").stdout)
    assert [each["name"] for each in listed] == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    shown = tiedmoe("recipes").stdout
    for each in listed:
        assert each["name"] in shown
        assert all(each[key] for key in ("method", "parameters", "summary"))
    fields = yaml.safe_load(tiedmoe("recipes", "olmoe-g4-select").stdout)
    assert (fields["method"], fields["method_options"], fields["group_size"]) == ("select", {"layer": "last"}, 4)
    assert "did you mean 'olmoe-g4-select'?" in tiedmoe("recipes", "olmoe-g4-selct", status=1).stderr
    (tmp_path / "olmoe-g4-select").mkdir()  # a folder of that name is no file of fields
    options = ("--recipe", "olmoe-g4-select", "--skip-first", 0, "--skip-last", 0, "--json")
    summary = json.loads(tiedmoe("plan", source, "here", *options).stdout)
    assert (summary["groups"], summary["method"], summary["output"]) == ([[0, 1, 2, 3]], "select", "here")
    error = tiedmoe("plan", source, "here", "--recipe", "olmoe-g4-selct", status=1).stderr
    assert "did you mean 'olmoe-g4-select'?" in error


def test_debug_shows_the_traceback(source, app, monkeypatch):
    monkeypatch.setenv("TIEDMOE_DEBUG", "")  # restored after the test
    result = CliRunner().invoke(app, ["--debug", "plan", source, "out", "--group-size", "0"])
    assert isinstance(result.exception, ValueError)


def test_a_flag_that_does_not_exist_is_status_2(tiedmoe):
    assert "No such option" in tiedmoe("convert", "m", "--dato", "x", status=2).stderr
    error = tiedmoe("heal", "m", "--dato", "x", status=2).stderr
    assert "no such flag or argument: --dato; did you mean --data?" in error


def test_heal_takes_every_flag_of_trainer_and_a_config_whose_fields_the_command_line_replaces(
    tied, text, tmp_path, tiedmoe
):
    config = tmp_path / "heal.yaml"
    config.write_text(
        "output: nowhere\nbatch-size: 2\nlearning_rate: 1e-2\nmax_steps: 9\noptim: adagrad\nblock_size: 16\n"
        "lr_scheduler_type: constant\n"
    )
    flags = [
        "--data",
        text,
        "--output_dir",
        tmp_path / "healed",
        "--config",
        config,
        "--max-steps",
        2,
        "--adam-beta2",
        0.9,
    ]
    report = json.loads(tiedmoe("heal", tied, *flags, "--logging_steps", 1, "--json").stdout)
    assert report["steps"] == 2
    assert report["tokens"] == 2 * 2 * 16
    assert report["config"]["optim"] == "adagrad"
    assert (report["config"]["adam_beta2"], report["config"]["learning_rate"]) == (0.9, 0.01)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deepspeed", "x.json"], "deepspeed='x.json' is not supported by healing: with ZeRO-1"),
        (["--fsdp", "full_shard"], "healing was told to use FSDP in one process; start several by `accelerate launch"),
        (["--push_to_hub"], "push_to_hub=True is not supported by healing: upload the finished folder"),
        (["--lr_scheduler_type", "square"], "transformers' TrainingArguments refuse this: square is not a valid"),
        (["--num_train_epochs", "2"], "healing counts steps, not epochs"),
        (["--batch-size", "2", "--per_device_train_batch_size", "4"], "per_device_train_batch_size is given twice"),
        (["--config", "{bomb}"], "it uses the alias"),
        (["--config", "{list}"], "holds a list; expected lines such as 'learning_rate: 1e-4'"),
        (["--config", "{typo}"], "healing has no argument 'learnin_rate'; did you mean learning_rate?"),
        (["--config", "{word}"], "learning_rate='fast'; expected a number"),
    ],
)
def test_heal_refuses_arguments_that_it_cannot_follow(arguments, message, tied, text, tmp_path, tiedmoe):
    files = {
        "bomb": "a: &a [1, 1]\nb: [*a, *a]\n",
        "list": "- 1\n",
        "typo": "learnin_rate: 1\n",
        "word": "learning_rate: fast\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    arguments = [each.format(**{name: tmp_path / name for name in files}) for each in arguments]
    result = tiedmoe("heal", tied, "--data", text, "--output", tmp_path / "healed", *arguments, status=1)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "healed").exists()


def test_a_missing_optional_package_is_no_traceback(tied, text, tmp_path, tiedmoe, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result = tiedmoe(
        "heal", tied, "--data", text, "--output", tmp_path / "o", "--block-size", "16", "--lora", status=1
    )
    assert "error: LoRA needs peft, which is not installed; pip install 'transformers-tiedmoe[peft]'" in result.stderr


def run_flags(config_class, *arguments, **options):
    """What `with_flags` hands over for these arguments."""
    calls = []
    app = typer.Typer()
    app.command()(with_flags(lambda *call: calls.append(call), config_class, **options))
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return calls[0]


@dataclass
class Example:
    name: str
    count: int = 3
    share: float | None = None
    use: bool = True
    maybe: bool | None = None
    layers: Sequence[int] | None = None
    lists: list[list[int]] = field(default_factory=list)
    table: Mapping[str, Any] = field(default_factory=dict)


def test_with_flags_hands_over_what_was_given_with_its_type():
    assert run_flags(Example, "x", arguments=("name",)) == ({"name": "x"}, False, None)
    given, as_json, _ = run_flags(
        Example,
        *["--name", "y", "--count", "3", "--share", "1e-3", "--no-use", "--no-maybe", "--layers", "0,2"],
        *["--lists", "[[0, 1], [2]]", "--table", "a: 1", "--json"],
        arguments=(),
    )
    assert given == {
        "name": "y",
        "count": 3,  # the default, but given
        "share": 0.001,
        "use": False,
        "maybe": False,
        "layers": [0, 2],
        "lists": [[0, 1], [2]],
        "table": {"a": 1},
    }
    assert as_json


def test_with_flags_requires_nothing_where_a_recipe_may_give_it(tmp_path):
    recipe = FileOption("recipe", "a file")
    assert run_flags(Example, arguments=("name",), file_option=recipe) == ({}, False, None)
    assert run_flags(Example, "--recipe", "a.yaml", arguments=(), file_option=recipe)[2] == "a.yaml"


def test_with_flags_expands_the_home_folder(monkeypatch):
    """`--name ~/x` is the shell's to expand, `--name=~/x` and a quoted one are ours."""
    monkeypatch.setenv("HOME", "/me")
    given, _, file = run_flags(Example, "--name=~/x", "--recipe=~/r.yaml", file_option=FileOption("recipe", "a file"))
    assert (given, file) == ({"name": "/me/x"}, "/me/r.yaml")
    assert run_flags(Example, "a~b", arguments=("name",))[0] == {"name": "a~b"}


def test_main_speaks_through_the_streams_and_the_status_of_the_process(source, tmp_path, monkeypatch, capfd):
    """Not typer's test runner: what libraries write to the file descriptors is caught, too."""
    command = [
        "tiedmoe",
        "convert",
        source,
        str(tmp_path / "tied"),
        "--skip-first",
        "1",
        "--skip-last",
        "1",
        "--json",
        "--method",
        "average",
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    streams = capfd.readouterr()
    assert exit.value.code == 0, streams.err
    assert json.loads(streams.out)["groups"] == [[1, 2]]
    assert "verifying" in streams.err
    with pytest.raises(SystemExit) as exit:
        cli.main()
    streams = capfd.readouterr()
    assert exit.value.code == 1
    assert streams.out == ""
    assert streams.err.startswith("error: output folder")
    assert streams.err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_130(tied, text, tmp_path):
    output = tmp_path / "healed"
    command = [sys.executable, "-m", "transformers_tiedmoe.cli", "heal", tied, "--data", text, "--output", output]
    process = subprocess.Popen(
        [*command, "--block-size", "16", "--max-steps", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        # Where these tests run in a shell's background, SIGINT is ignored, and so it would be by the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / ".healed.partial" / "scratch" / "checkpoints").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted" in stderr

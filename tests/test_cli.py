"""The commands of `tiedmoe`: their help, what they print and write."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from command_line import app_fixture, source_fixture, text_fixture, tied_fixture, tiedmoe_fixture  # noqa: F401
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tiedmoe_conversion
from tiedmoe_cli import app as cli
from tiedmoe_cli import terminal
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
    table = tiedmoe(*arguments, "--overwrite", "--lora", "--lora-rank", "2").stdout
    assert "before" in table
    assert f"{report['before']['perplexity']:.2f}" in table


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

"""What `tiedmoe` says where a user is wrong, a checkpoint is damaged, or we are: one paragraph and a status."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import app_fixture, source_fixture, text_fixture, tied_fixture, tiedmoe_fixture  # noqa: F401
from typer.testing import CliRunner

from tiedmoe_cli import app as cli


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


def test_debug_shows_the_traceback(source, app, monkeypatch):
    monkeypatch.setenv("TIEDMOE_DEBUG", "")  # restored after the test
    result = CliRunner().invoke(app, ["--debug", "plan", source, "out", "--group-size", "0"])
    assert isinstance(result.exception, ValueError)


def test_a_flag_that_does_not_exist_is_status_2(tiedmoe):
    assert "No such option" in tiedmoe("convert", "m", "--dato", "x", status=2).stderr
    error = tiedmoe("heal", "m", "--dato", "x", status=2).stderr
    assert "no such flag or argument: --dato; did you mean --data?" in error


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

"""Each example runs as its docstring says, at tiny size."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_source, save_tied
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.heal import HealConfig, heal

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO_PROCESSES = ["--config_file", str(EXAMPLES / "accelerate/ddp.yaml"), "--num_processes", "2"]
ONE_PROCESS = ["--config_file", str(EXAMPLES / "accelerate/one_gpu.yaml"), "--mixed_precision", "no"]
TWO_PROCESSES += ["--mixed_precision", "no", "--main_process_port", "0"]


one_after_the_other = pytest.mark.xdist_group("two_processes")  # each takes the cores of both workers


def run(*command, cwd):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def perplexities(output):
    return [float(number) for number in re.search(r"perplexity ([\d.]+) -> ([\d.]+)", output).groups()]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text())
    return path


def test_convert_and_heal(tmp_path, text, monkeypatch, capsys):
    source = save_source(tmp_path / "source", num_hidden_layers=6)
    options = ["--max-steps", "4", "--block-size", "16", "--calibration-tokens", "128"]
    monkeypatch.setattr(sys, "argv", ["convert_and_heal.py", source, str(text), str(tmp_path / "work"), *options])
    runpy.run_path(EXAMPLES / "convert_and_heal.py", run_name="__main__")
    out, progress = capsys.readouterr()
    assert "writing, " in progress
    assert "healing" in progress
    assert "100%  done" in progress
    assert "layers that keep their own experts: 0, 1, 4, 5" in out
    before, after = perplexities(out)
    assert before != after
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "work/healed").config.groups == [[2, 3]]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_begin_with_their_commands(path):
    """And every option of theirs is one; the tests here run them."""
    lines = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].splitlines()
    commands = [
        re.fullmatch(r"(?:\w+=\w+ )?(?:python|accelerate launch [-\w ]+) examples/([\w.]+) (.*)", line)
        for line in lines
    ]
    assert all(command and command[1] == path.name for command in commands), lines
    parsed = re.findall(r'add_argument\("([\w-]+)"', path.read_text())
    for command in commands:
        positional = command[2].split(" --")[0].split()
        assert len(positional) == sum(not name.startswith("-") for name in parsed)
        assert set(re.findall(r"--[\w-]+", command[2])) <= set(parsed)


def test_lora_of_the_documentation_is_loaded_by_auto_peft(tmp_path):
    """docs/training.md, its code as it stands there."""
    peft = pytest.importorskip("peft")
    (code,) = re.findall(r"```python\n(.*?LoraConfig.*?)```", (EXAMPLES.parent / "docs/training.md").read_text(), re.S)
    variables = {"model": AutoModelForCausalLM.from_pretrained(save_tied(tmp_path / "tied"))}
    exec(code, variables)
    model = variables["model"].eval()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in ("expert_pools.0", "q_proj"):
        assert any(part in name for name in names), names
    torch.manual_seed(1)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).view(1, -1)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, logits)
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, logits)


@pytest.mark.slow
@one_after_the_other
def test_heal_accelerate_on_two_processes_does_what_heal_does(tmp_path, text):
    """Two processes at batch 2 against `heal` in one: the same held-out perplexity before, and both learn."""
    tied = save_tied(tmp_path / "tied")
    options = ["--max-steps", "12", "--block-size", "16", "--batch-size", "2", "--learning-rate", "1e-2"]
    script = [EXAMPLES / "heal_accelerate.py", tied, text, tmp_path / "healed"]
    before, after = perplexities(run(*ACCELERATE, *TWO_PROCESSES, *script, *options, cwd=tmp_path).stdout)
    config = HealConfig(
        tied, str(text), str(tmp_path / "other"), max_steps=12, block_size=16, batch_size=4, learning_rate=1e-2
    )
    report = heal(config)
    assert before == pytest.approx(report["before"]["perplexity"], abs=0.01)
    assert after < 0.8 * before
    assert after == pytest.approx(report["after"]["perplexity"], rel=0.1)  # other order of the blocks
    _, validation = load_blocks(text, make_tokenizer(), block_size=16)
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert perplexity(healed, validation)["perplexity"] == pytest.approx(after, abs=0.01)


@pytest.mark.slow
@one_after_the_other
def test_heal_on_two_processes_under_accelerate_launch(tmp_path):
    """The committed configs: two processes at batch 2 (ddp.yaml) train as one at batch 4 (one_gpu.yaml), to rounding.

    There are four blocks to train on, so that every step sees them all in whatever order, and one held out, which two
    processes must not count twice.
    """
    tied, text = save_tied(tmp_path / "tied"), tmp_path / "text.txt"
    text.write_text(make_text(num_lines=8))
    options = {"block_size": len(make_tokenizer()(text.read_text())["input_ids"]) // 5, "max_steps": 4}
    options |= {"learning_rate": 1e-2, "validation_fraction": 0.2}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = ["-m", "transformers_tiedmoe.cli", "heal", tied, "--data", text, "--json", *flags]
    launched = [*ACCELERATE, *TWO_PROCESSES, *command, "--batch-size", "2", "--output", "two"]
    two = json.loads(run(*launched, cwd=tmp_path).stdout)
    launched = [*ACCELERATE, *ONE_PROCESS, *command, "--batch-size", "4", "--output", "one"]
    one = json.loads(run(*launched, cwd=tmp_path).stdout)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert two["tokens"] == one["tokens"]
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-4)
    losses = [[entry["loss"] for entry in each["history"] if "loss" in entry] for each in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert one["after"]["loss"] < one["before"]["loss"] - 0.1


@pytest.mark.slow
@one_after_the_other
def test_pretrain_goes_on_as_if_it_had_not_been_killed_and_on_two_processes_as_on_one(
    tmp_path, text, monkeypatch, capsys
):
    """Four steps; the last two again from the checkpoint of the second; all in two processes of half the batch."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 6, "num_experts": 4, "head_dim": 16}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 320}
    tiny |= {"router_aux_loss_coef": 0.0}  # it is of a batch, which two processes halve
    options = ["--tokenizer", tmp_path / "tokenizer", "--max-steps", 4, "--save-steps", 2, "--block-size", 16]
    options += ["--sequences-per-step", 4, "--warmup-steps", 1, "--fields", json.dumps(tiny)]

    def pretrain(name):
        words = ["pretrain.py", "olmoe-512-g2", text, tmp_path / name, *options, "--batch-size", 2]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        runpy.run_path(EXAMPLES / "pretrain.py", run_name="__main__")
        return load_file(tmp_path / name / "model.safetensors"), capsys.readouterr().out

    whole, out = pretrain("whole")
    assert re.search(r"step 4 of 4, loss \d\.\d{4}, [\d,]+ tokens/s, peak memory \d\.\d\d GiB", out)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.groups == [[2, 3]]
    shutil.copytree(tmp_path / "whole/checkpoints/step-2", tmp_path / "killed/checkpoints/step-2")
    (tmp_path / "killed/checkpoints/step-4.partial").mkdir()  # killed while it was written
    resumed, out = pretrain("killed")
    assert "going on from" in out
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    words = [EXAMPLES / "pretrain.py", "olmoe-512-g2", text, tmp_path / "two", *options, "--batch-size", 1]
    run(*ACCELERATE, *TWO_PROCESSES, *words, cwd=tmp_path)
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert two.keys() == whole.keys()
    for name, tensor in two.items():  # Muon's bfloat16 rounds what differs in its last bits
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-3, msg=name)

"""Tied models over several processes, for real: two CPU processes under torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import parallel_worker
import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_tied
from families import transformers_before
from fsdp2_heal_worker import KINDS, OPTIONS, load_alone, model_and_optimizer, save_alone, step, train_plainly
from fsdp2_worker import CASES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.heal import HealConfig, heal

HERE = Path(__file__).parent
FSDP2 = HERE.parent / "examples/accelerate/fsdp2.yaml"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What fsdp2_worker.py has written and said, in two processes that accelerate starts by the example's config."""
    folder = tmp_path_factory.mktemp("fsdp2")
    return folder, launch(folder)


def launch(folder, *kinds):
    """Run fsdp2_worker.py in the folder, with a model and text in it."""
    save_tied(folder / "tied", torch.bfloat16)
    (folder / "text.txt").write_text(make_text(num_lines=40))
    model, optimizer = model_and_optimizer(folder / "tied")
    step(model, optimizer, 0)
    save_alone(folder / "of_one", model, optimizer)
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(FSDP2),
        "--num_processes",
        "2",
    ]
    worker = [
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
        HERE / "fsdp2_worker.py",
        "tied",
        "text.txt",
        *kinds,
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*accelerate, *worker], cwd=folder, capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_fsdp2_and_ddp_have_the_gradients_of_one_process(two_processes):
    """Pools and layers are FSDP2 units of their own; a pool's gradient is that of all layers that read it.

    Each pool is gathered once in forward and once in backward, and reduced once: counted there, too. One process runs
    transformers' own experts; the two run them, or ours, which compute the gradient once per pool.
    """
    _, done = two_processes
    assert done.stdout.count("equal gradients") == len(CASES), done.stdout + done.stderr[-3000:]
    assert "equal weights after Muon's steps" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_heal_under_fsdp2_is_continued_bit_by_bit_and_saved_whole(two_processes):
    """Killed after steps 2 and 4 of 4, checkpoints in shards: as one with whole checkpoints that runs through.

    And to rounding as in one process, which trains on the same blocks in the same order.
    """
    check_continued(*two_processes, kind="")


@pytest.mark.minutes
def test_adapters_under_fsdp2_are_continued_bit_by_bit_and_merged_in_shards(tmp_path):
    check_continued(tmp_path, launch(tmp_path, "lora-"), kind="lora-")


def check_continued(folder, done, kind):
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("killed after") == 4  # two kills of two processes
    whole, killed = (load_file(folder / f"{kind}{name}/model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(whole[name].equal(killed[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    options, alone = OPTIONS | {"batch_size": 4} | KINDS[kind], folder / f"{kind}alone"
    report = heal(HealConfig(str(folder / "tied"), str(folder / "text.txt"), str(alone), **options))
    counted = json.loads((folder / f"{kind}whole/heal.json").read_text())
    for name in ("parameters", "trainable_parameters"):
        assert counted[name] == report[name]
    for file in ("model.safetensors", *(["adapter/adapter_model.safetensors"] if kind else [])):
        found = load_file(folder / f"{kind}whole" / file)
        for name, tensor in load_file(alone / file).items():
            torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=1e-3, msg=f"{file} {name}")


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_heal_under_fsdp2_that_diverges_keeps_the_last_good_checkpoint(two_processes):
    """A loss that is NaN in the second process alone ends both; the first makes a whole model of the shards."""
    folder, done = two_processes
    message = "diverged: the healing diverged: by step 4 the loss is no number any more: lower learning_rate."
    assert done.stdout.count(message) == 2, done.stdout + done.stderr[-3000:]
    report = json.loads((folder / "nan.diverged/heal.json").read_text())
    assert report["steps"] == 2
    _, validation = load_blocks(folder / "text.txt", make_tokenizer(), block_size=16)
    rescued = AutoModelForCausalLM.from_pretrained(folder / "nan.diverged")
    found = perplexity(rescued, validation)["loss"]
    assert found == pytest.approx(report["after"]["loss"], abs=1e-4)
    assert found < report["before"]["loss"]
    assert not (folder / ".nan.partial").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_states_of_fsdp2_go_from_one_process_to_two_and_back(two_processes):
    """One does a step, two the next, then each one more: as one process that does all three."""
    folder, done = two_processes
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    alone, others = model_and_optimizer(folder / "tied"), model_and_optimizer(folder / "tied")
    for number in range(3):
        step(*alone, number)
    load_alone(folder / "of_two", *others)
    step(*others, 2)
    saved = AutoModelForCausalLM.from_pretrained(folder / "of_both").state_dict()
    for (name, want), got in zip(alone[0].state_dict().items(), others[0].state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(saved[name], want, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_transformers_own_trainer_under_fsdp2_trains_as_in_one_process(two_processes):
    folder, done = two_processes
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    train_plainly(folder / "tied", folder / "plainly_alone", batch_size=4)
    start = AutoModelForCausalLM.from_pretrained(folder / "tied", dtype=torch.float32).state_dict()
    two, one = (load_file(folder / name / "model.safetensors") for name in ("plainly", "plainly_alone"))
    assert two.keys() == one.keys()
    for name, want in one.items():
        bound = 1e-4 * float((want - start[name]).abs().max())  # of what training has moved
        assert bound > 0, name
        torch.testing.assert_close(two[name], want, rtol=0, atol=bound, msg=name)


@pytest.mark.slow
@pytest.mark.xdist_group("two_processes")
def test_the_accelerate_example_runs_under_fsdp2(two_processes):
    folder, done = two_processes
    before, after = map(float, re.search(r"held-out perplexity ([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert after < before - 10
    _, validation = load_blocks(folder / "text.txt", make_tokenizer(), block_size=16)
    healed = AutoModelForCausalLM.from_pretrained(folder / "example")
    assert perplexity(healed, validation)["perplexity"] == pytest.approx(after, abs=0.01)
    assert healed.config.architectures == ["TiedMoeOlmoeForCausalLM"]


@pytest.mark.skipif(transformers_before("5.23"), reason="refused before transformers 5.23")
@pytest.mark.xdist_group("two_processes")
def test_tensor_and_expert_parallelism_equal_one_process(tmp_path):
    """Logits, generation and gradients, with a slot map and without; each process holds half of every pool."""
    command = [sys.executable, "parallel_worker.py", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") == len(parallel_worker.CASES), done.stdout
    assert done.stdout.count("refused") == len(parallel_worker.REFUSED), done.stdout

"""A healing that is killed and started again ends as one that was not: every weight and every logged number equal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, save_source, save_tied
from filelock import FileLock
from transformers import AutoModelForCausalLM

from transformers_tiedmoe.training.heal import HealConfig, heal

# Dropout needs the random state; a loss that is logged over three steps, half a mean; 9 steps, four epochs.
OPTIONS = {"max_steps": 9, "block_size": 16, "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.3,
           "logging_steps": 3, "save_steps": 2, "allow_worse": True}  # fmt: skip
SOFT = {
    "routing": "softmoe",
    "softmoe": {"alpha": 0.01, "target_alpha": 0.03, "target_budget": 6.0, "target_active": 7.0},
}
ACCUMULATION = {"batch_size": 2, "gradient_accumulation_steps": 2}
STREAMING = {
    "streaming": True,
    "validation_blocks": 2,
    "shuffle_buffer": 3,
    "separate_documents": True,
    "fused_loss": True,
}
HERE = Path(__file__).parent
SAME = ("before", "after", "steps", "tokens", "history", "warnings", "is_worse", "trainable_parameters")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text of three batches of four blocks, and the models to heal on it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(make_text(num_lines=16))
    save_source(folder / "source", attention_dropout=0.2)
    save_tied(folder / "tied", attention_dropout=0.2)
    save_tied(folder / "bf16", dtype=torch.bfloat16, attention_dropout=0.2)
    return folder


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def kill_at(step, what="healing"):
    def kill(done, total, doing):
        if done == step and doing.startswith(what):
            raise InterruptedError

    return kill


def assert_same(folder, report, expected_folder, expected):
    for name in SAME:
        assert report[name] == expected[name], name
    found, right = weights(folder), weights(expected_folder)
    assert {name for name in right if not torch.equal(found[name], right[name])} == set()
    configs = [json.loads(Path(each, "config.json").read_text()) for each in (folder, expected_folder)]
    assert configs[0] == configs[1]


def minutes(*case, id):
    return pytest.param(*case, id=id, marks=pytest.mark.minutes)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        pytest.param("tied", {}, id="full"),
        # Trainer's own resuming would skip the source's experts, which the file names one by one.
        pytest.param("source", {}, id="source"),
        pytest.param("bf16", {"lora": True, "lora_rank": 2}, id="lora"),
        pytest.param("soft", {"max_steps": 12, "lora": True, "lora_rank": 2, "fused_loss": True}, id="soft-lora"),
        pytest.param("tied", STREAMING, id="streaming"),
        minutes("soft", {"max_steps": 12}, id="soft"),
        minutes("tied", {"optimizer": "muon", "train_norms": True, "gradient_checkpointing": True}, id="muon"),
        minutes("tied", ACCUMULATION | {"dataloader_num_workers": 1, "teacher": "source"}, id="accumulation"),
    ],
)
def test_a_killed_healing_ends_as_an_unbroken_one(model, fields, made, tmp_path):
    """Killed in the middle, and again after its last step."""
    options = OPTIONS | fields
    if "teacher" in options:
        options["teacher"] = str(made / options["teacher"])
    if model == "soft" and not (made / model).exists():  # here, as an older transformers skips it
        save_tied(made / model, attention_dropout=0.2, **SOFT)
    arguments = str(made / model), str(made / "text.txt")
    unbroken = heal(HealConfig(*arguments, str(tmp_path / "unbroken"), **options))
    killed = HealConfig(*arguments, str(tmp_path / "killed"), **options)
    with pytest.raises(InterruptedError):
        heal(killed, kill_at(5))
    assert not (tmp_path / "killed").exists(), "it must not look complete"
    (tmp_path / ".killed.partial/scratch/checkpoints/checkpoint-5").mkdir()  # what a kill while saving leaves
    with pytest.raises(InterruptedError):
        heal(killed, kill_at(options["max_steps"], "evaluating"))
    report = heal(killed)
    assert report["resumed_from_step"] == options["max_steps"]
    assert len(report["history"]) >= 5
    assert_same(tmp_path / "killed", report, tmp_path / "unbroken", unbroken)


def two_processes(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "resume_worker.py"]
    return subprocess.run([*command, *arguments], cwd=HERE, capture_output=True, text=True, timeout=300)


@pytest.mark.minutes
@pytest.mark.xdist_group("two_processes")
def test_two_processes_that_are_killed_end_as_unbroken_ones(made):
    """One of the cases by SIGKILL, whose signal ends both at one step; then the same command again."""
    first = two_processes(str(made), "first")
    assert "SIGKILL" in first.stderr, first.stdout + first.stderr[-3000:]
    assert (made / "accumulation.unbroken").exists(), first.stdout + first.stderr[-3000:]
    assert not (made / "accumulation.killed").exists()
    message = "diverged: the healing diverged: by step 6 the loss is no number any more: lower learning_rate."
    assert first.stdout.count(message) == 2
    assert "The last good model, of step 4, is saved in" in first.stdout
    AutoModelForCausalLM.from_pretrained(made / "nan.diverged")
    with FileLock(made / ".accumulation.killed.partial" / "lock"):
        taken = two_processes(str(made), "second")
        assert "is writing" in taken.stderr
        assert "expected to be the only one" in taken.stderr
    second = two_processes(str(made), "second")
    assert second.returncode == 0, second.stdout + second.stderr[-3000:]
    for case in ("full", "lora", "streaming", "accumulation"):
        found, expected = made / f"{case}.killed", made / f"{case}.unbroken"
        reports = [json.loads((folder / "heal.json").read_text()) for folder in (found, expected)]
        assert [each["resumed_from_step"] for each in reports] == [4, 0]
        assert_same(found, reports[0], expected, reports[1])

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, make_text, make_tokenizer, save_source, save_tied
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.distillation import distillation_loss
from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.parameter_groups import pool_parameter_groups

QUICK = {"max_steps": 6, "block_size": 16, "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(make_text())
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save_tied(tmp_path_factory.mktemp("tied"))


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "healed")


def losses(report):
    return [entry["loss"] for entry in report["history"] if "loss" in entry]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_heal_measures_trains_and_saves_what_auto_classes_load(tied, data, output):
    report = heal(HealConfig(tied, data, output, **QUICK))
    assert report == json.loads(Path(output, "heal.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"] - 0.3
    assert report["steps"] == 6
    assert report["tokens"] == 6 * 4 * 16
    assert report["history"][-1]["step"] == 6

    _, validation = load_blocks(data, make_tokenizer(), block_size=16)
    for folder, when in ((tied, "before"), (output, "after")):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert perplexity(model, validation) == pytest.approx(report[when], rel=1e-5)
    assert isinstance(model, TiedMoeForCausalLM)
    assert model.generation_config.max_new_tokens == 7
    assert model.config.use_cache, "Trainer switches it off"
    assert AutoTokenizer.from_pretrained(output).get_vocab() == make_tokenizer().get_vocab()
    assert not {path.name for path in Path(output).iterdir()} & {"heal_progress.json", "checkpoint-6", ".final"}


def test_heal_trains_pools_and_routers_and_leaves_norms(tied, data, output):
    heal(HealConfig(tied, data, output, **QUICK))
    before, after = weights(tied), weights(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name in before if "norm" in name}
    assert norms
    assert changed == set(before) - norms
    assert {"model.expert_pools.0.gate_up_proj", "model.layers.1.mlp.gate.weight"} <= changed


def test_heal_trains_norms_when_asked(tied, data, output):
    heal(HealConfig(tied, data, output, train_norms=True, **QUICK))
    before, after = weights(tied), weights(output)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_heal_keeps_the_dtype_and_trains_in_float32(tmp_path, data, output):
    tied = save_tied(tmp_path / "bf16", dtype=torch.bfloat16)
    # 1e-5 is far below what bfloat16 weights could add up.
    heal(HealConfig(tied, data, output, **QUICK | {"learning_rate": 1e-5, "max_steps": 2}))
    assert {weight.dtype for weight in weights(output).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").config.dtype == torch.bfloat16


def test_heal_of_a_family_model_is_plain_fine_tuning(source, data, output):
    report = heal(HealConfig(source, data, output, **QUICK))
    assert report["after"]["loss"] < report["before"]["loss"] - 0.3
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "olmoe"


@pytest.mark.parametrize("fixture", ["tied", "source"])
def test_heal_killed_and_started_again_ends_where_an_unbroken_run_does(fixture, data, tmp_path, request, output):
    """The untied source too: Trainer's own resuming would skip its experts, which the file names one by one."""
    model = request.getfixturevalue(fixture)
    options = QUICK | {"save_steps": 2}
    unbroken = heal(HealConfig(model, data, str(tmp_path / "unbroken"), **options))

    class Killed(Exception):
        pass

    def kill(done, total, what):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        heal(HealConfig(model, data, output, **options), kill)
    assert not Path(output, "config.json").exists(), "it must not look complete"
    Path(output, "checkpoint-5").mkdir()  # what a kill in the middle of saving leaves
    resumed = heal(HealConfig(model, data, output, **options))
    assert resumed["resumed_from_step"] == 4
    assert resumed["steps"] == 6
    assert resumed["before"] == unbroken["before"]
    expected, found = weights(tmp_path / "unbroken"), weights(output)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_heal_process_killed_by_the_system_is_continued_by_the_same_command(tied, data, output):
    code = "from transformers_tiedmoe.cli import main; main()"
    command = [sys.executable, "-c", code, "heal", tied, "--data", data, "--output", output, "--block-size", "16"]
    command += ["--max-steps", "60", "--save-steps", "5", "--batch-size", "4", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path(output, "checkpoint-10", "trainer_state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not Path(output, "config.json").exists()
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["resumed_from_step"] >= 10
    assert report["steps"] == 60
    AutoModelForCausalLM.from_pretrained(output)


def test_heal_refuses_outputs_that_hold_something_else(tied, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no healing"):
            heal(HealConfig(tied, data, str(tmp_path), overwrite=overwrite, **QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_heal_refuses_a_finished_output_unless_asked_and_other_options_when_unfinished(tied, data, output):
    heal(HealConfig(tied, data, output, **QUICK))
    with pytest.raises(ValueError, match="holds a finished healing"):
        heal(HealConfig(tied, data, output, **QUICK))
    Path(output, "heal.json").rename(Path(output, "mark"))

    def kill(done, total, what):
        if done:
            raise InterruptedError

    other = QUICK | {"max_steps": 3}
    Path(output, "mark").rename(Path(output, "heal.json"))
    with pytest.raises(InterruptedError):
        heal(HealConfig(tied, data, output, overwrite=True, **other), kill)
    with pytest.raises(ValueError, match="max_steps was 3 and is 6"):
        heal(HealConfig(tied, data, output, **QUICK))
    assert heal(HealConfig(tied, data, output, **other))["steps"] == 3


def test_heal_that_diverges_saves_nothing(tied, data, output):
    with pytest.raises(ValueError, match=r"diverged: the held-out loss was 5\.\d+ and is nan; nothing was saved"):
        heal(HealConfig(tied, data, output, **QUICK | {"learning_rate": 1e38}))
    assert not Path(output, "config.json").exists()


def test_heal_refuses_sharded_weights(tied, data, output, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp` does
    with pytest.raises(ValueError, match=r"shard the weights \(FSDP\), but heal needs them whole"):
        heal(HealConfig(tied, data, output, **QUICK))
    assert not Path(output).exists()


def test_heal_leaves_the_disk_alone_when_the_data_is_missing(tied, output):
    with pytest.raises(FileNotFoundError, match=r"no file or folder nothing\.txt"):
        heal(HealConfig(tied, "nothing.txt", output, **QUICK))
    assert not Path(output).exists()


def test_heal_refuses_a_checkpoint_that_lacks_weights(tied, data, output, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    save_tied(broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.expert_pools.0.down_proj"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*model\.expert_pools\.0\.down_proj"):
        heal(HealConfig(str(broken), data, output, **QUICK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps=0, but it must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"warmup_fraction": 1.5}, "warmup_fraction=1.5"),
        ({"lr_divisor": "cube"}, "choose one of none, sqrt"),
        ({"eval_steps": -1}, "eval_steps=-1"),
        ({"output": "here", "model": "."}, None),
    ],
)
def test_heal_config_checks_its_fields(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if message is None:
        options, message = {"output": str(tmp_path), "model": "."}, "is also the model"
    with pytest.raises(ValueError, match=message):
        HealConfig(**{"model": "m", "data": "d", "output": "o"} | options)


def test_heal_distills_from_the_source(source, tied, data, output, tmp_path):
    """With all the weight on the teacher, and the teacher the model itself, there is nothing to learn."""
    options = QUICK | {"teacher_weight": 1.0, "max_steps": 2}
    heal(HealConfig(tied, data, output, teacher=tied, **options))
    before, after = weights(tied), weights(output)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=3e-2, msg=name)  # Adam amplifies rounding
    report = heal(HealConfig(tied, data, str(tmp_path / "two"), teacher=source, **options))
    assert losses(report)[0] > 1e-4


def test_heal_with_gradient_accumulation_equals_the_large_batch(source, tied, data, tmp_path):
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        options = QUICK | {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        config = HealConfig(tied, data, str(tmp_path / str(batch_size)), teacher=source, **options)
        found.append(losses(heal(config)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_heal_refuses_a_teacher_of_another_vocabulary(tied, data, output, tmp_path):
    other = save_source(tmp_path / "wide", vocab_size=400)
    with pytest.raises(ValueError, match=r"vocabulary of 400 tokens, but .* one of 320"):
        heal(HealConfig(tied, data, output, teacher=other, **QUICK))
    same_size = save_source(tmp_path / "other")
    vocabulary = Path(same_size, "tokenizer.json")
    tokenizer = json.loads(vocabulary.read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    vocabulary.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="number their tokens differently"):
        heal(HealConfig(tied, data, output, teacher=same_size, **QUICK))


def test_heal_with_lora_saves_the_merged_model_and_the_adapter(tied, data, output):
    from peft import PeftModel

    report = heal(HealConfig(tied, data, output, lora=True, lora_rank=2, **QUICK))
    assert report["after"]["loss"] < report["before"]["loss"] - 0.02
    assert report["trainable_parameters"] < report["parameters"] / 2
    merged = AutoModelForCausalLM.from_pretrained(output).eval()
    base = AutoModelForCausalLM.from_pretrained(tied).eval()
    changed = {
        name for name, weight in base.state_dict().items() if not torch.equal(weight, merged.state_dict()[name])
    }
    assert changed == {
        name for name in base.state_dict() if "expert_pools" in name or ("self_attn" in name and "norm" not in name)
    }
    adapted = PeftModel.from_pretrained(base, Path(output, "adapter")).eval()
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_heal_with_lora_is_resumed(tied, data, tmp_path, output):
    options = QUICK | {"lora": True, "lora_rank": 2, "save_steps": 2}
    heal(HealConfig(tied, data, str(tmp_path / "unbroken"), **options))

    def kill(done, total, what):
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        heal(HealConfig(tied, data, output, **options), kill)
    assert heal(HealConfig(tied, data, output, **options))["resumed_from_step"] == 2
    expected, found = weights(tmp_path / "unbroken"), weights(output)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def test_heal_with_gradient_checkpointing_learns_the_same(tied, data, tmp_path):
    reports = [
        heal(HealConfig(tied, data, str(tmp_path / str(use)), gradient_checkpointing=use, **QUICK))
        for use in (False, True)
    ]
    assert reports[0]["after"]["loss"] == pytest.approx(reports[1]["after"]["loss"], rel=1e-5)


def test_heal_with_unequal_batches_evaluates_each_token_once(tied, data, output):
    """Evaluation in the middle, and a last batch that is not full."""
    report = heal(HealConfig(tied, data, output, eval_steps=3, validation_fraction=0.2, **QUICK))
    evaluations = [entry["eval_loss"] for entry in report["history"] if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert evaluations[0] == pytest.approx(report["before"]["loss"])
    assert evaluations[2] == pytest.approx(report["after"]["loss"], rel=1e-5)
    _, validation = load_blocks(data, make_tokenizer(), block_size=16, validation_fraction=0.2)
    assert len(validation) % 4
    assert report["after"]["tokens"] == len(validation) * 15


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_loss_equals_the_formula_and_its_gradient(temperature):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5))
    labels[1, 2:] = -100
    p, q = ((each / temperature).softmax(-1) for each in (teacher, logits))
    expected = (temperature**2 * (p * (p / q).log()).sum(-1))[labels != -100].sum()
    (expected_grad,) = torch.autograd.grad(expected, logits)
    found = distillation_loss(logits, teacher, labels, temperature, chunk_size=3)  # 10 tokens: the last chunk is short
    (found_grad,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_distillation_loss_refuses_another_vocabulary():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), but the teacher's \(1, 2, 4\)"):
        distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))


def test_pool_parameter_groups_divides_by_the_root_of_each_group_size():
    config = TiedMoeConfig(family="olmoe", groups=[[0], [1, 2, 3]], **TINY)
    model = TiedMoeForCausalLM(config)
    groups = pool_parameter_groups(model, lr=1.0, weight_decay=0.1)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        lr = 3**-0.5 if "expert_pools.1." in name else 1.0
        assert settings[id(parameter)] == (pytest.approx(lr), 0.0 if "norm" in name else 0.1), name
    assert {group["lr"] for group in pool_parameter_groups(model, 1.0, lr_divisor="none")} == {1.0}
    with pytest.raises(ValueError, match="lr_divisor='cbrt' is unknown"):
        pool_parameter_groups(model, 1.0, lr_divisor="cbrt")


def test_pool_parameter_groups_takes_only_what_is_trained():
    model = TiedMoeForCausalLM(TiedMoeConfig(family="olmoe", skip_first=1, skip_last=1, **TINY)).requires_grad_(False)
    pool = model.model.expert_pools[0].down_proj.requires_grad_(True)
    (group,) = pool_parameter_groups(model, lr=1.0)
    assert group["params"] == [pool]
    assert group["lr"] == pytest.approx(2**-0.5)

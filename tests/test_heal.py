import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import TINY, make_text, make_tokenizer, save_source, save_tied
from families import transformers_before
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM, workdir
from transformers_tiedmoe.adapters import find_adapter
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.files import file_digest
from transformers_tiedmoe.manifest import read_manifest
from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.distillation import distillation_loss
from transformers_tiedmoe.training.fsdp import check_checkpoint, check_units
from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.live_teacher import LiveTeacher
from transformers_tiedmoe.training.lora import add_lora
from transformers_tiedmoe.training.outcome import Diverged, Worse
from transformers_tiedmoe.training.parameter_groups import BUDGET_LR, pool_parameter_groups
from transformers_tiedmoe.training.trainer import HealTrainer
from transformers_tiedmoe.workdir import open_work

needs_soft_routing = pytest.mark.skipif(transformers_before("5.18"), reason="refused before transformers 5.18")

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


def checkpoints(output):
    """Where Trainer's checkpoints of an unfinished healing are."""
    return Path(output).with_name(f".{Path(output).name}.partial") / "scratch" / "checkpoints"


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


@pytest.mark.slow
def test_heal_process_killed_by_the_system_is_continued_by_the_same_command(tied, data, output):
    code = "from transformers_tiedmoe.cli import main; main()"
    command = [sys.executable, "-c", code, "heal", tied, "--data", data, "--output", output, "--block-size", "16"]
    command += ["--max-steps", "60", "--save-steps", "5", "--batch-size", "4", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (checkpoints(output) / "checkpoint-10" / "complete.json").exists():
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
    for overwrite, message in ((False, "is not empty"), (True, "which the run to be replaced did not write")):
        with pytest.raises(TiedMoeError, match=message):
            heal(HealConfig(tied, data, str(tmp_path), overwrite=overwrite, **QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def kill_at(step):
    def kill(done, total, what):
        if done == step:
            raise InterruptedError

    return kill


def test_heal_replaces_a_finished_output_when_asked_and_only_at_its_end(tied, data, output):
    heal(HealConfig(tied, data, output, **QUICK))
    first = weights(output)
    with pytest.raises(TiedMoeError, match="holds a finished healing"):
        heal(HealConfig(tied, data, output, **QUICK))
    other = QUICK | {"max_steps": 3, "save_steps": 1, "overwrite": True}
    with pytest.raises(InterruptedError):
        heal(HealConfig(tied, data, output, **other), kill_at(2))
    assert all(torch.equal(weight, first[name]) for name, weight in weights(output).items()), "the old one is lost"
    report = heal(HealConfig(tied, data, output, **other))
    assert (report["steps"], report["resumed_from_step"]) == (3, 1)
    assert json.loads(Path(output, "heal.json").read_text())["steps"] == 3
    assert [path.name for path in Path(output).parent.iterdir()] == ["healed"]


def test_heal_overwrite_deletes_only_what_a_healing_wrote(tied, data, output):
    heal(HealConfig(tied, data, output, **QUICK))
    (Path(output) / "mine.txt").write_text("mine")
    with pytest.raises(TiedMoeError, match=r"holds \['mine.txt'\], which the run to be replaced did not write"):
        heal(HealConfig(tied, data, output, overwrite=True, **QUICK))
    assert (Path(output) / "mine.txt").read_text() == "mine"
    for name in ("model", "teacher", "data"):
        inside = Path(output) / "inside"
        shutil.copytree(tied, inside)
        fields = {"model": tied, "data": data, name: str(inside)}
        with pytest.raises(TiedMoeError, match=r"lies in output=|which the run to be replaced did not write"):
            heal(HealConfig(output=output, overwrite=True, **fields, **QUICK))
        assert (inside / "config.json").is_file()
        shutil.rmtree(inside)


@pytest.mark.parametrize("what", ["max_steps", "model", "data", "teacher"])
def test_heal_is_not_continued_with_another(what, source, data, tmp_path, output):
    """The same names, but other contents: what was trained so far would belong to something else."""
    tied, text, teacher = save_tied(tmp_path / "tied"), tmp_path / "text.txt", save_source(tmp_path / "teacher")
    shutil.copy(data, text)
    options = QUICK | {"save_steps": 1, "teacher": teacher}
    with pytest.raises(InterruptedError):
        heal(HealConfig(tied, str(text), output, **options), kill_at(3))
    if what == "max_steps":
        options["max_steps"] = 9
    elif what == "data":
        text.write_text(make_text()[:-20])
    else:
        folder = Path({"model": tied, "teacher": teacher}[what])
        for path in folder.glob("*.safetensors"):
            os.utime(path, (1, 1))
    differs = {"max_steps": "arguments: max_steps was 6 and is 9", "data": "data: tokens_sha256"}.get(
        what, f"{what}: model"
    )
    with pytest.raises(TiedMoeError, match=f"differs in its {differs}.*repeat the old command to go on, or"):
        heal(HealConfig(tied, str(text), output, **options))
    assert (checkpoints(output) / "checkpoint-2" / "complete.json").is_file()


def test_heal_killed_between_the_rename_and_its_end_ends_well(tied, data, output, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workdir, "_remove_state", killed)
        with pytest.raises(KeyboardInterrupt):
            heal(HealConfig(tied, data, output, **QUICK))
    assert Path(output, "heal.json").is_file()
    report = heal(HealConfig(tied, data, output, **QUICK))
    assert report == json.loads(Path(output, "heal.json").read_text())
    assert [path.name for path in Path(output).parent.iterdir()] == ["healed"]
    with pytest.raises(TiedMoeError, match="holds a finished healing"):
        heal(HealConfig(tied, data, output, **QUICK))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("optimizer.pt", "cut"), ("optimizer.pt", "remove"), ("scheduler.pt", "remove"), ("rng_state.pth", "cut"),
        ("trainer_state.json", "empty"), ("model.safetensors", "cut"), ("complete.json", "garble"),
    ],
)  # fmt: skip
def test_heal_goes_on_from_the_checkpoint_before_a_damaged_one(file, damage, tied, data, tmp_path, output):
    options = QUICK | {"save_steps": 2, "max_steps": 5}
    with pytest.raises(InterruptedError):
        heal(HealConfig(tied, data, output, **options), kill_at(5))
    path = checkpoints(output) / "checkpoint-4" / file
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-7], "empty": b"", "garble": b"[1"}[damage])
    report = heal(HealConfig(tied, data, output, **options))
    assert report["resumed_from_step"] == 2
    assert report["steps"] == 5
    assert any(
        "checkpoint-4 is damaged or was cut off; the run went on from checkpoint-2" in w for w in report["warnings"]
    )


def test_heal_goes_on_after_a_full_disk(tied, data, output, monkeypatch):
    options, save = QUICK | {"save_steps": 2}, torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TiedMoeError, match=r"the disk of .*healed is full; what is done is kept\. Free some space"):
        heal(HealConfig(tied, data, output, **options))
    monkeypatch.undo()
    report = heal(HealConfig(tied, data, output, **options))
    assert report["resumed_from_step"] == 2
    assert any("checkpoint-4 is damaged or was cut off" in warning for warning in report["warnings"])


def test_two_heals_on_one_output(tied, data, output):
    """The second is refused while the first is at work, and leaves it alone."""
    with open_work(Path(output), {"first": {"one": 1}}, keep=True) as work:
        (work.scratch / "checkpoints").mkdir()
        with pytest.raises(TiedMoeError, match=r"another process.* is writing .*healed; expected to be the only one"):
            heal(HealConfig(tied, data, output, **QUICK))
        assert (work.scratch / "checkpoints").is_dir()
        work.write_text("file", "of the first")
        work.complete({})
    assert [path.name for path in Path(output).iterdir()] == ["file"]


def test_heal_says_so_when_the_model_is_worse_or_knows_nothing(tied, data, tmp_path, output):
    trained = str(tmp_path / "trained")
    heal(HealConfig(tied, data, trained, **QUICK | {"max_steps": 20}))
    options, worse = QUICK | {"learning_rate": 3.0}, str(tmp_path / "worse")
    with pytest.raises(
        Worse, match=r"worse than before.*saved all the same, in .*worse: use the model before"
    ) as error:
        heal(HealConfig(trained, data, worse, **options))
    report = error.value.report
    assert report["after"]["loss"] > report["before"]["loss"]
    assert report["is_worse"]
    assert any("worse than before" in warning for warning in report["warnings"])
    assert report == json.loads(Path(worse, "heal.json").read_text())
    again = heal(HealConfig(trained, data, worse, overwrite=True, allow_worse=True, **options))
    assert again["after"] == report["after"]
    assert Path(output).parent.joinpath(".worse.partial").exists() is False
    message = (
        r"diverged: the held-out loss was .* is that of guessing.* Nothing was saved, as no checkpoint was better"
    )
    with pytest.raises(Diverged, match=message):
        heal(HealConfig(trained, data, output, **QUICK | {"learning_rate": 1e9, "save_steps": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained", "worse"]


@pytest.mark.parametrize("lora", [False, True])
def test_heal_that_diverges_keeps_the_last_good_model(lora, tmp_path, data, output, monkeypatch):
    """The last checkpoint that is better than the model was: here neither the last one, nor the first."""
    tied = str(tmp_path / "tied")
    heal(HealConfig(save_tied(tmp_path / "start", dtype=torch.bfloat16), data, tied, **QUICK | {"max_steps": 20}))
    options = QUICK | {"save_steps": 1, "save_total_limit": 4, "lora": lora, "lora_rank": 2}
    shorter = heal(
        HealConfig(tied, data, str(tmp_path / "3"), lr_scheduler_type="constant", **options | {"max_steps": 3})
    )
    real = Trainer.training_step

    def step(self, model, *args):
        loss = real(self, model, *args)
        if self.state.global_step == 3:  # what the step leaves is worse than the model was, and no NaN
            for each in (each for each in model.parameters() if each.requires_grad):
                each.data.normal_()
        return loss * torch.nan if self.state.global_step == 4 else loss

    monkeypatch.setattr(Trainer, "training_step", step)
    with pytest.raises(
        Diverged, match=r"by step 5 .* no number.* The last good model, of step 3, is saved in .*diverged"
    ):
        heal(HealConfig(tied, data, output, lr_scheduler_type="constant", **options))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "healed.diverged", "start", "tied"]
    kept = weights(f"{output}.diverged")
    expected = weights(tmp_path / "3")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}
    report = json.loads(Path(f"{output}.diverged", "heal.json").read_text())
    for name in ("steps", "tokens", "before", "after", "history"):
        assert report[name] == (pytest.approx(shorter[name]) if name == "after" else shorter[name]), name
    assert Path(f"{output}.diverged", "adapter").is_dir() == lora
    heal(
        HealConfig(
            f"{output}.diverged", data, output, **QUICK | {"max_steps": 1, "learning_rate": 1e-4}, allow_worse=True
        )
    )


def test_heal_of_a_model_with_nan(tmp_path, data, output):
    tied = save_tied(tmp_path / "tied")
    path = Path(tied, "model.safetensors")
    tensors = load_file(path)
    tensors["model.expert_pools.0.down_proj"] *= torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TiedMoeError, match="held-out loss is nan before the first step: the model's weights"):
        heal(HealConfig(tied, data, output, **QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["tied"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 65}, r"block_size=65, but .* knows 64 positions; lower it"),
        (
            {"lora": True, "lora_rank": 10**9},
            "lora_rank=1000000000, but .*self_attn.q_proj is a matrix of 16 by 16; expected at most 16",
        ),
    ],
)
def test_heal_refuses_what_the_model_cannot(fields, message, tied, data, output):
    with pytest.raises(TiedMoeError, match=message):
        heal(HealConfig(tied, data, output, **QUICK | fields))
    assert list(Path(output).parent.iterdir()) == []


def test_block_size_is_what_the_model_knows_if_not_given(tied, data, output):
    options = {name: value for name, value in QUICK.items() if name != "block_size"} | {"max_steps": 1}
    assert heal(HealConfig(tied, data, output, **options))["tokens"] == 4 * 64


def test_heal_refuses_tokens_beyond_the_vocabulary(tmp_path, output):
    tied = save_tied(tmp_path / "tied")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<tool{i}>" for i in range(20)])  # up to 321, and the embedding was not resized
    tokenizer.save_pretrained(tied)
    data = str(tmp_path / "text.txt")
    Path(data).write_text("<tool18>\n" + make_text())
    with pytest.raises(
        TiedMoeError, match=r"its tokenizer gives token 32[01], but its vocab_size is 320; expected the tokenizer"
    ):
        heal(HealConfig(tied, data, output, **QUICK))
    assert not Path(output).exists()


def test_mixed_dtypes_of_a_checkpoint_survive(tmp_path, data, output):
    """Routers in float32 among bfloat16, with bits that bfloat16 has not: trained from these, and saved so."""
    tied = save_tied(tmp_path / "tied", dtype=torch.bfloat16)
    path = Path(tied, "model.safetensors")
    tensors = load_file(path)
    routers = [name for name in tensors if name.endswith("mlp.gate.weight")]
    tensors |= {name: tensors[name].float() + 1e-5 for name in routers}
    save_file(tensors, path, metadata={"format": "pt"})
    heal(HealConfig(tied, data, output, **QUICK | {"max_steps": 1, "learning_rate": 1e-12}))
    healed = load_file(Path(output, "model.safetensors"))
    assert {name: tensor.dtype for name, tensor in healed.items()} == {n: t.dtype for n, t in tensors.items()}
    for name in routers:
        torch.testing.assert_close(healed[name], tensors[name], rtol=0, atol=1e-7)


def test_healed_folder_has_card_and_manifest_of_every_file(tied, data, output):
    report = heal(HealConfig(tied, data, output, **QUICK))
    manifest, card = read_manifest(output), Path(output, "README.md").read_text()
    assert manifest["made_by"] == "tiedmoe heal"
    assert manifest["healing"]["after"] == report["after"]
    files = {path.relative_to(output).as_posix(): path for path in Path(output).rglob("*") if path.is_file()}
    del files["tiedmoe_conversion.json"]
    assert manifest["files"] == {name: file_digest(path) for name, path in files.items()}
    assert f"| {report['before']['loss']:.4f} | {report['after']['loss']:.4f} |" in card
    assert str(Path(data).parent) not in card + json.dumps(manifest)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", r"has not the weights of the model in memory: \d+, first"),
        ("config.json", r"has the loss .* on sample blocks, but the model in memory"),
    ],
)
def test_what_is_on_the_disk_is_what_was_measured(file, message, tied, data, output, monkeypatch):
    """A save that writes another model than the one in memory ends the run, and nothing looks complete."""
    real = TiedMoeForCausalLM.save_pretrained

    def other(self, folder, **kwargs):
        real(self, folder, **kwargs)
        path = Path(folder, file)
        if "draft" not in str(folder):
            return
        if file == "config.json":
            path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 10.0}))
        else:
            save_file({n: t * 0.5 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})

    monkeypatch.setattr(TiedMoeForCausalLM, "save_pretrained", other)
    with pytest.raises(AssertionError, match=message):
        heal(HealConfig(tied, data, output, **QUICK))
    assert not Path(output).exists()


def save_with_adapter(folder):
    from peft import LoraConfig, get_peft_model

    tied = save_tied(folder)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied), config)
    model.save_pretrained(tied)
    return tied, model.merge_and_unload()


def test_heal_refuses_an_adapter_or_merges_it(tmp_path, data, output):
    tied, merged = save_with_adapter(tmp_path / "tied")
    with pytest.raises(TiedMoeError, match=r"holds an adapter \(adapter_config.json\).*merge it \(--merge-adapter"):
        heal(HealConfig(tied, data, output, **QUICK))
    with pytest.raises(TiedMoeError, match="holds an adapter"):
        heal(HealConfig(save_source(tmp_path / "source"), data, output, teacher=tied, **QUICK))
    assert not Path(output).exists()
    report = heal(HealConfig(tied, data, output, merge_adapter=True, **QUICK))
    _, validation = load_blocks(data, make_tokenizer(), block_size=16)
    assert report["before"]["loss"] == pytest.approx(perplexity(merged, validation)["loss"], rel=1e-5)
    assert not find_adapter(output)
    saved = AutoModelForCausalLM.from_pretrained(output)
    assert perplexity(saved, validation)["loss"] == pytest.approx(report["after"]["loss"], rel=1e-5)
    with pytest.raises(TiedMoeError, match="holds no adapter to merge"):
        heal(HealConfig(output, data, str(tmp_path / "again"), merge_adapter=True, **QUICK))


def test_padding_changes_neither_divergence_nor_held_out_loss(tmp_path):
    """Masks and positions reach the teacher and the evaluation."""
    torch.manual_seed(0)
    fields = {**TINY, "initializer_range": 0.2}
    model = TiedMoeForCausalLM(TiedMoeConfig(family="olmoe", skip_first=1, skip_last=1, **fields)).eval()
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = HealTrainer(model=model, teacher=LiveTeacher(model), teacher_weight=1.0, args=args)
    ids, zeros = torch.randint(1, 320, (1, 10)), torch.zeros(1, 6, dtype=torch.int64)
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    mask = torch.cat([zeros, torch.ones_like(ids)], 1)
    padded = {
        "input_ids": torch.cat([zeros, ids], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "labels": torch.cat([zeros - 100, zeros[:, :1] - 100, ids[:, 1:]], 1),
    }
    with torch.no_grad():
        assert trainer.compute_loss(model, dict(padded)).item() == pytest.approx(0, abs=1e-6)
        expected, found = (trainer.prediction_step(model, dict(each), False)[1].item() for each in (plain, padded))
    assert found == pytest.approx(expected, rel=1e-5)


def test_code_of_a_checkpoint_is_not_run(tmp_path, data, output, monkeypatch):
    """A tokenizer with `auto_map` would be imported on a "y" from stdin; nobody asks."""
    tied = save_tied(tmp_path / "tied")
    Path(tied, "evil.py").write_text("raise SystemExit('it ran')")
    config = json.loads(Path(tied, "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    Path(tied, "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    assert heal(HealConfig(tied, data, output, **QUICK | {"max_steps": 1}))["steps"] == 1
    other = save_tied(tmp_path / "kernels")
    path = Path(other, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_attn_implementation": "someone/kernels"}))
    with pytest.raises(TiedMoeError, match=r"asks for the attention kernels someone/kernels"):
        heal(HealConfig(other, data, str(tmp_path / "other"), **QUICK))


def test_heal_that_diverges_saves_nothing(tied, data, output):
    with pytest.raises(
        TiedMoeError, match=r"diverged: by step \d the loss is no number any more: lower .* Nothing was saved"
    ):
        heal(HealConfig(tied, data, output, **QUICK | {"learning_rate": 1e38}))
    assert list(Path(output).parent.iterdir()) == []
    heal(HealConfig(tied, data, output, **QUICK | {"max_steps": 1}))  # the advice is not in the way of itself


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"VERSION": "1"}, {}, "use FSDP1, .*; set fsdp_version: 2"),
        ({"AUTO_WRAP_POLICY": "NO_WRAP"}, {}, "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        (
            {"ACTIVATION_CHECKPOINTING": "true"},
            {},
            "fsdp_activation_checkpointing: false and give gradient_checkpoint",
        ),
        ({"CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "set fsdp_cpu_ram_efficient_loading: false"),
        ({"OFFLOAD_PARAMS": "true"}, {}, "set fsdp_offload_params: false"),
        ({}, {}, "use FSDP in one process; start several by `accelerate launch --num_processes N`"),
    ],
)
def test_heal_refuses_fsdp_that_it_cannot_do(tied, data, output, monkeypatch, settings, fields, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` passes its config on
    for name, value in ({"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"} | settings).items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    with pytest.raises(ValueError, match=message):
        heal(HealConfig(tied, data, output, **QUICK, **fields))
    assert not Path(output).exists()


def test_fsdp_units_and_checkpoints_are_checked(tied, tmp_path):
    model, plugin = AutoModelForCausalLM.from_pretrained(tied), SimpleNamespace(transformer_cls_names_to_wrap=None)
    check_units(model, plugin)
    plugin.transformer_cls_names_to_wrap = ["OlmoeDecoderLayer"]
    with pytest.raises(ValueError, match="names OlmoeDecoderLayer and not PoolOlmoeExperts"):
        check_units(model, plugin)
    plugin.transformer_cls_names_to_wrap = ["OlmoeDecoderLayer", "PoolOlmoeExperts"]
    check_units(model, plugin)
    check_checkpoint(tmp_path, is_sharded=False)
    with pytest.raises(ValueError, match="was written without FSDP, and this run is under it"):
        check_checkpoint(tmp_path, is_sharded=True)
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match="was written under FSDP, and this run is without it"):
        check_checkpoint(tmp_path, is_sharded=False)


def test_heal_leaves_the_disk_alone_when_the_data_is_missing(tied, output):
    with pytest.raises(FileNotFoundError, match=r"no file or folder nothing\.txt"):
        heal(HealConfig(tied, "nothing.txt", output, **QUICK))
    assert not Path(output).exists()


def test_heal_refuses_a_checkpoint_that_lacks_weights(tied, data, output, tmp_path):
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
    with pytest.raises(TiedMoeError, match=message):
        heal(HealConfig(**{"model": "m", "data": "d", "output": "o"} | options))


def test_heal_distills_from_the_source(source, tied, data, output, tmp_path):
    """With all the weight on the teacher, and the teacher the model itself, there is nothing to learn."""
    options = QUICK | {"teacher_weight": 1.0, "max_steps": 2}
    heal(HealConfig(tied, data, output, teacher=tied, **options))
    before, after = weights(tied), weights(output)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=3e-2, msg=name)  # Adam amplifies rounding
    report = heal(HealConfig(tied, data, str(tmp_path / "two"), teacher=source, allow_worse=True, **options))
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


@needs_soft_routing
def test_the_budget_of_soft_routing_has_its_own_rate_and_never_decays():
    config = TiedMoeConfig(family="olmoe", skip_first=1, skip_last=1, routing="softmoe", **TINY)
    for model in (TiedMoeForCausalLM(config), add_lora(TiedMoeForCausalLM(config), 2)):
        groups = pool_parameter_groups(model, lr=1.0, weight_decay=0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        (group,) = [each for each in groups if any("expert_budget" in names[id(p)] for p in each["params"])]
        assert (len(group["params"]), group["lr"], group["weight_decay"]) == (1, BUDGET_LR, 0.0)
        assert {each["lr"] for each in pool_parameter_groups(model, 1.0, budget_lr=0.5, lr_divisor="none")} == {1, 0.5}


@needs_soft_routing
def test_healing_moves_the_budget_at_its_own_rate(tmp_path):
    """As Adam's first steps do: by the rate, whatever the gradient; and not towards zero by weight decay."""
    config = TiedMoeConfig(family="olmoe", skip_first=1, skip_last=1, routing="softmoe", **TINY)
    model = TiedMoeForCausalLM(config)
    theta = model.base_model.expert_budget.theta
    theta.data.copy_(torch.tensor([0.5, -0.5, 0.5, -0.5]))
    args = TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=1e-5, weight_decay=0.5, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 300, (2, 16)).tolist()]
    HealTrainer(model, args, train_dataset=rows, data_collator=default_data_collator, budget_lr=0.2).train()
    moved = (theta - torch.tensor([0.5, -0.5, 0.5, -0.5])).abs()
    torch.testing.assert_close(moved, torch.full((4,), 0.2), rtol=0.01, atol=0)  # but for Adam's epsilon


def test_pool_parameter_groups_takes_only_what_is_trained():
    model = TiedMoeForCausalLM(TiedMoeConfig(family="olmoe", skip_first=1, skip_last=1, **TINY)).requires_grad_(False)
    pool = model.model.expert_pools[0].down_proj.requires_grad_(True)
    (group,) = pool_parameter_groups(model, lr=1.0)
    assert group["params"] == [pool]
    assert group["lr"] == pytest.approx(2**-0.5)

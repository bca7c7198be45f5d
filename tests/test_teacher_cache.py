"""A teacher's predictions on the disk stand for the teacher."""

import os
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_source, save_tied
from transformers import AutoModelForCausalLM, default_data_collator

from transformers_tiedmoe.training import teacher_cache, teachers
from transformers_tiedmoe.training.data import load_blocks
from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.live_teacher import LiveTeacher
from transformers_tiedmoe.training.teacher_cache import CachedTeacher, make_cache

OPTIONS = {
    "max_steps": 3,
    "block_size": 16,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "teacher_weight": 1.0,
    "allow_worse": True,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "text.txt").write_text(make_text())
    return save_tied(folder / "tied"), save_source(folder / "source"), str(folder / "text.txt")


@pytest.fixture(scope="module")
def rows(places):
    return load_blocks(places[2], make_tokenizer(), block_size=16)[0]


@pytest.fixture(scope="module")
def live(places):
    return LiveTeacher(AutoModelForCausalLM.from_pretrained(places[1]).eval(), temperature=2.0, has_head=True)


def losses(report):
    return [entry["loss"] for entry in report["history"] if "loss" in entry]


def test_heal_from_a_cache_is_heal_with_the_teacher(places, tmp_path, monkeypatch):
    """With all tokens kept, but for rounding to float16; the second time the teacher is not loaded at all."""
    model, source, data = places
    whole = heal(HealConfig(model, data, str(tmp_path / "live"), teacher=source, **OPTIONS))
    cache = {"teacher": source, "teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 320}
    once = heal(HealConfig(model, data, str(tmp_path / "once"), **cache, **OPTIONS))
    assert losses(once) == pytest.approx(losses(whole), rel=1e-2)
    assert once["after"]["loss"] == pytest.approx(whole["after"]["loss"], rel=1e-4)
    monkeypatch.setattr(teachers, "load_model", lambda *args, **options: pytest.fail("the teacher was loaded"))
    again = heal(HealConfig(model, data, str(tmp_path / "again"), fused_loss=True, **cache, **OPTIONS))
    assert losses(again) == pytest.approx(losses(once), rel=1e-4)
    with pytest.raises(ValueError, match=r"differs in its options: top_k was 320 and is 8; .* give another folder"):
        heal(HealConfig(model, data, str(tmp_path / "o"), **cache | {"teacher_top_k": 8}, **OPTIONS))
    Path(tmp_path / "short.txt").write_text(make_text()[:-400])
    with pytest.raises(ValueError, match=r"differs in its text: tokens_sha256 was .* give another folder"):
        heal(HealConfig(model, str(tmp_path / "short.txt"), str(tmp_path / "o"), **cache, **OPTIONS))
    with pytest.raises(ValueError, match=r"teacher_top_k=321, but .* knows 320 tokens; lower it"):
        heal(HealConfig(model, data, str(tmp_path / "o"), **cache | {"teacher_top_k": 321}, **OPTIONS))
    with pytest.raises(ValueError, match=r"teacher_cache=.* is also the data|the data .* lies in teacher_cache"):
        heal(HealConfig(model, data, str(tmp_path / "o"), **cache | {"teacher_cache": data}, **OPTIONS))
    os.utime(Path(source, "model.safetensors"), (1, 1))
    with pytest.raises(ValueError, match=r"differs in its teacher: model.safetensors was .* give another folder"):
        heal(HealConfig(model, data, str(tmp_path / "o"), **cache, **OPTIONS))


def test_each_block_has_its_own_predictions_and_a_killed_run_goes_on(rows, live, tmp_path, monkeypatch):
    """Of six shards four are kept and one is damaged: two are computed."""
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 16 * (6 * 8 + 4) * 15)
    monkeypatch.setattr(teacher_cache, "TOKENS_AT_A_TIME", 64)
    real, calls = LiveTeacher.targets, []

    def counted(self, inputs):
        calls.append(len(inputs["input_ids"]))
        if len(calls) == 19:
            raise KeyboardInterrupt
        return real(self, inputs)

    monkeypatch.setattr(LiveTeacher, "targets", counted)
    some = rows.select(range(80))
    arguments = (tmp_path, some, {"id": 1}, lambda: live, 8, 2.0)
    with pytest.raises(KeyboardInterrupt):
        make_cache(*arguments)
    (tmp_path / "teacher-00001.safetensors").write_bytes(b"damaged")
    del calls[:]
    calls.extend([0] * 20)
    make_cache(*arguments)
    assert sum(calls) == 80 - 3 * 15
    cached = CachedTeacher(some, tmp_path, 2.0)
    assert len(cached) == 80
    batch = default_data_collator([cached[i] for i in (79, 0, 17)])
    student = torch.randn(3 * 16, 320)
    targets = cached.targets(batch)
    assert set(batch) == {"input_ids", "labels"}
    found = cached.divergence(student, *(each.flatten(0, 1) for each in targets))
    whole = live.divergence(student, *(each.flatten(0, 1) for each in real(live, batch)))
    assert (found <= whole + 1e-3).all()
    assert (found > 0).all()
    logits = live.model(batch["input_ids"]).logits / 2
    assert torch.equal(targets[1].long(), logits.topk(8).indices)
    torch.testing.assert_close(targets[0].float(), logits.log_softmax(-1).topk(8).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        targets[2].exp() + targets[0].float().exp().sum(-1), torch.ones(3, 16), atol=1e-3, rtol=0
    )

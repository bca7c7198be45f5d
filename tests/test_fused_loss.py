"""The loss fused with the head is the loss, and takes less memory."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import TINY, make_text, save_source, save_tied
from families import tiny_config
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training import teachers
from transformers_tiedmoe.training.data import sequence_losses
from transformers_tiedmoe.training.distillation import distillation_loss, divergence, top_k_divergence, top_k_of
from transformers_tiedmoe.training.fused_loss import FusedLoss, fuse, head_logits, why_no_head, why_not_fused
from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.live_teacher import LiveTeacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from fused_loss import peak_bytes, steps

FIELDS = {**TINY, "initializer_range": 0.2, "output_router_logits": True, "router_aux_loss_coef": 0.1}


def tied(**fields):
    torch.manual_seed(0)
    return TiedMoeForCausalLM(TiedMoeConfig(family="olmoe", skip_first=1, skip_last=1, **FIELDS | fields))


def batch():
    ids = torch.randint(1, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 12) < 0.2, -100)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_loss_equals_that_of_whole_logits(temperature):
    """On text, from a teacher, and auxiliary; values and all gradients."""
    model, teacher = tied(), tied(num_attention_heads=4).eval().requires_grad_(False)
    inputs, items = batch(), torch.tensor(37)
    outputs = model(**inputs, num_items_in_batch=items)
    labels = inputs["labels"][:, 1:]
    kl = distillation_loss(outputs.logits[:, :-1], teacher(inputs["input_ids"]).logits[:, :-1], labels, temperature)
    auxiliary = outputs.aux_loss * model.config.router_aux_loss_coef * (labels != -100).sum() / items
    expected = torch.stack([outputs.loss - auxiliary, kl / items, auxiliary])
    wanted = gradients(model, expected @ torch.tensor([0.3, 0.7, 0.9]))

    fused, live = FusedLoss(model, chunk_size=5), LiveTeacher(teacher, temperature, has_head=True)
    found = fused.training_loss(
        lambda given: model(**given, num_items_in_batch=items).loss, inputs, live, live.targets(inputs)
    )
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-6, atol=1e-6)
    got = gradients(model, torch.stack(found) @ torch.tensor([0.3, 0.7, 0.9]))
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        sums, counts = fused.sequence_losses(lambda given: model(**given).loss, inputs)
        torch.testing.assert_close((sums, counts), sequence_losses(model, **inputs), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, outputs.loss)  # when nobody asks


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("granitemoe", {"logits_scaling": 7.0}),
        ("cohere2_moe", {"logit_scale": 0.1}),
        ("deepseek_v3", {}),  # its forward has no output_router_logits
        ("gemma4_text", {"final_logit_softcapping": 0.1}),  # and takes more than hidden states from its base model
    ],
)
def test_every_familys_own_form_of_logits_is_kept(family, fields):
    """Scaled or capped: the model's own forward makes them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **fields)).eval()
    ids = torch.randint(1, 60, (2, 12))
    assert why_not_fused(model, ids) is None
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(head_logits(model, hidden[1]), model(ids).logits[1], rtol=1e-5, atol=1e-6)


def test_a_model_of_another_form_is_refused_or_said(monkeypatch):
    """Logits that depend on more than the last hidden states; a loss of its own."""
    model, rows = OlmoeForCausalLM(OlmoeConfig(**FIELDS)), [{"input_ids": list(range(40))}]
    plain = OlmoeForCausalLM.forward
    assert fuse(model, rows, 10**9, None)[1] is None

    def with_memory(self, input_ids, **kwargs):
        outputs = plain(self, input_ids, **kwargs)
        outputs.logits = outputs.logits + F.one_hot(input_ids[:, -1:], 320)
        return outputs

    monkeypatch.setattr(OlmoeForCausalLM, "forward", with_memory)
    assert why_no_head(model, torch.arange(40)[None]) == "OlmoeForCausalLM has logits of another form"
    fused, why = fuse(model, rows, 10**9, None)
    assert fused is None
    assert "logits of another form" in why
    with pytest.raises(ValueError, match=r"fused_loss cannot be had: .* leave it out"):
        fuse(model, rows, 10, True)
    assert fuse(model, rows, 10, None) == (None, None), "nothing to gain"
    assert fuse(model, rows, 10**9, False) == (None, None)


def test_top_k_divergence_is_the_formula_and_at_k_of_the_vocabulary_the_whole():
    torch.manual_seed(0)
    logits, teacher = (3 * torch.randn(6, 9, requires_grad=True) for _ in range(2))
    for temperature in (1.0, 2.0):
        whole = divergence(logits, teacher, temperature)
        found = top_k_divergence(logits, *top_k_of(teacher, 9, temperature, torch.float32), temperature)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        for one, other in zip(
            *(torch.autograd.grad(each.sum(), logits, retain_graph=True) for each in (found, whole))
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        parts = top_k_of(teacher, 3, temperature)
        found = top_k_divergence(logits, *parts, temperature)
        q, p = (torch.softmax(each.detach().double() / temperature, -1) for each in (teacher, logits))
        q, p = [x.gather(-1, parts[1].long()) for x in (q, p)]
        q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
        expected = temperature**2 * (q * (q / p).log()).sum(-1)
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-3)  # of float16
        assert (found <= whole + 1e-3).all()


def test_fused_loss_takes_less_memory():
    """Peak of what forward and backward hold beyond the weights; the benchmark's default is a larger one of these."""
    whole, fused = steps(vocab_size=4096, tokens=256, hidden_size=16, chunk_size=16).values()
    assert whole()[0] == pytest.approx(fused()[0], rel=1e-6)
    logits = 256 * 4096 * 4
    assert peak_bytes(whole) > 5 * logits
    assert peak_bytes(fused) < logits


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    (folder / "text.txt").write_text(make_text())
    return save_tied(folder / "tied"), save_source(folder / "source"), str(folder / "text.txt")


def test_heal_with_the_fused_loss_ends_where_it_does_without(places, tmp_path, monkeypatch):
    """With a teacher in bfloat16 on the disk, layer by layer, read through accelerate's offload; and LoRA."""
    model, source, data = places
    layers = {f"model.layers.{i}": "disk" for i in range(1, TINY["num_hidden_layers"])}
    device = json.dumps({"model.embed_tokens": "cpu", "model.layers.0": "cpu", **layers, "model.norm": "cpu",
                         "model.rotary_emb": "cpu", "lm_head": "cpu"})  # fmt: skip
    reports = {}
    for name, fields in {"whole": {}, "fused": {"fused_loss": True}}.items():
        options = {
            "max_steps": 3,
            "block_size": 16,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "lora": True,
            "lora_rank": 4,
        }
        options |= {"teacher": source, "teacher_dtype": "bfloat16", "teacher_device": device, **fields}
        reports[name] = heal(HealConfig(model, data, str(tmp_path / name), **options))
        assert reports[name]["fused_loss"] is (name == "fused")
    for when in ("before", "after"):
        assert reports["fused"][when]["loss"] == pytest.approx(reports["whole"][when]["loss"], rel=1e-5)
    found, expected = ([each["loss"] for each in reports[name]["history"] if "loss" in each] for name in reports)
    assert found == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(teachers, "why_no_head", lambda *args: "a teacher of another form")
    options |= {"max_steps": 1, "lora": False, "allow_worse": True}
    report = heal(HealConfig(model, data, str(tmp_path / "headless"), **options))
    assert report["warnings"][0].startswith("the teacher's logits exist for whole batches")
    assert next(each["loss"] for each in report["history"] if "loss" in each) == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_device": "cpu"}, "teacher_device=cpu without a teacher"),
        ({"teacher": "s", "teacher_dtype": "int8"}, "teacher_dtype='int8' is unknown; choose one of auto, bfloat16"),
    ],
)
def test_teacher_options_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        HealConfig("m", "d", "o", **fields)


@pytest.mark.parametrize("device", ["tpu:7", "cuda:77", "{"])
def test_a_teachers_device_that_is_not_there(device, places, tmp_path):
    model, source, data = places
    with pytest.raises(
        ValueError, match=rf"teacher_device={re.escape(device)} cannot be used .*; expected cpu, cuda:1"
    ):
        heal(HealConfig(model, data, str(tmp_path / "o"), teacher=source, teacher_device=device, max_steps=1))

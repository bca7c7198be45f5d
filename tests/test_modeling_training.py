"""The tied model in training: checkpointing, compiling, precision, the router's losses, LoRA."""

import copy

import pytest
import torch
from families import tiny_config
from safetensors.torch import load_file
from test_families import family_model, make_experts_equal, tie
from tied_models import (
    OLDEST,
    TYING,
    tiny_model,
    tokens_fixture,  # noqa: F401
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    OlmoeForCausalLM,
)
from transformers.utils.output_capturing import CompileableContextVar

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, tokens):
    plain = tiny_model().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model(tokens, labels=tokens).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_compile_fullgraph(tokens):
    """One graph without breaks, forward and backward; `aot_eager` runs it without minutes of C++ compilation."""
    model = tiny_model(slot_maps=[True, False], num_hidden_layers=4, skip_first=0, skip_last=0)
    if OLDEST:  # its grouped_mm has a backward that the compiler cannot trace
        model.set_experts_implementation("batched_mm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if "expert_pools" in name}
    model.zero_grad()
    expected = model(tokens, labels=tokens, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_compile_fullgraph_with_inductor(tokens):
    model = tiny_model(num_hidden_layers=2, skip_first=0, skip_last=0)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tokens, tmp_path):
    model = tiny_model(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(pool.gate_up_proj.grad.isfinite().all() for pool in model.expert_pools)
    exact = copy.deepcopy(model).float()(tokens).logits
    assert (model(tokens).logits.float() - exact).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * exact.norm()
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype


def test_optimizer_sees_every_pool_once():
    model = tiny_model()
    ids = [id(p) for p in model.parameters()]
    assert len(ids) == len(set(ids))
    untied = family_model("olmoe")
    one_set = sum(p.numel() for p in untied.model.layers[0].mlp.experts.parameters())
    assert model.num_parameters() == untied.num_parameters() - 2 * one_set


def test_router_logits_and_balance_loss_over_unequal_widths(tokens):
    model = tiny_model(pool_num_experts=[8, 6], router_aux_loss_coef=0.5).train()
    out = model(tokens, labels=tokens, output_router_logits=True)
    assert [logits.shape[-1] for logits in out.router_logits] == [4, 8, 8, 6, 6, 4]
    plain = model(tokens, labels=tokens)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * out.aux_loss)
    out.loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)
    as_tuple = model(tokens, labels=tokens, output_router_logits=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)


def test_router_z_loss(tokens):
    model = tiny_model(output_router_logits=True, router_z_loss_coef=0.25)
    out = model(tokens, labels=tokens)
    plain = model(tokens, labels=tokens, output_router_logits=False).loss
    z = torch.stack([logits.logsumexp(-1).square().mean() for logits in out.router_logits]).mean()
    torch.testing.assert_close(out.loss, plain + model.config.router_aux_loss_coef * out.aux_loss + 0.25 * z)


def test_router_losses_and_reentrant_checkpointing(tokens):
    model = tiny_model(output_router_logits=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="reentrant"):
        model(tokens, labels=tokens)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(tokens, labels=tokens).loss.backward()


def test_router_losses_of_a_family_that_has_none(tokens):
    """deepseek_v3 reports router logits since transformers 5.23, by its base model, and has no loss of them."""
    if OLDEST:
        pytest.skip("its deepseek_v3 does not report router logits")
    source = family_model("deepseek_v3")
    model = tie(source, **TYING)
    make_experts_equal(source, model.config.groups)
    expected = source(tokens, labels=tokens, output_router_logits=True)
    out = model(tokens, labels=tokens, output_router_logits=True)
    assert out.loss.equal(expected.loss)
    for found, wanted in zip(out.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(found, wanted)
    model.config.router_aux_loss_coef = 0.5
    more = model(tokens, labels=tokens, output_router_logits=True)
    torch.testing.assert_close(more.loss, out.loss + 0.5 * out.aux_loss)


def test_a_family_that_reports_no_router_logits(tokens):
    model = tiny_model("gemma4_text")
    with pytest.raises(ValueError, match="does not report router logits"):
        model(tokens, output_router_logits=True)


def test_what_is_recorded_has_a_name_as_in_transformers(tokens, monkeypatch):
    """Whoever watches transformers' collectors, such as its own tests, finds ours by name among them."""
    found, original = [], CompileableContextVar.set
    monkeypatch.setattr(
        CompileableContextVar, "set", lambda self, value: found.append(sorted(value)) or original(self, value)
    )
    tiny_model()(tokens, output_router_logits=True, output_hidden_states=True)
    assert found == [["routings"], ["hidden_states"]]


@pytest.mark.parametrize("pool_num_experts", [4, 8])  # of 8 the tied layers are not those that the family made
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_gradient_checkpointing_by_config(auto, pool_num_experts):
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, pool_num_experts=pool_num_experts)
    config.gradient_checkpointing = True
    model = auto.from_config(config)
    assert all(layer.gradient_checkpointing for layer in model.base_model.layers)
    assert not hasattr(model.config, "gradient_checkpointing")  # taken, as by transformers: it is not saved


def test_what_the_head_of_every_family_answers_as_transformers_own(tokens):
    """As a class, without a family: serving code and tests of others ask these of it."""
    model = tiny_model()
    assert TiedMoeForCausalLM.main_input_name == "input_ids"
    assert TiedMoeForCausalLM.generate is OlmoeForCausalLM.generate
    assert TiedMoeForCausalLM.can_generate()
    assert TiedMoeForCausalLM._can_set_attn_implementation()
    loaded = TiedMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert type(loaded) is type(model)
    assert loaded(tokens).logits.equal(model(tokens).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_lora_on_attention_and_pools(implementation, tokens, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny_model(slot_maps=[True, False])
    base.set_experts_implementation(implementation)
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["expert_pools.0.gate_up_proj", "expert_pools.0.down_proj", "expert_pools.1.down_proj"],
    )
    before = base(tokens).logits.detach()
    model = get_peft_model(base, lora)
    torch.testing.assert_close(model(tokens).logits, before)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert sum("expert_pools" in name for name in adapters) == 6
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.2)
    logits = model(tokens).logits
    assert not torch.allclose(logits, before)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())

    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", experts_implementation=implementation)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(again(tokens).logits, logits)
    merged = again.merge_and_unload()
    assert isinstance(merged, TiedMoeForCausalLM)
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(loaded(tokens).logits, merged(tokens).logits)


def test_lora_on_a_pool_with_residuals(tokens):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model(residual_rank=2), LoraConfig(r=2, target_parameters=["expert_pools.0.down_proj"])
    )
    model(tokens).logits.logsumexp(-1).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert grads
    assert all(grad.abs().sum() > 0 for grad in grads)

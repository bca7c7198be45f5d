"""`experts_implementation="tiedmoe"`: every family's own models, and tied ones, against their eager experts."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from families import text_families, tiny_config, transformers_before
from test_experts import E, H, I, inputs
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoModelForCausalLM, CompileConfig, OlmoeConfig, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from tiedmoe_kernels import experts_forward, experts_forward_reference
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM, TiedMoeModel, experts_interface, modeling_tiedmoe
from transformers_tiedmoe.experts_interface import activation_of
from transformers_tiedmoe.families import expert_layers

# Families the kernels cannot compute, each with its error.
UNSUPPORTED = {
    "inkling2_text": "Inkling2Experts computes act\\(gate\\) \\* up with none of the formulas",
    "nemotron_h": "NemotronHExperts has experts without a gate",
}


NOT_TIED = {"gemma4"}  # test_families.py says why


if transformers_before("5.23"):
    NOT_TIED |= {"ernie4_5_moe", "lfm2_moe"}


FAMILIES = [f for f in text_families() if f not in NOT_TIED]


CLAMPED = {
    "gpt_oss": ("clamped_swiglu", 1.702, 7.0),
    "minimax_m3_vl_text": ("clamped_swiglu", 1.702, 7.0),
    "deepseek_v4": ("clamped_silu", 1.702, 10.0),
    "hy_v4": ("clamped_silu", 1.702, 10.0),
}


def outputs_and_gradients(model, implementation, tokens):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(tokens).logits
    torch.manual_seed(1)
    (logits * torch.randn_like(logits)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got.keys() == want.keys()
    scale = max(w.abs().max() for name, w in want.items() if name != "logits")
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-5 * float(scale), msg=name)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in UNSUPPORTED])
def test_every_family_equals_its_eager_experts(family, calls):
    config = tiny_config(family)
    tokens = torch.randint(3, 90, (1, 5))
    own = AutoModelForCausalLM.from_config(config).eval()
    layers = expert_layers(own)
    assert_same(outputs_and_gradients(own, "tiedmoe", tokens), outputs_and_gradients(own, "eager", tokens))
    assert calls == [1] * len(layers)
    first = own.get_submodule(next(iter(layers.values())))
    expected = CLAMPED.get(family, ("gelu_pytorch_tanh" if family == "gemma4_text" else "silu", 1.702, 7.0))
    assert tuple(activation_of(first)) == expected

    calls.clear()
    tied = TiedMoeForCausalLM(TiedMoeConfig.from_family(config, group_size=2, skip_first=1, skip_last=1)).eval()
    assert_same(outputs_and_gradients(tied, "tiedmoe", tokens), outputs_and_gradients(tied, "eager", tokens))
    groups = tied.config.groups
    assert sorted(calls) == sorted([len(g) for g in groups] + [1] * (len(layers) - sum(map(len, groups))))


@pytest.mark.parametrize("family", sorted(set(UNSUPPORTED) & set(FAMILIES)))
def test_unsupported_families_say_so(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    model.set_experts_implementation("tiedmoe")
    message = UNSUPPORTED[family] + '.*use experts_implementation="grouped_mm"'
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model(torch.randint(3, 90, (1, 5)))


def test_from_pretrained_takes_it_for_a_familys_own_checkpoint(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("olmoe")).save_pretrained(tmp_path)
    eager, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name).eval()
        for name in ("eager", "tiedmoe")
    )
    tokens = torch.randint(3, 90, (2, 6))
    assert ours.config._experts_implementation == "tiedmoe"
    torch.testing.assert_close(ours(tokens).logits, eager(tokens).logits, rtol=1e-4, atol=1e-5)
    assert ours.generate(tokens, max_new_tokens=3, do_sample=False).equal(
        eager.generate(tokens, max_new_tokens=3, do_sample=False)
    )


def olmoe_experts(activation="silu", experts_class=OlmoeExperts):
    config = OlmoeConfig(hidden_size=H, intermediate_size=I, num_experts=E, hidden_act=activation)
    config._experts_implementation = "tiedmoe"
    module = experts_class(config)
    for p in module.parameters():
        nn.init.normal_(p)
    return module


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_the_activation_is_found_and_survives_copies(activation):
    module = olmoe_experts(activation)
    assert activation_of(module).activation == activation
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        copied._apply_gate = None  # not asked again
        assert activation_of(copied) == activation_of(module)


class HalfClamped(OlmoeExperts):
    limit = 7.0

    def _apply_gate(self, gate_up):  # step3p7's: the clamp comes after silu
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=self.limit) * up.clamp(min=-self.limit, max=self.limit)


class HiddenClamp(OlmoeExperts):
    def _apply_gate(self, gate_up):  # a limit that no attribute tells of
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=40.0)) * up


@pytest.mark.parametrize("experts_class", [HalfClamped, HiddenClamp])
def test_a_formula_that_is_only_nearly_known_is_refused(experts_class):
    with pytest.raises(ValueError, match=f"{experts_class.__name__} computes act.* none of the formulas"):
        activation_of(olmoe_experts(experts_class=experts_class))


def test_a_norm_after_each_expert_is_refused():
    module = olmoe_experts()
    module.has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"OlmoeExperts has a norm after each expert.*grouped_mm"):
        module(torch.zeros(1, H), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))


def test_sentinels_of_expert_parallelism_cost_nothing():
    module, (x, index, weights) = olmoe_experts(), inputs("some inactive", torch.float32)
    want = experts_forward_reference(x, index, weights, module.gate_up_proj, module.down_proj)
    torch.testing.assert_close(module(x, index, weights), want)


def test_a_first_call_compiles_without_a_graph_break():
    module, (x, index, weights) = olmoe_experts("gelu"), inputs(dtype=torch.float32)
    assert "_tiedmoe_activation" not in vars(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [x, weights, *module.parameters()]
    got = torch.autograd.grad(compiled(x, index, weights).square().sum(), leaves)
    want = torch.autograd.grad(module(x, index, weights).square().sum(), leaves)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, index, weights), module(x, index, weights))


def tied_config(**fields):
    own = {name: fields.pop(name) for name in list(fields) if name == "hidden_act"}
    return TiedMoeConfig.from_family(tiny_config("olmoe", **own), group_size=2, skip_first=1, skip_last=1, **fields)


def test_a_tied_model_compiles_without_a_graph_break():
    config = TiedMoeConfig.from_family(tiny_config("olmoe", num_hidden_layers=2), groups=[[0, 1]])
    model = TiedMoeForCausalLM(config).train()
    model.set_experts_implementation("tiedmoe")
    tokens = torch.randint(3, 90, (1, 5))
    want = model(tokens, use_cache=False).logits
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


GENERATING = {
    "slot maps and residuals": {"slot_maps": True, "residual_rank": 2},
    "soft routing": {"routing": "softmoe", "softmoe": {"alpha": 0.1, "threshold": 0.2}},
}


def generating_model(name, device="cpu"):
    config = TiedMoeConfig.from_family(tiny_config("olmoe", num_hidden_layers=2), groups=[[0, 1]], **GENERATING[name])
    with torch.device(device):
        model = TiedMoeForCausalLM(config).eval()
    model.set_experts_implementation("tiedmoe")
    for parameter in model.parameters():  # residuals are zero at first, and all tokens nearly alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", GENERATING)
def test_generate_with_a_static_cache_compiles_its_step_as_one_graph(name):
    """As it does by itself on a GPU, where Inductor's CUDA graph then replays the step."""
    model, tokens = generating_model(name), torch.randint(3, 90, (2, 4))
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(tokens, **greedy)
    assert not torch._dynamo.utils.counters["stats"]
    got = model.generate(tokens, **greedy, cache_implementation="static", compile_config=compiled)
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", GENERATING)
def test_a_decoding_step_makes_no_tensor_on_the_host(name, monkeypatch):
    """Which would keep Inductor from replaying it as a CUDA graph; traced on the meta device, which is none's host."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no meta device
    model, devices = generating_model(name, "meta"), Counter()

    def see(graph, _):
        devices.update(
            value.device.type for node in graph.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)
        )
        return graph.forward

    cache = StaticCache(config=model.config, max_cache_len=8)
    heads, head_dim = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    cache.early_initialization(1, heads, head_dim, torch.float32, torch.device("meta"))
    step = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=see))
    tokens, place = (torch.zeros(1, 1, dtype=torch.int64, device="meta") for _ in range(2))
    with torch.no_grad():
        step(tokens, past_key_values=cache, position_ids=place)
    assert devices.keys() == {"meta"}


def test_the_forward_keeps_its_signature_and_class():
    import inspect

    model = TiedMoeModel(tied_config())
    family = inspect.signature(type(model)._family_class.forward)
    assert inspect.signature(type(model).forward) == family


def test_recompute_experts_is_a_config_field_and_changes_no_result(tmp_path):
    model = TiedMoeForCausalLM(tied_config(recompute_experts=True))
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="tiedmoe")
    assert model.config.recompute_experts is True
    assert "recompute_experts" not in model.config.to_family().to_dict()
    tokens, results = torch.randint(3, 90, (1, 5)), []
    for recompute in (True, False):
        model.config.recompute_experts = recompute
        results.append(outputs_and_gradients(model, "tiedmoe", tokens))
    assert_same(*results)


@pytest.mark.parametrize("gpu", [True, False])
def test_the_default_is_ours_where_a_gpu_is_present(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(experts_interface, "has_triton", lambda: True)
    model = TiedMoeForCausalLM(tied_config())
    assert model.config._experts_implementation == ("tiedmoe" if gpu else "grouped_mm")
    model.save_pretrained(tmp_path)
    for explicit in (None, "eager", "batched_mm"):
        kwargs = {} if explicit is None else {"experts_implementation": explicit}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
        assert loaded.config._experts_implementation == (explicit or model.config._experts_implementation)
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_the_default_is_not_ours_where_the_kernels_cannot_serve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))  # a T4
    monkeypatch.setattr(experts_interface, "has_triton", lambda: True)
    assert TiedMoeForCausalLM(tied_config()).config._experts_implementation == "grouped_mm"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert TiedMoeForCausalLM(tied_config()).config._experts_implementation == "tiedmoe"
    model = TiedMoeForCausalLM(tied_config(hidden_act="tanh"))
    assert model.config._experts_implementation == "grouped_mm"
    monkeypatch.setattr(experts_interface, "has_triton", lambda: False)
    assert TiedMoeForCausalLM(tied_config()).config._experts_implementation == "grouped_mm"


def test_a_tensor_parallel_weight_is_refused():
    class DTensor(torch.Tensor):
        pass

    gate_up = torch.zeros(2, 4, 4).as_subclass(DTensor)
    with pytest.raises(ValueError, match=r"a DTensor .tensor parallel. reached the experts"):
        experts_forward(
            torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), gate_up, torch.zeros(2, 4, 2)
        )


def with_residual(**fields):
    model = TiedMoeForCausalLM(tied_config(residual_rank=2, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_residual_b"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("fields", [{}, {"slot_maps": True, "pool_num_experts": 6}], ids=["identity", "slot maps"])
def test_a_residual_runs_on_the_kernels(fields, calls, monkeypatch):
    model, tokens = with_residual(**fields), torch.randint(3, 90, (1, 5))
    want = outputs_and_gradients(model, "eager", tokens)
    monkeypatch.setattr(modeling_tiedmoe, "experts_with_residual", None)  # nothing loops
    assert_same(outputs_and_gradients(model, "tiedmoe", tokens), want)
    assert sorted(calls) == [1, 1, 2, 2]  # the pools' gradients are deferred as ever


def test_a_residual_of_experts_that_the_kernels_do_not_know():
    config = TiedMoeConfig.from_family(tiny_config("nemotron_h"), group_size=2, residual_rank=2)
    model = TiedMoeForCausalLM(config)
    model.set_experts_implementation("tiedmoe")
    with pytest.raises(ValueError, match=UNSUPPORTED["nemotron_h"]):
        model(torch.randint(3, 90, (1, 5)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_tied_model(use_reentrant, calls):
    model = TiedMoeForCausalLM(tied_config()).train()
    tokens = torch.randint(3, 90, (1, 5))
    want = outputs_and_gradients(model, "eager", tokens)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(outputs_and_gradients(model, "tiedmoe", tokens), want)
    assert sorted(calls) == ([1] * 6 if use_reentrant else [1, 1, 2, 2])


def test_lora_on_pools_computes_layer_by_layer(calls):
    peft = pytest.importorskip("peft")
    model = TiedMoeForCausalLM(tied_config()).train()
    targets = ["expert_pools.0.gate_up_proj", "expert_pools.1.down_proj"]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    tokens = torch.randint(3, 90, (1, 5))
    got, want = (outputs_and_gradients_of_adapters(lora, name, tokens) for name in ("tiedmoe", "eager"))
    assert len(got) == 5
    assert_same(got, want)
    assert calls == [1, 1, 1, 1]


def outputs_and_gradients_of_adapters(lora, implementation, tokens):
    found = outputs_and_gradients(lora.base_model.model, implementation, tokens)
    return {name: t for name, t in found.items() if name == "logits" or "lora_" in name}


def test_slot_maps_and_wide_pools(calls):
    model = TiedMoeForCausalLM(tied_config(slot_maps=True, pool_num_experts=6)).eval()
    tokens = torch.randint(3, 90, (1, 5))
    assert_same(outputs_and_gradients(model, "tiedmoe", tokens), outputs_and_gradients(model, "eager", tokens))
    assert sorted(calls) == [1, 1, 2, 2]


def test_it_is_registered():
    assert ALL_EXPERTS_FUNCTIONS["tiedmoe"] is experts_interface.tiedmoe_experts_forward

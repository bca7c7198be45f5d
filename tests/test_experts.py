"""`tiedmoe_kernels.experts_forward` on a CPU against the reference, and `experts_implementation="tiedmoe"` on every
family.
"""

import copy
import pickle
import sys
from collections import Counter

import pytest
import torch
import transformers
from families import moe_families, tiny_config
from packaging.version import Version
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoModelForCausalLM, CompileConfig, OlmoeConfig, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from tiedmoe_kernels import ACTIVATIONS, backends, experts_forward, experts_forward_reference, torch_backend
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM, TiedMoeModel, experts_interface, modeling_tiedmoe
from transformers_tiedmoe.experts_interface import activation_of
from transformers_tiedmoe.families import canonical_family, expert_layers

T, H, I, E, K = 7, 8, 4, 5, 3  # rows of 16 bytes in float32, for which the CPU backend has a path of its own

LAYOUTS = {
    "plain": {},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "gpt_oss": {"is_transposed": True, "is_concatenated": False, "bias": True},
    "biased": {"bias": True},
}
ROUTINGS = {
    "uniform": lambda: torch.stack([torch.randperm(E)[:K] for _ in range(T)]),
    "one expert": lambda: torch.full((T, K), 2),  # K duplicates a token, and E - 1 empty experts
    "one slot": lambda: torch.randint(E, (T, 1)),  # K = 1
    "one token": lambda: torch.randint(E, (1, K)),  # T = 1 has a sum of its own
    "no token": lambda: torch.randint(E, (0, K)),
    "some inactive": lambda: torch.randint(E + 1, (T, K)).index_fill(0, torch.tensor([0, 3]), E),
    "all inactive": lambda: torch.full((T, K), E),
    "one inactive token": lambda: torch.full((1, K), E),
}


def pool(layout="plain", dtype=torch.float64, scale=1.0):
    flags = dict(LAYOUTS[layout])
    swap = flags.get("is_transposed", False)
    weights = {"gate_up_proj": torch.randn(E, 2 * I, H), "down_proj": torch.randn(E, H, I)}
    weights = {name: w.transpose(1, 2).contiguous() if swap else w for name, w in weights.items()}
    if flags.pop("bias", False):
        weights |= {"gate_up_proj_bias": torch.randn(E, 2 * I), "down_proj_bias": torch.randn(E, H)}
    return {name: (scale * w).to(dtype).requires_grad_() for name, w in weights.items()}, flags


def inputs(routing="uniform", dtype=torch.float64):
    index = ROUTINGS[routing]()
    x = torch.randn(len(index), H, dtype=dtype, requires_grad=True)
    weights = torch.rand(index.shape, dtype=dtype)
    return x, index, weights.masked_fill(index == E, torch.nan).requires_grad_()  # not read where inactive


def both(x, index, weights, matrices, **flags):
    """Outputs and gradients of the function and of the reference."""
    found = []
    leaves = [x, weights, *matrices.values()]
    for function in (experts_forward, experts_forward_reference):
        y = function(x, index, weights, **matrices, **flags)
        grad_y = (torch.arange(y.numel()) % 7 - 3).view_as(y).to(y.dtype)  # no dtype rounds it
        found.append([y, *torch.autograd.grad(y, leaves, grad_y)])
        flags.pop("recompute", None)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference(activation, layout):
    matrices, flags = pool(layout, scale=2.0)
    limits = {"swiglu_limit": 2.5, "swiglu_alpha": 1.3}  # small enough that the clamp acts
    got, want = both(*inputs(), matrices, activation=activation, **limits, **flags)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["plain", "gpt_oss"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_reference_at_every_routing(routing, layout, recompute):
    matrices, flags = pool(layout)
    got, want = both(*inputs(routing), matrices, recompute=recompute, **flags)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("R", [2 * E, E, 3])  # more router indices than experts (shared), as many, fewer
def test_slot_map(R):
    matrices, flags = pool("biased")
    x, _, weights = inputs()
    index = torch.randint(R + 1, weights.shape)  # R is inactive
    got, want = both(x, index, weights, matrices, slot_map=torch.randint(E, (R,)), **flags)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # in float32 torch's grouped_mm is tried
def test_views_that_are_not_contiguous(dtype):
    matrices, _ = pool(dtype=dtype)
    x = torch.randn(H, T, dtype=dtype).T.requires_grad_()
    index, weights = (t.T for t in (ROUTINGS["uniform"]().T.clone(), torch.rand(K, T, dtype=dtype)))
    matrices["gate_up_proj"] = torch.cat([matrices["gate_up_proj"].detach()] * 2, 1)[:, 2 * I :].requires_grad_()
    matrices["down_proj"] = matrices["down_proj"].detach().mT.contiguous().mT.requires_grad_()
    got, want = both(x, index, weights.requires_grad_(), matrices)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_dtype(dtype, recompute):
    matrices, flags = pool("gpt_oss", dtype)
    x, index, _ = inputs(dtype=dtype)
    weights = torch.rand(index.shape, requires_grad=True)  # routers often work in float32
    wide = {name: w.detach().double().requires_grad_() for name, w in matrices.items()}
    got, _ = both(x, index, weights, matrices, recompute=recompute, **flags)
    _, want = both(x.detach().double().requires_grad_(), index, weights, wide, **flags)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for a, b, leaf in zip(got, want, [x, x, weights, *matrices.values()]):
        assert a.dtype == leaf.dtype
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")
@pytest.mark.parametrize(
    "routing", ["one token", "one slot", "some inactive"]
)  # experts of one to three rows, and more
def test_experts_of_few_rows_have_a_product_of_their_own(routing, monkeypatch):
    monkeypatch.setattr(torch_backend, "_IN_CACHE", 0)
    monkeypatch.setattr(torch_backend, "_PIECES", 4)
    found, original = [], torch_backend._few_rows
    monkeypatch.setattr(torch_backend, "_few_rows", lambda x, *rest: found.append(len(x)) or original(x, *rest))
    matrices, flags = pool("biased", torch.float32)
    x, index, _ = inputs(routing, torch.float32)
    weights = torch.rand(index.shape, requires_grad=True)
    got, want = both(x, index, weights, matrices, **flags)
    rows = torch.bincount(index.flatten(), minlength=E + 1)[:E]
    assert found == 2 * [
        n for n in rows.tolist() if 0 < n <= 3
    ]  # up and down; dy through them is stored the other way
    assert found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    again, _ = both(x, index, weights, matrices, **flags)
    assert all(map(torch.equal, got, again))


def test_an_autocast_region_does_not_round_the_float32_parts():
    matrices, flags = pool("gpt_oss", torch.bfloat16)
    x, index, _ = inputs(dtype=torch.bfloat16)
    weights = torch.rand(index.shape, requires_grad=True)
    plain, _ = both(x, index, weights, matrices, **flags)
    with torch.autocast("cpu", torch.bfloat16):
        region, _ = both(x, index, weights, matrices, **flags)
    torch.testing.assert_close(region, plain, rtol=0, atol=0)


def test_a_default_device_does_not_matter():
    matrices, _ = pool("biased")
    x, index, weights = inputs("some inactive")
    with torch.device("meta"):
        y = experts_forward(x, index, weights, **matrices)
    torch.testing.assert_close(y, experts_forward(x, index, weights, **matrices))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'; choose one of silu"),
        ({"down_proj": torch.zeros(E, I, H)}, r"down_proj of \(5, 8, 4\); found down_proj \(5, 4, 8\)"),
        ({"down_proj": torch.zeros(H, I)}, "must be 3-D"),
        ({"gate_up_proj_bias": torch.zeros(E, I)}, r"gate_up_proj_bias must be \(5, 8\) to fit the pool"),
        ({"down_proj_bias": torch.zeros(H)}, r"down_proj_bias must be \(5, 8\) to fit the pool; found \(8,\)"),
        ({"hidden_states": torch.zeros(T, H + 1)}, r"must be \[T, 8\]"),
        ({"top_k_weights": torch.zeros(T, K + 1)}, r"must both be \[T, K\] with T=7"),
        ({"top_k_index": torch.zeros(T, K, dtype=torch.int32)}, "must be int64; found torch.int32"),
        ({"top_k_index": torch.full((T, K), E + 1)}, r"lie in \[0, 5\] \(5 marks an inactive slot\); found 6 to 6"),
        ({"top_k_index": torch.full((T, K), -1)}, "found -1 to -1"),
        ({"slot_map": torch.full((4,), E)}, r"slot_map must lie in \[0, 4\]; found 5 to 5"),
        ({"slot_map": torch.zeros(4, 1, dtype=torch.int64)}, r"slot_map must be \[R\], one pool row per router index"),
        ({"down_proj": torch.zeros(E, H, I, dtype=torch.bfloat16)}, "one dtype; found torch.float32 and torch.bfloat"),
        ({"gate_up_proj": torch.zeros(E, 2 * I, H, dtype=torch.int8)}, "on cpu must be one of .*; found torch.int8"),
        ({"hidden_states": torch.zeros(T, H).to(torch.float8_e4m3fn)}, "hidden_states must be bfloat16, float16"),
        ({"top_k_weights": torch.zeros(T, K, dtype=torch.int64)}, "top_k_weights must be .*; found torch.int64"),
        ({"down_proj": torch.zeros(E, H, I, device="meta")}, "must be on cpu, where hidden_states is; found .* meta"),
        (
            {"residual": (torch.zeros(E, 2, H),) * 4},
            r"residual of gate_up_proj must be b \[5, 8, r\] and a \[5, r, 8\]",
        ),
        ({"residual": (torch.zeros(E, 2 * I, 1),)}, "b and a of gate_up_proj, b and a of down_proj; found 1 tensors"),
        (
            {
                "residual": [torch.zeros(E, *shape) for shape in ((2 * I, 2), (2, H), (H, 2), (2, I))],
                "slot_map": torch.full((E,), E),
            },
            r"slot_map must lie in \[0, 4\]; found 5 to 5",
        ),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "hidden_states": torch.zeros(T, H),
        "top_k_index": torch.zeros(T, K, dtype=torch.int64),
        "top_k_weights": torch.zeros(T, K),
        "gate_up_proj": torch.zeros(E, 2 * I, H),
        "down_proj": torch.zeros(E, H, I),
    }
    experts_forward(**arguments)
    with pytest.raises(ValueError, match=message):
        experts_forward(**(arguments | change))


def test_a_device_without_a_backend_is_named():
    matrices, _ = pool()
    arguments = [*inputs(), *matrices.values()]
    with pytest.raises(ValueError, match="no backend for device 'meta'; expected cpu or cuda"):
        experts_forward(
            *(t.detach().to("meta").to(torch.float32 if t.is_floating_point() else None) for t in arguments)
        )


def test_a_gpu_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    ours = {name: module for name, module in sys.modules.items() if name.startswith("tiedmoe_kernels.")}
    for name, module in ours.items():  # an earlier test may have imported them, and triton with them
        if name == "tiedmoe_kernels.triton_backend" or hasattr(module, "triton"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(name, raising=False)
    backends.backend_of.cache_clear()  # another test may have been on a GPU
    with pytest.raises(ImportError, match=r"needs triton>=3.6, which is not installed; install the torch wheel"):
        backends.backend_of("cuda")


# Families the kernels cannot compute, each with its error.
UNSUPPORTED = {
    "inkling2_text": "Inkling2Experts computes act\\(gate\\) \\* up with none of the formulas",
    "nemotron_h": "NemotronHExperts has experts without a gate",
}
NOT_TIED = {"gemma4"}  # test_families.py says why
if Version(transformers.__version__) < Version("5.23"):
    NOT_TIED |= {"ernie4_5_moe", "lfm2_moe"}
# "qwen3_5_moe" and the like stand for their text models, which are in the list, too.
FAMILIES = [f for f in moe_families() if f not in NOT_TIED and canonical_family(f) == f]
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", ["plain", "gpt_oss"])
@pytest.mark.parametrize("slot_map", [None, [3, 0, 0, 4, 1, 3]], ids=["identity", "slot map"])
def test_a_residual_equals_the_reference(slot_map, layout, recompute):
    matrices, flags = pool(layout)
    R = E if slot_map is None else len(slot_map)
    for routing in ROUTINGS if recompute else ["some inactive"]:
        x, index, weights = inputs(routing)
        index = torch.where(index == E, R, index)
        factors = residual_factors(matrices, R)
        leaves = [x, weights, *matrices.values(), *factors]
        mapped = None if slot_map is None else torch.tensor(slot_map)
        found = []
        for function, more in ((experts_forward, {"recompute": recompute}), (experts_forward_reference, {})):
            y = function(x, index, weights, **matrices, **flags, slot_map=mapped, residual=factors, **more)
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def residual_factors(matrices, R, rank=2):
    shapes = [w.shape for w in (matrices["gate_up_proj"], matrices["down_proj"])]
    return tuple(
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for _, rows, columns in shapes for shape in ((R, rows, rank), (R, rank, columns))
    )  # fmt: skip


def test_a_frozen_residual_and_one_of_another_dtype():
    matrices, _ = pool(dtype=torch.float32)
    x, index, _ = inputs(dtype=torch.float32)
    weights = torch.rand(index.shape)
    factors = residual_factors(matrices, E)  # float64: computed in the pool's dtype, its gradient float64
    y = experts_forward(x, index, weights, **matrices, residual=factors)
    grads = torch.autograd.grad(y.sum(), [x, *factors])
    assert [g.dtype for g in grads] == [torch.float32] + [torch.float64] * 4
    frozen = tuple(f.detach() for f in factors)
    y_frozen = experts_forward(x, index, weights, **matrices, residual=frozen)
    assert torch.equal(y, y_frozen)
    assert torch.equal(torch.autograd.grad(y_frozen.sum(), x)[0], grads[0])


@pytest.mark.parametrize("slot_map", [None, [3, 0, 0, 4, 1, 3]], ids=["identity", "slot map"])
def test_a_residual_is_compiled(slot_map):
    matrices, _ = pool("biased")
    x, index, weights = inputs()
    mapped = None if slot_map is None else torch.tensor(slot_map)
    factors = residual_factors(matrices, E if slot_map is None else len(slot_map))

    def layer(x):
        return experts_forward(x, index, weights, **matrices, slot_map=mapped, residual=factors)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves, found = [x, weights, *matrices.values(), *factors], []
    for function in (compiled, layer):
        y = function(x)
        with torch.no_grad():
            torch.testing.assert_close(function(x), y.detach())
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*found)
    torch.library.opcheck(
        torch.ops.tiedmoe_kernels.experts,
        experts_op_arguments(x, index, weights, matrices, factors),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def experts_op_arguments(x, index, weights, matrices, factors):
    b_up, a_up, b_down, a_down = factors
    spec = ("silu", 1.702, 7.0, False, True)
    return (x, index, weights, *matrices.values(), None, *spec, True, [a_up, b_up, a_down, b_down])


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

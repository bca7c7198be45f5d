"""The tied model under what its users do to it: save, load, train, compile, adapt, generate."""

import copy
import io
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import tiny_config
from safetensors.torch import load_file, save_file
from test_families import family_model, make_experts_equal, tie, tied_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
    OlmoeForCausalLM,
)
from transformers.initialization import no_init_weights
from transformers.utils.output_capturing import CompileableContextVar

import transformers_tiedmoe
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM, TiedMoeModel
from transformers_tiedmoe.families import expert_layers
from transformers_tiedmoe.modeling_tiedmoe import TiedExperts
from transformers_tiedmoe.parallel import POOLS

OLDEST = transformers.__version__ < "5.23"
TYING = {"group_size": 2, "skip_first": 1, "skip_last": 1}


def tiny_model(family="olmoe", dtype=None, **fields) -> TiedMoeForCausalLM:
    tying = {
        name: fields.pop(name)
        for name in list(fields)
        if name in (*TYING, "pool_num_experts", "slot_maps", "residual_rank", "router_z_loss_coef")
    }
    config = TiedMoeConfig.from_family(tiny_config(family, **fields), **{**TYING, **tying})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 10))


# Names and identity


def test_classes():
    model = tiny_model()
    assert isinstance(model, TiedMoeForCausalLM)
    assert isinstance(model, OlmoeForCausalLM)
    assert isinstance(model.model, TiedMoeModel)
    assert isinstance(TiedMoeForCausalLM(model.config), TiedMoeForCausalLM)
    assert len(model.expert_pools) == 2
    assert model.expert_pools is model.model.expert_pools
    views = [name for name, module in model.named_modules() if isinstance(module, TiedExperts)]
    assert views == [f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 3, 4)]


def test_a_familys_config_is_refused():
    with pytest.raises(ValueError, match="got a OlmoeConfig; expected a TiedMoeConfig"):
        TiedMoeForCausalLM(tiny_config("olmoe"))


def test_from_pretrained_by_every_name(tmp_path, tokens):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for loader in (TiedMoeForCausalLM, AutoModelForCausalLM, type(model)):
        torch.testing.assert_close(loader.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    for loader in (TiedMoeModel, AutoModel):
        base, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(base, TiedMoeModel)
        assert not info["missing_keys"]


def test_an_untied_checkpoint_is_refused(tmp_path):
    family_model("olmoe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'olmoe' model; expected 'tiedmoe'"):
        TiedMoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("auto", "family"),
    [
        (AutoModelForSequenceClassification, "mixtral"),
        (AutoModelForSequenceClassification, "deepseek_v3"),
        (AutoModelForTokenClassification, "qwen3_moe"),
        (AutoModelForTokenClassification, "gpt_oss"),
    ],
)
def test_classification_heads(auto, family, tmp_path, tokens):
    config = TiedMoeConfig.from_family(tiny_config(family, num_labels=3), **TYING)
    model = auto.from_config(config).eval()
    logits = model(tokens).logits
    assert logits.shape == ((2, 3) if auto is AutoModelForSequenceClassification else (2, 10, 3))
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(tokens).logits, logits)


def test_a_head_that_the_family_lacks():
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForTokenClassification.from_config(config)
    with pytest.raises(ValueError, match="no ForTokenClassification of family 'olmoe'"):
        transformers_tiedmoe.TiedMoeForTokenClassification(config)


# Memory and bytes


class AllocatedBytes(TorchDispatchMode):
    """Bytes of every storage that an operation newly takes on the CPU."""

    def __init__(self):
        super().__init__()
        self.total, self.seen = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and t.device.type == "cpu"
        }
        if (
            isinstance(out, torch.Tensor)
            and out.device.type == "cpu"
            and out.untyped_storage().data_ptr() not in known
        ):
            self.total += out.untyped_storage().nbytes()
            self.seen.append((tuple(out.shape), str(func)))
        return out


def expert_bytes(model) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name or "expert_pools." in name)


@pytest.mark.parametrize("how", ["class", "from_config", "from_pretrained"])
def test_no_untied_expert_is_ever_allocated(how, tmp_path):
    """With g=4 over four of six layers, three sets of experts are left: not a byte of a fourth is taken."""
    config = TiedMoeConfig.from_family(
        tiny_config("olmoe", intermediate_size=96), group_size=4, skip_first=1, skip_last=1
    )
    if how == "from_pretrained":
        TiedMoeForCausalLM(config).save_pretrained(tmp_path)
    make = {
        "class": lambda: TiedMoeForCausalLM(config),
        "from_config": lambda: AutoModelForCausalLM.from_config(config),
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
    }[how]
    with AllocatedBytes() as allocated:
        model = make()
    one_set = expert_bytes(model) // 3
    experts = [shape for shape, _ in allocated.seen if len(shape) == 3 and shape[0] == 4]
    by_factory = [shape for shape, op in allocated.seen if len(shape) == 3 and shape[0] == 4 and "empty" in op]
    assert sum(torch.Size(shape).numel() * 4 for shape in by_factory) <= 3 * one_set
    assert expert_bytes(model) == 3 * one_set
    if how == "from_pretrained":
        assert len(experts) == 0 or len(experts) <= 6  # each tensor of the file once


def test_saved_bytes_are_exact(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert sum(t.nbytes for t in saved.values()) == sum(p.nbytes for p in model.parameters())
    assert sorted(name for name in saved if "expert_pools" in name) == [
        f"model.expert_pools.{p}.{name}" for p in (0, 1) for name in ("down_proj", "gate_up_proj")
    ]


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_old_per_expert_keys_of_untied_layers_are_read(family, tmp_path, tokens):
    model = tiny_model(family)
    model.save_pretrained(tmp_path, save_original_format=True)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(".experts.3." in name for name in names)  # the family's old layout, in the untied layers
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_sharded(tmp_path, tokens):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_missing_pool_is_reported(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.expert_pools.1.down_proj"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.expert_pools.1.down_proj"}


# Slot maps and residuals


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_union_pool_is_the_source(family, implementation, tokens):
    """P = g*E with slot maps: bit for bit the untied model (design.md, 5)."""
    source = family_model(family)
    groups = TiedMoeConfig.from_family(source.config, **TYING).groups
    sizes = [4 * len(group) for group in groups]
    config = TiedMoeConfig.from_family(source.config, groups=groups, slot_maps=True, pool_num_experts=sizes)
    union = TiedMoeForCausalLM(config).eval()  # the default slot map is the union's
    paths, state = expert_layers(source), dict(source.state_dict())
    for p, group in enumerate(config.groups):
        for name in [n.removeprefix(paths[group[0]] + ".") for n in state if n.startswith(paths[group[0]] + ".")]:
            layers = [state.pop(f"{paths[layer]}.{name}") for layer in group]
            state[f"model.expert_pools.{p}.{name}"] = torch.cat(layers)
    missing, unexpected = union.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("slot_map") for name in missing)
    source.set_experts_implementation(implementation)
    union.set_experts_implementation(implementation)
    with torch.no_grad():
        assert torch.equal(union(tokens).logits, source(tokens).logits)


def test_slot_map_is_saved_and_loaded(tmp_path, tokens):
    model = tiny_model(slot_maps=[True, False], pool_num_experts=[3, 4])
    model.model.layers[2].mlp.experts.slot_map.copy_(torch.tensor([2, 2, 0, 1]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [name for name in saved if "slot_map" in name] == [f"model.layers.{i}.mlp.experts.slot_map" for i in (1, 2)]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    assert again.model.layers[2].mlp.experts.slot_map.tolist() == [2, 2, 0, 1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


@pytest.mark.skipif(OLDEST, reason="its eager experts do not know the sentinel")
def test_sentinel_reaches_the_pool_as_its_own():
    """Router index E means inactive; in a pool of another size the sentinel is that size."""
    model = tiny_model(slot_maps=True, pool_num_experts=6)
    view, seen = model.model.layers[2].mlp.experts, []
    model.expert_pools[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model.set_experts_implementation("eager")
    x, weights = torch.randn(3, 32), torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.0, 0.0]])
    inactive = view(x, torch.tensor([[1, 4], [3, 4], [4, 4]]), weights)
    assert seen[0].tolist() == [[5, 6], [1, 6], [6, 6]]  # position 1 of the group: (4 + slot) % 6
    single = view(x[:2], torch.tensor([[1], [3]]), weights[:2, :1])
    torch.testing.assert_close(inactive, torch.cat([single, torch.zeros(1, 32)]))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "deepseek_v4"])
def test_residual_adds_to_the_pools_weights(family, tokens, tmp_path):
    """Equal to the family's model whose weights are `W + b @ a`; also biased, transposed and without a gate."""
    source = family_model(family)
    config = TiedMoeConfig.from_family(source.config, group_size=2, skip_first=0, skip_last=0, residual_rank=3)
    model = TiedMoeForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tied_state_dict(source, config), strict=False)
    assert not unexpected
    assert all("_residual_" in name for name in missing)
    make_experts_equal(source, config.groups)
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits)  # b starts at zero

    paths = expert_layers(source)
    for layer in [layer for group in config.groups for layer in group]:
        view, own = model.get_submodule(paths[layer]), source.get_submodule(paths[layer])
        for name in view.residual_names:
            b, a = view.get_parameter(f"{name}_residual_b"), view.get_parameter(f"{name}_residual_a")
            b.data.normal_(std=0.3), a.data.normal_(std=0.3)
            own.get_parameter(name).data += b.data @ a.data
    logits = model(tokens).logits
    torch.testing.assert_close(logits, source(tokens).logits, rtol=1e-3, atol=1e-4)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "residual" in n or "expert_pools" in n)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(again(tokens).logits, logits)


# Training


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


# Router losses


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


# Generation


def test_beam_search_sampling_and_left_padding(tokens):
    source = family_model("olmoe")
    model = tie(source, **TYING)
    make_experts_equal(source, model.config.groups)
    common = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    beams = {"num_beams": 3, "do_sample": False, **common}
    assert torch.equal(model.generate(tokens, **beams), source.generate(tokens, **beams))
    for _ in range(2):
        drawn = []
        for m in (model, source):
            torch.manual_seed(7)
            drawn.append(m.generate(tokens, do_sample=True, top_k=5, **common))
        assert torch.equal(*drawn)
    short = tokens[:, 4:]
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), short], dim=1)
    mask = (torch.arange(10) >= 4).long().expand(2, -1)
    alone = model.generate(short, do_sample=False, **common)
    together = model.generate(padded, attention_mask=mask, do_sample=False, **common)
    assert torch.equal(together[:, 4:], alone)


def test_resize_token_embeddings(tokens):
    model = tiny_model()
    before = model(tokens).logits
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120
    torch.testing.assert_close(model(tokens).logits[..., :96], before)


# Copies, devices, backends


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(how, tokens):
    model = tiny_model(slot_maps=True, residual_rank=2)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert type(again) is type(model)
    logits = model(tokens).logits
    torch.testing.assert_close(again(tokens).logits, logits)
    with torch.no_grad():
        again.expert_pools[0].down_proj.zero_()  # the copy's views read the copy's pools
    assert not torch.allclose(again(tokens).logits, logits)
    torch.testing.assert_close(model(tokens).logits, logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_set_experts_implementation(implementation, tokens, tmp_path):
    model = tiny_model()
    expected = model(tokens).logits
    model.set_experts_implementation(implementation)
    assert model.expert_pools[0].config._experts_implementation == implementation
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    assert loaded.config._experts_implementation == implementation
    with pytest.raises(ValueError, match="not supported"):
        model.set_experts_implementation("no_such_backend")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation(attention, tokens):
    model = tiny_model()
    model.set_attn_implementation(attention)
    assert model.model.layers[2].self_attn.config._attn_implementation == attention
    assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("device_map", ["auto", "offload"])
def test_device_map_and_offload(device_map, tokens, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    if device_map == "offload":  # the pools and two layers live on disk, between calls
        on_disk = ("model.expert_pools", "model.layers.2", "model.layers.3")
        on_cpu = (
            "model.embed_tokens",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
            *(f"model.layers.{i}" for i in (0, 1, 4, 5)),
        )
        places = dict.fromkeys(on_disk, "disk") | dict.fromkeys(on_cpu, "cpu")
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert loaded.expert_pools[0].down_proj.is_meta
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_pools_are_never_split_between_devices():
    assert {"PoolOlmoeExperts", "OlmoeDecoderLayer"} <= tiny_model()._no_split_modules


@pytest.mark.parametrize("as_dict", [False, True])
def test_pipeline_parallelism_is_refused(as_dict, tmp_path):
    from transformers.distributed import DistributedConfig

    tiny_model().save_pretrained(tmp_path)
    plan = {"pp_size": 2} if as_dict else DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match="pp_size=2 on a tied model, whose groups may lie in two stages"):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=plan)


def test_tensor_parallelism_needs_a_transformers_with_plans_by_module(monkeypatch):
    from transformers.distributed.mixin import DistributedMixin

    monkeypatch.delattr(DistributedMixin, "_expand_parallel_plan", raising=False)
    with pytest.raises(ValueError, match=r"tp_size=2 on a tied model needs transformers 5\.23"):
        type(tiny_model()).prepare_distribute_model({"tp_size": 2})


def test_meta_device_and_init_empty_weights():
    from accelerate import init_empty_weights

    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING)
    with torch.device("meta"):
        assert all(p.is_meta for p in TiedMoeForCausalLM(config).parameters())
    with init_empty_weights():
        model = TiedMoeForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    buffers = dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in TiedMoeForCausalLM(config).named_buffers():
        assert buffers[name].equal(buffer)  # real, as of the family's own model


@pytest.mark.parametrize("slot_maps", [False, True])
def test_without_initialisation_parameters_are_unset_and_buffers_right(slot_maps, tokens):
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, slot_maps=slot_maps)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config).eval()
    assert all(parameter.isnan().all() for parameter in model.parameters())
    for name, buffer in expected.named_buffers():
        assert model.get_buffer(name).equal(buffer), name
    torch.manual_seed(0)
    model.init_weights()
    assert model(tokens).logits.equal(expected(tokens).logits)


@pytest.mark.parametrize("pool_num_experts", [4, 8])  # of 8 the tied layers are not those that the family made
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_gradient_checkpointing_by_config(auto, pool_num_experts):
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), **TYING, pool_num_experts=pool_num_experts)
    config.gradient_checkpointing = True
    model = auto.from_config(config)
    assert all(layer.gradient_checkpointing for layer in model.base_model.layers)
    assert not hasattr(model.config, "gradient_checkpointing")  # taken, as by transformers: it is not saved


@pytest.mark.parametrize("slot_maps", [False, True])
def test_dispatch_of_a_model_built_without_memory(slot_maps, tokens, tmp_path):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    loaded = tiny_model(slot_maps=slot_maps)
    loaded.save_pretrained(tmp_path / "model")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(loaded.config)
    model = load_checkpoint_and_dispatch(
        model, tmp_path / "model", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert model.eval()(tokens).logits.equal(loaded(tokens).logits)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("groups", [[], [[1, 2], [3, 4]]])
def test_export_with_our_experts(groups, family, tokens):
    config = TiedMoeConfig.from_family(tiny_config(family, use_cache=False), groups=groups)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="tiedmoe").eval()
    exported = torch.export.export(model, (tokens,), strict=False).module()
    torch.testing.assert_close(exported(tokens).logits, model(tokens).logits)


def test_continuous_batching_of_a_model_that_reports_router_logits(tokens):
    """`generate_batch` packs requests and gives no labels: there is no loss to add router losses to."""
    model = tiny_model(output_router_logits=True, num_hidden_layers=4)
    generation = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    size = "block_size" if OLDEST else "page_size"
    small = ContinuousBatchingConfig(**{size: 16}, num_blocks=8, max_batch_tokens=64, max_requests_per_batch=4)
    found = model.generate_batch(tokens.tolist(), generation, small)
    expected = model.generate(tokens, generation_config=generation)[:, tokens.shape[1] :]
    assert sorted(each.generated_tokens for each in found.values()) == sorted(expected.tolist())


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


@pytest.mark.parametrize("groups", [[], [[1, 2], [3, 4]], [[0, 1, 2], [3, 4, 5]]])
def test_plans_name_the_experts_that_a_model_has(groups):
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), groups=groups)
    model = TiedMoeForCausalLM(config)
    parameters = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_parameters()}
    experts = {name for name in parameters if "experts." in name or "expert_pools." in name}
    for plan in (model._tp_plan, model._ep_plan):
        named = {name for name in plan if name.endswith("_proj") and "attn" not in name}
        assert named == experts
        assert {name.rpartition(".")[0] for name in named} <= plan.keys()  # and the module, whose calls are hooked
        assert not any(POOLS in name for name in plan) or groups
    assert model._ep_plan.get(f"model.{POOLS}.down_proj") == ("grouped_gemm" if groups else None)
    assert any(POOLS in name for name in model._fsdp_plan) == bool(groups)
    assert not model.base_model._pp_plan


# peft


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


# Remote code


def run_python(code: str, *path_entries: Path, without_us: bool) -> subprocess.CompletedProcess:
    block = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'transformers_tiedmoe':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", (block if without_us else "") + code], capture_output=True, text=True, timeout=300
    )


def test_trust_remote_code_in_a_process_that_never_imported_us(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
        "print(type(model).__module__, len(model.expert_pools))\n"
    )
    done = run_python(load, without_us=False)
    assert done.stdout.split() == ["transformers_tiedmoe.modeling_tiedmoe", "2"], done.stderr
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again.keys() == {path.name for path in (tmp_path / "model").iterdir()}
    assert again["tiedmoe_remote.py"] == (tmp_path / "model" / "tiedmoe_remote.py").read_bytes()

    refused = run_python(load, without_us=True)
    assert refused.returncode != 0
    assert f"pip install 'transformers-tiedmoe>={transformers_tiedmoe.__version__}'" in refused.stderr

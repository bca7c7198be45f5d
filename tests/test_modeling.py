"""The tied model: its classes, what is allocated and saved, slot maps and residuals."""

import pytest
import torch
from families import tiny_config
from safetensors.torch import load_file, save_file
from test_families import family_model, make_experts_equal, tied_state_dict
from tied_models import (
    OLDEST,
    TYING,
    tiny_model,
    tokens_fixture,  # noqa: F401
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    OlmoeForCausalLM,
)

import transformers_tiedmoe
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM, TiedMoeModel
from transformers_tiedmoe.families import expert_layers
from transformers_tiedmoe.modeling_tiedmoe import TiedExperts


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

"""`tied_components`: routers and attention that a group's layers share."""

import copy
import json
import pickle

import pytest
import torch
from families import tiny_config
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tiedmoe_conversion.errors import ConversionError
from tiedmoe_conversion.untying import untie
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.audit.routing import RoutingWatch
from transformers_tiedmoe.training.parameter_groups import pool_parameter_groups

TOKENS = torch.arange(3, 27).view(2, 12)


def make(components, family="olmoe", group_size=2, **fields):
    config = TiedMoeConfig.from_family(
        tiny_config(family, output_router_logits=True, num_hidden_layers=4, router_aux_loss_coef=0.1, **fields),
        group_size=group_size, skip_first=1, skip_last=1, tied_components=components,
    )  # fmt: skip
    torch.manual_seed(0)
    return TiedMoeForCausalLM(config)


def unshared_name(name):
    """The names in a model that ties experts alone: of both layers of the group."""
    for owner, own in (("shared_routers.0", "mlp.gate"), ("shared_attentions.0", "self_attn")):
        if owner in name:
            return [name.replace(owner, f"layers.{layer}.{own}") for layer in (1, 2)]
    return [name]


def with_equal_layers(model):
    """The model that ties experts alone, with the shared weights in every layer."""
    other = make(["experts"], model.config.family)
    state = {each: tensor for name, tensor in model.state_dict().items() for each in unshared_name(name)}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("components", [["experts", "router"], ["experts", "attention"], "all"])
def test_shared_modules_are_equal_layers_whose_gradients_sum(components):
    model = make(components)
    other = with_equal_layers(model)
    outputs, want = model(TOKENS, labels=TOKENS), other(TOKENS, labels=TOKENS)
    torch.testing.assert_close(outputs.logits, want.logits, rtol=0, atol=0)
    torch.testing.assert_close(outputs.loss, want.loss, rtol=0, atol=0)  # the balance loss of four layers in it
    assert len(outputs.router_logits) == 4
    outputs.loss.backward()
    want.loss.backward()
    grads = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in model.named_parameters():
        total = sum(grads[each] for each in unshared_name(name))
        torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-6, msg=name)
    attention = sum(p.numel() for p in other.model.layers[2].self_attn.parameters())
    router = other.model.layers[2].mlp.gate.weight.numel()
    shared = attention * ("attention" in model.config.tied_components)
    shared += router * ("router" in model.config.tied_components)
    assert other.num_parameters() - model.num_parameters() == shared


def test_a_checkpoint_holds_them_once_and_loads(tmp_path):
    model = make("all").eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {key for key in file.keys() if "shared_" in key and "attentions" not in key} == {
            "model.shared_routers.0.weight"
        }
        assert set(file.keys()) == set(model.state_dict())
        assert not [key for key in file.keys() if "layers.1.self_attn" in key or "layers.2.mlp" in key]
    assert json.loads((tmp_path / "config.json").read_text())["tied_components"] == ["experts", "router", "attention"]
    for other in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        torch.testing.assert_close(other.eval()(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)
        assert other.model.layers[2].self_attn.q_proj._owner[0] is other.model
    with pytest.raises(ConversionError, match="only experts can be untied"):
        untie(str(tmp_path), str(tmp_path.with_name("untied")))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_layers_keep_caches_of_their_own(family):
    model = make("all", family).eval()
    cached = model(TOKENS[:, :8], use_cache=True)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    steps = model(TOKENS[:, 8:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(steps, model(TOKENS).logits[:, 8:], rtol=1e-4, atol=1e-5)


def test_routers_are_watched_layer_by_layer():
    model = make("all").eval()
    seen = {}
    with RoutingWatch(model, seen.__setitem__, with_scores=True), torch.no_grad():
        model(TOKENS)
    assert sorted(seen) == [0, 1, 2, 3]
    for choices in seen.values():
        assert torch.equal(choices.scores.topk(2).indices, choices.slots)


def test_groups_of_one_layer_change_nothing():
    model, other = make("all", group_size=1).eval(), make(["experts"], group_size=1).eval()
    assert model.num_parameters() == other.num_parameters()
    names = {"shared_routers.%d": "layers.%d.mlp.gate", "shared_attentions.%d": "layers.%d.self_attn"}
    state = {}
    for name, tensor in model.state_dict().items():
        for p in (0, 1):
            for owner, own in names.items():
                name = name.replace(owner % p, own % (p + 1))
        state[name] = tensor
    other.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS).logits, other(TOKENS).logits, rtol=0, atol=0)


def test_their_learning_rate_is_divided_as_a_pools():
    model = make("all")
    rates = {id(p): group["lr"] for group in pool_parameter_groups(model, 1.0) for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_shared = "shared_" in name or "expert_pools" in name
        assert rates[id(parameter)] == pytest.approx(2**-0.5 if is_shared else 1.0), name


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (["router"], "with 'experts' in it"),
        (["experts", "norm"], "'norm'"),
        ("router", "'router'"),
        (3, "=3; expected"),
    ],
)
def test_other_components_are_refused(components, message):
    with pytest.raises(ValueError, match=message):
        make(components)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="keeps a router in every layer; leave 'router' out"):
        TiedMoeConfig(family="olmoe", routing="softmoe", tied_components="all")
    with pytest.raises(ValueError, match=r"attention of layers \[1, 2\] cannot be shared: family 'gpt_oss'"):
        make("all", "gpt_oss")  # its attention has sinks of its own

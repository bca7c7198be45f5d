"""Every MoE family of the installed transformers: tied, saved, reloaded, generated from, and differentiated.

Each is checked against the family's own model, so a test fails where our views, configs or names change anything.
"""

import warnings

import pytest
import torch
from families import moe_families, text_families, tiny_config, transformers_before
from transformers import AutoModelForCausalLM

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.families import expert_layers

# Families that cannot be tied, or whose check cannot hold, each with its reason; the README repeats the first list.
UNSUPPORTED = {
    "gemma4": "its causal LM class is multimodal (Gemma4ForConditionalGeneration); use gemma4_text",
}
CACHE_CHANGES_TOKENS = {
    "dots3_note_text": "its indexed attention selects other keys with a cache than without, untied too",
}
if transformers_before("5.23"):
    UNSUPPORTED["ernie4_5_moe"] = "this transformers does not initialise its routers in _init_weights"
    UNSUPPORTED["lfm2_moe"] = "this transformers cannot run its short convolutions with layer_types given"
FAMILIES = [family for family in text_families() if family not in UNSUPPORTED]


def family_model(family: str, **fields):
    return AutoModelForCausalLM.from_config(tiny_config(family, **fields)).eval()


def tie(model, **tying):
    """`model` tied: every pool takes the experts of its group's first layer, everything else is copied."""
    torch.manual_seed(1)
    tied = TiedMoeForCausalLM(TiedMoeConfig.from_family(model.config, **tying)).eval()
    tied.load_state_dict(tied_state_dict(model, tied.config))
    return tied


def tied_state_dict(model, config) -> dict[str, torch.Tensor]:
    paths = expert_layers(model)
    state = dict(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    for p, group in enumerate(config.groups):
        for layer in group:
            for name in [name for name in state if name.startswith(paths[layer] + ".")]:
                tensor = state.pop(name)
                if layer == group[0]:
                    state[f"{prefix}expert_pools.{p}{name.removeprefix(paths[layer])}"] = tensor
    return state


def make_experts_equal(model, groups) -> None:
    """By hand: every layer of a group gets the experts of the group's first layer."""
    paths = expert_layers(model)
    for group in groups:
        first = model.get_submodule(paths[group[0]]).state_dict()
        for layer in group[1:]:
            model.get_submodule(paths[layer]).load_state_dict(first)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 10))


def test_every_family_is_here():
    """56 causal LM entries in transformers 5.23; at least 40 must be supported."""
    assert len(FAMILIES) >= 40
    for family in UNSUPPORTED:
        if family == "gemma4" and family in moe_families():
            with pytest.raises(ValueError, match="unknown family"):
                TiedMoeConfig(family=family)


@pytest.mark.parametrize("family", FAMILIES)
def test_group_size_1_is_the_family(family, tokens):
    model = family_model(family)
    tied = tie(model, group_size=1, skip_first=0, skip_last=0)
    with torch.no_grad():
        assert torch.equal(tied(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_config_starts_as_the_family(family):
    """Building on the meta device first loses no initial value: what no seed changes is the same, the rest as wide."""

    def tensors(model):
        return dict(model.named_parameters()) | dict(model.named_buffers())

    first, second = tensors(family_model(family)), tensors(family_model(family))
    found = tensors(TiedMoeForCausalLM(TiedMoeConfig.from_family(tiny_config(family), groups=[])))
    assert first.keys() == found.keys()
    for name, tensor in first.items():
        if torch.equal(tensor, second[name]):
            assert torch.equal(found[name], tensor), name
        elif tensor.numel() >= 64:  # of fewer, the deviation says nothing
            assert 0.3 < found[name].std() / tensor.std() < 3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_model(family, tokens, tmp_path):
    """Logits and pool gradients of the family with equal experts; save, reload, generate."""
    model = family_model(family)
    moe_layers = sorted(expert_layers(model))
    tying = {"group_size": 2, "skip_first": 1 if len(moe_layers) > 3 else 0, "skip_last": 0}
    tied = tie(model, **tying)
    groups = tied.config.groups
    assert any(len(group) == 2 for group in groups)
    make_experts_equal(model, groups)

    logits = tied(tokens).logits
    expected = model(tokens).logits
    assert torch.equal(logits, expected)

    logits.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    paths = expert_layers(model)
    for p, group in enumerate(groups):
        for name, parameter in tied.expert_pools[p].named_parameters():
            total = sum(model.get_submodule(paths[layer]).get_parameter(name).grad for layer in group)
            assert total.abs().sum() > 0
            torch.testing.assert_close(parameter.grad, total, rtol=1e-4, atol=1e-5)

    tied.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(tied)
    assert loaded.config.groups == groups
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, logits)

    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (loaded.generate(tokens, use_cache=use, **greedy) for use in (True, False))
    assert with_cache.shape[1] == tokens.shape[1] + 6
    assert torch.equal(with_cache, model.generate(tokens, use_cache=True, **greedy))
    if tied.config.family in CACHE_CHANGES_TOKENS:
        without = model.generate(tokens, use_cache=False, **greedy)
        assert not torch.equal(with_cache, without)
    else:
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", FAMILIES)
def test_wider_pool_widens_the_router(family, tokens):
    """Width expansion: a pool of 8 for a family of 4; the group's layers route over 8, the others over 4."""
    config = TiedMoeConfig.from_family(
        tiny_config(family), group_size=2, skip_first=0, skip_last=1, pool_num_experts=8
    )
    model = TiedMoeForCausalLM(config).eval()
    assert {next(pool.parameters()).shape[0] for pool in model.expert_pools} == {8}
    used = set()
    for pool in model.expert_pools:
        pool.register_forward_pre_hook(lambda module, args: used.update(args[1].flatten().tolist()))
    with torch.no_grad():
        model(torch.randint(3, 90, (4, 32)))
    assert max(used) >= 4
    assert max(used) < 8

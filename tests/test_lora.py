"""Adapters that would train nothing are refused, whoever made them."""

import pytest
import torch
from checkpoints import TINY, make_text, save_tied
from torch import nn

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.training.arguments import parse_arguments
from transformers_tiedmoe.training.heal import heal
from transformers_tiedmoe.training.lora import add_lora, check_adapters

peft = pytest.importorskip("peft")
POOL = "expert_pools.0.gate_up_proj"


def tied(untied=1):
    torch.manual_seed(0)
    return TiedMoeForCausalLM(TiedMoeConfig(family="olmoe", group_size=2, skip_first=untied, skip_last=untied, **TINY))


def wrapped(model, **fields):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **fields))


def test_check_adapters_takes_what_trains_and_leaves_no_trace():
    model = wrapped(tied(), target_modules=["q_proj"], target_parameters=[POOL, "expert_pools.0.down_proj"])
    model.train()
    state = torch.get_rng_state()
    check_adapters(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    check_adapters(wrapped(tied(), target_modules="all-linear"))
    check_adapters(wrapped(tied(), target_parameters=[POOL, "mlp.experts.gate_up_proj"]))
    check_adapters(add_lora(tied().bfloat16(), rank=2))


@pytest.mark.parametrize(
    ("untied", "fields", "message"),
    [
        # peft at most warns of the first three: what matches has adapters, and the loss falls.
        (0, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
         r"target_parameters: mlp.experts.gate_up_proj match nothing .* \['expert_pools.0.down_proj',"),
        (1, {"target_modules": ["q_proj", "w1"]}, r"target_modules: w1 match nothing .* such as \['q_proj'\]"),
        (1, {"target_parameters": ["experts.gate_up_proj"]},
         r"only those of untied layers have adapters: .*layers.0.mlp.experts.gate_up_proj.* name \['expert_pools.0"),
        (1, {"target_modules": ["spare"]}, r"4 of 4 adapters would get no gradient, first .*layers.0.self_attn.spare"),
    ],
)  # fmt: skip
def test_check_adapters_refuses(untied, fields, message):
    model = tied(untied)
    for layer in model.model.layers:
        layer.self_attn.spare = nn.Linear(2, 2)  # nothing reads it
    model = wrapped(model, **fields)
    with pytest.raises(TiedMoeError, match=message):
        check_adapters(model)


def test_check_adapters_refuses_a_pool_that_is_used_without_its_adapter():
    """As if a tied layer had kept the pool's module from before peft wrapped it."""
    model = tied()
    own = model.model.expert_pools[0]
    model = wrapped(model, target_parameters=[POOL])
    pool = model.base_model.model.model.expert_pools[0]
    pool.forward = own.forward
    with pytest.raises(TiedMoeError, match=r"1 of 1 adapters would get no gradient, first .*expert_pools.0"):
        check_adapters(model)


def test_check_adapters_refuses_frozen_ones():
    model = wrapped(tied(), target_modules=["q_proj"]).requires_grad_(False)
    for each in (model, tied()):
        with pytest.raises(TiedMoeError, match="has no layer with an adapter that is trained"):
            check_adapters(each)


def test_add_lora_refuses_targets_that_are_not_there_and_quantised_weights():
    with pytest.raises(
        TiedMoeError, match=r"lora_target_modules: gate_proj match nothing .* such as \['k_proj', 'lm_h"
    ):
        add_lora(tied(), 2, modules=["gate_proj", "q_proj"])
    with pytest.raises(TiedMoeError, match=r"lora_target_parameters: expert_pools.1.down_proj match nothing"):
        add_lora(tied(), 2, parameters=["expert_pools.1.down_proj"])
    model = tied().requires_grad_(False)
    model.model.expert_pools[0].down_proj.data = model.model.expert_pools[0].down_proj.to(torch.float8_e4m3fn)
    with pytest.raises(TiedMoeError, match=r"expert_pools.0.down_proj is stored as torch.float8_e4m3fn; expected"):
        add_lora(model, 2)


def test_heal_takes_targets_and_refuses_what_matches_nothing(tmp_path):
    (tmp_path / "text.txt").write_text(make_text(num_lines=16))
    command = [save_tied(tmp_path / "tied"), "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    command += ["--max-steps", "2", "--block-size", "16", "--lora-rank", "2", "--allow-worse"]
    modules = ["--lora-target-modules", "q_proj", "v_proj"]
    with pytest.raises(TiedMoeError, match=r"say where adapters go; ask for them \(lora\)"):
        parse_arguments([*command, *modules])
    with pytest.raises(TiedMoeError, match=r"lora_target_parameters: experts.nothing match nothing"):
        heal(parse_arguments([*command, "--lora", *modules, "--lora-target-parameters", "experts.nothing"]))
    assert not (tmp_path / "out").exists()
    report = heal(parse_arguments([*command, "--lora", *modules]))
    assert report["trainable_parameters"] == 4 * 2 * (2 * 16 + 2 * 16)  # layers, modules, A and B
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "tied"]

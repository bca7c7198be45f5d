"""`experts_forward_reference` against transformers' own experts modules: outputs and gradients in float64."""

import pytest
import torch
from families import transformers_before
from torch import nn
from transformers import DeepseekV4Config, GptOssConfig, OlmoeConfig, OpenAIPrivacyFilterConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

from tiedmoe_kernels import experts_forward_reference

H, I, E, K = 12, 10, 5, 3


def olmoe(activation="silu"):
    config = OlmoeConfig(
        hidden_size=H, intermediate_size=I, num_experts=E, num_experts_per_tok=K, hidden_act=activation
    )
    config._experts_implementation = "eager"
    return OlmoeExperts(config), {"activation": activation}


def gpt_oss():
    config = GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    return GptOssExperts(config), {"activation": "clamped_swiglu", "is_transposed": True, "is_concatenated": False}


def privacy_filter():
    config = OpenAIPrivacyFilterConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "batched_mm"  # its eager forward computes in float32 whatever the input is
    return OpenAIPrivacyFilterExperts(config), {"activation": "clamped_swiglu", "is_transposed": True}


def deepseek_v4():
    config = DeepseekV4Config(
        hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, swiglu_limit=3.0
    )
    config._experts_implementation = "eager"
    return DeepseekV4Experts(config), {"activation": "clamped_silu", "swiglu_limit": 3.0}


FAMILIES = {
    "olmoe": olmoe,  # the layout of nearly all families
    "olmoe-gelu": lambda: olmoe("gelu"),
    "olmoe-gelu-tanh": lambda: olmoe("gelu_pytorch_tanh"),
    "olmoe-relu": lambda: olmoe("relu"),
    "gpt_oss": gpt_oss,  # transposed, interleaved, biased, clamped
    "deepseek_v4": deepseek_v4,  # clamped, then silu
    "privacy_filter": privacy_filter,  # transposed, concatenated, biased, clamped
}

ROUTINGS = {
    "uniform": lambda T: torch.stack([torch.randperm(E)[:K] for _ in range(T)]),
    "one expert": lambda T: torch.full((T, K), 2),  # K duplicates a token, and E - 1 empty experts
    "one slot": lambda T: torch.randint(E, (T, 1)),  # K=1
}


def double_experts(family):
    experts, flags = FAMILIES[family]()
    for p in experts.parameters():
        nn.init.normal_(p, std=2.0)  # large enough that the clamp of gpt-oss acts
    return experts.double(), flags


def inputs(routing, T=7):
    index = ROUTINGS[routing](T)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    return x, index, weights


def reference(experts, x, index, weights, flags, **more):
    return experts_forward_reference(x, index, weights, **dict(experts.named_parameters()), **flags, **more)


def gradients(y, *leaves):
    torch.manual_seed(1)
    return torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, routing):
    experts, flags = double_experts(family)
    x, index, weights = inputs(routing)
    leaves = [x, weights, *experts.parameters()]

    y, expected = reference(experts, x, index, weights, flags), experts(x, index, weights)

    torch.testing.assert_close(y, expected)
    for got, want in zip(gradients(y, *leaves), gradients(expected, *leaves)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_inactive_slots_are_neither_computed_nor_read(family):
    experts, flags = double_experts(family)
    x, index, weights = inputs("uniform")
    inactive = torch.rand(index.shape) < 0.5
    inactive[0] = True  # a token with no expert at all
    leaves = [x, weights, *experts.parameters()]

    y = reference(experts, x, index.masked_fill(inactive, E), weights.masked_fill(inactive, torch.nan), flags)
    expected = experts(x, index, weights.masked_fill(inactive, 0.0))

    torch.testing.assert_close(y, expected)
    assert y[0].abs().max() == 0
    for got, want in zip(gradients(y, *leaves), gradients(expected, *leaves)):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(transformers_before("5.23"), reason="eager experts of transformers 5.17 know no sentinel")
def test_inactive_slots_equal_transformers_sentinels():
    experts, flags = double_experts("olmoe")
    x, index, weights = inputs("uniform")
    index[:, 1] = E
    torch.testing.assert_close(reference(experts, x, index, weights, flags), experts(x, index, weights))


@pytest.mark.parametrize("R", [2 * E, E, 3])  # more router indices than experts (shared), as many, fewer
def test_slot_map_reads_the_mapped_experts(R):
    experts, flags = double_experts("gpt_oss")
    slot_map = torch.randint(E, (R,))
    x, _, weights = inputs("uniform")
    index = torch.randint(R, weights.shape)
    leaves = [x, weights, *experts.parameters()]

    y, expected = reference(experts, x, index, weights, flags, slot_map=slot_map), experts(x, slot_map[index], weights)

    torch.testing.assert_close(y, expected)
    for got, want in zip(gradients(y, *leaves), gradients(expected, *leaves)):
        torch.testing.assert_close(got, want)
    index[2, 0] = R  # inactive is the router's width here, not the pool's
    dropped = weights.detach().clone()
    dropped[2, 0] = 0
    y = reference(experts, x, index, weights, flags, slot_map=slot_map)
    torch.testing.assert_close(y, experts(x, slot_map[index.clamp(max=R - 1)], dropped))


@pytest.mark.parametrize("T", [0, 4])
def test_nothing_active_gives_zeros_and_zero_gradients(T):
    experts, flags = double_experts("olmoe")
    x, index, weights = inputs("one expert", T)
    y = reference(experts, x, torch.full_like(index, E), weights, flags)
    assert y.shape == (T, H)
    for g in [y, *gradients(y, x, weights, *experts.parameters())]:
        assert not g.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_input_is_kept_and_the_error_is_that_dtype_s(dtype):
    experts, flags = double_experts("olmoe")
    nn.init.normal_(experts.gate_up_proj, std=H**-0.5)
    nn.init.normal_(experts.down_proj, std=I**-0.5)
    x, index, weights = inputs("uniform")
    expected = reference(experts, x, index, weights, flags)
    y = reference(experts.to(dtype), x.to(dtype), index, weights.to(dtype), flags)
    assert y.dtype == dtype
    relative_error = (y - expected).norm() / expected.norm()
    assert relative_error < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "unknown activation 'tanh'; choose one of silu"),
        ({"down_proj": torch.zeros(E, I, H)}, r"down_proj of \(5, 12, 10\); found down_proj \(5, 10, 12\)"),
        ({"down_proj": torch.zeros(H, I)}, "must be 3-D"),
        ({"gate_up_proj_bias": torch.zeros(E, I)}, r"gate_up_proj_bias must be \(5, 20\) to fit the pool"),
        ({"hidden_states": torch.zeros(7, H + 1)}, r"must be \[T, 12\]"),
        ({"top_k_weights": torch.zeros(7, K + 1)}, r"must both be \[T, K\] with T=7"),
        ({"top_k_index": torch.zeros(7, K, dtype=torch.int32)}, "must be int64; found torch.int32"),
        ({"top_k_index": torch.full((7, K), E + 1)}, r"lie in \[0, 5\] \(5 marks an inactive slot\); found 6 to 6"),
        ({"top_k_index": torch.full((7, K), -1)}, "found -1 to -1"),
        ({"slot_map": torch.full((4,), E)}, r"slot_map must lie in \[0, 4\]; found 5 to 5"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {
        "hidden_states": torch.zeros(7, H),
        "top_k_index": torch.zeros(7, K, dtype=torch.int64),
        "top_k_weights": torch.zeros(7, K),
        "gate_up_proj": torch.zeros(E, 2 * I, H),
        "down_proj": torch.zeros(E, H, I),
    }
    experts_forward_reference(**arguments)
    with pytest.raises(ValueError, match=message):
        experts_forward_reference(**(arguments | change))

"""The paper's models have the parameters that its sizes give by hand."""

import pytest
import torch

from transformers_tiedmoe import TiedMoeForCausalLM
from transformers_tiedmoe.presets import NAMES, preset

VOCABULARY = 100277


def parameters(config):
    with torch.device("meta"):
        return TiedMoeForCausalLM(config).num_parameters()


def by_hand(hidden, width, layers, experts_in_layers, qk_norms):
    """Embedding and head; q, k, v, o; norms; and for each set of experts and each router its number of experts."""
    sets, routers = experts_in_layers
    layer = 4 * hidden**2 + 2 * hidden + qk_norms
    return 2 * VOCABULARY * hidden + hidden + layers * layer + sum(routers) * hidden + sum(sets) * 3 * hidden * width


@pytest.mark.parametrize(
    ("name", "sets", "routers"),
    [
        ("olmoe-512-g1", [64] * 16, [64] * 16),
        ("olmoe-1024-g2", [64] * (4 + 6), [64] * 16),  # twelve layers between two and two
        ("olmoe-2048-g4", [64] * (4 + 3), [64] * 16),
        ("deepseek-512-narrow", [16] * 16, [16] * 16),
        ("olmoe-512-g4-2x", [64] * 4 + [128] * 3, [64] * 4 + [128] * 12),
        ("deepseek-1024-g4-4x", [64] * 4 + [256] * 3, [64] * 4 + [256] * 12),
    ],
)
def test_olmoe(name, sets, routers):
    hidden = int(name.split("-")[1])
    config = preset(name)
    assert config.experts_per_token == (6 if name.startswith("deepseek") else 8)
    assert parameters(config) == by_hand(hidden, hidden // 2, 16, (sets, routers), 2 * hidden)


@pytest.mark.parametrize(
    ("name", "sets", "routers"),
    [
        ("qwen3-384-g1", [60] * 28, [60] * 28),
        ("qwen3-768-g2", [60] * (4 + 12), [60] * 28),
        ("qwen3-1536-g4", [60] * (4 + 6), [60] * 28),
        ("qwen3-384-narrow", [15] * 28, [15] * 28),
    ],
)
def test_qwen3(name, sets, routers):
    hidden = int(name.split("-")[1])
    config = preset(name)
    assert config.experts_per_token == 4
    assert parameters(config) == by_hand(hidden, hidden // 2, 28, (sets, routers), 2 * 64)


def test_tying_by_four_drops_nine_of_sixteen_sets_of_experts():
    """Seven of sixteen sets of experts are left."""
    untied, tied = preset("olmoe-1024-g1"), preset("olmoe-1024-g4")
    experts = 64 * 3 * 1024 * 512
    assert parameters(untied) - parameters(tied) == 9 * experts


def test_fields_replace_the_presets_and_widths_follow():
    config = preset("olmoe-512-g4-2x", num_experts=8, num_experts_per_tok=2, hidden_size=64, vocab_size=320)
    assert (config.num_experts, config.pool_num_experts, config.hidden_size) == (8, [16, 16, 16], 64)
    assert config.groups == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (0.01, 1e-4)
    assert config.max_position_embeddings == 2048
    assert len(NAMES) == 54
    with pytest.raises(ValueError, match="no preset 'olmoe-512-g3'; expected MODEL-HIDDEN-VARIANT"):
        preset("olmoe-512-g3")

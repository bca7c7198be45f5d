"""What soft routing costs beside the experts it routes to."""

import time

import pytest
import torch
from families import transformers_before
from transformers import AutoModelForCausalLM

from transformers_tiedmoe import TiedMoeConfig

TOKENS = 512


@pytest.mark.minutes
@pytest.mark.skipif(transformers_before("5.18"), reason="soft routing is refused there")
def test_routing_takes_little_of_a_layer(capsys):
    """Forward and backward of a layer of OLMoE's widths; CPU seconds, the least of four."""
    config = TiedMoeConfig(
        family="olmoe", num_hidden_layers=1, hidden_size=2048, intermediate_size=1024, num_experts=64,
        num_experts_per_tok=8, vocab_size=96, groups=[], routing="softmoe", softmoe={"budget": 8.0, "alpha": 0.001},
    )  # fmt: skip
    layer = AutoModelForCausalLM.from_config(config, experts_implementation="tiedmoe").model.layers[0].mlp
    x = torch.randn(TOKENS, 2048, requires_grad=True)
    took = {"router": [], "experts": []}
    for _ in range(4):
        start = time.process_time()
        _, weights, index = layer.gate(x)
        routed = time.process_time()
        out = layer.experts(x, index, weights.detach())
        out.sum().backward()
        computed = time.process_time()
        weights.sum().backward()
        took["router"].append(routed - start + time.process_time() - computed)
        took["experts"].append(computed - routed)
    share = min(took["router"]) / min(took["experts"])
    with capsys.disabled():
        used = (index < 64).sum().item() / TOKENS
        print(f"{TOKENS} tokens, {used:.1f} experts each: the router takes {share:.2%} of the experts' time")
    assert share < 0.1

"""Tiny tied models, for tests of modelling."""

import pytest
import torch
from families import tiny_config, transformers_before
from transformers import (
    AutoModelForCausalLM,
)

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM

OLDEST = transformers_before("5.23")


TYING = {"group_size": 2, "skip_first": 1, "skip_last": 1}


def tiny_model(family="olmoe", dtype=None, **fields) -> TiedMoeForCausalLM:
    tying = {
        name: fields.pop(name)
        for name in list(fields)
        if name in (*TYING, "pool_num_experts", "slot_maps", "residual_rank", "router_z_loss_coef")
    }
    config = TiedMoeConfig.from_family(tiny_config(family, **fields), **{**TYING, **tying})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(name="tokens")
def tokens_fixture():
    return torch.randint(3, 90, (2, 10))

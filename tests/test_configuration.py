"""`TiedMoeConfig`: flat, resolved, checked, saved and loaded."""

import copy
import dataclasses
import json
import pickle

import pytest
from families import moe_families, tiny_config
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    OlmoeConfig,
    PreTrainedConfig,
)

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.errors import TiedMoeError


def tied_config(family="olmoe", **fields):
    return TiedMoeConfig.from_family(tiny_config(family), **{"skip_first": 1, "skip_last": 1, **fields})


def test_flat_and_an_instance_of_the_familys_config():
    config = TiedMoeConfig(family="olmoe", hidden_size=64, num_hidden_layers=12, group_size=4)
    assert isinstance(config, TiedMoeConfig)
    assert isinstance(config, OlmoeConfig)
    assert config.model_type == "tiedmoe"
    assert config.hidden_size == 64
    assert config.rms_norm_eps == OlmoeConfig().rms_norm_eps  # the family's default
    assert config.groups == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert config.pool_num_experts == [64, 64]
    assert config.slot_maps == [False, False]
    assert [config.group_of(layer) for layer in (1, 2, 9, 10)] == [None, 0, 1, None]


@pytest.mark.parametrize("family", moe_families())
def test_no_family_changes_a_default_of_the_base_config(family):
    """A tied config takes the fields of PreTrainedConfig from there; a family with another default would lose it."""
    parent = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]].config_class
    assert [f.name for f in dataclasses.fields(PreTrainedConfig) if getattr(parent, f.name) != f.default] == []


@pytest.mark.parametrize("through", ["disk", "copy", "deepcopy", "pickle", "auto"])
def test_round_trip(through, tmp_path):
    config = tied_config(groups=[[1, 2, 3]], pool_num_experts=8, slot_maps=True, residual_rank=2)
    config.save_pretrained(tmp_path)
    again = {
        "disk": lambda: TiedMoeConfig.from_pretrained(tmp_path),
        "auto": lambda: AutoConfig.from_pretrained(tmp_path),
        "copy": lambda: copy.copy(config),
        "deepcopy": lambda: copy.deepcopy(config),
        "pickle": lambda: pickle.loads(pickle.dumps(config)),
    }[through]()
    assert type(again) is type(config)
    ignored = {"transformers_version", "dtype", "_name_or_path"}
    assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
        k: v for k, v in config.to_dict().items() if k not in ignored
    }
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["groups"] == [[1, 2, 3]]
    assert saved["family"] == "olmoe"
    assert saved["model_type"] == "tiedmoe"


def test_explicit_groups_override_the_three_numbers():
    config = tied_config(group_size=2, groups=[[0, 1], [3, 4, 5]])
    assert config.groups == [[0, 1], [3, 4, 5]]


@pytest.mark.parametrize(
    ("family", "fields", "moe_layers"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ("qwen2_moe", {"mlp_only_layers": [1, 4]}, [0, 2, 3, 5]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, [1, 3, 5]),
        ("jamba", {}, [1, 3, 5]),
    ],
)
def test_only_moe_layers_count(family, fields, moe_layers):
    config = TiedMoeConfig.from_family(tiny_config(family, **fields), group_size=2, skip_first=0, skip_last=0)
    assert [layer for group in config.groups for layer in group] == moe_layers


def test_to_family():
    family = tiny_config("qwen2_moe", mlp_only_layers=[1])
    again = TiedMoeConfig.from_family(family, group_size=2).to_family()
    assert type(again) is type(family)
    ignored = {"architectures", "transformers_version"}
    assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
        k: v for k, v in family.to_dict().items() if k not in ignored
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"groups": [[1, 2], [2, 3]]}, "layer 2 is in group 0 and in group 1"),
        ({"groups": [[1, 3]]}, "skips"),
        ({"pool_num_experts": 1}, "pool 0 has 1 experts but 2 are active per token"),
        ({"pool_num_experts": [4, 4, 4]}, "3 entries for 2 pools"),
        ({"pool_num_experts": "many"}, "expected int"),
        ({"slot_maps": [1, 0]}, "expected bool"),
        ({"residual_rank": -1}, "at least 0"),
        ({"router_z_loss_coef": 1e-3}, "output_router_logits"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        tied_config(**fields)


@pytest.mark.parametrize("family", ["llama", "no_such_family", None, "gemma4"])
def test_unknown_family(family):
    with pytest.raises(ValueError, match="unknown family"):
        TiedMoeConfig(family=family)


def test_a_config_without_experts():
    with pytest.raises(ValueError, match="no layer with experts"):
        TiedMoeConfig.from_family(tiny_config("qwen3_moe", mlp_only_layers=list(range(6))))


def test_already_tied_and_unknown_fields():
    with pytest.raises(ValueError, match="already a tiedmoe"):
        TiedMoeConfig.from_family(tied_config())
    with pytest.raises(ValueError, match="grup_size"):
        TiedMoeConfig.from_family(tiny_config("olmoe"), grup_size=2)


@pytest.mark.parametrize("layer_types", [["mixtral"], []])
def test_fields_that_the_family_refuses(layer_types):
    """transformers' own error there is no ValueError."""
    config = tied_config()
    config.layer_types = layer_types
    with pytest.raises(TiedMoeError, match=r"(?s)as one of family 'olmoe': .*layer_types"):
        config.to_family()

"""transformers' own model tests on tied models: `make hf-tests`, which fetches them; pytest does not collect them.

transformers' sdist holds its `tests/test_*.py`, which the Makefile unpacks as the package `transformers_tests`. Each
test runs on the family's own classes, the control; on the tied classes made for the family, which the Auto classes
give; and on the classes of ours that find the family by the config. What cannot hold is named below with its reason:
`XFAIL` fails as soon as one passes, `WITHOUT` runs one without what it contradicts.
"""

import contextlib
import functools
import sys
import types
import unittest
from unittest.mock import patch

import pytest
import torch
from families import tiny_config
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from transformers_tiedmoe import TiedMoeConfig, modeling_tiedmoe
from transformers_tiedmoe.families import config_class, heads_of, model_class

# What the sdist leaves out, so that its tests can be imported: test_modeling.py exports and generates itself.
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
for path, mixin in LEFT_OUT.items():
    for name in (path.split(".")[0], path):
        sys.modules[f"transformers_tests.{name}"] = types.ModuleType(f"transformers_tests.{name}")
    setattr(sys.modules[f"transformers_tests.{path}"], mixin, type(mixin, (), {}))

from transformers_tests import test_modeling_common as common  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

FAMILIES = ("olmoe", "mixtral")
KINDS = ("own", "tied", "by_config")

XFAIL = {
    "test_num_layers_is_small": (KINDS, "wants two layers at most; here one is untied and two share a pool"),
    "test_generation_tester_mixin_inheritance": (KINDS, "wants GenerationTesterMixin, which the sdist leaves out"),
    "test_model_main_input_name": (("by_config",), "reads the signature of forward, which a family's class has"),
    "test_moe_models_record_router_logits": (("by_config",), "reads the same signature for what forward returns"),
    "test_training": (("by_config",), "gives labels, and expects a loss, by the names of families' classes"),
}
WITHOUT = {  # of tied models
    # ours saves its own names unless told otherwise; here as the family's own class does
    "test_reverse_loading_mapping": lambda: patch.object(
        modeling_tiedmoe.TiedMoePreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained
    ),
    # ours refuses a file without the layers that config.json claims before it looks for missing keys
    "test_model_weights_reload_no_missing_tied_weights": lambda: patch.object(modeling_tiedmoe, "check_headers"),
    # turns initialisation off by a patch of its own of `_initialize_weights`; here as transformers does it
    "test_init_weights_can_init_buffers": lambda: patch.object(common, "skip_weight_init", no_init_weights),
    # looks for experts in the source of a class, which one made at run time has not
    "test_moe_models_record_router_logits": lambda: patch.object(
        common.inspect, "getsource", return_value="@use_experts_implementation"
    ),
}


class ModelTester:
    """What transformers' tests ask of a family's model tester: a tiny config and inputs for it."""

    is_training = True
    batch_size, seq_length, vocab_size = 5, 7, 96
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 3, 4, 2

    def __init__(self, family: str, kind: str):
        self.family, self.kind = family, kind
        self.causal_lm_class = classes(family, kind)[1]

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        config = tiny_config(self.family, **sizes, initializer_range=0.02, max_position_embeddings=512)
        if self.kind == "own":
            return config
        return TiedMoeConfig.from_family(config, group_size=2, skip_first=1, skip_last=0)

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def classes(family: str, kind: str) -> tuple[type, ...]:
    if kind == "own":
        return tuple(head._family_heads[CONFIG_MAPPING[family]] for head in heads_of(family))
    made = config_class(TiedMoeConfig, family)
    return tuple(model_class(head, made) if kind == "tied" else head for head in heads_of(family))


def without(context, test):
    @functools.wraps(test)
    def run(self):
        with context():
            test(self)

    return run


def make_test_case(family: str, kind: str) -> type:
    namespace = {
        "__module__": __name__,
        "test_all_params_have_gradient": False,  # of an expert that no token chose
        "test_can_init_all_missing_weights_before_2023": True,  # it reads the year in the copyright line of a file
        "model_tester": property(lambda self: ModelTester(family, kind)),
        "all_model_classes": classes(family, kind),
    }
    for name, context in WITHOUT.items() if kind != "own" else ():
        namespace[name] = without(context, getattr(common.ModelTesterMixin, name))
    for name, (kinds, reason) in XFAIL.items():
        if kind in kinds:
            test = namespace.get(name) or without(contextlib.nullcontext, getattr(common.ModelTesterMixin, name))
            namespace[name] = pytest.mark.xfail(strict=True, reason=reason)(test)
    bases = (common.ModelTesterMixin, TrainingTesterMixin, unittest.TestCase)
    return type(f"Test{family.capitalize()}_{kind}", bases, namespace)


for family in FAMILIES:
    for kind in KINDS:
        globals()[f"Test{family.capitalize()}_{kind}"] = make_test_case(family, kind)

import json

import pytest
import torch
from conversions import FAMILIES, assert_equal_tensors, read_tensors, save_source, save_tokenizer, unchanged_disk
from families import tiny_config
from test_conversion_execute import LiveBytes
from transformers import AutoConfig, AutoModelForCausalLM

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.configuration_tiedmoe import TYING_FIELDS
from transformers_tiedmoe.files import file_digest


def save_tied(folder, **fields):
    """A random tied OLMoE of 6 layers of 4 experts; layers 1 and 2 read pool 0, layers 3 and 4 pool 1."""
    torch.manual_seed(0)
    config = TiedMoeConfig.from_family(tiny_config("olmoe"), groups=[[1, 2], [3, 4]], **fields)
    model = TiedMoeForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_union_and_back_is_the_source_bit_for_bit(tmp_path, family):
    save_tokenizer(tmp_path / "source")
    save_source(tmp_path / "source", family)
    recipe = ConversionRecipe(
        source=str(tmp_path / "source"), output=str(tmp_path / "tied"), skip_last=0, skip_first=1, method="union"
    )
    execute(make_plan(recipe))
    report = untie(tmp_path / "tied", tmp_path / "back", max_shard_size="40KB")
    assert_equal_tensors(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "source"))
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "back" / "tiedmoe_remote.py").exists()
    assert json.loads(json.dumps(report)) == report

    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values())
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert type(model) is type(source)
    before, after = AutoConfig.from_pretrained(tmp_path / "source"), AutoConfig.from_pretrained(tmp_path / "back")
    ignored = ("_name_or_path", "transformers_version")
    assert {k: v for k, v in after.to_dict().items() if k not in ignored} == {
        k: v for k, v in before.to_dict().items() if k not in ignored
    }


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"slot_maps": [True, False], "pool_num_experts": [6, 4]},  # a pool between E and g*E, whose rows layers share
        {"residual_rank": [2, 0]},
    ],
    ids=["identity", "slot_map", "residual"],
)
def test_untied_model_computes_the_same(tmp_path, fields):
    model = save_tied(tmp_path / "tied", **fields)
    if fields.get("slot_maps"):
        model.get_submodule("model.layers.2.mlp.experts").slot_map.copy_(torch.tensor([5, 0, 0, 3]))
        model.save_pretrained(tmp_path / "tied")
    untie(tmp_path / "tied", tmp_path / "untied")
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    tokens = torch.randint(96, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(untied(tokens).logits, model(tokens).logits)


def test_pools_of_one_new_width_everywhere(tmp_path):
    """An expanded router is the family's own where every layer has it."""
    torch.manual_seed(0)
    config = TiedMoeConfig.from_family(
        tiny_config("olmoe"), group_size=3, skip_first=0, skip_last=0, pool_num_experts=6
    )
    model = TiedMoeForCausalLM(config)
    model.save_pretrained(tmp_path / "tied")
    untie(tmp_path / "tied", tmp_path / "untied")
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert untied.config.num_experts == 6
    tokens = torch.randint(96, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(untied(tokens).logits, model(tokens).logits)


def test_layers_of_several_widths_are_refused(tmp_path):
    save_tied(tmp_path / "tied", pool_num_experts=[6, 4])
    with unchanged_disk(tmp_path), pytest.raises(ConversionError, match=r"several router widths .*cannot be untied"):
        untie(tmp_path / "tied", tmp_path / "untied")


def test_untying_an_untied_checkpoint_is_refused(tmp_path):
    save_source(tmp_path / "source")
    with unchanged_disk(tmp_path), pytest.raises(ConversionError, match="'olmoe' checkpoint; expected a tiedmoe one"):
        untie(tmp_path / "source", tmp_path / "untied")


def test_progress(tmp_path):
    save_tied(tmp_path / "tied")
    calls = []
    report = untie(tmp_path / "tied", tmp_path / "untied", progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (report["bytes_after"], report["bytes_after"])
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_tiedmoe_is_left(tmp_path, family):
    """What vLLM, SGLang and llama.cpp read: the family's own config and files."""
    model = save_source(tmp_path / "source", family)
    recipe = {"source": str(tmp_path / "source"), "output": str(tmp_path / "tied"), "skip_first": 1, "skip_last": 0}
    execute(make_plan(ConversionRecipe(**recipe, method="average")))
    report = untie(tmp_path / "tied", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (model.config.model_type, [type(model).__name__])
    assert not set(config) & {*TYING_FIELDS, "auto_map"}
    assert not [
        path for path in (tmp_path / "back").iterdir() if "tied" in path.name or "tied" in path.read_text("latin1")
    ]
    before, after = read_tensors(tmp_path / "source"), read_tensors(tmp_path / "back")
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert report["files"] == {"model.safetensors": file_digest(tmp_path / "back" / "model.safetensors")}


def test_slot_map_beyond_the_pool_is_refused(tmp_path):
    model = save_tied(tmp_path / "tied", slot_maps=[True, False], pool_num_experts=[6, 4])
    model.get_submodule("model.layers.2.mlp.experts").slot_map.copy_(torch.tensor([5, 0, 6, 3]))
    model.save_pretrained(tmp_path / "tied")
    with unchanged_disk(tmp_path), pytest.raises(ConversionError, match=r"names row 6 of .*which has 6 experts"):
        untie(tmp_path / "tied", tmp_path / "untied")


def test_a_wide_pool_is_not_read_at_once(tmp_path):
    """A union of eight layers: never more than some copies of one layer's projection in memory."""
    save_source(tmp_path / "source", num_hidden_layers=8, intermediate_size=192)
    fields = {"method": "union", "groups": [list(range(8))]}
    plan = make_plan(ConversionRecipe(source=str(tmp_path / "source"), output=str(tmp_path / "tied"), **fields))
    execute(plan)
    with LiveBytes() as counter:
        untie(tmp_path / "tied", tmp_path / "back")
    layer = max(tensor.nbytes for name, tensor in plan.source.tensors.meta.items() if ".experts." in name)
    assert layer < counter.peak < 3.5 * layer

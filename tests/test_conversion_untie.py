import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversions import (
    FAMILIES,
    assert_equal_tensors,
    edit_tensors,
    read_tensors,
    save_source,
    save_tokenizer,
    unchanged_disk,
)
from families import text_families, tiny_config
from test_conversion_execute import LiveBytes
from transformers import AutoConfig, AutoModelForCausalLM

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie
from tiedmoe_conversion.untying import save_family_config
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


ROPE_THETA = {"rope_type": "default", "rope_theta": 20000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "short_mscale": 1.1}
LONG |= {"long_mscale": 1.2, "original_max_position_embeddings": 32}
# Fields of a family and what readers other than transformers 5 must find: the names that files on the Hub have.
OLDER_FIELDS = {
    "olmoe": (
        {"rope_parameters": ROPE_THETA},
        {"rope_theta": 20000.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
    ),
    "qwen3_moe": ({}, {"num_experts": 4, "rope_theta": 10000.0}),
    "mixtral": ({}, {"num_experts": 4, "num_local_experts": 4, "rope_theta": 1000000.0}),
    "deepseek_v3": (
        {"rope_parameters": YARN | {"rope_theta": 20000.0}},
        {"rope_theta": 20000.0, "rope_scaling": YARN},
    ),
    "gpt_oss": (
        {"rope_parameters": ROPE_THETA},
        {"rope_theta": 20000.0, "rope_scaling": None},
    ),  # its default is scaled
    "glm4_moe": ({"rope_parameters": ROPE_THETA | {"partial_rotary_factor": 0.25}}, {"partial_rotary_factor": 0.25}),
    "phimoe": (
        {"rope_parameters": LONG | {"rope_theta": 20000.0}},
        {"rope_theta": 20000.0, "rope_scaling": LONG, "original_max_position_embeddings": 32},
    ),
    "granitemoehybrid": ({}, {"layer_types": ["mamba", "attention"] * 3, "num_local_experts": 4}),
}


@pytest.mark.parametrize("family", OLDER_FIELDS)
def test_config_has_the_older_names_too(tmp_path, family):
    """Without them transformers 4, vLLM and llama.cpp take defaults: another model, without a word."""
    fields, expected = OLDER_FIELDS[family]
    config = tiny_config(family, dtype=torch.bfloat16, **fields)
    save_family_config(config, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert {name: found[name] for name in expected} == expected
    assert found["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", [family for family in text_families() if family != "gemma4"])
def test_transformers_reads_the_same_config_back(tmp_path, family):
    """The older names beside the newer ones change nothing for it."""
    config = tiny_config(family, dtype=torch.bfloat16)
    save_family_config(config, tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    found.name_or_path = config.name_or_path
    assert found.to_dict() == config.to_dict()


def test_untied_config_is_written_for_every_reader(tmp_path):
    save_source(tmp_path / "source", "qwen3_moe", rope_parameters=ROPE_THETA)
    recipe = ConversionRecipe(
        source=str(tmp_path / "source"), output=str(tmp_path / "tied"), method="union", group_size=3
    )
    execute(make_plan(recipe))
    untie(tmp_path / "tied", tmp_path / "untied")
    config = json.loads((tmp_path / "untied" / "config.json").read_text())
    assert (config["rope_theta"], config["num_experts"], config["num_local_experts"]) == (20000.0, 4, 4)


def test_dropped_prediction_layers_are_not_promised(tmp_path):
    """llama.cpp counts num_hidden_layers + num_nextn_predict_layers blocks, vLLM offers speculative decoding by it."""
    save_source(tmp_path / "source", "glm4_moe", num_nextn_predict_layers=1)
    edit_tensors(  # as GLM-4.5-Air names its extra layer
        tmp_path / "source",
        lambda tensors: tensors | {n.replace(".5.", ".46.", 1): t for n, t in tensors.items() if ".layers.5." in n},
    )
    fields = {"method": "union", "groups": [[1, 2], [3, 4]]}
    plan = make_plan(ConversionRecipe(source=str(tmp_path / "source"), output=str(tmp_path / "tied"), **fields))
    assert any(".layers.46." in name for name, _ in plan.dropped)
    execute(plan)
    untie(tmp_path / "tied", tmp_path / "untied")
    for made in ("tied", "untied"):
        assert json.loads((tmp_path / made / "config.json").read_text())["num_nextn_predict_layers"] == 0
        assert not [name for name in read_tensors(tmp_path / made) if ".layers.46." in name]


TRANSFORMERS_4 = Path(__file__).parents[1] / ".venv" / "transformers-4"
READ = """
import sys
sys.modules["kernels"] = None  # the one that is installed is for transformers 5
import torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32,
                                                              attn_implementation="eager")
    with torch.no_grad():
        torch.save(model.eval()(input_ids=torch.arange(1, 30)[None]).logits, folder + "/logits.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not TRANSFORMERS_4.is_dir(), reason="transformers 4 is not there: `make untied-check` fetches it by pip"
)
def test_transformers_4_computes_what_the_tied_model_does(tmp_path):
    rope = {family: fields.get("rope_parameters", ROPE_THETA) for family, (fields, _) in OLDER_FIELDS.items()}
    rope |= dict.fromkeys(("qwen2_moe", "deepseek_v2", "dots1", "ernie4_5_moe", "flex_olmo", "granitemoe"), ROPE_THETA)
    rope |= dict.fromkeys(("hunyuan_v1_moe", "minimax", "granitemoeshared"), ROPE_THETA)
    rope["qwen3_next"] = ROPE_THETA | {"partial_rotary_factor": 0.5}
    logits, folders = {}, []
    for family, parameters in rope.items():
        root = tmp_path / family
        save_source(root / "source", family, dtype=torch.float32, rope_parameters=parameters)
        edit_tensors(root / "source", sharpen_attention)
        recipe = {"source": str(root / "source"), "output": str(root / "tied"), "skip_first": 1, "skip_last": 0}
        execute(make_plan(ConversionRecipe(**recipe, method="union")))
        untie(root / "tied", root / "untied")
        tied = AutoModelForCausalLM.from_pretrained(root / "tied", attn_implementation="eager")
        with torch.no_grad():
            logits[family] = tied(torch.arange(1, 30)[None]).logits
        folders.append(str(root / "untied"))
    where = {**os.environ, "PYTHONPATH": str(TRANSFORMERS_4)}
    subprocess.run([sys.executable, "-c", READ, *folders], check=True, env=where, timeout=600)
    for family, expected in logits.items():
        found = torch.load(tmp_path / family / "untied" / "logits.pt")
        torch.testing.assert_close(found, expected, msg=lambda message, family=family: f"{family}: {message}")


def sharpen_attention(tensors):
    """Larger queries and keys, so that attention sees positions."""
    parts = ("q_proj", "k_proj", "q_b_proj", "kv_a_proj", "kv_b_proj")
    return {name: tensor * (10 if any(part in name for part in parts) else 1) for name, tensor in tensors.items()}

import json

import pytest
import torch
from conversions import edit_tensors, save_source
from families import tiny_config
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from tiedmoe_conversion import ConversionRecipe, make_plan
from tiedmoe_conversion.checkpoint.reader import Source


@pytest.fixture
def source(tmp_path):
    save_source(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


def plan(source, **fields):
    fields = {"skip_first": 1, "skip_last": 1, "method": "average"} | fields
    return make_plan(ConversionRecipe(source=str(source), output=str(source.parent / "out"), **fields))


def test_counts_are_exact(source):
    made = plan(source, group_size=2)
    summary = made.summary()
    per_layer = 4 * (2 * 24 * 32 + 32 * 24)  # E (2IH + HI) of the tiny OLMoE
    assert summary["groups"] == [[1, 2], [3, 4]]
    assert summary["pool_num_experts"] == [4, 4]
    assert summary["expert_parameters_before"] == 6 * per_layer
    assert summary["expert_parameters_after"] == 4 * per_layer
    assert summary["parameters_before"] - summary["parameters_after"] == 2 * per_layer
    assert summary["bytes_before"] == 2 * summary["parameters_before"]
    assert summary["bytes_after"] == 2 * summary["parameters_after"]
    assert summary["dropped"] == []


def test_union_is_as_large_and_has_slot_maps(source):
    summary = plan(source, group_size=4, method="union").summary()
    assert summary["pool_num_experts"] == [16]
    assert summary["parameters_after"] == summary["parameters_before"]
    assert summary["bytes_after"] == summary["bytes_before"] + 4 * 4 * 8  # four layers' slot_map [4] int64


def test_a_last_shorter_group(source):
    summary = plan(source, group_size=3, method="union").summary()
    assert summary["groups"] == [[1, 2, 3], [4]]
    assert summary["pool_num_experts"] == [12, 4]


def test_select_names_what_it_drops(source):
    made = plan(source, method="select", method_options={"layer": 1})
    dropped = dict(made.dropped)
    assert len(dropped) == 2 * 4 * 3
    assert "pool 0 takes the place" in dropped["model.layers.1.mlp.experts.0.gate_proj.weight"]
    assert not any(".layers.2." in name or ".layers.4." in name for name in dropped)


def test_extra_tensors_that_the_family_ignores_are_named(tmp_path):
    save_source(tmp_path / "source", "deepseek_v3")
    router = "model.layers.3.mlp.gate.weight"
    edit_tensors(tmp_path / "source", lambda t: t | {"model.layers.61.mlp.gate.weight": t[router]})  # an MTP layer
    made = plan(tmp_path / "source", skip_first=0, skip_last=0)
    assert dict(made.dropped) == {"model.layers.61.mlp.gate.weight": "DeepseekV3ForCausalLM ignores it on loading"}
    assert made.bytes_before < sum(info.num_bytes for info in made.source.opened.tensors.values())
    assert "dropped: 1 tensor(s), such as model.layers.61" in str(made).replace("\n", " ")


def test_multimodal_source_becomes_its_language_model(tmp_path):
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_position_embeddings": 16}
    config = Qwen3_5MoeConfig(
        text_config=tiny_config("qwen3_5_moe").to_dict(), vision_config=vision | {"out_hidden_size": 32}
    )
    Qwen3_5MoeForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "source")
    made = plan(tmp_path / "source")
    assert made.config.family == "qwen3_5_moe_text"
    assert made.config.dtype == torch.bfloat16
    assert all(name.startswith("model.visual.") for name, _ in made.dropped)
    assert len(made.dropped) == sum("visual" in name for name in made.source.opened.tensors) > 0


def test_reads_no_tensor(source, monkeypatch):
    """With the tensors replaced by a hole of the same length, and reading forbidden, the plan is the same."""
    expected = plan(source).summary()
    for path in source.glob("*.safetensors"):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.truncate(8 + int.from_bytes(file.read(8), "little"))
            file.truncate(size)
    monkeypatch.setattr(Source, "read", lambda *args: pytest.fail("a tensor was read"))
    assert plan(source).summary() == expected


def test_writes_nothing(source):
    before = sorted(source.parent.rglob("*"))
    plan(source)
    assert sorted(source.parent.rglob("*")) == before


def test_is_immutable_printable_and_json(source):
    made = plan(source)
    with pytest.raises(AttributeError):
        made.operations = ()
    assert isinstance(made.operations, tuple)
    assert json.loads(json.dumps(made.summary())) == made.summary()
    text = str(made)
    assert "1, 2" in text
    assert f"{made.parameters_after:,}" in text


def test_fused_source_needs_as_much_memory_as_one_tensor_per_expert(tmp_path):
    save_source(tmp_path / "source")
    save_source(tmp_path / "fused", original=False)
    per_expert, fused = plan(tmp_path / "source", method="select"), plan(tmp_path / "fused", method="select")
    assert fused.peak_memory_bytes == per_expert.peak_memory_bytes
    assert {operation.kind for operation in fused.operations} == {"copy", "pool"}


def test_output_files_are_within_max_shard_size(source):
    made = plan(source, max_shard_size="30KB")
    sizes = {}
    for operation in made.operations:
        sizes[operation.file] = sizes.get(operation.file, 0) + operation.num_bytes
    assert len(sizes) > 2
    assert max(sizes.values()) <= 30_000

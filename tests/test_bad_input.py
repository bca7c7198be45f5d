"""Families, configs, groups and weights that a conversion cannot do: an error that says what to do, and an
unchanged disk.
"""

import re
import shutil

import pytest
import torch
from bad_sources import attempt, folder_fixture, pristine_fixture, refuse, sharded_fixture  # noqa: F401
from conversions import edit_config, edit_tensors, save_source, unchanged_disk
from transformers import LlamaConfig, LlamaForCausalLM

from tiedmoe_conversion import untie, verify_folder
from transformers_tiedmoe.errors import TiedMoeError

GATE = "model.layers.{}.mlp.experts.{}.gate_proj.weight"


def test_checkpoint_without_experts(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    refuse(tmp_path / "source", "is a 'llama' checkpoint, a family without experts .*; expected a Mixture-of-Experts")


def test_moe_family_with_dense_layers_only(tmp_path):
    folder = tmp_path / "source"
    save_source(folder, "qwen3_moe")
    edit_config(folder, mlp_only_layers=list(range(6)))
    refuse(folder, "no layer with experts", error=ValueError)


def test_unknown_family(folder):
    edit_config(folder, model_type="olmoee")
    refuse(folder, r"unknown family 'olmoee'; did you mean 'olmoe'\? *\. transformers .* is installed")


def test_family_is_missing(folder):
    (folder / "config.json").write_text("{}")
    refuse(folder, "unknown family None; expected one of")


def test_source_that_is_tied_already(folder):
    edit_config(folder, model_type="tiedmoe")
    refuse(folder, "is already a tiedmoe checkpoint; .*Untie it first: tiedmoe untie")


def test_quantised_source(folder):
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    refuse(folder, "is quantised .*mxfp4.*; expected plain weights")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "expected a JSON object")


def test_config_is_missing(folder):
    (folder / "config.json").unlink()
    refuse(folder, r"cannot read .*config\.json")


def test_config_with_a_field_of_the_wrong_type(folder):
    edit_config(folder, num_hidden_layers="six")
    refuse(folder, r"transformers cannot read config\.json: .*num_hidden_layers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": 0}, "group_size=0; expected an integer of at least 1"),
        ({"groups": [[1, 2], [2, 3]]}, "layer 2 is in group 0 and in group 1; .*remove it from one of them"),
        ({"groups": [[1, 3]]}, r"group 0 is \[1, 3\], which skips or reorders MoE layers; .*such as \[1, 2, 3\]"),
        ({"groups": [[2, 1]]}, r"group 0 is \[2, 1\], which skips or reorders"),
        ({"groups": [[4, 5, 6]]}, "group 0 names layer 6; expected an integer from 0 to 5"),
        ({"skip_first": 3, "skip_last": 3}, "nothing to tie: .*lower them, or name groups"),
        ({"method": "select", "method_options": {"layer": 2}}, "layer=2 for a group of 2 layers .*from 0 to 1"),
        ({"method": "select", "method_options": {"layer": "middle"}}, "layer='middle' .*expected 'first', 'last'"),
    ],
)
def test_groups(folder, fields, message):
    refuse(folder, message, error=ValueError, **fields)


def test_group_that_names_a_dense_layer(tmp_path):
    save_source(tmp_path / "source", "qwen2_moe")  # layer 2 is dense
    refuse(tmp_path / "source", "group 0 names layer 2, which is dense", error=ValueError, groups=[[1, 2, 3]])


def test_top_k_greater_than_the_pool(folder):
    edit_config(folder, num_experts_per_tok=8)
    refuse(folder, "pool 0 has 4 experts but 8 are active per token; enlarge the pool or lower", error=ValueError)


def test_unequal_expert_shapes_in_a_group(folder):
    """Layer 2's experts are half as wide; no config can say that, the headers do."""

    def halve(tensors):
        for name, tensor in tensors.items():
            if ".layers.2.mlp.experts." in name:
                tensors[name] = tensor[:, :12] if "down_proj" in name else tensor[:12]
        return tensors

    edit_tensors(folder, halve)
    message = (
        r"group 0 ties layers 1 and 2, whose experts differ: layer 1 has .*'gate_up_proj': '\[4, 48, 32\] bfloat16'.* "
        r"layer 2 has .*'gate_up_proj': '\[4, 24, 32\] bfloat16'.*put the layers into different groups"
    )
    refuse(folder, message)
    refuse(folder, r"layers\.2\..* by the weights and .* by config\.json", groups=[[3, 4]])  # untied, still no OLMoE


def test_unequal_numbers_of_experts_in_a_group(folder):
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if ".layers.2.mlp.experts.3." not in k})
    refuse(folder, r"group 0 ties layers 1 and 2, .*'\[3, 48, 32\] bfloat16'")


def test_unequal_experts_in_a_layer(folder):
    edit_tensors(folder, lambda t: t | {GATE.format(2, 1): t[GATE.format(2, 1)][:12]})
    refuse(folder, "do not make up .*layers.2.mlp.experts.gate_up_proj.*expected equal shapes in every expert")


def test_unequal_dtypes_in_a_group(folder):
    edit_tensors(folder, lambda t: {k: v.half() if ".layers.2.mlp.experts." in k else v for k, v in t.items()})
    refuse(folder, "group 0 ties layers 1 and 2, whose experts differ: .*bfloat16.*float16")


def test_unequal_dtypes_in_a_layer(folder):
    edit_tensors(folder, lambda t: t | {GATE.format(2, 1): t[GATE.format(2, 1)].float()})
    refuse(folder, r"have dtypes \['bfloat16', 'float32'\]; expected one")


def test_config_of_another_size(folder):
    edit_config(folder, hidden_size=64)
    refuse(folder, r"by the weights and .* by config\.json; expected the same")


def test_missing_tensor(folder):
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    refuse(folder, r"lacks 1 tensors that OlmoeForCausalLM needs, such as \['model.norm.weight'\]")


def test_unknown_tensor(folder):
    edit_tensors(folder, lambda t: t | {"model.layers.1.adapter.weight": torch.zeros(2)})
    refuse(folder, r"holds 1 tensors that OlmoeForCausalLM does not have, such as \['model.layers.1.adapter.weight'\]")


def test_both_layouts_of_one_layer(folder):
    fused = torch.zeros(4, 48, 32, dtype=torch.bfloat16)
    edit_tensors(folder, lambda t: t | {"model.layers.1.mlp.experts.gate_up_proj": fused})
    refuse(folder, "two tensors for 'model.layers.1.mlp.experts.gate_up_proj'")


def test_two_different_tensors_that_the_config_ties(tmp_path):
    save_source(tmp_path / "source", "qwen3_moe")
    edit_tensors(tmp_path / "source", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    refuse(tmp_path / "source", "holds two different tensors; .*set tie_word_embeddings to false", run=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (GATE.format(3, 2), float("nan")),  # tied
        (GATE.format(0, 1), float("nan")),  # untied
        ("model.norm.weight", float("inf")),
        ("lm_head.weight", -float("inf")),
    ],
)
def test_nan_in_a_weight(folder, name, value):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = value
        return tensors

    edit_tensors(folder, spoil)
    kind = "NaN" if value != value else "infinity"
    refuse(folder, f"tensor '{re.escape(name)}' holds {kind}; expected finite weights", run=True)


@pytest.mark.parametrize("layers", [10**9, 0, -1, 10**30])
def test_config_of_a_thousand_million_layers(folder, layers):
    edit_config(folder, num_hidden_layers=layers)
    refuse(folder, r"num_hidden_layers=.* by config.json and \d+ tensors|cannot read config.json", error=ValueError)


@pytest.mark.parametrize(
    "fields",
    [{"num_attention_heads": 0}, {"model_type": []}, {"text_config": []}, {"n_group": "two"}, {"vocab_size": 2**70}],
    ids=lambda fields: next(iter(fields)),
)
def test_config_of_impossible_values(folder, fields):
    """Most of them found by test_conversion_fuzz.py."""
    edit_config(folder, **fields)
    refuse(folder, r"transformers cannot (build a model of|read) config\.json|unknown family \[\]")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("method", ["union", "average"])
def test_source_with_an_adapter(folder, file, method):
    """Auto classes load it on top, the conversion would not: other numbers than the source's, silently."""
    (folder / file).write_text("{}")
    refuse(folder, r"holds an adapter \(adapter_.*merge_and_unload\(\)", error=TiedMoeError, method=method)


def test_tied_folder_with_an_adapter(folder, tmp_path):
    attempt({"source": str(folder), "output": str(tmp_path / "tied"), "method": "average"}, run=True)
    (tmp_path / "tied" / "adapter_config.json").write_text("{}")
    for command in (lambda: untie(tmp_path / "tied", tmp_path / "untied"), lambda: verify_folder(tmp_path / "tied")):
        with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match="holds an adapter"):
            command()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.uint8])
def test_experts_that_are_no_numbers_to_average(folder, dtype):
    edit_tensors(folder, lambda t: {n: v.to(dtype) if ".experts." in n else v for n, v in t.items()})
    name = str(dtype).removeprefix("torch.")
    refuse(folder, rf"the experts' model.layers.0.mlp.experts.*of torch.{name}; expected floating-point weights")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps is NaN"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a positive number"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
            "rope_parameters: rope_theta is NaN",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
            "rope_theta is inf; expected a positive",
        ),
        ({"rope_theta": -1e4}, "rope_theta is -10000.0; expected a positive number"),
        ({"initializer_range": float("nan")}, "initializer_range is NaN"),
    ],
)
def test_numbers_that_no_model_runs_with(folder, tmp_path, fields, message):
    edit_config(folder, **fields)
    refuse(folder, message)
    shutil.rmtree(tmp_path / "source")


def test_fp8_weights_without_a_word_on_their_scales(folder):
    edit_tensors(
        folder,
        lambda t: (
            {n: v.to(torch.float8_e4m3fn) if ".experts." in n else v for n, v in t.items()}
            | {f"{n}_scale_inv": torch.ones(1, 1) for n in t if ".experts." in n}
        ),
    )
    refuse(folder, "fp8 tensors, such as .* has no quantization_config that says how they are scaled")

"""Sources whose weights are fp8 with a scale per block, as DeepSeek-V3's: dequantised as transformers does it, bit for
bit.
"""

import json

import pytest
import torch
from conversions import edit_config, edit_tensors, read_tensors, save_source
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie, verify_folder
from tiedmoe_conversion.checkpoint import reader

BLOCK = 16
EXPERT = "model.layers.3.mlp.experts.1.gate_proj.weight"


def quantise(tensors):
    """Every projection of attention and experts in fp8, as DeepSeek-V3 is: not the router, norms, embeddings and
    lm_head.
    """
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") and not name.endswith("_with_mqa.weight"):
            found[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
        blocks[:rows, :columns] = tensor.float()
        blocks = blocks.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale = blocks.abs().amax((1, 3)) / 448
        quantised = (blocks / scale[:, None, :, None]).reshape(blocks.shape[0] * BLOCK, -1)[:rows, :columns]
        found[name] = quantised.to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found


def save_fp8(folder, **fields):
    # Sizes that 16 divides by default: transformers itself reads others wrongly, or not at all.
    save_source(folder, "deepseek_v3", **{"qk_rope_head_dim": 16, "head_dim": 16, "intermediate_size": 32, **fields})
    edit_tensors(folder, quantise)
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(folder, quantization_config=block)
    return folder


def recipe(folder, **fields):
    fields = {"skip_first": 1, "skip_last": 1, "method": "union", "output": str(folder.parent / "out")} | fields
    return ConversionRecipe(source=str(folder), **fields)


def round_scales(tensors):
    return {name: tensor.bfloat16() if name.endswith("_scale_inv") else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("scales", ["float32", "bfloat16"])
def test_dequantised_as_transformers_does_it(tmp_path, scales):
    folder = save_fp8(tmp_path / "source")
    if scales == "bfloat16":
        edit_tensors(folder, round_scales)
    plan = make_plan(recipe(folder))
    report = execute(plan)
    untie(tmp_path / "out", tmp_path / "untied")
    expected = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype="auto"
    ).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "untied").state_dict()
    assert found.keys() == expected.keys()
    assert len([name for name in read_tensors(folder) if name.endswith("_scale_inv")]) > 60
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name
    assert report["verification"]["lossless"] == {"compared": "logits", "tokens": 32, "equal": True}
    assert set(report["verification"]["experts_relative_error"]["layers"].values()) == {0.0}
    verify_folder(tmp_path / "out", str(folder))


def test_config_and_sizes(tmp_path):
    folder = save_fp8(tmp_path / "source")
    plan = make_plan(recipe(folder))
    execute(plan)
    on_disk = sum(tensor.nbytes for tensor in read_tensors(folder).values())
    written = read_tensors(tmp_path / "out")
    assert plan.bytes_before == on_disk
    assert plan.bytes_after == sum(tensor.nbytes for tensor in written.values()) > on_disk
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16, torch.int64}
    assert not [name for name in written if name.endswith("_scale_inv")]
    untie(tmp_path / "out", tmp_path / "untied")
    for name in ("out", "untied"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"


def test_blocks_that_do_not_divide_a_weight(tmp_path):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows in blocks of 128; here it has 24 in blocks of 16."""
    folder = save_fp8(tmp_path / "source", qk_rope_head_dim=8, head_dim=8)
    report = execute(make_plan(recipe(folder)))
    tensors, name = read_tensors(folder), "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
    assert (weight.shape, scale.shape) == ((24, 32), (2, 2))
    expected = torch.empty(weight.shape)
    for row in range(24):
        for column in range(32):
            expected[row, column] = weight[row, column].float() * scale[row // BLOCK, column // BLOCK]
    assert torch.equal(read_tensors(tmp_path / "out")[name], expected.bfloat16())
    lossless = report["verification"]["lossless"]
    assert (lossless["compared"], lossless["equal"]) == ("experts", True)
    assert "transformers reads an fp8 weight wrongly whose size its blocks do not divide" in lossless["because"]


def test_layers_of_a_group_that_are_quantised_differently(tmp_path):
    folder = save_fp8(tmp_path / "source")

    def plain(tensors):
        names = [name for name in tensors if ".layers.3.mlp.experts." in name]
        found = {name: tensor for name, tensor in tensors.items() if name not in names}
        return found | {name: tensors[name].bfloat16() for name in names if not name.endswith("_scale_inv")}

    edit_tensors(folder, plain)
    message = (
        r"ties layers 3 and 4, .*'\[4, 32, 32\] bfloat16'.*bfloat16 \(from float8_e4m3fn in blocks of \[16, 16\]\)"
    )
    with pytest.raises(ConversionError, match=message):
        make_plan(recipe(folder))


def test_experts_of_a_layer_that_are_quantised_differently(tmp_path):
    folder = save_fp8(tmp_path / "source")

    def plain(tensors):
        del tensors[f"{EXPERT}_scale_inv"]
        return tensors | {EXPERT: tensors[EXPERT].bfloat16()}

    edit_tensors(folder, plain)
    with pytest.raises(
        ConversionError, match=r"have dtypes \['bfloat16', 'bfloat16 \(from float8_e4m3fn .*expected one"
    ):
        make_plan(recipe(folder))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop(f"{EXPERT}_scale_inv"),
            "fp8 weight .* has no scales; expected '.*gate_proj.weight_scale_inv'",
        ),
        (lambda t: t.pop(EXPERT), r"gate_proj.weight_scale_inv' has no weight beside it"),
        (
            lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(3, 2)}),
            r"float32 \[3, 2\]; expected .* F32 or BF16 \[1, 2\]",
        ),
        (lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(1, 2).half()}), r"torch.float16 \[1, 2\]; expected"),
        (lambda t: t.update({EXPERT: t[EXPERT].float().to(torch.float8_e5m2)}), "float8_e5m2 .* expected F8_E4M3"),
        (lambda t: t[f"{EXPERT}_scale_inv"].fill_(float("nan")), "gate_proj.weight' holds NaN"),
    ],
    ids=["no scale", "no weight", "shape", "scale dtype", "weight dtype", "NaN"],
)
def test_scales_that_do_not_belong(tmp_path, edit, message):
    folder = save_fp8(tmp_path / "source")

    def edited(tensors):
        edit(tensors)
        return tensors

    edit_tensors(folder, edited)
    with pytest.raises(ConversionError, match=message):
        execute(make_plan(recipe(folder)))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "gptq", "bits": 4},
        "fp8",
        [1],
    ],
)
def test_other_quantisations_are_refused(tmp_path, quantisation):
    folder = save_fp8(tmp_path / "source")
    edit_config(folder, quantization_config=quantisation)
    with pytest.raises(ConversionError, match=r"is quantised \(.*expected plain weights .*save a dequantised copy"):
        make_plan(recipe(folder))


def test_a_config_without_a_dtype_to_dequantise_to(tmp_path):
    folder = save_fp8(tmp_path / "source")
    edit_config(folder, dtype=None)
    with pytest.raises(ConversionError, match=r"has the dtype None; expected one of \['bfloat16'"):
        make_plan(recipe(folder))


def test_a_quantised_config_beside_plain_weights(tmp_path):
    save_source(tmp_path / "source")
    edit_config(tmp_path / "source", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ConversionError, match=r"none of its weights has scales; .*remove quantization_config"):
        make_plan(recipe(tmp_path / "source"))


def test_rows_of_a_dequantised_tensor(tmp_path):
    folder = save_fp8(tmp_path / "source")
    opened = reader.open_source(str(folder))
    whole = opened.read(EXPERT)
    assert whole.dtype == torch.bfloat16
    assert opened.read(EXPERT, 3, 9).equal(whole[3:9])
    assert opened.read(EXPERT, into=torch.empty_like(whole)).equal(whole)

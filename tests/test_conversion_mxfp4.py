"""gpt-oss as it is released, its experts in mxfp4: dequantised as transformers does it, bit for bit."""

import gc
import json

import pytest
import torch
from checkpoints import make_text, make_tokenizer
from conversions import edit_config, edit_tensors, read_tensors, save_source
from test_conversion_execute import LiveBytes
from transformers import AutoModelForCausalLM, Mxfp4Config

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie, verify_folder
from tiedmoe_conversion.calibration.streamed_model import StreamedModel
from tiedmoe_conversion.checkpoint.reader import open_source
from tiedmoe_conversion.layout.source_model import family_model, open_source_model
from tiedmoe_conversion.search import Search

# What four bits stand for: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
RELEASED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
EXPERTS = "model.layers.3.mlp.experts.down_proj"


def quantise(tensors):
    """The experts' matrices in blocks of 32 values along what they are multiplied with; biases stay as they are."""
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        blocks = tensor.float().mT.unflatten(-1, (-1, 32))
        exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
        codes = (blocks / exponents.exp2()).unsqueeze(-1).sub(VALUES).abs().argmin(-1).to(torch.uint8)
        found[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        found[f"{name}_scales"] = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return found


def dequantised(blocks, scales):
    """The weight in float32, by the format's own words and none of transformers' code."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    return (VALUES[codes.long()] * (scales.float() - 127).exp2().unsqueeze(-1)).flatten(-2).mT


def save_mxfp4(folder, **fields):
    save_source(folder, "gpt_oss", **{"hidden_size": 64, "intermediate_size": 32, **fields})
    edit_tensors(folder, quantise)
    edit_config(folder, quantization_config=RELEASED, dtype=None)  # a released config.json names no dtype
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return save_mxfp4(tmp_path_factory.mktemp("mxfp4") / "source")


@pytest.fixture
def folder(tmp_path):
    return save_mxfp4(tmp_path / "source", num_hidden_layers=4)


def recipe(folder, output, **fields):
    fields = {"skip_first": 1, "skip_last": 1, "method": "union"} | fields
    return ConversionRecipe(source=str(folder), output=str(output), **fields)


def of_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True)).eval()


def test_tied_by_union_it_computes_what_transformers_does(released, tmp_path):
    report = execute(make_plan(recipe(released, tmp_path / "out")))
    source, tied = of_transformers(released), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(32)[None] % 96
    with torch.inference_mode():
        assert tied(tokens).logits.equal(source(tokens).logits)
    assert report["verification"]["lossless"] == {"compared": "logits", "tokens": 32, "equal": True}
    assert set(report["verification"]["experts_relative_error"]["layers"].values()) == {0.0}
    verify_folder(tmp_path / "out", str(released))

    untie(tmp_path / "out", tmp_path / "untied")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "untied").state_dict()
    expected = source.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.bfloat16, name
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def test_values_and_sizes(released, tmp_path):
    plan = make_plan(recipe(released, tmp_path / "out", method="select", group_size=2))
    execute(plan)
    stored, written = read_tensors(released), read_tensors(tmp_path / "out")
    assert {str(tensor.dtype) for name, tensor in written.items()} == {"torch.bfloat16"}
    assert plan.bytes_before == sum(tensor.nbytes for tensor in stored.values())
    assert plan.bytes_after == sum(tensor.nbytes for tensor in written.values())
    for group, name in enumerate(plan.groups):
        for parameter in ("gate_up_proj", "down_proj"):
            old = f"model.layers.{name[0]}.mlp.experts.{parameter}"
            expected = dequantised(stored[f"{old}_blocks"], stored[f"{old}_scales"])
            assert written[f"model.expert_pools.{group}.{parameter}"].float().equal(expected)
            assert expected.unique().numel() > 15
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    verify_folder(tmp_path / "out", str(released))


def test_rows_are_read_alone(released):
    opened = open_source(str(released))
    whole = opened.read(EXPERTS)
    assert (whole.dtype, whole.shape) == (torch.bfloat16, (4, 32, 64))
    assert opened.read(EXPERTS, 1, 3).equal(whole[1:3])
    assert opened.read(EXPERTS, 3).equal(whole[3:])
    assert opened.read(EXPERTS, into=torch.empty_like(whole)).equal(whole)
    bytes_read = []
    read = opened._read
    opened._read = lambda info, *rows: bytes_read.append((tensor := read(info, *rows)).nbytes) or tensor
    opened.read(EXPERTS, 2, 3)
    assert sum(bytes_read) == opened.tensors[EXPERTS].num_bytes // 4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_dtype_is_the_configs(folder, dtype):
    edit_config(folder, dtype=dtype)
    stored, found = read_tensors(folder), open_source(str(folder)).read(EXPERTS)
    expected = dequantised(stored[f"{EXPERTS}_blocks"], stored[f"{EXPERTS}_scales"])
    assert found.dtype == getattr(torch, dtype)
    assert found.float().equal(expected)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("average", {}),
        ("select", {}),
        ("least_squares", {"calibration_tokens": 256, "calibration_block_size": 32}),
    ],
)
def test_memory_is_below_the_planned_one(tmp_path, method, fields):
    source = save_mxfp4(tmp_path / "source", num_hidden_layers=4, intermediate_size=256, vocab_size=320)
    make_tokenizer().save_pretrained(source)
    (tmp_path / "text.txt").write_text(make_text())
    fields = fields and {"calibration": str(tmp_path / "text.txt"), **fields}
    plan = make_plan(recipe(source, tmp_path / "out", method=method, group_size=2, **fields))
    gc.collect()
    with LiveBytes() as counter:
        execute(plan)
    # The values in float32 that torch multiplies inside of one operation are planned for and not counted.
    assert plan.peak_memory_bytes / 3 < counter.peak <= plan.peak_memory_bytes


def test_calibration_runs_the_dequantised_model(released):
    source = open_source_model(str(released))
    streamed = StreamedModel(family_model(source.model.config), source.tensors.read, source.bytes_as_read)
    tokens = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = of_transformers(released).float()(tokens, labels=tokens).loss
    assert abs(streamed.loss(tokens).mean() - expected) < 1e-5


def test_a_choice_by_bytes_counts_them_dequantised(released, tmp_path):
    fields = {"method": "select", "group_size": 3, "calibration": "austen"}
    search = Search(recipe(released, tmp_path / "out", max_loss=1.0, **fields), open_source_model(str(released)))
    for point in search.curve(search.candidates(measure=False)):
        groups = [list(candidate.layers) for candidate in point.candidates]
        assert make_plan(recipe(released, tmp_path / "out", groups=groups, **fields)).bytes_after == point.bytes_after
        assert 0 < point.fraction < 1


def test_layers_of_a_group_that_are_quantised_differently(folder, tmp_path):
    def plain(tensors):
        stored = [tensors.pop(f"{EXPERTS}_{part}") for part in ("blocks", "scales")]
        return tensors | {EXPERTS: dequantised(*stored).bfloat16().contiguous()}

    edit_tensors(folder, plain)
    with pytest.raises(
        ConversionError, match=r"\[4, 32, 64\] bfloat16 \(from mxfp4 in blocks of 32\)'.*64\] bfloat16'"
    ):
        make_plan(recipe(folder, tmp_path / "out", groups=[[2, 3]]))


def pop(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (pop(f"{EXPERTS}_scales"), r"down_proj_blocks' has no '.*down_proj_scales' beside it"),
        (pop(f"{EXPERTS}_blocks"), r"down_proj_scales' has no '.*down_proj_blocks' beside it"),
        (lambda t: t.update({EXPERTS: torch.zeros(4, 32, 64).bfloat16()}), "down_proj' is there twice"),
        (lambda t: t.update({f"{EXPERTS}_scales": torch.zeros(4, 64, 2).byte()}), r"uint8 \[4, 64, 2\]; expected U8"),
        (lambda t: t.update({f"{EXPERTS}_scales": torch.ones(4, 64, 1)}), r"float32 \[4, 64, 1\]; expected U8"),
        (lambda t: t.update({f"{EXPERTS}_blocks": torch.ones(4, 64, 1, 16)}), r"float32 \[4, 64, 1, 16\] and"),
        (lambda t: t.update({f"{EXPERTS}_blocks": torch.ones(4, 64, 16).byte()}), r"uint8 \[4, 64, 16\] and"),
        (lambda t: t.update({f"{EXPERTS}_blocks": torch.ones(4, 64, 1, 8).byte()}), r"uint8 \[4, 64, 1, 8\] and"),
        (
            lambda t: t.update({f"{EXPERTS}_{part}": t[f"{EXPERTS}_{part}"][:3] for part in ("blocks", "scales")}),
            r"\[3, 32, 64\] by the weights and \[4, 32, 64\] by config.json",
        ),
        (lambda t: t[f"{EXPERTS}_scales"].fill_(255), "down_proj' holds infinity"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}), "has the dtype None; expected"),
    ],
    ids=["no scales", "no blocks", "plain too", "one scale", "scale dtype", "block dtype", "flat", "half", "experts",
         "infinity", "two dtypes"],
)  # fmt: skip
def test_tensors_that_do_not_belong(folder, tmp_path, edit, message):
    def edited(tensors):
        edit(tensors)
        return tensors

    edit_tensors(folder, edited)
    with pytest.raises(ConversionError, match=message):
        execute(make_plan(recipe(folder, tmp_path / "out")))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_config_without_quantisation(folder, tmp_path):
    edit_config(folder, quantization_config=None)
    with pytest.raises(ConversionError, match=r"holds 8 mxfp4 tensors, such as .* has no quantization_config"):
        make_plan(recipe(folder, tmp_path / "out"))


def test_a_config_beside_plain_weights(tmp_path):
    save_source(tmp_path / "source", "gpt_oss")
    edit_config(tmp_path / "source", quantization_config=RELEASED)
    with pytest.raises(ConversionError, match=r"\(mxfp4\) by its config.json, and none of its weights has scales"):
        make_plan(recipe(tmp_path / "source", tmp_path / "out"))


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "mxfp8"}},
        {"quantization_config": {"quant_method": ["mxfp4"]}},
        {"quantization_config": "mxfp4"},
        {"model_type": "qwen3_moe"},  # mxfp4 of a family whose experts transformers reads no mxfp4 of
    ],
)
def test_other_quantisations_are_refused(folder, tmp_path, fields):
    edit_config(folder, **fields)
    with pytest.raises(ConversionError, match=r"is quantised \(.*expected plain weights .*save a dequantised copy"):
        make_plan(recipe(folder, tmp_path / "out"))

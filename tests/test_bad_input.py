"""What a user can do wrong with a conversion: an error that says what to do, and an unchanged disk."""

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from conversions import edit_config, edit_tensors, read_tensors, save_source, unchanged_disk
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan, untie, verify_folder
from tiedmoe_conversion.checkpoint import reader, writer
from transformers_tiedmoe.errors import TiedMoeError

GATE = "model.layers.{}.mlp.experts.{}.gate_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """An OLMoE source of 6 layers of 4 experts, one tensor per expert, in one file; do not change it."""
    folder = tmp_path_factory.mktemp("pristine") / "source"
    save_source(folder)
    return folder


@pytest.fixture
def folder(tmp_path, pristine):
    """A copy of it to break, in `tmp_path / "source"`."""
    return shutil.copytree(pristine, tmp_path / "source")


def refuse(folder, message, error=ConversionError, run=False, **fields):
    """Converting `folder` raises `error` matching `message`, and leaves everything beside it as it was."""
    recipe = {
        "source": str(folder),
        "output": str(folder.parent / "out"),
        "skip_first": 1,
        "skip_last": 1,
        "method": "average",
    } | fields
    with unchanged_disk(folder.parent), pytest.raises(error, match=message):
        attempt(recipe, run)


def attempt(recipe, run):
    plan = make_plan(ConversionRecipe.from_dict(recipe))
    if run:
        execute(plan)


# The family


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


# The groups


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


# The weights


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


# The files


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(folder, keep):
    """Nothing left, a piece of the length, a piece of the header, all but the last byte."""
    path = folder / "model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    refuse(folder, r"model.safetensors (is truncated|has a header)")


def test_bytes_after_the_last_tensor(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    refuse(folder, "has bytes after its last tensor")


def test_git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuse(folder, "is a Git LFS pointer, not the weights; run `git lfs pull`")


@pytest.fixture
def sharded(tmp_path):
    save_source(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuse(sharded, "has no file 'model-00002-of-00003.safetensors', which its index names; download it again")


def test_shard_that_lacks_a_tensor(sharded):
    edit_index(
        sharded,
        lambda index: {"weight_map": index["weight_map"] | {"model.extra": "model-00001-of-00003.safetensors"}},
    )
    refuse(
        sharded, "index.json says that 'model.extra' is in model-00001-of-00003.safetensors, which does not hold it"
    )


def test_tensor_that_the_index_does_not_list(sharded):
    def forget(index):
        del index["weight_map"]["model.norm.weight"]
        return index

    edit_index(sharded, forget)
    refuse(sharded, r"holds \['model.norm.weight'\], which model.safetensors.index.json does not list")


def test_tensor_in_two_shards(sharded):
    path = sharded / "model-00001-of-00003.safetensors"
    tensors = read_tensors(sharded)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    first = {name: tensors[name] for name, file in index.items() if file == path.name}
    save_file(first | {"model.norm.weight": tensors["model.norm.weight"]}, path)
    refuse(sharded, "tensor 'model.norm.weight' is in model-00001-of-00003.safetensors and in .*; expected it once")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "..\\x"])
def test_index_that_leaves_the_folder(sharded, file):
    edit_index(sharded, lambda index: {"weight_map": index["weight_map"] | {"model.norm.weight": file}})
    refuse(sharded, f"puts 'model.norm.weight' in {re.escape(repr(file))}; expected the plain name of a file")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_index_without_weights(sharded, index):
    edit_index(sharded, lambda _: index)
    refuse(sharded, "has no weight_map")


def write_header(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b"[]", "a header that is a list"),
        ({"a": 3}, "entry for 'a' is 3; expected dtype, shape and data_offsets"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 8]}}, "dtype 'F4'; expected one of"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, r"shape \[-2\]"),
        ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "shape '2'"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, "but its offsets .* hold 8"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "needs 12 bytes .* hold 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "starts at byte 4 of the data; expected 0"),
        (
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"},
            "starts at byte 0 of the data; expected 8: tensors overlap",
        ),
    ],
)
def test_header_that_contradicts_itself(folder, header, message):
    write_header(folder, header, b"\0" * 8)
    refuse(folder, message)


def test_header_of_absurd_length(folder):
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refuse(folder, "its header should take 9223372036854775808 bytes")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refuse(folder, r"has no weights: expected model.safetensors or .*, found \['consolidated.safetensors'\]")


def to_pickle(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_pickle_is_refused_unless_asked_for(folder):
    to_pickle(folder, read_tensors(folder))
    refuse(folder, "has its weights in a .bin pickle only, .*pass allow_pickle=True")


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.environ["TIEDMOE_TEST_FOLDER"], "owned"),)


def test_hostile_pickle_runs_nothing_even_when_allowed(folder, monkeypatch):
    monkeypatch.setenv("TIEDMOE_TEST_FOLDER", str(folder.parent))
    to_pickle(folder, {"model.norm.weight": Evil()})
    refuse(folder, r"torch.load\(weights_only=True\) refuses", allow_pickle=True)


def test_pickle_of_something_else(folder):
    to_pickle(folder, [1, 2])
    refuse(folder, "expected a state dict of tensors", allow_pickle=True)


@pytest.mark.parametrize("name", ["missing", "./missing", "a/b/c"])
def test_source_that_does_not_exist(folder, name, monkeypatch):
    monkeypatch.chdir(folder.parent)
    path = str(folder.parent / name) if name == "missing" else name
    refuse(folder, "does not exist; expected the folder of a checkpoint, or a Hugging Face Hub id", source=path)


def test_source_that_is_a_file(folder):
    refuse(folder, "is a file; expected the folder of a checkpoint", source=str(folder / "config.json"))


def test_revision_of_a_local_folder(folder):
    refuse(folder, "is a local folder, which has no revision 'main'", revision="main")


# Links, pipes and the like: nothing outside of the checkpoint's folder is read


@pytest.mark.parametrize("file", ["tokenizer.json", "README.md", "config.json", "generation_config.json", "LICENSE"])
def test_small_file_that_links_elsewhere(folder, file):
    """Or the conversion would copy a file of the user's, such as a key, into what he publishes."""
    secret = folder.parent / "secret"
    secret.write_text("{}")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(secret)
    refuse(folder, rf"{re.escape(file)} is a link to .*secret, outside of the checkpoint's folder", run=True)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "sub/../../secret"])
def test_travelling_file_that_links_elsewhere(folder, target):
    (folder.parent / "secret").write_text("secret")
    (folder / "sub").mkdir()
    (folder / "vocab.bpe").symlink_to(target)
    refuse(folder, r"vocab.bpe is a link to .*, outside of the checkpoint's folder", run=True)


def test_folder_of_templates_that_links_elsewhere(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "secret.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to("../elsewhere")
    refuse(folder, r"secret.jinja is a link to .*, outside of the checkpoint's folder", run=True)


def test_weights_that_link_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "weights")
    (folder / "model.safetensors").symlink_to("../weights")
    refuse(folder, r"model.safetensors is a link to .*weights, outside of .*put a copy of it there if you trust")


def test_shard_that_links_elsewhere(sharded):
    name = "model-00002-of-00003.safetensors"
    (sharded / name).rename(sharded.parent / name)
    (sharded / name).symlink_to(sharded.parent / name)
    refuse(sharded, "is a link to .*, outside of the checkpoint's folder")


def test_link_to_nowhere_and_in_a_circle(folder):
    (folder / "vocab.bpe").symlink_to("missing")
    refuse(folder, "vocab.bpe is a link to .*missing, which does not exist", run=True)
    (folder / "vocab.bpe").unlink()
    (folder / "vocab.bpe").symlink_to("vocab.bpe")
    refuse(folder, "vocab.bpe is a link to .*, which does not exist", run=True)


def test_links_within_the_folder_and_into_the_hubs_cache(tmp_path, pristine):
    """The two that are honest."""
    snapshot = tmp_path / "models--some--model" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--some--model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(pristine.iterdir())):
        shutil.copy(path, blobs / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    (snapshot / "vocab.bpe").write_text("within")
    (snapshot / "vocab.txt").symlink_to("vocab.bpe")
    execute(make_plan(ConversionRecipe(source=str(snapshot), output=str(tmp_path / "out"), method="average")))
    assert (tmp_path / "out" / "vocab.txt").read_text() == "within"
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_a_cache_whose_blob_links_elsewhere(tmp_path, pristine):
    snapshot = shutil.copytree(pristine, tmp_path / "hub" / "snapshots" / "c0ffee")
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "hub" / "blobs" / "1").symlink_to("../../secret")
    (snapshot / "vocab.bpe").symlink_to("../../blobs/1")
    refuse(snapshot, "vocab.bpe is a link to .*secret, outside of the checkpoint's folder", run=True)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json", "LICENSE"]
)
def test_pipe_in_the_place_of_a_file(folder, file):
    """To open one waits for a writer, for ever."""
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(
        ConversionError, match=rf"{re.escape(file)} is no regular file; expected one, not a folder, a pipe"
    ):
        attempt({"source": str(folder), "output": str(folder.parent / "out"), "method": "average"}, run=True)
    assert not (folder.parent / "out").exists()


def test_folder_in_the_place_of_the_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refuse(folder, "model.safetensors is no regular file")


def test_shape_of_a_million_dimensions(folder):
    """Their product alone would take minutes."""
    write_header(folder, {"a": {"dtype": "F32", "shape": [2**62] * 1_000_000, "data_offsets": [0, 8]}}, b"\0" * 8)
    refuse(folder, "at most 64 dimensions")


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


# The output


def test_output_folder_that_is_not_empty(folder):
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "notes.txt").write_text("mine")
    refuse(folder, r"is not empty: it holds \['notes.txt'\]; expected a new or empty one", TiedMoeError)


def test_output_that_becomes_not_empty_after_the_plan(folder):
    plan = make_plan(ConversionRecipe(source=str(folder), output=str(folder.parent / "out"), method="average"))
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "notes.txt").write_text("mine")
    with unchanged_disk(folder.parent), pytest.raises(TiedMoeError, match="is not empty"):
        execute(plan)


def test_output_that_is_the_source(folder):
    refuse(folder, "is not empty", TiedMoeError, output=str(folder))


def test_output_in_or_around_an_input_is_refused_before_the_work(folder, monkeypatch):
    """For convert, plan and untie; with links followed, and for an OUTPUT that is only seen to be another when it is
    resolved.
    """
    (folder.parent / "link").symlink_to(folder)
    (folder.parent / "text").mkdir()
    (folder.parent / "text" / "a.txt").write_text("text")
    refuse(folder, "lies in the source", TiedMoeError, output=str(folder / "out"))
    refuse(folder, "lies in the source", TiedMoeError, output=str(folder.parent / "link" / "out"))
    refuse(
        folder,
        "lies in the source",
        TiedMoeError,
        source=str(folder.parent / "link"),
        output=str(folder / "a" / "out"),
    )
    text = {"calibration": str(folder.parent / "text"), "output": str(folder.parent / "text" / "out")}
    refuse(folder, "lies in the calibration text", TiedMoeError, **text)
    monkeypatch.chdir(folder.parent)
    refuse(folder, "is not empty", TiedMoeError, output="x/..")
    for output, message in (("link/out", "lies in the source"), ("x/..", "is not empty"), ("source", "is not empty")):
        with unchanged_disk(folder.parent), pytest.raises(TiedMoeError, match=message):
            untie(folder, output)


def test_output_that_is_a_file_or_below_one(folder):
    refuse(folder, "exists and is not a folder", TiedMoeError, output=str(folder / "config.json"))
    refuse(
        folder, r"cannot be made: .*config\.json is a file", TiedMoeError, output=str(folder / "config.json" / "below")
    )


def test_output_that_is_a_link_to_nowhere(folder):
    (folder.parent / "out").symlink_to("nowhere")
    refuse(folder, "exists and is not a folder", TiedMoeError)


def test_disk_that_is_known_to_be_too_small(folder, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage(1000))
    refuse(
        folder, "has 1,000 bytes free, and .* are needed; free some", run=True, output=str(folder.parent / "a" / "out")
    )


@pytest.mark.parametrize("at", [0, 1, 20])
def test_disk_that_fills_up(folder, monkeypatch, at):
    """The write of the nth tensor fails as on a full disk; new parent folders vanish, too."""
    calls, real = [], writer._write

    def full(file, data):
        calls.append(data)
        if len(calls) > at:
            file.write(b"a piece")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    monkeypatch.setattr(writer, "_write", full)
    refuse(
        folder,
        "is full; nothing is left of the attempt",
        TiedMoeError,
        run=True,
        output=str(folder.parent / "new" / "out"),
    )
    assert len(calls) == at + 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_disk_that_is_really_full(folder, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        recipe = ConversionRecipe(source=str(folder), output=str(small / "out"), method="average")
        plan = make_plan(recipe)
        with unchanged_disk(tmp_path), pytest.raises(ConversionError, match="bytes free, and"):
            execute(plan)
        module = importlib.import_module("tiedmoe_conversion.run")  # the package's name is the function
        monkeypatch.setattr(module, "check_space", lambda *args: None)
        with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match="is full"):
            execute(plan)
    finally:
        subprocess.run(["umount", small], check=True)


def test_source_that_fails_while_it_is_read_leaves_nothing(folder, monkeypatch):
    plan = make_plan(ConversionRecipe(source=str(folder), output=str(folder.parent / "out"), method="average"))
    real = reader.Source.read

    def fail(self, name, *rows, **into):
        if name == "model.norm.weight":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, name, *rows, **into)

    monkeypatch.setattr(reader.Source, "read", fail)
    with unchanged_disk(folder.parent), pytest.raises(OSError, match="Input/output error"):
        execute(plan)


# An adapter beside the weights


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

"""Broken, missing and hostile files of a source: an error that says what to do, and an unchanged disk."""

import json
import os
import re
import shutil

import pytest
import torch
from bad_sources import attempt, edit_index, folder_fixture, pristine_fixture, refuse, sharded_fixture  # noqa: F401
from conversions import read_tensors
from safetensors.torch import save_file

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan


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

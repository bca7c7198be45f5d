"""Opening a checkpoint: headers, indexes, the Hub. What a user can do wrong is in test_bad_input.py."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conversions import assert_equal_tensors, read_tensors, save_source
from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan
from tiedmoe_conversion.checkpoint import reader
from tiedmoe_conversion.checkpoint.headers import DTYPES, read_header
from tiedmoe_conversion.checkpoint.reader import open_source


def test_reads_what_safetensors_wrote(tmp_path):
    """Every dtype, a scalar, an empty tensor, and rows of a tensor; fp8 only beside a config that says its scales."""
    tensors = {f"t{i}": torch.arange(24).reshape(4, 6).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, header = read_header(tmp_path / "model.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    with pytest.raises(ConversionError, match="holds 2 fp8 tensors"):
        open_source(str(tmp_path))

    tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in str(tensor.dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_source(str(tmp_path))
    for name, tensor in tensors.items():
        found = opened.read(name)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    assert opened.read("t1", 1, 3).equal(tensors["t1"][1:3])
    assert opened.read("t1", 3).equal(tensors["t1"][3:])


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = json.dumps({"a": A})
CRAFTED = {
    "sound": {"a": A}, "overlap": {"a": A, "b": A}, "gap": {"a": A | {"shape": [1], "data_offsets": [4, 8]}},
    "a name twice": f"{ONE[:-1]}, {ONE[1:]}".encode(), "shape of other bytes": {"a": A | {"shape": [3]}},
    "dtype F5": {"a": A | {"dtype": "F5"}}, "negative": {"a": A | {"shape": [-2]}},
    "2^124 values": {"a": A | {"shape": [2**62, 2**62]}}, "65 dimensions": {"a": A | {"shape": [1] * 64 + [2]}},
    "file too short": {"a": A | {"shape": [4], "data_offsets": [0, 16]}},
    "file too long": {"a": A | {"shape": [1], "data_offsets": [0, 4]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("opens", "opened"),
    [
        (open_source, ["sound"]),
        (lambda folder: safe_open(f"{folder}/model.safetensors", "pt"), ["sound", "a name twice", "65 dimensions"]),
        (get_local_safetensors_metadata, list(CRAFTED)),
    ],
    ids=["ours", "safe_open", "huggingface_hub"],
)
def test_crafted_headers_that_others_open(opens, opened, tmp_path):
    """Why there is a reader of our own: `checkpoint/headers.py`."""
    found = []
    for name, header in CRAFTED.items():
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with contextlib.suppress(Exception):
            opens(str(tmp_path))
            found.append(name)
    assert found == opened


def test_a_file_that_changes_after_the_plan_is_noticed(tmp_path):
    save_source(tmp_path / "source")
    opened = open_source(str(tmp_path / "source"))
    save_file({"other": torch.zeros(2)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ConversionError, match="changed while it was read"):
        opened.read("model.norm.weight")


def test_pickle_is_read_where_it_is_allowed(tmp_path):
    model = save_source(tmp_path / "source")
    tensors = read_tensors(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, tmp_path / "source" / file)
    (tmp_path / "source" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    recipe = ConversionRecipe(
        source=str(tmp_path / "source"), output=str(tmp_path / "out"), method="select", allow_pickle=True
    )
    execute(make_plan(recipe))
    found = read_tensors(tmp_path / "out")
    assert found["model.embed_tokens.weight"].equal(model.get_input_embeddings().weight)
    assert found["model.expert_pools.0.down_proj"].equal(model.get_submodule("model.layers.2.mlp.experts").down_proj)


class FakeHub:
    """Serves one folder as a repository, and counts what is downloaded."""

    def __init__(self, folder, cache):
        self.folder, self.cache, self.downloads = folder, cache / "snapshots" / "c0ffee", []

    def install(self, monkeypatch):
        monkeypatch.setattr(reader, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(reader, "hf_hub_download", self.hf_hub_download)
        api = SimpleNamespace(
            file_exists=lambda repo, file, revision: (self.folder / file).is_file(),
            parse_safetensors_file_metadata=self.parse_safetensors_file_metadata,
        )
        monkeypatch.setattr(reader, "HfApi", lambda: api)

    def snapshot_download(self, repo, revision, allow_patterns):
        assert repo == "some/model"
        assert "*.safetensors" not in allow_patterns
        self.cache.mkdir(parents=True)
        for path in self.folder.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, self.cache)
        return str(self.cache)

    def hf_hub_download(self, repo, file, revision):
        assert revision == "c0ffee"
        self.downloads.append(file)
        return shutil.copy(self.folder / file, self.cache / file)

    def parse_safetensors_file_metadata(self, repo, file, revision):
        _, infos = read_header(self.folder / file)
        names = {dtype: name for name, dtype in DTYPES.items()}
        tensors = {
            name: TensorInfo(names[info.dtype], list(info.shape), (info.offset, info.offset + info.num_bytes))
            for name, info in infos.items()
        }
        return SafetensorsFileMetadata(metadata={}, tensors=tensors)


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_hub_source_is_planned_without_downloading_a_weight(tmp_path, monkeypatch, max_shard_size):
    save_source(tmp_path / "repository", max_shard_size=max_shard_size)
    hub = FakeHub(tmp_path / "repository", tmp_path / "cache")
    hub.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(ConversionRecipe(source="some/model", output="out", method="union", revision="main"))
    assert hub.downloads == []
    assert plan.summary()["revision"] == "c0ffee"

    report = execute(plan)
    assert sorted(hub.downloads) == sorted(path.name for path in hub.folder.glob("*.safetensors"))  # each once
    assert report["verification"]["lossless"]["compared"] == "logits"
    local = ConversionRecipe(source=str(hub.folder), output="local", method="union")
    execute(make_plan(local))
    assert_equal_tensors(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "local"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: some/model" in card
    assert "revision: c0ffee" in card
    assert AutoModelForCausalLM.from_pretrained("out").config.groups == [[2, 3]]


def test_hub_file_that_is_not_the_planned_one_is_noticed(tmp_path, monkeypatch):
    save_source(tmp_path / "repository")
    hub = FakeHub(tmp_path / "repository", tmp_path / "cache")
    hub.install(monkeypatch)
    opened = open_source("some/model")
    save_source(tmp_path / "repository", hidden_size=16)
    with pytest.raises(ConversionError, match="not the file that was planned with"):
        opened.read("model.norm.weight")


def test_hub_that_cannot_be_reached(tmp_path):
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(ConversionError, match="'some/model' is not a folder here, and the Hub cannot serve it"):
        open_source("some/model")

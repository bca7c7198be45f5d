"""Tiny source checkpoints on disk, and what the conversion's tests ask of a folder."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from families import tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tiedmoe_conversion.calibration.inputs import open_calibration
from tiedmoe_conversion.checkpoint.reader import open_source
from tiedmoe_conversion.layout.source_model import SourceModel, read_config

logging.disable_progress_bar()

# The six key layouts of the issue: why each is here.
FAMILIES = {
    "olmoe": {},  # one tensor per expert on the Hub
    "mixtral": {},  # other names on the Hub: block_sparse_moe, w1, w2, w3
    "qwen2_moe": {"mlp_only_layers": [2]},  # a dense layer in the middle, shared experts
    "qwen3_moe": {"mlp_only_layers": [0], "tie_word_embeddings": True},  # no lm_head on disk
    "deepseek_v3": {"first_k_dense_replace": 2},  # leading dense layers, a float32 buffer beside the router
    "gpt_oss": {},  # biases, transposed, 3-D on the Hub
}


def save_source(folder, family="olmoe", dtype=torch.bfloat16, max_shard_size="5GB", original=True, **fields):
    """A random untied checkpoint of `family` in `folder`, and its model; all of it is a function of the arguments."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **FAMILIES.get(family, {}), **fields))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, save_original_format=original, max_shard_size=max_shard_size)
    return model


def save_tokenizer(folder) -> None:
    """A tokenizer of single words."""
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def read_tensors(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder by name, read by safetensors itself."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def edit_tensors(folder, edit) -> None:
    """Replace the tensors of a single-file checkpoint by `edit(tensors)`."""
    path = Path(folder) / "model.safetensors"
    save_file({k: v.clone() for k, v in edit(load_file(path)).items()}, path, metadata={"format": "pt"})


def edit_config(folder, **fields) -> None:
    """Change fields of a checkpoint's config.json."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal_tensors(found: dict, expected: dict) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


_calibrations = contextlib.ExitStack()


def opened_calibration(recipe):
    """The recipe's calibration as `open_calibration` gives it; the one that was opened before is closed."""
    _calibrations.close()
    opened = open_source(recipe.source)
    source = SourceModel.map(opened, read_config(opened))
    return _calibrations.enter_context(open_calibration(recipe, source))


@contextlib.contextmanager
def unchanged_disk(folder):
    """The block leaves every file and folder below `folder` as it was."""
    before = _tree(folder)
    yield
    assert _tree(folder) == before


def _tree(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in Path(folder).rglob("*")
    }

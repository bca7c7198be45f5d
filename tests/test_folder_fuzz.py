"""Folders of ours that were crafted or damaged: tied configs, slot maps, manifests, journals and statistics.

Each gives an error or what an undamaged folder gives; nothing takes long, and a command writes no file but its own.
"""

import contextlib
import json
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, save_source, save_tied
from conversions import edit_tensors
from fuzzing import EXTRA_FIELDS, Limits, anything, cases, numbers, spliced, words, write_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiedmoe_conversion import ConversionRecipe, execute, make_plan, untie, verify_folder
from transformers_tiedmoe.errors import TiedMoeError

TIED_FIELDS = (
    "family", "groups", "group_size", "skip_first", "skip_last", "pool_num_experts", "slot_maps", "residual_rank",
    "router_z_loss_coef", "num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size",
    "intermediate_size",
)  # fmt: skip
SLOT_MAP = "slot_map"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders to copy: `tied` with slot maps, `converted` with its manifest, `source`, and `text.txt`."""
    folder = tmp_path_factory.mktemp("whole")
    save_tied(folder / "tied", pool_num_experts=8, slot_maps=True)
    save_source(folder / "source")
    (folder / "text.txt").write_text(make_text(40))
    execute(make_plan(recipe(folder, folder / "converted", measure=False)))
    return folder


def recipe(folder, output, **fields):
    """By text, so that there are statistics; in files so small that a run is interrupted between them."""
    text = {"calibration": str(folder / "text.txt"), "calibration_tokens": 64, "calibration_block_size": 16}
    fields = {"method": "least_squares", "groups": [[1, 2]], "max_shard_size": "8KB", "measure": False} | text | fields
    return ConversionRecipe(str(folder / "source"), str(output), **fields)


def copy(whole, name):
    """A copy to break, at a path where the case before it had one."""
    folder = whole.parent / "case"
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(whole / name, folder / name)


def damage(data, path):
    """Change the JSON of a file: one value anywhere in it, all of it, or some of its bytes."""
    kind = data.draw(st.sampled_from(["value", "value", "value", "whole", "splice", "cut"]))
    if kind == "value":
        content = json.loads(path.read_text())
        place, key = content, data.draw(st.one_of(st.sampled_from(sorted(content)), words))
        while isinstance(place.get(key), dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            key = data.draw(st.one_of(st.sampled_from(sorted(place)), words))
        place[key] = data.draw(anything)
        write_json(path, content)
    elif kind == "whole":
        write_json(path, data.draw(anything))
    elif kind == "splice":
        path.write_bytes(spliced(data.draw, path.read_bytes()))
    else:
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])


@cases(0.05)
@given(data=st.data())
def test_tied_config(whole, data):
    folder = copy(whole, "tied")
    config = json.loads((folder / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(
            st.one_of(st.sampled_from(TIED_FIELDS), st.sampled_from(sorted(config)), st.sampled_from(EXTRA_FIELDS))
        )
        config[name] = data.draw(anything)
    write_json(folder / "config.json", config)
    command = data.draw(st.sampled_from(["verify", "untie", "load"]))
    with Limits(), contextlib.suppress(TiedMoeError):
        if command == "verify":
            verify_folder(str(folder))
        elif command == "untie":
            untie(str(folder), str(folder.parent / "untied"))
        else:
            load(folder)


def load(folder):
    """What transformers itself raises at a config or a tokenizer is transformers' to word."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except TiedMoeError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert "transformers_tiedmoe" not in Path(frames[-1].filename).parts, frames
        raise TiedMoeError(str(error)) from error


@cases(0.05)
@given(data=st.data())
def test_slot_map(whole, data):
    """Loads only if every number is a row of the pool; then all implementations agree."""
    folder = copy(whole, "tied")

    def edit(tensors):
        names = [name for name in tensors if SLOT_MAP in name]
        assert names
        name = data.draw(st.sampled_from(sorted(names)))
        values = tensors[name].tolist()
        values[data.draw(st.integers(0, len(values) - 1))] = (
            data.draw(st.one_of(st.integers(-9, 16), numbers)) % 2**31 - 8
        )
        dtype = data.draw(st.sampled_from([torch.int64, torch.int64, torch.float32, torch.int32, torch.bool]))
        tensors[name] = torch.tensor(values).to(dtype)
        valid.append(dtype in (torch.int64, torch.int32) and all(0 <= value < 8 for value in values))
        return tensors

    valid: list[bool] = []
    edit_tensors(folder, edit)
    with Limits():
        if not valid[0]:
            with pytest.raises(TiedMoeError):
                AutoModelForCausalLM.from_pretrained(folder)
            return
        ids = torch.arange(12).view(1, -1)
        with torch.no_grad():
            logits = [AutoModelForCausalLM.from_pretrained(folder, experts_implementation=each)(ids).logits
                      for each in ("eager", "grouped_mm")]  # fmt: skip
    torch.testing.assert_close(*logits)


@cases(0.1)
@given(data=st.data())
def test_verify_manifest(whole, data):
    folder = copy(whole, "converted")
    damage(data, folder / "tiedmoe_conversion.json")
    with Limits(), contextlib.suppress(TiedMoeError):
        verify_folder(str(folder), data.draw(st.sampled_from([None, str(whole / "source")])))


@pytest.fixture(scope="module")
def interrupted(whole):
    """What a run leaves that was stopped half-way, its work and its statistics; and the recipe to go on with."""
    case = whole.parent / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    wanted = recipe(whole, case / "converted", statistics=str(case / "statistics"))

    def progress(done, total, what):
        if what.startswith("writing") and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(make_plan(wanted), progress)
    case.rename(whole.parent / "interrupted")
    return whole.parent / "interrupted", wanted


@cases(0.03)
@given(data=st.data())
def test_interrupted_conversion(whole, interrupted, data):
    """A damaged state is refused or made again: what comes out is what comes out if nothing happened."""
    folder, wanted = interrupted
    case = whole.parent / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(folder, case)
    path = data.draw(
        st.sampled_from(sorted(path for path in case.rglob("*") if path.is_file() and path.stat().st_size))
    )
    if path.suffix in (".json", ".jsonl") and data.draw(st.booleans()):
        lines = path.read_text().splitlines()
        lines[data.draw(st.integers(0, len(lines) - 1))] = json.dumps(data.draw(anything))
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_bytes(spliced(data.draw, path.read_bytes()))
    with Limits(), contextlib.suppress(TiedMoeError):
        execute(make_plan(wanted))
        expected, found = tensors_of(whole / "converted"), tensors_of(case / "converted")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

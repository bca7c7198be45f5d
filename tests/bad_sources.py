"""A source to break, and what a conversion of it must refuse: an error that says what to do, an unchanged disk."""

import json
import shutil

import pytest
from conversions import save_source, unchanged_disk

from tiedmoe_conversion import ConversionError, ConversionRecipe, execute, make_plan


@pytest.fixture(scope="module", name="pristine")
def pristine_fixture(tmp_path_factory):
    """An OLMoE source of 6 layers of 4 experts, one tensor per expert, in one file; do not change it."""
    folder = tmp_path_factory.mktemp("pristine") / "source"
    save_source(folder)
    return folder


@pytest.fixture(name="folder")
def folder_fixture(tmp_path, pristine):
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


@pytest.fixture(name="sharded")
def sharded_fixture(tmp_path):
    save_source(tmp_path / "source", max_shard_size="60KB")
    return tmp_path / "source"


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))

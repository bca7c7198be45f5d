"""One conversion opens its source, its text and its statistics once; a method of ten lines is a method."""

import gc

import pytest
import torch
from checkpoints import make_text, save_source
from conversions import read_tensors
from test_conversion_execute import LiveBytes

from tiedmoe_conversion import METHODS, ConversionRecipe, convert, execute, make_plan, plan, run, search
from tiedmoe_conversion.calibration import inputs, text
from tiedmoe_conversion.layout import source_model
from tiedmoe_conversion.methods import Group, Pool, register_method

FIELDS = {"calibration_tokens": 256, "calibration_block_size": 16, "skip_first": 1, "skip_last": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    save_source(folder / "source", num_hidden_layers=6)
    (folder / "text.txt").write_text(make_text(400))
    return folder


def recipe_for(folder, output, **fields):
    fields = {
        "source": str(folder / "source"),
        "output": str(output),
        "calibration": str(folder / "text.txt"),
    } | fields
    return ConversionRecipe(**FIELDS | fields)


def count(monkeypatch, *places):
    """Count the calls of functions; `places` are modules and names."""
    calls = {}
    for module, name in places:
        real = getattr(module, name)

        def counted(*args, name=name, real=real, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("fields", [{"max_loss": 5.0, "group_size": 3, "method": "select"}, {"method": "prototype"}])
def test_everything_is_opened_once(folder, tmp_path, monkeypatch, fields):
    calls = count(
        monkeypatch,
        (text, "load_blocks"),  # tokenises the text
        (source_model, "open_source"),
        (source_model, "map_tensors"),  # finds every tensor's place
        (inputs, "open_folder"),  # takes the lock of the statistics
        (run, "make_plan"),
        (run, "open_work"),
    )
    searches = []
    real = search.Search._preview
    monkeypatch.setattr(search.Search, "_preview", lambda self: searches.append(1) or real(self))
    monkeypatch.setattr(plan, "open_source", lambda *args: pytest.fail("the source is opened again"))
    convert(recipe_for(folder, tmp_path / "out", **fields))
    assert calls == dict.fromkeys(calls, 1)
    assert len(calls) == 6
    assert len(searches) == ("max_loss" in fields)


@pytest.fixture
def ten_lines():
    """A method whose author states what it needs, text, and nothing of memory."""

    @register_method("loudest", calibration=True)
    def loudest(group: Group) -> Pool:
        """Of each place the expert of the layer that routes most tokens to it."""
        counts = torch.stack([layer.inputs().counts(group.num_experts) for layer in group.layers])
        every = [group.experts(layer) for layer in group.layers]
        chosen = [every[int(counts[:, slot].argmax())][slot] for slot in range(group.num_experts)]
        return group.pool(type(every[0]).concatenated(chosen), {})

    yield "loudest"
    del METHODS["loudest"]


def test_a_method_of_ten_lines_is_planned_run_and_within_the_planned_memory(folder, tmp_path, ten_lines, monkeypatch):
    recipe = recipe_for(folder, tmp_path / "out", method=ten_lines, groups=[[1, 2], [3, 4]])
    made = make_plan(recipe)
    gc.collect()
    with LiveBytes() as counter:
        report = execute(made)
    assert 0 < counter.peak <= made.peak_memory_bytes
    assert report["verification"]["auto_class"] is True
    assert report["measured"]["loss_added"] != 0
    source, tied = read_tensors(folder / "source"), read_tensors(tmp_path / "out")
    pool = tied["model.expert_pools.0.down_proj"]
    for slot in range(len(pool)):
        layers = [source[f"model.layers.{layer}.mlp.experts.{slot}.down_proj.weight"] for layer in (1, 2)]
        assert any(torch.equal(pool[slot], each) for each in layers)

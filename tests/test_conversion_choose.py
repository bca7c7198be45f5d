"""Groups and pool sizes chosen by budget or by loss: the scan, the curve, and what is refused."""

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_text, save_source
from conversions import opened_calibration

from tiedmoe_conversion import METHODS, ConversionError, ConversionRecipe, choose, convert, make_plan, preview
from tiedmoe_conversion.checkpoint.reader import Source, open_source
from tiedmoe_conversion.layout.source_model import SourceModel, read_config
from tiedmoe_conversion.methods import Pool
from tiedmoe_conversion.search import Search
from transformers_tiedmoe.grouping import Candidate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source of eight layers of four experts with its tokenizer, and text; do not change it."""
    folder = tmp_path_factory.mktemp("choose")
    save_source(folder / "source", num_hidden_layers=8)
    (folder / "text.txt").write_text(make_text(400))
    return folder


def recipe_for(folder, output, **fields):
    fields = {
        "calibration": str(folder / "text.txt"), "calibration_tokens": 256, "calibration_block_size": 16,
        "skip_first": 1,
        "skip_last": 1, "group_size": 3, "method": "select",
    } | fields  # fmt: skip
    return ConversionRecipe(source=str(folder / "source"), output=str(output), **fields)


def open_all(recipe, statistics):
    return opened_calibration(dataclasses.replace(recipe, statistics=str(statistics)))


def test_budget_is_met_by_the_plan(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "out", budget=0.87)
    chosen = choose(recipe, open_all(recipe, tmp_path / "statistics"))
    plan = make_plan(chosen.recipe)
    assert plan.bytes_after == chosen.point.bytes_after
    assert plan.bytes_after / plan.bytes_before == pytest.approx(chosen.point.fraction)
    assert chosen.point.fraction <= 0.87
    assert chosen.recipe.budget is None
    place = chosen.curve.index(chosen.point)
    assert list(chosen.measured) == [place]
    better = [point for point in chosen.curve if point.fraction <= 0.87 and point.predicted < chosen.point.predicted]
    assert not better


def test_measured_loss_is_the_conversions(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "out", budget=0.87)
    shown = []
    report = convert(recipe, show=shown.append)
    curve = report["choice"]["curve"][report["choice"]["chosen"]]
    assert curve["measured"] == pytest.approx(report["measured"]["loss_added"], abs=1e-6)
    assert report["groups"] == curve["groups"]
    chosen, plan = shown
    assert [list(candidate.layers) for candidate in chosen.point.candidates] == plan.groups
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scanned_losses_are_of_one_group_alone(folder, tmp_path):
    """By hand: the loss with only layers 3 and 4 tied, to layer 3's experts."""
    recipe = recipe_for(folder, tmp_path / "out", budget=0.9, group_size=2)
    calibration = open_all(recipe, tmp_path / "statistics")
    search = Search(recipe, calibration.source)
    search.run(calibration)
    candidates = search.candidates()
    (found,) = [candidate for candidate in candidates if candidate.layers == (3, 4)]
    experts = calibration.source.experts
    names = [name.rsplit(".", 1)[1] for name in calibration.source.expert_names(3)]
    tensors = {f"{experts[4]}.{name}": calibration.source.tensors.read(f"{experts[3]}.{name}") for name in names}
    with calibration.model.replaced(tensors):
        loss = float(calibration.model.loss(calibration.held_out).mean())
    assert found.loss == pytest.approx(loss - calibration.source_loss, abs=1e-6)


def test_curve_is_that_of_all_choices(folder, tmp_path):
    """Against every choice of disjoint groups, with losses and savings drawn at random."""
    recipe = recipe_for(folder, tmp_path / "out", budget=0.9)
    opened = open_source(recipe.source)
    search = Search(recipe, SourceModel.map(opened, read_config(opened)))
    draw = random.Random(0)
    candidates = [
        Candidate(c.layers, c.width, draw.randint(1, 50) * len(c.layers), draw.random())
        for c in search.candidates(measure=False)
    ]
    best = {}
    for count in range(1, 4):
        for chosen in itertools.combinations(candidates, count):
            layers = [layer for candidate in chosen for layer in candidate.layers]
            if len(set(layers)) == len(layers):
                saved, loss = sum(c.saved for c in chosen), sum(c.loss for c in chosen)
                best[saved] = min(best.get(saved, 9.0), loss)
    best[0] = 0.0
    front = {
        saved: loss
        for saved, loss in best.items()
        if saved
        and not any((s >= saved and other < loss) or (s > saved and other <= loss) for s, other in best.items())
    }
    curve = search.curve(candidates)
    found = {search.source.num_bytes - point.bytes_after: point.predicted for point in curve}
    assert found == pytest.approx(front)
    assert [point.bytes_after for point in curve] == sorted(point.bytes_after for point in curve)


def test_max_loss_is_met_as_measured_with_the_fewest_bytes(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "out", max_loss=1.0)
    chosen = choose(recipe, open_all(recipe, tmp_path / "statistics"))
    assert chosen.point is chosen.curve[0]  # random weights lose little
    losses = sorted(chosen.measured.values())
    between = max(losses[-1] / 2, 1e-6)
    strict = choose(dataclasses.replace(recipe, max_loss=between), open_all(recipe, tmp_path / "statistics"))
    assert strict.measured[strict.curve.index(strict.point)] <= between


def test_max_loss_that_cannot_be_met(folder, tmp_path):
    calibration = open_all(recipe_for(folder, tmp_path / "out", max_loss=1.0), tmp_path / "statistics")
    lossy = SimpleNamespace(loss=lambda tied: calibration.source_loss + 3.0)
    calibration.loss = lossy.loss
    with pytest.raises(ConversionError, match=r"max_loss=1.0 cannot be met: the nearest that can is 3\.0000, .*union"):
        choose(recipe_for(folder, tmp_path / "out", max_loss=1.0), calibration)


def test_budget_that_cannot_be_met_is_refused_from_headers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda *args, **kwargs: pytest.fail("a tensor is read"))
    recipe = recipe_for(folder, tmp_path / "out", budget=0.1)
    with pytest.raises(
        ConversionError, match=r"budget=0.1 cannot be met: the nearest that can is (0\.\d+), "
    ) as error:
        convert(recipe)
    nearest = float(str(error.value).split("nearest that can is ")[1].split(",")[0])
    found = preview(dataclasses.replace(recipe, budget=nearest))
    assert found.least_fraction <= nearest < found.least_fraction + 0.001
    assert not list(tmp_path.iterdir())


def test_scan_is_remembered(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "out", budget=0.87)
    first = choose(recipe, open_all(recipe, tmp_path / "statistics"))
    calibration = open_all(recipe, tmp_path / "statistics")
    calibration.loss = lambda tied: pytest.fail("the source is run again")
    again = choose(recipe, calibration)
    assert again.summary() == first.summary()


def test_widths_are_tried_where_a_method_makes_any(folder, tmp_path, monkeypatch):
    """Wider pools cost bytes and lose less; the curve holds both."""

    def first_rows(group):
        def blocks(name):
            yield torch.cat([layer.read(name) for layer in group.layers])[: group.pool_num_experts]

        experts = torch.arange(group.num_experts)
        maps = [(j * group.num_experts + experts) % group.pool_num_experts for j in range(len(group.layers))]
        return Pool(blocks, {layer.index: slots for layer, slots in zip(group.layers, maps)})

    method = dataclasses.replace(METHODS["union"], build=first_rows, any_width=True, lossless=False)
    monkeypatch.setitem(METHODS, "union", method)
    recipe = recipe_for(folder, tmp_path / "out", budget=0.95, method="union")
    chosen = choose(recipe, open_all(recipe, tmp_path / "statistics"))
    widths = {candidate.width for point in chosen.curve for candidate in point.candidates}
    assert widths > {4}
    assert widths <= {4, 6, 8, 10}
    plan = make_plan(chosen.recipe)
    assert plan.bytes_after == chosen.point.bytes_after  # slot maps counted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0.5, "max_loss": 0.1}, "are both given; expected one"),
        ({"budget": 1.5}, "budget=1.5; expected a fraction"),
        ({"budget": True}, "budget=True; expected a fraction"),
        ({"max_loss": -1.0}, "max_loss=-1.0; expected nats"),
        ({"budget": 0.5, "groups": [[1, 2]]}, "groups is given beside budget or max_loss"),
        ({"budget": 0.5, "calibration": None}, "choosing by budget or max_loss needs calibration text"),
    ],
)
def test_wrong_fields(folder, tmp_path, fields, message):
    with pytest.raises(ConversionError, match=message):
        recipe_for(folder, tmp_path / "out", **fields)


def test_nothing_to_choose(folder, tmp_path):
    with pytest.raises(ConversionError, match="nothing to choose: group_size=1"):
        convert(recipe_for(folder, tmp_path / "out", budget=0.5, group_size=1))


def test_union_saves_nothing(folder, tmp_path):
    with pytest.raises(ConversionError, match="method 'union' keeps every expert"):
        preview(recipe_for(folder, tmp_path / "out", budget=0.5, method="union"))


def test_a_plan_needs_groups(folder, tmp_path):
    with pytest.raises(ConversionError, match="leaves groups and pool sizes to budget"):
        make_plan(recipe_for(folder, tmp_path / "out", budget=0.5))

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import conversion_study
from study.configurations import QUICK, ROWS

pytestmark = pytest.mark.xdist_group("conversion_study")  # one worker makes the fixture once

SHARES = ("0.0", "0.25", "1.0")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    arguments = [
        "--quick",
        "--output",
        str(folder / "work"),
        "--results",
        str(folder / "results" / "conversion_study"),
    ]
    conversion_study.main(arguments)
    return folder, arguments, json.loads((folder / "results" / "conversion_study.json").read_text())


def test_main_measures_every_row_before_and_after_healing(quick):
    _, _, summary = quick
    assert [row["name"] for row in summary["rows"]] == [row.name for row in QUICK]
    for row in summary["rows"]:
        if row["kind"] == "scratch":
            assert row["loss"]["0.0"] is None
            assert len(row["loss"]["1.0"]["values"]) == 1
            continue
        seeds = min(2, next(each.num_seeds for each in QUICK if each.name == row["name"]))
        assert {share: len(row["loss"][share]["values"]) for share in SHARES} == {
            share: seeds if share in ("0.0", "1.0") else 1 for share in SHARES
        }
        assert len(row["percent_above_control"]["values"]) == seeds


def test_main_counts_bytes_and_keeps_losses_consistent(quick):
    _, _, summary = quick
    rows = {(row["series"], row["size"]): row for row in summary["rows"]}
    source = rows["source", "untied"]
    assert source["expert_share"] == 1
    assert source["percent_above_control"]["values"] == [0, 0]
    union = rows["union", "g=4"]
    assert union["loss"]["0.0"]["mean"] == pytest.approx(source["loss"]["0.0"]["mean"], abs=1e-5)
    assert 1 < union["expert_share"] < 1.1  # slot maps
    assert rows["average", "g=4"]["expert_share"] == 0.5
    assert rows["tied from scratch", "g=4"]["expert_share"] == 0.5
    assert rows["within layers, random", "50% of every layer"]["expert_share"] == 0.5
    assert (
        rows["within layers, random", "50% of every layer"]["loss"]["0.0"]["standard_deviation"] > 0
    )  # other experts
    assert rows["average", "g=4"]["loss"]["0.0"]["standard_deviation"] == 0


def test_main_writes_a_table_and_a_plot(quick):
    folder, _, summary = quick
    text = (folder / "results" / "conversion_study.md").read_text()
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(summary["rows"])
    for row in summary["rows"]:
        (line,) = [cells for cells in lines if [cells[0].strip(), cells[1].strip()] == [row["series"], row["size"]]]
        assert f"{row['loss']['1.0']['mean']:.4f}" in line[-4]
        assert f"{row['percent_above_control']['mean']:+.2f}" in line[-3]
    assert text.count("of the control's perplexity: ") == 2
    assert (folder / "results" / "conversion_study.png").read_bytes().startswith(b"\x89PNG")


def test_main_runs_nothing_twice_and_leaves_no_checkpoint(quick, monkeypatch):
    folder, arguments, summary = quick
    assert not list((folder / "work" / "checkpoints").iterdir())
    monkeypatch.setattr(conversion_study.Study, "run", lambda *_: pytest.fail("measured again"))
    conversion_study.main(arguments)
    assert json.loads((folder / "results" / "conversion_study.json").read_text())["rows"] == summary["rows"]


def test_main_refuses_the_folder_of_another_study(quick):
    folder, _, _ = quick
    with pytest.raises(ValueError, match="holds a study that differs in its settings"):
        conversion_study.main(
            ["--output", str(folder / "work"), "--results", str(folder / "results" / "conversion_study")]
        )


def test_rows_have_names_of_their_own():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


def test_rows_make_recipes_of_the_size_they_are_called(quick, tmp_path):
    """Every row can be planned on a source as wide and deep as the study's own, and keeps the bytes that it says."""
    from tiedmoe_conversion import make_plan
    from tiedmoe_demo import DemoConfig
    from tiedmoe_demo.train_source import source_config

    demo = DemoConfig(**conversion_study.SOURCE, output=str(tmp_path), data=str(quick[0] / "work" / "text.txt"))
    study = conversion_study.Study(demo)
    tokenizer = AutoTokenizer.from_pretrained(quick[0] / "work" / "source")
    AutoModelForCausalLM.from_config(source_config(demo, tokenizer)).save_pretrained(study.source)
    tokenizer.save_pretrained(study.source)
    shares = {
        "g=4": 0.5,
        "g=4, 2.5E": 0.75,
        "g=2, 1.25E": 0.75,
        "g=2": 2 / 3,
        "three pairs": 0.75,
        "g=4, rank 18": 0.75,
    }
    shares |= {"50% of every layer": 0.5, "75% of every layer": 0.75}
    for row in ROWS:
        if row.kind == "convert" and not row.heal:  # else one with the same recipe is there
            plan = make_plan(study.recipe(row, tmp_path / row.name, seed=0))
            others = plan.bytes_before - 4 * plan.expert_parameters_before
            share = (plan.bytes_after - others) / (4 * plan.expert_parameters_before)
            assert share == pytest.approx(1 if row.recipe["method"] == "union" else shares[row.size], abs=0.01), (
                row.name
            )

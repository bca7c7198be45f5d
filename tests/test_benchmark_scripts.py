"""The benchmarks of conversions, each started at a size that takes seconds; the study has a file of its own."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import conversion_scale
import llama_cpp_check
import pretraining_study
import softmoe_study
from study.jobs import run_all
from tables import mean_of, plus_minus, table, write_json


def test_write_json_gives_a_row_a_line(tmp_path):
    rows = [{"a": 1, "b": {"c": [1, 2]}}, {"a": 0.1}]
    write_json(tmp_path / "new" / "dict.json", {"machine": {"cores": 2}, "rows": rows, "none": []})
    lines = (tmp_path / "new" / "dict.json").read_text().splitlines()
    assert lines[1:5] == ['"machine": {"cores": 2},', '"rows": [', '{"a": 1, "b": {"c": [1, 2]}},', '{"a": 0.1}']
    assert json.loads("\n".join(lines)) == {"machine": {"cores": 2}, "rows": rows, "none": []}
    write_json(tmp_path / "list.json", rows)
    assert json.loads((tmp_path / "list.json").read_text()) == rows
    assert len((tmp_path / "list.json").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "nan.json", [{"a": float("nan")}])


def test_means_and_tables():
    assert mean_of([1.0, 2.0, 3.0]) == {"mean": 2.0, "standard_deviation": 1.0, "values": [1.0, 2.0, 3.0]}
    assert plus_minus(mean_of([1.0, 2.0, 3.0]), 2, " %", "+") == "+2.00 ± 1.00 %"
    assert plus_minus(mean_of([4.0]), 1) == "4.0"
    assert plus_minus(mean_of([]), 1) == ""
    assert table(["", "ms"], [["a", 1]]) == ["|  | ms |", "| --- | ---: |", "| a | 1 |"]


def test_run_all_gives_up_what_is_not_done_in_time(capsys):
    assert run_all(str.upper, ["a", "b"], workers=1, minutes=1)
    assert capsys.readouterr().out == "1/2 A\n2/2 B\n"
    assert not run_all(str.upper, ["a", "b"], workers=1, minutes=1e-9)
    assert capsys.readouterr().out == "1/2 A\n"
    assert not run_all(str.upper, ["a"], workers=1, minutes=0)
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_run_all_runs_every_job_once_in_processes_of_their_own(capsys):
    assert run_all(str.upper, list("abc"), workers=2, minutes=10)  # on a busy machine they start late
    assert sorted(line[-1] for line in capsys.readouterr().out.splitlines()) == list("ABC")


@pytest.fixture(scope="module")
def softmoe(tmp_path_factory):
    """A quick study of some rows at one seed: its folder, and what it wrote."""
    folder = tmp_path_factory.mktemp("softmoe")
    arguments = ["--output", str(folder), "--results", str(folder / "study"), "--quick", "--seeds", "0"]
    softmoe_study.main([*arguments, "--only", "top-k, (untied|healed), 4|learned, (tied|healed), 3"])
    return folder, arguments, json.loads((folder / "study.json").read_text())


@pytest.mark.xdist_group("softmoe_study")  # one worker runs it once
def test_softmoe_study_says_what_each_row_used(softmoe):
    folder, _, summary = softmoe
    rows = {row["row"]: row for row in summary["rows"]}
    assert list(rows) == [
        "top-k, untied, 4", "soft, learned, tied, 3", "top-k, healed, 4", "soft, learned, healed, 3",
    ]  # fmt: skip
    assert rows["top-k, untied, 4"]["active"]["values"] == [4.0]
    soft = rows["soft, learned, tied, 3"]
    assert soft["active"]["mean"] == pytest.approx(sum(soft["by_layer"]["mean"]) / 2)
    assert sum(soft["by_layer"]["k"]) == pytest.approx(softmoe_study.MASS * 3 * 2, abs=1e-3)
    above = rows["soft, learned, healed, 3"]["over_top_k"]["mean"]
    losses = [rows[name]["loss"]["mean"] for name in ("soft, learned, healed, 3", "top-k, healed, 4")]
    assert above == pytest.approx(losses[0] - losses[1])
    assert rows["top-k, untied, 4"]["step_over_top_k_4"]["median"] == 1.0
    assert "| soft, learned, tied, 3 |" in (folder / "study.md").read_text()
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.xdist_group("softmoe_study")
def test_softmoe_study_does_not_run_a_row_again(softmoe, monkeypatch):
    folder, arguments, summary = softmoe
    monkeypatch.setattr(softmoe_study.Study, "pretrain", lambda *_: pytest.fail("trained again"))
    softmoe_study.main([*arguments, "--minutes", "0"])
    assert json.loads((folder / "study.json").read_text())["rows"] == summary["rows"]


def test_softmoe_study_compares_like_with_like():
    """A tied row has its family's sizes and half of the pools; a soft one is steered to what its top-k uses."""
    sizes = softmoe_study.SIZES
    rows = {name: row.config(sizes) for name, row in softmoe_study.ROWS.items()}
    assert rows["top-k, tied, 2"].groups == [[0, 1], [2, 3], [4, 5]]
    assert rows["top-k, untied, 2"].groups == []
    assert rows["soft, even, untied, 3"].softmoe["target_active"] == 3 * sizes["num_hidden_layers"]
    assert not rows["soft, even, untied, 3"].softmoe["learn_budget"]
    assert rows["soft, learned, tied, 4"].softmoe["learn_budget"]


@pytest.mark.slow
def test_conversion_scale_converts_and_copies_in_pairs(tmp_path, monkeypatch):
    small = {"EXPERTS": 4, "HIDDEN": 32, "WIDTH": 48, "VOCAB": 64, "SHARD_BYTES": 40_000, "METHODS": ("union",)}
    for name, value in small.items():
        monkeypatch.setattr(conversion_scale, name, value)
    output = tmp_path / "results" / "scale.json"
    arguments = [str(tmp_path / "work"), "--gigabytes", "1e-4", "--methods", "average", "--output", str(output)]
    conversion_scale.main([*arguments, "--note", "Tiny."])
    found = json.loads(output.read_text())
    # An expert has 3 * 32 * 48 numbers of 2 bytes, a layer 4 of them and 2.5 * 32 * 32 of attention.
    assert found["source"]["layers"] == round((1e5 - 4 * 64 * 32) / (2 * (4 * 3 * 32 * 48 + 5 * 512)))
    assert found["source"]["group_bytes"] == 2 * 4 * 3 * 32 * 48 * 2
    assert found["source"]["shards"] > 1
    (row,) = found["rows"]
    assert row["ratio"] == row["convert_seconds"] / row["cp_seconds"]
    assert row["peak_bytes"] >= row["imports_bytes"] > 1 << 20
    assert row["bytes_after"] < found["source"]["bytes"]
    assert "| `average` |" in output.with_suffix(".md").read_text()
    assert not list((tmp_path / "work").iterdir())


def test_llama_cpp_check_converts_with_the_checkouts_own_script(tmp_path, monkeypatch):
    """A stand-in for llama.cpp's converter, which says what it was given; nothing is run without llama-cpp-python."""
    checkout = tmp_path / "llama.cpp"
    (checkout / "conversion").mkdir(parents=True)
    (checkout / "conversion" / "base.py").write_text("class TextModel: pass\n")
    (checkout / "convert_hf_to_gguf.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom conversion.base import TextModel\n"
        "assert TextModel().get_vocab_base_pre(None) == 'gpt-2'\n"
        "assert len(list(Path(sys.argv[1]).glob('*.safetensors'))) > 0\n"
        "assert sys.argv[2:5] == ['--outtype', 'f32', '--outfile']\nPath(sys.argv[5]).write_text('gguf')\n"
    )
    monkeypatch.setattr(llama_cpp_check, "FAMILIES", {"olmoe": llama_cpp_check.FAMILIES["olmoe"]})
    monkeypatch.setattr(llama_cpp_check, "installed", lambda: False)
    output = tmp_path / "untied.json"
    with pytest.raises(SystemExit) as ended:
        llama_cpp_check.main([str(checkout), "--output", str(output)])
    assert not ended.value.code
    assert json.loads(output.read_text())["families"] == [{"family": "olmoe", "converted": True}]
    (checkout / "convert_hf_to_gguf.py").write_text("raise SystemExit('unknown architecture')\n")
    with pytest.raises(SystemExit) as ended:
        llama_cpp_check.main([str(checkout), "--output", str(output)])
    assert ended.value.code
    assert json.loads(output.read_text())["families"][0]["untied"] == "unknown architecture"
    with pytest.raises(SystemExit):
        llama_cpp_check.main([str(tmp_path)])


def test_pretraining_study_compares_at_equal_tokens_and_runs_no_row_twice(tmp_path, monkeypatch):
    arguments = ["--output", str(tmp_path), "--results", str(tmp_path / "study"), "--quick", "--seeds", "0"]
    pretraining_study.main([*arguments, "--only", "untied|narrow|g=4$"])
    monkeypatch.setattr(pretraining_study.Study, "train", None)
    monkeypatch.setattr(pretraining_study.Study, "measure_steps", lambda study: study.found([])[1])
    pretraining_study.main([*arguments, "--only", "untied|narrow|g=4$"])
    summary = json.loads((tmp_path / "study.json").read_text())
    rows = {row["row"]: row for row in summary["rows"]}
    assert list(rows) == ["untied", "g=4", "narrow, parameters of g=4"]
    narrow, tied, untied = (rows[name] for name in ("narrow, parameters of g=4", "g=4", "untied"))
    experts, routers = 8 * 3 * 32 * 8, 6 * 4 * 32  # of one set; the rows that narrow routers lack
    assert untied["parameters"] - tied["parameters"] == 3 * experts
    assert tied["parameters"] - narrow["parameters"] == routers
    assert tied["above_untied"]["values"] == [tied["loss"]["mean"] - untied["loss"]["mean"]]
    untied, _, tied = summary["steps"]
    assert untied["bytes"]["weights"] - tied["bytes"]["weights"] == 4 * 3 * experts
    assert untied["bytes"]["optimizer"] - tied["bytes"]["optimizer"] == 4 * 3 * experts  # Muon's one momentum
    assert untied["bytes"]["activations"] == pytest.approx(tied["bytes"]["activations"], rel=0.05)
    assert "| g=4 | " in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")

import json
import lzma
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_source, save_tied
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from tiedmoe_demo import DemoConfig, comparison_table, run_demo
from tiedmoe_demo.figures import expert_parameters, peak_training_memory
from tiedmoe_demo.plot import _draw_cost
from tiedmoe_demo.train_source import train_tokenizer
from transformers_tiedmoe.audit.routing import RoutingCounts
from transformers_tiedmoe.audit.schema import Audit

pytestmark = pytest.mark.xdist_group("demo")  # one worker makes the fixture once

MODELS = ("source", "tied", "healed", "control")
SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 5, "num_attention_heads": 2, "num_experts": 4}
TINY = SIZES | {
    "vocab_size": 300,
    "source_steps": 12,
    "heal_steps": 3,
    "batch_size": 2,
    "block_size": 16,
    "calibration_tokens": 128,
    "new_tokens": 4,
}


def weights(folder):
    return sorted(Path(folder).glob("*.safetensors"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(60))
    return str(path)


@pytest.fixture(scope="module")
def demo(text, tmp_path_factory):
    """One run from end to end; layer 0 and 4 keep their experts, layers 1 to 3 read one pool."""
    output = tmp_path_factory.mktemp("demo") / "out"
    config = DemoConfig(output=str(output), data=text, group_size=4, skip_first=1, skip_last=1, **TINY)
    return config, run_demo(config)


def test_run_demo_counts_what_is_on_disk(demo):
    config, report = demo
    experts_of_a_layer = config.num_experts * 3 * config.hidden_size * config.intermediate_size
    for name in MODELS:
        figures = report[name]
        num_sets = 5 if name in ("source", "control") else 3
        assert figures["expert_parameters"] == num_sets * experts_of_a_layer
        assert figures["checkpoint_bytes"] == sum(file.stat().st_size for file in weights(config.path(name)))
        assert 0 < figures["checkpoint_bytes"] - 4 * figures["parameters"] < 20_000  # the files' headers
        model = AutoModelForCausalLM.from_pretrained(config.path(name))
        assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert figures["expert_parameters"] == expert_parameters(model)
    assert report["source"]["parameters"] - report["tied"]["parameters"] == 2 * experts_of_a_layer
    assert report["conversion"]["parameters_after"] == report["tied"]["parameters"]


def test_run_demo_measures_what_training_measured(demo):
    _, report = demo
    training = report["training"]
    for name, of in (("source", training["control"]["before"]), ("tied", training["healed"]["before"]),
                     ("healed", training["healed"]["after"]), ("control", training["control"]["after"])):  # fmt: skip
        assert report[name]["perplexity"] == pytest.approx(of["perplexity"], rel=1e-4)
        assert report[name]["perplexity"] == pytest.approx(math.exp(report[name]["loss"]))
    assert report["source"]["perplexity"] < 300  # that of a model that has learnt nothing, the size of the vocabulary
    assert training["source"]["tokens"] == 12 * 2 * 16
    assert training["control"]["tokens"] == training["healed"]["tokens"] == 3 * 2 * 16
    assert set(report["seconds"]) == {"source", "tied", "healed", "control", "figures", "audit", "total"}


def test_run_demo_writes_the_report_it_returns(demo):
    config, report = demo
    assert json.loads(config.path("report.json").read_text()) == report
    page = config.path("report.md").read_text()
    for name in MODELS:
        assert f"{report[name]['parameters']:,}" in page
        assert f"{report[name]['perplexity']:.2f}" in page
    table = comparison_table(report)
    assert [column.header for column in table.columns][1:] == [
        "parameters", "in experts", "weights on disk", "memory to train", "held-out perplexity"
    ]  # fmt: skip
    assert table.row_count == 4
    for name in ("source", "tied", "healed"):
        assert report[name]["text"].startswith(config.prompt)
        assert len(report[name]["text"]) > len(config.prompt)


def test_run_demo_ends_with_an_audit(demo):
    """Of source, tied and healed, on held-out text; the page links to it and shows its main figure."""
    config, report = demo
    found = Audit.model_validate_json(config.path("audit", "audit.json").read_text())
    assert [model.name for model in found.models] == ["source", "tied", "healed"]
    for model in found.models:
        assert model.memory.parameters["total"].unique == report[model.name]["parameters"]
        (loss,) = model.quality.loss.values()
        assert loss.value == pytest.approx(report[model.name]["loss"], rel=0.05)  # the first few thousand tokens of it
    card = config.path("healed", "README.md").read_text()
    assert "## Audit" in card
    assert all(config.path("healed", link).is_file() for link in re.findall(r"\]\((figures/[^)]+)\)", card))
    page = config.path("report.md").read_text()
    links = re.findall(r"\]\((audit/[^)]+)\)", page)
    assert set(links) == {"audit/report.html", "audit/report.md", "audit/figures/3-loads.png"}
    assert all(config.path(link).is_file() for link in links)


def test_run_demo_draws_a_plot(demo):
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(demo[0].path("report.png"), format="png")
    height, width, _ = pixels.shape
    assert width > height > 300
    for colour in ("#0072B2", "#56B4E9", "#D55E00", "#009E73"):  # a point each for the four models
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert ((torch.tensor(pixels)[..., :3] - rgb).abs().amax(-1) < 0.01).sum() > 20


def test_the_plots_axes_begin_at_zero(demo):
    """A per cent of perplexity looks like one, and no model's point is outside."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    _draw_cost(axes, demo[1])
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    for name in MODELS:
        assert demo[1][name]["perplexity"] < axes.get_ylim()[1]


def test_run_demo_records_where_tokens_go(demo):
    _, report = demo
    for name in MODELS:
        assert list(report[name]["routing"]) == ["0", "1", "2", "3", "4"]
        for shares in report[name]["routing"].values():
            assert len(shares) == 4
            assert sum(shares) == pytest.approx(1)
            assert max(shares) <= 0.5 + 1e-6  # two different experts per token


def test_run_demo_again_trains_nothing(demo):
    config, report = demo
    before = {file: file.stat().st_mtime_ns for name in MODELS for file in weights(config.path(name))}
    assert len(before) == 4
    whats = []
    again = run_demo(config, lambda done, total, what: whats.append(what))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert {what.split(":")[0] for what in whats} == {"figures"}
    for name in MODELS:
        for key in ("perplexity", "peak_training_memory_bytes", "text"):
            assert again[name][key] == report[name][key]
    assert again["seconds"]["source"] >= report["seconds"]["source"]  # what it took, not that it was there


def test_run_demo_refuses_other_settings_in_the_same_folder(demo):
    config, report = demo
    with pytest.raises(ValueError, match=r"heal_steps was 3 and is 4.*--overwrite"):
        run_demo(replace(config, heal_steps=4))
    assert json.loads(config.path("report.json").read_text())["settings"] == report["settings"]


def test_run_demo_refuses_a_folder_that_is_not_a_demo(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"not a demo: .*; expected a new or empty one"):
            run_demo(DemoConfig(output=str(tmp_path), overwrite=overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_run_demo_goes_on_after_it_was_stopped(demo, tmp_path):
    config = replace(demo[0], output=str(tmp_path / "out"))

    def stop(done, total, what):
        if what.startswith("healed") and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(config, stop)
    assert not config.path("report.json").exists()
    trained = [file.stat().st_mtime_ns for file in weights(config.path("source"))]
    report = run_demo(config)
    assert [file.stat().st_mtime_ns for file in weights(config.path("source"))] == trained
    for name in MODELS:
        assert report[name]["perplexity"] == pytest.approx(demo[1][name]["perplexity"], rel=1e-4)


def test_run_demo_overwrites_its_own_files_when_asked(text, tmp_path):
    """Stopped while it healed, then begun anew with other settings: the user's files stay, also among the demo's."""

    def stop_at(stage):
        def stop(done, total, what):
            if what.startswith(stage):
                raise KeyboardInterrupt

        return stop

    config = DemoConfig(output=str(tmp_path / "out"), data=text, skip_first=1, skip_last=1, **TINY)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, stop_at("healed"))
    assert config.path("tied", "config.json").is_file()
    config.path("mine.txt").write_text("kept")
    config.path("tied", "mine.txt").write_text("kept")
    config = replace(config, source_steps=13)
    with pytest.raises(ValueError, match="source_steps was 12 and is 13"):
        run_demo(config)
    assert config.path("tied", "config.json").is_file()
    with pytest.raises(KeyboardInterrupt):
        run_demo(replace(config, overwrite=True), stop_at("source"))
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert {name for name in kept if "/." not in name} == {"out/mine.txt", "out/tied/mine.txt"}
    with pytest.raises(ValueError, match=r"tied is not empty: it holds \['mine.txt'\]"):
        run_demo(config)


def test_run_demo_again_while_one_runs_is_refused(demo):
    config, _ = demo

    def again(done, total, what):
        run_demo(config)

    with pytest.raises(ValueError, match=r"another process \(process \d+\) uses .*wait until it is done"):
        run_demo(config, again)


def test_run_demo_refuses_inputs_in_its_output(text, tmp_path):
    shutil.copy(text, tmp_path / "text.txt")
    for fields, message in (
        ({"data": str(tmp_path / "text.txt")}, "the data .* lies in output"),
        ({"source": str(tmp_path), "data": text}, "is also the source"),
    ):
        with pytest.raises(ValueError, match=message):
            run_demo(DemoConfig(output=str(tmp_path), overwrite=True, **fields))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_run_demo_takes_another_familys_checkpoint(text, tmp_path):
    source = tmp_path / "mixtral"
    MixtralForCausalLM(
        MixtralConfig(vocab_size=320, hidden_size=16, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
                      num_key_value_heads=2, num_local_experts=4, eos_token_id=0, bos_token_id=None)
    ).save_pretrained(source)  # fmt: skip
    make_tokenizer().save_pretrained(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    config = DemoConfig(output=str(tmp_path / "out"), source=str(source), data=text, group_size=2, skip_first=1,
                        skip_last=1, method="select", distill=True, heal_steps=2,
        batch_size=2, block_size=16)  # fmt: skip
    report = run_demo(config)
    assert report["conversion"]["family"] == "mixtral"
    assert report["conversion"]["groups"] == [[1, 2]]
    assert report["tied"]["expert_parameters"] == 3 / 4 * report["source"]["expert_parameters"]
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert report["training"]["source"] is None


def test_run_demo_says_what_is_wrong_with_a_source(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        run_demo(DemoConfig(output=str(tmp_path / "out"), source=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heal_steps", 0, "at least 1"),
        ("vocab_size", 100, "256 bytes"),
        ("num_experts_per_tok", 17, "num_experts=16"),
        ("num_attention_heads", 5, "must divide hidden_size=64"),
        ("prompt", "", "prompt is empty"),
    ],
)
def test_demo_config_refuses(field, value, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**{field: value})


def test_demo_config_knows_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DemoConfig(output="~/demo", source="~/source", data="~/text.txt")
    assert (config.output, config.source, config.text) == tuple(
        f"{tmp_path}/{x}" for x in ("demo", "source", "text.txt")
    )


def test_novels_ship_with_the_package():
    with lzma.open(DemoConfig().text, "rt", encoding="utf-8") as file:
        text = file.read()
    assert 4_000_000 < len(text) < 4_100_000
    assert "It is a truth universally acknowledged" in text


def test_train_tokenizer_never_sees_the_held_out_text(tmp_path):
    draw = random.Random(0)
    seen = "".join(" ".join(draw.choices(["alpha", "beta", "gamma"], k=9)) + "\n" for _ in range(400))
    (tmp_path / "text.txt").write_text(seen + "delta\n" * 50)
    tokenizer = train_tokenizer(tmp_path / "text.txt", vocab_size=400)
    assert len(tokenizer(" alpha beta")["input_ids"]) == 2
    assert len(tokenizer(" delta")["input_ids"]) > 2
    assert tokenizer.decode(tokenizer("Any text: ünïcödé\n\n")["input_ids"]) == "Any text: ünïcödé\n\n"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab() == tokenizer.get_vocab()


def test_routing_counts_equal_the_routers_own_choices(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_source(tmp_path))
    input_ids = torch.randint(0, 300, (2, 12))
    with RoutingCounts(model) as routing:
        logits = model(input_ids, output_router_logits=True).router_logits
        model(input_ids)
    model(input_ids)  # no longer counted
    for layer, layer_logits in enumerate(logits):
        expected = torch.bincount(layer_logits.topk(2).indices.flatten(), minlength=4)
        assert routing.counts[layer].tolist() == (2 * expected).tolist()


def test_routing_counts_of_a_union_are_rows_of_the_pool(tmp_path):
    folder = save_tied(tmp_path, pool_num_experts=8, slot_maps=True)  # layers 1 and 2 of four
    model = AutoModelForCausalLM.from_pretrained(folder)
    with RoutingCounts(model) as routing:
        model(torch.randint(0, 300, (4, 16)))
    assert [len(shares) for shares in routing.shares().values()] == [4, 8, 8, 4]
    assert sum(routing.shares()["1"][:4]) == pytest.approx(1)
    assert sum(routing.shares()["2"][4:]) == pytest.approx(1)


def test_peak_training_memory_holds_weights_gradients_moments_and_activations(tmp_path):
    def peak(num_sequences):
        model = AutoModelForCausalLM.from_pretrained(save_source(tmp_path / str(num_sequences)))
        return model.num_parameters(), peak_training_memory(model, torch.randint(0, 300, (num_sequences, 32)))

    parameters, small = peak(1)
    _, large = peak(16)
    assert small > 4 * 4 * parameters  # four float32 numbers per parameter
    activations = 15 * 32 * 4 * 300  # of the fifteen more sequences: at least their logits
    assert large - small > activations


def test_demo_seeds_summarises_what_the_demos_report(demo, tmp_path, monkeypatch):
    """`benchmarks/demo_seeds.py` on the report of a tiny demo, as of two seeds that differ by one percent."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import demo_seeds

    def run_demo(config, progress):
        healed = demo[1]["healed"] | {"perplexity": 200.0 * (1 + config.seed / 100)}
        return demo[1] | {"healed": healed, "control": demo[1]["control"] | {"perplexity": 200.0}}

    monkeypatch.setattr(demo_seeds, "run_demo", run_demo)
    demo_seeds.main(["--output", str(tmp_path), "--seeds", "0,1", "--results", str(tmp_path / "results")])
    rows = json.loads((tmp_path / "results" / "demo_seeds.json").read_text())["rows"]
    assert [(row["model"], row["seed"]) for row in rows] == [(name, seed) for name in MODELS for seed in (0, 1)]
    text = (tmp_path / "results" / "demo_seeds.md").read_text()
    assert text.startswith("Seeds 0, 1; mean")
    assert "| 201.00 ± 1.41 |" in text
    assert "above the control's: 0.005 ± 0.007 nats" in text  # the mean of 0 and ln 1.01

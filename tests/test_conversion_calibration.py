"""Calibration text: what the experts are given on it, what is kept, what is refused; and what a conversion cost."""

import contextlib
import dataclasses
import fcntl
import json
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
import yaml
from checkpoints import make_text, save_source
from conversions import opened_calibration, unchanged_disk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiedmoe_conversion import ConversionError, ConversionRecipe, convert, execute, make, make_plan
from tiedmoe_conversion.calibration import inputs
from tiedmoe_conversion.checkpoint.reader import open_source
from tiedmoe_conversion.layout.source_model import SourceModel, read_config
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.families import expert_layers
from transformers_tiedmoe.files import file_digest
from transformers_tiedmoe.journal import append
from transformers_tiedmoe.run_folder import Work

NUM_TOKENS, BLOCK = 256, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source of four layers of four experts with its tokenizer, and text; do not change it."""
    folder = tmp_path_factory.mktemp("calibration")
    save_source(folder / "source")
    (folder / "text.txt").write_text(make_text(400))
    return folder


def open_text(folder, statistics, source=None, **fields):
    fields = {"source": str(source or folder / "source"), "statistics": str(statistics)} | fields
    return opened_calibration(recipe_for(folder, "out", **fields))


def test_inputs_are_those_of_the_whole_model(folder, tmp_path):
    found = open_text(folder, tmp_path / "statistics")
    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32)
    given = {}
    for layer, path in expert_layers(model).items():
        hook = lambda module, args, layer=layer: given.update({layer: args})  # noqa: E731
        model.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=found.tokens, use_cache=False).logits
    for layer in (1, 2):
        inputs = found.inputs(layer)
        states, index, weights = given[layer]
        torch.testing.assert_close(inputs.hidden_states, states)
        assert torch.equal(inputs.top_k_index, index)
        torch.testing.assert_close(inputs.top_k_weights, weights)
        assert inputs.num_fit == NUM_TOKENS
        assert len(states) == NUM_TOKENS * 5 // 4  # and a quarter held out
    held_out = logits[NUM_TOKENS // BLOCK :, :-1].flatten(0, 1)
    expected = F.cross_entropy(held_out, found.held_out[:, 1:].flatten())
    assert found.source_loss == pytest.approx(float(expected), abs=1e-5)


def test_of_slot_and_counts(folder, tmp_path):
    inputs = open_text(folder, tmp_path / "statistics").inputs(1)
    counts = inputs.counts(4)
    assert int(counts.sum()) == NUM_TOKENS * 2
    for slot in range(4):
        states, weights = inputs.of_slot(slot)
        assert len(states) == len(weights) == counts[slot]
        chose = (inputs.top_k_index[:NUM_TOKENS] == slot).any(-1)
        assert torch.equal(states, inputs.hidden_states[:NUM_TOKENS][chose])
    held_out = sum(len(inputs.of_slot(slot, held_out=True)[0]) for slot in range(4))
    assert held_out == NUM_TOKENS // 4 * 2


def test_the_last_of_the_text_is_left_alone(folder, tmp_path):
    """`tiedmoe heal` holds it out, so no decision may rest on it; what is fitted on and held out do not meet."""
    (tmp_path / "text.txt").write_text(make_text(400)[:-2000] + "quick " * 400)  # its last 5 % and more
    found = open_text(tmp_path, tmp_path / "statistics", source=folder / "source", calibration_tokens=1024)
    last = open_text(folder, tmp_path / "other", calibration_tokens=1024).tokens[-1]
    assert not any(torch.equal(row, last) for row in found.tokens[: found.num_fit])
    rows = [tuple(row.tolist()) for row in found.tokens]
    assert len(rows) == 64 + 16


def test_statistics_are_used_again_and_only_what_lacks_is_computed(folder, tmp_path, monkeypatch):
    first = open_text(folder, tmp_path / "statistics")
    first.gather([1, 2])
    loss = first.source_loss
    made = (tmp_path / "statistics" / "layer-1.safetensors").read_bytes()
    (tmp_path / "statistics" / "layer-2.safetensors").unlink()  # as after a kill
    (tmp_path / "statistics" / ".tiedmoe" / "draft").mkdir(exist_ok=True)
    (tmp_path / "statistics" / ".tiedmoe" / "draft" / "layer-2.safetensors").write_bytes(b"half")
    again = open_text(folder, tmp_path / "statistics")
    again.gather([1, 2])
    assert torch.equal(again.inputs(2).hidden_states, first.inputs(2).hidden_states)
    assert (tmp_path / "statistics" / "layer-1.safetensors").read_bytes() == made

    def refuse(*args, **kwargs):
        raise AssertionError("the source is run again")

    monkeypatch.setattr(inputs, "StreamedModel", refuse)
    third = open_text(folder, tmp_path / "statistics")
    assert third.source_loss == loss
    assert len(third.inputs(2).hidden_states) == len(first.inputs(2).hidden_states)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"seed": 1}, "seed was 0 and is 1, tokens_sha256 was"),
        ({"calibration_tokens": 128}, "num_tokens was 256 and is 128, tokens_sha256 was"),
    ],
)
def test_statistics_of_another_text(folder, tmp_path, fields, what):
    open_text(folder, tmp_path / "statistics").gather([1])
    with pytest.raises(TiedMoeError, match=f"differs in its text: {what} .*give another folder for statistics"):
        open_text(folder, tmp_path / "statistics", **fields)


def test_statistics_of_another_source(folder, tmp_path):
    open_text(folder, tmp_path / "statistics").gather([1])
    save_source(tmp_path / "source", num_hidden_layers=5)
    with pytest.raises(TiedMoeError, match="holds a calibration, whose source has changed since: headers_and_config"):
        open_text(folder, tmp_path / "statistics", source=tmp_path / "source")


def test_statistics_folder_that_holds_something_else(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(TiedMoeError, match=r"something that is not a calibration: .* expected a new or empty one"):
        open_text(folder, tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "garbled"])
def test_damaged_statistics_are_made_again(folder, tmp_path, damage):
    first = open_text(folder, tmp_path / "statistics")
    found = first.inputs(1)
    hidden_states, top_k_weights = (
        found.hidden_states.clone(),
        found.top_k_weights.clone(),
    )  # these are mapped from the file
    path = tmp_path / "statistics" / "layer-1.safetensors"
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes({"truncated": whole[:-8], "zeroed": whole[:-64] + bytes(64), "garbled": b"x" * 64}[damage])
    found = open_text(folder, tmp_path / "statistics").inputs(1)
    assert torch.equal(found.hidden_states, hidden_states)
    assert torch.equal(found.top_k_weights, top_k_weights)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found | {"top_k_index": found["top_k_index"] + 1},  # expert 4 of 4
        lambda found: found | {"top_k_index": found["top_k_index"] - 4},
        lambda found: found | {"top_k_index": found["top_k_index"].float()},
        lambda found: {name: tensor[1:].contiguous() for name, tensor in found.items()},
        lambda found: found | {"top_k_weights": found["top_k_weights"][:, :1].contiguous()},
        lambda found: {name: tensor for name, tensor in found.items() if name != "hidden_states"},
    ],
    ids=["too large", "negative", "float", "fewer tokens", "fewer weights", "lacks one"],
)
def test_statistics_that_claim_what_they_cannot(folder, tmp_path, change):
    """With a journal that says so, too."""
    open_text(folder, tmp_path / "statistics").gather([1])
    path = tmp_path / "statistics" / "layer-1.safetensors"
    changed = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    path.unlink()
    save_file(changed, path)
    append(tmp_path / "statistics" / ".tiedmoe" / "journal.jsonl", {"file": path.name, "written": file_digest(path)})
    found = open_text(folder, tmp_path / "statistics")
    with pytest.raises(
        ConversionError, match=r"expected the inputs of 320 tokens and their routing to 4 experts: delete"
    ):
        found.inputs(1)


def test_statistics_whose_journal_is_damaged(folder, tmp_path):
    open_text(folder, tmp_path / "statistics").gather([1])
    (tmp_path / "statistics" / ".tiedmoe" / "journal.jsonl").write_text("{}\n")
    with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match=r"is damaged: line 1 .*; delete the folder"):
        open_text(folder, tmp_path / "statistics")


def test_statistics_on_a_full_disk(folder, tmp_path, small_disk):
    """It is their disk that is named, and what other layers have is kept."""
    recipe = recipe_for(folder, tmp_path / "out", statistics=str(small_disk / "statistics"), calibration_tokens=512)
    message = rf"the disk of {small_disk}/statistics is full; what is done is kept"
    with pytest.raises(TiedMoeError, match=message):
        convert(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert (small_disk / "statistics" / "layer-1.safetensors").is_file()


def test_statistics_in_or_around_another_folder_are_refused_first(folder, tmp_path):
    for statistics, message in (
        (tmp_path / "out", "is also the statistics"),
        (tmp_path / "out" / "statistics", "the statistics .* lies in output"),
        (tmp_path, "lies in the statistics"),
        (folder / "source" / "statistics", "lies in the source"),
    ):
        recipe = recipe_for(folder, tmp_path / "out", statistics=str(statistics))
        for command in (make_plan, convert):
            with unchanged_disk(tmp_path), pytest.raises(TiedMoeError, match=message):
                command(recipe)


def test_text_too_short(folder, tmp_path):
    (tmp_path / "text.txt").write_text(make_text(4))
    with pytest.raises(
        ConversionError, match=r"is too short: .* tokens, and 320 are needed, .*lower calibration_tokens"
    ):
        open_text(tmp_path, tmp_path / "statistics", source=folder / "source")


def test_text_that_is_not_there(folder, tmp_path):
    with pytest.raises(ConversionError, match="calibration text: no file or folder"):
        open_text(folder, tmp_path / "statistics", calibration=str(tmp_path / "none.txt"))


def test_source_without_tokenizer(folder, tmp_path):
    save_source(tmp_path / "source")
    for path in (tmp_path / "source").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConversionError, match="has no tokenizer to read calibration text with"):
        open_text(folder, tmp_path / "statistics", source=tmp_path / "source")


def test_more_positions_than_the_source_knows(folder, tmp_path):
    fields = {"source": str(folder / "source"), "output": str(tmp_path / "out"), "calibration": "austen"}
    assert opened_calibration(ConversionRecipe(**fields, calibration_tokens=640)).tokens.shape[1] == 64  # by default
    recipe = ConversionRecipe(**fields, calibration_block_size=512)
    with pytest.raises(ConversionError, match=r"calibration_block_size=512, but .* knows 64 positions; lower it"):
        opened_calibration(recipe)


def test_bundled_text(folder, tmp_path):
    found = open_text(folder, tmp_path / "one", calibration="austen")
    path = files("transformers_tiedmoe") / "data" / "austen.txt.xz"
    assert torch.equal(found.tokens, open_text(folder, tmp_path / "two", calibration=str(path)).tokens)


# What a conversion cost


def recipe_for(folder, output, **fields):
    fields = {
        "calibration": str(folder / "text.txt"), "calibration_tokens": NUM_TOKENS, "calibration_block_size": BLOCK,
        "skip_first": 1, "skip_last": 1,
        "source": str(folder / "source"), "output": str(output),
    } | fields  # fmt: skip
    return ConversionRecipe(**fields)


def test_union_costs_nothing(folder, tmp_path):
    measured = convert(recipe_for(folder, tmp_path / "out", method="union"))["measured"]
    assert measured["loss_added"] == 0
    assert set(measured["routing_agreement"].values()) == {1.0}
    assert all(slots["source"] == slots["tied"] for slots in measured["dead_slots"].values())


def test_measured_loss_and_routing_are_the_tied_models(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "out", method="select", statistics=str(tmp_path / "statistics"))
    measured = convert(recipe)["measured"]
    text = open_text(folder, tmp_path / "statistics")
    found = {}
    for name, path in (("source", folder / "source"), ("tied", tmp_path / "out")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        chosen = {}
        for layer in range(4):
            hook = lambda module, args, layer=layer, chosen=chosen: chosen.update({layer: args[1]})  # noqa: E731
            model.model.layers[layer].mlp.experts.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = model(input_ids=text.held_out, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text.held_out[:, 1:].flatten())
        found[name] = float(loss), chosen
    assert measured["loss_before"] == pytest.approx(found["source"][0], abs=1e-5)
    assert measured["loss_after"] == pytest.approx(found["tied"][0], abs=1e-5)
    assert measured["loss_added"] == pytest.approx(measured["loss_after"] - measured["loss_before"])
    shares, tied_reached = [], set()
    for layer in range(4):
        pairs = list(zip(found["source"][1][layer].tolist(), found["tied"][1][layer].tolist()))
        shares.append(sum(len(set(a) & set(b)) for a, b in pairs) / (2 * len(pairs)))
        assert measured["routing_agreement"][str(layer)] == pytest.approx(shares[-1])
        if layer in (1, 2):
            used = {slot for _, b in pairs for slot in b}
            tied_reached |= used
            assert measured["dead_slots"][str(layer)]["tied"] == 4 - len(used)
    assert measured["routing_agreement"]["mean"] == pytest.approx(sum(shares) / 4)
    assert measured["dead_experts"] == {"0": {"dead": 4 - len(tied_reached), "of": 4}}


def test_measured_losses_are_in_the_card_and_can_be_left_out(folder, tmp_path):
    report = convert(recipe_for(folder, tmp_path / "one", method="average"))
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"{report['measured']['loss_after']:.4f}" in card
    assert str(tmp_path) not in card
    assert str(folder) not in card
    assert "measured" not in convert(recipe_for(folder, tmp_path / "two", method="average", measure=False))
    assert "What it cost" not in (tmp_path / "two" / "README.md").read_text()
    assert json.dumps(report)  # JSON-able


@pytest.mark.parametrize(("error", "stays"), [(None, False), (ValueError, False), (KeyboardInterrupt, True)])
def test_hidden_statistics_go_and_stay_after_an_interruption(folder, tmp_path, error, stays):
    hidden, recipe = tmp_path / ".out.statistics", recipe_for(folder, tmp_path / "out")
    opened = open_source(recipe.source)
    source = SourceModel.map(opened, read_config(opened))

    def run():
        with inputs.open_calibration(recipe, source) as calibration:
            calibration.gather([1])
            assert (hidden / "layer-1.safetensors").is_file()
            if error is not None:
                raise error

    with pytest.raises(error) if error is not None else contextlib.nullcontext():
        run()
    assert hidden.exists() == stays


def test_a_second_process_leaves_the_first_ones_statistics_alone(folder, tmp_path):
    recipe = recipe_for(folder, tmp_path / "out", method="least_squares")
    state = tmp_path / ".out.statistics" / ".tiedmoe"
    state.mkdir(parents=True)
    (tmp_path / ".out.statistics" / "layer-1.safetensors").write_bytes(b"of the first")
    with open(state / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process that converts to the same output
        with pytest.raises(TiedMoeError, match=r"another process uses .*out.statistics; .*wait until it is done"):
            convert(recipe)
    assert (tmp_path / ".out.statistics" / "layer-1.safetensors").read_bytes() == b"of the first"


def test_a_record_that_a_kill_cut_off_is_written_again(folder, tmp_path):
    state = tmp_path / ".out.statistics" / ".tiedmoe"
    state.mkdir(parents=True)
    (state / "journal.jsonl").write_text('{"identity": {')
    convert(recipe_for(folder, tmp_path / "out", method="least_squares"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plan_counts_the_model_that_runs_on_the_text(folder, tmp_path):
    """It fits into memory here: all of it in float32, and the tied one beside it where losses are compared."""
    plans = [
        make_plan(recipe_for(folder, tmp_path / "out", method="average", **fields))
        for fields in ({"calibration": None}, {"measure": False}, {})
    ]
    peaks = [plan.peak_memory_bytes for plan in plans]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] >= plans[0].bytes_before


def test_nothing_is_left_beside_the_output(folder, tmp_path):
    convert(recipe_for(folder, tmp_path / "out", method="average"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Chains, from end to end


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "least_squares"},
        {"method": "least_squares", "pool_experts": "1.5x"},
        {"method": "prototype", "pool_experts": "1.25x", "then": [{"prefit": {"steps": 4}}], "residual_rank": 2},
        {"method": "select", "method_options": {"layer": "best"}, "pool_experts": "2x"},
        {"method": "average", "method_options": {"weights": "frequency"}, "residual_rank": 3},
    ],
    ids=["default", "wide", "chain", "best", "residual"],
)
def test_a_recipe_gives_what_it_planned_and_the_same_again(folder, tmp_path, fields):
    plans = []
    report = convert(recipe_for(folder, tmp_path / "one", **fields), show=plans.append)
    (plan,) = plans
    width = report["pool_num_experts"][0]
    found = load_file(tmp_path / "one" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in found.values()) == report["bytes_after"] == plan.bytes_after
    assert found["model.expert_pools.0.down_proj"].shape[0] == width
    reached = {row for name, tensor in found.items() if name.endswith("slot_map") for row in tensor.tolist()}
    assert reached <= set(range(width))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.residual_rank == [fields.get("residual_rank", 0)]
    card = (tmp_path / "one" / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    recipe |= {
        "source": str(folder / "source"),
        "output": str(tmp_path / "two"),
        "calibration": str(folder / "text.txt"),
    }
    convert(ConversionRecipe.from_dict(recipe))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_clones_change_nothing_until_something_refines_them(folder, tmp_path):
    losses = {}
    for width in ("1x", "1.5x", "2x"):
        report = convert(recipe_for(folder, tmp_path / width, method="select", pool_experts=width))
        losses[width] = report["measured"]["loss_after"]
    assert len(set(losses.values())) == 1


def test_a_killed_run_does_not_make_its_pools_again(folder, tmp_path, monkeypatch):
    """Ctrl-C after the last pool was made and before its file was complete."""
    recipe = recipe_for(folder, tmp_path / "out", method="least_squares")
    plan = make_plan(recipe)
    stored = []

    def stop(self, name, tensors, metadata=None):
        store(self, name, tensors, metadata)
        stored.append(name)
        raise KeyboardInterrupt

    store = Work.store
    monkeypatch.setattr(Work, "store", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(plan)
    assert stored == ["pool-0.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", ".out.statistics"]
    monkeypatch.setattr(Work, "store", store)
    monkeypatch.setattr(make, "make_pool", lambda *args: pytest.fail("the pool is made again"))
    execute(make_plan(recipe))
    monkeypatch.undo()
    execute(make_plan(dataclasses.replace(recipe, output=str(tmp_path / "other"))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "union", "pool_experts": "1.5x"}, r"expected 8, all of its layers' experts"),
        (
            {"method": "prototype", "pool_experts": 9},
            r"pool_experts=9 makes pool 0 one of 9 experts; expected from 1 to 8",
        ),
        ({"method": "average", "pool_experts": "0.5x"}, r"but method 'average' makes 4 and can only be widened"),
        ({"method": "average", "pool_experts": [4, 4]}, r"pool_experts has 2 entries for 1 pools"),
        ({"pool_experts": "many"}, r"pool_experts='many'; expected a number such as 96"),
        ({"then": ["average"]}, r"then: method 'average' makes a pool and refines none; expected one of"),
        ({"then": ["prefitt"]}, r"then: unknown method 'prefitt'; did you mean 'prefit'"),
        ({"then": [{"prefit": {"stepz": 1}}]}, r"method 'prefit' has no option 'stepz'; did you mean 'steps'"),
        ({"residual_rank": -1}, r"residual_rank=-1; expected an integer of at least 0"),
        ({"residual_rank": 9}, r"residual_rank=9, but the experts' smallest side is 8; expected at most that"),
    ],
)
def test_wrong_chains_and_sizes(folder, tmp_path, fields, message):
    with pytest.raises(ConversionError, match=message):
        make_plan(recipe_for(folder, tmp_path / "out", **fields))

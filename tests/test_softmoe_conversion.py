"""From a source to soft routing, through healing, and back as far as a family's own config can say it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_tied
from checkpoints import save_source as save_small_source
from conversions import edit_config, edit_tensors, save_source, save_tokenizer
from families import text_families, tiny_config
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from test_families import UNSUPPORTED
from test_softmoe import SOFT as SOFT_FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiedmoe_conversion import ConversionError, ConversionRecipe, convert, make_plan, untie
from tiedmoe_conversion.baking import PER_LAYER
from tiedmoe_conversion.display import show_plan
from tiedmoe_conversion.verify import verify_folder
from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.configuration_tiedmoe import TOP_K_FIELDS
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.routing import active_experts
from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.pretrained import load_model
from transformers_tiedmoe.training.trainer import HealTrainer

SOFT = {"routing": "softmoe", "method": "union"}
TIED = {"group_size": 2, "skip_first": 1, "skip_last": 1, "method": "union"}
QUICK = {"max_steps": 8, "block_size": 16, "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0}


def logits(model, tokens):
    """The model's, with weights in memory of their own: files align them differently, and products then round so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model(tokens).logits


@pytest.mark.parametrize(
    ("family", "tying"),
    [("olmoe", {}), *((family, TIED) for family in ("olmoe", "mixtral", "deepseek_v3", "gpt_oss"))],
)
def test_a_conversion_starts_as_the_source(family, tying, tmp_path):
    """Tied, or by the routing alone: then every layer keeps its experts as they are."""
    save_source(tmp_path / "source", family)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    save_tokenizer(tmp_path / "source")
    recipe = ConversionRecipe(
        str(tmp_path / "source"), str(tmp_path / "soft"), routing="softmoe", budget_active=0.75, **tying
    )
    assert convert(recipe)["verification"]["lossless"]["compared"] == "logits"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "soft", dtype="auto")
    tokens = torch.randint(3, 90, (2, 9))
    expected = logits(source, tokens)
    assert logits(model, tokens).equal(expected)
    assert bool(model.config.groups) == bool(tying)
    assert ("expert_pools" in str(model.state_dict().keys())) == bool(tying)
    card = (tmp_path / "soft" / "README.md").read_text()
    assert "Soft routing ([SoftMoE]" in card
    assert ("softly routed; every layer has its own experts" in card) == (not tying)
    soft, num_layers = model.config.softmoe, len(model.base_model.expert_budget.theta)
    assert (soft["alpha"], soft["budget"]) == (0, 2 * num_layers)
    assert (soft["target_active"], soft["target_budget"]) == (1.5 * num_layers, 1.125 * num_layers)
    assert not verify_folder(tmp_path / "soft", str(tmp_path / "source"))["source"]["changed_tensors"]

    untie(tmp_path / "soft", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert type(again) is type(source)
    assert logits(again, tokens).equal(expected)
    assert "softmoe" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.minutes
@pytest.mark.parametrize("family", SOFT_FAMILIES)
def test_a_conversion_of_every_family_starts_as_the_source(family, tmp_path):
    save_source(tmp_path / "source", family)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    tokens = torch.randint(3, 90, (2, 9))
    expected = logits(source, tokens)
    recipe = ConversionRecipe(str(tmp_path / "source"), str(tmp_path / "soft"), group_size=1, **SOFT)
    convert(recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "soft", dtype="auto")
    assert model.config.routing == "softmoe"
    assert logits(model, tokens).equal(expected)


@pytest.mark.parametrize("routing", ["top_k", "softmoe"])
def test_a_source_with_a_top_k_for_each_layer(routing, tmp_path):
    """As the released HunYuan-A13B says it: tied or soft, each layer starts with its own."""
    by_layer = [1, 2, 3, 2, 1, 2]
    save_source(tmp_path / "source", "hunyuan_v1_moe", torch.float32, moe_topk=by_layer)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    tokens = torch.randint(3, 90, (2, 9))
    expected = logits(source, tokens)
    soft = {"routing": routing, "budget_active": 0.75} if routing == "softmoe" else {}
    recipe = ConversionRecipe(
        str(tmp_path / "source"),
        str(tmp_path / "tied"),
        group_size=2,
        skip_first=1,
        skip_last=1,
        method="union",
        **soft,
    )
    convert(recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", dtype="auto")
    assert logits(model, tokens).equal(expected)
    assert [model.config.experts_per_token_of(layer) for layer in range(6)] == by_layer
    assert model.config.experts_per_token == 3
    if routing == "softmoe":
        assert model.config.softmoe["budget"] == pytest.approx(11)
        assert model.config.softmoe["target_active"] == pytest.approx(0.75 * 11)
        model.config.softmoe |= {"alpha": 1e-7, "layers": [float(k) for k in by_layer]}
        torch.testing.assert_close(logits(model, tokens), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [[2, 2], [2, 2, 0, 2, 2, 2]])
def test_a_top_k_for_each_layer_that_does_not_fit_is_refused(top_k):
    config = tiny_config("hunyuan_v1_moe")
    config.moe_topk = top_k
    with pytest.raises(TiedMoeError, match=r"=\[2, 2.*; expected one integer of at least 1, or one for each of the 6"):
        TiedMoeConfig.from_family(config, group_size=2)


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soft")
    source = save_small_source(folder / "source")
    convert(ConversionRecipe(source, str(folder / "soft"), skip_first=1, skip_last=1, **SOFT, budget_active=0.75))
    return str(folder / "soft")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(make_text())
    return str(path)


def softmoe_of(folder):
    return json.loads(Path(folder, "config.json").read_text())["softmoe"]


@pytest.mark.parametrize("lora", [False, True])
def test_healing_anneals_to_the_targets(lora, soft, data, tmp_path):
    report = heal(HealConfig(soft, data, str(tmp_path / "healed"), **QUICK, lora=lora, lora_rank=4))
    assert report["after"]["loss"] < report["before"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    before, after = softmoe_of(soft), softmoe_of(tmp_path / "healed")
    assert (after["alpha"], after["budget"]) == (before["target_alpha"], before["target_budget"])
    assert after["target_alpha"] is after["target_budget"] is None
    assert model.base_model.expert_budget.theta.abs().max() > 0
    logged = [each["active_experts"] for each in report["history"] if "active_experts" in each]
    assert len(logged) == 8
    assert all(1 <= each <= 4 for each in logged)
    used = report["active_experts"]
    assert len(used) == 4
    assert sum(each["k"] for each in used) == pytest.approx(before["target_budget"])
    assert all(1 <= each["p50"] <= each["p99"] for each in used)


# The losses of a model that nobody trained, on all of its training text: 12.65 where it starts, 12.92 at the targets.
HARD = {"alpha": 0.0, "budget": 8.0}, {"alpha": 10.0, "budget": 4.0}


@pytest.mark.parametrize("hurts", [True, False])
def test_healing_waits_while_annealing_hurts(hurts, tmp_path, monkeypatch):
    """Each step sees all of the text, so that the loss has no noise, at a learning rate that changes nothing."""
    start, target = HARD if hurts else HARD[::-1]
    softmoe = start | {f"target_{name}": value for name, value in target.items()}
    save_tied(tmp_path / "soft", initializer_range=1.0, routing="softmoe", softmoe=softmoe)
    alphas, step = [], HealTrainer.training_step

    def noted(self, model, *args, **kwargs):
        alphas.append(model.config.softmoe["alpha"])
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(HealTrainer, "training_step", noted)
    fields = {"max_steps": 60, "block_size": 16, "batch_size": 20, "logging_steps": 60, "allow_worse": True}
    rates = {"learning_rate": 1e-8, "budget_lr": 1e-8}
    (tmp_path / "text.txt").write_text(make_text(24))
    paths = (str(tmp_path / name) for name in ("soft", "text.txt", "healed"))
    report = heal(HealConfig(*paths, **fields, **rates))
    assert report["tokens"] == 60 * 20 * 16  # all of it in every step
    after = softmoe_of(tmp_path / "healed")
    assert (after["alpha"], after["budget"]) == (target["alpha"], target["budget"])
    moved = [abs(b - a) > 1e-9 for a, b in zip([start["alpha"], *alphas], alphas)]
    if not hurts:
        assert report["annealing_held_steps"] == 0
        assert moved == [True] * 30 + [False] * 30
        assert not [each for each in report["warnings"] if "waited" in each]
        return
    # Half of the 30 steps that are left: it waits for 15, goes on all the same, and ends 15 steps before the end.
    assert report["annealing_held_steps"] == 15
    first = moved.index(False)
    assert moved == [True] * first + [False] * 15 + [True] * (30 - first) + [False] * 15
    assert first in (10, 20)
    (warning,) = [each for each in report["warnings"] if "waited" in each]
    assert "waited 15 of 60 steps, as the training loss was more than 0.05 above its lowest" in warning


def test_a_killed_healing_anneals_as_an_uninterrupted_one(soft, data, tmp_path, monkeypatch):
    whole = heal(HealConfig(soft, data, str(tmp_path / "whole"), **QUICK))
    step = HealTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    args = HealConfig(soft, data, str(tmp_path / "twice"), **QUICK, save_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(HealTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            heal(args)
    again = heal(args)
    assert again["resumed_from_step"] == 6
    assert again["after"] == whole["after"]


def copy_with(folder, copied, **softmoe):
    """The same checkpoint with other fields of config.json's softmoe."""
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("tiedmoe_conversion.json"))
    edit_config(copied, softmoe=softmoe_of(folder) | softmoe)
    return str(copied)


def test_the_threshold_follows_what_is_asked_for(soft, data, tmp_path):
    fields = {"alpha": 0.2, "target_alpha": None, "target_active": 5.0, "threshold": 0.02}
    copied = copy_with(soft, tmp_path / "soft", **fields)
    report = heal(HealConfig(copied, data, str(tmp_path / "healed"), **{**QUICK, "max_steps": 60}))
    assert softmoe_of(tmp_path / "healed")["threshold"] > 0.02
    assert sum(each["mean"] for each in report["active_experts"]) == pytest.approx(5.0, rel=0.15)


def test_what_max_active_takes_is_in_the_report(soft, data, tmp_path):
    copied = copy_with(soft, tmp_path / "soft", alpha=5.0, target_alpha=None, max_active=2)
    report = heal(HealConfig(copied, data, str(tmp_path / "healed"), **QUICK))
    assert all((each["tokens_cut"], each["experts_cut"]) == (each["tokens"], 2 * each["tokens"])
               for each in report["active_experts"])  # fmt: skip
    assert {each["tokens_cut"] for each in report["history"] if "loss" in each} == {1.0}
    (warning,) = [each for each in report["warnings"] if "max_active" in each]
    assert warning.startswith("max_active=2 took 2.0 experts each from 100.0% of the held-out tokens")


def test_a_learned_budget_that_config_json_switches_off(soft, data, tmp_path):
    """Whoever reads it, `learn_budget: false` alone is refused, and `layers` replace what the files hold."""
    refused = copy_with(soft, tmp_path / "refused", alpha=0.1, target_alpha=None, learn_budget=False)
    message = (
        r"learn_budget=false, and the files hold the shares .* \(expert_budget.theta\); .* set learn_budget to true, "
        r"which keeps them, or layers .* such as \[2.0, 2.0, 2.0, 2.0\]"
    )
    healing = {**QUICK, "max_steps": 1, "allow_worse": True}
    for read in (
        lambda: AutoModelForCausalLM.from_pretrained(refused),
        lambda: heal(HealConfig(refused, data, str(tmp_path / "healed"), **healing)),
        lambda: untie(refused, tmp_path / "untied", data=data, top_k=2),
        lambda: verify_folder(refused),
    ):
        with pytest.raises(TiedMoeError, match=message):
            read()
    assert [path.name for path in tmp_path.iterdir()] == ["refused"]

    layers = [1.0, 2.0, 2.0, 3.0]
    fixed = copy_with(refused, tmp_path / "fixed", layers=layers, target_budget=None)
    model, loading = AutoModelForCausalLM.from_pretrained(fixed, output_loading_info=True)
    assert not any(loading.values()), loading
    model(torch.ones(1, 4, dtype=torch.int64))
    assert [each["k"] for each in active_experts(model)] == layers
    assert verify_folder(fixed)["auto_class"]
    assert untie(fixed, tmp_path / "untied", data=data, top_k=2)["baked"]["top_k"] == 2
    report = heal(HealConfig(fixed, data, str(tmp_path / "healed"), **healing))
    assert [each["k"] for each in report["active_experts"]] == layers
    assert verify_folder(tmp_path / "healed")["auto_class"]


# Back to the family: a fixed top-k


def held_out_loss(folder, data):
    model = load_model(str(folder))
    blocks = load_blocks(data, AutoTokenizer.from_pretrained(folder), 64)[1]
    return type(model), perplexity(model, blocks)["loss"]


def test_untying_bakes_a_top_k_and_says_what_it_costs(soft, data, tmp_path):
    copied = copy_with(soft, tmp_path / "soft", alpha=1e-3, threshold=0.2)
    edit_config(copied, output_router_logits=True)  # as whoever trained with a balance loss has it
    with pytest.raises(
        ConversionError,
        match=r"is routed softly \(alpha=0.001\): its tokens use different numbers of experts. A 'olmoe' config says "
        r"one number for all tokens and layers, so that untying bakes a fixed top-k, which costs loss; give text to "
        r"measure that on as data \(--data\), and top_k \(--top-k\), which it then suggests",
    ):
        untie(copied, tmp_path / "untied")
    _, soft_loss = held_out_loss(copied, data)
    with pytest.raises(ConversionError, match=r"by layer .* give top_k=2 \(--top-k 2\), or another") as error:
        untie(copied, tmp_path / "untied", data=data)
    assert f"the loss is {soft_loss:.4f}" in str(error.value)
    assert not (tmp_path / "untied").exists()

    report = untie(copied, tmp_path / "untied", data=data, top_k=3)["baked"]
    kind, loss = held_out_loss(tmp_path / "untied", data)
    assert kind.__module__.startswith("transformers.models.olmoe")
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["num_experts_per_tok"] == report["top_k"] == 3
    assert (report["loss_before"], report["loss_after"]) == pytest.approx((soft_loss, loss), rel=1e-6)
    assert soft_loss != loss
    assert "softmoe" not in (tmp_path / "untied" / "config.json").read_text()


def test_a_family_with_a_number_for_each_layer_keeps_it(data, tmp_path):
    save_source(tmp_path / "source", "hunyuan_v1_moe", vocab_size=320, dtype=torch.float32, pad_token_id=None)
    make_tokenizer().save_pretrained(tmp_path / "source")
    convert(ConversionRecipe(str(tmp_path / "source"), str(tmp_path / "start"), skip_first=1, skip_last=1, **SOFT))
    soft = copy_with(tmp_path / "start", tmp_path / "soft", alpha=0.01)
    theta = torch.tensor([1.0, -9.0, 0.0, 2.0, 0.5, -3.0])
    edit_tensors(soft, lambda tensors: tensors | {"model.expert_budget.theta": theta})
    report = untie(soft, tmp_path / "untied", data=data)["baked"]
    used = [each["mean"] for each in report["active_experts"]]
    assert report["top_k"] == [int(mean + 0.5) for mean in used]
    assert len(set(report["top_k"])) > 1
    _, loss = held_out_loss(tmp_path / "untied", data)
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["moe_topk"] == report["top_k"]
    assert report["loss_after"] == pytest.approx(loss, rel=1e-6)
    assert report["loss_before"] == pytest.approx(held_out_loss(soft, data)[1], rel=1e-6)


@pytest.mark.parametrize("family", sorted({*text_families()} - {*PER_LAYER, *UNSUPPORTED}))
def test_no_other_family_s_config_holds_a_number_for_each_layer(family):
    config = tiny_config(family)
    field = next(name for name in TOP_K_FIELDS if getattr(config, name, None) is not None)
    fields = {field: [2] * config.num_hidden_layers}
    with torch.device("meta"), pytest.raises((StrictDataclassError, TypeError), match="list"):
        AutoModelForCausalLM.from_config(tiny_config(family, **fields))(torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("softmoe", "fields", "message"),
    [
        ({"alpha": 0}, {"top_k": 2}, r"routes by the top-k of its family, 2, which untying keeps; expected neither"),
        ({"alpha": 0.1}, {"top_k": 5, "data": "text"}, r"top_k=5; expected 1 to 4"),
        ({"alpha": 0.1}, {"top_k": 2, "data": "no/such.txt"}, r"text to measure on: no file or folder"),
        ({"alpha": 0.1}, {"top_k": 2}, r"costs loss; give text to measure that on as data \(--data\)$"),
    ],
)
def test_a_top_k_that_cannot_be_baked_is_refused(softmoe, fields, message, soft, tmp_path):
    with pytest.raises(ConversionError, match=message):
        untie(copy_with(soft, tmp_path / "soft", **softmoe), tmp_path / "untied", **fields)
    assert not (tmp_path / "untied").exists()


def test_a_plan_says_where_soft_routing_goes(tmp_path):
    save_source(tmp_path / "source")
    for share, aim in ((None, "alpha to 0.05\n"), (0.75, "tokens to 9 experts in all layers together, of 12\n")):
        recipe = ConversionRecipe(str(tmp_path / "source"), str(tmp_path / "out"), **SOFT, budget_active=share)
        console = Console(record=True, width=200)
        console.print(show_plan(make_plan(recipe)))
        assert aim in re.sub(" +\n", "\n", console.export_text())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "soft"}, "routing='soft'; expected top_k or softmoe"),
        ({"budget_active": 0.75}, "budget_active=0.75 has no effect with routing='top_k'"),
        ({"routing": "softmoe", "budget_active": 0}, "budget_active=0; expected a share such as 0.75"),
        (
            {"routing": "softmoe", "group_size": 1, "method": "average"},
            "method='average' has no effect with routing='softmoe' and group_size=1, which tie nothing; leave it out",
        ),
    ],
)
def test_recipes_that_are_refused(fields, message):
    with pytest.raises(ConversionError, match=message):
        ConversionRecipe("in", "out", **{"method": "union", **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (1, "union")),
        ({"skip_first": 1}, (1, "union")),
        ({"group_size": 1}, (1, "union")),
        ({"method": "average"}, (2, "average")),
        ({"pool_experts": 8, "calibration": "text"}, (2, "least_squares")),
        ({"group_size": 2, "calibration": "text"}, (2, "least_squares")),
        ({"routing": "top_k", "calibration": "text"}, (2, "least_squares")),
    ],
)
def test_soft_routing_ties_nothing_unless_something_is_said_of_tying(fields, expected):
    recipe = ConversionRecipe("in", "out", **{"routing": "softmoe", **fields})
    assert (recipe.group_size, recipe.method) == expected
    assert recipe.ties_nothing == (expected[0] == 1)
    assert ConversionRecipe.from_dict(recipe.to_dict()) == recipe


def test_a_budget_below_one_expert_a_layer_is_refused(tmp_path):
    save_source(tmp_path / "source")
    recipe = ConversionRecipe(str(tmp_path / "source"), str(tmp_path / "out"), **SOFT, budget_active=0.4)
    with pytest.raises(ValueError, match=r"softmoe\.target_active=4\.8.*; expected a number of at least 6"):
        convert(recipe)
    assert not (tmp_path / "out").exists()

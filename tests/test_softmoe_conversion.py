"""From a source to soft routing, through healing, and back as far as a family's own config can say it."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import make_text
from checkpoints import save_source as save_small_source
from conversions import save_source, save_tokenizer
from transformers import AutoModelForCausalLM

from tiedmoe_conversion import ConversionError, ConversionRecipe, convert, untie
from tiedmoe_conversion.verify import verify_folder
from transformers_tiedmoe.training.heal import HealConfig, heal

SOFT = {"routing": "softmoe", "method": "union"}
QUICK = {"max_steps": 8, "block_size": 16, "batch_size": 4, "learning_rate": 1e-2, "warmup_fraction": 0.0}


def logits(model, tokens):
    """The model's, with weights in memory of their own: files align them differently, and products then round so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model(tokens).logits


@pytest.mark.parametrize(
    ("family", "group_size"), [("olmoe", 1), ("olmoe", 2), ("mixtral", 2), ("deepseek_v3", 2), ("gpt_oss", 2)]
)
def test_a_conversion_starts_as_the_source(family, group_size, tmp_path):
    save_source(tmp_path / "source", family)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    save_tokenizer(tmp_path / "source")
    skip = 3 if group_size == 1 else 1  # of six layers: nothing is tied
    tying = {"group_size": group_size, "skip_first": skip, "skip_last": skip}
    recipe = ConversionRecipe(str(tmp_path / "source"), str(tmp_path / "soft"), **tying, **SOFT, budget_active=0.75)
    assert convert(recipe)["verification"]["lossless"]["compared"] == "logits"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "soft", dtype="auto")
    tokens = torch.randint(3, 90, (2, 9))
    expected = logits(source, tokens)
    assert logits(model, tokens).equal(expected)
    soft, num_layers = model.config.softmoe, len(model.base_model.expert_budget.theta)
    assert (soft["alpha"], soft["budget"], soft["target_budget"]) == (0, 2 * num_layers, 1.5 * num_layers)
    assert not verify_folder(tmp_path / "soft", str(tmp_path / "source"))["source"]["changed_tensors"]

    untie(tmp_path / "soft", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert type(again) is type(source)
    assert logits(again, tokens).equal(expected)
    assert "softmoe" not in (tmp_path / "again" / "config.json").read_text()


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
    report = heal(HealConfig(soft, data, str(tmp_path / "healed"), **QUICK, lora=lora))
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

    with pytest.raises(ConversionError, match=r"is routed softly \(alpha=0.05\), which a 'olmoe' config cannot say"):
        untie(tmp_path / "healed", tmp_path / "untied")
    assert not (tmp_path / "untied").exists()


def test_a_killed_healing_anneals_as_an_uninterrupted_one(soft, data, tmp_path, monkeypatch):
    from transformers_tiedmoe.training.trainer import HealTrainer

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


def test_the_threshold_follows_what_is_asked_for(soft, data, tmp_path):
    config = json.loads(Path(soft, "config.json").read_text())
    copied = tmp_path / "soft"
    copied.mkdir()
    for path in Path(soft).iterdir():
        if path.name != "tiedmoe_conversion.json":
            (copied / path.name).write_bytes(path.read_bytes())
    config["softmoe"] |= {"alpha": 0.2, "target_alpha": None, "target_active": 5.0, "threshold": 0.02}
    (copied / "config.json").write_text(json.dumps(config))
    report = heal(HealConfig(str(copied), data, str(tmp_path / "healed"), **{**QUICK, "max_steps": 60}))
    assert softmoe_of(tmp_path / "healed")["threshold"] > 0.02
    assert sum(each["mean"] for each in report["active_experts"]) == pytest.approx(5.0, rel=0.15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routing": "soft"}, "routing='soft'; expected top_k or softmoe"),
        ({"budget_active": 0.75}, "budget_active=0.75 has no effect with routing='top_k'"),
        ({"routing": "softmoe", "budget_active": 0}, "budget_active=0; expected a share such as 0.75"),
    ],
)
def test_recipes_that_are_refused(fields, message):
    with pytest.raises(ConversionError, match=message):
        ConversionRecipe("in", "out", method="union", **fields)


def test_a_budget_below_one_expert_a_layer_is_refused(tmp_path):
    save_source(tmp_path / "source")
    recipe = ConversionRecipe(str(tmp_path / "source"), str(tmp_path / "out"), **SOFT, budget_active=0.4)
    with pytest.raises(ValueError, match=r"softmoe\.target_budget=4\.8.*; expected a number of at least 6"):
        convert(recipe)
    assert not (tmp_path / "out").exists()

"""The evidence of layer strategy: replaced parts against copied weights, similarities by hand, plans as recipes."""

import copy
import dataclasses
import itertools
from functools import partial

import datasets
import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_source, save_tied
from families import text_families, tiny_config
from transformers import AutoModelForCausalLM

from tiedmoe_conversion import ConversionRecipe, make_plan
from tiedmoe_conversion.suggested import tied_by
from transformers_tiedmoe.audit import metrics
from transformers_tiedmoe.audit.replacement import moe_layers, other_experts, other_module
from transformers_tiedmoe.audit.strategy import (
    Blocks,
    KeepInputs,
    StrategyOptions,
    expert_outputs,
    measure,
)
from transformers_tiedmoe.audit.subject import Subject, layers_of, open_subject
from transformers_tiedmoe.pools import check_groups
from transformers_tiedmoe.training.data import load_blocks

pytestmark = pytest.mark.xdist_group("audit_strategy")  # one worker makes the fixture once

OPTIONS = StrategyOptions(num_blocks=8, batch_size=4)
SLOW = ("qwen3_5", "qwen3_next", "qwen4_exp", "inkling", "kimi", "bailing")  # linear attention in plain torch
LIKE_QWEN3_NEXT = ("qwen3_5", "qwen4_exp")  # each several seconds
FAMILIES = [family for family in text_families() if family != "gemma4"]  # multimodal: test_families.py


def blocks(*shape, vocab_size=96):
    ids = torch.randint(3, vocab_size, shape).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def subject_of(model):
    return Subject("tiny", "tiny", model.config, layers_of(model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untied and a tied checkpoint with their tokenizer, and text; do not change them."""
    folder = tmp_path_factory.mktemp("strategy")
    save_source(folder / "source", num_hidden_layers=5, initializer_range=0.2)
    save_tied(folder / "tied", initializer_range=0.2)
    (folder / "text.txt").write_text(make_text(400))
    return folder


@pytest.fixture(scope="module")
def domains(folder):
    train, _ = load_blocks(folder / "text.txt", make_tokenizer(), 16)
    return {"one": train.select(range(40)), "two": train.select(range(40, 100))}


@pytest.fixture(scope="module")
def source(folder):
    return open_subject(str(folder / "source")), AutoModelForCausalLM.from_pretrained(folder / "source").eval()


@pytest.fixture(scope="module")
def found(source, domains):
    return measure(*source, domains, OPTIONS)


def loss_of(model, domains):
    sums, counts = Blocks(domains, OPTIONS).losses(model)
    return float(sums.sum() / counts.sum())


def neighbours_match(model, domains, a, b):
    """By hand: which expert of layer b stands for each of layer a, for four experts among all permutations."""
    layers = {layer.index: layer for layer in moe_layers(model)}
    with KeepInputs(list(layers.values()), 1) as kept:
        Blocks(domains, OPTIONS).losses(model)
    tokens = [torch.cat(kept.parts[layer]) for layer in sorted((a, b))]
    step = max(1, len(tokens[0]) // OPTIONS.tokens_per_layer)
    tokens = torch.cat([each[::step][: OPTIONS.tokens_per_layer] for each in tokens])
    x, y = (expert_outputs(layers[each], tokens).flatten(1) for each in (a, b))
    cosines = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    best = max(itertools.permutations(range(4)), key=lambda p: sum(cosines[i, j] for i, j in enumerate(p)))
    return list(best), float(cosines[range(4), best].mean())


def copied(model, part, a, b, match):
    """A copy of the model whose layer a has b's weights of a part, as experts are matched."""
    model = copy.deepcopy(model)
    to, by = model.model.layers[a], model.model.layers[b]
    with torch.no_grad():
        if part == "attention":
            to.self_attn.load_state_dict(by.self_attn.state_dict())
        elif part == "router":
            to.mlp.gate.weight.copy_(by.mlp.gate.weight[match])
        else:
            for name, weight in to.mlp.experts.named_parameters():
                weight.copy_(getattr(by.mlp.experts, name)[match])
    return model


@pytest.mark.parametrize("part", ["experts", "router", "attention"])
def test_a_replacement_is_a_model_with_the_neighbours_weights(part, found, source, domains):
    _, model = source
    before = loss_of(model, domains)
    replacements = [each for each in found.replacements if each.part == part]
    assert len(replacements) == (8 if part == "experts" else 5)
    for each in replacements:
        match, _ = neighbours_match(model, domains, each.layer, each.neighbour)
        expected = loss_of(copied(model, part, each.layer, each.neighbour, match), domains) - before
        assert each.loss_increase.value == pytest.approx(expected, abs=1e-6)
        assert each.loss_increase.low <= each.loss_increase.value <= each.loss_increase.high
    assert max(abs(each.loss_increase.value) for each in replacements) > 1e-4


def test_similarity_is_that_by_hand(found, source, domains):
    _, model = source
    layers = moe_layers(model)
    text = Blocks(domains, OPTIONS)
    with KeepInputs(layers, 1) as kept:
        text.losses(model)
    features = {index: torch.cat(parts).double() for index, parts in kept.parts.items()}
    assert len(found.similarity) == 10
    for each in found.similarity:
        a, b = each.layers
        x, y = (features[layer] - features[layer].mean(0) for layer in (a, b))
        cka = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
        assert each.representation_cka == pytest.approx(float(cka), abs=1e-5)
        if b == a + 1:
            assert each.output_similarity == pytest.approx(neighbours_match(model, domains, a, b)[1], abs=1e-5)
        else:
            assert each.output_similarity is None


def test_the_model_is_afterwards_what_it_was(source, domains):
    subject, model = source
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    ids = torch.tensor(domains["one"]["input_ids"][:4])
    with torch.no_grad():
        before = model(ids).logits
        measure(subject, model, domains, OPTIONS)
        assert torch.equal(model(ids).logits, before)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in modules.values())


def test_an_error_puts_everything_back(source):
    _, model = source
    first, second, *_ = moe_layers(model)
    own = first.router.module

    def fail():
        with other_module(first.router, second.router), other_experts(first, second, torch.arange(4)):
            assert first.router.module is second.router.module
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert first.router.module is own
    assert "forward" not in vars(first.experts)


def test_keeping_inputs_changes_no_bit(source, domains):
    _, model = source
    text = Blocks(domains, OPTIONS)
    before, _ = text.losses(model)
    with KeepInputs(moe_layers(model), 3):
        kept, _ = text.losses(model)
    assert torch.equal(before, kept)


def test_blocks_are_spread_over_every_domain():
    domains = {"long": blocks(10, 8), "short": blocks(2, 8)}
    text = Blocks(domains, StrategyOptions(num_blocks=8))
    assert text.domains.tolist() == [0] * 4 + [1] * 2
    assert text.input_ids[:4].tolist() == [domains["long"][i]["input_ids"] for i in (0, 3, 6, 9)]


def test_a_tied_pair_costs_nothing_and_needs_no_plan(folder, domains):
    subject = open_subject(str(folder / "tied"))  # layers 1 and 2 read one pool
    found = measure(subject, subject.load(), domains, OPTIONS)
    costs = {(each.layer, each.neighbour): each.loss_increase for each in found.replacements if each.part == "experts"}
    assert costs[1, 2].value == costs[2, 1].value == costs[1, 2].high == 0
    assert costs[0, 1].value != 0
    assert {each.layers: each.output_similarity for each in found.similarity}[1, 2] == pytest.approx(1)
    assert found.plans == []
    assert any("tied already" in note for note in subject.notes)


@pytest.mark.parametrize("tying", [{}, {"groups": []}])
def test_soft_routers_are_replaced_too(tmp_path, domains, tying):
    """With their budgets; of the untied one a plan is suggested, of the tied one none."""
    save_tied(tmp_path / "soft", routing="softmoe", softmoe={"alpha": 0.5}, initializer_range=0.2, **tying)
    subject = open_subject(str(tmp_path / "soft"))
    model = subject.load()
    routers = [each.router.module for each in moe_layers(model)]
    found = measure(subject, model, domains, OPTIONS)
    assert [type(router).__name__ for router in routers] == ["SoftOlmoeTopKRouter"] * 4
    assert [each.router.module for each in moe_layers(model)] == routers
    increases = [each.loss_increase.value for each in found.replacements if each.part == "router"]
    assert len(increases) == 4
    assert all(increases)
    assert bool(found.plans) == bool(tying)


def test_pools_of_other_widths_are_left_out_with_a_note(tmp_path, domains):
    save_tied(tmp_path / "wide", groups=[[1, 2]], pool_num_experts=[6], slot_maps=[False])
    subject = open_subject(str(tmp_path / "wide"))
    found = measure(subject, subject.load(), domains, OPTIONS)
    pairs = {(each.layer, each.neighbour) for each in found.replacements if each.part == "experts"}
    assert pairs == {(1, 2), (2, 1)}
    assert sum("differ in the number" in note for note in subject.notes) == 2


def test_a_dense_model_says_so(domains):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    subject = subject_of(model)
    found = measure(subject, model, domains, OPTIONS)
    assert (found.replacements, found.similarity, found.plans) == ([], [], [])
    assert subject.notes == ["layer strategy: the model has no experts, so there is none"]


def test_plans_are_the_cheapest_groups_of_all(found):
    """Against every choice of disjoint runs of up to four of the five layers, by the replacements' own costs."""
    costs = {}
    for each in found.replacements:
        if each.part == "experts":
            pair = tuple(sorted((each.layer, each.neighbour)))
            costs[pair] = max(1e-6, min(costs.get(pair, 9.0), each.loss_increase.value))
    for budget, share in ((0.75, 0.6), (0.5, 0.4)):
        (plan,) = [plan for plan in found.plans if plan.expert_share == pytest.approx(share)]
        best = 9.0
        for tied in itertools.product((False, True), repeat=4):  # whether each layer shares with the one before
            longest = max(len(run) for run in "".join("1" if each else " " for each in tied).split(" "))
            if 1 - sum(tied) / 5 <= budget and longest < 4:
                best = min(best, sum(costs[i, i + 1] for i, each in enumerate(tied) if each))
        assert plan.predicted_loss_increase == pytest.approx(best)
        check_groups(plan.recipe["groups"], range(5), 5)
    shares = [plan.expert_share for plan in found.plans]
    assert shares == sorted(set(shares), reverse=True)


def test_a_plan_is_a_recipe_of_the_conversion(found, source, folder, tmp_path):
    _, model = source
    experts = sum(tensor.numel() * 4 for name, tensor in model.named_parameters() if ".experts." in name)
    for plan in found.plans:
        paths = {"source": str(folder / "source"), "output": str(tmp_path / "out"), "calibration": "austen"}
        made = make_plan(ConversionRecipe.from_dict({**paths, **plan.recipe}))
        assert made.groups == plan.recipe["groups"]
        slot_maps = 8 * 4 * sum(map(len, made.groups))
        saved = made.bytes_before - made.bytes_after + slot_maps
        assert 1 - saved / experts == pytest.approx(plan.expert_share)


def test_a_plan_is_measured_by_the_conversion(source, folder, domains):
    subject, model = source
    convert = partial(
        tied_by, source=str(folder / "source"), calibration=str(folder / "text.txt"),
        calibration_tokens=256, calibration_block_size=16,
    )  # fmt: skip
    options = dataclasses.replace(OPTIONS, budgets=(0.8,), method="average", convert=convert)
    calls = []
    (plan,) = measure(subject, model, domains, options, lambda *call: calls.append(call)).plans
    a, b = plan.recipe["groups"][0]
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in averaged.model.layers[a].mlp.experts.named_parameters():
            other = getattr(averaged.model.layers[b].mlp.experts, name)
            weight.copy_((weight + other) / 2)
            other.copy_(weight)
    expected = loss_of(averaged, domains) - loss_of(model, domains)
    assert plan.measured_loss_increase == pytest.approx(expected, abs=1e-5)
    done, totals, _ = zip(*calls)
    assert list(done) == list(range(20))
    assert set(totals) == {20}


def test_no_budget_below_what_groups_allow(source, domains):
    subject, model = source
    subject = dataclasses.replace(subject, notes=[])
    options = dataclasses.replace(OPTIONS, budgets=(0.5,), max_group=1)
    assert measure(subject, model, domains, options).plans == []
    assert "no plan keeps 50% of the expert bytes" in subject.notes[0]


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith(SLOW)])
def test_every_family(family):
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith(SLOW) and not f.startswith(LIKE_QWEN3_NEXT)])
def test_families_with_slow_layers(family):
    check_family(family)


@pytest.mark.minutes
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.startswith(LIKE_QWEN3_NEXT)])
def test_families_with_the_layers_of_qwen3_next(family):
    check_family(family)


def check_family(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    ids = blocks(2, 8)
    with torch.no_grad():
        before = model(torch.tensor(ids["input_ids"])).logits
    found = measure(subject_of(model), model, {"a": ids}, StrategyOptions(batch_size=2))
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(ids["input_ids"])).logits, before)
    experts = [each for each in found.replacements if each.part == "experts"]
    assert len(experts) == 2 * (len(moe_layers(model)) - 1)
    assert all(torch.isfinite(torch.tensor(each.loss_increase.value)) for each in found.replacements)
    assert any(each.loss_increase.value != 0 for each in experts)
    assert {each.part for each in found.replacements} >= {"experts", "router"}
    assert found.plans


def test_linear_cka_is_blind_to_rotation_and_scale():
    x, rotation = torch.randn(50, 6), torch.linalg.qr(torch.randn(6, 6))[0]
    cka = metrics.linear_cka([x, 3 * x @ rotation + 1, torch.randn(50, 4)])
    assert cka.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert float(cka[0, 1]) == pytest.approx(1, abs=1e-5)
    assert float(cka[0, 2]) < 0.5


def test_best_match_finds_a_permutation():
    x, order = torch.randn(6, 5, 3), torch.randperm(6)
    y = torch.empty_like(x)
    y[order] = 2 * x
    match, similarity = metrics.best_match(x, y)
    assert match.tolist() == order.tolist()
    assert similarity == pytest.approx(1, abs=1e-6)

"""Active experts and routing stability against numbers made by hand from the same choices."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from families import tiny_config
from test_audit_records import BLOCKS, SIZE, blocks, choices_by_hand, shared_rows, soft, tied
from transformers import AutoModelForCausalLM

from transformers_tiedmoe.audit import active, stability
from transformers_tiedmoe.audit.records import most_frequent, record
from transformers_tiedmoe.audit.routing import layer_experts
from transformers_tiedmoe.audit.subject import layers_of


def texts():
    """Two texts that differ: the second holds few tokens."""
    few = blocks().map(lambda row: {"input_ids": [each % 7 + 3 for each in row["input_ids"]]})
    return {"all": blocks(), "few": few}


@pytest.fixture(scope="module", params=[tied, shared_rows, soft], ids=lambda make: make.__name__)
def measured(request):
    torch.manual_seed(0)
    model = request.param()
    frequent = most_frequent(texts().values())
    records = {name: record(model, text, batch_size=2, frequent=frequent) for name, text in texts().items()}
    flops = active.count_flops(model, torch.tensor(blocks()[:1]["input_ids"]))
    return (
        active.measure(records, flops, active.expert_flops(model), active.soft_masses(model)),
        stability.measure(layers_of(model), records, num_gpus=2),
        {name: choices_by_hand(model, text) for name, text in texts().items()},
        model,
        flops,
    )


def test_active_experts_are_those_of_the_choices(measured):
    found, _, by_hand, model, flops = measured
    layers = sorted(by_hand["all"])
    used = {name: np.array([[len(slots) for slots, _ in each[layer]] for layer in layers])
            for name, each in by_hand.items()}  # fmt: skip
    assert found.is_adaptive is (model.config.routing == "softmoe")
    assert found.is_adaptive is any(len(set(row)) > 1 for each in used.values() for row in each)
    for name, numbers in used.items():
        same(found.per_token[name], numbers.sum(0))
        cost = [2 * 3 * 32 * 24] * len(layers)  # gate, up and down of one expert
        assert found.flops_per_token[name] == pytest.approx(flops + (numbers.mean(1) * cost).sum())
    together = np.concatenate(list(used.values()), axis=1)
    for place, layer in enumerate(found.layers):
        assert layer.layer == layers[place]
        for name, numbers in used.items():
            same(layer.by_domain[name], numbers[place])
        assert layer.histogram == np.bincount(together[place]).tolist()
        positions = together[place].reshape(-1, SIZE)
        assert found.position_bins == [0, 1, 2, 4, 8]
        expected = [positions[:, start:end].mean() for start, end in ((0, 1), (1, 2), (2, 4), (4, 8), (8, SIZE))]
        assert layer.by_position == pytest.approx(expected)
    shifts = []
    for first, second in zip(used["all"], used["few"]):
        shares = [np.bincount(each, minlength=5) / len(each) for each in (first, second)]
        shifts.append(abs(shares[0] - shares[1]).sum() / 2)
    assert found.domain_shift == {"all|few": pytest.approx(np.mean(shifts))}


def same(found, numbers):
    ordered = sorted(numbers)
    at = {share: ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 0.99)}
    expected = (numbers.mean(), at[0.5], at[0.95], at[0.99], max(ordered))
    assert (found.mean, found.p50, found.p95, found.p99, found.max) == pytest.approx(expected)


def test_soft_mass_and_realised_count_are_apart(measured):
    found, _, _, model, _ = measured
    masses = [each.soft_mass for each in found.layers]
    if model.config.routing == "softmoe":
        assert masses == [1.5] * 6  # a budget of 9 in six layers
        assert any(each.by_domain["all"].mean != 1.5 for each in found.layers)
    else:
        assert masses == [None] * 6


def test_stability_is_that_of_the_choices(measured):
    _, found, by_hand, _, _ = measured
    for layer in found.layers:
        counts = {
            name: np.bincount([slot for slots, _ in each[layer.layer] for slot, _ in slots], minlength=4)
            for name, each in by_hand.items()
        }
        total = sum(counts.values())
        assert layer.num_experts == len(total)
        assert layer.load_cv.value == pytest.approx(total.std() / total.mean())
        assert layer.load_max_over_mean.value == pytest.approx(total.max() / total.mean())
        assert layer.choice_entropy.value == pytest.approx(entropy(total) / math.log(len(total)))
        scores = np.array([scores.numpy() for each in by_hand.values() for _, scores in each[layer.layer]])
        assert layer.token_entropy.value == pytest.approx(
            np.mean([entropy(each) for each in scores]) / math.log(len(total)), rel=1e-5
        )
        assert layer.num_dead == (total == 0).sum()
        halves = [total[:2].sum(), total[2:].sum()]
        assert layer.gpu_balance.value == pytest.approx(np.mean(halves) / max(halves))
        ids = [token for text in texts().values() for row in text["input_ids"] for token in row]
        chosen = [slots for each in by_hand.values() for slots, _ in each[layer.layer]]
        joint = np.zeros((100, len(total)))
        for token, slots in zip(ids, chosen):
            for slot, _ in slots:
                joint[token, slot] += 1
        information = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
        assert layer.token_specialisation == pytest.approx(information)
        pairs = [({slot for slot, _ in slots}) for slots in chosen]
        together = {
            (a, b): sum(a in each and b in each for each in pairs) / max(1, sum(a in each for each in pairs))
            for a in range(len(total))
            for b in range(len(total))
            if a != b
        }
        for a, b, share in layer.co_active:
            assert share == pytest.approx(together[a, b])
        assert [share for *_, share in layer.co_active] == sorted(filter(None, together.values()), reverse=True)[:10]
        shares = [each / each.sum() for each in counts.values()]
        mixed = entropy(sum(shares)) - (entropy(shares[0]) + entropy(shares[1])) / 2
        assert layer.specialisation.value == pytest.approx(mixed)
        assert layer.drift["all|few"].value == pytest.approx(mixed)
        assert layer.drift["all|few"].low <= mixed <= layer.drift["all|few"].high
        assert layer.source_agreement is None
        for share, name in zip(shares, counts):
            assert layer.loads[name] == pytest.approx(share.tolist())


def entropy(weights):
    shares = weights[weights > 0] / weights.sum()
    return float(-(shares * np.log(shares)).sum())


def test_agreement_and_flows_are_those_of_the_choices(measured):
    _, found, by_hand, model, _ = measured
    rows_of = {}
    for layer, module in layer_experts(model).items():
        slot_map = getattr(module, "slot_map", None)
        rows_of[layer] = (lambda slot: slot) if slot_map is None else (lambda slot, m=slot_map: int(m[slot]))
    assert [(each.pool, each.layers) for each in found.agreement] == [(0, (1, 2)), (1, (3, 4))]
    for each in found.agreement:
        first, second = each.layers
        pairs = [
            ([rows_of[first](slot) for slot, _ in ours], [rows_of[second](slot) for slot, _ in theirs])
            for name in by_hand
            for (ours, _), (theirs, _) in zip(by_hand[name][first], by_hand[name][second])
        ]
        made = [row in theirs for ours, theirs in pairs for row in ours]
        assert each.agreement.value == pytest.approx(np.mean(made))
        independent = [row in theirs for (ours, _), (_, theirs) in itertools.product(pairs, pairs) for row in ours]
        assert each.by_chance == pytest.approx(np.mean(independent))
    layers = sorted(by_hand["all"])
    assert [flow.layers for flow in found.flows] == list(itertools.pairwise(layers))
    for flow in found.flows:
        assert sum(tokens for _, _, tokens in flow.flows) == 2 * BLOCKS * SIZE
        sizes = [tokens for _, _, tokens in flow.flows]
        assert sizes == sorted(sizes, reverse=True)
        joint = np.zeros((8, 8))
        for a, b, tokens in flow.flows:
            joint[a, b] = tokens
        information = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
        assert flow.mutual_information == pytest.approx(information)


def test_flops_without_experts_are_the_matrix_products():
    model = AutoModelForCausalLM.from_config(tiny_config("olmoe", num_hidden_layers=3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(3, 90, (2, 16))
    attention = 32 * 32 * 2 + 32 * 16 * 2  # query and output; key and value of two of four heads
    scores = 2 * 4 * 16 * 8  # of four heads, queries on keys and weights on values
    expected = 2 * (3 * (attention + scores + 32 * 4) + 32 * 96)  # with the router, and the head
    if " @ " in inspect.getsource(type(model.model.rotary_emb).forward):  # an older transformers: once for both rows
        expected += 2 * 4 * 16 / 32
    assert active.count_flops(model, tokens) == expected
    assert active.expert_flops(model) == dict.fromkeys(range(3), 2 * 3 * 32 * 24)
    expected_logits = model(tokens).logits
    assert model(tokens).logits.equal(expected_logits)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_flops_of_a_residual_count():
    model = tied(residual_rank=[3, 3])
    plain = 2 * 3 * 32 * 24
    rank = 2 * 3 * (2 * 24 + 32 + 24 + 32)
    assert active.expert_flops(model) == {0: plain, 1: plain + rank, 2: plain + rank, 3: plain + rank,
                                          4: plain + rank, 5: plain}  # fmt: skip


@pytest.mark.parametrize(("size", "bins"), [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 4]), (8, [0, 1, 2, 4])])
def test_position_bins(size, bins):
    assert active.position_bins(size) == bins

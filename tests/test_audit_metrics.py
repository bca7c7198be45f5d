"""Metrics against what they are by hand."""

import math
from pathlib import Path

import pytest
import torch

from transformers_tiedmoe.audit import metrics
from transformers_tiedmoe.audit.schema import described


def test_counts_leave_out_inactive_slots():
    index = torch.tensor([[0, 2], [2, 4], [1, 9]])
    assert metrics.expert_counts(index, 4).tolist() == [1, 1, 2, 0]
    assert metrics.expert_counts(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_shares_and_dead_experts():
    counts = torch.tensor([1, 0, 3, 0])
    assert metrics.load_shares(counts).tolist() == [0.25, 0.0, 0.75, 0.0]
    assert metrics.num_dead(counts) == 2


def test_agreement_counts_choices_in_any_order():
    reference = torch.tensor([[0, 1], [2, 3]])
    assert metrics.routing_agreement(reference, torch.tensor([[1, 0], [3, 5]]), 6) == 0.75
    assert metrics.routing_agreement(reference, reference, 4) == 1.0
    assert metrics.routing_agreement(reference, torch.tensor([[1], [2]]), 4) == 0.5


def test_agreement_leaves_out_inactive_slots():
    reference = torch.tensor([[0, 4], [2, 3]])
    other = torch.tensor([[4, 4], [3, 4]])
    assert metrics.routing_agreement(reference, other, 4) == pytest.approx(1 / 3)


def test_agreement_by_chance_is_that_of_shuffled_tokens():
    first, other = torch.randint(0, 8, (4000, 1)), torch.randint(0, 5, (4000, 1))
    expected = metrics.routing_agreement(first, other[torch.randperm(4000)], 8)
    counts = [metrics.expert_counts(each, 8) for each in (first, other)]
    assert metrics.agreement_by_chance(*counts, 4000) == pytest.approx(expected, abs=0.02)


def test_load_metrics_by_hand():
    counts = torch.tensor([[2, 2, 2, 2], [0, 0, 8, 0], [1, 3, 1, 3]])
    assert metrics.load_cv(counts).tolist() == pytest.approx([0, 3**0.5, 0.5])
    assert metrics.load_max_over_mean(counts).tolist() == [1, 4, 1.5]
    entropies = [1, 0, -(2 * 0.125 * math.log(0.125) + 2 * 0.375 * math.log(0.375)) / math.log(4)]
    assert metrics.choice_entropy(counts).tolist() == pytest.approx(entropies)


def test_gpu_balance_by_hand():
    assert metrics.gpu_balance(torch.tensor([[1, 3, 2, 2], [8, 0, 0, 0]]), 2).tolist() == [1, 0.5]


def test_co_activation_by_hand():
    together = torch.tensor([[4, 2, 0], [2, 2, 0], [0, 0, 0]])
    assert metrics.co_activation(together).tolist() == [[0, 0.5, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "top_k", "expected"),
    [
        ([1, 1, 1, 1], 2, False),
        ([3, 3, 1, 1], 2, True),  # 0.75 is the even half and half of the rest
        ([3, 2, 2, 1], 2, False),
        ([9, 0, 0, 0, 0, 0, 0, 9], 2, True),
        ([5, 5], 2, False),  # every token takes every expert
    ],
)
def test_collapse(counts, top_k, expected):
    assert metrics.is_collapsed(torch.tensor(counts), top_k) is expected


def test_mutual_information_of_independent_and_of_equal_variables():
    assert float(metrics.mutual_information(torch.outer(torch.tensor([1, 2]), torch.tensor([3, 4, 5])))) < 1e-12
    assert float(metrics.mutual_information(torch.eye(3))) == pytest.approx(math.log(3))


def test_divergences_by_hand():
    apart, alike = torch.tensor([[4, 0], [0, 9]]), torch.tensor([[1, 3], [2, 6]])
    assert float(metrics.jensen_shannon(*apart)) == pytest.approx(math.log(2))
    assert float(metrics.jensen_shannon(*alike)) == pytest.approx(0, abs=1e-12)
    p, q = torch.tensor([0.1, 0.9]).double(), torch.tensor([0.6, 0.4]).double()
    middle = (p + q) / 2
    expected = (p * (p / middle).log()).sum() / 2 + (q * (q / middle).log()).sum() / 2
    assert float(metrics.jensen_shannon(p * 10, q * 1000)) == pytest.approx(float(expected))
    assert float(metrics.total_variation(p * 10, q * 1000)) == pytest.approx(0.5)


def test_specialisation_does_not_depend_on_how_much_of_a_domain_there_is():
    counts = torch.tensor([[5, 5, 0], [0, 50, 50], [1, 1, 1]])
    expected = metrics.specialisation(counts * torch.tensor([[7], [1], [100]]))
    assert float(metrics.specialisation(counts)) == pytest.approx(float(expected))


def test_quantiles_of_a_histogram_are_those_of_the_numbers():
    numbers = torch.randint(0, 9, (1001,))
    histogram = torch.bincount(numbers)
    assert metrics.histogram_mean(histogram) == pytest.approx(float(numbers.double().mean()))
    for percent in (50, 95, 99):
        ordered = numbers.sort().values
        assert metrics.histogram_quantile(histogram, percent) == ordered[math.ceil(percent * 1001 / 100) - 1]


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(50), 50.0), (1000.0, math.inf)])
def test_perplexity(loss, expected):
    assert metrics.perplexity(loss) == pytest.approx(expected)


def test_the_docs_say_what_the_schema_says():
    page = (Path(__file__).parents[1] / "docs/audit.md").read_text()
    assert page.endswith(described())

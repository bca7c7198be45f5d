"""Metrics against what they are by hand."""

import math

import pytest
import torch

from transformers_tiedmoe.audit import metrics


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
    assert metrics.routing_agreement(reference, torch.tensor([[1, 0], [3, 5]])) == 0.75
    assert metrics.routing_agreement(reference, reference) == 1.0
    assert metrics.routing_agreement(reference, torch.tensor([[1], [2]])) == 0.5


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (math.log(50), 50.0), (1000.0, math.inf)])
def test_perplexity(loss, expected):
    assert metrics.perplexity(loss) == pytest.approx(expected)

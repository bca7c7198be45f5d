"""Bootstrap intervals against draws made by hand, and against what is known of them."""

import pytest
import torch

from transformers_tiedmoe.audit import metrics
from transformers_tiedmoe.audit.bootstrap import interval


def test_interval_of_a_mean_is_that_of_the_normal_approximation():
    sums, tokens = torch.randn(400, dtype=torch.float64) * 3 + 50, torch.full((400,), 10)
    found = interval(sums, tokens)
    error = float(sums.std() / 10) / 400**0.5
    assert found.value == pytest.approx(float(sums.sum() / 4000))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found == interval(sums.numpy(), tokens.numpy())  # the same draws again
    assert found != interval(sums, tokens, seed=1)


def test_interval_equals_draws_made_one_by_one():
    counts = torch.randint(0, 9, (7, 5))
    found = interval(counts, statistic=metrics.load_cv, seed=3)
    draws = torch.randint(7, (1000, 7), generator=torch.Generator().manual_seed(3))
    cv = torch.stack([metrics.load_cv(counts[chosen].sum(0)) for chosen in draws])
    expected = cv.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [found.low, found.high] == pytest.approx(expected)
    assert found.value == pytest.approx(float(metrics.load_cv(counts.sum(0))))


def test_strata_keep_their_sizes():
    is_first = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2)
    found = interval(is_first, statistic=lambda sums: sums[:, 0] / sums[:, 1], strata=[0, 0, 0, 1, 1])
    assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)


def test_a_single_block_has_no_interval():
    found = interval([5.0], [2])
    assert (found.value, found.low, found.high) == (2.5, None, None)
    assert interval([5.0, 6.0], [2, 2], strata=[0, 1]).low is None


def test_the_interval_holds_the_value():
    """Entropy is lower in every draw that misses a block when each block has an expert of its own."""
    found = interval(torch.eye(6), statistic=metrics.choice_entropy)
    assert found.high == found.value == pytest.approx(1)
    assert found.low < 1

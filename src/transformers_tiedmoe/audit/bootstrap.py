"""Bootstrap intervals over blocks of text: how much a figure would differ on other text of the same kind.

Tokens of one block depend on each other, so whole blocks are drawn, with replacement. Every figure of the audit is a
function of sums over blocks: a draw is a weighting of the blocks, and all draws are one matrix product.
"""

from collections.abc import Callable
from typing import Any

import torch

from .schema import Interval

NUM_DRAWS = 1000
COVERAGE = 0.95


def ratio(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return sums over weights: a mean per token, where values are sums and weights are tokens."""
    return values / weights


def interval(
    values_per_block: Any,
    weights: Any = None,
    statistic: Callable[..., torch.Tensor] = ratio,
    seed: int = 0,
    strata: Any = None,
) -> Interval:
    """Return a statistic of sums over blocks with its percentile interval (Efron and Tibshirani 1993, chapter 13).

    Example:
        >>> loss = interval(summed_losses, tokens)  # [B] each: the mean loss of a token
        >>> cv = interval(counts, statistic=metrics.load_cv)  # [B, E]

    Args:
        values_per_block: sums over a block's tokens, `[B, ...]`, as numpy or torch has them.
        weights: the block's tokens, or whatever `statistic` divides by, `[B]`; None if it takes values alone.
        statistic: gets the sums of the drawn blocks, float64 `[N, ...]`, and with `weights` theirs, `[N]`; gives
            `[N]`.
        seed: of the draws.
        strata: the stratum (domain) of each block, ints `[B]`: as many blocks are drawn of each as it has.

    Returns:
        The statistic of all blocks, with the interval, which is null if every stratum has one block. It is widened to
        hold the value: of few blocks the draws of an entropy or of a coefficient of variation are biased.
    """
    values = torch.as_tensor(values_per_block).double()
    sums = [values, *([] if weights is None else [torch.as_tensor(weights).double()])]
    strata = torch.zeros(len(values), dtype=torch.int64) if strata is None else torch.as_tensor(strata)
    value = float(statistic(*(each.sum(0, keepdim=True) for each in sums)))
    draws = _draws(strata, seed)
    if draws is None:
        return Interval(value=value)
    drawn = statistic(*((draws @ each.flatten(1 if each.dim() > 1 else 0)).reshape(NUM_DRAWS, *each.shape[1:])
                        for each in sums))  # fmt: skip
    tail = (1 - COVERAGE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(value=value, low=min(low, value), high=max(high, value))


def _draws(strata: torch.Tensor, seed: int) -> torch.Tensor | None:
    """Return how often each block is in each draw, float64 `[N, B]`; None if nothing can be drawn."""
    draws = torch.zeros(NUM_DRAWS, len(strata), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    sizes = []
    for stratum in strata.unique().tolist():
        blocks = (strata == stratum).nonzero().flatten()
        sizes.append(len(blocks))
        drawn = blocks[torch.randint(len(blocks), (NUM_DRAWS, len(blocks)), generator=generator)]
        draws.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return draws if max(sizes) > 1 else None

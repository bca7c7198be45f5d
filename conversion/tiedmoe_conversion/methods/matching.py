"""Matches the experts of two layers, and the neurons of two experts, by what they compute.

Both are assignment problems (Hungarian algorithm, as in weight matching, arXiv 2209.04836, Section 3). Experts are
compared by what they compute, which does not depend on how their neurons are numbered; neurons by what they add to the
output.
"""

import torch
from scipy.optimize import linear_sum_assignment

from ..layout.neurons import ExpertFunction, Experts
from .base import Sizes

TOKENS_AT_A_TIME = 128  # of all experts at once


def matching_bytes(sizes: Sizes, num_tokens: int) -> int:
    """Return the bytes that matching holds on that many tokens, scipy's copy of the matrix included."""
    of_experts = TOKENS_AT_A_TIME * sizes.num_experts * (16 * sizes.width + 24 * sizes.hidden_size)
    return max(of_experts, 24 * sizes.width**2 + num_tokens * (24 * sizes.width + 4 * sizes.hidden_size))


def match_experts(
    function: ExpertFunction,
    experts: Experts,
    reference: Experts,
    hidden_states: torch.Tensor,
    sizes: torch.Tensor,
    reference_sizes: torch.Tensor,
) -> torch.Tensor:
    """Match each of `experts [E]` with the one of `reference [E]` to merge it with: int64 `[E]`, a permutation.

    It has the least sum over pairs of a_s b_r / (a_s + b_r) * sum_x |E_s(x) - R_r(x)|^2: what it costs to put the
    mean, weighted by the `sizes` a and b `[E]`, in place of the two (Ward 1963). Much used experts are merged with
    idle ones rather than with each other.
    """
    distances = torch.zeros(len(experts), len(reference), dtype=torch.float64)
    for part in hidden_states.split(TOKENS_AT_A_TIME):
        own, other = (function.outputs(each, part).flatten(1).double() for each in (experts, reference))
        distances += own.square().sum(1)[:, None] + other.square().sum(1) - 2 * own @ other.T
    a, b = sizes.double()[:, None], reference_sizes.double()
    return _assign(-distances * a * b / (a + b))


def match_neurons(
    function: ExpertFunction,
    expert: Experts,
    reference: Experts,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
) -> Experts:
    """Return `expert` with its neurons in the order of those of `reference` that they resemble.

    What it computes stays the same. Neuron i adds f_i(x) d_i to the output. Two are alike by the inner product of what
    they add, sum_x w^2 f_i(x) f_j(x) * d_i . d_j, and by that of their weights, each in units of its own mean size.
    Where a neuron may change its sign (`can_flip`), neither depends on it, and the sign that brings the weights nearer
    is taken afterwards.

    Args:
        expert, reference: `[1, ...]` each.
        hidden_states, weights: tokens `[n, H]` and their routing weights `[n]`; n may be 0.
    """
    by_weights = _alike(reference, expert, function.can_flip)
    if len(weights):
        features = [function.features(each, hidden_states)[0] * weights[:, None] for each in (reference, expert)]
        by_effect = (features[0].T @ features[1]) * (reference.down[0].T @ expert.down[0])
        by_weights = _in_units(by_weights) + _in_units(by_effect)
    expert = expert.renumbered(torch.argsort(_assign(by_weights.T))[None])
    if function.can_flip:
        agreement = (reference.down * expert.down).sum(1) + (reference.up[:, :, -1] * expert.up[:, :, -1]).sum(-1)
        expert = expert.flipped(torch.where(agreement < 0, -1.0, 1.0))
    return expert


def _alike(reference: Experts, expert: Experts, any_sign: bool) -> torch.Tensor:
    """Return inner products of all weights of two experts' neurons, `[I, I]`; by size for those that may flip."""
    *fixed, last = (reference.up[0, :, place] @ expert.up[0, :, place].T for place in range(reference.up.shape[2]))
    free = last + reference.down[0].T @ expert.down[0]
    return sum(fixed, free.abs() if any_sign else free)


def _in_units(similarity: torch.Tensor) -> torch.Tensor:
    return similarity / similarity.abs().mean().clamp(min=torch.finfo(similarity.dtype).tiny)


def _assign(similarity: torch.Tensor) -> torch.Tensor:
    """Assign a column to each row, with the greatest sum."""
    return torch.from_numpy(linear_sum_assignment(similarity.double().numpy(), maximize=True)[1])

"""One definition of each metric: its formula, its unit, its source. Conversion, callbacks, demo and audit use these.

Shapes: T tokens, K experts per token, E experts that a router (or a pool) has. Indices of E or more are inactive
slots.
"""

import math

import torch


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean cross-entropy in nats per token; infinity if it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def expert_counts(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how many tokens chose each expert.

    Args:
        top_k_index: int64 `[..., K]`.
        num_experts: E.

    Returns:
        int64 `[E]`, on the device of `top_k_index`.
    """
    return torch.bincount(top_k_index[top_k_index < num_experts].flatten(), minlength=num_experts)


def load_shares(counts: torch.Tensor) -> torch.Tensor:
    """Return each expert's share of the choices, `[E]` float, summing to 1; NaN if nothing was chosen."""
    return counts / counts.sum()


def num_dead(counts: torch.Tensor) -> int:
    """Return how many experts no token chose."""
    return int((counts == 0).sum())


def routing_agreement(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the share of the choices in `reference` that `other` made for the same token, in any order: 1 if all.

    Args:
        reference: int64 `[T, K]`.
        other: int64 `[T, K']` of the same tokens.
    """
    return float((reference[:, :, None] == other[:, None, :]).any(-1).double().mean())

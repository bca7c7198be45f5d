"""How many experts each layer may use: one budget for the whole model, for which layers compete.

SoftMoE (arXiv 2606.17952) bounds the layers' mean numbers of active experts by `sum_l k_l <= B`. How it writes the k_l
is not public to us; this is our design: a soft top-k over layers, so that the sum is the budget at every step, and
every layer keeps at least one expert and at most the cap, without a penalty.
"""

import torch

from .lapsum import soft_top_k


def layer_budgets(theta: torch.Tensor, budget: float, cap: float, alpha: float = 1.0) -> torch.Tensor:
    """Return every layer's number of active experts, `k [L]`, with `1 <= k_l <= cap` and `k.sum() == budget`.

    `k_l = 1 + (cap - 1) p_l` with p the soft top-k of `theta` of mass `(budget - L) / (cap - 1)`. Equal numbers give
    every layer the same share. Differentiable in `theta`.

    Args:
        theta: `[L]`, the layers' free numbers: what is learned.
        budget: the sum over layers, from L to `L * cap`.
        cap: the most experts that a layer may use, above 1: at most the number of its experts, E.
        alpha: the temperature of the competition between layers, above 0.

    Returns:
        `[L]`, in float32 or the float64 of `theta`.

    Raises:
        ValueError: a cap of 1 or below, or a budget that the layers cannot have.
    """
    num_layers = len(theta)
    if not cap > 1:
        raise ValueError(f"cap={cap}; expected more than 1 expert a layer, or there is nothing to share out")
    if not num_layers <= budget <= num_layers * cap:
        raise ValueError(
            f"budget={budget} for {num_layers} layers; expected {num_layers}, one expert each, to "
            f"{num_layers * cap:g}, {cap:g} each"
        )
    mass = (budget - num_layers) / (cap - 1)
    if mass == 0 or mass == num_layers:  # nothing is left to compete for
        return torch.full_like(theta, 1.0 if mass == 0 else cap) + 0.0 * theta
    return 1 + (cap - 1) * soft_top_k(theta, mass, alpha)

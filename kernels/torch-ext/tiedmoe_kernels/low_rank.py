"""The low-rank residual of a tied layer: slot s of its router adds `b[s] @ a[s]` to the matrices of its pool row.

The layer's rows are sorted by pool row and, within one, by slot: so the products with the pool and its deferred
gradient see what they see without a residual, and the products with the factors are grouped ones over the same rows. A
backend brings the two kinds of product, this file says which are made.

Shape suffixes as in `spec.py`; R slots of the layer's router, r the rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .deferred import readable


class Residual(NamedTuple):
    """One layer's factors, each stored as the projections are: `[R, out, in]`, or `[R, in, out]` if transposed.

    Slots are numbered in the order of the pool rows that they read.
    """

    gate_up_to_rank: Tensor  # H -> r
    gate_up_from_rank: Tensor  # r -> 2I
    down_to_rank: Tensor  # I -> r
    down_from_rank: Tensor  # r -> H
    first_slot: Tensor | None = None  # [E+1] int64, each pool row's first slot; None where slot s reads pool row s


def offsets_of_pool(offsets: Tensor, residual: Residual | None) -> Tensor:
    """Return where each pool row's sorted rows begin, `[E + 1]`, of where each slot's do, `[R + 1]`."""
    if residual is None or residual.first_slot is None:
        return offsets
    return offsets[residual.first_slot]


def ordered_by_pool_row(
    factors: tuple[Tensor, Tensor, Tensor, Tensor],
    slot_map: Tensor | None,
    num_experts: int,
    is_transposed: bool,
    dtype: torch.dtype,
) -> tuple[Residual, Tensor | None]:
    """Return the residual of the factors (b, a) of gate_up and of down, and each router index's slot.

    Args:
        factors: `[R, rows, r]`, `[R, r, columns]` of gate_up, then of down, differentiable.
        slot_map: `[R]` int64 pool rows, or None for the identity.
        num_experts: E.
        is_transposed: the projections are stored `[E, in, out]`.
        dtype: the compute dtype.

    Returns:
        The residual, and `[R]` int64 slots, R where an index reads no row of the pool; None for the identity.
    """
    slot_of_index = first_slot = None
    b_up, a_up, b_down, a_down = factors
    if slot_map is not None:
        R = slot_map.numel()
        by_row = slot_map.argsort(stable=True)
        b_up, a_up, b_down, a_down = (factor[by_row] for factor in factors)
        rows_of_pool = torch.arange(num_experts + 1, device=slot_map.device)
        first_slot = torch.searchsorted(slot_map[by_row], rows_of_pool)
        slot_of_index = by_row.argsort().masked_fill((slot_map < 0) | (slot_map >= num_experts), R)
    b_up, a_up, b_down, a_down = (readable(factor.to(dtype)) for factor in (b_up, a_up, b_down, a_down))
    ordered = (b_up, a_up, b_down, a_down) if is_transposed else (a_up, b_up, a_down, b_down)
    return Residual(*ordered, first_slot), slot_of_index


class LowRank:
    """What one projection's residual adds to the products with the projection: None where there is no residual.

    Args:
        factors: to_rank and from_rank, or None.
        is_transposed: how they are stored.
        product: of (rows, factor, whether the contraction is the factor's last dimension, whether the rows are tokens'
            and to be gathered) makes the rows times each one's factor.
        weight_grad: of (inputs, output gradients, whether the inputs are tokens', whether the gradients are) makes the
            gradient of a factor.
    """

    def __init__(
        self,
        factors: tuple[Tensor, Tensor] | None,
        is_transposed: bool,
        product: Callable[[Tensor, Tensor, bool, bool], Tensor],
        weight_grad: Callable[[Tensor, Tensor, bool, bool], Tensor],
    ):
        self.factors, self.is_transposed = factors, is_transposed
        self.product, self.weight_grad = product, weight_grad

    def added(self, x: Tensor, by_token: bool = False) -> Tensor | None:
        """Return what is added to the output of x, `[N, out]`."""
        if self.factors is None:
            return None
        to_rank, from_rank = self.factors
        in_rank = self.product(x, to_rank, not self.is_transposed, by_token)
        return self.product(in_rank, from_rank, not self.is_transposed, False)

    def added_to_grad(self, grad: Tensor, by_token: bool = False) -> Tensor | None:
        """Return what is added to the gradient of x, `[N, in]`, and keep the output's gradient in the rank."""
        if self.factors is None:
            return None
        to_rank, from_rank = self.factors
        self.grad_in_rank = self.product(grad, from_rank, self.is_transposed, by_token)
        return self.product(self.grad_in_rank, to_rank, self.is_transposed, False)

    def gradients(
        self, x: Tensor, grad: Tensor, x_by_token: bool = False, grad_by_token: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of to_rank and from_rank; `added_to_grad` comes first."""
        assert self.factors is not None
        in_rank = self.product(x, self.factors[0], not self.is_transposed, x_by_token)
        return (
            self.weight_grad(x, self.grad_in_rank, x_by_token, False),
            self.weight_grad(in_rank, grad, False, grad_by_token),
        )

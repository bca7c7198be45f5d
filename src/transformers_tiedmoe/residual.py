"""The low-rank residual of a tied layer: what it adds to its pool's weights, `W[slot] + b[slot] @ a[slot]`.

The idea is LoRA's (arXiv 2106.09685, section 4.1), here one pair of factors for every slot of a layer's router.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Residual(NamedTuple):
    """One layer's factors, slot by slot.

    `router_index [T, K]` int64 are the layer's own slots and `slot_map [R]` int64 their pool rows, None for the
    identity; `factors` maps a projection's name to `(b [R, rows, r], a [R, r, columns])` in the family's own layout of
    that projection.
    """

    router_index: torch.Tensor
    slot_map: torch.Tensor | None
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]


def experts_with_residual(
    pool: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: Residual,
) -> torch.Tensor:
    """Run a pool's experts with a layer's residual in plain torch, in one loop over the slots in use.

    The pool's rows are read in place, never summed with the residual. `experts_implementation="tiedmoe"` has kernels.

    Args:
        pool: an `ExpertPool`.
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]` int64 rows of the pool.
        top_k_weights: `[T, K]`.
        residual: of the layer.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.
    """
    output = torch.zeros_like(hidden_states)
    up_name = "gate_up_proj" if pool.has_gate else "up_proj"
    num_slots = residual.factors["down_proj"][0].shape[0]
    for slot, token, k in _calls(residual.router_index, num_slots):
        row = 0 if token.is_meta else int(top_k_index[token[0], k[0]])
        state = _project(pool, up_name, hidden_states[token], row, slot, residual)
        state = pool._apply_gate(state) if pool.has_gate else pool.act_fn(state)
        state = _project(pool, "down_proj", state, row, slot, residual)
        if getattr(pool, "has_post_expert_norm", False):
            state = pool.post_expert_norm(state)
        state = state * top_k_weights[token, k, None]
        output.index_add_(0, token, state.to(output.dtype))
    return output


def _calls(router_index: torch.Tensor, num_slots: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each slot in use, its tokens and their columns; on the meta device, which holds no choices, even ones."""
    if router_index.is_meta:
        even = torch.empty(-(-router_index.numel() // num_slots), dtype=torch.int64, device="meta")
        yield from ((slot, even, even) for slot in range(num_slots))
        return
    for slot in router_index.unique().tolist():
        if slot != num_slots:  # the sentinel of an inactive slot
            yield slot, *torch.where(router_index == slot)


def _project(pool: Any, name: str, state: torch.Tensor, row: int, slot: int, residual: Residual):
    weight, (b, a) = getattr(pool, name)[row], (factor[slot] for factor in residual.factors[name])
    if pool.is_transposed:  # [in, out]
        state = state @ weight + (state @ b) @ a
    else:  # [out, in]
        state = state @ weight.T + (state @ a.T) @ b.T
    return state + getattr(pool, f"{name}_bias")[row] if pool.has_bias else state

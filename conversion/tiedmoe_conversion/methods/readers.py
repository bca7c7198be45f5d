"""Which slots read a row of a pool, and the choice between a pool and a refined one."""

from dataclasses import dataclass

import torch

from ..layout.neurons import ExpertFunction, Experts
from .base import Group, LayerExperts, Pool


@dataclass(frozen=True)
class Reader:
    """One slot of one layer, with the expert that it had in the source (float32, `[1, ...]`) and its tokens.

    Attributes:
        hidden_states, weights: tokens to fit on, `[n, H]` and `[n]`.
        held_out: the same of the held-out ones.
    """

    layer: LayerExperts
    slot: int
    expert: Experts
    hidden_states: torch.Tensor
    weights: torch.Tensor
    held_out: tuple[torch.Tensor, torch.Tensor]

    def targets(self, function: ExpertFunction) -> torch.Tensor:
        """Return what the expert gave on the tokens to fit on, `[n, H]`."""
        return function.outputs(self.expert, self.hidden_states)[0]


def slots_of_rows(group: Group, pool: Pool, num_rows: int) -> list[list[tuple[LayerExperts, int]]]:
    """Return, for each row of the pool, the layers and slots that read it."""
    slots: list[list[tuple[LayerExperts, int]]] = [[] for _ in range(num_rows)]
    for layer in group.layers:
        for slot, row in enumerate(group.slot_map(pool, layer).tolist()):
            slots[row].append((layer, slot))
    return slots


def better_pool(group: Group, name: str, start: Pool, fitted: Pool) -> Pool:
    """Return `fitted`, or `start` with a note if `fitted` does not lower the loss on held-out text."""
    if group.held_out_loss is None:
        return fitted
    before, after = group.held_out_loss(start), group.held_out_loss(fitted)
    if after < before:
        return fitted
    group.note(f"{name} was not kept: the held-out loss was {before:.4f} before it and {after:.4f} after it")
    return start

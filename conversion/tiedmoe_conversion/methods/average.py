"""`average`: the control. Experts of the same number in neighbouring layers are nearly orthogonal: it costs much."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from transformers_tiedmoe.audit.metrics import num_dead

from .base import Group, Memory, Pool, register_method

PIECE = 1 << 15  # elements; on larger pieces torch uses several threads, which wait for each other


@register_method(
    "average",
    streams=True,
    memory=Memory(float32_layers=1),
    calibration=lambda weights="uniform", **options: weights == "frequency",
)
def average(group: Group, weights: Literal["uniform", "frequency"] = "uniform") -> Pool:
    """Average the group's experts by expert number, in float32: uniform, or by routing frequency.

    By frequency, layer l's expert s counts n_ls / sum_l n_ls, where n_ls tokens of the calibration text chose it; an
    expert that no layer routed to gets the uniform mean.
    """
    uniform = torch.full((len(group.layers), group.num_experts), 1 / len(group.layers), dtype=torch.float64)
    shares = uniform
    if weights == "frequency":
        counts = torch.stack([layer.inputs().counts(group.num_experts) for layer in group.layers]).double()
        total = counts.sum(0)
        shares = torch.where(total > 0, counts / total.clamp(min=1), uniform)
        _note_unrouted(group, total)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        for first, last in group.layers[0].rows(name):
            yield _block(group, name, first, last, shares if weights == "frequency" else None)

    return Pool(blocks)


def _block(group: Group, name: str, first: int, last: int, shares: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of the experts `first` to `last` (not included)."""
    layers = [layer.read(name, first, last) for layer in group.layers]  # ours to change: every read is new memory
    for expert, rows in zip(range(first, last), zip(*layers)):
        _mean(rows, None if shares is None else shares[:, expert].tolist())
    return layers[0]


def _mean(rows: Sequence[torch.Tensor], shares: Sequence[float] | None) -> None:
    """Put the mean of one expert's `rows`, by `shares` or uniform, into the first of them.

    It works in pieces that stay in the processor's cache; a float32 copy of the whole would touch new memory.
    """
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    for pieces in zip(*(row.view(-1).split(PIECE) for row in rows)):
        total = pieces[0].to(wide)
        if shares is None:
            for piece in pieces[1:]:
                total += piece
            total /= len(rows)
        else:
            total *= shares[0]
            for share, piece in zip(shares[1:], pieces[1:]):
                total.add_(piece, alpha=share)
        pieces[0].copy_(total)


def _note_unrouted(group: Group, counts: torch.Tensor) -> None:
    unrouted = num_dead(counts)
    if unrouted:
        group.note(
            f"{unrouted} of {group.num_experts} experts have no calibration tokens in any layer: their mean is uniform"
        )

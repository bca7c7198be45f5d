"""`average`: the control. Experts with the same number in neighbouring layers are nearly orthogonal, so it costs."""

from collections.abc import Iterator
from typing import Literal

import torch

from .registry import Group, Pool, register_method


@register_method("average", float32_copies=1, calibration=lambda weights="uniform", **options: weights == "frequency")
def average(group: Group, weights: Literal["uniform", "frequency"] = "uniform") -> Pool:
    """The mean of the group's experts, by expert number, computed in float32: uniform, or by routing frequency.

    By frequency, layer l's expert s counts n_ls / sum_l n_ls, where n_ls tokens of the calibration text chose it; an expert
    that no layer routed to gets the uniform mean.
    """
    uniform = torch.full((len(group.layers), group.num_experts), 1 / len(group.layers), dtype=torch.float64)
    shares = uniform
    if weights == "frequency":
        counts = torch.stack([layer.inputs().counts(group.num_experts) for layer in group.layers]).double()
        total = counts.sum(0)
        shares = torch.where(total > 0, counts / total.clamp(min=1), uniform)
        _note_unrouted(group, total)

    def blocks(name: str) -> Iterator[torch.Tensor]:
        total = group.layers[0].read(name)  # ours to change: every read is new memory
        dtype = total.dtype
        total = total.to(torch.promote_types(dtype, torch.float32))
        if weights == "uniform":
            for layer in group.layers[1:]:
                total += layer.read(name)
            total.div_(len(group.layers))
        else:
            total.mul_(_column(shares[0], total))
            for share, layer in zip(shares[1:], group.layers[1:]):
                for row, own, factor in zip(total, layer.read(name), share.tolist()):
                    row.add_(own, alpha=factor)
        yield total.to(dtype)

    return Pool(blocks)


def _column(share: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return share.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _note_unrouted(group: Group, counts: torch.Tensor) -> None:
    unrouted = (counts == 0).sum().item()
    if unrouted:
        group.note(
            f"{unrouted} of {group.num_experts} experts have no calibration tokens in any layer: their mean is uniform"
        )

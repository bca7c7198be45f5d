"""`select`: the pool is one layer's experts, unchanged; the other layers of the group learn to use them."""

from collections.abc import Iterator, Sequence

import torch

from ..errors import ConversionError
from .base import Group, LayerExperts, Pool, register_method


def selected_layers(layers: Sequence[int], layer: str | int = "first") -> list[int]:
    """Return those of `layers` that are read: the one that the option `layer` names, or all of them for "best"."""
    if layer == "best":
        return list(layers)
    if layer in ("first", "last"):
        return [layers[0] if layer == "first" else layers[-1]]
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < len(layers):
        raise ConversionError(
            f"method 'select' got layer={layer!r} for a group of {len(layers)} layers {list(layers)}; "
            f"expected 'first', 'last', 'best', or a place in the group from 0 to {len(layers) - 1}"
        )
    return [layers[layer]]


@register_method(
    "select", streams=True, layers_read=selected_layers, calibration=lambda layer="first", **options: layer == "best"
)
def select(group: Group, layer: str | int = "first") -> Pool:
    """Take one layer's experts, bit for bit: the first, the last, the one at a place in the group, or the best.

    The best is the one whose pool adds least to the loss on held-out text: one evaluation for each layer.
    """
    pools = {index: _pool_of(group.layer(index)) for index in selected_layers([e.index for e in group.layers], layer)}
    if len(pools) == 1:
        return next(iter(pools.values()))
    assert group.held_out_loss is not None, "layer='best' was registered to need calibration"
    losses = {index: group.held_out_loss(pool) for index, pool in pools.items()}
    best = min(losses, key=lambda index: losses[index])
    scan = ", ".join(f"layer {index} {loss:.4f}" for index, loss in losses.items())
    group.note(f"layer {best} selected, by the held-out loss: {scan}")
    return pools[best]


def _pool_of(layer: LayerExperts) -> Pool:
    def blocks(name: str) -> Iterator[torch.Tensor]:
        for rows in layer.rows(name):
            yield layer.read(name, *rows)

    return Pool(blocks)

"""`select`: the pool is one layer's experts, unchanged; the other layers of the group learn to use them."""

from collections.abc import Iterator, Sequence

import torch

from ..errors import ConversionError
from .registry import Group, Pool, register_method


def selected_layer(layers: Sequence[int], layer: str | int = "first") -> list[int]:
    """The one layer of `layers` that the option `layer` names: "first", "last", or its place in the group from 0."""
    if layer in ("first", "last"):
        return [layers[0] if layer == "first" else layers[-1]]
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < len(layers):
        raise ConversionError(
            f"method 'select' got layer={layer!r} for a group of {len(layers)} layers {list(layers)}; "
            f"expected 'first', 'last', or a place in the group from 0 to {len(layers) - 1}"
        )
    return [layers[layer]]


@register_method("select", layers_read=selected_layer)
def select(group: Group, layer: str | int = "first") -> Pool:
    """One layer's experts, bit for bit: the group's first, its last, or the one at a place in the group."""
    chosen = group.layer(selected_layer([each.index for each in group.layers], layer)[0])

    def blocks(name: str) -> Iterator[torch.Tensor]:
        yield chosen.read(name)

    return Pool(blocks)

"""`union`: all of a group's experts in one pool, a lossless start from which a pool can be made smaller.

Layer j of a group of g reads rows j*E to (j+1)*E of a pool of P = g*E experts. The routers keep their width: masking a
router of g*E rows instead is not bitwise equal, because its softmax sums over more terms.
"""

from collections.abc import Iterator

import torch

from .base import Group, Pool, register_method


@register_method(
    "union",
    pool_num_experts=lambda num_experts, group_size: num_experts * group_size,
    slot_maps=True,
    lossless=True,
    streams=True,
)
def union(group: Group) -> Pool:
    """Keep every expert of the group, reached through a slot map: the source's logits, bit for bit; saves no byte."""

    def blocks(name: str) -> Iterator[torch.Tensor]:
        for layer in group.layers:
            for rows in layer.rows(name):
                yield layer.read(name, *rows)

    experts = torch.arange(group.num_experts)
    return Pool(blocks, {layer.index: j * group.num_experts + experts for j, layer in enumerate(group.layers)})

"""`average`: the control. Experts with the same number in neighbouring layers are nearly orthogonal, so it costs."""

from collections.abc import Iterator

import torch

from .registry import Group, Pool, register_method


@register_method("average", float32_copies=1)
def average(group: Group) -> Pool:
    """The uniform mean of the group's experts, by expert number, computed in float32."""

    def blocks(name: str) -> Iterator[torch.Tensor]:
        total = group.layers[0].read(name)  # ours to change: every read is new memory
        dtype = total.dtype
        total = total.to(torch.promote_types(dtype, torch.float32))
        for layer in group.layers[1:]:
            total += layer.read(name)
        yield total.div_(len(group.layers)).to(dtype)

    return Pool(blocks)

"""Widens a pool by clones of its rows, which computes the same; healing can then train the clones apart.

Not a method: it follows one that makes a pool of E experts when the recipe asks for a wider one.
"""

import torch

from .base import Group, LayerExperts, Pool
from .readers import slots_of_rows


def widen(group: Group, pool: Pool, num_experts: int) -> Pool:
    """Return a pool of `num_experts` rows, clones of `pool`'s, in which every layer computes the same bit for bit.

    The slots that read a row are shared out over its copies, neighbouring layers together; every row is read by at
    least one slot. Clones are made one by one, of the row with the most routed tokens per copy, or without calibration
    text of the row with the most slots per copy.

    Args:
        pool: of at most `num_experts` experts; rows that no slot reads are left out.
        num_experts: at most the group's g*E slots.
    """
    num_slots, width = len(group.layers) * group.num_experts, len(pool.read("down_proj"))
    assert width <= num_experts <= num_slots, (
        f"a pool of {width} cannot be made {num_experts} wide for {num_slots} slots"
    )
    slots = slots_of_rows(group, pool, width)
    load = [sum(_load(group, layer, slot) for layer, slot in readers) for readers in slots]
    copies = [min(1, len(readers)) for readers in slots]
    if copies.count(0):
        group.note(f"{copies.count(0)} of {width} pool rows were read by no slot and are left out")
    while sum(copies) < num_experts:
        free = [row for row in range(width) if 0 < copies[row] < len(slots[row])]
        copies[max(free, key=lambda row: load[row] / copies[row])] += 1
    origin = [row for row in range(width) if copies[row]]  # then the clones, so that these keep their numbers
    slot_maps = {layer.index: torch.empty(group.num_experts, dtype=torch.int64) for layer in group.layers}
    for row, readers in enumerate(slots):
        new_rows = [origin.index(row)] if copies[row] else []
        for _ in range(copies[row] - 1):
            new_rows.append(len(origin))
            origin.append(row)
        for place, (layer, slot) in enumerate(readers):
            slot_maps[layer.index][slot] = new_rows[place * copies[row] // len(readers)]
    return Pool(lambda name: iter([pool.read(name)[origin]]), slot_maps)


def _load(group: Group, layer: LayerExperts, slot: int) -> float:
    if group.held_out_loss is None:  # there is no calibration text
        return 1.0
    inputs = layer.inputs()
    return 1e-3 + (inputs.top_k_index[: inputs.num_fit] == slot).sum().item()

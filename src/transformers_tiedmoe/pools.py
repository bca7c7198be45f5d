"""Expert Tying in one file: which layer reads which pool, through which slot map.

An untied MoE keeps one set of experts per layer. Expert Tying ("Tying the Loop", arXiv 2606.16825) lets `group_size`
consecutive MoE layers read ONE pool of experts; attention, norms and the router stay per layer. With 8 MoE layers,
`group_size=2`, `skip_first=2`, `skip_last=2`:

    layer     0     1     2     3     4     5     6     7
    router   r0    r1    r2    r3    r4    r5    r6    r7       one each (but see `tied_components`)
    experts  E0    E1    └ pool 0 ┘  └ pool 1 ┘  E6    E7       8 sets of experts become 6
             skip_first   groups [[2, 3], [4, 5]]  skip_last

A layer reaches its pool through a slot map, `pool_index = slot_map[router_index]`. The identity is the paper's tying;
a pool of all the group's experts, where layer j of the group reads rows j*E..(j+1)*E, is the untied model again.
"""

from collections.abc import Sequence
from reprlib import repr as short_repr

from .errors import TiedMoeError


def tie_groups(
    moe_layers: Sequence[int], group_size: int = 2, skip_first: int = 2, skip_last: int = 2
) -> list[list[int]]:
    """Cut a model's MoE layers into groups of consecutive layers that read one pool (arXiv 2606.16825, Section 4).

    Args:
        moe_layers: indices of the layers that have experts, ascending. Dense layers are left out: layers are
            consecutive when they are neighbours in this sequence.
        group_size: layers per group, the paper's g. The last group is shorter where the layers do not divide evenly.
        skip_first, skip_last: MoE layers left untied at either end.

    Returns:
        One list of layer indices per group; group p reads pool p. Empty if no layer is left to tie.

    Example:
        >>> tie_groups(range(9), group_size=2, skip_first=2, skip_last=2)
        [[2, 3], [4, 5], [6]]
    """
    for name, value, least in (
        ("group_size", group_size, 1),
        ("skip_first", skip_first, 0),
        ("skip_last", skip_last, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TiedMoeError(f"{name}={short_repr(value)}; expected an integer of at least {least}")
    tied = list(moe_layers)[skip_first : len(moe_layers) - skip_last]
    return [tied[start : start + group_size] for start in range(0, len(tied), group_size)]


def check_groups(groups: Sequence[Sequence[int]], moe_layers: Sequence[int], num_hidden_layers: int) -> None:
    """Raise `TiedMoeError` unless `groups` are disjoint runs of neighbouring MoE layers, in order."""
    position = {layer: index for index, layer in enumerate(moe_layers)}
    owner: dict[int, int] = {}
    for p, group in enumerate(groups):
        if isinstance(group, (str, bytes)) or not isinstance(group, Sequence) or len(group) == 0:
            raise TiedMoeError(
                f"group {p} is {short_repr(group)}; expected a non-empty list of layer indices, e.g. [2, 3]"
            )
        for layer in group:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_hidden_layers:
                raise TiedMoeError(
                    f"group {p} names layer {short_repr(layer)}; expected an integer from 0 to {num_hidden_layers - 1}"
                )
            if layer not in position:
                raise TiedMoeError(
                    f"group {p} names layer {layer}, which is dense; only MoE layers can be tied: {list(moe_layers)}"
                )
            if layer in owner:
                raise TiedMoeError(
                    f"layer {layer} is in group {owner[layer]} and in group {p}; a layer reads one pool: "
                    "remove it from one of them"
                )
            owner[layer] = p
        positions = [position[layer] for layer in group]
        if positions != list(range(positions[0], positions[0] + len(positions))):
            run = [moe_layers[i] for i in range(min(positions), max(positions) + 1)]
            raise TiedMoeError(
                f"group {p} is {short_repr(list(group))}, which skips or reorders MoE layers; a group is a run of "
                f"consecutive MoE layers such as {run}"
            )


def default_slot_map(position: int, num_slots: int, pool_size: int) -> list[int]:
    """Return the initial slot map of a layer in its group; a conversion may choose another.

    Args:
        position: the layer's place in its group, from 0.
        num_slots: experts that the layer's router knows, E.
        pool_size: experts in the pool, P.

    Returns:
        `[E]` pool indices. Layer j starts at row j*E and wraps around, so that P = group_size * E gives every layer
        its own experts (a union pool) and P = E gives the identity.
    """
    return [(position * num_slots + slot) % pool_size for slot in range(num_slots)]

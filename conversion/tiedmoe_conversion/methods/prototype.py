"""`prototype`: keep some of the group's experts bit for bit; every slot reads the kept one that hurts it least."""

from collections.abc import Iterator

import torch

from .base import Group, Memory, Pool, Sizes, register_method
from .union import union

TOKENS_AT_A_TIME = 64  # of all experts of a layer at once
UNROUTED_TOKENS = 32  # of a layer, that stand for those of a slot without any
UNROUTED_WEIGHT = 1e-3  # routing weight of theirs: too little to decide which experts are kept, enough to map the slot


def _scratch_bytes(sizes: Sizes, tokens_per_expert: int) -> int:
    """Return the scratch memory: the slots' tokens and outputs, a batch of all experts' outputs, and the costs."""
    slots = sizes.num_layers * sizes.num_experts
    at_a_time = TOKENS_AT_A_TIME * sizes.num_experts * (16 * sizes.width + 12 * sizes.hidden_size)
    tokens = max(min(tokens_per_expert, sizes.num_tokens), UNROUTED_TOKENS)
    return slots * tokens * 8 * sizes.hidden_size + at_a_time + 4 * 8 * slots**2


@register_method(
    "prototype",
    any_width=True,
    slot_maps=True,
    memory=Memory(group_copies=(1, 0), scratch_bytes=_scratch_bytes),
    calibration=True,
)
def prototype(group: Group, tokens_per_expert: int = 256) -> Pool:
    """Keep P of the group's g*E experts, bit for bit; every slot reads the one that is nearest to its own expert.

    Slot p that reads expert k costs C[p, k] = sum over the tokens x that chose p of w^2 |E_k(x) - E_p(x)|^2. The P
    experts with the least sum_p min_k C[p, k] are sought by leaving out, one by one, the expert that is missed least,
    then by exchanging single ones while that helps (k-medoids, Kaufman and Rousseeuw 1990). P = g*E is `union`.

    Args:
        tokens_per_expert: calibration tokens per slot, at most.
    """
    num_slots = len(group.layers) * group.num_experts
    if group.pool_num_experts == num_slots:
        return union(group)
    costs = replacement_costs(group, tokens_per_expert)
    kept = choose(costs, group.pool_num_experts)
    rows = costs[:, kept].argmin(1)
    rows[kept] = torch.arange(len(kept))  # its own, also where another one is as good
    by_layer = kept // group.num_experts

    def blocks(name: str) -> Iterator[torch.Tensor]:
        for place in by_layer.unique().tolist():
            yield group.layers[place].read(name)[kept[by_layer == place] % group.num_experts]

    maps = rows.split(group.num_experts)
    return Pool(blocks, {layer.index: slot_map.clone() for layer, slot_map in zip(group.layers, maps)})


def replacement_costs(group: Group, tokens_per_expert: int) -> torch.Tensor:
    """Return C, float64 `[g*E, g*E]`: the cost of slot p (layer p // E) reading expert k (layer k // E)."""
    generator, num_experts = group.generator(), group.num_experts
    function, unrouted = group.family_function, 0
    states, targets, owners = [], [], []
    for place, layer in enumerate(group.layers):
        inputs, own = layer.inputs(), group.experts(layer)
        common = inputs.sample(UNROUTED_TOKENS, generator)
        for slot in range(num_experts):
            hidden_states, weights = inputs.sample_of_slot(slot, tokens_per_expert, generator)
            if not len(weights):
                hidden_states, weights = common, torch.full((len(common),), UNROUTED_WEIGHT)
                unrouted += 1
            for x, w in zip(hidden_states.split(TOKENS_AT_A_TIME), weights.split(TOKENS_AT_A_TIME)):
                states.append((x, w))
                targets.append(function.outputs(own[slot], x)[0])
                owners.append(place * num_experts + slot)
    if unrouted:
        group.note(
            f"prototype: {unrouted} of {len(group.layers) * num_experts} experts have no calibration tokens; their "
            f"slots are mapped by {UNROUTED_TOKENS} others'"
        )
    costs = torch.zeros(len(group.layers) * num_experts, len(group.layers) * num_experts, dtype=torch.float64)
    for place, layer in enumerate(group.layers):
        others, columns = group.experts(layer), slice(place * num_experts, (place + 1) * num_experts)
        for (x, w), target, slot in zip(states, targets, owners):
            gap = (function.outputs(others, x) - target) * w[:, None]
            costs[slot, columns] += gap.square().sum((1, 2)).double()
    return costs.fill_diagonal_(0)


def choose(costs: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Choose the columns to keep of `costs [N, N]`, so that the sum of each row's least is small.

    Returns:
        int64 `[num_kept]`, ascending.
    """
    kept = torch.arange(len(costs))
    while len(kept) > num_kept:
        least, nearest = costs[:, kept].topk(2, dim=1, largest=False)
        missed = torch.zeros(len(kept), dtype=costs.dtype).index_add_(0, nearest[:, 0], least[:, 1] - least[:, 0])
        kept = torch.cat([kept[: missed.argmin()], kept[missed.argmin() + 1 :]])
    while (swap := _best_swap(costs, kept)) is not None:
        kept[swap[0]] = swap[1]
    return kept.sort().values


def _best_swap(costs: torch.Tensor, kept: torch.Tensor) -> tuple[int, int] | None:
    """Find the place in `kept` and the new column for it that lower the sum most; None if no swap lowers it."""
    padded = torch.cat([costs[:, kept], torch.full((len(costs), 1), torch.inf, dtype=costs.dtype)], 1)
    least, nearest = padded.topk(2, dim=1, largest=False)
    bound, best = least[:, 0].sum().item() * (1 - 1e-6), None
    for place in range(len(kept)):
        without = torch.where(nearest[:, 0] == place, least[:, 1], least[:, 0])
        totals = torch.minimum(without[:, None], costs).sum(0)
        column = int(totals.argmin())
        if totals[column] < bound:
            bound, best = totals[column].item(), (place, column)
    return best

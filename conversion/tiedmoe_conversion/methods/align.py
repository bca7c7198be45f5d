"""`align`: a mean of experts that do the same, after their neurons were put in the same order."""

from typing import Literal

import torch

from ..layout.neurons import Experts
from .base import Group, LayerExperts, Memory, Pool, register_method
from .matching import match_experts, match_neurons, matching_bytes


@register_method(
    "align",
    slot_maps=True,
    memory=Memory(
        group_copies=(0, 6),
        scratch_bytes=lambda sizes, tokens_per_expert, **options: matching_bytes(
            sizes, 2 * min(tokens_per_expert, sizes.num_tokens)
        ),
    ),
    calibration=lambda on="activations", weights=None, **options: on == "activations" or weights == "frequency",
)
def align(
    group: Group,
    on: Literal["activations", "weights"] = "activations",
    experts: Literal["matched", "identity", "random"] = "matched",
    neurons: Literal["matched", "identity"] = "matched",
    weights: Literal["uniform", "frequency", None] = None,
    anchor: Literal["first", "last"] = "last",
    tokens_per_expert: int = 512,
) -> Pool:
    """Average the group's experts after matching experts and neurons to one layer's (Hungarian algorithm).

    Layer l's slot s reads row r = perm_l[s]; row r is the mean over layers of the experts that read it, each with its
    neurons renumbered (and their signs chosen, where that changes nothing) to match the anchor's expert r (arXiv
    2209.04836, 3.2).

    Args:
        on: what experts are compared on: the layers' inputs on the calibration text, or random Gaussian ones.
        experts, neurons: "identity" and "random" are controls of the study.
        weights: of the mean: uniform, or by routing frequency, sum of w^2; None is frequency on activations, else
            uniform.
        anchor: the layer that the others are matched to.
        tokens_per_expert: calibration tokens per slot, and E times as few of each layer to match experts on, at most.
    """
    generator, function = group.generator(), group.family_function
    by_frequency = weights == "frequency" or (weights is None and on == "activations")
    anchor_layer = group.layers[0 if anchor == "first" else -1]
    reference = group.experts(anchor_layer)
    total, sizes = reference.map(torch.zeros_like), torch.zeros(group.num_experts)
    slot_maps = {}
    for layer in sorted(group.layers, key=lambda each: each is not anchor_layer):
        own, shares = group.experts(layer), torch.ones(group.num_experts)
        if by_frequency:
            shares = _routed(layer, group.num_experts)
        if layer is anchor_layer or experts == "identity":
            rows = torch.arange(group.num_experts)
        elif experts == "random":
            rows = torch.randperm(group.num_experts, generator=generator)
        else:
            pair = [
                _inputs(each, on, reference.down.shape[1], tokens_per_expert, generator)
                for each in (layer, anchor_layer)
            ]
            rows = match_experts(function, own, reference, torch.cat(pair), shares, sizes)
        slot_maps[layer.index] = rows
        own = own[torch.argsort(rows)]
        if layer is not anchor_layer and neurons == "matched":
            own = _matched(group, own, reference, rows, (layer, anchor_layer), on, tokens_per_expert)
        total.add_(own, shares[torch.argsort(rows)])
        sizes += shares[torch.argsort(rows)]
    return group.pool(total.map(lambda tensor: tensor / sizes.view(-1, *[1] * (tensor.dim() - 1))), slot_maps)


def _inputs(layer: LayerExperts, on: str, hidden_size: int, limit: int, generator: torch.Generator) -> torch.Tensor:
    """Return the tokens to compare experts on, `[n, H]`."""
    if on == "weights":
        return torch.randn(limit, hidden_size, generator=generator)
    return layer.inputs().sample(limit, generator)


def _matched(
    group: Group,
    own: Experts,
    reference: Experts,
    rows: torch.Tensor,
    layers: tuple[LayerExperts, LayerExperts],
    on: str,
    limit: int,
) -> Experts:
    """Return `own [E]` in the reference's order of experts, and of neurons in each."""
    generator, matched = group.generator(), []
    for row, slot in enumerate(torch.argsort(rows).tolist()):
        if on == "weights":
            hidden_states, weights = torch.zeros(0, reference.down.shape[1]), torch.zeros(0)
        else:
            pairs = [layer.inputs().sample_of_slot(each, limit, generator) for layer, each in zip(layers, (slot, row))]
            hidden_states, weights = (torch.cat(each) for each in zip(*pairs))
        matched.append(match_neurons(group.family_function, own[row], reference[row], hidden_states, weights))
    return Experts.concatenated(matched)


def _routed(layer: LayerExperts, num_experts: int) -> torch.Tensor:
    """Return the sum of w^2 per slot, never quite zero: experts that no layer routes to have a uniform mean."""
    inputs = layer.inputs()
    index, weights = inputs.top_k_index[: inputs.num_fit].flatten(), inputs.top_k_weights[: inputs.num_fit].flatten()
    sizes = torch.zeros(num_experts + 1).index_add_(0, index, weights.float().square())[:num_experts]
    return sizes + 1e-6 * sizes.mean() + torch.finfo(sizes.dtype).tiny

"""Evidence 1: how many experts a token uses, by layer, text and position, and what a token then costs in FLOPs."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..modeling_tiedmoe import TiedExperts
from ..routing.softmoe import SoftRouter
from . import metrics
from .records import Records, execution_device
from .routing import layer_experts
from .schema import ActiveExperts, Distribution, LayerActive


def measure(
    records: Mapping[str, Records],
    flops_without_experts: float,
    flops_per_expert: Mapping[int, int],
    soft_masses: Mapping[int, float],
) -> ActiveExperts:
    """Summarise how many experts were used.

    Args:
        records: by domain.
        flops_without_experts: of a token, from `count_flops`.
        flops_per_expert: by layer, of one expert on one token, from `expert_flops`.
        soft_masses: by layer with soft routing, k_l, from `soft_masses`.
    """
    layers = sorted(flops_per_expert)
    histograms = {layer: {name: each.active[layer] for name, each in records.items()} for layer in layers}
    bins = position_bins(max(len(each.positions[layer]) for each in records.values() for layer in layers))
    means = {name: [metrics.histogram_mean(each.active[layer]) for layer in layers] for name, each in records.items()}
    costs = [flops_per_expert[layer] for layer in layers]
    return ActiveExperts(
        is_adaptive=any(int((each > 0).sum()) > 1 for of_layer in histograms.values() for each in of_layer.values()),
        per_token={name: distribution(each.per_token["all"]) for name, each in records.items()},
        layers=[
            LayerActive(
                layer=layer,
                by_domain={name: distribution(each) for name, each in histograms[layer].items()},
                soft_mass=soft_masses.get(layer),
                by_position=_by_position(layer, records.values(), bins),
                histogram=_total(list(histograms[layer].values())).tolist(),
            )
            for layer in layers
        ],
        position_bins=bins,
        flops_per_token={
            name: flops_without_experts + sum(used * cost for used, cost in zip(means[name], costs))
            for name in records
        },
        domain_shift={
            f"{first}|{second}": _mean_shift(records[first], records[second], layers)
            for first, second in itertools.combinations(records, 2)
        },
    )


def distribution(histogram: torch.Tensor) -> Distribution:
    """Summarise `histogram [N]`, whose entry n counts tokens that use n experts."""
    quantiles = {f"p{percent}": metrics.histogram_quantile(histogram, percent) for percent in (50, 95, 99)}
    most = int(histogram.nonzero().max())
    return Distribution(mean=metrics.histogram_mean(histogram), max=most, **quantiles)


def position_bins(block_size: int) -> list[int]:
    """Return the first position of each bin: 0, 1, 2, 4, 8, ..., as what is near the start differs most."""
    return [0, *(1 << power for power in range(max(block_size - 1, 0).bit_length()))]


def soft_masses(model: PreTrainedModel) -> dict[int, float]:
    """Return by layer the soft mass k_l that a model with soft routing gives its tokens; empty of any other."""
    found = {}
    routers = [module for module in model.modules() if isinstance(module, SoftRouter)]
    layers = list(layer_experts(model))
    for router in routers:
        owner: Any = router._owner[0]
        if owner.config.softmoe["alpha"] > 0:
            with torch.no_grad():
                found[layers[router.place]] = float(owner.expert_budget(router.place, owner.config.softmoe))
    return found


def expert_flops(model: PreTrainedModel) -> dict[int, int]:
    """Return by layer the FLOPs of one expert on one token: twice its weights, with a tied layer's residual.

    Args:
        model: on any device, meta included.
    """
    found = {}
    for layer, module in layer_experts(model).items():
        parameters = list(module.parameters())  # of a tied layer its residual
        if isinstance(module, TiedExperts):
            owner: Any = module._owner
            parameters += owner[0].expert_pools[module.pool_index].parameters()
        found[layer] = sum(2 * each.shape[1] * each.shape[2] for each in parameters if each.dim() == 3)
    return found


def count_flops(model: PreTrainedModel, input_ids: torch.Tensor) -> float:
    """Count the FLOPs of a token of a forward pass without the experts, by torch's own counter.

    Attention's scores count in full, `[S, S]` in each head, masked or not (as PaLM does, arXiv 2204.02311, appendix
    B), and recurrences as their matrix products; kernels that torch does not know count nothing.

    Args:
        model: in eval mode, on any device.
        input_ids: int64 `[B, S]`.
    """
    aten = torch.ops.aten
    on_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}
    with torch.no_grad(), _without_experts(model), FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        model(input_ids=input_ids.to(execution_device(model)), use_cache=False)
    return counter.get_total_flops() / input_ids.numel()


@contextlib.contextmanager
def _without_experts(model: nn.Module) -> Iterator[None]:
    """Make all experts give zeros within the block: what they would do is multiplied by how many are used."""
    # In an instance's own dict, where accelerate keeps a forward of its own.
    kept = {module: module.__dict__.get("forward") for module in layer_experts(model).values()}
    try:
        for module in kept:
            module.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)
        yield
    finally:
        for module, forward in kept.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _sdpa_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of attention on a CPU, which torch's counter does not know; of the tensors' shapes."""
    batch, num_heads, num_queries, width = query
    return 2 * batch * num_heads * num_queries * key[2] * (width + value[3])


def _by_position(layer: int, records: Any, bins: Sequence[int]) -> list[float]:
    """Return the mean number of experts in each bin of positions, all domains together."""
    used = _total([each.positions[layer] for each in records])
    sizes = [torch.full_like(each.positions[layer], len(each.tokens["all"])) for each in records]
    tokens = _total(sizes)
    ends = [*bins[1:], len(used)]
    return [float(used[start:end].sum() / tokens[start:end].sum()) for start, end in zip(bins, ends)]


def _mean_shift(first: Records, second: Records, layers: Sequence[int]) -> float:
    shifts = [float(metrics.total_variation(*_padded([first.active[n], second.active[n]]))) for n in layers]
    return sum(shifts) / len(shifts)


def _total(histograms: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(_padded(histograms)).sum(0)


def _padded(histograms: list[torch.Tensor]) -> list[torch.Tensor]:
    size = max(map(len, histograms))
    return [nn.functional.pad(each, (0, size - len(each))) for each in histograms]

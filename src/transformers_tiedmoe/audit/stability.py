"""Evidence 3: how evenly routers choose, how layers of a group agree, and how text changes it, with intervals."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import metrics
from .bootstrap import interval
from .records import Records
from .schema import Agreement, Flow, Interval, Layer, LayerStability, Stability

MAX_FLOWS = 200
MAX_CO_ACTIVE = 10


def measure(layers: Sequence[Layer], records: Mapping[str, Records], seed: int = 0, num_gpus: int = 1) -> Stability:
    """Summarise what the routers chose.

    Args:
        layers: of the model.
        records: by domain.
        seed: of the bootstrap.
        num_gpus: that the experts of a layer are spread over.
    """
    first = next(iter(records.values()))
    strata = torch.repeat_interleave(
        torch.arange(len(records)), torch.tensor([len(each.tokens["all"]) for each in records.values()])
    )
    return Stability(
        layers=[_of_layer(layer, records, strata, seed, num_gpus) for layer in layers if layer.index in first.counts],
        agreement=[_agreement(key, records, strata, seed) for key in sorted(first.agreement)],
        flows=[_flow(pair, records) for pair in sorted(first.flows)],
    )


def _of_layer(
    layer: Layer, records: Mapping[str, Records], strata: torch.Tensor, seed: int, num_gpus: int
) -> LayerStability:
    index = layer.index
    by_domain = {name: each.counts[index] for name, each in records.items()}
    counts = torch.cat(list(by_domain.values()))
    total = counts.sum(0)
    tokens = _joined(records, "tokens", "all")
    of_domain = _spread(counts, strata)  # [B, D, E]
    knows_scores = all(index in each.token_entropy for each in records.values())

    def of(statistic, values=counts) -> Interval:
        return interval(values, statistic=statistic, seed=seed, strata=strata)

    return LayerStability(
        layer=index,
        num_experts=counts.shape[1],
        load_cv=of(metrics.load_cv),
        load_max_over_mean=of(metrics.load_max_over_mean),
        choice_entropy=of(metrics.choice_entropy),
        token_entropy=interval(_joined(records, "token_entropy", index), tokens, seed=seed, strata=strata)
        if knows_scores
        else None,
        num_dead=metrics.num_dead(total),
        is_collapsed=metrics.is_collapsed(total, layer.top_k or max(1, round(float(total.sum() / tokens.sum())))),
        specialisation=of(metrics.specialisation, of_domain) if len(records) > 1 else None,
        source_agreement=_share(_joined(records, "source_agreement", index), strata, seed)
        if all(index in each.source_agreement for each in records.values())
        else None,
        gpu_balance=of(functools.partial(metrics.gpu_balance, num_gpus=num_gpus))
        if counts.shape[1] % num_gpus == 0
        else None,
        token_specialisation=float(metrics.mutual_information(_summed(records, "by_token", index))),
        co_active=_co_active(_summed(records, "together", index)),
        drift={
            f"{a}|{b}": of(_jensen_shannon, of_domain[:, list(pair)])
            for pair in itertools.combinations(range(len(records)), 2)
            for a, b in [(list(records)[pair[0]], list(records)[pair[1]])]
        },
        loads={name: metrics.load_shares(each.sum(0).double()).tolist() for name, each in by_domain.items()},
    )


def _agreement(
    key: tuple[int, int, int], records: Mapping[str, Records], strata: torch.Tensor, seed: int
) -> Agreement:
    pool, first, second = key
    counts, tokens = _summed(records, "row_counts", first), _summed(records, "row_tokens", second)
    return Agreement(
        pool=pool,
        layers=(first, second),
        agreement=_share(_joined(records, "agreement", key), strata, seed),
        by_chance=metrics.agreement_by_chance(counts, tokens, sum(each.num_tokens for each in records.values())),
    )


def _flow(pair: tuple[int, int], records: Mapping[str, Records]) -> Flow:
    joint = _summed(records, "flows", pair)
    return Flow(
        layers=pair,
        flows=_largest(joint, MAX_FLOWS),
        mutual_information=float(metrics.mutual_information(joint)),
    )


def _co_active(together: torch.Tensor) -> list[tuple[int, int, float]]:
    return _largest(metrics.co_activation(together), MAX_CO_ACTIVE)


def _largest(matrix: torch.Tensor, number: int) -> list[tuple[int, int, Any]]:
    """Return row, column and value of the largest entries above 0."""
    width, ordered = matrix.shape[1], matrix.flatten().sort(descending=True, stable=True)
    places = zip(ordered.indices[:number].tolist(), ordered.values[:number].tolist())
    return [(place // width, place % width, value) for place, value in places if value]


def _share(agreeing: torch.Tensor, strata: torch.Tensor, seed: int) -> Interval:
    """Return the share of `agreeing [B, 2]`, choices that agree and all."""
    return interval(agreeing[:, 0], agreeing[:, 1], seed=seed, strata=strata)


def _jensen_shannon(counts: torch.Tensor) -> torch.Tensor:
    """Return the divergence of two domains' loads, `[N, 2, E]`."""
    return metrics.jensen_shannon(counts[:, 0], counts[:, 1])


def _spread(counts: torch.Tensor, strata: torch.Tensor) -> torch.Tensor:
    """Put each block's counts `[B, E]` into the place of its domain, zeros elsewhere: `[B, D, E]`."""
    is_domain = torch.nn.functional.one_hot(strata, int(strata.max()) + 1)
    return is_domain[:, :, None] * counts[:, None, :]


def _summed(records: Mapping[str, Records], field: str, key) -> torch.Tensor:
    return torch.stack([getattr(each, field)[key] for each in records.values()]).sum(0)


def _joined(records: Mapping[str, Records], field: str, key) -> torch.Tensor:
    return torch.cat([getattr(each, field)[key] for each in records.values()])

"""Evidence 4: which layers need experts, routers and attention of their own, and a plan of tying that follows.

A part of a layer is replaced by its neighbour's and the loss taken again on the same blocks. Experts of two layers
share no numbering, so they are matched by their outputs first (`metrics.best_match`). A plan takes what replacing the
experts costs for what tying costs, adds it up over neighbours, and lets `grouping.best_choices` choose.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from ..grouping import Candidate, Choice, best_choices
from ..training.data import sequence_losses
from . import units
from .bootstrap import interval
from .metrics import best_match, linear_cka
from .replacement import MoeLayer, Place, are_alike, moe_layers, other_experts, other_module
from .schema import Interval, LayerStrategy, Replacement, Similarity, SuggestedPlan
from .subject import Subject

Progress = Callable[[int, int, str], None]
OUTPUTS_AT_A_TIME = 1 << 24  # numbers that experts put out in one call
FREE = (
    1e-6  # nats per token of a pair that costs nothing or less: above 0, so that no plan ties more than was asked for
)
MEASURED_PARAMETERS = 500_000_000  # plans of a model of more are predicted only


@dataclass(frozen=True)
class StrategyOptions:
    """What the evidence of layer strategy is measured on, and which plans are suggested.

    Attributes:
        num_blocks: blocks of text that every loss is taken on, as many of each domain, spread over it.
        batch_size: blocks in one forward.
        num_tokens: tokens on which representations are compared, at most.
        tokens_per_layer: tokens of each of two layers on which their experts are compared, at most.
        budgets: shares of the expert bytes that may stay, a plan for each.
        max_group: layers that may share a pool in a plan.
        method: the conversion's method in the plans' recipes.
        convert: ties the model by a plan's recipe and returns it, so that the plan is measured; None measures nothing.
            The package of conversions, which this one must not import, has `tied_by` for it.
        seed: of the intervals.
    """

    num_blocks: int = 64
    batch_size: int = 8
    num_tokens: int = 1024
    tokens_per_layer: int = 64
    budgets: tuple[float, ...] = (0.75, 0.67, 0.5)
    max_group: int = 4
    method: str = "prefit"
    convert: Callable[[dict[str, Any]], PreTrainedModel] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Neighbours:
    """Two layers with experts, one after the other: for each expert of `first` the one of `second` most like it."""

    first: MoeLayer
    second: MoeLayer
    match: torch.Tensor
    similarity: float

    def seen_from(self, layer: MoeLayer) -> tuple[MoeLayer, torch.Tensor]:
        """Return `layer`'s neighbour, and for each expert of `layer` the neighbour's."""
        return (self.second, self.match) if layer is self.first else (self.first, self.match.argsort())


def measure(
    subject: Subject,
    model: PreTrainedModel,
    domains: Mapping[str, datasets.Dataset],
    options: StrategyOptions = StrategyOptions(),
    progress: Progress | None = None,
) -> LayerStrategy:
    """Measure what replacing parts of layers adds to the loss, how alike layers are, and suggest plans.

    The model is afterwards what it was, bit for bit. What could not be compared is said in `subject.notes`.

    Args:
        subject: the model.
        model: its weights, in eval mode.
        domains: blocks of text.
        options: see there.
        progress: called as `progress(done, total, what)`.
    """
    if not subject.has_experts:
        subject.notes.append("layer strategy: the model has no experts, so there is none")
        return LayerStrategy(replacements=[], similarity=[], plans=[])
    return _Measurement(subject, model, domains, options, progress).run()


class _Measurement:
    def __init__(self, subject, model, domains, options, progress):
        self.subject, self.model, self.options = subject, model, options
        self.progress: Progress | None = progress
        self.blocks = Blocks(domains, options)
        self.layers = moe_layers(model)
        self.done = 0
        self.total = 4 * len(self.layers) - 1 + (len(options.budgets) if options.convert else 0)

    def run(self) -> LayerStrategy:
        inputs = self._inputs()
        pairs = self._neighbours(inputs)
        replacements = list(self._replacements(pairs))
        self._note(replacements)
        return LayerStrategy(
            replacements=replacements,
            similarity=_similarity(self.layers, inputs, pairs),
            plans=self._plans(replacements),
        )

    def _report(self, what: str) -> None:
        if self.progress:
            self.progress(self.done, self.total, what)
        self.done += 1

    def _inputs(self) -> dict[int, torch.Tensor]:
        """Take the model's own loss, and keep what enters each layer's experts."""
        self._report("the model itself")
        with KeepInputs(self.layers, self.blocks.num_tokens // self.options.num_tokens) as kept:
            self.base, self.counts = self.blocks.losses(self.model)
        return {index: torch.cat(parts)[: self.options.num_tokens] for index, parts in kept.parts.items()}

    @torch.no_grad()
    def _neighbours(self, inputs: Mapping[int, torch.Tensor]) -> list[Neighbours]:
        found = []
        for first, second in pairwise(self.layers):
            if first.num_experts != second.num_experts or inputs[first.index].shape != inputs[second.index].shape:
                self.subject.notes.append(
                    f"layer strategy: layers {first.index} and {second.index} differ in the number or in the width of "
                    "their experts, so neither's experts can stand for the other's"
                )
                continue
            both = [inputs[layer.index] for layer in (first, second)]
            step = max(1, len(both[0]) // self.options.tokens_per_layer)
            tokens = torch.cat([each[::step][: self.options.tokens_per_layer] for each in both])
            found.append(
                Neighbours(first, second, *best_match(expert_outputs(first, tokens), expert_outputs(second, tokens)))
            )
        return found

    def _replacements(self, pairs: list[Neighbours]) -> Iterator[Replacement]:
        for pair in pairs:
            for layer in (pair.first, pair.second):
                neighbour, match = pair.seen_from(layer)
                yield self._replaced(layer, neighbour, "experts", other_experts(layer, neighbour, match))
        for layer in self.layers:
            near = [pair for pair in pairs if layer in (pair.first, pair.second)]
            found = [pair for pair in near if _are_alike(pair.first.router, pair.second.router)]
            if found:
                neighbour, match = found[0].seen_from(layer)
                yield self._replaced(layer, neighbour, "router", _other_router(layer, neighbour, match))
        for layer in self.layers:
            alike = [each for each in self.layers if each is not layer and _are_alike(layer.attention, each.attention)]
            if alike:  # the earlier of two as near
                neighbour = min(alike, key=lambda each: abs(each.index - layer.index))
                swapped = other_module(layer.attention, neighbour.attention)
                yield self._replaced(layer, neighbour, "attention", swapped)

    def _replaced(
        self, layer: MoeLayer, neighbour: MoeLayer, part: Any, replaced: AbstractContextManager
    ) -> Replacement:
        self._report(f"{part} of layer {layer.index}")
        with replaced:
            increase = self._increase()
        return Replacement(layer=layer.index, neighbour=neighbour.index, part=part, loss_increase=increase)

    def _increase(self) -> Interval:
        sums, _ = self.blocks.losses(self.model)
        return interval(sums - self.base, self.counts, seed=self.options.seed, strata=self.blocks.domains)

    def _note(self, replacements: list[Replacement]) -> None:
        for part in ("router", "attention"):
            replaced = {each.layer for each in replacements if each.part == part}
            left = [str(layer.index) for layer in self.layers if layer.index not in replaced]
            if left:
                self.subject.notes.append(
                    f"layer strategy: no {part} was replaced in layers {', '.join(left)}: no neighbour has one like it"
                )

    def _plans(self, replacements: list[Replacement]) -> list[SuggestedPlan]:
        if any(layer.kind == "tied" for layer in self.subject.layers):
            self.subject.notes.append("layer strategy: the model is tied already, so no plan of tying is suggested")
            return []
        costs = pair_costs(replacements)
        choices = self._choices(costs)
        plans = []
        for choice in choices:
            recipe = {"groups": [list(each.layers) for each in choice.candidates], "method": self.options.method}
            plans.append(
                SuggestedPlan(
                    recipe=recipe,
                    expert_share=1 - choice.saved / self._expert_bytes(self.layers),
                    predicted_loss_increase=choice.loss,
                    measured_loss_increase=self._measured(recipe),
                    reason=_reason(choice, self.layers, costs),
                )
            )
        return plans

    def _choices(self, costs: Mapping[tuple[int, int], float]) -> list[Choice]:
        """Choose the groups of least cost for every budget that can be met, the most bytes first."""
        runs = [
            self.layers[first : first + length]
            for length in range(2, self.options.max_group + 1)
            for first in range(len(self.layers) - length + 1)
        ]
        candidates = [
            Candidate(
                layers=tuple(layer.index for layer in run),
                width=run[0].num_experts,
                saved=self._expert_bytes(run[1:]),
                loss=sum(costs[a.index, b.index] for a, b in pairwise(run)),
            )
            for run in runs
            if all((a.index, b.index) in costs and are_alike(a.experts, b.experts) for a, b in pairwise(run))
        ]
        total, front = (
            self._expert_bytes(self.layers),
            best_choices([layer.index for layer in self.layers], candidates),
        )
        chosen: list[Choice] = []
        for budget in sorted(self.options.budgets, reverse=True):
            enough = [choice for choice in front if total - choice.saved <= budget * total]
            if not enough:
                self.subject.notes.append(
                    f"layer strategy: no plan keeps {budget:.0%} of the expert bytes with groups of up to "
                    f"{self.options.max_group} layers that can share a pool"
                )
            elif enough[-1].candidates and enough[-1] not in chosen:
                chosen.append(enough[-1])
        return chosen

    def _expert_bytes(self, layers: list[MoeLayer]) -> int:
        return sum(each.numel() * each.element_size() for layer in layers for each in layer.experts.parameters())

    def _measured(self, recipe: dict[str, Any]) -> float | None:
        if self.options.convert is None or self.model.num_parameters() > MEASURED_PARAMETERS:
            return None
        self._report("a plan, converted")
        sums, _ = self.blocks.losses(self.options.convert(recipe).eval().to(self.model.device))
        return float((sums - self.base).sum() / self.counts.sum())


def pair_costs(replacements: list[Replacement]) -> dict[tuple[int, int], float]:
    """Return what it costs that two neighbouring layers share experts: the cheaper of using one's and the other's."""
    costs: dict[tuple[int, int], float] = {}
    for each in replacements:
        if each.part == "experts":
            pair = (min(each.layer, each.neighbour), max(each.layer, each.neighbour))
            costs[pair] = max(FREE, min(costs.get(pair, float("inf")), each.loss_increase.value))
    return costs


def _reason(choice: Choice, layers: list[MoeLayer], costs: Mapping[tuple[int, int], float]) -> str:
    """Say what a plan ties, what it leaves alone and at which cost."""
    tied = {layer for each in choice.candidates for layer in each.layers}
    groups = ", ".join(f"{each.layers[0]}-{each.layers[-1]} +{each.loss:.4f}" for each in choice.candidates)
    alone = [layer.index for layer in layers if layer.index not in tied]
    kept = f"experts of their own in {units.runs(alone)}" if alone else "no layer left with experts of its own"
    dearest = max(costs, key=lambda pair: costs[pair])
    return (
        f"Layers that share a pool, and what one's experts, unfitted, in the place of the others' add in nats per "
        f"token: {groups}; {kept}. The dearest neighbours are {dearest[0]} and {dearest[1]}, +{costs[dearest]:.4f}."
    )


class Blocks:
    """The blocks of text that every loss is taken on.

    Attributes:
        input_ids, labels: int64 `[B, T]`.
        domains: the number of each block's domain, int64 `[B]`.
    """

    def __init__(self, domains: Mapping[str, datasets.Dataset], options: StrategyOptions):
        share = max(1, options.num_blocks // len(domains))
        rows = []
        for dataset in domains.values():
            spread = torch.linspace(0, len(dataset) - 1, min(share, len(dataset))).long().tolist()
            rows.append(dataset.select(spread).with_format("torch")[:])
        self.input_ids, self.labels = (
            torch.cat([each[key] for each in rows]).long() for key in ("input_ids", "labels")
        )
        sizes = torch.tensor([len(each["input_ids"]) for each in rows])
        self.domains = torch.arange(len(rows)).repeat_interleave(sizes)
        self.batch_size = options.batch_size

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @torch.no_grad()
    def losses(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of each block in nats, float64 `[B]`, and its predicted tokens, `[B]`."""
        found = []
        for batch in zip(self.input_ids.split(self.batch_size), self.labels.split(self.batch_size)):
            found.append(sequence_losses(model, *(each.to(model.device) for each in batch)))
        sums, counts = (torch.cat([each.cpu() for each in parts]) for parts in zip(*found))
        return sums.double(), counts


class KeepInputs:
    """Keeps, while it is entered, every `step`-th token that enters the experts of each layer, `[t, H]` a call."""

    def __init__(self, layers: list[MoeLayer], step: int):
        self.layers, self.step = layers, max(1, step)
        self.parts: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}

    def __enter__(self) -> "KeepInputs":
        self._hooks = [
            layer.experts.register_forward_pre_hook(self._keeper(layer.index), with_kwargs=True)
            for layer in self.layers
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, index: int):
        def keep(module: Any, args: tuple, kwargs: dict) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            self.parts[index].append(states.detach().flatten(0, -2)[:: self.step].clone())

        return keep


@torch.no_grad()
def expert_outputs(layer: MoeLayer, tokens: torch.Tensor) -> torch.Tensor:
    """Run every expert of a layer on the same tokens, with weight 1: `[T, H]` gives `[E, T, H]`, float32."""
    outputs = []
    at_a_time = max(1, OUTPUTS_AT_A_TIME // tokens.numel())
    for experts in torch.arange(layer.num_experts, device=tokens.device).split(at_a_time):
        index = experts.repeat_interleave(len(tokens))[:, None]
        found = layer.experts(tokens.repeat(len(experts), 1), index, torch.ones_like(index, dtype=tokens.dtype))
        outputs.append(found.view(len(experts), len(tokens), -1).float().cpu())
    return torch.cat(outputs)


def _are_alike(one: Place | None, other: Place | None) -> bool:
    return one is not None and other is not None and are_alike(one.module, other.module)


@contextlib.contextmanager
def _other_router(layer: MoeLayer, neighbour: MoeLayer, match: torch.Tensor) -> Iterator[None]:
    """Let `layer` choose by its neighbour's router, which names the neighbour's experts: `match[i]` is i here."""
    with other_module(layer.router, neighbour.router), other_experts(layer, layer, match.argsort()):
        yield


def _similarity(
    layers: list[MoeLayer], inputs: Mapping[int, torch.Tensor], pairs: list[Neighbours]
) -> list[Similarity]:
    outputs = {(pair.first.index, pair.second.index): pair.similarity for pair in pairs}
    cka = linear_cka([inputs[layer.index] for layer in layers])
    return [
        Similarity(
            layers=(a.index, b.index),
            representation_cka=float(cka[i, j]),
            output_similarity=outputs.get((a.index, b.index)),
        )
        for (i, a), (j, b) in combinations(enumerate(layers), 2)
    ]

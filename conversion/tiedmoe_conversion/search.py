"""Chooses groups and pool sizes by what each costs: a recipe with `budget` or `max_loss` becomes one with `groups`.

Every run of up to `group_size` neighbouring layers is tied alone, at every width the method can make, and the loss on
held-out text is taken (a sensitivity scan). Losses of groups that do not touch are then added up, and dynamic
programming (`transformers_tiedmoe.grouping`) finds for every number of bytes the groups of the least sum. The sum is a
prediction: what is chosen is measured.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from rich.console import RenderableType

from transformers_tiedmoe.grouping import Candidate, best_choices
from transformers_tiedmoe.pools import tie_groups

from .calibration.inputs import Calibration, Residuals, TiedTensors
from .checkpoint.writer import Progress
from .display import show_search
from .errors import ConversionError
from .layout.source_model import SourceModel, open_source_model
from .make import make_pool
from .methods import Pool
from .recipe import ConversionRecipe

WIDTH_STEP = 0.5  # of E, between two widths of a pool that are tried


@dataclass(frozen=True)
class Point:
    """A choice of groups: the share of the bytes that is left, and the sum of what its groups add to the loss."""

    candidates: tuple[Candidate, ...]
    bytes_after: int
    fraction: float
    predicted: float

    def describe(self) -> str:
        """Describe the groups for people: "2-3 (16), 4-7 (24)"."""
        return ", ".join(f"{c.layers[0]}-{c.layers[-1]} ({c.width})" for c in self.candidates)


@dataclass(frozen=True)
class Chosen:
    """What `choose` found.

    Attributes:
        recipe: with groups and pool sizes in the place of budget or max_loss.
        point: the choice.
        curve: every choice that none beats in both bytes and predicted loss, the fewest bytes first.
        measured: the loss added by those choices of the curve that were measured, by their place in it.
    """

    recipe: ConversionRecipe
    point: Point
    curve: tuple[Point, ...]
    measured: dict[int, float]

    def summary(self) -> dict[str, Any]:
        """Return the curve and what was chosen, JSON-able."""
        points = [
            {"bytes": p.bytes_after, "fraction": p.fraction, "predicted": p.predicted,
             "measured": self.measured.get(i),
             "groups": [list(c.layers) for c in p.candidates], "pool_experts": [c.width for c in p.candidates]}
            for i, p in enumerate(self.curve)
        ]  # fmt: skip
        return {"chosen": self.curve.index(self.point), "curve": points}

    def __rich__(self) -> RenderableType:
        return show_search(self)


@dataclass(frozen=True)
class Preview:
    """What is known of a choice before any weight has been read.

    Attributes:
        least_fraction: of the source's bytes, the least that group size and skipped layers allow.
        candidates: groups and widths that would be tied alone, each a run of the source over the held-out text.
    """

    recipe: ConversionRecipe
    least_fraction: float
    candidates: int

    def summary(self) -> dict[str, Any]:
        """Return what is known, JSON-able."""
        return {"source": self.recipe.source, "budget": self.recipe.budget, "max_loss": self.recipe.max_loss,
                "least_fraction": self.least_fraction, "candidates": self.candidates}  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.recipe.source}: groups and pool sizes will be chosen by a scan of {self.candidates} groups and "
            f"widths, each a run of the source over the held-out text; from {self.least_fraction:.1%} of its bytes on "
            "is possible. tiedmoe convert does it; with --statistics FOLDER the scan is kept"
        )


def choose(recipe: ConversionRecipe, calibration: Calibration, progress: Progress | None = None) -> Chosen:
    """Find the groups and pool sizes that a recipe's `budget` or `max_loss` asks for.

    The scan ties by the recipe's method; what `then` and `residual_rank` add is done to the pools that are chosen.
    Scanned losses are kept with the calibration's statistics.

    Raises:
        ConversionError: no choice meets the budget or the loss; says the nearest that does.
    """
    return Search(recipe, calibration.source).run(calibration, progress)


def preview(recipe: ConversionRecipe) -> Preview:
    """Tell what `choose` would do, from the source's headers alone.

    Raises:
        ConversionError: the budget is less than any choice of groups can leave; says the least that can.
    """
    return Search(recipe, open_source_model(recipe.source, recipe.revision, recipe.allow_pickle)).preview


class Search:
    """One search; what it needs to know of the source is looked up once.

    Attributes:
        preview: what is known before any weight has been read.

    Raises:
        ConversionError: there is nothing to choose, or the budget is less than any choice can leave.
    """

    def __init__(self, recipe: ConversionRecipe, source: SourceModel):
        self.recipe, self.source = recipe, source
        self.progress: Progress | None = None
        self._calibration: Calibration | None = None
        layers = sorted(self.source.experts)
        self.eligible = [g[0] for g in tie_groups(layers, 1, recipe.skip_first, recipe.skip_last)]
        names = self.source.expert_names(layers[0])
        self.num_experts = self.source.num_experts
        self.parameters = [self.source.tensors.meta[name] for name in names]
        if recipe.steps[0][0].lossless:
            raise ConversionError(
                f"method {recipe.method!r} keeps every expert, so no budget or max_loss chooses anything; expected a "
                "method that saves bytes, such as prototype"
            )
        if len(self.eligible) < 2 or recipe.group_size < 2:
            raise ConversionError(
                f"nothing to choose: group_size={recipe.group_size}, skip_first={recipe.skip_first} and "
                f"skip_last={recipe.skip_last} leave {len(self.eligible)} layers with experts to tie; expected at "
                "least two and a group_size of at least 2"
            )
        self.preview = self._preview()

    def _preview(self) -> Preview:
        recipe, candidates = self.recipe, self.candidates(measure=False)
        least = min(point.fraction for point in self.curve(candidates))
        if recipe.budget is not None and recipe.budget < least:
            raise ConversionError(
                f"budget={recipe.budget} cannot be met: the nearest that can is {math.ceil(least * 10_000) / 10_000}, "
                f"everything that group_size={recipe.group_size}, skip_first={recipe.skip_first} and skip_last="
                f"{recipe.skip_last} allow tied; raise budget or group_size, or lower skip_first and skip_last"
            )
        return Preview(recipe, least, len(candidates))

    @cached_property
    def _scanned(self) -> ConversionRecipe:
        """The recipe to tie groups by while scanning: without its later steps."""
        return dataclasses.replace(self.recipe, budget=None, max_loss=None, then=(), residual_rank=0)

    @property
    def calibration(self) -> Calibration:
        assert self._calibration is not None
        return self._calibration

    def run(self, calibration: Calibration, progress: Progress | None = None) -> Chosen:
        """Scan, choose and measure what is chosen; see `choose`."""
        self._calibration, self.progress = calibration, progress
        curve = self.curve(self.candidates())
        measured: dict[int, float] = {}
        if self.recipe.budget is not None:
            place = min(
                (i for i, point in enumerate(curve) if point.fraction <= self.recipe.budget),
                key=lambda i: curve[i].predicted,
            )
            self._measure(curve, place, measured)
        else:
            place = self._least_bytes(curve, measured)
        point = curve[place]
        recipe = dataclasses.replace(
            self.recipe,
            budget=None,
            max_loss=None,
            groups=[list(c.layers) for c in point.candidates],
            pool_experts=[c.width for c in point.candidates],
        )
        return Chosen(recipe, point, tuple(curve), measured)

    def candidates(self, measure: bool = True) -> list[Candidate]:
        """Return every group and width, with the loss it adds alone; without `measure` the losses are 0."""
        found = []
        total = len(list(self._scans()))
        for done, (length, width, groups) in enumerate(self._scans()):
            if self.progress and measure:
                self.progress(done, total, f"scanning groups of {length} with pools of {width}")
            losses = self._losses(groups, width) if measure else [0.0] * len(groups)
            for group, loss in zip(groups, losses):
                found.append(Candidate(group, width, self._bytes_saved(length, width), loss))
        return found

    def curve(self, candidates: Sequence[Candidate]) -> list[Point]:
        """Return the choices of disjoint groups that none beats in both bytes and losses, the fewest bytes first."""
        size = self.source.bytes_as_read
        return [
            Point(choice.candidates, size - choice.saved, (size - choice.saved) / size, choice.loss)
            for choice in best_choices(self.eligible, candidates)
            if choice.candidates
        ]

    def _scans(self) -> Iterator[tuple[int, int, list[tuple[int, ...]]]]:
        """Yield a length, a width and disjoint groups, so that every run of layers comes at every width."""
        method, *refining = [method for method, _ in self._scanned.steps]
        for length in range(2, min(self.recipe.group_size, len(self.eligible)) + 1):
            own = method.pool_num_experts(self.num_experts, length)
            step = max(1, int(WIDTH_STEP * self.num_experts))
            some = range(self.num_experts, length * self.num_experts, step)
            widths = some if method.any_width or refining else [own]  # clones that nothing refines change nothing
            for width in widths:
                for offset in range(length):
                    starts = range(offset, len(self.eligible) - length + 1, length)
                    groups = [tuple(self.eligible[start : start + length]) for start in starts]
                    if groups and width < length * self.num_experts:
                        yield length, width, groups

    def _bytes_saved(self, length: int, width: int) -> int:
        """Return the bytes that a group of `length` layers saves with a pool of `width` experts.

        A slot map has an int64 per slot, a residual two factors.
        """
        experts = sum(tensor.nbytes for tensor in self.parameters) // self.num_experts
        factors = sum(sum(t.shape[1:]) * t.dtype.itemsize for t in self.parameters if t.dim() == 3)
        maps = width != self.num_experts or any(method.slot_maps for method, _ in self.recipe.steps)
        per_layer = self.num_experts * (8 * maps + self.recipe.residual_rank * factors)
        return (length * self.num_experts - width) * experts - length * per_layer

    def _losses(self, groups: Sequence[tuple[int, ...]], width: int) -> list[float]:
        """Return what each group adds to the loss when it alone is tied, into a pool of `width` experts."""
        losses = []
        for group in groups:
            key = f"scan {self.recipe.method} {sorted(self.recipe.method_options.items())} {list(group)} {width}"
            loss = self.calibration.remember(key, partial(self._loss, [(group, width)]))
            losses.append(loss - self.calibration.source_loss)
        return losses

    def _loss(self, tied: Sequence[tuple[Sequence[int], int]]) -> float:
        """Return the loss with these groups tied, each into a pool of so many experts, and no others."""
        made: dict[int, tuple[Pool, Residuals]] = {}
        for group, width in tied:
            pool = make_pool(self._scanned, self.source, group, width, self.calibration).pool
            made.update({layer: (pool, {}) for layer in group})
        parameters = self.source.parameter_names(tied[0][0][0])
        return self.calibration.loss(TiedTensors(self.source, made, parameters))

    def _measure(self, curve: Sequence[Point], place: int, measured: dict[int, float]) -> float:
        """Measure the loss that the curve's point at `place` really adds."""
        if place not in measured:
            if self.progress:
                self.progress(len(measured), len(measured) + 1, f"measuring {curve[place].fraction:.0%} of the bytes")
            candidates = curve[place].candidates
            key = f"choice {self.recipe.method} {sorted(self.recipe.method_options.items())} {curve[place].describe()}"
            loss = self.calibration.remember(key, lambda: self._loss([(c.layers, c.width) for c in candidates]))
            measured[place] = loss - self.calibration.source_loss
        return measured[place]

    def _least_bytes(self, curve: Sequence[Point], measured: dict[int, float]) -> int:
        """Find the place of the fewest bytes whose measured loss is at most `max_loss`, by bisection."""
        most = self.recipe.max_loss
        assert most is not None
        low, high = 0, len(curve) - 1
        if self._measure(curve, high, measured) > most:
            raise ConversionError(
                f"max_loss={most} cannot be met: the nearest that can is {measured[high]:.4f}, with "
                f"{curve[high].fraction:.1%} of the bytes; raise max_loss, or choose method union, which loses nothing"
            )
        while low < high:  # losses fall as bytes grow
            middle = (low + high) // 2
            if self._measure(curve, middle, measured) <= most:
                high = middle
            else:
                low = middle + 1
        return high

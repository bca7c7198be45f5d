"""Which layers to tie: disjoint groups by what each saves and what it adds to the loss, chosen by dynamic programming.

The conversion's search and the audit's suggested plans choose by it. Losses of groups that do not touch are added up:
the sum is a prediction, to be measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A group and the width of its pool: the bytes that saves, and what it adds to the loss when tied alone."""

    layers: tuple[int, ...]
    width: int
    saved: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """Disjoint groups, in order, with the sums of what they save and of what they add to the loss."""

    candidates: tuple[Candidate, ...]
    saved: int
    loss: float


def best_choices(layers: Sequence[int], candidates: Iterable[Candidate]) -> list[Choice]:
    """Return the choices that none beats in both bytes saved and loss, the most saved first; tying nothing is one.

    Args:
        layers: those that may be tied, ascending.
        candidates: groups of layers that are neighbours in `layers`, each at any number of widths.
    """
    starting: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        starting.setdefault(candidate.layers[0], []).append(candidate)
    # fronts[i]: the best choices among the first i layers, by bytes saved
    fronts: list[dict[int, Choice]] = [{} for _ in range(len(layers) + 1)]
    fronts[0] = {0: Choice((), 0, 0.0)}
    for i, layer in enumerate(layers):
        for choice in _undominated(fronts[i]):
            _keep(fronts[i + 1], choice)
            for c in starting.get(layer, []):
                longer = Choice((*choice.candidates, c), choice.saved + c.saved, choice.loss + c.loss)
                _keep(fronts[i + len(c.layers)], longer)
    return _undominated(fronts[-1])


def _keep(front: dict[int, Choice], choice: Choice) -> None:
    if choice.saved not in front or choice.loss < front[choice.saved].loss:
        front[choice.saved] = choice


def _undominated(front: dict[int, Choice]) -> list[Choice]:
    """Return the choices that save more than every choice of less loss, the most saved first."""
    kept: list[Choice] = []
    for saved in sorted(front, reverse=True):
        if not kept or front[saved].loss < kept[-1].loss:
            kept.append(front[saved])
    return kept

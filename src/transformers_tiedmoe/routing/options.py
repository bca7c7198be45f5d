"""`SoftMoeOptions`: what `TiedMoeConfig(softmoe=...)` may say, checked together."""

import dataclasses
import math
from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any

from ..errors import TiedMoeError

LEAST_ALPHA = 1e-30  # but for 0: float32 scores are divided by it
FARTHEST = 1e30  # from 0, of any number: what float32 holds


@dataclasses.dataclass(frozen=True)
class SoftMoeOptions:
    """Options of soft routing; `k_l` is the mass that layer l gives its experts, see `budget.py`.

    Args:
        budget: the sum of k_l over the layers with experts; the family's active experts times those layers by default.
        learn_budget: whether layers compete for the budget; otherwise each has the same share.
        layers: k_l of every layer with experts, fixed, in order; they sum to the budget and nothing is learned.
        alpha: the temperature of the soft top-k, in the units of the scores that the family's router chooses by. 0 is
            the family's own top-k, bit for bit.
        threshold: experts with a membership p below it are dropped, but for the token's first; from 0 to 1, excluded.
        cap: the most mass a layer may have; its number of experts by default.
        max_active: the most experts of a token, K_max; as many as can pass the threshold by default. A smaller number
            drops experts of some tokens.
        target_alpha, target_budget: where healing is to bring `alpha` and `budget`; None where they stay.
        target_active: the experts that a token is to use on average, all layers together, which `budget` does not
            bound: healing moves `threshold` towards it. None leaves the threshold alone.
    """

    budget: float | None = None
    learn_budget: bool = True
    layers: tuple[float, ...] | None = None
    alpha: float = 0.05
    threshold: float = 0.05
    cap: float | None = None
    max_active: int | None = None
    target_alpha: float | None = None
    target_budget: float | None = None
    target_active: float | None = None

    @classmethod
    def of(cls, given: object, num_layers: int, num_experts: int, top_k: float) -> "SoftMoeOptions":
        """Check what a config says, for `num_layers` layers of `num_experts` experts, and fill in what it leaves out.

        Raises:
            TiedMoeError: an unknown field, a wrong type, or a number out of range.
        """
        if not isinstance(given, Mapping):
            raise TiedMoeError(
                f"softmoe={short_repr(given)}; expected a mapping such as {{'budget': 32, 'alpha': 0.05}}"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(map(str, given.keys() - set(names))):
            raise TiedMoeError(f"softmoe has no field {unknown[0]!r}; expected some of {names}")
        self = cls(**given)
        if type(self.learn_budget) is not bool:
            raise TiedMoeError(f"softmoe.learn_budget={short_repr(self.learn_budget)}; expected true or false")
        cap = _number("cap", num_experts if self.cap is None else self.cap, 1, num_experts)
        layers = self.layers
        if layers is not None:
            if not isinstance(layers, (list, tuple)) or len(layers) != num_layers:
                raise TiedMoeError(
                    f"softmoe.layers={short_repr(layers)}; expected {num_layers} numbers, one for each layer with "
                    "experts"
                )
            layers = tuple(_number(f"layers[{i}]", k, 1, num_experts) for i, k in enumerate(layers))
            if self.budget is not None and not math.isclose(_number("budget", self.budget), sum(layers), rel_tol=1e-6):
                raise TiedMoeError(f"softmoe.budget={self.budget}, but softmoe.layers sum to {sum(layers)}; give one")
            budget = sum(layers)
        else:
            budget = top_k * num_layers if self.budget is None else self.budget
            budget = _number("budget", budget, num_layers, num_layers * cap)
        options = dataclasses.replace(
            self,
            budget=budget,
            learn_budget=self.learn_budget and layers is None and cap > 1,
            layers=layers,
            alpha=_alpha("alpha", self.alpha),
            threshold=_number("threshold", self.threshold, above=True, most=1),
            cap=cap,
        )
        if options.target_alpha is not None:
            _alpha("target_alpha", options.target_alpha)
        most = num_layers * cap
        for name, least, highest in (
            ("target_budget", num_layers, most),
            ("target_active", num_layers, num_layers * num_experts),
        ):
            if (target := getattr(options, name)) is not None:
                _number(name, target, least, highest)
        if layers is not None and options.target_budget is not None:
            raise TiedMoeError("softmoe.target_budget is given beside softmoe.layers, which are fixed; leave one out")
        if options.max_active is not None and (
            type(options.max_active) is not int or not 1 <= options.max_active <= num_experts
        ):
            raise TiedMoeError(
                f"softmoe.max_active={short_repr(options.max_active)}; expected an integer from 1 to {num_experts}"
            )
        needed = max(layers) if layers is not None else budget / num_layers
        if options.max_active is not None and options.max_active < needed:
            of_each = "a layer" if layers is not None else "each layer on average"
            raise TiedMoeError(
                f"softmoe.max_active={options.max_active} cannot hold the mass, {needed:g} of {of_each}; expected "
                f"{math.ceil(needed)} to {num_experts}"
            )
        return options

    def to_dict(self) -> dict[str, Any]:
        """Return the options as config.json holds them."""
        fields = dataclasses.asdict(self)
        return {**fields, "layers": None if self.layers is None else list(self.layers)}


def most_active(k: float, threshold: float, num_experts: int) -> int:
    """Return how many experts of a token can pass the threshold if the layer's mass is `k`: K_max.

    Fewer than `k / threshold` memberships that sum to k are above the threshold.
    """
    return min(num_experts, max(1, math.ceil(k / threshold) - 1))


def _alpha(name: str, value: object) -> float:
    alpha = _number(name, value)
    if 0 < alpha < LEAST_ALPHA:
        raise TiedMoeError(f"softmoe.{name}={alpha}; expected 0, the family's top-k, or at least {LEAST_ALPHA:g}")
    return alpha


def _number(name: str, value: object, least: float = 0.0, most: float = math.inf, above: bool = False) -> float:
    is_number = type(value) in (int, float) and -FARTHEST <= value <= FARTHEST  # type: ignore[operator]
    if not is_number or not (least < value < most if above else least <= value <= most):  # type: ignore[operator]
        bounds = f"above {least:g}" if above else f"of at least {least:g}"
        bounds += f" and {'below' if above else 'at most'} {most:g}" if most < math.inf else ""
        raise TiedMoeError(f"softmoe.{name}={short_repr(value)}; expected a number {bounds}")
    return float(value)  # type: ignore[arg-type]

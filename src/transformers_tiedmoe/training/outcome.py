"""How a healing ends: better than it began, worse, or diverged.

Held-out loss is computed without randomness, so that "worse" needs no tolerance: it is any loss above the one before.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TiedMoeError


class Diverged(TiedMoeError):
    """The loss is no longer a number, or no better than guessing: the model of the last step is worth nothing."""


class Worse(TiedMoeError):
    """The held-out loss is higher than before. The healed model is saved all the same.

    Attributes:
        report: what `heal` returns otherwise; its `is_worse` is true.
    """

    def __init__(self, message: str, report: dict[str, Any]):
        super().__init__(message)
        self.report = report


def refuse_diverged(before: Mapping[str, Any], after: Mapping[str, Any], vocab_size: int) -> None:
    """Raise `Diverged` if the loss after healing is no number, or that of guessing where the one before was better.

    Args:
        before, after: with `loss`, in nats per token.
        vocab_size: guessing has the loss `log(vocab_size)`.
    """
    uniform = math.log(vocab_size)
    is_uniform = abs(after["loss"] - uniform) < 1e-3 and before["loss"] < uniform - 1e-2
    if not math.isfinite(after["loss"]) or is_uniform:
        raise Diverged(
            f"the healing diverged: the held-out loss was {before['loss']:.3f} and is {after['loss']:.3f}, and "
            f"{uniform:.3f} is that of guessing: lower learning_rate"
        )


def is_worse(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Tell whether the held-out loss rose."""
    return after["loss"] > before["loss"]


def worse_in_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the warning of a model that is worse."""
    return (
        f"the model is worse than before: its held-out loss was {before['loss']:.4f} and is {after['loss']:.4f}; "
        "lower learning_rate, or give more text"
    )


def refuse_worse(report: dict[str, Any], output: Path) -> None:
    """Raise `Worse` if a finished report says so."""
    if report.get("is_worse"):
        raise Worse(
            f"{worse_in_words(report['before'], report['after'])}. It is saved all the same, in {output}: use the "
            "model before instead, or heal again with overwrite; allow_worse (--allow-worse) takes it for no error",
            report,
        )


def free_name(folder: Path) -> Path:
    """Return where the last good model of a healing that diverged is saved: `FOLDER.diverged`, -2, -3 if taken."""
    path, number = folder.with_name(f"{folder.name}.diverged"), 1
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}.diverged-{number}")
    return path

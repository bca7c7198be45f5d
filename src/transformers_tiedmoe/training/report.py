"""What `heal.json` says of a healing, from what Trainer has logged."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from ..audit.metrics import perplexity
from ..manifest import versions

Logs = Sequence[Mapping[str, Any]]
KEPT = ("step", "loss", "eval_loss", "active_experts", "dead_experts", "tokens_cut")


def held_out(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's loss in nats per token, perplexity and number of tokens."""
    loss = metrics["eval_loss"]
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": metrics["eval_tokens"]}


def held_out_before(logs: Logs) -> dict[str, Any]:
    """Return `held_out` before the first step, of this run or of the one that it continues."""
    return held_out(next(log for log in logs if log["step"] == 0 and "eval_loss" in log))


def history_of(logs: Logs) -> list[dict[str, Any]]:
    """Return all logged losses with their steps, and how the experts fared."""
    return [{name: log[name] for name in KEPT if name in log} for log in logs if "loss" in log or "eval_loss" in log]


def warnings_of_experts(layers: Sequence[Mapping[str, Any]], config: Any) -> list[str]:
    """Return what soft routing lost on the held-out text, in words.

    Args:
        layers: of `routing.active_experts`.
        config: of the model.
    """
    found = []
    if cut := sum(each["tokens_cut"] for each in layers):
        share, experts = cut / sum(each["tokens"] for each in layers), sum(each["experts_cut"] for each in layers)
        found.append(
            f"max_active={config.softmoe['max_active']} took {experts / cut:.1f} experts each from {share:.1%} of the "
            "held-out tokens, over all layers; raise it in config.json's softmoe, or leave it out"
        )
    if dead := {each["layer"]: each["dead"] for each in layers if each["dead"]}:
        found.append(f"experts that no held-out token used, by layer: {dead}")
    return found


def software() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a healing computes."""
    return {"python": platform.python_version(), **versions()} | {
        name: version(name) for name in ("accelerate", "datasets")
    }

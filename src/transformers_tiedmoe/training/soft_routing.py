"""Bring soft routing to its targets in any training by Trainer; see `routing.SoftMoeOptions`.

SoftMoE's own schedule (arXiv 2606.17952) is not public to us. Here alpha and the budget move in equal steps, from
where the model started, and the threshold follows what tokens really use.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..audit.metrics import dead_experts, tells_dead
from ..errors import TiedMoeError
from ..routing.softmoe import active_experts, soft_routers
from .parameter_groups import BUDGET_NAME

logger = logging.get_logger(__name__)

THRESHOLDS = (1e-4, 0.5)  # between which it is moved
RATE = 0.5  # of the logarithm of what is used by what is asked for


class AnnealRouting(TrainerCallback, ExportableState):
    """Move `alpha` and `budget` to their targets, and `threshold` towards `target_active`; log, warn of dead experts.

    `Trainer(model, ..., callbacks=[AnnealRouting()])`; `tiedmoe heal` adds it by itself. What is set depends on the
    step alone, but for the threshold: it and what was counted for it are in the checkpoints' trainer_state.json, so
    that a run that was killed goes on as it would have.

    Args:
        model: to check at once that it is routed softly; Trainer hands its own over when training begins.
        start: `config.softmoe` before the first step of the first run; the model's when training begins by default.
        share: of the steps in which the targets are reached.
        interval: steps between two looks at what tokens use, over all processes.

    Raises:
        TiedMoeError: a model that is not routed softly.
    """

    soft: dict[str, Any]
    start: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        start: Mapping[str, Any] | None = None,
        share: float = 0.5,
        interval: int = 10,
    ):
        if model is not None:
            _options_of(model)
        self.start, self.share, self.interval = None if start is None else dict(start), share, interval
        self.threshold: float | None = None
        self.kept: list[list[float]] | None = None  # `pending` of all processes at the last checkpoint
        self.dead: set[tuple[int, int]] = set()  # layer and expert that a warning has named

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        arguments = {"start": self.start, "share": self.share, "interval": self.interval}
        return {"args": arguments, "attributes": {"threshold": self.threshold, "kept": self.kept}}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Take the model's options; after a kill those of the first run, and the threshold that was reached."""
        self.soft = soft = _options_of(model)
        if state.global_step and (kept := state.stateful_callbacks.get(type(self).__name__)):
            self.start, self.threshold = kept["args"]["start"], kept["attributes"]["threshold"]
            self.kept = kept["attributes"]["kept"]
            soft["threshold"] = self.threshold or soft["threshold"]
        self.start = dict(soft if self.start is None else self.start)
        active_experts(model, reset=True)
        self.seen = self.pending = torch.zeros(len(soft_routers(model)), 2, dtype=torch.float64)
        if self.kept is not None and state.is_world_process_zero:
            self.pending = torch.tensor(self.kept, dtype=torch.float64)
        _warn_of_decay(model, optimizer)

    def on_step_begin(self, args, state, control, **kwargs):
        """Set alpha and the budget of this step."""
        self._set_step(state.global_step + 1, state.max_steps)

    def restore(self, model: nn.Module, state: TrainerState) -> None:
        """Set what the last step of a checkpoint had, for a model that is not trained on from there."""
        self.on_train_begin(None, state, None, model=model)
        self._set_step(state.global_step, state.max_steps)

    def _set_step(self, step: int, max_steps: int) -> None:
        done = min(1.0, step / max(1.0, self.share * max_steps))
        for name in ("alpha", "budget"):
            if (target := self.start[f"target_{name}"]) is not None:
                self.soft[name] = self.start[name] + done * (target - self.start[name])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Move the threshold; before a checkpoint, note what was counted for the next move."""
        if self.soft["target_active"] is None:
            return
        if state.global_step % self.interval == 0:
            experts, tokens = self._counted(model, args.device).unbind(-1)
            self.pending = torch.zeros_like(self.pending)
            if (used := float((experts / tokens.clamp(min=1)).sum())) > 0:
                threshold = self.soft["threshold"] * (used / self.soft["target_active"]) ** RATE
                self.threshold = self.soft["threshold"] = min(max(threshold, THRESHOLDS[0]), THRESHOLDS[1])
        if control.should_save:
            self.kept = self._counted(model, args.device).tolist()

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Say what was used since the last log, and which experts are newly dead; count anew."""
        if not logs or "loss" not in logs:
            return
        if "active_experts" not in logs:  # by a Trainer that does not log it itself
            logs.update(routing_logs(model))
            state.log_history[-1].update(routing_logs(model))
        self._look(model)
        self._warn_of_dead_experts(model)
        active_experts(model, reset=True)
        self.seen = torch.zeros_like(self.seen)

    def on_train_end(self, args, state, control, **kwargs):
        """Take the targets away: they are reached."""
        self.take_targets_away()

    def take_targets_away(self) -> None:
        """Leave no target in the model's config, as none is left to reach."""
        for name in ("target_alpha", "target_budget"):
            self.soft[name] = None

    def _counted(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """Return `pending` over all processes; counts are exact in float64."""
        self._look(model)
        return reduce(self.pending.to(device), "sum").cpu()

    def _look(self, model: nn.Module) -> None:
        """Add what was used since the last look to `pending`: experts and tokens of each layer."""
        counts = [router.counts for router in soft_routers(model)]
        now = [[0, 0] if each is None else [int(each.experts.sum()), int(each.tokens.sum())] for each in counts]
        found = torch.tensor(now, dtype=torch.float64)
        self.pending, self.seen = self.pending + found - self.seen, found

    def _warn_of_dead_experts(self, model: nn.Module) -> None:
        found = {}
        for router in soft_routers(model):
            if router.counts is not None and tells_dead(router.counts.experts):
                dead = dead_experts(router.counts.experts)
                if new := [expert for expert in dead if (router.layer, expert) not in self.dead]:
                    found[router.layer] = new
                    self.dead.update((router.layer, expert) for expert in new)
        if found:
            logger.warning(
                f"no token has used these experts since the last log, by layer: {found}. They learn nothing; train "
                "with output_router_logits=True, whose balance loss (router_aux_loss_coef) brings them back, or leave "
                "it if they were dead in the source"
            )


def _options_of(model: Any) -> dict[str, Any]:
    """Return a soft model's `config.softmoe`, which is changed in place."""
    if (soft := getattr(getattr(model, "config", None), "softmoe", None)) is None:
        raise TiedMoeError(
            f"AnnealRouting got a {type(model).__name__} that is not routed softly; expected routing='softmoe' in "
            "its config: leave the callback out, or make the model with it"
        )
    return soft


def _warn_of_decay(model: Any, optimizer: Any) -> None:
    """Warn if the optimizer pulls a learned budget towards an even one, as Trainer's own does with weight_decay."""
    budget = {id(parameter) for name, parameter in model.named_parameters() if BUDGET_NAME.search(name)}
    for group in getattr(optimizer, "param_groups", ()):
        if group.get("weight_decay") and budget & {id(parameter) for parameter in group["params"]}:
            logger.warning(
                f"the layers' shares of the budget decay by weight_decay={group['weight_decay']}, towards even ones; "
                "give Trainer an optimizer over training.pool_parameter_groups(model, lr, weight_decay), where they "
                "do not, and have a learning rate of their own"
            )


def routing_logs(model: nn.Module) -> dict[str, float]:
    """Return what soft layers have used since the last reset, as a log has it.

    Returns:
        `active_experts`, the mean over tokens and layers; `dead_experts`, over all layers; `tokens_cut`, the share of
        tokens that lost experts to `max_active`. Empty if nothing was routed softly.
    """
    if not (layers := active_experts(model)):
        return {}
    return {
        "active_experts": sum(each["mean"] for each in layers) / len(layers),
        "dead_experts": sum(each["dead"] for each in layers),
        "tokens_cut": sum(each["tokens_cut"] for each in layers) / sum(each["tokens"] for each in layers),
    }

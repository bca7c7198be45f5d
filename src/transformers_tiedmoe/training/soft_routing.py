"""Bring soft routing to its targets in any training by Trainer; see `routing.SoftMoeOptions`.

SoftMoE's own schedule (arXiv 2606.17952) is not public to us. Here alpha and the budget move in equal steps, from
where the model started, and the threshold follows what tokens really use.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..audit.metrics import dead_experts, tells_dead
from ..errors import TiedMoeError
from ..routing.softmoe import active_experts, soft_routers
from .callbacks import AddsToLogs
from .parameter_groups import BUDGET_NAME

logger = logging.get_logger(__name__)

THRESHOLDS = (1e-4, 0.5)  # between which it is moved
RATE = 0.5  # of the logarithm of what is used by what is asked for
TOLERANCE = 0.05  # nats of the training loss
KEPT = ("threshold", "held", "waits", "lowest", "pending")  # what a checkpoint keeps


class AnnealRouting(AddsToLogs, ExportableState):
    """Move `alpha` and `budget` to their targets, and `threshold` towards `target_active`; log, warn of dead experts.

    `AnnealRouting().attach(trainer)`; `tiedmoe heal` does it by itself. What is set depends on the step, the threshold
    on what tokens used. With `add_loss` annealing also waits while the loss, the mean of `interval` steps over all
    processes, is more than `tolerance` above the lowest such mean so far; it waits in at most half of the steps that
    `share` leaves, so that half of them are trained at the targets. All of that is in the checkpoints'
    trainer_state.json, and a run that was killed goes on as it would have.

    Args:
        model: to check at once that it is routed softly; Trainer hands its own over when training begins.
        start: `config.softmoe` before the first step of the first run; the model's when training begins by default.
        share: of the steps in which the targets are reached if it never waits.
        interval: steps between two looks at what tokens use and at the loss.
        tolerance: in nats.

    Attributes:
        held: the steps in which it waited.

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
        tolerance: float = TOLERANCE,
    ):
        if model is not None:
            _options_of(model)
        self.start, self.share, self.interval = None if start is None else dict(start), share, interval
        self.tolerance = tolerance
        self.threshold: float | None = None
        self.held, self.waits = 0, False
        self.lowest: float | None = None  # mean loss
        self.pending: list[float] = []  # since the last look, over processes: experts, tokens a layer; the loss
        self._losses: list[torch.Tensor] = []
        self.dead: set[tuple[int, int]] = set()  # layer and expert that a warning has named

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it."""
        names = ("start", "share", "interval", "tolerance")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in KEPT},
        }

    def add_loss(self, loss: torch.Tensor) -> None:
        """Note the loss of a batch, divided as its step's sum is, from `training_step`; no device is waited for."""
        self._losses.append(loss.detach())

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Take the model's options; after a kill those of the first run, and what was reached."""
        self.soft = soft = _options_of(model)
        if state.global_step and (kept := state.stateful_callbacks.get(type(self).__name__)):
            self.start = kept["args"]["start"]
            for name in KEPT:
                setattr(self, name, kept["attributes"][name])
            soft["threshold"] = self.threshold or soft["threshold"]
        self.start = dict(soft if self.start is None else self.start)
        active_experts(model, reset=True)
        self.seen = torch.zeros(len(soft_routers(model)), 2, dtype=torch.float64)
        self.found = torch.zeros_like(self.seen)
        self._losses.clear()
        _warn_of_decay(model, optimizer)

    def on_step_begin(self, args, state, control, **kwargs):
        """Set alpha and the budget of this step."""
        last = self._last(state.max_steps)
        done = state.global_step - self.held  # steps that annealed
        if self.waits and done < last and self.held < (state.max_steps - last) / 2:
            self.held += 1
        else:
            done += 1
        self._set(done / last)

    def restore(self, model: nn.Module, state: TrainerState) -> None:
        """Set what the last step of a checkpoint had, for a model that is not trained on from there."""
        self.on_train_begin(None, state, None, model=model)
        self._set((state.global_step - self.held) / self._last(state.max_steps))

    def _last(self, max_steps: int) -> float:
        """Return the annealing steps that lead to the targets."""
        return max(1.0, self.share * max_steps)

    def _set(self, done: float) -> None:
        for name in ("alpha", "budget"):
            if (target := self.start[f"target_{name}"]) is not None:
                self.soft[name] = self.start[name] + min(1.0, done) * (target - self.start[name])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Look at what tokens use and at the loss: move the threshold, and wait or go on."""
        looks = state.global_step % self.interval == 0
        if not looks and not control.should_save:
            return
        self._gather(args, model)
        if not looks:
            return
        *used, loss = self.pending
        self.pending = []
        experts, tokens = torch.tensor(used, dtype=torch.float64).view(-1, 2).unbind(-1)
        self._steer(float((experts / tokens.clamp(min=1)).sum()))
        if loss:  # 0 if nothing called `add_loss`
            self._judge(loss / self.interval / args.world_size, state.global_step)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        """Say what was used since the last log, and which experts are newly dead; count anew."""
        if not logs or "loss" not in logs:
            return
        logs.update(routing_logs(model))
        state.log_history[-1].update(routing_logs(model))
        self._look(model)
        self._warn_of_dead_experts(model)
        active_experts(model, reset=True)
        self.seen = torch.zeros_like(self.seen)

    def warnings(self, steps: int) -> list[str]:
        """Return what a report of `steps` steps is to say."""
        if not self.held:
            return []
        return [
            f"alpha and the budget of soft routing waited {self.held} of {steps} steps, as the training loss was more "
            f"than {self.tolerance:g} above its lowest; give more steps, or milder targets in config.json's softmoe"
        ]

    def on_train_end(self, args, state, control, **kwargs):
        """Take the targets away: they are reached."""
        self.take_targets_away()

    def take_targets_away(self) -> None:
        """Leave no target in the model's config, as none is left to reach."""
        for name in ("target_alpha", "target_budget"):
            self.soft[name] = None

    def _look(self, model: nn.Module) -> None:
        """Add what was used since the last look to `found`: experts and tokens of each layer."""
        counts = [router.counts for router in soft_routers(model)]
        now = [[0, 0] if each is None else [int(each.experts.sum()), int(each.tokens.sum())] for each in counts]
        seen = torch.tensor(now, dtype=torch.float64)
        self.found, self.seen = self.found + seen - self.seen, seen

    def _gather(self, args: TrainingArguments, model: nn.Module) -> None:
        """Add to `pending` what was found here and in the other processes. In float64 the sums are exact."""
        if self.start["target_active"] is not None:
            self._look(model)
        losses = torch.stack(self._losses).tolist() if self._losses else []
        here = torch.tensor([*self.found.flatten(), math.fsum(losses)], dtype=torch.float64)
        self.found = torch.zeros_like(self.found)
        self._losses.clear()
        if args.world_size > 1:
            here = reduce(here.to(args.device), "sum").cpu()
        self.pending = (here + torch.tensor(self.pending or 0.0, dtype=torch.float64)).tolist()

    def _steer(self, used: float) -> None:
        """Move the threshold, by the experts that a token uses in all layers."""
        if (target := self.soft["target_active"]) is not None and used > 0:
            threshold = self.soft["threshold"] * (used / target) ** RATE
            self.threshold = self.soft["threshold"] = min(max(threshold, THRESHOLDS[0]), THRESHOLDS[1])

    def _judge(self, loss: float, step: int) -> None:
        """Wait, or go on, by the mean loss of the last steps."""
        waited, self.waits = self.waits, self.lowest is not None and loss > self.lowest + self.tolerance
        self.lowest = loss if self.lowest is None else min(self.lowest, loss)
        if self.waits and not waited:
            logger.warning(
                f"step {step}: the loss, {loss:.4f}, is more than {self.tolerance:g} above its lowest, "
                f"{self.lowest:.4f}; alpha and the budget of soft routing wait until it is not"
            )

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
        tokens that lost experts to `max_active`; where the routing stands, `routing_alpha`, `routing_threshold` and
        `router_k/layer_N`, the soft mass of each layer. Empty if nothing was routed softly.
    """
    if not (layers := active_experts(model)):
        return {}
    soft = _options_of(model)
    return {
        **{f"routing_{name}": soft[name] for name in ("alpha", "threshold")},
        **{f"router_k/layer_{each['layer']}": each["k"] for each in layers},
        "active_experts": sum(each["mean"] for each in layers) / len(layers),
        "dead_experts": sum(each["dead"] for each in layers),
        "tokens_cut": sum(each["tokens_cut"] for each in layers) / sum(each["tokens"] for each in layers),
    }

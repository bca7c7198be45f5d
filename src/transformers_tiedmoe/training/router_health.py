"""`RouterHealth`: what the routers do while a model is trained, in Trainer's log; a warning if they collapse.

Recorded as the audit records it (`audit.routing`), by the audit's definitions (`audit.metrics`), in the steps that are
logged and in no other: it costs nothing in between, and changes neither outputs nor gradients.
"""

import contextlib
import itertools
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..audit import metrics
from ..audit.routing import Choices, RoutingWatch, layer_experts
from ..modeling_tiedmoe import TiedExperts
from .callbacks import AddsToLogs

logger = logging.get_logger(__name__)

OTHERWISE_EVERY = 10  # steps that are recorded, if Trainer logs by epochs
WHAT_TO_DO = (
    "train with output_router_logits=True, whose balance loss (router_aux_loss_coef) spreads the tokens, or lower the "
    "learning rate; leave it if the model was so before (`tiedmoe audit` says)"
)


class RouterHealth(AddsToLogs, ExportableState):
    """Put into each log, by layer, how evenly its router loads the experts; warn of collapsed layers, dead experts.

    `RouterHealth().attach(trainer)`; `tiedmoe heal` does it by itself. Whatever `report_to` names, such as
    tensorboard, wandb or trackio, gets the values with the loss. Of the step that is logged, over all processes and
    accumulated batches, without padding: `router_entropy/layer_L` (1 is even), `router_max_share/layer_L` of the
    busiest expert, `router_dead_experts/layer_L`, `router_active_experts/layer_L` of a token, and in a tied layer
    `router_agreement/layer_L` with the choices of the layer before it in its group. Forwards that gradient
    checkpointing repeats are not counted again.

    Args:
        warns_of_dead: whether to warn of dead experts; not beside `AnnealRouting`, which does so by all of the steps.

    Attributes:
        warnings: what was warned of, in words; each layer's collapse and each dead expert once.
    """

    def __init__(self, warns_of_dead: bool = True) -> None:
        self.warns_of_dead = warns_of_dead
        self.warnings: list[str] = []
        self._logs: dict[str, float] = {}
        self._recording: _Recording | None = None
        self._since: dict[int, torch.Tensor] = {}  # by layer, choices that were not looked through for dead experts
        self._told: set[Any] = set()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it: a run that was killed warns as it would have."""
        since = {layer: counts.tolist() for layer, counts in self._since.items()}
        told = [list(each) if isinstance(each, tuple) else each for each in self._told]
        kept = {"since": since, "told": told, "warnings": self.warnings}
        return {"args": {"warns_of_dead": self.warns_of_dead}, "attributes": kept}

    def restore(self, state: TrainerState) -> None:
        """Take up what was seen by the step of a checkpoint, given its state."""
        kept = state.stateful_callbacks[type(self).__name__]["attributes"]
        self._since = {int(layer): torch.tensor(counts) for layer, counts in kept["since"].items()}
        self._told = {tuple(each) if isinstance(each, list) else each for each in kept["told"]}
        self.warnings = list(kept["warnings"])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Find the layers; after a kill, take up what was seen."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # a checkpoint from before it
        if state.global_step:
            self.restore(state)
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.has_experts = bool(layer_experts(self.model))
        if not self.has_experts:
            self._warn(f"{type(self.model).__name__} has no experts: RouterHealth has nothing to record")
        elif args.n_gpu > 1:
            self.has_experts = False
            self._warn("RouterHealth does not record under DataParallel: launch one process a GPU (accelerate launch)")

    def on_step_begin(self, args, state, control, **kwargs):
        """Record this step if it will be logged."""
        if self.has_experts and _is_logged(state.global_step + 1, args, state):
            self._recording = _Recording(self.model)

    def on_step_end(self, args, state, control, **kwargs):
        """Compute the values, over all processes, and warn."""
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        recording.close()
        if not recording.counts:
            self._warn("RouterHealth saw no layer with experts run: under torch.compile it cannot record")
            return
        recording.reduce(args.device)
        self._logs = recording.values()
        self._look(recording)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the values to a log of the loss."""
        if logs and "loss" in logs and self._logs:
            logs.update(self._logs)
            state.log_history[-1].update(self._logs)
            self._logs = {}

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the hooks of a step that was broken off."""
        if self._recording is not None:
            self._recording.close()
            self._recording = None

    def _look(self, recording: "_Recording") -> None:
        """Warn of what is new: collapse in this step, and experts that were dead over steps with enough choices."""
        found: list[int] = []
        dead: dict[int, list[int]] = {}
        for layer, counts in recording.counts.items():
            top_k = max(1, round(recording.active(layer)))
            if metrics.is_collapsed(counts, top_k) and layer not in self._told:
                found.append(layer)
                self._told.add(layer)
            since = self._since.get(layer, 0) + counts
            enough = self.warns_of_dead and metrics.tells_dead(since)
            self._since[layer] = torch.zeros_like(counts) if enough else since
            experts = metrics.dead_experts(since) if enough else []
            if new := [expert for expert in experts if (layer, expert) not in self._told]:
                dead[layer] = new
                self._told.update((layer, expert) for expert in new)
        if found:
            self._warn(f"the routers of layers {found} have collapsed: as few experts as one token uses take half of "
                       f"what the others should have; {WHAT_TO_DO}")  # fmt: skip
        if dead:
            self._warn(f"no token uses these experts any more, by layer: {dead}; {WHAT_TO_DO}")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            logger.warning(text)


class _Recording:
    """Counts of one step. Hooks are on from its beginning to `close`, and count within a forward of the base model.

    What gradient checkpointing repeats, it repeats outside of it, in the backward pass.
    """

    def __init__(self, model: PreTrainedModel):
        self.counts: dict[int, torch.Tensor] = {}  # by layer `[E]`
        self.tokens: dict[int, torch.Tensor] = {}
        self.agreeing: dict[int, torch.Tensor] = {}  # by tied layer: choices that agree, and all
        self._before = _layers_before(model)
        self._rows: dict[int, torch.Tensor] = {}
        self._mask: torch.Tensor | None = None
        self._is_forward = False
        self._watch = RoutingWatch(model, self._count)
        base: Any = model.base_model
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(self._watch)
        self._hooks.callback(base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self._hooks.callback(base.register_forward_hook(self._end, always_call=True).remove)

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask.flatten().bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        self._is_forward = True

    def _end(self, *_: Any) -> None:
        self._is_forward = False
        self._rows.clear()

    def _count(self, layer: int, choices: Choices) -> None:
        if not self._is_forward:
            return
        slots, rows = choices.slots, choices.rows
        if self._mask is not None and len(self._mask) == len(slots):
            keeps = self._mask.to(slots.device)
            slots, rows = slots[keeps], rows[keeps]
        self._add(self.counts, layer, metrics.expert_counts(slots, choices.num_slots))
        self._add(self.tokens, layer, torch.tensor(len(slots)))
        self._rows[layer] = rows
        reference = self._rows.get(self._before.get(layer, -1))
        if reference is not None and len(reference) == len(rows):
            agreeing, chosen = metrics.agreeing_choices(reference.to(rows.device), rows, choices.num_rows)
            self._add(self.agreeing, layer, torch.stack([agreeing.sum(), chosen.sum()]))

    @staticmethod
    def _add(sums: dict[int, torch.Tensor], layer: int, found: torch.Tensor) -> None:
        sums[layer] = sums[layer] + found if layer in sums else found

    def reduce(self, device: torch.device) -> None:
        """Sum over processes, in one exchange, and fetch the counts from the device."""
        for sums in (self.counts, self.tokens, self.agreeing):
            sums.update({layer: found.to(device) for layer, found in sums.items()})
        parts = [each for sums in (self.counts, self.tokens, self.agreeing) for each in sums.values()]
        whole = reduce(torch.cat([each.reshape(-1) for each in parts]), "sum").cpu()
        pieces = iter(whole.split([each.numel() for each in parts]))
        for sums in (self.counts, self.tokens, self.agreeing):
            sums.update({layer: next(pieces) for layer in sums})

    def active(self, layer: int) -> float:
        """Return how many experts a token uses."""
        return float(self.counts[layer].sum() / self.tokens[layer].clamp(min=1))

    def values(self) -> dict[str, float]:
        """Return what is logged."""
        found: dict[str, float] = {}
        for layer, counts in self.counts.items():
            of_layer = {
                "entropy": float(metrics.choice_entropy(counts)),
                "max_share": float(metrics.load_shares(counts).max()),
                "dead_experts": float(metrics.num_dead(counts)),
                "active_experts": self.active(layer),
            }
            if layer in self.agreeing:
                agreeing, chosen = self.agreeing[layer].tolist()
                of_layer["agreement"] = agreeing / max(chosen, 1)
            found |= {f"router_{name}/layer_{layer}": value for name, value in of_layer.items()}
        return found


def _layers_before(model: PreTrainedModel) -> dict[int, int]:
    """Return for each tied layer but the first of its group the one before it there."""
    groups: dict[int, list[int]] = {}
    for layer, experts in layer_experts(model).items():
        if isinstance(experts, TiedExperts):
            groups.setdefault(experts.pool_index, []).append(layer)
    return {after: before for group in groups.values() for before, after in itertools.pairwise(group)}


def _is_logged(step: int, args: Any, state: Any) -> bool:
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
    return args.logging_strategy == IntervalStrategy.EPOCH and step % OTHERWISE_EVERY == 0

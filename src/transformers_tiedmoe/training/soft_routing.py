"""Bring soft routing to its targets while a model is healed; see `routing.SoftMoeOptions`.

SoftMoE's own schedule (arXiv 2606.17952) is not public to us. Here alpha and the budget move in equal steps, from
where the model started, and the threshold follows what tokens really use.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from ..routing import active_experts

THRESHOLDS = (1e-4, 0.5)  # between which it is moved
RATE = 0.5  # of the logarithm of what is used by what is asked for


class AnnealRouting(TrainerCallback):
    """Move `alpha` and `budget` to their targets, and `threshold` towards `target_active`.

    What is set depends on the step alone, but for the threshold, which is in the checkpoints' config. A run that was
    killed goes on as it would have if it saves every so many looks.

    Args:
        model: to be trained; its `config.softmoe` is changed.
        start: `config.softmoe` before the first step of the first run.
        share: of the steps in which the targets are reached.
        interval: steps between two looks at what tokens use, over all processes.
    """

    def __init__(self, model: Any, start: Mapping[str, Any], share: float = 0.5, interval: int = 10):
        self.model, self.start, self.share, self.interval = model, dict(start), share, interval
        self.soft: dict[str, Any] = model.config.softmoe

    def on_step_begin(self, args, state, control, **kwargs):
        """Set alpha and the budget of this step."""
        done = min(1.0, (state.global_step + 1) / max(1.0, self.share * state.max_steps))
        for name in ("alpha", "budget"):
            if (target := self.start[f"target_{name}"]) is not None:
                self.soft[name] = self.start[name] + done * (target - self.start[name])

    def on_step_end(self, args, state, control, **kwargs):
        """Move the threshold."""
        if self.soft["target_active"] is None or state.global_step % self.interval:
            return
        here = sum(each["mean"] for each in active_experts(self.model, reset=True))
        if (used := float(reduce(torch.tensor(here, device=args.device), "mean"))) > 0:
            threshold = self.soft["threshold"] * (used / self.soft["target_active"]) ** RATE
            self.soft["threshold"] = min(max(threshold, THRESHOLDS[0]), THRESHOLDS[1])

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Count anew, for the next log to say what was used since this one."""
        if logs and "loss" in logs and self.soft["target_active"] is None:
            active_experts(self.model, reset=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Take the targets away: they are reached."""
        for name in ("target_alpha", "target_budget"):
            self.soft[name] = None

"""What healing changes in transformers' Trainer: optimizer groups, distillation, evaluation, divergence."""

import math

import torch
from accelerate.utils import reduce
from transformers import Trainer

from .data import model_inputs, sequence_losses
from .distillation import Teacher, summed
from .fused_loss import FusedLoss
from .muon import Muon, muon_parameter_groups
from .outcome import Diverged
from .parameter_groups import BUDGET_LR, pool_parameter_groups
from .soft_routing import AnnealRouting


class HealTrainer(Trainer):
    """Trainer with pool parameter groups, a teacher if there is one, and evaluation without auxiliary losses.

    Args:
        lr_divisor, budget_lr: see `pool_parameter_groups`.
        teacher: what to learn from besides the text, or None.
        teacher_weight: w in `(1 - w) * (the model's own loss) + w * KL(teacher || model)`.
        fused: the model's `FusedLoss`; the logits of a whole batch exist without it.
        annealing: is told the loss of each batch; a callback of this trainer.
    """

    def __init__(
        self,
        *args,
        lr_divisor="none",
        budget_lr=BUDGET_LR,
        teacher: Teacher | None = None,
        teacher_weight=0.5,
        fused: FusedLoss | None = None,
        annealing: AnnealRouting | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=_token_weighted_loss, **kwargs)
        self.lr_divisor = lr_divisor
        self.budget_lr = budget_lr
        self.uses_muon = getattr(self.args, "optimizer", None) == "muon"
        self.teacher = teacher
        self.teacher_weight = teacher_weight
        self.fused = fused
        self.annealing = annealing
        self._is_finite = torch.ones((), dtype=torch.bool, device=self.args.device)

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model=None):
        """Make the optimizer that the arguments name, or Muon, over pool parameter groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            rates = {"lr_divisor": self.lr_divisor, "budget_lr": self.budget_lr}
            make_groups = muon_parameter_groups if self.uses_muon else pool_parameter_groups
            groups = make_groups(model, self.args.learning_rate, self.args.weight_decay, **rates)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = Muon(groups) if self.uses_muon else optimizer_class(groups, **options)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run one forward and backward, and note whether the loss was finite, without waiting for the device."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._is_finite &= loss.detach().isfinite()
        if self.annealing is not None:
            self.annealing.add_loss(loss)
        return loss

    def log(self, logs, *args, **kwargs):
        """Log; raise `Diverged` if a loss was not finite."""
        self._refuse_to_go_on()
        if not math.isfinite(logs.get("eval_loss", 0.0)) and self.state.global_step == 0:
            raise Diverged(
                f"the held-out loss is {logs['eval_loss']} before the first step: the model's weights hold what is no "
                "number, or are too large for their dtype; expected a model that works"
            )
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Evaluate a model whose loss was finite; a soft router refuses another, on a GPU for good."""
        self._refuse_to_go_on()
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self._refuse_to_go_on()  # continuing from such a checkpoint would diverge again
        super()._save_checkpoint(*args, **kwargs)

    def _refuse_to_go_on(self) -> None:
        # Of all processes, so that they end together: one that goes on would wait for the others.
        if reduce(self._is_finite.float(), "sum") < self.args.world_size:
            raise Diverged(
                f"the healing diverged: by step {self.state.global_step} the loss is no number any more: lower "
                "learning_rate"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mix the model's own loss, auxiliary losses included, with the divergence from the teacher."""
        if self.teacher is None and self.fused is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = self.teacher.targets(inputs) if self.teacher else ()
        kept: list = []

        def forward(given):
            loss, outputs = super(HealTrainer, self).compute_loss(model, dict(given), True, num_items_in_batch)
            kept.append(outputs)
            return loss

        if self.fused is not None:
            on_text, divergence, auxiliary = self.fused.training_loss(forward, inputs, self.teacher, targets)
            loss = on_text + auxiliary
        else:
            loss = forward(inputs)
            divergence = self._divergence(kept[0].logits, targets, inputs["labels"], num_items_in_batch)
        if self.teacher is not None:
            loss = (1 - self.teacher_weight) * loss + self.teacher_weight * divergence
        return (loss, kept[0]) if return_outputs else loss

    def _divergence(self, logits, targets, labels, num_items_in_batch) -> torch.Tensor:
        """Return the divergence from the teacher, from a batch's logits, normalised as the model's own loss is."""
        assert self.teacher is not None
        labels, before = labels[:, 1:], tuple(target[:, :-1] for target in targets)
        divergence = summed(self.teacher.divergence, logits[:, :-1], before, labels)
        if num_items_in_batch is None:
            return divergence / (labels != -100).sum()
        # By Trainer: over all processes' tokens and accumulation steps.
        return divergence / num_items_in_batch * self.accelerator.num_processes

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return per sequence the summed cross-entropy and the number of tokens: their mean over tokens is exact.

        Trainer's own mean would include the balance loss and count the sequences that fill up the last batch twice.
        """
        inputs = self._prepare_inputs(inputs)
        given = {"labels": inputs["labels"], **model_inputs(inputs)}
        with torch.no_grad():
            if self.fused is None:
                sums, counts = sequence_losses(model, **given)
            else:
                sums, counts = self.fused.sequence_losses(lambda each: model(**each, use_cache=False).loss, given)
        return None, sums, counts


def _token_weighted_loss(prediction) -> dict:
    sums, counts = prediction.predictions, prediction.label_ids
    return {"loss": float(sums.sum(dtype="float64") / counts.sum()), "tokens": int(counts.sum())}

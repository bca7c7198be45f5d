"""What healing changes in transformers' Trainer: the optimizer's groups, distillation, and what is evaluated."""

from collections.abc import Callable

import torch
from transformers import Trainer, TrainerCallback

from .data import sequence_losses
from .distillation import distillation_loss
from .parameter_groups import pool_parameter_groups


class HealTrainer(Trainer):
    """Trainer with pool parameter groups, a teacher where there is one, and evaluation without auxiliary losses.

    Args:
        lr_divisor: see `pool_parameter_groups`.
        teacher: a frozen causal language model on the device of the training, or None.
        teacher_weight: w in `(1 - w) * (the model's own loss) + w * KL(teacher || model)`.
        temperature: of the divergence.
    """

    def __init__(self, *args, lr_divisor="none", teacher=None, teacher_weight=0.5, temperature=1.0, **kwargs):
        super().__init__(*args, compute_metrics=_token_weighted_loss, **kwargs)
        self.lr_divisor = lr_divisor
        self.teacher = teacher
        self.teacher_weight = teacher_weight
        self.temperature = temperature

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model=None):
        """The optimizer that the arguments name, over pool parameter groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = pool_parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.lr_divisor)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss, auxiliary losses included, mixed with the divergence from the teacher."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        labels = inputs["labels"][:, 1:]
        divergence = distillation_loss(outputs.logits[:, :-1], teacher_logits[:, :-1], labels, self.temperature)
        # Normalised as Trainer normalises the model's own loss: over the tokens of all processes and accumulation steps.
        if num_items_in_batch is None:
            divergence = divergence / (labels != -100).sum()
        else:
            divergence = divergence / num_items_in_batch * self.accelerator.num_processes
        loss = (1 - self.teacher_weight) * loss + self.teacher_weight * divergence
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per sequence the summed cross-entropy and the number of tokens, so that the mean over tokens is exact.

        Trainer's own mean would include the balance loss and count the sequences that fill up the last batch twice.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            sums, counts = sequence_losses(model, inputs["input_ids"], inputs["labels"])
        return None, sums, counts


class ProgressReport(TrainerCallback):
    """Calls `progress(done_steps, all_steps, what)` after each step."""

    def __init__(self, progress: Callable[[int, int, str], None]):
        self.progress = progress
        self.what = "healing"

    def on_train_begin(self, args, state, control, **kwargs):
        """Show where a continued run starts."""
        self.progress(state.global_step, state.max_steps, "evaluating" if args.eval_on_start else self.what)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the last loss to show."""
        if logs and "loss" in logs:
            self.what = f"healing, loss {float(logs['loss']):.3f}"

    def on_step_end(self, args, state, control, **kwargs):
        """Report one more step."""
        self.progress(state.global_step, state.max_steps, self.what)


def _token_weighted_loss(prediction) -> dict:
    sums, counts = prediction.predictions, prediction.label_ids
    return {"loss": float(sums.sum(dtype="float64") / counts.sum()), "tokens": int(counts.sum())}

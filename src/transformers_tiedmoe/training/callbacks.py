"""What happens between Trainer's steps: progress is reported, and logs gain values before they are."""

from collections.abc import Callable
from typing import Self

from transformers import Trainer, TrainerCallback


class AddsToLogs(TrainerCallback):
    """A callback that puts values of its own into logs: `Callback().attach(trainer)`."""

    def attach(self, trainer: Trainer) -> Self:
        """Add it to a trainer before the callbacks that report, such as TensorBoard's: they see a log in order.

        Trainer's own, which comes first and decides when to log and to save, stays before it.
        """
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(1, callbacks.pop())
        return self


class ProgressReport(TrainerCallback):
    """Call `progress(done_steps, all_steps, what)` after each step."""

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

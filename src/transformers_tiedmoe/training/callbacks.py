"""What healing does between Trainer's steps: report progress."""

from collections.abc import Callable

from transformers import TrainerCallback


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

"""The loss of a causal language model, fused with its head: the logits of a chunk of tokens exist at a time.

A batch's logits, not the weights, are what a large vocabulary runs out of memory by. Here the model gives its last
hidden states, and each chunk goes through the head, cross-entropy and divergence inside a checkpoint, which computes
them again in the backward. Liger's fused linear losses have the idea (Liger-Kernel, `chunked_loss`); they are not used
because they take the head for one matrix product: no soft cap or scaling of logits, no adapter, no top-k teacher.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..errors import TiedMoeError
from ..fsdp import end_with_loss
from .data import sequence_losses
from .distillation import Teacher

CHUNK_NUMBERS = 1 << 24  # logits in a chunk, 64 MiB in fp32
SAMPLE = 64  # tokens on which the two ways are compared


def fuse(
    model: PreTrainedModel, rows: datasets.Dataset, batch_tokens: int, wanted: bool | None
) -> tuple["FusedLoss | None", str | None]:
    """Return the fused loss of a model, None if it has none, and then a sentence that says why.

    Args:
        model: without an adapter around it, where it is to run.
        rows: some text, as `input_ids`.
        batch_tokens: of one forward.
        wanted: by default if a batch has more tokens than a chunk; there is nothing to gain otherwise.

    Raises:
        TiedMoeError: it is wanted, and the model has a form that it cannot have.
    """
    if wanted is False or (wanted is None and batch_tokens <= _chunk_size(model)):
        return None, None
    problem = why_not_fused(model, torch.tensor(rows[0]["input_ids"])[None, :SAMPLE])
    if problem is None:
        return FusedLoss(model), None
    if wanted:
        raise TiedMoeError(f"fused_loss cannot be had: {problem}; leave it out")
    return None, f"the loss is not fused with the head, and so needs the logits of whole batches: {problem}"


class FusedLoss:
    """The `loss_function` of a causal LM, in the place of its family's, when asked for one.

    It works inside the model's own forward, so that auxiliary losses, DDP's and FSDP's hooks and autocast stay as they
    are. The forward is told to make the logits of one token only.

    Args:
        model: a causal LM, without an adapter around it.
        chunk_size: tokens at a time; by default as many as have `CHUNK_NUMBERS` logits.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int | None = None):
        self.model, self._family_loss = model, model.loss_function
        self.chunk_size = chunk_size or _chunk_size(model)
        self._asked: dict[str, Any] | None = None
        self._hidden: torch.Tensor | None = None
        self._end: Any = None
        self._hook = model.base_model.register_forward_hook(self._keep)
        model.loss_function = self

    def remove(self) -> None:
        """Give the model its own loss back."""
        self._hook.remove()
        self.model.loss_function = self._family_loss

    def training_loss(
        self, forward, inputs: Mapping[str, Any], teacher: Teacher | None = None, targets: tuple = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run a forward and return `(loss on the text, divergence from the teacher, auxiliary losses)`, scalars.

        Args:
            forward: called with the inputs; gives `outputs.loss` of the model, or a multiple of it.
            inputs: of the model, with labels.
            teacher: whose divergence is to be computed; it is normalised as the loss on the text is.
            targets: what the teacher says of these inputs, tensors `[B, T, ...]`.
        """
        loss = self._run(forward, inputs, teacher=teacher, targets=targets, by_sequence=False)
        return loss[0] - loss[2], loss[1] - loss[2], loss[2]

    def sequence_losses(self, forward, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each sequence's summed cross-entropy, fp32 `[B]`, and number of tokens; as `data.sequence_losses`."""
        loss = self._run(forward, inputs, teacher=None, targets=(), by_sequence=True)
        return loss[:-1] - loss[-1], (inputs["labels"][:, 1:] != -100).sum(-1)

    def _run(self, forward, inputs: Mapping[str, Any], **asked: Any) -> torch.Tensor:
        self._asked = asked
        self._end = self._end or end_with_loss(self.model.get_output_embeddings(), lambda: self._asked is not None)
        try:
            return forward({**inputs, "logits_to_keep": 1})
        finally:
            self._asked = self._hidden = None

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._asked is not None and not isinstance(output, _Given):
            self._hidden = output.last_hidden_state

    def __call__(self, logits, labels, *args, num_items_in_batch=None, shift_labels=None, **kwargs) -> torch.Tensor:
        """Return losses and a zero, in one vector.

        The model adds its auxiliary losses to every element, so the last one tells how much it added.
        """
        if self._asked is None:
            options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
            return self._family_loss(logits, labels, *args, **options)
        assert self._hidden is not None, "the forward has not called its base model"
        hidden, teacher, targets = self._hidden, self._asked["teacher"], self._asked["targets"]
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        shifted = shifted.to(hidden.device)
        if self._asked["by_sequence"]:
            sums = [self._sums(*row, teacher, ())[0] for row in zip(hidden, shifted)]
        else:
            flat = [each.flatten(0, 1) for each in (hidden, shifted, *targets)]
            total = self._sums(flat[0], flat[1], teacher, flat[2:])
            items = (shifted != -100).sum() if num_items_in_batch is None else num_items_in_batch
            sums = list(total / (items.to(total.device) if isinstance(items, torch.Tensor) else items))
        losses = torch.stack([*sums, torch.zeros_like(sums[0])])
        return self._end(losses) if self._end else losses

    def _sums(self, hidden, labels, teacher, targets) -> torch.Tensor:
        """Return summed cross-entropy and divergence `[2]` of tokens: hidden `[N, H]`, labels `[N]`."""
        chunks = zip(*(each.split(self.chunk_size) for each in (hidden, labels, *targets)))
        return torch.stack(
            [
                checkpoint(self._chunk, teacher, *chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in chunks
            ]
        ).sum(0)

    def _chunk(self, teacher, hidden, labels, *targets) -> torch.Tensor:
        logits = head_logits(self.model, hidden).float()
        on_text = F.cross_entropy(logits, labels, reduction="sum")
        if teacher is None:
            return torch.stack([on_text, torch.zeros_like(on_text)])
        return torch.stack([on_text, (teacher.divergence(logits, *targets) * (labels != -100)).sum()])


def _chunk_size(model: PreTrainedModel) -> int:
    return max(128, CHUNK_NUMBERS // model.config.get_text_config().vocab_size)


class _Given(MoeModelOutputWithPast):
    """What a base model gives that was not run: its last hidden states, and None for whatever a family adds."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits `[N, V]` that a causal LM makes of last hidden states `[N, H]`.

    By its own forward, whatever that does to logits, with a base model that only gives `hidden`.
    """
    base: Any = model.base_model
    own = base.__dict__.get("forward")  # accelerate's, of an offloaded model
    base.forward = lambda *args, **kwargs: _Given(last_hidden_state=hidden[None])
    try:
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        return type(model).forward(model, input_ids=ids, use_cache=False, output_router_logits=False).logits[0]
    finally:
        del base.forward
        if own is not None:
            base.forward = own


def why_not_fused(model: PreTrainedModel, input_ids: torch.Tensor) -> str | None:
    """Return why the loss of a causal LM cannot be computed from its last hidden states; None if it can.

    Its own logits and loss are compared with what is computed so.

    Args:
        model: without an adapter around it.
        input_ids: int64 `[B, T]`, some tokens of the text.
    """
    was_training, name = model.training, type(model).__name__
    model.eval()
    fused = FusedLoss(model)
    inputs = {"input_ids": input_ids.to(model.device), "labels": input_ids.to(model.device)}
    try:
        with torch.no_grad():
            expected, _ = sequence_losses(model, **inputs)
            found, _ = fused.sequence_losses(lambda given: model(**given, use_cache=False).loss, inputs)
            problem = why_no_head(model, input_ids)
    except Exception as error:  # whatever a forward of another form raises
        return f"{name} does not give it ({type(error).__name__}: {error})"
    finally:
        fused.remove()
        model.train(was_training)
    return problem if problem or _is_close(found, expected) else f"{name} has a loss of another form"


@torch.no_grad()
def why_no_head(model: PreTrainedModel, input_ids: torch.Tensor) -> str | None:
    """Return why `head_logits` does not give the logits of a causal LM; None if it does."""
    inputs = {"input_ids": input_ids.to(model.device), "use_cache": False}
    try:
        expected = model(**inputs).logits.flatten(0, 1)
        found = head_logits(model, model.base_model(**inputs).last_hidden_state.flatten(0, 1))
    except Exception as error:
        return f"{type(model).__name__} does not give it ({type(error).__name__}: {error})"
    return None if _is_close(found, expected) else f"{type(model).__name__} has logits of another form"


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two ways of computing the same agree; bfloat16 has 8 bits."""
    return found.shape == expected.shape and bool(((found - expected).abs() <= 0.02 * expected.abs().max()).all())

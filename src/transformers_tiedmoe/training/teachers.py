"""The teacher of a healing: the source itself, wherever it lies and however it is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import TiedMoeError
from .arguments import TiedMoeTrainingArguments
from .data import model_inputs
from .distillation import Teacher, divergence
from .fused_loss import SAMPLE, head_logits, why_no_head
from .pretrained import load_config, load_model, open_tokenizer

PLACED_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")


def open_teacher(
    args: TiedMoeTrainingArguments, config: PreTrainedConfig, tokenizer: Any, train: datasets.Dataset, offload: Path
) -> Teacher:
    """Load the frozen teacher that the arguments name.

    Args:
        args: of the healing.
        config: of the student, as is `tokenizer`: a number must mean the same token to both models.
        train: blocks of tokens.
        offload: folder for the layers that lie on the disk, which are read again for every batch.

    Raises:
        TiedMoeError: a teacher with another vocabulary, or no such device.
    """
    assert args.teacher is not None
    own = load_config(args.teacher, args.trust_remote_code)
    sizes = [each.get_text_config().vocab_size for each in (own, config)]
    if sizes[0] != sizes[1]:
        raise TiedMoeError(
            f"teacher {args.teacher} has a vocabulary of {sizes[0]} tokens, but {args.model} one of {sizes[1]}; "
            "give the source that the model was converted from"
        )
    if open_tokenizer(args.teacher, args.trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise TiedMoeError(
            f"the tokenizers of teacher {args.teacher} and of {args.model} number their tokens differently; "
            "give the source that the model was converted from"
        )
    model = _load(args, offload)
    has_head = why_no_head(model, torch.tensor(train[0]["input_ids"])[None, :SAMPLE]) is None
    return LiveTeacher(model, args.temperature, has_head)


def _load(args: TiedMoeTrainingArguments, offload: Path) -> PreTrainedModel:
    """Load the teacher's weights in `teacher_dtype` onto `teacher_device`."""
    where = args.teacher_device or str(args.device)
    try:
        placed = json.loads(where) if where.startswith("{") else where if where in PLACED_BY_ACCELERATE else None
        if placed is None:
            torch.empty(1, device=where)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise TiedMoeError(
            f"teacher_device={where} cannot be used ({str(error).splitlines()[0]}); expected cpu, cuda:1, "
            f"{', '.join(PLACED_BY_ACCELERATE)} or a device map as JSON"
        ) from error
    options: dict[str, Any] = {"device_map": placed, "offload_folder": str(offload)} if placed else {}
    if args.teacher_dtype != "auto":
        options["dtype"] = getattr(torch, args.teacher_dtype)
    model = load_model(str(args.teacher), args.trust_remote_code, **options).eval().requires_grad_(False)
    return model if placed else model.to(where)


class LiveTeacher:
    """A frozen causal LM that reads every batch.

    Args:
        model: in eval mode; on any device, or on several.
        temperature: of the divergence.
        has_head: whether `head_logits` gives its logits: they then exist for a chunk of tokens at a time.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, has_head: bool = False):
        self.model, self.temperature, self.has_head = model, temperature, has_head

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return its last hidden states, or its logits without `has_head`, `[B, T, ...]`, on its own device."""
        given = {name: tensor.to(self.model.device) for name, tensor in model_inputs(inputs).items()}
        if self.has_head:
            return (self.model.base_model(**given, use_cache=False).last_hidden_state,)
        return (self.model(**given, use_cache=False).logits,)

    def divergence(self, logits: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        """Return KL(teacher || student) per token, `[N]`."""
        with torch.no_grad():
            teacher_logits = head_logits(self.model, *targets) if self.has_head else targets[0]
        return divergence(logits, teacher_logits.to(logits.device), self.temperature)

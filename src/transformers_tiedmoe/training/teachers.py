"""Open the teacher of a healing: the source, wherever it lies, or what it said of the text before."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import TiedMoeError
from ..files import check_apart
from ..manifest import fingerprint
from .arguments import TiedMoeTrainingArguments
from .distillation import Teacher
from .documents import refuse_crossing
from .fused_loss import SAMPLE, why_no_head
from .live_teacher import LiveTeacher
from .pretrained import load_config, load_model, open_tokenizer
from .teacher_cache import CachedTeacher, make_cache

PLACED_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")


def open_teacher(
    args: TiedMoeTrainingArguments,
    config: PreTrainedConfig,
    tokenizer: Any,
    blocks: tuple[Any, datasets.Dataset],
    offload: Path,
) -> Teacher:
    """Load the frozen teacher that the arguments name, or open its cache, which is filled first where it is not.

    Args:
        args: of the healing.
        config: of the student, as is `tokenizer`: a number must mean the same token to both models.
        blocks: to train on, and held out.
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

    def load() -> LiveTeacher:
        model = _load(args, offload)
        if args.separate_documents:
            refuse_crossing(model, str(args.teacher))
        has_head = why_no_head(model, torch.tensor(blocks[1][0]["input_ids"])[None, :SAMPLE]) is None
        return LiveTeacher(model, args.temperature, has_head)

    if not args.teacher_cache:
        return load()
    inputs: dict[str, str | Path | None] = {name: getattr(args, name) for name in ("model", "data", "teacher")}
    check_apart(args.teacher_cache, inputs | {"output": Path(str(args.output_dir))}, name="teacher_cache")
    if args.teacher_top_k > sizes[0]:
        raise TiedMoeError(f"teacher_top_k={args.teacher_top_k}, but {args.teacher} knows {sizes[0]} tokens; lower it")
    identity = {**fingerprint(args.teacher, own), "dtype": args.teacher_dtype}
    make_cache(args.teacher_cache, blocks[0], identity, load, args.teacher_top_k, args.temperature)
    return CachedTeacher(blocks[0], args.teacher_cache, args.temperature)


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

"""Checks a written checkpoint before anybody sees it: headers, the Auto class, and the source's own logits.

The last is for methods that promise to lose nothing. A model too large to load twice is compared on its first and last
tied layers instead, expert by expert, and the report says which of the two was done.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .source import Source, open_source
from .write import Planned

if TYPE_CHECKING:
    from .plan import Plan

MAX_BYTES_FOR_LOGITS = 2 * 10**9  # one model; the two are loaded one after the other
SAMPLE_LENGTH = 32  # tokens of the compared input


class VerificationError(RuntimeError):
    """What was written is not what was planned: a mistake of ours or of the disk, never of the user's."""


def verify_output(folder: Path, planned: Iterable[Planned]) -> dict[str, Any]:
    """Reopen `folder`: every planned tensor is there with its shape and dtype, and the Auto class wants just these.

    Raises:
        VerificationError: with what is different.
    """
    expected = {tensor.target: (tensor.shape, tensor.dtype, tensor.file) for tensor in planned}
    found = {name: (info.shape, info.dtype, info.file) for name, info in open_source(str(folder)).tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise VerificationError(f"{folder}: tensors differ from the plan: {wrong[:5]}")
    with _quietly():
        _, loading = AutoModelForCausalLM.from_pretrained(folder, device_map="meta", output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    if problems:
        raise VerificationError(f"{folder}: the Auto class does not load it cleanly: {problems}")
    return {"tensors": len(found), "headers": True, "auto_class": True, "finite": True}


def verify_lossless(plan: "Plan", folder: Path) -> dict[str, Any]:
    """The output computes what the source computes, bit for bit: on a sample input, or else layer by layer.

    Returns:
        `{"compared": "logits", "tokens": 32, "equal": True}`, or `{"compared": "experts", "layers": [...], "equal": True,
        "because": ...}` where the model is too large to be loaded or its family cannot run it here.

    Raises:
        VerificationError: they differ.
    """
    size = max(plan.bytes_before, plan.bytes_after)
    because = f"a model of {size:,} bytes is more than the {MAX_BYTES_FOR_LOGITS:,} that are loaded to compare logits"
    if size <= MAX_BYTES_FOR_LOGITS:
        try:
            expected = _logits(plan.source.opened.folder)
        except Exception as error:  # the family's own code, before ours has been run
            because = f"the source's own forward pass fails here: {type(error).__name__}: {error}"
        else:
            if not torch.equal(expected.view(torch.uint8), _logits(folder).view(torch.uint8)):
                raise VerificationError(f"{folder}: the logits are not those of {plan.recipe.source}")
            return {"compared": "logits", "tokens": SAMPLE_LENGTH, "equal": True}
    layers = sorted({plan.groups[0][0], plan.groups[-1][-1]})
    for layer in layers:
        _compare_experts(plan, open_source(str(folder)), layer)
    return {"compared": "experts", "layers": layers, "equal": True, "because": because}


def _logits(folder: Path) -> torch.Tensor:
    """Logits `[1, SAMPLE_LENGTH, vocab]` on fixed random tokens, with transformers' plain loops over experts."""
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager", dtype="auto"
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, SAMPLE_LENGTH), generator=generator)
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, use_cache=False).logits.contiguous()


def _compare_experts(plan: "Plan", output: Source, layer: int) -> None:
    """Raise unless `layer` reaches, through its slot map, the experts that it has in the source."""
    slot_map = output.read(f"{plan.source.experts[layer]}.slot_map")
    for operation in plan.operations:
        if operation.kind == "pool" and operation.pool == plan.config.group_of(layer):
            expected = f"{plan.source.experts[layer]}.{operation.parameter}"
            if not _same_rows(output, operation.target, slot_map, plan.source.tensors.read(expected)):
                raise VerificationError(f"layer {layer} does not find its own experts in {operation.target}")


def _same_rows(output: Source, pool: str, slot_map: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether `pool[slot_map]` of the output is `expected`, bit for bit; reads no more of the pool than it must."""
    first, last = int(slot_map.min()), int(slot_map.max()) + 1
    rows = output.read(pool, first, last)
    if slot_map.tolist() != list(range(first, last)):
        rows = rows[slot_map - first]
    return torch.equal(rows.view(torch.uint8), expected.contiguous().view(torch.uint8))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars, which would be drawn over ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

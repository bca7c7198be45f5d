"""Checks a written checkpoint before anybody sees it: headers, the Auto class, and the source's own logits.

The last is for methods that promise to lose nothing. A model too large to load twice is compared on its first and last
tied layers instead, expert by expert, and the report says which of the two was done.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .source import Source, open_source
from .write import Planned

if TYPE_CHECKING:
    from .plan import Plan

MAX_BYTES_FOR_LOGITS = 2 * 10**9  # source and output together; they are loaded at the same time
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
    _, loading = AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder), device_map="meta", output_loading_info=True
    )
    problems = {key: sorted(map(str, value)) for key, value in loading.items() if value}
    if problems:
        raise VerificationError(f"{folder}: the Auto class does not load it cleanly: {problems}")
    return {"tensors": len(found), "headers": True, "auto_class": True, "finite": True}


def verify_lossless(plan: "Plan", folder: Path) -> dict[str, Any]:
    """The output computes what the source computes, bit for bit: on a sample input, or else layer by layer.

    Returns:
        `{"compared": "logits", "tokens": ...}`, or `{"compared": "experts", "layers": [...]}` for a large model.
    """
    size = plan.bytes_before + plan.bytes_after
    if size <= MAX_BYTES_FOR_LOGITS:
        return _compare_logits(plan.tensors.source, folder)
    first, last = plan.config.groups[0], plan.config.groups[-1]
    return _compare_experts(plan, folder, sorted({first[0], last[-1]}))


def _compare_logits(source: Source, folder: Path) -> dict[str, Any]:
    expected = _logits(source.folder)
    if not torch.equal(expected.view(torch.uint8), _logits(folder).view(torch.uint8)):
        raise VerificationError(f"{folder}: the logits are not those of {source.name}")
    return {"compared": "logits", "tokens": SAMPLE_LENGTH, "equal": True}


def _logits(folder: Path) -> torch.Tensor:
    """Logits `[1, SAMPLE_LENGTH, vocab]` on fixed random tokens, with transformers' plain loops over experts."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype="auto"
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, SAMPLE_LENGTH), generator=generator)
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, use_cache=False).logits.contiguous()


def _compare_experts(plan: "Plan", folder: Path, layers: list[int]) -> dict[str, Any]:
    output = open_source(str(folder))
    pools = {(o.pool, o.part): o.target for o in plan.operations if o.kind == "pool"}
    for layer in layers:
        p, path = plan.config.group_of(layer), plan.experts[layer]
        slot_map = output.read(f"{path}.slot_map")
        first, last = int(slot_map.min()), int(slot_map.max())
        for (pool, part), target in pools.items():
            if pool != p:
                continue
            rows = output.read(target, first, last + 1)[slot_map - first]
            expected = plan.tensors.read(f"{path}.{part}")
            if not torch.equal(rows.view(torch.uint8), expected.contiguous().view(torch.uint8)):
                raise VerificationError(f"{folder}: layer {layer} does not reach its own experts through {target}")
    return {"compared": "experts", "layers": layers, "equal": True}

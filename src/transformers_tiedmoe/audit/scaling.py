"""Training on many GPUs, predicted from a config alone: memory of each GPU, and what it sends in a step.

The audit's own model of memory (`memory_training.py`), for the ways that a tied model is trained by accelerate and
transformers: one GPU, DDP, FSDP2, and FSDP2 with the experts shared out over the GPUs of a node.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import TiedMoeError
from . import units
from .findings import smallest_gpu
from .memory import GIB, GPUS, unpredicted
from .memory_cache import prefill
from .memory_parameters import list_tensors
from .memory_training import Precision, Strategy, plan_training, step_bytes
from .subject import Subject, build_skeleton, layers_of

NODE = 8  # GPUs whose exchange of tokens does not leave a node


@dataclass(frozen=True)
class Setup:
    """How a model is spread over GPUs; `ep_size` of them share the experts out under FSDP2."""

    strategy: Strategy
    num_gpus: int
    ep_size: int = 1

    @property
    def name(self) -> str:
        """For people."""
        names = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2"}
        return names[self.strategy] + (f" + EP {self.ep_size}" if self.ep_size > 1 else "")


def setups(num_gpus: int, num_experts: Sequence[int]) -> list[Setup]:
    """Return the ways to train on `num_gpus`.

    Args:
        num_gpus: all of them.
        num_experts: of every pool and of every untied layer, which expert parallelism divides evenly; empty if it
            cannot be used.
    """
    if type(num_gpus) is not int or num_gpus < 1:
        raise TiedMoeError(f"gpus={num_gpus!r}; expected an integer of at least 1")
    if num_gpus == 1:
        return [Setup("one", 1)]
    ways = [Setup("ddp", num_gpus), Setup("fsdp2", num_gpus)]
    shared = math.gcd(num_gpus, *num_experts) if num_experts else 1
    if (ep_size := max(size for size in range(1, NODE + 1) if shared % size == 0)) > 1:
        ways.append(Setup("fsdp2", num_gpus, ep_size))
    return ways


def predict(
    config: PreTrainedConfig,
    num_gpus: Sequence[int],
    batch_size: int = 1,
    block_size: int = 4096,
    precision: Precision = "mixed",
) -> list[dict[str, Any]]:
    """Predict one step of AdamW with gradient checkpointing, for every way to spread a model over GPUs.

    Args:
        config: tied or not; no weight is needed, and none allocated.
        num_gpus: numbers of GPUs.
        batch_size: sequences on each GPU.
        block_size: tokens of a sequence.
        precision: see `MemoryOptions`.

    Returns:
        A row for each setup: its fields, those of `plan_training` and `gpu`, the smallest of `memory.GPUS` that holds
        it, or None.

    Raises:
        TiedMoeError: the model does not run on the meta device.
    """
    model = build_skeleton(config).to(torch.bfloat16)
    subject = Subject("", "", config, layers_of(model))
    try:
        top_k = prefill(model, 2, 1).top_k
        tensors = list_tensors(model, subject, top_k)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        activations = step_bytes(model, batch_size, block_size, precision, checkpointing=True)
    except (RuntimeError, NotImplementedError) as error:
        raise TiedMoeError(
            f"{unpredicted('training', error)}; expected a model whose code needs no values: leave --gpus out"
        ) from error
    sizes = {name: round(size * GIB) for name, size in GPUS.items()}
    found = []
    for setup in [way for number in num_gpus for way in setups(number, _num_experts(subject))]:
        needs = plan_training(
            tensors, buffers, activations[setup.strategy], precision, "adamw", setup.strategy, setup.num_gpus,
            batch_size * block_size, subject.config.get_text_config().hidden_size, top_k, True, setup.ep_size,
        )  # fmt: skip
        gpu = smallest_gpu({name: needs["total_bytes"] <= size for name, size in sizes.items()}, sizes)
        found.append({**vars(setup), "name": setup.name, **needs, "gpu": gpu})
    return found


def _num_experts(subject: Subject) -> list[int]:
    """Return the experts of every pool and untied layer; none where `parallel.py` refuses expert parallelism.

    It does so under soft routing, and with low-rank residuals.
    """
    config = subject.config
    if getattr(config, "routing", "top_k") != "top_k" or any(getattr(config, "residual_rank", ())):
        return []
    return [number for layer in subject.layers if (number := layer.pool_experts or layer.num_experts)]


COLUMNS = ("GPUs", "setup", "weights", "gradients", "AdamW", "activations", "each GPU", "fits", "sent in a step")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Write a row of `predict` for people, under `COLUMNS`."""
    parts = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes", "total_bytes")
    sent = units.size(row["communicated_bytes"]) if row["communicated_bytes"] else "–"
    sizes = (units.size(row[name]) for name in parts)
    return str(row["num_gpus"]), row["name"], *sizes, row["gpu"] or "none", sent

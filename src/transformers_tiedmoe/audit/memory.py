"""Evidence 2, memory: parameters, checkpoint, inference and training bytes, from config and headers without weights.

The model's skeleton runs on the meta device: caches and activations are those of transformers' own code, and nothing
is allocated. `memory_parameters.py` counts parameters, `memory_cache.py` caches, `memory_training.py` training.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from ..errors import TiedMoeError
from .memory_cache import prefill
from .memory_parameters import Tensor, count_layers, count_parameters, list_tensors
from .memory_training import OPTIMIZERS, PRECISIONS, STRATEGIES, Precision, plan_training, step_bytes
from .schema import Inference, Memory, Training
from .subject import Subject

GIB = 2**30
# What torch can use of each, as its own errors of full memory say ("GPU 0 has a total capacity of ..."), less than the
# name says. The GitHub issue that shows it stands beside each; "logs": several public repositories' logs agree.
GPUS = {
    "T4 16GB": 14.75,  # hpcaitech/Open-Sora 697
    "L4 24GB": 22.03,  # logs
    "RTX 3090 24GB": 23.70,  # Lightning-AI/lit-llama 137
    "RTX 4090 24GB": 23.64,  # TMElyralab/MuseTalk 76
    "RTX 5090 32GB": 31.36,  # TrajectoryCrafter/TrajectoryCrafter 20
    "A100 40GB": 39.50,  # TianheWu/CoSeR 10
    "L40S 48GB": 44.42,  # stepfun-ai/Step-Video-T2V 8
    "A100 80GB": 79.25,  # levihsu/OOTDiffusion 235
    "H100 80GB": 79.11,  # vllm-project/vllm 27508
    "H200 141GB": 139.80,  # logs
    "B200 192GB": 178.35,  # unslothai/unsloth 3411
    "MI300X 192GB": 191.98,  # logs
}
CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MemoryOptions:
    """What to predict memory for.

    Attributes:
        context: tokens of a sequence in serving.
        batch_size: sequences at a time, in serving and on each GPU in training.
        num_gpus: GPUs that training is split over.
        block_size: tokens of a sequence in training.
        dtypes: of the weights in serving, by torch's names; one of a byte keeps its cache in bfloat16.
        precision: of training, one of "mixed" (float32 weights, gradients and states, and bfloat16 computes: see
            `step_bytes`), "float32" and "bfloat16" (everything).
        gpus: names of `GPUS` to compare with; all by default.
    """

    context: int = 4096
    batch_size: int = 1
    num_gpus: int = 8
    block_size: int = 2048
    dtypes: tuple[str, ...] = ("bfloat16",)
    precision: Precision = "mixed"
    gpus: tuple[str, ...] = tuple(GPUS)

    def __post_init__(self) -> None:
        for name in ("context", "batch_size", "num_gpus", "block_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise TiedMoeError(f"{name}={getattr(self, name)!r}; expected an integer of at least 1")
        for name in self.dtypes:
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TiedMoeError(f"dtypes has {name!r}; expected floating dtypes of torch such as 'bfloat16'")
        if self.precision not in PRECISIONS:
            raise TiedMoeError(f"precision={self.precision!r}; expected one of {list(PRECISIONS)}")
        if unknown := [name for name in self.gpus if name not in GPUS]:
            raise TiedMoeError(f"gpus has {unknown[0]!r}; expected some of {list(GPUS)}")


def measure(subject: Subject, options: MemoryOptions | None = None) -> Memory:
    """Predict what a model needs; notes what could not be predicted in `subject.notes`.

    Args:
        subject: its config and, for the bytes of the checkpoint, its headers.
        options: what for.
    """
    options = options or MemoryOptions()
    gpus = {name: round(GPUS[name] * GIB) for name in options.gpus}
    stored = stored_bytes(subject)
    model = subject.skeleton()
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    model = model.to(torch.bfloat16)
    top_k: dict[int, int] = {}
    try:
        top_k = prefill(model, 2, 1).top_k
    except (RuntimeError, NotImplementedError) as error:
        subject.notes.append(unpredicted("the number of experts per token", error))
    text_config: Any = subject.config.get_text_config()
    if getattr(text_config, "routing", "top_k") == "softmoe" and top_k:
        subject.notes.append(
            f"memory: soft routing takes room for the most experts that a token may use ({max(top_k.values())} in a "
            "layer), whatever it does use, as on a GPU; `max_active` of its softmoe bounds that"
        )
    tensors = list_tensors(model, subject, top_k)
    return Memory(
        parameters=count_parameters(tensors),
        layers=count_layers(tensors, len(subject.layers)),
        checkpoint_bytes=sum(stored.values()) if stored else None,
        stored_dtypes=stored,
        inference=_inference(subject, model, tensors, options, buffers, stored, gpus),
        training=_training(subject, model, tensors, options, buffers, top_k, gpus),
        gpus=gpus,
    )


def stored_bytes(subject: Subject) -> dict[str, int]:
    """Return the bytes of a checkpoint's tensors by dtype as safetensors names them, from its headers.

    Packed values and their scales count as they are stored. Empty for a config without weights.

    Raises:
        TiedMoeError: a file in a local folder is missing, truncated or damaged.
    """
    folder = Path(subject.path)
    if not subject.path or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        return {}
    try:
        files = _local_headers(folder) if folder.is_dir() else _hub_headers(subject.path)
    except (
        OSError,
        huggingface_hub.errors.HFValidationError,
        huggingface_hub.errors.NotASafetensorsRepoError,
    ) as error:
        subject.notes.append(f"the headers of the weights could not be read: {type(error).__name__}: {error}")
        return {}
    found: Counter[str] = Counter()
    for file in files.values():
        for tensor in file.tensors.values():
            found[tensor.dtype] += tensor.data_offsets[1] - tensor.data_offsets[0]
    return dict(found)


def _hub_headers(name: str) -> dict[str, Any]:
    return huggingface_hub.get_safetensors_metadata(name).files_metadata


def _local_headers(folder: Path) -> dict[str, Any]:
    """Return the headers of a folder's weight files, each of which is there and whole."""
    expected = "expected whole safetensors files, as their header and index say: copy or download them again"
    try:
        files = huggingface_hub.get_local_safetensors_metadata(folder).files_metadata
    except (OSError, ValueError, huggingface_hub.errors.SafetensorsParsingError) as error:
        raise TiedMoeError(f"cannot read the headers of {folder}: {error}; {expected}") from error
    for name, found in files.items():
        with open(folder / name, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        size = header + max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
        if (actual := (folder / name).stat().st_size) < size:
            raise TiedMoeError(f"{folder / name} is truncated: it has {actual:,} of {size:,} bytes; {expected}")
    return files


def _inference(
    subject: Subject,
    model: Any,
    tensors: Sequence[Tensor],
    options: MemoryOptions,
    buffers: int,
    stored: dict[str, int],
    gpus: dict[str, int],
) -> list[Inference]:
    num = sum(tensor.num for tensor in tensors)
    weights = {name: num * getattr(torch, name).itemsize + buffers for name in options.dtypes}
    if getattr(subject.config, "quantization_config", None) is not None and stored:
        weights["as stored"] = sum(stored.values())
    found = []
    for name, weight_bytes in weights.items():
        dtype = getattr(torch, name, None)
        try:
            needs = prefill(
                model.to(dtype if dtype in CACHE_DTYPES else torch.bfloat16), options.context, options.batch_size
            )
        except (RuntimeError, NotImplementedError) as error:
            subject.notes.append(unpredicted("inference", error))
            return []
        total = weight_bytes + needs.cache_bytes + needs.working_bytes
        found.append(
            Inference(
                dtype=name,
                context=options.context,
                batch_size=options.batch_size,
                weight_bytes=weight_bytes,
                cache_bytes=needs.cache_bytes,
                working_bytes=needs.working_bytes,
                total_bytes=total,
                fits={gpu: total <= size for gpu, size in gpus.items()},
            )
        )
    return found


def _training(
    subject: Subject,
    model: Any,
    tensors: Sequence[Tensor],
    options: MemoryOptions,
    buffers: int,
    top_k: dict[int, int],
    gpus: dict[str, int],
) -> list[Training]:
    found = []
    for checkpointing in (False, True):
        if checkpointing and not model.supports_gradient_checkpointing:
            continue
        try:
            step = step_bytes(model, options.batch_size, options.block_size, options.precision, checkpointing)
        except (RuntimeError, NotImplementedError) as error:
            subject.notes.append(unpredicted("training", error))
            continue
        for optimizer in OPTIMIZERS:
            for strategy in STRATEGIES:
                num_gpus = 1 if strategy == "one" else options.num_gpus
                fields = plan_training(
                    tensors,
                    buffers,
                    step[strategy],
                    options.precision,
                    optimizer,
                    strategy,
                    num_gpus,
                    options.batch_size * options.block_size,
                    subject.config.get_text_config().hidden_size,
                    top_k,
                    checkpointing,
                )
                found.append(
                    Training(
                        optimizer=optimizer,
                        strategy=strategy,
                        num_gpus=num_gpus,
                        precision=options.precision,
                        gradient_checkpointing=checkpointing,
                        fits={gpu: fields["total_bytes"] <= size for gpu, size in gpus.items()},
                        **fields,
                    )
                )
    return found


def unpredicted(what: str, error: Exception) -> str:
    """Say what could not be predicted, and why."""
    return f"{what} could not be predicted without weights: {type(error).__name__}: {str(error).splitlines()[0]}"

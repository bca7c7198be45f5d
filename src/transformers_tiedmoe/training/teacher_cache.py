"""A teacher's most probable tokens, computed once over the training blocks and kept on the disk.

Per token k log-probabilities (float16), their tokens (int32) and the log-probability of all others (float32): 6k + 4
bytes. Training then needs no teacher in memory, and its text may be read many times.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from ..run_folder import Folder
from ..workdir import open_folder
from .data import model_inputs, tokens_digest
from .distillation import top_k_divergence, top_k_of
from .live_teacher import LiveTeacher

NAMES = ("log_q", "indices", "log_tail")
SHARD_BYTES = 64 << 20
TOKENS_AT_A_TIME = 4096  # read together: a layer that lies on the disk is read once for them
CHUNK_SIZE = 256  # tokens through the head


class CachedTeacher(Dataset):
    """Training blocks with what the teacher says of them, and the divergence from that (`top_k_divergence`).

    Args:
        rows: the blocks, each with `input_ids` and `labels` of one length.
        folder: that `make_cache` has filled from them.
        temperature: that of the cache.
    """

    def __init__(self, rows: datasets.Dataset, folder: str | Path, temperature: float = 1.0):
        self.rows, self.folder, self.temperature = rows, Path(folder), temperature
        self._opened: dict[int, Any] = {}
        self.shard_rows = self._shard(0).get_slice(NAMES[0]).get_shape()[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a block, with the teacher's tensors under their names."""
        shard, row = divmod(index, self.shard_rows)
        return {**self.rows[index], **{name: self._shard(shard).get_slice(name)[row] for name in NAMES}}

    def _shard(self, number: int) -> Any:
        if number not in self._opened:
            self._opened[number] = safe_open(self.folder / _name(number), "pt")
        return self._opened[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a worker process opens files of its own

    def targets(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Take the teacher's tensors out of a batch."""
        return tuple(inputs.pop(name) for name in NAMES)

    def divergence(self, logits: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        """Return the divergence with the tail as one event, per token, `[N]`."""
        log_q, indices, log_tail = targets
        return top_k_divergence(logits, log_q, indices, log_tail, self.temperature)


def make_cache(
    folder: str | Path,
    rows: datasets.Dataset,
    teacher: Mapping[str, Any],
    load: Callable[[], LiveTeacher],
    top_k: int,
    temperature: float = 1.0,
) -> None:
    """Fill a folder with what a teacher says of training blocks, or go on where a killed run stopped.

    The first process computes; the others wait.

    Args:
        folder: new, empty, or of an earlier run.
        rows: as in `CachedTeacher`.
        teacher: what identifies it, JSON-able.
        load: gives it; not called if the cache is complete.
        top_k: tokens to keep.
        temperature: of its distribution.

    Raises:
        TiedMoeError: the folder holds another teacher's, or of another text, or something else.
    """
    state = PartialState()
    identity = {
        "teacher": dict(teacher),
        "text": {"tokens_sha256": tokens_digest(rows)},
        "options": {
            "top_k": top_k,
            "temperature": temperature,
            "separate_documents": "position_ids" in rows.column_names,
        },
    }
    block_size = len(rows[0]["input_ids"])
    shard_rows = max(1, SHARD_BYTES // (block_size * (6 * top_k + 4)))
    with (
        state.main_process_first(),
        open_folder(
            folder,
            identity,
            what="a teacher's predictions",
            advice="give another folder (teacher_cache), or delete it",
            is_main=state.is_main_process,
        ) as work,
    ):
        if state.is_main_process:
            _fill(work, rows, load, top_k, temperature, shard_rows)


def _fill(
    work: Folder,
    rows: datasets.Dataset,
    load: Callable[[], LiveTeacher],
    top_k: int,
    temperature: float,
    shard_rows: int,
) -> None:
    live = None
    for number, start in enumerate(range(0, len(rows), shard_rows)):
        if work.is_sound(_name(number)):
            continue
        live = live or load()
        parts = []
        part = rows.select(range(start, min(start + shard_rows, len(rows))))
        for batch in part.with_format("torch").iter(max(1, TOKENS_AT_A_TIME // len(rows[0]["input_ids"]))):
            inputs = {name: column.long() for name, column in model_inputs(batch).items()}
            parts.append(_predict(live, inputs, top_k, temperature))
        tensors = {name: torch.cat(each) for name, each in zip(NAMES, zip(*parts))}
        with work.draft() as draft:
            save_file(tensors, draft / _name(number))


@torch.no_grad()
def _predict(live: LiveTeacher, inputs: dict[str, torch.Tensor], top_k: int, temperature: float) -> list[torch.Tensor]:
    """Return the tensors of `top_k_of` for inputs `[B, T]`, `[B, T, ...]` on the CPU."""
    (target,) = live.targets(inputs)
    chunks = [
        [each.cpu() for each in top_k_of(live.logits(chunk), top_k, temperature)]
        for chunk in target.flatten(0, 1).split(CHUNK_SIZE)
    ]
    return [torch.cat(each).unflatten(0, inputs["input_ids"].shape) for each in zip(*chunks)]


def _name(number: int) -> str:
    return f"teacher-{number:05}.safetensors"

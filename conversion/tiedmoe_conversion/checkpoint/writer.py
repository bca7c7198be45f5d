"""Writes weight files of any size, tensor by tensor, behind a header that the plan already knows.

A shard never has to fit into memory (safetensors' own writer wants all of it at once): while a block is written and
hashed in a thread of its own, the next one is made.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from huggingface_hub import split_state_dict_into_shards_factory

from transformers_tiedmoe.files import HASH, flush
from transformers_tiedmoe.output_place import partial_folder
from transformers_tiedmoe.run_folder import Work

from ..errors import ConversionError
from .headers import DTYPE_NAMES
from .reader import WEIGHTS, WEIGHTS_INDEX

Progress = Callable[[int, int, str], None]
# In one write. What was just hashed is then still in the processor's cache, and Linux 6.18 needs 0.35 s of CPU time
# per GB; with writes of 16 MiB it needs 2.3 s, to find pages for its own cache (ext4, a virtual machine).
WRITE_BYTES = 128 << 10


@dataclass(frozen=True)
class Planned:
    """A tensor of the output before it is made: its name, shape, dtype and weight file."""

    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str = field(default="", kw_only=True)

    @property
    def num_bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


PlannedT = TypeVar("PlannedT", bound=Planned)


def check_space(output: Path, num_bytes: int) -> None:
    """Raise `ConversionError` if the disk of `output` has room for less than `num_bytes`.

    What unfinished work on `output` holds counts as free.
    """
    free = shutil.disk_usage(next(p for p in output.parents if p.exists())).free
    free += sum(path.stat().st_size for path in partial_folder(output).rglob("*") if path.is_file())
    if free < num_bytes:
        raise ConversionError(
            f"the disk of {output} has {free:,} bytes free, and {num_bytes:,} are needed; free some, or choose an "
            "output on another disk. Nothing was written"
        )


def into_files(planned: Sequence[PlannedT], max_shard_size: int) -> tuple[PlannedT, ...]:
    """Assign `planned` to files of at most `max_shard_size` bytes, and sort them by file.

    Wide dtypes come first in each file, so that every tensor is aligned.
    """
    by_name = {tensor.target: tensor for tensor in planned}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return tuple(
        replace(tensor, file=file)
        for file, names in split.filename_to_tensors.items()
        for tensor in sorted((by_name[name] for name in names), key=lambda each: -each.dtype.itemsize)
    )


def write_weights(
    work: Work,
    planned: Sequence[PlannedT],
    make: Callable[[PlannedT], Iterable[torch.Tensor]],
    progress: Progress | None = None,
) -> None:
    """Write those files of `planned` that are not finished yet, in order, with an index where there are several files.

    Args:
        work: where to, and which files are finished.
        planned: the tensors of one file next to each other, wide dtypes first, so that every tensor is aligned.
        make: the tensor as one or more blocks along dimension 0.
        progress: called as `progress(done_bytes, total_bytes, what)` before each tensor and at the end.
    """
    files: dict[str, list[PlannedT]] = {}
    for tensor in planned:
        files.setdefault(tensor.file, []).append(tensor)
    done, total = 0, sum(tensor.num_bytes for tensor in planned)

    def reported(tensor: PlannedT) -> Iterable[torch.Tensor]:
        nonlocal done
        if progress:
            progress(done, total, f"writing, {tensor.target}")
        done += tensor.num_bytes
        return make(tensor)

    def finish(file: str, written: dict[str, Any]) -> None:
        flush(work.folder / file)
        flush(work.folder)
        work.finish(file, written)

    with ThreadPoolExecutor(1) as disk:  # one file is flushed while the next is written
        finishing: Future[None] | None = None
        for file, tensors in files.items():
            if file in work.files:
                done += sum(tensor.num_bytes for tensor in tensors)
                continue
            written = write_file(work.path(file), tensors, reported)
            if finishing is not None:
                finishing.result()
            finishing = disk.submit(finish, file, written)
        if finishing is not None:
            finishing.result()
    if list(files) != [WEIGHTS]:
        index = {"metadata": {"total_size": total}, "weight_map": {t.target: t.file for t in planned}}
        work.write_json(WEIGHTS_INDEX, index)
    if progress:
        progress(total, total, "written")


def write_file(
    path: Path, planned: Sequence[PlannedT], make: Callable[[PlannedT], Iterable[torch.Tensor]]
) -> dict[str, Any]:
    """Write one safetensors file; return its size and hash as `file_digest` does.

    The file may not be on the disk yet.
    """
    with open(path, "wb", buffering=0) as file, _Writer(file) as writer:
        writer.put(_header(planned))
        for tensor in planned:
            written = 0
            for block in make(tensor):
                written += writer.put(_bytes(block, tensor))
                del block  # before the next one is made, or three would be in memory
            assert written == tensor.num_bytes, f"{tensor.target}: {written} bytes, planned {tensor.num_bytes}"
        return writer.finish()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` into one safetensors file without a second copy of them in memory."""
    planned = [Planned(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    planned.sort(key=lambda each: -each.dtype.itemsize)
    write_file(path, planned, lambda each: [tensors[each.target]])


class _Writer:
    """Writes and hashes a file in a thread of its own, one block at a time."""

    def __init__(self, file):
        self._file, self._digest, self._size = file, xxhash.xxh3_128(), 0
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def put(self, data: bytes | memoryview) -> int:
        """Write `data` in the thread, after what was put before; the caller may make the next block meanwhile."""
        self._wait()
        self._size += len(data)
        self._pending = self._thread.submit(self._write, data)
        return len(data)

    def finish(self) -> dict[str, Any]:
        """Wait until everything is written; return the size and the hash."""
        self._wait()
        return {"bytes": self._size, HASH: self._digest.hexdigest()}

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), WRITE_BYTES):
            piece = view[start : start + WRITE_BYTES]
            self._digest.update(piece)
            _write(self._file, piece)


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.target] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(block: torch.Tensor, tensor: Planned) -> memoryview:
    found, expected = (block.dtype, block.shape[1:]), (tensor.dtype, torch.Size(tensor.shape[1:]))
    assert found == expected, f"{tensor.target}: a block of {found}, planned {expected}"
    if block.numel() == 0:
        return memoryview(b"")
    return memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(file, piece: memoryview) -> None:
    while len(piece):
        piece = piece[file.write(piece) :]

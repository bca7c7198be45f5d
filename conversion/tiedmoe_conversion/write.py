"""Writes a checkpoint folder so that it is there completely or not at all.

Everything goes into a hidden folder beside OUTPUT, is flushed to the disk, and takes OUTPUT's name in one rename.
Weight files are written tensor by tensor behind a header that the plan already knows, so that a shard never has to
fit into memory (safetensors' own writer wants all of it at once).
"""

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .errors import ConversionError
from .headers import DTYPE_NAMES
from .source import WEIGHTS, WEIGHTS_INDEX

FULL = (errno.ENOSPC, errno.EDQUOT)
Progress = Callable[[int, int, str], None]


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


def check_output(output: str | Path) -> Path:
    """The path of a folder that can be made: new or empty.

    Raises:
        ConversionError: it exists and is not an empty folder, or something above it is a file.
    """
    path = Path(output).expanduser().absolute()
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConversionError(f"output {output} exists and is not a folder; choose another one")
    if path.is_dir() and (found := sorted(p.name for p in path.iterdir())):
        raise ConversionError(
            f"output folder {output} is not empty: it holds {found[:3]}; expected a new or empty one, as nothing is "
            "overwritten: choose another, or empty it"
        )
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir():
        raise ConversionError(f"output {output} cannot be made: {parent} is a file; choose another one")
    return path


def check_space(output: Path, num_bytes: int) -> None:
    """Raise `ConversionError` where the disk of `output` has less than `num_bytes` free."""
    free = shutil.disk_usage(next(p for p in output.parents if p.exists())).free
    if free < num_bytes:
        raise ConversionError(
            f"the disk of {output} has {free:,} bytes free, and {num_bytes:,} are needed; free some, or choose an output "
            "on another disk. Nothing was written"
        )


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` when the block ends well, and vanishes when it does not."""
    made = [parent for parent in output.parents if not parent.exists()]
    partial = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            _flush(path)
        _flush(partial)
        if output.is_dir():
            output.rmdir()  # empty, or this fails
        partial.rename(output)
        _flush(output.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # the deepest first
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in FULL:
            raise ConversionError(
                f"the disk of {output} is full; nothing is left of the attempt. Free some space, or choose an output on "
                "another disk, and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConversionError(f"cannot write {output}: {error.strerror}; choose another output folder") from error
        raise


def into_files(planned: Sequence[PlannedT], max_shard_size: int) -> tuple[PlannedT, ...]:
    """`planned` with their files, those of one file together and wide dtypes first, so that all of them are aligned."""
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
    folder: Path,
    planned: Sequence[PlannedT],
    make: Callable[[PlannedT], Iterable[torch.Tensor]],
    progress: Progress | None = None,
) -> None:
    """Write `planned` tensors into their files in `folder`, in order, with an index where there are several files.

    Args:
        planned: the tensors of one file next to each other, wide dtypes first, so that every tensor is aligned.
        make: the tensor as one or more blocks along dimension 0.
        progress: called as `progress(done_bytes, total_bytes, target)` before each tensor and at the end.
    """
    files: dict[str, list[PlannedT]] = {}
    for tensor in planned:
        files.setdefault(tensor.file, []).append(tensor)
    done, total = 0, sum(tensor.num_bytes for tensor in planned)
    for file, tensors in files.items():
        with open(folder / file, "wb") as handle:
            handle.write(_header(tensors))
            for tensor in tensors:
                if progress:
                    progress(done, total, tensor.target)
                written = 0
                for block in make(tensor):
                    written += _write(handle, block, tensor)
                    del block  # before the next one is made, or two would be in memory
                assert written == tensor.num_bytes, f"{tensor.target}: {written} bytes, planned {tensor.num_bytes}"
                done += written
    if list(files) != [WEIGHTS]:
        index = {"metadata": {"total_size": total}, "weight_map": {t.target: t.file for t in planned}}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if progress:
        progress(total, total, "written")


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


def _write(handle, block: torch.Tensor, tensor: Planned) -> int:
    found, expected = (block.dtype, block.shape[1:]), (tensor.dtype, torch.Size(tensor.shape[1:]))
    assert found == expected, f"{tensor.target}: a block of {found}, planned {expected}"
    if block.numel() == 0:
        return 0
    return handle.write(memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Reads a safetensors file's header, and nothing more, as untrusted input.

Format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes, back to back
(https://huggingface.co/docs/safetensors). Our own, since `safe_open` maps files, which stay resident as they are read
(docs/log.md has figures). It also opens a header with a name twice, or with more dimensions than torch has;
huggingface_hub's opens nearly any (`tests/test_conversion_source.py`).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MAX_DIMENSIONS = 64  # the limit of torch
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is: `file`, byte `offset` after the file's header (None in a pickle), `dtype` and `shape`."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None

    @property
    def num_bytes(self) -> int:
        """The tensor's size on disk in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """Return a tensor of this shape and dtype that holds no memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def read_header(path: Path) -> tuple[int, dict[str, TensorInfo]]:
    """Return the byte at which a safetensors file's data starts, and its tensors.

    Raises:
        ConversionError: the file is truncated, is no safetensors file, or its header contradicts itself.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix.startswith(b"version "):
            raise ConversionError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise ConversionError(
                f"{path} is truncated or no safetensors file: its header should take {length} bytes, the file has "
                f"{size}; download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ConversionError(f"{path} claims a header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} has a header that is not valid JSON: {error}; download it again") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path} has a header that is a {type(header).__name__}; expected a JSON object")
    header.pop("__metadata__", None)
    tensors = tensors_from_header(header, path.name, str(path))
    end = sum(info.num_bytes for info in tensors.values())
    if 8 + length + end != size:
        problem = "is truncated" if 8 + length + end > size else "has bytes after its last tensor"
        raise ConversionError(
            f"{path} {problem}: its header promises {8 + length + end} bytes, the file has {size}; download it again"
        )
    return 8 + length, tensors


def tensors_from_header(header: Mapping[str, Any], file: str, where: str) -> dict[str, TensorInfo]:
    """Return the tensors of a parsed safetensors header, after checking it; `where` names it in errors.

    Every tensor must have `dtype`, `shape` and `data_offsets`, and the offsets must tile the data without gap or
    overlap, as safetensors requires.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ConversionError(
                f"{where}: the header's entry for {name!r} is {str(entry)[:200]}; expected dtype, shape and "
                "data_offsets"
            ) from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConversionError(
                f"{where}: tensor {name!r} has dtype {dtype!r}; expected one of {list(DTYPES)}: "
                "convert a dequantised copy of this checkpoint instead"
            )
        sizes = [*shape, begin, end] if isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS else [None]
        if not all(type(number) is int and 0 <= number < 2**63 for number in sizes):
            raise ConversionError(
                f"{where}: tensor {name!r} has shape {repr(shape)[:200]} and offsets [{begin!r}, {end!r}]; expected "
                f"integers from 0 to 2^63, and at most {MAX_DIMENSIONS} dimensions"
            )
        tensors[name] = TensorInfo(name, file, DTYPES[dtype], tuple(shape), begin)
        if tensors[name].num_bytes != end - begin:
            raise ConversionError(
                f"{where}: tensor {name!r} needs {tensors[name].num_bytes} bytes by its shape {shape} and dtype "
                f"{dtype}, but its offsets [{begin}, {end}] hold {end - begin}"
            )
    position = 0
    for info in sorted(tensors.values(), key=lambda each: (each.offset, each.num_bytes)):
        if info.offset != position:
            raise ConversionError(
                f"{where}: tensor {info.name!r} starts at byte {info.offset} of the data; expected {position}: "
                "tensors overlap or leave a gap"
            )
        position += info.num_bytes
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} appears twice")
        result[name] = value
    return result

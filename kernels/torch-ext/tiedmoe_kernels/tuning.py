"""Which tile sizes a kernel runs with: those of a file tuned on this very GPU, else its architecture's defaults.

Files are `configs/<device name>.json`, written by `make tune`, and `configs/default.json`; nothing is tuned at run
time. An entry serves one kernel, one element size (bytes) and up to `max_rows` rows per active expert (for the decode
kernels: slots of the call); the first that fits is used.
One with `tma` reads the weights through a tensor descriptor and is passed over where their layout does not allow it.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
import triton

CONFIGS = Path(__file__).parent / "configs"
KERNELS = ("gate_up", "rows", "weight_grad", "decode_gate_up", "decode_down")


class Config(NamedTuple):
    """One entry of a configuration file without what it is looked up by."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False  # gate_up and rows: a program a processor walks over the tiles


FORCED: dict[str, Config] = {}  # what `tune.py` is timing, by kernel


def architecture() -> str:
    """`"sm_90"` or `"gfx942"` of the current device, from triton's active driver."""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def has_pdl() -> bool:
    """Whether the current device has programmatic dependent launch: Hopper and newer."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def file_name(device_name: str) -> str:
    """`"NVIDIA H100 80GB HBM3"` -> `"nvidia_h100_80gb_hbm3.json"`."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


@functools.cache
def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def num_processors(device_index: int | None) -> int:
    """Multiprocessors (SMs, compute units) of the CUDA device; 4 where there is none, in the interpreter."""
    return 4 if device_index is None else torch.cuda.get_device_properties(device_index).multi_processor_count


@functools.cache
def _device_name(device_index: int) -> str:
    return torch.cuda.get_device_name(device_index)


def _default_architecture(arch: str, known: dict) -> str:
    """Return the entry of `configs/default.json` for an architecture that has none of its own."""
    if arch in known:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(re.sub(r"\D", "", arch) or 0)
    # The consumer chips (8.6, 8.9, 12.x) have 99 KiB of shared memory a block, the others at least what 8.0 has.
    return "sm_86" if number in (86, 87, 89) or number >= 120 else "sm_100" if number >= 100 else "sm_80"


@functools.cache
def choose(
    kernel: str, element_size: int, rows_per_expert: int, n_size: int, k_size: int, tma: bool, device_index: int | None
) -> Config:
    """Return the configuration of `kernel` (one of `KERNELS`), its blocks cut to the matrix.

    Args:
        kernel: its name here, the function's without `_kernel`.
        element_size: bytes of an element of the weights, 2 or 4.
        rows_per_expert: about how many rows an active expert has (the host does not know the true numbers); for the
            decode kernels all slots of the call.
        n_size: columns of what one program's columns are part of.
        k_size: length of the contraction.
        tma: whether a tensor descriptor can read the weights: contiguous, rows of a multiple of 16 bytes.
        device_index: the CUDA device, None where there is none (the interpreter, compiling ahead of time).

    Raises:
        LookupError: no entry fits.
    """
    if kernel in FORCED:
        return _cut(FORCED[kernel], n_size, k_size)
    tuned = {} if device_index is None else _read(CONFIGS / file_name(_device_name(device_index)))
    default = _read(CONFIGS / "default.json")["architectures"]
    arch = _INTERPRETED_AS if device_index is None and triton.knobs.runtime.interpret else architecture()
    for entry in [*tuned.get("entries", ()), *default[_default_architecture(arch, default)]]:
        if entry["kernel"] != kernel or entry["element_size"] != element_size:
            continue
        if entry["max_rows"] is not None and rows_per_expert > entry["max_rows"]:
            continue
        config = _cut(Config(*(entry.get(field, unset) for field, unset in _FIELDS.items())), n_size, k_size)
        # A descriptor knows the bounds of the storage, not of an expert: no block may reach past them.
        if not config.tma or (tma and config.block_n <= n_size and k_size % config.block_k == 0):
            return config
    raise LookupError(
        f"configs/default.json has no entry for kernel {kernel!r} of {element_size}-byte elements on {arch}; add one"
    )


def _cut(config: Config, n_size: int, k_size: int) -> Config:
    return config._replace(block_n=at_most(config.block_n, n_size), block_k=at_most(config.block_k, k_size))


def at_most(block: int, size: int) -> int:
    """Return the block, or the largest power of two within the size; 16 is the least that `tl.dot` takes."""
    return min(block, max(16, 1 << (max(size, 1).bit_length() - 1)))


_FIELDS = {field: Config._field_defaults.get(field) for field in Config._fields}
_INTERPRETED_AS = "sm_90"  # Triton's interpreter has no architecture; this one's entries reach the descriptors, too

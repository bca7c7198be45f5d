"""Time tile sizes on the GPU that is here and write `configs/<device name>.json`: `python -m tiedmoe_kernels.tune`.

Every kernel is timed through the backend's own launch, at OLMoE's layer in bfloat16 and one number of tokens for each class of
rows per expert; the fastest median is kept. What does not compile or does not fit is reported and left out.
Takes minutes; nothing else does any of this at run time.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.testing

from . import metadata, triton_backend, tuning
from .spec import Segment, Spec
from .tuning import Config

# Rows per active expert up to which an entry serves, and the tokens of an OLMoE layer (E=64, K=8) that it is timed with.
CLASSES = {32: 128, 128: 512, None: 8192}
DECODE_TOKENS = (1, 8, 32)
SPEC = Spec("silu", 1.702, 7.0, is_transposed=False, is_concatenated=True)


class Shape(NamedTuple):
    """The layer to time."""

    E: int = 64
    H: int = 2048
    I: int = 1024
    K: int = 8


OLMOE = Shape()


def candidates(kernel: str, max_rows: int | None, tma: bool) -> list[Config]:
    """The tile sizes that are tried."""
    if kernel.startswith("decode"):
        grid = itertools.product([16], [16, 32, 64], [128, 256], [1], [4, 8], [2, 3, 4], [False])
    elif max_rows == 32:
        grid = itertools.product([16, 32], [64, 128], [64, 128], [1], [4], [3, 4, 5], [False])
    elif kernel == "weight_grad":
        grid = itertools.product([128], [128, 256], [32, 64], [4, 8], [4, 8], [3, 5, 6], [False])
    else:
        rows, columns = ([64], [64, 128]) if max_rows == 128 else ([64, 128], [128, 256])
        grid = itertools.product(rows, columns, [64], [8], [4, 8], [3, 4], [False, True] if tma else [False])
    return [Config(*values) for values in grid]


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of a launch on the device, milliseconds; the caches are cleared in between."""
    return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def launches(kernel: str, tokens: Iterable[int], shape: Shape, device: str) -> Callable[[], object]:
    """A function that runs `kernel` as the backend does, once for each number of tokens and each of its uses."""
    E, H, I, K = shape
    backend = triton_backend
    gate_up, down = _normal(E, 2 * I, H, device=device) * H**-0.5, _normal(E, H, I, device=device) * I**-0.5
    runs: list[Callable[[], object]] = []
    for T in tokens:
        x, weights = _normal(T, H, device=device), _normal(T, K, device=device)
        index = torch.rand(T, E, device=device).argsort(dim=1)[:, :K].contiguous()
        if kernel.startswith("decode"):
            runs += [partial(backend.forward, x, index, weights, gate_up, down, None, None, None, SPEC, False)]
            continue
        order, offsets, _ = metadata.sort_slots(index, None, E)
        rows = backend._Rows(order, offsets, K)
        pre, hidden = _normal(T * K, 2 * I, device=device), _normal(T * K, I, device=device)
        if kernel == "gate_up":
            runs += [partial(backend._gate_up, x, gate_up, None, rows, SPEC, save_pre=True, save_hidden=True)]
        elif kernel == "rows":
            runs += [partial(backend._rows, hidden, backend._Matrices(down, True), None, weights, rows)]
            runs += [partial(backend._rows, pre, backend._Matrices(gate_up, False), None, None, rows)]
        else:
            segment = Segment(x, x, pre, hidden, order, offsets, weights)
            group = backend._Group([segment], x.dtype)
            runs += [partial(backend._weight_grad, (x,), (pre,), group, token_first=False, into=None)]
            runs += [partial(backend._weight_grad, (x,), (hidden,), group, token_first=True, into=None)]
    return lambda: [run() for run in runs]


def _normal(*size: int, device: str) -> torch.Tensor:
    return torch.randn(size, device=device).to(torch.bfloat16)


def fastest(
    kernel: str, run: Callable[[], object], tried: Iterable[Config], timer: Callable[[Callable[[], object]], float]
) -> tuple[Config, float]:
    """The configuration with the least time, and that time."""
    times: dict[Config, float] = {}
    for config in tried:
        tuning.FORCED[kernel] = config
        tuning.choose.cache_clear()
        try:
            times[config] = timer(run)
        except triton.runtime.errors.OutOfResources as error:
            print(f"{kernel} {tuple(config)}: left out, {error}")
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            print(f"{kernel} {tuple(config)}: left out, does not compile: {str(error)[:200]}")
        finally:
            tuning.FORCED.clear()
            tuning.choose.cache_clear()
    if not times:
        raise RuntimeError(f"no configuration of {kernel} runs on this device; its reasons are printed above")
    config = min(times, key=times.__getitem__)
    print(
        f"{kernel}: {config} {times[config]:.3f} ms, the median of {len(times)} was {statistics.median(times.values()):.3f} ms"
    )
    return config, times[config]


def tune(
    device: str,
    shape: Shape = OLMOE,
    classes: dict[int | None, int] = CLASSES,
    timer: Callable[[Callable[[], object]], float] = milliseconds,
    propose: Callable[[str, int | None, bool], list[Config]] = candidates,
) -> list[dict]:
    """The entries of a configuration file, with the milliseconds of each.

    Args:
        device: "cuda", or "cpu" in Triton's interpreter.
        shape: the layer that is timed.
        classes: the tokens that each class of rows per expert is timed with.
        timer: from a function that launches to its milliseconds.
        propose: from (kernel, max_rows, whether descriptors are possible) to configurations.
    """
    tma = device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 9
    entries = []
    for kernel in tuning.KERNELS:
        for max_rows, tokens in classes.items() if kernel in ("gate_up", "rows") else [(None, classes[None])]:
            run = launches(kernel, DECODE_TOKENS if kernel.startswith("decode") else [tokens], shape, device)
            config, time = fastest(kernel, run, propose(kernel, max_rows, tma), timer)
            entries.append(
                {
                    "kernel": kernel,
                    "element_size": 2,
                    "max_rows": max_rows,
                    **config._asdict(),
                    "milliseconds": round(time, 4),
                }
            )
    return entries


def main() -> None:
    """Tune for the current CUDA or ROCm device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: the package's configs/<device name>.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune: torch finds no GPU here; tile sizes can only be timed on one")
    name = torch.cuda.get_device_name()
    output = arguments.output or tuning.CONFIGS / tuning.file_name(name)
    found = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "entries": tune("cuda"),
    }
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()

"""Clocks, memory, spreads and the machine: `python benchmarks/timing.py cuda` prints what it has of what checks need.

Variants are timed in turn, round by round: a ratio is taken inside a round and its median reported, so that a machine
that slows down slows both.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch

Call = Callable[[int], object]  # the number of the round chooses the inputs
Timed = Callable[[int], float]  # the same call, and its seconds
PACKAGES = ("torch", "triton", "pytorch-triton-rocm", "transformers", "liger-kernel", "kernels", "llama-cpp-python")
PACKAGES += ("pytest", "pytest-xdist", "pytest-timeout")


def spread(values: list[float]) -> dict:
    """Return median, 20th and 80th percentile, and how many values there are."""
    median, low, high = numpy.quantile(values, (0.5, 0.2, 0.8)).tolist()
    return {"median": median, "p20": low, "p80": high, "n": len(values)}


def paired_ratio(values: list[float], base: list[float]) -> dict:
    """Spread values[r] / base[r] over the rounds r that both took part in: above 1, `base` is the faster one."""
    return spread([value / reference for value, reference in zip(values, base)])


def by_clock(call: Call, clock: Callable[[], float] = time.perf_counter) -> Timed:
    """Time one call by the host's clock: `torch.utils.benchmark` would make two more before each."""

    def timed(number: int) -> float:
        start = clock()
        call(number)
        return clock() - start

    return timed


def on_device(call: Call, in_graph: bool) -> Timed:
    """Time a call by triton's timers: replays of a CUDA graph of many, or one by one with a cold L2 cache."""
    from triton.testing import do_bench, do_bench_cudagraph

    bench, options = (do_bench_cudagraph, {"rep": 20}) if in_graph else (do_bench, {"warmup": 10, "rep": 50})
    return lambda number: bench(lambda: call(number), return_mode="median", **options) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(calls: dict[str, Timed], *, seconds: float, least: int, most: int) -> dict[str, list[float]]:
    """Time every call once a round, in an order that rotates, until `seconds` are over; `least` to `most` rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start > seconds:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(calls[name](number))
    return times


def in_own_process(work: Callable, *arguments: Any) -> Any:
    """Return what `work` returns in a fresh process, with as many threads as this one's torch has."""
    spawned, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, spawned, torch.set_num_threads, threads) as pool:
        return pool.submit(work, *arguments).result()


def resident_bytes(name: str) -> int:
    """Return "VmRSS", what this process holds of the memory, or "VmHWM", the most it has held."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def resident_growth(call: Callable[[], object]) -> int:
    """Return by how many bytes the greatest resident memory during a call is above what is held before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_bytes("VmRSS")
    call()
    return max(0, resident_bytes("VmHWM") - before)


def machine_rates(device: torch.device, size: int = 8192, copy_bytes: int = 2 << 30) -> dict:
    """Measure a `size`^3 bf16 matrix product in TFLOP/s and a copy in TB/s (bytes read and written)."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    calls = (lambda _: a @ b), (lambda _: target.copy_(source))
    timed = [by_clock(call) if device.type == "cpu" else on_device(call, False) for call in calls]
    product, copy = (min(call(number) for number in range(5)) for call in timed)
    return {"matmul_tflops": 2 * size**3 / product / 1e12, "copy_tb_per_s": 2 * copy_bytes / copy / 1e12}


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "hip"] = torch.version.cuda or torch.version.hip
    return found


def machine(device: torch.device) -> dict:
    """Describe the machine, without its name or any path on it."""
    cpuinfo = Path("/proc/cpuinfo")
    processors = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    described: dict = {"processor": processors[0] if processors else platform.machine(), "cores": os.cpu_count()}
    described["memory_gib"] = round(memory_bytes / 2**30, 1)
    if device.type != "cuda":
        return described
    gpu = torch.cuda.get_device_properties(device)
    described |= {"device": gpu.name, "device_memory_gib": round(gpu.total_memory / 2**30, 1)}
    described |= {"multiprocessors": gpu.multi_processor_count, "l2_mib": round(gpu.L2_cache_size / 2**20)}
    return described | {"capability": f"{gpu.major}.{gpu.minor}"}


def about() -> dict[str, dict]:
    """Return what every result tells: versions and machine."""
    return {"versions": versions(), "machine": machine(torch.device("cpu"))}


def tools(device: torch.device) -> dict:
    """Return what compiling and the tests marked gpu need: a compiler, Python's headers, the sanitizer, memory."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    printed = subprocess.run([compiler or "true", "-dumpfullversion"], capture_output=True, text=True)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return {
        "gcc": printed.stdout.strip(),
        "python_h": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "compute_sanitizer": Path(sanitizer).exists(),
        "free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 1) if device.type == "cuda" else None,
    }


if __name__ == "__main__":
    asked = torch.device(sys.argv[1])
    print(json.dumps(machine(asked) | versions() | tools(asked)))

"""Clocks, spreads and the machine's own limits.

Variants are timed in turn, round by round: a ratio is taken inside a round and its median reported, so that a machine
that slows down slows both.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

Call = Callable[[int], object]  # the number of the round chooses the inputs
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "kernels", "llama-cpp-python")


def spread(values: list[float]) -> dict:
    """Return median, 20th and 80th percentile, and how many values there are."""
    if len(values) < 2:
        return {"median": values[0], "p20": values[0], "p80": values[0], "n": 1}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": deciles[1], "p80": deciles[7], "n": len(values)}


def paired_ratio(values: list[float], base: list[float]) -> dict:
    """Spread values[r] / base[r] over the rounds r that both took part in: above 1, `base` is the faster one."""
    return spread([value / reference for value, reference in zip(values, base)])


class WallClock:
    """Seconds of one call by the host's clock, on a CPU, where `torch.utils.benchmark` would warm up before each."""

    def time(self, call: Call, number: int) -> float:
        start = time.perf_counter()
        call(number)
        return time.perf_counter() - start


class DeviceClock:
    """Seconds of a call by triton's timers: those `in_graph` many in a CUDA graph, others with a cold L2 cache."""

    def __init__(self, in_graph: Collection[Call] = ()):
        self.in_graph = in_graph

    def time(self, call: Call, number: int) -> float:
        from triton.testing import do_bench, do_bench_cudagraph

        if call in self.in_graph:
            return do_bench_cudagraph(lambda: call(number), rep=20, return_mode="median") / 1e3
        return do_bench(lambda: call(number), warmup=10, rep=50, return_mode="median") / 1e3


def clock_for(device: torch.device, in_graph: Collection[Call] = ()) -> WallClock | DeviceClock:
    return WallClock() if device.type == "cpu" else DeviceClock(in_graph)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def interleave(calls: dict[str, Call], clock, *, seconds: float, least: int, most: int) -> dict[str, list[float]]:
    """Time every call once a round, in an order that rotates, until `seconds` are over; `least` to `most` rounds.

    A call that has used up half of the time after its `least` rounds drops out; the others, two at least, go on.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start, dropped = time.perf_counter(), 0.0
    for number in range(most if calls else 0):
        if number == least:
            names = [name for name in names if sum(times[name]) <= seconds / 2]
            dropped = sum(sum(times[name]) for name in calls if name not in names)
            if len(names) < min(2, len(calls)):
                break
        if number >= least and time.perf_counter() - start > seconds + dropped:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(clock.time(calls[name], number))
    return times


def machine_rates(device: torch.device, size: int = 8192, copy_bytes: int = 2 << 30) -> dict:
    """Measure a `size`^3 bf16 matrix product in TFLOP/s and a copy in TB/s (bytes read and written)."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    clock = clock_for(device)
    matmul, copy = (
        min(clock.time(call, number) for number in range(5))
        for call in (lambda _: a @ b, lambda _: target.copy_(source))
    )
    return {"matmul_tflops": 2 * size**3 / matmul / 1e12, "copy_tb_per_s": 2 * copy_bytes / copy / 1e12}


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
    if device.type != "cpu":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(properties.L2_cache_size / 2**20),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    return described

"""Clocks, spreads and the machine's own limits. Everything runs on a CPU too; only `DeviceClock` and graphs need a GPU.

Variants are timed in turn, round by round: a ratio is taken inside a round and its median reported, so that a machine
that slows down slows both.
"""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]  # the number of the round chooses the inputs


def spread(values: list[float]) -> dict:
    """Median, 20th and 80th percentile, and how many values there are."""
    if len(values) < 2:
        return {"median": values[0], "p20": values[0], "p80": values[0], "n": 1}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": deciles[1], "p80": deciles[7], "n": len(values)}


def paired_ratio(values: list[float], base: list[float]) -> dict:
    """Spread of values[r] / base[r] over the rounds r that both took part in: above 1, `base` is the faster one."""
    return spread([value / reference for value, reference in zip(values, base)])


class WallClock:
    """Seconds of a call by the host's clock; for a CPU."""

    def time(self, call: Call, number: int) -> float:
        start = time.perf_counter()
        call(number)
        return time.perf_counter() - start


class DeviceClock:
    """Seconds of a call by device events, its inputs not in the L2 cache: a large buffer is written before each."""

    def __init__(self, device: torch.device):
        self.flushed = torch.empty(flush_bytes(device) // 4, dtype=torch.int32, device=device)

    def time(self, call: Call, number: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flushed.zero_()
        start.record()
        call(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> WallClock | DeviceClock:
    return WallClock() if device.type == "cpu" else DeviceClock(device)


def flush_bytes(device: torch.device) -> int:
    """More than the last cache holds. An AMD accelerator's memory-side cache is not in the properties: 1 GiB there."""
    if torch.version.hip:
        return 1 << 30
    return max(256 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


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


def capture(body: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a replay of `body` as one CUDA graph; on a CPU `body` itself. The graph's outputs live in `replay.outputs`."""
    if device.type == "cpu":
        return body
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = body()
    return _Replay(graph, outputs)


class _Replay:
    """Keeps a graph's outputs: their memory belongs to the graph."""

    def __init__(self, graph, outputs):
        self.graph, self.outputs = graph, outputs

    def __call__(self):
        self.graph.replay()
        return self.outputs


def machine_rates(device: torch.device, size: int = 8192, copy_bytes: int = 2 << 30) -> dict:
    """What this machine does at best: a `size`^3 bf16 matrix product in TFLOP/s, a copy in TB/s (bytes read and written)."""
    clock = clock_for(device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    calls = {"matmul": lambda _: torch.mm(a, b, out=product), "copy": lambda _: target.copy_(source)}
    for call in calls.values():
        call(0)
    synchronize(device)
    times = interleave(calls, clock, seconds=1.0, least=5, most=30)
    matmul, copy = (statistics.median(times[name]) for name in ("matmul", "copy"))
    return {"matmul_tflops": 2 * size**3 / matmul / 1e12, "copy_tb_per_s": 2 * copy_bytes / copy / 1e12}


def versions() -> dict[str, str]:
    """Versions of what takes part, and of the peers that are installed."""
    peers = ("liger-kernel", "sonic-moe", "quack-kernels", "sgl-deep-gemm", "deep-gemm")
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", *peers):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "hip"] = torch.version.cuda or torch.version.hip
    return found


def machine(device: torch.device) -> dict:
    """The machine in words, without its name or any path on it."""
    described: dict = {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": _memory_gib()}
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


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None

"""Time tile sizes on the GPU that is here and write `configs/<device name>.json`: `python -m tiedmoe_kernels.tune`.

A kernel is timed as the backend launches it: its launches in a call of the backend at OLMoE's size are recorded and
replayed as a CUDA graph, so that the host costs nothing. Per kernel and class of rows the least median is kept. What
spills registers, does not fit or does not compile is named and left out. Nothing else does any of this at run time.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.testing
from triton.runtime.jit import KernelInterface

from . import triton_backend, tuning
from .spec import Segment, Spec
from .tuning import Config

SPEC = Spec("silu", 1.702, 7.0, is_transposed=False, is_concatenated=True)
NUM_SEGMENTS = 4  # layers of a group, whose weight gradient is added to what is there, as training does
_DRAWS = 4  # routings that one graph of decoding goes through: a single one would find its experts' weights in L2
_LARGE = 2**16
_MILLISECONDS = 10  # of one graph, replayed ten times


class Shape(NamedTuple):
    """The layer to time."""

    E: int = 64
    H: int = 2048
    I: int = 1024
    K: int = 8


OLMOE, TINY = Shape(), Shape(E=4, H=32, I=32, K=2)  # the second to try the script on a CPU


class Problem(NamedTuple):
    """A kernel, the class of rows that its entry serves (`tuning.py`), and the tokens that it is timed with."""

    kernel: str
    max_rows: int | None
    tokens: int


# In the order in which they matter: what the clock leaves out keeps its default.
PROBLEMS = (
    Problem("gate_up", None, 8192),
    Problem("rows", None, 8192),
    Problem("weight_grad", None, 8192),
    *(Problem(kernel, 8 * tokens, tokens) for tokens in (1, 8, 32) for kernel in ("decode_gate_up", "decode_down")),
    Problem("gate_up", 64, 512),
    Problem("rows", 64, 512),
    Problem("gate_up", 256, 2048),
    Problem("rows", 256, 2048),
    Problem("gate_up", 16, 128),
    Problem("rows", 16, 128),
)
TINY_PROBLEMS = tuple(problem._replace(tokens=min(problem.tokens, 3)) for problem in PROBLEMS)
DEFAULTS_AT = (1, 8, 32, 128, 512, 2048, 8192)  # tokens that `--defaults` times


def candidates(problem: Problem, tma: bool) -> list[Config]:
    """Return the tile sizes that are tried, without those whose compiles for sm_90 spill registers."""
    kernel, max_rows, _ = problem
    grid: list[tuple]
    if kernel == "decode_gate_up":
        grid = [
            (16, n, k, 1, 4, stages)
            for n, k in ((16, 128), (16, 256), (32, 128), (32, 256), (64, 128))
            for stages in (3, 4)
        ]
    elif kernel == "decode_down":
        grid = [(16, n, k, 1, 4, stages) for n in (32, 64) for k in (128, 256) for stages in (3, 4)]
    elif kernel == "weight_grad":
        grid = [(128, 256, 64, 4, 8, 3), (128, 256, 64, 4, 8, 4), (128, 256, 32, 4, 8, 5), (128, 256, 32, 4, 8, 6)]
        grid += [(128, 128, 64, 4, warps, stages) for warps in (4, 8) for stages in (3, 5)]
    elif max_rows is None or max_rows > 64:
        grid = [(128, 128, 64, 8, 8, stages, use) for stages in (3, 4) for use in (True, False)]
        grid += [(64, 128, 64, 8, 8, 4, use) for use in (True, False)] + [(128, 64, 64, 8, 4, 4, True)]
        if kernel == "rows":
            grid += [(128, 256, 64, 8, 8, *more) for more in ((3, True), (4, True), (3, True, True))]  # persistent
        else:  # persistent in 128x128 it spills
            grid += [(m, n, 64, 8, 8, 4, True, True) for m, n in ((64, 128), (128, 64))]
    else:  # 64 rows are one wgmma; fewer multiply by mma.sync, and read the weights once more for each tile
        warps = 4 if kernel == "rows" else 8  # of 64 by 128, two accumulators of which spill in four warps
        grid = [(64, 64, 64, 8, 4, stages, use) for stages in (3, 4) for use in (True, False)]
        grid += [(64, 128, 64, 8, warps, 4, use) for use in (True, False)]
        grid += [(32, 64, 128, 8, 4, stages) for stages in (3, 4)] + [(32, 128, 64, 8, 4, 4)]
        grid += [(16, n, 128, 1, 4, stages) for n in (64, 128) for stages in (3, 4)] if max_rows <= 16 else []
    return [config for config in (Config(*values) for values in grid) if tma or not config.tma]


class Launch(NamedTuple):
    """A kernel's launch that can be made again; `compiled` is triton's kernel, None in its interpreter."""

    kernel: str
    again: Callable[[], object]
    compiled: Any


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch that is made in this block, as it is made."""
    launches: list[Launch] = []
    getitem = KernelInterface.__getitem__

    def recording(self, grid):
        def launch(*arguments, **options):
            again = partial(getitem(self, grid), *arguments, **options)
            compiled = again()
            launches.append(Launch(self.fn.__name__.removesuffix("_kernel").lstrip("_"), again, compiled))
            return compiled

        return launch

    def not_kept(self, *arguments):  # those of decoding, which otherwise pass triton's lookup by
        return self.kernel[self.grid](*arguments, **self.constants)

    with (
        mock.patch.object(KernelInterface, "__getitem__", recording),
        mock.patch.object(triton_backend._Launch, "__call__", not_kept),
    ):
        yield launches


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Let the backend launch `kernel` with this configuration."""
    tuning.FORCED[kernel] = config
    tuning.choose.cache_clear()
    try:
        yield
    finally:
        tuning.FORCED.clear()
        tuning.choose.cache_clear()


def calls(kernel: str, tokens: int, shape: Shape, device: str) -> tuple[Callable[[], object], int]:
    """Return a call of the backend that launches `kernel`, and how many times it does the same."""
    E, H, I, K = shape
    gate_up, down = _normal(E, 2 * I, H, device=device) * H**-0.5, _normal(E, H, I, device=device) * I**-0.5

    def routing() -> torch.Tensor:
        return torch.rand(tokens, E, device=device).argsort(dim=1)[:, :K].contiguous()

    x, weights = _normal(tokens, H, device=device), _normal(tokens, K, device=device)

    def forward(index: torch.Tensor, save_pre: bool) -> tuple[torch.Tensor, ...]:
        return triton_backend.forward(
            x, index, weights, gate_up, down, None, None, slot_map=None, spec=SPEC, save_pre=save_pre
        )

    if kernel.startswith("decode"):
        indices = [routing() for _ in range(_DRAWS)]
        return lambda: [forward(index, save_pre=False) for index in indices], _DRAWS
    index = routing()
    if kernel == "gate_up":
        return partial(forward, index, save_pre=True), 1

    def backward():
        _, pre, order, offsets = forward(index, save_pre=True)
        _, _, grad_pre, hidden, *_ = triton_backend.backward_data(
            x, x, weights, gate_up, down, None, None, pre=pre, order=order, offsets=offsets, spec=SPEC,
            needs_hidden_grad=True, needs_segment=True,
        )  # fmt: skip
        return Segment(x, x, grad_pre, hidden, order, offsets, weights)

    if kernel == "rows":
        return backward, 1
    segments = [backward() for _ in range(NUM_SEGMENTS)]
    into = (torch.zeros_like(gate_up), torch.zeros_like(down), None, None)
    needs = (True, True, False, False)
    return partial(triton_backend.backward_weight, segments, SPEC, x.dtype, needs, into), 1


def _normal(*size: int, device: str) -> torch.Tensor:
    return torch.randn(size, device=device).to(torch.bfloat16)


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call on the device, replayed as a CUDA graph."""
    return triton.testing.do_bench_cudagraph(run, rep=_MILLISECONDS, return_mode="median")


def wall_milliseconds(run: Callable[[], object]) -> float:
    """Return the time of one call by the host's clock: for the interpreter, where it means nothing."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def fastest(
    problem: Problem, call: Callable[[], object], tried: Iterable[Config], timer: Callable, repeats: int = 1
) -> tuple[Config, float]:
    """Return the configuration with the least time, and that time in milliseconds."""
    times: dict[Config, float] = {}
    for config in tried:
        try:
            with forced(problem.kernel, config), recorded() as launches:
                call()
            own = [launch for launch in launches if launch.kernel == problem.kernel]
            assert own, f"no launch of {problem.kernel} was recorded"
            if any(getattr(launch.compiled, "n_spills", 0) for launch in own):
                print(f"{problem.kernel} {tuple(config)}: left out, it spills registers")
                continue
            times[config] = timer(lambda own=own: [launch.again() for launch in own]) / repeats
        except triton.runtime.errors.OutOfResources as error:
            print(f"{problem.kernel} {tuple(config)}: left out, {error}")
        except (RuntimeError, triton.runtime.errors.TritonError) as error:
            print(f"{problem.kernel} {tuple(config)}: left out, does not compile: {str(error)[:200]}")
    if not times:
        raise RuntimeError(f"no configuration of {problem.kernel} runs on this device; its reasons are printed above")
    config = min(times, key=times.__getitem__)
    median = statistics.median(times.values())
    print(f"{problem.kernel}, {problem.tokens} tokens: {tuple(config)} of {len(times)}; their median {median:.4f} ms")
    return config, times[config]


def tune(
    device: str,
    shape: Shape = OLMOE,
    problems: Iterable[Problem] = PROBLEMS,
    timer: Callable[[Callable[[], object]], float] = milliseconds,
    propose: Callable[[Problem, bool], list[Config]] = candidates,
    seconds: float = float("inf"),
    done: Callable[[list[dict]], object] = lambda entries: None,
) -> list[dict]:
    """Return the entries of a configuration file; those without milliseconds were not tried, and are the default.

    Args:
        device: "cuda", or "cpu" in Triton's interpreter.
        shape: the layer that is timed.
        problems: what to tune, the most important first.
        timer: from a function that launches to its milliseconds.
        propose: from a problem and whether descriptors are possible to configurations.
        seconds: start no problem later.
        done: called with all entries after each problem.
    """
    end = time.monotonic() + seconds
    tma = has_descriptors(device)
    entries = {problem: {**_described(problem), **default(problem, device)._asdict()} for problem in problems}
    for problem in problems:
        if time.monotonic() >= end:
            print(f"{problem.kernel}, {problem.tokens} tokens: not tried in {seconds:.0f} s, keeps the default")
            continue
        call, repeats = calls(problem.kernel, problem.tokens, shape, device)
        tried = dict.fromkeys([default(problem, device), *propose(problem, tma)])
        config, took = fastest(problem, call, tried, timer, repeats)
        entries[problem] = {**_described(problem), **config._asdict(), "milliseconds": round(took, 5)}
        print(json.dumps(entries[problem]), flush=True)
        done(list(entries.values()))
    return list(entries.values())


def has_descriptors(device: str) -> bool:
    """Whether weights can be read through tensor descriptors (TMA)."""
    if device == "cpu" or torch.version.hip is not None:
        return False
    return device == "meta" or torch.cuda.get_device_capability()[0] >= 9


def _described(problem: Problem) -> dict:
    return {"kernel": problem.kernel, "element_size": 2, "max_rows": problem.max_rows}


def default(problem: Problem, device: str) -> Config:
    """Return what runs today for the most rows of the problem's class; blocks not yet cut to a matrix."""
    index = torch.cuda.current_device() if device == "cuda" else None
    return tuning.choose(problem.kernel, 2, problem.max_rows or _LARGE, _LARGE, _LARGE, has_descriptors(device), index)


def time_defaults(device: str, shape: Shape, tokens: Iterable[int], timer: Callable) -> None:
    """Print a JSON row per kernel and number of tokens: milliseconds of its launches in a step, or of decoding."""
    for T in tokens:
        is_decode = T * shape.K <= triton_backend.MAX_DECODE_SLOTS
        for kernel in ("decode",) if is_decode else ("rows", "weight_grad"):
            call, repeats = calls(kernel, T, shape, device)
            with recorded() as launches:
                call()
            for name, count in Counter(launch.kernel for launch in launches).items():
                own = [launch for launch in launches if launch.kernel == name]
                took = timer(lambda own=own: [launch.again() for launch in own]) / repeats
                row = {"kernel": name, "tokens": T, "launches": count // repeats, "milliseconds": round(took, 5)}
                factor = {"gate_up": 4, "rows": 8, "weight_grad": 6 * NUM_SEGMENTS}.get(name)
                if factor:  # the three products of a layer and of its backward pass, 2 operations a multiply-add
                    row["tflops"] = round(factor * T * shape.K * shape.H * shape.I / took / 1e9, 1)
                if own[0].compiled is not None:
                    row |= {"registers": [c.compiled.n_regs for c in own[: count // repeats]]}
                    row |= {"spills": sum(c.compiled.n_spills for c in own), "shared": own[0].compiled.metadata.shared}
                print(json.dumps(row), flush=True)


@contextlib.contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Count kernels that triton finds compiled in its cache, and those it has to compile; print them at the end."""
    hits: Counter[str] = Counter()
    misses: Counter[str] = Counter()

    def listen(*, src, cache_hit: bool, **_) -> None:
        (hits if cache_hit else misses)[src.name] += 1

    triton.knobs.compilation.listener = listen
    try:
        yield hits, misses
    finally:
        triton.knobs.compilation.listener = None
        print(json.dumps({"cache_hits": hits.total(), "cache_misses": misses.total(), "missed": dict(misses)}))


def text(found: dict) -> str:
    """Return a configuration file, an entry a line."""
    head = json.dumps({key: value for key, value in found.items() if key != "entries"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in found["entries"])
    return f'{head[:-2]},\n "entries": [\n{rows}\n ]\n}}\n'


def main() -> None:
    """Tune for the current CUDA or ROCm device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: the package's configs/<device name>.json")
    parser.add_argument("--copy", type=Path, help="write it there, too")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after them")
    parser.add_argument("--defaults", action="store_true", help="time what ships, write nothing")
    parser.add_argument(
        "--stand-in", action="store_true", help="a tiny layer in Triton's interpreter: tries the script"
    )
    arguments = parser.parse_args()
    if not arguments.stand_in and not torch.cuda.is_available():
        raise SystemExit("tune: torch finds no GPU here; tile sizes can only be timed on one")
    device, shape, timer = ("cpu", TINY, wall_milliseconds) if arguments.stand_in else ("cuda", OLMOE, milliseconds)
    with counted():
        if arguments.defaults:
            time_defaults(device, shape, (3, 130) if arguments.stand_in else DEFAULTS_AT, timer)
            return
        name = "stand-in" if arguments.stand_in else torch.cuda.get_device_name()
        if arguments.stand_in and arguments.output is None:
            raise SystemExit("tune: --stand-in times nothing that could ship; name an --output")
        output = arguments.output or tuning.CONFIGS / tuning.file_name(name)
        versions = {"torch": torch.__version__, "triton": triton.__version__}

        def write(entries: list[dict]) -> None:
            found = {"device": name, **versions, "date": date.today().isoformat(), "entries": entries}
            for path in filter(None, (output, arguments.copy)):
                path.write_text(text(found))

        problems = TINY_PROBLEMS if arguments.stand_in else PROBLEMS
        tune(device, shape, problems, timer, seconds=arguments.seconds, done=write)
        print(f"wrote {output}")


if __name__ == "__main__":
    main()

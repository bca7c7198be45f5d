"""Compile what the backend launches for chips that are not here, and write down what each kernel takes of them.

    python benchmarks/compile_table.py --output benchmarks/results/compile.json   # the triton that is installed
    python benchmarks/compile_table.py --table A.json B.json --output benchmarks/results/compile.md

The launches are the backend's own, on the meta device under a driver that names another chip, so a kernel is compiled
from the same arguments, alignments and tile sizes as on a GPU. `cuobjdump`, in triton's wheel, counts registers and
stack (above 0 bytes: spilled registers) and prints the machine code; AMD's assembly tells them.
"""

import contextlib
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from tables import parser_of, table, write_json
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tiedmoe_kernels import backends, triton_backend, tune, tuning
from tiedmoe_kernels.low_rank import Residual
from tiedmoe_kernels.spec import Segment, Spec

TARGETS = {f"sm_{chip}": GPUTarget("cuda", chip, 32) for chip in (80, 86, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# Shared memory of one block, bytes: CUDA C++ programming guide, "compute capabilities"; LDS of a CDNA3 compute unit.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
WHAT = ("architecture", "kernel", "dtype", "H", "tokens")
TILES = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "tma", "persistent")
TAKEN = ("loop", "registers", "stack", "shared")

HEAD = """# What each kernel takes of a chip, compiled ahead of time

`make compile-table` writes this table. Loop: machine instructions of one iteration of the main loop (NVIDIA only; what
changes the segment of a weight gradient or the tile of a persistent program is among them, and is run once each).
Registers and stack (bytes; above 0: registers spilled) are of one thread, shared memory is in bytes of one block;
where one kernel serves several products or numbers of segments, the most that any takes. Limits of a block: {limits}.
`H` 2048 is OLMoE's layer, 2880 gpt-oss's (transposed, interleaved, biased), 1008 none (16 divides it, nothing larger).

"""


class Shape(NamedTuple):
    E: int
    H: int
    I: int
    K: int
    spec: Spec
    has_bias: bool


BF16, FP32 = torch.bfloat16, torch.float32
OLMOE = Shape(64, 2048, 1024, 8, Spec("silu", 1.702, 7.0, is_transposed=False, is_concatenated=True), False)
# Transposed, interleaved, biased, clamped.
GPT_OSS = Shape(32, 2880, 2880, 4, Spec("clamped_swiglu", 1.702, 7.0, is_transposed=True, is_concatenated=False), True)
# No family's: sizes that 16 divides and no larger block, so that the masks are compiled, too.
ODD = Shape(64, 1008, 1008, 2, Spec("gelu", 1.702, 7.0, is_transposed=False, is_concatenated=True), True)


class Case(NamedTuple):
    """A forward pass without gradients, or a training step whose weight gradient has some segments."""

    shape: Shape
    dtype: torch.dtype
    tokens: int
    num_segments: int = 1
    rank: int = 0  # of a residual


# Every entry of configs/default.json is used by one of these at least; the test compiles these.
QUICK_CASES = (
    *(Case(OLMOE, BF16, tokens, num_segments=0) for tokens in (1, 64, 512)),
    *(Case(OLMOE, BF16, 8192), Case(ODD, BF16, 8192, num_segments=0)),
    *(Case(ODD, FP32, 1, num_segments=0), Case(ODD, FP32, 8192)),
    Case(OLMOE, BF16, 8192, rank=16),
)
CASES = (
    *QUICK_CASES,
    *(Case(OLMOE, BF16, tokens) for tokens in (64, 512)),
    *(Case(OLMOE, BF16, 64, num_segments=0, rank=16), Case(OLMOE, BF16, 512, rank=64)),
    Case(OLMOE, BF16, 8192, num_segments=4),
    *(Case(GPT_OSS, BF16, 1, num_segments=0), Case(GPT_OSS, BF16, 8192)),
    *(Case(ODD, BF16, 8192), Case(ODD, FP32, 8192, rank=18)),
)


def driver_of(target: GPUTarget) -> SimpleNamespace:
    """Return what `JITFunction` asks of a driver before it compiles; kernels are kept by device, one a target."""
    return SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: hash(target), get_current_stream=lambda device: 0
    )


@contextlib.contextmanager
def compiling(target: GPUTarget, found: Callable[[str, dict, Any], object] | None = None) -> Iterator[None]:
    """Compile every launch for the target instead; tensors of any device reach the kernels.

    `found` is told a launch's kernel by its name, the options it was launched with, and what triton made of it.
    """

    def compile_instead(self, grid):
        def launch(*arguments, **options) -> None:  # None: there is no kernel to keep and launch again
            kernel = self.warmup(*arguments, grid=grid, **options)
            if found:
                found(self.fn.__name__.removesuffix("_kernel"), options, kernel)

        return launch

    triton.runtime.driver.set_active(driver_of(target))
    tuning.choose.cache_clear()
    with (
        mock.patch.object(JITFunction, "__getitem__", compile_instead),
        mock.patch.object(backends, "backend_of", return_value=triton_backend),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # it does not know meta
    ):
        yield
    tuning.choose.cache_clear()


def launches(case: Case) -> None:
    """Make every launch of the case, on the meta device."""
    (E, H, I, K, spec, has_bias), dtype, tokens = case.shape, case.dtype, case.tokens
    empty = functools.partial(torch.empty, device="meta", dtype=dtype)

    def stored(*sizes: tuple[int, int]) -> list[torch.Tensor]:
        return [empty(E, *(size if spec.is_transposed else size[::-1])) for size in sizes]

    x, index, weights = empty(tokens, H), empty(tokens, K, dtype=torch.int64), empty(tokens, K)
    pool = (*stored((H, 2 * I), (I, H)), *((empty(E, 2 * I), empty(E, H)) if has_bias else (None, None)))
    r = case.rank
    residual = Residual(*stored((H, r), (r, 2 * I), (I, r), (r, H))) if r else None
    if not case.num_segments:
        triton_backend.forward(x, index, weights, *pool, None, spec, False, residual)
        return
    _, pre, order, offsets = triton_backend.forward(x, index, weights, *pool, None, spec, True, residual)
    _, _, grad_pre, hidden, _ = triton_backend.backward_data(
        x, x, weights, *pool, pre, order, offsets, spec, True, True, residual, residual is not None
    )
    segment = Segment(x, x, grad_pre, hidden, order, offsets, weights)
    # A group's gradient is added to one that is there, in both dtypes; a single layer's is written.
    needs = (True, True, has_bias, has_bias)
    for out_dtype in {dtype, torch.float32} if case.num_segments > 1 else {dtype}:
        into = [None if t is None or case.num_segments == 1 else t.to(out_dtype) for t in pool]
        triton_backend.backward_weight([segment] * case.num_segments, spec, out_dtype, needs, into)


def main_loop(sass: str) -> int:
    """Count the instructions of an iteration of the main loop: the longest with products and no such loop inside.

    0 without one. What jumps back over an EXIT waits on a barrier, out of line behind the kernel's end.
    """
    code = {int(at, 16): text for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)}
    loops: list[tuple[int, int]] = []
    for end, text in code.items():
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and (start := int(jump[1], 16)) <= end:
            body = [code[at] for at in code if start <= at <= end]
            if any(re.search(r"MMA\b|\bFFMA", line) for line in body) and "EXIT" not in "".join(body):
                loops.append((start, end))
    outer = {(s, e) for s, e in loops for each in loops if each != (s, e) and s <= each[0] and each[1] <= e}
    return max((sum(start <= at <= end for at in code) for start, end in set(loops) - outer), default=0)


def resources(kernel) -> dict[str, int | None]:
    """Return registers and stack (or scratch) bytes a thread, shared memory bytes a block, the main loop's length."""
    loop = None  # AMD's assembly is not taken apart
    if "cubin" in kernel.asm:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            text, sass = (subprocess.check_output([tool, f, file.name], text=True) for f in ("-res-usage", "-sass"))
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
        loop = main_loop(sass)
    else:
        wanted = (r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)")
        registers, stack = (re.search(each, kernel.asm["amdgcn"])[1] for each in wanted)
    return {"loop": loop, "registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}


def rows(architecture: str, cases: Iterable[Case]) -> list[dict]:
    """One row per kernel with tile sizes that the cases launch on a chip, compiled by the installed triton."""
    kernels: dict[str, dict] = {}
    case = None

    def found(name: str, options: dict, kernel) -> None:
        if "PRECISION" not in options or kernel.hash in kernels:
            return  # without tile sizes to choose: it sorts, or sums
        facts = {field: options.get(field.upper(), options.get(field, False)) for field in TILES}
        where = {"H": case.shape.H, "dtype": str(case.dtype).removeprefix("torch."), "tokens": case.tokens}
        about = {"architecture": architecture, "triton": triton.__version__, "kernel": name}
        kernels[kernel.hash] = about | facts | where | resources(kernel)

    with compiling(TARGETS[architecture], found):
        for case in cases:
            launches(case)
        if architecture in ("sm_90", "sm_100"):  # no entry yet, but candidates of `make tune`
            case = Case(OLMOE, torch.bfloat16, 8192)
            for kernel, m, n, stages in (("rows", 128, 256, 3), ("gate_up", 64, 128, 4), ("gate_up", 128, 64, 4)):
                with tune.forced(kernel, tuning.Config(m, n, 64, 8, 8, stages, tma=True, persistent=True)):
                    launches(case)
    return list(kernels.values())


def faults(row: dict) -> list[str]:
    """Return what is wrong with a row: spilled registers, too much shared memory."""
    found, limit = [], SHARED_LIMIT[row["architecture"]]
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack a thread; expected 0: smaller blocks or more warps")
    if (shared := row["shared"]) > limit:
        found.append(f"{shared} bytes of shared memory a block; {row['architecture']} has {limit}: fewer stages")
    return found


def unused_entries(found: list[dict]) -> list[dict]:
    """Return the entries of `configs/default.json`, for these rows' architectures, that no row was compiled with."""
    columns = ("architecture", "kernel", "dtype", *(f for f in tuning.Config._fields if f != "group_m"))
    used = {tuple(row[column] for column in columns) for row in found}
    shipped = json.loads((tuning.CONFIGS / "default.json").read_text())["architectures"]
    entries = [
        {"architecture": each, **entry} for each in {row["architecture"] for row in found} for entry in shipped[each]
    ]
    for entry in entries:
        entry["dtype"] = {2: "bfloat16", 4: "float32"}[entry["element_size"]]
    return [entry for entry in entries if tuple(entry.get(column, False) for column in columns) not in used]


def markdown(found: list[dict]) -> str:
    """Return the table of all rows, one line per kernel and configuration, what it takes with each triton."""
    versions = sorted({row["triton"] for row in found})
    lines: dict[tuple, list[dict]] = {}
    for row in found:
        lines.setdefault(tuple(row[column] for column in (*WHAT, *TILES)), []).append(row)

    def most(rows: list[dict], version: str, what: str) -> str:
        values = [row[what] for row in rows if row["triton"] == version]
        return "-" if not values or None in values else str(max(values))

    cells = [[*key, *(most(same, v, what) for v in versions for what in TAKEN)] for key, same in lines.items()]
    limits = ", ".join(f"{name} {limit}" for name, limit in SHARED_LIMIT.items())
    columns = [*WHAT, *TILES, *(f"{what}, triton {v}" for v in versions for what in TAKEN)]
    return HEAD.format(limits=limits) + "\n".join(table(columns, cells, left=3)) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="each entry of configs/default.json once, not each use")
    parser.add_argument("--table", nargs="+", type=Path, help="compile nothing, make a table of these JSON files")
    arguments = parser.parse_args()
    if arguments.table:
        found = [row for path in arguments.table for row in json.loads(path.read_text())]
        arguments.output.write_text(markdown(found))
    else:
        cases = QUICK_CASES if arguments.quick else CASES
        found = [row for architecture in arguments.architectures for row in rows(architecture, cases)]
        write_json(arguments.output, found)
    wrong = [f"{row}: {fault}" for row in found for fault in faults(row)]
    wrong += [f"{e['architecture']}: no case compiles the entry {e}" for e in unused_entries(found)]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

"""Expert kernels on a GPU against their peers: `python benchmarks/experts_gpu.py` (or `make bench-gpu`).

    python benchmarks/experts_gpu.py --output PREFIX --cases 0-6 --peers grouped_mm,batched_mm,liger --budget-s 200
    python benchmarks/experts_gpu.py --list                             # every case with its number

The cases, in bfloat16; a step is forward and backward of a tied group of g layers, two microbatches, accumulated:

    0        the bar: forward of OLMoE's layer, 8192 tokens (TFLOP/s)
    1        the bar: a step of it, g=4 (TFLOP/s, and the bytes that a layer saves for its backward)
    2, 3, 4  the bar: decoding 1, 8 and 32 tokens (microseconds, caches cold, as a CUDA graph)
    5, 6     the bar: a step at g=1 and g=2 (saved bytes, and never slower than transformers)
    7-10     Qwen3-30B, forward and step at 8192 and 32768 tokens: what Liger publishes
    11-13    OLMoE with Zipf routing: forward, step, decode
    14-20    OLMoE at 512, 2048 and 32768 tokens, and decoding 64
    21-43    every other shape: forward at 8192, decoding 8, a step at 2048
    44-      the rest of the grid of shapes, tokens, group sizes and routings

One row is a peer (peers.py) in a case. A row is written to PREFIX.jsonl, one JSON object a line, as soon as it is
measured, after a first line that describes machine, versions and the machine's own rates; PREFIX.md, the table, is
written again after each. Peers that compile and tune for a minute come after all others, in every case. A row that
would not end within --budget-s is not begun, and named in the table. A peer that breaks the device sits out the case,
the second time all cases, and the run goes on in a new process; --resume goes on after what PREFIX.jsonl holds.
`--device cpu` tries the script on tiny shapes; those figures mean nothing.
"""

import argparse
import datetime
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measure import Bench, run_plan
from peers import PEERS, TIEDMOE, TRANSFORMERS, Peer
from shapes import DECODE_TOKENS, GROUP_SIZES, OLMOE, QWEN3, ROUTINGS, SHAPES, TINY, TOKENS, Case
from tables import table
from timing import machine, machine_rates, versions

RESULTS = Path(__file__).parent / "results" / "experts_gpu"
OTHERS = [shape for shape in SHAPES if shape != OLMOE]
GRID = [
    Case(kind, shape, T, g, routing)
    for shape in SHAPES
    for routing in ROUTINGS
    for T in TOKENS
    for kind, g in [("forward", 1), ("decode", 1), *(("step", g) for g in GROUP_SIZES)]
    if kind != "decode" or T in DECODE_TOKENS
]
CASES = list(
    dict.fromkeys(
        [
            *(Case("forward", OLMOE, 8192), Case("step", OLMOE, 8192, 4)),
            *(Case("decode", OLMOE, T) for T in (1, 8, 32)),
            *(Case("step", OLMOE, 8192, g) for g in (1, 2)),
            *(Case(kind, QWEN3, T) for kind in ("forward", "step") for T in (8192, 32768)),
            *(
                Case(kind, OLMOE, T, g, "zipf")
                for kind, T, g in (("forward", 8192, 1), ("step", 8192, 4), ("decode", 8, 1))
            ),
            *(Case(kind, OLMOE, T, g) for T in (512, 2048, 32768) for kind, g in (("forward", 1), ("step", 4))),
            Case("decode", OLMOE, 64),
            *(Case("forward", shape, 8192) for shape in OTHERS),
            *(Case("decode", shape, 8) for shape in OTHERS),
            *(Case("step", shape, 2048, 4) for shape in OTHERS),
            *GRID,
        ]
    )
)
TINY_CASES = [Case("forward", TINY, 16), Case("decode", TINY, 2), Case("step", TINY, 16, 2, "zipf")]
QUICK = "0-43"
# Set for an H100 by issue 10 ("The bar stays"): case, figure of our row, at least or at most, what, unit.
BAR = (
    (0, "tflops", ">=", 450, "TFLOP/s"),
    (1, "tflops", ">=", 400, "TFLOP/s"),
    (2, "us", "<=", 48, "us"),
    (3, "us", "<=", 252, "us"),
    (4, "us", "<=", 378, "us"),
    (1, "saved_mb", "<=", 302, "MB saved by one layer"),
)


class Task(NamedTuple):
    number: int
    case: Case
    peer: Peer

    @property
    def key(self) -> str:
        return f"{self.number}: {self.case.key}, {self.peer.name}"


def plan(cases: list[Case], numbers: list[int], names: set[str]) -> list[Task]:
    """Return every case with every peer, case by case; those that take a minute to compile and tune come last."""
    tasks = [Task(number, cases[number], peer) for number in numbers for peer in PEERS if peer.name in names]
    return sorted(tasks, key=lambda task: task.peer.slow_to_prepare)


def parse_cases(text: str, total: int) -> list[int]:
    """Return the numbers of cases that "0-6,12" or "all" means."""
    if text == "all":
        return list(range(total))
    ends = [(part.split("-") * 2)[:2] for part in text.split(",")]
    numbers = [number for first, last in ends for number in range(int(first), int(last) + 1)]
    if not numbers or max(numbers) >= total:
        raise ValueError(f"--cases {text}: there are cases 0 to {total - 1}; --list names them")
    return numbers


# --- the table -------------------------------------------------------------------------------------------------------


def bar(rows: list[dict]) -> list[str]:
    """Return the bar of issue 10, a line each: needed, found, and whether that passes."""
    ours = {row["key"]: row for row in rows if row["peer"] == TIEDMOE and row["status"] == "measured"}
    lines = []
    for number, figure, sign, needed, unit in BAR:
        verdict, row = "not measured", ours.get(CASES[number].key)
        if row:
            found = {"us": row["ms"]["median"] * 1e3, "saved_mb": round(row.get("saved_bytes", 0) / 1e6)} | row
            passes = found[figure] >= needed if sign == ">=" else found[figure] <= needed
            verdict = f"{found[figure]:.4g}, {'pass' if passes else 'fail'}"
        lines.append(f"- case {number}, {sign} {needed} {unit}: {verdict}")
    ratios = {
        f"{row['key']}, {row['peer']}": row["time_over_tiedmoe"]["median"]
        for row in rows
        if row["peer"] in TRANSFORMERS and row["status"] == "measured" and "time_over_tiedmoe" in row
    }
    closest = min(ratios, key=lambda key: ratios[key], default="")
    found = (
        f"{ratios[closest]:.2f} ({closest}), {'pass' if ratios[closest] >= 1 else 'fail'}"
        if ratios
        else "not measured"
    )
    return [*lines, f"- never slower than transformers' best, time over ours >= 1, {len(ratios)} rows: {found}"]


def markdown(run: dict, rows: list[dict], left_out: Sequence[str]) -> str:
    rates, where = run["rates"], run["machine"] | run["versions"]
    device = where.get("device", "a CPU: the script alone is tried, the figures mean nothing")
    columns = ["case", "peer", "", "ms", "rate", "of machine", "over ours", "saved, MB", "peak, MB", "error"]
    cells = [
        [
            f"{row['case']}: {row['key']}",
            row["peer"],
            ", ".join([row["status"]] * (row["status"] == "wrong") + ["no graph"] * ("no_graph" in row)),
            "{median:.4g} ({p20:.4g}-{p80:.4g})".format(**row["ms"]),
            f"{row['tflops']:.4g} TFLOP/s" if "tflops" in row else f"{row['tb_per_s']:.3g} TB/s",
            f"{row['of_machine']:.0%}",
            "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**over) if (over := row.get("time_over_tiedmoe")) else "",
            *(f"{row[name] / 1e6:.1f}" if row.get(name) else "" for name in ("saved_bytes", "peak_bytes")),
            f"{row['largest_error']:.1e}" if "largest_error" in row else "",
        ]
        for row in rows
        if "ms" in row
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("reason") or row.get("no_graph"):
            reasons.setdefault(f"{row['peer']}, {row['status']}: {reason}", []).append(str(row["case"]))
    lines = [
        f"# Expert kernels on {device}",
        "",
        f"{run['date']}, `{run['command']}`. {', '.join(f'{name} {value}' for name, value in where.items())}.",
        f"bf16 matrix product of 8192 {rates['matmul_tflops']:.4g} TFLOP/s, copy {rates['copy_tb_per_s']:.3g} TB/s. "
        "Times are medians of rounds (p20-p80), `over ours` the median ratio inside a round: above 1 ours is faster.",
        "",
        "The bar, set for an H100:",
        "",
        *bar(rows),
        "",
        *table(columns, cells, left=3),
        "",
        *(f"- {reason} (case {', '.join(numbers)})" for reason, numbers in reasons.items()),
        *(f"- no time left: {key}" for key in left_out),
    ]
    return "\n".join(lines).rstrip() + "\n"


# --- the run ---------------------------------------------------------------------------------------------------------


class Results:
    """PREFIX.jsonl and PREFIX.md, written row by row."""

    def __init__(self, prefix: Path, resume: bool):
        self.lines, self.table = (prefix.parent / (prefix.name + end) for end in (".jsonl", ".md"))
        prefix.parent.mkdir(parents=True, exist_ok=True)
        found = self.lines.read_text().splitlines() if resume and self.lines.exists() else []
        self.entries = [json.loads(line) for line in found]  # the run, then the rows
        self.lines.write_text("".join(f"{line}\n" for line in found))

    def add(self, entry: dict) -> None:
        self.entries.append(entry)
        with self.lines.open("a") as lines:
            lines.write(json.dumps(entry, allow_nan=False) + "\n")
        self.write_table()

    def write_table(self, left_out: Sequence[str] = ()) -> None:
        self.table.write_text(markdown(self.entries[0], self.entries[1:], left_out))

    def status(self, number: int, peer: str) -> str | None:
        """Return that of the row, if it is there; a peer that has broken the device twice has one in every case."""
        found = {row["case"]: row["status"] for row in self.entries[1:] if row["peer"] == peer}
        breaks = list(found.values()).count("broke the device")
        return found.get(number, "broke the device" if breaks > 1 else None)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="PREFIX", help="of PREFIX.jsonl and PREFIX.md")
    parser.add_argument("--cases", default=None, help=f'numbers, such as 0-6,12, or "all"; default {QUICK}')
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="beside tiedmoe; default all")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds, of everything; default no end")
    parser.add_argument(
        "--device", default="cuda", help="cuda (also for ROCm), or cpu: tiny shapes, to try the script"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there and measure the others")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    return parser


def main(arguments: list[str] | None = None) -> None:
    start = time.monotonic()
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    cases = TINY_CASES if device.type == "cpu" else CASES
    if options.list:
        print("\n".join(f"{number}: {case.key}" for number, case in enumerate(cases)))
        return
    if device.type != "cpu" and not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no GPU here; nothing was timed (--device cpu tries the script alone)")
    names = {TIEDMOE, *filter(None, options.peers.split(","))}
    if unknown := names - {peer.name for peer in PEERS}:
        raise ValueError(f"--peers: unknown {sorted(unknown)}; choose from {[peer.name for peer in PEERS]}")
    results = Results(options.output, options.resume)
    given = sys.argv[1:] if arguments is None else arguments
    if not results.entries:
        command = " ".join(["python benchmarks/experts_gpu.py", *given])
        sizes = {"size": 256, "copy_bytes": 1 << 22} if device.type == "cpu" else {}
        results.add(
            {
                "date": datetime.date.today().isoformat(),
                "command": command.replace(str(options.output), options.output.name),  # no path of the machine
                "machine": machine(device),
                "versions": versions(),
                "rates": machine_rates(device, **sizes),
            }
        )
    numbers = parse_cases(options.cases or ("all" if device.type == "cpu" else QUICK), len(cases))
    limits = {"seconds": 0.05, "most": 4} if device.type == "cpu" else {}
    bench: Bench | None = None

    def execute(task: Task) -> dict:
        nonlocal bench
        begun = time.monotonic()
        if bench is None or bench.case != task.case:
            bench = None  # its memory first
            gc.collect()
            if device.type != "cpu":
                torch.cuda.empty_cache()
            has_ours = results.status(task.number, TIEDMOE) == "measured"
            bench = Bench(task.case, device, results.entries[0]["rates"], has_ours, **limits)
        row = {"case": task.number, "key": task.case.key, "peer": task.peer.name} | bench.row(task.peer)
        results.add(row | {"seconds": round(time.monotonic() - begun, 1)})
        print(
            f"{begun - start:5.0f} s  {task.key}: {row['status']}, {time.monotonic() - begun:.1f} s", file=sys.stderr
        )
        if row["status"] == "broke the device":
            left = options.budget_s - (time.monotonic() - start)
            os.execv(sys.executable, [sys.executable, __file__, *given, "--resume", "--budget-s", str(left)])
        return row

    todo = [task for task in plan(cases, numbers, names) if not results.status(task.number, task.peer.name)]
    left = options.budget_s - (time.monotonic() - start)
    _, left_out = run_plan(todo, execute, left, kind=lambda task: (task.case.kind, task.peer.name))
    results.write_table(left_out)
    print(results.table.read_text())


if __name__ == "__main__":
    main()

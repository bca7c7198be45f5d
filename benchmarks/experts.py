"""Experts against their peers, on a GPU or a CPU: `make bench-gpu`, `make bench`.

    python benchmarks/experts.py --output PREFIX --cases 0-6 --peers grouped_mm,batched_mm,liger --budget-s 200
    python benchmarks/experts.py --device cpu --output PREFIX
    python benchmarks/experts.py --list                             # every case with its number
    python benchmarks/experts.py --check                            # ours in `CHECKED_CASES` against float64, alone

The cases of a GPU, in bfloat16: 0 to 6 are the bar, forward, steps and decoding of OLMoE's layer, 7 to 10 Qwen3-30B,
which Liger publishes, 11 to 13 Zipf routing, 14 to 20 other numbers of tokens, then the other shapes. A step is
forward and backward of a tied group of g layers, its weight gradient added to what is there. Those of a CPU are in
`CPU_CASES`, whole models among them; peak memory is that of a process of its own there.

One row is a peer (peers.py) in a case, timed in turn with ours. PREFIX.json (machine, versions, the machine's own
rates, a row a line) and PREFIX.md, the table, are written again after each. Peers that compile and tune for a minute
come last. A row that would not end within --budget-s is not begun, and named in the table. A peer that breaks the
device ends the run. `--tiny` tries the script; those figures mean nothing.
"""

import datetime
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measure import TOLERANCE, Bench, errors_of, expected_outcome, make_problem
from models import MODELS, ModelBench, ModelCase
from peers import PEERS, TIEDMOE, TRANSFORMERS, Peer
from shapes import OLMOE, QUARTER, QWEN3, SHAPES, TINY, Case
from tables import RESULTS, numbers, parser_of, table, write_results
from timing import machine, machine_rates, versions

OTHERS = [shape for shape in SHAPES if shape != OLMOE]
GPU_CASES = [
    *(Case("forward", OLMOE, 8192), Case("step", OLMOE, 8192, 4)),
    *(Case("decode", OLMOE, T) for T in (1, 8, 32)),
    *(Case("step", OLMOE, 8192, g) for g in (1, 2)),
    *(Case(kind, QWEN3, T) for kind in ("forward", "step") for T in (8192, 32768)),
    *(Case(kind, OLMOE, T, g, "zipf") for kind, T, g in (("forward", 8192, 1), ("step", 8192, 4), ("decode", 8, 1))),
    *(Case(kind, OLMOE, T, g) for T in (512, 2048, 32768) for kind, g in (("forward", 1), ("step", 4))),
    Case("decode", OLMOE, 64),
    *(Case("forward", shape, 8192) for shape in OTHERS if shape != QWEN3),
    *(Case("decode", shape, 8) for shape in OTHERS),
    *(Case("step", shape, 2048, 4) for shape in OTHERS),
]
CHECKED_CASES = (
    *(Case("decode", OLMOE, T) for T in (1, 8, 32)),
    *(Case("forward", OLMOE, T) for T in (512, 2048)),
    *(Case("step", OLMOE, T) for T in (64, 512, 2048, 8192)),
    Case("step", OLMOE, 512, g=4),
)
TINY_CHECKED_CASES = (Case("decode", TINY, 1), Case("step", TINY, 5), Case("step", TINY, 5, g=4))
FP32, BF16 = torch.float32, torch.bfloat16
STEP, STEP_512 = Case("step", QUARTER, 64, 4, dtype=FP32), Case("step", QUARTER, 512, 4, dtype=FP32)
CPU_CASES = [  # what says most first: the clock may cut the end off
    STEP,
    *(Case("decode", OLMOE, T, dtype=dtype) for T, dtype in ((1, FP32), (8, FP32), (1, BF16))),
    *(ModelCase("generate"), ModelCase("train"), STEP_512, Case("step", QUARTER, 64, 4)),
    *(Case("decode", OLMOE, 8), Case("step", QUARTER, 512, 4), Case("step", QUARTER, 64, 2, dtype=FP32)),
    *(Case("step", OLMOE, 64, 4, dtype=FP32), Case("decode", OLMOE, 64, dtype=FP32)),
]
CPU_PEERS = (TIEDMOE, "tiedmoe recompute", *TRANSFORMERS)
CPU_PEAKS = {STEP, STEP_512, ModelCase("generate"), ModelCase("train")}
TINY_CASES = [Case("forward", TINY, 16), Case("decode", TINY, 2), Case("step", TINY, 16, 2, "zipf")]
TINY_CASES += [ModelCase(kind, TINY, 4) for kind in ("generate", "train")]
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
    case: Case | ModelCase
    peer: Peer

    @property
    def key(self) -> str:
        return f"{self.number}: {self.case.key}, {self.peer.name}"


def plan(cases: Sequence[Case | ModelCase], numbers: Iterable[int], names: set[str]) -> list[Task]:
    """Return every case with every peer, case by case; those that take a minute to compile and tune come last."""
    chosen = [peer for peer in PEERS if peer.name in names]
    peers_of = {number: MODELS if isinstance(cases[number], ModelCase) else chosen for number in numbers}
    tasks = [Task(number, cases[number], peer) for number in numbers for peer in peers_of[number]]
    return sorted(tasks, key=lambda task: task.peer.slow_to_prepare)


def parse_cases(text: str, total: int) -> list[int]:
    """Return the numbers of cases that "0-6,12" means."""
    found = numbers(text)
    if not found or max(found) >= total:
        raise ValueError(f"--cases {text}: there are cases 0 to {total - 1}; --list names them")
    return found


def run_plan(tasks: Iterable[Task], execute: Callable, seconds: float, now: Callable = time.monotonic) -> list[str]:
    """Execute the tasks in turn until one breaks the device; return the keys of those that were left out.

    One that would not end within `seconds`, judged by what such a case took for such a peer, is not begun.
    """
    start, is_broken, left_out = now(), False, []
    took: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        begun, before = now(), took.setdefault((task.case.kind, task.peer.name), [])
        if is_broken or begun - start + statistics.median(before or [10.0]) > seconds:
            left_out.append(task.key)
            continue
        is_broken = execute(task)["status"] == "broke the device"
        before.append(now() - begun)
    return left_out


def check(cases: Iterable[Case], device: torch.device) -> bool:
    """Print a case's relative errors against float64, a row each; whether all are within the tolerance."""
    rows = []
    for case in cases:
        problem = make_problem(case, device)
        for weight in problem.pools[0] if case.g == 1 else ():
            weight.grad = None  # the gradient is written; a group's is added to what is there
        errors = errors_of(PEERS[0], problem, expected_outcome(problem))
        is_right = all(error <= TOLERANCE[case.dtype] for error in errors.values())
        rows.append({"case": case.key, "right": is_right, "errors": {k: float(f"{v:.2e}") for k, v in errors.items()}})
        print(json.dumps(rows[-1]), flush=True)
    return all(row["right"] for row in rows)


def bar(rows: list[dict]) -> list[str]:
    """Return the bar of issue 10, a line each: needed, found, and whether that passes."""
    ours = {row["key"]: row for row in rows if row["peer"] == TIEDMOE and row["status"] == "measured"}
    lines = []
    for number, figure, sign, needed, unit in BAR:
        verdict, row = "not measured", ours.get(GPU_CASES[number].key)
        if row:
            found = {"us": row["ms"]["median"] * 1e3, "saved_mb": round(row.get("saved_bytes", 0) / 1e6)} | row
            passes = found[figure] >= needed if sign == ">=" else found[figure] <= needed
            verdict = f"{found[figure]:.4g}, {'pass' if passes else 'fail'}"
        lines.append(f"- case {number}, {sign} {needed} {unit}: {verdict}")
    theirs = [row for row in rows if row["peer"] in TRANSFORMERS and row["status"] == "measured"]
    ratios = [(over["median"], row["key"], row["peer"]) for row in theirs if (over := row.get("time_over_tiedmoe"))]
    verdict = "not measured"
    if ratios:
        least, key, peer = min(ratios)
        verdict = f"{least:.2f} ({key}, {peer}), {'pass' if least >= 1 else 'fail'}"
    return [*lines, f"- never slower than transformers' best, time over ours >= 1, {len(ratios)} rows: {verdict}"]


def cells(row: dict) -> list[str]:
    """Return the table's line of a row with a time."""
    rate = f"{row['tflops']:.4g} TFLOP/s" if "tflops" in row else ""
    rate = f"{row['tb_per_s']:.3g} TB/s" if "tb_per_s" in row else rate
    over = row.get("time_over_tiedmoe")
    return [
        *(f"{row['case']}: {row['key']}", row["peer"]),
        ", ".join([row["status"]] * (row["status"] == "wrong") + ["no graph"] * ("no_graph" in row)),
        "{median:.4g} ({p20:.4g}-{p80:.4g})".format(**row["ms"]),
        "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**over) if over else "",
        rate,
        f"{row['of_machine']:.0%}" if "of_machine" in row else "",
        *(f"{row[name] / 1e6:.1f}" if row.get(name) else "" for name in ("saved_bytes", "peak_bytes")),
        f"{row['largest_error']:.1e}" if "largest_error" in row else "",
        str(row["ms"]["n"]),
    ]


def markdown(run: dict) -> str:
    rows, where = run["rows"], run["machine"] | run["versions"]
    columns = ["case", "peer", "", "ms", "over ours", "rate", "of machine", "saved, MB", "peak, MB", "error", "rounds"]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("reason") or row.get("no_graph"):
            reasons.setdefault(f"{row['peer']}, {row['status']}: {reason}", []).append(str(row["case"]))
    about = ", ".join(f"{name} {value}" for name, value in where.items())
    rates = ", ".join(f"{name} {rate:.4g}" for name, rate in run.get("rates", {}).items())
    about = (
        f"{run['date']}, `{run['command']}`. {about}; {run['threads']} threads, load before the run {run['load']}: "
        f"above 0.5, other work disturbed it. {rates}"
    )
    how = (
        "Times are medians of rounds (20th to 80th percentile), `over ours` the median ratio inside a round: above 1 "
        "ours is faster. A layer's peak memory is above pool, gradients and inputs, a model's is all that it takes."
    )
    lines = [f"# Experts on {where.get('device', 'a CPU')}", "", about, "", how, ""]
    lines += ["The bar, set for an H100:", "", *bar(rows), ""] if "device" in where else []
    lines += [*table(columns, [cells(row) for row in rows if "ms" in row], left=3), ""]
    lines += [f"- {reason} (case {', '.join(numbers)})" for reason, numbers in reasons.items()]
    lines += [f"- left out: {key}" for key in run["left_out"]]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    start = time.monotonic()
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda is also for ROCm")
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="of PREFIX.json and PREFIX.md")
    parser.add_argument("--cases", help="numbers, such as 0-6,12; default all")
    parser.add_argument("--peers", help="of layers, beside tiedmoe, by commas; default all that run on the device")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds, of everything; default no end")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--check", action="store_true", help="time nothing; exit status 1 where ours is wrong")
    options = parser.parse_args(arguments)
    device, is_gpu = torch.device(options.device), options.device == "cuda"
    output = options.output or RESULTS / f"experts_{'gpu' if is_gpu else 'cpu'}"
    cases = TINY_CASES if options.tiny else GPU_CASES if is_gpu else CPU_CASES
    if options.list:
        print("\n".join(f"{number}: {case.key}" for number, case in enumerate(cases)))
        return
    if is_gpu and not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no GPU here; nothing was timed (--device cpu times the CPU)")
    if options.check:
        from tiedmoe_kernels.tune import counted  # which needs triton

        with counted():
            sys.exit(int(not check(TINY_CHECKED_CASES if options.tiny else CHECKED_CASES, device)))
    peers = options.peers.split(",") if options.peers else [peer.name for peer in PEERS] if is_gpu else CPU_PEERS
    if unknown := set(peers) - {peer.name for peer in PEERS}:
        raise ValueError(f"--peers: unknown {sorted(unknown)}; choose from {[peer.name for peer in PEERS]}")
    chosen = parse_cases(options.cases or f"0-{len(cases) - 1}", len(cases))
    command = " ".join(["python benchmarks/experts.py", *(sys.argv[1:] if arguments is None else arguments)])
    run = {
        "date": datetime.date.today().isoformat(),
        "command": command.replace(str(output), output.name),  # no path of the machine
        **{"machine": machine(device), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)},
        "versions": versions(),
        "rates": machine_rates(device, *(() if is_gpu else (256, 1 << 22) if options.tiny else (1024, 1 << 28))),
        **{"rows": [], "left_out": []},
    }
    limits = {} if is_gpu else {"seconds": 0.05, "most": 4} if options.tiny else {"seconds": 6.0, "most": 40}
    bench: Bench | None = None

    def execute(task: Task) -> dict:
        nonlocal bench
        begun = time.monotonic()
        if bench is None or bench.case != task.case:
            bench = None  # its memory first
            gc.collect()
            if is_gpu:
                torch.cuda.empty_cache()
            kind = ModelBench if isinstance(task.case, ModelCase) else Bench
            bench = kind(task.case, device, run["rates"], task.case in CPU_PEAKS, **limits)
        row = {"case": task.number, "key": task.case.key, "peer": task.peer.name} | bench.row(task.peer)
        took = round(time.monotonic() - begun, 1)
        run["rows"].append(row | {"seconds": took})
        write_results(output, run, markdown(run), quiet=True)
        print(f"{begun - start:5.0f} s  {task.key}: {row['status']}, {took} s", file=sys.stderr)
        return row

    left = options.budget_s - (time.monotonic() - start)
    run["left_out"] = run_plan(plan(cases, chosen, {TIEDMOE, *peers}), execute, left)
    write_results(output, run, markdown(run))


if __name__ == "__main__":
    main()

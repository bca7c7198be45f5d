"""Expert layers on a CPU against transformers: `python benchmarks/experts_cpu.py` (or `make bench`), some 6 minutes.

Times a tied training step (one pool, routing by layer, forward, backward, accumulation into gradients that are there)
and decoding, at OLMoE's true shape and at a quarter of its widths, where `batched_mm`'s copies of the weights fit too.
Everything in turn, round by round; a figure is the median of ratios taken inside a round. Peak memory is that of a
process of its own. Writes experts_cpu.json and experts_cpu.md.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import Pools, Problem, make_problem, one_line, prepare, relative_error, run_plan, training_step
from peers import PEERS, RECOMPUTE, TIEDMOE, Peer, reason_to_leave_out
from shapes import OLMOE, Case, Shape
from timing import WallClock, interleave, machine, paired_ratio, spread, versions
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "experts_cpu.json"
CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
QUARTER = Shape("OLMoE/4", OLMOE.E, OLMOE.H // 4, OLMOE.I // 4, OLMOE.K)
TINY = Shape("tiny", 8, 32, 16, 2)
PEERS_HERE = tuple(peer for peer in PEERS if peer.name in (TIEDMOE, RECOMPUTE, "grouped_mm", "batched_mm", "eager"))
MEMORY_BYTES = 10 << 30  # what a case may take beside what else runs here
# Two implementations that both round: twice what one may be off.
TOLERANCE = {FP32: 2e-5, BF16: 4e-2}
EAGER_MOVES_BYTES = 50e9
MINUTES = 5.5  # no case starts later
TIMING_SHARE = 0.75  # of them; the rest is for the memory


def step(shape: Shape, T: int, g: int, dtype: torch.dtype = FP32) -> Case:
    return Case("step", shape, T, g, dtype=dtype, microbatches=1)


def timed_cases() -> list[Case]:
    """What says most first: the clock may cut the end off."""
    decode = {(T, dtype): Case("decode", OLMOE, T, dtype=dtype) for T in (1, 8, 64) for dtype in (FP32, BF16)}
    cases = [step(QUARTER, 64, 2), step(QUARTER, 64, 4), decode[1, FP32], decode[8, FP32], step(OLMOE, 64, 4)]
    cases += [decode[1, BF16], step(QUARTER, 512, 4), decode[8, BF16], decode[64, FP32]]
    return [*cases, step(QUARTER, 512, 2), step(OLMOE, 64, 2), decode[64, BF16], step(QUARTER, 64, 4, BF16)]


def memory_cases() -> list[Case]:
    return [step(QUARTER, 64, 4), step(QUARTER, 512, 4), Case("decode", QUARTER, 64, dtype=FP32)]


def reason_here(peer: Peer, case: Case) -> str | None:
    """Why a peer does not take part on this machine, or None."""
    if peer.name == "eager" and case.kind == "step":
        # Autograd makes a gradient of the whole pool for each expert that is indexed, zeroes it and adds it.
        moved = 3 * case.g * case.shape.E * case.shape.pool_bytes(case.dtype.itemsize)
        if moved > EAGER_MOVES_BYTES:
            return f"its backward moves {moved / 1e9:.0f} GB: a gradient of the whole pool for each expert"
    return reason_to_leave_out(peer, case, MEMORY_BYTES)


# --- timing ----------------------------------------------------------------------------------------------------------


def make_cpu_pool(shape: Shape, dtype: torch.dtype) -> Pools:
    """A pool with gradients. Every expert is one random expert, scaled and rolled: drawing them all takes longer than a run."""
    torch.manual_seed(0)
    scale = torch.rand(shape.E, 1, 1, dtype=dtype) + 0.5
    weights = []
    for rows, columns in ((2 * shape.I, shape.H), (shape.H, shape.I)):
        weight = torch.randn(1, rows, columns, dtype=dtype).mul_(columns**-0.5) * scale
        for e in range(shape.E):
            weight[e] = weight[e].roll(e, dims=0)
        weights.append(nn.Parameter(weight))
        weights[-1].grad = torch.ones_like(weight)
    return [tuple(weights)]


def time_case(case: Case, pools: Pools, seconds: float) -> dict:
    """Return the case with an entry for every peer: times, and the ratio to ours within each round."""
    problem = make_problem(case, CPU, pools=pools)
    entries: dict[str, dict] = {}
    calls, per_call, expected = {}, {}, None
    for peer in PEERS_HERE[::-1]:  # eager first: the others are compared with it, or with what comes next
        reason = reason_here(peer, case)
        if reason:
            entries[peer.name] = {"status": "left out", "reason": reason}
            continue
        try:
            prepared = prepare(peer, problem)
            found = outcome(peer, prepared, problem)
        except Exception as error:  # whatever a peer raises is its result
            entries[peer.name] = {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
            continue
        expected = expected or [each.double() for each in found]
        difference = max(relative_error(*pair) for pair in zip(found, expected, strict=True))
        right = difference <= TOLERANCE[case.dtype]
        entries[peer.name] = {"status": "measured" if right else "wrong", "difference": difference}
        if not right:
            entries[peer.name]["reason"] = f"differs from {next(iter(calls))} by {difference:.1e}"
        calls[peer.name], per_call[peer.name] = prepared.call, prepared.calls
    times = interleave(calls, WallClock(), seconds=seconds, least=3, most=40)
    for name, each in times.items():
        milliseconds = [second / per_call[name] * 1e3 for second in each]
        entries[name] |= {"ms": spread(milliseconds), "rounds_ms": milliseconds}
    for name in times if TIEDMOE in times else ():
        entries[name]["time_over_tiedmoe"] = paired_ratio(entries[name]["rounds_ms"], entries[TIEDMOE]["rounds_ms"])
    peers = {peer.name: entries[peer.name] for peer in PEERS_HERE}
    return {"key": case.key, "flops": case.flops, "active_experts": problem.active_experts, "peers": peers}


def outcome(peer, prepared, problem: Problem) -> list[Tensor]:
    """What must agree between peers: the output, or what a step adds to the gradients of the pool's first experts."""
    if problem.case.kind != "step":
        return [each.clone() for each in prepared.call(0)]
    before = [weight.grad[:4].clone() for weight in problem.pools[0]]
    training_step(peer, prepared.layer, problem, 0)
    return [weight.grad[:4] - start for weight, start in zip(problem.pools[0], before, strict=True)]


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_peak(case: Case, peer_name: str) -> dict:
    """Peak memory of one call in a new process, in bytes above the pool, its gradients and the inputs."""
    described = {
        **dataclasses.asdict(case),
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    command = [sys.executable, __file__, "--peak", json.dumps([described, peer_name])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {
            "status": "failed",
            "reason": one_line(RuntimeError(lines[-1] if lines else f"exit {done.returncode}")),
        }
    return {"status": "measured", "peak_bytes": json.loads(done.stdout)}


def print_peak(described: dict, peer_name: str) -> None:
    """In the new process: the high-water mark of the resident memory above what it was before the call."""
    shape, dtype = Shape(*described.pop("shape")), getattr(torch, described.pop("dtype"))
    case = Case(shape=shape, dtype=dtype, **described)
    peer = next(peer for peer in PEERS if peer.name == peer_name)
    problem = make_problem(case, CPU, pools=make_cpu_pool(shape, dtype))
    small = Problem(
        case,
        CPU,
        make_cpu_pool(TINY, dtype),
        make_problem(Case("decode", TINY, 2, dtype=dtype), CPU).sets,
        problem.grad_output,
    )
    with torch.no_grad():  # libraries load themselves at a first call
        x, index, weights = small.sets[0]
        peer.build(*small.pools[0])(x, index[0], weights[0])
    call = prepare(peer, problem).call if case.kind == "step" else prepare_one(peer, problem)
    before = reset_peak()
    call(0)
    print(max(0, status_bytes("VmHWM") - before))


def prepare_one(peer, problem: Problem):
    """One layer call; `prepare` would go through all input sets."""
    layer, (x, index, weights) = peer.build(*problem.pools[0]), problem.sets[0]
    return torch.no_grad()(lambda _: layer(x, index[0], weights[0]))


def reset_peak() -> int:
    """Lower the high-water mark to the present, which is returned, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


def measure_peaks(case: Case) -> dict:
    peers = {}
    for peer in PEERS_HERE:
        reason = reason_here(peer, case)
        peers[peer.name] = {"status": "left out", "reason": reason} if reason else measure_peak(case, peer.name)
    return {"key": case.key, "peers": peers}


# --- report ----------------------------------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    before, after = report["load_average"]
    names = [peer.name for peer in PEERS_HERE if peer.name != TIEDMOE]
    lines = [
        "# Expert layers on a CPU",
        "",
        f"{report['date']}, `{report['command']}`, {report['minutes']:.1f} minutes, {report['threads']} threads. {machine}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
        f"Load of the machine (1 minute) before the run {before:.2f}, after it {after:.2f}."
        + (" **Other work ran beside it: trust the ratios, not the milliseconds.**" if report["busy"] else ""),
        "",
        "A step is forward and backward of a whole tied group (g layers, one pool, each its own routing) with the gradients",
        "added to those already there. The columns of the peers are their time over ours in the same round, median (p20-p80):",
        "above 1 ours is faster.",
        "",
        f"| case | tiedmoe, ms (p20-p80) | {' | '.join(names)} | rounds |",
        f"|---|---:|{'---:|' * len(names)}---:|",
    ]
    for result in report["cases"]:
        ours = result["peers"][TIEDMOE]
        ms = ours.get("ms")
        cells = [f"{ms['median']:.1f} ({ms['p20']:.1f}-{ms['p80']:.1f})" if ms else ours["status"]]
        cells += [ratio_cell(result["peers"][name]) for name in names]
        lines.append(f"| {result['key']} | {' | '.join(cells)} | {ms['n'] if ms else ''} |")
    lines += [
        "",
        "Peak memory of one call above the pool, its gradients and the inputs, MB, each in a process of its own:",
        "",
    ]
    lines += [f"| case | {TIEDMOE} | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for result in report["peak_memory"]:
        cells = [peak_cell(result["peers"][name]) for name in (TIEDMOE, *names)]
        lines.append(f"| {result['key']} | {' | '.join(cells)} |")
    lines += ["", *not_measured(report)]
    return "\n".join(lines).rstrip() + "\n"


def ratio_cell(found: dict) -> str:
    over = found.get("time_over_tiedmoe")
    return f"{over['median']:.2f} ({over['p20']:.2f}-{over['p80']:.2f})" if over else "-"


def peak_cell(found: dict) -> str:
    return f"{found['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in found else "-"


def not_measured(report: dict) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for result in (*report["cases"], *report["peak_memory"]):
        for name, found in result["peers"].items():
            if found["status"] != "measured":
                reasons.setdefault(f"{name}, {found['status']}: {found['reason']}", []).append(result["key"])
    lines = [f"- {reason} ({', '.join(dict.fromkeys(keys))})" for reason, keys in reasons.items()]
    lines += [f"- no time left: {key}" for key in report["left_out"]]
    return ["Not measured:", "", *lines] if lines else []


def described_options(options: argparse.Namespace) -> list[str]:
    threads = ["--threads", str(options.threads)] if options.threads else []
    minutes = ["--minutes", f"{options.minutes:g}"] if options.minutes != MINUTES else []
    return [*(["--tiny"] if options.tiny else []), *threads, *minutes]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write, .json and .md")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="start no case later")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice, as many as there are cores")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script; the figures mean nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # this script calls itself for the memory of one peer
    options = parser.parse_args(arguments)
    if options.peak:
        print_peak(*json.loads(options.peak))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    start, before = time.monotonic(), os.getloadavg()[0]
    timed, in_memory = timed_cases(), memory_cases()
    if options.tiny:
        timed, in_memory = [step(TINY, 16, 2), Case("decode", TINY, 2, dtype=BF16)], [step(TINY, 16, 2)]
    pool: dict[tuple, Pools] = {}

    def execute(case: Case) -> dict:
        if (case.shape, case.dtype) not in pool:
            pool.clear()  # before the next one is made
            pool[case.shape, case.dtype] = make_cpu_pool(case.shape, case.dtype)
        begun = time.monotonic()
        result = time_case(case, pool[case.shape, case.dtype], seconds=0.2 if options.tiny else 8.0)
        print(f"{begun - start:5.0f} s  {case.key}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        return result

    seconds = 60 * options.minutes
    results, left_out = run_plan(timed, execute, TIMING_SHARE * seconds)
    pool.clear()
    peak_memory, without_peak = run_plan(in_memory, measure_peaks, start + seconds - time.monotonic())
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/experts_cpu.py", *described_options(options)]),
        "machine": machine(CPU),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "minutes": (time.monotonic() - start) / 60,
        "load_average": [before, os.getloadavg()[0]],
        "busy": before > 0.5,
        "cases": results,
        "peak_memory": peak_memory,
        "left_out": [*left_out, *(f"peak memory of {key}" for key in without_peak)],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    options.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

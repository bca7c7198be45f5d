"""Experts on a CPU against transformers' own: `python benchmarks/experts_cpu.py` (or `make bench`), some 8 minutes.

One layer at OLMoE's shape and at a quarter of its widths: decoding, and a tied training step (g layers, one pool,
routing by layer, forward, backward, added to gradients that are there). A whole model: eight layers of those quarter
widths, tied by four and untied, `generate` and a training step with AdamW. What is compared takes turns, round by
round; a figure is the median of the ratios inside a round. Peak memory is that of a process of its own.

Writes PREFIX.json, a row a line, and PREFIX.md. Where other work disturbs, `--cpu-time --threads 1` counts the seconds
that the process computed, not those that it waited for a core.
"""

import argparse
import dataclasses
import datetime
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import (
    TOLERANCE,
    Pools,
    expected_outcome,
    make_pool,
    make_problem,
    one_line,
    outcome,
    prepare,
    relative_error,
    run_plan,
)
from peers import PEERS, RECOMPUTE, TIEDMOE, Peer, reason_to_leave_out
from shapes import OLMOE, TINY, Case, Shape
from tables import table, write_json
from timing import Call, WallClock, interleave, machine, paired_ratio, spread, versions
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "experts_cpu"
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
QUARTER = Shape("OLMoE/4", OLMOE.E, OLMOE.H // 4, OLMOE.I // 4, OLMOE.K)
PEERS_HERE = tuple(peer for peer in PEERS if peer.name in (TIEDMOE, RECOMPUTE, "grouped_mm", "batched_mm", "eager"))
MODELS = {  # whole models: group size, experts_implementation
    TIEDMOE: (4, "tiedmoe"),
    "tied, grouped_mm": (4, "grouped_mm"),
    "untied, grouped_mm": (1, "grouped_mm"),
    "untied, eager": (1, "eager"),
}
NEW_TOKENS, STEP_TOKENS, VOCABULARY = 64, 512, 4096
MEMORY_BYTES = 2 << 30  # what a case may take; `batched_mm` is slowest by far where its copies are large
FLOAT64_BYTES = 1 << 30  # of a pool: a larger one is compared with another peer, not with float64
EAGER_MOVES_BYTES = 50e9
EAGER_STEP = "its backward makes a gradient of the whole pool for each expert"


class CpuClock:
    """Seconds that this process computes in a call, all threads together."""

    def time(self, call: Call, number: int) -> float:
        start = time.process_time()
        call(number)
        return time.process_time() - start


class Task(NamedTuple):
    """One entry of the plan; `run` returns its rows."""

    kind: str
    key: str
    run: Callable[[], list[dict]]


class Turns:
    """What takes turns in one case, with a row for each, ours the base of the ratios."""

    def __init__(self, case: str, tolerance: float):
        self.case, self.tolerance = case, tolerance
        self.rows: dict[str, dict] = {}
        self.calls: dict[str, Call] = {}

    def leave_out(self, name: str, reason: str, status: str = "left out") -> None:
        self.rows[name] = {"case": self.case, "figure": "time", "peer": name, "status": status, "reason": reason}

    def add(self, name: str, call: Call, difference: float) -> None:
        """Take part, with the relative difference to what is expected."""
        row = self.rows[name] = {"case": self.case, "figure": "time", "peer": name, "status": "measured"}
        row["difference"] = difference
        if not difference <= self.tolerance:
            row |= {"status": "wrong", "reason": f"differs by {difference:.1e}"}
        self.calls[name] = call

    def timed(self, clock: Any, seconds: float, repeats: int = 1) -> list[dict]:
        """Return the rows with times; a call does its work `repeats` times."""
        times = interleave(self.calls, clock, seconds=seconds, least=3, most=40)
        for name, each in times.items():
            self.rows[name]["ms"] = spread([second / repeats * 1e3 for second in each])
            if TIEDMOE in times:
                self.rows[name]["time_over_tiedmoe"] = paired_ratio(each, times[TIEDMOE])
        return list(self.rows.values())


# --- one layer -------------------------------------------------------------------------------------------------------


def reason_here(peer: Peer, case: Case) -> str | None:
    """Return why a peer does not take part on this machine, or None."""
    moved = 3 * case.g * case.shape.E * case.shape.pool_bytes(case.dtype.itemsize)
    if peer.name == "eager" and case.kind == "step" and moved > EAGER_MOVES_BYTES:
        return f"{EAGER_STEP}, {moved / 1e9:.0f} GB"
    return reason_to_leave_out(peer, case, MEMORY_BYTES)


@functools.lru_cache(maxsize=1)
def pool_of(shape: Shape, dtype: torch.dtype) -> Pools:
    """Return a pool with gradients; the last one is kept."""
    return [make_pool(Case("step", shape, 1, dtype=dtype), CPU)]


def time_layer(case: Case, clock: Any, seconds: float) -> list[dict]:
    """Return a row for every peer."""
    problem = make_problem(case, CPU, pools=pool_of(case.shape, case.dtype))
    expected = expected_outcome(problem) if case.shape.pool_bytes(8) <= FLOAT64_BYTES else None
    turns, repeats = Turns(case.key, TOLERANCE[case.dtype]), 1
    for peer in PEERS_HERE[::-1]:  # eager first: without float64 the others are compared with it, or the next
        if reason := reason_here(peer, case):
            turns.leave_out(peer.name, reason)
            continue
        try:
            prepared = prepare(peer, problem)
            found = outcome(peer, problem, problem.pools[0])
        except Exception as error:  # whatever a peer raises is its result
            turns.leave_out(peer.name, f"{type(error).__name__}: {one_line(error)}", "failed")
            continue
        expected = expected or [each.clone() for each in found]
        turns.add(peer.name, prepared.call, max(relative_error(*pair) for pair in zip(found, expected, strict=True)))
        repeats = prepared.calls
    return turns.timed(clock, seconds, repeats)[::-1]


def peak_of_layer(case: Case, peer_name: str) -> int:
    """Return the bytes of one call above the pool, its gradients and the inputs."""
    peer = next(peer for peer in PEERS if peer.name == peer_name)
    prepare(peer, make_problem(dataclasses.replace(case, shape=TINY, T=2), CPU)).call(
        0
    )  # libraries load at a first call
    call = prepare(peer, make_problem(case, CPU, pools=pool_of(case.shape, case.dtype))).call
    before = reset_peak()
    call(0)
    return max(0, status_bytes("VmHWM") - before)


# --- a whole model ---------------------------------------------------------------------------------------------------


def make_model(name: str, shape: Shape, layers: int) -> nn.Module:
    """Return a causal language model of OLMoE's family with random weights, the same ones for the same tying."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from transformers_tiedmoe import TiedMoeConfig

    group_size, implementation = MODELS[name]
    sizes = {"hidden_size": shape.H, "intermediate_size": shape.I, "num_experts": shape.E, "eos_token_id": None}
    sizes |= {"num_experts_per_tok": shape.K, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": max(1, shape.H // 128)}
    tied = {"family": "olmoe", "group_size": group_size, "skip_first": 0, "skip_last": 0}
    config = OlmoeConfig(**sizes) if group_size == 1 else TiedMoeConfig(**tied, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation)


def generate(model: nn.Module) -> Call:
    """Return what continues a prompt of 16 tokens by NEW_TOKENS."""
    prompt, number_of = torch.arange(16)[None] + 5, {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    model.eval()
    return lambda number: model.generate(prompt + number, do_sample=False, pad_token_id=1, **number_of)


def training_step(model: nn.Module) -> Call:
    """Return forward, backward and AdamW on STEP_TOKENS tokens, 128 a row."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(3, VOCABULARY, (STEP_TOKENS // 128, 128), generator=torch.Generator().manual_seed(0))
    model.train()

    def step(number: int) -> None:
        model(tokens.roll(number), labels=tokens.roll(number), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


MODEL_CALLS = {f"generate {NEW_TOKENS} tokens": generate, f"step of {STEP_TOKENS} tokens": training_step}


def takes_part(name: str, kind: str) -> bool:
    """Tell whether a model does in what `MODEL_CALLS` names: eager experts do not train in minutes."""
    return MODELS[name][1] != "eager" or MODEL_CALLS[kind] is not training_step


def time_models(kind: str, shape: Shape, layers: int, clock: Any, seconds: float) -> list[dict]:
    """Return a row for every model; those that are tied alike must have the same logits."""
    turns, expected = Turns(kind, TOLERANCE[FP32]), {}
    for name, (group_size, _) in MODELS.items():
        if not takes_part(name, kind):
            turns.leave_out(name, EAGER_STEP)
            continue
        model = make_model(name, shape, layers)
        with torch.no_grad():
            found: Tensor = model(torch.arange(5, 21)[None]).logits.double()
        call = MODEL_CALLS[kind](model)
        call(0)  # as a warm-up
        turns.add(name, call, relative_error(found, expected.setdefault(group_size, found)))
    return turns.timed(clock, seconds)


def peak_of_model(kind: str, name: str, shape: Shape, layers: int) -> int:
    """Return the bytes of model, gradients, optimizer and activations above what a tiny one leaves behind."""
    MODEL_CALLS[kind](make_model(name, TINY, 4))(0)
    before = reset_peak()
    call = MODEL_CALLS[kind](make_model(name, shape, layers))
    for number in range(2):
        call(number)
    return max(0, status_bytes("VmHWM") - before)


# --- memory ----------------------------------------------------------------------------------------------------------


def reset_peak() -> int:
    """Lower the high-water mark of the resident memory to the present, which is returned, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """Return an entry of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


def peaks(case: str, works: dict[str, Callable[[], int]]) -> list[dict]:
    """Return a row for each of the works, each in a process of its own that returns its peak memory."""
    rows = []
    for name, work in works.items():
        row = {"case": case, "figure": "peak", "peer": name, "status": "measured"}
        spawned, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
        try:
            with ProcessPoolExecutor(1, spawned, torch.set_num_threads, threads) as pool:
                row["peak_bytes"] = pool.submit(work).result(timeout=300)
        except Exception as error:  # whatever a peer raises is its result, the end of its process too
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
        rows.append(row)
    return rows


# --- plan and report -------------------------------------------------------------------------------------------------


def plan(tiny: bool, clock: Any) -> list[Task]:
    """Return what is to be done, what says most first: the clock may cut the end off."""
    step = functools.partial(Case, "step", QUARTER, microbatches=1)
    decode = functools.partial(Case, "decode", OLMOE)
    cases = [step(64, 4, dtype=FP32), decode(1, dtype=FP32), decode(8, dtype=FP32), decode(1, dtype=BF16)]
    cases += [step(512, 4, dtype=FP32), step(64, 4, dtype=BF16), decode(8, dtype=BF16), step(512, 4, dtype=BF16)]
    cases += [step(64, 2, dtype=FP32), Case("step", OLMOE, 64, 4, dtype=FP32, microbatches=1), decode(64, dtype=FP32)]
    in_memory, shape, layers, seconds = [cases[0], cases[4]], QUARTER, 8, 12.0
    if tiny:
        cases = [Case("step", TINY, 16, 2, dtype=FP32, microbatches=1), Case("decode", TINY, 2, dtype=BF16)]
        in_memory, shape, layers, seconds = cases[:1], TINY, 4, 0.2
    layer = [Task(case.kind, case.key, functools.partial(time_layer, case, clock, seconds)) for case in cases]
    models, memory = [], []
    for case in in_memory:
        works = {
            p.name: functools.partial(peak_of_layer, case, p.name) for p in PEERS_HERE if not reason_here(p, case)
        }
        memory.append(Task("peak", f"peak of {case.key}", functools.partial(peaks, case.key, works)))
    for kind in MODEL_CALLS:
        models.append(Task(kind, kind, functools.partial(time_models, kind, shape, layers, clock, 3 * seconds)))
        works = {n: functools.partial(peak_of_model, kind, n, shape, layers) for n in MODELS if takes_part(n, kind)}
        memory.append(Task("peak", f"peak of {kind}", functools.partial(peaks, kind, works)))
    return [*layer[:4], *models, *memory, *layer[4:]]


def markdown(report: dict) -> str:
    """Return the tables: times of ours and ratios of the others, memory, and what was not measured."""
    described = [f"{name} {value}" for part in ("machine", "versions") for name, value in report[part].items()]
    before, after = report["load_average"]
    lines = [
        "# Experts on a CPU",
        "",
        f"{report['date']}, `{report['command']}`, {report['minutes']:.1f} minutes, {report['threads']} threads. "
        f"{', '.join(described)}. Load before the run {before}, after it {after}: above 0.5, other work disturbed it.",
        "",
        f"Times are {report['clock']}. Those of others are over ours in the same round, median (20th to 80th",
        "percentile): above 1 ours is faster. A layer's step adds to gradients that are there; its memory is above",
        "pool, gradients and inputs. A whole model has eight layers of a quarter of OLMoE's widths; its memory is all",
        "that it takes.",
    ]
    rows = {(row["case"], row["peer"], row["figure"]): row for row in report["rows"]}
    for names in ([peer.name for peer in PEERS_HERE], list(MODELS)):
        cases = [case for case, peer, _ in rows if peer == TIEDMOE and (case in MODEL_CALLS) == (names[1] in MODELS)]
        times, memory = [], []
        for case in dict.fromkeys(cases):
            if ms := rows.get((case, TIEDMOE, "time"), {}).get("ms"):
                over = [rows.get((case, name, "time"), {}).get("time_over_tiedmoe") for name in names[1:]]
                ratios = ["{median:.2f} ({p20:.2f}-{p80:.2f})".format(**each) if each else "-" for each in over]
                times.append([case, "{median:.4g} ({p20:.4g}-{p80:.4g})".format(**ms), *ratios, ms["n"]])
            found = [rows.get((case, name, "peak"), {}).get("peak_bytes") for name in names]
            if any(each is not None for each in found):
                memory.append([case, *("-" if bytes is None else f"{bytes / 1e6:.0f}" for bytes in found)])
        lines += ["", *table(["case", "ours, ms", *names[1:], "rounds"], times)]
        lines += ["", *table(["peak, MB (1e6 bytes)", *names], memory)]
    reasons: dict[str, list[str]] = {}
    for row in report["rows"]:
        if "reason" in row:
            reasons.setdefault(f"{row['peer']}, {row['status']}: {row['reason']}", []).append(row["case"])
    lines += ["", *(f"- {reason} ({', '.join(dict.fromkeys(keys))})" for reason, keys in reasons.items())]
    lines += [f"- no time left: {key}" for key in report["left_out"]]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the plan and write what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="PREFIX", help="of PREFIX.json and PREFIX.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing later")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice, as many as there are cores")
    parser.add_argument("--cpu-time", action="store_true", help="time by the process's own seconds")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script; the figures mean nothing")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    start, before = time.monotonic(), os.getloadavg()[0]

    def execute(task: Task) -> list[dict]:
        begun = time.monotonic()
        rows = task.run()
        print(f"{begun - start:5.0f} s  {task.key}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        return rows

    clock = CpuClock() if options.cpu_time else WallClock()
    results, left_out = run_plan(plan(options.tiny, clock), execute, 60 * options.minutes)
    given = [f" --{name.replace('_', '-')}" for name in ("cpu_time", "tiny") if getattr(options, name)]
    given += [
        f" --{name} {value:g}"
        for name in ("minutes", "threads")
        if (value := getattr(options, name)) != parser.get_default(name)
    ]
    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/experts_cpu.py" + "".join(given),
        "machine": machine(CPU),
        "threads": torch.get_num_threads(),
        "clock": "seconds the process computed" if options.cpu_time else "seconds of the wall clock",
        "versions": versions(),
        "minutes": round((time.monotonic() - start) / 60, 2),
        "load_average": [round(load, 2) for load in (before, os.getloadavg()[0])],
        "rows": [row for rows in results for row in rows],
        "left_out": left_out,
    }
    write_json(options.output.with_suffix(".json"), report)
    options.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

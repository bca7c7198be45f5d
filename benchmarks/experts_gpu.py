"""Expert kernels on a GPU against their peers: `python benchmarks/experts_gpu.py` (or `make bench-gpu`), 9 minutes at most.

Writes experts_gpu.json and experts_gpu.md: times of every case (shapes.py) and peer (peers.py), as fractions of the same
run's 8192^3 bf16 matrix product and copy bandwidth, and the bar of the kernels' issue, line by line. Without --full a
part of the grid that has every shape; what the clock left out is named. Works take place in a process of their own: a
peer that breaks the device or hangs is reported, and the rest goes on without it. `--device cpu` tries the script on
tiny shapes; those figures mean nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from measure import (
    Limits,
    PeerBrokeDevice,
    make_pool,
    make_problem,
    measure_case,
    one_line,
    run_plan,
    training_step,
)
from peers import PEERS, TIEDMOE, reason_to_leave_out
from report import LIGER_RELEASED, bar, markdown
from shapes import DECODE_TOKENS, GROUP_SIZES, OLMOE, QWEN3, ROUTINGS, SHAPES, TOKENS, Case, Shape
from timing import machine, machine_rates, synchronize, versions

RESULTS = Path(__file__).parent / "results" / "experts_gpu.json"
TINY = Shape("tiny", 8, 32, 16, 2)
QUICK_MINUTES = 7.5  # no case starts later
LAST_MINUTES = 8.4  # whatever still runs is stopped
PREWARM_SECONDS = 80
START_SECONDS = 120  # for a process to import everything and measure the machine
SLOW_PEERS_AT = (OLMOE.name, TINY.name)  # in the quick grid: where the bar is


def quick_cases() -> list[Case]:
    """The bar's own cases first, then every shape once, then the rest of OLMoE's range of T."""
    bars = [
        Case("forward", OLMOE, 8192),
        Case("step", OLMOE, 8192, 4),
        *(Case("decode", OLMOE, T) for T in (1, 8, 32)),
    ]
    bars += [Case("step", OLMOE, 8192, 1), Case("step", OLMOE, 8192, 2)]
    released = [Case(kind, QWEN3, T) for kind, T, _ in LIGER_RELEASED]  # which Liger publishes
    others = [shape for shape in SHAPES if shape != OLMOE]
    shapes = [Case("forward", shape, 8192) for shape in others] + [Case("decode", shape, 8) for shape in others]
    shapes += [Case("step", shape, 2048, 4) for shape in others]
    zipf = [
        Case(kind, OLMOE, T, g, "zipf") for kind, T, g in (("forward", 8192, 1), ("step", 8192, 4), ("decode", 8, 1))
    ]
    tokens = [Case("decode", OLMOE, 64), *(Case("forward", OLMOE, T) for T in (512, 2048, 32768))]
    tokens += [Case("step", OLMOE, T, 4) for T in (512, 2048, 32768)]
    return list(dict.fromkeys(bars + released + shapes + zipf + tokens))


def full_cases() -> list[Case]:
    """The quick grid, then everything else."""
    cases = [
        Case(kind, shape, T, g, routing)
        for shape in SHAPES
        for routing in ROUTINGS
        for T in TOKENS
        for kind, g in [("forward", 1), ("decode", 1), *(("step", g) for g in GROUP_SIZES)]
        if kind != "decode" or T in DECODE_TOKENS
    ]
    return list(dict.fromkeys([*quick_cases(), *cases]))


def tiny_cases() -> list[Case]:
    return [Case("forward", TINY, 16), Case("decode", TINY, 2), Case("step", TINY, 16, 2, "zipf")]


# --- the process that works ------------------------------------------------------------------------------------------


def work(connection, device_name: str, limits: Limits) -> None:
    """Measure the cases that come through `connection` until None comes. Says what it is at before it does it."""
    device = torch.device(device_name)
    sizes = {"size": 256, "copy_bytes": 1 << 22} if device.type == "cpu" else {}
    rates = machine_rates(device, **sizes)
    connection.send(("ready", rates, machine(device)))
    while (order := connection.recv()) is not None:
        case, banned, traffic = order
        try:
            result = measure_case(
                case,
                device,
                rates,
                limits=limits,
                banned=banned,
                traffic=traffic,
                say=lambda peer, stage: connection.send(("at", peer, stage)),
            )
        except PeerBrokeDevice as error:
            connection.send(("broke", error.peer, error.reason))
            return
        except Exception as error:  # the case itself does not fit, say
            result = {"key": case.key, "error": f"{type(error).__name__}: {one_line(error)}", "peers": {}}
        gc.collect()  # graphs and compiled code of the case hold memory in cycles
        if device.type != "cpu":
            torch.cuda.empty_cache()
        connection.send(("done", result))
    connection.send(("ready", machine_rates(device, **sizes), machine(device)))


class Worker:
    """Runs cases in a process of its own, and starts another one when a peer took the first one down."""

    def __init__(self, device_name: str, limits: Limits, *, deadline: float = float("inf"), target=work):
        self.device_name, self.limits, self.target, self.deadline = device_name, limits, target, deadline
        self.broke: set[str] = set()  # peers that took a process down
        self.banned: dict[str, str] = {}  # those that did it twice: from every further case
        self.rates: list[dict] = []  # of the machine, at the start of each process and at the end
        self.machine: dict = {}
        self.process = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=self.target, args=(other, self.device_name, self.limits), daemon=True)
        self.process.start()
        other.close()
        _, rates, self.machine = self._receive(START_SECONDS)
        self.rates.append(rates)

    def execute(self, case: Case, traffic: bool = False) -> dict:
        """Return the case's result. A peer that broke or hung the process sits out the case, the second time all cases."""
        sits_out: dict[str, str] = {}
        while True:
            peer, reason, result = self._attempt(case, traffic, sits_out)
            if result is not None:
                return result
            self.stop()
            if time.monotonic() > self.deadline:
                reason = "stopped at the end of the time"
            elif peer in {each.name for each in PEERS} - sits_out.keys():
                if peer in self.broke:
                    self.banned[peer] = f"broke the device twice, last in {case.key}: {reason}"
                self.broke.add(peer)
                sits_out[peer] = f"broke the device: {reason}"
                continue
            return {"key": case.key, "error": f"{reason} ({peer or 'before any peer'})", "peers": {}}

    def _attempt(self, case: Case, traffic: bool, sits_out: dict[str, str]) -> tuple[str, str, dict | None]:
        """The result; or without one, the peer that was at work when the process failed, and how it failed."""
        peer, stage = "", "start"
        try:
            if self.process is None:
                self.start()
            left_out = slow_left_out(case, self.limits) | self.banned | sits_out
            self.connection.send((case, left_out, traffic))
            while (message := self._receive())[0] == "at":
                _, peer, stage = message
        except TimeoutError:
            return peer, f"no answer in time, at its {stage}", None
        except (EOFError, OSError):
            self.process.join(5)
            return peer, f"its process ended with {self.process.exitcode}, at its {stage}", None
        if message[0] == "done":
            return "", "", message[1]
        return message[1], message[2], None

    def _receive(self, seconds: float | None = None):
        seconds = self.limits.silence_seconds if seconds is None else seconds
        if not self.connection.poll(max(0.0, min(seconds, self.deadline - time.monotonic()))):
            raise TimeoutError
        return self.connection.recv()

    def finish(self) -> None:
        """Let the process measure the machine once more and end."""
        if self.process is not None:
            with contextlib.suppress(EOFError, OSError, TimeoutError):  # then the figures of the start stand alone
                self.connection.send(None)
                self.rates.append(self._receive(START_SECONDS)[1])
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.join(0.5)
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None


def slow_left_out(case: Case, limits: Limits) -> dict[str, str]:
    if limits.slow_peers_everywhere or case.shape.name in SLOW_PEERS_AT:
        return {}
    return {p.name: f"{p.slow_to_prepare}: --full has it here" for p in PEERS if p.slow_to_prepare}


# --- compiling ahead -------------------------------------------------------------------------------------------------


def prewarm(todo: list[tuple], device_name: str, seconds: float) -> list[str]:
    """Fill the compilers' caches with as many processes as there are cores, so that the timed run need not compile.

    Returns what went wrong, in words; the timed run will compile that itself.
    """
    context = multiprocessing.get_context("spawn")
    waiting = {task: context.Process(target=prewarm_task, args=(*task, device_name), daemon=True) for task in todo}
    running: dict[tuple, multiprocessing.process.BaseProcess] = {}
    remarks = []
    end = time.monotonic() + seconds
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < (os.cpu_count() or 1):
            task = next(iter(waiting))
            running[task] = waiting.pop(task)
            running[task].start()
        for task, process in list(running.items()):
            if not process.is_alive():
                del running[task]
                if process.exitcode:
                    remarks.append(
                        f"compiling {task[0]} ahead for {task[1][0].shape.name} ended with {process.exitcode}"
                    )
        time.sleep(0.1)
    for process in running.values():
        process.kill()
    unfinished = sorted({f"{peer} for {own[0].shape.name}" for peer, own, *_ in (*running, *waiting)})
    return remarks + [f"not compiled ahead in {seconds:.0f} s: {each}" for each in unfinished]


def tasks(cases: list[Case], limits: Limits) -> list[tuple[str, tuple[Case, ...], int, int]]:
    """(peer, its cases of one shape at g=1, part, of how many): the kernels are the same for every g and routing."""
    by_shape: dict[Shape, dict[Case, None]] = {}
    for case in cases:
        by_shape.setdefault(case.shape, {})[dataclasses.replace(case, g=1, routing="uniform")] = None
    found = [(TIEDMOE, tuple(own), 0, 1) for own in by_shape.values()]
    for own in by_shape.values():
        left_out = slow_left_out(next(iter(own)), limits)
        for peer in PEERS:
            if not peer.slow_to_prepare or peer.name in left_out:
                continue
            if peer.name == "liger":  # its code depends on H and I alone, and has some 240 configurations
                steps = [case for case in own if case.kind == "step"] or list(own)
                smallest = min(steps, key=lambda case: case.T)
                found += [(peer.name, (smallest,), part, 6) for part in range(6)]
            else:  # several processes share the device's memory
                found.append((peer.name, tuple(case for case in own if case.T <= 8192), 0, 1))
    return found


def prewarm_task(peer_name: str, cases: tuple[Case, ...], part: int, parts: int, device_name: str) -> None:
    """Call a peer once in every case; of a peer that tunes itself, with one part of its configurations."""
    device = torch.device(device_name)
    peer = next(peer for peer in PEERS if peer.name == peer_name)
    if parts > 1 and not restrict_liger(part, parts):
        return
    for case in cases:
        if reason_to_leave_out(peer, case, float("inf")):
            continue
        problem = make_problem(case, device, pools=[make_pool(case, device)])
        inputs = problem.sets[0]
        try:
            layer = peer.build(*problem.pools[0])
        except ImportError:
            return  # the run itself says that it is not installed
        if case.kind == "step":
            training_step(peer, layer, problem, 0)
        else:
            with torch.no_grad():
                layer(inputs.x, inputs.index[0], inputs.weights[0])
        synchronize(device)


def restrict_liger(part: int, parts: int) -> bool:
    """Leave Liger's kernels every `parts`-th of their configurations in this process; False if it is not installed."""
    try:
        from liger_kernel.ops import fused_moe_kernels
    except ImportError:
        return False
    for kernel in vars(fused_moe_kernels).values():
        if isinstance(getattr(kernel, "configs", None), list):
            kernel.configs = kernel.configs[part::parts]
    return True


# --- the run ---------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write, .json and .md")
    parser.add_argument("--full", action="store_true", help="every case and every peer at every shape; no time limit")
    parser.add_argument(
        "--minutes", type=float, help=f"start no case later; default {QUICK_MINUTES}, with --full none"
    )
    parser.add_argument("--only", default="", help="cases whose name has this in it, say 'decode OLMoE'")
    parser.add_argument(
        "--device", default="cuda", help="cuda (also for ROCm), or cpu: tiny shapes, to try the script"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no GPU here; nothing was timed (--device cpu tries the script alone)")
    start = time.monotonic()
    minutes = options.minutes or (float("inf") if options.full else QUICK_MINUTES)
    deadline = start + (minutes + LAST_MINUTES - QUICK_MINUTES) * 60
    cases = tiny_cases() if on_cpu else full_cases() if options.full else quick_cases()
    cases = [case for case in cases if options.only in case.key]
    limits = Limits(slow_peers_everywhere=True, silence_seconds=1200) if options.full else Limits()
    if on_cpu:
        limits = Limits(seconds=0.05, least=3, most=4)
    ahead = PREWARM_SECONDS * (10 if options.full else 1)
    remarks = [] if on_cpu else prewarm(tasks(cases, limits), options.device, ahead)
    worker = Worker(options.device, limits, deadline=deadline)

    def execute(case: Case) -> dict:
        begun = time.monotonic()
        result = worker.execute(
            case, traffic=case.kind == "step" and case.shape in (OLMOE, TINY) and case.T in (16, 8192)
        )
        print(f"{begun - start:5.0f} s  {case.key}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        return result

    def write(results: list[dict], left_out: list[str]) -> dict:
        report = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/experts_gpu.py" + (" --full" if options.full else ""),
            "smoke_test": on_cpu,
            "machine": worker.machine,
            "versions": versions(),
            "rates": worker.rates,
            "minutes": (time.monotonic() - start) / 60,
            "remarks": remarks,
            "bar": bar(results, worker.machine.get("device", "")),
            "left_out": left_out,
            "cases": results,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        options.output.with_suffix(".md").write_text(markdown(report))
        return report

    results, left_out = run_plan(cases, execute, start + minutes * 60 - time.monotonic(), done=write)
    worker.finish()
    short, *rest = markdown(write(results, left_out)).partition("## Every peer")
    print(short + "".join(rest).partition("## Not measured")[2])


if __name__ == "__main__":
    main()

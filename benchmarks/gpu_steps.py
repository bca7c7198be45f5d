"""Steps of `gpu_check.py` that are no program of their own: rows of JSON, and status 1 where something is wrong.

python benchmarks/gpu_steps.py machine
python benchmarks/gpu_steps.py float64
python benchmarks/gpu_steps.py again --previous DIR --report FILE
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import timing
import torch
from gpu_check import ROOT, TESTS, pytest
from measure import TOLERANCE, errors_of, expected_outcome, make_problem
from peers import PEERS
from shapes import OLMOE, TINY, Case

from tiedmoe_kernels.tune import counted

CASES = (
    *(Case("decode", OLMOE, T) for T in (1, 8, 32)),
    *(Case("forward", OLMOE, T) for T in (512, 2048)),
    *(Case("step", OLMOE, T) for T in (64, 512, 2048, 8192)),
    Case("step", OLMOE, 512, g=4),
)
TINY_CASES = (Case("decode", TINY, 1), Case("step", TINY, 5), Case("step", TINY, 5, g=4))
SELECTED = {"tests": TESTS, "sanitizer": "sanitizer"}


def float64(device: torch.device) -> bool:
    """Print every case's relative errors against float64; whether all are within the tolerance."""
    right = True
    for case in TINY_CASES if device.type == "cpu" else CASES:
        problem = make_problem(case, device)
        if case.g == 1:  # its gradient is written; a group's is added to what is there
            for weight in problem.pools[0]:
                weight.grad = None
        errors = errors_of(PEERS[0], problem, expected_outcome(problem))
        is_right = all(error <= TOLERANCE[case.dtype] for error in errors.values())
        right &= is_right
        row = {"case": case.key, "right": is_right, "errors": {k: float(f"{v:.2e}") for k, v in errors.items()}}
        print(json.dumps(row), flush=True)
    return right


def machine(device: torch.device) -> None:
    """Print what the machine has of what the checks need."""
    found = timing.machine(device) | timing.versions()
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    printed = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True) if compiler else None
    found["gcc"] = printed and printed.stdout.strip()
    found["python_h"] = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    found["compute_sanitizer"] = Path(sanitizer).exists()
    if device.type == "cuda":
        found["free_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 1)
    print(json.dumps(found), flush=True)


def again(previous: Path | None, report: Path | None, device: torch.device) -> bool:
    """Run what stage a found wrong or did not end; whether it is right now."""
    if previous is None or report is None:
        print(json.dumps({"nothing": "no results of stage a are named: --previous DIR"}))
        return True
    found = json.loads((previous / "a.json").read_text())
    done = [step["name"] for step in found["steps"] if step["state"] in ("passed", "skipped")]
    todo = [name for name in ("float64", *SELECTED) if name not in done]
    print(json.dumps({"again": todo}), flush=True)
    right = "float64" not in todo or float64(device)
    failures = [name for row in found["rows"] for name in row.get("failures", ())]
    selected = " or ".join(f"({each})" for name, each in SELECTED.items() if name in todo)
    if selected:
        command = pytest(report, selected, device.type == "cpu")
        if failures:  # by name, and not all the others once more
            command = (*(word for word in command if not word.startswith("tests/")), *failures)
        right &= subprocess.run(command, cwd=ROOT).returncode == 0
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("machine", "float64", "again"))
    parser.add_argument("--previous", type=Path, help="the results of stage a")
    parser.add_argument("--report", type=Path, help="where pytest writes its report")
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args()
    device = torch.device("cpu" if options.stand_in else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch finds no GPU here; nothing was checked (--stand-in tries it on a CPU)")
    if options.step == "machine":
        machine(device)
        return 0
    with counted():
        right = float64(device) if options.step == "float64" else again(options.previous, options.report, device)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())

"""Steps of `gpu_check.py` that are no program of their own: rows of JSON, and status 1 where something is wrong.

python benchmarks/gpu_steps.py machine
python benchmarks/gpu_steps.py float64
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import timing
import torch
from measure import TOLERANCE, errors_of, expected_outcome, make_problem
from peers import PEERS
from shapes import OLMOE, TINY, Case
from tables import parser_of

from tiedmoe_kernels.tune import counted

CASES = (
    *(Case("decode", OLMOE, T) for T in (1, 8, 32)),
    *(Case("forward", OLMOE, T) for T in (512, 2048)),
    *(Case("step", OLMOE, T) for T in (64, 512, 2048, 8192)),
    Case("step", OLMOE, 512, g=4),
)
TINY_CASES = (Case("decode", TINY, 1), Case("step", TINY, 5), Case("step", TINY, 5, g=4))


def float64(device: torch.device) -> bool:
    """Print every case's relative errors against float64; whether all are within the tolerance."""
    rows = []
    for case in TINY_CASES if device.type == "cpu" else CASES:
        problem = make_problem(case, device)
        for weight in problem.pools[0] if case.g == 1 else ():
            weight.grad = None  # the gradient is written; a group's is added to what is there
        errors = errors_of(PEERS[0], problem, expected_outcome(problem))
        is_right = all(error <= TOLERANCE[case.dtype] for error in errors.values())
        rows.append({"case": case.key, "right": is_right, "errors": {k: float(f"{v:.2e}") for k, v in errors.items()}})
        print(json.dumps(rows[-1]), flush=True)
    return all(row["right"] for row in rows)


def machine(device: torch.device) -> None:
    """Print what the machine has of what the checks need."""
    found = timing.machine(device) | timing.versions()
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    printed = subprocess.run([compiler or "true", "-dumpfullversion"], capture_output=True, text=True)
    found["gcc"] = printed.stdout.strip()
    found["python_h"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    found["compute_sanitizer"] = Path(sanitizer).exists()
    found["free_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 1) if device.type == "cuda" else None
    print(json.dumps(found), flush=True)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("step", choices=("machine", "float64"))
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args()
    device = torch.device("cpu" if options.stand_in else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu-check: torch finds no GPU here; nothing was checked (--stand-in tries it on a CPU)")
    if options.step == "machine":
        machine(device)
        return 0
    with counted():
        return int(not float64(device))


if __name__ == "__main__":
    sys.exit(main())

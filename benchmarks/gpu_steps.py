"""Steps of `gpu_check.py` that are no program of their own: rows of JSON, and status 1 where something is wrong.

python benchmarks/gpu_steps.py machine
python benchmarks/gpu_steps.py float64
python benchmarks/gpu_steps.py again --previous DIR --report FILE
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_check import ROOT, TESTS, pytest
from torch import Tensor

from tiedmoe_kernels import deferred_weight_gradients, experts_forward, experts_forward_reference
from tiedmoe_kernels.tune import OLMOE, TINY, Shape, counted

TOLERANCE = 2e-2  # relative error of bfloat16, in the Frobenius norm, as in tests/test_kernels_gpu.py


class Case(NamedTuple):
    """A forward pass without gradients (`num_layers` 0), or a step of layers that read one pool."""

    tokens: int
    num_layers: int


CASES = (
    *(Case(T, 0) for T in (1, 8, 32, 512, 2048)),
    *(Case(T, 1) for T in (64, 512, 2048, 8192)),
    Case(512, 4),
)
TINY_CASES = (Case(1, 0), Case(5, 1), Case(5, 4))


class Inputs(NamedTuple):
    """Leaves of a case: x `[T, H]`, per layer index and weights `[T, K]`, the pool, the gradient of the output."""

    x: Tensor
    index: list[Tensor]
    weights: list[Tensor]
    gate_up: Tensor
    down: Tensor
    grad_y: Tensor

    def leaves(self) -> dict[str, Tensor]:
        layers = {f"top_k_weights {i}": w for i, w in enumerate(self.weights)}
        return {"x": self.x, **layers, "gate_up": self.gate_up, "down": self.down}


def make(case: Case, shape: Shape, device: str) -> Inputs:
    """Random inputs in bfloat16; a group's pool has gradients already, as in the second microbatch of a step."""
    (T, layers), (E, H, I, K) = case, shape

    def leaf(*size: int, scale: float) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(torch.bfloat16).requires_grad_(layers > 0)

    gate_up, down = leaf(E, 2 * I, H, scale=H**-0.5), leaf(E, H, I, scale=I**-0.5)
    if layers > 1:
        for pool in (gate_up, down):
            pool.grad = torch.randn_like(pool)
    count = max(1, layers)
    index = [torch.rand(T, E, device=device).argsort(dim=1)[:, :K].contiguous() for _ in range(count)]
    weights = [leaf(T, K, scale=K**-0.5) for _ in range(count)]
    return Inputs(leaf(T, H, scale=1.0), index, weights, gate_up, down, leaf(T, H, scale=1.0).detach())


def exact(inputs: Inputs) -> Inputs:
    """Return the same numbers in float64."""

    def copy(t: Tensor) -> Tensor:
        found = t.detach().double().requires_grad_(t.requires_grad)
        if t.grad is not None:
            found.grad = t.grad.double()
        return found

    x, index, weights, *rest = inputs
    return Inputs(copy(x), index, [copy(w) for w in weights], *(copy(t) for t in rest))


def outputs(function: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """y, the sum of the layers, and what is in `.grad` afterwards."""
    with deferred_weight_gradients(), torch.set_grad_enabled(inputs.x.requires_grad):
        layers = zip(inputs.index, inputs.weights)
        y = torch.stack([function(inputs.x, i, w, inputs.gate_up, inputs.down) for i, w in layers]).sum(0)
    if not y.requires_grad:
        return {"y": y}
    y.backward(inputs.grad_y)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in inputs.leaves().items()}}


def float64(device: str, shape: Shape, cases: tuple[Case, ...]) -> bool:
    """Print every case's relative errors against float64; whether all are within the tolerance."""
    torch.manual_seed(0)
    right = True
    for case in cases:
        inputs = make(case, shape, device)
        expected = outputs(experts_forward_reference, exact(inputs))
        found = outputs(experts_forward, inputs)
        errors = {name: ((found[name].double() - t).norm() / t.norm()).item() for name, t in expected.items()}
        is_right = all(error < TOLERANCE for error in errors.values())
        right &= is_right
        row = {**case._asdict(), "right": is_right, "errors": {k: float(f"{v:.2e}") for k, v in errors.items()}}
        print(json.dumps(row), flush=True)
        del inputs, expected, found
    return right


def machine(device: str) -> None:
    """Print what the machine has of what the checks need."""
    found: dict[str, object] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    for name in ("torch", "triton", "transformers", "liger-kernel", "pytest", "pytest-xdist", "pytest-timeout"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    found["gcc"] = (
        compiler and subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    )
    found["python_h"] = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    found["compute_sanitizer"] = Path(
        shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    ).exists()
    if device != "cpu":
        free, total = torch.cuda.mem_get_info()
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "device": torch.cuda.get_device_name()}
        found |= {"capability": torch.cuda.get_device_capability(), "free_gib": round(free / 2**30, 1)}
        found["total_gib"] = round(total / 2**30, 1)
    print(json.dumps(found), flush=True)


def again(previous: Path | None, report: Path | None, device: str) -> bool:
    """Run what stage a found wrong or did not end; whether it is right now."""
    if previous is None or report is None:
        print(json.dumps({"nothing": "no results of stage a are named: --previous DIR"}))
        return True
    steps = {step["name"]: step for step in json.loads((previous / "a.json").read_text())["steps"]}
    todo = [
        name
        for name in ("float64", "tests", "sanitizer")
        if steps.get(name, {}).get("state") not in ("passed", "skipped")
    ]
    print(json.dumps({"again": todo}), flush=True)
    right = True
    if "float64" in todo:
        right = float64(device, *((TINY, TINY_CASES) if device == "cpu" else (OLMOE, CASES)))
    failures = [name for step in steps.values() for row in step["rows"] for name in row.get("failures", ())]
    selected = " or ".join(f"({each})" for name, each in _SELECTED.items() if name in todo)
    if selected:
        command = pytest(report, selected, device == "cpu")
        if failures:  # by name, and not all the others once more
            command = (*(word for word in command if not word.startswith("tests/")), *failures)
        right &= subprocess.run(command, cwd=ROOT).returncode == 0
    return right


_SELECTED = {"tests": TESTS, "sanitizer": "sanitizer"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("machine", "float64", "again"))
    parser.add_argument("--previous", type=Path, help="the results of stage a")
    parser.add_argument("--report", type=Path, help="where pytest writes its report")
    parser.add_argument("--stand-in", action="store_true", help="on a CPU, at tiny sizes")
    options = parser.parse_args()
    device = "cpu" if options.stand_in else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "gpu-check: torch finds no GPU here; nothing was checked (--stand-in tries the script on a CPU)"
        )
    if options.step == "machine":
        machine(device)
        return 0
    with counted():
        if options.step == "again":
            return int(not again(options.previous, options.report, device))
        return int(not float64(device, *((TINY, TINY_CASES) if options.stand_in else (OLMOE, CASES))))


if __name__ == "__main__":
    sys.exit(main())

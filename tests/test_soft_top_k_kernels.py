"""The soft top-k's kernels against plain torch in float64; on a CPU in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tiedmoe_kernels import soft_top_k as kernels
from transformers_tiedmoe.routing import lapsum, soft_top_k

DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
ROOT = Path(__file__).parents[1]


def rows_of(num_scores, alpha, device):
    """Ordinary scores, ties, all equal, one huge, two ruled out by -inf; k from one to all, also integers."""
    scores = torch.randn(7, num_scores)
    scores[1] = scores[1].round()
    scores[2] = 0.0
    scores[3, 0] = 1e4 * alpha
    if num_scores > 4:
        scores[4, 1:3] = -torch.inf
    k = torch.tensor([1.0, 1.5, num_scores / 2, 2.0, 2.5, num_scores - 0.5, num_scores]).clamp(max=num_scores)
    k[:6] = k[:6].clamp(max=num_scores - 0.5)
    return scores.to(device), k.to(device), torch.full((7,), alpha, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("alpha", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("num_scores", [2, 3, 16, 60, 64])
def test_kernels_are_the_operator(num_scores, alpha, device, monkeypatch):
    """Through autograd, as on a GPU: memberships, and the gradients of scores, k and alpha."""
    monkeypatch.setattr(lapsum, "_runs_on_kernel", lambda scores: scores.dtype == torch.float32)
    inputs = rows_of(num_scores, alpha, device)
    found = [each.clone().requires_grad_() for each in inputs]
    expected = [each.double().clone().requires_grad_() for each in inputs]
    weight = torch.randn(inputs[0].shape, device=device)
    p, reference = soft_top_k(*found), soft_top_k(*expected)
    finite = inputs[0].where(inputs[0].isfinite(), 0)
    error = torch.finfo(torch.float32).eps * (4 * num_scores + (finite.max() - finite.min()) / alpha)
    torch.testing.assert_close(p.double(), reference, rtol=0, atol=float(error))
    (p * weight).sum().backward()
    (reference * weight).sum().backward()
    for kernel, plain in zip(found, expected):
        assert kernel.grad.isfinite().all()
        if alpha >= 0.1:  # else p is a step: a rounding of b decides
            torch.testing.assert_close(kernel.grad.double(), plain.grad, rtol=1e-3, atol=float(error) / alpha)


@pytest.mark.parametrize("device", DEVICES)
def test_one_k_and_alpha_for_all_rows(device, monkeypatch):
    """Numbers are not copied for every row: a stride of 0."""
    monkeypatch.setattr(lapsum, "_runs_on_kernel", lambda scores: True)
    scores = torch.randn(2, 3, 16, device=device)
    found = soft_top_k(scores, 2.5, 0.2)
    monkeypatch.undo()
    torch.testing.assert_close(found.cpu(), soft_top_k(scores.cpu(), 2.5, 0.2), rtol=1e-5, atol=1e-6)


def test_no_rows_and_too_many_scores():
    empty = torch.empty(0, 8)
    assert kernels.soft_top_k_forward(empty, empty[:, 0], empty[:, 0])[0].shape == (0, 8)
    with pytest.raises(ValueError, match="1025 scores a row; expected at most 1024"):
        kernels.soft_top_k_forward(torch.zeros(1, 1025), torch.ones(1), torch.ones(1))
    assert lapsum.MAX_SCORES == kernels.MAX_SCORES


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tiedmoe_kernels import soft_top_k as kernels
rows = []
for backend, arch, warp in (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)):
    for block in (64,):
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            names = kernel.arg_names
            constants = {"BLOCK_E": block, **({"FAR": 80.0} if "FAR" in names else {})}
            kinds = {n: "*fp32" if n.endswith(("_TE", "_T")) else "i32" for n in names}
            kinds |= dict.fromkeys(constants, "constexpr")
            options = {"num_warps": 1 if block <= 128 else 4}
            source = ASTSource(kernel, kinds, {(names.index(n),): value for n, value in constants.items()})
            made = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
            rows.append([str(arch), block, made.metadata.shared, sorted(made.asm)])
print(json.dumps(rows))
"""


def test_compiles_ahead_of_time_for_every_chip():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    assert len(rows) == 8
    assert all(shared <= 48 * 1024 and {"cubin", "hsaco"} & set(made) for _, _, shared, made in rows)

"""What only a device shows: full-size tiles, repeatability, memory faults, CUDA graphs, offsets beyond 2^31, waits of
the host.

`make gpu-test` runs this file together with `test_kernels.py`. No test here has run without a GPU.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiedmoe_kernels import deferred_weight_gradients, experts_forward, experts_forward_reference

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# E, H, I, K: OLMoE's experts and routing in narrower layers; gpt-oss's own sizes, which no block divides; Mixtral's
# few wide experts.
SIZES = {"olmoe": (64, 512, 256, 8), "gpt-oss": (32, 720, 720, 4), "mixtral": (8, 512, 1792, 2)}


def layer(T: int, size: str, dtype: torch.dtype, is_transposed: bool = False) -> list[Tensor]:
    """x, index, weights, gate_up, down on the device; the floating ones require gradients."""
    E, H, I, K = SIZES[size]
    weights, index = torch.randn(T, E, device="cuda").softmax(-1).topk(K)
    gate_up, down = torch.randn(E, 2 * I, H, device="cuda") * H**-0.5, torch.randn(E, H, I, device="cuda") * I**-0.5
    if is_transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    x, weights, gate_up, down = (
        t.to(dtype).detach().requires_grad_() for t in (torch.randn(T, H, device="cuda"), weights, gate_up, down)
    )
    return [x, index, weights, gate_up, down]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point()]


def step(tensors: list[Tensor], grad_y: Tensor | None = None, function=experts_forward, **flags) -> list[Tensor]:
    """y and all gradients."""
    y = function(*tensors, **flags)
    return [y, *torch.autograd.grad(y, leaves(tensors), torch.ones_like(y) if grad_y is None else grad_y.to(y.dtype))]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("T", "size", "dtype", "is_transposed"),
    [  # decode, a tile partly filled, every class of tile sizes; each combination costs a dozen compiles
        *((T, "olmoe", torch.bfloat16, False) for T in (1, 17, 300, 2048)),
        *((T, "olmoe", dtype, False) for T in (17, 2048) for dtype in (torch.float16, torch.float32)),
        *((T, "gpt-oss", torch.bfloat16, True) for T in (1, 300)),
        *((T, "mixtral", torch.bfloat16, False) for T in (1, 2048)),
    ],
)
def test_shipped_tiles_against_float64(T, size, dtype, is_transposed):
    tensors = layer(T, size, dtype, is_transposed)
    grad_y = torch.randn(T, SIZES[size][1], device="cuda", dtype=dtype)
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    expected = step(exact, grad_y, experts_forward_reference, is_transposed=is_transposed)
    got = step(tensors, grad_y, is_transposed=is_transposed)
    with torch.no_grad():
        got.append(experts_forward(*tensors, is_transposed=is_transposed))
    for mine, wanted in zip(got, [*expected, expected[0]]):
        assert relative_error(mine, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("I", [48, 256])  # 48: fewer elements than a program of four warps has threads
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_two_runs_are_equal_bit_by_bit(dtype, I, monkeypatch):
    monkeypatch.setitem(SIZES, "olmoe", (64, 512, I, 8))
    tensors = layer(4096, "olmoe", dtype)
    first, second = step(tensors), step(tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_the_host_never_waits():
    tensors = layer(512, "olmoe", torch.bfloat16)
    step(tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with deferred_weight_gradients():
            total = sum(experts_forward(*tensors) for _ in range(2))
        total.backward(torch.ones_like(total), retain_graph=True)
        total.backward(torch.ones_like(total))  # adds to the gradients that are there
        with torch.no_grad():
            experts_forward(*(t[:4] if i < 3 else t for i, t in enumerate(tensors)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [4, 512])  # the decode path, the sorted one
def test_a_cuda_graph_replays_a_new_routing(T):
    tensors = layer(T, "olmoe", torch.bfloat16)
    with torch.no_grad():
        experts_forward(*tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts_forward(*tensors)
        tensors[1].copy_(torch.randint(SIZES["olmoe"][0] + 1, tensors[1].shape))  # inactive slots among them
        tensors[0].normal_()
        graph.replay()
        torch.testing.assert_close(y, experts_forward(*tensors), rtol=0, atol=0)


def test_a_cuda_graph_of_a_training_step():
    tensors = layer(512, "olmoe", torch.bfloat16)
    step(tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    for replayed, eager in zip(captured, step(tensors)):
        assert torch.equal(replayed, eager)


def test_a_cuda_graph_of_a_group_s_backward_that_adds_to_gradients():
    tensors, side = layer(512, "olmoe", torch.bfloat16), torch.cuda.Stream()

    def backward():
        with deferred_weight_gradients():
            sum(experts_forward(*tensors) for _ in range(2)).float().square().sum().backward()

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
        once = [t.grad.clone() for t in leaves(tensors)]
        backward()
    torch.cuda.current_stream().wait_stream(side)
    addresses = [t.grad.data_ptr() for t in leaves(tensors)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward()
    for t in leaves(tensors):
        t.grad.zero_()
    graph.replay()
    for t, address, expected in zip(leaves(tensors), addresses, once):
        assert t.grad.data_ptr() == address
        torch.testing.assert_close(t.grad, expected)


@pytest.mark.parametrize("is_trained", [False, True])
def test_torch_compile_fullgraph(is_trained):
    tensors = layer(300, "olmoe", torch.bfloat16)
    compiled = torch.compile(experts_forward, fullgraph=True)
    if is_trained:
        got, expected = step(tensors, function=compiled), step(tensors)
    else:
        with torch.no_grad():
            got, expected = [compiled(*tensors)], [experts_forward(*tensors)]
    for mine, wanted in zip(got, expected):
        torch.testing.assert_close(mine, wanted)


def test_rows_beyond_two_to_the_31_elements():
    """Sorted rows `[N, H]`, input `[T, H]` and one projection each hold more than 2^31 elements."""
    T, E, H, I = 2**18 + 64, 64, 8192, 2176
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    gate_up = torch.randn(E, 2 * I, H, device="cuda", dtype=torch.bfloat16).mul_(H**-0.5)
    down = torch.randn(E, H, I, device="cuda", dtype=torch.bfloat16).mul_(I**-0.5)
    index, weights = torch.randint(E, (T, 1), device="cuda"), torch.rand(T, 1, device="cuda", dtype=torch.bfloat16)
    assert min(x.numel(), gate_up.numel()) > 2**31
    with torch.no_grad():
        y = experts_forward(x, index, weights, gate_up, down)
        some = torch.cat([torch.arange(64), torch.arange(T - 64, T)]).cuda()
        expected = experts_forward_reference(x[some], index[some], weights[some], gate_up, down)
    assert relative_error(y[some], expected.double()) < 2e-2


@pytest.mark.parametrize("kind", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(kind):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer is not installed")
    program = (
        "import torch; from tiedmoe_kernels import experts_forward as f\n"
        "x, w = torch.randn(37, 80, device='cuda', requires_grad=True), torch.rand(37, 3, device='cuda', "
        "requires_grad=True)\n"
        "i = torch.randint(6, (37, 3), device='cuda')\n"
        "g, d = (torch.randn(s, device='cuda', requires_grad=True) for s in ((5, 144, 80), (5, 80, 72)))\n"
        "f(x, i, w, g, d).sum().backward()\n"
        "with torch.no_grad(): f(x[:3], i[:3], w[:3], g, d)\n"
        "torch.cuda.synchronize()"
    )
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(
        [tool, "--tool", kind, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-c", program],
        env=env, capture_output=True, text=True, timeout=400, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "0 error" in run.stdout + run.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype):
    x, index, weights, gate_up, down = layer(4, "olmoe", torch.float32)
    with pytest.raises(ValueError, match="must be one of"):
        experts_forward(x, index, weights, gate_up.detach().to(dtype), down.detach().to(dtype))

"""The Triton kernel of weight gradients: any number of layers and rows, added in place, beyond 2^31 elements.

In the interpreter, and by `pytest.mark.gpu` on a device.
"""

import mmap

import pytest
import torch
from kernel_layers import (
    CASES,
    DEVICES,
    Case,
    Layer,
    backend_fixture,  # noqa: F401
    forward,
    in_float64,
    layer,
    relative_error,
)

from tiedmoe_kernels import (
    backward,
    deferred_weight_gradients,
    experts_forward,
    experts_forward_reference,
    triton_backend,
)
from tiedmoe_kernels.spec import Segment, Spec


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segments_per_launch", [8, 2])
def test_tied_layers_share_one_weight_gradient(segments_per_launch, device, backend, monkeypatch):
    monkeypatch.setattr(triton_backend, "_SEGMENTS_PER_LAUNCH", segments_per_launch)
    case, calls = Case(T=4, E=3, has_bias=True), []
    layers_of_group = ((2, 0), (1, 3), (2, 0))  # top-k and rank of the residual: both may differ
    real = triton_backend.backward_weight
    monkeypatch.setattr(triton_backend, "backward_weight", lambda s, *a: calls.append(len(s)) or real(s, *a))
    pool = layer(case, torch.float32, device)
    layers = [
        layer(case._replace(K=K, rank=rank), torch.float32, device)._replace(
            **{n: getattr(pool, n) for n in Layer._fields[3:7]}
        )
        for K, rank in layers_of_group
    ]
    reference_pool = in_float64(pool)
    references = [
        in_float64(one)._replace(**{n: getattr(reference_pool, n) for n in Layer._fields[3:7]}) for one in layers
    ]

    with deferred_weight_gradients():
        total = sum(forward(experts_forward, one, case).square().sum() for one in layers)
    gradients = torch.autograd.grad(total, pool.leaves[2:])

    expected = sum(forward(experts_forward_reference, one, case).square().sum() for one in references)
    expected_gradients = torch.autograd.grad(expected, reference_pool.leaves[2:])
    for got, want in zip(gradients, expected_gradients):
        assert relative_error(got, want) < 1e-5
    assert calls[0] == 3  # one call for the three layers; it may split its launches
    assert len(calls) == (1 if segments_per_launch == 8 else 3)

    for leaf in pool.leaves[2:]:
        leaf.grad = torch.ones_like(leaf)
    with deferred_weight_gradients():
        sum(forward(experts_forward, one, case).square().sum() for one in layers).backward()
    for leaf, want in zip(pool.leaves[2:], expected_gradients):
        assert relative_error(leaf.grad, want + 1) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("counts", "top_ks"),
    [
        pytest.param([[16, 0, 1], [0, 0, 17], [33, 0, 15]], (2, 2, 2), id="blocks exactly full, tails of one row"),
        pytest.param([[0, 0, 0], [0, 5, 0], [0, 0, 0]], (1, 1, 1), id="one segment with rows between two without"),
        pytest.param([[3, 32, 0], [18, 1, 0]], (2, 3), id="layers of different K"),
        pytest.param([[0, 0, 0]], (2,), id="no rows at all"),
    ],
)
def test_weight_gradient_of_segments_of_any_length(counts, top_ks, is_transposed, device, backend):
    """Blocks of 16 rows; what the kernel may not read is NaN: rows past the last, tokens that no active slot has."""
    H, I, E = 24, 20, 3
    spec = Spec("silu", 1.702, 7.0, is_transposed=is_transposed, is_concatenated=True)
    segments, expected_gate_up, expected_down = [], torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)
    for count, K in zip(counts, top_ks):
        T = sum(count) + 2
        order = torch.randperm(T * K, dtype=torch.int32)
        offsets = torch.tensor([0, *count], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        active = int(offsets[-1])
        x, dy = (torch.full((T, H), torch.nan) for _ in range(2))
        grad_pre, hidden = torch.full((T * K, 2 * I), torch.nan), torch.full((T * K, I), torch.nan)
        token = (order[:active] // K).long()
        x[token], dy[token] = torch.randn(active, H), torch.randn(active, H)
        grad_pre[:active], hidden[:active] = torch.randn(active, 2 * I), torch.randn(active, I)
        for e in range(E):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            expected_gate_up[e] += grad_pre[rows].T @ x[token[rows]]
            expected_down[e] += dy[token[rows]].T @ hidden[rows]
        segments.append(Segment(*(t.to(device) for t in (x, dy, grad_pre, hidden, order, offsets, torch.ones(T, K)))))

    for into in ((None,) * 4, (torch.ones(E, 2 * I, H), torch.ones(E, H, I), None, None)):
        into = [None if t is None else (t.mT if is_transposed else t).contiguous().to(device) for t in into]
        needs = (True, True, False, False)
        got = triton_backend.backward_weight(segments, spec, torch.float32, needs, into)
        for grad, want in zip(got, (expected_gate_up, expected_down)):
            want = want if into[0] is None else want + 1
            torch.testing.assert_close(grad.cpu(), want.mT if is_transposed else want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; test_kernels_gpu.py has the true sizes")
@pytest.mark.parametrize("is_transposed", [False, True])
def test_weight_gradient_reads_beyond_2_31_elements(is_transposed):
    """One program over x `[T, H]` and dpre `[N, H]` of 8.6 GB each; only the rows that are read take memory."""
    T, H = 2**17 + 2, 2**15  # beyond 2^32, too: some numbers are unsigned before they are widened
    x, grad_pre = (torch.frombuffer(mmap.mmap(-1, 2 * T * H), dtype=torch.float16).view(T, H) for _ in range(2))
    rows = torch.arange(T - 2, T)
    x[rows, :16], grad_pre[rows, :16] = torch.randn(2, 16).half(), torch.randn(2, 16).half()
    order = torch.arange(T, dtype=torch.int32)  # K = 1
    offsets = torch.tensor([T - 2, T], dtype=torch.int32)
    out = torch.zeros(16, H)
    a, b = (x, grad_pre) if is_transposed else (grad_pre, x)
    backward.weight_grad_kernel[(1,)](
        (a,), (b,), (order,), (offsets,), out, H, H, 1,
        K=1, GATHER_A=is_transposed, GATHER_B=not is_transposed, ADD=False, EVEN=True,
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP_M=1, PRECISION="ieee", num_warps=4, num_stages=2,
    )  # fmt: skip
    expected = a[rows, :16].float().T @ b[rows, :16].float()
    torch.testing.assert_close(out[:, :16], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["biased", "sizes that no block divides, E not a power of two"])
def test_a_second_backward_adds_in_place(name, device, backend):
    case = CASES[name]._replace(index="half inactive")  # some experts get no token: their gradient stays
    mine = layer(case, torch.float32, device)
    reference = in_float64(mine)
    grads = torch.autograd.grad(forward(experts_forward_reference, reference, case).sum(), reference.leaves[2:])
    for _ in range(2):
        forward(experts_forward, mine, case).sum().backward()
        addresses = [leaf.grad.data_ptr() for leaf in mine.leaves[2:]]
    for leaf, want, address in zip(mine.leaves[2:], grads, addresses):
        assert leaf.grad.data_ptr() == address
        assert relative_error(leaf.grad, 2 * want) < 1e-5

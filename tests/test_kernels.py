"""The Triton kernels against `experts_forward_reference` in float64: outputs and all gradients.

Without a GPU they run in Triton's interpreter on CPU tensors, with blocks of 16 so that small shapes have several
tiles, full and partly filled; `make gpu-test` runs the same tests on the device with the blocks that are shipped.
Uninitialised memory is NaN.
"""

import json
import math
import mmap
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
import triton.language as tl

from tiedmoe_kernels import (
    backends,
    backward,
    deferred,
    deferred_weight_gradients,
    experts_forward,
    experts_forward_reference,
    metadata,
    triton_backend,
    tune,
    tuning,
)
from tiedmoe_kernels.spec import Segment, Spec

DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Of a result, relative to its norm: what the issue of the kernels asks for.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """A layer and its routing; `index` makes `[T, K]` from (T, R, K)."""

    T: int = 6
    H: int = 32
    I: int = 16
    E: int = 4
    K: int = 2
    index: str = "uniform"
    flags: Mapping[str, object] = MappingProxyType({})
    has_bias: bool = False
    slot_map: list[int] | None = None
    rank: int = 0  # of a residual


CASES = {
    "several tiles of rows, columns and k": Case(T=20, H=48, I=40, E=2),
    "sizes that no block divides, E not a power of two": Case(T=7, H=40, I=24, E=3, K=3),
    "smaller than a block": Case(T=3, H=10, I=6, E=2, K=1),
    "one token": Case(T=1),
    "no token": Case(T=0),
    "K=1": Case(K=1),
    "all tokens to one expert, the others empty": Case(T=20, E=4, index="one expert"),
    "a token twice to one expert": Case(index="twice"),
    "inactive slots, a token without any expert": Case(index="half inactive"),
    "nothing active": Case(index="nothing active"),
    "slot map: nine router indices, five pool rows, one unused": Case(E=5, slot_map=[0, 0, 1, 3, 3, 3, 4, 1, 0]),
    "slot map with inactive slots": Case(E=5, slot_map=[2, 0, 4], index="half inactive"),
    "gpt-oss: transposed, interleaved, biased, clamped": Case(
        H=40,
        I=24,
        E=3,
        index="half inactive",
        flags={"activation": "clamped_swiglu", "swiglu_limit": 1.0, "is_transposed": True, "is_concatenated": False},
        has_bias=True,
    ),
    "transposed": Case(flags={"is_transposed": True}),
    "biased": Case(has_bias=True),
    "gelu": Case(T=4, flags={"activation": "gelu"}),
    "gelu_pytorch_tanh": Case(T=4, flags={"activation": "gelu_pytorch_tanh"}),
    "relu": Case(T=4, flags={"activation": "relu"}),
    "clamped_silu": Case(T=4, flags={"activation": "clamped_silu", "swiglu_limit": 0.7}),
    "residual": Case(T=20, rank=3),
    "residual of more than a block, an expert without tokens": Case(T=5, K=1, rank=18),
    "residual, no token": Case(T=0, rank=2),
    "residual, slots in another order than their pool rows, two of one row": Case(
        T=9, E=3, K=3, slot_map=[2, 0, 0, 1, 2], index="half inactive", has_bias=True, rank=2
    ),
    "residual of gpt-oss: transposed, interleaved, biased, clamped": Case(
        H=40,
        I=24,
        E=3,
        flags={"activation": "clamped_swiglu", "swiglu_limit": 1.0, "is_transposed": True, "is_concatenated": False},
        has_bias=True,
        slot_map=[1, 2, 0, 1],
        rank=5,
    ),
}


def in_larger_storage(w: Tensor, *sizes: int) -> Tensor:
    larger = torch.full(sizes, torch.nan, device=w.device)
    view = larger[tuple(slice(size - n, size) for size, n in zip(sizes, w.shape))]
    return view.copy_(w.detach()).requires_grad_()


VIEWS = {
    "transposed": lambda w: w.detach().mT.contiguous().mT.requires_grad_(),
    "some rows of each expert": lambda w: in_larger_storage(w, len(w) + 1, w.size(1) + 3, w.size(2)),
    "some columns": lambda w: in_larger_storage(w, len(w), w.size(1), w.size(2) + 16),
}


def routing(case: Case) -> Tensor:
    R = case.E if case.slot_map is None else len(case.slot_map)
    index = torch.rand(case.T, max(R, case.K)).argsort(dim=1)[:, : case.K] % R
    if case.index == "one expert":
        index = torch.full_like(index, 2)
    elif case.index == "twice":
        index[:, 1] = index[:, 0]
    elif case.index == "half inactive":
        index[torch.rand(index.shape) < 0.5] = R
        index[0] = R
    elif case.index == "nothing active":
        index = torch.full_like(index, R)
    return index


class Layer(NamedTuple):
    """The tensors of one call, in the order that gradients are compared in."""

    x: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    slot_map: Tensor | None
    residual: tuple[Tensor, ...] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weights, *self[3:7], *(self.residual or ())) if t is not None]


def layer(case: Case, dtype: torch.dtype, device: str) -> Layer:
    T, H, I, E, K = case[:5]
    gate_up, down = torch.randn(E, 2 * I, H) * 2 * H**-0.5, torch.randn(E, H, I) * I**-0.5
    if case.flags.get("is_transposed"):
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    bias = (torch.randn(E, 2 * I), torch.randn(E, H)) if case.has_bias else (None, None)
    R, rank = E if case.slot_map is None else len(case.slot_map), case.rank
    factors = [
        factor for _, rows, columns in (gate_up.shape, down.shape) if rank
        for factor in (torch.randn(R, rows, rank) * rank**-0.5, torch.randn(R, rank, columns) * columns**-0.5)
    ]  # fmt: skip
    floats = [
        t if t is None else t.to(device, dtype).requires_grad_()
        for t in (torch.randn(T, H), torch.rand(T, K), gate_up, down, *bias, *factors)
    ]
    slot_map = None if case.slot_map is None else torch.tensor(case.slot_map, device=device)
    return Layer(floats[0], routing(case).to(device), *floats[1:6], slot_map, tuple(floats[6:]) or None)


def forward(function, layer: Layer, case: Case, **more) -> Tensor:
    arguments = {
        "gate_up_proj_bias": layer.gate_up_bias,
        "down_proj_bias": layer.down_bias,
        "slot_map": layer.slot_map,
        "residual": layer.residual,
    }
    return function(*layer[:5], **arguments, **case.flags, **more)


def in_float64(layer: Layer) -> Layer:
    """The same numbers on the CPU, inactive weights NaN: the reference must not read them either."""

    def converted(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t.detach().cpu().double().requires_grad_() if t.is_floating_point() else t.cpu()

    residual = None if layer.residual is None else tuple(map(converted, layer.residual))
    return Layer(*map(converted, layer[:8]), residual)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    error, norm = (got.detach().cpu().double() - expected).norm().item(), expected.norm().item()
    return error / norm if norm else error


@pytest.fixture
def backend(request, monkeypatch):
    """The Triton backend for CPU tensors, too, and blocks of 16 in the interpreter."""
    device = request.getfixturevalue("device")
    if device == "cpu":
        blocks = dict.fromkeys(tuning.KERNELS, tuning.Config(16, 16, 16, group_m=2, num_warps=4, num_stages=2))
        monkeypatch.setattr(backends, "backend_of", lambda device_type: triton_backend)
        monkeypatch.setattr(tuning, "choose", lambda kernel, *_: blocks[kernel])
        return blocks
    return None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        *(
            (name, dtype)
            for name in ("biased", "slot map with inactive slots", "residual")
            for dtype in (torch.float16, torch.bfloat16)
        ),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_outputs_and_gradients(name, dtype, device, backend):
    case = CASES[name]
    mine = layer(case, dtype, device)
    reference = in_float64(mine)
    expected = forward(experts_forward_reference, reference, case)
    grad_y = torch.randn(expected.shape)
    expected_gradients = torch.autograd.grad(expected, reference.leaves, grad_y.double())

    y = forward(experts_forward, mine, case)
    gradients = torch.autograd.grad(y, mine.leaves, grad_y.to(device, dtype))
    with torch.no_grad():  # few slots without a gradient: the decode path
        decoded = forward(experts_forward, mine, case)

    assert y.dtype == dtype
    for got, want in zip([y, decoded, *gradients], [expected, expected, *expected_gradients]):
        assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_inactive_slots_are_not_read(device, backend):
    case = CASES["inactive slots, a token without any expert"]
    mine = layer(case, torch.float32, device)
    with torch.no_grad():
        mine.weights[mine.index == case.E] = torch.nan
    for is_trained in (True, False):
        with torch.set_grad_enabled(is_trained):
            y = forward(experts_forward, mine, case)
        assert y.isfinite().all()
        assert not y[0].any()
    gradients = torch.autograd.grad(forward(experts_forward, mine, case).sum(), mine.leaves)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [-1, 7, 2**40])
def test_an_index_out_of_range_is_inactive_and_reads_no_memory(index, device, backend):
    case = Case(T=4, E=6)
    mine = layer(case, torch.float32, device)
    mine.index[1, 0] = index
    same = mine._replace(index=mine.index.masked_fill(mine.index == index, case.E))
    for is_trained in (True, False):  # the sorted path, the decode path
        with torch.set_grad_enabled(is_trained):
            torch.testing.assert_close(forward(experts_forward, mine, case), forward(experts_forward, same, case))


@pytest.mark.parametrize("device", DEVICES)
def test_recompute_saves_the_input_only_and_changes_no_bit(device, backend, monkeypatch):
    monkeypatch.setattr(triton_backend, "MAX_DECODE_SLOTS", 0)
    case = CASES["biased"]
    mine = layer(case, torch.float32, device)
    results = {}
    for recompute in (False, True):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = forward(experts_forward, mine, case, recompute=recompute)
        own = [
            t for t in saved if t.is_floating_point() and all(t.data_ptr() != leaf.data_ptr() for leaf in mine.leaves)
        ]
        results[recompute] = (y, *torch.autograd.grad(y.square().sum(), mine.leaves))
        assert sum(t.numel() for t in own) == (0 if recompute else case.T * case.K * 2 * case.I)
    for kept, recomputed in zip(results[False], results[True]):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("device", DEVICES)
def test_descriptors_read_the_same_weights(device, backend, monkeypatch):
    """Weights through tensor descriptors (TMA on a GPU) or through pointers, in both layouts."""
    chosen = []
    for flags in ({}, {"is_transposed": True}):
        case = Case(T=4, H=32, I=48, E=2, flags=flags)  # 48: the last tile of 32 columns begins at 16
        mine, results = layer(case, torch.float32, device), []
        for tma in (False, True):
            config = tuning.Config(16, 32, 16, group_m=2, num_warps=4, num_stages=2, tma=tma)

            def choose(kernel, *_, config=config):
                chosen.append(config.tma)
                return config

            monkeypatch.setattr(tuning, "choose", choose)
            y = forward(experts_forward, mine, case)
            results.append((y, *torch.autograd.grad(y.square().sum(), mine.leaves)))
        for by_pointer, by_descriptor in zip(*results):
            torch.testing.assert_close(by_pointer, by_descriptor)
    assert True in chosen


@pytest.mark.parametrize("name", ["sizes that no block divides, E not a power of two", "biased", "nothing active"])
@pytest.mark.parametrize("device", DEVICES[:1])
def test_decode_under_programmatic_dependent_launch(name, device, backend, monkeypatch):
    """Down's first block of weights is multiplied last there; the interpreter knows no waiting."""
    monkeypatch.setattr(triton_backend, "_pdl", lambda: (("PDL", True),))
    waits = []
    for function in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(tl.extra.cuda, function, lambda function=function: waits.append(function))
    mine = layer(CASES[name], torch.float32, device)
    with torch.no_grad():
        y = forward(experts_forward, mine, CASES[name])
    assert relative_error(y, forward(experts_forward_reference, in_float64(mine), CASES[name])) < 1e-5
    assert waits.count("gdc_wait") > waits.count("gdc_launch_dependents") > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS)
def test_weights_are_read_where_they_lie(view, device, backend, monkeypatch):
    """Views of other storage, through pointers and descriptors: the same results, and no copy of the weights."""
    case = Case(T=4, H=32, I=32, E=2)
    mine = layer(case, torch.float32, device)
    there = mine._replace(gate_up=VIEWS[view](mine.gate_up), down=VIEWS[view](mine.down))
    assert not any(w.is_contiguous() for w in (there.gate_up, there.down))
    copied: list[torch.Size] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.clone.default:
                copied.append(out.shape)
            return out

    for tma in (False, True):
        config = tuning.Config(16, 32, 16, group_m=2, num_warps=4, num_stages=2, tma=tma)
        monkeypatch.setattr(tuning, "choose", lambda *a, config=config: config._replace(tma=config.tma and a[5]))
        want = results(forward(experts_forward, mine, case), mine.leaves)
        with Copies():
            y = forward(experts_forward, there, case)
            gradients = torch.autograd.grad(y.square().sum(), there.leaves)
            with torch.no_grad():
                decoded = forward(experts_forward, there, case)
        for got, expected in zip([y, *gradients], want):
            assert relative_error(got, expected.double()) < 1e-6
        with torch.no_grad():
            torch.testing.assert_close(decoded, forward(experts_forward, mine, case))
    assert not {there.gate_up.shape, there.down.shape} & set(copied)


def results(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def test_weights_that_lie_neither_by_rows_nor_by_columns_are_copied():
    assert triton_backend._Matrices(torch.empty(2, 8, 8).mT, k_is_last=True).k_is_last is False
    for weight, is_one in (
        (torch.empty(2, 8, 8), True),
        (torch.empty(2, 8, 8).mT, True),
        (torch.empty(2, 8, 16)[:, :, 4:12], True),  # rows apart, each expert's after the other's
        (torch.empty(2, 16, 8)[:, :8], False),  # experts apart: rows of one matrix only with those between
        (torch.empty(2, 8, 9)[:, :, :8], False),  # 36 bytes from row to row
        (torch.empty(2, 8, 16)[:, :, 2:10], False),  # begins 8 bytes after a multiple of 16
        (torch.empty(1, 8, 8).expand(2, 8, 8), False),  # one matrix for all experts
    ):
        assert deferred.readable(weight) is weight
        assert triton_backend._Matrices(weight, k_is_last=True).can_use_tma() is is_one
    strided = torch.randn(2, 8, 16)[:, :, ::2]
    deferred.say_once.cache_clear()
    copy = deferred.readable(strided)
    assert copy.is_contiguous()
    assert torch.equal(copy, strided)
    assert deferred.say_once.cache_info().currsize == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    [
        "several tiles of rows, columns and k",
        "all tokens to one expert, the others empty",
        "inactive slots, a token without any expert",
        "nothing active",
    ],
)
def test_programs_that_walk_over_tiles_change_no_bit(name, device, backend, monkeypatch):
    """Two programs for all tiles of `gate_up_kernel` and of `rows_kernel`, or one for each."""
    monkeypatch.setattr(triton_backend, "MAX_DECODE_SLOTS", 0)
    monkeypatch.setattr(tuning, "num_processors", lambda index: 2)
    case = CASES[name]
    mine, results = layer(case, torch.float32, device), []
    for persistent in (False, True):
        config = tuning.Config(16, 16, 16, group_m=2, num_warps=4, num_stages=2, persistent=persistent)
        monkeypatch.setattr(tuning, "choose", lambda kernel, *_, config=config: config)
        y = forward(experts_forward, mine, case)
        results.append((y, *torch.autograd.grad(y.square().sum(), mine.leaves)))
    for one, other in zip(*results):
        assert torch.equal(one, other)


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


@pytest.mark.parametrize("device", DEVICES)
def test_many_slots_of_few_experts_are_sorted_rather_than_decoded(device, backend, monkeypatch):
    """One read of an expert's weights serves 16 slots in the decode path."""
    sorts, real = [], metadata.sort_slots
    monkeypatch.setattr(metadata, "sort_slots", lambda *a: sorts.append(1) or real(*a))
    with torch.no_grad():
        for T, E in ((16, 2), (17, 2)):
            case = Case(T=T, E=E, H=16)
            mine = layer(case, torch.float32, device)
            y = forward(experts_forward, mine, case)
            assert relative_error(y, forward(experts_forward_reference, in_float64(mine), case)) < 1e-5
    assert len(sorts) == 1


@pytest.mark.parametrize(("old", "new"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_are_as_exact_as_torch_s(old, new):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(old)
        assert triton_backend._precision(torch.empty(0)) == new
        assert triton_backend._precision(torch.empty(0, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_float32_products_under_torch_s_new_switches():
    code = (
        "import torch; from tiedmoe_kernels import triton_backend as b; x = torch.empty(0); print(b._precision(x))\n"
        "torch.backends.fp32_precision = 'tf32'; print(b._precision(x))\n"
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'; print(b._precision(x))"
    )  # in a process of its own: torch does not let the old and the new switches be mixed
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ieee", "tf32", "ieee"]


def test_blocks_of_a_row_are_powers_of_two_and_cover_it():
    for size in [*range(1, 200), 1000, 1024, 2880, 14336]:
        block, num_warps = triton_backend._block_of_row(size)
        assert block >= min(size, 1024)
        assert math.log2(block).is_integer()
        assert num_warps in (1, 2, 4)  # 96 columns are no three warps


class TestMetadata:
    """The sort and the tiles for any routing."""

    @pytest.mark.parametrize("device", DEVICES)
    def test_more_blocks_of_slots_than_one_scan_takes(self, device, monkeypatch):
        monkeypatch.setattr(metadata, "_BLOCKS_PER_SCAN", 2)
        row = torch.randint(3, (5 * 128 // 4, 4))  # five blocks of 128 slots
        order, offsets, _ = metadata.sort_slots(row.to(device), None, 3)
        assert torch.equal(order.cpu().long(), row.flatten().argsort(stable=True))
        assert offsets[-1] == row.numel()

    @pytest.mark.parametrize("device", DEVICES)
    def test_a_pool_of_hundreds_of_experts(self, device):
        """A union of many layers: the blocks that count shrink to 16 slots."""
        row = torch.randint(521, (20, 2))
        order, offsets, _ = metadata.sort_slots(row.to(device), None, 520)
        assert torch.equal(order.cpu().long(), row.flatten().argsort(stable=True))
        assert torch.equal(
            offsets.cpu(),
            row.flatten().bincount(minlength=521).cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0).int(),
        )

    def test_too_many_slots_are_refused(self):
        with pytest.raises(ValueError, match=f"{2**31} slots.*at most {2**31 - 1}"):
            metadata.sort_slots(torch.empty(2**28, 8, dtype=torch.int64, device="meta"), None, 4)


class TestConfigurations:
    """The files of tile sizes; whether they compile is `test_compile.py`'s."""

    @pytest.mark.parametrize("path", sorted(tuning.CONFIGS.glob("*.json")), ids=lambda path: path.name)
    def test_every_entry_is_well_formed(self, path):
        content = tuning._read(path)
        entries = content.get("entries") or [e for entries in content["architectures"].values() for e in entries]
        for entry in entries:
            fields = {"kernel", "element_size", "max_rows", *tuning.Config._fields}
            optional = {*tuning.Config._field_defaults}
            assert entry.keys() - optional - {"milliseconds"} == fields - optional
            assert entry["kernel"] in tuning.KERNELS
            assert entry["element_size"] in (2, 4)
            for block in ("block_m", "block_n", "block_k"):
                assert entry[block] >= 16
                assert math.log2(entry[block]).is_integer()

    @pytest.mark.parametrize(
        "arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx90a", "gfx942", "gfx950"]
    )
    def test_every_architecture_has_every_kernel(self, arch, monkeypatch):
        monkeypatch.setattr(tuning, "architecture", lambda: arch)
        monkeypatch.setattr(tuning.triton.knobs.runtime, "interpret", False)
        choose = tuning.choose.__wrapped__
        for kernel in tuning.KERNELS:
            for element_size in (2, 4):
                for rows in (1, 64, 4096):
                    config = choose(kernel, element_size, rows, 2048, 40, True, None)
                    assert config.block_k <= 32  # cut to k = 40
                    assert not config.tma  # 32 does not divide 40

    def test_a_file_of_the_very_gpu_comes_first(self, monkeypatch, tmp_path):
        default = (tuning.CONFIGS / "default.json").read_text()
        (tmp_path / "default.json").write_text(default)
        (tmp_path / "some_gpu_80gb.json").write_text(
            '{"entries": [{"kernel": "rows", "element_size": 2, "max_rows": 64, "block_m": 32, "block_n": 16,'
            ' "block_k": 16, "group_m": 1, "num_warps": 2, "num_stages": 7}]}'
        )
        monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
        monkeypatch.setattr(tuning, "_device_name", lambda index: "Some GPU (80GB)")
        monkeypatch.setattr(tuning, "architecture", lambda: "sm_90")
        tuned = tuning.choose.__wrapped__("rows", 2, 64, 256, 256, True, 0)
        assert (tuned.block_m, tuned.num_stages) == (32, 7)
        assert tuning.choose.__wrapped__("rows", 2, 65, 256, 256, True, 0).num_stages != 7

    @pytest.mark.skipif(torch.cuda.is_available(), reason="tunes CPU tensors, in the interpreter")
    def test_tune_keeps_the_fastest_and_leaves_out_what_fails(self, capsys):
        slow, fast, broken = (tuning.Config(16, 16, block_k, 1, 4, 2) for block_k in (16, 32, 64))
        launched, forced = [], tune.forced

        def watched(kernel, config):
            launched[:] = [config]
            return forced(kernel, config)

        def timer(run):
            if launched == [broken]:
                raise RuntimeError("too large")
            run()
            return {slow: 2.0, fast: 1.0}.get(*launched, 3.0)

        problems = [problem._replace(tokens=3) for problem in tune.PROBLEMS[:4]]
        written = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tune, "forced", watched)
            entries = tune.tune(
                "cpu", tune.TINY, problems, timer, lambda *_: [slow, broken, fast], done=written.append
            )
            with pytest.raises(RuntimeError, match="no configuration of gate_up runs"):
                tune.fastest(problems[0], tune.calls("gate_up", 3, tune.TINY, "cpu")[0], [broken], timer)
        assert [entry["kernel"] for entry in entries] == ["gate_up", "rows", "weight_grad", "decode_gate_up"]
        assert all(tuning.Config(*(entry[f] for f in tuning.Config._fields)) == fast for entry in entries)
        assert [entry["milliseconds"] for entry in entries] == [1.0, 1.0, 1.0, 1.0 / tune._DRAWS]
        assert "left out, does not compile: too large" in capsys.readouterr().out
        assert not tuning.FORCED
        assert [sum("milliseconds" in entry for entry in each) for each in written] == [1, 2, 3, 4]
        assert json.loads(tune.text({"device": "x", "entries": entries})) == {"device": "x", "entries": entries}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="tunes CPU tensors, in the interpreter")
    def test_what_the_clock_leaves_out_keeps_its_default(self, capsys):
        entries = tune.tune("cpu", tune.TINY, tune.TINY_PROBLEMS, seconds=0)
        assert capsys.readouterr().out.count("keeps the default") == len(entries) == len(tune.PROBLEMS)
        for problem, entry in zip(tune.TINY_PROBLEMS, entries):
            config = tune.default(problem, "cpu")
            assert entry["max_rows"] == problem.max_rows
            assert tuning.Config(*(entry[f] for f in tuning.Config._fields)) == config

    def test_launches_that_are_kept_are_recorded_too(self):
        class Kernel(tune.KernelInterface):
            def fn_kernel(self): ...

            fn, calls = fn_kernel, []

            def run(self, *args, grid, warmup, **options):
                self.calls.append((args, grid, options))

        launch = triton_backend._Launch(Kernel(), (1, 2, 3), {"K": 4}, keep=True)
        launch.run = lambda *_: pytest.fail("passed the recording by")
        with tune.recorded() as launches:
            launch(5)
        launches[0].again()
        assert [each.kernel for each in launches] == ["fn"]
        assert Kernel.calls == [((5,), (1, 2, 3), {"K": 4})] * 2

    def test_decoding_is_chosen_by_its_slots(self, monkeypatch):
        asked, choose = [], tuning.choose
        monkeypatch.setattr(tuning, "choose", lambda *key: asked.append(key) or choose(*key))
        x, index, weights = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
        pool = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
        triton_backend.forward(x, index, weights, *pool, None, None, None, tune.SPEC, False)
        assert [(kernel, rows) for kernel, _, rows, *_ in asked] == [("decode_gate_up", 8), ("decode_down", 8)]

    def test_a_missing_entry_is_named(self, monkeypatch):
        with pytest.raises(LookupError, match="no entry for kernel 'rows' of 8-byte elements"):
            tuning.choose.__wrapped__("rows", 8, 1, 16, 16, False, None)

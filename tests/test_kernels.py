"""The Triton kernels against `experts_forward_reference` in float64: outputs and all gradients.

Without a GPU they run in Triton's interpreter; `make gpu-test` runs the same tests (`pytest.mark.gpu`) on the device
with the blocks that are shipped. Uninitialised memory is NaN.
"""

import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from kernel_layers import (
    CASES,
    DEVICES,
    TOLERANCE,
    Case,
    backend_fixture,  # noqa: F401
    forward,
    in_float64,
    in_larger_storage,
    layer,
    relative_error,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiedmoe_kernels import (
    deferred,
    experts_forward,
    experts_forward_reference,
    metadata,
    triton_backend,
    tuning,
)

VIEWS = {
    "transposed": lambda w: w.detach().mT.contiguous().mT.requires_grad_(),
    "some rows of each expert": lambda w: in_larger_storage(w, len(w) + 1, w.size(1) + 3, w.size(2)),
    "some columns": lambda w: in_larger_storage(w, len(w), w.size(1), w.size(2) + 16),
}


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

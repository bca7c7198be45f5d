"""bfloat16 in the interpreter that stands in for a GPU: see triton_interpreter.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs where there is no GPU")


@triton.jit
def cast_kernel(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets).to(target.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, out, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    tile = row[:, None] * BLOCK + row[None, :]
    accumulator = tl.full((BLOCK, BLOCK), 1.0, tl.float32)
    accumulator = tl.dot(tl.load(a + tile), tl.trans(tl.load(b + tile)), accumulator)
    tl.store(out + tile, accumulator.to(out.dtype.element_ty))


@triton.jit
def double_kernel(x, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    tl.store(x + offsets, value + value)


def cast(source, dtype):
    target = torch.empty_like(source, dtype=dtype)
    cast_kernel[(1,)](source, target, BLOCK=source.numel())
    return target


def test_cast_to_bfloat16_rounds_to_nearest_even():
    ties = 1 + torch.arange(64) * 2.0**-8  # odd numerators lie half-way between two bfloat16
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38, 1e-40, 1e-45, -1e-39])
    source = torch.cat([torch.randn(440) * 10 ** torch.linspace(-30, 30, 440), ties, special])
    for dtype in (torch.float32, torch.float64, torch.float16):
        values = source.to(dtype)
        assert torch.equal(cast(values, torch.bfloat16).view(torch.int16), values.bfloat16().view(torch.int16))
    assert cast(torch.full((16,), float("nan")), torch.bfloat16).isnan().all()


def test_cast_from_bfloat16_is_exact():
    bits = torch.arange(2**16).to(torch.int32).sub(2**15).to(torch.int16)
    source = bits.view(torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        torch.testing.assert_close(cast(source, dtype), source.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_what_the_tensors_hold(dtype):
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32, dtype=torch.float32)
    dot_kernel[(1,)](a, b, out, BLOCK=32)
    torch.testing.assert_close(out, (1 + a.double() @ b.double().T).float(), rtol=1e-6, atol=1e-5)


def test_arithmetic_on_bfloat16_is_refused():
    with pytest.raises(Exception, match="convert to float32 first"):
        double_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), BLOCK=16)

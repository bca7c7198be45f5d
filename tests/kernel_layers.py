"""Layers, routings and devices on which the Triton kernels are compared with the reference.

Without a GPU the kernels run in Triton's interpreter on CPU tensors, with blocks of 16 so that small shapes have
several tiles, full and partly filled.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from tiedmoe_kernels import backends, triton_backend, tuning

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


@pytest.fixture(name="backend")
def backend_fixture(request, monkeypatch):
    """The Triton backend for CPU tensors, too, and blocks of 16 in the interpreter."""
    device = request.getfixturevalue("device")
    if device == "cpu":
        blocks = dict.fromkeys(tuning.KERNELS, tuning.Config(16, 16, 16, group_m=2, num_warps=4, num_stages=2))
        monkeypatch.setattr(backends, "backend_of", lambda device_type: triton_backend)
        monkeypatch.setattr(tuning, "choose", lambda kernel, *_: blocks[kernel])
        return blocks
    return None

"""What the benchmarks time: expert layers of published models, their routing, and the work a layer cannot do without.

Shape letters: T tokens, H hidden size, I expert intermediate size, E experts in the pool, K top-k, g group_size.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf")


class Shape(NamedTuple):
    name: str
    E: int
    H: int
    I: int
    K: int

    @property
    def expert_numbers(self) -> int:
        """Numbers in one expert: gate, up and down."""
        return 3 * self.H * self.I


OLMOE = Shape("OLMoE", 64, 2048, 1024, 8)
QUARTER = Shape("OLMoE/4", OLMOE.E, OLMOE.H // 4, OLMOE.I // 4, OLMOE.K)
QWEN3 = Shape("Qwen3-30B", 128, 2048, 768, 8)
SHAPES = (  # "2x", "4x": with that many times the experts, as wide as a tied group's pool may be made
    OLMOE,
    *(Shape(f"Qwen{wide}", n * 60, 1536, 768, 4) for n, wide in ((1, ""), (2, " 2x"), (4, " 4x"))),
    *(Shape(f"DeepSeek{wide}", n * 64, 2048, 1024, 6) for n, wide in ((1, ""), (2, " 2x"), (4, " 4x"))),
    QWEN3,
    Shape("Mixtral", 8, 4096, 14336, 2),
)
TINY = Shape("tiny", 8, 32, 16, 2)  # to try a script


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time. `kind`: "forward" of one layer, "step" of a tied group, "decode" of one layer."""

    kind: str
    shape: Shape
    T: int
    g: int = 1
    routing: str = "uniform"
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.shape.name} T={self.T} g={self.g} {self.routing} {dtype}"

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, 2 per multiply-add; a backward is two forwards."""
        forward = 2 * self.T * self.shape.K * self.shape.expert_numbers
        return forward * 3 * self.g if self.kind == "step" else forward

    def decode_bytes(self, active_experts: float) -> float:
        """Count bytes one layer must move: the experts that some token chose, once, the tokens in and out."""
        return (active_experts * self.shape.expert_numbers + 2 * self.T * self.shape.H) * self.dtype.itemsize

    def weight_copies_bytes(self) -> int:
        """Count bytes of `batched_mm`'s weight copies, one per slot; a backward keeps them and makes gradients."""
        copies = self.g + 1 if self.kind == "step" else 1
        return copies * self.T * self.shape.K * self.shape.expert_numbers * self.dtype.itemsize


def route(T: int, shape: Shape, routing: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `top_k_index [T, K]` int64, K different experts a token, and `top_k_weights [T, K]` float32, on the CPU.

    "uniform": every expert equally likely. "zipf": the r-th most popular expert has a probability proportional to 1/r,
    drawn without replacement (Gumbel top-k); which expert is popular is drawn too.
    """
    gumbel = -torch.empty(T, shape.E).exponential_(generator=generator).log()
    if routing == "zipf":
        gumbel -= (torch.randperm(shape.E, generator=generator) + 1.0).log()
    elif routing != "uniform":
        raise ValueError(f"unknown routing {routing!r}; choose one of {', '.join(ROUTINGS)}")
    index = gumbel.topk(shape.K, dim=-1).indices
    return index, torch.randn(T, shape.K, generator=generator).softmax(-1)

"""What the backends (`torch_backend`, `triton_backend`) and their callers hand to each other. Imports torch only.

A backend is a module with three functions, `forward`, `backward_data` and `backward_weight`, all in terms of `Spec`
and `Segment`; `torch_backend.py` documents them. Rows are slots (token, k) sorted by expert, N = T*K of them.

Shape suffixes: T tokens, H hidden size, I expert intermediate size, E experts in the pool, K top-k, N = T*K slots.
"""

from typing import NamedTuple

from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # gate_up, down, gate_up_bias, down_bias

Factors = tuple[Tensor, Tensor, Tensor, Tensor]  # of a residual: b and a of gate_up, b and a of down

# Every name that `activation` may have; reference.py says what they compute.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "clamped_silu", "clamped_swiglu")


class Spec(NamedTuple):
    """What does not change from call to call: the activation and the layout of the weights."""

    activation: str  # one of ACTIVATIONS
    swiglu_alpha: float  # alpha of "clamped_swiglu"
    swiglu_limit: float  # limit of "clamped_swiglu" and "clamped_silu"
    is_transposed: bool  # projections are stored [E, in, out]
    is_concatenated: bool  # gate and up are two halves; False: interleaved


class Segment(NamedTuple):
    """What one layer leaves for the weight gradient: rows sorted by expert, undefined from `offsets[E]` on."""

    hidden_states: Tensor  # x  [T, H]
    grad_output: Tensor  # dy [T, H]
    grad_pre: Tensor  # [N, 2I] gradient of the pre-activation, columns as the weights have them
    hidden: Tensor  # [N, I] w * act(gate) * up
    order: Tensor  # [N] int32, slot numbers t*K+k by pool row (stable), inactive slots last; token = order // K
    offsets: Tensor  # [E+1] int32, expert e has rows offsets[e]:offsets[e+1]; offsets[E] = number of active slots
    weights: Tensor  # w  [T, K], for the gradient of down's bias

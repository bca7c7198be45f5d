"""The experts of one MoE layer in plain torch: what is computed, with nothing done for speed.

Run it in float64 to judge a kernel. Autograd gives every gradient: hidden states, routing weights, projections,
biases.

Shape suffixes: T tokens, H hidden size, I expert intermediate size, E experts in the pool, R router width (R = E
without a slot map), K top-k, N rows of one router index.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_indices, check_shapes
from .spec import Spec

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def experts_forward_reference(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: str = "silu",
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    slot_map: Tensor | None = None,
    residual: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return `y [T, H]`, y = sum_k w_k * down_e(act(gate_e(x)) * up_e(x)) with e = slot_map[top_k_index[t, k]].

    The flags mean what transformers' `use_experts_implementation` declares by the same names.

    Args:
        hidden_states: `[T, H]`, floating point.
        top_k_index: `[T, K]` int64 in `[0, R]`. R marks an inactive slot: not computed, its weight not read.
        top_k_weights: `[T, K]`, floating point.
        gate_up_proj: `[E, 2I, H]`, or `[E, H, 2I]` if `is_transposed`.
        down_proj: `[E, H, I]`, or `[E, I, H]` if `is_transposed`.
        activation: "silu", "gelu", "gelu_pytorch_tanh" or "relu" on the gate; "clamped_silu", DeepSeek-V4's
            silu(min(gate, limit)) * clamp(up, -limit, limit); or "clamped_swiglu", gpt-oss's
            min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clamp(up, -limit, limit) + 1).
        swiglu_alpha: alpha of "clamped_swiglu".
        swiglu_limit: limit of the two clamped ones.
        gate_up_proj_bias: `[E, 2I]`, default none.
        down_proj_bias: `[E, H]`, default none.
        is_transposed: the projections are stored `[E, in, out]`.
        is_concatenated: gate and up are stored as two halves; False: interleaved, gate0, up0, gate1, up1, ...
        slot_map: `[R]` int64, the pool row that each router index reads, default the identity (R = E).
        residual: b and a of gate_up_proj, b and a of down_proj, default none. Router index s reads
            `W[e] + b[s] @ a[s]`, b `[R, rows, r]` and a `[R, r, columns]` of the projection as it is stored.

    Returns:
        `[T, H]` in the dtype of `hidden_states`, summed over K in float32 or wider.

    Raises:
        ValueError: shapes that do not fit together, an index that is not int64 or out of range, an unknown activation.
    """
    num_experts = gate_up_proj.size(0)
    spec = Spec(activation, swiglu_alpha, swiglu_limit, is_transposed, is_concatenated)
    weights = (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias)
    check_shapes(hidden_states, top_k_index, top_k_weights, weights, slot_map, residual, spec)
    check_indices(top_k_index, slot_map, num_experts)
    pool_rows = range(num_experts) if slot_map is None else slot_map.tolist()

    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    y_TH = torch.zeros_like(hidden_states, dtype=dtype)
    active = [s for s in top_k_index.unique().tolist() if s < len(pool_rows)]
    # With nothing active, index 0 on zero rows costs nothing and leaves zero gradients instead of missing ones.
    for s in active or [0]:
        token_N, k_N = (top_k_index == s).nonzero(as_tuple=True)
        e = pool_rows[s]
        gate_up_w, down_w = gate_up_proj[e], down_proj[e]
        if residual is not None:
            gate_up_b, gate_up_a, down_b, down_a = (factor[s] for factor in residual)
            gate_up_w, down_w = gate_up_w + gate_up_b @ gate_up_a, down_w + down_b @ down_a
        if is_transposed:
            gate_up_w, down_w = gate_up_w.T, down_w.T
        gate_up_bias = None if gate_up_proj_bias is None else gate_up_proj_bias[e]
        down_bias = None if down_proj_bias is None else down_proj_bias[e]

        gate_up_N2I = F.linear(hidden_states[token_N], gate_up_w, gate_up_bias)
        if is_concatenated:
            gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
        else:
            gate_NI, up_NI = gate_up_N2I[:, ::2], gate_up_N2I[:, 1::2]
        if activation.startswith("clamped"):
            gate_NI, up_NI = gate_NI.clamp(max=swiglu_limit), up_NI.clamp(-swiglu_limit, swiglu_limit)
        if activation == "clamped_swiglu":
            h_NI = gate_NI * torch.sigmoid(swiglu_alpha * gate_NI) * (up_NI + 1)
        elif activation == "clamped_silu":
            h_NI = F.silu(gate_NI) * up_NI
        else:
            h_NI = _ACTIVATIONS[activation](gate_NI) * up_NI
        out_NH = F.linear(h_NI, down_w, down_bias)
        y_TH = y_TH.index_add(0, token_N, out_NH.to(dtype) * top_k_weights[token_N, k_N, None].to(dtype))
    return y_TH.to(hidden_states.dtype)

"""The experts of one MoE layer in plain torch: what is computed, with nothing done for speed.

Run it in float64 to judge a kernel. Autograd gives every gradient: hidden states, routing weights, projections, biases.

Shape suffixes: T tokens, H hidden size, I expert intermediate size, E experts in the pool, R router width (R = E
without a slot map), K top-k, N rows of one expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
ACTIVATIONS = (*_ACTIVATIONS, "clamped_silu", "clamped_swiglu")  # every name that `activation` may have


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
) -> Tensor:
    """Return `y [T, H]`, y = sum_k w_k * down_e(act(gate_e(x)) * up_e(x)) with e = slot_map[top_k_index[t, k]].

    The flags mean what transformers' `use_experts_implementation` declares by the same names.

    Args:
        hidden_states: `[T, H]`, floating point.
        top_k_index: `[T, K]` int64 in `[0, R]`. R marks an inactive slot: it is not computed and its weight is not read.
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

    Returns:
        `[T, H]` in the dtype of `hidden_states`, summed over K in float32 or wider.

    Raises:
        ValueError: shapes that do not fit together, an index that is not int64 or out of range, an unknown activation.
    """
    num_experts = gate_up_proj.size(0)
    _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, is_transposed, slot_map, activation)
    pool_index_TK = top_k_index
    if slot_map is not None:
        inactive = slot_map.new_full((1,), num_experts)
        pool_index_TK = torch.cat([slot_map, inactive])[top_k_index]

    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    y_TH = torch.zeros_like(hidden_states, dtype=dtype)
    active = [e for e in pool_index_TK.unique().tolist() if e < num_experts]
    # With nothing active, expert 0 on zero rows costs nothing and leaves zero gradients instead of missing ones.
    for e in active or [0]:
        token_N, k_N = (pool_index_TK == e).nonzero(as_tuple=True)
        gate_up_w, down_w = gate_up_proj[e], down_proj[e]
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


def _check(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    is_transposed: bool,
    slot_map: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError for what a caller can get wrong; reads the indices, so it waits for the device."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3:
        raise ValueError(
            f"gate_up_proj and down_proj must be 3-D, one matrix per expert; found {tuple(gate_up_proj.shape)} "
            f"and {tuple(down_proj.shape)}"
        )
    E, two_I, H = gate_up_proj.transpose(1, 2).shape if is_transposed else gate_up_proj.shape
    expected = (E, two_I // 2, H) if is_transposed else (E, H, two_I // 2)
    if two_I % 2 or tuple(down_proj.shape) != expected:
        raise ValueError(
            f"gate_up_proj {tuple(gate_up_proj.shape)} with is_transposed={is_transposed} needs an even 2I and "
            f"a down_proj of {expected}; found down_proj {tuple(down_proj.shape)}"
        )
    if hidden_states.dim() != 2 or hidden_states.size(1) != H:
        raise ValueError(f"hidden_states must be [T, {H}] to fit the pool; found {tuple(hidden_states.shape)}")
    if top_k_index.shape != top_k_weights.shape or top_k_index.dim() != 2 or len(top_k_index) != len(hidden_states):
        raise ValueError(
            f"top_k_index and top_k_weights must both be [T, K] with T={len(hidden_states)}; found "
            f"{tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}"
        )
    if top_k_index.dtype != torch.int64 or (slot_map is not None and slot_map.dtype != torch.int64):
        found = top_k_index.dtype if slot_map is None else f"{top_k_index.dtype} and {slot_map.dtype}"
        raise ValueError(f"top_k_index and slot_map must be int64; found {found}")
    num_slots = E if slot_map is None else len(slot_map)
    _check_range("top_k_index", top_k_index, num_slots, f" ({num_slots} marks an inactive slot)")
    if slot_map is not None:
        _check_range("slot_map", slot_map, E - 1)


def _check_range(name: str, index: Tensor, last: int, remark: str = "") -> None:
    if index.numel() and not (index.min() >= 0 and index.max() <= last):
        found = f"{index.min().item()} to {index.max().item()}"
        raise ValueError(f"{name} must lie in [0, {last}]{remark}; found {found}")

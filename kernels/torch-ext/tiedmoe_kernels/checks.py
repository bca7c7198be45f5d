"""What callers of the entry points can get wrong, each as a ValueError: what was found, what fits, what to do.

Shape suffixes as in `spec.py`.
"""

import torch
from torch import Tensor

from .spec import ACTIVATIONS, Factors, Spec, Weights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_arguments(
    hidden_states: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    weights: Weights,
    slot_map: Tensor | None,
    residual: Factors | None,
    spec: Spec,
) -> None:
    """Check everything about a call that can be known without reading a tensor, so that no device is waited for."""
    check_shapes(hidden_states, index, top_k_weights, weights, slot_map, residual, spec)
    dtype, device = weights[0].dtype, hidden_states.device
    known = (*_DTYPES, torch.float64) if device.type == "cpu" else _DTYPES
    if dtype not in known:
        names = ", ".join(str(d) for d in known)
        raise ValueError(
            f"expert weights on {device.type} must be one of {names}; found {dtype}. Convert them with .to(), or use "
            'experts_implementation="eager"'
        )
    for w in weights:
        if w is not None and w.dtype != dtype:
            raise ValueError(
                f"expert weights and biases must have one dtype; found {dtype} and {w.dtype}: convert one of them"
            )
    for name, found in (("hidden_states", hidden_states.dtype), ("top_k_weights", top_k_weights.dtype)):
        if found not in (*_DTYPES, torch.float64):
            raise ValueError(
                f"{name} must be bfloat16, float16, float32 or float64; found {found}: convert it with .to()"
            )
    factors = residual or ()
    for tensor in (hidden_states, *weights, *factors):
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                "a DTensor (tensor parallel) reached the experts; expected plain tensors of this device: unshard them "
                'first, or use experts_implementation="grouped_mm"'
            )
    for tensor in (index, top_k_weights, slot_map, *weights, *factors):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"every tensor must be on {device}, where hidden_states is; found one on {tensor.device}: "
                "move it there"
            )


def check_shapes(
    hidden_states: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    weights: Weights,
    slot_map: Tensor | None,
    residual: Factors | None,
    spec: Spec,
) -> None:
    """Check that the activation is known, that all shapes fit together and that indices are int64."""
    gate_up, down, gate_up_bias, down_bias = weights
    if spec.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {spec.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            "gate_up_proj and down_proj must be 3-D, one matrix per expert; found "
            f"{tuple(gate_up.shape)} and {tuple(down.shape)}: stack the experts' matrices"
        )
    E, two_I, H = gate_up.shape
    if spec.is_transposed:
        two_I, H = H, two_I
    expected = (E, two_I // 2, H) if spec.is_transposed else (E, H, two_I // 2)
    if two_I % 2 or tuple(down.shape) != expected:
        raise ValueError(
            f"gate_up_proj {tuple(gate_up.shape)} with is_transposed={spec.is_transposed} needs an even 2I and "
            f"a down_proj of {expected}; found down_proj {tuple(down.shape)}"
        )
    for name, bias, shape in (("gate_up_proj_bias", gate_up_bias, (E, two_I)), ("down_proj_bias", down_bias, (E, H))):
        if bias is not None and tuple(bias.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit the pool; found {tuple(bias.shape)}")
    if hidden_states.dim() != 2 or hidden_states.size(1) != H:
        raise ValueError(f"hidden_states must be [T, {H}] to fit the pool; found {tuple(hidden_states.shape)}")
    if index.dim() != 2 or index.shape != top_k_weights.shape or index.size(0) != hidden_states.size(0):
        raise ValueError(
            f"top_k_index and top_k_weights must both be [T, K] with T={hidden_states.size(0)}; found "
            f"{tuple(index.shape)} and {tuple(top_k_weights.shape)}"
        )
    if slot_map is not None and slot_map.dim() != 1:
        raise ValueError(f"slot_map must be [R], one pool row per router index; found {tuple(slot_map.shape)}")
    if index.dtype != torch.int64 or (slot_map is not None and slot_map.dtype != torch.int64):
        found = index.dtype if slot_map is None else f"{index.dtype} and {slot_map.dtype}"
        raise ValueError(f"top_k_index and slot_map must be int64; found {found}: convert with .long()")
    if residual is not None:
        _check_residual(residual, weights, E if slot_map is None else slot_map.size(0))


def _check_residual(residual: Factors, weights: Weights, num_slots: int) -> None:
    if len(residual) != 4:
        raise ValueError(
            f"residual must be b and a of gate_up_proj, b and a of down_proj; found {len(residual)} tensors"
        )
    for name, weight, b, a in zip(("gate_up_proj", "down_proj"), weights[:2], residual[::2], residual[1::2]):
        _, rows, columns = weight.shape
        rank = b.size(2) if b.dim() == 3 else 0
        if rank == 0 or tuple(b.shape) != (num_slots, rows, rank) or tuple(a.shape) != (num_slots, rank, columns):
            raise ValueError(
                f"the residual of {name} must be b [{num_slots}, {rows}, r] and a [{num_slots}, r, {columns}], a pair "
                f"per router index; found {tuple(b.shape)} and {tuple(a.shape)}"
            )
        if not (b.is_floating_point() and a.is_floating_point()):
            raise ValueError(
                f"the residual of {name} must be of floating point; found {b.dtype} and {a.dtype}: "
                "convert it with .to()"
            )


def check_indices(index: Tensor, slot_map: Tensor | None, E: int) -> None:
    """Check that every index names a slot or marks an inactive one, and every slot a row of the pool; reads both."""
    R = E if slot_map is None else slot_map.numel()
    _check_range("top_k_index", index, R, f" ({R} marks an inactive slot)")
    if slot_map is not None:
        _check_range("slot_map", slot_map, E - 1)


def _check_range(name: str, index: Tensor, last: int, remark: str = "") -> None:
    if not index.numel():
        return
    low, high = (bound.item() for bound in index.aminmax())
    if low < 0 or high > last:
        raise ValueError(f"{name} must lie in [0, {last}]{remark}; found {low} to {high}")

"""`experts_forward`: checks, autocast, the backend of the device, and the gradients.

Eager calls go through an `autograd.Function` straight to the backend (dispatching an operator costs microseconds), with
the weight gradient deferred where `deferred.py` says so. Under `torch.compile` the same backend is reached through
custom operators with fake implementations; each layer then computes its own weight gradient, in the compute dtype.
"""

import contextlib
import functools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import deferred
from .deferred import Ledger, Weights
from .ops_namespace import add_op_namespace_prefix
from .reference import ACTIVATIONS
from .spec import Segment, Spec

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def experts_forward(
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
    recompute: bool = False,
) -> Tensor:
    """Return `y [T, H]`, y = sum_k w_k * down_e(act(gate_e(x)) * up_e(x)) with e = slot_map[top_k_index[t, k]].

    What `experts_forward_reference` computes, whose docstring says what the activations are. Differentiable once,
    with respect to `hidden_states`, `top_k_weights`, the projections and the biases.

    Args:
        hidden_states: `[T, H]`, floating point.
        top_k_index: `[T, K]` int64 in `[0, R]`. R marks an inactive slot, which costs nothing. On a GPU the range is
            not checked (it would make the host wait): an index outside of it counts as inactive.
        top_k_weights: `[T, K]`, floating point; not read at inactive slots.
        gate_up_proj: `[E, 2I, H]`, or `[E, H, 2I]` if `is_transposed`; bfloat16, float16, float32, or float64 on a CPU.
        down_proj: `[E, H, I]`, or `[E, I, H]` if `is_transposed`; the same dtype.
        activation: one of `ACTIVATIONS`.
        swiglu_alpha: alpha of "clamped_swiglu".
        swiglu_limit: limit of "clamped_swiglu" and "clamped_silu".
        gate_up_proj_bias: `[E, 2I]`, default none; the same dtype.
        down_proj_bias: `[E, H]`, default none; the same dtype.
        is_transposed: the projections are stored `[E, in, out]`.
        is_concatenated: gate and up are stored as two halves; False: interleaved, gate0, up0, gate1, up1, ...
        slot_map: `[R]` int64, the pool row that each router index reads, default the identity (R = E).
        recompute: keep only the layer's input and routing for the backward pass, and compute the pre-activation again.

    Returns:
        `[T, H]` in the dtype of `hidden_states`. Computed in the weights' dtype, or in autocast's where that is on,
        and accumulated in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown activation, a device without a
            backend; in the backward pass, `create_graph=True`.
        ImportError: the tensors are on a GPU and triton is not installed.
    """
    spec = Spec(activation, swiglu_alpha, swiglu_limit, is_transposed, is_concatenated)
    weights: Weights = (gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias)
    _check(hidden_states, top_k_index, top_k_weights, weights, slot_map, spec)
    device = hidden_states.device.type
    backend = None if torch.compiler.is_compiling() else _backend(device)
    dtype = gate_up_proj.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    is_trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden_states, top_k_weights, *weights)
    )
    if backend is None:
        return _traced(
            hidden_states, top_k_index, top_k_weights, weights, slot_map, spec, dtype, is_trained, recompute
        )

    if not is_trained:
        x, inputs = _contiguous(hidden_states, top_k_index, top_k_weights, weights, slot_map, dtype)
        with _no_autocast(device):
            return backend.forward(x, *inputs, spec, False)[0].to(hidden_states.dtype)
    call = _Call(backend, spec, dtype, recompute, deferred.gradient_dtype(weights), None)
    token = None
    if (gate := deferred.gate(weights, spec, dtype, backend)) is not None:
        token, ledger, weights = gate
        call = call._replace(ledger=ledger)
    return _Experts.apply(token, hidden_states, top_k_weights, *weights, top_k_index, slot_map, call)


class _Call(NamedTuple):
    """What one eager call of a layer is, besides its tensors."""

    backend: ModuleType
    spec: Spec
    dtype: torch.dtype
    recompute: bool
    gradient_dtype: torch.dtype
    ledger: Ledger | None


class _Experts(torch.autograd.Function):
    """One layer. With a ledger the weights come detached and `token` stands for them in the graph."""

    @staticmethod
    def forward(
        ctx,
        token: Tensor | None,
        hidden_states: Tensor,
        top_k_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        index: Tensor,
        slot_map: Tensor | None,
        call: _Call,
    ) -> Tensor:
        weights = (gate_up, down, gate_up_bias, down_bias)
        x, inputs = _contiguous(hidden_states, index, top_k_weights, weights, slot_map, call.dtype)
        with _no_autocast(x.device.type):
            y, pre, order, offsets = _forward_for_backward(call.backend, x, inputs, call.spec, not call.recompute)
        ctx.save_for_backward(x, *inputs[1:6], pre, order, offsets)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.hidden_dtype = call, hidden_states.dtype
        ctx.is_there = [w is not None for w in weights]
        ctx.in_backward = torch._C._current_graph_task_id() != -1
        return y.to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None) -> tuple:
        if grad_y is None:
            return (None,) * 10
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph=True: experts_forward is differentiable once; for second derivatives use "
                'experts_forward_reference, or experts_implementation="eager"'
            )
        call: _Call = ctx.call
        ledger = call.ledger
        _, needs_x, needs_w, *needs = ctx.needs_input_grad[:7]
        needs_segment = any(needs) if ledger is None else deferred.is_wanted(ctx.next_functions[0][0])
        if ledger is None and needs_segment and ctx.in_backward:
            deferred.say_once(
                "The gradient of expert weights is not deferred in reentrant gradient checkpointing; "
                'gradient_checkpointing_kwargs={"use_reentrant": False} lets tied layers share one computation.'
            )
        x, w, gate_up, down, gate_up_bias, down_bias, pre, order, offsets = ctx.saved_tensors
        grad_y = grad_y.to(call.dtype).contiguous()
        grad_weights: tuple[Tensor | None, ...] = (None,) * 4
        with _no_autocast(x.device.type):
            grad_x, grad_w, grad_pre, hidden = call.backend.backward_data(
                grad_y, x, w, gate_up, down, gate_up_bias, down_bias, pre, order, offsets, call.spec, needs_x, needs_segment
            )  # fmt: skip
            if needs_segment:
                segment = Segment(x, grad_y, grad_pre, hidden, order, offsets, w)
                if ledger is not None:
                    ledger.leave(segment)
                else:
                    grad_weights = deferred.weight_gradients(
                        call.backend,
                        [segment],
                        call.spec,
                        call.gradient_dtype,
                        tuple(needs),
                        deferred.targets(ctx.next_functions[2:], ctx.is_there),
                    )
        grad_hidden = grad_x.to(ctx.hidden_dtype) if needs_x else None
        return None, grad_hidden, grad_w if needs_w else None, *grad_weights, None, None, None


@functools.cache
def _backend(device_type: str) -> ModuleType:
    """The module that computes on a device; looked up at every call, so that a test can replace this function."""
    if device_type == "cpu":
        from . import torch_backend

        return torch_backend
    if device_type in ("cuda", "hip"):
        try:
            from . import triton_backend
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            raise ImportError(
                "experts_forward on a GPU needs triton>=3.6, which is not installed; install the torch wheel of your "
                "GPU, which brings it, or pip install 'triton>=3.6'"
            ) from error
        return triton_backend
    raise ValueError(
        f"experts_forward has no backend for device {device_type!r}; expected cpu or cuda (ROCm included). "
        'Use experts_implementation="grouped_mm" there'
    )


def _forward_for_backward(
    backend: ModuleType, x: Tensor, inputs: tuple, spec: Spec, save_pre: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backend.forward`, whose order and offsets a backward pass will read."""
    # So few slots a backend may compute without sorting them unless asked for the pre-activation, which is small then.
    few = x.size(0) * inputs[0].size(1) <= getattr(backend, "MAX_DECODE_SLOTS", 0)
    return backend.forward(x, *inputs, spec, save_pre or few)


def _contiguous(
    hidden_states: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    weights: Weights,
    slot_map: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple]:
    """What a backend takes: x, and (index, weights, gate_up, down, gate_up_bias, down_bias, slot_map)."""
    cast = (None if w is None else w.to(dtype).contiguous() for w in weights)
    slot_map = None if slot_map is None else slot_map.contiguous()
    return hidden_states.to(dtype).contiguous(), (index.contiguous(), top_k_weights.contiguous(), *cast, slot_map)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast would round the float32 parts of a backend."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _check(
    hidden_states: Tensor, index: Tensor, top_k_weights: Tensor, weights: Weights, slot_map: Tensor | None, spec: Spec
) -> None:
    """Raise ValueError for what a caller can get wrong, reading no tensor."""
    gate_up, down, gate_up_bias, down_bias = weights
    if spec.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {spec.activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            "gate_up_proj and down_proj must be 3-D, one matrix per expert; found "
            f"{tuple(gate_up.shape)} and {tuple(down.shape)}"
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
        raise ValueError(f"top_k_index and slot_map must be int64; found {found}")
    _check_dtypes_and_devices(hidden_states, index, top_k_weights, weights, slot_map)


def _check_dtypes_and_devices(
    hidden_states: Tensor, index: Tensor, top_k_weights: Tensor, weights: Weights, slot_map: Tensor | None
) -> None:
    dtype, device = weights[0].dtype, hidden_states.device
    known = (*_DTYPES, torch.float64) if device.type == "cpu" else _DTYPES
    if dtype not in known:
        names = ", ".join(str(d) for d in known)
        raise ValueError(f"expert weights on {device.type} must be one of {names}; found {dtype}")
    for w in weights:
        if w is not None and w.dtype != dtype:
            raise ValueError(f"expert weights and biases must have one dtype; found {dtype} and {w.dtype}")
    for name, found in (("hidden_states", hidden_states.dtype), ("top_k_weights", top_k_weights.dtype)):
        if found not in (*_DTYPES, torch.float64):
            raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; found {found}")
    for tensor in (hidden_states, *weights):
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                "a DTensor (tensor parallel) reached the experts; expected plain tensors of this device: unshard them "
                'first, or use experts_implementation="grouped_mm"'
            )
    for tensor in (index, top_k_weights, slot_map, *weights):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"every tensor must be on {device}, where hidden_states is; found one on {tensor.device}: move it there"
            )


# What follows is used under torch.compile only.


def _traced(
    hidden_states: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    weights: Weights,
    slot_map: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
    is_trained: bool,
    recompute: bool,
) -> Tensor:
    x, inputs = _contiguous(hidden_states, index, top_k_weights, weights, slot_map, dtype)
    if is_trained:
        _say_if_deferred()
        y = _experts_op(x, *inputs, *spec, not recompute)[0]
    else:
        y = _inference_op(x, *inputs, *spec)
    return y.to(hidden_states.dtype)


@torch.compiler.assume_constant_result
def _say_if_deferred() -> None:
    """Runs once, when the graph is traced."""
    if deferred.in_scope():
        deferred.say_once("The gradient of expert weights is not deferred under torch.compile.")


@torch.library.custom_op(add_op_namespace_prefix("experts_inference"), mutates_args=())
def _inference_op(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, slot_map: Tensor | None, activation: str, alpha: float, limit: float,
    is_transposed: bool, is_concatenated: bool,
) -> Tensor:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    inputs = (index, weights, gate_up, down, gate_up_bias, down_bias, slot_map)
    with _no_autocast(x.device.type):
        return _backend(x.device.type).forward(x, *inputs, spec, False)[0]


@_inference_op.register_fake
def _(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(add_op_namespace_prefix("experts"), mutates_args=())
def _experts_op(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, slot_map: Tensor | None, activation: str, alpha: float, limit: float,
    is_transposed: bool, is_concatenated: bool, save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    inputs = (index, weights, gate_up, down, gate_up_bias, down_bias, slot_map)
    with _no_autocast(x.device.type):
        y, pre, order, offsets = _forward_for_backward(_backend(x.device.type), x, inputs, spec, save_pre)
    return y, pre if save_pre else x.new_empty(0), order, offsets


@_experts_op.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest):
    is_transposed, save_pre = rest[6], rest[8]
    N, two_I = index.numel(), 2 * down.size(1 if is_transposed else 2)
    pre = x.new_empty((N, two_I) if save_pre else 0)
    return (
        torch.empty_like(x),
        pre,
        index.new_empty(N, dtype=torch.int32),
        index.new_empty(gate_up.size(0) + 1, dtype=torch.int32),
    )


@torch.library.custom_op(add_op_namespace_prefix("experts_backward_data"), mutates_args=())
def _backward_data_op(
    grad_output: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, pre: Tensor, order: Tensor, offsets: Tensor, activation: str, alpha: float, limit: float,
    is_transposed: bool, is_concatenated: bool, needs_hidden_grad: bool, needs_segment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    with _no_autocast(x.device.type):
        grad_x, grad_weights, grad_pre, hidden = _backend(x.device.type).backward_data(
            grad_output, x, weights, gate_up, down, gate_up_bias, down_bias, pre, order, offsets, spec,
            needs_hidden_grad, needs_segment,
        )  # fmt: skip
    if not needs_hidden_grad:
        grad_x = x.new_empty(0)
    if not needs_segment:
        grad_pre, hidden = x.new_empty(0), x.new_empty(0)
    return grad_x, grad_weights, grad_pre, hidden


@_backward_data_op.register_fake
def _(grad_output: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest):
    is_transposed, needs_hidden_grad, needs_segment = rest[8], rest[10], rest[11]
    N, I = weights.numel(), down.size(1 if is_transposed else 2)
    return (
        torch.empty_like(x) if needs_hidden_grad else x.new_empty(0),
        torch.empty_like(weights),
        x.new_empty((N, 2 * I) if needs_segment else 0),
        x.new_empty((N, I) if needs_segment else 0),
    )


@torch.library.custom_op(add_op_namespace_prefix("experts_backward_weight"), mutates_args=())
def _backward_weight_op(
    x: Tensor, grad_output: Tensor, grad_pre: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, weights: Tensor,
    activation: str, alpha: float, limit: float, is_transposed: bool, is_concatenated: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    segment = Segment(x, grad_output, grad_pre, hidden, order, offsets, weights)
    with _no_autocast(x.device.type):
        gradients = _backend(x.device.type).backward_weight([segment], spec, x.dtype, tuple(needs))
    # An operator's outputs must not share memory, not even none.
    a, b, c, d = (g if need else x.new_empty(0) for g, need in zip(gradients, needs))
    return a, b, c, d


@_backward_weight_op.register_fake
def _(x: Tensor, grad_output: Tensor, grad_pre: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, *rest):
    is_transposed, needs = rest[4], rest[6]
    E, H, I = offsets.size(0) - 1, x.size(1), hidden.size(1)
    gate_up, down = ((E, H, 2 * I), (E, I, H)) if is_transposed else ((E, 2 * I, H), (E, H, I))
    shapes = (gate_up, down, (E, 2 * I), (E, H))
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs))


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, _, *weights = inputs[:7]
    ctx.save_for_backward(x, *weights, *output[1:])
    ctx.spec = Spec(*inputs[8:13])
    ctx.mark_non_differentiable(*output[1:])


def _traced_backward(ctx, grad_y: Tensor, *_) -> tuple:
    x, w, *rest = ctx.saved_tensors
    *weights, pre, order, offsets = rest
    needs_x, _, needs_w, *needs = ctx.needs_input_grad[:7]
    grad_y = grad_y.contiguous()
    grad_x, grad_w, grad_pre, hidden = _backward_data_op(
        grad_y, x, w, *weights, pre, order, offsets, *ctx.spec, needs_x, any(needs)
    )
    grad_weights: tuple = (None,) * 4
    if any(needs):
        gradients = _backward_weight_op(x, grad_y, grad_pre, hidden, order, offsets, w, *ctx.spec, needs)
        grad_weights = tuple(g if need else None for g, need in zip(gradients, needs))
    return grad_x if needs_x else None, None, grad_w if needs_w else None, *grad_weights, *(None,) * 7


_experts_op.register_autograd(_traced_backward, setup_context=_setup_context)

"""`experts_forward` and its gradients in eager calls, which go straight to the backend: a dispatch takes time.

The weight gradient is deferred where `deferred.py` says so. A call that `torch.compile` or `torch.export` traces goes
to `compile_ops.py` instead.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, compile_ops, deferred
from .checks import check_arguments, check_indices
from .deferred import Ledger
from .low_rank import Residual, offsets_of_pool, ordered_by_pool_row
from .spec import Factors, Segment, Spec, Weights


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
    residual: Factors | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return `y [T, H]`, y = sum_k w_k * down_e(act(gate_e(x)) * up_e(x)) with e = slot_map[top_k_index[t, k]].

    What `experts_forward_reference` computes, whose docstring says what the activations are. Differentiable once,
    with respect to `hidden_states`, `top_k_weights`, the projections, the biases and the residual.

    Args:
        hidden_states: `[T, H]`, floating point.
        top_k_index: `[T, K]` int64 in `[0, R]`. R marks an inactive slot, which costs nothing. On a GPU the range is
            not checked (it would make the host wait): an index outside of it counts as inactive.
        top_k_weights: `[T, K]`, floating point; not read at inactive slots.
        gate_up_proj: `[E, 2I, H]`, or `[E, H, 2I]` if `is_transposed`; bfloat16, float16, float32, on a CPU float64.
        down_proj: `[E, H, I]`, or `[E, I, H]` if `is_transposed`; the same dtype.
        activation: one of `ACTIVATIONS`.
        swiglu_alpha: alpha of "clamped_swiglu".
        swiglu_limit: limit of "clamped_swiglu" and "clamped_silu".
        gate_up_proj_bias: `[E, 2I]`, default none; the same dtype.
        down_proj_bias: `[E, H]`, default none; the same dtype.
        is_transposed: the projections are stored `[E, in, out]`.
        is_concatenated: gate and up are stored as two halves; False: interleaved, gate0, up0, gate1, up1, ...
        slot_map: `[R]` int64, the pool row that each router index reads, default the identity (R = E).
        residual: b and a of gate_up_proj, b and a of down_proj, default none. Router index s reads
            `W[e] + b[s] @ a[s]`, b `[R, rows, r]` and a `[R, r, columns]` of the projection as it is stored, floating
            point.
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
    check_arguments(hidden_states, top_k_index, top_k_weights, weights, slot_map, residual, spec)
    device, dtype = hidden_states.device.type, gate_up_proj.dtype
    backend = None if torch.compiler.is_compiling() else backends.backend_of(device)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    is_trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden_states, top_k_weights, *weights, *(residual or ()))
    )
    ordered = None
    if residual is not None:
        if device == "cpu" and backend is not None:  # of the caller's numbers: those that a backend sees are others
            check_indices(top_k_index, slot_map, gate_up_proj.size(0))
        ordered, slot_map = ordered_by_pool_row(residual, slot_map, gate_up_proj.size(0), is_transposed, dtype)
    if backend is None:
        x, inputs = backends.inputs_for(hidden_states, top_k_index, top_k_weights, weights, slot_map, dtype)
        return compile_ops.traced_forward(x, inputs, spec, ordered, is_trained, recompute).to(hidden_states.dtype)

    if not is_trained:
        x, inputs = backends.inputs_for(hidden_states, top_k_index, top_k_weights, weights, slot_map, dtype)
        with backends.no_autocast(device):
            return backend.forward(x, *inputs, spec, False, ordered)[0].to(hidden_states.dtype)
    call = _Call(backend, spec, dtype, recompute, deferred.gradient_dtype(weights), None)
    token = None
    if (gate := deferred.gate(weights, spec, dtype, backend)) is not None:
        token, ledger, weights = gate
        call = call._replace(ledger=ledger)
    return _Experts.apply(token, hidden_states, top_k_weights, *weights, top_k_index, slot_map, call, *(ordered or ()))


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
        *ordered: Any,
    ) -> Tensor:
        weights = (gate_up, down, gate_up_bias, down_bias)
        x, inputs = backends.inputs_for(hidden_states, index, top_k_weights, weights, slot_map, call.dtype)
        with backends.no_autocast(x.device.type):
            y, pre, order, offsets = backends.forward_for_backward(
                call.backend, x, inputs, call.spec, not call.recompute, Residual(*ordered) if ordered else None
            )
        ctx.save_for_backward(x, *inputs[1:6], pre, order, offsets, *ordered)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.hidden_dtype = call, hidden_states.dtype
        ctx.is_there = [w is not None for w in weights]
        ctx.in_backward = torch._C._current_graph_task_id() != -1
        return y.to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None) -> tuple:
        if grad_y is None:
            return (None,) * len(ctx.needs_input_grad)
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
        x, w, gate_up, down, gate_up_bias, down_bias, pre, order, offsets, *ordered = ctx.saved_tensors
        residual = Residual(*ordered) if ordered else None
        grad_y = grad_y.to(call.dtype).contiguous()
        grad_weights: tuple[Tensor | None, ...] = (None,) * 4
        with backends.no_autocast(x.device.type):
            grad_x, grad_w, grad_pre, hidden, grad_ordered = call.backend.backward_data(
                grad_y, x, w, gate_up, down, gate_up_bias, down_bias, pre, order, offsets,
                call.spec, needs_x, needs_segment, residual, any(ctx.needs_input_grad[10:]),
            )  # fmt: skip
            if needs_segment:
                segment = Segment(x, grad_y, grad_pre, hidden, order, offsets_of_pool(offsets, residual), w)
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
        grad_ordered = (*grad_ordered, None) if grad_ordered else (None,) * len(ordered)
        return None, grad_hidden, grad_w if needs_w else None, *grad_weights, None, None, None, *grad_ordered

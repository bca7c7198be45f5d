"""`experts_forward` under `torch.compile` and `torch.export`: custom operators with fake implementations.

They reach the same backends as eager calls. Each layer computes its own weight gradient, in the compute dtype. What a
`Spec` holds travels as single arguments, as an operator's schema wants it. Shape suffixes as in `spec.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, deferred
from .low_rank import Residual, offsets_of_pool
from .ops_namespace import add_op_namespace_prefix
from .spec import Segment, Spec


def traced_forward(
    x: Tensor, inputs: tuple, spec: Spec, residual: Residual | None, is_trained: bool, recompute: bool
) -> Tensor:
    """Return y `[T, H]` of what `backends.inputs_for` gives, through an operator that may be traced."""
    ordered = [tensor for tensor in residual or () if tensor is not None]
    if not is_trained:
        return _inference_op(x, *inputs, *spec, ordered)
    _say_if_deferred()
    return _experts_op(x, *inputs, *spec, not recompute, ordered)[0]


def _residual(ordered: Sequence[Tensor]) -> Residual | None:
    """Return the residual of the tensors it was made of; an operator takes no `None` among them."""
    return Residual(*ordered) if ordered else None


@torch.compiler.assume_constant_result
def _say_if_deferred() -> None:
    """Warn once, when the graph is traced."""
    if deferred.in_scope():
        deferred.say_once("The gradient of expert weights is not deferred under torch.compile.")


@torch.library.custom_op(add_op_namespace_prefix("experts_inference"), mutates_args=())
def _inference_op(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, slot_map: Tensor | None, activation: str, alpha: float, limit: float,
    is_transposed: bool, is_concatenated: bool, ordered: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    inputs = (index, weights, gate_up, down, gate_up_bias, down_bias, slot_map)
    with backends.no_autocast(x.device.type):
        return backends.backend_of(x.device.type).forward(x, *inputs, spec, False, _residual(ordered))[0]


@_inference_op.register_fake
def _(x: Tensor, *_) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(add_op_namespace_prefix("experts"), mutates_args=())
def _experts_op(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, slot_map: Tensor | None, activation: str, alpha: float, limit: float,
    is_transposed: bool, is_concatenated: bool, save_pre: bool, ordered: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    inputs = (index, weights, gate_up, down, gate_up_bias, down_bias, slot_map)
    with backends.no_autocast(x.device.type):
        y, pre, order, offsets = backends.forward_for_backward(
            backends.backend_of(x.device.type), x, inputs, spec, save_pre, _residual(ordered)
        )
    return y, pre if save_pre else x.new_empty(0), order, offsets


@_experts_op.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest):
    is_transposed, save_pre, ordered = rest[6], rest[8], rest[9]
    N, two_I = index.numel(), 2 * down.size(1 if is_transposed else 2)
    pre = x.new_empty((N, two_I) if save_pre else 0)
    return (
        torch.empty_like(x),
        pre,
        index.new_empty(N, dtype=torch.int32),
        index.new_empty((ordered[0] if ordered else gate_up).size(0) + 1, dtype=torch.int32),
    )


@torch.library.custom_op(add_op_namespace_prefix("experts_backward_data"), mutates_args=())
def _backward_data_op(
    grad_output: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None,
    down_bias: Tensor | None, pre: Tensor, order: Tensor, offsets: Tensor, activation: str, alpha: float, limit: float,
    is_transposed: bool, is_concatenated: bool, needs_hidden_grad: bool, needs_segment: bool,
    ordered: Sequence[Tensor], needs_residual_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    with backends.no_autocast(x.device.type):
        grad_x, grad_weights, grad_pre, hidden, grad_ordered = backends.backend_of(x.device.type).backward_data(
            grad_output, x, weights, gate_up, down, gate_up_bias, down_bias, pre, order, offsets, spec,
            needs_hidden_grad, needs_segment, _residual(ordered), needs_residual_grad,
        )  # fmt: skip
    if not needs_hidden_grad:
        grad_x = x.new_empty(0)
    if not needs_segment:
        grad_pre, hidden = x.new_empty(0), x.new_empty(0)
    return grad_x, grad_weights, grad_pre, hidden, list(grad_ordered)


@_backward_data_op.register_fake
def _(grad_output: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *rest):
    is_transposed, (needs_hidden_grad, needs_segment, ordered, needs_residual_grad) = rest[8], rest[10:]
    N, I = weights.numel(), down.size(1 if is_transposed else 2)
    return (
        torch.empty_like(x) if needs_hidden_grad else x.new_empty(0),
        torch.empty_like(weights),
        x.new_empty((N, 2 * I) if needs_segment else 0),
        x.new_empty((N, I) if needs_segment else 0),
        [torch.empty_like(factor) for factor in ordered[:4]] if needs_residual_grad else [],
    )


@torch.library.custom_op(add_op_namespace_prefix("experts_backward_weight"), mutates_args=())
def _backward_weight_op(
    x: Tensor, grad_output: Tensor, grad_pre: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor, weights: Tensor,
    activation: str, alpha: float, limit: float, is_transposed: bool, is_concatenated: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spec = Spec(activation, alpha, limit, is_transposed, is_concatenated)
    segment = Segment(x, grad_output, grad_pre, hidden, order, offsets, weights)
    with backends.no_autocast(x.device.type):
        gradients = backends.backend_of(x.device.type).backward_weight([segment], spec, x.dtype, tuple(needs))
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
    ctx.save_for_backward(x, *weights, *output[1:], *inputs[14])
    ctx.spec = Spec(*inputs[8:13])
    ctx.mark_non_differentiable(*output[1:])


def _traced_backward(ctx, grad_y: Tensor, *_) -> tuple:
    x, w, *rest = ctx.saved_tensors
    weights, (pre, order, offsets, *ordered) = rest[:4], rest[4:]
    needs_x, _, needs_w, *needs = ctx.needs_input_grad[:7]
    needs_residual_grad = any(ctx.needs_input_grad[14])
    grad_y = grad_y.contiguous()
    grad_x, grad_w, grad_pre, hidden, grad_ordered = _backward_data_op(
        grad_y, x, w, *weights, pre, order, offsets, *ctx.spec, needs_x, any(needs), ordered, needs_residual_grad
    )
    grad_ordered = [*grad_ordered, *[None] * (len(ordered) - len(grad_ordered))]
    grad_weights: tuple = (None,) * 4
    if any(needs):
        offsets = offsets_of_pool(offsets, _residual(ordered))
        gradients = _backward_weight_op(x, grad_y, grad_pre, hidden, order, offsets, w, *ctx.spec, needs)
        grad_weights = tuple(g if need else None for g, need in zip(gradients, needs))
    return grad_x if needs_x else None, None, grad_w if needs_w else None, *grad_weights, *(None,) * 7, grad_ordered


_experts_op.register_autograd(_traced_backward, setup_context=_setup_context)

"""Deferred weight gradients: layers that read one pool share one gradient computation per backward.

Inside `deferred_weight_gradients()` the first layer that reads a pool makes a gate: an autograd node whose inputs are
the pool's weights and whose only output is an empty token. Every layer takes the token and the weights detached, so in
the backward pass the engine runs the gate after all layers of that pass. A layer leaves a `Segment` in the gate's
ledger instead of returning weight gradients, and the gate makes one gradient of all of them. The gate saves no tensor,
so a checkpointed layer saves the same tensors whether it made the gate, found it, or is computed again without any.
"""

import contextvars
import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from .spec import Segment, Spec, Weights

logger = logging.getLogger(__name__)

Targets = tuple[torch.autograd.graph.Node | None, ...]  # where the gradient of each weight goes

_scope: "contextvars.ContextVar[_Scope | None]" = contextvars.ContextVar("tiedmoe_scope", default=None)


class deferred_weight_gradients:
    """Context of ONE forward pass of a model: calls of `experts_forward` with the same parameters share a gate.

    The backward pass may run inside or after it, once or more often, over all or some of the layers. Where the weight
    gradient cannot be deferred each layer computes its own, and it is said once why: under `torch.compile`, in
    reentrant gradient checkpointing, for weights that are not parameters but computed anew at each call.

    Example:
        >>> with deferred_weight_gradients():
        ...     for router in routers:
        ...         x = x + experts_forward(x, *router(x), gate_up_proj, down_proj)
        >>> x.sum().backward()  # computes the gradient of the two projections once
    """

    def __enter__(self) -> None:
        self._reset = None
        if not torch.compiler.is_compiling():
            self._reset = _scope.set(_Scope())

    def __exit__(self, *exception) -> None:
        if self._reset is not None:
            _scope.reset(self._reset)


class Ledger:
    """What the layers behind one gate have left, by backward pass, and how to make the gradient of it."""

    def __init__(self, backend: ModuleType, spec: Spec, out_dtype: torch.dtype):
        self.backend, self.spec, self.out_dtype = backend, spec, out_dtype
        self.segments: dict[int, list[tuple[Segment, torch.cuda.Stream | None]]] = {}

    def leave(self, segment: Segment) -> None:
        """Note what a layer's backward pass has to contribute."""
        x = segment.hidden_states
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self.segments.setdefault(torch._C._current_graph_task_id(), []).append((segment, stream))

    def settle(self, needs: tuple[bool, bool, bool, bool], targets: Targets) -> tuple[Tensor | None, ...]:
        """Return the weights' gradients over all segments of the running backward pass, None where not needed."""
        left = self.segments.pop(torch._C._current_graph_task_id(), [])
        if not left:  # no layer got a gradient
            return (None,) * 4
        for segment, stream in left:
            _wait_for(stream, segment)
        segments = [segment for segment, _ in left]
        left.clear()
        return weight_gradients(self.backend, segments, self.spec, self.out_dtype, needs, targets)


class Gate(torch.autograd.Function):
    """From the weights to the token."""

    @staticmethod
    def forward(ctx, ledger: Ledger, gate_up: Tensor, *others: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.ledger, ctx.is_there = ledger, [w is not None for w in (gate_up, *others)]
        return torch.empty(0, device=gate_up.device)

    @staticmethod
    def backward(ctx, _: None) -> tuple:
        return None, *ctx.ledger.settle(ctx.needs_input_grad[1:], targets(ctx.next_functions, ctx.is_there))


class _Pool:
    """One pool inside a scope. Holds its parameters, so that nothing else gets their ids meanwhile."""

    def __init__(self, weights: Weights, ledger: Ledger):
        self.weights, self.ledger = weights, ledger
        self.token: Tensor = Gate.apply(ledger, *weights)
        self.cast: Weights | None = None
        self.versions: list[int] = []

    def current(self, dtype: torch.dtype) -> Weights:
        """Return the weights without autograd in `dtype`: the parameters' own memory of now, or a copy made once."""
        if self.weights[0].dtype == dtype:
            return _detached(self.weights, dtype)
        versions = [w._version for w in self.weights if w is not None]
        if self.cast is None or versions != self.versions:  # a parameter may be stepped inside the scope
            self.cast, self.versions = _detached(self.weights, dtype), versions
        return self.cast


class _Scope:
    """The pools that one forward pass has read so far."""

    def __init__(self) -> None:
        self.graph_task = torch._C._current_graph_task_id()
        self.pools: dict[tuple, _Pool] = {}


def gate(
    weights: Weights, spec: Spec, dtype: torch.dtype, backend: ModuleType
) -> tuple[Tensor, Ledger, Weights] | None:
    """Return the token, the ledger and the detached weights in `dtype` to use in place of `weights`.

    None where the layer has to compute its own weight gradient.
    """
    scope = _scope.get()
    # Another backward pass than the scope's runs: a checkpointed layer is being computed again, for itself.
    if scope is None or scope.graph_task != torch._C._current_graph_task_id():
        return None
    trained = [w for w in weights if w is not None and w.requires_grad]
    if not trained:
        return None
    if not all(w.is_leaf for w in trained):
        say_once(
            "The gradient of expert weights is not deferred: they are computed anew at each call (a parametrization "
            "such as LoRA on pools), so that tied layers do not share one tensor."
        )
        return None
    key = (*map(id, weights), spec, dtype, id(backend))
    if key not in scope.pools:
        scope.pools[key] = _Pool(weights, Ledger(backend, spec, gradient_dtype(weights)))
    pool = scope.pools[key]
    return pool.token, pool.ledger, pool.current(dtype)


def is_wanted(gate_node: torch.autograd.graph.Node) -> bool:
    """Tell whether the running backward pass gets to the gate; `torch.autograd.grad` may ask for other inputs only."""
    return torch._C._will_engine_execute_node(gate_node)


def in_scope() -> bool:
    """Tell whether a scope is open in this thread."""
    return _scope.get() is not None


def gradient_dtype(weights: Weights) -> torch.dtype:
    """Return the dtype that gradients are written in: the parameters', or the widest `grad_dtype` asked for."""
    dtype = weights[0].dtype
    for w in weights:
        if w is not None and w.requires_grad and w.is_leaf:
            wanted = getattr(w, "grad_dtype", None)
            dtype = dtype if wanted is None else torch.promote_types(dtype, wanted)
    return dtype


def targets(next_functions: tuple, is_there: list[bool]) -> Targets:
    """Return for each weight the autograd node that its gradient goes to, None for a weight that is not there."""
    nodes = iter(next_functions)
    return tuple(next(nodes)[0] if there else None for there in is_there)


def weight_gradients(
    backend: ModuleType,
    segments: list[Segment],
    spec: Spec,
    out_dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool],
    targets: Targets,
) -> tuple[Tensor | None, ...]:
    """Call `backend.backward_weight`, written in `out_dtype` as far as it may be: the compute dtype or float32.

    A parameter that has a `.grad` gets its gradient added there by the kernel, in place, and None is returned for it.
    Autograd's own addition would read two gradients more and write one.
    """
    compute = segments[0].hidden.dtype
    written = out_dtype if out_dtype in (compute, torch.float32) else torch.promote_types(compute, torch.float32)
    into = tuple(_to_add_to(target, written) if need else None for target, need in zip(targets, needs))
    gradients = backend.backward_weight(segments, spec, written, needs, into)
    for grad in into:
        if grad is not None:
            torch.autograd.graph.increment_version(grad)
    return tuple(g if need and old is None else None for g, need, old in zip(gradients, needs, into))


def _to_add_to(target: torch.autograd.graph.Node | None, dtype: torch.dtype) -> Tensor | None:
    """Return the `.grad` of the parameter behind `target`, if adding to it here is what autograd would do next.

    Not for a parameter with hooks on its gradient, which are to get this pass's gradient from autograd.
    """
    if target is None or (parameter := getattr(target, "variable", None)) is None:
        return None
    grad = parameter.grad
    if grad is None or type(grad) is not Tensor or grad.dtype != dtype or not grad.is_contiguous():
        return None
    if grad.requires_grad or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return None
    try:
        return grad if torch._C._will_engine_execute_node(target) else None
    except RuntimeError:  # torch.autograd.grad asks for this parameter's gradient: `.grad` is none of its business
        return None


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, the first time only."""
    logger.warning(message)


def readable(weight: Tensor) -> Tensor:
    """Return a weight as the backends read it: matrices as they lie, by rows or by columns; else a contiguous copy."""
    if weight.dim() == 3 and 1 in weight.stride()[1:]:
        return weight
    if weight.dim() == 3:
        _say_copied()
    return weight.contiguous()


@torch.compiler.assume_constant_result
def _say_copied() -> None:
    say_once(
        "Expert weights are copied at every call: in neither direction are a matrix's elements side by side in "
        "memory. Keep them contiguous, as a transposed view, or as a slice of whole rows or columns."
    )


def _detached(weights: Weights, dtype: torch.dtype) -> Weights:
    gate_up, down, *biases = (None if w is None else readable(w.detach().to(dtype)) for w in weights)
    return gate_up, down, biases[0], biases[1]  # type: ignore[return-value]


def _wait_for(stream: torch.cuda.Stream | None, segment: Segment) -> None:
    """Let the current stream read what a layer has computed on `stream`."""
    if stream is None or stream == (current := torch.cuda.current_stream(stream.device)):
        return
    current.wait_stream(stream)
    for tensor in segment:
        tensor.record_stream(current)

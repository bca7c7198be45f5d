"""Which module computes on a device, and how it is called: what eager calls and the operators for compilers share."""

import contextlib
import functools
from types import ModuleType

import torch
from torch import Tensor

from .deferred import readable
from .low_rank import Residual
from .spec import Spec, Weights


@functools.cache
def backend_of(device_type: str) -> ModuleType:
    """Return the module that computes on a device.

    Raises:
        ValueError: no backend computes there.
        ImportError: the device is a GPU and triton is not installed.
    """
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


def inputs_for(
    hidden_states: Tensor,
    index: Tensor,
    top_k_weights: Tensor,
    weights: Weights,
    slot_map: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple]:
    """Return what a backend's `forward` takes: x, and (index, weights, *weights of the pool, slot_map).

    The projections may lie by rows or by columns with any distance between them; all else is contiguous.
    """
    cast = (None if w is None else readable(w.to(dtype)) for w in weights)
    slot_map = None if slot_map is None else slot_map.contiguous()
    return hidden_states.to(dtype).contiguous(), (index.contiguous(), top_k_weights.contiguous(), *cast, slot_map)


def forward_for_backward(
    backend: ModuleType, x: Tensor, inputs: tuple, spec: Spec, save_pre: bool, residual: Residual | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `backend.forward`'s results, whose order and offsets a backward pass will read."""
    # So few slots a backend may compute without sorting them unless asked for the pre-activation, which is small then.
    few = x.size(0) * inputs[0].size(1) <= getattr(backend, "MAX_DECODE_SLOTS", 0)
    return backend.forward(x, *inputs, spec, save_pre or few, residual)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Return a context without autocast, which would round the float32 parts of a backend."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()

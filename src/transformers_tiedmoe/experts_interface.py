"""`experts_implementation="tiedmoe"`: the kernels of `tiedmoe_kernels` for any gated family of transformers.

An experts module declares its layout but not its activation, so that is found by trying: the module's own
`_apply_gate` on a grid of values must give what one of the kernels' formulas gives. Nothing here imports triton.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from tiedmoe_kernels import ACTIVATIONS, deferred_weight_gradients, experts_forward, experts_forward_reference
from tiedmoe_kernels.deferred import say_once

from .errors import TiedMoeError
from .residual import Residual


class Activation(NamedTuple):
    """One of the kernels' formulas: the arguments of `experts_forward` that name it."""

    activation: str
    swiglu_alpha: float
    swiglu_limit: float


def tiedmoe_experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    residual: Residual | None = None,
) -> torch.Tensor:
    """Run an experts module on `tiedmoe_kernels.experts_forward`, under the contract of `grouped_mm_experts_forward`.

    Args:
        self: an experts module of `@use_experts_implementation`; its config's `recompute_experts`, where there is one,
            says whether the pre-activation is computed again in the backward pass instead of being kept.
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]` int64; the number of experts, or more, marks an inactive slot (expert parallelism).
        top_k_weights: `[T, K]`.
        residual: of the tied layer that calls, whose own slots `top_k_index` are then.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        TiedMoeError: experts without a gate, with a norm after each expert, or with an unknown activation.
    """
    activation = activation_of(self)  # which refuses experts without a gate
    has_bias, slot_map, factors = self.has_bias, None, None
    if residual is not None:
        slot_map, factors = residual.slot_map, (*residual.factors["gate_up_proj"], *residual.factors["down_proj"])
    return experts_forward(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        **activation._asdict(),
        gate_up_proj_bias=self.gate_up_proj_bias if has_bias else None,
        down_proj_bias=self.down_proj_bias if has_bias else None,
        is_transposed=self.is_transposed,
        is_concatenated=self.is_concatenated,
        slot_map=slot_map,
        residual=factors,
        recompute=getattr(self.config, "recompute_experts", False),
    )


def activation_of(experts: nn.Module) -> Activation:
    """Return the formula that an experts module computes, found at its first call and kept in the module.

    Raises:
        TiedMoeError: the kernels cannot compute this module.
    """
    if torch.compiler.is_dynamo_compiling():
        return Activation(*_activation_while_tracing(experts))
    if torch.compiler.is_compiling():  # torch.export traces by modes of this thread; another thread has none
        with ThreadPoolExecutor(1) as untraced:
            return Activation(*untraced.submit(_find_activation, experts).result())
    return Activation(*_find_activation(experts))


@torch.compiler.assume_constant_result
def _activation_while_tracing(experts: nn.Module) -> tuple[str, float, float]:
    return _find_activation(experts)


def _find_activation(experts: nn.Module) -> tuple[str, float, float]:
    known = experts.__dict__.get("_tiedmoe_activation")
    if known is None:  # in the module's __dict__: copies, pickles and pools made of it have it, too
        known = experts.__dict__["_tiedmoe_activation"] = tuple(_try_activations(experts))
    return known


@torch.no_grad()
def _try_activations(experts: Any) -> Activation:
    name, instead = type(experts).__name__, 'use experts_implementation="grouped_mm"'
    if not experts.has_gate:
        raise TiedMoeError(
            f"{name} has experts without a gate, which experts_implementation='tiedmoe' needs; {instead}"
        )
    if getattr(experts, "has_post_expert_norm", False):
        raise TiedMoeError(
            f"{name} has a norm after each expert, which experts_implementation='tiedmoe' does not know; {instead}"
        )
    limit = _number(experts, "limit", "swiglu_limit")
    alpha = _number(experts, "alpha", "swiglu_alpha")
    # Around zero, at the extremes, and on both sides of the limits; every pair of a gate and an up.
    edges = [30.0, 1000.0] + ([] if limit is None else [0.9 * limit, limit, 1.1 * limit, 3 * limit])
    values = [*(i / 4 for i in range(-24, 25)), *edges, *(-edge for edge in edges)]
    candidates = [
        Activation(activation, 1.702 if alpha is None else alpha, 7.0 if limit is None else limit)
        for activation in ACTIVATIONS
        if limit is not None or not activation.startswith("clamped")
    ]
    with torch.device("cpu"):  # a model may be in construction on the meta device
        # I = 1: gate and up are side by side in both layouts
        gate_up = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * 2)
        computed = experts._apply_gate(gate_up).double()
        for candidate in candidates:
            expected = _formula(candidate, gate_up)
            if computed.shape == expected.shape and torch.allclose(computed, expected, rtol=1e-5, atol=1e-6):
                return candidate
    raise TiedMoeError(
        f"{name} computes act(gate) * up with none of the formulas that experts_implementation='tiedmoe' knows "
        f"({', '.join(ACTIVATIONS)}); {instead}"
    )


def _formula(found: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """Compute an activation of `gate_up [N, 2]` by the kernels' reference: its weights pass the values through."""
    return experts_forward_reference(
        gate_up,
        torch.zeros(len(gate_up), 1, dtype=torch.int64),
        torch.ones(len(gate_up), 1, dtype=gate_up.dtype),
        torch.eye(2, dtype=gate_up.dtype)[None],
        torch.tensor([[[1.0], [0.0]]], dtype=gate_up.dtype),
        **found._asdict(),
    )[:, :1]


def _number(experts: nn.Module, *names: str) -> float | None:
    for name in names:
        if isinstance(value := getattr(experts, name, None), (int, float)) and math.isfinite(value):
            return float(value)
    return None


def is_default_for(experts: nn.Module) -> bool:
    """Tell whether our kernels are the default for `experts`: on a GPU that they support, if they know the formula."""
    if not (torch.cuda.is_available() and has_triton()):
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):  # older chips were never tried
        return False
    try:
        activation_of(experts)
    except ValueError:
        return False
    return True


def has_triton() -> bool:
    """Tell whether triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def defer_weight_gradients(family_forward: Callable) -> Callable:
    """Wrap a base model's `forward`: tied layers compute the weight gradient of their pool once per backward pass."""

    @functools.wraps(family_forward)
    def forward(self, *args, **kwargs):
        if self.config._experts_implementation != "tiedmoe":
            return family_forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            if self.training:
                _say_not_deferred()
            return family_forward(self, *args, **kwargs)
        with deferred_weight_gradients():
            return family_forward(self, *args, **kwargs)

    return forward


@torch.compiler.assume_constant_result
def _say_not_deferred() -> None:
    say_once("The gradient of expert weights is not deferred under torch.compile.")

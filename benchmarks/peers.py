"""The implementations that are timed against each other, each behind one signature.

A peer that is not installed, does not fit or fails says so by an exception or a reason; nothing is skipped in silence.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable

import torch
from shapes import Case
from torch import Tensor, nn

from tiedmoe_kernels import deferred_weight_gradients, experts_forward

# x [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """`build(gate_up [E, 2I, H], down [E, H, I])` returns the layer; the same parameters serve a whole group."""

    name: str
    build: Callable[[nn.Parameter, nn.Parameter], Layer]
    trains: bool = True
    capturable: bool = True  # False: it waits for the device, which no CUDA graph can hold
    slow_to_prepare: bool = False  # compiles and tunes for a minute: its turn comes when all others are measured
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around one forward of a model


def tiedmoe_layer(gate_up: nn.Parameter, down: nn.Parameter, recompute: bool = False) -> Layer:
    return lambda x, index, weights: experts_forward(x, index, weights, gate_up, down, recompute=recompute)


def transformers_layer(implementation: str, gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """Return OLMoE's experts of transformers, which are those of every gated family here, on these parameters."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    E, H, I = down.shape
    config = OlmoeConfig(hidden_size=H, intermediate_size=I, num_experts=E)
    config._experts_implementation = implementation
    with torch.device("meta"):  # the pool is there already
        experts = OlmoeExperts(config)
    experts.gate_up_proj, experts.down_proj = gate_up, down
    return experts


def liger_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """Call it as `LigerExperts.forward` of liger-kernel 0.8.5 does: indices in int32."""
    from liger_kernel.ops import LigerFusedMoEFunction, fused_moe_kernels

    for kernel in vars(fused_moe_kernels).values():
        if hasattr(kernel, "configs") and "run" not in vars(kernel):
            kernel.run = functools.partial(run_compiled_at_once, kernel, kernel.run, set())
    return lambda x, index, weights: LigerFusedMoEFunction.apply(x, gate_up, down, index.to(torch.int32), weights)


def run_compiled_at_once(kernel, run: Callable, known: set, *args, grid, warmup: bool = False, **options):
    """Compile an autotuned kernel's configurations in threads before its first run, which takes them one by one.

    Liger has 240 of them for each H and I: minutes, and seconds with 16 cores.
    """
    import triton

    key = tuple(options.get(name) for name in kernel.keys)
    if key not in known:
        known.add(key)
        threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        with threads, triton.AsyncCompileMode(threads, ignore_errors=True):  # those that fail, the tuner leaves out
            kernel.warmup(*args, grid=grid, **options)
    return run(*args, grid=grid, warmup=warmup, **options)


MOST_SECONDS = 5  # that `eager` may take for the gradients of a step alone
TIEDMOE = "tiedmoe"
RECOMPUTE = "tiedmoe recompute"
TRANSFORMERS = ("grouped_mm", "batched_mm", "eager")
PEERS = (
    Peer(TIEDMOE, tiedmoe_layer, scope=deferred_weight_gradients),
    Peer(RECOMPUTE, functools.partial(tiedmoe_layer, recompute=True), scope=deferred_weight_gradients),
    *(Peer(name, functools.partial(transformers_layer, name)) for name in ("grouped_mm", "batched_mm")),
    Peer("eager", functools.partial(transformers_layer, "eager"), capturable=False),
    Peer("liger", liger_layer, capturable=False, slow_to_prepare=True),
    # These two load a kernel from the Hub.
    Peer("sonicmoe", functools.partial(transformers_layer, "sonicmoe"), slow_to_prepare=True),
    Peer("deepgemm", functools.partial(transformers_layer, "deepgemm"), trains=False, slow_to_prepare=True),
)


def reason_to_leave_out(peer: Peer, case: Case, memory_bytes: float, copy_tb_per_s: float) -> str | None:
    """Say why `peer` does not take part in `case` on a device of that much memory and that rate of a copy, or None."""
    if peer.name == RECOMPUTE and case.kind != "step":
        return "differs from tiedmoe in training only"
    if case.kind == "step" and not peer.trains:
        return "it has no backward"
    if peer.name == "batched_mm" and case.weight_copies_bytes() > 0.6 * memory_bytes:
        return f"its copies of the weights take {case.weight_copies_bytes() / 2**30:.1f} GiB"
    moved = 3 * case.g * case.shape.E**2 * case.shape.expert_numbers * case.dtype.itemsize
    if peer.name == "eager" and case.kind == "step" and moved > MOST_SECONDS * copy_tb_per_s * 1e12:
        return f"its backward makes a gradient of the whole pool for each expert, {moved / 1e9:.0f} GB"
    return None

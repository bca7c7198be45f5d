"""The implementations that are timed against each other, each behind one signature.

A peer that is not installed, does not fit or fails says so by an exception or a reason; nothing is skipped in silence.
What was tried of SonicMoE and DeepGEMM is said beside them.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from shapes import Case
from torch import Tensor, nn

# x [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Peer:
    """`build(gate_up [E, 2I, H], down [E, H, I])` returns the layer; the same parameters serve every layer of a group."""

    name: str
    build: Callable[[nn.Parameter, nn.Parameter], Layer]
    trains: bool = True
    not_capturable: str | None = None  # why no CUDA graph can hold it
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around one forward of a model
    slow_to_prepare: str | None = None  # why the quick grid has it at few shapes only


def tiedmoe_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    from tiedmoe_kernels import experts_forward

    return lambda x, index, weights: experts_forward(x, index, weights, gate_up, down)


def tiedmoe_recompute_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    from tiedmoe_kernels import experts_forward

    return lambda x, index, weights: experts_forward(x, index, weights, gate_up, down, recompute=True)


def tiedmoe_scope() -> contextlib.AbstractContextManager:
    from tiedmoe_kernels import deferred_weight_gradients

    return deferred_weight_gradients()


def transformers_layer(implementation: str, gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """OLMoE's experts of transformers, which are those of every gated family here, on the given parameters."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    E, H, I = down.shape
    config = OlmoeConfig(hidden_size=H, intermediate_size=I, num_experts=E)
    config._experts_implementation = implementation
    with torch.device("meta"):  # the pool is there already
        experts = OlmoeExperts(config)
    experts.gate_up_proj, experts.down_proj = gate_up, down
    return experts


def compiled_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    import torch._dynamo

    for limit in ("recompile_limit", "cache_size_limit"):  # the same setting under its new and its old name
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 256)  # one forward is compiled for many shapes
    return torch.compile(transformers_layer("grouped_mm", gate_up, down))


def liger_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """As `LigerExperts.forward` of liger-kernel 0.8 calls it: indices in int32."""
    from liger_kernel.ops import LigerFusedMoEFunction

    return lambda x, index, weights: LigerFusedMoEFunction.apply(x, gate_up, down, index.to(torch.int32), weights)


def sonicmoe_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """SonicMoE's general routing with the concatenated layout, called as transformers' integration calls it.

    sonic-moe 0.1.2.post1, the newest wheel, installs on Python >= 3.12 and pins torch <= 2.9.1 and nvidia-cutlass-dsl 4.4.2;
    its repository takes torch 2.11 since June 2026 (pull request 62). Beside another torch: `pip install --no-deps`, and by
    hand quack-kernels 0.3.11, nvidia-cutlass-dsl 4.4.2 with its libs-base (74 MB), apache-tvm-ffi, torch-c-dlpack-ext, einops.
    It fetches nothing at first use, but compiles and tunes; Hopper or newer. Not tried on a GPU yet.
    """
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    w1, w2 = gate_up.permute(1, 2, 0), down.permute(1, 2, 0)

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        T, K = index.shape
        token = torch.arange(T, device=x.device, dtype=torch.int32)[:, None].expand(T, K).reshape(-1)
        out, _ = moe_general_routing_inputs(
            x,
            weights.reshape(-1),
            token,
            index.reshape(-1).int(),
            w1,
            None,
            w2,
            None,
            E=gate_up.size(0),
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return out

    return layer


def deepgemm_layer(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """Forward with DeepGEMM's m-grouped bf16 products; it has no autograd, so no training.

    deep-gemm 1.0.0 on PyPI is an early upload with FP8 alone. sgl-deep-gemm 0.2.5 brings `deep_gemm` with bf16, linked
    with CUDA 13 and torch's C++ library (another torch build than its own may not load it: DeepGEMM issue 330); it compiles
    at first use with nvcc >= 12.9. Hopper and Blackwell. Not tried on a GPU yet.
    """
    import deep_gemm

    if not hasattr(deep_gemm, "m_grouped_bf16_gemm_nt_contiguous"):
        raise ImportError("this deep_gemm has no m_grouped_bf16_gemm_nt_contiguous; install sgl-deep-gemm")
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    by_sums = torch.cuda.get_device_capability()[0] >= 10  # Blackwell reads where experts end, Hopper an expert a row
    product = deep_gemm.m_grouped_bf16_gemm_nt_contiguous

    def layer(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        slot, row, layout, num_rows = aligned_rows(index, gate_up.size(0), alignment)
        grouped = gate_up.new_zeros(num_rows, x.size(1))
        grouped[row] = x[slot // index.size(1)]
        pre = gate_up.new_empty(num_rows, gate_up.size(1))
        product(grouped, gate_up.detach(), pre, layout(by_sums), use_psum_layout=by_sums)
        gate, up = pre.chunk(2, dim=-1)
        out = gate_up.new_empty(num_rows, x.size(1))
        product(F.silu(gate) * up, down.detach(), out, layout(by_sums), use_psum_layout=by_sums)
        by_slot = torch.empty(slot.numel(), x.size(1), dtype=x.dtype, device=x.device)
        by_slot[slot] = out[row]
        return (by_slot.view(*index.shape, -1) * weights[..., None]).sum(1)

    return layer


def aligned_rows(index: Tensor, E: int, alignment: int) -> tuple[Tensor, Tensor, Callable[[bool], Tensor], int]:
    """Sort the slots by expert and give each expert a multiple of `alignment` rows, without waiting for the device.

    Returns `slot [N]` sorted by expert, the `row [N]` of each, the layout as DeepGEMM wants it (an expert a row, -1 for
    padding; or, asked with True, the row where each expert ends) and an upper bound for the number of rows.
    """
    expert, slot = index.reshape(-1).sort(stable=True)
    count = torch.zeros(E, dtype=torch.int64, device=index.device).scatter_add_(0, expert, torch.ones_like(expert))
    aligned = (count + alignment - 1) // alignment * alignment
    row = torch.arange(slot.numel(), device=index.device) + ((aligned - count).cumsum(0) - (aligned - count))[expert]
    num_rows = -(-slot.numel() // alignment) * alignment + min(slot.numel(), E) * alignment

    def layout(by_sums: bool) -> Tensor:
        if by_sums:
            return aligned.cumsum(0).int()
        of_row = torch.full((num_rows,), -1, dtype=torch.int32, device=index.device)
        of_row[row] = expert.int()
        return of_row

    return slot, row, layout, num_rows


def _transformers(implementation: str) -> Callable[[nn.Parameter, nn.Parameter], Layer]:
    return lambda gate_up, down: transformers_layer(implementation, gate_up, down)


TIEDMOE = "tiedmoe"
RECOMPUTE = "tiedmoe, recompute"
TRANSFORMERS = ("grouped_mm", "grouped_mm compiled", "batched_mm", "eager")
PEERS = (
    Peer(TIEDMOE, tiedmoe_layer, scope=tiedmoe_scope),
    Peer(RECOMPUTE, tiedmoe_recompute_layer, scope=tiedmoe_scope),
    Peer("grouped_mm", _transformers("grouped_mm")),
    Peer("grouped_mm compiled", compiled_layer, slow_to_prepare="torch.compile takes its time at every shape"),
    Peer("batched_mm", _transformers("batched_mm")),
    Peer("eager", _transformers("eager"), not_capturable="it asks the device which experts were chosen"),
    Peer(
        "liger",
        liger_layer,
        not_capturable="it asks the device for its number of tiles",
        slow_to_prepare="it tunes itself at every H and I",
    ),
    Peer("sonicmoe", sonicmoe_layer, slow_to_prepare="it compiles and tunes at every shape"),
    Peer("deepgemm", deepgemm_layer, trains=False, slow_to_prepare="it compiles at every shape"),
)


def reason_to_leave_out(peer: Peer, case: Case, memory_bytes: float) -> str | None:
    """Why `peer` does not take part in `case` on a device of that much memory, or None."""
    if peer.name == RECOMPUTE and case.kind != "step":
        return "differs from tiedmoe in training only"
    if case.kind == "step" and not peer.trains:
        return "it has no backward"
    if peer.name == "batched_mm" and case.weight_copies_bytes() > 0.6 * memory_bytes:
        return f"its copies of the weights take {case.weight_copies_bytes() / 2**30:.1f} GiB"
    return None

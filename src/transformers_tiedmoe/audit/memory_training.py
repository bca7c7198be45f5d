"""What a training step needs on each GPU, and what one GPU sends: for one GPU, DDP, FSDP2 and expert parallelism.

N GPUs, P bytes. A ring all-reduce sends 2 (N - 1) / N P from each GPU, an all-gather or a reduce-scatter half of that
(Rabenseifner, ICCS 2004, and NCCL's own performance notes).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from .memory_parameters import Tensor
from .meta_run import counted_on_meta, recomputing_on_meta

Optimizer = Literal["adamw", "muon"]
Strategy = Literal["one", "ddp", "fsdp2", "expert_parallel"]
Precision = Literal["float32", "bfloat16", "mixed"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")
STRATEGIES: tuple[Strategy, ...] = ("one", "ddp", "fsdp2", "expert_parallel")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number: of weights, of what FSDP2 gathers and experts exchange, of gradients, of optimizer states."""

    weight: int
    compute: int
    gradient: int
    state: int


PRECISIONS: dict[str, Sizes] = {
    "float32": Sizes(4, 4, 4, 4),
    "bfloat16": Sizes(2, 2, 2, 2),
    "mixed": Sizes(4, 2, 4, 4),
}


def step_bytes(
    model: PreTrainedModel, batch_size: int, block_size: int, precision: Precision, checkpointing: bool
) -> dict[Strategy, int]:
    """Return `activation_bytes` of each strategy.

    "mixed" is `torch.autocast` to bfloat16, as Trainer's `bf16` has it; FSDP2 casts all that it gathers instead, its
    `MixedPrecisionPolicy`. With expert parallelism the tokens of a GPU's experts are as many as its own, evenly
    routed, and the gradient of one layer's experts counts whole, which is too much.
    """
    if precision != "mixed":
        model = model.to(getattr(torch, precision))
        return dict.fromkeys(STRATEGIES, activation_bytes(model, batch_size, block_size, checkpointing))
    model = model.to(torch.float32)
    found = dict.fromkeys(
        STRATEGIES, activation_bytes(model, batch_size, block_size, checkpointing, autocast=torch.bfloat16)
    )
    cast = model.to(torch.bfloat16)
    return found | {"fsdp2": activation_bytes(cast, batch_size, block_size, checkpointing)}


def activation_bytes(
    model: PreTrainedModel,
    batch_size: int,
    block_size: int,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> int:
    """Return the most bytes that a step holds besides weights, gradients and optimizer: activations and temporaries.

    The family's own forward and backward run on the meta device, with gradients that are already there, as in all but
    the first micro-batch of a step. Experts run as one grouped product and attention as a fused kernel; layers of
    linear attention as transformers' reference code, which keeps more than their own kernels do.

    Args:
        model: on the meta device, in the dtype of its weights; it is left in eval mode.
        batch_size: sequences.
        block_size: tokens in each.
        checkpointing: whether every layer is computed again in the backward pass (non-reentrant).
        autocast: as `torch.autocast`, whose copies of weights then count too; transformers' experts compute in the
            dtype of their weights under it.
    """
    model = model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    if checkpointing:
        again = {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": lambda: recomputing_on_meta(autocast),
        }
        _checkpointing(model, "enable")(again)
    tokens = torch.empty(batch_size, block_size, dtype=torch.int64, device="meta")
    known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in parameters), tokens]
    try:
        with counted_on_meta(known, autocast) as (allocations, answers):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            answers.forget()
            allocations.is_backward = True
            loss.backward()
    finally:
        for parameter in parameters:
            parameter.grad = None
        if checkpointing:
            _checkpointing(model, "disable")()
        model.eval()
    return allocations.peak


def _checkpointing(model: PreTrainedModel, what: str) -> Any:
    """Return the method that enables or disables checkpointing, under its newer name where transformers has it."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


def plan_training(
    tensors: Sequence[Tensor],
    buffer_bytes: int,
    activations: int,
    precision: Precision,
    optimizer: Optimizer,
    strategy: Strategy,
    num_gpus: int,
    tokens: int,
    hidden_size: int,
    top_k: dict[int, int],
    checkpointing: bool,
    ep_size: int = 1,
) -> dict[str, int]:
    """Return the byte fields of `Training` for one GPU of a strategy.

    Args:
        tensors: every parameter once.
        buffer_bytes: of the model's buffers.
        activations: from `activation_bytes`, of the sequences of one GPU.
        precision: dtypes of weights, of computing, of gradients and of states.
        optimizer: see `state_numbers`.
        strategy: see the functions below.
        num_gpus: N; 1 for "one".
        tokens: of one GPU in a step.
        hidden_size: H.
        top_k: experts of a token by layer.
        checkpointing: whether layers are computed again.
        ep_size: GPUs that share the experts out under "fsdp2", which then gathers a GPU's share of each layer and pool
            from as many GPUs as hold the same one, num_gpus / ep_size; tokens travel to the others.
    """
    sizes = PRECISIONS[precision]
    states = sum(state_numbers(tensor, optimizer) for tensor in tensors) * sizes.state
    weights = sum(tensor.num for tensor in tensors)
    experts = sum(tensor.num for tensor in tensors if tensor.component == "experts")
    ring = _ring(num_gpus)
    passes = 6 if checkpointing else 4  # dispatch and combine: forward, backward, and computed again
    exchanged = passes * tokens * sum(top_k.values()) * hidden_size * sizes.compute
    if strategy == "fsdp2":
        root, dense, shares, two, one = _units(tensors, ep_size)
        gathered = (root + two) * sizes.compute
        fields = (
            weights * sizes.weight / num_gpus + gathered,
            weights * sizes.gradient / num_gpus + one * (sizes.compute + sizes.gradient),
            states / num_gpus,
            ring * ((root + 2 * dense) * sizes.compute + (root + dense) * sizes.gradient)
            + _ring(num_gpus // ep_size) * shares * (2 * sizes.compute + sizes.gradient)
            + _ring(ep_size) * exchanged,
        )
    elif strategy == "expert_parallel":
        own = weights - experts + experts / num_gpus
        expert_states = (
            sum(state_numbers(tensor, optimizer) for tensor in tensors if tensor.component == "experts") * sizes.state
        )
        fields = (
            own * sizes.weight,
            own * sizes.gradient,
            states - expert_states + expert_states / num_gpus,
            2 * ring * (weights - experts) * sizes.gradient + ring * exchanged,
        )
    else:
        copies = 2 if strategy == "ddp" else 1  # DDP's buckets, unless gradient_as_bucket_view
        fields = (
            weights * sizes.weight,
            weights * sizes.gradient * copies,
            states,
            2 * ring * weights * sizes.gradient if strategy == "ddp" else 0,
        )
    weight_bytes, gradient_bytes, optimizer_bytes, communicated = map(round, fields)
    weight_bytes += buffer_bytes
    return {
        "weight_bytes": weight_bytes,
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": optimizer_bytes,
        "activation_bytes": activations,
        "total_bytes": weight_bytes + gradient_bytes + optimizer_bytes + activations,
        "communicated_bytes": communicated,
    }


def state_numbers(tensor: Tensor, optimizer: Optimizer) -> int:
    """Return how many numbers an optimizer keeps of a parameter.

    AdamW keeps two of each (arXiv 1711.05101, algorithm 2), and Muon the momentum of what it takes: `muon_matrices`.
    """
    return tensor.num if optimizer == "muon" and tensor.is_muons else 2 * tensor.num


def _ring(num_gpus: int) -> float:
    return (num_gpus - 1) / num_gpus


def _units(tensors: Sequence[Tensor], ep_size: int) -> tuple[float, float, float, float, float]:
    """Cut a model into FSDP2's units: the root (what is in no layer), each layer, each pool.

    Returns:
        Parameters of the root, which stays gathered from forward to backward; of all others, each gathered once
        forward and once backward (a pool too: its gather is kept until the last layer of its group), those besides
        the experts and one GPU's share of the experts; of the two neighbouring layers that are the largest with the
        pools that they read, which are gathered at a time, as FSDP2 fetches the next layer while one computes; and of
        the largest layer with its pool, whose gradients wait whole, in what computes and in what is reduced. A step
        may need less: this is not at the time of the most activations.
    """
    root = dense = shares = 0.0
    layers: dict[int, float] = {}
    pools: dict[int, float] = {}
    pool_of: dict[int, int] = {}  # what is whole while a layer computes, from the first to the last that reads it
    for tensor in tensors:
        num = tensor.num / ep_size if tensor.component == "experts" else float(tensor.num)
        if tensor.layer is None:
            root += num
            continue
        if tensor.component == "experts":
            shares += num
        else:
            dense += num
        if tensor.pool is None:
            layers[tensor.layer] = layers.get(tensor.layer, 0) + num
        else:
            pools[tensor.pool] = pools.get(tensor.pool, 0) + num
            pool_of.update(dict.fromkeys(range(tensor.layer, (tensor.last or tensor.layer) + 1), tensor.pool))
    order = sorted({*layers, *pool_of})
    whole = [layers.get(layer, 0) + pools.get(pool_of.get(layer, -1), 0) for layer in order]
    two = max(whole, default=0)
    for (one, size), (following, next_size) in itertools.pairwise(zip(order, whole)):
        is_shared = one in pool_of and pool_of[one] == pool_of.get(following)
        two = max(two, size + next_size - (pools[pool_of[one]] if is_shared else 0))
    return root, dense, shares, two, max(whole, default=0)

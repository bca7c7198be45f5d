"""Muon for tied models: every matrix's update is orthogonalised, an expert's slice of a pool on its own.

Muon is Jordan et al.'s (https://kellerjordan.github.io/posts/muon/); "Tying the Loop" (arXiv 2606.16825) pretrains
with it. `torch.optim.Muon` takes 2-D parameters only; this one equals it slice by slice and runs all experts of a pool
as one batch. What is no matrix of a layer goes to torch's AdamW within the same optimizer, so that schedulers, Trainer
and accelerate see one, with parameter groups.

`gate_up_proj [P, 2I, H]` is orthogonalised as it lies, gate and up as one matrix of an expert: one batch instead of
two, and no family's layout to know. It is another update than that of the halves taken apart, whose norm is about the
same (exactly so if 2I <= H), but whose largest singular value may be sqrt(2). The ratio of the learning rate is of a
matrix as it is stored, as in torch.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from ..errors import TiedMoeError
from ..families import is_experts
from .parameter_groups import BUDGET_LR, NO_DECAY, pool_parameter_groups

ADAMW_SHARE = 0.1  # AdamW's learning rate and decay, of Muon's: 2e-3 and .01 beside 2e-2 and .1 in the paper's code
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan's post
FACTORS = ("_residual_", "lora_")  # low-rank factors: the matrix is their product


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, and `torch.optim.AdamW` for the others.

    The state of a matrix is `momentum_buffer`, of its shape and dtype; Newton-Schulz runs in bfloat16, as torch's
    does. Under FSDP2 a shard along the first dimension of a pool holds whole experts, which are orthogonalised where
    they are; a matrix in shards is gathered first.

    Args:
        params: parameter groups, of `muon_parameter_groups`; without `use_muon` a group is Muon's.
        lr: learning rate of a group that has none of its own.
        weight_decay: decoupled, times the learning rate.
        momentum: of Muon, with Nesterov's step.
        ns_steps: iterations of Newton-Schulz.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 2e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        own = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps}
        # It works on this optimizer's groups and state; a parameter of its own only because torch asks for one.
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))], betas=betas, eps=eps)
        super().__init__(params, {**self._adamw.defaults, **own, "use_muon": True})
        for parameter in (p for group in self.param_groups if group["use_muon"] for p in group["params"]):
            if parameter.ndim not in (2, 3):
                raise TiedMoeError(
                    f"Muon got a parameter of shape {list(parameter.shape)}; expected a matrix, or a stack of them: "
                    "put it into a group with use_muon=False"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, parameter.grad, group)
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.state = self.state  # loading a state dict puts another in its place
        self._adamw.step()
        return loss

    def _step_matrix(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = _orthogonalise_shards(grad.lerp(momentum, group["momentum"]), group["ns_steps"])
        rows, columns = parameter.shape[-2:]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of each of `matrices [..., M, N]` towards 1 by `steps` of Newton-Schulz, in bfloat16.

    Each is scaled by its own norm. Returns bfloat16 of the same shape.
    """
    a, b, c = COEFFICIENTS
    X = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    is_tall = X.shape[-2] > X.shape[-1]
    X = X.mT if is_tall else X
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-7)  # no singular value is above this norm
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return (X.mT if is_tall else X).reshape(matrices.shape)


def _orthogonalise_shards(update: torch.Tensor, steps: int) -> torch.Tensor:
    if not isinstance(update, DTensor):
        return orthogonalise(update, steps)
    mesh, placements = update.device_mesh, update.placements
    if update.ndim == 3 and all(isinstance(p, Replicate) or (type(p) is Shard and p.dim == 0) for p in placements):
        local = orthogonalise(update.to_local(), steps)
        return DTensor.from_local(local, mesh, placements, shape=update.shape, stride=update.stride())
    whole = orthogonalise(update.full_tensor(), steps)  # the same in every process
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(placements=placements)


def muon_parameter_groups(
    model: PreTrainedModel,
    lr: float = 2e-2,
    weight_decay: float = 0.1,
    lr_divisor: str = "sqrt",
    budget_lr: float = BUDGET_LR,
) -> list[dict]:
    """Make groups for `Muon`: matrices of layers for Muon, all else for AdamW at a tenth of rate and decay.

    Matrices are experts' in pools and in untied layers, attention's, dense feed-forward layers' and routers';
    embeddings, the head, norms, biases and low-rank factors are AdamW's.

    Args:
        model: a tied model or any other.
        lr, weight_decay: of Muon.
        lr_divisor, budget_lr: see `pool_parameter_groups`.

    Raises:
        TiedMoeError: no parameter is a matrix that Muon may train.
    """
    matrices = muon_matrices(model)
    if not matrices:
        raise TiedMoeError(
            "Muon finds no trainable matrix of a layer in this model; expected experts or attention to be trained: "
            "use AdamW for adapters"
        )
    groups = []
    for use_muon, share in ((True, 1.0), (False, ADAMW_SHARE)):
        for group in pool_parameter_groups(model, share * lr, share * weight_decay, lr_divisor, budget_lr):
            params = [p for p in group["params"] if (p in matrices) is use_muon]
            if params:
                groups.append({**group, "params": params, "use_muon": use_muon})
    return groups


def muon_matrices(model: PreTrainedModel) -> set[nn.Parameter]:
    """Return the trainable parameters that Muon takes, of a model on any device; AdamW takes the others."""
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    embeddings |= set(head.parameters()) if head is not None else set()
    return {
        parameter
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.ndim == (3 if is_experts(module) else 2)
        and parameter.requires_grad
        and parameter not in embeddings
        and not NO_DECAY.search(name)
        and not any(factor in name for factor in FACTORS)
    }

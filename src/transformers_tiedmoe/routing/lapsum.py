"""`soft_top_k`: a differentiable top-k whose mass is exactly k, in closed form after one sort.

LapSum (arXiv 2503.06242): `p_i = F((s_i - b) / alpha)` with F the distribution function of the Laplace distribution,
and b such that the p_i sum to k. Between two neighbouring scores the sum is `m + P/2 exp(-b) - Q/2 exp(b)`, a
quadratic in exp(b). Notable: scores are taken relative to the k-th largest, near which b lies, and the root is chosen
by the sign of what is left, so that nothing cancels: the textbook root is wrong by up to 1 at integer k and small
alpha, where P*Q underflows.
"""

from typing import Any

import numpy as np
import torch

from ..experts_interface import has_triton

MAX_SCORES = 1024  # of a row, as the kernels take


def soft_top_k(scores: torch.Tensor, k: float | torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """Return the soft membership of every score in the top k: `p [..., E]` from 0 to 1, with `p.sum(-1) == k`.

    Differentiable in `scores`, `k` and `alpha` (LapSum, arXiv 2503.06242). For alpha to 0 it comes to the top k; equal
    scores share what is left. The error of a p is about eps * |s_i - s_j| / alpha at most, over the scores near the
    k-th, with eps of the dtype that is computed in: float32 for bfloat16 and float16 scores.

    Args:
        scores: `[..., E]` floating; finite, or -inf for what is ruled out if more than k are left.
        k: how many, `0 < k <= E`, where E makes all of them a 1: a number, or a tensor that broadcasts to `[...]`.
        alpha: the temperature, above 0: a number, or a tensor that broadcasts to `[...]`. Small is sharp.

    Returns:
        `[..., E]` in float32, or in float64 for float64 scores.

    Raises:
        ValueError: a number `k` or `alpha` out of range. Tensors are not looked at: that would wait for a device.
    """
    num_experts = scores.shape[-1]
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if not isinstance(k, torch.Tensor) and not 0 < k <= num_experts:
        raise ValueError(f"k={k}; expected a number above 0 and at most {num_experts}, the number of scores")
    if not isinstance(alpha, torch.Tensor) and not alpha > torch.finfo(dtype).tiny:
        raise ValueError(f"alpha={alpha}; expected a number above 0: for 0 take the family's own top-k")
    k, alpha = (  # `full` makes a number where the scores are; `as_tensor` copies it there, which no CUDA graph holds
        each.to(scores.device, dtype) if isinstance(each, torch.Tensor) else scores.new_full((), each, dtype=dtype)
        for each in (k, alpha)
    )
    return _LapSum.apply(scores.to(dtype), k.expand(scores.shape[:-1]), alpha.expand(scores.shape[:-1]))


class _LapSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: torch.Tensor, k: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        ctx.on_kernel = _runs_on_kernel(scores)
        if ctx.on_kernel:
            rows = scores.reshape(-1, scores.shape[-1]).contiguous()
            p, z = soft_top_k_kernels().soft_top_k_forward(rows, k.reshape(-1), alpha.reshape(-1))
            ctx.save_for_backward(z, alpha)
            return p.view(scores.shape)
        k, alpha = k.unsqueeze(-1), alpha.unsqueeze(-1)
        z = _distances(scores, k, alpha)
        ctx.save_for_backward(z, alpha)
        half, is_below = 0.5 * torch.exp(-z.abs()), z < 0
        return half * is_below + (1 - half) * ~is_below  # torch.where takes several times as long on a CPU

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        z, alpha = ctx.saved_tensors
        if ctx.on_kernel:
            kernels, rows = soft_top_k_kernels(), grad.reshape(z.shape)
            scores_grad, k_grad, alpha_grad = kernels.soft_top_k_backward(rows, z, alpha.reshape(-1))
            return scores_grad.view(grad.shape), k_grad.view(alpha.shape), alpha_grad.view(alpha.shape)
        density = 0.5 * torch.exp(-z.abs())
        # dp_i = density_i dz_i; b takes away from each the densities' mean of the gradient. As a softmax that mean is
        # right where every density underflows.
        mean = (torch.softmax(-z.abs(), dim=-1) * grad).sum(-1, keepdim=True)
        per_score = density * (grad - mean) / alpha
        return per_score, mean.squeeze(-1), -(per_score * z).sum(-1)


def _descending(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores sorted; by numpy on a CPU, which takes a twentieth of torch's time for rows this short."""
    if scores.device.type == "cpu" and type(scores) is torch.Tensor and not torch.compiler.is_compiling():
        return torch.from_numpy(-np.sort(-scores.detach().numpy(), axis=-1))
    return scores.sort(dim=-1, descending=True).values


def _runs_on_kernel(scores: torch.Tensor) -> bool:
    """Tell whether one kernel a pass computes it; a compiler fuses the plain operations by itself."""
    return (
        scores.is_cuda
        and scores.dtype == torch.float32
        and scores.shape[-1] <= MAX_SCORES
        and not torch.compiler.is_compiling()
        and has_triton()
    )


def soft_top_k_kernels() -> Any:
    """Return the module of the kernels, which imports triton."""
    from tiedmoe_kernels import soft_top_k

    return soft_top_k


def _distances(scores: torch.Tensor, k: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Return `z = (s - b) / alpha`, `[..., E]`, of `k [..., 1]` and `alpha [..., 1]`."""
    ordered = _descending(scores)
    # b lies within log(E / 2f) above and log(k / 2(1 - f)) below the score that the fraction f of k belongs to.
    # Farther scores are a 0 or a 1, wherever they are.
    reference = ordered.gather(-1, (k.ceil().long() - 1).clamp(0, scores.shape[-1] - 1))  # within, if k is NaN
    far = 300.0 if scores.dtype == torch.float64 else 80.0  # exp(far) times the number of scores stays finite
    x = ((ordered - reference) / alpha).clamp(-far, far)
    up, down = torch.exp(x), torch.exp(-x)
    place = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    # The mass if b were at each score, which grows from the largest score to the smallest; m scores are above b.
    at_or_below = up.flip(-1).cumsum(-1).flip(-1)
    mass = place - 0.5 + 0.5 * (down * at_or_below - up * down.cumsum(-1))
    above = mass <= k
    # All are finite; a product with a mask takes a tenth of the time of masked_fill on a CPU.
    p, q = (up * ~above).sum(-1, keepdim=True), (down * above).sum(-1, keepdim=True)
    left = k - above.sum(-1, keepdim=True)  # = (p exp(-b) - q exp(b)) / 2
    root = left.abs() + torch.sqrt(left * left + p * q)
    b = torch.where(left > 0, p.log() - root.log(), root.log() - q.log())
    b = torch.where(left == 0, 0.5 * (p.log() - q.log()), b)
    # A score of -inf, an expert that is ruled out, is a 0; if k is all of them, b is -inf and each score a 1.
    return ((scores - reference) / alpha - b).clamp(-1e6, 1e6)

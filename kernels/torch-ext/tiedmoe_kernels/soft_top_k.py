"""LapSum's soft top-k (arXiv 2503.06242) as one kernel a pass: a row of up to 1024 scores is a program.

Forward sorts the row and finds the one number b in closed form; `transformers_tiedmoe.routing.lapsum` is the same in
plain torch, with the derivation, and its reference. Backward needs z = (s - b) / alpha alone.

Shapes: T rows, E scores in each; `_TE` is `[T, E]`, contiguous, `_T` is `[T]` with a stride that may be 0.
"""

import torch
import triton
import triton.language as tl

from .metadata import next_power_of_2

MAX_SCORES = 1024
FAR = 80.0  # exp(80) times 1024 is finite in float32


@triton.jit
def forward_kernel(
    scores_TE, k_T, alpha_T, p_TE, z_TE, E, stride_k, stride_alpha, FAR: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Memberships p and distances z of one row, both float32."""
    t = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_E)
    is_score = place < E
    scores = tl.load(scores_TE + t * E + place, mask=is_score, other=float("-inf"))
    k, alpha = tl.load(k_T + t * stride_k), tl.load(alpha_T + t * stride_alpha)
    ordered = tl.sort(scores, descending=True)
    # b lies near the score that the last of k belongs to; the others are taken relative to it, and where they are
    # farther than exp can say it does not matter how far
    reference = tl.sum(tl.where(place == tl.ceil(k).to(tl.int32) - 1, ordered, 0.0), axis=0)
    x = tl.minimum(tl.maximum((ordered - reference) / alpha, -FAR), FAR)
    up = tl.where(is_score, tl.exp(x), 0.0)
    down = tl.where(is_score, tl.exp(-x), 0.0)
    mass = place + 0.5 + 0.5 * (down * tl.cumsum(up, axis=0, reverse=True) - up * tl.cumsum(down, axis=0))
    above = is_score & (mass <= k)
    below_sum = tl.sum(tl.where(above, 0.0, up), axis=0)
    above_sum = tl.sum(tl.where(above, down, 0.0), axis=0)
    left = k - tl.sum(above.to(tl.float32), axis=0)
    root = tl.abs(left) + tl.sqrt(left * left + below_sum * above_sum)
    # the logarithm of an empty sum is not used, but where k is all scores: each of them is a 1
    log_below = tl.where(below_sum > 0, tl.log(tl.where(below_sum > 0, below_sum, 1.0)), -2e6)
    log_above = tl.log(tl.where(above_sum > 0, above_sum, 1.0))
    log_root = tl.log(tl.where(root > 0, root, 1.0))
    b = tl.where(left > 0, log_below - log_root, log_root - log_above)
    b = tl.where(left == 0, 0.5 * (log_below - log_above), b)
    z = tl.minimum(tl.maximum((scores - reference) / alpha - b, -1e6), 1e6)
    half = 0.5 * tl.exp(-tl.abs(z))
    tl.store(p_TE + t * E + place, tl.where(z < 0, half, 1 - half), mask=is_score)
    tl.store(z_TE + t * E + place, z, mask=is_score)


@triton.jit
def backward_kernel(grad_TE, z_TE, alpha_T, dscores_TE, dk_T, dalpha_T, E, stride_alpha, BLOCK_E: tl.constexpr):
    """Gradients of one row's scores, k and alpha."""
    t = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_E)
    is_score = place < E
    grad = tl.load(grad_TE + t * E + place, mask=is_score, other=0.0)
    z = tl.load(z_TE + t * E + place, mask=is_score, other=0.0)
    alpha = tl.load(alpha_T + t * stride_alpha)
    near = tl.where(is_score, -tl.abs(z), -2e6)  # farther than any score: no share, also if k is all of them
    # the mean by the densities, as a softmax: right where every density underflows
    share = tl.exp(near - tl.max(near, axis=0))
    mean = tl.sum(share * grad, axis=0) / tl.sum(share, axis=0)
    per_score = 0.5 * tl.exp(near) * (grad - mean) / alpha
    tl.store(dscores_TE + t * E + place, per_score, mask=is_score)
    tl.store(dk_T + t, mean)
    tl.store(dalpha_T + t, -tl.sum(per_score * z, axis=0))


def soft_top_k_forward(
    scores_TE: torch.Tensor, k_T: torch.Tensor, alpha_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `p` and `z`, both `[T, E]` float32, of contiguous float32 scores and float32 `[T]` k and alpha.

    Raises:
        ValueError: more than 1024 scores a row.
    """
    num_rows, num_scores = scores_TE.shape
    if num_scores > MAX_SCORES:
        raise ValueError(f"{num_scores} scores a row; expected at most {MAX_SCORES}: use the plain torch operator")
    p_TE, z_TE = torch.empty_like(scores_TE), torch.empty_like(scores_TE)
    if num_rows:
        forward_kernel[(num_rows,)](
            scores_TE, k_T, alpha_T, p_TE, z_TE, num_scores, k_T.stride(0), alpha_T.stride(0), FAR,
            **_block(num_scores),
        )  # fmt: skip
    return p_TE, z_TE


def soft_top_k_backward(
    grad_TE: torch.Tensor, z_TE: torch.Tensor, alpha_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of scores `[T, E]`, k `[T]` and alpha `[T]`."""
    num_rows, num_scores = z_TE.shape
    dscores_TE, dk_T, dalpha_T = torch.empty_like(z_TE), z_TE.new_empty(num_rows), z_TE.new_empty(num_rows)
    if num_rows:
        backward_kernel[(num_rows,)](
            grad_TE.contiguous(), z_TE, alpha_T, dscores_TE, dk_T, dalpha_T, num_scores, alpha_T.stride(0),
            **_block(num_scores),
        )  # fmt: skip
    return dscores_TE, dk_T, dalpha_T


def _block(num_scores: int) -> dict[str, int]:
    block = max(16, next_power_of_2(num_scores))
    return {"BLOCK_E": block, "num_warps": 1 if block <= 128 else 4}

"""The Kullback-Leibler divergence from a teacher's next-token distribution, a bounded number of tokens at a time."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import TiedMoeError

CHUNK_SIZE = 1024


class Teacher(Protocol):
    """What the student learns from: something per token, and a divergence from it."""

    def targets(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return what it says of a batch, without gradient, tensors `[B, T, ...]`; it may take them out of it."""

    def divergence(self, logits: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        """Return the divergence of the student's `logits [N, V]` from `targets [N, ...]` per token, fp32 `[N]`."""


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Sum `divergence` over tokens.

    Args:
        logits: of the student, `[B, T, V]`, any float dtype.
        teacher_logits: `[B, T, V]`; no gradient goes there.
        labels: int64 `[B, T]`, already shifted to stand beside the logits that predict them; -100 is left out.
        temperature: as in `divergence`.
        chunk_size: tokens at a time.

    Returns:
        fp32 scalar, the sum over the tokens that are not left out, in nats.
    """
    if logits.shape != teacher_logits.shape:
        raise TiedMoeError(
            f"the student's logits are {tuple(logits.shape)}, but the teacher's {tuple(teacher_logits.shape)}; "
            "give a teacher with the same vocabulary"
        )

    def function(logits, teacher_logits):
        return divergence(logits, teacher_logits, temperature)

    return summed(function, logits, (teacher_logits.detach(),), labels, chunk_size)


def summed(
    function,
    logits: torch.Tensor,
    targets: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    chunk_size: int = CHUNK_SIZE,
) -> torch.Tensor:
    """Sum a divergence per token over the tokens whose label is not -100.

    The fp32 log-probabilities of `chunk_size` tokens exist at a time, in the forward and in the backward, which
    computes them again: with a vocabulary of 150k a chunk of 1024 tokens takes 0.6 GiB for each of student and
    teacher.

    Args:
        function: of logits `[N, V]` and targets `[N, ...]`, as `Teacher.divergence`.
        logits: `[B, T, V]`, as are targets `[B, T, ...]` and labels `[B, T]`.
    """

    def masked(logits, mask, *targets):
        return function(logits, *targets).mul(mask).sum()

    flat = [each.flatten(0, 1).split(chunk_size) for each in (logits, labels != -100, *targets)]
    return torch.stack([checkpoint(masked, *chunk, use_reentrant=False) for chunk in zip(*flat)]).sum()


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute KL(teacher || student) at a temperature, times its square (arXiv 1503.02531, section 2), per token.

    Args:
        logits: of the student, `[N, V]`.
        teacher_logits: `[N, V]`.
        temperature: divides both logits; the factor temperature² keeps the gradient's size.

    Returns:
        fp32 `[N]`, in nats.
    """
    log_p = F.log_softmax(logits.float() / temperature, -1)
    log_q = F.log_softmax(teacher_logits.float() / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * temperature**2


def top_k_divergence(
    logits: torch.Tensor,
    log_q: torch.Tensor,
    indices: torch.Tensor,
    log_tail: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Compute the divergence from a teacher of whom only the k most probable tokens S are known, per token.

    All other tokens are one event, the tail, with the probabilities q_t = 1 - sum_S q_i and p_t = 1 - sum_S p_i:

        KL_k = sum_S q_i (log q_i - log p_i) + q_t (log q_t - log p_t), times temperature²

    which is at most the whole divergence (the log-sum inequality), and equal to it for k = V.

    Args:
        logits: of the student, `[N, V]`.
        log_q: of the teacher's k tokens, at that temperature, `[N, k]`, maybe rounded: they are scaled to the sum
            1 - q_t.
        indices: int `[N, k]`, these tokens.
        log_tail: log q_t, fp32 `[N]`; -inf for k = V.
        temperature: of both distributions.

    Returns:
        fp32 `[N]`, in nats.
    """
    scaled = logits.float() / temperature
    indices = indices.long()
    normaliser = scaled.logsumexp(-1)
    log_p = scaled.gather(-1, indices) - normaliser[:, None]
    log_q = log_q.float()
    log_q = log_q + (torch.log1p(-log_tail.exp()) - log_q.logsumexp(-1))[:, None]
    q = log_q.exp()
    found = (torch.special.xlogy(q, q) - q * log_p).sum(-1)
    if indices.shape[-1] < scaled.shape[-1]:
        log_p_tail = scaled.scatter(-1, indices, -torch.inf).logsumexp(-1) - normaliser
        tail = log_tail.exp()
        found = found + torch.special.xlogy(tail, tail) - tail * log_p_tail
    return found * temperature**2


def top_k_of(
    logits: torch.Tensor, k: int, temperature: float = 1.0, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `log_q`, int32 `indices` and `log_tail` of `top_k_divergence` for a teacher's `logits [N, V]`."""
    scaled = logits.float() / temperature
    normaliser = scaled.logsumexp(-1)
    values, indices = scaled.topk(k, -1)
    log_tail = (
        scaled.scatter(-1, indices, -torch.inf).logsumexp(-1) - normaliser
    )  # of the others: 1 - sum would cancel
    return (values - normaliser[:, None]).to(dtype), indices.to(torch.int32), log_tail

"""The Kullback-Leibler divergence from a teacher's next-token distribution, a bounded number of tokens at a time."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import TiedMoeError


def distillation_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student) at a temperature, times its square (arXiv 1503.02531, section 2).

    The fp32 log-probabilities of `chunk_size` tokens exist at a time, in the forward and in the backward, which
    computes them again: with a vocabulary of 150k a chunk of 1024 tokens takes 0.6 GiB for each of student and
    teacher.

    Args:
        logits: of the student, `[B, T, V]`, any float dtype.
        teacher_logits: `[B, T, V]`; no gradient goes there.
        labels: int64 `[B, T]`, already shifted to stand beside the logits that predict them; -100 is left out.
        temperature: divides both logits; the factor temperature² keeps the gradient's size.
        chunk_size: tokens at a time.

    Returns:
        fp32 scalar, the sum over the tokens that are not left out, in nats.
    """
    if logits.shape != teacher_logits.shape:
        raise TiedMoeError(
            f"the student's logits are {tuple(logits.shape)}, but the teacher's {tuple(teacher_logits.shape)}; "
            "give a teacher with the same vocabulary"
        )
    chunks = zip(
        logits.flatten(0, 1).split(chunk_size),
        teacher_logits.detach().flatten(0, 1).split(chunk_size),
        (labels != -100).flatten().split(chunk_size),
    )
    return torch.stack([checkpoint(_divergence, *chunk, temperature, use_reentrant=False) for chunk in chunks]).sum()


def _divergence(logits, teacher_logits, mask, temperature):
    log_p = F.log_softmax(logits.float() / temperature, -1)
    log_q = F.log_softmax(teacher_logits.float() / temperature, -1)
    per_token = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return per_token.mul(mask).sum() * temperature**2

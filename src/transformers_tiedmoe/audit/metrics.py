"""One definition of each metric: its formula, its unit, its source. Conversion, callbacks, demo and audit use these.

Shapes: T tokens, K experts per token, E experts that a router (or a pool) has, D domains. Indices of E or more are
inactive slots. Counts may have leading dimensions, `[..., E]`, which a metric keeps. Entropies, divergences and mutual
information are in nats unless they say "over log E".
"""

import math
from collections.abc import Sequence

import torch

GIB = 2**30
EVEN_TOKENS = 64  # an expert that no token chose is called dead if an even router had sent it so many


def perplexity(loss: float) -> float:
    """Return exp(loss) of a mean cross-entropy in nats per token; infinity if it is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


# Quality for its cost


def bits_saved(bits_per_byte: float) -> float:
    """Return the bits of text that a model saves of each byte: 8, as it is stored, less what its predictions take.

    A loss has no zero to take a share of; a model that predicts text compresses it (arXiv 2309.10668, Section 2), and
    what is saved begins at 0 for bytes that are all as likely, is 8 at most, and compares vocabularies.
    """
    return 8 - bits_per_byte


def quality_per_gib(quality: float, num_bytes: int) -> float:
    """Return quality (`bits_saved`, or a task's metric of which more is better) for each GiB that serving takes."""
    return quality / (num_bytes / GIB)


def quality_per_gflop(quality: float, flops_per_token: float) -> float:
    """Return quality (as in `quality_per_gib`) for each 10^9 FLOPs that a token's forward pass takes."""
    return quality / (flops_per_token / 1e9)


# Load of the experts


def expert_counts(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how many tokens chose each expert.

    Args:
        top_k_index: int64 `[..., K]`.
        num_experts: E.

    Returns:
        int64 `[E]`, on the device of `top_k_index`.
    """
    return torch.bincount(top_k_index[top_k_index < num_experts].flatten(), minlength=num_experts)


def load_shares(counts: torch.Tensor) -> torch.Tensor:
    """Return each expert's share of the choices, float `[..., E]`, summing to 1; NaN if nothing was chosen."""
    return counts / counts.sum(-1, keepdim=True)


def num_dead(counts: torch.Tensor) -> int:
    """Return how many experts no token chose."""
    return int((counts == 0).sum())


def tells_dead(counts: torch.Tensor) -> bool:
    """Tell whether counts `[E]` are enough to call an expert dead: an even router had sent each `EVEN_TOKENS`."""
    return int(counts.sum()) >= EVEN_TOKENS * len(counts)


def dead_experts(counts: torch.Tensor) -> list[int]:
    """Return the experts of counts `[E]` that no token chose; see `tells_dead` for whether that means anything."""
    return (counts == 0).nonzero().flatten().tolist()


def load_cv(counts: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of the experts' loads over their mean: 0 is even (Shazeer 2017, 1701.06538, 4).

    Args:
        counts: `[..., E]`.

    Returns:
        `[...]`, of which the square is the paper's CV², before its weight.
    """
    loads = counts.double()
    return loads.std(-1, correction=0) / loads.mean(-1)


def load_max_over_mean(counts: torch.Tensor) -> torch.Tensor:
    """Return the busiest expert's load over the mean, `[...]`: 1 is even, E is all (MaxVio + 1 of 2408.15664, 4.1)."""
    loads = counts.double()
    return loads.amax(-1) / loads.mean(-1)


def gpu_balance(counts: torch.Tensor, num_gpus: int) -> torch.Tensor:
    """Return the mean over the maximum of the loads of GPUs that hold the experts in order, `[...]`: 1 is even.

    It is the "balancedness" of expert parallelism that serving engines log.

    Args:
        counts: `[..., E]`, E a multiple of `num_gpus`.
        num_gpus: GPUs with as many experts each.
    """
    loads = counts.double().unflatten(-1, (num_gpus, -1)).sum(-1)
    return loads.mean(-1) / loads.amax(-1)


def is_collapsed(counts: torch.Tensor, top_k: int) -> bool:
    """Tell whether the K busiest experts have their even share K/E of all choices and half of the rest, or more.

    Args:
        counts: `[E]`.
        top_k: K, experts of a token.
    """
    even = top_k / counts.shape[-1]
    busiest = load_shares(counts.double()).topk(min(top_k, counts.shape[-1])).values.sum()
    return even < 1 and float(busiest) >= even + (1 - even) / 2


# Entropy and divergence


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """Return the entropy of distributions `[..., E]` in nats, `[...]`: -sum p log p."""
    return torch.special.entr(shares.double()).sum(-1)


def choice_entropy(counts: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the shares of all choices over log E, `[...]`: 1 is even, 0 is one expert."""
    return entropy(load_shares(counts.double())) / _log(counts.shape[-1])


def token_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each token's router distribution over log E: `[T, E]` gives `[T]`; 1 is undecided."""
    return entropy(scores) / _log(scores.shape[-1])


def mutual_information(joint: torch.Tensor) -> torch.Tensor:
    """Return the mutual information of two variables by their joint counts `[..., A, B]`, in nats, `[...]`."""
    joint = joint.double() / joint.sum((-2, -1), keepdim=True)
    margins = entropy(joint.sum(-1)) + entropy(joint.sum(-2))
    return (margins - entropy(joint.flatten(-2))).clamp(min=0)


def specialisation(counts: torch.Tensor) -> torch.Tensor:
    """Return the mutual information of expert and domain, with domains as likely as each other, in nats.

    It is 0 if every domain loads the experts alike, log D if no two domains share one, and of two domains their
    `jensen_shannon` divergence (the generalised divergence of Lin 1991, 10.1109/18.61115, equation 5.1).

    Args:
        counts: `[..., D, E]`.

    Returns:
        `[...]`.
    """
    return mutual_information(load_shares(counts.double()))


def jensen_shannon(counts: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of two loads `[..., E]` in nats, 0 to log 2 (Lin 1991, equation 4.1)."""
    return specialisation(torch.stack([counts, others], dim=-2))


def total_variation(counts: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the total variation of two histograms `[..., E]`, 0 to 1: half the sum of the shares' differences."""
    return (load_shares(counts.double()) - load_shares(others.double())).abs().sum(-1) / 2


# Agreement


def co_activation(together: torch.Tensor) -> torch.Tensor:
    """Return the share of each expert's tokens that use each other one too, `[E, E]` (OLMoE, 2409.02060, 5.2).

    Args:
        together: tokens that use both, `[E, E]`, and on the diagonal all tokens of an expert.
    """
    shares = together.double() / together.diagonal()[:, None].clamp(min=1)
    return shares - torch.diag_embed(shares.diagonal())


def agreeing_choices(
    reference: torch.Tensor, other: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count each token's choices in `reference`, and those among them that `other` made too.

    Args:
        reference: int64 `[T, K]`.
        other: int64 `[T, K']` of the same tokens.
        num_experts: E.

    Returns:
        agreeing and all, int64 `[T]` each.
    """
    is_active = reference < num_experts
    agrees = (reference[:, :, None] == other[:, None, :]).any(-1) & is_active
    return agrees.sum(-1), num_active(reference, num_experts)


def routing_agreement(reference: torch.Tensor, other: torch.Tensor, num_experts: int) -> float:
    """Return the share of the choices in `reference` that `other` made for the same token, in any order: 1 if all.

    Arguments as in `agreeing_choices`.
    """
    agreeing, chosen = agreeing_choices(reference, other, num_experts)
    return float(agreeing.sum() / chosen.sum())


def agreement_by_chance(counts: torch.Tensor, other_tokens: torch.Tensor, num_tokens: int) -> float:
    """Return the `routing_agreement` of two routers with these loads that choose independently of each other.

    It is the sum over experts of the reference's share of choices times the other's share of tokens.

    Args:
        counts: of the reference's choices, `[E]`.
        other_tokens: tokens that the other sends to each expert, `[E]`.
        num_tokens: T.
    """
    return float((load_shares(counts.double()) * other_tokens.double()).sum() / num_tokens)


# Numbers of active experts


def num_active(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how many experts each token uses: `[..., K]` gives int64 `[...]`."""
    return (top_k_index < num_experts).sum(-1)


def histogram_quantile(histogram: torch.Tensor, percent: int) -> int:
    """Return the smallest number n such that `percent` % of the items of `histogram [N]`, or more, are n or less."""
    return int((100 * histogram.cumsum(0) < percent * histogram.sum()).sum())


def histogram_mean(histogram: torch.Tensor) -> float:
    """Return the mean number of the items of `histogram [N]`, whose entry n counts those that are n."""
    numbers = torch.arange(len(histogram), dtype=torch.float64)
    return float((numbers * histogram).sum() / histogram.sum())


# Similarity of layers


def linear_cka(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the linear centred kernel alignment of each pair of layers (arXiv 1905.00414, Section 3).

    |Y'X|^2 / (|X'X| |Y'Y|) of centred columns, 0 to 1, by products of tokens: <XX', YY'> / (|XX'| |YY'|). Rotating or
    scaling a layer's features changes nothing. With fewer tokens than features it is too high.

    Args:
        layers: L tensors `[T, H]` of the same tokens; H may differ.

    Returns:
        float32 `[L, L]`.
    """
    centred = (each.double() - each.double().mean(0) for each in layers)
    products = torch.stack([(x @ x.T).float().flatten() for x in centred])
    products = torch.nn.functional.normalize(products, dim=1)
    return products @ products.T


def best_match(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Match experts one to one by the cosine of their outputs on the same tokens, so that the sum is largest.

    Args:
        x: `[E, T, H]` outputs of the experts of one layer.
        y: `[E', T, H]` of another, on the same tokens; E' is at least E.

    Returns:
        int64 `[E]`, for each of x's experts one of y's, and the mean of their cosines, -1 to 1. The cosine is of all
        tokens' outputs as one vector; that of an expert without output is 0.
    """
    from scipy.optimize import linear_sum_assignment  # here, as it takes a while and healing needs it not

    flat = [torch.nn.functional.normalize(each.flatten(1).float(), dim=1) for each in (x, y)]
    cosines = flat[0] @ flat[1].T
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return torch.from_numpy(columns).long(), float(cosines[rows, columns].mean())


def _log(num_experts: int) -> float:
    return math.log(max(num_experts, 2))  # of a single expert the entropy is 0

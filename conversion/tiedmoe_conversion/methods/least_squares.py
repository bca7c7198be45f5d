"""`least_squares`: closed-form fits of each pool row to the experts that it stands for, on their own tokens."""

import math
from typing import Literal

import torch

from ..layout.neurons import ExpertFunction, Experts
from .base import Group, LayerExperts, Memory, Pool, Sizes, register_method
from .matching import match_neurons, matching_bytes
from .readers import Reader, better_pool, slots_of_rows

ROUNDS = 16  # of leaving neurons out; more gave nothing


def _scratch_bytes(sizes: Sizes, up: str, candidates: int, tokens_per_expert: int, **options) -> int:
    """Return the scratch memory: a row's tokens and their features, and four Gram matrices in float64.

    The matrices are of the neurons to choose from, or of one expert's.
    """
    side = sizes.width * min(candidates, sizes.num_readers) if up == "neurons" else max(sizes.width, sizes.hidden_size)
    num_tokens = min(tokens_per_expert, sizes.num_tokens)
    tokens = num_tokens * (8 * sizes.num_readers * sizes.hidden_size + 24 * (side + sizes.hidden_size))
    matrices = 4 * 8 * (side + 1) ** 2 + 2 * 8 * side * sizes.hidden_size
    return tokens + max(matrices, matching_bytes(sizes, num_tokens))


@register_method(
    "least_squares",
    slot_maps=True,
    memory=Memory(group_copies=(1, 4), scratch_bytes=_scratch_bytes),
    calibration=True,
    refines="align",
)
def least_squares(
    group: Group,
    start: Pool,
    up: Literal["neurons", "regmean", "keep"] = "neurons",
    ridge: float = 0.01,
    shrink: float = 0.9,
    candidates: int = 4,
    tokens_per_expert: int = 4096,
) -> Pool:
    """Return each pool row's gate and up by choosing neurons or by RegMean, then its down by least squares.

    A slot that reads the row is a reader. f(x) is what the row's neurons hand to down, y(x) the output of a reader's
    own expert, w its routing weight; sums run over the tokens of all readers:

        up="regmean"  W = (sum W_l G_l)(sum G_l)^-1 for neurons matched to the start's row, G_l = sum w^2 x x^T
                      with entries off the diagonal times `shrink` (RegMean, arXiv 2212.09849, Section 3)
        up="neurons"  the I of all readers' neurons that fit best: those whose loss raises sum w^2 |y - D f|^2 least
                      are left out, step by step
        up="keep"     the start's own
        down          D = D_0 + (sum w^2 (y - D_0 f) f^T)(sum w^2 f f^T + lambda I)^-1,
                      lambda = ridge * the mean of the diagonal

    A row whose fit is not better on held-out tokens stays as it was, and so does the pool if the model's loss is not
    less.

    Args:
        start: the pool to refine; `align`'s where the recipe names none before it.
        candidates: neurons to choose from, times I, by what they add to the output.
        tokens_per_expert: calibration tokens per slot, at most.
    """
    function, generator = group.family_function, group.generator()
    rows = group.pool_experts(start)
    sources = {layer.index: group.tensors(layer) for layer in group.layers}
    fitted, num_kept = [], 0
    for row, slots in enumerate(slots_of_rows(group, start, len(rows))):
        readers = [_reader(group, layer, slot, sources, tokens_per_expert, generator) for layer, slot in slots]
        old = rows[row]
        new = _fit_row(function, old, readers, up, ridge, shrink, candidates)
        num_kept += new is old
        fitted.append(new)
    if num_kept:
        group.note(
            f"least_squares: {num_kept} of {len(rows)} pool rows stay as they were: no tokens, or no better fit"
        )
    pool = group.pool(Experts.concatenated(fitted), start.slot_maps)
    return start if num_kept == len(rows) else better_pool(group, "least_squares", start, pool)


def _reader(
    group: Group,
    layer: LayerExperts,
    slot: int,
    sources: dict[int, dict[str, torch.Tensor]],
    limit: int,
    generator: torch.Generator,
) -> Reader:
    inputs = layer.inputs()
    hidden_states, weights = inputs.sample_of_slot(slot, limit, generator)
    expert = group.expert(sources[layer.index], slot)
    return Reader(layer, slot, expert, hidden_states, weights, inputs.of_slot(slot, held_out=True))


def _fit_row(
    function: ExpertFunction,
    old: Experts,
    readers: list[Reader],
    up: str,
    ridge: float,
    shrink: float,
    candidates: int,
) -> Experts:
    """Return the row that fits its `readers` better, or `old` itself."""
    if len(readers) == 1:
        return readers[0].expert  # nothing to share
    readers = [reader for reader in readers if len(reader.weights)]
    before = _error(function, old, readers)
    if before == 0:
        return old
    new = old
    if up == "regmean":
        new = _regmean(function, old, readers, shrink)
    elif up == "neurons":
        new = _chosen_neurons(function, old, readers, ridge, candidates)
    new = _refit_down(function, new, readers, ridge)
    after = _error(function, new, readers)
    return new if after < before else old


def _error(function: ExpertFunction, row: Experts, readers: list[Reader]) -> float:
    """Return sum w^2 |y - row(x)|^2 on the held-out tokens, or on those to fit on where none are held out."""
    total = 0.0
    is_held_out = any(len(reader.held_out[1]) for reader in readers)
    for reader in readers:
        hidden_states, weights = reader.held_out if is_held_out else (reader.hidden_states, reader.weights)
        gap = function.outputs(reader.expert, hidden_states) - function.outputs(row, hidden_states)
        total += (gap[0] * weights[:, None]).square().sum().item()
    return total


def _regmean(function: ExpertFunction, old: Experts, readers: list[Reader], shrink: float) -> Experts:
    """Fit incoming weights with the least sum_l |(W - W_l) x|^2; the others are means, by the same tokens' weights."""
    total = old.map(torch.zeros_like)
    numerator = denominator = torch.zeros(())
    size = 0.0
    for reader in readers:
        expert = match_neurons(function, reader.expert, old, reader.hidden_states, reader.weights)
        inputs, incoming = reader.hidden_states, expert.up[0].flatten(0, 1)
        if expert.up_bias is not None:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
            incoming = torch.cat([incoming, expert.up_bias[0].flatten()[:, None]], 1)
        inputs = (inputs * reader.weights[:, None]).double()
        gram = inputs.T @ inputs
        gram = shrink * gram + (1 - shrink) * torch.diag(gram.diagonal())
        numerator, denominator = numerator + incoming.double() @ gram, denominator + gram
        share = reader.weights.square().sum()
        total.add_(expert, share[None])
        size += share.item()
    incoming = _solve(denominator, numerator, 1e-6)
    hidden = old.up.shape[-1]
    mean = total.map(lambda tensor: tensor / size)
    bias = None if mean.up_bias is None else incoming[:, hidden].float().view_as(mean.up_bias)
    return Experts(incoming[:, :hidden].float().reshape(mean.up.shape), mean.down, bias, mean.down_bias)


def _chosen_neurons(
    function: ExpertFunction, old: Experts, readers: list[Reader], ridge: float, candidates: int
) -> Experts:
    """Return the I of all readers' neurons that together fit best, with the outgoing weights of that fit.

    Backward elimination: leaving neuron k out costs |D_k|^2 / (A^-1)_kk, where A = sum w^2 f f^T + lambda I and D the
    fit on the neurons that are left (as Optimal Brain Surgeon).
    """
    width = old.down.shape[-1]
    pool = _strongest(function, readers, candidates * width)
    gram, cross, _ = _normal_equations(function, pool, readers, torch.zeros_like(pool.down[0]))
    gram += max(ridge, 1e-6) * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left = torch.arange(pool.down.shape[-1] + (pool.down_bias is not None))
    for rounds_left in range(ROUNDS, -1, -1):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[left][:, left]))
        outgoing = cross[:, left] @ inverse
        surplus = (left < pool.down.shape[-1]).sum().item() - width
        if surplus == 0:
            break
        cost = outgoing.square().sum(0) / inverse.diagonal()
        cost[left >= pool.down.shape[-1]] = math.inf  # the bias of down stays
        left = left[cost.argsort()[math.ceil(surplus / max(rounds_left, 1)) :].sort().values]
    chosen = left[:width]
    bias = None if pool.up_bias is None else pool.up_bias[:, chosen]
    down_bias = None if pool.down_bias is None else outgoing[:, width][None].float()
    return Experts(pool.up[:, chosen], outgoing[None, :, :width].float().contiguous(), bias, down_bias)


def _strongest(function: ExpertFunction, readers: list[Reader], limit: int) -> Experts:
    """Return the at most `limit` neurons of all readers that add most, sum w^2 f^2 |d|^2, as one wide expert."""
    strength = torch.cat(
        [
            (function.features(reader.expert, reader.hidden_states)[0] * reader.weights[:, None]).square().sum(0)
            * reader.expert.down[0].square().sum(0)
            for reader in readers
        ]
    )
    chosen = strength.argsort(descending=True)[:limit].sort().values
    experts = [reader.expert for reader in readers]
    up = torch.cat([each.up for each in experts], 1)[:, chosen]
    down = torch.cat([each.down for each in experts], 2)[:, :, chosen]
    biases = [each.up_bias for each in experts if each.up_bias is not None]
    up_bias = torch.cat(biases, 1)[:, chosen] if biases else None
    bias = experts[0].down_bias
    return Experts(up, down, up_bias, None if bias is None else torch.zeros_like(bias))


def _refit_down(function: ExpertFunction, row: Experts, readers: list[Reader], ridge: float) -> Experts:
    """Fit outgoing weights and their bias as a correction: the ridge pulls towards what they were."""
    gram, cross, width = _normal_equations(function, row, readers, row.down[0])
    change = _solve(gram, cross, ridge).float()
    bias = None if row.down_bias is None else row.down_bias + change[:, width]
    return Experts(row.up, row.down + change[None, :, :width], row.up_bias, bias)


def _normal_equations(
    function: ExpertFunction, row: Experts, readers: list[Reader], down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return sum w^2 f f^T and sum w^2 (y - D f) f^T in float64, with a constant feature for a bias of down; and I."""
    gram = cross = torch.zeros(())
    for reader in readers:
        features = function.features(row, reader.hidden_states)[0]
        gap = reader.targets(function) - features @ down.T
        if row.down_bias is not None:
            gap = gap - row.down_bias
            features = torch.cat([features, torch.ones(len(features), 1)], 1)
        features = (features * reader.weights[:, None]).double()
        gram = gram + features.T @ features
        cross = cross + (gap * reader.weights[:, None]).double().T @ features
    return gram, cross, row.down.shape[-1]


def _solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return cross (gram + lambda I)^-1, with lambda in units of the mean diagonal and never quite zero."""
    size = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    damped = gram + max(ridge, 1e-9) * size * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(damped, cross.T).T

"""What one layer adds to its pool's weights: low-rank factors per slot, `W[slot] + b @ a`."""

from collections.abc import Mapping

import torch

from ..layout.neurons import ExpertFunction, Experts
from .base import Group, Pool, Sizes
from .matching import match_neurons, matching_bytes

# By layer index and name of the projection: `b [E, rows, r]` and `a [E, r, columns]` in the family's own layout.
Residuals = Mapping[int, Mapping[str, tuple[torch.Tensor, torch.Tensor]]]

TOKENS_PER_EXPERT = 2048  # of the calibration text, at most
DAMPING = 0.01  # of a Gram matrix, in units of its mean diagonal


def residuals(group: Group, pool: Pool, rank: int) -> dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return the factors of the given rank that bring each slot's pool row nearest to its own expert.

    The own expert's neurons are put in the row's order first. With D the difference of a projection's weights and G =
    sum w^2 x x^T over the projection's inputs in the slot's tokens, b a = U U^T D, where U are the first `rank`
    eigenvectors of D G D^T: the least |(D - b a) x|^2 over them (arXiv 2403.07378, Section 3, without its roots), and
    the plain truncated SVD where G is the identity: without calibration text, or without tokens. `down` is fitted to
    what the neurons give with the residual of gate and up, D = D_0 + (sum w^2 (y - D_0 f) f^T)(sum w^2 f f^T + lambda
    I)^-1, as in `least_squares`. Where a fit of `down` alone is nearer, as it may be to a row that was itself fitted,
    gate and up have none.

    Args:
        group: with calibration inputs where `held_out_loss` is there.
        pool: in the source's dtype, as are the factors.
        rank: from 1 to the least of every projection's rows and columns.

    Returns:
        By layer index and projection the pair `(b [E, rows, r], a [E, r, columns])`, as `TiedExperts` registers it; b
        is zero where the row is the slot's own expert.
    """
    function, generator = group.family_function, group.generator()
    dtype, rows = group.layers[0].read("down_proj").dtype, group.pool_experts(pool)
    found = {}
    for layer in group.layers:
        experts, slot_map = group.experts(layer), group.slot_map(pool, layer).tolist()
        factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {function.up_name: [], "down_proj": []}
        for slot, row in enumerate(slot_map):
            inputs = torch.zeros(0, rows.up.shape[-1]), torch.zeros(0)
            if group.held_out_loss is not None:
                inputs = layer.inputs().sample_of_slot(slot, TOKENS_PER_EXPERT, generator)
            pairs_of_slot = _factors(function, experts[slot], rows[row], rank, generator, *inputs)
            for name, pair in zip(factors, pairs_of_slot):
                factors[name].append(pair)
        found[layer.index] = {
            name: (
                torch.stack([b for b, _ in pairs]).to(dtype).contiguous(),
                torch.stack([a for _, a in pairs]).to(dtype).contiguous(),
            )
            for name, pairs in factors.items()
        }
    return found


def scratch_bytes(sizes: Sizes) -> int:
    """Return the scratch memory, at most: one expert's tokens, and four float64 matrices of neurons or of inputs."""
    num_tokens = min(TOKENS_PER_EXPERT, sizes.num_tokens)
    tokens = num_tokens * (32 * sizes.width + 40 * sizes.hidden_size)
    low_rank = 4 * 8 * min(2 * sizes.width, sizes.hidden_size) ** 2 + 4 * 8 * 2 * sizes.width * sizes.hidden_size
    return tokens + max(low_rank, 4 * 8 * sizes.width**2, matching_bytes(sizes, num_tokens))


def _factors(
    function: ExpertFunction,
    own: Experts,
    row: Experts,
    rank: int,
    generator: torch.Generator,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return `(b, a)` of the incoming weights and of the outgoing ones, in the family's layout."""
    if own.equals(row):
        up, down = (_zeros(each.flatten(0, -2), rank, generator) for each in (row.up[0], row.down[0]))
    else:
        matched = match_neurons(function, own, row, hidden_states, weights)
        up = _low_rank((matched.up - row.up)[0].flatten(0, 1), hidden_states * weights[:, None], rank)
        with_up = Experts(row.up + (up[0] @ up[1]).view_as(row.up), row.down, row.up_bias, row.down_bias)
        down, error = _fit_down(function, own, with_up, matched.down[0], rank, hidden_states, weights)
        down_alone, error_alone = _fit_down(function, own, row, row.down[0], rank, hidden_states, weights)
        if error_alone < error:
            up, down = _zeros(row.up[0].flatten(0, 1), rank, generator), down_alone
    # The rows of b stand as the weights' own do: interleaved, or gate after up.
    b = function.tensors(Experts(up[0].view(*row.up.shape[:3], rank), row.down), torch.float32)[function.up_name]
    if function.module.is_transposed:
        return (up[1].T, b[0]), (down[1].T, down[0].T)
    return (b[0], up[1]), down


def _fit_down(
    function: ExpertFunction,
    own: Experts,
    row: Experts,
    near: torch.Tensor,
    rank: int,
    hidden_states: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """Fit the factors of down to what the neurons of `row` give; return them and sum w^2 |error|^2.

    The ridge pulls down towards `near`.
    """
    change = near - row.down[0]
    features = function.features(row, hidden_states)[0] * weights[:, None]
    targets = function.outputs(own, hidden_states)[0] - (0 if row.down_bias is None else row.down_bias)
    targets = targets * weights[:, None]
    if len(weights):
        gap = targets - features @ near.T
        change = change + torch.linalg.solve(_gram(features), features.double().T @ gap.double()).T.float()
    b, a = _low_rank(change, features, rank)
    return (b, a), (targets - features @ (row.down[0] + b @ a).T).square().sum().item()


def _gram(inputs: torch.Tensor) -> torch.Tensor:
    """Return sum x x^T, damped, in float64; the identity where there are no inputs."""
    size = inputs.shape[1]
    gram = inputs.double().T @ inputs.double()
    mean = gram.diagonal().mean().item()
    return gram + DAMPING * mean * torch.eye(size, dtype=gram.dtype) if mean else torch.eye(size, dtype=gram.dtype)


def _low_rank(change: torch.Tensor, inputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor `change [out, in]` into `b [out, r] @ a [r, in]` with the least error on `inputs [n, in]`.

    The product is exactly zero where `change` is zero.
    """
    change, gram = change.double(), _gram(inputs)
    if len(change) <= len(gram):
        directions = torch.linalg.eigh(change @ gram @ change.T).eigenvectors[:, -rank:].flip(1)
    else:  # the same space, from the eigenvectors of the smaller matrix
        shaped = change @ torch.linalg.cholesky(gram)
        shaped = shaped @ torch.linalg.eigh(shaped.T @ shaped).eigenvectors[:, -rank:].flip(1)
        directions = torch.linalg.qr(shaped).Q
    a = directions.T @ change
    size = a.norm(dim=1).sqrt()  # shared between both, so that neither is out of a half's range
    b = directions * size
    return b.float(), (a / size[:, None].clamp(min=torch.finfo(a.dtype).tiny)).float()


def _zeros(weight: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors that leave `weight [out, in]` as it is: b = 0, and a random a.

    With a = 0 as well, healing would have no gradient (arXiv 2106.09685).
    """
    size = weight.square().mean().sqrt()
    return torch.zeros(weight.shape[0], rank), torch.randn(rank, weight.shape[1], generator=generator) * size

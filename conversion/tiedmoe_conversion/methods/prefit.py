"""`prefit`: a pool trained, before any training of the model, to give what the layers' own experts gave."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..layout.neurons import ExpertFunction, Experts
from .base import Group, LayerExperts, Memory, Pool, RoutedInputs, Sizes, register_method
from .readers import better_pool

CHECKS = 10  # evaluations on held-out tokens, evenly spaced
PATIENCE = 3  # evaluations without progress, after which it stops
HELD_OUT_TOKENS = 4096  # of every layer, at most
BETAS = (0.9, 0.95)  # of Adam; the second forgets early gradients within a few dozen steps


def _scratch_bytes(sizes: Sizes, batch_tokens: int, **options) -> int:
    """Return the scratch memory: one layer's activations with gradients in a step, and its held-out outputs."""
    step = batch_tokens * sizes.top_k * (40 * sizes.width + 24 * sizes.hidden_size)
    held_out = min(HELD_OUT_TOKENS, sizes.num_tokens)
    return max(step, held_out * ((sizes.top_k + 3) * 4 * sizes.hidden_size + 16 * sizes.width))


@register_method(
    "prefit",
    slot_maps=True,
    memory=Memory(group_copies=(1, 7), scratch_bytes=_scratch_bytes),
    calibration=True,
    refines="least_squares",
)
def prefit(
    group: Group,
    start: Pool,
    steps: int = 300,
    learning_rate: float = 0.05,
    objective: Literal["layer", "expert"] = "layer",
    batch_tokens: int = 1024,
) -> Pool:
    """Fit a pool by gradient (Adam) to each layer's own expert outputs on the calibration text, through its slot map.

    Per layer, in units of its own outputs' mean square: objective="layer" is |sum_k w_k (P_k(x) - E_k(x))|^2 over the
    token's experts k, "expert" is sum_k w_k^2 |P_k(x) - E_k(x)|^2. It stops when that is no longer less on held-out
    tokens, goes back to the least, and keeps the start if the model's loss on held-out text is not less.

    Args:
        start: the pool to fit; `least_squares`'s where the recipe names none before it.
        steps: of Adam at most; the rate falls to zero along a cosine.
        learning_rate: in units of each tensor's root mean square.
        batch_tokens: tokens of every layer in a step.
    """
    function, generator = group.family_function, group.generator()
    rows = group.pool_experts(start)
    student = [rows[row].map(lambda tensor: tensor.clone().requires_grad_()) for row in range(len(rows))]
    layers = [_Layer.of(group, start, layer, objective) for layer in group.layers]
    # Every row has its own parameters: one that no token reaches gets no gradient, and no momentum moves it.
    parameters = [tensor for row in student for tensor in row.tensors if tensor is not None]
    optimizer = torch.optim.Adam(
        [{"params": [each], "lr": learning_rate * _size(each)} for each in parameters], betas=BETAS
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = least = sum(layer.held_out_loss(function, student) for layer in layers)
    best, waited = rows, 0
    for step in range(1, steps + 1):
        for layer in layers:
            tokens = torch.randint(layer.inputs.num_fit, (batch_tokens,), generator=generator)
            with torch.enable_grad():
                layer.loss(function, student, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // CHECKS) and step != steps:
            continue
        loss = sum(layer.held_out_loss(function, student) for layer in layers)
        if loss < least:
            least, waited = loss, 0
            best = Experts.concatenated([row.map(lambda tensor: tensor.detach().clone()) for row in student])
        elif (waited := waited + 1) == PATIENCE:
            break
    if not least < first:
        group.note("prefit was not kept: no step was better on held-out tokens")
        return start
    return better_pool(group, "prefit", start, group.pool(best, start.slot_maps))


@dataclass(frozen=True)
class _Layer:
    """One layer's experts, its inputs, and the pool rows that its slots read."""

    experts: Experts
    inputs: RoutedInputs
    rows: list[int]
    objective: str
    size: float  # mean square of the layer's own outputs, summed over H

    @staticmethod
    def of(group: Group, pool: Pool, layer: LayerExperts, objective: str) -> "_Layer":
        found = _Layer(group.experts(layer), layer.inputs(), group.slot_map(pool, layer).tolist(), "layer", 1.0)
        size = found.loss(group.family_function, None, torch.arange(found.inputs.num_fit)[-HELD_OUT_TOKENS:])
        return replace(found, objective=objective, size=max(size.item(), torch.finfo(torch.float32).tiny))

    def loss(self, function: ExpertFunction, student: list[Experts] | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return the objective, mean over `tokens [n]`; without a student that of a pool whose output is zero."""
        hidden_states = self.inputs.hidden_states[tokens].float()
        index, weights = self.inputs.top_k_index[tokens], self.inputs.top_k_weights[tokens].float()
        gaps, owners = [hidden_states.new_zeros(0, hidden_states.shape[1])], [tokens.new_zeros(0)]
        for slot, row in enumerate(self.rows):
            token, place = torch.where(index == slot)
            if not len(token):
                continue
            with torch.no_grad():
                gap = -function.outputs(self.experts[slot], hidden_states[token])[0]
            if student is not None:
                gap = gap + function.outputs(student[row], hidden_states[token])[0]
            gaps.append(gap * weights[token, place, None])
            owners.append(token)
        gap = torch.cat(gaps)
        if self.objective == "layer":
            gap = torch.zeros_like(hidden_states).index_add(0, torch.cat(owners), gap)
        return gap.square().sum() / (max(1, len(tokens)) * self.size)

    @torch.no_grad()
    def held_out_loss(self, function: ExpertFunction, student: list[Experts]) -> float:
        """Return the objective on held-out tokens, or on some to fit on where none are held out."""
        last = torch.arange(len(self.inputs.hidden_states))
        tokens = last[self.inputs.num_fit :] if self.inputs.num_fit < len(last) else last
        return self.loss(function, student, tokens[:: -(-len(tokens) // HELD_OUT_TOKENS)]).item()


def _size(tensor: torch.Tensor) -> float:
    """Return the root mean square; 1e-3 for a tensor of zeros, such as a bias that was never trained."""
    return tensor.detach().square().mean().sqrt().item() or 1e-3

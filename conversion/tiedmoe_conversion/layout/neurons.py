"""One layout for every family's experts: neurons in float32, and what an expert computes of them.

Families store gate and up one after the other or interleaved, plain or transposed, with biases or without, and some
have no gate. The calibrated methods see none of it: neuron i of an expert has incoming weights `up[:, i]` (gate and
up, or up alone) and outgoing ones `down[:, :, i]`; renumbering the neurons changes nothing that an expert computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..errors import ConversionError


@dataclass(frozen=True)
class Experts:
    """Some experts in float32, N of them.

    Attributes:
        up: `[N, I, U, H]`, each neuron's incoming weights; U is 2 (gate, up), or 1 where the family has no gate.
        down: `[N, H, I]`, each neuron's outgoing weights.
        up_bias: `[N, I, U]`, None where the family has none.
        down_bias: `[N, H]`, None where the family has none.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Up, down and their biases."""
        return self.up, self.down, self.up_bias, self.down_bias

    def equals(self, other: "Experts") -> bool:
        """Tell whether all weights are the same."""
        pairs = zip(self.tensors, other.tensors)
        return all(its is None if mine is None else its is not None and torch.equal(mine, its) for mine, its in pairs)

    def __len__(self) -> int:
        return len(self.up)

    def __getitem__(self, rows: "int | slice | torch.Tensor") -> "Experts":
        """Return the experts `rows` as `Experts`; an integer gives one expert, N = 1."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return self.map(lambda tensor: tensor[rows])

    def renumbered(self, neurons: torch.Tensor) -> "Experts":
        """Return the same functions with neuron `neurons[n, i]` in place i; `neurons [N, I]` int64."""
        _, _, num_inputs, hidden = self.up.shape
        up = self.up.gather(1, neurons[:, :, None, None].expand(-1, -1, num_inputs, hidden))
        down = self.down.gather(2, neurons[:, None, :].expand(-1, hidden, -1))
        bias = self.up_bias
        if bias is not None:
            bias = bias.gather(1, neurons[:, :, None].expand(-1, -1, num_inputs))
        return Experts(up, down, bias, self.down_bias)

    def flipped(self, signs: torch.Tensor) -> "Experts":
        """Return the experts with some neurons' signs changed, which `ExpertFunction.can_flip` allows.

        A neuron's last input and its outgoing weights are multiplied by its entry of `signs [N, I]`, 1 or -1.
        """
        up = self.up.clone()
        up[:, :, -1] *= signs[:, :, None]
        bias = self.up_bias
        if bias is not None:
            bias = bias.clone()
            bias[:, :, -1] *= signs
        return Experts(up, self.down * signs[:, None], bias, self.down_bias)

    def add_(self, other: "Experts", shares: torch.Tensor) -> None:
        """Add `other`'s weights times `shares [N]` in place: sums of matched experts."""
        for mine, its in zip(self.tensors, other.tensors):
            if mine is not None and its is not None:
                mine += its * shares.view(-1, *[1] * (mine.dim() - 1))

    @staticmethod
    def concatenated(parts: "list[Experts]") -> "Experts":
        """Return all the experts of `parts`, in order."""

        def cat(name: str) -> torch.Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return Experts(
            torch.cat([p.up for p in parts]), torch.cat([p.down for p in parts]), cat("up_bias"), cat("down_bias")
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Experts":
        """Return the experts with `change` applied to every tensor."""
        up, down, up_bias, down_bias = (None if tensor is None else change(tensor) for tensor in self.tensors)
        assert up is not None
        assert down is not None
        return Experts(up, down, up_bias, down_bias)


@dataclass(frozen=True)
class ExpertFunction:
    """How a family's experts are stored and what they compute, taken from one of its own modules (on meta).

    Raises:
        ConversionError: the module has parameters besides up, down and their biases, or a norm after each expert.
    """

    module: Any  # an nn.Module; torch types every attribute of one as a tensor or a module

    def __post_init__(self):
        expected = {self.up_name, "down_proj"} | (
            {f"{self.up_name}_bias", "down_proj_bias"} if self.module.has_bias else set()
        )
        found = {name for name, _ in self.module.named_parameters()}
        if found != expected or getattr(self.module, "has_post_expert_norm", False):
            raise ConversionError(
                f"{type(self.module).__name__} has the parameters {sorted(found)}; expected {sorted(expected)} and no "
                "norm after each expert, which is all that calibrated methods know: choose union, select or average"
            )

    @property
    def up_name(self) -> str:
        """The family's name of the incoming weights."""
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @cached_property
    def can_flip(self) -> bool:
        """Whether an expert stays the same when a neuron's `up` (not its gate) and its `down` change signs."""
        if not self.module.has_gate:
            return False
        probe = torch.linspace(-3, 3, 10).view(1, 5, 2)
        columns, flipped = (
            (each.transpose(1, 2) if self.module.is_concatenated else each).flatten(1)
            for each in (probe, probe * torch.tensor([1, -1]))
        )
        return torch.equal(self.module._apply_gate(columns), -self.module._apply_gate(flipped))

    def neurons(self, tensors: Mapping[str, torch.Tensor]) -> Experts:
        """Return the family's `tensors` by parameter name, `[N, ...]` in any dtype, as neurons; float32 copies."""
        up, down = tensors[self.up_name], tensors["down_proj"]
        if self.module.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        bias, down_bias = tensors.get(f"{self.up_name}_bias"), tensors.get("down_proj_bias")
        return Experts(
            self._by_neuron(up).to(torch.float32, copy=True).contiguous(),
            down.to(torch.float32, copy=True).contiguous(),
            None if bias is None else self._by_neuron(bias).to(torch.float32, copy=True).contiguous(),
            None if down_bias is None else down_bias.to(torch.float32, copy=True),
        )

    def tensors(self, experts: Experts, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return `experts` as the family stores them, by parameter name, contiguous and in `dtype`."""
        up, down = self._by_row(experts.up), experts.down
        if self.module.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        found = {self.up_name: up, "down_proj": down}
        if experts.up_bias is not None and experts.down_bias is not None:
            found |= {f"{self.up_name}_bias": self._by_row(experts.up_bias), "down_proj_bias": experts.down_bias}
        return {name: tensor.to(dtype).contiguous() for name, tensor in found.items()}

    def features(self, experts: Experts, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what each neuron hands to `down`, `[N, n, I]`; differentiable.

        `hidden_states` is `[N, n, H]`, or `[n, H]` for all experts.
        """
        num, width, num_inputs, hidden = experts.up.shape
        if hidden_states.dim() == 2:
            hidden_states = hidden_states.expand(num, -1, -1)
        before = hidden_states @ experts.up.reshape(num, width * num_inputs, hidden).transpose(1, 2)
        before = before.unflatten(-1, (width, num_inputs))
        if experts.up_bias is not None:
            before = before + experts.up_bias[:, None]
        if not self.module.has_gate:
            return self.module.act_fn(before.squeeze(-1))
        # The family's own formula, in its own order of the columns.
        columns = before.transpose(-1, -2) if self.module.is_concatenated else before
        return self.module._apply_gate(columns.flatten(-2))

    def outputs(self, experts: Experts, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute each expert's output, without routing weights: `[N, n, H]` or `[n, H]` for all -> `[N, n, H]`."""
        out = self.features(experts, hidden_states) @ experts.down.transpose(1, 2)
        return out if experts.down_bias is None else out + experts.down_bias[:, None]

    def _by_neuron(self, rows: torch.Tensor) -> torch.Tensor:
        """Reshape `[N, U * I, ...]` as the family has it into `[N, I, U, ...]`."""
        num_inputs = 2 if self.module.has_gate else 1
        if self.module.is_concatenated:
            return rows.unflatten(1, (num_inputs, -1)).transpose(1, 2)
        return rows.unflatten(1, (-1, num_inputs))

    def _by_row(self, neurons: torch.Tensor) -> torch.Tensor:
        if self.module.is_concatenated:
            neurons = neurons.transpose(1, 2)
        return neurons.flatten(1, 2)

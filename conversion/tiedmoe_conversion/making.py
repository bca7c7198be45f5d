"""Makes the tensors that a plan's operations name; holds one pool, and no other, at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .families import FamilyTensors, check_finite
from .methods import Group, Pool
from .plan import Plan, TensorOperation


@dataclass(frozen=True)
class _SourceExperts:
    """One source layer's experts as a method reads them."""

    index: int
    path: str
    tensors: FamilyTensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors.read(f"{self.path}.{name}")


class TensorMaker:
    """Makes the tensor of an operation; keeps the pool that is being written, and no other."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._current: tuple[int, Pool] | None = None

    def make(self, operation: TensorOperation) -> Iterator[torch.Tensor]:
        """The operation's tensor in blocks along dimension 0."""
        if operation.pool < 0:
            yield self.plan.source.tensors.read(operation.target)
        elif operation.kind == "slot_map":
            yield self._pool(operation.pool).slot_maps[operation.layer]
        else:
            for block in self._pool(operation.pool).blocks(operation.parameter):
                check_finite(block, operation.target, f"method {self.plan.recipe.method!r}")
                yield block
                del block  # as the writer does

    def _pool(self, index: int) -> Pool:
        if self._current is None or self._current[0] != index:
            self._current = None
            layers = tuple(
                _SourceExperts(layer, self.plan.source.experts[layer], self.plan.source.tensors)
                for layer in self.plan.groups[index]
            )
            num_experts = getattr(self.plan.config, self.plan.config.num_experts_field)
            pool = self.plan.method.build(Group(layers, num_experts), **self.plan.recipe.method_options)
            self._current = (index, pool)
        return self._current[1]

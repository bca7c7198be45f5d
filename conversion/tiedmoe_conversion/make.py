"""Makes the tensors that a plan's operations name, holding one pool at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from safetensors.torch import load_file

from transformers_tiedmoe.run_folder import Work

from .calibration.inputs import Calibration, Residuals, TiedTensors
from .checkpoint.writer import Progress, write_tensors
from .layout.keys import FamilyTensors, check_finite
from .layout.neurons import ExpertFunction
from .layout.source_model import SourceModel
from .methods.base import Group, Pool, RoutedInputs
from .methods.residual import residuals
from .methods.widen import widen
from .operations import TensorOperation
from .plan import Plan
from .recipe import ConversionRecipe


@dataclass(frozen=True)
class SourceExperts:
    """One source layer's experts as a method reads them."""

    index: int
    path: str
    tensors: FamilyTensors
    calibration: Calibration | None = None
    _inputs: list[RoutedInputs] = field(default_factory=list, repr=False)

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        return self.tensors.read(f"{self.path}.{name}", first, last)

    def rows(self, name: str) -> list[tuple[int, int]]:
        return self.tensors.rows(f"{self.path}.{name}")

    def inputs(self) -> RoutedInputs:
        assert self.calibration is not None, "a method that was not registered to need calibration asks for it"
        if not self._inputs:
            self._inputs.append(self.calibration.inputs(self.index))
        return self._inputs[0]


@dataclass(frozen=True)
class MadePool:
    """A pool and what the layers of its group add to it."""

    pool: Pool
    residuals: Residuals = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_pool(
    recipe: ConversionRecipe, source: SourceModel, layers: Sequence[int], width: int, calibration: Calibration | None
) -> MadePool:
    """Run the recipe's methods for one group: the first makes the pool, the others refine it.

    The pool is in the source's dtype; the same recipe gives the same bits.

    Args:
        recipe: names the methods; its groups and sizes are not used.
        source: whose layers are tied.
        layers: of the group, by index.
        width: P, experts of the pool.
        calibration: None if no method needs text.
    """
    parameters = source.parameter_names(layers[0])

    def held_out_loss(pool: Pool) -> float:
        assert calibration is not None
        return calibration.loss(TiedTensors(source, {layer: (pool, {}) for layer in layers}, parameters))

    group = Group(
        layers=tuple(SourceExperts(layer, source.experts[layer], source.tensors, calibration) for layer in layers),
        num_experts=source.num_experts,
        pool_num_experts=width,
        parameters=parameters,
        function=cache(lambda: ExpertFunction(source.model.get_submodule(source.experts[layers[0]]))),
        seed=recipe.seed * 1_000_003 + layers[0],
        held_out_loss=held_out_loss if calibration is not None else None,
    )
    pool: Pool | None = None
    for step, (method, options) in enumerate(recipe.steps):
        if method.refines is None:
            pool = method.build(group, **options)
        else:
            pool = method.build(group, pool, **options)
        if not step and not method.any_width:
            own = method.pool_num_experts(group.num_experts, len(layers))
            pool = widen(group, pool, group.pool_num_experts) if group.pool_num_experts > own else pool
    assert pool is not None
    made: Residuals = {}
    if recipe.residual_rank:
        made = residuals(group, pool, recipe.residual_rank)
    return MadePool(pool, made, list(group.notes))


class TensorMaker:
    """Makes the tensor of an operation; keeps only the pool that is being written.

    Attributes:
        notes: of the methods, by pool.
    """

    def __init__(
        self,
        plan: Plan,
        calibration: Calibration | None = None,
        work: Work | None = None,
        progress: Progress | None = None,
    ):
        self.plan, self.calibration, self.work, self.progress = plan, calibration, work, progress
        self.notes: dict[int, list[str]] = {}
        self._current: tuple[int, MadePool] | None = None
        self._streams = all(method.streams for method, _ in plan.recipe.steps) and not plan.recipe.residual_rank

    @property
    def all_notes(self) -> list[str]:
        """The methods' notes, each with its pool; also those of pools that an earlier run made."""
        if not self._streams:
            for p in range(len(self.plan.groups)):
                if p not in self.notes and self.work and (found := self.work.load(f"pool-{p}")):
                    self.notes[p] = found[1]["notes"]
        return [f"pool {p}: {note}" for p, notes in sorted(self.notes.items()) for note in notes]

    def make(self, operation: TensorOperation) -> Iterator[torch.Tensor]:
        """Return the operation's tensor in blocks along dimension 0."""
        if operation.kind == "zeros":
            yield torch.zeros(operation.shape, dtype=operation.dtype)
            return
        if operation.pool < 0:
            tensors = self.plan.source.tensors
            for rows in tensors.rows(operation.target) if len(operation.shape) > 2 else [(0, None)]:
                yield tensors.read(operation.target, *rows)
            return
        made = self._pool(operation.pool)
        if operation.kind == "slot_map":
            identity = torch.arange(operation.shape[0])  # of a method without slot maps, in a recipe with others
            yield made.pool.slot_maps.get(operation.layer, identity)
        elif operation.kind == "residual":
            name, factor = operation.parameter.rsplit("_residual_", 1)
            tensor = made.residuals[operation.layer][name]["ba".index(factor)]
            check_finite(tensor, operation.target, f"the residual of method {self.plan.recipe.method!r}")
            yield tensor
        else:
            is_copy = self._streams and not any(method.memory.float32_layers for method, _ in self.plan.recipe.steps)
            for block in made.pool.blocks(operation.parameter):
                if not is_copy:  # copies were checked when they were read
                    check_finite(block, operation.target, f"method {self.plan.recipe.method!r}")
                yield block
                del block  # as the writer does

    def _pool(self, index: int) -> MadePool:
        if self._current is None or self._current[0] != index:
            self._current = None
            self._current = (index, self._stored(index) if self.work and not self._streams else self._make(index))
            self.notes[index] = self._current[1].notes
        return self._current[1]

    def _make(self, index: int) -> MadePool:
        if self.plan.statistics_bytes and self.calibration is not None:
            self.calibration.gather([layer for group in self.plan.groups for layer in group], self.progress)
        if not self._streams and self.progress:
            self.progress(index, len(self.plan.groups), f"making pool {index}")
        plan = self.plan
        return make_pool(plan.recipe, plan.source, plan.groups[index], plan.pool_num_experts[index], self.calibration)

    def _stored(self, index: int) -> MadePool:
        """Load a pool that an earlier run, which was killed, left in the working folder."""
        assert self.work is not None
        name = f"pool-{index}.safetensors"
        found = self.work.load(name)
        if found is None:
            made = self._make(index)
            tensors = _flat(made, self.plan.source.parameter_names(self.plan.groups[index][0]))
            self.work.store(name, partial(write_tensors, tensors=tensors), {"notes": made.notes})
            return made
        path, metadata = found
        return _unflat(load_file(path), metadata["notes"])


def _flat(made: MadePool, parameters: tuple[str, ...]) -> dict[str, torch.Tensor]:
    tensors = {f"pool/{name}": made.pool.read(name) for name in parameters}
    tensors |= {f"slot_map/{layer}": slot_map for layer, slot_map in made.pool.slot_maps.items()}
    for layer, factors in made.residuals.items():
        for name, pair in factors.items():
            tensors |= {f"residual/{layer}/{name}/{factor}": each for factor, each in zip("ba", pair)}
    return tensors


def _unflat(tensors: Mapping[str, torch.Tensor], notes: list[str]) -> MadePool:
    slot_maps: dict[int, torch.Tensor] = {}
    factors: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split("/")
        if kind == "slot_map":
            slot_maps[int(rest[0])] = tensor
        elif kind == "residual" and rest[2] == "b":
            factors.setdefault(int(rest[0]), {})[rest[1]] = (tensor, tensors[f"{name[:-1]}a"])

    def blocks(name: str) -> Iterator[torch.Tensor]:
        yield tensors[f"pool/{name}"]

    return MadePool(Pool(blocks, slot_maps), factors, notes)

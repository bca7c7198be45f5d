"""`execute`: runs a plan, tensor by tensor, into a folder that appears complete and verified or not at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .card import save_card
from .errors import ConversionError
from .families import FamilyTensors, check_finite
from .methods import Group, Pool
from .plan import Plan, TensorOperation
from .verify import verify_lossless, verify_output
from .write import Progress, check_output, check_space, new_folder, write_weights


def execute(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Convert as planned; the output folder appears in one rename, after everything in it has been verified.

    Args:
        plan: from `make_plan`.
        progress: called as `progress(done_bytes, total_bytes, what)`.

    Returns:
        The plan's summary plus `verification`, JSON-able.

    Raises:
        ConversionError: the source changed or holds NaN, the output exists by now, the disk is full. Nothing is left.
    """
    output = check_output(plan.recipe.output)
    check_space(output, plan.bytes_after)
    _check_copies(plan.source.tensors)
    with new_folder(output) as folder:
        plan.config.save_pretrained(folder)
        plan.source.opened.copy_travelling_files(folder)
        write_weights(folder, plan.operations, _Maker(plan).make, progress)
        save_card(plan, folder)
        if progress:
            progress(plan.bytes_after, plan.bytes_after, "verifying")
        verification = verify_output(folder, plan.operations)
        verification["source_tensors"] = {
            "used": len(plan.source.opened.tensors) - len(plan.dropped),
            "dropped": len(plan.dropped),
        }
        if plan.method.lossless:
            verification["lossless"] = verify_lossless(plan, folder)
    return {**plan.summary(), "verification": verification}


@dataclass(frozen=True)
class _SourceExperts:
    """One source layer's experts as a method reads them."""

    index: int
    path: str
    tensors: FamilyTensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors.read(f"{self.path}.{name}")


class _Maker:
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


def _check_copies(tensors: FamilyTensors) -> None:
    """Raise unless tensors that the config ties, and that the source holds twice all the same, are equal."""
    for alias, name in tensors.copies.items():
        if not torch.equal(tensors.read(alias), tensors.read(name)):
            raise ConversionError(
                f"{tensors.source.name} ties {alias} to {name} by its config, but holds two different tensors; expected "
                "equal ones: set tie_word_embeddings to false in its config.json if they are meant to differ"
            )

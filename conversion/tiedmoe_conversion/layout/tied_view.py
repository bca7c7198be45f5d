"""A tied checkpoint layer by layer: what a tied layer reads from its pool, as the family's own tensors."""

from collections.abc import Mapping

import torch

from transformers_tiedmoe import TiedMoeConfig

from ..errors import ConversionError
from .keys import FamilyTensors


class LayerTensors:
    """The family's state dict, made of a tied checkpoint's tensors when asked; a layer's experts from its pool.

    Args:
        config: the tied checkpoint's.
        tensors: its tensors.
        experts: path of the experts of every layer that has some.
        prefix: of the family's base model, such as "model".
    """

    def __init__(self, config: TiedMoeConfig, tensors: FamilyTensors, experts: Mapping[int, str], prefix: str):
        self.tensors = tensors
        self.pools: dict[str, str] = {}  # path of a tied layer's experts -> path of the pool it reads
        for layer, path in experts.items():
            if (p := config.group_of(layer)) is not None:
                self.pools[f"{path}."] = f"{prefix}.expert_pools.{p}."

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return one state-dict tensor of the family, or its rows `first` to `last` (not included).

        Of a pool only the rows in use are read.
        """
        path = self._path(name)
        if path is None:
            return self.tensors.read(name, first, last)
        pool = name.replace(path, self.pools[path], 1)
        slot_map = self.slot_map(path)
        rows = self._rows(
            pool, range(len(self.tensors.meta[pool]))[first:last] if slot_map is None else slot_map[first:last]
        )
        if f"{name}_residual_b" in self.tensors.meta:
            wide = torch.promote_types(rows.dtype, torch.float32)
            b, a = (self.tensors.read(f"{name}_residual_{factor}", first, last).to(wide) for factor in "ba")
            rows = rows.to(wide).baddbmm_(b, a).to(rows.dtype)
        return rows

    def meta(self, name: str) -> torch.Tensor:
        """Return the whole tensor on the meta device: shape and dtype."""
        path, meta = self._path(name), self.tensors.meta
        if path is None:
            return meta[name]
        rows = meta[name.replace(path, self.pools[path], 1)]
        slots = meta.get(f"{path}slot_map")
        return rows if slots is None else rows.new_empty(len(slots), *rows.shape[1:])

    def slot_map(self, path: str) -> list[int] | None:
        """Return the pool's row of every slot of the layer whose experts are at `path`; None for the identity.

        Raises:
            ConversionError: a row that the pool does not have.
        """
        if f"{path}slot_map" not in self.tensors.meta:
            return None
        slot_map = self.tensors.read(f"{path}slot_map").tolist()
        pool = self.pools[path]
        width = min(len(tensor) for name, tensor in self.tensors.meta.items() if name.startswith(pool))
        if wrong := [row for row in slot_map if not 0 <= row < width]:
            raise ConversionError(
                f"{self.tensors.source.name}: {path}slot_map names row {wrong[0]} of {pool.rstrip('.')}, which has "
                f"{width} experts; expected 0 to {width - 1}: convert the source again"
            )
        return slot_map

    def _path(self, name: str) -> str | None:
        return next((path for path in self.pools if name.startswith(path)), None)

    def _rows(self, pool: str, rows: "range | list[int]") -> torch.Tensor:
        first, last = min(rows, default=0), max(rows, default=-1) + 1
        if list(rows) == list(range(first, last)):
            return self.tensors.read(pool, first, last)
        meta = self.tensors.meta[pool]
        tensor = meta.new_empty(len(rows), *meta.shape[1:], device="cpu")
        for place, row in enumerate(rows):
            tensor[place] = self.tensors.read(pool, row, row + 1)[0]
        return tensor

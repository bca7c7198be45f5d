"""Maps checkpoint tensors to a family's parameters, both ways, with transformers' own conversion rules.

transformers keeps, per family, the renamings and fusions between the keys on the Hub (one tensor per expert) and its
modules (3-D, fused). A `Unit` is one application of such a rule; it runs on meta tensors for the plan and on real ones
for the conversion, so what is planned is what is done.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..checkpoint.headers import TensorInfo
from ..checkpoint.quantised import Quantised
from ..checkpoint.reader import Source
from ..errors import ConversionError

Read = Callable[[str], torch.Tensor]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18  # elements of a tensor that fit into a cache


@dataclass(frozen=True)
class Unit:
    """One use of a transformers rule: the tensors that go in together, and those that come out.

    Attributes:
        name: the first target, under transformers' name; with the rule's pattern still in it when reversed.
        parts: the rule's pattern and the input's key, in the order the rule wants.
        converter: the rule, None where a tensor only changes its name.
        model: rules look up its configuration and shapes, never its values.
        renamings: what is applied to the outputs' names afterwards.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    model: PreTrainedModel
    renamings: tuple[WeightRenaming, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The inputs' names."""
        return tuple(key for _, key in self.parts)

    def convert(self, read: Read) -> dict[str, torch.Tensor]:
        """Apply the rule to `read(key)` of every input; returns the outputs by name."""
        if self.converter is None:
            return {self.name: read(self.keys[0])}
        converter = deepcopy(self.converter)
        for pattern, key in self.parts:
            converter.add_tensor(self.name, key, pattern, partial(read, key))
        converted = converter.convert(self.name, model=self.model, config=self.model.config)
        outputs = {}
        for name, tensor in converted.items():
            for renaming in self.renamings:
                name, _ = renaming.rename_source_key(name)
            outputs[name] = tensor[0] if isinstance(tensor, list) else tensor
        return outputs

    def places(self, infos: Mapping[str, TensorInfo]) -> list[tuple[str, int, int, int]] | None:
        """Return the place of every input in the output, if the rule only stacks experts and joins their rows.

        Returns:
            Per input its key, its expert, and its first and last (not included) row in that expert, so that it can be
            read into its place; None for any other rule.
        """
        operations = self.converter.operations if self.converter is not None else []
        if [(type(each), getattr(each, "dim", None)) for each in operations] not in (
            [(MergeModulelist, 0)],
            [(MergeModulelist, 0), (Concatenate, 1)],
        ):
            return None
        assert self.converter is not None
        places, start = [], 0
        for pattern in self.converter.source_patterns:
            keys = [key for each, key in self.parts if each == pattern]
            if keys:
                rows = infos[keys[0]].shape[0]
                places += [(key, expert, start, start + rows) for expert, key in enumerate(keys)]
                start += rows
        return places

    def convert_meta(self, infos: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
        """Return the outputs as meta tensors, from the inputs' `TensorInfo`s."""
        dtypes = {describe_dtype(infos[key]) for key in self.keys}
        if len(dtypes) > 1:
            raise ConversionError(
                f"the tensors that make up {self.name!r} have dtypes {sorted(dtypes)}; expected one: "
                "save the source in a single dtype"
            )
        try:
            return self.convert(lambda key: infos[key].meta())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shapes = sorted({infos[key].shape for key in self.keys})
            raise ConversionError(
                f"the source's tensors {self.keys[0]!r} … ({len(self.keys)} of them, shapes {shapes}) do not make up "
                f"{self.name!r}: {error}; expected equal shapes in every expert of a layer"
            ) from error


@dataclass(frozen=True)
class FamilyTensors:
    """A checkpoint's tensors under the names and in the shapes of a model's state dict; nothing is read yet.

    Attributes:
        units: the unit that makes each state-dict tensor.
        meta: each state-dict tensor's shape and dtype, as a meta tensor.
        dropped: checkpoint tensors that have no place in the state dict, and why that is right.
        copies: state-dict names that are tied to another but also stored in the checkpoint, with that other.
    """

    source: Source
    units: dict[str, Unit]
    meta: dict[str, torch.Tensor]
    dropped: dict[str, str]
    copies: dict[str, str]
    _last: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return one state-dict tensor, read and fused, or its rows `first` to `last` (not included).

        Every tensor that is read is checked to be finite.
        """
        unit = self.units[name]
        if unit.converter is None:
            return self._read_finite(unit.keys[0], first, last)
        places = unit.places(self.source.tensors)
        if places is not None:
            return self._read_places(name, places, first, last)
        if name not in self._last:  # a rule with several outputs runs once for outputs read one after another
            self._last.clear()
            self._last.update(unit.convert(self._read_finite))
        tensor = self._last.pop(name)
        return tensor if last is None and not first else tensor[first:last].clone()

    def rows(self, name: str) -> list[tuple[int, int]]:
        """Return the first and last (not included) rows of the blocks that a state-dict tensor can be read in."""
        unit, length = self.units[name], len(self.meta[name])
        if unit.converter is None or unit.places(self.source.tensors) is not None:
            return [(row, row + 1) for row in range(length)]
        return [(0, length)]

    def _read_places(
        self, name: str, places: list[tuple[str, int, int, int]], first: int, last: int | None
    ) -> torch.Tensor:
        """Read every input straight into its place of the output, without a copy."""
        meta = self.meta[name]
        experts = range(len(meta))[first:last]
        tensor = self.source.buffers.empty((len(experts), *meta.shape[1:]), meta.dtype)
        for key, expert, start, end in places:
            if expert in experts:
                self._read_finite(key, into=tensor[expert - experts.start, start:end])
        return tensor

    def _read_finite(
        self, key: str, first: int = 0, last: int | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        tensor = self.source.read(key, first, last, into)
        check_finite(tensor, key, self.source.name)
        return tensor


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state dict that `save_pretrained` writes: without tied names such as `lm_head.weight`."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def map_tensors(source: Source, model: PreTrainedModel, rules: PreTrainedModel | None = None) -> FamilyTensors:
    """Find what every tensor of `source` is in `model` (on meta), by the conversion rules of `rules` or of `model`.

    Raises:
        ConversionError: a tensor that the model does not know, one that it misses, or two for one place.
    """
    expected, tied = model.state_dict(), model.all_tied_weights_keys
    units, unknown = _group(source.tensors, model, get_model_conversion_mapping(rules or model), expected)
    dropped = _ignored(unknown, model)
    left = sorted(unknown.keys() - dropped.keys())
    if left:
        raise ConversionError(
            f"{source.name} holds {len(left)} tensors that {type(model).__name__} does not have, such as {left[:3]}; "
            "expected only tensors that the family loads or is known to ignore: remove them, or use the "
            "transformers version that the checkpoint was made for"
        )
    tensors = FamilyTensors(source, {}, {}, dropped, {})
    for unit in units:
        if unit.name in tied and unit.converter is None:
            if any(other.name == tied[unit.name] for other in units):
                tensors.copies[unit.name] = tied[unit.name]
                dropped[unit.keys[0]] = f"the same tensor as {tied[unit.name]}, to which it is tied"
            else:  # the tied pair is there once, under the other name
                unit = replace(unit, name=tied[unit.name])
        for name, tensor in unit.convert_meta(source.tensors).items():
            tensors.units[name], tensors.meta[name] = unit, tensor
    missing = sorted(saved_tensors(model).keys() - tensors.units.keys())
    if missing:
        raise ConversionError(
            f"{source.name} lacks {len(missing)} tensors that {type(model).__name__} needs, such as {missing[:3]}; "
            "expected every one of them, as none is made up here: download the checkpoint again"
        )
    return tensors


def hub_units(model: PreTrainedModel, names: Iterable[str]) -> list[Unit]:
    """Return the units that turn the state-dict tensors `names` into the keys of the family's checkpoints."""
    rules = [r for r in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(r, PrefixChange)]
    rules = [rule.reverse_transform() for rule in reversed(rules)]  # the order and selection of save_pretrained
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = tuple(rule for rule in rules if isinstance(rule, WeightRenaming))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, [], converters)
        if pattern is None:
            target, _ = rename_source_key(name, list(renamings), [])
        parts.setdefault(target, []).append((pattern or "", name))
    return [
        Unit(target, tuple(found), by_pattern.get(found[0][0]), model, renamings) for target, found in parts.items()
    ]


def describe_dtype(info: TensorInfo) -> str:
    """Return a tensor's dtype for people, and its dtype on the disk if that differs."""
    name = str(info.dtype).removeprefix("torch.")
    if isinstance(info, Quantised):
        name += f" (from {info.stored_as})"
    return name


def check_finite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raise `ConversionError` where a floating-point `tensor` holds NaN or infinity; allocates next to nothing."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return
    if tensor.dtype.itemsize == 1:
        tensor = tensor.to(torch.float32)  # fp8 encodes infinity differently
    # NaN and infinity have all bits of the exponent set: as integers without their sign they are the greatest. By
    # numpy, as torch's threads would wait for each other while another thread writes.
    bits = tensor.contiguous().reshape(-1).view(_BITS[tensor.dtype.itemsize]).numpy()
    infinity = torch.tensor(float("inf"), dtype=tensor.dtype).view(_BITS[tensor.dtype.itemsize]).item()
    without_sign = np.empty(min(len(bits), _CHUNK), bits.dtype)
    greatest = 0
    for start in range(0, len(bits), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        masked = np.bitwise_and(chunk, np.iinfo(bits.dtype).max, out=without_sign[: len(chunk)])
        greatest = max(greatest, int(masked.max()))
    if greatest >= infinity:
        kind = "NaN" if greatest > infinity else "infinity"
        raise ConversionError(
            f"{where}: tensor {name!r} holds {kind}; expected finite weights: download it again, or repair it"
        )


def _group(
    keys: Iterable[str], model: PreTrainedModel, rules: list[Any], expected: Mapping[str, torch.Tensor]
) -> tuple[list[Unit], dict[str, str]]:
    """Group checkpoint keys into units of `model`, in transformers' order; return also the unknown keys, renamed."""
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, tuple[WeightConverter | None, list[tuple[str, str]]]] = {}
    unknown: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected:  # as transformers: a key that is already the model's own is not renamed
            direct, _ = rename_source_key(key, [], [], prefix, expected)
            name, pattern = (direct, None) if direct in expected else (name, pattern)
        if name not in expected:
            unknown[key] = name
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        kept_converter, parts = found.setdefault(name, (converter, []))
        if parts and (converter is None or converter is not kept_converter):
            raise ConversionError(
                f"the source has two tensors for {name!r}: {parts[0][1]!r} and {key!r}; expected one layout of it: "
                "remove one"
            )
        parts.append((pattern or "", key))
    return [Unit(name, tuple(parts), converter, model) for name, (converter, parts) in found.items()], unknown


def _ignored(unknown: dict[str, str], model: PreTrainedModel) -> dict[str, str]:
    """Return those of the `unknown` keys that the family's class ignores on loading, with the reason."""
    info = _Unexpected(set(unknown.values()))
    model._adjust_missing_and_unexpected_keys(info)
    reason = f"{type(model).__name__} ignores it on loading"
    return {key: reason for key, name in unknown.items() if name not in info.unexpected_keys}


@dataclass
class _Unexpected:
    """Stands for the loading info whose unexpected keys transformers' own filter reduces."""

    unexpected_keys: set[str]
    missing_keys: set[str] = field(default_factory=set)

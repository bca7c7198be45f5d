"""How a method is written: one decorated function per file that turns a group's experts into a pool.

The decorator's arguments say what the plan must know before any tensor is read (how wide the pool is, which layers
are read); the function itself runs once per group, and hands out the pool's tensors in blocks, so that a pool wider
than memory can still be written.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..errors import ConversionError, did_you_mean


class LayerExperts(Protocol):
    """The experts of one source layer, read only when asked."""

    @property
    def index(self) -> int:
        """The layer's index in the model."""

    def read(self, name: str) -> torch.Tensor:
        """The experts' parameter `name` (such as `gate_up_proj`), `[E, ...]` in the source's dtype and in new memory."""


@dataclass(frozen=True)
class Group:
    """What a method is given: the layers of one group, in order, of which only `layers_read` may be read."""

    layers: tuple[LayerExperts, ...]
    num_experts: int

    def layer(self, index: int) -> LayerExperts:
        """The layer whose index in the model is `index`."""
        return next(layer for layer in self.layers if layer.index == index)


@dataclass(frozen=True)
class Pool:
    """What a method returns.

    Args:
        blocks: given a parameter's name, yields the pool's tensor `[P, ...]` as consecutive blocks along dimension 0.
        slot_maps: per layer index the int64 `[E]` map from router index to pool index; empty where the method was
            registered without slot maps.
    """

    blocks: Callable[[str], Iterator[torch.Tensor]]
    slot_maps: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method; see `register_method` for the fields."""

    name: str
    summary: str
    build: Callable[..., Pool]
    pool_num_experts: Callable[[int, int], int]
    slot_maps: bool
    lossless: bool
    layers_read: Callable[..., Sequence[int]]
    float32_copies: int

    @property
    def options(self) -> dict[str, Any]:
        """The method's options and their defaults: the keyword arguments of its function."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `ConversionError` for an option that the method does not have."""
        for name in options:
            if name not in self.options:
                hint = did_you_mean(name, self.options) if self.options else "it has none"
                raise ConversionError(f"method {self.name!r} has no option {name!r}; {hint}")


METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    pool_num_experts: Callable[[int, int], int] = lambda num_experts, group_size: num_experts,
    slot_maps: bool = False,
    lossless: bool = False,
    layers_read: Callable[..., Sequence[int]] = lambda layers, **options: layers,
    float32_copies: int = 0,
) -> Callable[[Callable[..., Pool]], Callable[..., Pool]]:
    """Register `build(group, **options) -> Pool` under `name`; the first line of its docstring is its help.

    Args:
        pool_num_experts: P from the source's E and the number of layers in the group.
        slot_maps: whether the layers keep their own router width E and reach the pool through a slot map.
        lossless: whether the tied model computes the source's logits, bit for bit; verified when it claims so.
        layers_read: the layers of a group, by index, that the method reads; the others' experts are dropped by name.
            Called as `layers_read(layers, **options)`, and raises `ConversionError` for a bad option value.
        float32_copies: float32 buffers of one layer's size that the method keeps, for the plan's memory estimate.
    """

    def register(build: Callable[..., Pool]) -> Callable[..., Pool]:
        assert name not in METHODS, f"two methods are called {name!r}"
        summary = (build.__doc__ or "").strip().splitlines()[0]
        METHODS[name] = Method(
            name, summary, build, pool_num_experts, slot_maps, lossless, layers_read, float32_copies
        )
        return build

    return register

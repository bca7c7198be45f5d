"""Lets a layer use its neighbour's experts, router or attention for a while, and puts everything back."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .routing import layer_experts

ROUTERS = ("gate", "router")  # beside the experts
ATTENTION = ("self_attn", "linear_attn", "mamba", "conv")  # whatever mixes tokens, in the layer
NUMBERS = ("layer", "layer_idx", "place")  # of the layer itself


@dataclass(frozen=True)
class Place:
    """Where a module hangs."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)


@dataclass(frozen=True)
class MoeLayer:
    """The parts of one layer with experts; None where a family has no such part by its usual name."""

    index: int
    experts: Any
    num_experts: int
    router: Place | None
    attention: Place | None


def moe_layers(model: PreTrainedModel) -> list[MoeLayer]:
    """Find the parts of every layer with experts, in order."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for index, module in layer_experts(model).items():
        experts: Any = module
        path = paths[id(experts)]
        layer = re.match(r".*?\blayers\.\d+(?=\.)", path)
        assert layer, f"no layer index in {path}"
        found.append(
            MoeLayer(
                index,
                experts,
                getattr(experts, "num_slots", None) or experts.num_experts,
                _child(model.get_submodule(path.rpartition(".")[0]), ROUTERS),
                _child(model.get_submodule(layer[0]), ATTENTION),
            )
        )
    return found


def _child(parent: nn.Module, names: tuple[str, ...]) -> Place | None:
    children = dict(parent.named_children())
    return next((Place(parent, name) for name in names if name in children), None)


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two modules are of one class, with tensors of the same shapes and the same settings."""
    return type(one) is type(other) and _shapes_and_settings(one) == _shapes_and_settings(other)


def _shapes_and_settings(module: nn.Module) -> tuple[dict[str, torch.Size], dict[str, Any]]:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    simple = (bool, int, float, str, type(None))
    return shapes, {k: v for k, v in vars(module).items() if isinstance(v, simple) and k not in NUMBERS}


@contextlib.contextmanager
def other_module(place: Place | None, other: Place | None) -> Iterator[None]:
    """Put `other`'s module in `place` too within the block."""
    assert place is not None
    assert other is not None
    own = place.module
    setattr(place.parent, place.name, other.module)
    try:
        yield
    finally:
        setattr(place.parent, place.name, own)


@contextlib.contextmanager
def other_experts(layer: MoeLayer, other: MoeLayer, match: torch.Tensor) -> Iterator[None]:
    """Let `layer` run `other`'s experts within the block: `match[i]` of them where its router chooses i.

    Args:
        match: int64 `[E of layer]`, experts of `other`; may be `layer` itself, whose experts are then renumbered.
    """
    with _other_forwards({layer: (other, match)}):
        yield


@contextlib.contextmanager
def _other_forwards(uses: Mapping[MoeLayer, tuple[MoeLayer, torch.Tensor]]) -> Iterator[None]:
    own = {layer: vars(layer.experts).get("forward") for layer in uses}
    runs = {layer: layer.experts.forward if other is layer else other.experts for layer, (other, _) in uses.items()}
    try:
        for layer, (other, match) in uses.items():
            layer.experts.forward = _renumbered(runs[layer], match, other.num_experts)
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                vars(layer.experts).pop("forward", None)
            else:  # accelerate's hooks put theirs there
                layer.experts.forward = forward


def _renumbered(run: Any, match: torch.Tensor, num_experts: int) -> Any:
    """Return a forward of experts by `run`, with indices by `match`; those of no expert stay so."""
    rows = torch.cat([match, match.new_tensor([num_experts])])

    def forward(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        index = rows.to(top_k_index.device)[top_k_index.clamp(max=len(match))]
        return run(hidden_states, index, top_k_weights, *args, **kwargs)

    return forward

"""Where a model's parameters are: by component and by layer, a pool counted once. From modules and shapes alone."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..modeling_tiedmoe import TiedExperts
from ..training.muon import muon_matrices
from .routing import layer_experts
from .schema import COMPONENTS, LayerMemory, Parameters
from .subject import Subject

SHARED = re.compile(r"shared_(experts?|mlp|expert_gate)")
ATTENTION = {"shared_attentions", "self_attn", "attn", "attention", "linear_attn", "mamba", "mixer", "conv"}
DENSE = {"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"}
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Tensor:
    """A parameter, counted once.

    Attributes:
        name: its first name in the model.
        component: one of `COMPONENTS`.
        layer: the decoder layer that it is counted in, the first that reads it; None outside of layers.
        reads: how often a pass reads it: once for each layer of a pool, twice where the head is the embedding.
        active: parameters that one token uses, over all reads.
        pool: the pool that it is of.
        last: the last layer that reads that pool.
        is_muons: whether Muon takes it, which leaves the rest to AdamW.
    """

    name: str
    shape: tuple[int, ...]
    component: str
    layer: int | None
    reads: int
    active: float
    pool: int | None = None
    last: int | None = None
    is_muons: bool = False

    @property
    def num(self) -> int:
        """The number of parameters."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def list_tensors(model: PreTrainedModel, subject: Subject, top_k: dict[int, int]) -> list[Tensor]:
    """List every parameter of a model once.

    Args:
        model: on any device.
        subject: what it is of.
        top_k: experts of a token by layer, where the config does not say.
    """
    used = _experts_used(subject, top_k)
    readers = _readers(model)
    head = model.get_output_embeddings()
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    matrices = muon_matrices(model)
    tensors = []
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        modules = [path[:stop] for stop in _prefixes(path)]
        layers = next((readers[module] for module in modules if module in readers), None)
        match = LAYER.search(name)
        layer = int(match[1]) if match else None
        if layers is not None:
            # an expert's part of it, or all of a norm that the experts share
            shares = [used.get(index, 0.0) / parameter.shape[0] if path in readers else 1.0 for index in layers]
            active = parameter.numel() * sum(shares)
            pool = int(name.split("expert_pools.")[1].split(".")[0]) if "expert_pools." in name else None
            shape, is_muons = tuple(parameter.shape), parameter in matrices
            tensors.append(Tensor(name, shape, "experts", layers[0], len(layers), active, pool, layers[-1], is_muons))
            continue
        component = "head" if id(parameter) in of_head else _component(name, model, modules)
        reads = 1
        if component == "head" and any(
            parameter is other for other in model.get_input_embeddings().parameters()
        ):  # tied word embeddings
            component, reads = "embedding", 2
        active, is_muons = float(parameter.numel()), parameter in matrices
        tensors.append(Tensor(name, tuple(parameter.shape), component, layer, reads, active, is_muons=is_muons))
    return tensors


def count_parameters(tensors: list[Tensor]) -> dict[str, Parameters]:
    """Sum by component, and in all.

    `active` is what publishers count: all parameters but those of the experts that a token does not use. Some leave
    the embedding out, of which a token reads one row: subtract `parameters["embedding"].active`.
    """
    found = {}
    for component in COMPONENTS:
        own = [tensor for tensor in tensors if tensor.component == component]
        found[component] = Parameters(
            unique=sum(tensor.num for tensor in own),
            read=sum(tensor.num * tensor.reads for tensor in own),
            active=round(sum(tensor.active for tensor in own)),
        )
    found["total"] = Parameters(
        **{field: sum(getattr(each, field) for each in found.values()) for field in Parameters.model_fields}
    )
    return found


def count_layers(tensors: list[Tensor], num_layers: int) -> list[LayerMemory]:
    """Sum by layer and component."""
    counts: list[Counter] = [Counter() for _ in range(num_layers)]
    for tensor in tensors:
        if tensor.layer is not None:
            counts[tensor.layer][tensor.component] += tensor.num
    return [LayerMemory(layer=index, parameters=dict(count)) for index, count in enumerate(counts)]


def _readers(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the layers that read each module with expert weights, by its path."""
    readers: dict[int, list[int]] = {}
    for layer, module in layer_experts(model).items():
        readers.setdefault(id(module), []).append(layer)
        if isinstance(module, TiedExperts):
            pool = model.base_model.expert_pools[module.pool_index]
            readers.setdefault(id(pool), []).append(layer)
    return {path: readers[id(module)] for path, module in model.named_modules() if id(module) in readers}


def _experts_used(subject: Subject, top_k: dict[int, int]) -> dict[int, float]:
    """Return how many experts a token uses by layer: top-k, or the soft mass that the config gives the layer."""
    config: Any = subject.config.get_text_config()
    moe = [layer for layer in subject.layers if layer.kind != "dense"]
    if getattr(config, "routing", "top_k") == "softmoe":
        masses = config.softmoe["layers"] or [config.softmoe["budget"] / len(moe)] * len(moe)
        return {layer.index: float(layer.soft_mass or mass) for layer, mass in zip(moe, masses)}
    return {layer.index: float(top_k.get(layer.index) or layer.top_k or 0) for layer in moe}


def _component(name: str, model: PreTrainedModel, modules: list[str]) -> str:
    parts = name.split(".")
    if any(SHARED.fullmatch(part) for part in parts):
        return "shared_experts"
    if any(part in ("gate", "router", "shared_routers", "expert_bias", "budget") for part in parts):
        return "router"
    if "mixer" in parts and "mlp" in type(_module_at(model, modules, "mixer")).__name__.lower():
        return "dense_mlp"
    if ATTENTION.intersection(parts):
        return "attention"
    if any("norm" in part for part in parts):
        return "norm"
    if any("embed" in part for part in parts):
        return "embedding"
    return "dense_mlp" if DENSE.intersection(parts) else "other"


def _module_at(model: PreTrainedModel, modules: list[str], last: str) -> nn.Module:
    return model.get_submodule(next(path for path in modules if path.rpartition(".")[2] == last))


def _prefixes(path: str) -> Iterator[int]:
    for match in re.finditer(r"\.|$", path):
        yield match.start()

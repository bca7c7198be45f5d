"""What a model's cache holds after a prompt, read off transformers' own cache on the meta device.

No formula of ours: the family's own forward fills its own cache, so sliding windows, latents of multi-head latent
attention (transformers caches the latent and the rotary key, not the decompressed keys and values), states of linear
attention and of convolutions, and what a family invents are right by construction.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .meta_run import counted_on_meta
from .routing import layer_experts

SHORT = 64  # tokens; states of linear attention do not grow, and their reference code loops over tokens


@dataclass(frozen=True)
class Prefill:
    """What one pass over a prompt leaves and needs.

    Attributes:
        cache_bytes: of the cache after it.
        working_bytes: most that it takes besides weights and cache.
        top_k: experts of a token by layer, as the routers hand them on.
    """

    cache_bytes: int
    working_bytes: int
    top_k: dict[int, int]


def prefill(model: PreTrainedModel, context: int, batch_size: int) -> Prefill:
    """Run a prompt of `context` tokens through a model on the meta device, in its dtype; only shapes are computed."""
    model = model.eval()
    top_k: dict[int, int] = {}
    hooks = [
        module.register_forward_pre_hook(_recorder(layer, top_k), with_kwargs=True)
        for layer, module in layer_experts(model).items()
    ]
    try:
        length = min(context, SHORT)
        cache, working = _run(model, length, batch_size)
        if context > length and not _loops_over_tokens(cache):
            length = context
            cache, working = _run(model, length, batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    scale = context / length  # of what grows with the tokens
    grown = sum(_bytes(tensor) for tensor in _tensors(_grow(cache, context - length)))
    return Prefill(grown, round(working * scale), top_k)


def _run(model: PreTrainedModel, length: int, batch_size: int) -> tuple[Any, int]:
    prompt = torch.empty(batch_size, length, dtype=torch.int64, device="meta")
    known = [*model.parameters(), *model.buffers(), prompt]
    with torch.no_grad(), counted_on_meta(known) as (allocations, _):
        cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
        held = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(cache))
    return cache, max(allocations.peak - held, 0)


def _recorder(layer: int, top_k: dict[int, int]):
    def record(module: Any, args: tuple, kwargs: dict) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        top_k[layer] = index.shape[-1]

    return record


def _loops_over_tokens(cache: Any) -> bool:
    """Tell whether any layer is of linear attention, and every layer of a class that `_grow` knows."""
    layers = getattr(cache, "layers", [])
    is_known = all(
        type(layer).__module__ == "transformers.cache_utils" and not hasattr(layer, "update_indexer")
        for layer in layers
    )
    return is_known and any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _grow(cache: Any, num_tokens: int) -> Any:
    """Add `num_tokens` to the layers that keep keys and values, by their own `update`; the others stay as they are."""
    if num_tokens > 0:
        for layer in cache.layers:
            if getattr(layer, "keys", None) is not None:
                more = [
                    part.new_empty(*part.shape[:2], num_tokens, part.shape[3]) for part in (layer.keys, layer.values)
                ]
                layer.update(*more)
    return cache


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Return every tensor that a cache holds, once."""
    found: dict[int, torch.Tensor] = {}
    visited: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)
        elif type(value).__module__.startswith("transformers."):
            visit(getattr(value, "__dict__", {}))

    visit(cache)
    return list(found.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

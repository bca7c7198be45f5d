"""What `untie` makes of soft routing, which no family's config can say: a fixed top-k, and what that costs.

A layer's number is what its tokens use on average, rounded. Most families have one number for all layers.
"""

from typing import Any

import torch

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.auto_files import load_tokenizer
from transformers_tiedmoe.routing import active_experts, fixed_top_k
from transformers_tiedmoe.training.data import load_blocks, perplexity

from .checkpoint.reader import Source
from .errors import ConversionError

PER_LAYER = ("hunyuan_v1_moe",)  # families whose config holds a number for each layer; a test looks through all
MAX_TOKENS = 2**16  # that the loss is measured on
DEFAULT_BLOCK_SIZE = 512  # as healing has it, which holds the same text out


def bake(opened: Source, config: TiedMoeConfig, top_k: int | None, data: str | None) -> dict[str, Any] | None:
    """Choose the top-k of a softly routed checkpoint's untied copy, and measure what it costs.

    Args:
        opened: the checkpoint, which is loaded whole.
        config: of it.
        top_k: one number for all layers; None takes each layer's own, where the family's config can say them.
        data: text, whose last 5 % are measured on, at most 65,536 tokens: what `tiedmoe heal` holds out.

    Returns:
        `top_k`, one number or one a layer; `active_experts` as `routing.active_experts` gives them; `tokens`;
        `loss_before` and `loss_after` in nats per token. None for a checkpoint that routes by its family's top-k.

    Raises:
        ConversionError: `top_k` or `data` is missing, out of range, or without effect.
    """
    soft: Any = config.softmoe
    if soft is None or soft["alpha"] == 0:
        if top_k is not None or data is not None:
            raise ConversionError(
                f"{opened.name} routes by the top-k of its family, {config.experts_per_token}, which untying keeps; "
                "expected neither top_k nor data: leave them out"
            )
        return None
    is_per_layer = config.family in PER_LAYER
    most = config.most_experts_per_token
    if top_k is not None and not 1 <= top_k <= most:
        raise ConversionError(
            f"top_k={top_k}; expected 1 to {most}, the experts that a token of {opened.name} can have"
        )
    is_soft = (
        f"{opened.name} is routed softly (alpha={soft['alpha']:g}): its tokens use different numbers of experts. A "
        f"{config.family!r} config says one number for all tokens{'' if is_per_layer else ' and layers'}, so that "
        "untying bakes a fixed top-k, which costs loss"
    )
    if data is None:
        also = "" if is_per_layer or top_k is not None else ", and top_k (--top-k), which it then suggests"
        raise ConversionError(f"{is_soft}; give text to measure that on as data (--data){also}")
    model, blocks = _load(opened, config, data)
    before = perplexity(model, blocks)
    used = active_experts(model, reset=True)
    mean = sum(each["mean"] for each in used) / len(used)
    if top_k is not None or not is_per_layer:
        layers = [_rounded(mean, most) if top_k is None else top_k] * len(used)
    else:
        layers = [_rounded(each["mean"], most) for each in used]
    with fixed_top_k(model, layers):
        after = perplexity(model, blocks)
    if top_k is None and not is_per_layer:
        by_layer = ", ".join(f"{each['mean']:.2f}" for each in used)
        raise ConversionError(
            f"{is_soft}; on {before['tokens']} tokens of {data} they use {mean:.2f} on average (by layer {by_layer}), "
            f"and the loss is {before['loss']:.4f}; with the nearest top-k it would be {after['loss']:.4f}: give "
            f"top_k={layers[0]} (--top-k {layers[0]}), or another"
        )
    return {
        "top_k": layers if is_per_layer and top_k is None else layers[0],
        "active_experts": used,
        "tokens": before["tokens"],
        "loss_before": before["loss"],
        "loss_after": after["loss"],
    }


def _rounded(mean: float, most: int) -> int:
    return min(most, max(1, int(mean + 0.5)))


def _load(opened: Source, config: Any, data: str) -> tuple[Any, Any]:
    # Here, as it imports Trainer, which takes seconds.
    from transformers_tiedmoe.training.pretrained import load_model

    size = min(DEFAULT_BLOCK_SIZE, getattr(config, "max_position_embeddings", None) or DEFAULT_BLOCK_SIZE)
    try:
        blocks = load_blocks(data, load_tokenizer(opened.folder, opened.name), size)[1]
    except (ValueError, OSError) as error:
        raise ConversionError(f"text to measure on: {error}") from error
    model = load_model(opened.name).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, blocks.select(range(min(len(blocks), max(1, MAX_TOKENS // size))))

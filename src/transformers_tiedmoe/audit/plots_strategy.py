"""The audit's figures of the layers' strategy: what replacing parts costs, and how alike layers are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import units
from .drawing import BLUE, GREEN, MUTED, ORANGE, PURPLE, SHADES, new_figure, swatches, title
from .schema import Domain, Interval, ModelAudit

PARTS = {  # of whom, and which side the neighbour is on; None of either
    "experts, previous layer's": ("experts", -1, BLUE),
    "experts, next layer's": ("experts", 1, PURPLE),
    "router": ("router", None, ORANGE),
    "attention": ("attention", None, GREEN),
}
OUTLIER = 10  # times the median: losses so far apart are drawn on a logarithmic scale


def strategy(model: ModelAudit, domains: list[Domain], is_narrow: bool) -> Any | None:
    """Draw what the loss becomes, over depth, when a layer uses its neighbour's experts, router or attention."""
    if model.strategy is None or not model.strategy.replacements:
        return None
    found = model.strategy.replacements
    worst = max(found, key=lambda each: each.loss_increase.value)
    figure = new_figure(
        is_narrow,
        3.5,
        f"Loss added over the layers of {units.short(model.name)} when one uses its neighbour's part: at most "
        f"{units.added(worst.loss_increase.value)}, for the {worst.part} of layer {worst.layer}.",
    )
    axes = figure.subplots()
    axes.axhline(0, color=MUTED, linewidth=0.7)
    names, colours = [], []
    for name, (part, side, colour) in PARTS.items():
        rows = [
            each for each in found if each.part == part and (side is None or (each.neighbour - each.layer) * side > 0)
        ]
        if not rows:
            continue
        rows.sort(key=lambda each: each.layer)
        layers, values = [each.layer for each in rows], [each.loss_increase for each in rows]
        low = [each.value if each.low is None else each.low for each in values]
        high = [each.value if each.high is None else each.high for each in values]
        axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
        style = {"linewidth": 1.7, "marker": "o" if side != 1 else "s", "markersize": 3.2}
        axes.plot(layers, [each.value for each in values], color=colour, **style)
        names.append(name.replace("experts, ", "").replace("layer's", "experts") if is_narrow else name)
        colours.append(colour)
    bend = _bend_scale(axes, [each.loss_increase for each in found])
    axes.set(xlabel="layer", ylabel="loss added, nats per token" + (f"\n(logarithmic from {bend:g})" if bend else ""))
    axes.xaxis.get_major_locator().set_params(integer=True)
    title(axes, model, "What a layer loses with a neighbour's part", is_narrow, above=13)
    swatches(axes, names, colours, 3, is_narrow)
    return figure


def _bend_scale(axes: Any, losses: Sequence[Interval]) -> float | None:
    """Draw losses logarithmically from a value on if the largest are far from most; return that value."""
    sizes = sorted(abs(each.value) for each in losses)
    median = max(sizes[len(sizes) // 2], 1e-3)
    if sizes[-1] < OUTLIER * median:
        return None
    steps = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    bend = next(step for step in steps if step >= 2 * median)
    axes.set_yscale("symlog", linthresh=bend, linscale=1.2)
    low, high = axes.get_ylim()
    ticks = [0, bend / 2, *(step for step in steps if step >= bend)]
    axes.set_yticks([tick for each in ticks for tick in {each, -each} if low <= tick <= high])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(_no_ticks())
    return bend


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def similarity(model: ModelAudit, domains: list[Domain], is_narrow: bool) -> Any | None:
    """Draw how alike layers are: above the diagonal what enters their experts, below it what comes out."""
    if model.strategy is None or len(model.strategy.similarity) < 3:
        return None
    pairs = model.strategy.similarity
    layers = sorted({layer for each in pairs for layer in each.layers})
    place = {layer: i for i, layer in enumerate(layers)}
    outputs = {each.layers: each.output_similarity for each in pairs if each.output_similarity is not None}
    most = max(1e-9, *outputs.values()) if outputs else 1.0
    image = np.zeros((len(layers), len(layers), 4), np.uint8)
    for each in pairs:
        first, second = sorted(place[layer] for layer in each.layers)
        image[first, second] = (*SHADES["blue"], int(255 * np.clip(each.representation_cka, 0, 1)))
        if each.layers in outputs:
            image[second, first] = (*SHADES["orange"], int(255 * np.clip(outputs[each.layers] / most, 0, 1)))
    closest = max(pairs, key=lambda each: outputs.get(each.layers, each.representation_cka))
    figure = new_figure(
        is_narrow,
        4.6 if is_narrow else 5.0,
        f"Matrix of layers of {units.short(model.name)}: the similarity of what enters their experts, and of their "
        f"experts' outputs. Most alike are layers {units.span(sorted(closest.layers))}.",
    )
    axes = figure.subplots()
    axes.imshow(image, interpolation="none")
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.6)
    axes.plot([-0.5, len(layers) - 0.5], [-0.5, len(layers) - 0.5], color=MUTED, linewidth=0.6)
    step = next(step for step in (1, 2, 4, 8, 16, 32) if len(layers) <= 16 * step)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.tick_params(length=0)
    axes.set(xlabel="layer", ylabel="layer")
    title(axes, model, "How alike layers are", is_narrow, above=13)
    shown = (
        ("experts' inputs, CKA", BLUE, [each.representation_cka for each in pairs]),
        ("outputs, cosine", ORANGE, list(outputs.values())),
    )
    names = [f"{name} {min(values):.2f} to {max(values):.2f}" for name, _, values in shown if values]
    swatches(axes, names, [colour for _, colour, values in shown if values], 3, is_narrow)
    return figure

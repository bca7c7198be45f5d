"""The figure of tokens that flow between the experts of consecutive layers, by their first choices.

A column is a layer, a bar an expert, as high as the tokens that it gets; a ribbon holds the tokens that go from one
expert to one of the next layer. Only the largest are drawn, and only layers next to each other whose choices tell most
about the next one's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from . import units
from .drawing import BLUE, INK, MUTED, ORANGE, PAPER, new_figure, title
from .findings import total_loads
from .schema import Domain, Flow, ModelAudit

MAX_LAYERS = {False: 7, True: 4}
MAX_EXPERTS = {False: 12, True: 8}
LEAST = 0.004  # of the tallest column: a thinner ribbon is a hair
STRONG = 2.0  # times as many tokens as by chance
GAPS, BAR = 0.2, 0.09  # of the tallest column, all gaps; half a bar's width, in parts of the way between layers
KINDS = {  # colour and opacity of a ribbon, and what it means
    "same": (ORANGE, 0.75, "stays with the same expert of a pool"),
    "strong": (BLUE, 0.5, f"{STRONG:g}× chance or more"),
    "other": (MUTED, 0.22, "other flows"),
}
Column = dict[int, tuple[float, float]]  # an expert's top and height, in tokens, from above


def flow(model: ModelAudit, domains: list[Domain], is_narrow: bool) -> Any | None:
    """Draw the flow of tokens between experts from layer to layer."""
    if model.stability is None or not any(each.flows for each in model.stability.flows):
        return None
    pairs = _window(model.stability.flows, MAX_LAYERS[is_narrow] - 1)
    layers = [pairs[0].layers[0], *(pair.layers[1] for pair in pairs)]
    tokens = max(sum(domain.num_tokens for domain in domains), *(sum(n for *_, n in pair.flows) for pair in pairs))
    columns = _columns(pairs, MAX_EXPERTS[is_narrow])
    depth = max(top + height for column in columns for top, height in column.values())
    loads = {row.layer: total_loads(row, domains) for row in model.stability.layers}
    pools = {layer.index: layer.pool for layer in model.layers}
    figure = new_figure(is_narrow, 4.8 if is_narrow else 5.0, "")
    axes = figure.subplots()
    drawn: Counter[str] = Counter()
    for c, pair in enumerate(pairs):
        is_group = pools.get(pair.layers[0]) is not None and pools.get(pair.layers[0]) == pools.get(pair.layers[1])
        margins = [_margin(pair, side, loads.get(pair.layers[side]), tokens) for side in (0, 1)]
        drawn += _draw_pair(axes, c, pair, columns[c : c + 2], margins, is_group, (tokens, depth))
    for c, column in enumerate(columns):
        _draw_column(axes, c, column, depth)
    _draw_heads(axes, layers, [pools.get(layer) for layer in layers])
    axes.set(xlim=(-0.15, len(layers) - 0.85), ylim=(1.01 * depth, -0.01 * depth))
    axes.axis("off")
    share = drawn.total() / (tokens * len(pairs))
    all_layers = len(pairs) == len(model.stability.flows)
    figure.set_label(
        f"Flow of tokens between the experts of layers {units.span(layers)} of {units.short(model.name)}, by first "
        f"choices; the ribbons drawn hold {units.percent(share)} of the tokens"
        + (f", {units.percent(drawn['same'] / max(drawn.total(), 1))} of these stay with an expert of the same number "
           "in the same pool." if drawn["same"] else ".")
    )  # fmt: skip
    title(axes, model, "Where tokens go from layer to layer", is_narrow, above=16)
    _draw_key(axes, [kind for kind in KINDS if drawn[kind]], share, all_layers, is_narrow)
    return figure


def _window(flows: Sequence[Flow], most: int) -> list[Flow]:
    """Return at most `most` consecutive pairs of layers, those with the largest sum of mutual information."""
    best: list[Flow] = []
    for start in range(len(flows)):
        window = [flows[start]]
        for pair in flows[start + 1 : start + most]:
            if pair.layers[0] != window[-1].layers[1]:
                break
            window.append(pair)
        window = [pair for pair in window if pair.flows] or window
        if (len(window), sum(each.mutual_information for each in window)) > (
            len(best),
            sum(each.mutual_information for each in best),
        ):
            best = window
    return best


def _columns(pairs: Sequence[Flow], most: int) -> list[Column]:
    """Place each layer's largest experts: in the first layer by size, then near those that their tokens come from."""
    sizes = []
    for c in range(len(pairs) + 1):
        sent = _sums(pairs[c], 0) if c < len(pairs) else Counter[int]()
        got = _sums(pairs[c - 1], 1) if c else Counter[int]()
        largest = sorted(sent | got, key=lambda expert: (-(sent | got)[expert], expert))[:most]
        sizes.append({expert: (sent | got)[expert] for expert in largest})
    gap = GAPS * max(sum(each.values()) for each in sizes) / max(len(each) for each in sizes)
    columns: list[Column] = []
    for c, heights in enumerate(sizes):
        order = list(heights)
        if c:
            centres = {expert: top + height / 2 for expert, (top, height) in columns[-1].items()}
            order.sort(key=lambda expert: _mean_source(pairs[c - 1], expert, centres))
        column, top = {}, 0.0
        for expert in order:
            column[expert] = (top, float(heights[expert]))
            top += heights[expert] + gap
        columns.append(column)
    return columns


def _sums(pair: Flow, side: int) -> Counter[int]:
    found: Counter[int] = Counter()
    for each in pair.flows:
        found[each[side]] += each[2]
    return found


def _mean_source(pair: Flow, expert: int, centres: dict[int, float]) -> float:
    known = [(centres[a], n) for a, b, n in pair.flows if b == expert and a in centres]
    total = sum(n for _, n in known)
    return sum(at * n for at, n in known) / total if total else math.inf


def _margin(pair: Flow, side: int, loads: Any | None, tokens: int) -> dict[int, float]:
    """Estimate the tokens of each expert: those of the flows listed, or by its load if that is more."""
    sums = _sums(pair, side)
    if loads is None:
        return dict(sums)
    return {
        expert: max(n, float(loads[expert]) * tokens if expert < len(loads) else 0.0) for expert, n in sums.items()
    }


def _draw_pair(
    axes: Any,
    c: int,
    pair: Flow,
    columns: list[Column],
    margins: list[dict[int, float]],
    is_group: bool,
    heights: tuple[int, float],
) -> Counter[str]:
    """Draw the ribbons between two layers; return the tokens drawn of each kind.

    Args:
        axes: y in tokens.
        c: number of the left column.
        pair: their flows.
        columns: the two.
        margins: tokens of each expert, of the left layer and of the right one.
        is_group: whether both layers read one pool.
        heights: all tokens, and the tallest column's.
    """
    from matplotlib.patches import PathPatch

    left, right = columns
    tokens, depth = heights
    shown = [(a, b, n) for a, b, n in pair.flows if a in left and b in right and n >= LEAST * depth]
    starts: dict[tuple[int, int], float] = {}
    ends: dict[tuple[int, int], float] = {}
    for place, column, here, there, other in ((starts, left, 0, 1, right), (ends, right, 1, 0, left)):
        next_free = {expert: top for expert, (top, _) in column.items()}
        for each in sorted(shown, key=lambda each: other[each[there]][0]):
            place[each[:2]] = next_free[each[here]]
            next_free[each[here]] += each[2]
    drawn: Counter[str] = Counter()
    order = {"other": 0, "strong": 1, "same": 2}
    kinds = {}
    for a, b, n in shown:
        is_strong = n * tokens >= STRONG * margins[0][a] * margins[1][b]
        kinds[a, b] = "same" if is_group and a == b else "strong" if is_strong else "other"
        drawn[kinds[a, b]] += n
    for a, b, n in sorted(shown, key=lambda each: order[kinds[each[:2]]]):
        colour, opacity, _ = KINDS[kinds[a, b]]
        path = _ribbon(c + BAR, c + 1 - BAR, starts[a, b], ends[a, b], n)
        axes.add_patch(PathPatch(path, facecolor=colour, alpha=opacity, linewidth=0))
    return drawn


def _ribbon(x0: float, x1: float, y0: float, y1: float, height: float) -> Any:
    """Return the path of a ribbon that leaves and arrives level."""
    from matplotlib.path import Path

    middle = (x0 + x1) / 2
    upper = [(x0, y0), (middle, y0), (middle, y1), (x1, y1)]
    lower = [(x1, y1 + height), (middle, y1 + height), (middle, y0 + height), (x0, y0 + height)]
    curve = [Path.CURVE4] * 3
    return Path([*upper, *lower, (x0, y0)], [Path.MOVETO, *curve, Path.LINETO, *curve, Path.CLOSEPOLY])


def _draw_column(axes: Any, c: int, column: Column, depth: float) -> None:
    from matplotlib.patches import Rectangle

    for expert, (top, height) in column.items():
        axes.add_patch(Rectangle((c - BAR, top), 2 * BAR, height, facecolor=INK, linewidth=0))
        if height > 0.026 * depth:  # as high as a digit
            axes.text(c, top + height / 2, str(expert), ha="center", va="center", fontsize=7, color=PAPER)


def _draw_heads(axes: Any, layers: list[int], pools: list[int | None]) -> None:
    """Write each column's layer above it, and a line with the pool's number over the layers that read one."""
    place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
    for c, layer in enumerate(layers):
        axes.annotate(f"layer {layer}", (c, 1), (0, 3), ha="center", va="bottom", fontsize=8, **place)
    c = 0
    while c < len(layers):
        end = c
        while end + 1 < len(layers) and pools[end + 1] == pools[c]:
            end += 1
        if pools[c] is not None:
            # A line below the columns, as wide as the group's.
            axes.plot([c - BAR, end + BAR], [-0.012] * 2, color=INK, linewidth=1.1, clip_on=False,
                      transform=axes.get_xaxis_transform())  # fmt: skip
            axes.annotate(f"pool {pools[c]}", ((c + end) / 2, -0.012), (0, -3), ha="center", va="top", fontsize=8,
                          **place)  # fmt: skip
        c = end + 1


def _draw_key(axes: Any, kinds: list[str], share: float, all_layers: bool, is_narrow: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.transforms import offset_copy

    below = offset_copy(axes.transAxes, axes.figure, y=-22, units="points")

    handles = [Line2D([], [], color=KINDS[kind][0], alpha=KINDS[kind][1], linewidth=6) for kind in kinds]
    which = "" if all_layers else "; these layers tell most about the next one's choices"
    key = axes.legend(
        handles, [KINDS[kind][2] for kind in kinds], loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below,
        frameon=False, ncols=1 if is_narrow else 3, fontsize=8, borderaxespad=0, borderpad=0, handlelength=1.6,
        title=f"Bars: experts by number and tokens. Ribbons: {units.percent(share)} of the tokens"
        + ("" if is_narrow else which),
        title_fontsize=8, alignment="left",
    )  # fmt: skip
    key.get_title().set_color(MUTED)

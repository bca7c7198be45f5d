"""The audit's figures, drawn by matplotlib: titles, units and labels stand in them, so that none needs a caption.

Every figure is drawn for a page (`is_narrow=False`) or for a phone. Its label (`figure.get_label()`) is its
alternative text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import units
from .drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    SERIES,
    SHADES,
    TITLE_PAD,
    WIDTHS,
    end_labels,
    label,
    new_figure,
    styled,
    subtitle,
    swatches,
    title,
)
from .findings import total_loads
from .plots_strategy import similarity, strategy
from .ribbons import flow
from .schema import Audit, Domain, Layer, ModelAudit
from .tables import OPTIMIZERS

LOG2_LIMIT = 3  # loads are shown from an eighth of the even share to eight times it


def figures(audit: Audit, is_narrow: bool = False) -> dict[str, Any]:
    """Draw every figure that the audit has figures for.

    Returns:
        matplotlib's `Figure` by name, such as "memory" or "1-loads" for the first model's.

    Raises:
        ImportError: without matplotlib.
    """
    found: dict[str, Any] = {}
    with styled():
        for i, model in enumerate(audit.models, start=1):
            for name, draw in PER_MODEL.items():
                figure = draw(model, audit.domains, is_narrow)
                if figure is not None:
                    found[f"{i}-{name}"] = figure
        for name, draw_all in PER_AUDIT.items():
            figure = draw_all(audit, is_narrow)
            if figure is not None:
                found[name] = figure
    return found


# --- loads: experts x layers -----------------------------------------------------------------------------------------


def loads(model: ModelAudit, domains: list[Domain], is_narrow: bool) -> Any | None:
    """Draw experts x layers: how often each is chosen against an even share; a bracket holds the layers of a pool."""
    if model.stability is None or not model.stability.layers:
        return None
    rows = model.stability.layers
    width = max(row.num_experts for row in rows)
    shares = np.full((len(rows), width), np.nan)
    for r, row in enumerate(rows):
        shares[r, : row.num_experts] = total_loads(row, domains) * row.num_experts
    busiest = max(rows, key=lambda row: row.load_max_over_mean.value)
    figure = new_figure(
        is_narrow,
        np.clip(0.17 * len(rows), 1.5, 6.6) + 1.75,
        f"Heat map of experts by layer: how often each expert of {units.short(model.name)} is chosen. The busiest "
        f"expert, in layer {busiest.layer}, takes {busiest.load_max_over_mean.value:.1f} times an even share; "
        f"{sum(row.num_dead for row in rows)} experts are never chosen.",
    )
    if is_narrow:
        axes, side = figure.subplots(), None
    else:
        axes, side = figure.subplots(1, 2, width_ratios=(5.5, 1), sharey=True)
    axes.imshow(_diverging(shares), aspect="auto", interpolation="none")
    _mark_dead(axes, shares)
    _layer_ticks(axes, [row.layer for row in rows])
    axes.set_xlabel("expert")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _brackets(axes, rows, {layer.index: layer for layer in model.layers}, is_narrow)
    title(axes, model, "How often each expert is chosen", is_narrow)
    if side is not None:
        values = [row.load_max_over_mean.value for row in rows]
        side.barh(range(len(rows)), values, height=0.62, color=BLUE)
        side.axvline(1, color=INK, linewidth=0.8)
        subtitle(side, "Busiest expert", "× an even share")
        side.spines["left"].set_visible(False)
        side.tick_params(axis="y", length=0, labelleft=False)
        side.set_xlim(0, 1.25 * max(values))
        for r in sorted(range(len(rows)), key=lambda r: -values[r])[:3]:
            label(side, f"{values[r]:.1f}", (values[r], r), (3, 0), va="center", fontsize=8)
    _load_key(figure, axes, is_narrow)
    return figure


def _diverging(ratios: np.ndarray) -> np.ndarray:
    """Return RGBA: orange above 1, blue below, by the logarithm; nothing at 1, where the page shows through."""
    with np.errstate(divide="ignore"):
        log = np.clip(np.log2(ratios), -LOG2_LIMIT, LOG2_LIMIT)
    image = np.zeros((*ratios.shape, 4), np.uint8)
    image[log > 0, :3], image[log <= 0, :3] = SHADES["orange"], SHADES["blue"]
    image[..., 3] = np.nan_to_num(255 * np.abs(log) / LOG2_LIMIT).astype(np.uint8)
    return image


def _mark_dead(axes: Any, shares: np.ndarray) -> None:
    """Strike through experts that were never chosen: one path, however many there are."""
    rows, columns = np.nonzero(shares == 0)
    if len(rows):
        gap = np.full(len(rows), np.nan)
        x = np.stack([columns - 0.35, columns + 0.35, gap], 1).ravel()
        y = np.stack([rows + 0.35, rows - 0.35, gap], 1).ravel()
        axes.plot(x, y, color=INK, linewidth=0.9, scalex=False, scaley=False)


def _layer_ticks(axes: Any, layers: list[int]) -> None:
    step = next(step for step in (1, 2, 4, 8, 16, 32) if len(layers) <= 26 * step)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_ylabel("layer")


def _runs(keys: Sequence[Any]) -> list[tuple[int, int]]:
    """Return first and last index of every run of equal keys."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [(start, end - 1) for start, end in zip(starts, [*starts[1:], len(keys)])]


def _brackets(axes: Any, rows: Sequence[Any], layers: dict[int, Layer], is_narrow: bool) -> None:
    """Frame every group of tied layers, and every run of untied ones; a bracket on the left names the pool."""
    keys = [(layers[row.layer].pool if row.layer in layers else None, row.num_experts) for row in rows]
    beside = axes.get_yaxis_transform()  # x in parts of the axes, y in rows
    has_pools = any(pool is not None for pool, _ in keys)
    axes.yaxis.labelpad = 30 if has_pools else 4
    point = 1 / (72 * WIDTHS[is_narrow] * (0.85 if is_narrow else 0.73))  # in parts of the axes, about
    left, tip = -21 * point, -17.5 * point
    runs = _runs(keys)
    for top, bottom in runs:
        pool, width = keys[top]
        axes.plot(
            [-0.5, width - 0.5, width - 0.5, -0.5, -0.5],
            [top - 0.5, top - 0.5, bottom + 0.5, bottom + 0.5, top - 0.5],
            color=MUTED, linewidth=0.6, scalex=False, scaley=False, clip_on=False,
        )  # fmt: skip
        if top:
            axes.plot([-0.5, width - 0.5], [top - 0.5] * 2, color=PAPER, linewidth=2.4, scalex=False, scaley=False)
        if pool is None:
            continue
        y = [top - 0.28, top - 0.28, bottom + 0.28, bottom + 0.28]
        axes.plot([tip, left, left, tip], y, color=INK, linewidth=1.1, transform=beside, clip_on=False)
        is_tall = (bottom - top + 1) * 26 >= 3.2 * len(rows)
        name, turn = (f"pool {pool}", 90) if is_tall else (str(pool), 0)
        style = {"rotation": turn, "ha": "right", "va": "center", "fontsize": 7.5}
        axes.text(left - 3 * point, (top + bottom) / 2, name, transform=beside, **style)


def _load_key(figure: Any, axes: Any, is_narrow: bool) -> None:
    """Draw the key of the colours below the image, in words."""
    bar = figure.colorbar(
        _mappable(),
        ax=axes,
        location="bottom",
        aspect=42,
        shrink=0.66 if is_narrow else 0.72,
        pad=0.015,
        anchor=(0, 0.5),
    )
    bar.solids.remove()
    ramp = np.exp2(np.linspace(-LOG2_LIMIT, LOG2_LIMIT, 97))[None]
    bar.ax.imshow(_diverging(ramp), aspect="auto", extent=(-LOG2_LIMIT, LOG2_LIMIT, 0, 1), interpolation="none")
    bar.ax.set_yticks([])
    names = {-3: "⅛ or less", -2: "¼", -1: "½", 0: "even share", 1: "2×", 2: "4×", 3: "8× or more"}
    shown = (-3, 0, 3) if is_narrow else tuple(names)
    bar.set_ticks(shown, labels=[names[at] for at in shown])
    bar.ax.tick_params(length=0)
    bar.outline.set(edgecolor=MUTED, linewidth=0.6)
    label(bar.ax, "/ never chosen", (1, 0.5), (10 if is_narrow else 26, 0), "axes fraction", va="center", fontsize=8)


def _mappable() -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(-LOG2_LIMIT, LOG2_LIMIT))


# --- active experts over depth ---------------------------------------------------------------------------------------


def active(model: ModelAudit, domains: list[Domain], is_narrow: bool) -> Any | None:
    """Draw how many experts tokens use over depth, soft mass apart, and over position; nothing where all use K."""
    if model.active is None or not model.active.is_adaptive or not model.active.layers:
        return None
    rows = model.active.layers
    layers = np.array([row.layer for row in rows])
    highest = max((n for row in rows for n, tokens in enumerate(row.histogram) if tokens), default=1)
    counts = np.zeros((highest + 1, len(rows)))
    for column, row in enumerate(rows):
        part = row.histogram[: highest + 1]
        counts[: len(part), column] = part
    totals = np.maximum(counts.sum(0), 1)
    shares, means = counts / totals, (np.arange(highest + 1)[:, None] * counts).sum(0) / totals
    tail = np.array([np.searchsorted(column.cumsum(), 0.95 - 1e-9) for column in shares.T])
    text = (
        f"Distribution of active experts per token over the layers of {units.short(model.name)}: the mean goes from "
        f"{means[0]:.1f} in layer {layers[0]} to {means[-1]:.1f} in layer {layers[-1]}; no token uses more than "
        f"{highest}."
    )
    has_positions = len(model.active.position_bins) > 1
    figure = new_figure(is_narrow, (5.2 if has_positions else 3.4) if is_narrow else 3.5, text)
    if has_positions:
        grid = {"height_ratios": (1.8, 1)} if is_narrow else {"width_ratios": (2.4, 1)}
        axes, side = figure.subplots(*((2, 1) if is_narrow else (1, 2)), **grid)
    else:
        axes, side = figure.subplots(), None
    image = np.zeros((*shares.shape, 4), np.uint8)
    image[..., :3] = SHADES["blue"]
    image[..., 3] = (200 * np.sqrt(shares / max(shares.max(), 1e-12))).astype(np.uint8)
    edges = (layers[0] - 0.5, layers[-1] + 0.5, -0.5, highest + 0.5)
    axes.imshow(image, aspect="auto", origin="lower", interpolation="none", extent=edges)
    lines = [("mean used", means, INK, "-"), ("95 % use at most", tail, MUTED, ":")]
    if all(row.soft_mass is not None for row in rows):
        lines.append(("soft mass k", np.array([row.soft_mass for row in rows]), ORANGE, "--"))
    for _, values, colour, dashes in lines:
        axes.plot(layers, values, color=colour, linestyle=dashes, linewidth=1.7)
    end_labels(axes, layers[-1] + 0.5, [(name, values[-1], colour) for name, values, colour, _ in lines])
    axes.set(xlabel="layer", ylabel="experts that a token uses", ylim=(-0.5, highest + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    title(axes, model, "Active experts over depth", is_narrow, second="; shade: share of the tokens")
    if side is not None:
        by_position = np.mean([row.by_position for row in rows], axis=0)
        side.plot(model.active.position_bins, by_position, color=INK, linewidth=1.7, drawstyle="steps-post")
        side.set(xlabel="position in the block, tokens", ylim=(0, 1.15 * np.nanmax(by_position)))
        subtitle(side, "… and over position", "mean of the layers")
    return figure


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(audit: Audit, is_narrow: bool) -> Any | None:
    """Draw what serving takes, one bar a model and dtype, against the sizes of GPUs."""
    bars = [
        (
            model,
            f"{each.dtype}",
            {"weights": each.weight_bytes, "cache": each.cache_bytes, "working": each.working_bytes},
            each,
        )
        for model in audit.models
        if model.memory is not None
        for each in model.memory.inference
    ]
    if not bars:
        return None
    shown = bars[0][3]
    gpus = next(model.memory.gpus for model in audit.models if model.memory is not None)
    title = f"Memory to serve, {shown.context:,} tokens" + (f" × {shown.batch_size}" if shown.batch_size > 1 else "")
    return _bars(audit, bars, gpus, title, (BLUE, ORANGE, GREEN), is_narrow)


def training(audit: Audit, is_narrow: bool) -> Any | None:
    """Draw what a training step takes on each GPU, one bar an optimizer and strategy, against the sizes of GPUs."""
    found = [each for model in audit.models if model.memory is not None for each in model.memory.training]
    is_checkpointed = any(each.gradient_checkpointing for each in found)  # both in one figure are too many bars
    how = "with gradient checkpointing" if is_checkpointed else ""
    heading = f"Memory to train{f', {how}' if how and not is_narrow else ''}, on each GPU"
    bars = [
        (
            model,
            f"{OPTIMIZERS[each.optimizer]}, " + (
                "one GPU" if each.num_gpus == 1 else f"{each.num_gpus} × {STRATEGIES[each.strategy]}"
            ),
            {
                "weights": each.weight_bytes,
                "gradients": each.gradient_bytes,
                "optimizer": each.optimizer_bytes,
                "activations": each.activation_bytes,
            },
            each,
        )
        for model in audit.models
        if model.memory is not None
        for each in model.memory.training
        if each.gradient_checkpointing == is_checkpointed
    ]  # fmt: skip
    if not bars:
        return None
    gpus = next(model.memory.gpus for model in audit.models if model.memory is not None)
    return _bars(audit, bars, gpus, heading, SERIES, is_narrow, how if is_narrow else "")


STRATEGIES = {"one": "one", "ddp": "DDP", "fsdp2": "FSDP2", "expert_parallel": "EP"}


def _bars(
    audit: Audit,
    bars: list,
    gpus: dict[str, int],
    title: str,
    colours: Sequence[str],
    is_narrow: bool,
    how: str = "",
) -> Any:
    """Draw stacked bars in GiB, grouped by model, with a line at each size of GPU; `how` stands under them."""
    unit, scale = _scale(max(each.total_bytes for *_, each in bars))
    most = max(each.total_bytes for *_, each in bars) / scale
    figure = new_figure(
        is_narrow,
        0.24 * len(bars) + 0.3 * len({model.name for model, *_ in bars}) + 1.35,
        f"{title}, as bars in {unit}: "
        + "; ".join(
            f"{units.short(model.name)} {name} {units.size(each.total_bytes)}" for model, name, _, each in bars
        )
        + ".",
    )
    axes = figure.subplots()
    y, previous, ticks = 0.0, None, []
    for model, name, parts, each in bars:
        if model is not previous:
            y += 1.1 if previous is not None else 0.0
            name_style = {"va": "center", "fontweight": "bold", "bbox": {"facecolor": PAPER, "linewidth": 0, "pad": 1}}
            label(axes, units.short(model.name, 34 if is_narrow else 60), (0, y), (2, 0), **name_style)
            y, previous = y + 0.95, model
        left = 0.0
        for size, colour in zip(parts.values(), colours):
            axes.barh(y, size / scale, left=left, height=0.66, color=colour, edgecolor=PAPER, linewidth=0.6)
            left += size / scale
        label(axes, f"{each.total_bytes / scale:,.3g}", (left, y), (4, 0), va="center", fontsize=8.5)
        ticks.append((y, name))
        y += 1.0
    axes.set_ylim(y - 0.4, -0.7)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    note, num_rows = _gpu_lines(axes, most, scale, gpus, is_narrow)
    axes.set_xlabel(("\n" if is_narrow else "; ").join(each for each in (unit, how, note) if each))
    axes.set_title(f"{title}\n", loc="left", pad=TITLE_PAD + 10 * num_rows)
    swatches(axes, list(bars[0][2]), colours, 5 + 10 * num_rows, is_narrow)
    return figure


def _gpu_lines(axes: Any, most: float, scale: float, gpus: dict[str, int], is_narrow: bool) -> tuple[str, int]:
    """Draw a line at each GPU's size, up to the first that holds the longest bar.

    Returns:
        What to say where no line is in sight, and how many rows the lines' names take above the axes.
    """
    by_size: dict[float, list[str]] = {}
    for name, num_bytes in sorted(gpus.items(), key=lambda each: each[1]):
        by_size.setdefault(num_bytes / scale, []).append(name)
    sizes = sorted(by_size)
    if not sizes or most < 0.12 * sizes[0]:
        axes.set_xlim(0, 1.18 * most)
        remark = f"the smallest GPU here, {by_size[sizes[0]][0]}, has {units.size(sizes[0] * scale)}" if sizes else ""
        return remark, 0
    largest = next((size for size in sizes if size >= most), sizes[-1])
    limit = 1.12 * max(most, largest)
    axes.set_xlim(0, limit)
    ends: list[float] = []  # how far each row of labels reaches, in parts of the axes
    for size in [each for each in sizes if each <= largest]:
        names = by_size[size]
        name = units.short(names[0], 20) + (f" +{len(names) - 1}" if len(names) > 1 else "")
        axes.axvline(size, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        half = (0.0105 if is_narrow else 0.0052) * (len(name) + 2)
        at = max(half, min(size / limit, 1 - half))
        row = next((row for row, end in enumerate(ends) if at - half >= end), len(ends))
        ends[row : row + 1] = [at + half]
        style = {"ha": "center", "va": "bottom", "fontsize": 8, "color": MUTED}
        label(axes, name, (at, 1), (0, 2 + 10 * row), "axes fraction", **style)
    return "", len(ends)


def _scale(most: float) -> tuple[str, float]:
    for unit, scale in (("GiB", 2.0**30), ("MiB", 2.0**20)):
        if most >= 0.9 * scale:
            return unit, scale
    return "KiB", 2.0**10


# --- Pareto ----------------------------------------------------------------------------------------------------------

MAX_MEASURES = 4


def pareto(audit: Audit, is_narrow: bool) -> Any | None:
    """Draw quality against compute and memory, a row a measure, the fronts as steps; for two models or more."""
    if len({point.model for point in audit.pareto}) < 2:
        return None
    measures = list(dict.fromkeys(point.measure for point in audit.pareto))[:MAX_MEASURES]
    on_front = sorted({units.short(point.model) for point in audit.pareto if point.is_on_memory_front})
    figure = new_figure(
        is_narrow,
        (2.5 * 2 if is_narrow else 2.7) * len(measures) + 0.3,
        f"Quality against compute and against memory, for {', '.join(measures)}. On a front of memory: "
        f"{units.join(on_front)}.",
    )
    grid = figure.subplots(*((2 * len(measures), 1) if is_narrow else (len(measures), 2)), squeeze=False).reshape(
        -1, 2
    )
    number = {model.name: i for i, model in enumerate(audit.models)}
    unit, scale = _scale(max(point.memory_bytes for point in audit.pareto))
    most = max(point.flops_per_token for point in audit.pareto)
    flops_unit, flops_scale = next(each for each in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1)) if most >= each[1])
    for row, measure in zip(grid, measures):
        points = [point for point in audit.pareto if point.measure == measure]
        flops, sizes = [p.flops_per_token / flops_scale for p in points], [p.memory_bytes / scale for p in points]
        for axes, front, cost, unit_name in (
            (row[0], "is_on_compute_front", flops, f"{flops_unit}FLOPs per token"),
            (row[1], "is_on_memory_front", sizes, f"memory to serve, {unit}"),
        ):
            _front(axes, points, cost, [getattr(point, front) for point in points], number, is_narrow)
            axes.set_xlabel(unit_name)
            is_lower_better, is_loss = points[0].is_lower_better, measure.startswith("loss ")
            axes.set_ylabel(f"loss on {units.short(measure[5:])}, nats per token" if is_loss else measure)
            against = "compute" if front == "is_on_compute_front" else "memory"
            axes.set_title(f"{'Loss' if is_loss else 'Quality'} against {against}", loc="left")
            better = "better ↙" if is_lower_better else "better ↖"
            label(
                axes, f"● on the front, {better}", (1, 1), (0, 9), "axes fraction", ha="right", fontsize=8, color=MUTED
            )
    return figure


def _front(axes: Any, points: list, costs: list[float], is_front: list[bool], number: dict, is_narrow: bool) -> None:
    front = sorted((cost, point.value) for cost, point, on in zip(costs, points, is_front) if on)
    low, high = min(costs), max(costs)
    pad = 0.35 * (high - low) or 0.2 * high
    values = [point.value for point in points]
    height = max(values) - min(values) or 0.05 * abs(max(values)) or 1.0
    axes.set(xlim=(low - 0.35 * pad, high + pad), ylim=(min(values) - 0.3 * height, max(values) + 0.3 * height))
    if front:
        x, y = [*(cost for cost, _ in front), high + pad], [*(value for _, value in front), front[-1][1]]
        axes.plot(x, y, color=MUTED, linewidth=1, drawstyle="steps-post", zorder=1)
    above: dict[int, float] = {}
    for i in sorted(range(len(points)), key=lambda i: points[i].value):
        point, cost, on = points[i], costs[i], is_front[i]
        colour = SERIES[number.get(point.model, 0) % len(SERIES)]
        axes.plot(cost, point.value, "o", markersize=8, color=colour, fillstyle="full" if on else "none", mew=1.8)
        # Names that would stand on each other are moved apart, upwards.
        at = max((y for j, y in above.items() if abs(costs[j] - cost) < 0.5 * (high - low + pad)), default=-np.inf)
        above[i] = max(point.value, at + 0.13 * height)
        name = units.short(point.model, 18 if is_narrow else 24)
        label(axes, name, (cost, above[i]), (6, 5), va="bottom", fontsize=8.5, color=colour)


PER_MODEL = {"loads": loads, "active": active, "flow": flow, "strategy": strategy, "similarity": similarity}
PER_AUDIT = {"memory": memory, "training": training, "pareto": pareto}

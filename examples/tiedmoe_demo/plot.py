"""The demo's picture: what tying saves and costs, and where the tokens of the healed model go."""

from pathlib import Path

# Okabe and Ito's colours, told apart by people who are colour-blind as well.
COLOURS = {"source": "#0072B2", "control": "#56B4E9", "tied": "#D55E00", "healed": "#009E73"}
MARKERS = {"source": "o", "control": "s", "tied": "v", "healed": "D"}

SAME_SIZE = {"source": "control", "control": "source", "tied": "healed", "healed": "tied"}


def save_plot(report: dict, path: Path) -> None:
    """Draw `report`, what `run_demo` returns, into the PNG file `path`.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no state
    except ImportError as error:
        raise ImportError("the demo draws with matplotlib; pip install 'transformers-tiedmoe[demo]'") from error
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _draw_cost(left, report)
    _draw_routing(figure, right, report)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png")
    draft.replace(path)


def _draw_cost(axes, report: dict) -> None:
    """Draw perplexity against bytes on disk, one point a model, with tying and healing as arrows between them."""
    points = {name: (report[name]["checkpoint_bytes"] / 1e6, report[name]["perplexity"]) for name in COLOURS}
    for start, end in (("source", "tied"), ("tied", "healed")):
        style = {"arrowstyle": "->", "color": "0.6", "shrinkA": 7, "shrinkB": 7}
        axes.annotate("", points[end], points[start], arrowprops=style)
    for name, (size, perplexity) in points.items():
        # Hollow: models whose perplexities are a per cent apart stand on one another.
        axes.plot(size, perplexity, MARKERS[name], color=COLOURS[name], markersize=10, fillstyle="none", mew=2.2)
        # Two models share a size and may be close: labels stand to the outer side, and away from each other.
        outwards = -1 if name in ("tied", "healed") else 1
        upwards = 1 if perplexity >= points[SAME_SIZE[name]][1] else -1
        axes.annotate(
            f"{name} {perplexity:.2f}",
            (size, perplexity),
            (10 * outwards, 3 * upwards),
            textcoords="offset points",
            ha="right" if outwards < 0 else "left",
            va="bottom" if upwards > 0 else "top",
        )
    # Both axes from zero: a per cent is to look like one.
    axes.set_xlim(0, 1.35 * max(size for size, _ in points.values()))
    axes.set_ylim(0, 1.2 * max(perplexity for _, perplexity in points.values()))
    axes.set_xlabel("weights on disk, MB")
    axes.set_ylabel("held-out perplexity per token")
    axes.set_title("What tying saves, and what it costs")
    axes.grid(alpha=0.3)


def _draw_routing(figure, axes, report: dict) -> None:
    """Draw the routing: rows are layers, columns experts; a bracket holds the layers that read one pool."""
    routing = {int(layer): shares for layer, shares in report["healed"]["routing"].items()}
    layers, width = sorted(routing), max(map(len, routing.values()))
    grid = [
        [100 * share for share in routing[layer]] + [float("nan")] * (width - len(routing[layer])) for layer in layers
    ]
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0)
    figure.colorbar(image, ax=axes, pad=0.02, label="share of the layer's choices, %")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer", labelpad=44)
    axes.set_title("Where the healed model's held-out tokens go")
    beside = axes.get_yaxis_transform()  # x in parts of the axes, y in rows
    for p, group in enumerate(report["conversion"]["groups"]):
        rows = [layers.index(layer) for layer in group]
        top, bottom = min(rows) - 0.5, max(rows) + 0.5
        axes.hlines([top, bottom], -0.5, width - 0.5, color="white", linewidth=2.5)
        x = -0.075
        axes.plot([x + 0.01, x, x, x + 0.01], [top + 0.1, top + 0.1, bottom - 0.1, bottom - 0.1], color="black",
                  linewidth=1.2, transform=beside, clip_on=False)  # fmt: skip
        axes.text(x - 0.015, (top + bottom) / 2, f"pool {p}", rotation=90, ha="right", va="center", transform=beside)

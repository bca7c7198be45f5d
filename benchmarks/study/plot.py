"""The study's picture: loss against expert bytes before and after healing, and against the healing."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people who are colour-blind as well; a marker each where they come round again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "oDsv^PX<>*"


def save_plot(summary: dict[str, Any], path: Path) -> None:
    """Draw `summary`, of `summarize`, into the PNG file `path`."""
    figure = Figure(figsize=(15, 6.2), layout="constrained", dpi=130)
    before, after, healing = figure.subplots(1, 3)
    rows = [row for row in summary["rows"] if row["kind"] != "source"]
    series = list(dict.fromkeys(row["series"] for row in rows))
    for place, name in enumerate(series):
        own = sorted((row for row in rows if row["series"] == name), key=lambda row: row["expert_share"])
        style = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "--" if own[0]["kind"] != "convert" else "-",
            "linewidth": 1.2,
            "markersize": 6,
            "alpha": 0.85,
        }
        _draw_sizes(before, own, summary, "0.0", style | {"label": name})
        _draw_sizes(after, own, summary, "1.0", style | {"label": name})
        _draw_healing(healing, own, summary, style)
    for axes, when in ((before, "before healing"), (after, "after all of the healing budget")):
        axes.set_xlabel("expert bytes, % of the source's")
        axes.set_title(f"Loss above the control's, {when}")
    healing.set_xlabel("healing, % of the source's training tokens")
    healing.set_title("What healing does, smallest size of each")
    for axes in (before, after, healing):
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3)
    handles = {label: handle for axes in (before, after) for handle, label in zip(*axes.get_legend_handles_labels())}
    ordered = [name for name in series if name in handles]
    figure.legend([handles[name] for name in ordered], ordered, loc="outside lower center", ncols=6, fontsize=9)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png")
    draft.replace(path)


def _draw_sizes(axes, rows: list[dict], summary: dict[str, Any], share: str, style: dict[str, Any]) -> None:
    control = summary["control_loss"][share]
    points = [(100 * row["expert_share"], row["loss"][share]) for row in rows if row["loss"].get(share)]
    if not points or not control:
        return
    axes.errorbar(
        [size for size, _ in points],
        [loss["mean"] - control["mean"] for _, loss in points],
        yerr=[loss["standard_deviation"] or 0 for _, loss in points],
        capsize=2,
        **style,
    )


def _draw_healing(axes, rows: list[dict], summary: dict[str, Any], style: dict[str, Any]) -> None:
    shares = ["0.0", *map(str, summary["settings"]["shares"])]
    loss, control = rows[0]["loss"], summary["control_loss"]
    points = [
        (100 * summary["settings"]["heal_share"] * float(share), loss[share]["mean"] - control[share]["mean"])
        for share in shares
        if loss.get(share) and control[share]
    ]
    if len(points) > 1:
        axes.plot(*zip(*points), **style)

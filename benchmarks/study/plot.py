"""The study's picture: loss against expert bytes before and after healing, and against the healing."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

# Okabe and Ito's colours, told apart by people who are colour-blind as well, and two greys.
COLOURS = ("#E69F00", "#D55E00", "#009E73", "#000000", "#0072B2", "#CC79A7", "#56B4E9", "0.45", "0.7")
MARKERS = "oDs^vPX"
LINEAR_BELOW = 0.01  # nats; a logarithmic scale above
TICKS = (-0.02, -0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


def figure_of(summary: dict[str, Any]) -> Figure:
    """Draw `summary`, of `summarize`."""
    figure = Figure(figsize=(15, 6.2), layout="constrained", dpi=130)
    before, after, healing = figure.subplots(1, 3)
    after.sharex(before)
    for axes in (before, after, healing):
        # The good methods lie between a thousandth and a tenth of a nat, the bad ones ten times above.
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(0, color="0.4", linewidth=1)
        axes.set_ylabel("nats per token, logarithmic above 0.01")
        axes.grid(alpha=0.3)
    rows = [row for row in summary["rows"] if row["kind"] != "source"]
    series = list(dict.fromkeys(row["series"] for row in rows))
    families = list(dict.fromkeys(map(_family, series)))
    for name in series:
        own = sorted((row for row in rows if row["series"] == name), key=lambda row: row["expert_share"])
        relatives = [each for each in series if _family(each) == _family(name)]
        style = {"linewidth": 1.2, "markersize": 6, "alpha": 0.85}
        style["color"] = COLOURS[families.index(_family(name)) % len(COLOURS)]
        style["marker"] = MARKERS[relatives.index(name) % len(MARKERS)]
        style["linestyle"] = {"convert": ":" if own[0]["heal"] else "-"}.get(own[0]["kind"], "--")
        _draw_sizes(before, own, "0.0", style | {"label": name})
        _draw_sizes(after, own, "1.0", style | {"label": name})
        _draw_healing(healing, own, summary, style)
    for axes, when in ((before, "before healing"), (after, "after all of the healing budget")):
        axes.set_xlabel("expert bytes, % of the source's")
        axes.set_title(f"Loss above the control's, {when}")
    healing.set_xlabel("healing, % of the source's training tokens")
    healing.set_title("What healing does, smallest size of each")
    handles = {label: handle for axes in (before, after) for handle, label in zip(*axes.get_legend_handles_labels())}
    ordered = [name for name in series if name in handles]
    figure.legend([handles[name] for name in ordered], ordered, loc="outside lower center", ncols=6, fontsize=9)
    return figure


def _family(series: str) -> str:
    """Return the first word, by which series share a colour."""
    return series.replace(",", " ").replace(";", " ").split()[0]


def _draw_sizes(axes, rows: list[dict], share: str, style: dict[str, Any]) -> None:
    points = [(row["expert_share"], row["loss_above_control"][share]) for row in rows]
    points = [(100 * size, above["mean"], above["standard_deviation"] or 0) for size, above in points if above]
    if points:
        sizes, means, deviations = zip(*points)
        axes.errorbar(sizes, means, yerr=deviations, capsize=2, **style)


def _draw_healing(axes, rows: list[dict], summary: dict[str, Any], style: dict[str, Any]) -> None:
    shares = ["0.0", *map(str, summary["settings"]["shares"])]
    above, percent = rows[0]["loss_above_control"], 100 * summary["settings"]["heal_share"]
    points = [(percent * float(share), above[share]["mean"]) for share in shares if above[share]]
    if len(points) > 1:
        axes.plot(*zip(*points), **style)

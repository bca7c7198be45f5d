"""The study's runs in one JSON-able summary, and that as a table and a picture."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from tables import mean_of, plus_minus, table

from .configurations import SOURCE, Row
from .runs import BEFORE, Study

Found = dict[tuple[int, float], dict[str, Any]]  # by seed and share of the healing budget
# Share of the expert bytes, % of perplexity above the control or the untouched source.
GOALS = ((0.75, 0.5, "control"), (0.50, 3.0, "control"))
HEALING_GOALS = ((0.75, 0.5, "source"), (0.50, 2.0, "source"))
NEAR = 0.005  # a router, a slot map: what still counts as that share
# What a kind of row is drawn in, and called where that has to be said. Okabe and Ito's colours.
KINDS = {
    "convert": ("#0072B2", ""),
    "prune": ("#D55E00", "healed, the control of fewer experts in every layer"),
    "source": ("0.45", "the source, with the same tokens"),
    "scratch": ("#009E73", "tied from scratch, with all tokens of both"),
}
AFTER_DOT = {"marker": "o", "markersize": 7}
BEFORE_DOT = {"marker": "o", "markersize": 6, "markerfacecolor": "white"}
WAY_DOT = {"marker": "|", "markersize": 6}
LINEAR_BELOW = 1  # %; a logarithmic scale above
TICKS = (-1, 0, 1, 3, 10, 30, 100, 300)


def summarize(study: Study, training: dict, results: Sequence[tuple[Row, Found]], goals: Sequence[tuple]) -> dict:
    """Give each row its size and, over its seeds, losses and the perplexity against the control's of the same seed."""
    control = next(found for row, found in results if row == SOURCE)
    rows = [_row(row, found, control, study.shares) for row, found in results if found]
    return {
        "rows": rows,
        "goals": [_goal(rows, *goal) for goal in goals],
        "control_perplexity": mean_of(_values(control, 1.0, "perplexity")),
        "source_perplexity": control[0, BEFORE]["perplexity"],
        "held_out_tokens": next(iter(control.values()))["tokens"],
        "training": training,
        "healing_steps": {str(share): study.steps(share) for share in study.shares},
        "settings": study.settings(),
    }


def markdown(summary: dict[str, Any]) -> str:
    """Write the table, and what became of the goals.

    The largest row comes first, among equals the best first and what was not healed last.
    """
    settings, steps = summary["settings"], summary["healing_steps"]
    shares = [str(share) for share in settings["shares"]]
    columns = ["", "size", "expert bytes", "seeds healed", "loss before"]
    columns += [f"after {100 * settings['heal_share'] * float(share):.3g}% ({steps[share]} steps)" for share in shares]
    columns += ["perplexity against the control", "against the source", "seconds to convert"]
    tokens = settings["source"]["batch_size"] * settings["source"]["block_size"]
    head = (
        f"Held-out loss in nats per token (`{summary['command']}`). Source: {summary['training']['tokens']:,} tokens "
        f"of training; healing budget: {steps['1.0'] * tokens:,} tokens, {settings['heal_share']:.0%} of them, "
        "source as teacher at half the loss (all of it: teacher alone, and `make study-healing`), peak learning rate "
        f"{settings['heal_learning_rate']:g}. Control: the source with the same tokens, perplexity "
        f"{plus_minus(summary['control_perplexity'], 2)}; untouched {summary['source_perplexity']:.2f}. Mean ± sample "
        "standard deviation over the seeds of calibration text and healing, whose tokens are in % of the source's."
    )
    cells = [
        [
            *(row["series"], row["size"], f"{row['expert_share']:.1%}", row["num_seeds"]),
            *(plus_minus(row["loss"][share], 4) for share in (str(BEFORE), *shares)),
            *(plus_minus(row[f"percent_above_{model}"], 2, " %", "+") for model in ("control", "source")),
            plus_minus(row["conversion_seconds"], 1),
        ]
        for row in sorted(summary["rows"], key=_order)
    ]
    goals = map(_goal_line, summary["goals"])
    return "\n".join([head, "", *table(columns, cells, left=2), "", *goals, ""])


def _row(row: Row, found: Found, control: Found, shares: Sequence[float]) -> dict[str, Any]:
    first = next(result for result in found.values() if "expert_bytes" in result)
    if row.kind == "scratch":  # its tokens are the source's and the healing's
        found = {(seed, 1.0): result for (seed, _), result in found.items()}
    healed = {seed: result["perplexity"] for (seed, share), result in found.items() if share == 1.0}
    fields = {"name": row.name, "series": row.series, "size": row.size, "kind": row.kind}
    fields |= {"recipe": dict(row.recipe), "heal": dict(row.heal), "num_seeds": len(healed)}
    fields |= {name: first[name] for name in ("parameters", "expert_bytes")}
    return fields | {
        "expert_share": first["expert_bytes"] / control[0, BEFORE]["expert_bytes"],
        "loss": {str(share): mean_of(_values(found, share, "loss")) for share in (BEFORE, *shares)},
        "percent_above_control": _above(healed, {seed: control.get((seed, 1.0)) for seed in healed}),
        "percent_above_source": _above(healed, dict.fromkeys(healed, control[0, BEFORE])),
        "conversion_seconds": mean_of(_values(found, BEFORE, "conversion_seconds")),
        "healing_seconds": mean_of(_values(found, 1.0, "heal_seconds")),
    }


def _above(perplexity: dict[int, float], other: dict[int, dict | None]) -> dict[str, Any] | None:
    """Compare perplexities with those of `other`, by seed, in % above; one that `other` has not run is left out."""
    return mean_of([100 * (perplexity[seed] / each["perplexity"] - 1) for seed, each in other.items() if each])


def _values(found: Found, share: float, figure: str) -> list[float]:
    return [result[figure] for (_, each), result in found.items() if each == share and figure in result]


def _goal(rows: list[dict], expert_share: float, percent: float, against: str) -> dict[str, Any]:
    """Find the converted row that comes closest to the control, or the source, with so many bytes."""
    distance = f"percent_above_{against}"
    rows = [row for row in rows if row["kind"] == "convert" and row[distance]]
    able = [row for row in rows if row["expert_share"] <= expert_share + NEAR]
    best = min(able, key=lambda row: row[distance]["mean"], default=None)
    goal = {"expert_share": expert_share, "percent": percent, "against": against, "best": best and best["name"]}
    goal |= {"found": best and best[distance], "above_source": best and best["percent_above_source"]}
    return goal | {"is_met": best and best[distance]["mean"] <= percent}


def _goal_line(goal: dict[str, Any]) -> str:
    model = {"control": "the control", "source": "the untouched source"}[goal["against"]]
    aim = f"- {goal['expert_share']:.0%} of the expert bytes, within {goal['percent']:g} % of {model}'s perplexity: "
    if goal["best"] is None:
        return aim + "not measured"
    found, above_source = (plus_minus(goal[name], 2, " %", "+") for name in ("found", "above_source"))
    verdict = "met" if goal["is_met"] else "missed"
    also = f"; {above_source} above the untouched source" if goal["against"] == "control" else ""
    return aim + f"{verdict}, {found} (`{goal['best']}`{also})"


def _order(row: dict[str, Any]) -> tuple:
    after, before = row["loss"].get("1.0"), row["loss"][str(BEFORE)]
    mean = (after or before)["mean"] if after or before else 0.0
    return row["kind"] != "source", -round(row["expert_share"], 2), after is None, mean


def figure_of(summary: dict[str, Any]) -> Figure:
    """Draw `summary`, of `summarize`: a line a row, from its perplexity before healing to that after."""
    rows = [row for row in sorted(summary["rows"], key=_order) if row["loss"]["1.0"]]
    halves = [[row for row in rows if (row["expert_share"] > 0.6) == is_large] for is_large in (True, False)]
    longest = max(map(len, halves))
    figure = Figure(figsize=(13, 2.2 + 0.26 * longest), layout="constrained", dpi=130)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, half in zip(panels, halves):
        for place, row in enumerate(half):
            _draw_row(axes, -place, row, summary)
        axes.set_yticks([-place for place in range(len(half))], [_name(row) for row in half])
        axes.set_ylim(0.6 - longest, 0.6)  # both panels' rows have one height
        # Good methods lie within 1 %, bad ones a hundred times above.
        axes.set_xscale("symlog", linthresh=LINEAR_BELOW, linscale=0.6)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axvline(0, color="0.2", linewidth=1)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("perplexity above the untouched source, %")
    panels[0].set_title("Two thirds of the expert bytes, or more", loc="left")
    panels[1].set_title("Half of the expert bytes", loc="left")
    healed = f"healed on {summary['settings']['heal_share']:.0%} of the source's tokens"
    styles = [("before healing", "0.2", BEFORE_DOT), ("on the way", "0.2", WAY_DOT)]
    styles += [(text or healed, colour, AFTER_DOT) for colour, text in KINDS.values()]
    handles = [Line2D([], [], linestyle="", label=text, color=colour, **dot) for text, colour, dot in styles]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _name(row: dict[str, Any]) -> str:
    size = "" if row["size"].endswith("of every layer") else f" ({row['size']})"
    return f"{row['series']}{size}  {row['expert_share']:.0%}"


def _draw_row(axes, y: float, row: dict[str, Any], summary: dict[str, Any]) -> None:
    def above(loss: float) -> float:
        return 100 * (math.exp(loss) / summary["source_perplexity"] - 1)

    losses = {float(share): loss for share, loss in row["loss"].items() if loss and float(share) <= 1}
    points = [above(losses[share]["mean"]) for share in sorted(losses)]
    colour, _ = KINDS[row["kind"]]
    axes.plot(points, [y] * len(points), color=colour, linewidth=1, alpha=0.5)
    axes.plot(points[1:-1], [y] * len(points[1:-1]), linestyle="", color=colour, **WAY_DOT)
    if len(points) > 1:
        axes.plot(points[0], y, color=colour, **BEFORE_DOT)
    seeds = [above(loss) for loss in losses[1.0]["values"]]
    axes.plot([min(seeds), max(seeds)], [y, y], color=colour, linewidth=4, alpha=0.4, solid_capstyle="butt")
    axes.plot(points[-1], y, color=colour, **AFTER_DOT)
    axes.text(1.02, y, f"{points[-1]:+.2f} %", transform=axes.get_yaxis_transform(), va="center")

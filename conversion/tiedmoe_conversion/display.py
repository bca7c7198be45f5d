"""What people see of a plan, a search and a measurement, rendered by rich."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text


def show_plan(plan: Any) -> RenderableType:
    """Render a `Plan`: its pools, what is left of parameters and bytes, memory, disk, and what is dropped."""
    recipe = plan.recipe
    pools = Table("pool", "layers", "experts", "made by", "bytes", box=box.SIMPLE_HEAD)
    for p, (group, width) in enumerate(zip(plan.groups, plan.pool_num_experts)):
        size = sum(operation.num_bytes for operation in plan.operations if operation.pool == p)
        pools.add_row(str(p), _span(group), str(width), _made_by(recipe), decimal(size))
    totals = Table("", "before", "after", "left", box=box.SIMPLE_HEAD)
    for label, before, after, show in (
        ("parameters", plan.parameters_before, plan.parameters_after, "{:,}".format),
        ("of these in experts", plan.expert_parameters_before, plan.expert_parameters_after, "{:,}".format),
        ("weights on disk", plan.bytes_before, plan.bytes_after, decimal),
    ):
        totals.add_row(label, show(before), show(after), f"{after / before:.1%}")
    untied = [layer for layer in plan.source.experts if plan.config.group_of(layer) is None]
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.dropped:
        reasons.setdefault(reason, []).append(name)
    return Group(
        Text(f"{recipe.source} ({plan.config.family}) -> {recipe.output}", style="bold"),
        *([pools] if plan.groups else []),
        Text(f"layers that keep their own experts: {_span(untied) if untied else 'none'}"),
        totals,
        Text(
            f"{len(plan.operations)} tensors in {len({operation.file for operation in plan.operations})} weight "
            f"file(s); at most {decimal(plan.peak_memory_bytes)} of tensors in memory at a time\n"
            + (
                f"calibration on {recipe.calibration_tokens:,} tokens of {recipe.calibration}: "
                f"{decimal(plan.statistics_bytes)} of statistics on the disk\n"
                if recipe.calibration is not None
                else ""
            )
            + f"files that travel along: {', '.join(plan.files) or 'none'}"
        ),
        *([Text(_soft_routing(plan.config.softmoe))] if recipe.routing == "softmoe" else []),
        *(Text(f"dropped: {len(names)} tensor(s), such as {names[0]}: {why}") for why, names in reasons.items()),
    )


def show_training(rows: Mapping[str, Any]) -> RenderableType:
    """Render what `transformers_tiedmoe.audit.scaling.predict` gives for the source and the tied model."""
    from transformers_tiedmoe.audit.scaling import COLUMNS, cells  # torch, which no other rendering here needs

    table = Table("", *COLUMNS, box=box.SIMPLE_HEAD)
    for name, each in rows.items():
        for row in each:
            table.add_row(name, *cells(row))
    table.title = "a step of AdamW, computed: bfloat16 and float32 mixed, checkpointing, 4,096 tokens on each GPU"
    return table


def show_search(chosen: Any) -> RenderableType:
    """Render what a search `Chosen` found: the curve of loss against bytes, its choice marked."""
    table = Table("", "bytes left", "predicted", "measured", "groups (experts in the pool)", box=box.SIMPLE_HEAD)
    for i, point in enumerate(chosen.curve):
        found = chosen.measured.get(i)
        table.add_row(
            ">" if point is chosen.point else "",
            f"{point.fraction:.1%}",
            f"{point.predicted:+.4f}",
            "" if found is None else f"{found:+.4f}",
            point.describe(),
        )
    table.title = "loss added on held-out text (nats per token) against bytes"
    return table


def show_measured(measured: Mapping[str, Any]) -> RenderableType:
    """Render what `calibration.measure.measure_conversion` returns: source and tied model side by side."""
    slots, experts = measured["dead_slots"].values(), measured["dead_experts"].values()
    table = Table(f"on {measured['tokens']:,} held-out tokens", "source", "tied")
    table.add_row("loss", f"{measured['loss_before']:.4f}", f"{measured['loss_after']:.4f}")
    table.add_row("experts chosen as by the source", "", f"{measured['routing_agreement']['mean']:.1%}")
    total = sum(each["of"] for each in slots)
    table.add_row(
        "slots that no token chose", *(f"{sum(each[k] for each in slots)} of {total}" for k in ("source", "tied"))
    )
    dead = sum(each["dead"] for each in experts)
    table.add_row("pool experts that no token reached", "", f"{dead} of {sum(each['of'] for each in experts)}")
    return table


def show_baked(baked: Mapping[str, Any]) -> RenderableType:
    """Render what `baking.bake` returns: soft routing and the top-k that stands for it, side by side."""
    used, top_k = baked["active_experts"], baked["top_k"]
    layers = top_k if isinstance(top_k, list) else [top_k] * len(used)
    table = Table(f"on {baked['tokens']:,} held-out tokens", "soft", "top-k")
    for each, k in zip(used, layers):
        table.add_row(f"experts used in layer {each['layer']}", f"{each['mean']:.2f}", str(k))
    table.add_row("in all layers", f"{sum(each['mean'] for each in used):.2f}", str(sum(layers)))
    added = baked["loss_after"] - baked["loss_before"]
    table.add_row("loss", f"{baked['loss_before']:.4f}", f"{baked['loss_after']:.4f} ({added:+.4f})")
    return table


def _soft_routing(soft: Mapping[str, Any]) -> str:
    """Say where soft routing starts, and where healing takes it."""
    towards = soft["target_active"]
    aim = (
        "" if towards is None else f" and tokens to {towards:g} experts in all layers together, of {soft['budget']:g}"
    )
    return f"routing: the source's top-k until `tiedmoe heal` takes alpha to {soft['target_alpha']:g}{aim}"


def _made_by(recipe: Any) -> str:
    """Name the recipe's methods for people: "prototype, prefit, residual 8"."""
    names = [method.name for method, _ in recipe.steps]
    return ", ".join(names + [f"residual {recipe.residual_rank}"] * bool(recipe.residual_rank))


def _span(layers: list[int]) -> str:
    """Write layer indices for people: "2-5", or "0, 1, 14, 15"."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))

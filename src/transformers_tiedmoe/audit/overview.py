"""The tables of an audit as a whole: its models beside each other, what their layers are, how it was measured."""

import itertools

from . import units
from .findings import inference_shown, smallest_gpu
from .schema import Audit, Layer, ModelAudit
from .tables import Table

RATIOS = {"quality_per_gflop": "bits saved per GFLOP", "quality_per_gib": "bits saved per GiB"}


def glance(audit: Audit) -> Table:
    """Return what one wants first: each model's size, memory, compute and loss."""
    domains = [domain.name for domain in audit.domains]
    ratios = [name for name in RATIOS if any(_ratio(audit, model, name) for model in audit.models)]
    # Models that differ only far into their names keep the whole of them.
    columns = (
        "model",
        "parameters",
        "a token uses",
        "FLOPs per token",
        "memory to serve",
        "fits one",
        *(f"loss on {units.short(domain)}" for domain in domains),
        *(RATIOS[name] for name in ratios),
    )
    rows = []
    for model in audit.models:
        memory, shown = model.memory, inference_shown(model.memory) if model.memory else None
        total = memory.parameters["total"] if memory else None
        flops = list(model.active.flops_per_token.values()) if model.active else []
        rows.append(
            (
                units.short(model.name, 48),
                units.count(total.unique) if total else "–",
                units.count(total.active) if total else "–",
                _range(flops),
                f"{units.size(shown.total_bytes)}, {shown.dtype}" if shown else "–",
                (smallest_gpu(shown.fits, memory.gpus) or "none") if memory and shown and shown.fits else "–",
                *(_loss(model, name) for name in domains),
                *(_ratio(audit, model, name) or "–" for name in ratios),
            )
        )
    shown = next((inference_shown(model.memory) for model in audit.models if model.memory), None)
    at = f"; memory at {shown.context:,} tokens and a batch of {shown.batch_size}" if shown else ""
    note = "Bits saved of each byte of text: 8 less the bits per byte." if ratios else ""
    losses = "; losses in nats per token" if domains else ""
    return Table(f"The models at a glance{at}{losses}", columns, rows, note)


def layers(model: ModelAudit) -> Table:
    """Return what every layer is; neighbours that are alike are one row."""
    rows = []
    for found, alike in itertools.groupby(model.layers, _description):
        rows.append((units.span([layer.index for layer in alike]), *found))
    return Table(
        "What the layers are",
        ("layers", "kind", "pool", "experts to choose among", "experts in the pool", "top-k", "soft mass"),
        rows,
    )


def _description(layer: Layer) -> tuple[str, ...]:
    mass = None if layer.soft_mass is None else f"{layer.soft_mass:.2f}"
    figures = (layer.pool, layer.num_experts, layer.pool_experts, layer.top_k, mass)
    return layer.kind, *("–" if value is None else str(value) for value in figures)


def kinds(model: ModelAudit) -> str:
    """Say in words what a model's layers are."""
    found = [
        f"{len(layers)} {kind} {'layer' if len(layers) == 1 else 'layers'}"
        for kind in ("dense", "untied", "tied")
        if (layers := [layer for layer in model.layers if layer.kind == kind])
    ]
    return units.join(found)


def pareto(audit: Audit) -> Table:
    """Return every model's cost and quality, and whether another is better at no more cost."""
    return Table(
        "Cost against quality: on a front, no other model is better at the same cost or less",
        (
            "model",
            "measure",
            "value",
            "FLOPs per token",
            "memory to serve",
            "front of compute",
            "front of memory",
            "quality",
            "per GFLOP",
            "per GiB",
        ),
        [
            (
                units.short(point.model, 48),
                units.one_line(point.measure) + (", less is better" if point.is_lower_better else ""),
                f"{point.value:.3f}",
                units.flops(point.flops_per_token),
                units.size(point.memory_bytes),
                "yes" if point.is_on_compute_front else "no",
                "yes" if point.is_on_memory_front else "no",
                "–" if point.quality is None else f"{point.quality:.3f}",
                units.figure(point.quality_per_gflop),
                units.figure(point.quality_per_gib),
            )
            for point in audit.pareto
        ],
        "Quality: of a text the bits saved of each byte, 8 less the bits per byte; of a task its value. Per GFLOP of "
        "a token and per GiB to serve: between models about as good it tells which is cheaper, and little else.",
    )


def texts(audit: Audit) -> Table:
    """Return the texts that the models were read on."""
    return Table(
        "Texts",
        ("text", "data", "tokens", "blocks", "SHA-256 of the tokens"),
        [
            (
                units.one_line(each.name),
                units.one_line(each.data),
                f"{each.num_tokens:,}",
                f"{each.num_blocks:,} × {each.block_size:,}",
                each.sha256[:16] if each.sha256 else "–",
            )
            for each in audit.domains
        ],
    )


def conditions(audit: Audit) -> Table:
    """Return settings, versions and machine."""
    return Table(
        "Settings, versions, machine",
        ("what", "value"),
        [
            (units.one_line(f"{kind} {name}"), units.one_line(value))
            for kind, values in (("setting", audit.settings), ("version", audit.versions), ("machine", audit.machine))
            for name, value in values.items()
        ],
    )


def _ratio(audit: Audit, model: ModelAudit, name: str) -> str:
    """Return the bits saved of a byte for a cost, the least and the most of the texts; empty if none is known."""
    found = {
        value
        for point in audit.pareto
        if point.model == model.name and point.measure.startswith(("loss ", "bits per byte "))
        and (value := getattr(point, name)) is not None
    }  # fmt: skip
    return " to ".join(dict.fromkeys(units.figure(value) for value in (min(found), max(found)))) if found else ""


def _loss(model: ModelAudit, domain: str) -> str:
    return f"{model.quality.loss[domain].value:.3f}" if model.quality and domain in model.quality.loss else "–"


def _range(flops: list[float]) -> str:
    if not flops:
        return "–"
    low, high = units.flops(min(flops)), units.flops(max(flops))
    return low if low == high else f"{low} to {high}"

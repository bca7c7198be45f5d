"""The audit's tables, one function a kind of evidence; report.py puts them on a page and into the terminal."""

import itertools
from dataclasses import dataclass

from . import units
from .findings import smallest_gpu
from .schema import COMPONENTS, ActiveExperts, LayerMemory, LayerStrategy, Memory, Quality, Stability

NAMES = {
    "embedding": "embedding",
    "attention": "attention",
    "router": "routers",
    "experts": "experts",
    "shared_experts": "shared experts",
    "dense_mlp": "dense MLP",
    "norm": "norms",
    "head": "head",
    "other": "other",
}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
STRATEGIES = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2", "expert_parallel": "expert parallelism"}
LONG = 12  # rows: a longer table is folded


@dataclass(frozen=True)
class Table:
    """A table of text: the first cell of a row names it; a note says what the columns are."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def transposed(self) -> "Table":
        """Return the table with a column for each of its rows."""
        columns, *rows = zip(self.columns, *self.rows)
        return Table(self.caption, columns, rows, self.note)

    @property
    def is_long(self) -> bool:
        """Whether a page folds it."""
        return len(self.rows) > LONG


def active(found: ActiveExperts) -> list[Table]:
    """Return the experts that a token uses, over all layers and in each."""
    tables = [
        Table(
            "Experts that a token uses, summed over the layers, and what a forward pass computes for it",
            ("text", "mean", "median", "95 % at most", "99 % at most", "most", "FLOPs per token"),
            [
                (
                    units.one_line(name),
                    *_distribution(each),
                    units.flops(found.flops_per_token[name]) if name in found.flops_per_token else "–",
                )
                for name, each in found.per_token.items()
            ],
        )
    ]
    if found.domain_shift and found.is_adaptive:  # else it is 0
        tables.append(
            Table(
                "How far texts differ in the numbers of experts used: total variation, mean of the layers, 0 to 1",
                ("texts", "shift"),
                [(_pair(pair), f"{shift:.3f}") for pair, shift in found.domain_shift.items()],
            )
        )
    domains = list(found.per_token)
    is_soft = any(row.soft_mass is not None for row in found.layers)
    if not found.is_adaptive and len({each.mean for row in found.layers for each in row.by_domain.values()}) == 1:
        return tables  # the sum over layers says all
    tables.append(
        Table(
            "Experts that a token uses in each layer",
            ("layer", *(("soft mass",) if is_soft else ()), *(units.short(name) for name in domains)),
            [
                (
                    str(row.layer),
                    *((f"{row.soft_mass:.2f}" if row.soft_mass is not None else "–",) if is_soft else ()),
                    *(
                        f"{each.mean:.2f} ({each.p95:g}; {each.max})"
                        if (each := row.by_domain.get(name)) is not None
                        else "–"
                        for name in domains
                    ),
                )
                for row in found.layers
            ],
            "By text: the mean, and in brackets what 95 % use at most, and the most.",
        )
    )
    return tables


def memory(found: Memory) -> list[Table]:
    """Return parameters by component and layer, and what serving and training take."""
    total = found.parameters["total"]
    shown = [name for name in (*COMPONENTS, "total") if name in found.parameters and found.parameters[name].read]
    tables = [
        Table(
            "Parameters by component",
            ("component", "stored", "of all", "shared", "used by a token"),
            [
                (
                    NAMES.get(name, name),
                    units.count(each.unique),
                    units.percent(each.unique / max(total.unique, 1)),
                    units.count(each.read - each.unique) if each.read > each.unique else "–",
                    units.count(each.active),
                )
                for name in shown
                for each in [found.parameters[name]]
            ],
            "A pool is stored once; shared are those that there would be besides if every layer that reads a pool "
            "counted it. A token uses all but the experts that its routers do not choose.",
        ),
        Table(
            "Memory to serve",
            ("dtype", "tokens × batch", "weights", "cache", "working", "in all", "fits one"),
            [
                (
                    each.dtype,
                    f"{each.context:,} × {each.batch_size}",
                    units.size(each.weight_bytes),
                    units.size(each.cache_bytes),
                    units.size(each.working_bytes),
                    units.size(each.total_bytes),
                    _fits(each.fits, found.gpus),
                )
                for each in found.inference
            ],
            f"Fits one: the smallest that holds it of {_sizes(found.gpus)}." if found.gpus else "",
        ),
        Table(
            "Memory to train, on each GPU, and what each sends in a step",
            (
                "optimizer",
                "how",
                "GPUs",
                "precision",
                "weights",
                "gradients",
                "optimizer states",
                "activations",
                "in all",
                "sent",
                "fits one",
            ),
            [
                (
                    OPTIMIZERS[each.optimizer],
                    STRATEGIES[each.strategy],
                    str(each.num_gpus),
                    each.precision + (", checkpointing" if each.gradient_checkpointing else ""),
                    *map(
                        units.size,
                        (
                            each.weight_bytes,
                            each.gradient_bytes,
                            each.optimizer_bytes,
                            each.activation_bytes,
                            each.total_bytes,
                            each.communicated_bytes,
                        ),
                    ),
                    _fits(each.fits, found.gpus),
                )
                for each in found.training
            ],
        ),
    ]
    used = [name for name in COMPONENTS if any(row.parameters.get(name) for row in found.layers)]
    tables.append(
        Table(
            "Parameters stored by each layer",
            ("layers", *(NAMES[name] for name in used)),
            [
                (units.span([row.layer for row in alike]), *counts)
                for counts, alike in itertools.groupby(found.layers, lambda row: _counts(row, used))
            ],
            "Neighbours that are alike are one row; a pool counts in the first layer of its group.",
        )
    )
    return [table for table in tables if table.rows]


def stability(found: Stability) -> list[Table]:
    """Return how evenly and steadily each layer's router chooses, and how layers of a pool agree."""
    has_domains = any(row.specialisation is not None for row in found.layers)
    has_tokens = any(row.token_specialisation is not None for row in found.layers)
    has_balance = any(row.gpu_balance is not None for row in found.layers)
    has_source = any(row.source_agreement is not None for row in found.layers)
    pairs = list(dict.fromkeys(pair for row in found.layers for pair in row.drift))
    tables = [
        Table(
            "How evenly each layer's router chooses",
            (
                "layer",
                "experts",
                "spread",
                "busiest",
                "entropy",
                "of a token",
                "never chosen",
                *(("specialisation",) if has_domains else ()),
                *(("by token",) if has_tokens else ()),
                *(("GPU balance",) if has_balance else ()),
                *(("as the source",) if has_source else ()),
                *(f"drift, {_pair(pair)}" for pair in pairs),
            ),
            [
                (
                    f"{row.layer}{' (collapsed)' if row.is_collapsed else ''}",
                    str(row.num_experts),
                    units.interval(row.load_cv),
                    units.interval(row.load_max_over_mean),
                    units.interval(row.choice_entropy, 3),
                    units.interval(row.token_entropy, 3),
                    str(row.num_dead),
                    *((units.interval(row.specialisation, 3),) if has_domains else ()),
                    *((_figure(row.token_specialisation),) if has_tokens else ()),
                    *((units.interval(row.gpu_balance),) if has_balance else ()),
                    *((units.interval(row.source_agreement),) if has_source else ()),
                    *(units.interval(row.drift.get(pair), 3) for pair in pairs),
                )
                for row in found.layers
            ],
            "With 95 % intervals. Spread: standard deviation of experts' loads over their mean, 0 if even. Busiest: "
            "the largest load over the mean, 1 if even. Entropy: of all choices and of one token's distribution, 1 if "
            "even."
            + (" Specialisation: nats that an expert's number tells about the text." if has_domains else "")
            + (" By token: nats that it tells about which token it is, of frequent ones." if has_tokens else "")
            + (" GPU balance: mean over largest load of the GPUs, 1 if even." if has_balance else "")
            + (" As the source: the share of the source's choices that it makes too." if has_source else "")
            + (" Drift: Jensen-Shannon divergence of two texts' loads, nats." if pairs else ""),
        ),
        Table(
            "How far layers of one pool choose the same experts for a token",
            ("layers", "pool", "same choices", "by chance"),
            [
                (units.span(each.layers), str(each.pool), units.interval(each.agreement), f"{each.by_chance:.2f}")
                for each in found.agreement
            ],
        ),
        Table(
            "Experts that tokens use together most",
            ("layer", "most", "next", "third"),
            [
                (str(row.layer), *[*(f"{a} and {b}: {units.percent(s)}" for a, b, s in row.co_active), "–", "–"][:3])
                for row in found.layers
                if row.co_active
            ],
            "Of the tokens of the first expert, those that use the second one too.",
        ),
        Table(
            "What a token's first choice tells about its first choice in the next layer",
            ("layers", "nats"),
            [(units.span(each.layers), f"{each.mutual_information:.3f}") for each in found.flows],
        ),
    ]
    return [table for table in tables if table.rows]


def strategy(found: LayerStrategy) -> list[Table]:
    """Return the suggested plans, and what each layer loses with its neighbour's parts."""
    by_layer: dict[tuple[int, int], dict[str, str]] = {}
    for each in found.replacements:
        by_layer.setdefault((each.layer, each.neighbour), {})[each.part] = units.interval(each.loss_increase, 3)
    parts = [part for part in ("experts", "router", "attention") if any(part in row for row in by_layer.values())]
    tables = [
        Table(
            "Suggested plans, and the loss that each is predicted to add, in nats per token",
            ("experts' bytes that stay", "predicted", "measured", "why"),
            [
                (
                    units.percent(plan.expert_share),
                    f"{plan.predicted_loss_increase:+.3f}",
                    "–" if plan.measured_loss_increase is None else f"{plan.measured_loss_increase:+.3f}",
                    units.one_line(plan.reason),
                )
                for plan in found.plans
            ],
        ),
        Table(
            "Loss added when a layer uses its neighbour's part, in nats per token",
            ("layer", "neighbour", *parts),
            [
                (str(layer), str(neighbour), *(row.get(part, "–") for part in parts))
                for (layer, neighbour), row in sorted(by_layer.items())
            ],
        ),
        Table(
            "How alike neighbours are",
            ("layers", "inputs", "outputs"),
            [
                (units.span(each.layers), f"{each.representation_cka:.2f}", _figure(each.output_similarity))
                for each in found.similarity
                if abs(each.layers[0] - each.layers[1]) == 1
            ],
            "Inputs: linear CKA of what enters their experts. Outputs: mean cosine of matched experts' outputs.",
        ),
    ]
    return [table for table in tables if table.rows]


def quality(found: Quality) -> list[Table]:
    """Return losses, tasks and speed."""
    speeds = [
        ("reading (prefill)", None if (n := found.prefill_tokens_per_second) is None else units.rate(n)),
        ("writing (decode)", None if (n := found.decode_tokens_per_second) is None else units.rate(n)),
        ("peak memory", None if (n := found.peak_memory_bytes) is None else units.size(n)),
    ]
    tables = [
        Table(
            "Loss, in nats per token with 95 % intervals, and perplexity"
            + (", and bits per byte of text, which compare vocabularies" if found.bits_per_byte else ""),
            ("text", "loss", "perplexity", *(("bits per byte",) if found.bits_per_byte else ())),
            [
                (
                    units.one_line(name),
                    units.interval(each, 3),
                    f"{found.perplexity[name]:.2f}" if name in found.perplexity else "–",
                    *((units.interval(found.bits_per_byte.get(name), 3),) if found.bits_per_byte else ()),
                )
                for name, each in found.loss.items()
            ],
        ),
        Table(
            "Tasks of lm-evaluation-harness, with standard errors",
            ("task", "metric", "value", "shots", "samples"),
            [
                (
                    units.one_line(task.name),
                    units.one_line(task.metric) + ("" if task.is_higher_better else ", less is better"),
                    f"{task.value:.3f}" + (f" ± {task.standard_error:.3f}" if task.standard_error is not None else ""),
                    "–" if task.num_shots is None else str(task.num_shots),
                    f"{task.num_samples:,}",
                )
                for task in found.tasks
            ],
        ),
        Table(
            f"Measured here, on {units.one_line(found.device)}",
            ("what", "measured"),
            [(what, value) for what, value in speeds if value is not None],
        ),
    ]
    return [table for table in tables if table.rows]


def _counts(row: LayerMemory, used: list[str]) -> tuple[str, ...]:
    return tuple(units.count(row.parameters[name]) if row.parameters.get(name) else "–" for name in used)


def _distribution(each) -> tuple[str, ...]:
    return f"{each.mean:.1f}", f"{each.p50:g}", f"{each.p95:g}", f"{each.p99:g}", str(each.max)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _fits(fits: dict[str, bool], sizes: dict[str, int]) -> str:
    return "–" if not fits else smallest_gpu(fits, sizes) or "none"


def _pair(pair: str) -> str:
    return " and ".join(units.short(name) for name in pair.split("|"))


def _sizes(gpus: dict[str, int]) -> str:
    """Name GPUs with their sizes, the smallest first."""
    return units.join([f"{name} ({units.size(size)})" for name, size in sorted(gpus.items(), key=lambda g: g[1])])

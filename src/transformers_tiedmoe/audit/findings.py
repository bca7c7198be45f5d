"""What an audit found, in plain sentences: each is computed from the figures, and none is written without them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import units
from .schema import Audit, Domain, Inference, LayerStability, Memory, ModelAudit, SuggestedPlan

UNEVEN = 0.35  # of the experts: fewer of them with half of the choices are worth a sentence; an even router has 0.5
SPECIALISED = 0.05  # nats of mutual information between expert and domain
SHIFTED = 0.02  # total variation between two domains' numbers of active experts
NEGLIGIBLE = 0.02  # nats per token that a replaced part costs: as good as nothing


class Finding(NamedTuple):
    """A sentence, the kind of evidence that it rests on, and whether a reader wants it first."""

    text: str
    evidence: str
    is_main: bool = True


def total_loads(layer: LayerStability, domains: list[Domain]) -> np.ndarray:
    """Return each expert's share of a layer's choices over all domains, weighted by their tokens: float64 `[E]`."""
    tokens = {domain.name: domain.num_tokens for domain in domains}
    names = [name for name in layer.loads if np.isfinite(layer.loads[name]).all()]
    if not names:
        return np.zeros(layer.num_experts)
    return np.average([layer.loads[name] for name in names], axis=0, weights=[tokens.get(name, 1) for name in names])


def num_for_half(shares: np.ndarray) -> int:
    """Return how many experts, the busiest first, take half of the choices or more."""
    return int(np.searchsorted(np.sort(shares)[::-1].cumsum(), 0.5 * shares.sum() * (1 - 1e-12))) + 1


def inference_shown(memory: Memory) -> Inference | None:
    """Return the inference that sentences and comparisons speak of: bfloat16 if it was asked for, else the first."""
    return next((each for each in memory.inference if each.dtype == "bfloat16"), next(iter(memory.inference), None))


def smallest_gpu(fits: dict[str, bool], sizes: dict[str, int]) -> str | None:
    """Return the smallest GPU that holds it, None if none does."""
    return min((gpu for gpu, does in fits.items() if does), key=lambda gpu: (sizes[gpu], gpu), default=None)


def untied_experts(model: ModelAudit) -> float | None:
    """Return the parameters of the experts if every layer had as many of its own as its router chooses among.

    A layer reads its whole pool, which may hold more experts than that (a union) or as many. None if nothing is tied.
    """
    layers = [layer for layer in model.layers if layer.kind != "dense" and layer.num_experts]
    if (
        model.memory is None
        or "experts" not in model.memory.parameters
        or not any(each.pool_experts for each in layers)
    ):
        return None
    read = sum(layer.pool_experts or layer.num_experts or 0 for layer in layers)
    return model.memory.parameters["experts"].read * sum(layer.num_experts or 0 for layer in layers) / read


def of_model(model: ModelAudit, domains: list[Domain]) -> list[Finding]:
    """Say what was found of one model, the most important first."""
    return [*_memory(model), *_strategy(model), *_stability(model, domains), *_active(model), *_quality(model)]


def of_comparison(audit: Audit) -> list[Finding]:
    """Say how the models compare with the first one, and which is on no Pareto front."""
    return [Finding(text, "comparison") for text in (*_against_first(audit), *_fronts(audit))]


def _memory(model: ModelAudit) -> Iterator[Finding]:
    memory = model.memory
    if memory is None:
        return
    total, experts = memory.parameters["total"], memory.parameters.get("experts")
    text = f"It has {units.count(total.unique)} parameters"
    if total.active < total.unique:
        text += f", of which a token uses {units.count(total.active)} ({units.percent(total.active / total.unique)})"
    if experts is not None and experts.unique:
        text += f"; {units.percent(experts.unique / total.unique)} are experts"
    yield Finding(f"{text}.", "memory")
    shown = inference_shown(memory)
    if shown is None:
        return
    untied = untied_experts(model)
    if experts is not None and untied is not None:
        saved = (untied - experts.unique) * shown.weight_bytes / total.unique
        if saved > 0:
            yield Finding(
                f"Sharing pools saves {units.size(saved)} in {shown.dtype}: with experts of their own in every layer "
                f"it would have {units.count(total.unique + untied - experts.unique)} parameters.",
                "memory",
            )
        else:
            yield Finding("Its pools hold as many experts as its layers would: tying saves nothing yet.", "memory")
    text = f"It needs {units.size(shown.total_bytes)} in {shown.dtype} at {shown.context:,} tokens"
    if shown.batch_size > 1:
        text += f" and a batch of {shown.batch_size}"
    gpu = smallest_gpu(shown.fits, memory.gpus)
    if gpu is not None:
        text += f": fits one {gpu} ({units.size(memory.gpus[gpu])})"
    elif shown.fits:
        largest = max(memory.gpus, key=lambda name: memory.gpus[name])
        text += f": more than one {largest} has ({units.size(memory.gpus[largest])})"
    yield Finding(f"{text}.", "memory")
    if memory.checkpoint_bytes is not None:
        dtypes = [f"{units.size(size)} in {units.one_line(name)}" for name, size in memory.stored_dtypes.items()]
        yield Finding(f"Its weight files hold {units.size(memory.checkpoint_bytes)}: {units.join(dtypes)}.", "memory",
                      is_main=False)  # fmt: skip


def _strategy(model: ModelAudit) -> Iterator[Finding]:
    if model.strategy is None:
        return
    for i, plan in enumerate(model.strategy.plans):
        yield Finding(_plan(plan, model.memory), "strategy", is_main=i == 0)
    costs = [each for each in model.strategy.replacements if each.part == "experts"]
    if len(costs) > 1:
        worst = max(costs, key=lambda each: each.loss_increase.value)
        least = min(costs, key=lambda each: each.loss_increase.value)
        back = next((each for each in costs if (each.layer, each.neighbour) == (worst.neighbour, worst.layer)), None)
        text = (
            f"Layer {worst.layer} needs experts of its own most: with those of layer {worst.neighbour} the loss "
            f"changes by {units.added(worst.loss_increase.value)} per token"
        )
        if back is not None and back.loss_increase.value < worst.loss_increase.value / 2:
            text += (
                f", though layer {back.layer} would do with those of layer {back.neighbour} "
                f"({units.added(back.loss_increase.value)})"
            )
        yield Finding(
            f"{text}; layer {least.layer} needs its own least ({units.added(least.loss_increase.value)}).", "strategy"
        )
    routers = [each for each in model.strategy.replacements if each.part == "router"]
    free = [each.layer for each in routers if each.loss_increase.value < NEGLIGIBLE]
    if free:
        yield Finding(f"{_layers(free)} would lose next to nothing with a neighbour's router (less than "
                      f"{NEGLIGIBLE} nats per token).", "strategy", is_main=False)  # fmt: skip


def _plan(plan: SuggestedPlan, memory: Memory | None) -> str:
    groups = plan.recipe.get("groups")
    what = f"Tying layers {units.join([units.span(group) for group in groups])}" if groups else "The suggested plan"
    shown = inference_shown(memory) if memory is not None else None
    saved = f"{units.percent(1 - plan.expert_share)} of the experts' bytes"
    if memory is not None and shown is not None and "experts" in memory.parameters:
        per_parameter = shown.weight_bytes / memory.parameters["total"].unique
        num_bytes = (1 - plan.expert_share) * memory.parameters["experts"].unique * per_parameter
        saved = f"{units.size(num_bytes)} in {shown.dtype} ({saved})"
    text = f"{what} would save {saved} at a predicted {units.added(plan.predicted_loss_increase)} per token"
    if plan.measured_loss_increase is not None:
        text += f", measured {units.added(plan.measured_loss_increase)}"
    return f"{text}."


def _stability(model: ModelAudit, domains: list[Domain]) -> Iterator[Finding]:
    if model.stability is None or not model.stability.layers:
        return
    layers = model.stability.layers
    halves = {each.layer: num_for_half(total_loads(each, domains)) for each in layers}
    narrow = min(layers, key=lambda each: halves[each.layer] / each.num_experts)
    if halves[narrow.layer] / narrow.num_experts < UNEVEN:
        yield Finding(
            f"Layer {narrow.layer} sends half of its choices to {halves[narrow.layer]} of {narrow.num_experts} "
            f"experts; an even router would use {(narrow.num_experts + 1) // 2}.",
            "stability",
        )
    else:
        busiest = max(layers, key=lambda each: each.load_max_over_mean.value)
        yield Finding(
            f"The experts' load is even: the busiest, in layer {busiest.layer}, takes "
            f"{busiest.load_max_over_mean.value:.1f} times its share.",
            "stability",
        )
    if collapsed := [each.layer for each in layers if each.is_collapsed]:
        who = "routers of {} have" if len(collapsed) > 1 else "router of {} has"
        yield Finding(f"The {who.format(_layers(collapsed, start='layer'))} collapsed: as few experts as one token "
                      "uses take half or more of what is not theirs by an even share.", "stability")  # fmt: skip
    num_dead, num_experts = sum(each.num_dead for each in layers), sum(each.num_experts for each in layers)
    if num_dead:
        worst = max(layers, key=lambda each: each.num_dead)
        all_of_them = "all of them" if worst.num_dead == num_dead else f"{worst.num_dead} of them"
        yield Finding(f"No token chose {num_dead:,} of {num_experts:,} experts, {all_of_them} in layer {worst.layer}.",
                      "stability")  # fmt: skip
    else:
        yield Finding(
            f"Every one of the {num_experts:,} experts was chosen by some token.", "stability", is_main=False
        )
    known = [each for each in layers if each.specialisation is not None]
    if known:
        most = max(known, key=lambda each: each.specialisation.value if each.specialisation else 0.0)
        value = most.specialisation.value if most.specialisation else 0.0
        if value >= SPECIALISED:
            yield Finding(f"Experts specialise by domain most in layer {most.layer}: an expert's number tells "
                          f"{value:.2f} nats about the text that the token comes from.", "stability")  # fmt: skip
        else:
            yield Finding(f"Experts hardly specialise by domain: at most {value:.3f} nats, in layer {most.layer}.",
                          "stability", is_main=False)  # fmt: skip
    if model.stability.agreement:
        agreement = max(model.stability.agreement, key=lambda each: each.agreement.value)
        if all(each.by_chance == 0 for each in model.stability.agreement):
            yield Finding("No two layers of a pool use the same experts of it.", "stability")
            return
        yield Finding(
            f"Layers {agreement.layers[0]} and {agreement.layers[1]}, of pool {agreement.pool}, agree most: "
            f"{units.percent(agreement.agreement.value)} of their choices are the same expert "
            f"({units.percent(agreement.by_chance)} by chance).",
            "stability",
        )


def _active(model: ModelAudit) -> Iterator[Finding]:
    active = model.active
    if active is None or not active.layers:
        return
    means = {
        each.layer: np.average(np.arange(len(each.histogram)), weights=each.histogram)
        for each in active.layers
        if sum(each.histogram)
    }
    if not means:
        return
    if not active.is_adaptive:
        if len(set(means.values())) == 1:
            each_layer = f"{next(iter(means.values())):g} experts in each of {len(means)} layers"
        else:
            each_layer = f"{min(means.values()):g} to {max(means.values()):g} experts a layer"
        yield Finding(f"Every token uses {each_layer}.", "active", is_main=False)
        return
    least, most = min(means, key=lambda layer: means[layer]), max(means, key=lambda layer: means[layer])
    yield Finding(
        f"A token uses {np.mean(list(means.values())):.1f} experts a layer on average, from {means[least]:.1f} in "
        f"layer {least} to {means[most]:.1f} in layer {most}.",
        "active",
    )
    if active.domain_shift:
        pair = max(active.domain_shift, key=lambda key: active.domain_shift[key])
        if active.domain_shift[pair] >= SHIFTED and all(name in active.per_token for name in pair.split("|")):
            a, b = pair.split("|")
            yield Finding(
                f"The text matters: over all layers a token of {a} uses {active.per_token[a].mean:.1f} experts, one "
                f"of {b} {active.per_token[b].mean:.1f}.",
                "active",
            )


def _quality(model: ModelAudit) -> Iterator[Finding]:
    quality = model.quality
    if quality is None:
        return
    if quality.perplexity:
        told = units.join([f"{value:.2f} on {units.one_line(name)}" for name, value in quality.perplexity.items()])
        yield Finding(f"Its perplexity per token is {told}.", "quality")
    if quality.tasks:
        told = units.join([f"{task.value:.3g} {task.metric} on {task.name}" for task in quality.tasks[:4]])
        yield Finding(f"It reaches {units.one_line(told)}.", "quality", is_main=False)
    speeds = [
        f"{verb} {units.rate(speed)}"
        for verb, speed in (
            ("reads", quality.prefill_tokens_per_second),
            ("writes", quality.decode_tokens_per_second),
        )
        if speed is not None
    ]
    if speeds:
        text = f"On {units.one_line(quality.device)} it {units.join(speeds)}"
        if quality.peak_memory_bytes is not None:
            text += f", at a peak of {units.size(quality.peak_memory_bytes)}"
        yield Finding(f"{text}.", "quality", is_main=False)


def _against_first(audit: Audit) -> Iterator[str]:
    first = audit.models[0] if audit.models else None
    if first is None or first.memory is None:
        return
    reference = inference_shown(first.memory)
    has_one_vocabulary = not any(point.measure.startswith("bits per byte ") for point in audit.pareto)
    for model in audit.models[1:]:
        shown = inference_shown(model.memory) if model.memory is not None else None
        if reference is None or shown is None or shown.dtype != reference.dtype:
            continue
        text = (
            f"{units.short(model.name)} needs {units.percent(shown.total_bytes / reference.total_bytes)} of the "
            f"memory of {units.short(first.name)} ({units.size(shown.total_bytes)}, not "
            f"{units.size(reference.total_bytes)}, in {shown.dtype})"
        )
        if told := _loss_differences(first, model, has_one_vocabulary):
            text += f"; {told}"
        yield f"{text}."


def _loss_differences(first: ModelAudit, model: ModelAudit, has_one_vocabulary: bool) -> str:
    """Tell a model's losses against the first one's: per token, or by the text's bytes between vocabularies."""
    if first.quality is None or model.quality is None:
        return ""
    if has_one_vocabulary:
        what, unit, ours, theirs = "its loss per token", "nats", model.quality.loss, first.quality.loss
    else:
        what, unit = "its loss on the text", "bits per byte"
        ours, theirs = model.quality.bits_per_byte, first.quality.bits_per_byte
    told = [
        f"{ours[name].value - theirs[name].value:+.3f} {unit} on {units.one_line(name)}"
        for name in ours
        if name in theirs
    ]
    return f"{what} differs by {units.join(told)}" if told else ""


def _fronts(audit: Audit) -> Iterator[str]:
    if len(audit.models) < 2:
        return
    for front, against in (("is_on_memory_front", "memory"), ("is_on_compute_front", "compute")):
        beaten = [
            units.short(model.name)
            for model in audit.models
            if (points := [point for point in audit.pareto if point.model == model.name])
            and not any(getattr(point, front) for point in points)
        ]
        if beaten:
            whose, verb = ("its", "is") if len(beaten) == 1 else ("their", "are")
            yield (
                f"For {whose} {against}, {units.join(beaten)} {verb} beaten on every measure: another model is better "
                "and takes no more."
            )


def _layers(layers: list[int], start: str = "Layer") -> str:
    return f"{start}{'s' if len(layers) > 1 else ''} {units.span(layers)}"

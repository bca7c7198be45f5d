"""Audits of models that do not exist: random but plausible figures, seeded, for what reads an `Audit`."""

import itertools

import numpy as np

from transformers_tiedmoe.audit import schema

DOMAINS = {"prose": 65536, "code": 32768}
GIB = 2**30
GPUS = {"RTX 4090": 24 * GIB, "L40S": 48 * GIB, "A100 80GB": 80 * GIB, "H100": 80 * GIB, "H200": 141 * GIB}
HOSTILE = [
    "<script>alert(1)</script>",
    "a-\"quoted\"-'model'|with*every_`mark`[x](y)&amp; $\\frac{1}$ {{ 7 * 7 }} " + "very-long-name-" * 20,
    "modèle-模型-🚀\n# heading [bold red]x[/]",
]


def interval(rng, value, spread=0.05):
    half = abs(value) * spread * rng.uniform(0.5, 1.5)
    return schema.Interval(value=value, low=value - half, high=value + half)


def distribution(rng, histogram):
    counts = np.asarray(histogram)
    below = counts.cumsum() / counts.sum()
    p50, p95, p99 = (float(np.searchsorted(below, q)) for q in (0.5, 0.95, 0.99))
    mean = float((counts * np.arange(len(counts))).sum() / counts.sum())
    return schema.Distribution(mean=mean, p50=p50, p95=p95, p99=p99, max=int(np.flatnonzero(counts)[-1]))


def model(
    name="olmoe-small", num_layers=16, num_experts=64, top_k=8, group_size=1, is_soft=False, is_dense=False, seed=0,
    domains=tuple(DOMAINS),
):  # fmt: skip
    """One model; `group_size` layers read one pool, but for the first two and the last two."""
    rng = np.random.default_rng(seed)
    inner = list(range(2, num_layers - 2))
    groups = [inner[i : i + group_size] for i in range(0, len(inner), group_size)] if group_size > 1 else []
    groups = [group for group in groups if len(group) > 1]
    pool_of = {layer: p for p, group in enumerate(groups) for layer in group}
    layers = [
        schema.Layer(
            index=i,
            kind="dense" if is_dense else "tied" if i in pool_of else "untied",
            pool=pool_of.get(i),
            num_experts=None if is_dense else num_experts,
            pool_experts=num_experts if i in pool_of else None,
            top_k=None if is_soft or is_dense else top_k,
            soft_mass=float(top_k * (0.6 + 0.8 * i / num_layers)) if is_soft else None,
        )
        for i in range(num_layers)
    ]
    memory = _memory(num_layers, 1 if is_dense else num_experts, top_k, groups)
    notes = ["A dense model: it has no experts, so only memory and quality are told."] if is_dense else []
    return schema.ModelAudit(
        name=name,
        family="llama" if is_dense else "olmoe",
        architecture="TiedMoeForCausalLM" if groups else "OlmoeForCausalLM",
        routing="softmoe" if is_soft else "top_k",
        tying=f"{len(groups)} pools of {group_size} layers" if groups else "untied",
        layers=layers,
        active=None if is_dense else _active(rng, layers, top_k, is_soft, domains),
        memory=memory,
        stability=None if is_dense else _stability(rng, layers, groups, domains),
        strategy=None if is_dense else _strategy(rng, layers, num_experts),
        quality=_quality(rng, domains, 3.2 - 0.03 * np.log(memory.parameters["total"].unique)),
        notes=notes,
    )


def audit(models=None, domains=tuple(DOMAINS)):
    """An audit of the models given, one untied by default, on two texts."""
    models = models or [model()]
    points = []
    for measure in sorted({f"loss {domain}" for each in models for domain in each.quality.loss}):
        rows = [
            (each.name, each.quality.loss[measure[5:]].value, each.memory.parameters["total"].active * 2.0, each)
            for each in models
        ]
        for name, value, flops, each in rows:
            size = each.memory.inference[0].total_bytes
            points.append(
                schema.ParetoPoint(
                    model=name,
                    measure=measure,
                    value=value,
                    flops_per_token=flops,
                    memory_bytes=size,
                    quality=8 - each.quality.bits_per_byte[measure[5:]].value,
                    quality_per_gib=5 / (size / GIB),
                    quality_per_gflop=5 / (flops / 1e9),
                    is_on_compute_front=not any(v < value and f <= flops for _, v, f, _ in rows),
                    is_on_memory_front=not any(
                        v < value and other.memory.inference[0].total_bytes <= size for _, v, _, other in rows
                    ),
                )
            )
    return schema.Audit(
        date="2026-11-28",
        command="tiedmoe audit " + " ".join(each.name for each in models),
        settings={"context": 4096, "batch_size": 1, "seed": 0},
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        machine={"cpu": "2 cores", "memory_gib": 24},
        domains=[
            schema.Domain(name=n, data=f"{n}.txt", num_tokens=DOMAINS[n], num_blocks=DOMAINS[n] // 512, block_size=512)
            for n in domains
        ],
        models=models,
        pareto=points,
    )


def _active(rng, layers, top_k, is_soft, domains):
    rows, total = [], dict.fromkeys(domains, 0.0)
    for layer in layers:
        by_domain, whole = {}, np.zeros(2 * top_k + 1, int)
        for d, domain in enumerate(domains):
            tokens = DOMAINS[domain]
            if is_soft:
                mean = min(layer.soft_mass * (1.25 + 0.1 * d), 2 * top_k - 1)
                drawn = np.clip(rng.poisson(mean, 4000), 1, 2 * top_k)
                histogram = (np.bincount(drawn, minlength=2 * top_k + 1) * tokens) // 4000
            else:
                histogram = np.bincount([top_k], minlength=2 * top_k + 1) * tokens
            by_domain[domain] = distribution(rng, histogram)
            total[domain] += by_domain[domain].mean
            whole += histogram
        positions = [
            float(np.average(np.arange(len(whole)), weights=whole) * (1 + 0.25 * is_soft * np.exp(-b / 2)))
            for b in range(8)
        ]
        rows.append(
            schema.LayerActive(
                layer=layer.index,
                by_domain=by_domain,
                soft_mass=layer.soft_mass,
                by_position=positions,
                histogram=whole.tolist(),
            )
        )
    per_token = {
        d: schema.Distribution(
            mean=t, p50=round(t), p95=round(t * 1.2), p99=round(t * 1.3), max=round(t * (1.5 if is_soft else 1))
        )
        for d, t in total.items()
    }
    return schema.ActiveExperts(
        is_adaptive=is_soft,
        per_token=per_token,
        layers=rows,
        position_bins=[64 * b for b in range(8)],
        flops_per_token={d: 2.4e9 * t / (top_k * len(layers)) for d, t in total.items()},
        domain_shift={"prose|code": 0.08 if is_soft else 0.0} if len(domains) > 1 else {},
    )


def _memory(num_layers, num_experts, top_k, groups):
    hidden, inner = 2048, 1024
    expert, attention = 3 * hidden * inner, 4 * hidden * hidden
    repeated = sum(len(group) - 1 for group in groups)
    table = {
        "embedding": (50304 * hidden,) * 3,
        "attention": (attention * num_layers,) * 3,
        "router": (hidden * num_experts * num_layers,) * 3,
        "experts": (
            expert * num_experts * (num_layers - repeated),
            expert * num_experts * num_layers,
            expert * min(top_k, num_experts) * num_layers,
        ),
        "norm": (2 * hidden * num_layers,) * 3,
        "head": (50304 * hidden,) * 3,
    }
    table["total"] = tuple(sum(each[i] for each in table.values()) for i in range(3))
    parameters = {k: schema.Parameters(unique=u, read=r, active=a) for k, (u, r, a) in table.items()}
    not_first = {layer for group in groups for layer in group[1:]}
    per_layer = [
        schema.LayerMemory(
            layer=i,
            parameters={
                "attention": attention,
                "router": hidden * num_experts,
                "experts": 0 if i in not_first else expert * num_experts,
                "norm": 2 * hidden,
            },
        )
        for i in range(num_layers)
    ]
    unique = table["total"][0]
    inference = []
    for dtype, width in (("bfloat16", 2), ("int8", 1), ("int4", 0.5)):
        weights, cache = int(unique * width), 2 * 2 * hidden * num_layers * 4096
        inference.append(
            schema.Inference(
                dtype=dtype,
                context=4096,
                batch_size=1,
                weight_bytes=weights,
                cache_bytes=cache,
                working_bytes=GIB // 4,
                total_bytes=weights + cache + GIB // 4,
                fits={gpu: weights + cache + GIB // 4 <= size for gpu, size in GPUS.items()},
            )
        )
    training = []
    for optimizer, states in (("adamw", 8), ("muon", 4)):
        for strategy, gpus in (("one", 1), ("fsdp2", 8)):
            parts = [unique * each // gpus for each in (4, 4, states)]
            activations = 4 * GIB
            training.append(
                schema.Training(
                    optimizer=optimizer,
                    strategy=strategy,
                    num_gpus=gpus,
                    precision="mixed",
                    gradient_checkpointing=False,
                    weight_bytes=parts[0],
                    gradient_bytes=parts[1],
                    optimizer_bytes=parts[2],
                    activation_bytes=activations,
                    total_bytes=sum(parts) + activations,
                    communicated_bytes=0 if gpus == 1 else 3 * unique * 2,
                    fits={gpu: sum(parts) + activations <= size for gpu, size in GPUS.items()},
                )
            )
    return schema.Memory(
        parameters=parameters,
        layers=per_layer,
        checkpoint_bytes=2 * unique,
        stored_dtypes={"bfloat16": 2 * unique},
        inference=inference,
        training=training,
        gpus=GPUS,
    )


def _stability(rng, layers, groups, domains):
    rows, shares = [], {}
    for layer in layers:
        experts, top_k = layer.num_experts, layer.top_k or 8
        base = rng.dirichlet(np.full(experts, 0.6 if layer.index == len(layers) // 2 else 6.0))
        if layer.index == 1:
            base[rng.permutation(experts)[: max(1, experts // 16)]] = 0
        loads = {domain: (each := base * rng.gamma(8, 1, experts)) / each.sum() for domain in domains}
        mean = sum(loads.values()) / len(loads)
        shares[layer.index] = mean
        entropy = float(-(mean[mean > 0] * np.log(mean[mean > 0])).sum() / np.log(experts))
        rows.append(
            schema.LayerStability(
                layer=layer.index,
                num_experts=experts,
                load_cv=interval(rng, float(mean.std() / mean.mean())),
                load_max_over_mean=interval(rng, float(mean.max() / mean.mean())),
                choice_entropy=interval(rng, entropy, 0.01),
                token_entropy=interval(rng, 0.7 * entropy, 0.01),
                num_dead=int((mean == 0).sum()),
                gpu_balance=interval(rng, 0.8),
                token_specialisation=0.4,
                co_active=[(3, 5, 0.31), (1, 2, 0.2)],
                is_collapsed=bool(np.sort(mean)[-top_k:].sum() >= 0.5) and top_k < experts / 2,
                specialisation=interval(rng, float(rng.uniform(0.01, 0.15))) if len(domains) > 1 else None,
                drift={"prose|code": interval(rng, float(rng.uniform(0.005, 0.08)))} if len(domains) > 1 else {},
                loads={domain: each.tolist() for domain, each in loads.items()},
            )
        )
    tokens = sum(DOMAINS[domain] for domain in domains)
    flows = []
    for first, second in itertools.pairwise(layers):
        is_group = first.pool is not None and first.pool == second.pool
        joint = np.outer(shares[first.index], shares[second.index])
        joint *= rng.gamma(0.7, 1, joint.shape)
        if is_group:
            joint += 2.5 * np.diag(np.diag(joint)) + np.diag(shares[first.index]) * 0.15
        joint /= joint.sum()
        counts = rng.multinomial(tokens, joint.ravel()).reshape(joint.shape)
        order = np.argsort(-counts, axis=None)[:200]
        pairs = [(int(i // counts.shape[1]), int(i % counts.shape[1])) for i in order]
        expected = joint.sum(1, keepdims=True) * joint.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            information = np.nansum(joint * np.log(joint / expected))
        flows.append(
            schema.Flow(
                layers=(first.index, second.index),
                flows=[(i, j, int(counts[i, j])) for i, j in pairs if counts[i, j]],
                mutual_information=float(information),
            )
        )
    agreement = [
        schema.Agreement(pool=p, layers=pair, agreement=interval(rng, rng.uniform(0.15, 0.5)), by_chance=0.13)
        for p, group in enumerate(groups)
        for pair in itertools.pairwise(group)
    ]
    return schema.Stability(layers=rows, agreement=agreement, flows=flows)


def _strategy(rng, layers, num_experts):
    replacements, similarity = [], []
    last = len(layers) - 1
    for layer in layers:
        neighbour = layer.index + 1 if layer.index < last else layer.index - 1
        depth = layer.index / last
        for part, scale in (("experts", 0.35), ("router", 0.5), ("attention", 0.12)):
            value = scale * (0.15 + 4 * (depth - 0.5) ** 2) * rng.uniform(0.8, 1.2)
            replacements.append(
                schema.Replacement(
                    layer=layer.index, neighbour=neighbour, part=part, loss_increase=interval(rng, value, 0.1)
                )
            )
        for other in layers[layer.index + 1 :]:
            apart = other.index - layer.index
            similarity.append(
                schema.Similarity(
                    layers=(layer.index, other.index),
                    representation_cka=float(np.exp(-0.12 * apart) * rng.uniform(0.95, 1)),
                    output_similarity=float(0.4 * rng.uniform(0.5, 1)) if apart == 1 else None,
                )
            )
    middle = len(layers) // 2
    plans = [
        schema.SuggestedPlan(
            recipe={
                "source": "olmoe-small",
                "output": "olmoe-small-tied",
                "groups": groups,
                "method": "prototype",
                "pool_experts": num_experts,
            },
            expert_share=1 - sum(len(group) - 1 for group in groups) / len(layers),
            predicted_loss_increase=increase,
            measured_loss_increase=measured,
            reason="the middle layers' experts are the cheapest to replace",
        )
        for groups, increase, measured in (
            ([[middle, middle + 1]], 0.008, 0.0095),
            ([[middle - 2, middle - 1], [middle, middle + 1]], 0.031, None),
        )
    ]
    return schema.LayerStrategy(replacements=replacements, similarity=similarity, plans=plans)


def _quality(rng, domains, loss):
    losses = {domain: interval(rng, loss - 0.7 * (domain == "code"), 0.01) for domain in domains}
    return schema.Quality(
        loss=losses,
        perplexity={domain: float(np.exp(each.value)) for domain, each in losses.items()},
        bits_per_byte={domain: interval(rng, 0.4 * each.value, 0.01) for domain, each in losses.items()},
        tasks=[
            schema.Task(name="arc_easy", metric="acc", value=0.61, standard_error=0.01, num_shots=0, num_samples=2376)
        ],
        prefill_tokens_per_second=1240.0,
        decode_tokens_per_second=21.5,
        peak_memory_bytes=15 * GIB,
        device="cpu",
    )

"""Tied models pretrained from scratch by the paper's recipe, at a size for one core: `make study-pretraining`.

Small OLMoEs (six layers, the four in the middle tied) learn the novels that ship with the package by Muon and AdamW,
as "Tying the Loop" (arXiv 2606.16825) trains: warm-up, rates that fall to a tenth, clipping, balance loss and z-loss.
All see the same tokens, and at a seed in the same order; a seed decides weights and order. `narrow` is untied with as
many parameters as g=4, but for its smaller routers. Differences are paired by seed.

    python benchmarks/pretraining_study.py --output study-pretraining
    python benchmarks/pretraining_study.py --output quick --quick --results quick/study    # the whole path in seconds

Kill it and start it again: rows that are there are not run again. Every row runs at a seed before any at the next.
"""

import statistics
import time
from typing import Any

import torch
from matplotlib.figure import Figure
from study.jobs import BLOCK, ScratchStudy
from tables import above_of, mean_of, plus_minus, table, write_results
from timing import about, by_clock, interleave, spread
from transformers import get_cosine_with_min_lr_schedule_with_warmup, set_seed

from tiedmoe_demo.figures import peak_bytes
from transformers_tiedmoe import TiedMoeForCausalLM
from transformers_tiedmoe.audit.memory_training import activation_bytes
from transformers_tiedmoe.presets import RECIPE, preset
from transformers_tiedmoe.training.data import perplexity
from transformers_tiedmoe.training.muon import Muon, muon_parameter_groups

SIZES = {
    "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4, "vocab_size": 1024,
    "max_position_embeddings": 128, "skip_first": 1, "skip_last": 1, "norm_topk_prob": True,
}  # fmt: skip
QUICK = {"hidden_size": 32, "num_experts": 8, "vocab_size": 300, "head_dim": 16}
BATCH = 16
BASE = "untied"
# A preset of the paper's and fields of its config; what says most comes first. g=4 leaves 3 of 6 sets of experts.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("g1", {}),
    "g=4": ("g4", {}),
    "narrow, parameters of g=4": ("g1", {"num_experts": SIZES["num_experts"] // 2}),
    "g=4, attention too": ("g4", {"tied_components": ["experts", "attention"]}),
    "g=2": ("g2", {}),
    "g=4, pools twice as wide": ("g4-2x", {}),
    "g=4, routers too": ("g4", {"tied_components": ["experts", "router"]}),
}
# Whose steps and memory are measured, and the paper's model of the same tying.
PAPERS = {BASE: "olmoe-1024-g1", "g=2": "olmoe-1024-g2", "g=4": "olmoe-1024-g4"}
PARTS = ("forward and backward", "optimizer")
KINDS = ("weights", "gradients", "optimizer", "activations")
PAPERS_BATCH = 8  # sequences on one device at once


class Study(ScratchStudy):
    name, usual, quick = "pretraining", (SIZES, 500, 9), (SIZES | QUICK, 8, 1)

    def model(self, name: str, seed: int = 0) -> TiedMoeForCausalLM:
        """Make a row's model from weights at random."""
        variant, fields = ROWS[name]
        set_seed(seed)
        if "num_experts" in fields:
            fields = {"num_experts": self.sizes["num_experts"] // 2}
        model = TiedMoeForCausalLM(preset(f"olmoe-512-{variant}", **{**self.sizes, **fields})).train()
        model.set_experts_implementation("tiedmoe")
        return model

    def train(self, name: str, seed: int) -> dict:
        model = self.model(name, seed)
        optimizer = Muon(muon_parameter_groups(model, RECIPE["lr"], RECIPE["weight_decay"]))
        warmup = min(RECIPE["warmup_steps"], self.steps // 10)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, self.steps, min_lr_rate=RECIPE["final_lr"] / RECIPE["lr"]
        )
        (blocks, held_out), draw = self.blocks, torch.Generator().manual_seed(seed)
        epochs = -(-self.steps * BATCH // len(blocks))
        order = torch.cat([torch.randperm(len(blocks), generator=draw) for _ in range(epochs)])
        losses = []
        for numbers in order[: self.steps * BATCH].split(BATCH):
            tokens = torch.tensor(blocks[numbers.tolist()]["input_ids"])
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        loss, train_loss = perplexity(model, held_out, BATCH)["loss"], statistics.mean(losses[-50:])
        return {"loss": loss, "train_loss": train_loss, "parameters": model.num_parameters()}

    def measure_steps(self) -> list[dict]:
        """Time steps of tied and untied models in turn, and measure their memory; then compute the paper's sizes'."""
        tokens = torch.tensor(self.blocks[0][:BATCH]["input_ids"])
        models = {name: self.model(name) for name in PAPERS}
        optimizers = {name: Muon(muon_parameter_groups(model)) for name, model in models.items()}
        calls = {}
        for name, model in models.items():
            calls[name, PARTS[0]] = lambda number=0, model=model: model(tokens, labels=tokens).loss.backward()
            calls[name, PARTS[1]] = lambda number, step=optimizers[name].step: step()
        timed = {part: by_clock(call, time.process_time) for part, call in calls.items()}
        times = interleave(timed, seconds=0, least=self.rounds + 1, most=self.rounds + 1)
        found = []
        for name, model in models.items():
            own = computed_memory(model.config, BATCH, BLOCK)
            states = [t for state in optimizers[name].state.values() for t in state.values() if t.ndim]
            assert own["optimizer"] == sum(state.nbytes for state in states)
            own["activations"] = peak_bytes(calls[name, PARTS[0]])
            papers = preset(PAPERS[name], **({"num_hidden_layers": 6} if self.options.quick else {}))
            seconds = {part: spread(times[name, part][1:]) for part in PARTS}  # the first is a warm-up
            found.append({"row": name, "seconds": seconds, "bytes": own})
            found[-1]["papers_bytes"] = computed_memory(papers, PAPERS_BATCH, RECIPE["block_size"])
        return found


def computed_memory(config: Any, batch: int, block: int) -> dict[str, int]:
    """Return the bytes of a training step of Muon in float32 by kind, from a model on the meta device."""
    with torch.device("meta"):
        model = TiedMoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    weights = 4 * model.num_parameters()
    groups = muon_parameter_groups(model)
    states = sum(4 * p.numel() * (1 if group["use_muon"] else 2) for group in groups for p in group["params"])
    activations = activation_bytes(model, batch, block)
    return {"weights": weights, "gradients": weights, "optimizer": states, "activations": activations}


def summarize(study: Study) -> dict:
    """Return each row's losses over its seeds, and above those of the untied model at the same seed."""
    (runs, steps), rows = study.found(ROWS), []
    for name in ROWS:
        if own := [run for run in runs if run["row"] == name]:
            above = None if name == BASE else above_of(own, [run for run in runs if run["row"] == BASE])
            rows.append({"row": name, "parameters": own[0]["parameters"], "loss": mean_of([r["loss"] for r in own])})
            rows[-1]["above_untied"] = above
    settings = {**study.sizes, **RECIPE, "block_size": BLOCK, "sequences_per_step": BATCH, "steps": study.steps}
    found = {"settings": settings, "rows": rows, "steps": steps, "runs": runs}
    return {"command": "make study-pretraining", **about(), **found}


def markdown(summary: dict) -> str:
    settings, runs = summary["settings"], summary["runs"]
    tokens = settings["steps"] * BATCH * BLOCK
    lines = []
    for row in summary["rows"]:
        losses = [plus_minus(row["loss"], 4), plus_minus(row["above_untied"], 4, sign="+")]
        lines.append([row["row"], f"{row['parameters']:,}", len(row["loss"]["values"]), *losses])
    text = ["# Pretraining: the study", "", __doc__.split("\n\n")[1], "", f"`{summary['command']}`", ""]
    text += [f"{tokens:,} tokens a run, {statistics.mean(run['cpu_seconds'] for run in runs):.0f} s of one core.", ""]
    text += table(["row", "parameters", "seeds", "held-out loss", "above untied, by seed"], lines)
    if summary["steps"]:
        measured = [
            [*memory(row, "bytes", 2**20), *(f"{1000 * each['median']:.0f} ms" for each in row["seconds"].values())]
            for row in summary["steps"]
        ]
        text += ["", f"A step of {BATCH} sequences of {BLOCK}, measured, and process time; MiB:", ""]
        text += table(["model", *KINDS, "sum", "forward and backward", "optimizer step"], measured)
        computed = [memory(row, "papers_bytes", 2**30) for row in summary["steps"]]
        text += ["", f"The paper's OLMoE of hidden size 1024, {PAPERS_BATCH} sequences, computed, float32; GiB:", ""]
        text += table(["model", *KINDS, "sum"], computed)
    return "\n".join(text) + "\n"


def memory(row: dict, field: str, unit: int) -> list[str]:
    """Return a row's name, its bytes by kind and their sum, in units."""
    sizes = [row[field][kind] / unit for kind in KINDS]
    return [row["row"], *(f"{each:.1f}" for each in (*sizes, sum(sizes)))]


def figure_of(summary: dict) -> Figure:
    """Draw how far each row's loss is above the untied one's, every seed a point."""
    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=130)
    axes = figure.subplots()
    rows = [row for row in summary["rows"] if row["above_untied"]][::-1]
    for place, row in enumerate(rows):
        values = row["above_untied"]["values"]
        axes.plot(values, [place] * len(values), "o", color="#0072B2", alpha=0.6)
        axes.plot([row["above_untied"]["mean"]], [place], "|", color="black", markersize=18)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['row']} ({row['parameters'] / 1e6:.2f}M)" for row in rows])
    axes.set_xlabel("held-out loss above the untied model's of the same seed, nats per token")
    axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    study = Study(__doc__, arguments)
    study.run_all(ROWS)
    summary = summarize(study)
    write_results(study.options.results, summary, markdown(summary), figure_of(summary))


if __name__ == "__main__":
    main()

"""Soft routing against top-k at equal tokens, trained from scratch, tied and not: `make study-softmoe`.

Small OLMoEs learn the novels that ship with the package, three seeds each, by the same Trainer. A soft row is steered
to a number of experts that its tokens really use (`target_active`), so that it stands beside the top-k of as many; a
seed decides weights and order of the text. Last, one trained top-k model is made soft and healed, against the same
model healed as it is and with one expert fewer. Writes softmoe_study.json, .md and .png. Kill it and start it again:
rows that are there are not run again.

    python benchmarks/softmoe_study.py --output study-softmoe --workers 2
    python benchmarks/softmoe_study.py --output quick --quick --results quick/study    # the whole path in a minute
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from study.jobs import BLOCK, ScratchStudy
from tables import above_of, mean_of, plus_minus, table, write_results
from timing import Timed, about, by_clock, interleave, paired_ratio
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, set_seed

from tiedmoe_conversion import ConversionRecipe, convert
from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import train_on_text
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.routing import active_experts
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.data import perplexity
from transformers_tiedmoe.training.heal import heal
from transformers_tiedmoe.training.soft_routing import AnnealRouting

SIZES = {
    "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "num_experts": 32,
    "vocab_size": 1024, "max_position_embeddings": 128, "initializer_range": 0.06, "tie_word_embeddings": True,
    "norm_topk_prob": True, "output_router_logits": True,
}  # fmt: skip
BATCH, LEARNING_RATE = 16, 5e-3
ALPHA, MASS = 0.01, 0.75
COLOURS = ("#000000", "#0072B2", "#D55E00")  # Okabe and Ito's
QUICK_SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 300}


@dataclass(frozen=True)
class Row:
    """A configuration: `active` experts a token, exactly (top-k) or on average over layers (soft)."""

    name: str
    active: int
    is_soft: bool = False
    learns: bool = False
    group_size: int = 1
    heals: bool = False  # the trained SOURCE, instead of weights at random
    learning_rate: float = LEARNING_RATE

    def config(self, sizes: dict) -> TiedMoeConfig:
        """Return the model's config; an untied one has no group."""
        L = sizes["num_hidden_layers"]
        groups = [list(range(i, i + 2)) for i in range(0, L, 2)] if self.group_size == 2 else []
        family = OlmoeConfig(**sizes, num_experts_per_tok=self.active)
        return TiedMoeConfig.from_family(family, groups=groups, **self.routing(L))

    def routing(self, num_layers: int) -> dict:
        """Return the fields of soft routing: where it starts, and where training steers it."""
        if not self.is_soft:
            return {}
        soft = {"alpha": ALPHA, "budget": MASS * self.active * num_layers, "target_active": self.active * num_layers}
        return {"routing": "softmoe", "softmoe": {**soft, "learn_budget": self.learns}}


def rows(where: str, top_k: tuple = (), learned: tuple = (), even: tuple = (), **fields) -> list[Row]:
    """Return the rows of one setting, by experts asked for: top-k's, then soft ones by how the budget is shared."""
    soft = [("learned", k) for k in learned] + [("even", k) for k in even]
    return [Row(f"top-k, {where}, {k}", k, **fields) for k in top_k] + [
        Row(f"soft, {kind}, {where}, {k}", k, True, kind == "learned", **fields) for kind, k in soft
    ]


SETTINGS = (
    *rows("untied", (4, 2, 1), (4, 3, 2), (4, 3, 2)),
    *rows("tied", (4, 2), (4, 3, 2), (4, 3, 2), group_size=2),
    # Which top-k of 4 likes better: the control is not to be hobbled.
    *rows("untied at twice the rate", (4,), (4,), learning_rate=2 * LEARNING_RATE),
    *rows("healed", (4, 3), (4, 3), heals=True),
)
ROWS = {row.name: row for row in SETTINGS}
SOURCE = BASE = "top-k, untied, 4"  # what is healed; by whose step the others' are divided


class Study(ScratchStudy):
    name, usual, quick = "softmoe", (SIZES, 600, 9), (SIZES | QUICK_SIZES, 20, 2)

    def train(self, name: str, seed: int) -> dict:
        """Train or heal a row and measure it; of a soft one also, by layer, mass and the experts that tokens use."""
        row = ROWS[name]
        model = self.heal(row, seed) if row.heals else self.pretrain(row, seed)
        active_experts(model, reset=True)
        found = perplexity(model, self.blocks[1], BATCH)
        used = active_experts(model)
        active = mean(each["mean"] for each in used) if row.is_soft else float(row.active)
        return {"loss": found["loss"], "active": active, "by_layer": used}

    def pretrain(self, row: Row, seed: int) -> TiedMoeForCausalLM:
        """Train from weights at random, all rows alike."""
        set_seed(seed)
        model = TiedMoeForCausalLM(row.config(self.sizes))
        anneal = [AnnealRouting(model, model.config.softmoe)] if row.is_soft else []
        batches = {"batch_size": BATCH, "block_size": BLOCK, "source_learning_rate": row.learning_rate}
        settings = DemoConfig(data=self.text, source_steps=self.steps, seed=seed, **batches)
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        train_on_text(model, tokenizer, settings, self.path(row.name, seed, ".trainer"), lambda *_: None, anneal)
        model.save_pretrained(self.path(row.name, seed, ""))
        return model

    def heal(self, row: Row, seed: int) -> TiedMoeForCausalLM:
        """Heal the trained top-k model, seed 0 of it, as it is or made soft; as it was trained it is the teacher."""
        source, model = self.path(SOURCE, 0, ".source"), self.path(row.name, seed, ".start")
        if not source.exists():  # as any OLMoE checkpoint is
            trained = TiedMoeForCausalLM.from_pretrained(self.path(SOURCE, 0, ""))
            own = OlmoeForCausalLM(OlmoeConfig(**self.sizes, num_experts_per_tok=ROWS[SOURCE].active))
            own.load_state_dict(trained.state_dict())
            own.save_pretrained(source)
            AutoTokenizer.from_pretrained(self.tokenizer).save_pretrained(source)
        if not model.exists():
            if row.is_soft:
                convert(ConversionRecipe(str(source), str(model), group_size=1, method="union", routing="softmoe"))
            else:
                shutil.copytree(source, model)
            config = json.loads((model / "config.json").read_text())
            if row.is_soft:
                wanted = row.routing(config["num_hidden_layers"])["softmoe"]
                config["softmoe"] |= {"learn_budget": row.learns, "target_active": wanted["target_active"]}
                config["softmoe"] |= {"target_budget": wanted["budget"], "target_alpha": ALPHA}
            else:
                config["num_experts_per_tok"] = row.active
            (model / "config.json").write_text(json.dumps(config))
        healed = self.path(row.name, seed, "")
        options = TiedMoeTrainingArguments(
            model=str(model), data=self.text, output_dir=str(healed), teacher=str(source), seed=seed,
            max_steps=self.steps // 5, per_device_train_batch_size=BATCH, block_size=BLOCK,
            learning_rate=LEARNING_RATE / 5, save_steps=self.steps, disable_tqdm=True, logging_strategy="no",
            allow_worse=True, anneal_tolerance=100.0,  # it never waits, as when the reported rows were run
        )  # fmt: skip
        heal(options)
        return AutoModelForCausalLM.from_pretrained(healed)

    def measure_steps(self) -> dict[str, list[float]]:
        """Time a training step's forward and backward of the trained rows in turn, in seconds of the process."""
        batch = torch.tensor(self.blocks[0][:BATCH]["input_ids"])

        def step(path: Path) -> Timed:
            model = TiedMoeForCausalLM.from_pretrained(path).train()
            return by_clock(lambda number: model(input_ids=batch, labels=batch).loss.backward(), time.process_time)

        paths = {name: self.path(name, 0, "") for name, row in ROWS.items() if not row.heals}
        steps = {name: step(path) for name, path in paths.items() if path.exists()}
        times = interleave(steps, seconds=0, least=self.rounds + 1, most=self.rounds + 1)
        return {name: own[1:] for name, own in times.items()}  # the first is a warm-up


def summarize(study: Study) -> dict:
    """Return what each row used, lost and took over its seeds, JSON-able, and all runs."""
    runs, times = study.found(ROWS)
    settings = {"steps": study.steps, "batch": BATCH, "block": BLOCK, "learning_rate": LEARNING_RATE}
    settings = {**study.sizes, **settings, "alpha": ALPHA, "mass": MASS}
    rows = [row_of(name, runs, times) for name in ROWS if any(run["row"] == name for run in runs)]
    return {"command": "make study-softmoe", **about(), "settings": settings, "rows": rows, "runs": runs}


def row_of(name: str, runs: list[dict], times: dict[str, list[float]]) -> dict:
    """Return the means of a row's runs: nats above top-k's of 4, seed by seed; by layer, mass and experts used."""
    beside = f"top-k, {name.split(', ')[-2]}, 4"
    own, base = ([run for run in runs if run["row"] == each] for each in (name, beside))
    layers = list(zip(*(run["by_layer"] for run in own)))
    is_timed = {name, BASE} <= set(times)
    return {
        "row": name, "seeds": len(own), "active": mean_of([run["active"] for run in own]),
        "loss": mean_of([run["loss"] for run in own]), "over_top_k": None if name == beside else above_of(own, base),
        "step_over_top_k_4": paired_ratio(times[name], times[BASE]) if is_timed else None,
        "by_layer": {figure: [mean(run[figure] for run in layer) for layer in layers] for figure in ("k", "mean")},
    }  # fmt: skip


def markdown(summary: dict) -> str:
    columns = ["row, experts asked for", "seeds", "experts used", "held-out loss", "above top-k of 4"]
    lines = []
    for row in summary["rows"]:
        losses = [plus_minus(row["active"], 2), plus_minus(row["loss"], 4), plus_minus(row["over_top_k"], 4, sign="+")]
        step = row["step_over_top_k_4"]
        over = "{median:.2f} ({p20:.2f}-{p80:.2f})".format(**step) if step else ""
        lines.append([row["row"], row["seeds"], *losses, over])
    text = ["# Soft routing: the study", "", __doc__.split("\n\n")[1], "", f"`{summary['command']}`", ""]
    text += ["The step is forward and backward, process seconds in paired rounds, over those of top-k 4, untied.", ""]
    return "\n".join([*text, *table([*columns, "step, over top-k's"], lines)]) + "\n"


def figure_of(summary: dict) -> Figure:
    """Draw loss against experts used, with the seeds' deviation, and what the learned budgets gave each layer."""
    figure = Figure(figsize=(12, 4.4), layout="constrained", dpi=130)
    untied, tied, depth = figure.subplots(1, 3)
    tied.sharey(untied)
    rows = {row["row"]: row for row in summary["rows"]}
    for axes, where in ((untied, "untied"), (tied, "tied")):
        for number, kind in enumerate(("top-k", "soft, even", "soft, learned")):
            own = [row for name, row in rows.items() if name.rpartition(", ")[0] == f"{kind}, {where}"]
            own.sort(key=lambda row: row["active"]["mean"])
            if own:
                active = [row["active"]["mean"] + 0.04 * number for row in own]
                deviations = [row["loss"]["standard_deviation"] or 0 for row in own]
                style = {"color": COLOURS[number], "marker": "osD"[number], "capsize": 2, "label": kind}
                axes.errorbar(active, [row["loss"]["mean"] for row in own], deviations, **style)
        axes.set(xlabel="experts that a token uses in a layer, mean", title=where)
        axes.legend(fontsize=9)
    untied.set_ylabel("held-out loss, nats per token")
    for name, row in rows.items():
        kind, _, where = name.partition("soft, learned, ")
        if not kind and where.split(", ")[0] in ("untied", "tied"):
            style = {"linestyle": "--" if where.startswith("tied") else "-", "marker": "o", "markersize": 4}
            used = row["by_layer"]["mean"]
            depth.plot(range(1, len(used) + 1), used, label=where, color=COLOURS[int(where[-1]) % 3], **style)
    depth.set(xlabel="layer", ylabel="experts that a token uses, mean")
    depth.set_title("what a learned budget gives each layer")
    depth.legend(fontsize=8)
    for axes in (untied, tied, depth):
        axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    study = Study(__doc__, arguments)
    healed = {name for name, row in ROWS.items() if row.heals}  # they need the trained source
    study.run_all([name for name in ROWS if name not in healed], healed)
    summary = summarize(study)
    write_results(study.options.results, summary, markdown(summary), figure_of(summary))


if __name__ == "__main__":
    main()

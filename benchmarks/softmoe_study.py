"""Soft routing against top-k at equal tokens, trained from scratch, tied and not: `make study-softmoe`.

Small OLMoEs learn the novels that ship with the package, three seeds each, by the same Trainer. A soft row is steered
to a number of experts that its tokens really use (`target_active`), so that it stands beside the top-k of as many; a
seed decides weights and order of the text. Last, one trained top-k model is made soft and healed, against the same
model healed as it is and with one expert fewer. Writes softmoe_study.json, .md and .png. Kill it and start it again:
rows that are there are not run again.

    python benchmarks/softmoe_study.py --output study-softmoe --workers 2
    python benchmarks/softmoe_study.py --output quick --quick --results quick/study    # the whole path in a minute
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path
from statistics import mean

import datasets
import torch
import transformers
from matplotlib.figure import Figure
from tables import mean_of, plus_minus, table, write_json
from timing import machine, spread, versions
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import transformers_tiedmoe
from tiedmoe_conversion import ConversionRecipe, convert
from tiedmoe_demo.train_source import train_tokenizer
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.routing import active_experts
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.heal import heal
from transformers_tiedmoe.training.soft_routing import AnnealRouting

RESULTS = Path(__file__).parent / "results" / "softmoe_study"
TEXT = Path(transformers_tiedmoe.__file__).parent / "data" / "austen.txt.xz"
SIZES = {
    "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "num_experts": 32,
    "vocab_size": 1024, "max_position_embeddings": 128, "initializer_range": 0.06, "tie_word_embeddings": True,
    "norm_topk_prob": True, "output_router_logits": True,
}  # fmt: skip
STEPS, BATCH, BLOCK, LEARNING_RATE, HELD_OUT_BLOCKS = 600, 16, 128, 5e-3, 256
ALPHA, MASS = 0.01, 0.75
TIMES = "step_times.json"
COLOURS = ("#000000", "#0072B2", "#D55E00")  # Okabe and Ito's
QUICK_SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 300}


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration: `active` experts a token, exactly (top-k) or on average over layers (soft)."""

    name: str
    active: float
    is_soft: bool = False
    learns: bool = False
    group_size: int = 1
    heals: bool = False  # the trained `SOURCE` row, instead of weights at random
    learning_rate: float = LEARNING_RATE

    def config(self, sizes: dict, vocab_size: int) -> TiedMoeConfig:
        """Return the model's config; an untied one has no group."""
        L = sizes["num_hidden_layers"]
        groups = [list(range(i, i + 2)) for i in range(0, L, 2)] if self.group_size == 2 else []
        top_k = max(1, round(self.active))
        family = OlmoeConfig(**sizes | {"vocab_size": vocab_size, "num_experts_per_tok": top_k})
        return TiedMoeConfig.from_family(family, groups=groups, **self.routing(L))

    def routing(self, num_layers: int) -> dict:
        """Return the fields of soft routing: where it starts, and where training steers it."""
        if not self.is_soft:
            return {}
        soft = {"alpha": ALPHA, "budget": MASS * self.active * num_layers, "target_active": self.active * num_layers}
        return {"routing": "softmoe", "softmoe": {**soft, "learn_budget": self.learns}}


def top_k(where: str, *active: int, **fields) -> list[Row]:
    """Return rows of the family's own routing."""
    return [Row(f"top-k, {where}, {k}", k, **fields) for k in active]


def soft(kind: str, where: str, *active: int, **fields) -> list[Row]:
    """Return soft rows, whose budget is "learned" or "even"."""
    return [Row(f"soft, {kind}, {where}, {k}", k, True, kind == "learned", **fields) for k in active]


SOURCE = BASE = Row("top-k, untied, 4", 4)  # what is healed; by whose step the others' are divided
TIED: dict = {"group_size": 2}
OTHER_RATE: dict = {
    "learning_rate": 2 * LEARNING_RATE
}  # which top-k of 4 likes better: the control is not to be hobbled
HEALED: dict = {"heals": True}
ROWS = [
    *top_k("untied", 4, 2, 1), *soft("learned", "untied", 4, 3, 2), *soft("even", "untied", 4, 3, 2),
    *top_k("tied", 4, 2, **TIED), *soft("learned", "tied", 4, 3, 2, **TIED), *soft("even", "tied", 4, 3, 2, **TIED),
    *top_k("untied at twice the rate", 4, **OTHER_RATE), *soft("learned", "untied at twice the rate", 4, **OTHER_RATE),
    *top_k("healed", 4, 3, **HEALED), *soft("learned", "healed", 4, 3, **HEALED),
]  # fmt: skip


class Study:
    """The text, the sizes and the folder of a study.

    Every row at a seed leaves `NAME.seedN.json` there.
    """

    def __init__(self, output: Path, quick: bool):
        self.output, self.quick = output, quick
        self.sizes = SIZES | (QUICK_SIZES if quick else {})
        self.steps = 20 if quick else STEPS
        self.text = output / "text.txt" if quick else TEXT
        output.mkdir(parents=True, exist_ok=True)
        if quick and not self.text.exists():
            lines = datasets.load_dataset("text", data_files=str(TEXT), split="train[:800]")["text"]
            self.text.write_text("\n".join(lines))
        self.tokenizer_folder = output / "tokenizer"
        if not self.tokenizer_folder.exists():
            train_tokenizer(self.text, self.sizes["vocab_size"]).save_pretrained(self.tokenizer_folder)

    def prepare(self) -> None:
        """Read the text; in every process once."""
        torch.set_num_threads(1)
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_folder)
        self.train, held_out = load_blocks(self.text, self.tokenizer, BLOCK)
        self.held_out = held_out.select(range(min(HELD_OUT_BLOCKS, len(held_out))))

    def path(self, row: Row, seed: int, suffix: str = ".json") -> Path:
        """Return the file, or folder, of a row at a seed."""
        return self.output / ("".join(c if c.isalnum() else "-" for c in row.name) + f".seed{seed}{suffix}")

    def run(self, row: Row, seed: int) -> dict:
        """Train a row once, or read what it gave."""
        path = self.path(row, seed)
        if not path.exists():
            start = time.process_time()
            found = self.heal(row, seed) if row.heals else self.pretrain(row, seed)
            found = {"row": row.name, "seed": seed, **found, "cpu_seconds": round(time.process_time() - start, 1)}
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())

    def pretrain(self, row: Row, seed: int) -> dict:
        """Train from weights at random, all rows alike; return the held-out loss and what tokens use."""
        set_seed(seed)
        model = TiedMoeForCausalLM(row.config(self.sizes, len(self.tokenizer)))
        callbacks = [AnnealRouting(model, model.config.softmoe)] if row.is_soft else []
        arguments = TrainingArguments(
            str(self.path(row, seed, ".trainer")), max_steps=self.steps, per_device_train_batch_size=BATCH,
            learning_rate=row.learning_rate, lr_scheduler_type="cosine", warmup_steps=self.steps // 20,
            adam_beta2=0.95, weight_decay=0.1, logging_strategy="no", save_strategy="no", seed=seed, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, default_data_collator, self.train, callbacks=callbacks).train()
        model.save_pretrained(self.path(row, seed, ""))
        return self.measure(row, model)

    def heal(self, row: Row, seed: int) -> dict:
        """Heal the trained top-k model, seed 0 of it, as it is or made soft; as it was trained it is the teacher."""
        source, model = self.path(SOURCE, 0, ".source"), self.path(row, seed, ".start")
        if not source.exists():  # as any OLMoE checkpoint is
            trained = TiedMoeForCausalLM.from_pretrained(self.path(SOURCE, 0, ""))
            own = OlmoeForCausalLM(OlmoeConfig(**{**self.sizes, "num_experts_per_tok": round(SOURCE.active)}))
            own.load_state_dict(trained.state_dict())
            own.save_pretrained(source)
            AutoTokenizer.from_pretrained(self.tokenizer_folder).save_pretrained(source)
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
                config["num_experts_per_tok"] = round(row.active)
            (model / "config.json").write_text(json.dumps(config))
        healed = self.path(row, seed, "")
        heal(
            TiedMoeTrainingArguments(
                model=str(model), data=str(self.text), output_dir=str(healed), teacher=str(source), seed=seed,
                max_steps=self.steps // 5, per_device_train_batch_size=BATCH, block_size=BLOCK,
                learning_rate=LEARNING_RATE / 5, save_steps=self.steps, disable_tqdm=True, logging_strategy="no",
                allow_worse=True,
            )
        )  # fmt: skip
        return self.measure(row, AutoModelForCausalLM.from_pretrained(healed))

    def measure(self, row: Row, model: TiedMoeForCausalLM) -> dict:
        """Measure the held-out loss; of a soft row also, by layer, mass and the experts that tokens use."""
        active_experts(model, reset=True)
        found = perplexity(model, self.held_out, BATCH)
        used = active_experts(model)
        mean = sum(each["mean"] for each in used) / len(used) if row.is_soft else float(row.active)
        return {"loss": found["loss"], "active": mean, "by_layer": used}

    def time_steps(self, rounds: int) -> None:
        """Time a training step's forward and backward of the trained rows in turn, in seconds of the process."""
        self.prepare()
        models = {row.name: self.path(row, 0, "") for row in ROWS if not row.heals and self.path(row, 0, "").exists()}
        models = {name: TiedMoeForCausalLM.from_pretrained(path).train() for name, path in models.items()}
        batch = torch.tensor(self.train[:BATCH]["input_ids"])
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds + 1):
            for name, model in models.items():
                start = time.process_time()
                model(input_ids=batch, labels=batch).loss.backward()
                times[name].append(time.process_time() - start)
        (self.output / TIMES).write_text(json.dumps({name: own[1:] for name, own in times.items()}))


def write_results(study: Study, runs: list[dict], results: Path) -> None:
    """Write the table and the plot of what has run."""
    times = json.loads((study.output / TIMES).read_text()) if (study.output / TIMES).exists() else {}
    found = []
    for row in ROWS:
        own = [run for run in runs if run["row"] == row.name]
        base = times.get(BASE.name) if row.name in times else None
        ratios = [mine / theirs for mine, theirs in zip(times[row.name], base)] if base else None
        if own:
            found.append(
                {
                    "row": row.name,
                    "seeds": len(own),
                    "active": mean_of([run["active"] for run in own]),
                    "loss": mean_of([run["loss"] for run in own]),
                    "over_top_k": over(row, own, runs),
                    "step_over_top_k_4": ratios and spread(ratios),
                    "by_layer": {
                        figure: [
                            mean([run["by_layer"][layer][figure] for run in own])
                            for layer in range(len(own[0]["by_layer"]))
                        ]
                        for figure in ("k", "mean")
                    },
                }
            )
    summary = {
        "command": "make study-softmoe", "versions": versions(), "machine": machine(torch.device("cpu")),
        "settings": {
            **study.sizes, "steps": study.steps, "batch": BATCH, "block": BLOCK, "learning_rate": LEARNING_RATE,
            "alpha": ALPHA, "mass": MASS,
        },
        "rows": found, "runs": runs,
    }  # fmt: skip
    write_json(results.with_suffix(".json"), summary)
    results.with_suffix(".md").write_text(markdown(summary))
    save_plot(summary, results.with_suffix(".png"))
    print(markdown(summary))


def over(row: Row, own: list[dict], runs: list[dict]) -> dict | None:
    """Subtract, seed by seed, the loss of the top-k row beside which a soft row stands: nats; None of top-k."""
    base = f"top-k, {row.name.split(', ')[-2]}, 4"
    losses = {run["seed"]: run["loss"] for run in runs if run["row"] == base}
    if row.name == base:
        return None
    return mean_of([run["loss"] - losses[run["seed"]] for run in own if run["seed"] in losses])


def markdown(summary: dict) -> str:
    """Return the table: what each row uses, its loss, and what its steps take."""
    lines = []
    for row in summary["rows"]:
        ratio = row["step_over_top_k_4"]
        lines.append(
            [
                row["row"], row["seeds"], plus_minus(row["active"], 2), plus_minus(row["loss"], 4),
                plus_minus(row["over_top_k"], 4, sign="+"),
                f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})" if ratio else "",
            ]
        )  # fmt: skip
    columns = [
        "row, experts asked for",
        "seeds",
        "experts used",
        "held-out loss",
        "above top-k of 4",
        "step, over top-k's",
    ]
    text = ["# Soft routing: the study", "", __doc__.split("\n\n")[1], "", f"`{summary['command']}`", ""]
    text += ["The step is forward and backward, process seconds in paired rounds, over those of top-k 4, untied.", ""]
    return "\n".join([*text, *table(columns, lines)]) + "\n"


def save_plot(summary: dict, path: Path) -> None:
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
                axes.errorbar(
                    [row["active"]["mean"] + 0.04 * number for row in own], [row["loss"]["mean"] for row in own],
                    yerr=[row["loss"]["standard_deviation"] or 0 for row in own], capsize=2, label=kind,
                    color=COLOURS[number], marker="osD"[number],
                )  # fmt: skip
        axes.set_xlabel("experts that a token uses in a layer, mean")
        axes.set_title(where)
        axes.legend(fontsize=9)
    untied.set_ylabel("held-out loss, nats per token")
    for name, row in rows.items():
        kind, _, where = name.partition("soft, learned, ")
        if not kind and where.split(", ")[0] in ("untied", "tied"):
            style = {"linestyle": "--" if where.startswith("tied") else "-", "marker": "o", "markersize": 4}
            used = row["by_layer"]["mean"]
            depth.plot(range(1, len(used) + 1), used, label=where, color=COLOURS[int(where[-1]) % 3], **style)
    depth.set_xlabel("layer")
    depth.set_ylabel("experts that a token uses, mean")
    depth.set_title("what a learned budget gives each layer")
    depth.legend(fontsize=8)
    for axes in (untied, tied, depth):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


_study: Study


def start_worker(output: Path, quick: bool) -> None:
    global _study
    _study = Study(output, quick)
    _study.prepare()


def run_job(job: tuple[Row, int]) -> dict:
    return _study.run(*job)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("study-softmoe"), help="what is there is reused")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file name without .json, .md, .png")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--only", default="", help="rows whose name this regular expression finds")
    parser.add_argument("--rounds", type=int, default=9, help="in which the rows' steps are timed")
    parser.add_argument("--report", action="store_true", help="run nothing, write the results of what is there")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps: whether it all works")
    options = parser.parse_args(arguments)
    study = Study(options.output, options.quick)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    jobs = [(row, seed) for seed in seeds for row in ROWS if re.search(options.only, row.name)]
    if not options.report:
        run_all(study, [job for job in jobs if not study.path(*job).exists()], options.workers)
        study.time_steps(options.rounds)
    runs = [json.loads(path.read_text()) for row, seed in jobs if (path := study.path(row, seed)).exists()]
    write_results(study, runs, options.results)


def run_all(study: Study, jobs: list[tuple[Row, int]], workers: int) -> None:
    """Run the jobs, those that heal last: they need the trained source."""
    context = multiprocessing.get_context("spawn")
    given = (study.output, study.quick)
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, given) as pool:
        for stage in ([job for job in jobs if not job[0].heals], [job for job in jobs if job[0].heals]):
            for found in pool.map(run_job, stage):
                print(
                    f"{found['row']} seed {found['seed']}: loss {found['loss']:.4f}, {found['active']:.2f} experts, "
                    f"{found['cpu_seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()

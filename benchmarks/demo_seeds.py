"""The demo over several seeds: `python benchmarks/demo_seeds.py --output seeds --seeds 0,1,2` (or `make seeds`).

Every seed has its own source weights, order of the text and samples; the text and the tokenizer are the same. Writes
benchmarks/results/demo_seeds.json, a row for each model and seed, and demo_seeds.md: means and standard deviations.
"""

import math
from pathlib import Path

import datasets
import transformers
from tables import RESULTS, mean_of, numbers, parser_of, plus_minus, show, table, write_results

from tiedmoe_demo import DemoConfig, run_demo

MODELS = ("source", "tied", "healed", "control")
FIGURES = ("parameters", "expert_parameters", "checkpoint_bytes", "peak_training_memory_bytes", "perplexity")


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", default="seeds", help="folder for one demo per seed; what is there is reused")
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the summary")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    reports = {seed: run_demo(DemoConfig(f"{options.output}/{seed}", seed=seed), show) for seed in options.seeds}
    found = [(name, seed, report[name]) for name in MODELS for seed, report in reports.items()]
    rows = [{"model": name, "seed": seed} | {figure: each[figure] for figure in FIGURES} for name, seed, each in found]
    first = reports[options.seeds[0]]
    shared = {"settings": {name: value for name, value in first["settings"].items() if name != "seed"}}
    counts = {name: each and {k: each[k] for k in ("steps", "tokens")} for name, each in first["training"].items()}
    shared |= {"training": counts, "versions": first["versions"], "machine": first["machine"]}
    write_results(options.results / "demo_seeds", {"rows": rows, **shared}, markdown(rows))


def markdown(rows: list[dict]) -> str:
    def of(model: str, figure: str) -> dict:
        return mean_of([row[figure] for row in rows if row["model"] == model])

    columns = ["", "parameters", "in experts", "weights on disk, MB", "memory to train, MB", "held-out perplexity"]
    cells = []
    for model in MODELS:
        *counts, disk, memory = (of(model, figure)["mean"] for figure in FIGURES[:-1])
        sizes = [*(f"{count:,.0f}" for count in counts), f"{disk / 1e6:.1f}", f"{memory / 1e6:.0f}"]
        cells.append([model, *sizes, plus_minus(of(model, "perplexity"), 2)])
    perplexities = (of(model, "perplexity")["values"] for model in ("healed", "control"))
    above = plus_minus(mean_of([math.log(healed / control) for healed, control in zip(*perplexities)]), 3)
    seeds = ", ".join(str(row["seed"]) for row in rows if row["model"] == MODELS[0])
    head = [f"Seeds {seeds}; mean ± sample standard deviation (`make seeds`).", ""]
    last = ["", f"Loss of the healed model above the control's: {above} nats per token.", ""]
    return "\n".join([*head, *table(columns, cells), *last])


if __name__ == "__main__":
    main()

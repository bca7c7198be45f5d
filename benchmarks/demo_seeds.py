"""The demo over several seeds: `python benchmarks/demo_seeds.py --output seeds --seeds 0,1,2` (or `make seeds`).

Every seed has its own source weights, order of the text and samples; the text and the tokenizer are the same. Writes
benchmarks/results/demo_seeds.json and demo_seeds.md: each seed's figures, their mean and their sample standard deviation.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import datasets
import transformers

from tiedmoe_demo import DemoConfig, run_demo

RESULTS = Path(__file__).parent / "results"
MODELS = ("source", "tied", "healed", "control")
FIGURES = ("parameters", "expert_parameters", "checkpoint_bytes", "peak_training_memory_bytes", "perplexity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="seeds", help="folder for one demo per seed; what is there is reused")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the summary")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    reports = {seed: run_demo(DemoConfig(output=f"{arguments.output}/{seed}", seed=seed), show) for seed in seeds}
    summary = summarize(reports)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "demo_seeds.json").write_text(json.dumps(summary, indent=2) + "\n")
    (arguments.results / "demo_seeds.md").write_text(markdown(summary))
    print(markdown(summary))


def show(done: int, total: int, what: str) -> None:
    if done == total or done % max(1, total // 5) == 0:
        print(f"{what} ({done}/{total})", file=sys.stderr, flush=True)


def summarize(reports: dict[int, dict]) -> dict:
    """Per model and figure the values by seed, their mean and sample standard deviation (None for one seed)."""
    first = next(iter(reports.values()))
    summary = {
        name: {figure: spread([report[name][figure] for report in reports.values()]) for figure in FIGURES}
        for name in MODELS
    }
    return {
        **summary,
        "healed minus control, nats per token": spread(
            [report["healed"]["loss"] - report["control"]["loss"] for report in reports.values()]
        ),
        "seeds": list(reports),
        "training": {
            name: each and {k: each[k] for k in ("steps", "tokens")} for name, each in first["training"].items()
        },
        "settings": {name: value for name, value in first["settings"].items() if name != "seed"},
        "versions": first["versions"],
        "machine": first["machine"],
    }


def spread(values: list[float]) -> dict:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "values": values}


def markdown(summary: dict) -> str:
    lines = [
        f"Seeds {', '.join(map(str, summary['seeds']))}; mean ± sample standard deviation (`make seeds`).",
        "",
        "| | parameters | in experts | weights on disk, MB | memory to train, MB | held-out perplexity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in MODELS:
        figures = summary[name]
        cells = [
            f"{figures['parameters']['mean']:,.0f}",
            f"{figures['expert_parameters']['mean']:,.0f}",
            f"{figures['checkpoint_bytes']['mean'] / 1e6:.1f}",
            f"{figures['peak_training_memory_bytes']['mean'] / 1e6:.0f}",
            plus_minus(figures["perplexity"], 2),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    difference = plus_minus(summary["healed minus control, nats per token"], 3)
    return "\n".join([*lines, "", f"Loss of the healed model above the control's: {difference} nats per token.", ""])


def plus_minus(figure: dict, digits: int) -> str:
    if figure["standard_deviation"] is None:
        return f"{figure['mean']:.{digits}f}"
    return f"{figure['mean']:.{digits}f} ± {figure['standard_deviation']:.{digits}f}"


if __name__ == "__main__":
    main()

"""A trained top-k model made soft and healed, against its own top-k healed alike: a first trial, not the study.

python benchmarks/soft_routing.py demo/source --work soft-trial --seeds 0,1,2

The source is the demo's (two experts of 16 active in each of 12 layers; `make demo`). Each row is healed with the
source as teacher; a seed decides the order of its text. Experts used are means over the held-out text and the layers.
Writes benchmarks/results/soft_routing.json and .md.
"""

import argparse
import json
import shutil
from pathlib import Path

import transformers
from tables import mean_of, plus_minus, table, write_json

import transformers_tiedmoe
from tiedmoe_conversion import ConversionRecipe, convert
from transformers_tiedmoe.training.heal import HealConfig, heal

RESULTS = Path(__file__).parent / "results"
TEXT = Path(transformers_tiedmoe.__file__).parent / "data" / "austen.txt.xz"
# By row: the family's own top-k of so many, or what soft routing is healed towards, experts and mass per layer.
ROWS = {
    "top-k, k=2": {"top_k": 2},
    "top-k, k=1": {"top_k": 1},
    "soft, learned": {"active": 1.5, "mass": 1.25},
    "soft, the same for each layer": {"active": 1.5, "mass": 1.25, "learn_budget": False},
    "soft, learned, as many": {"active": 2.0, "mass": 1.5},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="an untied checkpoint")
    parser.add_argument("--work", type=Path, default=Path("soft-trial"), help="folder for the models")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--data", default=str(TEXT))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    soft = options.work / "soft"
    if not soft.exists():
        recipe = ConversionRecipe(options.source, str(soft), group_size=1, method="union", routing="softmoe")
        convert(recipe)
    rows = []
    for name, wanted in ROWS.items():
        model = start_of(name, wanted, options.source, soft, options.work)
        rows += [row_of(name, model, int(seed), options) for seed in options.seeds.split(",")]
        write_json(options.results / "soft_routing.json", {"steps": options.steps, "rows": rows})
    (options.results / "soft_routing.md").write_text(markdown(rows))
    print(markdown(rows))


def start_of(name: str, wanted: dict, source: str, soft: Path, work: Path) -> Path:
    """Copy the checkpoint that a row starts from, with its routing in config.json."""
    folder = work / "".join(c if c.isalnum() else "-" for c in name)
    if not folder.exists():
        shutil.copytree(source if "top_k" in wanted else soft, folder)
        (folder / "tiedmoe_conversion.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if "top_k" in wanted:
        config["num_experts_per_tok"] = wanted["top_k"]
    else:
        num_layers = config["num_hidden_layers"]
        config["softmoe"] |= {
            "target_active": wanted["active"] * num_layers,
            "target_budget": wanted["mass"] * num_layers,
            "learn_budget": wanted.get("learn_budget", True),
        }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def row_of(name: str, model: Path, seed: int, options: argparse.Namespace) -> dict:
    """Heal once; return the held-out perplexity before and after, and what tokens use."""
    report = heal(
        HealConfig(
            str(model), options.data, f"{model}-healed-{seed}", teacher=options.source, seed=seed,
            max_steps=options.steps, batch_size=8, block_size=options.block_size, learning_rate=5e-4,
            save_steps=options.steps, disable_tqdm=True, logging_strategy="no",
        )
    )  # fmt: skip
    layers = report.get("active_experts") or []
    top_k = ROWS[name].get("top_k")
    return {
        "row": name,
        "seed": seed,
        "before": report["before"]["perplexity"],
        "after": report["after"]["perplexity"],
        "experts_used": top_k or sum(each["mean"] for each in layers) / len(layers),
        "used_by_layer": [round(each["mean"], 3) for each in layers],
        "mass_by_layer": [round(each["k"], 3) for each in layers],
        "seconds": report["seconds"],
    }


def markdown(rows: list[dict]) -> str:
    figures = ("experts_used", "before", "after", "seconds")
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = [row for row in rows if row["row"] == name]
        lines.append([name, *(plus_minus(mean_of([row[figure] for row in own]), 2) for figure in figures)])
    columns = ["", "experts used", "perplexity before", "perplexity healed", "seconds"]
    text = ["# Soft routing: a first trial", "", __doc__.split("\n\n")[2].strip(), "", *table(columns, lines)]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()

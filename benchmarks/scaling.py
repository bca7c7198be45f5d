"""The table of docs/scaling.md: memory of each GPU and bytes sent in a step, computed by `tiedmoe plan --gpus`.

    python benchmarks/scaling.py --write docs/scaling.md

Nothing is measured. Sizes are the published ones, named beside each; layers are tied as in the paper, two at either
end untied. `--models olmoe` takes some alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tables import table, write_json
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.audit import units
from transformers_tiedmoe.audit.scaling import predict

GPUS = (1, 8, 64, 512)
GROUP_SIZES = (1, 2, 4)
RESULTS = Path(__file__).parent / "results" / "scaling.json"
BEGIN, END = "<!-- benchmarks/scaling.py -->", "<!-- end -->"


def published() -> dict[str, tuple[str, str, PreTrainedConfig]]:
    """Return by family the model, where its sizes are published, and its config."""
    return {
        "olmoe": ("OLMoE-1B-7B", "arXiv 2409.02060, table 10", OlmoeConfig(intermediate_size=1024)),
        "mixtral": ("Mixtral-8x7B", "arXiv 2401.04088, table 1", MixtralConfig()),
        "qwen3_moe": (
            "Qwen3-235B-A22B",
            "arXiv 2505.09388, table 2, and the model's config.json",
            Qwen3MoeConfig(
                hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
                num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, intermediate_size=12288,
                vocab_size=151936,
            ),
        ),
        "deepseek_v3": ("DeepSeek-V3", "arXiv 2412.19437, section 4.2", DeepseekV3Config()),
    }  # fmt: skip


def rows_of(family: str) -> list[dict[str, Any]]:
    """Predict a model at every group size and number of GPUs."""
    name, _, source = published()[family]
    found = []
    for group_size in GROUP_SIZES:
        config = source if group_size == 1 else TiedMoeConfig.from_family(source, group_size=group_size)
        found += [{"model": name, "group_size": group_size, **row} for row in predict(config, GPUS)]
    return found


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Write a table for each model: a line for each g and number of GPUs, DDP left out."""
    lines: list[str] = []
    for name, where, _ in published().values():
        by = {(row["group_size"], row["num_gpus"], row["name"]): row for row in rows if row["model"] == name}
        if not by:
            continue
        cells = []
        for group_size in GROUP_SIZES:
            for number in GPUS:
                kinds = ("one GPU", "") if number == 1 else ("FSDP2", "FSDP2 + EP 8")
                pairs = [by.get((group_size, number, kind)) for kind in kinds]
                sizes = [
                    text
                    for row in pairs
                    for text in (
                        ("", "")
                        if row is None
                        else (
                            f"{units.size(row['total_bytes'])} ({row['gpu'] or 'none'})",
                            units.size(row["communicated_bytes"]) if number > 1 else "–",
                        )
                    )
                ]
                cells.append([group_size, number, *sizes])
        head = ["g", "GPUs", "FSDP2: each GPU (fits)", "sent", "with EP 8: each GPU (fits)", "sent"]
        lines += [f"**{name}** ({where})", "", *table(head, cells), ""]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Compute the rows, write them, and put the tables between their marks in a page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(published()))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="the page; by default the tables are printed")
    given = parser.parse_args(arguments)
    wanted = given.models.split(",")
    names = {published()[family][0] for family in wanted}
    kept = json.loads(given.results.read_text()) if given.results.exists() else []
    rows = [row for row in kept if row["model"] not in names] + [row for family in wanted for row in rows_of(family)]
    write_json(given.results, rows)
    text = "\n".join(markdown(rows)).rstrip()
    if given.write is None:
        print(text)
        return
    page = given.write.read_text(encoding="utf-8")
    before, rest = page.split(f"{BEGIN}\n")
    given.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()

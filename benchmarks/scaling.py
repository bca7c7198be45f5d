"""The table of docs/scaling.md: memory of each GPU and bytes sent in a step, computed by `tiedmoe plan --gpus`.

    python benchmarks/scaling.py --write docs/scaling.md

Nothing is measured. Sizes are the published ones, named beside each; layers are tied as in the paper, two at either
end untied.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import RESULTS as FOLDER
from tables import parser_of, table, write_json
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.audit import units
from transformers_tiedmoe.audit.scaling import predict

GPUS = (1, 8, 64, 512)
GROUP_SIZES = (1, 2, 4)
RESULTS = FOLDER / "scaling.json"
BEGIN, END = "<!-- benchmarks/scaling.py -->", "<!-- end -->"


MODELS = (  # and where their sizes are published
    ("OLMoE-1B-7B", "arXiv 2409.02060, table 10", OlmoeConfig(intermediate_size=1024)),
    ("Mixtral-8x7B", "arXiv 2401.04088, table 1", MixtralConfig()),
    (
        "Qwen3-235B-A22B",
        "arXiv 2505.09388, table 2, and the model's config.json",
        Qwen3MoeConfig(
            hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, intermediate_size=12288,
            vocab_size=151936,
        ),
    ),
    ("DeepSeek-V3", "arXiv 2412.19437, section 4.2", DeepseekV3Config()),
)  # fmt: skip


def predicted() -> Iterator[dict[str, Any]]:
    """Predict every model at every group size and number of GPUs."""
    for (name, _, source), group_size in itertools.product(MODELS, GROUP_SIZES):
        config = source if group_size == 1 else TiedMoeConfig.from_family(source, group_size=group_size)
        for row in predict(config, GPUS):
            yield {"model": name, "group_size": group_size, **row}


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Write a table for each model: a line for each g and number of GPUs, DDP left out."""
    head = ["g", "GPUs", "FSDP2: each GPU (fits)", "sent", "with EP 8: each GPU (fits)", "sent"]
    lines: list[str] = []
    for name, where, _ in MODELS:
        by = {(row["group_size"], row["num_gpus"], row["name"]): row for row in rows if row["model"] == name}
        cells = []
        for group_size, number in itertools.product(GROUP_SIZES, GPUS):
            kinds = ("one GPU", "") if number == 1 else ("FSDP2", "FSDP2 + EP 8")
            pairs = [size_and_sent(by.get((group_size, number, kind))) for kind in kinds]
            cells.append([group_size, number, *itertools.chain(*pairs)])
        lines += [f"**{name}** ({where})", "", *table(head, cells), ""]
    return lines


def size_and_sent(row: dict[str, Any] | None) -> tuple[str, str]:
    """Return a row's memory with the GPU that has it, and what is sent; nothing for None."""
    if row is None:
        return "", ""
    sent = units.size(row["communicated_bytes"]) if row["num_gpus"] > 1 else "–"
    return f"{units.size(row['total_bytes'])} ({row['gpu'] or 'none'})", sent


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--write", type=Path, required=True, help="the page")
    given = parser.parse_args(arguments)
    rows = list(predicted())
    write_json(RESULTS, rows)
    text = "\n".join(markdown(rows)).rstrip()
    before, rest = given.write.read_text(encoding="utf-8").split(f"{BEGIN}\n")
    given.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A conversion against `cp`, at any size: `python benchmarks/conversion_scale.py FOLDER --gigabytes 20`.

Writes a source of Mixtral 8x7B's shape, one tensor per expert, into FOLDER, which needs room for it twice. Then, for
each method, in pairs, as all depends on what else the disk does: `cp` of its files plus fsync, and a conversion in a
process of its own. The limits are those of the project: twice the seconds of `cp`, and 1.5 times one group's experts
plus 1 GB of memory.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tables import RESULTS, parser_of, table, write_results
from timing import about, in_own_process, resident_bytes
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tiedmoe_conversion import ConversionRecipe, execute, make_plan
from transformers_tiedmoe.files import flush

METHODS = ("union", "select", "average")
GROUP_SIZE = 2
EXPERTS, HIDDEN, WIDTH, VOCAB = 8, 4096, 14336, 32000
SHARD_BYTES = 1_000_000_000


def write_source(folder: Path, gigabytes: float) -> int:
    """Write a Mixtral of as many layers as fit into `gigabytes`; returns their number."""
    layer_bytes = 2 * (3 * EXPERTS * HIDDEN * WIDTH + 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4)
    num_layers = max(round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / layer_bytes), GROUP_SIZE)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERTS}
    sizes |= {"num_hidden_layers": num_layers, "architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"}
    config = MixtralConfig(**sizes)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    tensors = revert_weight_conversion(model, model.state_dict())  # a tensor for each expert, as released
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    # Random bits once, and another window of them for each tensor: drawing 20 GB would take longer than all else.
    torch.manual_seed(0)
    bits = (torch.randn(max(tensor.numel() for tensor in tensors.values()) + 1_000_003) * 0.02).to(torch.bfloat16)
    starts = {name: number * 7919 % 1_000_003 for number, name in enumerate(tensors)}
    for file, names in split.filename_to_tensors.items():
        windows = {name: bits[starts[name] :][: tensors[name].numel()] for name in names}
        written = {name: window.clone().reshape(tensors[name].shape) for name, window in windows.items()}
        save_file(written, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_layers


def copy_seconds(source: Path, target: Path) -> float:
    """Time `cp` of all files, and having them on the disk, in seconds."""
    target.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, sorted(source.iterdir())), str(target)], check=True)
    for path in [*target.iterdir(), target]:
        flush(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(recipe: dict) -> dict:
    """Convert in this process, a fresh one, and return its seconds and bytes."""
    imports, start = resident_bytes("VmHWM"), time.perf_counter()
    report = execute(make_plan(ConversionRecipe(**recipe)))
    seconds, peak = time.perf_counter() - start, resident_bytes("VmHWM")
    found = {"convert_seconds": seconds, "imports_bytes": imports, "peak_bytes": peak}
    return found | {"planned_bytes": report["peak_memory_bytes"], "bytes_after": report["bytes_after"]}


def run(folder: Path, gigabytes: float, pairs: int, methods: list[str]) -> dict:
    source, group_bytes, rows = folder / "source", GROUP_SIZE * 2 * 3 * EXPERTS * HIDDEN * WIDTH, []
    num_layers = write_source(source, gigabytes)
    sizes = {path.name: path.stat().st_size for path in source.iterdir()}
    tying = {"group_size": GROUP_SIZE, "skip_first": 0, "skip_last": num_layers % GROUP_SIZE}
    recipe = {"source": str(source), "output": str(folder / "out"), **tying}
    for pair, method in itertools.product(range(pairs), methods):
        os.sync()
        copied = copy_seconds(source, folder / "copy")
        os.sync()
        converted = in_own_process(convert, recipe | {"method": method})
        shutil.rmtree(folder / "out")
        row = {"method": method, "pair": pair, "cp_seconds": copied, "ratio": converted["convert_seconds"] / copied}
        rows.append(row | converted | {"limit_bytes": int(1.5 * group_bytes + 1e9)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    shutil.rmtree(source)
    written = {"bytes": sum(sizes.values()), "layers": num_layers, "group_bytes": group_bytes}
    written["shards"] = sum(name.endswith(".safetensors") for name in sizes)
    return {**about(), "source": written, "rows": rows}


def markdown(result: dict) -> str:
    source, rows, where = result["source"], result["rows"], result["machine"] | result["versions"]
    columns = ["method", "cp (s)", "convert (s)", "ratio", "limit", "peak RSS (GB)", "limit (GB)", "written (GB)"]
    line = "`{method}`|{cp_seconds:.1f}|{convert_seconds:.1f}|{ratio:.2f}|2|{peak:.2f}|{limit:.2f}|{written:.1f}"
    cells, ratios = [], {}
    for row in rows:
        sizes = {name: row[f"{name}_bytes"] / 1e9 for name in ("peak", "limit")}
        cells.append(line.format(**row, **sizes, written=row["bytes_after"] / 1e9).split("|"))
        ratios.setdefault(row["method"], []).append(row["ratio"])
    medians = [
        f"- `{method}`: {statistics.median(own):.2f} times the seconds of `cp`, the median of {len(own)}"
        for method, own in ratios.items()
    ]
    text = (
        f"Mixtral 8x7B's shape with {source['layers']} layers, {source['bytes'] / 1e9:.1f} GB in some "
        f"{source['shards']} shards, one tensor per expert; a group's experts are {source['group_bytes'] / 1e9:.2f} "
        "GB. `cp` includes fsync, `convert` hashes and verification. One line is a pair, run one after the other."
    )
    last = f"{', '.join(f'{name} {value}' for name, value in where.items())}. {result['note']}".strip()
    head = ["# Converting a large checkpoint, against copying it", "", text, ""]
    return "\n".join([*head, *table(columns, cells), "", *medians, "", last, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="an empty or new folder on the disk to measure; emptied afterwards")
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--note", default="", help="what else there is to say, such as what else ran on the machine")
    parser.add_argument("--output", type=Path, default=RESULTS / "conversion_scale")
    options = parser.parse_args(arguments)
    result = run(options.folder, options.gigabytes, options.pairs, options.methods.split(","))
    result["note"] = options.note
    write_results(options.output, result, markdown(result))


if __name__ == "__main__":
    main()

"""Our reading of safetensors against safetensors' own and huggingface_hub's: `python benchmarks/reading.py FOLDER`.

Leaves 2 GB in FOLDER, in shards: 20,000 small tensors and a fused one of 64 experts. Each reader does each task in a
process of its own, in turn, and tells its seconds of CPU time and by how much its greatest resident memory grew: the
medians of five rounds, with the files in the system's cache. What is read is hashed, as a memory map reads nothing
before. Then, which crafted headers each reader opens.
"""

import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import xxhash
from huggingface_hub import get_local_safetensors_metadata, save_torch_state_dict
from safetensors import safe_open
from timing import in_own_process, resident_bytes

from tiedmoe_conversion.checkpoint.reader import open_source

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = json.dumps({"a": A})
CRAFTED = {
    "sound": {"a": A}, "overlap": {"a": A, "b": A}, "gap": {"a": A | {"shape": [1], "data_offsets": [4, 8]}},
    "a name twice": f"{ONE[:-1]}, {ONE[1:]}".encode(), "shape of other bytes": {"a": A | {"shape": [3]}},
    "dtype F5": {"a": A | {"dtype": "F5"}}, "negative": {"a": A | {"shape": [-2]}},
    "2^124 values": {"a": A | {"shape": [2**62, 2**62]}}, "65 dimensions": {"a": A | {"shape": [1] * 64 + [2]}},
    "file too short": {"a": A | {"shape": [4], "data_offsets": [0, 16]}},
    "file too long": {"a": A | {"shape": [1], "data_offsets": [0, 4]}},
}  # fmt: skip


class Safetensors:
    """Every file stays open, as a conversion reads from all of them in turn."""

    def __init__(self, folder: str):
        self.tensors = {}
        for file in [safe_open(path, "pt") for path in sorted(Path(folder).glob("*.safetensors"))]:
            slices = {name: file.get_slice(name) for name in file.keys()}
            self.tensors |= {name: (file, each.get_dtype(), each.get_shape()) for name, each in slices.items()}

    def read(self, name: str, *rows: int) -> torch.Tensor:
        file = self.tensors[name][0]
        return file.get_slice(name)[slice(*rows)] if rows else file.get_tensor(name)


READERS = {"ours": open_source, "safe_open": Safetensors, "huggingface_hub": get_local_safetensors_metadata}
NAMES, EXPERTS = [f"t{i}" for i in range(20_000)], (64, 1024, 1024)
TASKS = {"open": [], "every tensor": [[n] for n in NAMES], "experts": [["experts", i, i + 1] for i in range(64)]}


def measure(folder: str, reader: str, task: str) -> tuple[float, float]:
    """Return a task's seconds, in which opening counts for "open" alone, and the MB by which the memory grew."""
    before, start = resident_bytes("VmHWM"), time.process_time()
    opened = READERS[reader](folder)
    start = start if task == "open" else time.process_time()
    for rows in TASKS[task]:
        xxhash.xxh3_64(opened.read(*rows).view(torch.uint8).numpy())
    seconds = time.process_time() - start
    return seconds, (resident_bytes("VmHWM") - before) / 1e6


def main(folder: str) -> None:
    """Measure every reader in turn and print the medians, then say what each makes of crafted headers."""
    tensors = {name: torch.full((256, 181), i).bfloat16() for i, name in enumerate(NAMES)}
    save_torch_state_dict(tensors | {"experts": torch.ones(EXPERTS)}, folder, max_shard_size="500MB")
    found = {(r, t): [] for t in TASKS for r in READERS if t == "open" or r != "huggingface_hub"}
    for run in [*found] * 5:
        found[run].append(in_own_process(measure, folder, *run))
    for (reader, task), results in found.items():
        print(f"{task:14} {reader:16}", "{:7.3f} s {:7.1f} MB".format(*map(statistics.median, zip(*results))))
    for (name, header), reader in itertools.product(CRAFTED.items(), READERS):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        with tempfile.TemporaryDirectory() as place, contextlib.suppress(Exception):
            Path(place, "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
            READERS[reader](place)
            print(f"{reader} opens a header with: {name}")


if __name__ == "__main__":
    main(sys.argv[1])

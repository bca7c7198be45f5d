"""Decoding a model whose weights lie on disk: bytes read and tokens a second, untied, tied, and tied with pools kept.

    python benchmarks/offload.py --tokens 4 --rounds 3 --cold

OLMoE's 16 layers at a small width, random weights, one sequence, executed on the CPU (or on the GPU, where there is
one) by accelerate's offload; tied at g=4, two layers at either end untied. Every weight that is fetched is copied, as
onto a GPU: a CPU would map the file and read the experts in use. `--cold` drops the files from the page cache before
every token, so that the disk is read; without it "disk" is the page cache.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import OffloadedWeightsLoader
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.utils import logging

from transformers_tiedmoe import TiedMoeConfig, keep_pools_loaded

BYTES = {"read": 0}
CASES = ("untied", "tied, accelerate alone", "tied", "tied, prefetch")


def counted(read):
    """Wrap accelerate's reading of a weight to add up bytes."""

    def getitem(self, name):
        weight = read(self, name).clone()
        BYTES["read"] += weight.nbytes
        return weight

    return getitem


def load(case: str, folder: Path):
    """Load a case's model with everything on disk."""
    path = folder / ("untied" if case == "untied" else "tied")
    model = AutoModelForCausalLM.from_pretrained(
        path, device_map={"": "disk"}, offload_folder=folder / "offload", dtype=torch.float32
    )
    if case == "tied, accelerate alone":
        for pool in model.expert_pools:
            pool._hf_hook = pool._hf_hook.hook
    elif case == "tied, prefetch":
        keep_pools_loaded(model, prefetch=True)
    return model


def forget(folder: Path) -> None:
    """Drop the weight files from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def decode(model, num_tokens: int, folder: Path | None) -> tuple[float, float]:
    """Return seconds and bytes read of a token, after a prompt of 16."""
    tokens, cache, seconds, read = torch.arange(3, 19)[None], None, 0.0, 0
    for i in range(num_tokens + 1):  # the first pass is over the prompt
        if folder is not None:
            forget(folder)
        BYTES["read"], start = 0, time.perf_counter()
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        if i:
            seconds, read = seconds + time.perf_counter() - start, read + BYTES["read"]
    return seconds / num_tokens, read / num_tokens


def main(arguments: list[str] | None = None) -> list[dict]:
    """Print a row per case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--num-experts", type=int, default=32)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    source = OlmoeConfig(
        hidden_size=given.hidden_size, intermediate_size=given.hidden_size, num_hidden_layers=16,
        num_attention_heads=4, num_experts=given.num_experts, num_experts_per_tok=4, vocab_size=4096,
    )  # fmt: skip
    tied = TiedMoeConfig.from_family(source, group_size=4, skip_first=2, skip_last=2)
    with tempfile.TemporaryDirectory() as name, patch.object(
        OffloadedWeightsLoader, "__getitem__", counted(OffloadedWeightsLoader.__getitem__)
    ):  # fmt: skip
        folder = Path(name)
        for path, config in (("untied", source), ("tied", tied)):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / path, save_original_format=False)
            gc.collect()
        models = {case: load(case, folder) for case in CASES}
        times: dict[str, list[float]] = {case: [] for case in CASES}
        read = {}
        for turn in range(given.rounds + 1):  # the first one warms up; cases in turn, each round from the other end
            for case in CASES[:: 1 if turn % 2 else -1]:
                seconds, read[case] = decode(models[case], given.tokens, folder if given.cold else None)
                times[case] += [seconds] if turn else []
        rows = [
            {"case": case, "mb_per_token": round(read[case] / 1e6, 1),
             "tokens_per_s": round(1 / statistics.median(times[case]), 3),
             "all": [round(1 / seconds, 3) for seconds in times[case]]}
            for case in CASES
        ]  # fmt: skip
    for row in rows:
        print(json.dumps(row))
    return rows


if __name__ == "__main__":
    main()

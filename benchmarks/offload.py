"""Decoding a model whose weights lie on disk: bytes read and tokens a second, untied, tied, and tied with pools kept.

    python benchmarks/offload.py --tokens 2 --rounds 4 --hidden-size 256

OLMoE's 16 layers at a small width, random weights, one sequence, executed on the CPU (or on the GPU, where there is
one) by accelerate's offload; tied at g=4, two layers at either end untied. Every weight that is fetched is copied, as
onto a GPU: a CPU would map the file and read the experts in use. The files are in the system's cache.
"""

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import OffloadedWeightsLoader
from tables import parser_of
from timing import in_rounds
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.utils import logging

from transformers_tiedmoe import TiedMoeConfig, keep_pools_loaded

READ = OffloadedWeightsLoader.__getitem__
BYTES = {"read": 0}
CASES = ("untied", "tied, accelerate alone", "tied", "tied, prefetch")


def read_counted(self, name: str) -> torch.Tensor:
    """Read a weight as accelerate does, copy it, and add up bytes."""
    weight = READ(self, name).clone()
    BYTES["read"] += weight.nbytes
    return weight


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


@torch.no_grad()
def decode(model, num_tokens: int) -> tuple[float, float]:
    """Return seconds and bytes read of a token, after a prompt of 16."""
    tokens, cache, seconds, read = torch.arange(3, 19)[None], None, 0.0, 0
    for i in range(num_tokens + 1):  # the first pass is over the prompt
        BYTES["read"], start = 0, time.perf_counter()
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        if i:
            seconds, read = seconds + time.perf_counter() - start, read + BYTES["read"]
    return seconds / num_tokens, read / num_tokens


def main() -> None:
    """Print a row per case."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=384)
    given = parser.parse_args()
    logging.disable_progress_bar()
    source = OlmoeConfig(
        hidden_size=given.hidden_size, intermediate_size=given.hidden_size, num_hidden_layers=16,
        num_attention_heads=4, num_experts=32, num_experts_per_tok=4, vocab_size=4096,
    )  # fmt: skip
    tied, read = TiedMoeConfig.from_family(source, group_size=4, skip_first=2, skip_last=2), {}
    with (
        tempfile.TemporaryDirectory() as name,
        patch.object(OffloadedWeightsLoader, "__getitem__", read_counted),
    ):
        folder = Path(name)
        for path, config in (("untied", source), ("tied", tied)):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / path, save_original_format=False)
            gc.collect()

        def decoding(case: str):
            model = load(case, folder)

            def timed(number: int) -> float:
                seconds, read[case] = decode(model, given.tokens)
                return seconds

            return timed

        times = in_rounds({case: decoding(case) for case in CASES}, given.rounds)
    for case, own in times.items():
        rates = {"tokens_per_s": round(1 / statistics.median(own), 3), "all": [round(1 / each, 3) for each in own]}
        print(json.dumps({"case": case, "mb_per_token": round(read[case] / 1e6, 1)} | rates))


if __name__ == "__main__":
    main()

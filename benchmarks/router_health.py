"""What `RouterHealth` costs: CPU time of training steps with and without it, in pairs, at the demo's sizes.

    python benchmarks/router_health.py --pairs 6 --steps 30

Every step is recorded here; `tiedmoe heal` records those that are logged, by default a fiftieth of all.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import source_config
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training.router_health import RouterHealth


class Vocabulary:
    """What the source's config takes from the demo's tokenizer."""

    pad_token_id = bos_token_id = eos_token_id = 0

    def __len__(self) -> int:
        return DemoConfig().vocab_size


def train(config: TiedMoeConfig, steps: int, has_health: bool) -> float:
    """Train a new model for some steps; return their CPU time in seconds."""
    torch.manual_seed(0)
    settings = DemoConfig()
    ids = torch.randint(1, settings.vocab_size, (settings.batch_size * steps, settings.block_size)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=settings.batch_size, logging_steps=1, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(TiedMoeForCausalLM(config), arguments, train_dataset=data)
        trainer.callback_handler.callbacks = [each for each in trainer.callback_handler.callbacks
                                              if type(each).__name__ != "PrinterCallback"]  # fmt: skip
        if has_health:
            RouterHealth().attach(trainer)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def main() -> None:
    """Print the overhead of a recorded step, over the pairs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    family = source_config(DemoConfig(), Vocabulary())
    config = TiedMoeConfig.from_family(family, group_size=4, skip_first=2, skip_last=2)
    train(config, 3, True)  # imports, first calls
    overheads, seconds = [], []
    for pair in range(given.pairs):
        order = (False, True) if pair % 2 else (True, False)
        times = {has_health: train(config, given.steps, has_health) for has_health in order}
        overheads.append(times[True] / times[False] - 1)
        seconds.append(times[False] / given.steps)
    print(json.dumps({
        "cpu_seconds_of_a_step": round(statistics.median(seconds), 4),
        "overhead_of_a_recorded_step": round(statistics.median(overheads), 4),
        "pairs": [round(each, 4) for each in overheads],
    }))  # fmt: skip


if __name__ == "__main__":
    main()

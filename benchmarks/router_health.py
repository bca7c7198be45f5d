"""What `RouterHealth` costs: CPU time of training steps with and without it, in pairs, at the demo's sizes.

    python benchmarks/router_health.py --pairs 6 --steps 30

Every step is recorded here; `tiedmoe heal` records those that are logged, by default a fiftieth of all.
"""

import json
import tempfile
import time

import torch
from tables import parser_of
from timing import interleave, paired_ratio, spread
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import source_config, train_tokenizer
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training.data import load_blocks
from transformers_tiedmoe.training.router_health import RouterHealth

SETTINGS = DemoConfig()


def train(config: TiedMoeConfig, blocks, steps: int, has_health: bool) -> float:
    """Train a new model for some steps; return their CPU time in seconds."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=SETTINGS.batch_size, logging_steps=1, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(TiedMoeForCausalLM(config), arguments, default_data_collator, blocks)
        trainer.remove_callback(PrinterCallback)
        if has_health:
            RouterHealth().attach(trainer)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start


def main() -> None:
    """Print the overhead of a recorded step, over the pairs."""
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    tokenizer = train_tokenizer(SETTINGS.text, SETTINGS.vocab_size)
    blocks, _ = load_blocks(SETTINGS.text, tokenizer, SETTINGS.block_size)
    config = TiedMoeConfig.from_family(source_config(SETTINGS, tokenizer), group_size=4, skip_first=2, skip_last=2)
    train(config, blocks, 3, True)  # imports, first calls
    trained = {has_health: lambda _, has=has_health: train(config, blocks, given.steps, has) for has_health in (0, 1)}
    times = interleave(trained, seconds=0, least=given.pairs, most=given.pairs)
    print(json.dumps({
        "cpu_seconds_of_a_step": round(spread(times[0])["median"] / given.steps, 4),
        "time_over_that_without": paired_ratio(times[1], times[0]),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

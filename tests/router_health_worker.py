"""Train a tiny tied model with RouterHealth, in as many processes as were launched; write the logs of the first.

`python router_health_worker.py FOLDER BATCH_SIZE`, or under torchrun.
"""

import json
import sys
from pathlib import Path

import torch
from checkpoints import TINY
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.training.router_health import RouterHealth


def tiny_model():
    """Layers 1 and 2 of four read pool 0."""
    torch.manual_seed(0)
    config = TiedMoeConfig(**{"family": "olmoe", "group_size": 2, "skip_first": 1, "skip_last": 1} | TINY)
    return TiedMoeForCausalLM(config).eval()


def rows(num=16, length=16):
    """Random tokens."""
    ids = torch.randint(1, 32, (num, length), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder, **fields):
    """Trainer's, for a few steps on a CPU, in the order of the data."""
    given = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
             "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
             "train_sampling_strategy": "sequential"}  # fmt: skip
    return TrainingArguments(str(folder), **given | fields)


if __name__ == "__main__":
    options = arguments(sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), max_steps=2, logging_steps=1)
    trainer = Trainer(tiny_model(), options, train_dataset=rows())
    RouterHealth().attach(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        Path(sys.argv[1], "logs.json").write_text(json.dumps(logs))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

"""Run by fsdp2_worker.py, in two processes under accelerate's FSDP2: healing, killed and continued; states.

And by test_distributed.py: what one process does with those states.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, load_fsdp_model, load_fsdp_optimizer
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from transformers_tiedmoe.training.checkpoints import RecordCheckpoints
from transformers_tiedmoe.training.heal import HealConfig, _Run, heal
from transformers_tiedmoe.training.outcome import Diverged

OPTIONS = {"max_steps": 4, "save_steps": 2, "block_size": 16, "batch_size": 2, "learning_rate": 1e-2}
OPTIONS |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "fused_loss": True}
OPTIONS |= {"logging_steps": 1}


FOLDERS = {"model": "pytorch_model_fsdp_0", "optimizer": "optimizer_0"}
EXAMPLE = Path(__file__).parents[1] / "examples/heal_accelerate.py"
EXAMPLE_OPTIONS = ["--max-steps", "4", "--block-size", "16", "--batch-size", "2", "--learning-rate", "1e-2"]


KINDS = {"": {}, "lora-": {"lora": True, "lora_rank": 2}}  # of healing, by the first part of a folder's name


class Killed(BaseException):
    """What ends a run in the middle."""


def run(tied: str, text: str, output: str, state_dict_type: str, **fields) -> dict:
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict_type
    args = HealConfig(tied, text, output, **OPTIONS | fields)
    # accelerate shards on GPUs and their like alone; all that it does then works on the CPU, too
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return heal(args)


def run_killed(step: int, *args: str, **fields) -> None:
    original = RecordCheckpoints.on_save

    def kill(self, arguments, state, control, **kwargs):
        original(self, arguments, state, control, **kwargs)
        PartialState().wait_for_everyone()
        if state.global_step == step:
            raise Killed

    RecordCheckpoints.on_save = kill
    try:
        run(*args, **fields)
    except Killed:
        print("killed after", step, flush=True)
    finally:
        RecordCheckpoints.on_save = original


def check_heal(tied: str, text: str, prefix: str = "") -> None:
    """Heal into the current folder: "whole" runs through, "killed" is killed after two steps and after the last."""
    fields = KINDS[prefix]
    collect, sharded = _Run._collect, []
    _Run._collect = lambda self, model: sharded.append(isinstance(model, FSDPModule)) or collect(self, model)
    whole = run(tied, text, f"{prefix}whole", "FULL_STATE_DICT", **fields)
    run_killed(2, tied, text, f"{prefix}killed", "SHARDED_STATE_DICT", **fields)
    run_killed(4, tied, text, f"{prefix}killed", "SHARDED_STATE_DICT", **fields)
    killed = run(tied, text, f"{prefix}killed", "SHARDED_STATE_DICT", **fields)
    assert (whole["resumed_from_step"], killed["resumed_from_step"]) == (0, 4)
    for name in ("before", "after", "history", "parameters", "trainable_parameters"):
        assert whole[name] == killed[name], (prefix, name, whole[name], killed[name])
    assert sharded == [True, True]


def check_rescue(tied: str, text: str) -> None:
    """Let the loss of the second process be no number in the fourth step; nothing is saved after the second."""
    original = Trainer.training_step

    def step(self, *args):
        loss = original(self, *args)
        return loss * torch.nan if self.args.process_index == 1 and self.state.global_step == 3 else loss

    Trainer.training_step = step
    try:
        run(tied, text, "nan", "SHARDED_STATE_DICT", fused_loss=False)
    except Diverged as error:
        print(f"diverged: {error}", flush=True)
    finally:
        Trainer.training_step = original


def model_and_optimizer(tied: str) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer, number: int, rank: int | None = None) -> None:
    """Train on the batch of that number; of two processes each on its half."""
    tokens = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(number))
    tokens = tokens if rank is None else tokens.chunk(2)[rank]
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()


def save_alone(folder: Path, model, optimizer) -> None:
    """Save in one process as `Accelerator.save_state` does in several."""
    for name, state in (("model", model.state_dict()), ("optimizer", get_optimizer_state_dict(model, optimizer))):
        save({name: state}, storage_writer=FileSystemWriter(folder / FOLDERS[name]), no_dist=True)


def load_alone(folder: Path, model, optimizer) -> None:
    """Load in one process what several have saved."""
    weights, state = model.state_dict(), get_optimizer_state_dict(model, optimizer)
    for name, tensors in (("model", weights), ("optimizer", state)):
        load({name: tensors}, storage_reader=FileSystemReader(folder / FOLDERS[name]), no_dist=True)
    set_optimizer_state_dict(model, optimizer, state)


def check_states(tied: str) -> None:
    """Go on in two processes from the step that one has done, and save for one to go on from."""
    accelerator = Accelerator()
    plugin, (model, optimizer) = accelerator.state.fsdp_plugin, accelerator.prepare(*model_and_optimizer(tied))
    load_fsdp_model(plugin, accelerator, model, "of_one")
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, "of_one")
    step(model, optimizer, 1, accelerator.process_index)
    accelerator.save_state("of_two")
    step(model, optimizer, 2, accelerator.process_index)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        model.save_pretrained("of_both", state_dict=weights)
    accelerator.free_memory()


def train_plainly(tied: str, output: str, batch_size: int) -> None:
    """Train by transformers' Trainer, which knows nothing of pools, and save as it does."""
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    tokens = torch.randint(3, 90, (8, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_steps": 2, "learning_rate": 1.0, "optim": "sgd", "save_strategy": "no", "report_to": "none"}
    args = TrainingArguments(output, per_device_train_batch_size=batch_size, disable_tqdm=True, **options)
    if is_sharded := os.environ.get("WORLD_SIZE") == "2":
        PartialState().distributed_type = DistributedType.MULTI_GPU  # as `run` does; the arguments reset it
    trainer = Trainer(model, args, train_dataset=[{"input_ids": each, "labels": each} for each in tokens])
    trainer.train()
    assert isinstance(trainer.model, FSDPModule) is is_sharded
    trainer.save_model()


def check_trainer(tied: str) -> None:
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    train_plainly(tied, "plainly", batch_size=2)


def check_example(tied: str, text: str) -> None:
    """Run the example as its command line does; it ends the processes' group."""
    sys.argv = [str(EXAMPLE), tied, text, "example", *EXAMPLE_OPTIONS]
    runpy.run_path(str(EXAMPLE), run_name="__main__")

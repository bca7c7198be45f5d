"""Heal in two processes: unbroken, killed and continued, with a loss that is NaN in one process, on a taken output.

`torchrun --nproc-per-node=2 resume_worker.py FOLDER STAGE`; FOLDER holds `tied` and `text.txt`.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from test_resume import ACCUMULATION, OPTIONS, STREAMING, kill_at
from transformers import Trainer

from transformers_tiedmoe.training.heal import HealConfig, heal
from transformers_tiedmoe.training.outcome import Diverged

CASES = {"full": {}, "lora": {"lora": True, "lora_rank": 2}, "streaming": STREAMING, "accumulation": ACCUMULATION}
RANK = int(os.environ["RANK"])


def config(folder, output, fields):
    """Half a batch for each process."""
    options = OPTIONS | {"batch_size": 2, "use_cpu": True} | fields
    if options["batch_size"] == 2 and "gradient_accumulation_steps" in options:
        options["batch_size"] = 1
    return HealConfig(str(folder / "tied"), str(folder / "text.txt"), str(folder / output), **options)


def killed_by_the_system(done, total, doing):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def nan_in_the_second(folder):
    """Only the second process sees it; both must end, and the first saves what was good."""
    real = Trainer.training_step

    def step(self, *args):
        loss = real(self, *args)
        return loss * torch.nan if RANK == 1 and self.state.global_step == 4 else loss

    Trainer.training_step = step
    try:
        heal(config(folder, "nan", {}))
    except Diverged as error:
        print(f"diverged: {error}")
    finally:
        Trainer.training_step = real


def main(folder, stage):
    if stage == "first":
        nan_in_the_second(folder)
        for name, fields in CASES.items():
            heal(config(folder, f"{name}.unbroken", fields))
            progress = killed_by_the_system if name == "accumulation" else kill_at(5)
            try:
                heal(config(folder, f"{name}.killed", fields), progress)
            except InterruptedError:
                heal(config(folder, f"{name}.killed", fields))
    else:
        heal(config(folder, "accumulation.killed", CASES["accumulation"]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

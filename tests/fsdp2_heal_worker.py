"""Run by fsdp2_worker.py, in two processes under accelerate's FSDP2: healing, killed and continued."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from transformers_tiedmoe.training.checkpoints import RecordCheckpoints
from transformers_tiedmoe.training.heal import HealConfig, _Run, heal

OPTIONS = {"max_steps": 4, "save_steps": 2, "block_size": 16, "batch_size": 2, "learning_rate": 1e-2}
OPTIONS |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "logging_steps": 1}


class Killed(BaseException):
    """What ends a run in the middle."""


def run(tied: str, text: str, output: str, state_dict_type: str) -> dict:
    os.environ["FSDP_STATE_DICT_TYPE"] = state_dict_type
    args = HealConfig(tied, text, output, **OPTIONS)
    # accelerate shards on GPUs and their like alone; all that it does then works on the CPU, too
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return heal(args)


def run_killed(step: int, *args: str) -> None:
    original = RecordCheckpoints.on_save

    def kill(self, arguments, state, control, **kwargs):
        original(self, arguments, state, control, **kwargs)
        PartialState().wait_for_everyone()
        if state.global_step == step:
            raise Killed

    RecordCheckpoints.on_save = kill
    try:
        run(*args)
    except Killed:
        print("killed after", step, flush=True)
    finally:
        RecordCheckpoints.on_save = original


def check_heal(tied: str, text: str) -> None:
    """Heal into the current folder: "whole" runs through, "killed" is killed after two steps and after the last."""
    collect, sharded = _Run._collect, []
    _Run._collect = lambda self, model: sharded.append(isinstance(model, FSDPModule)) or collect(self, model)
    whole = run(tied, text, "whole", "FULL_STATE_DICT")
    run_killed(2, tied, text, "killed", "SHARDED_STATE_DICT")
    run_killed(4, tied, text, "killed", "SHARDED_STATE_DICT")
    killed = run(tied, text, "killed", "SHARDED_STATE_DICT")
    assert sharded == [True, True]
    assert (whole["resumed_from_step"], killed["resumed_from_step"]) == (0, 4)
    for name in ("before", "after", "history"):
        assert whole[name] == killed[name], (name, whole[name], killed[name])

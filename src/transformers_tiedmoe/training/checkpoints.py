"""Trainer's checkpoints, with a record of what is in each: a run goes on from the last one that is whole.

Trainer itself silently continues from a checkpoint without optimizer, scheduler or random state, and fails with a
traceback on a file that was cut off.
"""

import json
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerCallback

from ..files import atomic_write_json, file_digest

RECORD = "complete.json"


class RecordCheckpoints(TrainerCallback):
    """Write into every checkpoint the size and hash of its files, once all processes have written theirs."""

    def on_step_end(self, args, state, control, **kwargs):
        """Log where a checkpoint is saved: what Trainer gathers between two logs, such as the loss, is in none."""
        control.should_log |= control.should_save

    def on_save(self, args, state, control, **kwargs):
        """Record the checkpoint of this step."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            atomic_write_json(folder / RECORD, {name: file_digest(folder / name) for name in _names(folder)})


def last_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the last checkpoint in `folder` whose files are all as they were recorded.

    Returns:
        It, or None; and the names of later ones that are cut off or damaged.
    """
    damaged: list[str] = []
    for checkpoint in _checkpoints(folder):
        if _is_sound(checkpoint):
            return checkpoint, damaged
        damaged.append(checkpoint.name)
    return None, damaged


def sound_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in `folder` whose files are as they were recorded, the last one first."""
    return [checkpoint for checkpoint in _checkpoints(folder) if _is_sound(checkpoint)]


def step_of(checkpoint: Path | None) -> int:
    """Return the steps done in a checkpoint, 0 without one."""
    return 0 if checkpoint is None else _step(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_sound(checkpoint: Path) -> bool:
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or not isinstance(state, dict) or state.get("global_step") != _step(checkpoint):
        return False
    return set(record) <= set(_names(checkpoint)) and all(
        file_digest(checkpoint / name) == written for name, written in record.items()
    )


def _names(checkpoint: Path) -> list[str]:
    found = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(RECORD))

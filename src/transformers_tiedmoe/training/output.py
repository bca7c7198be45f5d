"""The folder that a healing writes: refused, continued or finished, and never mistaken for complete when it is not.

While training it holds Trainer's `checkpoint-*` and `heal_progress.json`. The model is written into a folder of its own,
moved over file by file with config.json last, and only then the other files of the unfinished state are deleted.
"""

import json
import shutil
from pathlib import Path

from transformers import CONFIG_NAME

from ..auto_files import settle_tokenizer
from ..errors import TiedMoeError

PROGRESS = "heal_progress.json"
REPORT = "heal.json"
# Options that may differ between a killed run and the one that continues it.
FREE_OPTIONS = ("overwrite", "save_steps", "eval_steps")


class HealOutput:
    """State of an output folder for one configuration; creating it reads, `begin` and `finish` write.

    Attributes:
        state: what `begin` stored when the unfinished healing found here began; empty for a new one.
        checkpoint: the last complete checkpoint of that healing, or None.
    """

    def __init__(self, folder: str | Path, config: dict):
        self.folder = Path(folder)
        self.staging = self.folder / ".final"
        self.identity = {name: value for name, value in config.items() if name not in FREE_OPTIONS}
        self.state: dict = {}
        self.checkpoint: Path | None = None
        self._replace = False
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        is_unfinished = (self.folder / PROGRESS).is_file()
        if not is_unfinished and not (self.folder / REPORT).is_file():
            raise TiedMoeError(
                f"output {self.folder} is not empty and holds no healing; give a new or an empty folder"
            )
        if config["overwrite"]:
            self._replace = True
        elif is_unfinished:
            self._continue(json.loads((self.folder / PROGRESS).read_text()))
        else:
            raise TiedMoeError(
                f"output {self.folder} holds a finished healing; give another folder, or ask to overwrite it (overwrite)"
            )

    def _continue(self, progress: dict):
        different = [
            f"{name} was {progress['identity'].get(name)!r} and is {value!r}"
            for name, value in self.identity.items()
            if progress["identity"].get(name) != value
        ]
        if different:
            raise TiedMoeError(
                f"output {self.folder} holds an unfinished healing with other options ({'; '.join(different)}); "
                "repeat its command to continue it, or ask to overwrite it (overwrite)"
            )
        self.state = progress["state"]
        # Trainer writes trainer_state.json last: a checkpoint without it was cut off.
        complete = [path for path in self.folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        self.checkpoint = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)

    @property
    def checkpoint_step(self) -> int:
        """Steps done in `checkpoint`, 0 without one."""
        return int(self.checkpoint.name.split("-")[1]) if self.checkpoint else 0

    def begin(self, state: dict) -> None:
        """Remember what a run that continues this one needs; with overwrite, first delete the old healing."""
        if self._replace:
            shutil.rmtree(self.folder)
        if not self.state:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / PROGRESS, {"identity": self.identity, "state": state})

    def finish(self, model, tokenizer, report: dict) -> None:
        """Save model, tokenizer and report; what is already staged (an adapter) moves along."""
        model.save_pretrained(self.staging)
        tokenizer.save_pretrained(self.staging)
        settle_tokenizer(tokenizer, self.staging)
        for path in sorted(self.staging.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            target = self.folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        self.staging.rmdir()
        _write_json(self.folder / REPORT, report)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (self.folder / PROGRESS).unlink()


def _write_json(path: Path, content: dict) -> None:
    """Write a file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)

"""`AuditConfig`: what is audited, on what; the command's flags are made of its fields."""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TiedMoeError
from ..files import expand
from ..hub import public_name


@dataclass(frozen=True)
class AuditConfig:
    """The arguments of `audit`."""

    models: list[str] = field(metadata={"help": "Folders or hub ids, to be compared."})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text: a file, a folder or a dataset of the hub, as for `tiedmoe heal`, or several, with commas "
            "between them or by repeating the flag; NAME=DATA gives one a name.",
            "repeats": "[NAME=]DATA[,...]",
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "The folder to write, new or empty. Needed unless --memory-only."}
    )
    source: str | None = field(
        default=None,
        metadata={"help": "What the models were made of: audited first, and their choices compared with its."},
    )
    lm_eval: str | None = field(
        default=None, metadata={"help": "Tasks of lm-evaluation-harness, with commas between them."}
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "At most so many samples of each task."})
    memory_only: bool = field(
        default=False, metadata={"help": "Predict memory from config and headers alone; no weight, no text is read."}
    )
    strategy: bool = field(
        default=True, metadata={"help": "Replace parts of layers by their neighbours', and suggest how to tie."}
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "Text to fit suggested plans on, each of which is then made and measured on the data."},
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "Tokens of it to fit on."})
    num_tokens: int = field(default=65536, metadata={"help": "At most so many tokens of each text, its last."})
    share: float = field(
        default=1.0,
        metadata={"help": "At most this share of each text, its last; 0.05 is what `tiedmoe heal` holds out."},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a block; 512 by default, or what the models' positions allow."}
    )
    batch_size: int = field(default=8, metadata={"help": "Blocks in one forward pass."})
    text_column: str = field(default="text", metadata={"help": "The column of the text, where the data has columns."})
    context: int = field(default=4096, metadata={"help": "Tokens of a sequence in serving, to predict memory for."})
    sequences: int = field(default=1, metadata={"help": "Sequences at a time in serving, and on a GPU in training."})
    num_gpus: int = field(default=8, metadata={"help": "GPUs that training is split over."})
    train_block_size: int = field(default=2048, metadata={"help": "Tokens of a sequence in training."})
    precision: str = field(
        default="mixed",
        metadata={"help": 'Of training: "mixed" (float32 weights, bfloat16 computes), "float32" or "bfloat16".'},
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["bfloat16"], metadata={"help": "Dtypes of the weights in serving."}
    )
    gpus: list[str] | None = field(
        default=None, metadata={"help": "GPUs to compare with, by name; by default all that are known."}
    )
    seed: int = field(default=0, metadata={"help": "Of the bootstrap's draws."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a checkpoint names."})

    def __post_init__(self) -> None:
        if not self.models:
            raise TiedMoeError("models is empty; give a folder or a hub id")
        for name in ("num_tokens", "batch_size", "calibration_tokens", "block_size", "lm_eval_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TiedMoeError(f"{name}={value}; expected an integer of at least 1")
        weighty = ("data", "source", "lm_eval", "calibration")
        if self.memory_only and (given := [name for name in weighty if getattr(self, name)]):
            raise TiedMoeError(f"memory_only reads neither text nor weights; leave it off, or leave {given[0]} off")
        if self.calibration and not self.strategy:
            raise TiedMoeError(
                "calibration measures the plans that strategy suggests; leave it off, or leave strategy on"
            )
        if not self.memory_only and not self.data:
            raise TiedMoeError("there is no text to run the models on; give one (data), or ask for memory_only")
        if not self.memory_only and not self.output:
            raise TiedMoeError("there is no folder to write into; give one (output)")
        _ = self.texts

    @property
    def texts(self) -> dict[str, str]:
        """File or dataset by domain."""
        found: dict[str, str] = {}
        for given in self.data:
            for part in [given] if Path(expand(given)).exists() else given.split(","):
                name, is_named, data = part.partition("=")
                if not is_named or Path(expand(part)).exists():
                    name, data = Path(public_name(part).partition(":")[0]).name.partition(".")[0], part
                if not name or not data or "|" in name:
                    raise TiedMoeError(f"data has {part!r}; expected DATA or NAME=DATA, with no '|' in the name")
                if name in found:
                    raise TiedMoeError(
                        f"data names two texts {name!r}: {found[name]} and {data}; name one otherwise (NAME={data})"
                    )
                found[name] = expand(data)
        return found

    @property
    def paths(self) -> list[str]:
        """All models to audit, the source first, each once."""
        paths = [expand(each) for each in ([self.source] if self.source else []) + self.models]
        given = [expand(each) for each in self.models]
        if twice := [each for each in given if given.count(each) > 1]:
            raise TiedMoeError(f"models has {twice[0]} twice; give each once")
        return list(dict.fromkeys(paths))

    def settings(self) -> dict[str, Any]:
        """Return what a result depends on, JSON-able, without a path of this machine."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "output"}
        named = {name: public_name(data) for name, data in self.texts.items()}
        return fields | {
            "models": [public_name(expand(each)) for each in self.models],
            **{name: value and public_name(expand(value)) for name, value in self._places().items()},
            "data": named,
        }

    def _places(self) -> dict[str, str | None]:
        return {"source": self.source, "calibration": self.calibration}

    def command(self) -> str:
        """Return the command that gives this, with names in the place of paths."""
        words = ["tiedmoe", "audit", *(public_name(expand(each)) for each in self.models)]
        if self.texts:
            words += ["--data", ",".join(f"{name}={public_name(data)}" for name, data in self.texts.items())]
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
            if each.name in ("models", "data", "output") or value == default:
                continue
            flag = "--" + each.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                shown = public_name(expand(value)) if each.name in self._places() else value
                words += [flag, json.dumps(shown) if isinstance(shown, list) else str(shown)]
        return shlex.join(words)

"""`TiedMoeTrainingArguments`: Trainer's arguments and those of healing; from flags, YAML or Python.

The flags are made by transformers' `HfArgumentParser` from the fields, as in TRL's commands:
`--per_device_train_batch_size` or `--per-device-train-batch-size`. Shorter names that were documented before
(`--batch-size`, `--output`, `--warmup-fraction`) stand for Trainer's own.
"""

import argparse
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import HfArgumentParser, TrainingArguments

from ..errors import TiedMoeError
from ..files import expand
from ..yaml_input import read_yaml
from .parameter_groups import BUDGET_LR, LR_DIVISORS
from .soft_routing import TOLERANCE

OTHER_NAMES = {"output": "output_dir", "batch_size": "per_device_train_batch_size", "warmup_fraction": "warmup_steps"}
PATHS = ("model", "teacher", "teacher_cache", "data", "output_dir")
TEACHER_DTYPES = ("auto", "bfloat16", "float16", "float32")
# What may differ in a run that continues a killed one, because it does not change what is computed.
FREE = (
    *(
        "output_dir",
        "overwrite",
        "allow_worse",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "save_strategy",
        "save_steps",
        "save_total_limit",
    ),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node"),
    *("disable_tqdm", "report_to", "run_name", "project", "hub_token", "debug", "skip_memory_metrics", "local_rank"),
    *(
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
    ),
    *("ddp_timeout", "ddp_backend", "per_device_eval_batch_size", "eval_accumulation_steps", "resume_from_checkpoint"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_on_start", "dataloader_in_order"),
)
INSTEAD = (
    "use FSDP2 (examples/accelerate/fsdp2.yaml), or --multi_gpu where every process holds weights and optimizer whole"
)
# ZeRO-2 was tried by hand: gradients equal one process's. The way from its checkpoints to a model never was.
DEEPSPEED = (
    "with ZeRO-1 and ZeRO-2 its engine clips, steps and writes checkpoints itself, from which healing was never seen "
    "to continue bit by bit or to rescue a model; ZeRO-3 also splits the weights, which healing reads, rounds and "
    f"compares whole; {INSTEAD}"
)
# Trainer's arguments that healing decides itself, or does not support; each with the reason.
REFUSED = {
    "deepspeed": DEEPSPEED,
    "push_to_hub": "upload the finished folder with `hf upload ACCOUNT/MODEL OUTPUT`",
    "resume_from_checkpoint": "the same command started again goes on by itself",
    "save_only_model": "a killed run could not go on without the optimizer",
    "load_best_model_at_end": "the model of the last step is saved; lower max_steps instead",
    "auto_find_batch_size": "a run that is continued needs one batch size; lower per_device_train_batch_size instead",
    "fp16": "weights are trained in float32 and computed in bfloat16 (bf16) or float32",
    "parallelism_config": "healing needs the weights whole in every process",
    "enable_jit_checkpoint": "checkpoints are written every save_steps",
}


def _ours(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TiedMoeTrainingArguments(TrainingArguments):
    """What to heal, on what, and how: Trainer's arguments with other defaults, and healing's own.

    Raises:
        TiedMoeError: a field, or several together, that is wrong whatever the model is.
    """

    model: str = _ours("", "Folder or hub id of the model to heal.")
    data: str = _ours(
        "",
        "Text to train on: a .txt, .jsonl or .parquet file (.xz or .gz or not), a folder of them, or a dataset of the "
        "Hub (id or id:config); austen: the novels that ship with the package.",
    )
    teacher: str | None = _ours(None, "Folder or hub id of the source, to learn from its predictions as well.")
    teacher_weight: float = _ours(
        0.5,
        "Share of the distillation loss, with a teacher; the loss on the text has the rest. Use 1 if the source was "
        "trained on that text: there is nothing more to learn from it.",
    )
    teacher_device: str | None = _ours(
        None,
        "Where the teacher lies: cpu, cuda:1, auto (over all devices, and on the disk if they are full) or a device "
        "map as JSON; by default where the model is trained.",
    )
    teacher_dtype: str = _ours("auto", "Of the teacher: bfloat16, float16, float32 or auto, as its files say.")
    teacher_cache: str | None = _ours(
        None,
        "Folder for the teacher's most probable tokens, computed once over the training text; training then needs no "
        "teacher in memory. A complete one is used again, an unfinished one continued.",
    )
    teacher_top_k: int = _ours(64, "With teacher_cache: tokens kept of each prediction; the others are one event.")
    fused_loss: bool | None = _ours(
        None,
        "Compute logits and loss a chunk of tokens at a time, so that a batch's logits never exist; by default if a "
        "batch has more tokens than a chunk.",
    )
    temperature: float = _ours(1.0, "Softens both distributions in the distillation loss.")
    lr_divisor: str = _ours("sqrt", "Divides a pool's learning rate: sqrt (of its number of layers) or none.")
    optimizer: str | None = _ours(
        None,
        "muon: Muon for matrices, AdamW at a tenth of its learning rate and decay for the rest (see muon.py). By "
        "default what optim names.",
    )
    train_norms: bool = _ours(False, "Train the norms too; they are frozen otherwise, as training them did harm.")
    anneal: float = _ours(0.5, "With soft routing: the share of the steps in which it comes to its targets.")
    anneal_tolerance: float = _ours(
        TOLERANCE,
        "With soft routing: the way to its targets waits while the training loss is more than this above its lowest, "
        "in nats.",
    )
    budget_lr: float = _ours(
        BUDGET_LR, "With soft routing: peak learning rate of the numbers by which layers share the budget."
    )
    block_size: int | None = _ours(None, "Tokens in a sequence; by default 512, or the model's positions if fewer.")
    text_column: str = _ours("text", "Column of the text, if the data has columns.")
    validation_fraction: float = _ours(0.05, "Share of the text, from its end, that is held out.")
    streaming: bool = _ours(False, "Read and tokenize the text while training, in its order, again when it ends.")
    shuffle_buffer: int = _ours(
        0, "With streaming: sequences in memory from which the next one is drawn, by data_seed or seed; 0: in order."
    )
    validation_blocks: int = _ours(64, "With streaming: sequences at the text's start that are held out.")
    validation_split: str | None = _ours(None, "With streaming from the Hub: the split to hold out from instead.")
    separate_documents: bool = _ours(
        False, "Let no token see the document before its own: attention and positions begin anew after an end token."
    )
    lora: bool = _ours(False, "Train low-rank adapters on attention and pools; the merged model is saved.")
    lora_rank: int = _ours(16, "Rank of the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Ends of names of linear modules to put adapters on; by default those of attention."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "The same of experts' weights, such as expert_pools.0.down_proj; by default all pools'."},
    )
    merge_adapter: bool = _ours(False, "Merge the adapter that lies beside the model's weights before healing.")
    trust_remote_code: bool = _ours(False, "Run code that comes with the model, the teacher or their tokenizers.")
    overwrite: bool = _ours(False, "Replace a healing that output already holds.")
    allow_worse: bool = _ours(False, "A held-out loss above the one before is only warned of, and no error.")

    output_dir: str | None = _ours(None, "Folder to write; new or empty. An unfinished healing of it is continued.")
    max_steps: int = _ours(200, "Optimizer steps.")
    learning_rate: float = _ours(1e-4, "Peak learning rate, reached by warmup, left by the schedule.")
    lr_scheduler_type: str = _ours("cosine", "Schedule of the learning rate.")
    warmup_steps: float = _ours(0.05, "Steps in which the learning rate grows; below 1 a share of all steps.")
    per_device_eval_batch_size: int | None = _ours(None, "As per_device_train_batch_size if not given.")
    bf16: bool | None = _ours(None, "Compute in bfloat16, weights in float32; by default if the GPU can.")
    save_steps: float = _ours(100, "Steps between two checkpoints, from which a killed run goes on.")
    save_total_limit: int | None = _ours(2, "Checkpoints to keep: if the last is damaged, the one before is used.")
    eval_steps: float | None = _ours(None, "Steps between two evaluations; 0 or none: only before and after.")
    logging_steps: float | None = _ours(None, "Steps between two logged losses; a fiftieth of all by default.")
    dataloader_pin_memory: bool | None = _ours(None, "By default if there is a GPU.")

    def __post_init__(self):
        self._check()
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = torch.cuda.is_available()
        self.eval_steps = self.eval_steps or None
        self.eval_strategy = "steps" if self.eval_steps else "no"
        self.logging_steps = self.logging_steps or max(1, self.max_steps // 50)
        self.eval_on_start = True  # `heal` switches it off if the run is continued
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:  # Trainer's own checks
            raise TiedMoeError(f"transformers' TrainingArguments refuse this: {error}") from error
        if self.n_gpu > 1:
            raise TiedMoeError(
                f"one process sees {self.n_gpu} GPUs, which Trainer would use through torch's DataParallel; start one "
                "process a GPU with `accelerate launch`, or show it one by CUDA_VISIBLE_DEVICES=0"
            )
        if self.is_fsdp:
            from .fsdp import fsdp_plugin  # takes over a second to import

            fsdp_plugin(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "TiedMoeTrainingArguments":
        """Make the arguments from a mapping of fields, under Trainer's names or the shorter ones.

        Raises:
            TiedMoeError: an unknown field, or one given under both names.
        """
        known = [each.name for each in fields(cls) if each.init]
        found: dict[str, Any] = {}
        for name, value in given.items():
            own = OTHER_NAMES.get(name, name)
            if own not in known:
                raise TiedMoeError(f"healing has no argument {name!r}; {_did_you_mean(name, [*known, *OTHER_NAMES])}")
            if own in found:
                raise TiedMoeError(f"{own} is given twice, once as {name}; give one of them")
            found[own] = value
        fraction = given.get("warmup_fraction")
        if fraction is not None:
            if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
                raise TiedMoeError(f"warmup_fraction={fraction}, but it is a share and must lie between 0 and 1")
            steps = found.get("max_steps", cls.max_steps)
            found["warmup_steps"] = math.ceil(fraction * steps) if isinstance(steps, int) else fraction
        return cls(**found)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, JSON-able: only a run with the same identity continues a killed one."""
        everything = self.to_dict()
        return {each.name: everything[each.name] for each in fields(self) if each.init and each.name not in FREE}

    @property
    def is_fsdp(self) -> bool:
        """Whether weights are sharded by FSDP, as `fsdp` or `accelerate launch` says."""
        return bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")

    def _check(self) -> None:
        """Check what needs no file and no device."""
        for name, what in (
            ("model", "a folder or hub id"),
            ("data", "text to train on"),
            ("output_dir", "a folder to write"),
        ):
            if not getattr(self, name):
                raise TiedMoeError(f"{name} is missing; expected {what}")
        for name in PATHS:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, expand(value))
        for name, reason in REFUSED.items():
            if value := getattr(self, name, None):
                raise TiedMoeError(f"{name}={value!r} is not supported by healing: {reason}")
        for plugin, reason in (("DEEPSPEED", DEEPSPEED), ("MEGATRON_LM", f"it has its own models; {INSTEAD}")):
            if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):
                raise TiedMoeError(
                    f"accelerate launch was told to use {plugin}, which heal does not support: {reason}"
                )
        for name in (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "lora_rank",
            "teacher_top_k",
            "validation_blocks",
            "save_steps",
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value != int(value) or value < 1:
                raise TiedMoeError(f"{name}={value}, but it must be at least 1, a whole number")
        for name in ("learning_rate", "temperature", "budget_lr", "anneal_tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise TiedMoeError(f"{name}={getattr(self, name)}, but it must be a positive number")
        for name in ("teacher_weight", "validation_fraction", "anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise TiedMoeError(f"{name}={getattr(self, name)}, but it is a share and must lie between 0 and 1")
        for name in ("eval_steps", "logging_steps", "weight_decay", "warmup_steps", "shuffle_buffer"):
            if (getattr(self, name) or 0) < 0:
                raise TiedMoeError(f"{name}={getattr(self, name)} must not be negative")
        if self.save_strategy not in ("steps", "no") or self.num_train_epochs != type(self).num_train_epochs:
            raise TiedMoeError(
                "healing counts steps, not epochs: set max_steps and save_steps, and leave num_train_epochs and "
                "save_strategy out"
            )
        if self.optimizer not in (None, "muon"):
            raise TiedMoeError(f"optimizer={self.optimizer!r} is unknown; give muon, or leave it out and set optim")
        if (self.lora_target_modules or self.lora_target_parameters) and not self.lora:
            raise TiedMoeError(
                "lora_target_modules and lora_target_parameters say where adapters go; ask for them (lora)"
            )
        if self.optimizer and self.lora:
            raise TiedMoeError("optimizer='muon' trains whole matrices, and lora low-rank factors; give one of them")
        if self.streaming and (self.teacher_cache or self.dataloader_num_workers > 1):
            raise TiedMoeError(
                "streaming has one reader and no end; leave teacher_cache out, and dataloader_num_workers at most 1"
            )
        for name in ("validation_split", "shuffle_buffer"):
            if getattr(self, name) and not self.streaming:
                raise TiedMoeError(f"{name}={getattr(self, name)} needs streaming; ask for it, or leave it out")
        if self.teacher_dtype not in TEACHER_DTYPES:
            raise TiedMoeError(
                f"teacher_dtype={self.teacher_dtype!r} is unknown; choose one of {', '.join(TEACHER_DTYPES)}"
            )
        for name in ("teacher_device", "teacher_dtype", "teacher_cache"):
            if not self.teacher and getattr(self, name) != getattr(type(self), name):
                raise TiedMoeError(f"{name}={getattr(self, name)} without a teacher; give a teacher, or leave it out")
        if self.lr_divisor not in LR_DIVISORS:
            raise TiedMoeError(f"lr_divisor={self.lr_divisor!r} is unknown; choose one of {', '.join(LR_DIVISORS)}")


def parse_arguments(arguments: Sequence[str]) -> TiedMoeTrainingArguments:
    """Parse a command line: `MODEL --data TEXT --output FOLDER [--config FILE] [any flag of Trainer]`.

    Prints help for `--help` (healing's own flags) and `--help-all` (Trainer's too) and exits. A flag that does not
    exist exits with status 2, as argparse does.

    Raises:
        TiedMoeError: as `TiedMoeTrainingArguments`, or a config that cannot be read.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.print_short_help()
        raise SystemExit(0)
    if "--help-all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"no such flag or argument: {unknown[0]}; {_did_you_mean(unknown[0], flags)}")
    values = {name: value for name, value in vars(given).items() if value is not argparse.SUPPRESS}
    values.pop("json", None)  # the command line's own
    if (config := values.pop("config", None)) is not None:
        values = {**_without(read_config(config), values), **values}
    return TiedMoeTrainingArguments.from_dict(values)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of arguments.

    Raises:
        TiedMoeError: it cannot be read, or is no mapping of names to values.
    """
    found = read_yaml(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise TiedMoeError(f"{path} holds a {type(found).__name__}; expected lines such as 'learning_rate: 1e-4'")
    # YAML 1.1 reads 1e-4, without a dot, as text.
    floats = {each.name for each in fields(TiedMoeTrainingArguments) if each.type in (float, float | None)}
    for name, value in found.items():
        if name.replace("-", "_") in floats | {"warmup_fraction"} and isinstance(value, str):
            try:
                found[name] = float(value)
            except ValueError:
                raise TiedMoeError(f"{path}: {name}={value!r}; expected a number") from None
    return {name.replace("-", "_"): value for name, value in found.items()}


class _Parser(HfArgumentParser):
    """HfArgumentParser whose defaults are left out, so that what the user gave is known."""

    def print_short_help(self) -> None:
        """Print the help of healing's own flags; it only mentions Trainer's."""
        own = set(TiedMoeTrainingArguments.__annotations__)
        short = argparse.ArgumentParser(
            prog=self.prog, description=self.description, epilog=self.epilog, usage=self.usage, add_help=False
        )
        for action in self._actions:
            if action.dest in own or action.dest in ("model", "config", "json", *OTHER_NAMES):
                short._add_action(action)
        short.print_help()


def _parser() -> _Parser:
    parser = _Parser(
        TiedMoeTrainingArguments,
        prog="tiedmoe heal",
        usage="tiedmoe heal MODEL --data TEXT --output FOLDER [--config FILE] [any flag of TrainingArguments]",
        description="Train a tied model for a short while, and measure held-out perplexity before and after. Start "
        "the same command again to continue a run that was killed. For several devices put `accelerate launch -m "
        "transformers_tiedmoe.cli` in the place of `tiedmoe`.",
        epilog="Every flag of transformers' TrainingArguments is known, too: --help-all lists them. Example: tiedmoe "
        "heal tied --data text.txt --output healed --max-steps 500",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    for action in parser._actions:
        if action.dest in ("bf16", "dataloader_pin_memory", "fused_loss"):  # true or false, or, without a value, true
            action.nargs, action.const = "?", True
    parser.add_argument("--no_bf16", "--no-bf16", dest="bf16", action="store_false", default=argparse.SUPPRESS)
    model = next(action for action in parser._actions if action.dest == "model")
    parser._remove_action(model)
    for flag in model.option_strings:
        del parser._option_string_actions[flag]
    parser.add_argument("model", nargs="?", metavar="MODEL", help=model.help, default=argparse.SUPPRESS)
    parser.add_argument("--model", dest="model", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    for name, own in OTHER_NAMES.items():
        kind = {"output": str, "batch_size": int}.get(name, float)
        flags = {f"--{name}", f"--{name.replace('_', '-')}"}
        parser.add_argument(
            *sorted(flags), dest=name, type=kind, help=f"Stands for --{own}.", default=argparse.SUPPRESS
        )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print one JSON object on stdout, and nothing else there.",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of these; what is given here wins.", default=argparse.SUPPRESS
    )
    return parser


def _without(config: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without what `given` sets, under either of its names."""
    names = {OTHER_NAMES.get(name, name) for name in given}
    return {name: value for name, value in config.items() if OTHER_NAMES.get(name, name) not in names}


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else "`tiedmoe heal --help-all` lists all"

"""Healing: the short training after a conversion, with transformers' Trainer underneath.

`heal(HealConfig(model, data, output))` measures held-out perplexity, trains, measures again and leaves in `output` a
model that the Auto classes load and `heal.json`, the report. Works on any causal language model: without pools it is
plain fine-tuning. Kill it and call it again: it goes on from the last checkpoint in `output`.
"""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..errors import TiedMoeError, reading
from .data import load_blocks
from .lora import add_lora
from .output import HealOutput
from .parameter_groups import LR_DIVISORS
from .trainer import HealTrainer, ProgressReport


def _option(default, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class HealConfig:
    """What to heal, on what, and how. Every check that needs no file is made here."""

    model: str = field(metadata={"help": "Folder or hub id of the model to heal."})
    data: str = field(
        metadata={
            "help": "Text to train on: a .txt, .jsonl or .parquet file (.xz or .gz or not), a folder of them, or a "
            "dataset of the Hub (id or id:config)."
        }
    )
    output: str = field(metadata={"help": "Folder to write; one that holds an unfinished healing is continued."})
    teacher: str | None = _option(None, "Folder or hub id of the source, to learn from its predictions as well.")
    teacher_weight: float = _option(
        0.5,
        "Share of the distillation loss where there is a teacher; the text has the rest. 1 where the source was trained on "
        "that text: it has nothing more to learn from it.",
    )
    temperature: float = _option(1.0, "Softens both distributions in the distillation loss.")
    max_steps: int = _option(200, "Optimizer steps.")
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW, reached by warmup, left by a cosine.")
    lr_divisor: str = _option("sqrt", "Divides a pool's learning rate: sqrt (of its number of layers) or none.")
    weight_decay: float = _option(0.0, "Of everything but biases and norms.")
    warmup_fraction: float = _option(0.05, "Share of the steps in which the learning rate grows.")
    batch_size: int = _option(8, "Sequences in one forward on one device.")
    gradient_accumulation_steps: int = _option(1, "Forwards in one optimizer step.")
    block_size: int = _option(512, "Tokens in a sequence.")
    text_column: str = _option("text", "Column of the text, where the data has columns.")
    validation_fraction: float = _option(0.05, "Share of the text, from its end, that is held out.")
    train_norms: bool = _option(False, "Train the norms too; they are frozen otherwise, as training them did harm.")
    lora: bool = _option(False, "Train low-rank adapters on attention and pools; the merged model is saved.")
    lora_rank: int = _option(16, "Rank of the adapters.")
    gradient_checkpointing: bool = _option(False, "Less memory, about a third more time.")
    bf16: bool | None = _option(None, "Compute in bfloat16, weights in float32; by default where the GPU can.")
    save_steps: int = _option(100, "Steps between two checkpoints, from which a killed run goes on.")
    eval_steps: int = _option(0, "Steps between two evaluations; 0: only before and after.")
    seed: int = _option(42, "Of the order of the data and of new adapters.")
    overwrite: bool = _option(False, "Replace a healing that output already holds.")

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "lora_rank", "save_steps"):
            if getattr(self, name) < 1:
                raise TiedMoeError(f"{name}={getattr(self, name)}, but it must be at least 1")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise TiedMoeError(f"{name}={getattr(self, name)}, but it must be a positive number")
        for name in ("teacher_weight", "warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise TiedMoeError(f"{name}={getattr(self, name)}, but it is a share and must lie between 0 and 1")
        if self.eval_steps < 0 or self.weight_decay < 0:
            raise TiedMoeError(
                f"eval_steps={self.eval_steps} and weight_decay={self.weight_decay} must not be negative"
            )
        if self.lr_divisor not in LR_DIVISORS:
            raise TiedMoeError(f"lr_divisor={self.lr_divisor!r} is unknown; choose one of {', '.join(LR_DIVISORS)}")
        for name in ("model", "teacher", "data"):
            value = getattr(self, name)
            if value and Path(value).exists() and Path(value).resolve() == Path(self.output).resolve():
                raise TiedMoeError(f"output={self.output} is also the {name}; give a folder of its own")


def heal(config: HealConfig, progress: Callable[[int, int, str], None] | None = None) -> dict:
    """Train a converted model for a short while and save it.

    In full training the weights are float32 and, with `bf16`, the arithmetic is bfloat16; each is saved in the dtype it
    was read in. With `lora` the weights stay as they were read, the adapters are float32, and both the merged model
    (in `output`) and the adapter (in `output/adapter`) are saved. Norms are frozen unless `train_norms`; the router
    is trained, with the auxiliary losses that the model's own config asks for.

    Args:
        config: what to heal, on what, and how.
        progress: called as `progress(done_steps, all_steps, what)`, instead of Trainer's own bar and log.

    Returns:
        The report that `output/heal.json` holds: `before` and `after` (`loss` in nats per token, `perplexity`, `tokens`,
        all on the held-out blocks and without auxiliary losses), `steps`, `tokens` trained on, `seconds` (of this
        process's steps), `resumed_from_step`, `parameters`, `trainable_parameters`, `history`, `config`, `versions`.

    Raises:
        FileNotFoundError: no such data.
        OSError: no such model or teacher.
        TiedMoeError: too little text, a teacher with another vocabulary, an output folder that holds something else, or
            a loss that is no longer a number.
        ImportError: `lora` without peft.
    """
    tell = progress or (lambda done, total, what: None)
    set_seed(config.seed)
    output = HealOutput(config.output, asdict(config))
    args = _training_arguments(config, is_resumed=output.checkpoint is not None, is_quiet=progress is not None)
    tell(output.checkpoint_step, config.max_steps, "reading the text")
    tokenizer = _load_tokenizer(config.model)
    with args.main_process_first(desc="tokenizing the text"):
        train, validation = load_blocks(
            config.data, tokenizer, config.block_size, config.validation_fraction, config.text_column
        )
    tell(output.checkpoint_step, config.max_steps, "loading the model")
    teacher = _load_teacher(config, tokenizer)
    model, origin = _load_model(config, output)
    trainable_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainer = HealTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_data_collator,  # blocks need no padding, nor a tokenizer that can pad
        processing_class=tokenizer,
        callbacks=[ProgressReport(progress)] if progress else None,
        lr_divisor=config.lr_divisor,
        teacher=teacher and teacher.to(args.device),
        teacher_weight=config.teacher_weight,
        temperature=config.temperature,
    )
    if progress:
        trainer.remove_callback(PrinterCallback)

    if trainer.is_world_process_zero():
        output.begin(origin)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(output.checkpoint) if output.checkpoint else None)
    seconds = time.perf_counter() - start
    logs = trainer.state.log_history  # of the killed runs as well
    seconds -= sum(
        log.get("eval_runtime", 0) for log in logs if log["step"] > output.checkpoint_step or not output.checkpoint
    )

    tell(config.max_steps, config.max_steps, "evaluating")
    before = _held_out(next(log for log in logs if log["step"] == 0 and "eval_loss" in log))
    history = [_history_entry(log) for log in logs if "loss" in log or "eval_loss" in log]
    healed = _final_model(trainer, origin, output)
    after = _held_out(trainer.evaluate())
    if not math.isfinite(after["loss"]):
        raise TiedMoeError(
            f"the healing diverged: the held-out loss was {before['loss']:.3f} and is {after['loss']}; nothing was saved: "
            "lower learning_rate"
        )
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * args.world_size * config.block_size
    report = {
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "seconds": round(seconds, 2),
        "resumed_from_step": output.checkpoint_step,
        "parameters": healed.num_parameters(),
        "trainable_parameters": trainable_parameters,
        "history": history,
        "num_processes": args.world_size,
        "device": str(args.device),
        "config": asdict(config),
        "versions": _versions(),
    }
    if trainer.is_world_process_zero():
        output.finish(healed, tokenizer, report)
    trainer.accelerator.wait_for_everyone()
    return report


def _training_arguments(config: HealConfig, is_resumed: bool, is_quiet: bool) -> TrainingArguments:
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{plugin}"):
            raise TiedMoeError(
                f"accelerate launch was told to shard the weights ({plugin}), but heal needs them whole in every process; "
                "launch it with --multi_gpu, with lora where memory is short"
            )
    bf16 = config.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    args = TrainingArguments(
        output_dir=config.output,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_fraction * config.max_steps),
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        bf16=bf16,
        save_steps=config.save_steps,
        save_total_limit=1,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        # Not trainer.evaluate() before trainer.train(): accelerate then takes the model for prepared, and several
        # processes train without exchanging gradients (transformers 5.23 with accelerate 1.15).
        eval_on_start=not is_resumed,
        logging_steps=max(1, config.max_steps // 50),
        seed=config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=is_quiet,
    )
    if args.n_gpu > 1:
        raise TiedMoeError(
            f"one process sees {args.n_gpu} GPUs, which Trainer would use through torch's DataParallel; start one process "
            "a GPU with `accelerate launch`, or show it one by CUDA_VISIBLE_DEVICES=0"
        )
    return args


def _load_tokenizer(path: str):
    with reading(f"the tokenizer of {path}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _load(path: str | Path, dtype) -> PreTrainedModel:
    """A causal language model with every weight found in the checkpoint."""
    with reading(f"the model {path}"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    lacking = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    if lacking:
        raise TiedMoeError(
            f"{path} lacks {len(lacking)} weights of {type(model).__name__}, first {lacking[0]}; "
            "they would be drawn at random: give a complete checkpoint of a causal language model"
        )
    return model


def _load_model(config: HealConfig, output: HealOutput) -> tuple[PreTrainedModel, dict]:
    """The model ready to train, and what its checkpoint said that training changes and `_final_model` restores."""
    # Trainer's own resuming matches the names in the file with those of the modules and skips what differs, but
    # save_pretrained writes a family's old names (an untied OLMoE's experts, one by one): read it as Auto classes do.
    path: str | Path = config.model
    if output.checkpoint and not config.lora and any(output.checkpoint.glob("model*.safetensors")):
        path = output.checkpoint
    model = _load(path, dtype="auto")
    origin = {name: output.state[name] for name in ("dtypes", "use_cache") if name in output.state} or {
        "dtypes": {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in model.named_parameters()},
        "use_cache": getattr(model.config, "use_cache", None),
    }
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it, in Trainer's arguments too. Both default to the non-reentrant kind.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if config.lora:
        return add_lora(model, config.lora_rank), origin
    for module in model.modules():
        frozen = "norm" in type(module).__name__.lower() and not config.train_norms
        for parameter in module.parameters(recurse=False):
            # In bfloat16 an update smaller than 1/256 of a weight is lost.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(not frozen)
    return model, origin


def _load_teacher(config: HealConfig, tokenizer) -> PreTrainedModel | None:
    """The frozen teacher. Logits are compared one by one: both models must mean the same token by the same number."""
    if config.teacher is None:
        return None
    with reading(f"the config of {config.teacher}"):
        sizes = [
            AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size
            for path in (config.teacher, config.model)
        ]
    if sizes[0] != sizes[1]:
        raise TiedMoeError(
            f"teacher {config.teacher} has a vocabulary of {sizes[0]} tokens, but {config.model} one of {sizes[1]}; "
            "give the source that the model was converted from"
        )
    if _load_tokenizer(config.teacher).get_vocab() != tokenizer.get_vocab():
        raise TiedMoeError(
            f"the tokenizers of teacher {config.teacher} and of {config.model} number their tokens differently; "
            "give the source that the model was converted from"
        )
    return _load(config.teacher, dtype="auto").eval().requires_grad_(False)


def _final_model(trainer: HealTrainer, origin: dict, output: HealOutput) -> PreTrainedModel:
    """The trained model as it is to be saved: merged, in the dtypes it came in; `trainer` evaluates it from now on."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        if trainer.is_world_process_zero():
            model.save_pretrained(output.staging / "adapter")
        trainer.model = model = model.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(getattr(torch, origin["dtypes"][name]))
    if origin["use_cache"] is not None:
        model.config.use_cache = origin["use_cache"]  # Trainer switched it off
    return model


def _held_out(metrics: dict) -> dict:
    loss = metrics["eval_loss"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "tokens": metrics["eval_tokens"]}


def _history_entry(entry: dict) -> dict:
    return {name: entry[name] for name in ("step", "loss", "eval_loss") if name in entry}


def _versions() -> dict:
    packages = ("transformers-tiedmoe", "transformers", "torch", "accelerate", "datasets")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}

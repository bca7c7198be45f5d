"""Healing: the short training after a conversion, with transformers' Trainer underneath.

`heal(TiedMoeTrainingArguments(model=..., data=..., output_dir=...))` measures held-out loss, trains, measures again,
and leaves in `output_dir` a model that the Auto classes load, its card and manifest, and `heal.json`, the report.
Works on any causal language model: without pools it is plain fine-tuning. The folder appears complete, in one rename.
A killed run goes on from its last checkpoint when it is called again.
"""

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerState,
    default_data_collator,
    set_seed,
)

from ..adapters import load_merged, refuse_adapter
from ..audit.routing import layer_experts
from ..auto_files import settle_tokenizer
from ..errors import TiedMoeError
from ..files import atomic_write_json
from ..manifest import MANIFEST, fingerprint, read_manifest, versions
from ..model_card import save_healed
from ..output_place import check_output, was_renamed
from ..routing import active_experts
from ..run_folder import Work
from ..workdir import open_work
from . import fsdp
from .arguments import TiedMoeTrainingArguments
from .callbacks import ProgressReport
from .checkpoints import RecordCheckpoints, last_sound, sound_checkpoints, step_of
from .data import perplexity
from .documents import refuse_crossing
from .fused_loss import fuse
from .lora import add_lora, check_adapters, without_adapters
from .mixed_dtypes import read_rounded, replaced
from .outcome import Diverged, free_name, is_worse, refuse_diverged, refuse_worse, worse_in_words
from .pretrained import check_saved, load_config, load_model, open_tokenizer, sample_loss
from .report import held_out, held_out_before, history_of, software, warnings_of_experts
from .router_health import RouterHealth
from .soft_routing import AnnealRouting
from .streaming import read_text
from .teacher_cache import CachedTeacher
from .teachers import open_teacher
from .trainer import HealTrainer

REPORT = "heal.json"
DEFAULT_BLOCK_SIZE = 512
Progress = Callable[[int, int, str], None]


def HealConfig(model: str, data: str, output: str, **fields: Any) -> TiedMoeTrainingArguments:
    """Make the arguments under the names of version 0.1: `output`, `batch_size`, `warmup_fraction`."""
    return TiedMoeTrainingArguments.from_dict({"model": model, "data": data, "output": output, **fields})


def heal(args: TiedMoeTrainingArguments, progress: Progress | None = None) -> dict[str, Any]:
    """Train a converted model for a short while and save it.

    In full training the weights are float32 and, with `bf16`, the arithmetic is bfloat16; each is saved in the dtype
    that it has in the model's files. With `lora` the weights stay as they are, the adapters are float32, and both the
    merged model (in `output_dir`) and the adapter (in `output_dir/adapter`) are saved. Norms are frozen unless
    `train_norms`; the router is trained, with the auxiliary losses that the model's own config asks for.

    Args:
        args: what to heal, on what, and how.
        progress: called as `progress(done_steps, all_steps, what)`, instead of Trainer's own bar and log.

    Returns:
        The report that `output_dir/heal.json` holds: `before` and `after` (`loss` in nats per token, `perplexity`,
        `tokens`, all on the held-out blocks and without auxiliary losses), `steps`, `tokens` trained on, `seconds` (of
        this process's steps), `resumed_from_step`, `parameters`, `trainable_parameters`, `history`, `warnings`,
        `is_worse`, `config`, `versions`; with soft routing also `active_experts`, per layer, on the held-out blocks of
        the main process (`routing.active_experts`), and `annealing_held_steps`, in which annealing waited.

    Raises:
        FileNotFoundError: no such data.
        OSError: no such model or teacher.
        TiedMoeError: too little text, a teacher with another vocabulary, an output folder that holds something else,
            another healing at work on it, or a full disk.
        Worse: the held-out loss rose, and `allow_worse` is false; the model is saved, the report is in the error.
        Diverged: the loss is no longer a number, or that of guessing. The last checkpoint whose held-out loss is below
            that of the model before is saved in `OUTPUT_DIR.diverged`, as a model to go on from.
        ImportError: `lora` without peft.
    """
    tell = progress or (lambda done, total, what: None)
    set_seed(args.seed)
    state = PartialState()
    owned = _owned(args)
    inputs = {"model": args.model, "data": args.data, "teacher": args.teacher}
    folder = str(args.output_dir)
    output = check_output(folder, inputs, owned) if state.is_main_process else Path(folder).absolute()

    if not args.merge_adapter:
        refuse_adapter(args.model, merge="--merge-adapter")
    if args.teacher:
        refuse_adapter(args.teacher)

    tell(0, args.max_steps, "reading the text")
    config = load_config(args.model, args.trust_remote_code)
    tokenizer = open_tokenizer(args.model, args.trust_remote_code)
    args = _with_block_size(args, config)
    with state.main_process_first():
        train, validation, text = read_text(args, tokenizer, config.get_text_config().vocab_size)
    identity = {
        "arguments": args.identity | {name: _place(getattr(args, name)) for name in ("model", "data", "teacher")},
        "model": fingerprint(args.model, config),
        "data": text,
        "teacher": fingerprint(args.teacher, load_config(args.teacher, args.trust_remote_code))
        if args.teacher
        else {},
        "versions": versions(),
    }
    with contextlib.ExitStack() as stack:
        with state.main_process_first():  # the lock first; the others only read
            work = stack.enter_context(
                open_work(output, identity, owned=owned, keep=True, is_main=state.is_main_process)
            )
        if work.report is None:
            run = _Run(args, config, tokenizer, (train, validation), work, progress)
            try:
                report = run.report()
            except Diverged as error:
                saved = run.rescue()
                work.keep = False  # the next run, with other arguments, is not to find this one
                raise Diverged(f"{error}. {saved}") from error
            if state.is_main_process:
                work.complete(report)
        else:
            report = work.report
        state.wait_for_everyone()
    if not args.allow_worse:
        refuse_worse(report, output)
    return report


class _Run:
    """One run of a healing in its working folder."""

    def __init__(self, args, config, tokenizer, blocks, work: Work, progress: Progress | None):
        self.args: TiedMoeTrainingArguments = args
        self.config, self.tokenizer, self.work, self.progress = config, tokenizer, work, progress
        self.train, self.validation = blocks
        self.is_main = PartialState().is_main_process
        self.checkpoints = work.scratch / "checkpoints"
        self.checkpoint, damaged = last_sound(self.checkpoints)
        self.warnings = [
            f"checkpoint {name} is damaged or was cut off; the run went on from "
            f"{self.checkpoint.name if self.checkpoint else 'the beginning'}"
            for name in damaged
        ]
        if self.checkpoint:
            fsdp.check_checkpoint(self.checkpoint, args.is_fsdp)
        PartialState().wait_for_everyone()  # all have looked
        if self.is_main:
            for name in damaged:
                shutil.rmtree(self.checkpoints / name)
        self.is_soft = getattr(self.config, "routing", "") == "softmoe"
        self._tell("loading the model")
        offload = work.scratch / f"teacher-{args.process_index}"
        self.teacher = open_teacher(args, config, tokenizer, blocks, offload) if args.teacher else None
        self.model = self._load_model()
        self.fsdp = fsdp.fsdp_plugin(args)
        if self.fsdp:
            fsdp.check_units(self.model, self.fsdp)
        self.trainable = sum(each.numel() for each in self.model.parameters() if each.requires_grad)
        self.health = RouterHealth(warns_of_dead=not self.is_soft)  # AnnealRouting does
        options = {"share": args.anneal, "tolerance": args.anneal_tolerance}
        self.annealing = AnnealRouting(start=self.config.softmoe, **options) if self.is_soft else None
        self.trainer = self._make_trainer()
        if args.lora:
            check_adapters(self.model)

    def report(self) -> dict[str, Any]:
        """Train the steps that are left, save, check what was saved, and return the report."""
        args, trainer = self.args, self.trainer
        start = time.perf_counter()
        if step_of(self.checkpoint) < args.max_steps:
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        else:  # killed after its last step: Trainer would do one more
            assert self.checkpoint is not None
            self._take_over(self.checkpoint)
            if self.fsdp:  # accelerate shards a model together with its optimizer only
                trainer.model, _ = trainer.accelerator.prepare(self.model, trainer.create_optimizer())
            if self.annealing:
                self.annealing.take_targets_away()
        logs = trainer.state.log_history  # of the killed runs as well
        of_this_run = [log for log in logs if log["step"] > step_of(self.checkpoint) or not self.checkpoint]
        seconds = time.perf_counter() - start - sum(log.get("eval_runtime", 0) for log in of_this_run)
        history = history_of(self.trainer.state.log_history)  # without the evaluation that follows
        self._tell("evaluating", done=args.max_steps)
        model = self._final_model(self.work)
        active_experts(model, reset=True)
        after = held_out(trainer.evaluate())
        refuse_diverged(
            held_out_before(self.trainer.state.log_history), after, self.config.get_text_config().vocab_size
        )
        report = self._describe(model, after, history, seconds)
        whole = self._collect(model) if fsdp.is_sharded(model) else None  # by all processes
        if self.is_main:
            self._save(model, report, self.work, Path(str(args.output_dir)).name, whole)
        trainer.accelerator.wait_for_everyone()
        return report

    def rescue(self) -> str:
        """Save the last checkpoint that is better than the model was, beside the output; say in words what was saved.

        The others wait for the first process: one that ends takes the rest with it.
        """
        said = self._rescue() if self.is_main else "The first process says what was saved"
        PartialState().wait_for_everyone()
        return said

    def _rescue(self) -> str:
        args = self.args
        if not self.fsdp:
            self.trainer.model.to("cpu")  # its place is needed
        for checkpoint in sound_checkpoints(self.checkpoints):
            self._tell(f"looking at {checkpoint.name}")
            self.checkpoint = checkpoint
            self.model = self.trainer.model = self._load_model()
            self._take_over(checkpoint)
            if self._perplexity(self.model)["loss"] < held_out_before(self.trainer.state.log_history)["loss"]:
                break
        else:
            return "Nothing was saved, as no checkpoint was better than the model before"
        output = check_output(free_name(Path(str(args.output_dir)).absolute()))
        with open_work(output, {"rescued": {"from": str(args.output_dir)}}) as work:
            model = self._final_model(work)
            active_experts(model, reset=True)
            report = self._describe(
                model, self._perplexity(model), history_of(self.trainer.state.log_history), seconds=0.0
            )
            self._save(model, report, work, output.name)
            work.complete(report)
        return (
            f"The last good model, of step {report['steps']}, is saved in {output}: its held-out loss is "
            f"{report['after']['loss']:.4f}, and was {report['before']['loss']:.4f} before. Go on from it, or begin "
            "anew, with a lower learning_rate"
        )

    def _perplexity(self, model: PreTrainedModel) -> dict[str, Any]:
        """Measure the held-out loss in this process alone."""
        with self.trainer.accelerator.autocast():
            return perplexity(model, self.validation, self.args.eval_batch_size)

    def _describe(self, model: PreTrainedModel, after: dict, history: list, seconds: float) -> dict[str, Any]:
        """Return the report of a final model."""
        args, state = self.args, self.trainer.state
        before = held_out_before(state.log_history)
        if is_worse(before, after):
            self.warnings.append(worse_in_words(before, after))
        used = active_experts(model) if self.is_soft else []
        self.warnings += warnings_of_experts(used, self.config)
        self.warnings += self.annealing.warnings(state.global_step) if self.annealing else []
        return {
            "before": before,
            "after": after,
            "is_worse": is_worse(before, after),
            "steps": state.global_step,
            "tokens": state.global_step
            * args.train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size
            * args.block_size,
            "seconds": round(seconds, 2),
            "resumed_from_step": step_of(self.checkpoint),
            "parameters": sum(each.numel() for each in without_adapters(dict(model.named_parameters())).values()),
            "trainable_parameters": self.trainable,
            "history": history,
            "warnings": [*self.warnings, *self.health.warnings],
            **({"active_experts": used, "annealing_held_steps": self.annealing.held} if self.annealing else {}),
            "num_processes": args.world_size,
            "device": str(args.device),
            "fused_loss": self.trainer.fused is not None,
            "config": args.identity,
            "versions": software(),
        }

    def _tell(self, what: str, done: int | None = None) -> None:
        if self.progress:
            self.progress(step_of(self.checkpoint) if done is None else done, self.args.max_steps, what)

    def _load_model(self) -> PreTrainedModel:
        """Load the model ready to train."""
        args = self.args
        # Not by Trainer's own resuming: it skips names in the file that no module has, and save_pretrained writes a
        # family's old names (an untied OLMoE's experts, one by one). Auto classes read them.
        load = load_merged if args.merge_adapter else load_model
        model = load(args.model, args.trust_remote_code)
        self.dtypes = {name: tensor.dtype for name, tensor in _tensors(model).items()}
        # Of a checkpoint with several dtypes: the tensors that Auto classes round to the config's.
        self.rounded = {} if args.merge_adapter else read_rounded(args.model, model)
        if self.checkpoint and not args.lora and not (self.checkpoint / fsdp.SHARDS).is_dir():
            model = load_model(str(self.checkpoint), args.trust_remote_code)
        if args.lora:
            model = add_lora(model, args.lora_rank, args.lora_target_modules, args.lora_target_parameters)
        for module in () if args.lora else model.modules():
            frozen = "norm" in type(module).__name__.lower() and not args.train_norms
            for parameter in module.parameters(recurse=False):
                # In bfloat16 an update smaller than 1/256 of a weight is lost.
                parameter.data = parameter.data.float()
                parameter.requires_grad_(not frozen)
        if not self.checkpoint and not args.lora:
            for name, tensor in self.rounded.items():
                _tensors(model)[name].data.copy_(tensor)
        elif self.checkpoint and (self.checkpoint / fsdp.SHARDS).is_dir():
            fsdp.read_shards(self.checkpoint, model)
        return model

    def _make_trainer(self) -> HealTrainer:
        args = copy.copy(self.args)
        args.output_dir = str(self.checkpoints)
        args.eval_on_start = self.checkpoint is None
        # Not trainer.evaluate() before trainer.train(): accelerate then takes the model for prepared, and several
        # processes train without exchanging gradients (transformers 5.23 with accelerate 1.15).
        args.disable_tqdm = args.disable_tqdm or self.progress is not None
        args.remove_unused_columns = False  # blocks have none, and those of a cached teacher are not the model's
        trainer = HealTrainer(
            model=self.model,
            args=args,
            train_dataset=self.teacher if isinstance(self.teacher, CachedTeacher) else self.train,
            eval_dataset=self.validation,
            data_collator=default_data_collator,  # blocks need no padding, nor a tokenizer that can pad
            processing_class=self.tokenizer,
            callbacks=[
                RecordCheckpoints(),
                *([ProgressReport(self.progress)] if self.progress else []),
            ],
            lr_divisor=args.lr_divisor,
            budget_lr=args.budget_lr,
            teacher=self.teacher,
            teacher_weight=args.teacher_weight,
            annealing=self.annealing,
        )
        bare = self.model.get_base_model() if args.lora else self.model
        batch_tokens = args.per_device_train_batch_size * (args.block_size or 0)
        trainer.fused, why_not = fuse(bare, self.validation, batch_tokens, args.fused_loss)
        self.warnings += [why_not] if why_not else []
        if trainer.fused and not getattr(self.teacher, "has_head", True):
            self.warnings.append("the teacher's logits exist for whole batches: its head cannot be run by itself")
        if args.separate_documents:
            refuse_crossing(bare, args.model)
        if self.fsdp:
            fsdp.check_enabled(trainer)
        if self.progress:
            trainer.remove_callback(PrinterCallback)
        if layer_experts(bare):
            self.health.attach(trainer)
        if self.annealing:
            self.annealing.attach(trainer)
        return trainer

    def _take_over(self, checkpoint: Path) -> None:
        """Restore the state of a checkpoint from which no step is trained; its full weights are loaded already."""
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.args.lora and not (checkpoint / fsdp.SHARDS).is_dir():
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(str(checkpoint), device="cpu"))
        if self.health in self.trainer.callback_handler.callbacks:
            self.health.restore(self.trainer.state)
        if self.annealing:
            self.annealing.restore(self.model, self.trainer.state)
        self.model.to("cpu" if self.fsdp else self.args.device)  # which may not hold the whole model

    def _final_model(self, work: Work) -> PreTrainedModel:
        """Return the model to evaluate and save: adapters merged, every tensor in the dtype of its file."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if hasattr(model, "merge_and_unload"):
            adapter = fsdp.collect(model, trained_only=True) if fsdp.is_sharded(model) else None  # by all processes
            if self.is_main:
                with work.draft() as draft:
                    model.save_pretrained(draft / "adapter", state_dict=adapter)
            if fsdp.is_sharded(model):
                fsdp.merge_adapters(model)
            else:
                self.trainer.model = model = model.merge_and_unload()
        if fsdp.is_sharded(model):
            fsdp.round_shards(model, self.dtypes | {name: tensor.dtype for name, tensor in self.rounded.items()})
        for name, tensor in () if fsdp.is_sharded(model) else _tensors(model).items():
            if name in self.rounded and not self.args.lora:
                self.rounded[name] = tensor.data.to(self.rounded[name].dtype, copy=True)
            tensor.data = tensor.data.to(self.dtypes[name])  # as Auto classes load it
        if (use_cache := getattr(self.config, "use_cache", None)) is not None:
            model.config.use_cache = use_cache  # Trainer switched it off
        return model

    def _collect(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], float]:
        """Return a sharded final model's whole weights, as they are saved, and its `sample_loss`.

        All processes have to call this; the first gets the weights.
        """
        loss = sample_loss(model, self.validation, self.args)
        dtypes = self.dtypes | {name: tensor.dtype for name, tensor in self.rounded.items()}
        return {name: each.to(dtypes[name]) for name, each in without_adapters(fsdp.collect(model)).items()}, loss

    def _save(self, model: PreTrainedModel, report: dict, work: Work, title: str, whole: tuple | None = None) -> None:
        """Write the model and all that goes with it; raise if the saved model differs from the one in memory.

        Of a sharded model `whole` is what `_collect` returns.
        """
        with work.draft() as draft:
            with replaced(model, {} if whole else self.rounded):
                bare = model.get_base_model() if hasattr(model, "get_base_model") else model
                bare.save_pretrained(draft, state_dict=dict(whole[0]) if whole else None)  # which it empties
            self.tokenizer.save_pretrained(draft)
            settle_tokenizer(self.tokenizer, draft)
            atomic_write_json(draft / REPORT, report)
        if whole:
            policy = self.trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
            loaded = {name: tensor.to(self.dtypes[name]) for name, tensor in whole[0].items()}
            whole = (loaded, whole[1], policy.param_dtype if policy else None)
        check_saved(work.folder, model, self.validation, self.args, whole)
        healing = {name: report[name] for name in ("steps", "tokens", "parameters", "before", "after")} | {
            "learning_rate": self.args.learning_rate,
            "data": self.args.data,
            "teacher": self.args.teacher,
            "teacher_weight": self.args.teacher_weight,
        }
        with work.draft() as draft:
            save_healed(draft, title, self.args.model, model.config, healing, work.files)


def _owned(args: TiedMoeTrainingArguments) -> set[str] | None:
    """Return the files of the finished healing that `overwrite` replaces; None if there is nothing to replace."""
    folder = Path(str(args.output_dir))
    if was_renamed(folder.absolute()):
        return None  # by a run that was killed before its very end, which this one comes to
    if not (folder / REPORT).is_file():
        return set() if args.overwrite else None
    if not args.overwrite:
        raise TiedMoeError(
            f"output {folder} holds a finished healing; give another folder, or ask to overwrite it (overwrite)"
        )
    files = read_manifest(str(folder)).get("files")
    return {*(files if isinstance(files, dict) else {}), MANIFEST}


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _place(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _with_block_size(args: TiedMoeTrainingArguments, config: PreTrainedConfig) -> TiedMoeTrainingArguments:
    """Return the arguments with a block size that fits the model's positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    known = positions if isinstance(positions, int) and positions > 0 else math.inf
    if args.block_size is not None and args.block_size > known:
        raise TiedMoeError(f"block_size={args.block_size}, but {args.model} knows {known} positions; lower it")
    args = copy.copy(args)
    args.block_size = args.block_size or int(min(DEFAULT_BLOCK_SIZE, known))
    return args

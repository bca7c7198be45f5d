"""`audit(AuditConfig(...))`: every kind of evidence on every model, and the folder that holds it.

A model at a time, a section at a time: what is finished is kept beside the output until all is, so that a killed audit
goes on where it was. The output folder appears complete, in one rename.
"""

import contextlib
import functools
import gc
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import psutil
import torch
from transformers import PreTrainedModel

from ..errors import TiedMoeError
from ..files import expand
from ..hub import public_name
from ..manifest import fingerprint, versions
from ..output_place import check_output
from ..run_folder import Work
from ..training.data import check_tokens, load_last_blocks, load_texts, tokens_digest
from ..training.pretrained import open_tokenizer
from ..workdir import open_work
from . import active, drawing, memory, quality, report, stability, strategy
from .config import AuditConfig
from .memory_training import Precision
from .records import Records, execution_device, most_frequent, record
from .schema import ActiveExperts, Audit, Domain, Layer, Memory, ModelAudit, Quality, Section, Stability
from .schema import LayerStrategy as Strategy
from .subject import Subject, open_subject

Progress = Callable[[int, int, str], None]
Convert = Callable[..., PreTrainedModel]
Blocks = Mapping[str, datasets.Dataset]
Made = TypeVar("Made", bound=Section)

RESULT = "audit.json"
DEFAULT_BLOCK_SIZE = 512
MEMORY, ROUTING, STRATEGY, QUALITY = 1, 10, 40, 20  # what the kinds of evidence take, about, for the time left


def audit(config: AuditConfig, progress: Progress | None = None, convert: Convert | None = None) -> dict[str, Any]:
    """Audit models, and write `audit.json`, `report.html`, `report.md` and figures.

    Args:
        config: which models, on which text.
        progress: called as `progress(done, total, what)`.
        convert: ties a model as `convert(recipe, source=, calibration=, calibration_tokens=)`, for suggested plans to
            be measured; this package must not import that of conversions, which has it.

    Returns:
        What `audit.json` holds; see `schema.Audit`.

    Raises:
        FileNotFoundError: no such data.
        OSError: no such model on the Hub.
        TiedMoeError: no such folder, too little text, a tokenizer that does not fit its model, an output folder that
            holds something else, another audit at work on it, a full disk.
        ImportError: `lm_eval` without the harness.
    """
    if config.calibration is not None and convert is None:
        raise TiedMoeError("plans are measured by converting (calibration); expected a function for it (convert)")
    tell = progress or (lambda done, total, what: None)
    if config.lm_eval:
        quality.open_tasks(_quality_options(config))  # a wrong name is told before the work
    _memory_options(config)  # as is a size, a dtype, a GPU
    tell(0, 1, "reading the models")
    inputs: dict[str, str | None] = {f"data {name}": data for name, data in config.texts.items()}
    inputs |= {"calibration": config.calibration} | {f"model {path}": path for path in config.paths}
    output = None if config.output is None else check_output(config.output, inputs)
    if output is not None:
        with drawing.styled():  # without matplotlib it is told before the work
            pass
    subjects = _open_subjects(config)
    if config.memory_only:
        run = _Run(config, subjects, {}, None, tell, None)
        found = run.audit()
        if output is not None:
            with open_work(output, _identity(config, subjects, {}), keep=True) as work:
                _write(work, found)
        return found.model_dump(mode="json")
    tell(0, 1, "reading the text")
    texts = _read_texts(config, subjects)
    if config.calibration is not None:
        load_texts(expand(config.calibration), "text")  # is there; converting, much later, reads it
    assert output is not None
    with open_work(output, _identity(config, subjects, texts), keep=True) as work:
        if work.report is None:
            found = _Run(config, subjects, texts, work, tell, convert).audit()
            _write(work, found)
    return work.report or {}


def _write(work: Work, found: Audit) -> None:
    with work.draft() as draft:
        (draft / RESULT).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        report.write(found, draft)
    work.complete(found.model_dump(mode="json"))


class _Run:
    """One run of an audit in its working folder."""

    def __init__(
        self,
        config: AuditConfig,
        subjects: list[Subject],
        texts: Mapping[str, Blocks],
        work: Work | None,
        tell: Progress,
        convert: Convert | None,
    ):
        self.config, self.subjects, self.texts, self.work, self.convert = config, subjects, texts, work, convert
        per_model = MEMORY if config.memory_only else MEMORY + ROUTING + QUALITY + STRATEGY * config.strategy
        self.stages = _Stages(tell, per_model * len(subjects))

    def audit(self) -> Audit:
        """Audit every model, and compare them."""
        models = [self._model(number, subject) for number, subject in enumerate(self.subjects)]
        return Audit(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.config.command(),
            settings=self.config.settings(),
            versions={"python": platform.python_version(), **versions(), "datasets": version("datasets")},
            machine=_machine(),
            domains=self._domains(),
            models=models,
            pareto=[] if self.config.memory_only else quality.pareto(self._comparable(models)),
        )

    def _model(self, number: int, subject: Subject) -> ModelAudit:
        name, stages = subject.name, self.stages
        found: dict[str, Any] = {}
        with stages.stage(MEMORY, f"{name}: memory"):
            found["memory"] = self._section(
                number, Memory, lambda: memory.measure(subject, _memory_options(self.config))
            )
        if not subject.has_experts:
            subject.notes.append("it has no experts: nothing can be told of active experts, routing and tying")
        if quantised := getattr(subject.config, "quantization_config", None):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
            subject.notes.append(
                f"its weights are quantised ({getattr(method, 'value', method)}): its checkpoint's bytes are those of "
                "its files, and all that takes weights was measured as transformers loads them here"
            )
        if not self.config.memory_only:
            found |= self._with_weights(number, subject)
        layers = list(subject.layers)
        if found.get("active"):
            masses = {each.layer: each.soft_mass for each in found["active"].layers}
            layers = [each.model_copy(update={"soft_mass": masses.get(each.index)}) for each in layers]
        text_config: Any = subject.config.get_text_config()
        return ModelAudit(
            name=name,
            family=getattr(text_config, "family", text_config.model_type),
            architecture=(subject.config.architectures or [type(subject.skeleton()).__name__])[0],
            routing=getattr(text_config, "routing", "top_k"),
            tying=describe_tying(subject.layers),
            layers=layers,
            notes=list(dict.fromkeys(subject.notes)),
            **found,
        )

    def _with_weights(self, number: int, subject: Subject) -> dict[str, Section]:
        """Return the evidence that takes weights and text, of one model."""
        name, config, stages, blocks = subject.name, self.config, self.stages, self.texts[subject.name]
        assert self.work is not None
        weights = _Weights(subject, self.work.scratch / f"offload-{number}")
        found: dict[str, Section] = {}
        with stages.stage(ROUTING, f"{name}: routing") as progress:
            records = self._records(number, subject, weights, blocks, progress) if subject.has_experts else {}
            found["active"] = self._section(number, ActiveExperts, lambda: _active(weights.model, records, blocks))
            if records:
                found["stability"] = self._section(
                    number, Stability, lambda: stability.measure(subject.layers, records, config.seed, config.num_gpus)
                )
        if config.strategy:
            with stages.stage(STRATEGY, f"{name}: layer strategy") as progress:
                if subject.has_experts:
                    found |= self._strategy(number, subject, weights, blocks, progress)
        with stages.stage(QUALITY, f"{name}: quality") as progress:
            found["quality"] = self._section(
                number, Quality, lambda: self._quality(subject, weights.model, blocks, progress)
            )
        weights.drop()
        return found

    def _strategy(
        self, number: int, subject: Subject, weights: "_Weights", blocks: Blocks, progress: Progress
    ) -> dict[str, Section]:
        if weights.is_offloaded:
            subject.notes.append("layer strategy was left out: to replace parts of layers takes the weights in memory")
            return {}
        convert, calibration = None, self.config.calibration
        if calibration is not None and self.convert is not None:
            convert = functools.partial(
                self.convert,
                source=subject.path,
                calibration=expand(calibration),
                calibration_tokens=self.config.calibration_tokens,
            )
        options = strategy.StrategyOptions(batch_size=self.config.batch_size, convert=convert, seed=self.config.seed)
        made = self._section(
            number, Strategy, lambda: strategy.measure(subject, weights.model, blocks, options, progress)
        )
        return {"strategy": made}

    def _quality(self, subject: Subject, model: PreTrainedModel, blocks: Blocks, progress: Progress) -> Quality:
        return quality.measure(subject, model, blocks, _quality_options(self.config), progress)

    def _records(
        self, number: int, subject: Subject, weights: "_Weights", blocks: Blocks, progress: Progress
    ) -> dict[str, Records]:
        """Return what the routers did on each text, of this run or of one that was killed after it."""
        assert self.work is not None
        is_source = self.config.source is not None and number == 0
        found, frequent = {}, most_frequent(blocks.values())
        for place, (domain, rows) in enumerate(blocks.items()):
            file = f"records-{number}-{place}.safetensors"
            kept = self.work.load(file)
            if kept is None:
                records = record(
                    weights.model,
                    rows,
                    self.config.batch_size,
                    source=self._source_records(subject, place),
                    keep_choices=is_source and len(self.subjects) > 1,
                    frequent=frequent,
                    progress=_part(progress, place, len(blocks), domain),
                )
                self.work.store(file, records.save)
                kept = self.work.load(file)
                assert kept is not None
            found[domain] = Records.load(kept[0])
        return found

    def _source_records(self, subject: Subject, place: int) -> Records | None:
        """Return what the source chose on a text; None of the source itself, or if it reads the text otherwise."""
        source = self.subjects[0]
        if self.config.source is None or subject is source:
            return None
        if self.texts[subject.name] is not self.texts[source.name]:
            subject.notes.append(f"its choices were not compared with the source's: {source.name} numbers its tokens "
                                 "differently")  # fmt: skip
            return None
        assert self.work is not None
        kept = self.work.load(f"records-0-{place}.safetensors")
        return Records.load(kept[0]) if kept is not None else None

    def _section(self, number: int, kind: type[Made], make: Callable[[], Made]) -> Made:
        """Return a section of a model: what a run that was killed had finished, or else what `make` gives."""
        if self.work is None:
            return make()
        file, notes = f"{kind.__name__.lower()}-{number}.json", self.subjects[number].notes
        kept = self.work.load(file)
        if kept is not None:
            notes += kept[1]["notes"]
            return kind.model_validate_json(kept[0].read_bytes())
        before = len(notes)
        made = make()
        text = made.model_dump_json()
        self.work.store(file, lambda path: path.write_text(text, encoding="utf-8"), {"notes": notes[before:]})
        return kind.model_validate_json(text)

    def _domains(self) -> list[Domain]:
        if not self.texts:
            return []
        blocks = self.texts[self.subjects[0].name]
        return [
            Domain(
                name=name,
                data=public_name(data),
                num_tokens=len(blocks[name]) * len(blocks[name][0]["input_ids"]),
                num_blocks=len(blocks[name]),
                block_size=len(blocks[name][0]["input_ids"]),
                sha256=tokens_digest(blocks[name]),
            )
            for name, data in self.config.texts.items()
        ]

    def _comparable(self, models: list[ModelAudit]) -> list[ModelAudit]:
        """Return the models, without the losses of those whose tokens are not the first model's."""
        first, compared = self.texts[self.subjects[0].name], []
        for subject, model in zip(self.subjects, models):
            if self.texts[subject.name] is not first and model.quality is not None:
                model.notes.append(
                    f"its tokens are not those of {self.subjects[0].name}: losses and perplexities per token do not "
                    "compare, and are left out of the comparison"
                )
                model = model.model_copy(update={"quality": model.quality.model_copy(update={"loss": {}})})
            compared.append(model)
        return compared


class _Weights:
    """A model that is loaded when it is first needed: never, if an earlier run has done what needs it."""

    def __init__(self, subject: Subject, offload_folder: Path):
        self.subject, self.offload_folder = subject, offload_folder

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in eval mode."""
        return self.subject.load(self.offload_folder)

    @property
    def is_offloaded(self) -> bool:
        """Whether weights are read from the disk, or from memory to a GPU, as they are needed."""
        return any(each.is_meta for each in self.model.parameters())

    def drop(self) -> None:
        """Free the memory, and what was laid on the disk."""
        self.__dict__.pop("model", None)
        gc.collect()
        shutil.rmtree(self.offload_folder, ignore_errors=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Stages:
    """One progress of stages that take, about, so much each."""

    def __init__(self, tell: Progress, total: int):
        self.tell, self.total, self.done = tell, total, 0

    @contextlib.contextmanager
    def stage(self, size: int, what: str) -> Iterator[Progress]:
        """Give the progress of one stage."""

        def progress(done: int, total: int, detail: str) -> None:
            share = min(done / total, 1) if total else 0
            told = f"{what}, {detail}" if detail else what
            self.tell(round(1000 * (self.done + share * size)), 1000 * self.total, told)

        progress(0, 1, "")
        yield progress
        self.done += size


def _part(progress: Progress, place: int, of: int, detail: str) -> Progress:
    """Return the progress of one of several equal parts."""
    return lambda done, total, what: progress(place * total + done, of * total, detail)


def describe_tying(layers: tuple[Layer, ...]) -> str:
    """Say in words which layers read which pools."""
    with_experts = [each for each in layers if each.kind != "dense"]
    pools: dict[int, list[int]] = {}
    for each in with_experts:
        if each.pool is not None:
            pools.setdefault(each.pool, []).append(each.index)
    if not with_experts:
        return "no experts"
    if not pools:
        return "untied"
    groups = "; ".join(f"{group[0]} to {group[-1]}" if len(group) > 1 else str(group[0]) for group in pools.values())
    num_tied = sum(map(len, pools.values()))
    plural = "s" if len(pools) > 1 else ""
    return f"{num_tied} of {len(with_experts)} layers with experts read {len(pools)} pool{plural}: layers {groups}"


def _active(model: PreTrainedModel, records: dict[str, Records], blocks: Blocks) -> ActiveExperts:
    rows = next(iter(blocks.values()))
    input_ids = torch.tensor(rows[:1]["input_ids"], device=execution_device(model))
    flops = active.count_flops(model, input_ids)
    if not records:
        return ActiveExperts(
            is_adaptive=False,
            per_token={},
            layers=[],
            position_bins=[],
            flops_per_token=dict.fromkeys(blocks, flops),
            domain_shift={},
        )
    return active.measure(records, flops, active.expert_flops(model), active.soft_masses(model))


def _memory_options(config: AuditConfig) -> memory.MemoryOptions:
    gpus: dict[str, Any] = {} if config.gpus is None else {"gpus": tuple(config.gpus)}
    return memory.MemoryOptions(
        context=config.context,
        batch_size=config.sequences,
        num_gpus=config.num_gpus,
        block_size=config.train_block_size,
        precision=cast(Precision, config.precision),
        dtypes=tuple(config.dtypes),
        **gpus,
    )


def _quality_options(config: AuditConfig) -> quality.QualityOptions:
    tasks = tuple(each.strip() for each in (config.lm_eval or "").split(",") if each.strip())
    return quality.QualityOptions(
        batch_size=config.batch_size, tasks=tasks, limit=config.lm_eval_limit, seed=config.seed
    )


def _open_subjects(config: AuditConfig) -> list[Subject]:
    """Open the models, the source first; of one name, as many of the folders above tell them apart as it takes."""
    paths = config.paths
    names = [public_name(path) for path in paths]
    parts = [Path(path).resolve().parts if Path(path).exists() else () for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["/".join(each[-depth:]) if each and name in twice else name for each, name in zip(parts, names)]
    if twice := {name for name in names if names.count(name) > 1}:
        same = [path for path, name in zip(paths, names) if name in twice]
        raise TiedMoeError(f"{same[0]} and {same[1]} are the same model; give it once")
    return [open_subject(path, name, config.trust_remote_code) for path, name in zip(paths, names)]


def _read_texts(config: AuditConfig, subjects: list[Subject]) -> dict[str, Blocks]:
    """Return by model its texts in its tokens; models with one vocabulary get the same object."""
    found: dict[str, Blocks] = {}
    vocabularies: list[tuple[dict[str, int], Blocks]] = []
    block_size = _block_size(config, subjects)
    for subject in subjects:
        tokenizer = open_tokenizer(subject.path, config.trust_remote_code)
        vocabulary = tokenizer.get_vocab()
        blocks = next((each for known, each in vocabularies if known == vocabulary), None)
        if blocks is None:
            blocks = {
                name: load_last_blocks(
                    data,
                    tokenizer,
                    block_size,
                    config.share,
                    max(1, config.num_tokens // block_size),
                    config.text_column,
                )
                for name, data in config.texts.items()
            }
            vocabularies.append((vocabulary, blocks))
        check_tokens(subject.path, subject.config.get_text_config().vocab_size, *blocks.values())
        found[subject.name] = blocks
    return found


def _block_size(config: AuditConfig, subjects: list[Subject]) -> int:
    """Return the block size of all models: as asked for, if they know so many positions."""
    sizes = []
    for subject in subjects:
        positions = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            sizes.append(positions)
            if (config.block_size or 0) > positions:
                raise TiedMoeError(
                    f"block_size={config.block_size}, but {subject.name} knows {positions} positions; lower it"
                )
    return config.block_size or min([DEFAULT_BLOCK_SIZE, *sizes])


def _identity(config: AuditConfig, subjects: list[Subject], texts: Mapping[str, Blocks]) -> dict[str, dict[str, Any]]:
    """Return what decides the result: a killed audit goes on only with the same."""
    return {
        "arguments": config.settings(),
        "models": {each.name: [str(Path(each.path).absolute()) if Path(each.path).exists() else each.path,
                               fingerprint(each.path, each.config)] for each in subjects},
        "data": {
            f"{model} {name}": tokens_digest(rows) for model, blocks in texts.items() for name, rows in blocks.items()
        },
        "versions": versions(),
    }  # fmt: skip


def _machine() -> dict[str, Any]:
    """Describe the machine without naming it."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "num_cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }

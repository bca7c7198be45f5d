"""Evidence 5: what a model costs and how good it is, and which of several nobody beats.

Losses are taken on the blocks of every domain, tasks by lm-evaluation-harness, speeds and memory on this machine: one
sequence, few repeats, to compare the models of one audit and not machines.
"""

import contextlib
import importlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from transformers import PreTrainedModel

from ..errors import TiedMoeError, reading
from ..training.data import sequence_losses
from ..training.pretrained import open_tokenizer
from .bootstrap import interval
from .metrics import bits_saved, perplexity, quality_per_gflop, quality_per_gib
from .records import execution_device
from .schema import Interval, ModelAudit, ParetoPoint, Quality, Task
from .subject import Subject

Progress = Callable[[int, int, str], None]
REPEATS = 3  # of a timing, after one that does not count; the median is reported
NEW_TOKENS = 32  # that decoding is timed on
SAMPLED_EVERY = 0.01  # seconds, of the process's memory
BOOTSTRAPS = 1000  # of the harness, for standard errors of metrics that have no formula


@dataclass(frozen=True)
class QualityOptions:
    """What quality is measured by.

    Attributes:
        batch_size: blocks, or requests of a task, in one forward.
        tasks: of lm-evaluation-harness by name, or paths of YAML files of tasks.
        limit: documents of each task, at most.
        num_shots: examples before each question; None leaves it to the task.
        seed: of the intervals.
    """

    batch_size: int = 8
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_shots: int | None = None
    seed: int = 0


def measure(
    subject: Subject,
    model: PreTrainedModel,
    domains: Mapping[str, datasets.Dataset],
    options: QualityOptions = QualityOptions(),
    progress: Progress | None = None,
) -> Quality:
    """Measure loss by domain, tasks, speed and peak memory.

    Args:
        subject: the model; what could not be measured is said in its notes.
        model: its weights, in eval mode.
        domains: blocks of text.
        options: see there.
        progress: called as `progress(done, total, what)`.

    Raises:
        ImportError: tasks without lm-evaluation-harness.
        TiedMoeError: no such task, or one that cannot be evaluated.
    """
    report = progress or (lambda done, total, what: None)
    total = len(domains) + 1 + len(options.tasks)
    run_tasks = open_tasks(options) if options.tasks else None  # a wrong name is told before the work
    device, tokenizer = execution_device(model), _tokenizer(subject)
    losses: dict[str, Interval] = {}
    bits: dict[str, Interval] = {}
    with peak_memory(device) as peak:
        for done, (name, blocks) in enumerate(domains.items()):
            report(done, total, f"loss on {name}")
            sums, counts = _losses(model, device, blocks, options.batch_size)
            losses[name] = interval(sums, counts, seed=options.seed)
            if tokenizer is not None:
                bits[name] = interval(sums / math.log(2), _num_bytes(tokenizer, blocks), seed=options.seed)
        report(len(domains), total, "speed")
        prefill, decode = _speeds(subject, model, device, next(iter(domains.values())))
    if run_tasks:
        report(len(domains) + 1, total, f"tasks {', '.join(options.tasks)}")
    return Quality(
        loss=losses,
        perplexity={name: perplexity(loss.value) for name, loss in losses.items()},
        bits_per_byte=bits,
        tasks=run_tasks(subject, model) if run_tasks else [],
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        peak_memory_bytes=peak[0],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


# Loss


@torch.no_grad()
def _losses(
    model: PreTrainedModel, device: torch.device, blocks: datasets.Dataset, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each block's summed loss in nats, float64 `[B]`, and its predicted tokens, int64 `[B]`."""
    found = []
    for batch in blocks.with_format("torch").iter(batch_size):
        input_ids, labels = (batch[key].to(device, torch.int64) for key in ("input_ids", "labels"))
        found.append([each.cpu() for each in sequence_losses(model, input_ids, labels)])
    sums, counts = (torch.cat(parts) for parts in zip(*found))
    return sums.double(), counts


def _tokenizer(subject: Subject) -> Any:
    """Open a model's tokenizer; None, with a note, if it has none."""
    try:
        tokenizer = open_tokenizer(subject.path, subject.trust_remote_code)
        if tokenizer("Some text.").input_ids:  # without files transformers makes one up, which knows no text
            return tokenizer
    except (TiedMoeError, OSError):
        pass
    subject.notes.append("quality: no bits per byte, as it has no tokenizer that reads text")
    return None


def _num_bytes(tokenizer: Any, blocks: datasets.Dataset) -> torch.Tensor:
    """Return the bytes of text that the predicted tokens of each block stand for, `[B]`.

    A block is decoded with its first token, which is not predicted, and that token alone.
    """
    rows = blocks["input_ids"][:]
    whole, first = (
        tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) for ids in (rows, [row[:1] for row in rows])
    )
    return torch.tensor([len(a.encode()) - len(b.encode()) for a, b in zip(whole, first)])


# Tasks


def open_tasks(options: QualityOptions) -> Callable[[Subject, PreTrainedModel], list[Task]]:
    """Find the tasks, so that a wrong name is told at once; return what evaluates them.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        TiedMoeError: no such task.
    """
    try:
        harness = importlib.import_module("lm_eval")
        tasks: Any = importlib.import_module("lm_eval.tasks")
        models: Any = importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ImportError(
            f"tasks ({', '.join(options.tasks)}) need lm-evaluation-harness, which cannot be imported ({error}); "
            "pip install 'transformers-tiedmoe[eval]'"
        ) from error
    paths = [task for task in options.tasks if Path(task).suffix in (".yaml", ".yml")]
    manager = tasks.TaskManager(include_defaults=len(paths) < len(options.tasks))
    known = set(manager.all_tasks)
    missing = [task for task in options.tasks if not (Path(task).is_file() if task in paths else task in known)]
    if missing:
        raise TiedMoeError(
            f"lm-evaluation-harness knows no task {missing[0]!r}; expected a name that `lm-eval ls tasks` shows, or "
            "the path of a YAML file"
        )

    def run(subject: Subject, model: PreTrainedModel) -> list[Task]:
        wrapped = models.HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=open_tokenizer(subject.path, subject.trust_remote_code),
            batch_size=options.batch_size,
        )
        with reading(f"the tasks {', '.join(options.tasks)} with {subject.name}"):
            found = harness.simple_evaluate(
                model=wrapped,
                tasks=list(options.tasks),
                task_manager=manager,
                num_fewshot=options.num_shots,
                limit=options.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        return list(_tasks(found))

    return run


def _tasks(found: Mapping[str, Any]) -> Iterator[Task]:
    """Yield every metric of every task and group of tasks in the harness's results."""
    for name, results in found["results"].items():
        for key, value in results.items():
            metric, _, rest = key.partition(",")
            if not rest or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results.get(f"{metric}_stderr,{rest}")
            samples = found.get("n-samples", {}).get(name, {})
            yield Task(
                name=name,
                metric=metric if rest == "none" else f"{metric} ({rest})",
                value=value,
                standard_error=error if isinstance(error, (int, float)) else None,
                num_shots=found.get("n-shot", {}).get(name),
                num_samples=samples.get("effective") or results.get("sample_len") or 0,
                is_higher_better=found.get("higher_is_better", {}).get(name, {}).get(metric) is not False,
            )


# Speed and memory


@torch.no_grad()
def _speeds(
    subject: Subject, model: PreTrainedModel, device: torch.device, blocks: datasets.Dataset
) -> tuple[float | None, float | None]:
    """Return tokens per second of reading one block, and of writing after it with a cache, one sequence each."""
    block = torch.tensor(blocks[:1]["input_ids"], device=device)
    prefill = block.shape[1] / _seconds(lambda: model(input_ids=block, use_cache=False), device)
    new_tokens = min(NEW_TOKENS, block.shape[1] // 2)
    prompt = block[:, : block.shape[1] - new_tokens]  # a model may know no more positions than a block has

    def generate(number: int) -> float:
        kept: Any = {"min_new_tokens": number, "max_new_tokens": number, "do_sample": False, "pad_token_id": 0}
        ones = torch.ones_like(prompt)
        return _seconds(lambda: model.generate(prompt, attention_mask=ones, use_cache=True, **kept), device)

    try:
        seconds = generate(new_tokens) - generate(1)
    except Exception as error:  # whatever a family without a cache raises
        subject.notes.append(f"quality: decoding was not timed, as generate fails ({type(error).__name__}: {error})")
        return prefill, None
    if seconds <= 0:
        subject.notes.append("quality: decoding was not timed, as this machine is too busy to tell its time")
        return prefill, None
    return prefill, (new_tokens - 1) / seconds


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Find the most memory in use within the block, which is in the list it gives when the block has ended.

    On a GPU that is what torch has allocated, elsewhere the resident size of the process, sampled.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    process, is_done = psutil.Process(), threading.Event()

    def sample() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if is_done.wait(SAMPLED_EVERY):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_done.set()
        thread.join()
        peak[0] = max(peak[0], process.memory_info().rss)


# Several models


def pareto(models: Sequence[ModelAudit]) -> list[ParetoPoint]:
    """Return a point a model and measure, and whether any other model beats it at no more compute, or memory.

    A model is on a front if none is at least as good at no more cost and better in one of the two: models that tie in
    both are on it together. Compute is the FLOPs of a token, on the domain of the measure or, of a task, on average
    over domains; memory is what serving needs, in the first dtype of the memory section. Losses per token compare only
    between models of one vocabulary: where a model comes without, bits per byte are compared besides. A model without
    one of the two costs is left out.

    What a point's quality is, for each GiB and GFLOP, is in `metrics.py`.
    """
    costs = {model.name: cost for model in models if (cost := _costs(model)) is not None}
    found = {model.name: model.quality for model in models if model.quality is not None}
    points = []
    for measure_name, domain, values, is_lower_better in _measures(models):
        names = [name for name, value in values.items() if name in costs and math.isfinite(value)]
        worse = [values[name] if is_lower_better else -values[name] for name in names]
        flops = [costs[name].on(domain) for name in names]
        memory = [costs[name].memory_bytes for name in names]
        on_compute, on_memory = _front(worse, flops), _front(worse, memory)
        points += [
            ParetoPoint(
                model=name,
                measure=measure_name,
                value=values[name],
                flops_per_token=flops[i],
                memory_bytes=memory[i],
                is_lower_better=is_lower_better,
                is_on_compute_front=on_compute[i],
                is_on_memory_front=on_memory[i],
                **_worth(found[name], domain, values[name], is_lower_better, flops[i], memory[i]),
            )
            for i, name in enumerate(names)
        ]
    return points


def _worth(
    found: Quality, domain: str | None, value: float, is_lower_better: bool, flops: float, memory: int
) -> dict[str, float]:
    """Return a point's quality, which begins at 0, and its ratios to the costs; nothing of a measure without one."""
    bits = found.bits_per_byte.get(domain) if domain is not None else None
    if domain is None and not is_lower_better:
        worth = value
    elif bits is not None:
        worth = bits_saved(bits.value)
    else:
        return {}
    ratios = {"quality_per_gib": quality_per_gib(worth, memory), "quality_per_gflop": quality_per_gflop(worth, flops)}
    return {"quality": worth, **ratios}


@dataclass(frozen=True)
class _Costs:
    flops_per_token: Mapping[str, float]
    memory_bytes: int

    def on(self, domain: str | None) -> float:
        """Return the FLOPs of a token on a domain, or on average over domains."""
        found = self.flops_per_token
        return found[domain] if domain is not None and domain in found else statistics.fmean(found.values())


def _costs(model: ModelAudit) -> _Costs | None:
    """Return what a model costs; None, with a note, if it has a quality to compare but a cost is not known."""
    flops = model.active.flops_per_token if model.active else {}
    serving = model.memory.inference if model.memory else []
    if model.quality is None:
        return None
    if not flops or not serving:
        unknown = "memory" if flops else "FLOPs of a token"
        model.notes.append(f"left out of the comparison of costs and quality, which knows no {unknown} of it")
        return None
    return _Costs(flops, serving[0].total_bytes)


def _measures(models: Sequence[ModelAudit]) -> Iterator[tuple[str, str | None, dict[str, float], bool]]:
    """Yield each measure's name, its domain if it has one, its value by model, and whether less is better."""
    found = {model.name: model.quality for model in models if model.quality is not None}
    for domain in dict.fromkeys(name for each in found.values() for name in (*each.loss, *each.bits_per_byte)):
        losses = {name: each.loss[domain].value for name, each in found.items() if domain in each.loss}
        bits = {name: each.bits_per_byte[domain].value for name, each in found.items() if domain in each.bits_per_byte}
        yield f"loss {domain}", domain, losses, True
        if bits.keys() - losses.keys():
            yield f"bits per byte {domain}", domain, bits, True
    tasks: dict[tuple[str, str, bool], dict[str, float]] = {}
    for name, each in found.items():
        for task in each.tasks:
            tasks.setdefault((task.name, task.metric, task.is_higher_better), {})[name] = task.value
    for (task_name, metric, is_higher_better), values in tasks.items():
        yield f"{task_name} {metric}", None, values, not is_higher_better


def _front(values: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Tell of each, less being better in both, whether no other is as good in both and better in one."""
    points = list(zip(values, costs))
    return [not any(v <= value and c <= cost and (v, c) != (value, cost) for v, c in points) for value, cost in points]

"""Cost against quality: losses by hand, tasks by the real harness, fronts against every pair of models."""

import importlib
import json
import math
import mmap
import random
import sys
import time

import psutil
import pytest
import torch
from checkpoints import make_text, make_tokenizer, save_source, save_tied

from transformers_tiedmoe.audit import quality
from transformers_tiedmoe.audit.quality import QualityOptions, measure, open_tasks, pareto, peak_memory
from transformers_tiedmoe.audit.schema import (
    ActiveExperts,
    Inference,
    Interval,
    Memory,
    ModelAudit,
    Parameters,
    Quality,
    Task,
)
from transformers_tiedmoe.audit.subject import open_subject
from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.training.data import load_blocks, perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untied and a tied checkpoint with their tokenizer, and text; do not change them."""
    folder = tmp_path_factory.mktemp("quality")
    save_source(folder / "source")
    save_tied(folder / "tied")
    (folder / "text.txt").write_text(make_text(200) + "ümläut ☃ " * 40)
    return folder


@pytest.fixture(scope="module")
def domains(folder):
    train, held_out = load_blocks(folder / "text.txt", make_tokenizer(), 16, 0.2)
    return {"train": train.select(range(12)), "held out": held_out}


@pytest.fixture(scope="module")
def source(folder):
    subject = open_subject(str(folder / "source"))
    return subject, subject.load()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(quality, "REPEATS", 1)
    monkeypatch.setattr(quality, "NEW_TOKENS", 4)


def test_losses_are_those_of_all_tokens(source, domains, fast):
    subject, model = source
    calls = []
    found = measure(subject, model, domains, QualityOptions(batch_size=5), lambda *call: calls.append(call))
    for name, blocks in domains.items():
        expected = perplexity(model, blocks)
        assert found.loss[name].value == pytest.approx(expected["loss"], abs=1e-5)
        assert found.perplexity[name] == pytest.approx(expected["perplexity"], rel=1e-5)
        assert found.loss[name].low < found.loss[name].value < found.loss[name].high
    assert found.tasks == []
    assert found.device == "cpu"
    assert [done for done, _, _ in calls] == [0, 1, 2]
    assert {total for _, total, _ in calls} == {3}


def test_bits_per_byte_are_those_of_the_text(source, domains, fast):
    """By hand: the bytes of the text that a block's tokens are, but for the first token's."""
    subject, model = source
    blocks = domains["held out"]
    found = measure(subject, model, domains, QualityOptions())
    tokenizer, total = make_tokenizer(), perplexity(model, blocks)
    num_bytes = sum(sum(map(_bytes_of(tokenizer), row[1:])) for row in blocks["input_ids"])
    nats = total["loss"] * total["tokens"]
    # A block may end within a letter, which decodes to a replacement of three bytes.
    assert found.bits_per_byte["held out"].value == pytest.approx(nats / math.log(2) / num_bytes, rel=0.02)


def _bytes_of(tokenizer):
    """The bytes of one token of a byte-level tokenizer: as many as it has characters."""
    return lambda token: len(tokenizer.convert_ids_to_tokens(token))


def test_no_tokenizer_no_bits_per_byte(tmp_path, domains, fast):
    save_source(tmp_path / "source")
    subject = open_subject(str(tmp_path / "source"))
    model = subject.load()
    for path in (tmp_path / "source").glob("tokenizer*"):
        path.unlink()
    found = measure(subject, model, domains, QualityOptions())
    assert found.bits_per_byte == {}
    assert set(found.loss) == set(domains)
    assert len([note for note in subject.notes if "no bits per byte" in note]) == 1


@pytest.mark.parametrize("kind", ["source", "tied"])
def test_speed_is_tokens_over_time(kind, folder, domains, fast, monkeypatch):
    """By a clock that goes on when the model runs: 0.1 s a forward, and generating 1 s a token after 2 s."""
    subject = open_subject(str(folder / kind))
    model = subject.load()
    now, written, forward, generate = [0.0], [], model.forward, model.generate

    def slow_forward(*args, **kwargs):
        now[0] += 0.1
        return forward(*args, **kwargs)

    def slow_generate(*args, **kwargs):
        before = now[0]
        ids = generate(*args, **kwargs)
        written.append(ids.shape[1] - args[0].shape[1])
        now[0] = before + 2 + written[-1]
        return ids

    monkeypatch.setattr(quality.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(model, "forward", slow_forward)
    monkeypatch.setattr(model, "generate", slow_generate)
    found = measure(subject, model, domains, QualityOptions())
    assert found.prefill_tokens_per_second == pytest.approx(16 / 0.1)
    assert written == [4, 4, 1, 1]
    assert found.decode_tokens_per_second == pytest.approx(3 / 3)


def test_a_model_that_cannot_generate_says_so(source, domains, fast, monkeypatch):
    _, model = source
    subject = open_subject(source[0].path)
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: (_ for _ in ()).throw(NotImplementedError("none")))
    found = measure(subject, model, domains, QualityOptions())
    assert found.decode_tokens_per_second is None
    assert found.prefill_tokens_per_second > 0
    assert subject.notes == ["quality: decoding was not timed, as generate fails (NotImplementedError: none)"]


def test_peak_memory_is_that_of_the_block():
    process = psutil.Process()
    with peak_memory(torch.device("cpu")) as peak:
        held = mmap.mmap(-1, 200 << 20)  # pages of its own, which no earlier test has left behind
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        time.sleep(0.1)
        most = process.memory_info().rss
        held.close()
    assert peak[0] == pytest.approx(most, rel=0.05)
    assert peak[0] - process.memory_info().rss > 150 << 20


# Tasks


def write_task(folder, name="tiny_choice", **fields):
    lines = [{"question": "the cat", "choices": [" sat", " ümläut"], "answer": i % 2} for i in range(6)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "tiny.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    } | fields  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task))  # YAML too
    return str(path)


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness, the extra `eval`, is not installed")


@pytest.mark.parametrize("kind", ["source", "tied"])
def test_a_local_task(kind, folder, domains, tmp_path, fast, harness):
    """Accuracy by hand: whichever of two endings the model finds likelier, of the same six questions."""
    subject = open_subject(str(folder / kind))
    model = subject.load()
    found = measure(subject, model, domains, QualityOptions(tasks=(write_task(tmp_path),)))
    (task,) = found.tasks
    tokenizer = make_tokenizer()

    def likelihood(ending):
        start, ids = (tokenizer(text, return_tensors="pt").input_ids[0] for text in ("the cat", "the cat" + ending))
        with torch.no_grad():
            logs = model(ids[None]).logits[0].log_softmax(-1)
        return sum(float(logs[i - 1, ids[i]]) for i in range(len(start), len(ids)))

    chosen = max((0, 1), key=lambda i: likelihood((" sat", " ümläut")[i]))
    assert (task.name, task.metric, task.num_samples, task.num_shots) == ("tiny_choice", "acc", 6, 0)
    assert task.value == sum(i % 2 == chosen for i in range(6)) / 6 == 0.5
    assert task.standard_error == pytest.approx(0.5 / math.sqrt(5), abs=0.01)
    assert task.is_higher_better
    limited = open_tasks(QualityOptions(tasks=(write_task(tmp_path),), limit=2))(subject, model)
    assert limited[0].num_samples == 2


def test_a_task_that_is_not_there(harness, tmp_path):
    with pytest.raises(TiedMoeError, match=r"knows no task .*nowhere\.yaml"):
        open_tasks(QualityOptions(tasks=(str(tmp_path / "nowhere.yaml"),)))


@pytest.mark.slow  # reads all of the harness's tasks
def test_a_task_that_the_harness_does_not_know(harness):
    with pytest.raises(TiedMoeError, match="knows no task 'helaswag'; expected a name"):
        open_tasks(QualityOptions(tasks=("helaswag",)))


def test_a_task_whose_data_are_not_there(source, harness, tmp_path):
    path = write_task(tmp_path)
    (tmp_path / "tiny.jsonl").unlink()
    with pytest.raises((TiedMoeError, OSError), match=r"tiny\.jsonl"):
        open_tasks(QualityOptions(tasks=(path,)))(*source)


def test_tasks_without_the_harness_name_the_extra(source, domains, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"tasks \(hellaswag\) need lm-evaluation-harness.*\[eval\]"):
        measure(*source, domains, QualityOptions(tasks=("hellaswag",)))


def test_metrics_of_the_harness_results():
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "word_perplexity,none": 9.0,
                  "word_perplexity_stderr,none": "N/A", "sample_len": 4},
            "b": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.2, "exact_match,loose": 0.5},
        },
        "n-shot": {"a": 5, "b": 0},
        "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 8, "effective": 8}},
        "higher_is_better": {"a": {"acc": True, "word_perplexity": False}, "b": {"exact_match": True}},
    }  # fmt: skip
    tasks = {(task.name, task.metric): task for task in quality._tasks(found)}
    assert list(tasks) == [
        ("a", "acc"), ("a", "word_perplexity"), ("b", "exact_match (strict)"), ("b", "exact_match (loose)")
    ]  # fmt: skip
    acc, perplexities, strict, loose = tasks.values()
    assert (acc.value, acc.standard_error, acc.num_shots, acc.num_samples) == (0.5, 0.1, 5, 4)
    assert (perplexities.standard_error, perplexities.is_higher_better) == (None, False)
    assert (strict.standard_error, loose.standard_error) == (0.2, None)


# Several models


def audited(name, loss=None, flops=1.0, memory=1, bits=None, tasks=()):
    serving = Inference(
        dtype="bfloat16", context=1, batch_size=1, weight_bytes=memory or 0, cache_bytes=0, working_bytes=0,
        total_bytes=memory or 0, fits={},
    )  # fmt: skip
    as_interval = lambda value: {} if value is None else {"text": Interval(value=value)}  # noqa: E731
    return ModelAudit(
        name=name, family="olmoe", architecture="OlmoeForCausalLM", routing="top_k", tying="untied", layers=[],
        active=None if flops is None else ActiveExperts(
            is_adaptive=False, per_token={}, layers=[], position_bins=[],
            flops_per_token={"text": flops, "other": 3 * flops}, domain_shift={},
        ),
        memory=None if memory is None else Memory.model_construct(
            parameters={"total": Parameters(unique=1, read=1, active=1)}, inference=[serving]
        ),
        quality=Quality(
            loss=as_interval(loss), perplexity={}, bits_per_byte=as_interval(bits), tasks=list(tasks), device="cpu",
            prefill_tokens_per_second=None, decode_tokens_per_second=None, peak_memory_bytes=None,
        ),
    )  # fmt: skip


def task(value, metric="acc", is_higher_better=True):
    return Task(
        name="t", metric=metric, value=value, standard_error=None, num_shots=0, num_samples=1,
        is_higher_better=is_higher_better,
    )  # fmt: skip


def test_fronts_are_those_of_all_pairs():
    draw = random.Random(0)
    for _ in range(50):  # few values: many ties
        models = [
            audited(
                str(i), draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 4), tasks=[task(draw.randint(1, 4))]
            )
            for i in range(6)
        ]
        points = pareto(models)
        assert len(points) == 12
        for point in points:
            sign = 1 if point.is_lower_better else -1
            others = [each for each in points if each.measure == point.measure]
            for cost, is_on_front in (
                ("flops_per_token", point.is_on_compute_front),
                ("memory_bytes", point.is_on_memory_front),
            ):
                mine = (sign * point.value, getattr(point, cost))
                beaten = [
                    other for each in others
                    for other in [(sign * each.value, getattr(each, cost))]
                    if other[0] <= mine[0] and other[1] <= mine[1] and other != mine
                ]  # fmt: skip
                assert is_on_front == (not beaten)


def test_compute_is_that_of_the_domain_or_the_mean():
    points = {point.measure: point for point in pareto([audited("a", 1.0, 10.0, 7, tasks=[task(0.5)])])}
    assert points["loss text"].flops_per_token == 10
    assert points["t acc"].flops_per_token == 20
    assert points["t acc"].memory_bytes == 7
    assert not points["t acc"].is_lower_better
    assert points["loss text"].is_lower_better


def test_models_that_tie_are_on_the_front_together():
    points = pareto([audited("a", 1.0), audited("b", 1.0), audited("c", 2.0)])
    assert [point.is_on_compute_front for point in points] == [True, True, False]


def test_other_vocabularies_are_compared_by_bytes():
    """A model that comes without the loss, as its tokens are others, is compared in bits per byte alone."""
    points = pareto([audited("a", 3.0, bits=1.0), audited("b", 2.0, bits=0.9), audited("c", None, bits=0.8)])
    assert [(point.measure, point.model) for point in points] == [
        ("loss text", "a"), ("loss text", "b"),
        ("bits per byte text", "a"), ("bits per byte text", "b"), ("bits per byte text", "c"),
    ]  # fmt: skip
    assert [point.is_on_memory_front for point in points] == [False, True, False, False, True]
    assert {point.measure for point in pareto([audited("a", 3.0, bits=1.0)])} == {"loss text"}


def test_quality_for_its_cost_by_hand():
    """A GiB and a half, 2 GFLOPs on the text, 4 on average: 0.8 bits a byte saves 7.2; a task counts its value."""
    tasks = [task(0.6), task(9.0, "word_perplexity", False)]
    model = audited("a", 2.0, 2e9, 3 * 2**29, bits=0.8, tasks=tasks)
    points = {point.measure: point for point in pareto([model])}
    found = {name: (p.quality, p.quality_per_gib, p.quality_per_gflop) for name, p in points.items()}
    assert found == {
        "loss text": (pytest.approx(7.2), pytest.approx(4.8), pytest.approx(3.6)),
        "t acc": (pytest.approx(0.6), pytest.approx(0.4), pytest.approx(0.15)),
        "t word_perplexity": (None, None, None),
    }
    assert pareto([audited("a", 2.0)])[0].quality is None  # without a tokenizer no bytes are known


def test_of_some_tasks_less_is_better():
    worse, better = (audited(n, tasks=[task(v, "word_perplexity", False)]) for n, v in (("a", 9.0), ("b", 8.0)))
    assert [point.is_on_memory_front for point in pareto([worse, better])] == [False, True]


def test_without_costs_no_point():
    models = [audited("a", 1.0, flops=None), audited("b", 1.0), audited("c", math.inf)]
    assert [point.model for point in pareto(models)] == ["b"]
    assert "FLOPs of a token" in models[0].notes[0]
    assert not models[1].notes


def test_the_harness_is_imported_only_for_tasks():
    assert "lm_eval" not in vars(importlib.import_module("transformers_tiedmoe.audit.quality"))

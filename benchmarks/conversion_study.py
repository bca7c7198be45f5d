"""Loss against bytes for every conversion method, before and after healing: `make study-conversion`.

One source is trained on the novels that ship with the package, or found in OUTPUT/source; every row of
`study/configurations.py` is converted, measured, healed with 5, 25 and 100 % of a fixed budget (5 % of the source's
own training tokens) and measured again. Writes conversion_study.json, .md and .png. Kill it and start it again: runs
that are there are not run again.

    python benchmarks/conversion_study.py --output study --workers 2       # two or three hours on two idle cores
    python benchmarks/conversion_study.py --output quick --quick --results quick/study    # the whole path in a minute
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import time
from pathlib import Path

import datasets
import torch
import transformers
from study.configurations import QUICK, ROWS, Row
from study.plot import save_plot
from study.runs import Study
from study.summary import markdown, summarize
from tables import show, write_json
from timing import machine, versions

from tiedmoe_demo import DemoConfig
from transformers_tiedmoe.workdir import open_folder

RESULTS = Path(__file__).parent / "results" / "conversion_study"
SOURCE = {"source_steps": 4200, "source_learning_rate": 6e-3, "balance_by_layer": True, "seed": 0}
TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "batch_size": 8}
TINY |= {"block_size": 16, "source_steps": 20, "source_learning_rate": 6e-3, "balance_by_layer": True}
TINY_STUDY = Study(DemoConfig(**TINY), heal_share=0.2, shares=(0.25, 1.0), calibration_tokens=256, num_seeds=2)
QUICK_CHARACTERS = 20_000
_worker = contextlib.ExitStack()
TEXT = "text.txt"  # of a quick study


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("study"), help="working folder; what is there is reused")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file name without .json, .md, .png")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run starts later; 0 only reports")
    parser.add_argument("--quick", action="store_true", help="a tiny source and few steps: whether it all works")
    options = parser.parse_args(arguments)
    quieten()
    with contextlib.ExitStack() as stack:
        study = make_study(options, stack)
        write_results(study, options)


def write_results(study: Study, options: argparse.Namespace) -> None:
    """Run what is not there yet, and write the results of all."""
    rows = QUICK if options.quick else ROWS
    training = study.train_source(show)
    run_all(study, rows, training, options)
    summary = summarize(study, training, [(row, study.results(row)) for row in rows]) | {
        "command": "make study-conversion" + (" ARGS=--quick" if options.quick else ""),
        "versions": versions(),
        "machine": machine(torch.device("cpu")) | {"threads of a process": torch.get_num_threads()},
    }
    write_json(options.results.with_suffix(".json"), summary)
    options.results.with_suffix(".md").write_text(markdown(summary))
    save_plot(summary, options.results.with_suffix(".png"))
    print(markdown(summary))


def make_study(options: argparse.Namespace, stack: contextlib.ExitStack) -> Study:
    """Return the study asked for, in its folder until `stack` ends; refuse the folder of another one."""
    study = TINY_STUDY if options.quick else Study(DemoConfig(**SOURCE))
    data = str(options.output / TEXT) if options.quick else None
    study = dataclasses.replace(study, demo=dataclasses.replace(study.demo, output=str(options.output), data=data))
    identity = {"settings": study.settings()}
    work = stack.enter_context(open_folder(options.output, identity, what="a study", advice="give another --output"))
    if options.quick:
        text = datasets.load_dataset("text", data_files=TINY_STUDY.demo.text, split="train")["text"]
        work.write_text(TEXT, "\n".join(text)[:QUICK_CHARACTERS])
    return dataclasses.replace(study, work=work)


def run_all(study: Study, rows: list[Row], training: dict, options: argparse.Namespace) -> None:
    """Run what is not there yet, every row at a first seed before any at a second."""
    deadline = time.time() + 60 * options.minutes
    jobs = [(row, seed, deadline) for row in rows for seed in study.seeds(row) if study.missing(row, seed)]
    jobs.sort(key=lambda job: job[1])
    steps = sum(study.steps(share) for row, seed, _ in jobs for share in study.missing(row, seed))
    # A healing step is a step of training and a forward of the teacher, about a third of one.
    minutes = steps * training["seconds"] / training["steps"] * 4 / 3 / 60
    print(f"{len(jobs)} runs, {steps} healing steps: about {minutes:.0f} minutes and conversions", flush=True)
    with contextlib.ExitStack() as stack:
        if options.workers == 1:
            start_worker(study)
            done = map(run_job, jobs)
        else:
            spawned = multiprocessing.get_context("spawn")
            start = (start_worker, (dataclasses.replace(study, work=None),))
            done = stack.enter_context(spawned.Pool(options.workers, *start)).imap_unordered(run_job, jobs)
        for number, what in enumerate(done):
            print(f"{number + 1}/{len(jobs)} {what}", flush=True)


def start_worker(study: Study) -> None:
    global _study
    if study.work is None:
        work = _worker.enter_context(open_folder(study.demo.output, {}, what="a study", is_main=False))
        study = dataclasses.replace(study, work=work)
    _study = study  # so that a process reads the text once
    quieten()


def run_job(job: tuple[Row, int, float]) -> str:
    row, seed, deadline = job
    start = time.time()
    if start > deadline:
        return f"{row.name}, seed {seed}: no time left"
    _study.run(row, seed)
    return f"{row.name}, seed {seed}: {time.time() - start:.0f} s"


def quieten() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()

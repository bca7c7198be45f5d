"""What the studies share: jobs, each run once in a process of one thread, and a small text to try the path on."""

import argparse
import contextlib
import functools
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tables import RESULTS, numbers, parser_of, write_json

from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import train_tokenizer
from transformers_tiedmoe.files import atomic_write_json, read_json
from transformers_tiedmoe.training.data import load_blocks

QUICK_CHARACTERS = 20_000
BLOCK, HELD_OUT_BLOCKS = 128, 256  # of models trained from scratch
MEASURED = "steps.json"


def study_parser(docstring: str, output: str, name: str) -> argparse.ArgumentParser:
    """Return a parser of what every study asks for; its results are called `name`."""
    parser = parser_of(docstring)
    parser.add_argument("--output", type=Path, default=Path(output), help="working folder; what is there is reused")
    parser.add_argument("--results", type=Path, default=RESULTS / name, help="file name without .json, .md, .png")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="runs are given up then; 0 only reports")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps: whether it all works")
    return parser


def one_thread() -> None:
    """Make this process one that runs jobs: a single thread, and no progress bars."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def run_all(run: Callable, jobs: list, workers: int, minutes: float) -> bool:
    """Call `run(job)` for every job and print what it returns; whether all were done in time, the others given up.

    Several workers are processes of their own.
    """
    if not minutes:
        return False
    one_thread()
    deadline, spawn = time.monotonic() + 60 * minutes, multiprocessing.get_context("spawn")
    with spawn.Pool(workers, one_thread) if workers > 1 else contextlib.nullcontext() as pool:
        for number, said in enumerate(pool.imap_unordered(run, jobs) if pool else map(run, jobs)):
            print(f"{number + 1}/{len(jobs)} {said}", flush=True)
            if time.monotonic() > deadline:
                return number + 1 == len(jobs)
    return True


def quick_text(path: Path) -> Path:
    """Write the start of the demo's novels to `path`, once, and return it."""
    if not path.exists():
        lines = datasets.load_dataset("text", data_files=DemoConfig().text, split="train")["text"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines)[:QUICK_CHARACTERS])
    return path


class ScratchStudy:
    """Small models trained from scratch on the demo's novels: every row at a seed leaves a JSON file in the folder.

    A subclass has a name; `usual` and `quick` sizes of the model, steps of training and rounds of measuring;
    `train(row, seed)`, which returns the held-out "loss" and what else was found; and `measure_steps()`, of the rows'
    models side by side.
    """

    def __init__(self, docstring: str, arguments: list[str] | None):
        parser = study_parser(docstring, f"study-{self.name}", f"{self.name}_study")
        parser.add_argument("--seeds", type=numbers, default="0,1,2")
        parser.add_argument("--only", default="", help="rows whose name this regular expression finds")
        self.options = parser.parse_args(arguments)
        self.sizes, self.steps, self.rounds = self.quick if self.options.quick else self.usual
        self.output, self.tokenizer = self.options.output, self.options.output / "tokenizer"
        self.text = str(quick_text(self.output / "text.txt")) if self.options.quick else DemoConfig().text
        if not self.tokenizer.exists():
            train_tokenizer(self.text, self.sizes["vocab_size"]).save_pretrained(self.tokenizer)

    @functools.cached_property
    def blocks(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """The blocks to train on and those held out."""
        train, held_out = load_blocks(self.text, transformers.AutoTokenizer.from_pretrained(self.tokenizer), BLOCK)
        return train, held_out.select(range(min(HELD_OUT_BLOCKS, len(held_out))))

    def path(self, row: str, seed: int, suffix: str = ".json") -> Path:
        """Return the file, or folder, of a row at a seed; another number of steps has others."""
        return self.output / f"{re.sub(r'[^a-z0-9]+', '-', row)}.steps{self.steps}.seed{seed}{suffix}"

    def run(self, job: tuple[str, int]) -> str:
        """Train a row at a seed and keep what was found; say the most of it."""
        (row, seed), start = job, time.process_time()
        found = {"row": row, "seed": seed, **self.train(row, seed)}
        found["cpu_seconds"] = round(time.process_time() - start, 1)
        atomic_write_json(self.path(row, seed), found)
        return "{row}, seed {seed}: loss {loss:.4f}, {cpu_seconds:.0f} s".format(**found)

    def run_all(self, *stages: Iterable[str]) -> None:
        """Run the rows that are asked for and not there, a stage at a time, then measure steps."""
        for rows in stages:
            jobs = [(row, seed) for seed in self.options.seeds for row in rows if re.search(self.options.only, row)]
            missing = [job for job in jobs if not self.path(*job).exists()]
            if not run_all(self.run, missing, self.options.workers, self.options.minutes):
                return
        write_json(self.output / MEASURED, self.measure_steps())

    def found(self, rows: Iterable[str]) -> tuple[list[dict[str, Any]], Any]:
        """Return what was found of the rows at the seeds that are asked for, and of steps if no row was left."""
        paths = [self.path(row, seed) for seed in self.options.seeds for row in rows]
        steps = self.output / MEASURED
        runs = [read_json(path) for path in paths if path.exists()]
        return runs, json.loads(steps.read_text()) if steps.exists() else []

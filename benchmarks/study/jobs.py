"""What the studies share: jobs, each run once in a process of one thread, and a small text to try the path on."""

import argparse
import functools
import json
import multiprocessing
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
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
    """Call `run(job)` for every job and print what it returns; whether all were done in time, the others given up."""
    deadline = time.monotonic() + 60 * minutes
    for number, said in enumerate(_results(run, jobs, workers) if minutes else ()):
        print(f"{number + 1}/{len(jobs)} {said}", flush=True)
        if time.monotonic() > deadline:
            return number + 1 == len(jobs)
    return minutes > 0


def _results(run: Callable, jobs: list, workers: int) -> Iterator:
    """Yield the results as the jobs end; several workers are processes of their own."""
    one_thread()
    if workers == 1:
        yield from map(run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, one_thread) as pool:
        yield from pool.imap_unordered(run, jobs)
        pool.close()
        pool.join()


def quick_text(path: Path) -> Path:
    """Write the start of the demo's novels to `path`, once, and return it."""
    if not path.exists():
        lines = datasets.load_dataset("text", data_files=DemoConfig().text, split="train")["text"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines)[:QUICK_CHARACTERS])
    return path


class ScratchStudy:
    """Small models trained from scratch on the demo's novels: every row at a seed leaves a JSON file in the folder."""

    def __init__(self, options: argparse.Namespace, sizes: dict[str, Any], steps: int):
        self.options, self.sizes, self.steps = options, sizes, steps
        self.output, self.tokenizer = options.output, options.output / "tokenizer"
        self.text = str(quick_text(self.output / "text.txt")) if options.quick else DemoConfig().text
        if not self.tokenizer.exists():
            train_tokenizer(self.text, sizes["vocab_size"]).save_pretrained(self.tokenizer)

    @staticmethod
    def parser(docstring: str, output: str, name: str) -> argparse.ArgumentParser:
        """Return `study_parser`, with which rows are run and at which seeds."""
        parser = study_parser(docstring, output, name)
        parser.add_argument("--seeds", type=numbers, default="0,1,2")
        parser.add_argument("--only", default="", help="rows whose name this regular expression finds")
        return parser

    @property
    def blocks(self) -> tuple[datasets.Dataset, datasets.Dataset]:
        """The blocks to train on and those held out."""
        return _blocks(self.text, self.tokenizer)

    def path(self, row: str, seed: int, suffix: str = ".json") -> Path:
        """Return the file, or folder, of a row at a seed; another number of steps has others."""
        return self.output / f"{re.sub(r'[^a-z0-9]+', '-', row)}.steps{self.steps}.seed{seed}{suffix}"

    @abstractmethod
    def train(self, row: str, seed: int) -> dict[str, Any]:
        """Train a row and return its held-out "loss", and what else was found."""

    def run(self, job: tuple[str, int]) -> str:
        """Train a row at a seed and keep what was found; say the most of it."""
        (row, seed), start = job, time.process_time()
        found = {"row": row, "seed": seed, **self.train(row, seed)}
        found["cpu_seconds"] = round(time.process_time() - start, 1)
        atomic_write_json(self.path(row, seed), found)
        return "{row}, seed {seed}: loss {loss:.4f}, {cpu_seconds:.0f} s".format(**found)

    @abstractmethod
    def measure_steps(self) -> dict | list:
        """Measure steps of the rows' models, side by side."""

    def run_all(self, *stages: Iterable[str]) -> None:
        """Run the rows that are asked for and not there, stage by stage, all at a seed before any at the next.

        Steps are measured when no row is left.
        """
        for rows in stages:
            jobs = [(row, seed) for seed in self.options.seeds for row in rows if re.search(self.options.only, row)]
            missing = [job for job in jobs if not self.path(*job).exists()]
            if not run_all(self.run, missing, self.options.workers, self.options.minutes):
                return
        write_json(self.output / MEASURED, self.measure_steps())

    def measured(self) -> dict | list:
        """Return what was measured of steps; nothing if rows are left."""
        path = self.output / MEASURED
        return json.loads(path.read_text()) if path.exists() else []

    def found(self, rows: Iterable[str]) -> list[dict[str, Any]]:
        """Return what was found of the rows at the seeds that are asked for."""
        paths = [self.path(row, seed) for seed in self.options.seeds for row in rows]
        return [read_json(path) for path in paths if path.exists()]


@functools.cache
def _blocks(text: str, tokenizer: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    train, held_out = load_blocks(text, transformers.AutoTokenizer.from_pretrained(tokenizer), BLOCK)
    return train, held_out.select(range(min(HELD_OUT_BLOCKS, len(held_out))))

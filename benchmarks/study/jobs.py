"""What the studies share: jobs, each run once in a process of one thread, and a small text to try the path on."""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
import transformers
from tables import RESULTS, parser_of

from tiedmoe_demo import DemoConfig

QUICK_CHARACTERS = 20_000


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

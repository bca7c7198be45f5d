"""What the studies share: jobs, each run once in a process of one thread, and a small text to try the path on."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import torch
import transformers

from tiedmoe_demo import DemoConfig

QUICK_CHARACTERS = 20_000


def one_thread() -> None:
    """Make this process one that runs jobs: a single thread, and no progress bars."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()


def run_all(run: Callable, jobs: Iterable, workers: int) -> Iterator:
    """Yield what `run(job)` returns of every job as it ends; several workers are processes of their own."""
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

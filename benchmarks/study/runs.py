"""One run of the study: a row at a seed, measured before healing or after a share of the healing budget.

Every run leaves `runs/NAME.json` and is not run again while that file says the same recipe; checkpoints are deleted
once all runs that need them are there.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiedmoe_conversion import ConversionRecipe, execute, make_plan
from tiedmoe_demo import DemoConfig
from tiedmoe_demo.config import VALIDATION_FRACTION
from tiedmoe_demo.figures import expert_parameters
from tiedmoe_demo.train_source import train_source
from transformers_tiedmoe.files import read_json
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.heal import heal
from transformers_tiedmoe.workdir import Folder, discard_work

from .configurations import Row
from .controls import prune, train_tied

BEFORE = 0.0  # the share of the healing budget before any
BYTES_PER_PARAMETER = 4
DEMO_SETTINGS = (
    *("data", "source_steps", "source_learning_rate", "batch_size", "block_size", "vocab_size", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok", "seed"),
    "balance_by_layer",
)
TRAINED = "scratch"  # the kind of rows whose checkpoints took long


@dataclass(frozen=True)
class Run:
    """A row at a seed after a share of the healing budget."""

    row: Row
    seed: int
    share: float

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.row.name}.seed{self.seed}." + (f"heal{self.share:g}" if self.share else "before")


@dataclass(frozen=True)
class Study:
    """Where the study works, and what decides its figures.

    Args:
        demo: source, text and output folder.
        work: that folder, as it is open in this process.
        heal_share: of the source's training steps, the healing budget.
        shares: of that budget, healings each with a schedule of its own.
        heal_learning_rate: peak learning rate of every healing and of the source's own extra steps.
        calibration_tokens: for the methods that need text.
        num_seeds: of what is cheap.
    """

    demo: DemoConfig
    work: Folder | None = None
    heal_share: float = 0.05
    shares: tuple[float, ...] = (0.05, 0.25, 1.0)
    heal_learning_rate: float = 5e-4
    calibration_tokens: int = 32768
    num_seeds: int = 3

    @property
    def heal_steps(self) -> int:
        """Steps of the whole healing budget."""
        return round(self.heal_share * self.demo.source_steps)

    @property
    def source(self) -> Path:
        """The folder of the source."""
        return self.demo.path("source")

    def settings(self) -> dict[str, Any]:
        """Return what the figures depend on beside the rows, JSON-able."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("demo", "work")}
        demo = {name: getattr(self.demo, name) for name in DEMO_SETTINGS}
        return own | {"shares": list(self.shares), "source": demo}

    def steps(self, share: float) -> int:
        """Count the healing steps of a share of the budget."""
        return max(1, round(share * self.heal_steps)) if share else 0

    def seeds(self, row: Row) -> range:
        """Return the seeds that a row is run with."""
        return range(min(row.num_seeds, self.num_seeds))

    def runs(self, row: Row) -> list[Run]:
        """Return a row's runs: each seed before healing and after all of the budget, the first after parts, too."""
        if row.kind == "scratch":
            return [Run(row, seed, BEFORE) for seed in self.seeds(row)]
        shares = {seed: (BEFORE, *self.shares) if seed == 0 else (BEFORE, 1.0) for seed in self.seeds(row)}
        return [Run(row, seed, share) for seed in shares for share in shares[seed]]

    def all_runs(self, rows: Sequence[Row]) -> list[Run]:
        """Return all runs of `rows`, what says most first: a study that is stopped lacks the end."""
        runs = [run for row in rows for run in self.runs(row)]
        return sorted(runs, key=lambda run: (run.share != BEFORE, run.seed, run.share != 1.0))

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return what the run measured, or None where it has not run as the row is now."""
        path = self._result_path(run)
        if not path.is_file():
            return None
        result = read_json(path)
        made_by = json.loads(json.dumps([dict(run.row.recipe), dict(run.row.heal)]))
        return result if [result.get("recipe"), result.get("heal", {})] == made_by else None

    def has_checkpoint(self, run: Run) -> bool:
        """Say whether what the run heals is there."""
        return (self._checkpoint(run) / "config.json").is_file()

    def train_source(self, progress: Callable[[int, int, str], None]) -> dict:
        """Train the source, or find it; returns its training's report."""
        return train_source(self.demo, self.source, progress)

    def measure(self, run: Run) -> dict[str, Any]:
        """Convert and measure, or heal and measure; leaves the run's JSON."""
        measured = self._measure_before(run) if run.share == BEFORE else self._heal(run)
        result = {"name": run.row.name, "seed": run.seed, "share": run.share}
        result |= {"recipe": dict(run.row.recipe), "heal": dict(run.row.heal)} | measured
        self._folder.write_json(f"runs/{run.name}.json", result)
        self._clean(run)
        return result

    @cached_property
    def _validation(self) -> datasets.Dataset:
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        return load_blocks(self.demo.text, tokenizer, self.demo.block_size, VALIDATION_FRACTION)[1]

    def _result_path(self, run: Run) -> Path:
        return self.demo.path("runs", f"{run.name}.json")

    @property
    def _folder(self) -> Folder:
        assert self.work is not None, "a run needs the open folder of the study"
        return self.work

    def _checkpoint_name(self, run: Run) -> str:
        return f"checkpoints/{run.row.name}.seed{run.seed}"

    def _checkpoint(self, run: Run) -> Path:
        return self.demo.path(self._checkpoint_name(run))

    def _delete_checkpoint(self, run: Run) -> None:
        """Delete what a run has made to be healed, finished or not."""
        name = self._checkpoint_name(run)
        self._folder.delete(name)
        discard_work(self.demo.path(name))

    def _measure_before(self, run: Run) -> dict[str, Any]:
        """Make the checkpoint anew and measure it."""
        folder = self._checkpoint(run)
        if run.row.kind != TRAINED:
            self._delete_checkpoint(run)
        start = time.perf_counter()
        sizes = self._make(run, folder)
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        measured = {"parameters": model.num_parameters()}
        if run.row.kind in ("convert", "prune"):
            measured["conversion_seconds"] = round(seconds, 2)
        measured |= sizes or {"expert_bytes": BYTES_PER_PARAMETER * expert_parameters(model)}
        return measured | perplexity(model, self._validation, self.demo.batch_size)

    def _make(self, run: Run, folder: Path) -> dict[str, Any]:
        """Make the run's checkpoint; returns its `expert_bytes` where a plan has counted them."""
        row = run.row
        if row.kind == "scratch":
            steps = self.demo.source_steps + self.heal_steps
            settings = DemoConfig(**{**self.demo.settings(), "source_steps": steps, "seed": run.seed})
            train_tied(settings, self.source, folder)
        elif row.kind == "source":
            prune(self.source, folder, share=1.0)
        elif row.kind == "prune":
            prune(self.source, folder, seed=run.seed, **row.recipe)
        elif row.kind == "convert":
            plan = make_plan(self.recipe(row, folder, run.seed))
            execute(plan)
            # All that is not the source's and outside of its experts: slot maps, residuals and wider routers, too.
            others = plan.bytes_before - BYTES_PER_PARAMETER * plan.expert_parameters_before
            return {"expert_bytes": plan.bytes_after - others}
        return {}

    def recipe(self, row: Row, folder: Path, seed: int) -> ConversionRecipe:
        """Return the conversion of a row."""
        return ConversionRecipe(
            source=str(self.source),
            output=str(folder),
            calibration=self.demo.text,
            calibration_tokens=self.calibration_tokens,
            calibration_block_size=self.demo.block_size,
            measure=False,
            seed=seed,
            **row.recipe,
        )

    def _heal(self, run: Run) -> dict[str, Any]:
        name = f"healing/{run.name}"
        config = TiedMoeTrainingArguments(
            model=str(self._checkpoint(run)),
            data=self.demo.text,
            output_dir=str(self.demo.path(name)),
            overwrite=True,
            teacher=None if run.row.kind == "source" else str(self.source),
            max_steps=self.steps(run.share),
            learning_rate=self.heal_learning_rate,
            per_device_train_batch_size=self.demo.batch_size,
            block_size=self.demo.block_size,
            validation_fraction=VALIDATION_FRACTION,
            save_steps=self.steps(run.share),
            seed=run.seed,
            **run.row.heal,
        )
        report = heal(config, lambda done, total, what: None)
        self._folder.own(name)
        self._folder.delete(name)
        return {**report["after"], "steps": report["steps"], "heal_seconds": report["seconds"]}

    def _clean(self, run: Run) -> None:
        """Delete the run's checkpoint if no other run needs it."""
        same = [other for other in self.runs(run.row) if other.seed == run.seed]
        if run.row.kind != TRAINED and all(self.result(other) for other in same):
            self._delete_checkpoint(run)

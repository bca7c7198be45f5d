"""The study's runs: a row at a seed is made, measured, and healed by each share of the healing budget.

What a measurement found is in `runs/NAME.json`, and it is not made again while that file says the same recipe; a row's
checkpoint is deleted once all of them are there.
"""

import json
import time
from collections.abc import Callable
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

    def shares_of(self, row: Row, seed: int) -> tuple[float, ...]:
        """Return the shares of the budget after which a row is measured, none first; of the first seed parts, too."""
        if row.kind == "scratch":
            return (BEFORE,)
        return (BEFORE, *self.shares) if seed == 0 else (BEFORE, 1.0)

    def results(self, row: Row) -> dict[tuple[int, float], dict[str, Any]]:
        """Return what was measured of a row as it is now, by seed and share."""
        made_by = json.loads(json.dumps([dict(row.recipe), dict(row.heal)]))
        keys = [(seed, share) for seed in self.seeds(row) for share in self.shares_of(row, seed)]
        paths = {key: self.demo.path(self._result_name(row, *key)) for key in keys}
        found = {key: read_json(path) for key, path in paths.items() if path.is_file()}
        return {key: each for key, each in found.items() if [each.get("recipe"), each.get("heal", {})] == made_by}

    def missing(self, row: Row, seed: int) -> list[float]:
        """Return the shares that nothing was measured after."""
        found = self.results(row)
        return [share for share in self.shares_of(row, seed) if (seed, share) not in found]

    def train_source(self, progress: Callable[[int, int, str], None]) -> dict:
        """Train the source, or find it; returns its training's report."""
        return train_source(self.demo, self.source, progress)

    def run(self, row: Row, seed: int) -> None:
        """Make a row's checkpoint anew, measure what is missing, and delete it unless it took long to train."""
        name = f"checkpoints/{row.name}.seed{seed}"
        folder, is_trained = self.demo.path(name), row.kind == "scratch"
        if not is_trained:
            self._delete(name)
        start = time.perf_counter()
        sizes = self._make(row, seed, folder)
        if row.kind in ("convert", "prune"):
            sizes["conversion_seconds"] = round(time.perf_counter() - start, 2)
        for share in self.missing(row, seed):
            measured = self._heal(row, seed, share, folder) if share else sizes | self._measure(folder, sizes)
            result = {
                "name": row.name,
                "seed": seed,
                "share": share,
                "recipe": dict(row.recipe),
                "heal": dict(row.heal),
            }
            self._folder.write_json(self._result_name(row, seed, share), result | measured)
        if not is_trained:
            self._delete(name)

    @cached_property
    def _validation(self) -> datasets.Dataset:
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        return load_blocks(self.demo.text, tokenizer, self.demo.block_size, VALIDATION_FRACTION)[1]

    def _result_name(self, row: Row, seed: int, share: float) -> str:
        return f"runs/{row.name}.seed{seed}." + (f"heal{share:g}.json" if share else "before.json")

    @property
    def _folder(self) -> Folder:
        assert self.work is not None, "a run needs the open folder of the study"
        return self.work

    def _delete(self, name: str) -> None:
        """Delete a checkpoint, finished or not."""
        self._folder.delete(name)
        discard_work(self.demo.path(name))

    def _measure(self, folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        expert_bytes = sizes.get("expert_bytes", BYTES_PER_PARAMETER * expert_parameters(model))
        held_out = perplexity(model, self._validation, self.demo.batch_size)
        return {"parameters": model.num_parameters(), "expert_bytes": expert_bytes, **held_out}

    def _make(self, row: Row, seed: int, folder: Path) -> dict[str, Any]:
        """Make a row's checkpoint; returns its `expert_bytes` where a plan has counted them."""
        if row.kind == "scratch":
            steps = self.demo.source_steps + self.heal_steps
            settings = DemoConfig(**{**self.demo.settings(), "source_steps": steps, "seed": seed})
            train_tied(settings, self.source, folder)
        elif row.kind == "source":
            prune(self.source, folder, share=1.0)
        elif row.kind == "prune":
            prune(self.source, folder, seed=seed, **row.recipe)
        elif row.kind == "convert":
            plan = make_plan(self.recipe(row, folder, seed))
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

    def _heal(self, row: Row, seed: int, share: float, folder: Path) -> dict[str, Any]:
        name = f"healing/{row.name}.seed{seed}"
        config = TiedMoeTrainingArguments(
            model=str(folder),
            data=self.demo.text,
            output_dir=str(self.demo.path(name)),
            overwrite=True,
            teacher=None if row.kind == "source" else str(self.source),
            max_steps=self.steps(share),
            learning_rate=self.heal_learning_rate,
            per_device_train_batch_size=self.demo.batch_size,
            block_size=self.demo.block_size,
            validation_fraction=VALIDATION_FRACTION,
            save_steps=self.steps(share),
            allow_worse=True,  # as the source gets by more of a text that it knows
            seed=seed,
            **row.heal,
        )
        report = heal(config, lambda done, total, what: None)
        self._folder.own(name)
        self._folder.delete(name)
        return {**report["after"], "steps": report["steps"], "heal_seconds": report["seconds"]}

"""The study's runs: a row at a seed is made, measured, and healed by each share of the healing budget.

What a measurement found is in `runs/NAME.json`, and it is not made again while that file says the same recipe; a row's
checkpoint is deleted once all of them are there.
"""

import functools
import json
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from tiedmoe_conversion import ConversionRecipe, execute, make_plan
from tiedmoe_demo import DemoConfig
from tiedmoe_demo.config import VALIDATION_FRACTION
from tiedmoe_demo.figures import expert_parameters
from tiedmoe_demo.train_source import source_config, train_on_text
from transformers_tiedmoe import TiedMoeConfig, TiedMoeForCausalLM
from transformers_tiedmoe.files import atomic_write_json, read_json
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.data import load_blocks, perplexity
from transformers_tiedmoe.training.heal import heal
from transformers_tiedmoe.workdir import discard_work

from .configurations import Row

BEFORE = 0.0  # the share of the healing budget before any
BYTES_PER_PARAMETER = 4
DEMO_SETTINGS = (
    *("data", "source_steps", "source_learning_rate", "batch_size", "block_size", "vocab_size", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok", "seed"),
    "balance_by_layer",
)


@dataclass(frozen=True)
class Study:
    """Where the study works, and what decides its figures."""

    demo: DemoConfig  # source, text and output folder
    heal_share: float = 0.05  # of the source's training steps, the healing budget
    shares: tuple[float, ...] = (0.05, 0.25, 1.0)  # of that budget, healings each with a schedule of its own
    heal_learning_rate: float = 5e-4  # peak of every healing and of the source's own extra steps
    calibration_tokens: int = 32768  # for the methods that need text
    num_seeds: int = 3  # of what is cheap

    @property
    def heal_steps(self) -> int:
        return round(self.heal_share * self.demo.source_steps)

    @property
    def source(self) -> Path:
        return self.demo.path("source")

    def settings(self) -> dict[str, Any]:
        """Return what the figures depend on beside the rows, JSON-able."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "demo"}
        demo = {name: getattr(self.demo, name) for name in DEMO_SETTINGS}
        return own | {"shares": list(self.shares), "source": demo}

    def steps(self, share: float) -> int:
        """Count the healing steps of a share of the budget."""
        return max(1, round(share * self.heal_steps)) if share else 0

    def seeds(self, row: Row) -> range:
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
        found = {key: read_json(path) for key in keys if (path := self._result(row, *key)).is_file()}
        return {key: each for key, each in found.items() if [each.get("recipe"), each.get("heal", {})] == made_by}

    def missing(self, row: Row, seed: int) -> list[float]:
        """Return the shares that nothing was measured after."""
        found = self.results(row)
        return [share for share in self.shares_of(row, seed) if (seed, share) not in found]

    def run(self, job: tuple[Row, int]) -> str:
        """Make a row's checkpoint anew, measure what is missing, and delete it."""
        row, seed = job
        folder = self.demo.path("checkpoints", f"{row.name}.seed{seed}")
        _delete(folder)
        start = time.perf_counter()
        sizes = self._make(row, seed, folder)
        if row.kind in ("convert", "prune"):
            sizes["conversion_seconds"] = round(time.perf_counter() - start, 2)
        made_by = {"name": row.name, "seed": seed, "recipe": dict(row.recipe), "heal": dict(row.heal)}
        for share in self.missing(row, seed):
            measured = self._heal(row, seed, share, folder) if share else sizes | self._measure(folder, sizes)
            path = self._result(row, seed, share)
            path.parent.mkdir(exist_ok=True)
            atomic_write_json(path, made_by | {"share": share} | measured)
        _delete(folder)
        return f"{row.name}, seed {seed}: {time.perf_counter() - start:.0f} s"

    def _result(self, row: Row, seed: int, share: float) -> Path:
        return self.demo.path("runs", f"{row.name}.seed{seed}." + (f"heal{share:g}.json" if share else "before.json"))

    def _measure(self, folder: Path, sizes: dict[str, Any]) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        expert_bytes = sizes.get("expert_bytes", BYTES_PER_PARAMETER * expert_parameters(model))
        held_out = _held_out(self.demo.text, self.source, self.demo.block_size)
        measured = perplexity(model, held_out, self.demo.batch_size)
        return {"parameters": model.num_parameters(), "expert_bytes": expert_bytes, **measured}

    def _make(self, row: Row, seed: int, folder: Path) -> dict[str, Any]:
        """Make a row's checkpoint; returns its `expert_bytes` where a plan has counted them."""
        if row.kind == "scratch":
            steps = self.demo.source_steps + self.heal_steps
            settings = DemoConfig(**{**self.demo.settings(), "source_steps": steps, "seed": seed})
            _train_tied(settings, self.source, folder)
        elif row.kind == "source":
            _prune(self.source, folder, share=1.0)
        elif row.kind == "prune":
            _prune(self.source, folder, seed=seed, **row.recipe)
        elif row.kind == "convert":
            plan = make_plan(self.recipe(row, folder, seed))
            execute(plan)
            # All that is not the source's and outside of its experts: slot maps, residuals and wider routers, too.
            others = plan.bytes_before - BYTES_PER_PARAMETER * plan.expert_parameters_before
            return {"expert_bytes": plan.bytes_after - others}
        return {}

    def recipe(self, row: Row, folder: Path, seed: int) -> ConversionRecipe:
        text = {"calibration": self.demo.text, "calibration_tokens": self.calibration_tokens}
        text["calibration_block_size"] = self.demo.block_size
        return ConversionRecipe(str(self.source), str(folder), measure=False, seed=seed, **{**text, **row.recipe})

    def _heal(self, row: Row, seed: int, share: float, folder: Path) -> dict[str, Any]:
        healed, batch = self.demo.path("healing", f"{row.name}.seed{seed}"), self.demo.batch_size
        fields = {"per_device_train_batch_size": batch, **row.heal}
        steps = self.steps(share) * batch // fields["per_device_train_batch_size"]  # the same tokens
        config = TiedMoeTrainingArguments(
            model=str(folder), data=self.demo.text, output_dir=str(healed), overwrite=True,
            teacher=None if row.kind == "source" else str(self.source), max_steps=steps, save_steps=steps,
            learning_rate=self.heal_learning_rate, block_size=self.demo.block_size,
            validation_fraction=VALIDATION_FRACTION, seed=seed, **fields,
            allow_worse=True,  # as the source gets by more of a text that it knows
        )  # fmt: skip
        report = heal(config, lambda done, total, what: None)
        _delete(healed)
        return {**report["after"], "steps": report["steps"], "heal_seconds": report["seconds"]}


@functools.cache
def _held_out(text: str, source: Path, block_size: int) -> datasets.Dataset:
    return load_blocks(text, AutoTokenizer.from_pretrained(source), block_size, VALIDATION_FRACTION)[1]


def _delete(folder: Path) -> None:
    """Delete a checkpoint, finished or not."""
    shutil.rmtree(folder, ignore_errors=True)
    discard_work(folder)


def _train_tied(config: DemoConfig, source: Path, folder: Path) -> None:
    """Train a tied model from random weights, exactly as `train_source` trains the source.

    `source_steps`, sizes and tying fields of `config` count; the tokenizer is the `source`'s.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    set_seed(config.seed)
    tying = {name: getattr(config, name) for name in ("group_size", "skip_first", "skip_last")}
    model = AutoModelForCausalLM.from_config(TiedMoeConfig.from_family(source_config(config, tokenizer), **tying))
    train_on_text(model, tokenizer, config, folder, lambda done, total, what: None)
    for each in (model, tokenizer):
        each.save_pretrained(folder)


def _prune(source: Path, folder: Path, share: float, keep: str = "magnitude", seed: int = 0) -> None:
    """Save the source with `share` of the experts of every layer, and those rows of its router, into `folder`.

    It is saved as a tied model without a group, the family's own but for a balance loss in every layer: what all the
    study's models are healed with. `keep` is "random", or "magnitude": those of the largest product of the Frobenius
    norm of the expert's weights and the norm of its row of the router.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    num_kept = round(share * model.config.num_experts)
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for index in range(model.config.num_hidden_layers):
        layer = f"model.layers.{index}.mlp."
        parts = [layer + part for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
        router, gate_up, down = (state[part].flatten(1) for part in parts)
        magnitude = router.norm(dim=1) * torch.cat([gate_up, down], 1).norm(dim=1)
        scores = {"magnitude": magnitude, "random": torch.rand(len(router), generator=generator)}[keep]
        chosen = scores.topk(num_kept).indices.sort().values
        state.update({part: state[part][chosen] for part in parts})
    model.config.num_experts = num_kept
    pruned = TiedMoeForCausalLM(TiedMoeConfig.from_family(model.config, groups=[]))
    pruned.load_state_dict(state)
    for each in (pruned, AutoTokenizer.from_pretrained(source)):
        each.save_pretrained(folder)

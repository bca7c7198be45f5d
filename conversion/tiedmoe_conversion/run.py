"""Runs a conversion from start to end: plan -> make -> write -> measure -> verify.

A session opens the source, the calibration text and its statistics once, for all steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from transformers_tiedmoe.hub import check_upload, push_to_hub
from transformers_tiedmoe.run_folder import Work
from transformers_tiedmoe.workdir import open_work

from .calibration.inputs import Calibration, open_calibration
from .calibration.measure import measure_conversion
from .checkpoint.reader import open_source
from .checkpoint.writer import Progress, check_space, write_weights
from .errors import ConversionError
from .folders import output_folder
from .layout.keys import FamilyTensors
from .layout.source_model import SourceModel, open_source_model
from .layout.tied_view import LayerTensors
from .make import TensorMaker
from .plan import Plan, make_plan
from .provenance import card_facts, identity, save_card, save_manifest
from .recipe import ConversionRecipe
from .search import Search
from .verify import tied_layers, verify_lossless, verify_output, verify_sample


def convert(
    recipe: ConversionRecipe, progress: Progress | None = None, show: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """Convert by a recipe, whose groups may be left to its `budget` or `max_loss`.

    Args:
        recipe: what to do.
        progress: called as `progress(done, total, what)`.
        show: called with what has been decided before it is done: the curve of loss against bytes if groups were
            chosen, and the plan. Both can be printed by rich.

    Returns:
        `execute`'s report, under `choice` the curve if groups were chosen, and under `pushed_to` the Hub's commit.

    Raises:
        TiedMoeError: whatever is wrong with the recipe, the source or the text; nothing is left then.
    """
    show = show or (lambda what: None)
    if recipe.push_to_hub is not None:
        check_upload(recipe.push_to_hub)
    output_folder(recipe)
    source = open_source_model(recipe.source, recipe.revision, recipe.allow_pickle)
    # Either refuses an impossible recipe before text is read.
    search = Search(recipe, source) if recipe.chooses_groups else None
    plan = None if search else make_plan(recipe, source)
    choice = {}
    with open_calibration(recipe, source) as calibration:
        if search is not None:
            assert calibration is not None, "a recipe with a budget names calibration text"
            chosen = search.run(calibration, progress)
            choice = {"choice": chosen.summary()}
            show(chosen)
            plan = make_plan(chosen.recipe, source)
        assert plan is not None
        show(plan)
        report = Session(source, calibration, progress).run(plan) | choice
    if recipe.push_to_hub is not None:
        message = f"{plan.config.family} with tied experts, from {source.name}"
        report["pushed_to"] = push_to_hub(recipe.output, recipe.push_to_hub, message)
    return report


def execute(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Convert as planned; the output folder appears in one rename, after everything in it has been verified.

    A run that was killed, or stopped by Ctrl-C, is continued by the next one of the same plan.

    Args:
        plan: from `make_plan`.
        progress: called as `progress(done_bytes, total_bytes, what)`.

    Returns:
        JSON-able: the plan's summary, `verification`, `notes` (of the methods, pool by pool), with calibration text
        `measured` (see `measure_conversion`), and `resumed_files`, how many an earlier run had finished.

    Raises:
        TiedMoeError: the source changed or holds NaN, the output exists by now, the disk is full: nothing is left. Or
            another process, or another recipe, is at work on the same output: that stays as it is.
    """
    output_folder(plan.recipe)
    with open_calibration(plan.recipe, plan.source) as calibration:
        return Session(plan.source, calibration, progress).run(plan)


@dataclass(frozen=True)
class Session:
    """What one conversion has opened, on which a plan is run.

    Attributes:
        source: the source's headers, mapped to its family's model.
        calibration: the source on text, with its statistics; None without text.
        progress: called as `progress(done, total, what)`.
    """

    source: SourceModel
    calibration: Calibration | None
    progress: Progress | None = None

    def run(self, plan: Plan) -> dict[str, Any]:
        """Make, write, measure and verify what is planned; see `execute`."""
        output = output_folder(plan.recipe)
        check_space(output, plan.bytes_after + plan.statistics_bytes * (plan.recipe.statistics is None))
        made = identity("convert", plan.recipe.to_dict(), self.source.opened, plan.operations)
        made["calibration"] = {"tokens": self.calibration.digest if self.calibration else None}
        with open_work(output, made) as work:
            if work.report is None:
                work.complete(self._run(plan, work))
        assert work.report is not None
        return {**plan.summary(), **work.report, "resumed_files": work.num_resumed}

    def _run(self, plan: Plan, work: Work) -> dict[str, Any]:
        _check_copies(self.source.tensors)
        with work.draft() as draft:
            plan.config.save_pretrained(draft)
            self.source.opened.copy_travelling_files(draft)
        maker = TensorMaker(plan, self.calibration, work, self.progress)
        write_weights(work, plan.operations, maker.make, self.progress)
        self.source.opened.buffers.clear()
        verification = verify_output(work.folder, plan.operations)
        layers = tied_layers(open_source(str(work.folder)), plan.config)
        measured = self._measure(plan, layers)
        facts = card_facts(plan, measured, self.calibration.digest if self.calibration else "")
        with work.draft() as draft:
            save_card(plan, draft, facts)
        verification |= self._verify_numbers(plan, layers)
        with work.draft() as draft:
            save_manifest(plan, draft, work.files, {**facts, "verification": verification})
        found = {} if measured is None else {"measured": measured}
        return {**found, "notes": maker.all_notes, "verification": verification}

    def _measure(self, plan: Plan, layers: LayerTensors) -> dict[str, Any] | None:
        if self.calibration is None or not plan.recipe.measure:
            return None
        self._tell(plan, "measuring the loss")
        return measure_conversion(self.source, layers, plan.config, self.calibration)

    def _verify_numbers(self, plan: Plan, layers: LayerTensors) -> dict[str, Any]:
        self._tell(plan, "verifying")
        num_tensors, num_dropped = len(self.source.opened.tensors), len(plan.dropped)
        return {
            "source_tensors": {"used": num_tensors - num_dropped, "dropped": num_dropped},
            "experts_relative_error": verify_sample(self.source, layers, plan.groups, plan.is_lossless),
            **({"lossless": verify_lossless(self.source, layers, plan.groups)} if plan.is_lossless else {}),
        }

    def _tell(self, plan: Plan, what: str) -> None:
        if self.progress:
            self.progress(plan.bytes_after, plan.bytes_after, what)


def _check_copies(tensors: FamilyTensors) -> None:
    """Raise unless tensors that the config ties, but that the source holds twice, are equal."""
    for alias, name in tensors.copies.items():
        if not torch.equal(tensors.read(alias), tensors.read(name)):
            raise ConversionError(
                f"{tensors.source.name} ties {alias} to {name} by its config, but holds two different tensors; "
                "expected equal ones: set tie_word_embeddings to false in its config.json if they are meant to differ"
            )

"""`execute`: runs a plan, tensor by tensor, into a folder that appears complete and verified or not at all."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from transformers_tiedmoe.workdir import Work, open_work

from .calibration.inputs import Calibration, open_calibration
from .calibration.measure import measure
from .checkpoint.writer import Progress, check_space, write_weights
from .errors import ConversionError
from .folders import output_folder
from .layout.keys import FamilyTensors
from .make import TensorMaker
from .plan import Plan
from .provenance import identity, save_card, save_manifest
from .verify import verify_lossless, verify_output, verify_sample


def execute(plan: Plan, progress: Progress | None = None, calibration: Calibration | None = None) -> dict[str, Any]:
    """Convert as planned; the output folder appears in one rename, after everything in it has been verified.

    A run that was killed, or stopped by Ctrl-C, is gone on with by the next one of the same plan.

    Args:
        plan: from `make_plan`.
        progress: called as `progress(done_bytes, total_bytes, what)`.
        calibration: the recipe's, if it is open already.

    Returns:
        JSON-able: the plan's summary, `verification`, `notes` (what the methods had to say, pool by pool), with
        calibration text `measured` (see `measure`), and `resumed_files`, how many an earlier run had finished.

    Raises:
        ConversionError: the source changed or holds NaN, the output exists by now, the disk is full: nothing is left. Or another
            process, or another recipe, is at work on the same output: that stays as it is.
    """
    output = output_folder(plan.recipe)
    check_space(output, plan.bytes_after + plan.statistics_bytes * (plan.recipe.statistics is None))
    with contextlib.ExitStack() as stack:
        calibration = calibration or stack.enter_context(open_calibration(plan.recipe, plan.source))
        made = identity("convert", plan.recipe.to_dict(), plan.source.opened, plan.operations)
        made["calibration"] = {"tokens": calibration.digest if calibration else None}
        with open_work(output, made) as work:
            if work.report is None:
                work.complete(_convert(plan, calibration, work, progress))
    assert work.report is not None
    return {**plan.summary(), **work.report, "resumed_files": work.num_resumed}


def _convert(plan: Plan, calibration: Calibration | None, work: Work, progress: Progress | None) -> dict[str, Any]:
    folder = work.folder
    _check_copies(plan.source.tensors)
    with work.draft() as draft:
        plan.config.save_pretrained(draft)
        plan.source.opened.copy_travelling_files(draft)
    maker = TensorMaker(plan, calibration, work, progress)
    write_weights(work, plan.operations, maker.make, progress)
    plan.source.opened.buffers.clear()
    found: dict[str, Any] = {}
    if calibration is not None and plan.recipe.measure:
        if progress:
            progress(plan.bytes_after, plan.bytes_after, "measuring the loss")
        found["measured"] = measure(plan, folder, calibration)
    with work.draft() as draft:
        save_card(plan, draft, found.get("measured"), calibration.digest if calibration else "")
    if progress:
        progress(plan.bytes_after, plan.bytes_after, "verifying")
    verification = _verify(plan, folder)
    with work.draft() as draft:
        save_manifest(plan, draft, work.files, verification)
    return {**found, "notes": maker.all_notes, "verification": verification}


def _verify(plan: Plan, folder: Path) -> dict[str, Any]:
    verification = verify_output(folder, plan.operations)
    verification["source_tensors"] = {
        "used": len(plan.source.opened.tensors) - len(plan.dropped),
        "dropped": len(plan.dropped),
    }
    verification["experts_relative_error"] = verify_sample(plan, folder)
    if plan.is_lossless:
        verification["lossless"] = verify_lossless(plan, folder)
    return verification


def _check_copies(tensors: FamilyTensors) -> None:
    """Raise unless tensors that the config ties, and that the source holds twice all the same, are equal."""
    for alias, name in tensors.copies.items():
        if not torch.equal(tensors.read(alias), tensors.read(name)):
            raise ConversionError(
                f"{tensors.source.name} ties {alias} to {name} by its config, but holds two different tensors; expected "
                "equal ones: set tie_word_embeddings to false in its config.json if they are meant to differ"
            )

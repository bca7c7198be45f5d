"""`execute`: runs a plan, tensor by tensor, into a folder that appears complete and verified or not at all."""

from typing import Any

import torch

from .calibration import open_calibration, statistics_folder
from .card import save_card
from .errors import ConversionError
from .families import FamilyTensors
from .making import TensorMaker
from .measure import measure
from .plan import Plan
from .verify import verify_lossless, verify_output
from .write import Progress, check_output, check_space, new_folder, write_weights


def execute(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Convert as planned; the output folder appears in one rename, after everything in it has been verified.

    Args:
        plan: from `make_plan`.
        progress: called as `progress(done_bytes, total_bytes, what)`.

    Returns:
        JSON-able: the plan's summary, `verification`, `notes` (what the methods had to say, pool by pool) and, with
        calibration text, `measured` (see `measure`).

    Raises:
        ConversionError: the source changed or holds NaN, the output exists by now, the disk is full. Nothing is left.
    """
    output = check_output(plan.recipe.output)
    check_space(output, plan.bytes_after + plan.statistics_bytes * (plan.recipe.statistics is None))
    with statistics_folder(plan.recipe) as statistics, new_folder(output) as folder:
        _check_copies(plan.source.tensors)
        calibration = open_calibration(plan.recipe, plan.source, statistics)
        plan.config.save_pretrained(folder)
        plan.source.opened.copy_travelling_files(folder)
        maker = TensorMaker(plan, calibration, progress=progress)
        write_weights(folder, plan.operations, maker.make, progress)
        found: dict[str, Any] = {}
        if calibration is not None and plan.recipe.measure:
            if progress:
                progress(plan.bytes_after, plan.bytes_after, "measuring the loss")
            found["measured"] = measure(plan, folder, calibration)
        save_card(plan, folder, found.get("measured"), calibration.digest if calibration else "")
        if progress:
            progress(plan.bytes_after, plan.bytes_after, "verifying")
        verification = verify_output(folder, plan.operations)
        verification["source_tensors"] = {
            "used": len(plan.source.opened.tensors) - len(plan.dropped),
            "dropped": len(plan.dropped),
        }
        if plan.is_lossless:
            verification["lossless"] = verify_lossless(plan, folder)
    return {**plan.summary(), **found, "notes": maker.all_notes, "verification": verification}


def _check_copies(tensors: FamilyTensors) -> None:
    """Raise unless tensors that the config ties, and that the source holds twice all the same, are equal."""
    for alias, name in tensors.copies.items():
        if not torch.equal(tensors.read(alias), tensors.read(name)):
            raise ConversionError(
                f"{tensors.source.name} ties {alias} to {name} by its config, but holds two different tensors; expected "
                "equal ones: set tie_word_embeddings to false in its config.json if they are meant to differ"
            )

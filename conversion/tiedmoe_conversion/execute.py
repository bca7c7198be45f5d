"""`execute`: runs a plan, tensor by tensor, into a folder that appears complete and verified or not at all."""

from typing import Any

import torch

from .card import save_card
from .errors import ConversionError
from .families import FamilyTensors
from .making import TensorMaker
from .plan import Plan
from .verify import verify_lossless, verify_output
from .write import Progress, check_output, check_space, new_folder, write_weights


def execute(plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Convert as planned; the output folder appears in one rename, after everything in it has been verified.

    Args:
        plan: from `make_plan`.
        progress: called as `progress(done_bytes, total_bytes, what)`.

    Returns:
        The plan's summary plus `verification`, JSON-able.

    Raises:
        ConversionError: the source changed or holds NaN, the output exists by now, the disk is full. Nothing is left.
    """
    output = check_output(plan.recipe.output)
    check_space(output, plan.bytes_after)
    _check_copies(plan.source.tensors)
    with new_folder(output) as folder:
        plan.config.save_pretrained(folder)
        plan.source.opened.copy_travelling_files(folder)
        write_weights(folder, plan.operations, TensorMaker(plan).make, progress)
        save_card(plan, folder)
        if progress:
            progress(plan.bytes_after, plan.bytes_after, "verifying")
        verification = verify_output(folder, plan.operations)
        verification["source_tensors"] = {
            "used": len(plan.source.opened.tensors) - len(plan.dropped),
            "dropped": len(plan.dropped),
        }
        if plan.method.lossless:
            verification["lossless"] = verify_lossless(plan, folder)
    return {**plan.summary(), "verification": verification}


def _check_copies(tensors: FamilyTensors) -> None:
    """Raise unless tensors that the config ties, and that the source holds twice all the same, are equal."""
    for alias, name in tensors.copies.items():
        if not torch.equal(tensors.read(alias), tensors.read(name)):
            raise ConversionError(
                f"{tensors.source.name} ties {alias} to {name} by its config, but holds two different tensors; expected "
                "equal ones: set tie_word_embeddings to false in its config.json if they are meant to differ"
            )

"""Ties a model by a recipe that the audit suggests, so that the audit can measure it."""

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from transformers_tiedmoe.training.pretrained import load_model

from .recipe import ConversionRecipe
from .run import convert


def tied_by(fields: dict[str, Any], source: str, calibration: str, **more: Any) -> PreTrainedModel:
    """Convert `source` by a recipe's `fields` in a temporary folder, and load what comes out.

    Args:
        fields: of a `ConversionRecipe`, without source and output, as an audit's plans have them.
        source: folder or hub id.
        calibration: text to fit on.
        more: further fields, such as `calibration_tokens`.
    """
    with tempfile.TemporaryDirectory(prefix="tiedmoe-suggested-") as folder:
        output = str(Path(folder, "tied"))
        convert(
            ConversionRecipe.from_dict(
                {"source": source, "output": output, "calibration": calibration, "measure": False, **fields, **more}
            )
        )
        return load_model(output)

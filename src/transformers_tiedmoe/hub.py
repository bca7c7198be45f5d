"""The stub that lets `trust_remote_code=True` load a checkpoint in a process that never imported this package."""

from pathlib import Path

STUB_NAME = "tiedmoe_remote.py"
STUB = '''"""Loads this checkpoint's classes from the package transformers-tiedmoe."""

try:
    from transformers_tiedmoe import (
        TiedMoeConfig,
        TiedMoeForCausalLM,
        TiedMoeForSequenceClassification,
        TiedMoeForTokenClassification,
        TiedMoeModel,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers_tiedmoe":
        raise
    raise ImportError(
        "This checkpoint ties experts across layers and needs the package transformers-tiedmoe, which is not "
        "installed; install it with: pip install transformers-tiedmoe"
    ) from error

__all__ = [
    "TiedMoeConfig",
    "TiedMoeForCausalLM",
    "TiedMoeForSequenceClassification",
    "TiedMoeForTokenClassification",
    "TiedMoeModel",
]
'''


def write_stub(directory) -> None:
    """Write the stub into a checkpoint's `directory`, which is made if it is not there."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / STUB_NAME).write_text(STUB, encoding="utf-8")

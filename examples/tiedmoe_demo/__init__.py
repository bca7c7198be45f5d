"""The main job on a model small enough for two CPU cores: a trained MoE checkpoint in, a tied and healed one out.

`run_demo(DemoConfig(output="demo"))` trains a source on six novels, converts it, heals it, gives the source the same
extra steps as a control, measures all four, audits source, tied and healed, and writes the report. Nothing here is
used by the rest of the package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .config import DemoConfig

if TYPE_CHECKING:
    from .page import comparison_table
    from .run import run_demo

__all__ = ["DemoConfig", "comparison_table", "run_demo"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: the command line reads DemoConfig for its flags, and torch takes seconds.
    modules = {"comparison_table": "page", "run_demo": "run"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{modules[name]}", __name__), name)

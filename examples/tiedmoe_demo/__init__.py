"""The main job on a model small enough for two CPU cores: a trained MoE checkpoint in, a tied and healed one out.

`run_demo(DemoConfig(output="demo"))` trains a source on six novels, converts it, heals it, gives the source the same
extra steps as a control, measures all four and writes the report. Nothing here is used by the rest of the package.
"""

from .config import DemoConfig
from .page import comparison_table
from .run import run_demo

__all__ = ["DemoConfig", "comparison_table", "run_demo"]

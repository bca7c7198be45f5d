"""The command `tiedmoe`: plan, convert, verify, untie, heal, demo, recipes. Only glue around the Python API.

A package of its own because `import transformers_tiedmoe` registers with the Auto classes, which takes seconds: here
torch and transformers are imported when a command runs, so that `tiedmoe --help` answers at once.
"""

from .app import build_app, main

__all__ = ["build_app", "main"]

"""The package's version, the one place of it: pyproject.toml, the CLI, cards and remote stubs read it here."""

__version__ = "0.1.0"

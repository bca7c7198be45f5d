"""Read YAML that a user wrote, or found somewhere: plain values, of bounded size and depth.

Aliases are refused, as ten lines of them stand for gigabytes; so is nesting that no recipe has.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from .errors import TiedMoeError

MAX_BYTES = 1 << 16
MAX_DEPTH = 32


def read_yaml(path: str | Path, name: str | None = None) -> Any:
    """Return the value in a YAML file.

    Args:
        path: of the file.
        name: what errors call it; `path` if missing.

    Raises:
        TiedMoeError: the file cannot be read, has more than 64 KiB, or holds more than plain values.
    """
    name = f"cannot read {name or path}"
    try:
        with open(os.path.expanduser(path), "rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, ValueError) as error:  # a ValueError: not UTF-8, or a NUL in the path
        raise TiedMoeError(f"{name}: {error}; expected a text file of YAML in UTF-8") from error
    return load_yaml(text, f"{name}: it")


def load_yaml(text: str, name: str) -> Any:
    """Return the value that `text` stands for.

    Args:
        text: one YAML document.
        name: what errors call it.

    Raises:
        TiedMoeError: the text is longer than 64 KiB, is no YAML, uses aliases or nests more than 32 deep.
    """
    if len(text) > MAX_BYTES:
        raise TiedMoeError(f"{name} has more than {MAX_BYTES} bytes; expected a few lines of YAML")
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: an impossible date or number
        raise TiedMoeError(f"{name} is no YAML of plain values: {error}; mend it there") from error


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, and without recursion deeper than `MAX_DEPTH`."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"it uses the alias *{event.anchor}; write the value out", event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"it nests more than {MAX_DEPTH} deep", self.peek_event().start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node):
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:
            raise yaml.constructor.ConstructorError(None, None, "it holds a number of over 63 bits", node.start_mark)
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)

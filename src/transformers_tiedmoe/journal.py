"""The journal of a run: what it has done so far, line by line in a file that survives a kill. For `workdir.py`.

A line is flushed to the disk after the file that it names: what the journal does not call finished is made again. Each
line holds its own hash, and its content is checked in type and range.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from .errors import TiedMoeError
from .files import flush, is_digest, is_file_name

CHECK = "check"  # a line's own hash


def read_journal(journal: Path, mend: bool = False) -> list[dict[str, Any]]:
    """Return a journal's entries without a last line that a kill cut off; none if the file is missing.

    Args:
        journal: the file.
        mend: remove that last line from the file; only with the lock held.

    Raises:
        TiedMoeError: a line is not one that `append` wrote, or claims what it cannot.
    """
    if not journal.is_file():
        return []
    lines = journal.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        if mend:
            os.truncate(journal, sum(map(len, lines[:-1])))
        lines.pop()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if (
            not isinstance(entry, dict)
            or entry.pop(CHECK, "") != _line_hash(entry)
            or not _is_entry(entry, number == 1)
        ):
            raise TiedMoeError(
                f"{journal} is damaged: line {number} is not one that was written there; delete the folder "
                f"{journal.parent} and start anew"
            )
        entries.append(entry)
    return entries


def append(journal: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to a journal; it is on the disk when this returns."""
    with open(journal, "ab") as file:
        file.write(json.dumps({**entry, CHECK: _line_hash(entry)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    flush(journal.parent)


def _line_hash(entry: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(entry).encode())


def _is_entry(entry: dict[str, Any], is_first: bool) -> bool:
    """Tell whether a journal's line has the form of those written here, and names only files inside the folder."""
    match entry:
        case {"identity": dict(aspects), "made": list(made)}:
            is_right = all(isinstance(each, dict) for each in aspects.values()) and all(
                isinstance(each, str) for each in made
            )
            return is_first and is_right
        case {"begun": list(names)} | {"owned": list(names)} | {"deleted": list(names)}:
            is_right = all(map(is_file_name, names))
        case {"file": name, "written": written}:
            is_right = is_file_name(name) and is_digest(written)
        case {"stored": name, "written": written, "metadata": dict()}:
            is_right = is_file_name(name) and is_digest(written)
        case {"value": str(), "is": _} | {"complete": dict()}:
            is_right = True
        case _:
            is_right = False
    return is_right and not is_first

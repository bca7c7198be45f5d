"""What a conversion has done so far, as lines of a file that survive a kill; `work.py` says what for.

A line is written, and flushed to the disk, after the file it speaks of: what the journal does not name is made again.
"""

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from .errors import ConversionError

JOURNAL, FILES = "journal.jsonl", "output"
HASH = "xxh3_128"  # finds damage, not forgery; sha256 would take longer than copying the files
_CHUNK = 1 << 20


def partial_folder(output: Path) -> Path:
    """Where the work on `output` is."""
    return output.parent / f".{output.name}.partial"


def was_renamed(output: Path) -> bool:
    """Whether a run was killed after `output` took its name and before its working folder was gone."""
    partial = partial_folder(output)
    if not output.is_dir() or (partial / FILES).exists():
        return False
    entries = read_journal(partial)
    return bool(entries) and "complete" in entries[-1]


def read_journal(partial: Path) -> list[dict[str, Any]]:
    """The journal's entries; a last line that a kill has cut off is removed from the file."""
    path = partial / JOURNAL
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, sum(map(len, lines[:-1])))
        lines.pop()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ConversionError(f"{path} is damaged: {error}; delete the folder {partial} and start anew") from error


def append(journal: Path, entry: dict[str, Any]) -> None:
    """Add a line to a journal; it is on the disk when this returns."""
    with open(journal, "ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    flush(journal.parent)


def file_digest(path: Path) -> dict[str, Any] | None:
    """`{"bytes": …, "xxh3_128": …}` of a file, None where there is none."""
    if not path.is_file():
        return None
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return {"bytes": path.stat().st_size, HASH: digest.hexdigest()}


def flush(path: Path) -> None:
    """Have a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

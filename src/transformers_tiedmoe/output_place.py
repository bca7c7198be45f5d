"""Where an output may be made, and whether one has just been.

Nothing here writes, but for an empty folder of a run that was killed just before its end.
"""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from .errors import TiedMoeError
from .files import MAX_NAME_BYTES, check_apart, disk_errors_explained, others_in, resolved
from .journal import read_journal
from .run_folder import FILES, JOURNAL, Folder


def partial_folder(output: Path) -> Path:
    """Return the folder in which `output` is made."""
    return output.parent / f".{output.name}.partial"


def check_output(
    output: str | Path, inputs: Mapping[str, str | Path | None] | None = None, owned: Collection[str] | None = None
) -> Path:
    """Return the absolute path of a folder that can be made: new, empty, or to be replaced.

    Args:
        output: as the user gave it.
        inputs: by name what the run reads, or writes elsewhere: no such file or folder may be in `output`, nor
            `output` in it. A str that does not exist (a hub id) and None are left out, a Path is not.
        owned: relative names of the files that an earlier run wrote into `output`, which may then hold these and no
            others; None if it must be new or empty.

    Raises:
        TiedMoeError: one of these is not so, or no folder can have that name.
    """
    path = resolved(output)
    with disk_errors_explained(path, "nothing was written"):
        _check_place(path, output, owned)
    check_apart(path, inputs or {})
    return path


def _check_place(path: Path, output: str | Path, owned: Collection[str] | None) -> None:
    """Raise unless a folder can be made at `path`, or replaced, or is empty."""
    if len(os.fsencode(partial_folder(path).name)) > MAX_NAME_BYTES or path.is_mount():
        raise TiedMoeError(
            f"output {output} cannot be made: its name is too long, or a disk is mounted there; choose another one"
        )
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise TiedMoeError(f"output {output} exists and is not a folder; choose another one")
    if path.is_dir() and not was_renamed(path):
        with contextlib.suppress(OSError):
            partial_folder(path).rmdir()  # empty: of a run that was killed just before its end
        if owned is None and (found := sorted(p.name for p in path.iterdir())):
            raise TiedMoeError(
                f"output folder {output} is not empty: it holds {found[:3]}; expected a new or empty one, as nothing "
                "is overwritten: choose another, or empty it"
            )
        if owned is not None:
            check_owned(path, owned)
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir():
        raise TiedMoeError(f"output {output} cannot be made: {parent} is a file; choose another one")


def was_renamed(output: Path) -> bool:
    """Tell whether a run was killed after `output` took its name and before its working folder was gone."""
    partial = partial_folder(output)
    if not output.is_dir() or (partial / FILES).exists():
        return False
    entries = read_journal(partial / JOURNAL)
    if not entries or "complete" not in entries[-1]:
        return False
    written = Folder(output, partial, entries).files
    return all(_size(output / name) == found["bytes"] for name, found in written.items())


def check_owned(output: Path, owned: Collection[str]) -> None:
    """Raise if `output` holds anything but the files of the run to be replaced."""
    if foreign := others_in(output, owned):
        raise TiedMoeError(
            f"output folder {output} holds {foreign[:3]}, which the run to be replaced did not write; nothing of that "
            "kind is deleted: move it elsewhere, or choose another output"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1

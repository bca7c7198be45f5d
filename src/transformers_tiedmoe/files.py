"""Where files may be written, and how they are written whole.

The disk may be full or taken away, and links may form a circle.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import TiedMoeError

HASH = "xxh3_128"  # finds damage, not forgery; sha256 would take longer than copying the files
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
MAX_NAME_BYTES = 255  # of a file or a folder, on every usual disk
_CHUNK = 1 << 20


def expand(path: str | Path) -> str:
    """Return `path` with a leading `~` replaced by the home folder; a hub id stays as it is."""
    return os.path.expanduser(path)


def misplaced(model: str | Path) -> str | None:
    """Say why a model's name is neither a folder nor can be a hub id: it is a file, or a path that leads nowhere."""
    path, name = Path(expand(model)), str(model)
    if path.is_dir():
        return None
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        what = "is a file" if path.exists() else "does not exist"
        return f"{model} {what}; expected the folder of a checkpoint, or a Hugging Face Hub id"
    return None


def resolved(folder: str | Path) -> Path:
    """Return the absolute path of a folder to be written; a link as its last part is not followed."""
    text = expand(folder)
    try:
        is_name = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise TiedMoeError(f"{str(folder)!r} cannot be the name of a folder; choose another one")
    path = Path(text).absolute()
    return real_path(path) if path.name in ("", "..") else real_path(path.parent) / path.name


def real_path(path: Path) -> Path:
    """Return the path with links resolved; unlike `Path.resolve` it does not raise for a circle of links."""
    return Path(os.path.realpath(path))


def check_apart(folder: str | Path, inputs: Mapping[str, str | Path | None], name: str = "output") -> None:
    """Raise `TiedMoeError` if the output `folder` is one of the inputs, holds one or lies in one; links are followed.

    Args:
        folder: as the user gave it.
        inputs: as in `check_output`.
        name: what the user calls the folder.
    """
    written = resolved(folder)
    for what, given in inputs.items():
        path = Path(expand(given)) if given is not None else None
        if path is None or not (os.path.exists(path) or isinstance(given, Path)):
            continue
        found = real_path(path)
        links = [real_path(link) for link in path.rglob("*") if link.is_symlink()] if path.is_dir() else []
        for place in (written, real_path(written), written.with_name(f".{written.name}.partial")):
            if found == place:
                raise TiedMoeError(f"{name}={folder} is also the {what}; give a folder of its own")
            if place in found.parents:
                raise TiedMoeError(
                    f"the {what} {given} lies in {name}={folder}, which is written; give a folder of its own"
                )
            if inside := [link for link in links if place == link or place in link.parents]:
                raise TiedMoeError(
                    f"the {what} {given} links to {inside[0]}, which lies in {name}={folder}; give a folder of its own"
                )
        if found in {*written.parents, *real_path(written).parents}:
            raise TiedMoeError(f"{name}={folder} lies in the {what} {given}, which is read; give a folder of its own")


def file_digest(path: Path) -> dict[str, Any] | None:
    """Return `{"bytes": …, "xxh3_128": …}` of a file, None if it is missing."""
    if not path.is_file():
        return None
    import xxhash  # here: a GPU machine that only checks kernels has no package installed, but reads this file

    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return {"bytes": path.stat().st_size, HASH: digest.hexdigest()}


def is_file_name(name: Any) -> bool:
    """Tell whether `name` can be a file in a folder: a relative path that does not lead out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    try:
        is_short = all(len(os.fsencode(part)) <= MAX_NAME_BYTES for part in path.parts) and len(path.parts) < 64
    except UnicodeEncodeError:
        return False
    return is_short and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name != "."


def is_digest(written: Any) -> bool:
    """Tell whether `written` has the form of what `file_digest` gives."""
    match written:
        case {"bytes": int(size), **others} if set(others) == {HASH}:
            return size >= 0 and re.fullmatch("[0-9a-f]{32}", str(others[HASH])) is not None
    return False


def flush(path: Path) -> None:
    """Write a file, or a folder's entries, through to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str, draft: Path | None = None) -> None:
    """Write a file atomically: whatever happens, it is complete or as it was before.

    Args:
        path: in a folder that exists.
        text: written as UTF-8.
        draft: where it is written first, on the same disk; `.NAME.draft` beside it if None.
    """
    draft = draft or path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    flush(draft)
    draft.replace(path)


def atomic_write_json(path: Path, value: Any, draft: Path | None = None) -> None:
    """Write `value` as JSON by `atomic_write_text`."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n", draft)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that a run of ours has written.

    Raises:
        TiedMoeError: it is missing, damaged or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TiedMoeError(
            f"cannot read {path}: {error}; expected a JSON object: delete it, and make it again"
        ) from error
    if not isinstance(value, dict):
        raise TiedMoeError(
            f"{path} holds a {type(value).__name__}; expected a JSON object: delete it, and make it again"
        )
    return value


def files_in(folder: Path) -> Iterator[Path]:
    """Yield every file in a folder and its subfolders, except links."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def others_in(folder: Path, owned: Collection[str]) -> list[str]:
    """Return, sorted, what a folder holds besides the `owned` files and their folders."""
    names = {PurePosixPath(name) for name in owned}
    folders = {parent for name in names for parent in name.parents}
    found = []
    for path in folder.rglob("*"):
        name = PurePosixPath(path.relative_to(folder).as_posix())
        if path.is_symlink() or name not in (folders if path.is_dir() else names):
            found.append(str(name))
    return sorted(found)


def remove_file(folder: Path, name: str) -> None:
    """Delete the file `name` if it exists, and the folders in `folder` that are then empty; never through a link."""
    path = folder / name
    parents = [folder / parent for parent in PurePosixPath(name).parents if parent.name]
    if any(each.is_symlink() for each in (path, *parents)) or path.is_dir():
        return
    path.unlink(missing_ok=True)
    for parent in parents:  # the deepest first
        with contextlib.suppress(OSError):
            parent.rmdir()


@contextlib.contextmanager
def disk_errors_explained(output: Path, left: str) -> Iterator[None]:
    """Turn the errors of a full or forbidden disk into one that says what to do, and what is left (`left`)."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in FULL:
            raise TiedMoeError(
                f"the disk of {output} is full; {left}. Free some space, or choose a folder on another disk, and run "
                "the same command again"
            ) from error
        if number in FORBIDDEN:
            where = getattr(error, "filename", None)
            raise TiedMoeError(
                f"cannot write {output}: {os.strerror(number)}{f' ({where})' if where else ''}; choose another "
                f"folder, or change who may read and write; {left}"
            ) from error
        if isinstance(error, OSError) and _is_folder_of(output, error.filename):
            raise TiedMoeError(
                f"the folder {output} cannot be made: {error.strerror} ({error.filename}); choose another one; {left}"
            ) from error
        raise


def _is_folder_of(output: Path, name: Any) -> bool:
    """Tell whether an error's file is the output, the folder that it is made in, or one of those that it lies in."""
    if not isinstance(name, (str, Path)):
        return False
    path, own = Path(os.path.abspath(name)), Path(os.path.abspath(output))
    return path in {own, own.with_name(f".{own.name}.partial"), *own.parents} or path.parent == own


def _error_number(error: Exception) -> int | None:
    """Return the errno of an error; safetensors and torch name it only in the text of theirs."""
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    is_torchs = re.search(r"PytorchStreamWriter failed writing file|unexpected pos \d+ vs \d+", str(error))
    return errno.ENOSPC if is_torchs else None

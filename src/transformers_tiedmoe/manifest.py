"""`tiedmoe_conversion.json`, beside a checkpoint's weights: how they came about, and the hash of every file."""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .errors import TiedMoeError
from .files import is_file_name
from .version import __version__

MANIFEST = "tiedmoe_conversion.json"


def versions() -> dict[str, str]:
    """Name the packages whose version can change what is written."""
    return {"transformers-tiedmoe": __version__, **{name: version(name) for name in ("transformers", "torch")}}


def fingerprint(model: str, config: PreTrainedConfig) -> dict[str, Any]:
    """Return what identifies a model: size and time of each file of a folder, or a hub id's commit."""
    folder = Path(model)
    if not folder.is_dir():
        return {"commit": getattr(config, "_commit_hash", None)}
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def save_manifest(folder: Path, made_by: str, fields: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    """Write `tiedmoe_conversion.json`: what the checkpoint in `folder` is made of, and the hash of every file in it.

    It holds no time and no path of this machine: the same recipe gives the same file.

    Args:
        folder: of the complete checkpoint.
        made_by: the command.
        fields: JSON-able; recipe, source and whatever else says how the weights came about.
        digests: by relative path `{"bytes": …, "xxh3_128": …}` of every file but the manifest itself.
    """
    manifest = {"made_by": made_by, **fields, "versions": versions(), "files": dict(sorted(digests.items()))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(model: str, revision: str | None = None) -> dict[str, Any]:
    """Read the manifest of `model`, a folder or hub id; empty if it has none.

    Raises:
        TiedMoeError: it is no JSON object, or not of the form that `save_manifest` writes.
    """
    path = cached_file(
        model,
        MANIFEST,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TiedMoeError(
            f"{path} cannot be read: {error}; expected the JSON object that a conversion wrote: copy the checkpoint "
            "again, or delete that file"
        ) from error
    return check_manifest(found, path)


def check_manifest(found: Any, path: str | Path) -> dict[str, Any]:
    """Return the content of a manifest, if what it claims has the type and range of what `save_manifest` writes.

    Args:
        found: as it was parsed.
        path: for the error.
    """
    if not isinstance(found, dict):
        raise TiedMoeError(
            f"{path} holds a {type(found).__name__}; expected the JSON object that a conversion wrote: copy the "
            "checkpoint again, or delete that file"
        )
    wrong = sorted(name for name, is_right in _MANIFEST_FIELDS.items() if name in found and not is_right(found[name]))
    if wrong:
        raise TiedMoeError(
            f"{path} has {wrong} of another form than a conversion writes; copy the checkpoint again, or delete that "
            "file"
        )
    return found


def _is_source(value: Any) -> bool:
    return isinstance(value, dict) and all(each is None or isinstance(each, str) for each in value.values())


def _is_dropped(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("tensor"), str) and isinstance(each.get("reason"), str)
        for each in value
    )


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_file_name(name) and isinstance(each, dict) for name, each in value.items()
    )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


_MANIFEST_FIELDS: dict[str, Callable[[Any], bool]] = {
    "made_by": lambda value: isinstance(value, str),
    "recipe": lambda value: value is None or isinstance(value, dict),  # None: healed, and converted by somebody else
    "source": _is_source,
    "dropped": _is_dropped,
    "verification": _is_mapping,
    "versions": _is_mapping,
    "healing": _is_mapping,
    "conversion": _is_mapping,
    "healed_from": lambda value: isinstance(value, str),
    "files": _is_files,
}

"""`tiedmoe_conversion.json`: what an output is made of, and the hash of every file in it.

It holds no time and no path of this machine: the same recipe gives the same file.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import PACKAGES, public_recipe
from .checkpoint.reader import Source
from .journal import file_digest
from .verify import MANIFEST

if TYPE_CHECKING:
    from .checkpoint.writer import Planned
    from .plan import Plan


def versions() -> dict[str, str]:
    """The packages whose version can change what is written."""
    return {name: version(name) for name in PACKAGES}


def identity(
    command: str, recipe: Mapping[str, Any], source: Source, operations: "tuple[Planned, ...]"
) -> dict[str, Any]:
    """What decides an output's bytes: a run goes on with the work of another one where all of it is the same."""
    digest = hashlib.sha256()
    for each in operations:
        digest.update(f"{each.target} {each.dtype} {each.shape} {each.file}\n".encode())
    folders = {"source": str(source.folder.resolve()) if source.commit is None else source.name}
    return {
        "recipe": {"command": command, **recipe, **folders, "output": None},
        "source": {"commit": source.commit, "headers_and_config": source.fingerprint(), **source.stamps()},
        "versions": versions(),
        "plan": {"tensors": digest.hexdigest()},
    }


def save_manifest(plan: "Plan", folder: Path, files: Mapping[str, Any], verification: Mapping[str, Any]) -> None:
    """Write the manifest of the converted checkpoint in `folder`, last.

    Args:
        plan: what was done.
        folder: where.
        files: of the files whose hash is known already, `{"bytes": …, "xxh3_128": …}`.
        verification: what was found when the output was read again.
    """
    source, recipe = plan.source.opened, public_recipe(plan)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = {
        "made_by": "tiedmoe convert",
        "recipe": recipe,
        "source": {
            "name": recipe["source"],
            "commit": source.commit,
            "headers_and_config_sha256": source.fingerprint(),
        },
        "versions": versions(),
        "dropped": [{"tensor": name, "reason": reason} for name, reason in plan.dropped],
        "verification": verification,
        "files": {name: files.get(name) or file_digest(folder / name) for name in names if name != MANIFEST},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

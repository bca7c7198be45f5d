"""What a checkpoint carries beside its weights, and its way to the Hub: remote stub, model card, manifest, upload.

The card is rendered from `model_cards/TEMPLATE.md`, which ships as `data/model_card.md`. Names that a user or a source
chose go into it as plain text: no Markdown, no HTML, no link but to a web page.
"""

import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .errors import TiedMoeError
from .files import file_digest, is_file_name
from .version import __version__

MANIFEST = "tiedmoe_conversion.json"
CARD = "README.md"
STUB_NAME = "tiedmoe_remote.py"
STUB = f'''"""Loads this checkpoint's classes from the package transformers-tiedmoe, {__version__} or newer."""

from packaging.version import Version

HOW = (
    "clone the package's repository and run `pip install ./transformers-tiedmoe` "
    "(once a registry has it: pip install 'transformers-tiedmoe>={__version__}')"
)

try:
    import transformers_tiedmoe
    from transformers_tiedmoe import (
        TiedMoeConfig,
        TiedMoeForCausalLM,
        TiedMoeForSequenceClassification,
        TiedMoeForTokenClassification,
        TiedMoeModel,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers_tiedmoe":
        raise
    raise ImportError(
        "This checkpoint ties experts across layers and needs the package transformers-tiedmoe, which is not "
        f"installed: {{HOW}}"
    ) from error

if Version(transformers_tiedmoe.__version__) < Version("{__version__}"):
    raise ImportError(
        f"This checkpoint was written by transformers-tiedmoe {__version__}, but {{transformers_tiedmoe.__version__}} "
        f"is installed, which may not know all of it: {{HOW}}"
    )

__all__ = [
    "TiedMoeConfig",
    "TiedMoeForCausalLM",
    "TiedMoeForSequenceClassification",
    "TiedMoeForTokenClassification",
    "TiedMoeModel",
]
'''
LICENCE_FIELDS = ("license", "license_name", "license_link")


def write_stub(directory: str | Path) -> None:
    """Write the stub that `trust_remote_code=True` imports into a `directory`, which is made if missing."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / STUB_NAME).write_text(STUB, encoding="utf-8")


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
    "files": _is_files,
}


def save_card(folder: Path, source: Mapping[str, Any], licence: Mapping[str, Any], **fields: Any) -> None:
    """Render the template into `folder/README.md`.

    Args:
        folder: of the checkpoint.
        source: `name`, the hub id or the folder's name, and `on_hub`, whether it is a hub id.
        licence: as `read_licence` returns it.
        fields: what the template names; text that a user or a source chose goes through `plain` here.
    """
    name = source["name"]
    recipe = yaml.safe_dump(fields["recipe"], sort_keys=False) if fields.get("recipe") else ""
    title = fields.pop("title")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe", "expert-tying", "tiedmoe"],
        base_model=name if source["on_hub"] else None,
        **licence,
    )
    shown = {
        "title": plain(title),
        "path": json.dumps(str(title)),
        "source": {"link": f"[{plain(name)}](https://huggingface.co/{name})" if source["on_hub"] else plain(name)},
        "licence": "The licence is the source's."
        if licence
        else "The source names no licence: ask before passing it on.",
        "versions": ", ".join(f"{package} {number}" for package, number in versions().items()),
        "requires": __version__,
        "fence": _fence(recipe),
        "methods": [],
        "groups": [],
    }
    template = (files("transformers_tiedmoe") / "data" / "model_card.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **{**shown, **fields, "recipe": recipe})
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)
    card.save(folder / CARD)


def save_healed(
    folder: Path,
    title: str,
    model: str,
    config: Any,
    healing: Mapping[str, Any],
    digests: Mapping[str, Any],
) -> None:
    """Write the manifest and the card of a healed checkpoint: what it was converted from, how, and what healing gave.

    Args:
        folder: where the two are written.
        title: name of the healed checkpoint.
        model: the folder or hub id that was healed; its own manifest and card say where it comes from.
        config: the healed model's.
        healing: JSON-able: `data`, `teacher` (or None), `teacher_weight`, `steps`, `tokens`, `parameters`,
            `learning_rate`, and `before` and `after`, each with `loss` in nats per token, `perplexity` and `tokens`.
            Paths become names.
        digests: of every other file of the checkpoint, as `save_manifest`.
    """
    made = read_manifest(model)
    earlier = made.get("source") if isinstance(made.get("source"), dict) else None
    name = str(earlier.get("name")) if earlier else public_name(model)
    source = {"name": name, "on_hub": bool(earlier and earlier.get("commit")) or is_hub_id(name)}
    told = {
        **healing,
        "data": public_name(healing["data"]),
        "teacher": healing["teacher"] and public_name(healing["teacher"]),
    }
    recipe = made.get("recipe") if isinstance(made.get("recipe"), dict) else None
    save_card(
        folder,
        source,
        read_licence(model),
        title=title,
        made_by=f"Made by `tiedmoe heal` from {plain(public_name(model))}.",
        healing={**told, "data": plain(told["data"]), "teacher": told["teacher"] and plain(told["teacher"])},
        recipe=recipe,
        groups=getattr(config, "groups", None) or [],
        pool_num_experts=getattr(config, "pool_num_experts", None) or [],
    )
    fields = {"recipe": recipe, "source": earlier or {"name": public_name(model)}, "healing": told}
    if "dropped" in made:
        fields["dropped"] = made["dropped"]
    save_manifest(folder, "tiedmoe heal", fields, {**digests, CARD: file_digest(folder / CARD)})


def read_licence(model: str, revision: str | None = None) -> dict[str, Any]:
    """Read the licence fields of the card of `model`, a folder or hub id; empty if there is no card or it names none.

    A licence is a short name, its link a web page or a file beside the card; anything else is left out.
    """
    path = cached_file(
        model,
        CARD,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        data = ModelCard.load(path).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError, RecursionError):
        return {}  # a card that cannot be read names no licence; ours says so
    found = {name: data[name] for name in LICENCE_FIELDS if isinstance(data.get(name), str)}
    is_link = re.fullmatch(r"https?://[^\s<>()\"'`]+|[\w.-]+", found.get("license_link", ""))
    found = {
        name: value
        for name, value in found.items()
        if (is_link if name == "license_link" else re.fullmatch(r"[\w.+ -]{1,96}", value))
    }
    return found if "license" in found else {}


def plain(text: object) -> str:
    """Return `text` as one line that Markdown shows as it is: no heading, link, HTML or code."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&])", r"\\\1", " ".join(str(text).split()))


def public_name(name: str) -> str:
    """Return a folder's or file's own name in place of its path on this machine; a hub id stays."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else str(name)


def is_hub_id(name: str) -> bool:
    """Tell whether `name` has the form `account/model`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _fence(text: str) -> str:
    """Return a code fence that nothing in `text` closes."""
    return "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def check_upload(repo_id: str) -> None:
    """Raise `TiedMoeError` unless `repo_id` is a valid name and an account is logged in to the Hub.

    Called before a conversion begins, which may take hours.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TiedMoeError(f"push_to_hub={repo_id!r}: {error}; expected a name such as account/model") from error
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a bad one, no network: all have their own classes
        raise TiedMoeError(
            f"push_to_hub={repo_id!r}, but the Hub does not know who you are ({error}); run `hf auth login` first, or "
            "leave it out"
        ) from error


def push_to_hub(folder: str | Path, repo_id: str, message: str) -> str:
    """Upload everything in `folder` to the model repository `repo_id`, which is made if missing.

    Returns:
        The address of the commit.

    Raises:
        TiedMoeError: the Hub refused or could not be reached. The folder is complete all the same.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:
        raise TiedMoeError(
            f"{folder} is complete, but uploading it to {repo_id!r} failed: {error}. Try again with "
            f"`hf upload {repo_id} {folder}`"
        ) from error
    return str(commit.commit_url)

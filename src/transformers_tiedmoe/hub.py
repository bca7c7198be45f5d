"""What a checkpoint carries beside its weights, and its way to the Hub: remote stub, model card, manifest, upload.

The card is rendered from `model_cards/TEMPLATE.md`, which ships as `data/model_card.md`. Names that a user or a source
chose go into it as plain text: no Markdown, no HTML, no link but to a web page.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel, Field, ValidationError
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
    "conversion": _is_mapping,
    "healed_from": lambda value: isinstance(value, str),
    "files": _is_files,
}


class HeldOut(BaseModel):
    """A loss in nats per token, and on how many tokens."""

    loss: float
    perplexity: float
    tokens: int


class Healing(BaseModel):
    """What a healing gave, as the manifest keeps it; `data` and `teacher` are names, no paths."""

    data: str
    teacher: str | None
    teacher_weight: float
    steps: int
    tokens: int
    parameters: int
    learning_rate: float
    before: HeldOut
    after: HeldOut


class Sizes(BaseModel):
    """What a conversion saved."""

    parameters_before: int
    parameters_after: int
    expert_parameters_before: int
    expert_parameters_after: int
    bytes_before: int
    bytes_after: int


class Measured(BaseModel):
    """What a conversion cost on held-out calibration text, before any healing."""

    tokens: int
    text: str
    digest: str
    loss_before: float
    loss_after: float
    perplexity_before: float
    perplexity_after: float
    agreement: float = Field(description="share of the routers' choices that are the source's")
    slots: int
    dead_slots: int
    dead_before: int
    experts: int
    dead_experts: int


class Conversion(BaseModel):
    """What the card of a converted checkpoint tells besides its recipe."""

    methods: list[tuple[str, str]] = Field(default=[], description="name and summary, in order")
    residual_rank: int = 0
    is_lossless: bool = False
    sizes: Sizes | None = None
    measured: Measured | None = None


class CardFacts(BaseModel):
    """What a card takes from a manifest. A stranger may have written it: all of it is checked, its texts are escaped.

    Attributes:
        made_by: the command.
        healed_from: the model that was healed.
        source: `name`, a hub id or a folder's name; `commit` and `headers_and_config_sha256` if they are known.
    """

    made_by: str = ""
    healed_from: str | None = None
    source: dict[str, str | None] | None = None
    recipe: dict[str, Any] | None = None
    conversion: Conversion | None = None
    healing: Healing | None = None
    versions: dict[str, str] = {}


def save_card(folder: Path, title: str, manifest: Mapping[str, Any], config: Any, **fields: Any) -> None:
    """Write the card of a checkpoint, `render_card`, into `folder/README.md`."""
    render_card(title, manifest, config, **fields).save(folder / CARD)


def render_card(
    title: str,
    manifest: Mapping[str, Any],
    config: Any,
    licence: Mapping[str, Any],
    audited: Mapping[str, Any] | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCard:
    """Render the template: the same checkpoint and the same audit give the same card, whichever command asks.

    Args:
        title: of the checkpoint, its folder's name or hub id.
        manifest: as `save_manifest` writes it, or its fields before that; empty for a model that we did not make.
        config: of the model.
        licence: as `read_licence` returns it.
        audited: what the card tells of an audit, `cards.tell`; its texts are escaped already.
        results: for the metadata's `model-index`.

    Raises:
        TiedMoeError: the manifest is not of the form that we write.
    """
    try:
        facts = CardFacts.model_validate(dict(manifest))
    except ValidationError as error:
        wrong = ", ".join(sorted({".".join(map(str, each["loc"])) for each in error.errors()}))
        raise TiedMoeError(
            f"the {MANIFEST} of {title} has another form than we write, at {wrong}; copy the checkpoint again, or "
            "delete that file: its card then tells what config and weights say"
        ) from error
    source = facts.source or {}
    name = str(source.get("name") or "")
    on_hub = is_hub_id(name) or bool(source.get("commit") and is_hub_id(f"account/{name}"))
    link = f"[{plain(name)}](https://huggingface.co/{name})" if on_hub else plain(name)
    recipe = yaml.safe_dump(facts.recipe, sort_keys=False) if facts.recipe else ""
    package = facts.versions.get("transformers-tiedmoe", __version__)
    config = config.get_text_config()
    is_tied = isinstance(getattr(config, "groups", None), list)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe", *(["expert-tying", "tiedmoe"] if is_tied else [])],
        base_model=name if on_hub else None,
        model_name=" ".join(title.split()) if results else None,
        eval_results=list(results) or None,
        **licence,
    )
    shown = {
        "plain": plain,
        "title": plain(title),
        "path": json.dumps(title),
        "facts": facts,
        "source": link,
        "made_by": _made_by(facts),
        "family": plain(getattr(config, "family", None) or config.model_type),
        "num_layers": config.num_hidden_layers,
        "groups": getattr(config, "groups", None) or [],
        "pool_num_experts": getattr(config, "pool_num_experts", None) or [],
        "is_tied": is_tied,
        "has_licence": bool(licence),
        "recipe": recipe,
        "fence": _fence(recipe),
        "versions": plain(", ".join(f"{each} {number}" for each, number in (facts.versions or versions()).items())),
        "requires": package if re.fullmatch(r"[\w.+]+", package) else __version__,
        "audited": audited,
        "limits": _limits(facts, bool(source), is_tied, audited),
    }
    template = (files("transformers_tiedmoe") / "data" / "model_card.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **shown)
    card.content = re.sub(r"\n{3,}", "\n\n", card.content)
    return card


def _limits(facts: CardFacts, has_source: bool, is_tied: bool, audited: Mapping[str, Any] | None) -> list[str]:
    measured = audited or facts.healing or (facts.conversion and facts.conversion.measured)
    found = ["Its losses above are those of a few texts: other text, languages and tasks may cost more."
             if measured else "How well it predicts has not been measured: `tiedmoe audit` does that."]  # fmt: skip
    if has_source:
        found.append("What the source gets wrong, and may not be used for, holds for this model too; nothing was done "
                     "about it here.")  # fmt: skip
    if is_tied:
        found.append("Programs other than transformers do not read tied checkpoints: `tiedmoe untie` writes the "
                     "family's own, at full size.")  # fmt: skip
    return [*found, *(audited["notes"] if audited else ())]


def _made_by(facts: CardFacts) -> str:
    source = facts.source or {}
    if facts.made_by == "tiedmoe heal":
        return f"Made by `tiedmoe heal` from {plain(facts.healed_from or 'a model of another name')}."
    if facts.made_by != "tiedmoe convert":
        return ""
    revision, fingerprint = (re.sub(r"\W", "", source.get(key) or "") for key in ("commit", _FINGERPRINT))
    where = f"revision `{revision}`" if revision else "a local folder"
    return f"Made by `tiedmoe convert` from {where}, sha256 of its config and headers `{fingerprint}`."


_FINGERPRINT = "headers_and_config_sha256"


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
        healing: JSON-able, the fields of `Healing`. Paths become names.
        digests: of every other file of the checkpoint, as `save_manifest`.
    """
    made = read_manifest(model)
    earlier = made.get("source") if isinstance(made.get("source"), dict) else None
    told = {
        **healing,
        "data": public_name(healing["data"]),
        "teacher": healing["teacher"] and public_name(healing["teacher"]),
    }
    fields: dict[str, Any] = {
        "recipe": made.get("recipe"),
        "source": earlier or {"name": public_name(model)},
        "healed_from": public_name(model),
        "healing": told,
    }
    fields |= {name: made[name] for name in ("dropped", "conversion") if name in made}
    save_card(folder, title, {"made_by": "tiedmoe heal", **fields}, config, licence=read_licence(model))
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

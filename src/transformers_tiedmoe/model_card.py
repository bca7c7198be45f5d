"""The model card of a checkpoint, rendered from `model_cards/TEMPLATE.md`, which ships as `data/model_card.md`.

Names that a user or a source chose go into it as plain text: no Markdown, no HTML, no link but to a web page.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import BaseModel, Field, ValidationError
from transformers.utils import cached_file

from .errors import TiedMoeError
from .files import file_digest
from .hub import is_hub_id, public_name
from .manifest import MANIFEST, read_manifest, save_manifest, versions
from .version import __version__

CARD = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")
_FINGERPRINT = "headers_and_config_sha256"


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
        "softmoe": getattr(config, "softmoe", None),
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


def _fence(text: str) -> str:
    """Return a code fence that nothing in `text` closes."""
    return "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))

"""Where an output comes from: the identity that a killed run is continued by, its manifest and its model card."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from transformers_tiedmoe import manifest, model_card
from transformers_tiedmoe.audit.metrics import perplexity
from transformers_tiedmoe.hub import public_name

from .checkpoint.reader import Source

if TYPE_CHECKING:
    from .checkpoint.writer import Planned
    from .plan import Plan

COMMAND = "tiedmoe convert"


def identity(
    command: str, recipe: Mapping[str, Any], source: Source, operations: "Sequence[Planned]"
) -> dict[str, Any]:
    """Return what decides an output's bytes: a run continues the work of a killed one if all of it is the same."""
    digest = hashlib.sha256()
    for each in operations:
        digest.update(f"{each.target} {each.dtype} {each.shape} {each.file}\n".encode())
    folders = {"source": str(source.folder.resolve()) if source.commit is None else source.name}
    return {
        "recipe": {"command": command, **recipe, **folders, "output": None},
        "source": {"commit": source.commit, "headers_and_config": source.fingerprint(), **source.stamps()},
        "versions": manifest.versions(),
        "plan": {"tensors": digest.hexdigest()},
    }


def save_manifest(plan: "Plan", folder: Path, files: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Write the manifest of a converted checkpoint into `folder`, last.

    Args:
        plan: what was done.
        folder: of the checkpoint.
        files: by relative path `{"bytes": …, "xxh3_128": …}` of every file of the checkpoint, as `Work.files`.
        fields: what `card_facts` gave, and `verification`: what was found when the output was read again.
    """
    dropped = [{"tensor": name, "reason": reason} for name, reason in plan.dropped]
    digests = {name: found for name, found in files.items() if name != manifest.MANIFEST}
    manifest.save_manifest(folder, COMMAND, {**fields, "dropped": dropped}, digests)


def save_card(plan: "Plan", folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the model card of a converted checkpoint into `folder`; paths of this machine stay out of it.

    Args:
        plan: what was done.
        folder: of the checkpoint.
        facts: as `card_facts`.
    """
    licence = model_card.read_licence(str(plan.source.opened.folder))
    title = PurePath(plan.recipe.output).name
    model_card.save_card(folder, title, {"made_by": COMMAND, **facts}, plan.config, licence=licence)


def card_facts(plan: "Plan", measured: Mapping[str, Any] | None = None, text_digest: str = "") -> dict[str, Any]:
    """Return what card and manifest tell of a conversion: source, recipe, methods, sizes, what it cost.

    Args:
        plan: what was done.
        measured: what `measure` returned, None if nothing was measured.
        text_digest: of the calibration text's tokens.
    """
    source, recipe, summary = plan.source.opened, public_recipe(plan), plan.summary()
    conversion = model_card.Conversion(
        methods=[(method.name, method.summary) for method, _ in plan.recipe.steps],
        residual_rank=plan.recipe.residual_rank,
        is_lossless=plan.is_lossless,
        sizes=model_card.Sizes(**{name: summary[name] for name in model_card.Sizes.model_fields}),
        measured=_measured(recipe, measured, text_digest) if measured else None,
    )
    return {
        "recipe": recipe,
        "source": {
            "name": recipe["source"],
            "commit": source.commit,
            "headers_and_config_sha256": source.fingerprint(),
        },
        "conversion": conversion.model_dump(mode="json"),
    }


def public_recipe(plan: "Plan") -> dict[str, Any]:
    """Return the recipe as others can use it: names instead of this machine's paths."""
    source, recipe = plan.source.opened, plan.recipe.to_dict()
    return {
        **recipe,
        "calibration": recipe["calibration"] and public_name(recipe["calibration"]),
        "source": source.name if source.commit is not None else PurePath(source.name).name,
        "output": PurePath(plan.recipe.output).name,
        "revision": source.commit,
        "statistics": None,
        "push_to_hub": None,
    }


def _measured(recipe: Mapping[str, Any], measured: Mapping[str, Any], text_digest: str) -> model_card.Measured:
    """Return what the card shows of `measure`'s report: sums over layers and pools."""
    slots, experts = measured["dead_slots"].values(), measured["dead_experts"].values()
    return model_card.Measured(
        tokens=measured["tokens"],
        text=str(recipe["calibration"]),
        digest=text_digest,
        loss_before=measured["loss_before"],
        loss_after=measured["loss_after"],
        perplexity_before=perplexity(measured["loss_before"]),
        perplexity_after=perplexity(measured["loss_after"]),
        agreement=measured["routing_agreement"]["mean"],
        slots=sum(each["of"] for each in slots),
        dead_slots=sum(each["tied"] for each in slots),
        dead_before=sum(each["source"] for each in slots),
        experts=sum(each["of"] for each in experts),
        dead_experts=sum(each["dead"] for each in experts),
    )

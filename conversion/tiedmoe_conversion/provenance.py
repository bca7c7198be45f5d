"""Where an output comes from: the identity that a killed run is continued by, its manifest and its model card."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from transformers_tiedmoe import hub
from transformers_tiedmoe.audit.metrics import perplexity

from .checkpoint.reader import Source

if TYPE_CHECKING:
    from .checkpoint.writer import Planned
    from .plan import Plan


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
        "versions": hub.versions(),
        "plan": {"tensors": digest.hexdigest()},
    }


def save_manifest(plan: "Plan", folder: Path, files: Mapping[str, Any], verification: Mapping[str, Any]) -> None:
    """Write the manifest of a converted checkpoint into `folder`, last.

    Args:
        plan: what was done.
        folder: of the checkpoint.
        files: by relative path `{"bytes": …, "xxh3_128": …}` of every file of the checkpoint, as `Work.files`.
        verification: what was found when the output was read again.
    """
    source, recipe = plan.source.opened, public_recipe(plan)
    fields = {
        "recipe": recipe,
        "source": {
            "name": recipe["source"],
            "commit": source.commit,
            "headers_and_config_sha256": source.fingerprint(),
        },
        "dropped": [{"tensor": name, "reason": reason} for name, reason in plan.dropped],
        "verification": verification,
    }
    digests = {name: found for name, found in files.items() if name != hub.MANIFEST}
    hub.save_manifest(folder, "tiedmoe convert", fields, digests)


def save_card(plan: "Plan", folder: Path, measured: Mapping[str, Any] | None = None, text_digest: str = "") -> None:
    """Write the model card of a converted checkpoint into `folder`; paths of this machine stay out of it.

    Args:
        plan: what was done.
        folder: of the checkpoint.
        measured: what `measure` returned, None if nothing was measured.
        text_digest: of the calibration text's tokens.
    """
    source, recipe = plan.source.opened, public_recipe(plan)
    on_hub = source.commit is not None
    where = f"revision `{source.commit}`" if on_hub else "a local folder"
    hub.save_card(
        folder,
        {"name": recipe["source"], "on_hub": on_hub},
        hub.read_licence(str(source.folder)),
        title=recipe["output"],
        made_by=f"Made by `tiedmoe convert` from {where}, sha256 of its config and headers `{source.fingerprint()}`.",
        methods=[{"name": method.name, "summary": method.summary} for method, _ in plan.recipe.steps],
        residual_rank=plan.recipe.residual_rank,
        is_lossless=plan.is_lossless,
        measured=_measured(recipe, measured, text_digest) if measured else None,
        recipe=recipe,
        **_sizes(plan),
    )


def public_recipe(plan: "Plan") -> dict[str, Any]:
    """Return the recipe as others can use it: names instead of this machine's paths."""
    source, recipe = plan.source.opened, plan.recipe.to_dict()
    return {
        **recipe,
        "calibration": recipe["calibration"] and hub.public_name(recipe["calibration"]),
        "source": source.name if source.commit is not None else PurePath(source.name).name,
        "output": PurePath(plan.recipe.output).name,
        "revision": source.commit,
        "statistics": None,
        "push_to_hub": None,
    }


def _sizes(plan: "Plan") -> dict[str, Any]:
    names = (
        *("groups", "pool_num_experts", "parameters_before", "parameters_after"),
        *("expert_parameters_before", "expert_parameters_after", "bytes_before", "bytes_after"),
    )
    summary = plan.summary()
    return {name: summary[name] for name in names}


def _measured(recipe: Mapping[str, Any], measured: Mapping[str, Any], text_digest: str) -> dict[str, Any]:
    """Return what the card's template shows of `measure`'s report: sums over layers and pools."""
    slots, experts = measured["dead_slots"].values(), measured["dead_experts"].values()
    return {
        "tokens": measured["tokens"],
        "text": hub.plain(recipe["calibration"]),
        "digest": text_digest,
        "loss_before": measured["loss_before"],
        "loss_after": measured["loss_after"],
        "perplexity_before": perplexity(measured["loss_before"]),
        "perplexity_after": perplexity(measured["loss_after"]),
        "agreement": measured["routing_agreement"]["mean"],
        "slots": sum(each["of"] for each in slots),
        "dead_slots": sum(each["tied"] for each in slots),
        "dead_before": sum(each["source"] for each in slots),
        "experts": sum(each["of"] for each in experts),
        "dead_experts": sum(each["dead"] for each in experts),
    }

"""`tiedmoe card`: the model card of any saved model, with what an audit found of it.

The card itself is rendered by `model_card.render_card`, as of every checkpoint that we write. Here is what an audit
adds: its findings and figures to the text, its losses and tasks to the metadata, as the `model-index` of the Hub.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from pydantic import ValidationError

from .audit import findings
from .audit.schema import Audit, Domain, Interval, ModelAudit
from .errors import TiedMoeError
from .files import atomic_write_json, atomic_write_text, disk_errors_explained, expand, file_digest, misplaced
from .hub import is_hub_id, public_name
from .manifest import MANIFEST, read_manifest
from .model_card import CARD, plain, read_licence, render_card
from .training.pretrained import load_config

AUDIT = "audit.json"
FIGURES = "figures"
# By the end of the file's name: what to show of one model, then of all, with the text for who does not see it.
SHOWN = {
    "loads": "Heat map of experts by layer: how often each expert is chosen",
    "active": "Number of experts that a token uses, by layer",
    "pareto": "Quality of the audited models against their memory and compute",
    "memory": "Memory of the audited models, beside that of GPUs",
}


@dataclass(frozen=True)
class CardConfig:
    """The arguments of `write_card`."""

    model: str = field(metadata={"help": "Folder or hub id of any causal language model."})
    audit: str | None = field(
        default=None, metadata={"help": "Folder that `tiedmoe audit` wrote: its findings, figures and results."}
    )
    audited_as: str | None = field(
        default=None, metadata={"help": "The model's name in the audit, if it was called otherwise then."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder to write README.md and figures into, such as the model's own; else it is printed."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a README.md that we did not write."})


def write_card(config: CardConfig) -> dict[str, Any]:
    """Render the card of a model, and write it if there is a folder to write into.

    Returns:
        `card`, its text; `files`, what was written into the folder.

    Raises:
        OSError: no such model; a folder that cannot be written.
        TiedMoeError: no such audit, a model that it does not know, a README.md that somebody else wrote.
    """
    model = expand(config.model)
    if (why := misplaced(model)) is not None:
        raise TiedMoeError(why)
    manifest = read_manifest(model)
    audited, results, figures = None, [], {}
    if config.audit is not None:
        folder = Path(expand(config.audit))
        found = read_audit(folder)
        of_model = pick_model(found, config.audited_as or public_name(model))
        figures = figures_of(folder, found, of_model)
        audited, results = tell(found, of_model, figures), eval_results(found, of_model)
    title = public_name(model)
    card = render_card(title, manifest, load_config(model), read_licence(model), audited, results)
    if config.output is None:
        return {"card": card.content, "files": []}
    output = Path(expand(config.output))
    with disk_errors_explained(output, "nothing was written"):
        _refuse_to_replace(output, config.overwrite)
        return {"card": card.content, "files": _write(card, output, figures)}


def read_audit(folder: Path) -> Audit:
    """Read `audit.json`.

    Raises:
        TiedMoeError: there is none, or it is damaged or of another version.
    """
    path = folder / AUDIT
    if not path.is_file():
        raise TiedMoeError(f"there is no {path}; expected a folder that `tiedmoe audit ... --output` wrote")
    try:
        return Audit.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = sorted({".".join(map(str, each["loc"])) or "all of it" for each in error.errors()})
        raise TiedMoeError(
            f"{path} is no audit of this version, {len(wrong)} fields are wrong, first {wrong[0]}; audit the model "
            "again"
        ) from error


def pick_model(audit: Audit, name: str) -> ModelAudit:
    """Return the model of that name: as it was audited, or the last part of it."""
    for is_it in (lambda audited: audited == name, lambda audited: audited.rpartition("/")[2] == name):
        found = [each for each in audit.models if is_it(each.name)]
        if len(found) == 1:
            return found[0]
    raise TiedMoeError(
        f"the audit knows no model {name!r}, but {[each.name for each in audit.models]}; say which of these it is "
        "(audited_as), or audit it"
    )


def eval_results(audit: Audit, model: ModelAudit) -> list[EvalResult]:
    """Return the losses by domain and the tasks of a model, for the metadata's `model-index`."""
    quality = model.quality
    if quality is None:
        return []
    domains = {each.name: each for each in audit.domains}
    found = []
    for name, loss in quality.loss.items():
        domain = domains.get(name)
        dataset: dict[str, Any] = {
            "task_type": "text-generation",
            "dataset_name": _line(name),
            "dataset_type": _dataset(domain.data if domain else name),
            "dataset_args": {"num_tokens": domain.num_tokens, "block_size": domain.block_size} if domain else None,
        }
        for kind, metric, value in (
            ("loss", "Loss, nats per token", loss.value),
            ("perplexity", "Perplexity per token", quality.perplexity.get(name, math.nan)),
        ):
            if math.isfinite(value):
                found.append(EvalResult(metric_type=kind, metric_name=metric, metric_value=_digits(value), **dataset))
    for task in quality.tasks:
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_name=_line(task.name),
                dataset_type=_dataset(task.name),
                dataset_args={"num_few_shot": task.num_shots, "num_samples": task.num_samples},
                metric_type=_line(task.metric),
                metric_name=_line(task.metric),
                metric_value=_digits(task.value),
            )
        )
    return found


def tell(audit: Audit, model: ModelAudit, figures: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the card's template shows of an audit, every text that somebody chose as plain text."""
    quality, perplexities = model.quality, model.quality.perplexity if model.quality else {}
    texts = ", ".join(_text(each) for each in audit.domains) or "no text"
    return {
        "date": plain(audit.date[:10]),
        "texts": texts,
        "findings": [plain(each.text) for each in findings.of_model(model, audit.domains) if each.is_main],
        "columns": ["parameters", "read by a token", *(f"loss, {plain(name)}" for name in perplexities)],
        "rows": [_row(each, list(perplexities), each is model) for each in audit.models],
        "tasks": [
            [plain(task.name), plain(task.metric), f"{task.value:.4f}", _number(task.standard_error, "{:.4f}"),
             _number(task.num_shots, "{}"), f"{task.num_samples:,}"]
            for task in (quality.tasks if quality else ())
        ],
        "figures": [{"path": name, "alternative": _alternative(name)} for name in figures],
        "notes": [plain(note) for note in model.notes],
    }  # fmt: skip


def figures_of(folder: Path, audit: Audit, model: ModelAudit) -> dict[str, Path]:
    """Find the audit's figures of a model, and of all: by the name that the card gives them."""
    number = audit.models.index(model) + 1
    found = {}
    for kind in SHOWN:
        for name in (f"{number}-{kind}.png", f"{kind}.png"):
            if (path := folder / FIGURES / name).is_file():
                found[f"{FIGURES}/{kind}.png"] = path
    return found


def _row(model: ModelAudit, domains: Sequence[str], is_this: bool) -> list[str]:
    total = model.memory.parameters.get("total") if model.memory else None
    losses = model.quality.loss if model.quality else {}
    name = f"**{plain(model.name)}**" if is_this else plain(model.name)
    return [name, *(_number(each, "{:,}") for each in ((total.unique, total.active) if total else (None, None))),
            *(_interval(losses.get(domain)) for domain in domains)]  # fmt: skip


def _interval(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{found.value:.4f}" + (f" ({found.low:.4f} to {found.high:.4f})" if found.low is not None else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _text(domain: Domain) -> str:
    return f"{plain(domain.name)} ({plain(domain.data)}, {domain.num_tokens:,} tokens)"


def _alternative(name: str) -> str:
    return SHOWN[Path(name).stem]


def _line(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def _dataset(data: str) -> str:
    """Return a dataset's id; of another name what the Hub takes for one: letters, digits, `-`, `_` and `.`."""
    name = data.partition(":")[0]
    return name if is_hub_id(name) else re.sub(r"[^A-Za-z0-9_.-]+", "-", data).strip("-.") or "text"


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _refuse_to_replace(output: Path, overwrite: bool) -> None:
    """Raise unless the folder's card is the one that was written with its manifest, or there is none."""
    written = read_manifest(str(output)).get("files", {}).get(CARD) if output.is_dir() else None
    if (output / CARD).exists() and not overwrite and file_digest(output / CARD) != written:
        raise TiedMoeError(
            f"{output / CARD} is not as we wrote it; give another folder, or ask to replace it (overwrite)"
        )


def _write(card: ModelCard, output: Path, figures: Mapping[str, Path]) -> list[str]:
    """Write card and figures, and their hashes into the folder's manifest if it has one."""
    output.mkdir(parents=True, exist_ok=True)
    for name, path in figures.items():
        (output / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, output / name)
    atomic_write_text(output / CARD, card.content)
    written = [CARD, *figures]
    if (output / MANIFEST).is_file():
        manifest = read_manifest(str(output))
        digests = {name: file_digest(output / name) for name in written}
        manifest["files"] = dict(sorted({**manifest.get("files", {}), **digests}.items()))
        atomic_write_json(output / MANIFEST, manifest)
    return written

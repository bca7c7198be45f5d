"""An audit for people: one page of HTML, the same as Markdown, its figures as files, a summary for the terminal.

The HTML is one file that asks for nothing: no network, no script, no web font. Names and texts that others chose are
escaped by Jinja2; figures are in it as SVG, drawn for a page and for a phone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ..files import atomic_write_text
from ..model_card import plain
from . import drawing, findings, overview, plots, tables, units
from .findings import Finding
from .schema import Audit, ModelAudit
from .tables import Table

EVIDENCE = {
    "active": "Active experts",
    "memory": "Memory",
    "stability": "Routing stability",
    "strategy": "Layer strategy",
    "quality": "Quality and speed",
}
TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "active": tables.active,
    "memory": tables.memory,
    "stability": tables.stability,
    "strategy": tables.strategy,
    "quality": tables.quality,
}
FIGURES = {  # of one model, by evidence
    "active": ("active",),
    "memory": (),
    "stability": ("loads", "flow"),
    "strategy": ("strategy", "similarity"),
    "quality": (),
}


COLUMNS = 4  # models that stand beside each other, on a phone too


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    anchor: str
    level: int
    paragraphs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    listings: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A figure as it stands in the page: its file's name, its text, and its SVG for a page and for a phone."""

    name: str
    alternative: str
    wide: Markup
    narrow: Markup


def write(audit: Audit, folder: str | Path) -> None:
    """Write `report.html`, `report.md` and `figures/NAME.svg` and `.png` into `folder`, which is made if need be.

    Raises:
        ImportError: without matplotlib.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    shown = page(audit, _figures(audit, folder / "figures"))
    for name, escapes in (("report.html", True), ("report.md", False)):
        environment = Environment(
            loader=PackageLoader("transformers_tiedmoe.audit"), autoescape=escapes, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        environment.filters |= {"plain": plain, "together": _together}
        atomic_write_text(folder / name, environment.get_template(f"{name}.j2").render(audit=audit, **shown))


def page(audit: Audit, figures: dict[str, Figure]) -> dict[str, Any]:
    """Return all that the templates show of an audit: texts, tables, figures."""
    glance = overview.glance(audit)
    return {
        "title": _title(audit),
        "glance": glance.transposed() if len(glance.rows) <= COLUMNS else glance,
        "groups": _groups(audit),
        "figures": figures,
        "sections": _sections(audit, figures),
    }


def _together(text: str) -> str:
    """Return text whose figures stay on the line of their units."""
    return re.sub(r"(?<=\d) (?=%|[KMGT]iB|nats|[mbt]r?illion|experts)", "\u00a0", text)


def terminal(audit: Audit) -> list[RenderableType]:
    """Return what a terminal shows: the models at a glance, then what was found, the most important first."""
    glance = overview.glance(audit)
    shown: list[RenderableType] = [Text(glance.caption, style="italic"), _rich(glance)]
    for heading, _, sentences in _groups(audit):
        lines = Text(heading, style="bold")
        for each in sentences:
            lines.append(f"\n  • {each.text}", style="not bold")
        shown.append(lines)
    for model in audit.models:
        if model.notes:
            lines = Text(f"Notes on {units.short(model.name, 48)}", style="bold")
            for note in model.notes:
                lines.append(f"\n  • {units.one_line(note)}", style="not bold")
            shown.append(lines)
    return shown


def _rich(table: Table) -> RichTable:
    """Return a table for the terminal, a column a model; as `Text`, since a name may hold rich's markup."""
    shown = RichTable(box=box.SIMPLE_HEAD)
    shown.add_column(Text(table.columns[0]), overflow="fold")
    for row in table.rows:
        shown.add_column(Text(row[0]), justify="right", overflow="fold")
    for i, column in enumerate(table.columns[1:], start=1):
        shown.add_row(Text(column), *(Text(row[i]) for row in table.rows))
    return shown


def _title(audit: Audit) -> str:
    names = [units.short(model.name, 48) for model in audit.models]
    return f"Audit of {units.join(names)}" if names else "Audit of no model"


def _groups(audit: Audit) -> list[tuple[str, str, list[Finding]]]:
    """Return the sentences that the page begins with: heading, anchor of its section, findings."""
    groups = [("The models compared", "comparison", findings.of_comparison(audit))]
    for i, model in enumerate(audit.models, start=1):
        main = [each for each in findings.of_model(model, audit.domains) if each.is_main]
        groups.append((units.short(model.name, 48), f"model-{i}", main))
    return [group for group in groups if group[2]]


def _figures(audit: Audit, folder: Path) -> dict[str, Figure]:
    """Draw all figures, and write the wide ones as files."""
    wide, narrow = plots.figures(audit), plots.figures(audit, is_narrow=True)
    found = {}
    with drawing.styled():
        for name, figure in wide.items():
            texts = {"wide": drawing.svg_text(figure), "narrow": drawing.svg_text(narrow[name])}
            drawing.save_png(figure, folder / f"{name}.png")
            atomic_write_text(folder / f"{name}.svg", texts["wide"])
            alternative = figure.get_label()
            inline = {kind: Markup(drawing.inline_svg(text, alternative, name, kind)) for kind, text in texts.items()}
            found[name] = Figure(name, alternative, **inline)
    return found


def _sections(audit: Audit, figures: dict[str, Figure]) -> list[Section]:
    found: list[Section] = []
    is_alone = len(audit.models) == 1
    for i, model in enumerate(audit.models, start=1):
        found += _model_sections(audit, model, i, figures, is_alone)
    if not is_alone and audit.models:
        found.insert(
            0,
            Section(
                "The models compared",
                "comparison",
                2,
                [each.text for each in findings.of_comparison(audit)]
                or ["There is too little in common to compare: see the notes on each model."],
                figures=[name for name in ("pareto", "memory", "training") if name in figures],
                tables=[overview.pareto(audit)] if audit.pareto else [],
            ),
        )
    when = f"On {audit.date[:10]}, by tiedmoe's audit, version {audit.version} of its schema."
    found.append(
        Section(
            "How this was measured",
            "conditions",
            2,
            [f"{when} audit.json, beside this file, holds every figure."],
            tables=[table for table in (overview.texts(audit), overview.conditions(audit)) if table.rows],
            listings=[("The command", audit.command)],
        )
    )
    return found


def _model_sections(
    audit: Audit, model: ModelAudit, number: int, figures: dict[str, Figure], is_alone: bool
) -> list[Section]:
    """Return a model's section, and those of its five kinds of evidence."""
    anchor = f"model-{number}"
    routing = "soft routing" if model.routing == "softmoe" else "top-k routing"
    kinds = overview.kinds(model) or "no layers"
    lead = units.one_line(f"{model.architecture}, family {model.family}: {kinds}; {model.tying}; {routing}.")
    layers = [overview.layers(model)] if model.layers else []
    found = [Section(units.short(model.name, 80), anchor, 2, [lead], model.notes, tables=layers)]
    sentences = findings.of_model(model, audit.domains)
    for evidence, heading in EVIDENCE.items():
        section: Any = getattr(model, evidence)
        title, place = f"{heading}", f"{anchor}-{evidence}"
        if section is None:
            why = "the notes above say why" if model.notes else "the audit was not asked for it"
            found.append(Section(title, place, 3, [f"Not measured: {why}."]))
            continue
        names = [f"{number}-{name}" for name in FIGURES[evidence]]
        if evidence == "memory" and is_alone:
            names += ["memory", "training"]
        found.append(
            Section(
                title,
                place,
                3,
                [each.text for each in sentences if each.evidence == evidence],
                figures=[name for name in names if name in figures],
                tables=TABLES[evidence](section)
                + ([overview.pareto(audit)] if evidence == "quality" and is_alone and audit.pareto else []),
                listings=_recipes(model) if evidence == "strategy" else [],
            )
        )
    return found


def _recipes(model: ModelAudit) -> list[tuple[str, str]]:
    plans = model.strategy.plans if model.strategy else []
    return [
        (f"Recipe that keeps {units.percent(plan.expert_share)} of the experts' bytes, for tiedmoe convert --recipe",
         yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True, width=100).rstrip())
        for plan in plans
    ]  # fmt: skip

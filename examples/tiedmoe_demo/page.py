"""The demo's figures as one table for the terminal and as a page of Markdown."""

from rich import box
from rich.filesize import decimal
from rich.table import Table

MODELS = {
    "source": "as trained",
    "tied": "converted, not trained since",
    "healed": "the tied model, trained on",
    "control": "the source, trained on as long",
}
PICTURE = "audit/figures/3-loads.png"  # the healed model is the third that is audited
COLUMNS = ("parameters", "in experts", "weights on disk", "memory to train", "held-out perplexity")


def comparison_table(report: dict) -> Table:
    """Render the rich table of source, tied, healed and control out of what `run_demo` returns."""
    table = Table("", *COLUMNS, box=box.SIMPLE_HEAD, caption=_caption(report))
    for column in table.columns[1:]:
        column.justify = "right"
    for name in MODELS:
        table.add_row(f"[bold]{name}[/]", *_cells(report, name))
    return table


def markdown(report: dict) -> str:
    """Render the page `report.md`: the table, what was done, what each model writes."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| **{name}**, {meaning} | {' | '.join(_cells(report, name))} |" for name, meaning in MODELS.items()]
    return "\n".join(
        [
            "# Expert tying on a small model",
            "",
            *lines,
            "",
            _caption(report),
            "",
            *_what_was_done(report),
            "",
            "![perplexity against size, and where the healed model's tokens go](report.png)",
            "",
            "The audit of source, tied and healed, [as a page](audit/report.html) or [as text](audit/report.md), says "
            "where compute, memory and quality go. How often each expert of the healed model is chosen:",
            "",
            f"![each expert's share of the choices, by layer]({PICTURE})",
            "",
            "## What they write",
            "",
            f"One sample each, same seed, after “{report['settings']['prompt']}”:",
            "",
            *(f"- **{name}**: {' '.join(report[name]['text'].split())}" for name in ("source", "tied", "healed")),
            "",
        ]
    )


def _cells(report: dict, name: str) -> list[str]:
    figures, source = report[name], report["source"]
    cells = []
    for key, show in (
        ("parameters", "{:,}".format),
        ("expert_parameters", "{:,}".format),
        ("checkpoint_bytes", decimal),
        ("peak_training_memory_bytes", decimal),
    ):
        share = "" if figures[key] == source[key] else f" ({figures[key] / source[key]:.0%})"
        cells.append(show(figures[key]) + share)
    return [*cells, f"{figures['perplexity']:.2f}"]


def _caption(report: dict) -> str:
    """Say what tying saved and what it cost, in one sentence."""
    source, tied, healed, control = (report[name] for name in MODELS)
    saved = 1 - healed["parameters"] / source["parameters"]
    return (
        f"{saved:.0%} of the parameters saved. Perplexity {source['perplexity']:.2f} -> {tied['perplexity']:.2f} tied "
        f"-> {healed['perplexity']:.2f} healed; the source with the same extra steps: {control['perplexity']:.2f}."
    )


def _what_was_done(report: dict) -> list[str]:
    settings, conversion, training = report["settings"], report["conversion"], report["training"]
    source = training["source"]
    origin = (
        f"Source: {settings['source']}."
        if source is None
        else f"Source: OLMoE format, {settings['num_hidden_layers']} layers, {settings['num_experts']} experts with "
        f"{settings['num_experts_per_tok']} active, trained for {source['steps']} steps ({source['tokens']:,} tokens)."
    )
    groups = ", ".join(f"{group[0]}-{group[-1]}" for group in conversion["groups"])
    teacher = ", with the source as teacher" if settings["distill"] else ""
    return [
        f"- {origin}",
        f"- Tied by `{conversion['method']}`: the layers {groups} read one pool each.",
        f"- Healed for {training['healed']['steps']} steps ({training['healed']['tokens']:,} tokens){teacher}; the "
        f"control is the source trained for the same steps on the same text with the same schedule.",
        "- Perplexity per token of the tokenizer, on the last 5 % of the text. Memory to train: the most that tensors "
        f"take at a time in an AdamW step of {settings['batch_size']} sequences of {settings['block_size']} tokens.",
        f"- {report['seconds']['total']:.0f} s in all on {report['machine']['cores']} cores.",
    ]

"""How the benchmarks write what they found: JSON with one row a line, Markdown tables, means with their deviation."""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser_of(docstring: str) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a script's docstring, as it stands there."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def numbers(text: str) -> list[int]:
    """Return the numbers that "0-2,5" names: a type of argparse."""
    ends = [(part.split("-") * 2)[:2] for part in text.split(",")]
    return [number for first, last in ends for number in range(int(first), int(last) + 1)]


def show(done: int, total: int, what: str) -> None:
    """Print how far a training is, five times in all."""
    if done == total or done % max(1, total // 5) == 0:
        print(f"{what} ({done}/{total})", file=sys.stderr, flush=True)


def write_results(prefix: Path, result: dict, text: str, figure: Any = None, quiet: bool = False) -> None:
    """Write PREFIX.json, PREFIX.md and, of a matplotlib `figure`, PREFIX.png; print the text unless `quiet`."""
    write_json(prefix.with_suffix(".json"), result)
    prefix.with_suffix(".md").write_text(text)
    if figure is not None:
        figure.savefig(prefix.with_suffix(".png"))
    if not quiet:
        print(text)


def write_json(path: Path, result: dict | list) -> None:
    """Write JSON with each entry of `result`, and each row of an entry that is a list of rows, on its own line."""
    text = _rows(result)
    if isinstance(result, dict):
        text = "{\n" + ",\n".join(f"{json.dumps(name)}: {_rows(value)}" for name, value in result.items()) + "\n}"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text + "\n")
    draft.replace(path)  # whole, or as it was


def _rows(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def table(columns: Sequence[str], rows: Iterable[Sequence], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table, numbers to the right but for the first `left` columns."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def mean_of(values: list[float]) -> dict[str, Any] | None:
    """Return mean, sample standard deviation (None of one) and the values; None of none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "values": values}


def above_of(runs: list[dict], base: list[dict]) -> dict[str, Any] | None:
    """Return how far the runs' losses are above those of `base`, by seed."""
    losses = {run["seed"]: run["loss"] for run in base}
    return mean_of([run["loss"] - losses[run["seed"]] for run in runs if run["seed"] in losses])


def plus_minus(found: dict[str, Any] | None, digits: int, unit: str = "", sign: str = "") -> str:
    """Return what `mean_of` found as text; nothing for None."""
    if found is None:
        return ""
    deviation = found["standard_deviation"]
    return f"{found['mean']:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}") + unit

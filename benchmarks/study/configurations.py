"""What the study compares: one line a row. Sizes are those of its source, 12 layers of 16 experts.

`g=4` ties layers 2-5 and 6-9, `g=2` four pairs of them, `pairs` three pairs: 50 %, 67 % and 75 % of the expert bytes with
pools of E experts. Wider pools are named by their multiple of E.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        series: what it is called in table and plot; rows of one series differ in size only.
        size: how its bytes come about, such as "g=4, 2.5E"; unique within a series.
        recipe: fields of `ConversionRecipe`.
        num_seeds: how many seeds it is run with, at most the study's.
        kind: "convert"; or a control: "source" as it is, "scratch" (tied, trained from random weights), "prune" (fewer
            experts in every layer, chosen by `recipe["keep"]`).
    """

    series: str
    size: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    num_seeds: int = 3
    kind: str = "convert"

    @property
    def name(self) -> str:
        """What its files are called."""
        words = f"{self.series} {self.size}".replace("+", " then ").replace(".", "_")
        return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in words).split())


SOURCE = Row("source", "untied", kind="source")
PAIRS = {"groups": [[3, 4], [5, 6], [7, 8]]}
EVERY_LAYER = {"groups": [[layer] for layer in range(12)]}
G4, G2, THREE_PAIRS = ("g=4", {}), ("g=2", {"group_size": 2}), ("three pairs", PAIRS)


def rows(series: str, *sizes: tuple[str, dict], num_seeds: int = 3, **fields: Any) -> list[Row]:
    """The rows of one series, one a size, with g=4 unless the size says otherwise."""
    return [Row(series, size, {"group_size": 4, **fields, **extra}, num_seeds) for size, extra in sizes]


ROWS = [
    SOURCE,
    *rows("union", G4, method="union", num_seeds=1),
    *rows("average", G4, G2, THREE_PAIRS, method="average"),
    *rows("select first", G4, method="select", method_options={"layer": "first"}),
    *rows("select last", G4, method="select", method_options={"layer": "last"}),
    Row("tied from scratch", "g=4", num_seeds=1, kind="scratch"),
    *[
        Row(f"pruned, {keep}", f"{share:.0%} of every layer", {"keep": keep, "share": share}, kind="prune")
        for keep in ("random", "magnitude")
        for share in (0.5, 0.75)
    ],
]
QUICK = [row for row in ROWS if row.size in ("untied", "g=4", "50% of every layer")]
QUICK = [row for row in QUICK if row.series in ("source", "union", "average", "tied from scratch", "pruned, random")]

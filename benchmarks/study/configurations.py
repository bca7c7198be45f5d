"""What the study compares: one line a row. Sizes are those of its source, 12 layers of 16 experts.

Every row is healed with the source as teacher at half the loss, those called "teacher alone" and all of HEALING_ROWS
with nothing but it.
`g=4` ties layers 2-5 and 6-9, `g=2` four pairs of them, `three pairs` three of their pairs: 50 %, 67 % and 75 % of the
expert bytes with pools of E experts. Wider pools are named by their multiple of E. Rank 18 of a residual is 25 % of
the expert bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One configuration.

    `kind` is "convert", or a control: "source" as it is, "scratch" (tied, trained from random weights), "prune" (fewer
    experts in every layer, chosen by `recipe["keep"]`).
    """

    series: str  # what it is called in table and plot; rows of one series differ in size only
    size: str  # how its bytes come about, such as "g=4, 2.5E"; unique within a series
    recipe: Mapping[str, Any] = field(default_factory=dict)  # fields of `ConversionRecipe`
    num_seeds: int = 3  # at most the study's
    heal: Mapping[str, Any] = field(default_factory=dict)  # of `TiedMoeTrainingArguments`, where it differs
    kind: str = "convert"

    @property
    def name(self) -> str:
        """What its files are called."""
        words = f"{self.series} {self.size}".replace("+", " then ").replace(".", "_")
        return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in words).split())


SOURCE = Row("source", "untied", kind="source")
PAIRS = {"groups": [[3, 4], [5, 6], [7, 8]]}
G4, G2, THREE_PAIRS = ("g=4", {}), ("g=2", {"group_size": 2}), ("three pairs", PAIRS)
# Of methods that make pools of any width: 50 %, 75 % and once more 75 % of the expert bytes.
WIDE, WIDE_PAIRS = ("g=4, 2.5E", {"pool_experts": "2.5x"}), ("g=2, 1.25E", {"group_size": 2, "pool_experts": "1.25x"})


def rows(series: str, *sizes: tuple[str, dict], num_seeds: int = 3, heal: Mapping = {}, **fields) -> list[Row]:
    """Return the rows of one series, one a size, with g=4 unless the size says otherwise."""
    return [Row(series, size, {"group_size": 4, **fields, **extra}, num_seeds, heal) for size, extra in sizes]


TEACHER_ALONE = {"teacher_weight": 1.0}
KEPT = HALF, _ = (0.5, "50% of every layer"), (0.75, "75% of every layer")
PROTOTYPES = [(size, {"pool_experts": f"{share}x"}) for share, size in KEPT]
# What says most comes first: a study that is stopped lacks the end.
ROWS = [
    SOURCE,
    *rows("average", G4, THREE_PAIRS, method="average"),
    *rows("prototype", G4, WIDE, WIDE_PAIRS, G2, method="prototype"),
    *rows("least_squares", G4, THREE_PAIRS, method="least_squares"),
    *rows("prototype, least_squares", G4, WIDE, method="prototype", then=["least_squares"]),
    *rows("prefit", G4, THREE_PAIRS, method="prefit"),
    *rows("prototype, prefit", G4, WIDE, WIDE_PAIRS, method="prototype", then=["prefit"]),
    *rows("union; teacher alone", G4, method="union", heal=TEACHER_ALONE),
    *rows("prefit; teacher alone", G4, method="prefit", heal=TEACHER_ALONE),
    *rows("least_squares; teacher alone", G4, method="least_squares", heal=TEACHER_ALONE),
    *rows("prototype, prefit; teacher alone", WIDE, method="prototype", then=["prefit"], heal=TEACHER_ALONE),
    *(Row("within layers, random", size, {"keep": "random", "share": s}, kind="prune") for s, size in KEPT),
    *(Row("within layers, magnitude", size, {"keep": "magnitude", "share": s}, kind="prune") for s, size in KEPT),
    *rows("within layers, prototype", *PROTOTYPES, method="prototype", groups=[[layer] for layer in range(12)]),
    *rows("align", G4, THREE_PAIRS, method="align"),
    *rows("align, experts by number", G4, method="align", method_options={"experts": "identity"}),
    *rows("align, experts at random", G4, method="align", method_options={"experts": "random"}),
    *rows("align, neurons by number", G4, method="align", method_options={"neurons": "identity"}),
    *rows("average, residual", ("g=4, rank 18", {"residual_rank": 18}), method="average"),
    *rows("prefit, residual", ("g=4, rank 18", {"residual_rank": 18}), method="prefit", num_seeds=1),
    *rows("select first", G4, method="select", method_options={"layer": "first"}),
    *rows("select last", G4, method="select", method_options={"layer": "last"}),
    *rows("select best", G4, method="select", method_options={"layer": "best"}),
    *rows("average by frequency", G4, method="average", method_options={"weights": "frequency"}),
    *rows("union", G4, method="union"),
    Row("tied from scratch", "g=4", num_seeds=1, kind="scratch"),
]
# `make study-healing`: what came closest to the untouched source, and the pairs that were best before it;
# docs/log.md tells what else was tried.
SIX_PAIRS = {"groups": [[layer, layer + 1] for layer in range(0, 12, 2)]}
HALF_PAIRS, MORE_PAIRS = ("six pairs", SIX_PAIRS), ("six pairs, 1.5E", {**SIX_PAIRS, "pool_experts": "1.5x"})
ONE_POOL = ("one pool of 9E", {"groups": [list(range(12))], "pool_experts": "9x"})  # of all layers
LONG = {"calibration_tokens": 215040}  # as many as the healing has
TWO = {**TEACHER_ALONE, "per_device_train_batch_size": 2}
LONG_PREFIT = [{"prefit": {"steps": 1600}}]
HEALING_ROWS = [
    SOURCE,
    *rows("long prefit; batches of 2", HALF_PAIRS, method="prefit", method_options={"steps": 1600}, heal=TWO, **LONG),
    *rows(
        "prototype, long prefit",
        MORE_PAIRS,
        ONE_POOL,
        method="prototype",
        then=LONG_PREFIT,
        heal=TEACHER_ALONE,
        **LONG,
    ),
]
QUICK_SERIES = ("source", "union", "average", "tied from scratch", "within layers, random")
QUICK = [row for row in ROWS if row.size in ("untied", "g=4", HALF[1]) and row.series in QUICK_SERIES]

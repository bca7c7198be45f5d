"""What the audit's figures share: colours, type, titles, and how a figure becomes a file or a part of a page.

Colours are near Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart by people who are colour-blind as well,
and dark enough for text on white; shades are one colour at different opacity, so that a figure stands on light and on
dark alike.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from . import units
from .schema import ModelAudit

INK, MUTED, LINE, PAPER = "#1b1f24", "#57606a", "#d0d7de", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#b84e00", "#00805e", "#a8507f"
SERIES = (BLUE, ORANGE, GREEN, PURPLE)
SHADES = {"blue": (0x2F, 0x8B, 0xD0), "orange": (0xE0, 0x6A, 0x0C)}  # of images, whose colours follow no scheme
TITLE_PAD = 9.0  # points
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollars
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": TITLE_PAD,
    "axes.labelsize": 9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "tiedmoe audit",  # the same figures give the same files
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}
WIDTHS = {False: 8.6, True: 4.3}  # inches, of a page and of a phone
SCHEME = {  # CSS variables of templates/report.html.j2, which give the colour of the page's scheme
    INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", PURPLE: "--purple",
}  # fmt: skip
PNG_DPI = 150


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw and save within this: the style of every figure.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the audit's figures are drawn by matplotlib, which is not installed; pip install "
            "'transformers-tiedmoe[audit]'"
        ) from error
    with warnings.catch_warnings(), matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        # A name may hold what the type has no glyph for; the SVG names it all the same.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def new_figure(is_narrow: bool, height: float, label: str) -> Any:
    """Return an empty figure, `height` in inches, whose label is its alternative text."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(WIDTHS[is_narrow], height), layout="constrained")
    figure.set_label(label)
    return figure


def label(axes: Any, text: str, at: Any, shift: tuple[float, float] = (0, 0), place: Any = "data", **style) -> None:
    """Write text at a point of the coordinates `place`, `shift` points from it; it may stand outside the axes."""
    axes.annotate(text, at, shift, xycoords=place, textcoords="offset points", annotation_clip=False, **style)


def title(axes: Any, model: ModelAudit, text: str, is_narrow: bool, above: float = 0, second: str = "") -> None:
    """Say what is drawn, and under it of which model, and `second`; `above` leaves points for what stands between."""
    subtitle(axes, text, units.short(model.name, (40 if is_narrow else 70) - len(second)) + second, above)


def subtitle(axes: Any, text: str, second: str, above: float = 0) -> None:
    """Write a title of two lines, the second one muted."""
    axes.set_title(f"{text}\n", loc="left", pad=TITLE_PAD + above)
    label(axes, second, (0, 1), (0, 5 + above), "axes fraction", color=MUTED, fontsize=8.5, va="bottom")


def end_labels(axes: Any, x: float, labels: list[tuple[str, float, str]]) -> None:
    """Write each line's name at its right end, moved apart where two would touch."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    at = None
    for name, value, colour in sorted(labels, key=lambda each: each[1]):
        at = value if at is None else max(value, at + gap)
        label(axes, name, (x, at), (5, 0), color=colour, fontsize=8.5, va="center")


def swatches(axes: Any, names: list[str], colours: Sequence[str], above: float, is_narrow: bool) -> None:
    """Name the bars' colours in one line under the title, `above` points over the axes, each in its own colour."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    type_size = 7.5 if is_narrow else 8.5
    texts: list[Any] = [
        TextArea(f"■ {name}", textprops={"color": colour, "fontsize": type_size})
        for name, colour in zip(names, colours)
    ]
    line = HPacker(children=texts, pad=0, sep=6 if is_narrow else 10)
    axes.add_artist(
        AnnotationBbox(
            line,
            (0, 1),
            (0, above),
            "axes fraction",
            boxcoords="offset points",
            box_alignment=(0, 0),
            frameon=False,
            pad=0,
            annotation_clip=False,
        )
    )


def save_png(figure: Any, path: Path) -> None:
    """Write the figure on a white page."""
    figure.savefig(path, facecolor=PAPER, dpi=PNG_DPI)


def svg_text(figure: Any) -> str:
    """Return the figure as an SVG file on a white page; the same figure gives the same text."""
    written = io.StringIO()
    figure.savefig(written, format="svg", facecolor=PAPER, metadata={"Date": None})
    figure.set_layout_engine("none")  # it stands: what is saved next need not find it again
    return written.getvalue()


def inline_svg(svg: str, alternative: str, name: str, kind: str) -> str:
    """Return a figure as an `<svg>` element of a page, in the colours and the type of the page.

    Args:
        svg: by `svg_text`.
        alternative: text for who does not see it.
        name: of the figure.
        kind: "wide" or "narrow": the element's class, and before its ids, which are unique on a page.
    """
    prefix = f"{kind}-{name}"
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'url\(#([^)]*)\)|href="#([^"]*)"', lambda found: _renamed(found, prefix), svg)
    for colour, variable in SCHEME.items():
        svg = re.sub(rf"(?<=: ){colour}\b", f"var({variable})", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--type)")
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size[0] if size else ""} class="{kind}" role="img" aria-label="{escape(alternative, _QUOTE)}" '
    opening += 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)).strip()


_QUOTE = {'"': "&quot;"}


def _renamed(found: re.Match, prefix: str) -> str:
    return f"url(#{prefix}-{found[1]})" if found[1] else f'href="#{prefix}-{found[2]}"'

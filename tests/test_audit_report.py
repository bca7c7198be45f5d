"""The audit's report: sentences against figures worked out by hand, the files, and a real browser that opens them."""

import itertools
import re
import resource
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, get_args, get_origin

import audits
import numpy as np
import pytest
from rich.console import Console

from transformers_tiedmoe.audit import drawing, findings, plots, report, ribbons, schema, units

pytestmark = pytest.mark.xdist_group("audit_report")  # one worker makes the fixture once

DOMAINS = [
    schema.Domain(name="a", data="a.txt", num_tokens=300, num_blocks=3, block_size=100),
    schema.Domain(name="b", data="b.txt", num_tokens=100, num_blocks=1, block_size=100),
]
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "use", "image"}


class Page(HTMLParser):
    """The elements of a page, in order: name, attributes, text directly in it."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.stack = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.stack:
            self.stack[-1][2] += data

    def all(self, *tags):
        return [each for each in self.elements if each[0] in tags]


def small(name, **changes):
    settings = {"num_layers": 5, "num_experts": 8, "top_k": 2, "group_size": 1}
    return audits.model(name, **(settings | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report on two models of hostile names, one of them tied and softly routed, and on one without experts."""
    pytest.importorskip("matplotlib")
    first, second, third = audits.HOSTILE
    tied = small(second, num_layers=6, group_size=2, is_soft=True, seed=1)
    dense = small(third, is_dense=True, seed=2)
    audit = audits.audit([small(first), tied, dense])
    folder = tmp_path_factory.mktemp("report")
    report.write(audit, folder)
    return audit, folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written[1] / "report.html").read_text(encoding="utf-8"))


# --- sentences -------------------------------------------------------------------------------------------------------


def stable(loads, **changes):
    """A layer's stability with these loads by domain; the other figures are of no interest."""
    some = schema.Interval(value=1.0)
    fields = {
        "layer": 0, "num_experts": len(next(iter(loads.values()))), "load_cv": some, "load_max_over_mean": some,
        "choice_entropy": some, "token_entropy": None, "num_dead": 0, "is_collapsed": False, "specialisation": None,
        "drift": {}, "loads": loads,
    }  # fmt: skip
    return schema.LayerStability(**(fields | changes))


def test_loads_of_all_domains_are_weighted_by_their_tokens():
    layer = stable({"a": [1.0, 0.0], "b": [0.0, 1.0]})
    assert findings.total_loads(layer, DOMAINS).tolist() == [0.75, 0.25]


def test_a_domain_without_choices_counts_for_nothing():
    layer = stable({"a": [0.25, 0.75], "b": [float("nan"), float("nan")]})
    assert findings.total_loads(layer, DOMAINS).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("shares", "number"),
    [([1.0], 1), ([0.5, 0.5], 1), ([0.25] * 4, 2), ([0.1, 0.6, 0.3], 1), ([0.3, 0.4, 0.3], 2), ([0.1] * 10, 5)],
)
def test_number_of_experts_with_half_of_the_choices(shares, number):
    assert findings.num_for_half(np.array(shares)) == number


def sentences(model, domains=DOMAINS, evidence="stability"):
    return [each.text for each in findings.of_model(model, domains) if each.evidence == evidence]


def with_stability(*layers):
    model = small("m", domains=("prose",))
    return model.model_copy(update={"stability": schema.Stability(layers=list(layers), agreement=[], flows=[])})


def test_the_narrowest_layer_is_named_with_its_experts():
    narrow = stable({"a": [0.3, 0.3, *[0.05] * 8]}, layer=7, num_dead=3)
    texts = sentences(with_stability(stable({"a": [0.1] * 10}), narrow))
    assert texts[0] == "Layer 7 sends half of its choices to 2 of 10 experts; an even router would use 5."
    assert "No token chose 3 of 20 experts, all of them in layer 7." in texts


def test_an_even_load_is_called_even():
    busiest = schema.Interval(value=1.23)
    texts = sentences(with_stability(stable({"a": [0.1] * 10}, load_max_over_mean=busiest, layer=4)))
    assert texts[0] == "The experts' load is even: the busiest, in layer 4, takes 1.2 times its share."
    assert texts[1] == "Every one of the 10 experts was chosen by some token."


def test_collapsed_layers_are_named():
    loads = {"a": [0.9, 0.1]}
    texts = sentences(with_stability(*(stable(loads, layer=layer, is_collapsed=layer > 3) for layer in range(6))))
    assert any(text.startswith("The routers of layers 4–5 have collapsed") for text in texts)


def test_what_fits_is_the_smallest_gpu():
    sizes = {"large": 80, "small": 24, "tiny": 8}
    assert findings.smallest_gpu({"large": True, "small": True, "tiny": False}, sizes) == "small"
    assert findings.smallest_gpu({"large": False}, sizes) is None


def test_memory_is_told_with_the_gpu_that_it_fits():
    model = audits.model()  # OLMoE's sizes
    text = " ".join(sentences(model, evidence="memory"))
    assert "It has 6.92 billion parameters, of which a token uses 1.28 billion (19 %); 93 % are experts." in text
    total = model.memory.inference[0].total_bytes
    assert f"It needs {total / 2**30:.1f} GiB in bfloat16 at 4,096 tokens: fits one RTX 4090 (24.0 GiB)." in text


def test_what_sharing_saves_counts_layers_not_pools():
    """A pool as wide as a layer saves a layer's experts; a union of two layers' saves nothing."""
    tied = small("tied", num_layers=6, group_size=2)
    experts = tied.memory.parameters["experts"]
    assert findings.untied_experts(tied) == experts.read == experts.unique * 6 / 5
    assert findings.untied_experts(small("untied")) is None
    wide = [layer.model_copy(update={"pool_experts": 16}) if layer.pool_experts else layer for layer in tied.layers]
    union = schema.Parameters(unique=6 * 8, read=(4 + 2 * 2) * 8, active=1)
    memory = tied.memory.model_copy(update={"parameters": tied.memory.parameters | {"experts": union}})
    model = tied.model_copy(update={"layers": wide, "memory": memory})
    assert findings.untied_experts(model) == 6 * 8
    assert "tying saves nothing yet" in " ".join(sentences(model, evidence="memory"))


def test_a_plan_is_told_by_its_groups_bytes_and_loss():
    model = small("m")
    plan = model.strategy.plans[0].model_copy(
        update={"recipe": {"groups": [[4, 5, 6, 7]]}, "expert_share": 0.25, "measured_loss_increase": None}
    )
    model = model.model_copy(update={"strategy": model.strategy.model_copy(update={"plans": [plan]})})
    experts = model.memory.parameters["experts"].unique * 2  # bytes in bfloat16
    assert sentences(model, evidence="strategy")[0] == (
        f"Tying layers 4–7 would save {units.size(0.75 * experts)} in bfloat16 (75 % of the experts' bytes) at a "
        "predicted +0.008 nats per token."
    )


def test_models_are_compared_with_the_first():
    audit = audits.audit([audits.model(), audits.model("tied", group_size=4, seed=1)])
    (text, *_) = [each.text for each in findings.of_comparison(audit)]
    first, second = (model.memory.inference[0].total_bytes for model in audit.models)
    assert text.startswith(f"tied needs {100 * second / first:.0f} % of the memory of olmoe-small (")
    added = audit.models[1].quality.loss["prose"].value - audit.models[0].quality.loss["prose"].value
    assert f"{added:+.3f} nats on prose" in text


def test_a_beaten_model_is_named():
    audit = audits.audit([audits.model(), audits.model("tied", group_size=4, seed=1)])
    worse = [p.model_copy(update={"is_on_memory_front": p.model != "tied"}) for p in audit.pareto]
    texts = [each.text for each in findings.of_comparison(audit.model_copy(update={"pareto": worse}))]
    assert "For its memory, tied is beaten on every measure: another model is better and takes no more." in texts


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (2**20, "1.00 MiB"), (14.2 * 2**30, "14.2 GiB"), (80 * 2**30, "80.0 GiB"),
     (1023 * 2**20, "1.00 GiB"), (5000 * 2**40, "5,000 TiB")],
)  # fmt: skip
def test_sizes_have_three_digits(number, text):
    assert units.size(number) == text


def test_layers_are_written_as_spans():
    assert [units.span(each) for each in ([4, 5, 6], [4, 6], [3], [])] == ["4–6", "4 and 6", "3", ""]
    assert [units.runs(each) for each in ([0, 4, 5, 6, 9], [3, 4], [])] == ["0, 4–6 and 9", "3–4", ""]


def test_a_long_name_keeps_both_ends():
    name = units.short("start" + "x" * 100 + "end", 32)
    assert len(name) == 32
    assert name.startswith("start")
    assert name.endswith("end")
    assert units.short("two\nlines\x07") == "two lines"


# --- figures ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_figure_is_drawn_where_there_is_something_to_show(written):
    names = {path.stem for path in (written[1] / "figures").glob("*.svg")}
    per_model = {"loads", "flow", "strategy", "similarity"}
    expected = {f"{i}-{name}" for i in (1, 2) for name in per_model} | {"2-active", "memory", "training", "pareto"}
    assert names == expected == {path.stem for path in (written[1] / "figures").glob("*.png")}


@pytest.mark.parametrize("draw", [plots.memory, plots.training, plots.strategy, plots.similarity])
def test_nothing_is_cut_off_on_a_phone(draw):
    audit = audits.audit()
    with drawing.styled():
        is_of_one = draw in plots.PER_MODEL.values()
        figure = draw(audit.models[0], audit.domains, True) if is_of_one else draw(audit, True)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.x1 <= drawing.WIDTHS[True] + 0.01


def test_losses_far_apart_are_drawn_by_their_logarithm():
    model = audits.audit().models[0]
    for factor, scale in ((1, "linear"), (1000, "symlog")):
        losses = [each.loss_increase.value for each in model.strategy.replacements]
        first = model.strategy.replacements[0]
        worst = schema.Interval(value=factor * max(losses))
        rows = [first.model_copy(update={"loss_increase": worst}), *model.strategy.replacements[1:]]
        strategy = model.strategy.model_copy(update={"replacements": rows})
        figure = plots.strategy(model.model_copy(update={"strategy": strategy}), [], True)
        assert figure.axes[0].get_yscale() == scale


def test_one_model_has_no_pareto_front():
    pytest.importorskip("matplotlib")
    assert set(plots.figures(audits.audit([small("m", is_dense=True)]))) == {"memory", "training"}


def test_colours_of_loads():
    """Nothing at an even share, the full colour from eight times on, half of it at the square root of that."""
    image = plots._diverging(np.array([[1.0, 8.0, 100.0, 8**0.5, 1 / 8, 0.0, np.nan]]))
    assert image[0, :, 3].tolist() == [0, 255, 255, 127, 255, 255, 0]
    assert tuple(image[0, 1, :3]) == drawing.SHADES["orange"]
    assert tuple(image[0, 4, :3]) == drawing.SHADES["blue"]


def test_runs_of_layers():
    assert plots._runs([None, None, 0, 0, 1, None]) == [(0, 1), (2, 3), (4, 4), (5, 5)]


def flows(first, second, *triples, information=0.0):
    return schema.Flow(layers=(first, second), flows=list(triples), mutual_information=information)


def test_the_layers_shown_are_those_that_tell_most():
    chain = [flows(i, i + 1, (0, 0, 9), information=value) for i, value in enumerate([0.9, 0.1, 0.5, 0.6, 0.2])]
    assert [each.layers for each in ribbons._window(chain, 2)] == [(2, 3), (3, 4)]
    apart = [chain[0], chain[3], chain[4]]  # dense layers between
    assert [each.layers for each in ribbons._window(apart, 3)] == [(3, 4), (4, 5)]


def test_columns_hold_each_experts_tokens_without_overlap():
    pairs = [flows(0, 1, (0, 1, 60), (1, 0, 30), (2, 2, 10)), flows(1, 2, (1, 1, 50), (0, 0, 40))]
    first, second, third = ribbons._columns(pairs, 2)
    assert {expert: height for expert, (_, height) in first.items()} == {0: 60, 1: 30}  # the third is not shown
    assert {expert: height for expert, (_, height) in second.items()} == {1: 60, 0: 40}  # the larger of in and out
    assert list(second) == [1, 0]  # as its tokens come
    for column in (first, second, third):
        places = sorted(column.values())
        assert all(top + height < below for (top, height), (below, _) in itertools.pairwise(places))


def test_ribbons_are_told_apart_by_pool_and_by_chance():
    from matplotlib.figure import Figure

    pair = flows(0, 1, (0, 0, 40), (1, 1, 45), (0, 1, 10), (1, 0, 5))
    columns = ribbons._columns([pair], 2)
    margins = [ribbons._margin(pair, side, None, 100) for side in (0, 1)]
    drawn = {
        is_group: dict(ribbons._draw_pair(Figure().subplots(), 0, pair, columns, margins, is_group, (100, 100.0)))
        for is_group in (True, False)
    }
    assert drawn[True] == {"same": 85, "other": 15}
    assert drawn[False] == {"other": 100}  # 40 of 50 x 45 / 100 expected: less than twice
    margins = [{0: 20, 1: 20}, {0: 20, 1: 20}]
    assert ribbons._draw_pair(Figure().subplots(), 0, pair, columns, margins, False, (100, 100.0))["strong"] == 95


def test_the_same_model_gives_the_same_figure():
    pytest.importorskip("matplotlib")
    model = small("m", num_layers=3)
    with drawing.styled():
        one, two = (drawing.svg_text(plots.loads(model, DOMAINS, True)) for _ in range(2))
    assert one == two
    assert "never chosen" in one


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers-tiedmoe\[audit\]'"):
        report.write(audits.audit(), tmp_path)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone(page):
    """No script, nothing fetched: every address is a place on the page itself or data."""
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "foreignobject"}
    for tag, attributes, text in page.elements:
        for name in ("src", "href", "xlink:href", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "style":
            assert not re.search(r"@import|url\((?!#)|@font-face", text)


def test_names_are_escaped(written, page):
    html = (written[1] / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert any(text == "<script>alert(1)</script>" for tag, _, text in page.all("h2"))
    assert "49" not in [text for _, _, text in page.elements]  # {{ 7 * 7 }} is no template
    markdown = (written[1] / "report.md").read_text(encoding="utf-8")
    listing = re.compile(r"^    .*\n", re.MULTILINE)
    assert not re.search(r"(?<!\\)<script", listing.sub("", markdown))
    assert "\n# heading" not in markdown  # a name with a line break begins no heading


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [
        attributes[name] for _, attributes, _ in page.elements for name in ("href", "xlink:href") if name in attributes
    ]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    clips = [each[5:-1] for _, attributes, _ in page.elements if (each := attributes.get("clip-path"))]
    assert clips
    assert set(clips) <= set(ids)


def test_headings_are_in_order_and_every_figure_has_a_text(page):
    levels = [int(tag[1]) for tag, _, _ in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.all("html")[0][1]["lang"] == "en"
    drawn = page.all("svg")
    assert len(drawn) == 2 * 12  # for a page, and for a phone
    for _, attributes, _ in drawn:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 40
    assert all(attributes.get("scope") in ("col", "row") for _, attributes, _ in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 15


def test_what_is_absent_says_why(written, page):
    """Of the model without experts: three kinds of evidence are not there, and a note says why."""
    texts = [text for tag, _, text in page.all("p", "li")]
    assert sum(text == "Not measured: the notes above say why." for text in texts) == 3
    assert any(text.startswith("A dense model") for text in texts)


def test_every_section_and_figure_is_in_the_markdown(written, page):
    markdown = (written[1] / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    assert len(headings) == len(page.all("h1", "h2")) + len(report.EVIDENCE) * 3
    linked = re.findall(r"\]\((figures/[\w-]+\.png)\)", markdown)
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (written[1] / "figures").glob("*.png"))


def test_rows_of_markdown_tables_are_as_wide_as_their_heads(written):
    lines = (written[1] / "report.md").read_text(encoding="utf-8").splitlines()
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    heads = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) > 15
    for i in heads:
        assert cells[i - 1] == cells[i] == cells[i + 1]


def test_contrast_of_text_is_enough_in_both_schemes(written):
    """At least 4.5 to 1 (WCAG 2.2, 1.4.3), for every colour of text on the page's and on the panel's ground."""
    html = (written[1] / "report.html").read_text(encoding="utf-8")
    schemes = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for name in ("ink", "muted", "blue", "orange", "green", "purple"):
            for ground in ("paper", "panel"):
                if (name, ground) in {("orange", "panel"), ("green", "panel"), ("purple", "panel")}:
                    continue  # figures stand on the page's ground
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one, other):
    """The ratio of WCAG 2.2's definition of contrast."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_computed_as_wcag_says():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_colours_of_figures_follow_the_page(written):
    html = (written[1] / "report.html").read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "DejaVu" not in drawn
    for colour, variable in drawing.SCHEME.items():
        assert colour not in drawn
        assert f"{variable}:" in html
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}  # matplotlib's default, of clipped paths


def test_the_terminal_shows_names_as_they_are(written):
    console = Console(width=200, record=True, file=open(Path("/dev/null"), "w"))  # noqa: SIM115
    for each in report.terminal(written[0]):
        console.print(each)
    text = console.export_text()
    assert "[bold red]x[/]" in text  # no markup of rich's
    assert "<script>alert(1)</script>" in text
    assert "It has " in text
    assert "Notes on mod" in text


def test_an_audit_of_nothing_is_a_page_that_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    report.write(audits.audit([]).model_copy(update={"models": [], "pareto": []}), tmp_path)
    assert "Nothing was measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- every field -----------------------------------------------------------------------------------------------------

DRAWN = {  # in figures alone
    ("LayerActive", "by_position"): plots.active,
    ("ActiveExperts", "position_bins"): plots.active,
    ("LayerStability", "loads"): plots.loads,
    ("Flow", "flows"): plots.flow,
}
FIELDS = [(section, name) for section in schema.Section.__subclasses__() for name in section.model_fields]


@pytest.fixture(scope="module")
def full():
    """An audit that has something in every field, and what its page shows."""
    tied = small("tied", num_layers=6, group_size=2, is_soft=True, seed=1)
    stability = [each.model_copy(update={"source_agreement": each.load_cv}) for each in tied.stability.layers]
    tied = tied.model_copy(
        update={"stability": tied.stability.model_copy(update={"layers": stability}), "notes": ["a note"]}
    )
    domains = [each.model_copy(update={"sha256": "0123456789abcdef"}) for each in audits.audit([tied]).domains]
    audit = audits.audit([tied, small("other")]).model_copy(update={"domains": domains})
    return audit, shown(audit)


def shown(audit):
    return repr(report.page(audit, {}))


def changed(value, section, name):
    """The same with another value wherever a `section` has a field `name`."""
    if isinstance(value, schema.Section):
        fields = {key: changed(each, section, name) for key, each in value}
        if type(value) is section:
            fields[name] = another(fields[name], section.model_fields[name].annotation)
        return value.model_copy(update=fields)
    if isinstance(value, dict):
        return {key: changed(each, section, name) for key, each in value.items()}
    return type(value)(changed(each, section, name) for each in value) if isinstance(value, (list, tuple)) else value


def another(value, kind):
    """Another value of a field: numbers and texts are others, of all else there is an item less."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * value + 1  # of several numbers the shares change, too
        case str():
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            return next((each for each in choices if each != value), f"no {value}")
        case schema.Interval():
            return value.model_copy(update={"value": another(value.value, float)})
        case list() | tuple():
            is_plain = all(isinstance(each, int | float) for each in value)
            return type(value)(another(each, float) for each in value) if is_plain else value[1:]
        case dict():
            is_plain = all(isinstance(each, int | float | str) for each in value.values())
            return {k: another(v, str) for k, v in value.items()} if is_plain else dict([*value.items()][1:])
    return None


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_every_field_is_in_the_report(section, name, full):
    """Of each field that changes, the page's text changes, or else a figure."""
    audit, text = full
    other = changed(audit, section, name)
    assert other != audit, "no field of the example has a value"
    assert (shown(other) != text) == ((section.__name__, name) not in DRAWN)


def test_what_is_not_in_words_is_drawn(full):
    pytest.importorskip("matplotlib")
    audit, _ = full
    with drawing.styled():
        as_they_are = {draw: svg(draw, audit) for draw in set(DRAWN.values())}
        for (section, name), draw in DRAWN.items():
            assert svg(draw, changed(audit, getattr(schema, section), name)) != as_they_are[draw], name


def svg(draw, audit):
    return drawing.svg_text(draw(audit.models[0], audit.domains, False))


# --- a browser -------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IS_LIMITED = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY  # it reserves terabytes of addresses


@pytest.fixture
def needs_browser():
    if BROWSER is None:
        pytest.skip("no Chromium here; Debian's package `chromium` has it")
    if IS_LIMITED:
        pytest.skip("Chromium starts in no limited address space; `ulimit -v unlimited` before")


def browse(page, profile, *flags):
    """Open a file in headless Chromium; return what it wrote to stdout and to stderr."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", *flags)
    shown = ("--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={profile}", page.as_uri())
    command = [BROWSER, *flags, *shown]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def console_of(stderr):
    return [line for line in stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.usefixtures("needs_browser")
def test_an_error_on_the_console_is_noticed(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><title>x</title><script>console.error('found')</script>")
    assert "found" in "".join(console_of(browse(path, tmp_path / "profile", "--dump-dom")[1]))


@pytest.mark.usefixtures("needs_browser")
@pytest.mark.parametrize(("width", "kind"), [(390, "narrow"), (1280, "wide")])
def test_a_browser_opens_the_page(width, kind, written, tmp_path):
    """No error on the console; no sideways scrolling but in tables' own boxes; the figures of this width are shown."""
    measure = """<script>parent.document.title = [document.documentElement.scrollWidth, innerWidth,
        ...["wide", "narrow"].map(kind => [...document.querySelectorAll(`svg.${kind}`)].filter(
            each => each.getBoundingClientRect().width > 100).length)].join(" ")</script></body>"""
    html = (written[1] / "report.html").read_text(encoding="utf-8").replace("</body>", measure)
    path = tmp_path / "page.html"  # in a frame: headless windows are 500 pixels wide or more
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{escape(html)}"></iframe>'
    path.write_text(f"<!doctype html><title>none</title>{frame}", encoding="utf-8")
    dom, errors = browse(path, tmp_path / "profile", "--dump-dom", "--window-size=1400,900")
    assert console_of(errors) == []
    page_width, window, wide, narrow = map(int, re.search(r"<title>([\d ]+)</title>", dom)[1].split())
    assert page_width <= window == width
    assert (wide, narrow) == ((12, 0) if kind == "wide" else (0, 12))


@pytest.mark.usefixtures("needs_browser")
def test_a_browser_draws_the_page_in_both_schemes(written, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    grounds = {}
    for scheme, flags in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
        shot = tmp_path / f"{scheme}.png"
        browse(written[1] / "report.html", tmp_path / scheme, f"--screenshot={shot}", "--window-size=1280,900", *flags)
        pixels = image.imread(shot)
        assert pixels.shape[1] == 1280
        grounds[scheme] = pixels[2, 2, :3].mean()
        assert pixels.std() > 0.05  # something is on it
    assert grounds["light"] > 0.95
    assert grounds["dark"] < 0.15

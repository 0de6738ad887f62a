"""Reports as text, in colour, as JSON and as a page: complete, bounded, escaped, and readable without colours."""

import importlib.metadata
import io
import json
import math
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console

from funcreg import interop
from interop import Hint, Report, Verdict
from interop._html import pages
from interop._log_axis import LogAxis
from interop._measure import Errors
from interop.report import Leaf, summed_up
from interop.verdict import Evidence, judge

ROUNDING, SEMANTIC, INCONCLUSIVE = Verdict
NASTY = "<script>alert('x')</script>&\"quoted\""
X = np.linspace(-1, 1, 12).reshape(4, 3)


class Page(HTMLParser):
    """Tags, visible text, and whether every tag is closed in its order."""

    VOID = {"meta", "wbr", "br", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.attributes = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.title = data
        elif "style" not in self.open:
            self.text = (self.text + data).lstrip()


def leaf(name, error, step=0, verdict=None, reason=""):
    """A leaf with this relative error in float64."""
    judged = judge(Evidence(1.0, min(error, 1e300), 1e-16, 1.0, max(min(error, 1e300), 1e-7), 1e-7))
    errors = Errors(error, error, error / 2.0**-52), Errors(1e-7, 1e-7, 1.0)
    return Leaf(name, (2, 3), verdict or judged.verdict, *errors, ("float64", "float64"), judged, reason, step)


def trajectories(names, steps, error):
    return summed_up([leaf(name, error(i, step), step) for step in range(1, steps + 1) for i, name in enumerate(names)])


def test_the_page_says_the_verdict_in_words_first_and_needs_nothing_else():
    for verdict, words, error in (
        (ROUNDING, "The two sides agree", 1e-16),
        (SEMANTIC, "The two sides compute different things", 1e-3),
        (INCONCLUSIVE, "No verdict: it cannot be told", 1e-12),
    ):
        text = summed_up([leaf("w", error)], at_least=verdict).to_html()
        page = Page(text)
        mark = {ROUNDING: "=", SEMANTIC: "\u2260", INCONCLUSIVE: "?"}[verdict]
        assert page.text.startswith(f"{mark} verdict: {verdict}{words}"), "the verdict, in text, before all else"
        assert page.title.startswith(words) and '<html lang="en">' in text and "prefers-color-scheme: dark" in text
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not re.search(r"https?:|url\(|@import|javascript:", text)
        assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]


def test_whatever_comes_from_outside_is_escaped():
    class Location:
        where, direction = f"inside `{NASTY}`", NASTY

        def __str__(self):
            return NASTY

    report = Report(
        SEMANTIC,
        tuple(leaf(NASTY, 1e-3, step, reason=NASTY) for step in (1, 2)),
        (NASTY,),
        (Hint("kind", NASTY, 1e-16),),
        {NASTY: NASTY},
    )
    for text in (report.to_html(location=Location()), pages({NASTY: report, "error": NASTY})):
        page = Page(text)
        assert "script" not in page.tags and NASTY in page.text
        assert not re.search(r"<script|\"quoted\"", text)


def test_hints_location_reasons_evidence_and_versions_are_on_the_page():
    class Location:
        where, direction = "between `fc1` and `fc2`", "forward"

        def __str__(self):
            return "fc1  0\nfc2  1e-3"

    report = Report(SEMANTIC, (leaf("deep.weight", 1e-3),), ("a reason",), (Hint("eps", "another eps", 3e-16),))
    text = Page(report.to_html(location=Location())).text
    order = ["different things", "another eps (then they differ by 3e-16)", "between fc1 and fc2 (forward)", "a reason"]
    order += ["deep.weight", "4.5e+12", "What the columns mean", f"torch{importlib.metadata.version('torch')}"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    assert "first layer" not in Page(report.to_html()).text
    Location.where = ""
    assert "nowhere" in Page(report.to_html(location=Location())).text


def test_errors_over_steps_are_drawn_on_a_log_scale_with_zeros_and_infinities():
    def error(i, step):
        return [0.0, 1e-16 * step, math.inf if step > 8 else 1e-15, math.nan][i]

    text = trajectories(["zero", "small", "inf", "nan"], 10, error).to_html()
    (chart,) = re.findall(r'<svg class="chart".*?</svg>', text)
    lines = {kind: points for kind, points in re.findall(r'<path class="(s\d)" d="M([^"]+)"', chart)}
    legend = re.findall(r'class="(s\d)" d="M1 4H27"/></svg>(\S+) ', text)
    y = {name: [float(p.split()[1]) for p in lines[kind].split(" L")] for kind, name in legend if kind in lines}
    assert set(y) == {"zero", "small", "inf"} and len({name for _, name in legend}) == 4
    assert len(set(y["zero"])) == 1 and min(y["zero"]) > max(y["small"]), "zeros lie beneath all numbers"
    assert y["small"] == sorted(y["small"], reverse=True) and len(set(y["small"])) == 10
    assert y["inf"][:8] == [y["inf"][0]] * 8 and max(y["inf"][8:]) < min(y["small"]), "infinity lies above"
    assert "nan" not in chart.lower() and ">0</text>" in chart and ">\u221e</text>" in chart
    assert 'role="img" aria-label="Relative error in float64, steps 1 to 10' in chart
    assert 'class="s' in re.findall(r'<circle class="s\d ring"[^>]*>', chart)[0], "the first step that is not rounding"


def test_one_step_is_a_dot_and_no_step_no_chart():
    assert 'r="3.5"' in trajectories(["w"], 1, lambda i, step: 1e-16).to_html()
    assert '<svg class="chart"' not in summed_up([leaf("w", 1e-16)]).to_html()


def test_a_large_report_stays_readable_and_small():
    names = [f"params.encoder.layers.{i}.attention.query.kernel" for i in range(500)]
    error = lambda i, step: 1e-6 * step if i == 321 and step > 30 else 1e-16 * (1 + (i + 3) % 5)  # noqa: E731
    report = trajectories(names, 40, error)
    text = report.to_html()
    page = Page(text)
    assert len(text) < 400_000
    assert "500 leaves over 40 steps: 1 semantic, 499 rounding" in page.text
    assert "The 200 most serious of 500 are listed." in page.text
    assert page.tags.count("tr") == 2 + 200
    first = re.search(r'<tbody><tr><th scope="row">(.*?)</th><td>(\d+)', text)
    assert first[1].replace("<wbr>", "") == names[321] and first[2] == "31", "the most serious first"
    assert "largest of 492 other leaves" in page.text and "\u2026321.attention.query.kernel (semantic)" in page.text
    ((at, _),) = re.findall(r'<circle class="s0 ring" cx="([\d.]+)" cy="([\d.]+)"', text)
    drawn = dict(re.findall(r'<path class="(s\d|rest)" d="M([^"]+ L[^"]+)"', text))
    assert drawn["s0"].split(" L")[30].split()[0] == at, "the ring is at step 31"
    assert drawn["rest"] == drawn["s1"], "the largest of the others, which is that of the second leaf"
    long = trajectories(["w"], 2000, lambda i, step: 1e-3 if step == 1000 else 1e-16)
    (chart,) = re.findall(r'<svg class="chart".*?</svg>', long.to_html())
    assert len(chart) < 20_000 and "Of every few steps the largest error is drawn" in long.to_html()
    assert len(set(re.findall(r" (\d+\.\d)", re.search(r'class="s0" d="M([^"]+)"', chart)[1]))) == 2, "the spike stays"


def test_the_table_begins_with_the_most_serious_verdicts_and_the_largest_errors():
    report = summed_up([leaf(name, error) for name, error in (("a", 1e-16), ("b", 3e-4), ("c", 9e-16), ("d", 1e-3))])
    assert re.findall(r'<th scope="row">(.)</th>', report.to_html()) == ["d", "b", "c", "a"]
    assert [row.name for row in report.ranked()] == ["b", "d", "a", "c"], "in text, the order of the model"


def test_names_and_reasons_of_any_length_are_cut():
    report = summed_up([leaf("deep." * 300 + "kernel", 1e-3, reason="why " * 2000)])
    text = report.to_html()
    assert len(text) < 30_000 and "deep.kernel" in Page(text).text.replace("\u2026", "")


def test_a_report_without_leaves_has_a_page():
    page = Page(Report(INCONCLUSIVE, (), ("the one side has float64 only",)).to_html())
    assert "No array could be compared" in page.text and "table" not in page.tags


def test_several_reports_share_a_page_and_errors_are_on_it():
    found = {"one": summed_up([leaf("w", 1e-16)]), "two": summed_up([leaf("v", 1e-3)])}
    page = Page(pages(found))
    assert page.text.count("verdict: ") == 2 and page.title.startswith("The two sides compute different things")
    page = Page(pages({**found, "three": "Traceback: broken"}))
    assert page.title.startswith("Something could not be checked") and "Traceback: broken" in page.text
    assert page.text.count("Environment") == 1


def test_a_page_is_written_whole(tmp_path):
    report = summed_up([leaf("w", 1e-16)])
    path = tmp_path / "page.html"
    path.write_text("before")
    assert report.to_html(path) == path.read_text(encoding="utf-8") and [*tmp_path.iterdir()] == [path]
    with pytest.raises(FileNotFoundError, match="to_html: there is no folder .*'; make it first"):
        report.to_html(tmp_path / "no" / "page.html")


@pytest.mark.parametrize(
    "values, low, high, zero, infinity",
    [
        ([1e-16, 3e-3], -16, -2, False, False),
        ([0.0], -16, -15, True, False),
        ([0.0, 1.0, math.inf, math.nan], 0, 1, True, True),
        ([5e-324, 1e308], -324, 308, False, False),
    ],
)
def test_the_axis_holds_every_number(values, low, high, zero, infinity):
    axis = LogAxis(values)
    assert (axis.low, axis.high) == (low, high)
    assert (axis.bottom > 0, axis.top < 1) == (zero, infinity)
    places = [axis.at(x) for x in sorted(x for x in values if x >= 0)]
    assert places == sorted(places) and all(0 <= place <= 1 for place in places)
    assert len(axis.ticks()) <= 12 and all(0 <= place <= 1 for place, _ in axis.ticks())


# --- text ---


def shown(report, **options):
    console = Console(file=io.StringIO(), width=80, **options)
    console.print(report)
    return console.file.getvalue()


def test_on_a_terminal_it_has_colours_and_elsewhere_none():
    report = interop.check(lambda x: {"same": x, "other": x}, lambda x: {"same": x, "other": 2 * x}, X, hints=False)
    colours = shown(report, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;31msemantic" in colours and "\x1b[32mrounding" in colours
    bare = shown(report)
    assert "\x1b" not in bare and "\x1b" not in str(report)
    assert bare.splitlines()[0] == str(report).splitlines()[0] == "verdict: semantic"
    assert bare.index("other") < bare.index("same") and max(map(len, bare.splitlines())) <= 80


def test_square_brackets_in_names_are_no_markup():
    report = summed_up([leaf("layers[bold]", 1e-16, reason="see [red]")])
    assert shown(report).count("layers[bold]") == 2, "in the reason and in the table"
    assert "see [red]" in shown(report)


def test_hints_and_the_leaves_that_are_not_listed_are_in_both_texts():
    leaves = tuple(leaf(f"w{i}", 1e-16, step=1) for i in range(43))
    report = Report(SEMANTIC, leaves, (), (Hint("eps", "another eps", 3e-16),))
    for text in (str(report), shown(report)):
        assert "  hint: another eps (3e-16)" in text and "... and 3 more leaves" in text and "step" in text


def test_a_difference_without_a_hint_says_what_to_do_next():
    bare = summed_up([leaf("w", 1e-3)])
    steps = summed_up([leaf("params.w", 1e-3, step) for step in (1, 2)])
    for report, words in ((bare, "check` their parts"), (steps, "check` the gradients of both losses")):
        assert words in report.advice and "interop.locate(net, flax_model, pair, *inputs)" in report.advice
        assert f"\n  next: {report.advice}\n" in str(report)
        assert "next: `interop" in shown(report) and report.to_dict()["next"] == report.advice
        assert report.advice.replace("`", "") in Page(report.to_html()).text
    assert "What to do next" not in bare.to_html(location=NoLocation())
    hinted = Report(SEMANTIC, bare.leaves, (), (Hint("eps", "another eps", 3e-16),))
    for report in (hinted, summed_up([leaf("w", 1e-16)]), summed_up([leaf("w", 1e-12)], at_least=INCONCLUSIVE)):
        assert report.advice == report.to_dict()["next"] == "" and "next:" not in str(report) + shown(report)
        assert "What to do next" not in report.to_html()


class NoLocation:
    where, direction = "", ""


def test_what_is_invisible_in_names_is_written_out():
    name = "a\nb\tc\x00\u200b\x1b[31m"
    report = summed_up([leaf(name, 1e-3, step, reason="why") for step in (1, 2)])
    for text in (str(report), shown(report)):
        assert not set(text) & set("\t\x00\u200b\x1b")
        assert r"a\nb\tc\x00\u200b" in text and sum(line.lstrip().startswith("a") for line in text.splitlines()) == 2
    text = report.to_html()
    assert not set(text) & set("\t\x00\u200b\x1b") and r"a\nb\tc\x00\u200b" in Page(text).text
    assert json.loads(report.to_json())["leaves"][0]["name"] == name
    visible = "gr\u00fc\u00df.\u5c64"
    assert visible in str(summed_up([leaf(visible, 1e-16)]))


# --- JSON ---


def test_json_has_a_schema_versions_and_the_machine():
    report = interop.check(torch.sin, jnp.sin, X)
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert (
        list(plain) == ["schema", "verdict", "reasons", "hints", "next", "leaves", "environment"]
        and plain["schema"] == 1
    )
    for name in ("numpy", "torch", "jax", "jaxlib", "flax", "optax"):
        assert plain["environment"][name] == importlib.metadata.version(name)
    assert {"funcreg", "python", "system", "cores", "jax devices"} <= plain["environment"].keys()
    assert set(plain["leaves"][0]) == {
        *("name", "shape", "verdict", "float64", "float32", "dtypes", "judgement", "reason", "step")
    }

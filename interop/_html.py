"""A report as one page for a browser, without scripts and without anything from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from . import verdict as rules
from ._chart import over_steps
from ._log_axis import DIGITS, LogAxis
from ._page_style import STYLE
from ._text import ORDER, printable, seriousness, shape_of, short
from .verdict import Verdict

if TYPE_CHECKING:
    from .report import Leaf, Report

ROWS, NAME, TEXT = 200, 160, 1000  # at most: rows of the table, characters of a name and of a sentence

TITLES = {
    Verdict.ROUNDING: "The two sides agree",
    Verdict.SEMANTIC: "The two sides compute different things",
    Verdict.INCONCLUSIVE: "No verdict: it cannot be told",
}
WORDS = {
    Verdict.ROUNDING: "What differs between PyTorch and JAX is rounding: it shrinks with the precision, or is no "
    "larger than what each side shows by itself when its inputs move by an ulp. On these inputs they are the same "
    "function.",
    Verdict.SEMANTIC: "PyTorch and JAX differ by more than rounding: the difference stays when the precision grows, or "
    "is far beyond what an ulp in the inputs does to one side alone. One of them has another formula, constant or "
    "layout.",
    Verdict.INCONCLUSIVE: "What was measured does not tell rounding from a real difference. The reasons below say what "
    "stood in the way; this is neither agreement nor a fault.",
}
EXPLAINED = f"""<section><details><summary>What the columns mean</summary><dl>
<dt>float64, float32</dt><dd>Both sides were run in both precisions from the same inputs. <em>largest</em>: the largest
difference; <em>relative</em>: that by the largest entry of the leaf; <em>ulp</em>: in units of the last place of each
entry.</dd>
<dt>by precision</dt><dd><em>64/32</em> is the difference in float64 by that in float32. Rounding shrinks to about 2e-9
of itself (here: at most {rules.RATIO_ROUNDING:.0e}), a fault stays (above {rules.RATIO_SEMANTIC:.0e}).</dd>
<dt>by conditioning</dt><dd><em>ulp test</em> is the difference in float64 by what a change of one or two ulp in the
inputs does to one side alone. Rounding: at most {rules.EXCESS_ROUNDING:.0e}; a fault: above
{rules.EXCESS_SEMANTIC:.0e}.</dd>
<dt>opinion</dt><dd>What each rule says by itself; <em>none</em> where it has no opinion. Two opinions that contradict
each other, and none at all, are inconclusive. Differences below {rules.FLOOR:.0e} of the leaf count as rounding.</dd>
</dl></details></section>"""
MARKS = {Verdict.ROUNDING: "=", Verdict.SEMANTIC: "\u2260", Verdict.INCONCLUSIVE: "?"}


def page(report: Report, location: Any = None) -> str:
    """The whole page of one report; of `interop.locate`, what it found."""
    return _document(TITLES[report.verdict], _article(report, location) + _foot(report.environment))


def pages(found: Mapping[str, Report | str]) -> str:
    """Several reports by name on one page, one below the other; a string stands for an error."""
    articles = []
    for name, report in found.items():
        heading = f'<p class="name">{_text(name)}</p>'
        articles.append(heading + (_failed(report) if isinstance(report, str) else _article(report)))
    shown = next((report.environment for report in found.values() if not isinstance(report, str)), {})
    verdicts = [report.verdict for report in found.values() if not isinstance(report, str)]
    worst = TITLES[min(verdicts, key=ORDER.index)] if len(verdicts) == len(found) else "Something could not be checked"
    return _document(worst, "\n".join(articles) + _foot(shown))


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
        f'content="light dark">\n<title>{title} \u2013 parity of PyTorch and JAX</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _article(report: Report, location: Any = None) -> str:
    rows = sorted(report.ranked(), key=seriousness)
    verdict = report.verdict
    parts = [
        f'<header class="{verdict}"><p class="badge"><span aria-hidden="true">{MARKS[verdict]}</span> verdict: '
        f"{verdict}</p><h1>{TITLES[verdict]}</h1><p>{WORDS[verdict]}</p>{_counts(report, rows)}</header>",
        _listed("What makes them agree", [_hint(hint) for hint in report.hints]),
        _listed("What to do next", [_marked(report.advice)] if report.advice and location is None else []),
        _location(location),
        _listed("Reasons", [_text(reason) for reason in report.reasons]),
        over_steps(report),
        _table(rows),
    ]
    return f"<article>{chr(10).join(part for part in parts if part)}</article>\n"


def _failed(error: str) -> str:
    return (
        '<article><header class="inconclusive"><p class="badge"><span aria-hidden="true">!</span> error</p>'
        f'<h1>It could not be checked</h1></header><pre class="wide">{escape(error[: 20 * TEXT])}</pre></article>\n'
    )


def _counts(report: Report, rows: Sequence[Leaf]) -> str:
    if not rows:
        return "<p>No array could be compared.</p>"
    steps = max(leaf.step for leaf in report.leaves)
    found = [(sum(leaf.verdict is verdict for leaf in rows), verdict) for verdict in ORDER]
    said = ", ".join(f"{count} {verdict}" for count, verdict in found if count)
    over = f" over {steps} steps" if steps > 1 else ""
    worst = max((leaf.float64.relative for leaf in report.leaves if leaf.float64), default=None)
    largest = f" The largest difference in float64 is {short(worst)} of its leaf." if worst else ""
    if worst == 0 and report.verdict is Verdict.ROUNDING:
        largest = " In float64 they are equal to the last bit."
    return f"<p>{len(rows)} {'leaf' if len(rows) == 1 else 'leaves'}{over}: {said}.{largest}</p>"


def _hint(hint: Any) -> str:
    return f'{_text(hint.change)} <span class="faint">(then they differ by {hint.difference:.0e})</span>'


def _location(location: Any) -> str:
    if location is None:
        return ""
    where = location.where or "nowhere"
    direction = f" ({escape(str(location.direction))})" if getattr(location, "direction", "") else ""
    return (
        f"<section><h2>The first layer that differs</h2><p>{_marked(where)}{direction}</p><details><summary>Layer by "
        f'layer</summary><pre class="wide">{escape(str(location)[: 20 * TEXT])}</pre></details></section>'
    )


def _listed(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"<section><h2>{title}</h2><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul></section>"


def _table(rows: Sequence[Leaf]) -> str:
    if not rows:
        return ""
    shown = rows[:ROWS]
    steps = any(leaf.step for leaf in rows)
    axis = LogAxis(
        [e.relative for leaf in shown for e in (leaf.float64, leaf.float32) if e is not None] + [*DIGITS.values()],
        4,
        0.15,
    )
    ticks = "".join(f'<text x="{_at(part)}" y="11" text-anchor="middle">{label}</text>' for part, label in axis.ticks())
    head = [
        "leaf",
        *(["step"] if steps else []),
        "verdict",
        f'relative error<svg class="strip" viewBox="0 0 200 14" aria-hidden="true">{ticks}</svg>',
    ]
    groups = {
        "by precision": ["64/32", "opinion"],
        "by conditioning": ["ulp test", "opinion"],
        "float64": ["largest", "relative", "ulp"],
        "float32": ["largest", "relative", "ulp"],
    }
    top = "".join(f'<th rowspan="2" scope="col">{name}</th>' for name in head)
    top += "".join(f'<th colspan="{len(below)}" scope="colgroup">{name}</th>' for name, below in groups.items())
    top += "".join(f'<th rowspan="2" scope="col">{name}</th>' for name in ("shape", "dtypes"))
    second = "".join(f'<th scope="col">{name}</th>' for below in groups.values() for name in below)
    body = "".join(_row(leaf, axis, steps) for leaf in shown)
    more = f" The {len(shown)} most serious of {len(rows)} are listed." if len(rows) > len(shown) else ""
    each = "Of every leaf, the first step of its most serious verdict, or that of its largest error. " if steps else ""
    return (
        f'<section><h2>Leaf by leaf</h2><p>{each}<svg class="mark" viewBox="0 0 12 12" aria-hidden="true"><circle '
        'class="in64" cx="6" cy="6" r="4"/></svg> float64, <svg class="mark" viewBox="0 0 12 12" aria-hidden="true">'
        '<circle class="in32" cx="6" cy="6" r="4"/></svg> float32, on a logarithmic scale; dotted: the spacing of the '
        f'two.{more}</p><div class="wide"><table><thead><tr>{top}</tr><tr>{second}</tr></thead><tbody>{body}</tbody>'
        "</table></div></section>"
    )


def _row(leaf: Leaf, axis: LogAxis, steps: bool) -> str:
    judged = leaf.judgement
    name = printable(leaf.name)
    name = name if len(name) <= NAME else f"{name[: NAME // 2]}\u2026{name[-NAME // 2 :]}"
    cells = [f"<td>{leaf.step}</td>"] if steps else []
    cells += [f'<td><span class="chip {leaf.verdict}">{leaf.verdict}</span></td>', f"<td>{_strip(leaf, axis)}</td>"]
    opinions = [judged.by_precision, judged.by_conditioning] if judged else []
    measures = [judged.ratio, judged.excess] if judged else [None, None]
    said = [str(opinion or "none") for opinion in opinions] or ["-", "-"]
    numbers = [short(measures[0]), said[0], short(measures[1]), said[1]]
    for errors in (leaf.float64, leaf.float32):
        numbers += [short(x) for x in errors or (None, None, None)]
    numbers += [shape_of(leaf).replace("x", "\u00d7"), ", ".join(dict.fromkeys(leaf.dtypes))]
    cells += [f"<td>{escape(x)}</td>" for x in numbers]
    row = f'<tr><th scope="row">{escape(name).replace(".", ".<wbr>")}</th>{"".join(cells)}</tr>'
    if not leaf.reason:
        return row
    return f'{row}<tr class="why"><td colspan="{len(cells) + 1}"><div>{_text(leaf.reason)}</div></td></tr>'


def _strip(leaf: Leaf, axis: LogAxis) -> str:
    """The two relative errors of a leaf on a scale that all rows share."""
    marks = [f'<path class="eps" d="M{_at(axis.at(x))} 0V20"/>' for x in DIGITS.values()]
    marks += [f'<path class="grid" d="M{_at(part)} 0V20"/>' for part, _ in axis.ticks()]
    for kind, errors in (("in32", leaf.float32), ("in64", leaf.float64)):
        if errors is not None and errors.relative >= 0:  # not NaN
            marks.append(f'<circle class="{kind}" cx="{_at(axis.at(errors.relative))}" cy="10" r="4.5"/>')
    return f'<svg class="strip" viewBox="0 0 200 20" aria-hidden="true">{"".join(marks)}</svg>'


def _at(part: float) -> str:
    return f"{16 + 168 * part:.0f}"


def _foot(environment: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in environment.items())
    return f'{EXPLAINED}\n<footer><h2>Environment</h2><dl class="inline">{items}</dl></footer>'


def _text(text: str) -> str:
    text = printable(text)
    return escape(text if len(text) <= TEXT else f"{text[:TEXT]}\u2026")


def _marked(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", _text(text))

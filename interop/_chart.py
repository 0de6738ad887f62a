"""Errors over the steps of a training run, as a drawing (SVG)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ._log_axis import DIGITS, LogAxis
from ._text import ORDER, printable, seriousness
from .verdict import Verdict

if TYPE_CHECKING:
    from .report import Leaf, Report

LINES, POINTS = 8, 200  # drawn at most
NAME = 400  # characters of a name, at most
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 340, 56, 16, 12, 40

Series = list[tuple[int, float]]  # step and error


def over_steps(report: Report) -> str:
    """The figure; empty for a report without steps."""
    of_leaf: dict[str, list[Leaf]] = {}
    for leaf in report.leaves:
        if leaf.step:
            of_leaf.setdefault(leaf.name, []).append(leaf)
    if not of_leaf:
        return ""
    order = [leaf.name for leaf in sorted(report.ranked(), key=seriousness) if leaf.name in of_leaf]
    drawn, others = order[:LINES], order[LINES:]
    steps = sorted({leaf.step for leaf in report.leaves if leaf.step})
    lines = {name: _series(of_leaf[name]) for name in drawn}
    rest = _largest([leaf for name in others for leaf in of_leaf[name]])
    narrow = _largest([leaf for leaves in of_leaf.values() for leaf in leaves], "float32")
    every = [lines[name] for name in drawn] + [rest, narrow]
    axis = LogAxis([x for series in every for _, x in series] + [DIGITS["float64"]])
    plot = _Plot(axis, steps[0], steps[-1])
    parts = [*plot.grid()]
    parts += [plot.line(_thinned(narrow), "narrow")] if narrow else []
    parts += [plot.line(_thinned(rest), "rest")] if rest else []
    for i, name in enumerate(drawn):
        parts.append(plot.line(_thinned(lines[name]), f"s{i}"))
        onset = next((leaf for leaf in of_leaf[name] if leaf.verdict is not Verdict.ROUNDING), None)
        if onset is not None and onset.float64 is not None and not math.isnan(onset.float64.relative):
            parts.append(plot.ring(onset.step, onset.float64.relative, f"s{i}"))
    called = zip(drawn, _told_apart(drawn), strict=True)
    parts.append(plot.spacing())
    legend = [(f"s{i}", f"{short} ({_worst(of_leaf[name])})", name[:NAME]) for i, (name, short) in enumerate(called)]
    legend += [("rest", f"largest of {len(others)} other leaves", "")] if rest else []
    legend += [("narrow", "float32, largest of all leaves", "")] if narrow else []
    keys = "".join(
        f'<li title="{escape(printable(title))}"><svg class="key" viewBox="0 0 28 8" aria-hidden="true">'
        f'<path class="{kind}" d="M1 4H27"/></svg>{escape(printable(text))}</li>'
        for kind, text, title in legend
    )
    said = f"Relative error in float64, steps {steps[0]} to {steps[-1]}, logarithmic; the table has the numbers."
    thinned = " Of every few steps the largest error is drawn." if len(steps) > POINTS else ""
    caption = f"Relative error in float64, step by step. A ring: the first step that is not rounding.{thinned}"
    drawing = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(parts)}</svg>'
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="wide">{drawing}</div><ul class="legend">{keys}</ul>'
        "</figure>"
    )


class _Plot:
    """Steps to the right, errors upwards."""

    def __init__(self, axis: LogAxis, first: int, last: int) -> None:
        self.axis, self.first, self.last = axis, first, last

    def x(self, step: int) -> float:
        part = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(self, error: float) -> float:
        return TOP + (1 - self.axis.at(error)) * (HEIGHT - TOP - BOTTOM)

    def line(self, series: Series, kind: str) -> str:
        points = [f"{self.x(step):.1f} {self.y(error):.1f}" for step, error in series]
        if len(points) == 1:
            x, y = points[0].split()
            return f'<circle class="{kind} dot" cx="{x}" cy="{y}" r="3.5"/>'
        return f'<path class="{kind}" d="M{" L".join(points)}"/>' if points else ""

    def ring(self, step: int, error: float, kind: str) -> str:
        return f'<circle class="{kind} ring" cx="{self.x(step):.1f}" cy="{self.y(error):.1f}" r="6"/>'

    def spacing(self) -> str:
        """The name of the dotted line, drawn last, over the others."""
        y = self.y(DIGITS["float64"]) - 5
        return f'<text class="over" x="{WIDTH - RIGHT}" y="{y:.1f}" text-anchor="end">spacing of float64</text>'

    def grid(self) -> list[str]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for part, label in self.axis.ticks():
            y = TOP + (1 - part) * (bottom - TOP)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for step in _round_steps(self.first, self.last):
            parts.append(f'<text x="{self.x(step):.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>')
        y = self.y(DIGITS["float64"])
        parts.append(f'<path class="eps" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
        return parts


def _series(leaves: Sequence[Leaf], run: str = "float64") -> Series:
    errors = [(leaf.step, getattr(leaf, run)) for leaf in leaves]
    return [(step, found.relative) for step, found in errors if found is not None and not math.isnan(found.relative)]


def _largest(leaves: Sequence[Leaf], run: str = "float64") -> Series:
    found: dict[int, float] = {}
    for step, error in _series(leaves, run):
        found[step] = max(found.get(step, 0.0), error)
    return sorted(found.items())


def _thinned(series: Series) -> Series:
    """The largest of every few points, so that no spike is lost."""
    every = math.ceil(len(series) / POINTS)
    return [max(series[i : i + every], key=lambda point: point[1]) for i in range(0, len(series), every or 1)]


def _round_steps(first: int, last: int) -> list[int]:
    rough = max(1, (last - first) / 8)
    unit = 10 ** math.floor(math.log10(rough))
    every = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    inner = [step for step in range(every * math.ceil(first / every), last + 1, every)]
    return inner if first in inner or (inner and inner[0] - first < every / 2) else [first, *inner]


def _worst(leaves: Sequence[Leaf]) -> str:
    verdicts = {leaf.verdict for leaf in leaves}
    return str(next(v for v in ORDER if v in verdicts))


def _told_apart(names: Sequence[str], most: int = 40) -> list[str]:
    """Names short enough for a legend: without the components that all begin with, then without their ends."""
    parts = [name.split(".") for name in names]
    same = 0
    while len(names) > 1 and all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    short = [name if len(name) <= most else "\u2026" * (same > 0) + ".".join(name.split(".")[same:]) for name in names]
    return [name if len(name) <= most else f"{name[:most]}\u2026" for name in short]

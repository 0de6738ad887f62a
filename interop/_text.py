"""A report as text: plain, and in colour for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .verdict import Verdict

if TYPE_CHECKING:
    from .report import Leaf, Report

SHOWN = 40  # rows of the table; the others are counted
ORDER = (Verdict.SEMANTIC, Verdict.INCONCLUSIVE, Verdict.ROUNDING)  # the most serious first
COLOURS = {Verdict.ROUNDING: "green", Verdict.INCONCLUSIVE: "yellow", Verdict.SEMANTIC: "red"}


def plain(report: Report) -> str:
    """The verdict, the reasons, the hints and a table with all errors, one line a leaf."""
    rows = report.ranked()
    lines = [f"verdict: {report.verdict}", *_sentences(report.reasons), *_below(report)]
    if rows:
        lines += ["", *_lines(rows[:SHOWN])]
    return "\n".join([*lines, *_others(rows)])


def coloured(report: Report) -> Any:
    """The same for rich; the table has the relative errors only, so that it fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = report.ranked()
    colour = COLOURS[report.verdict]
    parts: list[Any] = [Text.assemble("verdict: ", (str(report.verdict), f"bold {colour}"))]
    parts += [Text(line) for line in _sentences(report.reasons)]
    parts += [Text(line, "bold") for line in _below(report)]
    if rows:
        steps = any(leaf.step for leaf in rows)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("leaf", overflow="fold")
        for name in (["step"] if steps else []) + ["verdict"]:
            table.add_column(name, no_wrap=True)
        for name in ("float64", "float32", "64/32", "ulp test"):
            table.add_column(name, justify="right", no_wrap=True)
        for leaf in rows[:SHOWN]:
            step = [str(leaf.step)] if steps else []
            relative = [short(errors.relative if errors else None) for errors in (leaf.float64, leaf.float32)]
            verdict = Text(str(leaf.verdict), COLOURS[leaf.verdict])
            table.add_row(Text(printable(leaf.name)), *step, verdict, *relative, *_measures(leaf))
        parts.append(table)
    return Group(*parts, *(Text(line) for line in _others(rows)))


def short(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}"


def seriousness(leaf: Leaf) -> tuple[int, float]:
    """Sorts the most serious verdicts first, and within one the largest errors."""
    return ORDER.index(leaf.verdict), -(leaf.float64.relative if leaf.float64 else 0.0)


def shape_of(leaf: Leaf) -> str:
    return "x".join(map(str, leaf.shape)) or "-"


def printable(text: str) -> str:
    """On one line: what is no visible character, such as a newline in the name of a leaf, as Python writes it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _sentences(sentences: Sequence[str]) -> list[str]:
    return [f"  {printable(sentence)}" for sentence in sentences]


def _below(report: Report) -> list[str]:
    """The hints, or where there is none, what to do next."""
    hints = [f"hint: {hint.change} ({hint.difference:.0e})" for hint in report.hints]
    return _sentences(hints or ([f"next: {report.advice}"] if report.advice else []))


def _others(rows: Sequence[Leaf]) -> list[str]:
    return [f"... and {len(rows) - SHOWN} more leaves"] if len(rows) > SHOWN else []


def _measures(leaf: Leaf) -> list[str]:
    judged = leaf.judgement
    return [short(judged.ratio), short(judged.excess)] if judged else ["-"] * 2


def _lines(rows: Sequence[Leaf]) -> list[str]:
    steps = any(leaf.step for leaf in rows)
    head = ["leaf", "shape", "verdict", "float64 max", "rel", "ulp", "float32 max", "rel", "ulp", "64/32", "ulp test"]
    lines = [head[:1] + (["step"] if steps else []) + head[1:]]
    for leaf in rows:
        line = [printable(leaf.name), *([str(leaf.step)] if steps else []), shape_of(leaf), str(leaf.verdict)]
        for errors in (leaf.float64, leaf.float32):
            line += [short(x) for x in errors] if errors else ["-"] * 3
        lines.append(line + _measures(leaf))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [text[0], "-" * max(map(len, text)), *text[1:]]

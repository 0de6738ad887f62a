"""What `locate` found: layer by layer, and the first place where the sides differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._text import ORDER, short
from .report import Leaf, as_json
from .verdict import Verdict

_SHOWN = 60  # rows of the table; beyond, those that agree are left out


@dataclass(frozen=True)
class Layer:
    """One call of a layer, or one of the ends of the model: "(input)" and "(result)".

    `free` and `free_gradient` are of a run in which each side feeds itself. Everything else is of runs in which both
    are fed what PyTorch has there: what differs then is made there.

    Attributes:
        name: of the PyTorch layer.
        flax: the path of its twin.
        free: how far its result is from PyTorch's in the free run, by its largest entry; None if it was not seen.
        handed_over: what the steps before it give it; of several arrays the worst.
        inside: what it makes of that.
        free_gradient: as `free`, of the gradient with respect to its result.
        handed_back: the gradient that the steps behind it give it.
        inside_gradient: what it makes of that, for what it reads and for its parameters; the worst.
    """

    name: str
    flax: str
    free: float | None = None
    handed_over: Leaf | None = None
    inside: Leaf | None = None
    free_gradient: float | None = None
    handed_back: Leaf | None = None
    inside_gradient: Leaf | None = None

    @property
    def verdict(self) -> Verdict:
        """The most serious of its four."""
        leaves = (self.handed_over, self.inside, self.handed_back, self.inside_gradient)
        return worst_of([leaf.verdict for leaf in leaves if leaf is not None])


@dataclass(frozen=True)
class Location:
    """Where two models begin to differ. `print(location)` shows it; `location.verdict` is compared with `"rounding"`.

    It has no truth value: `if location:` would have to take an inconclusive comparison for one thing or the other.

    Attributes:
        verdict: semantic where any piece of the model is, else inconclusive where any is, else rounding.
        where: the first piece that is, in words: "inside `encoder.norm1`", "between `fc1` and `fc2`", "before `conv1`",
            "after `head`"; "" if the models agree. Names are PyTorch's.
        direction: "forward"; "gradient" if the values agree and only gradients differ; "" if nothing does. Backwards,
            the first piece is the one nearest to the result.
        layers: every call of a layer, in PyTorch's order.
        ends: what the model is given, and its result.
        reasons: what is to be known about the verdict, most serious first.
    """

    verdict: Verdict
    where: str
    direction: str
    layers: tuple[Layer, ...]
    ends: tuple[Layer, Layer]
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        raise TypeError("a Location has no truth value: compare location.verdict with 'rounding' (the models agree)")

    def __str__(self) -> str:
        head = f"verdict: {self.verdict}" + (f", {self.direction}: {self.where}" if self.where else "")
        rows = [self.ends[0], *self.layers, self.ends[1]]
        lines = [head, *(f"  {reason}" for reason in self.reasons)]
        shown = rows if len(rows) <= _SHOWN else _around(rows)
        return "\n".join([*lines, "", *_table(shown), *_left_out(rows, shown)])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; numbers that are not finite are strings, since JSON has none."""
        return {
            "verdict": str(self.verdict),
            "where": self.where,
            "direction": self.direction,
            "reasons": list(self.reasons),
            "layers": [_layer(row) for row in self.layers],
            "ends": [_layer(row) for row in self.ends],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    return min((Verdict.ROUNDING, *verdicts), key=ORDER.index)


def worst_leaf(leaves: Sequence[Leaf]) -> Leaf | None:
    """The first of the most serious; where all agree the one that is furthest off for its rounding errors."""

    def rank(leaf: Leaf) -> tuple[int, float]:
        agrees = leaf.verdict is Verdict.ROUNDING
        return -ORDER.index(leaf.verdict), leaf.judgement.excess if agrees and leaf.judgement else 0.0

    return max(leaves, key=rank, default=None)


def _layer(row: Layer) -> dict[str, Any]:
    return {name: as_json(getattr(row, name)) for name in row.__dataclass_fields__} | {"verdict": str(row.verdict)}


def _around(rows: list[Layer]) -> list[Layer]:
    """The ends, and what does not agree with its neighbours; the first of them if these are too many."""
    near = {i + d for i, row in enumerate(rows) if row.verdict is not Verdict.ROUNDING for d in (-1, 0, 1)}
    kept = sorted({0, 1, len(rows) - 2, *(i for i in near if 0 <= i < len(rows) - 1)})[: _SHOWN - 1]
    return [rows[i] for i in (*kept, len(rows) - 1)]


def _left_out(rows: list[Layer], shown: list[Layer]) -> list[str]:
    count = len(rows) - len(shown)
    return [f"... and {count} more calls of layers (all of them in .layers)"] if count else []


def _table(rows: Sequence[Layer]) -> list[str]:
    lines = [["layer", "flax", "free", "handed over", "inside", "free", "handed back", "inside"]]
    for row in rows:
        forward = [short(row.free), _cell(row.handed_over), _cell(row.inside)]
        lines.append(
            [
                row.name,
                row.flax,
                *forward,
                short(row.free_gradient),
                _cell(row.handed_back),
                _cell(row.inside_gradient),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(8)]
    gap = "  | "
    text = [
        gap.join(
            "  ".join(cell.ljust(w) for cell, w in zip(line[part], widths[part], strict=True))
            for part in (slice(0, 2), slice(2, 5), slice(5, 8))
        ).rstrip()
        for line in lines
    ]
    starts = sum(widths[:2]) + 2, sum(widths[2:5]) + 4
    titles = f"{'':{starts[0]}}{gap}{'value':{starts[1]}}{gap}gradient"
    return [titles, text[0], "-" * max(map(len, text)), *text[1:]]


_MARKS = {Verdict.SEMANTIC: " !", Verdict.INCONCLUSIVE: " ?", Verdict.ROUNDING: ""}


def _cell(leaf: Leaf | None) -> str:
    """The difference, by the largest entry, with a mark where it is not rounding."""
    if leaf is None:
        return "-"
    return (short(leaf.float64.relative) if leaf.float64 else "shape") + _MARKS[leaf.verdict]

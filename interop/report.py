"""What a comparison found: the verdict, the leaves, the reasons; as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._measure import Errors
from .verdict import Judgement, Verdict

_SEVERITY = (Verdict.ROUNDING, Verdict.INCONCLUSIVE, Verdict.SEMANTIC)
_SHOWN = 40  # rows of the table; the others are counted


@dataclass(frozen=True)
class Leaf:
    """One array of the results, on both sides.

    Attributes:
        name: dotted; of the JAX side for parameters that a pair carries across.
        shape: the same on both sides.
        verdict: on this leaf.
        float64, float32: the errors in each run; None where a run is missing.
        dtypes: of the float64 run, PyTorch's and JAX's.
        judgement: what the rules said; None where something else decided, which `reason` says.
        reason: why, where it is not plain agreement.
        step: of a trajectory, counted from 1; 0 without one.
    """

    name: str
    shape: tuple[int, ...]
    verdict: Verdict
    float64: Errors | None
    float32: Errors | None
    dtypes: tuple[str, str]
    judgement: Judgement | None
    reason: str = ""
    step: int = 0


@dataclass(frozen=True)
class Hint:
    """A change that makes the two sides agree: made to one of them, which was then run again.

    Attributes:
        kind: the short name of the change, such as "layer_norm_eps".
        change: a sentence: what a side does, and with what change both agree.
        difference: the largest relative difference in float64, after it, of any leaf that had differed.

    Example:
        >>> import jax, numpy as np, torch
        >>> from funcreg import interop
        >>> x = np.linspace(-3, 3, 50)
        >>> (hint,) = interop.check(torch.nn.functional.gelu, jax.nn.gelu, x).hints
        >>> print(hint.kind, hint.difference < 1e-15)
        gelu True
        >>> print(hint.change)
        PyTorch computes gelu exactly, by erf; with gelu by its approximation with tanh, both sides agree
    """

    kind: str
    change: str
    difference: float


@dataclass(frozen=True)
class Report:
    """A comparison of two sides. `print(report)` shows it; `report.verdict` is compared with `"rounding"`.

    It has no truth value: `if report:` would have to take an inconclusive comparison for one thing or the other.

    Attributes:
        verdict: semantic where any leaf is, else inconclusive where any is, else rounding.
        leaves: every leaf, of a trajectory at every step.
        reasons: what is to be known about the verdict, most serious first.
        hints: the changes that explain a semantic difference; none where none of those known does.
    """

    verdict: Verdict
    leaves: tuple[Leaf, ...]
    reasons: tuple[str, ...]
    hints: tuple[Hint, ...] = ()

    def __bool__(self) -> bool:
        raise TypeError("a Report has no truth value: compare report.verdict with 'rounding' (the sides agree)")

    def worst(self) -> list[Leaf]:
        """One leaf of each name: the first step of its most serious verdict, or where all agree its largest error."""
        chosen: dict[str, Leaf] = {}
        for leaf in self.leaves:
            seen = chosen.setdefault(leaf.name, leaf)
            order, before = _SEVERITY.index(leaf.verdict), _SEVERITY.index(seen.verdict)
            if order > before or (order == before == 0 and _relative(leaf) > _relative(seen)):
                chosen[leaf.name] = leaf
        return list(chosen.values())

    def __str__(self) -> str:
        rows = sorted(self.worst(), key=lambda leaf: -_SEVERITY.index(leaf.verdict))
        lines = [f"verdict: {self.verdict}", *(f"  {reason}" for reason in self.reasons)]
        lines += [f"  hint: {hint.change} ({hint.difference:.0e})" for hint in self.hints]
        if rows:
            lines += ["", *_table(rows[:_SHOWN])]
        if len(rows) > _SHOWN:
            lines.append(f"... and {len(rows) - _SHOWN} more leaves")
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; numbers that are not finite are strings, since JSON has none."""
        return {
            "verdict": str(self.verdict),
            "reasons": list(self.reasons),
            "hints": [_plain(hint) for hint in self.hints],
            "leaves": [_plain(leaf) for leaf in self.leaves],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def summed_up(leaves: Sequence[Leaf], reasons: Sequence[str] = (), at_least: Verdict = Verdict.ROUNDING) -> Report:
    """The report of these leaves; `reasons` about the whole come first.

    Args:
        at_least: what is known apart from the leaves: INCONCLUSIVE where they cannot be trusted.
    """
    verdict = max((at_least, *(leaf.verdict for leaf in leaves)), key=_SEVERITY.index)
    own = [
        f"{leaf.name}{f', step {leaf.step}' if leaf.step else ''}: {leaf.reason}"
        for leaf in sorted(Report(verdict, tuple(leaves), ()).worst(), key=lambda leaf: -_SEVERITY.index(leaf.verdict))
        if leaf.reason
    ]
    if len(own) > 5:
        own = [*own[:5], f"{len(own) - 5} more leaves have reasons of their own"]
    return Report(verdict, tuple(leaves), (*reasons, *own))


def _relative(leaf: Leaf) -> float:
    return leaf.float64.relative if leaf.float64 else 0.0


def _table(rows: Sequence[Leaf]) -> list[str]:
    steps = any(leaf.step for leaf in rows)
    head = ["leaf", "shape", "verdict", "float64 max", "rel", "ulp", "float32 max", "rel", "ulp", "64/32", "ulp test"]
    lines = [head[:1] + (["step"] if steps else []) + head[1:]]
    for leaf in rows:
        line = [leaf.name, *([str(leaf.step)] if steps else []), "x".join(map(str, leaf.shape)) or "-", leaf.verdict]
        for errors in (leaf.float64, leaf.float32):
            line += [_short(x) for x in errors] if errors else ["-"] * 3
        judged = leaf.judgement
        line += [_short(judged.ratio), _short(judged.excess)] if judged else ["-"] * 2
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def _short(x: float | None) -> str:
    return "-" if x is None else "0" if x == 0 else f"{x:.1e}"


def _plain(x: Any) -> Any:
    if isinstance(x, (Leaf, Hint, Judgement)):
        return {name: _plain(getattr(x, name)) for name in x.__dataclass_fields__}
    if isinstance(x, Errors):
        return _plain(x._asdict())
    if isinstance(x, Mapping):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return str(x) if isinstance(x, Verdict) else x

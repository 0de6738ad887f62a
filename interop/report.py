"""What a comparison found: the verdict, the leaves, the reasons; as text, as JSON and as a page for a browser."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _html, _text
from ._environment import environment
from ._measure import Errors
from ._text import ORDER, seriousness
from ._writing import written_whole
from .verdict import Evidence, Judgement, Verdict

_ADVICE = (
    "`interop.locate(net, flax_model, pair, *inputs)` names the first layer of two models that differs; of other "
    "functions, `interop.check` their parts, one by one; what no array shows, such as what True means in a mask, is in "
    "the notes of `print(pair)`"
)
_ADVICE_IN_TRAINING = (
    "`interop.check` the gradients of both losses; if they agree, the optimizers differ, and if not, "
    "`interop.locate(net, flax_model, pair, *inputs)` names the first layer that does"
)


@dataclass(frozen=True)
class Leaf:
    """One array of the results, on both sides.

    Attributes:
        name: dotted; of the JAX side for parameters that a pair carries across.
        shape: the same on both sides.
        verdict: on this leaf.
        float64, float32: the errors in each run, of one entry where `judgement.part` names it; None without a run.
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
        environment: versions of the libraries and the machine.
    """

    verdict: Verdict
    leaves: tuple[Leaf, ...]
    reasons: tuple[str, ...]
    hints: tuple[Hint, ...] = ()
    environment: Mapping[str, str] = field(default_factory=environment)

    def __bool__(self) -> bool:
        raise TypeError("a Report has no truth value: compare report.verdict with 'rounding' (the sides agree)")

    @property
    def advice(self) -> str:
        """What to do next about a difference that no hint explains; else ""."""
        if self.verdict is not Verdict.SEMANTIC or self.hints:
            return ""
        return _ADVICE_IN_TRAINING if any(leaf.step for leaf in self.leaves) else _ADVICE

    def worst(self) -> list[Leaf]:
        """One leaf of each name: the first step of its most serious verdict, or where all agree its largest error."""
        chosen: dict[str, Leaf] = {}
        for leaf in self.leaves:
            seen = chosen.setdefault(leaf.name, leaf)
            order, before = ORDER.index(leaf.verdict), ORDER.index(seen.verdict)
            agree = leaf.verdict is seen.verdict is Verdict.ROUNDING
            if order < before or (agree and seriousness(leaf) < seriousness(seen)):
                chosen[leaf.name] = leaf
        return list(chosen.values())

    def ranked(self) -> list[Leaf]:
        """One leaf of each name as in `worst`, the most serious verdicts first."""
        return sorted(self.worst(), key=lambda leaf: ORDER.index(leaf.verdict))

    def __str__(self) -> str:
        return _text.plain(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        """What `rich.print(report)` shows: the same in colour, with the relative errors only."""
        return _text.coloured(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; numbers that are not finite are strings, since JSON has none.

        `schema` is the version of this form: it grows when a key changes its meaning or goes.
        """
        return {
            "schema": 1,
            "verdict": str(self.verdict),
            "reasons": list(self.reasons),
            "hints": [as_json(hint) for hint in self.hints],
            "next": self.advice,
            "leaves": [as_json(leaf) for leaf in self.leaves],
            "environment": dict(self.environment),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_html(self, path: str | os.PathLike[str] | None = None, location: Any = None) -> str:
        """One page for a browser: the verdict in words, hints, reasons, errors by step and by leaf, versions.

        It needs nothing else: no script, no other file, no network. Of large reports it draws and lists the most
        serious leaves and says so.

        Args:
            path: where to write it as well; an existing file is replaced only once the page is complete.
            location: of `interop.locate`, whose finding is put beneath the verdict.

        Returns:
            The page.

        Example:
            >>> import numpy as np, torch, jax.numpy as jnp
            >>> from funcreg import interop
            >>> page = interop.check(torch.sin, jnp.sin, np.ones(3)).to_html()
            >>> "The two sides agree" in page
            True
        """
        page = _html.page(self, location)
        if path is not None:
            with written_whole("to_html", Path(path)) as part:
                part.write_text(page, encoding="utf-8")
        return page


def summed_up(leaves: Sequence[Leaf], reasons: Sequence[str] = (), at_least: Verdict = Verdict.ROUNDING) -> Report:
    """The report of these leaves; `reasons` about the whole come first.

    Args:
        at_least: what is known apart from the leaves: INCONCLUSIVE where they cannot be trusted.
    """
    verdict = min((at_least, *(leaf.verdict for leaf in leaves)), key=ORDER.index)
    own = [
        f"{leaf.name}{f', step {leaf.step}' if leaf.step else ''}: {leaf.reason}"
        for leaf in Report(verdict, tuple(leaves), ()).ranked()
        if leaf.reason
    ]
    if len(own) > 5:
        own = [*own[:5], f"{len(own) - 5} more leaves have reasons of their own"]
    return Report(verdict, tuple(leaves), (*reasons, *own))


def as_json(x: Any) -> Any:
    if isinstance(x, (Leaf, Hint, Judgement)):
        return {name: as_json(getattr(x, name)) for name in x.__dataclass_fields__}
    if isinstance(x, (Errors, Evidence)):
        return as_json(x._asdict())
    if isinstance(x, Mapping):
        return {name: as_json(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return [as_json(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return str(x) if isinstance(x, Verdict) else x

"""Penalties made of penalties: a table of globs, and the distance from an anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import _selectors
from ._checks import check_domain
from ._penalty import AnyPenalty, Part, Penalty
from ._selectors import Selector
from ._trees import leaves_by_name


def layerwise(rows: Mapping[str, AnyPenalty | None]) -> AnyPenalty:
    """One penalty per row of a table of globs; the first row that matches a leaf wins.

    Args:
        rows: glob -> penalty, or None for leaves without one. In `{"head.weight": fr.l1(1e-3), "*": fr.l2(1e-4)}` the
            head gets l1 and no l2.

    Returns:
        The penalty. Using it raises ValueError for a leaf in no row, for a row that matches nothing, and for one whose
        leaves are all taken by earlier rows; `"*"`, the rest, may be left with none.

    Raises:
        TypeError: a row is no penalty and not None, or every row is None.
    """
    if not isinstance(rows, Mapping):
        raise TypeError(f"layerwise: rows must be a dict of globs and penalties, got {rows!r}")
    globs = tuple(rows)
    parts: list[Part] = []
    for i, (glob, penalty) in enumerate(rows.items()):
        _selectors.check_glob(glob, "layerwise")
        if glob.startswith("!"):
            raise TypeError(f"layerwise: a row cannot exclude, got {glob!r}; put a row with None above the others")
        if not (penalty is None or isinstance(penalty, Penalty)):
            raise TypeError(f"layerwise: row {glob!r} must be a penalty or None, got {penalty!r}")
        for part in penalty.parts if penalty is not None else ():
            parts.append(replace(part, selectors=(*part.selectors, Selector(rows=globs, row=i))))
    first = next((penalty for penalty in rows.values() if penalty is not None), None)
    if first is None:
        raise TypeError(f"layerwise: at least one row must be a penalty, got {dict(rows)!r}")
    total = first._with(*parts)
    for penalty in rows.values():
        if penalty is not None and type(penalty) is not type(total):
            raise TypeError("layerwise: a penalty of the torch wing and one of the JAX wing in one table")
    return total


def anchored(penalty: AnyPenalty, anchor: Any, importance: Any = None) -> AnyPenalty:
    r"""The penalty of the distance from an anchor: fine-tuning that stays near a predefined state.

    .. math::
        \Omega(w) = R(w - a), \qquad
        \Omega(w) = \sum_i F_i\, r(w_i - a_i) \;\text{ with importance } F

    With `l2` this is L2-SP, with the Fisher information as importance EWC (with the factor 1/2 of the paper), and with
    the round's starting point FedProx.

    Args:
        penalty: what to shift.
        anchor: `a`, a tree with the leaves that the penalty selects; copied, so that training in place does not
            move it.
        importance: `F >= 0`, a tree like `anchor` with leaves that are scalars or shaped like the parameter; for
            penalties that are sums over coordinates (l1, l2).

    Returns:
        The shifted penalty. Quadratic parts still merge in the prox of a sum, others do not.

    Raises:
        ValueError: a negative or infinite importance.
        TypeError: not a penalty, an anchor twice, or an importance for a penalty that is no sum over coordinates.

    Reference:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", 2018,
        arXiv:1802.01483; Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017,
        arXiv:1612.00796.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"anchored: penalty must be a penalty such as l2(1e-3), got {type(penalty).__name__}")
    if anchor is None:
        raise TypeError("anchored: anchor must be a tree like the parameters, got None")
    parts = []
    for part in penalty.parts:
        if part.anchor is not None:
            raise TypeError(f"anchored: {part.rule.name} has an anchor already")
        if importance is not None and not (part.rule.linear and part.rule.separable):
            raise TypeError(
                f"anchored: importance needs a penalty that is a sum over coordinates (l1, l2), got {part.rule.name}"
            )
        parts.append(part)
    wing = penalty.wing
    # by name: what is no array stays behind, and every transform takes the rest
    anchor = wing.own(leaves_by_name(wing, "anchor", anchor))
    if importance is not None:
        importance = wing.own(leaves_by_name(wing, "importance", importance))
        for name, factor in importance.items():
            check_domain(wing, f"anchored: importance of the leaf {name!r}", factor)
    parts = [replace(part, anchor=anchor, importance=importance) for part in parts]
    return penalty._with(*parts)

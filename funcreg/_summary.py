"""What a penalty finds in the parameters, leaf by leaf: a table for a person."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ._penalty import Penalty
from ._selectors import nearest


class Row(NamedTuple):
    """One leaf: the penalty's value on it, its exact zeros, and its groups that are zero as a whole.

    `summary` says what the fields are.
    """

    name: str
    size: int
    value: float
    zeros: int
    groups: int | None
    dead_groups: int | None
    parts: str


@dataclass(frozen=True)
class Summary:
    """The rows of `summary`; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        header = ("leaf", "size", "value", "zeros", "dead groups", "penalty")
        lines = [header] + [_line(row) for row in self.rows] + [_line(self.total)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                c.ljust(w) if i in (0, 5) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        return "\n".join(line.rstrip() for line in [text[0], rule, *text[1:-1], rule, text[-1]])

    __repr__ = __str__

    def __getitem__(self, name: str) -> Row:
        """The row of a leaf, by its name."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise KeyError(f"summary: no leaf {name!r}; nearest names: {nearest(name, list(rows))}")
        return rows[name]

    @property
    def total(self) -> Row:
        """The sum of the rows."""
        grouped = [row for row in self.rows if row.groups is not None]
        return Row(
            "total",
            sum(row.size for row in self.rows),
            sum(row.value for row in self.rows),
            sum(row.zeros for row in self.rows),
            sum(row.groups or 0 for row in grouped) if grouped else None,
            sum(row.dead_groups or 0 for row in grouped) if grouped else None,
            "",
        )


def _line(row: Row) -> tuple[str, ...]:
    share = f"{row.zeros} ({row.zeros / row.size:.1%})" if row.size else "0"
    dead = "-" if row.groups is None else f"{row.dead_groups} of {row.groups}"
    return (row.name, str(row.size), f"{row.value:.6g}", share, dead, row.parts)


def summary(penalty: Penalty, params: Any) -> Summary:
    """The penalty's value, the exact zeros and the dead groups of every leaf; prints as a table.

    Args:
        penalty: the penalty.
        params: a tree of parameters; concrete, since the numbers are fetched.

    Returns:
        A record of rows, one for each leaf the penalty could act on, with their sum in `.total`; `summary["a.weight"]`
        is the row of one leaf. A row is a named tuple:

        * `name`: dotted name of the leaf;
        * `size`: number of its entries;
        * `value`: of the penalty on it, strengths included, in the units of the loss;
        * `zeros`: number of entries that are exactly 0;
        * `groups`, `dead_groups`: number of the groups of the leaf's first group lasso, and of those that are all exact
          zeros; None where no part groups the leaf;
        * `parts`: the names of the penalties on it, joined by ` + `; `-` where there is none.

    Raises:
        TypeError: `penalty` is no penalty.
        ValueError: a selector that matches nothing.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"summary: penalty must be a penalty such as l1(1e-3), got {type(penalty).__name__}")
    wing = penalty.wing
    flat, bound = penalty.bind(params)
    rows = []
    for name, leaf, parts in zip(flat.names, flat.leaves, bound, strict=True):
        x = wing.as_numpy(leaf)
        value = sum(float(wing.as_numpy(part.value(wing.upcast(leaf)))) for part in parts)
        grouped = [part for part in parts if part.rule.merges == "group"]
        groups = dead = None
        if grouped:
            zero = np.all(x == 0, axis=tuple(grouped[0].resolved[0]))
            groups, dead = zero.size, int(zero.sum())
        text = " + ".join(dict.fromkeys(part.rule.name for part in parts)) or "-"
        rows.append(Row(name, x.size, value, int((x == 0).sum()), groups, dead, text))
    return Summary(tuple(rows))

"""Two arrays of one shape, entry by entry: how far apart they are, and what cannot be compared."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ._orders import ORDERS, Table, enter, orders, table

Array = np.ndarray
BLOCK = 1 << 16  # entries: what is computed of them stays in the cache


class Errors(NamedTuple):
    """The largest differences over the entries that are finite on both sides.

    Attributes:
        absolute: `max |a - b|`.
        relative: that by the largest entry of the leaf on either side, not entry by entry: an entry that is 0 up to
            rounding has no relative error of its own.
        ulp: `max |a - b| / ulp(max(|a|, |b|))`, entry by entry, in the spacing of the precision of the run.
    """

    absolute: float
    relative: float
    ulp: float


@dataclass
class Differences:
    """`|a - b|` by the order of the larger of the two, where both are finite and neither is exactly zero.

    A number that is zero on one side only is no measure of its own error: a factor of it may have been too small for
    its side, or a sum have cancelled. It counts by what it is to the whole.

    Attributes:
        largest: by order.
        where: by order, the entry at which it is, as a flat index.
        sizes: by order, the larger of the two there.
    """

    largest: Table = field(default_factory=table)
    where: np.ndarray = field(default_factory=lambda: np.zeros(ORDERS, np.intp))
    sizes: Table = field(default_factory=table)

    def note(self, start: int, order: Array, values: Array, sizes: Array) -> None:
        enter(self.largest, order, values)
        hit = np.flatnonzero(values == self.largest[order])
        self.where[order[hit]], self.sizes[order[hit]] = start + hit, sizes[hit]


class Comparison(NamedTuple):
    """What two arrays have in common.

    Attributes:
        errors: of the entries that are compared.
        size: their largest absolute value on either side.
        compared: which entries are finite on both sides.
        alike: which are the same infinity or NaN on both sides.
        apart: all others: finite on one side only, or different infinities.
        orders: of the entries, where asked for: of the larger of the two; 0 where they are not to be told by order.
        differences: by order, where asked for.
    """

    errors: Errors
    size: float
    compared: Array
    alike: Array
    apart: Array
    orders: Array | None = None
    differences: Differences | None = None


def compare(a: Array, b: Array, by_order: bool = False, known: Array | None = None) -> Comparison:
    """Compare two arrays of one shape; `by_order` also by the order of the entries, or by a `known` one.

    Integers and bools are compared as numbers, and count ulps as float64 does: different ones differ by 1 at least,
    also beyond 2**53, where float64 does not hold all of them.
    """
    shape, size = a.shape, 0.0
    spacing = np.dtype(np.float32 if np.result_type(a, b) in (np.float32, np.complex64) else np.float64)
    both, alike, apart = (np.zeros(a.size, bool) for _ in range(3))
    order = np.zeros(a.size, np.int16) if by_order and known is None else known
    differences = Differences() if by_order else None
    absolute = ulp = 0.0
    if a.dtype.kind in "biu" and b.dtype.kind in "biu" and bool((a != b).any()):
        absolute = 1.0
    for at, x, y in _blocks(a, b):
        with np.errstate(over="ignore", invalid="ignore"):  # huge numbers of opposite signs: infinitely apart
            difference, sizes = np.abs(x - y), np.maximum(np.abs(x), np.abs(y))
        finite = np.isfinite(x) & np.isfinite(y)
        both[at] = finite
        if not finite.all():
            alike[at] = ~finite & ((x == y) | (np.isnan(x) & np.isnan(y)))
            apart[at] = ~finite & ~alike[at]
        if differences is not None and order is not None:
            if known is None:
                order[at] = np.where(finite & (x != 0) & (y != 0), orders(sizes), 0)
            shown = np.where(finite, difference, 0.0)
            differences.note(at.start, order[at].astype(np.intp), shown, sizes)
        if not finite.all():
            difference, sizes = difference[finite], sizes[finite]
        if difference.size:
            one = np.spacing(np.minimum(sizes, np.finfo(spacing).max).astype(spacing)).astype(np.float64)
            absolute, size = max(absolute, float(difference.max())), max(size, float(sizes.max()))
            ulp = max(ulp, float((difference / one).max()))
    relative = absolute / size if size else 0.0
    both, alike, apart = (mask.reshape(shape) for mask in (both, alike, apart))
    return Comparison(Errors(absolute, relative, ulp), size, both, alike, apart, order, differences)


def movement(a: Array, b: Array, into: Table) -> bool:
    """Enters `|a - b|` by the order of `a`, where both are finite; whether elsewhere they are not alike."""
    apart = False
    for _, x, y in _blocks(a, b):
        with np.errstate(over="ignore", invalid="ignore"):
            moved, sizes = np.abs(x - y), np.abs(x)
        if not np.isfinite(moved).all():  # seldom: which entries are finite has to be looked at
            finite = np.isfinite(x) & np.isfinite(y)
            apart = apart or bool((~finite & (x != y) & ~(np.isnan(x) & np.isnan(y))).any())
            moved, sizes = moved[finite], sizes[finite]
        enter(into, orders(sizes), moved)
    return apart


def is_whole(x: Array) -> bool:
    """Integers or bools, or floats that are such numbers, and small enough not to be so by necessity."""
    if x.dtype.kind in "biu":
        return True
    if x.dtype.kind == "c":
        return False
    return all(bool(((part == np.rint(part)) & (np.abs(part) < 2.0**50)).all()) for _, part in _blocks(x))


def same_bits(a: Array, b: Array) -> bool:
    """Equal shapes, dtypes and values; NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _blocks(*arrays: Array) -> Iterator[Any]:
    """Where we are, and that part of each array as float64: a leaf may be a whole model, and its copies many."""
    flat = [x.reshape(-1) for x in arrays]
    for start in range(0, flat[0].size, BLOCK):
        at = slice(start, start + BLOCK)
        yield at, *(x[at].astype(np.complex128 if x.dtype.kind == "c" else np.float64) for x in flat)

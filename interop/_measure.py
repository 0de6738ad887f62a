"""Two arrays of one shape, entry by entry: how far apart they are, and what cannot be compared."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


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


class Comparison(NamedTuple):
    """What two arrays have in common.

    Attributes:
        errors: of the entries that are compared.
        size: their largest absolute value on either side.
        compared: which entries are finite on both sides.
        alike: which are the same infinity or NaN on both sides.
        apart: all others: finite on one side only, or different infinities.
    """

    errors: Errors
    size: float
    compared: Array
    alike: Array
    apart: Array


def compare(a: Array, b: Array, within: Array | None = None) -> Comparison:
    """Compare two arrays of one shape, over the entries where `within` is true (everywhere without).

    Integers and bools are compared as numbers, exactly up to 2**53, and count ulps as float64 does.
    """
    spacing = np.float32 if np.result_type(a, b) in (np.float32, np.complex64) else np.float64
    a, b = _wide(a), _wide(b)
    both = np.isfinite(a) & np.isfinite(b)
    alike = ~both & ((a == b) | (np.isnan(a) & np.isnan(b)))
    apart = ~both & ~alike
    if within is not None:
        both, alike, apart = both & within, alike & within, apart & within
    x, y = a[both], b[both]
    if not x.size:
        return Comparison(Errors(0.0, 0.0, 0.0), 0.0, both, alike, apart)
    with np.errstate(over="ignore"):  # two huge numbers of opposite signs: infinitely apart
        difference = np.abs(x - y)
    sizes = np.maximum(np.abs(x), np.abs(y))
    size, absolute = float(sizes.max()), float(difference.max())
    relative = absolute / size if size else 0.0
    one = np.spacing(np.minimum(sizes, np.finfo(spacing).max).astype(spacing)).astype(np.float64)
    return Comparison(Errors(absolute, relative, float((difference / one).max())), size, both, alike, apart)


def largest_difference(a: Array, b: Array, within: Array) -> float:
    """`max |a - b|` over the entries of `within` that are finite on both sides."""
    return compare(a, b, within).errors.absolute


def same_bits(a: Array, b: Array) -> bool:
    """Equal shapes, dtypes and values; NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _wide(x: Array) -> Array:
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)

"""Other inputs of the same kind: on those that were given, two different changes may come to the same numbers.

Moved numbers keep their signs, zeros, ties and opposites, as `_nudge` does, since a kink that the inputs excite must
stay excited. What holds only zeros and ones is a mask, and stays.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .._trees import rebuild

Tree = Any
_MIX = np.uint64(0xD6E8FEB86659FD93)


def mild(tree: Tree) -> Tree:
    """Floats moved by up to one percent; most constraints of inputs, such as probabilities, survive that."""
    return _each(tree, lambda x: _moved(x, lambda unit: 1 + 0.01 * (unit - 1)))


def strong(tree: Tree) -> Tree:
    """Floats moved by factors from 1/2 to 2, integers taken from the row before."""

    def convert(x: np.ndarray) -> np.ndarray:
        if x.dtype.kind in "iu" and x.ndim:
            return np.roll(x, 1, 0)
        return _moved(x, lambda unit: 2.0 ** (2 * unit - 1))

    return _each(tree, convert)


def lengths(tree: Tree) -> Iterator[int]:
    """The different lengths of first axes, any of which may be that of the batch."""
    found: dict[int, None] = {}
    _each(tree, lambda x: found.setdefault(x.shape[0]) if x.ndim else None)
    yield from found


def longer(tree: Tree, length: int) -> Tree:
    """Arrays of this many rows with as many again, moved: a factor that stays is none of the number of rows."""

    def convert(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, mild(x)]) if x.ndim and x.shape[0] == length else x

    return _each(tree, convert)


def _each(tree: Tree, convert: Callable[[np.ndarray], Any]) -> Tree:
    return rebuild("hints", tree, lambda name, x: convert(np.asarray(x)))


def _moved(x: np.ndarray, factor: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    if x.dtype.kind == "c":
        return x * factor(np.asarray(0.7))
    if x.dtype.kind != "f" or np.isin(x, (0, 1)).all():
        return x
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):  # hashing wraps around
        bits = np.abs(wide).view(np.uint64)
        hashed = (bits ^ (bits >> np.uint64(32))) * _MIX
    unit = (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.where(np.isfinite(wide), wide * factor(unit), wide)

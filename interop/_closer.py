"""A second look at leaves on which measures of the whole do not settle the matter: entry by entry.

Where one entry of a leaf is badly conditioned, what an ulp does to it hides a fault in all others of its size. Each
entry is therefore held against what happens to that entry alone. One draw of moved inputs may leave an entry where it
is by accident, and among a million some will be; so entries are suspects, and every further run of a side releases
those that it moves by as much as the sides differ. A fault is what no run has released.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._leaves import Leaves
from ._orders import orders
from ._sides import Side
from .verdict import (
    EPS64,
    EXCESS_SEMANTIC,
    LOST32,
    PART_DRIFT,
    RATIO_ROUNDING,
    RESOLVED32,
    TINY32,
    Evidence,
)

DRAWS = range(2, 10)  # of `nudge`: others than those that the leaf as a whole was judged by
MOST = 2**20  # suspects of one leaf; of more, as many at even distances


@dataclass
class Suspects:
    """Entries of one leaf, and what is known of each.

    Attributes:
        at: flat indices.
        ours, theirs: the results in float64.
        difference, size: of the two, and the larger of them.
        noise: the most that either has moved by.
        difference32, drift: in float32, and from float64 to it.
    """

    at: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray
    difference: np.ndarray
    size: np.ndarray
    noise: np.ndarray
    difference32: np.ndarray
    drift: np.ndarray

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> "Suspects":
        """Those that differ by more than an ulp of the entry itself could explain."""
        a, b = ours.reshape(-1), theirs.reshape(-1)
        with np.errstate(all="ignore"):
            difference, size = np.abs(a - b), np.maximum(np.abs(a), np.abs(b))
            suspect = (difference > EXCESS_SEMANTIC * EPS64 * size) & np.isfinite(difference)
        at = np.flatnonzero(suspect & (a != 0) & (b != 0) & (orders(size) > 0))
        at = at[:: 1 + at.size // MOST]
        unknown = np.zeros(at.size)
        return cls(at, a[at], b[at], difference[at], size[at], unknown, unknown, unknown)

    def keep(self, these: np.ndarray) -> None:
        for name, x in vars(self).items():
            setattr(self, name, x[these])

    def in_float32(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Release those that float32 explains, or has no digits of."""
        a, b = ours.reshape(-1)[self.at], theirs.reshape(-1)[self.at]
        with np.errstate(all="ignore"):
            self.drift = np.maximum(np.abs(a - self.ours), np.abs(b - self.theirs))
            self.difference32 = np.abs(a.astype(self.ours.dtype) - b)
            known = (self.drift <= LOST32 * self.size) & (self.difference > PART_DRIFT * 2.0**-29 * self.drift)
            shrinks = self.difference <= RATIO_ROUNDING * np.maximum(self.difference32, RESOLVED32 * self.size)
        self.keep((self.size < TINY32) | (known & ~shrinks))

    def moved(self, before: np.ndarray, after: np.ndarray) -> None:
        """Release those that one side has moved by as much as the sides differ, or a part of it."""
        with np.errstate(all="ignore"):
            self.noise = np.maximum(self.noise, np.abs(after.reshape(-1)[self.at] - before))
            self.keep(self.difference > EXCESS_SEMANTIC * self.noise)

    def worst(self) -> Evidence | None:
        if not self.at.size:
            return None
        i = int(np.argmax(self.difference / self.size))
        size = float(self.size[i])
        evidence = Evidence(size, float(self.difference[i]), float(self.noise[i]), at=int(self.at[i]))
        if size < TINY32:
            return evidence
        return evidence._replace(size32=size, difference32=float(self.difference32[i]), drift32=float(self.drift[i]))


Functions = tuple[Callable[..., Any], Callable[..., Any]]


def closer(
    sides: tuple[Side, Side], functions: Functions, inputs: tuple[Any, ...], names: Iterable[str]
) -> dict[str, Evidence | None]:
    """Of each of these leaves the entry that no run explains, if there is one; nothing where a run fails."""

    def call(i: int, bits: int, draw: int | None = None) -> Leaves:
        found = sides[i].call(functions[i], inputs, bits, draw)
        if isinstance(found, Exception):
            raise found
        return {name: found[name] for name in names}

    try:
        ours, theirs = call(0, 64), call(1, 64)
        suspects = {name: Suspects.of(ours.pop(name), theirs.pop(name)) for name in names}
        ours, theirs = call(0, 32), call(1, 32)
        for name, of in suspects.items():
            of.in_float32(ours.pop(name), theirs.pop(name))
        for draw in DRAWS:
            for i in range(2):
                if any(of.at.size for of in suspects.values()):
                    moved = call(i, 64, draw)
                    for name, of in suspects.items():
                        of.moved(of.theirs if i else of.ours, moved.pop(name))
    except Exception:  # what raises beside its inputs shows nothing
        return {}
    return {name: of.worst() for name, of in suspects.items()}

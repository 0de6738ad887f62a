"""A second look at leaves on which measures of the whole do not settle the matter: entry by entry.

Where one entry of a leaf is badly conditioned, what an ulp does to it hides a fault in all others of its size. Each
entry is therefore held against what happens to that entry alone. One draw of moved inputs may leave an entry where it
is by accident, and among a million some will be; so entries are suspects, and every further run of a side releases
those that it moves by as much as the sides differ, or by a part of it. A fault is what no run has released.

Where whole numbers differ, the suspects are those that differ, and are released where one side alone jumps as far from
float64 to float32: a fault does not come and go with the precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ._leaves import Leaves
from ._orders import orders
from ._sides import Side
from .verdict import (
    EPS64,
    EXCESS_SEMANTIC,
    JUMP,
    LOST32,
    PART_DRIFT,
    RATIO_ROUNDING,
    RESOLVED32,
    TINY32,
    Evidence,
)

DRAWS = range(2, 10)  # of `nudge`: others than those that the leaf as a whole was judged by
MOST = 2**20  # suspects of one leaf; of more, as many at even distances
STAY = 0.5  # the share of the suspects among whole numbers that has to stay, for a fault


class Closer(NamedTuple):
    """What a second look at a leaf has shown.

    Attributes:
        parts: the entry that no run explains, if there is one.
        jumps: whether whole numbers differ where they jump.
    """

    parts: tuple[Evidence, ...] = ()
    jumps: bool = False


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
    def of(cls, ours: np.ndarray, theirs: np.ndarray, whole: bool) -> "Suspects":
        """Those that differ by more than an ulp of the entry could explain, or of whole numbers all that differ."""
        wide = np.complex128 if "c" in (ours.dtype.kind, theirs.dtype.kind) else np.float64
        a, b = (x.reshape(-1).astype(wide, copy=False) for x in (ours, theirs))
        with np.errstate(all="ignore"):
            difference, size = np.abs(a - b), np.maximum(np.abs(a), np.abs(b))
            if whole:
                suspect = difference > 0
            else:
                suspect = (difference > EXCESS_SEMANTIC * EPS64 * size) & (a != 0) & (b != 0) & (orders(size) > 0)
        at = np.flatnonzero(suspect & np.isfinite(difference))
        at = at[:: 1 + at.size // MOST]
        unknown = np.zeros(at.size)
        return cls(at, a[at], b[at], difference[at], size[at], unknown, unknown, unknown)

    def keep(self, these: np.ndarray) -> None:
        for name, x in vars(self).items():
            setattr(self, name, x[these])

    def in_float32(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Take in both results in float32."""
        a, b = (x.reshape(-1)[self.at].astype(self.ours.dtype) for x in (ours, theirs))
        with np.errstate(all="ignore"):
            self.drift = np.maximum(np.abs(a - self.ours), np.abs(b - self.theirs))
            self.difference32 = np.abs(a - b)

    def release_rounded(self) -> None:
        """Release those that float32 explains, or has no digits of."""
        known = (self.drift <= LOST32 * self.size) & (self.difference > PART_DRIFT * 2.0**-29 * self.drift)
        shrinks = self.difference <= RATIO_ROUNDING * np.maximum(self.difference32, RESOLVED32 * self.size)
        self.keep((self.size < TINY32) | (known & ~shrinks))

    def are_jumps(self) -> bool:
        """Whether most of these whole numbers jump from float64 to float32 as they do between the sides."""
        jumps = (self.difference <= JUMP * self.drift) & (self.drift <= JUMP * self.difference)
        return bool(self.at.size) and bool((~jumps).mean() < STAY)

    def moved(self, before: np.ndarray, after: np.ndarray) -> None:
        """Release those that one side has moved by as much as the sides differ, or a part of it."""
        with np.errstate(all="ignore"):
            self.noise = np.maximum(self.noise, np.abs(after.reshape(-1)[self.at] - before))
            self.keep(self.difference > EXCESS_SEMANTIC * self.noise)

    def worst(self) -> tuple[Evidence, ...]:
        if not self.at.size:
            return ()
        i = int(np.argmax(self.difference / self.size))
        size = float(self.size[i])
        evidence = Evidence(size, float(self.difference[i]), float(self.noise[i]), at=int(self.at[i]))
        if size >= TINY32:
            more = {"difference32": float(self.difference32[i]), "drift32": float(self.drift[i])}
            evidence = evidence._replace(size32=size, **more)
        return (evidence,)


Functions = tuple[Callable[..., Any], Callable[..., Any]]


def closer(
    sides: tuple[Side, Side], functions: Functions, inputs: tuple[Any, ...], names: Mapping[str, bool]
) -> dict[str, Closer]:
    """A second look at the leaves of these names, and whether they hold whole numbers; none where a run fails."""

    def call(i: int, bits: int, draw: int | None = None) -> Leaves:
        found = sides[i].call(functions[i], inputs, bits, draw)
        if isinstance(found, Exception):
            raise found
        return {name: found[name] for name in names}

    try:
        ours, theirs = call(0, 64), call(1, 64)
        suspects = {name: Suspects.of(ours.pop(name), theirs.pop(name), whole) for name, whole in names.items()}
        ours, theirs = call(0, 32), call(1, 32)
        for name, of in suspects.items():
            of.in_float32(ours.pop(name), theirs.pop(name))
        seen = {name: Closer(jumps=of.are_jumps()) for name, of in suspects.items() if names[name]}
        others = {name: of for name, of in suspects.items() if not names[name]}
        for of in others.values():
            of.release_rounded()
        for draw in DRAWS:
            for i in range(2):
                if any(of.at.size for of in others.values()):
                    after = call(i, 64, draw)
                    for name, of in others.items():
                        of.moved(of.theirs if i else of.ours, after[name])
    except Exception:  # what raises beside its inputs shows nothing
        return {}
    return {**seen, **{name: Closer(of.worst()) for name, of in others.items()}}

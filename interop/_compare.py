"""The leaves of the results: what each side shows of its own, how far both are apart, and the verdict on each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ._coarse import Seen, is_coarse, resolution
from ._leaves import Leaves, same_names
from ._measure import Comparison, Errors, compare, movement, same_bits
from .report import Leaf
from .verdict import Evidence, Verdict, judge

# A difference in float64 of up to so many roundings of the lower precision that a side computes in is put down to it.
COARSE = 4.0

# Two calls with the same inputs that differ by more than this, relative to the leaf, are not one function: what is
# summed in another order each time (atomics of a GPU) stays far below, noise of dropout far above.
RANDOM = 1e-9


NOTHING = "no entry is finite on either side: there is nothing to compare"


@dataclass
class Results:
    """What one side returned, and what is known of it by itself.

    Attributes:
        side: its name.
        float64, float32: the results; None where the run failed, or once they have been compared.
        dtypes: of the float64 results.
        noise: by leaf, the most that the float64 results move when the inputs move by an ulp.
        drift: by leaf, how far float32 is from float64 where both are finite.
        unstable: leaves whose finite entries do not stay the same then.
        coarse: what it computes in a lower precision also in float64.
        random: leaves that two calls with the same inputs do not agree on.
    """

    side: str
    float64: Leaves | None = None
    float32: Leaves | None = None
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)
    unstable: set[str] = field(default_factory=set)
    random: set[str] = field(default_factory=set)
    coarse: Seen = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.float64 is not None:
            self.keep(self.float64)
        self.drifted()

    def keep(self, leaves: Leaves) -> None:
        """Take in the float64 results, with which the others are compared."""
        self.float64 = leaves
        self.dtypes = {name: x.dtype for name, x in leaves.items()}

    def moved(self, leaves: Leaves) -> None:
        """Take in the float64 results of inputs that were moved by an ulp."""
        for name, x in (self.float64 or {}).items():
            by, apart = movement(x, leaves[name])
            self.noise[name] = max(self.noise.get(name, 0.0), by)
            if apart:
                self.unstable.add(name)

    def repeated(self, leaves: Leaves) -> None:
        """Take in the float64 results of a second call with the same inputs."""
        for name, x in (self.float64 or {}).items():
            if name not in leaves or leaves[name].shape != x.shape:
                self.random.add(name)
            elif not same_bits(x, leaves[name]):
                found = compare(x, leaves[name])
                self.noise[name] = max(self.noise.get(name, 0.0), found.errors.absolute)
                if found.apart.any() or found.errors.relative > RANDOM:
                    self.random.add(name)

    def drifted(self) -> None:
        """Compare the float32 results with the float64 ones."""
        for name, x in (self.float64 or {}).items():
            if self.float32 is not None and name in self.float32 and self.float32[name].shape == x.shape:
                self.drift[name] = movement(x, self.float32[name])[0]


class Found(NamedTuple):
    """One leaf of both sides, in one precision.

    Attributes:
        shape, dtypes: the latter PyTorch's and JAX's.
        errors, size: as in `Comparison`.
        compared, alike: how many entries there are of each.
        apart: about those that are not finite on both sides in the same way; empty where there is none.
    """

    shape: tuple[int, ...]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    errors: Errors
    size: float
    compared: int
    alike: int
    apart: str


def found_in(where: str, ours: Leaves | None, theirs: Leaves | None) -> dict[str, Found]:
    """Every leaf of both sides, in the order of JAX's; none without a run of both. `ours` is empty afterwards."""
    if ours is None or theirs is None:
        return {}
    same_names(where, ours, theirs)
    return {name: found_of(ours.pop(name), x) for name, x in theirs.items()}


def found_of(a: np.ndarray, b: np.ndarray) -> Found:
    """One leaf of both sides."""
    both = compare(a, b)
    apart = _apart(both, a, b) if both.apart.any() else ""
    counts = int(both.compared.sum()), int(both.alike.sum())
    return Found(a.shape, (a.dtype, b.dtype), both.errors, both.size, *counts, apart)


def leaf_of(name: str, ours: Results, theirs: Results, step: int = 0) -> Leaf:
    """The leaf of this name, of results that are still there, judged."""
    runs = (ours.float64, theirs.float64), (ours.float32, theirs.float32)
    return judged(name, ours, theirs, *(found_of(a[name], b[name]) if a and b else None for a, b in runs), step=step)


def judged(name: str, ours: Results, theirs: Results, in64: Found | None, in32: Found | None, step: int = 0) -> Leaf:
    """The leaf of this name, judged."""
    sides = (ours, theirs)
    have = in64 or in32
    assert have is not None
    verdict, judgement, reasons = Verdict.INCONCLUSIVE, None, []
    if in64 is None:
        reasons.append("there is no float64 run of both sides, without which rounding cannot be told from a fault")
    elif in64.apart:
        unstable = any(name in side.unstable for side in sides)
        verdict = Verdict.INCONCLUSIVE if unstable else Verdict.SEMANTIC
        reasons.append(in64.apart + (", and which they are changes with an ulp in the inputs" * unstable))
    elif not in64.compared and math.prod(in64.shape):
        reasons.append(NOTHING)
    else:
        drift = max(side.drift.get(name, 0.0) for side in sides) if in32 is not None else None
        judgement = judge(
            Evidence(
                in64.size,
                in64.errors.absolute,
                max(side.noise.get(name, 0.0) for side in sides),
                size32=in32.size if in32 else None,
                difference32=in32.errors.absolute if in32 else None,
                drift32=drift,
                exact=all(_kind(dtype) in ("bool", "integer") for dtype in in64.dtypes),
            )
        )
        verdict = judgement.verdict
        coarse = [side for side in sides if side.coarse]
        if verdict is Verdict.SEMANTIC and coarse:
            resolved = max(in64.size * resolution(dtype) for side in coarse for dtype in side.coarse)
            if in64.errors.absolute <= COARSE * max(drift or 0.0, resolved):
                verdict = Verdict.INCONCLUSIVE
                reasons.append(_explained(coarse))
        reasons += [judgement.reason] if judgement.reason else []
        if in32 is None and verdict is Verdict.ROUNDING:
            verdict = Verdict.INCONCLUSIVE
            reasons.append("there is no float32 run of both sides; in float64 they agree")
        if in32 is not None and in32.apart and verdict is Verdict.ROUNDING:
            verdict = Verdict.INCONCLUSIVE
            reasons.append(f"float64 agrees, but in float32 {in32.apart}")
        if in64.alike:
            reasons.append(
                f"{in64.alike} of {math.prod(in64.shape)} entries are the same infinity or NaN on both sides; the "
                "verdict is on the others"
            )
    narrowed = [f"{s.side} ({s.dtypes[name]})" for s in sides if name in s.dtypes and is_coarse(s.dtypes[name])]
    if narrowed:
        verdict = Verdict.INCONCLUSIVE
        reasons = [
            f"in the float64 run the result of {' and of '.join(narrowed)} is of a lower precision: a dtype is "
            "hard-coded there; without it the sides can be compared"
            + (f" (they differ by {in64.errors.relative:.1e} of the leaf)" if in64 else "")
        ]
    if in64 is not None and len({_kind(dtype) for dtype in have.dtypes}) == 2:
        reasons.append(
            f"the dtypes differ in kind: {have.dtypes[0]} on the PyTorch side, {have.dtypes[1]} on the JAX side"
        )
    random = [side.side for side in sides if name in side.random]
    if random:
        verdict = Verdict.INCONCLUSIVE
        reasons = [f"two calls of the {' and of the '.join(random)} side with the same inputs differ"]
    dtypes = (str(have.dtypes[0]), str(have.dtypes[1]))
    errors64, errors32 = in64 and in64.errors, in32 and in32.errors
    return Leaf(name, have.shape, verdict, errors64, errors32, dtypes, judgement, "; ".join(reasons), step)


def _explained(sides: Sequence[Results]) -> str:
    found = [f"{side.side} computes in {dtype} ({by})" for side in sides for dtype, by in side.coarse.items()]
    return (
        f"{' and '.join(found)} also in the float64 run, which accounts for a difference of this size: a hard-coded "
        "dtype, or arrays that the function closes over (pass parameters as inputs)"
        + "; of flax, nnx.Embed and nnx.MultiHeadAttention do so by themselves, interop.locate runs them in float64"
        * any(side.side == "JAX" for side in sides)
    )


def _kind(dtype: np.dtype[Any]) -> str:
    return {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}.get(dtype.kind, "float")


def _apart(found: Comparison, ours: np.ndarray, theirs: np.ndarray) -> str:
    where = found.apart
    counts = " and ".join(
        f"{side} has {np.isnan(wide).sum()} NaN, {np.isinf(wide).sum()} infinite"
        for side, x in (("PyTorch", ours), ("JAX", theirs))
        for wide in [x[where].astype(np.complex128)]
    )
    return f"{where.sum()} of {where.size} entries are not finite on both sides in the same way: there {counts}"

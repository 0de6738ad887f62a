"""One leaf of the results on both sides, in both precisions, judged."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ._coarse import Seen, is_coarse, resolution
from ._leaves import Leaves
from ._measure import Comparison, compare, largest_difference, same_bits
from .report import Leaf
from .verdict import Evidence, Verdict, judge

# A difference in float64 of up to so many roundings of the lower precision that a side computes in is put down to it.
COARSE = 4.0

# Two calls with the same inputs that differ by more than this, relative to the leaf, are not one function: what is
# summed in another order each time (atomics of a GPU) stays far below, noise of dropout far above.
RANDOM = 1e-9


@dataclass
class Results:
    """What one side returned.

    Attributes:
        side: its name.
        float64, float32: the results; None where the run failed.
        noise: by leaf, the most that the float64 results move when the inputs move by an ulp.
        unstable: leaves whose finite entries do not stay the same then.
        coarse: what it computes in a lower precision also in float64.
        random: leaves that two calls with the same inputs do not agree on.
    """

    side: str
    float64: Leaves | None = None
    float32: Leaves | None = None
    noise: dict[str, float] = field(default_factory=dict)
    unstable: set[str] = field(default_factory=set)
    random: set[str] = field(default_factory=set)
    coarse: Seen = field(default_factory=dict)

    def moved(self, leaves: Leaves) -> None:
        """Take in the float64 results of inputs that were moved by an ulp."""
        for name, x in (self.float64 or {}).items():
            found = compare(x, leaves[name])
            self.noise[name] = max(self.noise.get(name, 0.0), found.errors.absolute)
            if found.apart.any():
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


def leaf_of(name: str, ours: Results, theirs: Results, step: int = 0) -> Leaf:
    """The leaf of this name, judged."""
    sides = (ours, theirs)
    wide = [side.float64[name] for side in sides if side.float64 is not None]
    narrow = [side.float32[name] for side in sides if side.float32 is not None]
    in64 = compare(wide[0], wide[1]) if len(wide) == 2 else None
    in32 = compare(narrow[0], narrow[1]) if len(narrow) == 2 else None
    have = wide if in64 is not None else narrow
    verdict, judgement, reasons = Verdict.INCONCLUSIVE, None, []
    if in64 is None:
        reasons.append("there is no float64 run of both sides, without which rounding cannot be told from a fault")
    elif in64.apart.any():
        unstable = any(name in side.unstable for side in sides)
        verdict = Verdict.INCONCLUSIVE if unstable else Verdict.SEMANTIC
        reasons.append(_apart(in64, *wide) + (", and which they are changes with an ulp in the inputs" * unstable))
    elif not in64.compared.any() and have[0].size:
        reasons.append("no entry is finite on either side: there is nothing to compare")
    else:
        drift = _drift(name, sides, in64) if in32 is not None else None
        judgement = judge(
            Evidence(
                in64.size,
                in64.errors.absolute,
                max(side.noise.get(name, 0.0) for side in sides),
                size32=in32.size if in32 else None,
                difference32=in32.errors.absolute if in32 else None,
                drift32=drift,
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
        if in32 is not None and in32.apart.any() and verdict is Verdict.ROUNDING:
            verdict = Verdict.INCONCLUSIVE
            reasons.append(f"float64 agrees, but in float32 {_apart(in32, *narrow)}")
        if in64.alike.any():
            reasons.append(
                f"{in64.alike.sum()} of {have[0].size} entries are the same infinity or NaN on both sides; the verdict "
                "is on the others"
            )
    narrowed = [f"{s.side} ({x.dtype})" for s, x in zip(sides, wide, strict=False) if is_coarse(x.dtype)]
    if narrowed:
        verdict = Verdict.INCONCLUSIVE
        reasons = [
            f"in the float64 run the result of {' and of '.join(narrowed)} is of a lower precision: a dtype is "
            "hard-coded there; without it the sides can be compared"
            + (f" (they differ by {in64.errors.relative:.1e} of the leaf)" if in64 else "")
        ]
    if wide and len({_kind(x) for x in have}) == 2:
        reasons.append(
            f"the dtypes differ in kind: {have[0].dtype} on the PyTorch side, {have[1].dtype} on the JAX side"
        )
    random = [side.side for side in sides if name in side.random]
    if random:
        verdict = Verdict.INCONCLUSIVE
        reasons = [f"two calls of the {' and of the '.join(random)} side with the same inputs differ"]
    shape, dtypes = have[0].shape, (str(have[0].dtype), str(have[1].dtype))
    errors64, errors32 = in64 and in64.errors, in32 and in32.errors
    return Leaf(name, shape, verdict, errors64, errors32, dtypes, judgement, "; ".join(reasons), step)


def _drift(name: str, sides: Sequence[Results], in64: Comparison) -> float:
    """How far float32 is from float64 on one and the same side; the larger of the two."""
    pairs = [(s.float64[name], s.float32[name]) for s in sides if s.float64 is not None and s.float32 is not None]
    return max(largest_difference(a, b, in64.compared) for a, b in pairs)


def _explained(sides: Sequence[Results]) -> str:
    found = [f"{side.side} computes in {dtype} ({by})" for side in sides for dtype, by in side.coarse.items()]
    return (
        f"{' and '.join(found)} also in the float64 run, which accounts for a difference of this size: a hard-coded "
        "dtype, or arrays that the function closes over (pass parameters as inputs)"
    )


def _kind(x: np.ndarray) -> str:
    return {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}.get(x.dtype.kind, "float")


def _apart(found: Comparison, ours: np.ndarray, theirs: np.ndarray) -> str:
    where = found.apart
    counts = " and ".join(
        f"{side} has {np.isnan(wide).sum()} NaN, {np.isinf(wide).sum()} infinite"
        for side, x in (("PyTorch", ours), ("JAX", theirs))
        for wide in [x[where].astype(np.complex128)]
    )
    return f"{where.sum()} of {where.size} entries are not finite on both sides in the same way: there {counts}"

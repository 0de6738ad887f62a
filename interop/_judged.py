"""One leaf of both sides: the evidence, as a whole and by the order of its entries, and the verdict on it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ._closer import Closer
from ._coarse import is_coarse, resolution
from ._compare import Found, Results, found_of
from ._measure import Errors
from ._orders import Table, around, table
from .report import Leaf
from .verdict import FLOOR, JUMPS, TINY32, Evidence, Verdict, judge

# A difference in float64 of up to so many roundings of the lower precision that a side computes in is put down to it.
COARSE = 4.0

NOTHING = "no entry is finite on either side: there is nothing to compare"


def leaf_of(name: str, ours: Results, theirs: Results, step: int = 0) -> Leaf:
    """The leaf of this name, of results that are still there, judged."""
    in64, in32 = None, None
    if ours.float64 and theirs.float64:
        in64 = found_of(ours.float64[name], theirs.float64[name])
    if ours.float32 and theirs.float32:
        in32 = found_of(ours.float32[name], theirs.float32[name], in64)
    return judged(name, ours, theirs, in64, in32, step=step)


def judged(
    name: str,
    ours: Results,
    theirs: Results,
    in64: Found | None,
    in32: Found | None,
    step: int = 0,
    closer: Closer | None = None,
) -> Leaf:
    """The leaf of this name, judged; with what a second look at it has shown, if there was one."""
    sides = (ours, theirs)
    have = in64 or in32
    assert have is not None
    verdict, judgement, reasons = Verdict.INCONCLUSIVE, None, []
    errors64, errors32 = in64 and in64.errors, in32 and in32.errors
    if in64 is None:
        reasons.append("there is no float64 run of both sides, without which rounding cannot be told from a fault")
    elif in64.apart:
        unstable = any(name in side.unstable for side in sides)
        verdict = Verdict.INCONCLUSIVE if unstable else Verdict.SEMANTIC
        reasons.append(in64.apart + (", and which they are changes with an ulp in the inputs" * unstable))
    elif not in64.compared and math.prod(in64.shape):
        reasons.append(NOTHING)
    else:
        whole, by_order = evidence_of(name, sides, in64, in32)
        judgement = judge(whole, by_order if closer is None else closer.parts)
        if closer is not None and closer.jumps:
            judgement = replace(judgement, verdict=Verdict.INCONCLUSIVE, reason=JUMPS)
        verdict, decided = judgement.verdict, judgement.part or whole
        if judgement.part is not None:
            errors64 = errors64 and _errors_of_part(errors64, decided.difference64, decided)
            errors32 = errors32 and _errors_of_part(errors32, decided.difference32 or 0.0, decided)
            reasons.append(_standing(in64, decided))
        coarse = [side for side in sides if side.coarse]
        if verdict is Verdict.SEMANTIC and coarse:
            resolved = max(decided.size * resolution(dtype) for side in coarse for dtype in side.coarse)
            if decided.difference64 <= COARSE * max(decided.drift32 or 0.0, resolved):
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
            "hard-coded there (nnx.Embed keeps the one it was made with; set its `dtype` to None); without it the "
            "sides can be compared" + (f" (they differ by {in64.errors.relative:.1e} of the leaf)" if in64 else "")
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
    return Leaf(name, have.shape, verdict, errors64, errors32, dtypes, judgement, "; ".join(reasons), step)


def is_doubtful(leaf: Leaf, in64: Found | None, in32: Found | None) -> bool:
    """Whether there is more to be learnt from a leaf's single entries than from the largest values of all.

    That a part of it stands out may be an accident of few entries, and what hides in the noise of one entry need not
    hide in that of another. Where whole numbers differ, that no ulp moved them may be an accident as well.
    """
    judged = leaf.judgement
    if judged is None or in64 is None or in32 is None or judged.reason == JUMPS:
        return False
    if in64.whole:
        return leaf.verdict is Verdict.SEMANTIC and in64.errors.absolute > 0
    return judged.part is not None or (leaf.verdict is not Verdict.SEMANTIC and in64.errors.relative > FLOOR)


def in_place_of(leaf: Leaf, other: Leaf, why: str) -> Leaf:
    """Another comparison of the same leaf, if it settles what this one does not; what is semantic, only by agreement.

    But a lower precision that a side returns stays a fault of its own.
    """
    better = (Verdict.ROUNDING, *(Verdict.SEMANTIC,) * (leaf.verdict is Verdict.INCONCLUSIVE))
    if other.verdict not in better or any(is_coarse(np.dtype(x)) for x in leaf.dtypes):
        return leaf
    return replace(other, reason="; ".join(filter(None, (leaf.reason, why, other.reason))))


def _explained(sides: Sequence[Results]) -> str:
    found = [f"{side.side} computes in {dtype} ({by})" for side in sides for dtype, by in side.coarse.items()]
    return (
        f"{' and '.join(found)} also in the float64 run, which accounts for a difference of this size: a hard-coded "
        "dtype, or arrays that the function closes over (pass parameters as inputs)"
    )


def _kind(dtype: np.dtype[Any]) -> str:
    return {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}.get(dtype.kind, "float")


def evidence_of(
    name: str, sides: Sequence[Results], in64: Found, in32: Found | None
) -> tuple[Evidence, Iterator[Evidence]]:
    """What is known of a leaf as a whole, and of its entries of each order of magnitude."""
    noise, drift = (
        np.maximum(*(of.get(name, table()) for of in both))
        for both in ([side.noise for side in sides], [side.drift for side in sides])
    )
    whole = Evidence(
        in64.size,
        in64.errors.absolute,
        float(noise.max()),
        size32=in32.size if in32 else None,
        difference32=in32.errors.absolute if in32 else None,
        drift32=float(drift.max()) if in32 else None,
        exact=in64.exact,
        still=all(side.still for side in sides),
    )
    return whole, _parts(in64, in32, noise, drift)


def _parts(in64: Found, in32: Found | None, noise: Table, drift: Table) -> Iterator[Evidence]:
    """The orders in which there is a difference; the first is that of zeros, of which nothing is known."""
    if in64.differences is None:
        return
    differences, sizes = in64.differences.largest, in64.differences.sizes
    orders = 1 + np.flatnonzero(differences[1:] > FLOOR * sizes[1:])
    if not orders.size:
        return
    noise, drift = around(noise), around(drift)
    in32_too = None if in32 is None or in32.differences is None else in32.differences.largest
    for order in orders:
        size = float(sizes[order])
        part = Evidence(size, float(differences[order]), float(noise[order]), at=int(in64.differences.where[order]))
        if in32_too is not None and size >= TINY32:
            part = part._replace(size32=size, difference32=float(in32_too[order]), drift32=float(drift[order]))
        yield part


def _errors_of_part(errors: Errors, absolute: float, part: Evidence) -> Errors:
    return errors._replace(absolute=absolute, relative=absolute / part.size)


def _standing(in64: Found, part: Evidence) -> str:
    at = ", ".join(str(int(i)) for i in np.unravel_index(part.at or 0, in64.shape))
    return (
        f"the entry [{at}], of {part.size:.1e}, differs by {part.difference64:.1e}, and neither side moves it by "
        f"as much by itself; measures of the whole leaf, whose largest entry is {in64.size:.1e}, do not show that; "
        "its errors here are those of this entry"
    )

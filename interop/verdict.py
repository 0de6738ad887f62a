"""Rounding or a real difference: two rules that do not know of each other, and every threshold with its evidence.

Two programs for one function never agree to the last bit, and one tolerance cannot tell their rounding from a fault: on
the 84 pairs of `tests/parity_corpus.py`, whose answers are known, the usual float32 closeness test (rtol 1.3e-6, atol
1e-5) is right for 60. Rounding has two properties that a fault has not.

**It shrinks with the precision** (`by_precision`). From float32 to float64 rounding shrinks by 2**29, a fault stays:
the ratio of the two differences tells them apart. This rule sees only the difference between the sides.

**A side shows it by itself** (`by_conditioning`). When the inputs move by an ulp of float64, a program's own result
moves by about as much as its rounding errors are worth, however badly conditioned the function or unstable the formula:
the last bits of the intermediate results are drawn anew. Two programs for one function differ by no more than a small
multiple of that. The yardstick of this rule is taken on each side alone.

They err in different places. Noise of float32 hides a small fault from the first rule, and it has no opinion where
float32 has no digits left. The second cannot see rounding errors that do not follow the inputs: those of `1 - cos(x)`
at small x, of computations on constants, of inputs that are zeros or integers. There float32 speaks against it: a
difference that is no larger than a side's own drift from float32 to float64, scaled down by 2**29, is no evidence of a
fault; and where float32 has no digits left although the inputs' ulps move nothing, it is not their ulps that matter.
Neither sees that a result jumps, as those of `floor` do, where its argument is rounded to the other side: what a side
does by itself, both with an ulp and in float32, is no evidence either. A rule has no opinion where its measurement
means nothing; where the two contradict each other, or neither has an opinion, the verdict is inconclusive.

Largest values of a leaf see what is large beside its largest entry. A leaf is therefore judged by the order of its
entries as well (`stands_out`): what differs by far more than entries of that order move by themselves is a fault,
however small beside the rest. What cancels is not, since the rounding errors of huge intermediate numbers move the
small result; nor is a zero of one side, nor an entry of which float32 has no digits, as the tail of a formula that
saturates. And where the whole is in doubt, `check` looks at each entry alone (`_closer`), so that one badly conditioned
entry hides no fault in another.

What stays hidden: a fault that the inputs do not excite; one below `FLOOR` of the entries around it; one that float32's
noise exceeds by more than `1 / RATIO_ROUNDING`; one smaller than what the function does to an ulp of its inputs, to the
entry in `check`, to entries of its order in `check_training`. Two implementations of a special function that differ by
more than rounding are two functions: `polygamma` of PyTorch is 5e-10 off, `logcdf` of JAX 8e-12.

The thresholds were chosen on one half of the corpus and on the pairs that are marked there as having changed the rules;
the other half is held out, and the test suite judges each by itself.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

EPS64 = float(np.finfo(np.float64).eps)
EPS32 = float(np.finfo(np.float32).eps)

# All relative to the largest entry of the leaf, or to the entry itself in a part of it; of whole numbers everything
# counts, and any movement is a jump. Between two thresholds of a rule it has no opinion.

# Below this nothing is told from rounding, which long sums bring to some hundred ulps: 450 of them.
FLOOR = 1e-13

# by_precision: the difference in float64 by that in float32. Rounding: 2**-29 = 1.9e-9 in theory, up to 1.5e-8 over the
# corpus where float32 has digits; faults: from 8e-6 (where eps stands in RAdam).
RATIO_ROUNDING = 1e-7
RATIO_SEMANTIC = 1e-2
# A difference in float32 is not resolved below half an ulp: it is taken to be at least this, exact agreement included.
RESOLVED32 = EPS32 / 2
# Where one side's own drift from float32 to float64 is a tenth of the leaf, float32 has no digits: no opinion.
LOST32 = 0.1

# by_conditioning: the difference in float64 by what an ulp or two in the inputs does to one side alone. Rounding: up to
# 2.1 over the corpus, but for rounding errors that do not follow the inputs, 6e4; faults: from 2e4 (softplus) up.
EXCESS_ROUNDING = 1e2
EXCESS_SEMANTIC = 1e4
# Nor is it a fault below this multiple of a side's own drift times 2**-29. Rounding errors that do not follow the
# inputs: up to 17 in trials; faults: from 4e3 up.
SCALED_DRIFT = 1e2
# Where an ulp moves a result that much, float64 has no digits to compare either, or there is a jump: no opinion.
LOST64 = 1e-3
# Where float32 has no digits left, an ulp should move float64 by 2**-29 of the drift. Where it does by less than this
# part of that, rounding errors do not follow the inputs: no fault by that rule. `1 - cos(x)`: 5e-7; a matrix of
# Hilbert: from 0.05 up.
FOLLOWS = 1e-3
# A difference below the smallest normal number is none: some processors, and XLA on all, take smaller ones for zero.
TINY64 = float(np.finfo(np.float64).tiny)
# A difference of up to so many of the jumps that a side makes by itself is put down to them.
JUMP = 2.0
JUMPS = (
    "the result jumps: an ulp in the inputs, or float32, moves one side alone by as much as the sides differ; choose "
    "inputs that are not on the edge, or compare what is rounded before it is"
)


# A part of a leaf may be of few entries, where float32 is right by accident: it is no fault below this multiple of the
# scaled drift, a hundred times that of a whole leaf. A million sums that cancel show none; an eps that is off by 1%
# beside a row at mean 1e8 is 1e7 of it.
PART_DRIFT = 1e4
# On numbers below its smallest normal one float32 has nothing to say.
TINY32 = float(np.finfo(np.float32).tiny)


class Verdict(StrEnum):
    """What a comparison says: `ROUNDING` (the sides agree), `SEMANTIC` (they compute different things), or neither."""

    ROUNDING = "rounding"
    SEMANTIC = "semantic"
    INCONCLUSIVE = "inconclusive"


class Evidence(NamedTuple):
    """What is known of one leaf: largest absolute values over its entries.

    Attributes:
        size: of the results in float64.
        difference64: between the sides in float64.
        noise64: of what each side's own float64 result moves by when its inputs move by an ulp or two.
        size32: of the results in float32; None without a float32 run, as the next two.
        difference32: between the sides in float32.
        drift32: between float32 and float64 of one and the same side, the larger of the two.
        exact: these are integers or bools, which are not rounded: there is no floor below which nothing is told.
        still: no input could be moved, as integers and zeros cannot: that `noise64` is 0 then says nothing of jumps.
        at: of a part of a leaf, the entry at which the difference is, as a flat index.
    """

    size: float
    difference64: float
    noise64: float
    size32: float | None = None
    difference32: float | None = None
    drift32: float | None = None
    exact: bool = False
    still: bool = False
    at: int | None = None


@dataclass(frozen=True)
class Judgement:
    """A verdict on one leaf, and how it came about.

    Attributes:
        verdict: of both rules together.
        by_precision, by_conditioning: of each; None is no opinion.
        ratio: the difference in float64 by that in float32; None without a float32 run.
        excess: the difference in float64 by what an ulp in the inputs does.
        reason: in words, where it is not plain agreement.
        part: the evidence on the part that decided, of which the measures are then; None where the whole leaf did.
    """

    verdict: Verdict
    by_precision: Verdict | None
    by_conditioning: Verdict | None
    ratio: float | None
    excess: float
    reason: str = ""
    part: Evidence | None = None


def judge(evidence: Evidence, parts: Iterable[Evidence] = ()) -> Judgement:
    """The verdict on one leaf. It does not change when all results are multiplied by one number.

    Two rules of one opinion, or one where the other has none, decide. No opinion at all, and two that contradict each
    other, are inconclusive. Where the leaf as a whole is not semantic, a part of it may be.

    Args:
        evidence: finite numbers, of the whole leaf.
        parts: the same of its entries of each order of magnitude, sizes and differences at one of them.

    Returns:
        The judgement.

    Example:
        >>> from interop.verdict import Evidence, judge
        >>> badly_conditioned = Evidence(3.0, 5e-7, 4e-7, size32=3.0, difference32=4.0, drift32=4.0)
        >>> judge(badly_conditioned).verdict
        <Verdict.ROUNDING: 'rounding'>
        >>> another_epsilon = Evidence(1.0, 6e-9, 1e-16, size32=1.0, difference32=8e-8, drift32=9e-8)
        >>> judge(another_epsilon).verdict
        <Verdict.SEMANTIC: 'semantic'>
    """
    first, second = by_precision(evidence), by_conditioning(evidence)
    ratio, excess = ratio_of(evidence), excess_of(evidence)
    said = {opinion for opinion in (first, second) if opinion is not None}
    if _jumps(evidence):
        verdict, reason = Verdict.INCONCLUSIVE, JUMPS
    elif len(said) == 1:
        verdict, reason = said.pop(), ""
    else:
        verdict, reason = Verdict.INCONCLUSIVE, _why_not(evidence, first, second, ratio, excess)
    if verdict is not Verdict.SEMANTIC:
        worst = max(filter(stands_out, parts), key=lambda part: part.difference64 / part.size, default=None)
        if worst is not None:
            opinions = by_precision(worst), by_conditioning(worst)
            return Judgement(Verdict.SEMANTIC, *opinions, ratio_of(worst), excess_of(worst), part=worst)
    return Judgement(verdict, first, second, ratio, excess, reason)


def stands_out(part: Evidence) -> bool:
    """Whether a part of a leaf differs by a fault, although the whole does not show it.

    The second rule has to say so, more plainly than of a whole leaf, and the first must not say that it is rounding.
    """
    explained = part.difference64 <= PART_DRIFT * 2.0**-29 * (part.drift32 or 0.0)
    semantic = by_conditioning(part) is Verdict.SEMANTIC
    return semantic and not explained and by_precision(part) is not Verdict.ROUNDING


def by_precision(evidence: Evidence) -> Verdict | None:
    """What becomes of the difference when the precision grows: it shrinks with it (rounding) or stays (semantic)."""
    ratio = ratio_of(evidence)
    if evidence.difference64 <= _floor(evidence):
        return Verdict.ROUNDING
    if ratio is None or evidence.drift32 is None:
        return None
    if evidence.drift32 > (0.0 if evidence.exact else LOST32 * evidence.size):
        return None
    return _between(ratio, RATIO_ROUNDING, RATIO_SEMANTIC)


def by_conditioning(evidence: Evidence) -> Verdict | None:
    """Whether each side's own reaction to an ulp in its inputs accounts for the difference in float64."""
    if evidence.difference64 <= _floor(evidence):
        return Verdict.ROUNDING
    if _is_lost(evidence, evidence.noise64):
        return None
    opinion = _between(excess_of(evidence), EXCESS_ROUNDING, EXCESS_SEMANTIC)
    scaled = 2.0**-29 * (evidence.drift32 or 0.0)
    follows = scaled <= LOST32 * 2.0**-29 * evidence.size or evidence.noise64 >= FOLLOWS * scaled
    explained = evidence.difference64 <= SCALED_DRIFT * scaled or not follows
    return None if opinion is Verdict.SEMANTIC and explained else opinion


def _floor(evidence: Evidence) -> float:
    return 0.0 if evidence.exact else max(FLOOR * evidence.size, TINY64)


def _is_lost(evidence: Evidence, movement: float) -> bool:
    """Whether a result that moves by so much has no digits to compare, or jumps, as whole numbers always do."""
    return movement > (0.0 if evidence.exact else LOST64 * max(evidence.size, evidence.size32 or 0.0))


def _jumps(evidence: Evidence) -> bool:
    """Whether one side alone moves by the difference both with an ulp in its inputs and from float32 to float64."""
    drift = evidence.drift32 or 0.0
    alone = min(evidence.noise64, drift)
    if evidence.still and drift <= JUMP * evidence.difference64:  # where it is more, float32 has no digits
        alone = drift
    return _floor(evidence) < evidence.difference64 <= JUMP * alone and _is_lost(evidence, alone)


def ratio_of(evidence: Evidence) -> float | None:
    if evidence.difference32 is None:
        return None
    if evidence.difference64 == 0:
        return 0.0
    in32 = evidence.difference32 if evidence.exact else max(evidence.difference32, RESOLVED32 * evidence.size)
    return evidence.difference64 / in32 if in32 else math.inf


def excess_of(evidence: Evidence) -> float:
    if evidence.difference64 == 0:
        return 0.0
    own = evidence.noise64 if evidence.exact else max(evidence.noise64, EPS64 * evidence.size)
    return evidence.difference64 / own if own else math.inf


def _between(x: float, rounding: float, semantic: float) -> Verdict | None:
    if x <= rounding:
        return Verdict.ROUNDING
    return Verdict.SEMANTIC if x > semantic else None


def _why_not(
    evidence: Evidence, first: Verdict | None, second: Verdict | None, ratio: float | None, excess: float
) -> str:
    by_ratio = (
        "there is no float32 run to compare with"
        if ratio is None
        else f"in float64 the difference is {ratio:.1e} of that in float32"
    )
    if first is None and second is None:
        return f"neither rule has an opinion: {by_ratio}, and {excess:.1e} times what an ulp in the inputs does"
    return (
        f"the rules contradict each other: {by_ratio} ({first}), but {excess:.1e} times what an ulp in the inputs does "
        f"to one side alone ({second})"
    )

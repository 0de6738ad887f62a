"""Which of the known changes make the two sides agree: each is made to the PyTorch side, which is then run again.

A change is accepted where it brings every leaf that differed below `EXPLAINED`, and at least by `CLEARLY`, and leaves
the others as they were; on the given inputs, at every step of a trajectory, and on other draws of them, with as many
rows and with more. A draw that one of the sides cannot be run on does not count. What two changes explain equally well
is reported as both.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator

import numpy as np

from .._leaves import Leaves
from .._measure import compare
from ..report import Hint, Leaf, Report
from ..verdict import Verdict
from ._changes import Change
from ._trials import Given, Trial

# The largest difference in float64, relative to the leaf, that a change may leave behind.
EXPLAINED = 1e-12
# A difference is explained where it falls by this at least: without it any change would explain one of 1e-12.
CLEARLY = 1e-2
# Within one kind, of changes that explain it, those are reported that leave no more than so many times the least.
AS_GOOD = 10.0
# A residual is of so many steps more than show that there is a difference.
LATER = 2
# It holds about so many entries of each leaf: one number is to be found from them.
ENTRIES = 10_000
# A leaf that is smaller is not divided by its size.
TINY = 1e-30
# Seconds before a bar is shown.
PATIENCE = 2.0


class Goal:
    """What was wrong, and so what a change has to put right."""

    def __init__(self, report: Report) -> None:
        self.before = {(leaf.name, leaf.step or 1): leaf for leaf in report.leaves}
        self.onset = min(leaf.step or 1 for leaf in report.leaves if leaf.verdict is Verdict.SEMANTIC)
        self.differing = {leaf.name for leaf in report.leaves if leaf.verdict is Verdict.SEMANTIC}

    def left(self, step: int, ours: Leaves, theirs: Leaves, drawn: bool) -> float | None:
        """The largest relative difference that is left in this step; None where something is not explained."""
        largest = 0.0
        for name in self.names(theirs):
            leaf = self.before.get((name, step))
            if name not in ours or ours[name].shape != theirs[name].shape:
                return None
            found = compare(ours[name], theirs[name])
            left = max(found.errors.relative, _of_part(leaf, ours[name], theirs[name]))
            if found.apart.any() or left > _allowed(leaf, drawn):
                return None
            if name in self.differing:
                largest = max(largest, left)
        return largest

    def names(self, theirs: Leaves) -> Iterator[str]:
        compared = {name for name, _ in self.before}
        return (name for name in theirs if name in compared)


def _of_part(leaf: Leaf | None, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Where only small entries of a leaf differed, what is left of it beside these."""
    part = leaf.judgement.part if leaf is not None and leaf.judgement is not None else None
    if part is None:
        return 0.0
    small = np.maximum(np.abs(ours), np.abs(theirs)) <= 4 * part.size  # of their order, or of a smaller one
    return compare(ours[small], theirs[small]).errors.relative


def _allowed(leaf: Leaf | None, drawn: bool) -> float:
    """Of a leaf that differed, a hundredth of that; one that did not differ may stay as rounded as it is."""
    if leaf is None or leaf.float64 is None:
        return EXPLAINED
    before = leaf.float64.relative
    if leaf.verdict is Verdict.SEMANTIC:
        if drawn or before <= EXPLAINED:  # only infinities and NaN differed
            return EXPLAINED
        return min(EXPLAINED, CLEARLY * before)
    return max(EXPLAINED, 2 * before)


def still_differs(trial: Trial, goal: Goal, change: Change) -> bool:
    """Whether the sides can be run again, and differ as they did."""
    return _run(trial, goal, change, trial.given) is None


def residual(trial: Trial, goal: Goal, change: Change) -> np.ndarray | None:
    """How far apart the sides are with a change, each leaf by its size, up to a few steps after they first differ.

    None where a side cannot be run.
    """
    apart: list[np.ndarray] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pairs = zip(trial.ours(change, trial.given), trial.theirs(trial.given), strict=False)
            for ours, theirs in itertools.islice(pairs, goal.onset + LATER):
                for name in goal.names(theirs):
                    a, b = (x[name].ravel()[:: 1 + x[name].size // ENTRIES] for x in (ours, theirs))
                    apart.append((a - b) / max(np.abs(b).max(initial=0), TINY))
        except Exception:
            return None
    return np.concatenate(apart)


def explain(trial: Trial, goal: Goal, changes: Iterable[Change], progress: bool = True) -> tuple[Hint, ...]:
    """The changes that explain the difference, in the order of the table."""
    changes = list(changes)
    hints: list[Hint] = []
    for kind in dict.fromkeys(change.kind for change in changes):
        mine = [change for change in changes if change.kind == kind]
        for stage in sorted({change.stage for change in mine}):
            found = []
            for change in _with_bar([c for c in mine if c.stage == stage], kind, progress):
                difference = _difference(trial, goal, change)
                if difference is not None:
                    found.append(Hint(kind, change.change, difference))
            if found:
                least = min(hint.difference for hint in found)
                hints += [hint for hint in found if hint.difference <= AS_GOOD * max(least, 1e-16)]
                break
    return tuple({hint.change: hint for hint in hints}.values())


def _difference(trial: Trial, goal: Goal, change: Change) -> float | None:
    """What the change leaves of the difference, where it explains it."""
    found = _run(trial, goal, change, trial.given)
    if found is None or math.isinf(found):
        return None
    for longer, given in trial.draws():
        if (change.sized or not longer) and _run(trial, goal, change, given, drawn=True) is None:
            return None
    return found


def _with_bar(changes: list[Change], kind: str, progress: bool) -> Iterable[Change]:
    from tqdm.auto import tqdm

    disable = None if progress else True  # None: where there is no terminal
    return tqdm(changes, f"hints: {kind}", leave=False, delay=PATIENCE, disable=disable, dynamic_ncols=True)


def _run(trial: Trial, goal: Goal, change: Change, given: Given, drawn: bool = False) -> float | None:
    """The largest difference that is left; infinite where a side cannot be run, None where it is not explained."""
    largest, step = 0.0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a change that is only tried
        try:
            # that of PyTorch first: where it ends, JAX's is not asked for more
            pairs = zip(trial.ours(change, given), trial.theirs(given), strict=False)
            for step, (ours, theirs) in enumerate(pairs, start=1):
                left = goal.left(step, ours, theirs, drawn)
                if left is None:
                    return None
                largest = max(largest, left)
        except Exception:
            return math.inf
    return largest if step else math.inf

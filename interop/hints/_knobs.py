"""Hyper-parameters of optimizers that have another value on the other side: a decay, a momentum, a first accumulator.

What the other value is cannot be read off JAX's side. Where one number is all that differs, the difference of the sides
tells it: from the best of a few usual values it is found by Newton's method on the first steps, rounded to `DIGITS`. It
is the sum of absolute differences that is made small, by a weighted median: entries that jump, such as those that one
value sets to zero and the other does not, do not move it. The value is then a change as any other, which must explain
all steps and other draws.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ._changes import Change

DIGITS = 6  # a hyper-parameter is a number that somebody wrote down
_ITERATIONS = 8
_APART, _LEAST = 1e-5, 1e-4  # of a difference quotient: relative, and to this where the number is smaller
_ENOUGH = 0.9  # one that leaves more than this of a difference is not turned further
_NOTHING = 1e-9  # one that leaves less than this is the last that is tried

_DECAYS = (0.0, 1e-4, 1e-2)
_MEMORIES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999)  # of averages and sums of what was before
USUAL: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("weight_decay", "lam", "lam1", "lam2"), _DECAYS),
    **dict.fromkeys(("momentum", "decay", "alpha", "rho", "b1", "b2", "betas[0]", "betas[1]"), _MEMORIES),
    **dict.fromkeys(("initial_accumulator_value", "initial_scale"), (0.0, 0.1, 1.0)),
    **dict.fromkeys(("lr", "learning_rate"), (1e-3, 1e-2, 0.1)),
    "eps_root": (1e-8, 1e-7, 1e-6, 1e-4),
    "max_norm": (0.1, 1.0, 10.0),
}
FLAGS = ("nesterov", "amsgrad", "centered", "eps_in_sqrt", "bias_correction")


class Knob(NamedTuple):
    """A number or a flag that an optimizer was made with.

    Attributes:
        who: the beginning of a sentence, "PyTorch's AdamW has".
        name: among `FLAGS`, or a number with the usual values of `USUAL`.
        value: of now.
        make: of a value, where and how it is given, as keywords of a `Change`.
        usual: values to begin with.
        stage: of the change.
    """

    who: str
    name: str
    value: float
    make: Callable[[float], dict[str, Any]]
    usual: tuple[float, ...] = ()
    stage: int = 1

    def change(self, new: float) -> Change:
        now = f"{self.who} {self.name}={_shown(self.value)}"
        sentence = f"{now}; with {self.name}={_shown(new)} both sides agree"
        return Change("hyper_parameter", sentence, self.stage, **self.make(new))


def is_one(name: str, value: Any) -> bool:
    """Whether this is a hyper-parameter whose other values are looked for."""
    return name in FLAGS if isinstance(value, bool) else name in USUAL and isinstance(value, (int, float))


def changes(knobs: Iterable[Knob], residual: Callable[[Change], np.ndarray | None]) -> Iterator[Change]:
    """Of every knob the value with which less is left of the difference; after one that leaves nothing, no other.

    Args:
        knobs: of the PyTorch side.
        residual: how far both sides are apart in the first steps with a change, each leaf by its size.
    """
    for knob in knobs:
        if isinstance(knob.value, bool):
            yield knob.change(not knob.value)
            continue
        new, left = _fitted(knob, residual)
        if new != knob.value:
            yield knob.change(new)
        if left < _NOTHING:
            return


def _fitted(knob: Knob, residual: Callable[[Change], np.ndarray | None]) -> tuple[float, float]:
    """Where the residual is least, and how much of it is left."""

    def at(value: float) -> np.ndarray | None:
        left = residual(knob.change(value))
        return left if left is not None and np.isfinite(left).all() else None

    found = {float(x): at(x) for x in dict.fromkeys((knob.value, *knob.usual, *USUAL.get(knob.name, ())))}
    value = min(found, key=lambda x: _size(found[x]))
    left, start = found[value], _size(found[float(knob.value)])
    for _ in range(_ITERATIONS):
        apart = _APART * max(value, _LEAST)
        beside = at(value + apart)
        if left is None or beside is None:
            break
        new = float(f"{max(value - _median_ratio(left, (beside - left) / apart), 0.0):.{DIGITS}g}")
        if new == value:
            break
        there = at(new)
        if not _size(there) < _ENOUGH * _size(left):
            break
        value, left = new, there
    return value, _size(left) / start if left is not None and start else 1.0


def _median_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """The `x` of which `sum(abs(a - x * b))` is least; 0 where all `b` are."""
    where = b != 0
    ratios, weights = a[where] / b[where], np.abs(b[where])
    order = np.argsort(ratios)
    below = np.cumsum(weights[order])
    return float(ratios[order][np.searchsorted(below, below[-1] / 2)]) if where.any() else 0.0


def _shown(x: float) -> str:
    return str(x) if isinstance(x, bool) else f"{x:g}"


def _size(x: np.ndarray | None) -> float:
    return math.inf if x is None else float(np.abs(x).sum())

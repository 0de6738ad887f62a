"""Hyper-parameters of optimizers that have another value on the other side: a decay, a momentum, a first accumulator.

What the other value is cannot be read off JAX's side. Where one number is all that differs, the difference of the sides
tells it: from the best of a few usual values it is found by Gauss and Newton's method on the first steps, and rounded
to `DIGITS`. It is then a change as any other, which must explain all steps and other draws.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ._changes import Change

DIGITS = 6  # a hyper-parameter is a number that somebody wrote down
_ITERATIONS = 8
_APART, _LEAST = 1e-5, 1e-4  # of a difference quotient: relative, and to this where the number is smaller
_ALONG = 0.3  # the least cosine between what a knob does and the difference, of one that is turned further

_DECAYS = (0.0, 1e-4, 1e-2)
_MEMORIES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999)  # of averages and sums of what was before
USUAL: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("weight_decay", "lam", "lam1", "lam2"), _DECAYS),
    **dict.fromkeys(("momentum", "decay", "alpha", "rho", "b1", "b2", "betas[0]", "betas[1]"), _MEMORIES),
    **dict.fromkeys(("initial_accumulator_value", "initial_scale"), (0.0, 0.1, 1.0)),
    "eps_root": (1e-8, 1e-7, 1e-6, 1e-4),
    "max_norm": (0.1, 1.0, 10.0),
}
FLAGS = ("nesterov", "amsgrad", "centered", "eps_in_sqrt", "bias_correction")


class Knob(NamedTuple):
    """A number or a flag that an optimizer was made with.

    Attributes:
        who: "PyTorch's AdamW".
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
        now = f"{self.who} has {self.name}={_shown(self.value)}"
        sentence = f"{now}; with {self.name}={_shown(new)} both sides agree"
        return Change("hyper_parameter", sentence, self.stage, **self.make(new))


def is_one(name: str, value: Any) -> bool:
    """Whether this is a hyper-parameter whose other values are looked for."""
    return name in FLAGS if isinstance(value, bool) else name in USUAL and isinstance(value, (int, float))


def changes(knobs: Iterable[Knob], residual: Callable[[Change], np.ndarray | None]) -> Iterator[Change]:
    """Of every knob the value, if there is one, with which less is left of the difference.

    Args:
        knobs: of the PyTorch side.
        residual: how far both sides are apart in the first steps with a change, each leaf by its size.
    """
    for knob in knobs:
        if isinstance(knob.value, bool):
            yield knob.change(not knob.value)
            continue
        new = _fitted(knob, residual)
        if new != knob.value:
            yield knob.change(new)


def _fitted(knob: Knob, residual: Callable[[Change], np.ndarray | None]) -> float:
    """Where the residual is least."""

    def at(value: float) -> np.ndarray | None:
        left = residual(knob.change(value))
        return left if left is not None and np.isfinite(left).all() else None

    found = {float(x): at(x) for x in dict.fromkeys((knob.value, *knob.usual, *USUAL.get(knob.name, ())))}
    value = min(found, key=lambda x: _size(found[x]))
    left = found[value]
    for _ in range(_ITERATIONS):
        apart = _APART * max(value, _LEAST)
        beside = at(value + apart)
        if left is None or beside is None:
            break
        slope = (beside - left) / apart
        square, product = float(slope @ slope), float(slope @ left)
        if not abs(product) > _ALONG * math.sqrt(square) * _size(left):
            break  # it moves the sides in another direction than they differ in, or there is nothing left
        new = float(f"{max(value - product / square, 0.0):.{DIGITS}g}")
        there = at(new)
        if not _size(there) < _size(left):
            break
        value, left = new, there
    return value


def _shown(x: float) -> str:
    return str(x) if isinstance(x, bool) else f"{x:g}"


def _size(x: np.ndarray | None) -> float:
    return math.inf if x is None else float(np.linalg.norm(x))

"""Rule: one kind of penalty, and Bound: the rule on one leaf; the gradient and the prox of several on one leaf.

No framework: the formulas live in the wings, one file a penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class NoProxError(ValueError):
    """The proximal operator is not implemented, on the leaf and for the parts that the message names."""


class NoGradError(ValueError):
    """The penalty is an indicator or a count: it has a proximal operator, but no gradient."""


def _no_options(name: str, shape: Sequence[int], options: Mapping[str, Any]) -> tuple[Any, ...]:
    del name, shape, options
    return ()


@dataclass(frozen=True)
class Rule:
    """What one kind of penalty is, without its strengths: leaf functions and traits. Static and hashable.

    Leaf functions take `(x, *strengths, *resolved)` and the prox `(x, step_size, *strengths, *resolved)`, where
    `resolved = resolve(name, shape, options)` turns the options of the factory into those of one leaf.
    """

    name: str
    value: Callable[..., Any]
    grad: Callable[..., Any] | None
    prox: Callable[..., Any] | None
    strengths: tuple[str, ...] = ("lam",)
    options: tuple[tuple[str, Any], ...] = ()
    resolve: Callable[[str, Sequence[int], Mapping[str, Any]], tuple[Any, ...]] = _no_options
    linear: bool = False  # the value is proportional to the first strength: equal rules add theirs
    separable: bool = False  # a sum over coordinates: the first strength may be an array shaped like the leaf
    merges: Literal["quadratic", "soft", "group", ""] = ""  # see NOTE [the prox of a sum] in this file


class Bound(NamedTuple):
    """A part on one leaf: strengths in its dtype, with weight and importance taken in where the rule is linear."""

    rule: Rule
    strengths: tuple[Any, ...]
    resolved: tuple[Any, ...]
    weight: Any  # what the strengths could not take in
    anchor: Any

    def value(self, x: Any) -> Any:
        v = self.rule.value(self.shift(x), *self.strengths, *self.resolved)
        if tuple(getattr(v, "shape", (1,))) != ():
            raise TypeError(f"{self.rule.name}: value must return a scalar array, got {brief(v)}")
        return v if self.weight is None else self.weight * v

    def grad(self, x: Any) -> Any:
        if self.rule.grad is None:
            raise NoGradError(
                f"{self.rule.name} is an indicator or a count and has no gradient; use it in prox_sgd or prox_adam"
            )
        g = self.rule.grad(self.shift(x), *self.strengths, *self.resolved)
        self.check_shape("grad", g, x)
        return g if self.weight is None else self.weight * g

    def prox(self, wing: Any, x: Any, step: Any) -> Any:
        assert self.rule.prox is not None
        step = step if self.weight is None else step * self.weight
        d = self.shift(x)
        y = self.rule.prox(d, step, *self.strengths, *self.resolved)
        self.check_shape("prox", y, x)
        if self.anchor is None:
            return y
        # a + (x - a) is x but for rounding, and a step of 0 must return x
        return wing.where((y == d) & (d != 0), x, self.anchor + y)

    def check_shape(self, function: str, y: Any, x: Any) -> None:
        """Refuse what would be broadcast into the leaf."""
        shape = getattr(y, "shape", None)
        if shape is None or tuple(shape) != tuple(x.shape):
            got = type(y).__name__ if shape is None else f"the shape {tuple(shape)}"
            raise TypeError(
                f"{self.rule.name}: {function} must return an array of the leaf's shape {tuple(x.shape)}, got {got}"
            )

    def shift(self, x: Any) -> Any:
        return x if self.anchor is None else x - self.anchor


def brief(x: Any) -> str:
    return f"<{type(x).__name__}{list(getattr(x, 'shape', []))}>" if getattr(x, "ndim", 0) else str(x)


def grad_leaf(wing: Any, x: Any, bound: Sequence[Bound]) -> Any:
    if not bound:
        return wing.zeros_like(x)
    up = wing.upcast(x)
    total = bound[0].grad(up)
    for b in bound[1:]:
        total = total + b.grad(up)
    return wing.downcast(total, x)


def guard_leaf(wing: Any, x: Any, bound: Sequence[Bound]) -> Any:
    """`|grad|` on one leaf; parts without a gradient count as 0."""
    return abs(grad_leaf(wing, x, [b for b in bound if b.rule.grad]))


# NOTE [the prox of a sum]
# Quadratic parts mu/2 |x - a|^2 always merge: completing the square, the prox of g + mu/2 |x - a|^2 at v with step t is
# the prox of g at (v + t mu a) / (1 + t mu) with step t / (1 + t mu); per coordinate, so in any diagonal metric.
# Equal rules that are proportional to their strength add their strengths.
# A soft-threshold (l1) followed by the prox of a group norm is the prox of their sum: on the coordinates that l1
# leaves, the subgradient of the group norm keeps the signs (Friedman, Hastie and Tibshirani 2010, arXiv:1001.0736,
# for the identity metric; the argument is per coordinate and a diagonal metric does not change it).
# Everything else that is not quadratic, and every anchored part that is not, must be alone on its leaf.


def plan(name: str, bound: Sequence[Bound]) -> tuple[list[Bound], list[Bound]]:
    """The quadratic parts of a leaf and the others in the order in which their prox maps compose, or NoProxError."""
    quadratic = [b for b in bound if b.rule.merges == "quadratic"]
    others: list[Bound] = []
    for b in bound:
        if b.rule.merges == "quadratic":
            continue
        if b.rule.prox is None:
            raise NoProxError(
                f"{b.rule.name} has no proximal operator, on the leaf {name!r}: use it in penalize or "
                "add_penalty_gradient"
            )
        same = [i for i, o in enumerate(others) if _adds(o, b)]
        if same:
            twin = others[same[0]]
            others[same[0]] = twin._replace(strengths=(twin.strengths[0] + b.strengths[0], *twin.strengths[1:]))
        else:
            others.append(b)
    kinds = sorted(b.rule.merges if b.anchor is None else "" for b in others)
    if len(others) > 1 and kinds != ["group", "soft"]:
        raise NoProxError(
            f"the prox of the sum of {' and '.join(b.rule.name for b in others)} is not implemented, on the leaf "
            f"{name!r}: "
            "put them on different leaves with .on, or use penalize or add_penalty_gradient for all but one"
        )
    return quadratic, sorted(others, key=lambda b: b.rule.merges == "group")


def _adds(a: Bound, b: Bound) -> bool:
    same = a.rule == b.rule and a.resolved == b.resolved and len(a.strengths) == 1
    return same and a.rule.linear and a.anchor is None and b.anchor is None


def prox_leaf(wing: Any, name: str, bound: Sequence[Bound], x: Any, step: Any) -> Any:
    quadratic, others = plan(name, bound)
    for b in quadratic:
        (mu,) = b.strengths
        shrink = 1 + step * mu
        x = (x if b.anchor is None else x + step * mu * b.anchor) / shrink
        step = step / shrink
    for b in others:
        x = b.prox(wing, x, step)
    return x

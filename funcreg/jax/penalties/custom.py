"""A penalty of one's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ..._penalty import make
from ..._rule import Rule
from .._wing import Penalty, Strength


@dataclass(frozen=True)
class _Keyword:
    """Hands strengths over by name; a class, so that equal rules compare equal and pickle."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    leading: int  # how many arguments come before the strengths

    def __call__(self, *args: Any) -> Any:
        return self.function(*args[: self.leading], **dict(zip(self.names, args[self.leading :], strict=True)))


@dataclass(frozen=True)
class _Autodiff:
    value: Callable[..., Any]

    def __call__(self, x: Any, *strengths: Any) -> Any:
        return jax.grad(self.value)(x, *strengths)


def custom(
    name: str,
    value: Callable[..., Any],
    grad: Callable[..., Any] | None = None,
    prox: Callable[..., Any] | None = None,
    **strengths: Strength,
) -> Penalty:
    """A penalty of one's own, from functions of one leaf; it composes like the others.

    Example:
        `custom("cauchy", lambda x, lam: lam * (1 + x**2).log().sum(), lam=1e-3)` (torch)

    Args:
        name: what `repr` and errors call it.
        value: `value(x, **strengths) -> scalar`.
        grad: `grad(x, **strengths)`, shaped like `x`; None: automatic differentiation of `value`, with the framework's
            own convention at kinks.
        prox: `prox(x, step_size, **strengths)`, shaped like `x`; `step_size` is a scalar or shaped like `x`. None: it
            has none, and `prox` raises NoProxError.
        strengths: numbers or 0-d arrays, `>= 0`, by name.

    Returns:
        The penalty. Its prox does not merge with that of other parts on the same leaf, quadratic ones excepted.

    Raises:
        ValueError: a negative or infinite strength.
        TypeError: `value`, `grad` or `prox` is no function, or a strength is neither number nor array.
    """
    for argument, function in (("value", value), ("grad", grad), ("prox", prox)):
        if not callable(function) and not (function is None and argument != "value"):
            raise TypeError(f"custom: {argument} must be a function, got {function!r}")
    names = tuple(strengths)
    by_name = _Keyword(value, names, 1)
    rule = Rule(
        name,
        by_name,
        _Autodiff(by_name) if grad is None else _Keyword(grad, names, 1),
        None if prox is None else _Keyword(prox, names, 2),
        names,
    )
    return make(Penalty, rule, *strengths.values())

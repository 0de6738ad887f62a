"""Penalty: a sum of parts, each a rule with strengths on selected leaves. No framework.

This text speaks to a wing through the functions of its `_wing.py`:
`flatten, zeros_like, where, is_complex, is_scalar, is_real, upcast, downcast, cast, concrete, total, own, as_numpy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

from ._checks import check_domain, check_strength
from ._rule import Bound, NoGradError, Rule, brief, grad_leaf, guard_leaf, plan, prox_leaf
from ._selectors import Selector, selector_of
from ._trees import Flat, fitting, leaves_by_name


@dataclass(frozen=True, eq=False)
class Part:
    """One summand of a penalty: `weight * rule(params[selected] - anchor)`, per coordinate times `importance`."""

    rule: Rule
    strengths: tuple[Any, ...]
    selectors: tuple[Selector, ...] = ()
    weight: Any = None
    anchor: Any = None
    importance: Any = None

    def __repr__(self) -> str:
        given = [f"{s:g}" if isinstance(s, (float, int)) else brief(s) for s in self.strengths]
        given += [f"{k}={v!r}" for k, v in self.rule.options if v is not None]
        text = f"{self.rule.name}({', '.join(given)})"
        if self.anchor is not None:
            text = f"anchored({text}{', importance' if self.importance is not None else ''})"
        if self.weight is not None:
            weight = f"{self.weight:g}" if isinstance(self.weight, (float, int)) else brief(self.weight)
            text = f"{weight} * {text}"
        return text + "".join(f" on {selector!r}" for selector in self.selectors)


@dataclass(frozen=True, eq=False, repr=False)
class Penalty:
    """A regularizer as pure functions over a parameter tree: `value`, `grad`, `prox`; composed by `+`, `*` and `.on`.

    It is a pytree whose leaves are its strengths (and anchors), so that it goes through jit, compile, vmap and grad as
    an argument or a result. Leaves that are no floating-point arrays are passed over.
    """

    parts: tuple[Part, ...]
    wing: ClassVar[Any]

    def __repr__(self) -> str:
        return " + ".join(repr(part) for part in self.parts) or "0"

    # --- composing ---

    def on(self, selector: Any) -> Self:
        """The same penalty on selected leaves only; twice means both.

        Args:
            selector: a glob or a list of globs over dotted names and their leading parts (`"hidden"` selects
                `hidden.weight`, `"!..."` excludes); a role (`weights`, `biases`, `norms`); a function
                `(name, leaf) -> bool`; or a tree of bools shaped like the parameters or like a prefix of them.
                A glob that matches nothing raises when the penalty is used; a role or a function that selects nothing
                is silent, so that it survives a port to a model without leaves of that kind.

        Raises:
            TypeError: the selector is none of these.
        """
        chosen = selector_of(self.wing, selector)
        return self._with(*(replace(part, selectors=(*part.selectors, chosen)) for part in self.parts))

    def __add__(self, other: Any) -> Self:
        if isinstance(other, Penalty):
            if type(other) is not type(self):
                raise TypeError("a penalty of the torch wing and one of the JAX wing cannot be added")
            return self._with(*self.parts, *other.parts)
        if isinstance(other, (int, float)) and other == 0:  # the start of sum(...)
            return self
        return NotImplemented

    __radd__ = __add__

    def __mul__(self, factor: Any) -> Self:
        if isinstance(factor, bool) or not (isinstance(factor, (int, float)) or self.wing.is_scalar(factor)):
            return NotImplemented
        check_strength(self.wing, "penalty", "factor", factor)
        return self._with(*(replace(p, weight=factor if p.weight is None else factor * p.weight) for p in self.parts))

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy scalars leave `scalar * penalty` to the penalty

    def _with(self, *parts: Part) -> Self:
        return type(self)(parts)

    # --- the three functions ---

    def value(self, params: Any) -> Any:
        """The sum of the parts over their leaves: a scalar array; half precision accumulates and returns float32."""
        flat, bound = self.bind(params)
        values = [b.value(self.wing.upcast(x)) for x, bs in zip(flat.leaves, bound, strict=True) for b in bs]
        return self.wing.total(values, flat.leaves)

    def grad(self, params: Any) -> Any:
        """The minimal-norm subgradient, a tree like `params`; equals the gradient of `value` also at the kinks.

        Raises:
            NoGradError: a part is an indicator or a count.
        """
        flat, bound = self.bind(params)
        wing = self.wing
        return flat.rebuild_zeros([grad_leaf(wing, x, bs) for x, bs in zip(flat.leaves, bound, strict=True)])

    def guard(self, params: Any) -> Any:
        """The bound that `prox_adam` puts on its metric: `|grad|`, where parts without a gradient count as 0."""
        flat, bound = self.bind(params)
        return flat.rebuild_zeros([guard_leaf(self.wing, x, bs) for x, bs in zip(flat.leaves, bound, strict=True)])

    def prox(self, params: Any, step_size: Any) -> Any:
        r"""The proximal operator, exact for every sum it accepts.

        .. math::
            \mathrm{argmin}_y\; R(y) + \sum_i \frac{(y_i - x_i)^2}{2 \tau_i}

        Args:
            params: the point `x`.
            step_size: `\tau >= 0`: a scalar, or a tree like `params` (the inverse of a diagonal metric) whose leaves
                are scalars or shaped like the parameter.

        Returns:
            A tree like `params`; leaves without a part come back as they are. A step of 0 returns the point exactly.

        Raises:
            NoProxError: a leaf has parts whose sum has no prox here; the message names both.
            ValueError: a negative or infinite step; a step tree that does not fit the parameters.
            TypeError: a step that is no number and no array.
        """
        return self._prox(params, step_size, check=True)

    def _prox(self, params: Any, step_size: Any, check: bool) -> Any:
        """`prox`; a training loop does not check its own steps, in which the NaN of a gradient passes through."""
        flat, bound = self.bind(params)
        wing = self.wing
        steps = _steps(wing, flat, bound, step_size)
        if check:
            _check_steps(wing, flat, bound, params, step_size)
        new = []
        for name, x, bs, step in zip(flat.names, flat.leaves, bound, steps, strict=True):
            if bs:
                up = wing.upcast(x)
                new.append(wing.downcast(prox_leaf(wing, name, bs, up, wing.cast(step, up)), x))
            else:
                new.append(x)
        return flat.rebuild(new)

    def check_prox(self, params: Any) -> None:
        """Raise NoProxError if `prox` would, computing nothing."""
        flat, bound = self.bind(params)
        for name, bs in zip(flat.names, bound, strict=True):
            plan(name, bs)

    def check_grad(self, where: str) -> None:
        """Raise NoGradError if `grad` would, naming the function that needs it."""
        for part in self.parts:
            if part.rule.grad is None:
                raise NoGradError(
                    f"{where}: {part.rule.name} is an indicator or a count and has no gradient; "
                    "use it in prox_sgd or prox_adam"
                )

    # --- plumbing ---

    def bind(self, params: Any) -> tuple[Flat, list[list[Bound]]]:
        """The parts of every leaf."""
        wing = self.wing
        flat = wing.flatten(params)
        flat.check_names("params")
        bound: list[list[Bound]] = [[] for _ in flat.names]
        for part in self.parts:
            anchors = None if part.anchor is None else leaves_by_name(wing, "anchor", part.anchor)
            factors = None if part.importance is None else leaves_by_name(wing, "importance", part.importance)
            for i, chosen in enumerate(_selected(part, flat)):
                if chosen:
                    name, x = flat.names[i], flat.leaves[i]
                    if wing.is_complex(x):
                        raise TypeError(
                            f"{part.rule.name}: the leaf {name!r} is complex; penalties act on real arrays: store "
                            "real and imaginary parts as a last axis of two (group_lasso(axis=-1) then shrinks "
                            "magnitudes) or exclude the leaf with .on"
                        )
                    bound[i].append(_bind_part(wing, part, name, wing.upcast(x), anchors, factors))
        return flat, bound


def _selected(part: Part, flat: Flat) -> list[bool]:
    chosen = [True] * len(flat.names)
    for selector in part.selectors:
        also = selector.select(flat.names, flat.leaves, part.rule.name, flat.passed_over)
        chosen = [a and b for a, b in zip(chosen, also, strict=True)]
    return chosen


def _bind_part(wing: Any, part: Part, name: str, x: Any, anchors: Any, factors: Any) -> Bound:
    rule = part.rule
    for argument, s in (*zip(rule.strengths, part.strengths, strict=True), ("weight", part.weight)):
        if not isinstance(s, (int, float)) and getattr(s, "ndim", 0) != 0:  # a compiled float has no attributes
            raise ValueError(
                f"{rule.name}: {argument} must be a scalar, got an array of shape {tuple(s.shape)}; "
                "for several strengths vmap over the penalty: vmap(lambda p: p.value(params))(penalty)"
            )
    strengths = [wing.cast(s, x) for s in part.strengths]
    weight = None if part.weight is None else wing.cast(part.weight, x)
    if rule.linear and weight is not None:
        strengths[0], weight = strengths[0] * weight, None
    if factors is not None:
        strengths[0] = strengths[0] * wing.cast(fitting("importance", factors, name, x, scalar=True), x)
    anchor = None if anchors is None else wing.cast(fitting("anchor", anchors, name, x, scalar=False), x)
    options = dict(rule.options)
    return Bound(rule, tuple(strengths), rule.resolve(name, tuple(x.shape), options), weight, anchor)


def _steps(wing: Any, flat: Flat, bound: Sequence[Sequence[Bound]], step_size: Any) -> list[Any]:
    """The step of every leaf with a part."""
    if wing.is_scalar(step_size):
        return [step_size] * len(flat.names)
    if step_size is None or isinstance(step_size, str):
        raise TypeError(f"prox: step_size must be a number, an array or a tree like the parameters, got {step_size!r}")
    by_name = leaves_by_name(wing, "step_size", step_size)
    return [
        fitting("step_size", by_name, name, x, scalar=True) if bs else None
        for name, x, bs in zip(flat.names, flat.leaves, bound, strict=True)
    ]


def _check_steps(wing: Any, flat: Flat, bound: Sequence[Sequence[Bound]], params: Any, step_size: Any) -> None:
    """Refuse what is no step, by name; a leaf of the parameters that was passed over may have one."""
    if wing.is_scalar(step_size):
        _check_step(wing, "prox: step_size", step_size)
        return
    by_name = leaves_by_name(wing, "step_size", step_size)
    more = by_name.keys() - set(flat.names)
    more = more and more - set(wing.flatten(params, scalars=True).names)
    if more:
        raise ValueError(f"prox: step_size has a leaf {min(more)!r} that the parameters do not have")
    for name, bs in zip(flat.names, bound, strict=True):
        if bs:
            _check_step(wing, f"prox: step_size of the leaf {name!r}", by_name[name])


def _check_step(wing: Any, what: str, step: Any) -> None:
    if not wing.is_real(step):
        raise TypeError(f"{what} must be a real number or array, got {step!r}")
    check_domain(wing, what, step)


AnyPenalty = TypeVar("AnyPenalty", bound=Penalty)


def make(penalty_class: type[AnyPenalty], rule: Rule, *strengths: Any) -> AnyPenalty:
    """A penalty of one part; its strengths are checked against the domain `[0, inf)`."""
    for name, value in zip(rule.strengths, strengths, strict=True):
        check_strength(penalty_class.wing, rule.name, name, value)
    return penalty_class((Part(rule, strengths),))


# --- the pytree: strengths, weights, anchors and importances are its children, all else is static ---


def flatten_penalty(penalty: Penalty) -> tuple[list[Any], tuple[Any, ...]]:
    """Children and static part of the pytree; what is None (no weight, no anchor) is no child."""
    children: list[Any] = []
    static = []
    for part in penalty.parts:
        optional = (part.weight, part.anchor, part.importance)
        children += [*part.strengths, *(x for x in optional if x is not None)]
        static.append((part.rule, part.selectors, tuple(x is not None for x in optional)))
    return children, tuple(static)


def unflatten_penalty(penalty_class: type[AnyPenalty], static: Sequence[Any], children: Sequence[Any]) -> AnyPenalty:
    """The inverse of `flatten_penalty`; checks nothing, since transforms put placeholders in place of strengths."""
    rest = list(children)
    parts = []
    for rule, selectors, given in static:
        strengths = tuple(rest.pop(0) for _ in rule.strengths)
        weight, anchor, importance = (rest.pop(0) if g else None for g in given)
        parts.append(Part(rule, strengths, selectors, weight, anchor, importance))
    return penalty_class(tuple(parts))

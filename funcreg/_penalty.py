"""Penalty: a sum of parts, each a rule with strengths on selected leaves. Names, sums, anchors and errors; no
framework.

The formulas live in the wings, one file a penalty. This text speaks to a wing through the functions of its `_wing.py`:
`flatten, zeros_like, where, is_complex, is_scalar, is_real, upcast, downcast, cast, concrete, total, own, as_numpy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from . import _selectors
from ._selectors import Selector


class NoProxError(ValueError):
    """The proximal operator is not implemented, on the leaf and for the parts that the message names."""


class NoGradError(ValueError):
    """The penalty is an indicator or a count: it has a proximal operator, but no gradient."""


class Flat(NamedTuple):
    """A parameter tree taken apart: the leaves a penalty may act on, their names, and the ways back to a tree."""

    names: list[str]
    leaves: list[Any]
    rebuild: Callable[[list[Any]], Any]  # leaves that were passed over come back as they were
    rebuild_zeros: Callable[[list[Any]], Any]  # leaves that were passed over come back as zeros
    passed_over: list[tuple[str, Any]]  # leaves that no penalty acts on, with their names

    def check_names(self, where: str) -> None:
        """Refuse two leaves of one name: a selector could not tell them apart."""
        if len(set(self.names)) < len(self.names):
            name = next(n for i, n in enumerate(self.names) if n in self.names[:i])
            raise ValueError(f"{where}: two leaves have the name {name!r}; rename one of them")


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
        given = [f"{s:g}" if isinstance(s, (float, int)) else _brief(s) for s in self.strengths]
        given += [f"{k}={v!r}" for k, v in self.rule.options if v is not None]
        text = f"{self.rule.name}({', '.join(given)})"
        if self.anchor is not None:
            text = f"anchored({text}{', importance' if self.importance is not None else ''})"
        if self.weight is not None:
            weight = f"{self.weight:g}" if isinstance(self.weight, (float, int)) else _brief(self.weight)
            text = f"{weight} * {text}"
        return text + "".join(f" on {selector!r}" for selector in self.selectors)


def _brief(x: Any) -> str:
    return f"<{type(x).__name__}{list(getattr(x, 'shape', []))}>" if getattr(x, "ndim", 0) else str(x)


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
            raise TypeError(f"{self.rule.name}: value must return a scalar array, got {_brief(v)}")
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
        chosen = _selector(self.wing, selector)
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
            anchors = None if part.anchor is None else _by_name(wing, "anchor", part.anchor)
            factors = None if part.importance is None else _by_name(wing, "importance", part.importance)
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


_NO_SELECTOR = (
    "on: expected a glob, a list of globs, a role (weights, biases, norms), a function (name, leaf) -> bool or a tree "
    "of bools, got "
)


def _selector(wing: Any, given: Any) -> Selector:
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and all(isinstance(g, str) for g in given)):
        globs = (given,) if isinstance(given, str) else tuple(given)
        if not globs:
            raise TypeError("on: an empty list selects nothing; give at least one glob")
        for glob in globs:
            _selectors.check_glob(glob, "on")
        return Selector(globs=globs)
    # A model can be called, but says nothing about a leaf. callable() first: torch.compile cannot trace __mro__.
    model = callable(given) and any(cls.__name__ == "Module" for cls in type(given).__mro__)
    try:
        flat = wing.flatten(given, scalars=True)
    except TypeError:
        if callable(given) and not model:
            return Selector(function=given)
        raise TypeError(_NO_SELECTOR + type(given).__name__) from None
    flags = tuple(zip(flat.names, flat.leaves, strict=True))
    wrong = [name for name, flag in flags if not isinstance(flag, bool)]
    if callable(given) and not model and (wrong or not flags):
        function: Callable[[str, Any], Any] = given
        return Selector(function=function)
    globs_among = isinstance(given, (list, tuple)) and any(isinstance(g, str) for g in given)
    if wrong or not flags or globs_among:
        raise TypeError(_NO_SELECTOR + type(given).__name__ + (f" with the leaf {wrong[0]!r}" if wrong else ""))
    flat.check_names("on")
    return Selector(flags=flags)


def check_strength(wing: Any, where: str, name: str, value: Any) -> None:
    """Refuse what is no strength: functions, text, negative or non-finite numbers. Traced values are not checked."""
    if callable(value) and not hasattr(value, "shape"):
        raise TypeError(
            f"{where}: {name} must be a number or an array, got a function; for a schedule give the transformation a "
            f"function count -> Penalty, such as prox_adam(learning_rate, lambda count: {where}(schedule(count)))"
        )
    if not wing.is_real(value):
        library, home = type(value).__module__.split(".")[0], wing.__name__.split(".")[1]
        if hasattr(value, "dtype") and library not in ("numpy", home, home + "lib"):
            given = f"an array of {library}; funcreg.{home} takes those of {home} and of NumPy"
        else:
            given = repr(value)
        raise TypeError(f"{where}: {name} must be a number or an array, got {given}")
    check_domain(wing, f"{where}: {name}", value)


def check_domain(wing: Any, what: str, value: Any) -> None:
    """Refuse a concrete value with an entry outside `[0, inf)`."""
    wrong = wing.concrete(value)
    if wrong is not None and not 0 <= wrong < float("inf"):
        raise ValueError(f"{what} must be {'finite' if wrong > 0 else '>= 0'}, got {wrong:g}")


AnyPenalty = TypeVar("AnyPenalty", bound=Penalty)


def make(penalty_class: type[AnyPenalty], rule: Rule, *strengths: Any) -> AnyPenalty:
    """A penalty of one part; its strengths are checked against the domain `[0, inf)`."""
    for name, value in zip(rule.strengths, strengths, strict=True):
        check_strength(penalty_class.wing, rule.name, name, value)
    return penalty_class((Part(rule, strengths),))


def one_of(where: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse an unknown option value, listing the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{where}: {argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


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


# --- combinators ---


def layerwise(rows: Mapping[str, AnyPenalty | None]) -> AnyPenalty:
    """One penalty per row of a table of globs; the first row that matches a leaf wins.

    Args:
        rows: glob -> penalty, or None for leaves without one. In `{"head.weight": fr.l1(1e-3), "*": fr.l2(1e-4)}` the
            head gets l1 and no l2.

    Returns:
        The penalty. Using it raises ValueError for a leaf in no row, for a row that matches nothing, and for one whose
        leaves are all taken by earlier rows; `"*"`, the rest, may be left with none.

    Raises:
        TypeError: a row is no penalty and not None, or every row is None.
    """
    if not isinstance(rows, Mapping):
        raise TypeError(f"layerwise: rows must be a dict of globs and penalties, got {rows!r}")
    globs = tuple(rows)
    parts: list[Part] = []
    for i, (glob, penalty) in enumerate(rows.items()):
        _selectors.check_glob(glob, "layerwise")
        if glob.startswith("!"):
            raise TypeError(f"layerwise: a row cannot exclude, got {glob!r}; put a row with None above the others")
        if not (penalty is None or isinstance(penalty, Penalty)):
            raise TypeError(f"layerwise: row {glob!r} must be a penalty or None, got {penalty!r}")
        for part in penalty.parts if penalty is not None else ():
            parts.append(replace(part, selectors=(*part.selectors, Selector(rows=globs, row=i))))
    first = next((penalty for penalty in rows.values() if penalty is not None), None)
    if first is None:
        raise TypeError(f"layerwise: at least one row must be a penalty, got {dict(rows)!r}")
    total = first._with(*parts)
    for penalty in rows.values():
        if penalty is not None and type(penalty) is not type(total):
            raise TypeError("layerwise: a penalty of the torch wing and one of the JAX wing in one table")
    return total


def anchored(penalty: AnyPenalty, anchor: Any, importance: Any = None) -> AnyPenalty:
    r"""The penalty of the distance from an anchor: fine-tuning that stays near a predefined state.

    .. math::
        \Omega(w) = R(w - a), \qquad
        \Omega(w) = \sum_i F_i\, r(w_i - a_i) \;\text{ with importance } F

    With `l2` this is L2-SP, with the Fisher information as importance EWC (with the factor 1/2 of the paper), and with
    the round's starting point FedProx.

    Args:
        penalty: what to shift.
        anchor: `a`, a tree with the leaves that the penalty selects; copied, so that training in place does not
            move it.
        importance: `F >= 0`, a tree like `anchor` with leaves that are scalars or shaped like the parameter; for
            penalties that are sums over coordinates (l1, l2).

    Returns:
        The shifted penalty. Quadratic parts still merge in the prox of a sum, others do not.

    Raises:
        ValueError: a negative or infinite importance.
        TypeError: not a penalty, an anchor twice, or an importance for a penalty that is no sum over coordinates.

    Reference:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", 2018,
        arXiv:1802.01483; Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017,
        arXiv:1612.00796.
    """
    if not isinstance(penalty, Penalty):
        raise TypeError(f"anchored: penalty must be a penalty such as l2(1e-3), got {type(penalty).__name__}")
    if anchor is None:
        raise TypeError("anchored: anchor must be a tree like the parameters, got None")
    parts = []
    for part in penalty.parts:
        if part.anchor is not None:
            raise TypeError(f"anchored: {part.rule.name} has an anchor already")
        if importance is not None and not (part.rule.linear and part.rule.separable):
            raise TypeError(
                f"anchored: importance needs a penalty that is a sum over coordinates (l1, l2), got {part.rule.name}"
            )
        parts.append(part)
    wing = penalty.wing
    # by name: what is no array stays behind, and every transform takes the rest
    anchor = wing.own(_by_name(wing, "anchor", anchor))
    if importance is not None:
        importance = wing.own(_by_name(wing, "importance", importance))
        for name, factor in importance.items():
            check_domain(wing, f"anchored: importance of the leaf {name!r}", factor)
    parts = [replace(part, anchor=anchor, importance=importance) for part in parts]
    return penalty._with(*parts)


# --- trees that belong together ---


def align(wing: Any, where: str, params: Any, **trees: Any) -> tuple[Flat, dict[str, list[Any]]]:
    """The leaves of several trees in the order of the parameters, matched by name.

    Raises:
        ValueError: a tree lacks a leaf of the parameters, has one more, or has one of another shape; names the first.
    """
    flat = wing.flatten(params)
    flat.check_names("params")
    lists = {}
    names = set(flat.names)
    for what, tree in trees.items():
        by_name = _by_name(wing, f"{where}: {what}", tree, scalars=False)
        for name in by_name:
            if name not in names:
                there = name in wing.flatten(params, scalars=True).names
                reason = "is no floating-point array in the parameters" if there else "the parameters do not have"
                raise ValueError(f"{where}: {what} has a leaf {name!r} that {reason}")
        for name in names - by_name.keys():
            _refuse_none(wing, f"{where}: {what}", tree, name)
        lists[what] = [
            _fitting(f"{where}: {what}", by_name, name, x, scalar=False)
            for name, x in zip(flat.names, flat.leaves, strict=True)
        ]
    return flat, lists


def _refuse_none(wing: Any, what: str, tree: Any, name: str) -> None:
    """Say so if a leaf is missing because it is None, as `.grad` of what took no part in a loss is."""
    paths, leaves, _ = wing.paths_and_leaves(tree)
    if any(leaf is None and _selectors.leaf_name(path) == name for path, leaf in zip(paths, leaves, strict=True)):
        raise ValueError(
            f"{what}: the leaf {name!r} is None; give it zeros if it took no part in the loss, or leave it out of the "
            "parameters if it is not trained"
        )


# --- one leaf ---


def _by_name(wing: Any, what: str, tree: Any, scalars: bool = True) -> dict[str, Any]:
    flat = wing.flatten(tree, scalars=scalars)
    flat.check_names(what)
    return dict(zip(flat.names, flat.leaves, strict=True))


def _fitting(what: str, by_name: Mapping[str, Any], name: str, x: Any, scalar: bool) -> Any:
    """The leaf of another tree that belongs to a parameter."""
    if name not in by_name:
        have = ", ".join(list(by_name)[:5])
        raise ValueError(f"{what}: the leaf {name!r} of the parameters is missing; {what} has {have or 'no leaves'}")
    shape = tuple(getattr(by_name[name], "shape", ()))
    if shape != tuple(x.shape) and not (scalar and shape == ()):
        raise ValueError(f"{what}: the leaf {name!r} must have the parameter's shape {tuple(x.shape)}, got {shape}")
    return by_name[name]


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
        strengths[0] = strengths[0] * wing.cast(_fitting("importance", factors, name, x, scalar=True), x)
    anchor = None if anchors is None else wing.cast(_fitting("anchor", anchors, name, x, scalar=False), x)
    options = dict(rule.options)
    return Bound(rule, tuple(strengths), rule.resolve(name, tuple(x.shape), options), weight, anchor)


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


def _steps(wing: Any, flat: Flat, bound: Sequence[Sequence[Bound]], step_size: Any) -> list[Any]:
    """The step of every leaf with a part."""
    if wing.is_scalar(step_size):
        return [step_size] * len(flat.names)
    if step_size is None or isinstance(step_size, str):
        raise TypeError(f"prox: step_size must be a number, an array or a tree like the parameters, got {step_size!r}")
    by_name = _by_name(wing, "step_size", step_size)
    return [
        _fitting("step_size", by_name, name, x, scalar=True) if bs else None
        for name, x, bs in zip(flat.names, flat.leaves, bound, strict=True)
    ]


def _check_steps(wing: Any, flat: Flat, bound: Sequence[Sequence[Bound]], params: Any, step_size: Any) -> None:
    """Refuse what is no step, by name; a leaf of the parameters that was passed over may have one."""
    if wing.is_scalar(step_size):
        _check_step(wing, "prox: step_size", step_size)
        return
    by_name = _by_name(wing, "step_size", step_size)
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

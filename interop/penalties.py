"""Penalties across: `pair.penalty_to_jax` and `pair.penalty_to_torch`.

A penalty crosses part by part. Its selectors are asked which parameters they select, and the part on the other side
names their twins; a role (`weights`, `biases`, `norms`) stays one if it selects the twins there. Strengths stay;
anchors and importances cross with their parameters. What depends on a layout, the groups of a group lasso, is compared
and not translated: the partition of a parameter into groups is taken through its link, and axes are sought that cut the
twin into the same groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import torch
from torch import Tensor

import funcreg.jax
import funcreg.torch
from funcreg import _selectors
from funcreg._penalty import Part, Penalty
from funcreg._rule import Rule
from funcreg._selectors import Selector

from . import arrays
from ._refusals import TO_TORCH, checked
from .links import Arrays, Link

if TYPE_CHECKING:
    from .pair import Pair

_ROLES = (_selectors.weights, _selectors.biases, _selectors.norms)
# One penalty of each rule that the wings share, by its name; elastic_net and sparse_group_lasso are sums of these.
_EXAMPLES: Mapping[str, Callable[[Any], Penalty]] = {
    "l1": lambda fr: fr.l1(1.0),
    "l2": lambda fr: fr.l2(1.0),
    "group_lasso": lambda fr: fr.group_lasso(1.0, per="output"),
    "non_negative": lambda fr: fr.non_negative(),
}


@dataclass(frozen=True)
class _Side:
    """One side of a pair as a penalty sees it.

    Attributes:
        fr: the wing.
        forms: the shape of each of its parameters, by name.
        take: a tree of the other wing's arrays as one of this wing's.
        shaped: what a selector may look at: arrays without values.
    """

    fr: ModuleType
    forms: Mapping[str, tuple[int, ...]]
    take: Callable[[Any], Any]
    shaped: Mapping[str, Any]

    def rule(self, name: str) -> Rule | None:
        return _EXAMPLES[name](self.fr).parts[0].rule if name in _EXAMPLES else None


@dataclass(frozen=True)
class _Way:
    """A link in the direction of the crossing."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    move: Callable[..., Arrays]
    sums: str


def penalty_to_jax(pair: "Pair", penalty: Penalty) -> Any:
    """The penalty of the JAX wing that is to the flax parameters what this one is to PyTorch's."""
    if not isinstance(penalty, funcreg.torch.Penalty):
        raise TypeError(f"pair.penalty_to_jax: penalty must be one of funcreg.torch, got {_kind(penalty)}")
    ways = [_Way(link.torch, link.jax, link.to_jax, link.sums) for link in _links(pair)]
    return _Crossing("pair.penalty_to_jax", *_sides(pair), ways).penalty(penalty)


def penalty_to_torch(pair: "Pair", penalty: Penalty) -> Any:
    """The penalty of the PyTorch wing that is to PyTorch's parameters what this one is to flax's."""
    if not isinstance(penalty, funcreg.jax.Penalty):
        raise TypeError(f"pair.penalty_to_torch: penalty must be one of funcreg.jax, got {_kind(penalty)}")
    ways = [_Way(link.jax, link.torch, link.to_torch, link.sums) for link in _links(pair)]
    torch_side, jax_side = _sides(pair)
    return _Crossing("pair.penalty_to_torch", jax_side, torch_side, ways).penalty(penalty)


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def _links(pair: "Pair") -> list[Link]:
    return [link for link in pair.links if set(link.torch) <= pair.torch.trained]


def _sides(pair: "Pair") -> tuple[_Side, _Side]:
    ours = {name: pair.torch.forms[name].shape for name in pair.parameters}
    theirs = {name: form for name, form in pair.flax.forms.items() if name in pair.flax.trained}
    now = pair._dtypes()
    tensors = {name: torch.empty(x, dtype=TO_TORCH[now[name]], device="meta") for name, x in ours.items()}
    structs = {name: jax.ShapeDtypeStruct(*form) for name, form in theirs.items()}
    return (
        _Side(funcreg.torch, ours, arrays.to_torch, tensors),
        _Side(funcreg.jax, {name: form.shape for name, form in theirs.items()}, arrays.to_jax, structs),
    )


@dataclass(frozen=True)
class _Crossing:
    where: str
    ours: _Side
    theirs: _Side
    ways: Sequence[_Way]

    def penalty(self, penalty: Penalty) -> Penalty:
        parts = [new for part in penalty.parts for new in self._part(part)]
        return self.theirs.fr.Penalty(tuple(parts))

    def _part(self, part: Part) -> list[Part]:
        rule = self.theirs.rule(part.rule.name)
        ours = self.ours.rule(part.rule.name)
        if rule is None or ours is None or replace(part.rule, options=ours.options) != ours:
            raise ValueError(
                f"{self.where}: {part.rule.name!r} is a penalty of one's own (custom), whose functions belong to one "
                "framework; make it with fr.custom on the other side and add it there"
            )
        names = self._selected(part)
        ways = self._ways(part, names)
        new = replace(
            part,
            rule=rule,
            strengths=tuple(map(self._number, part.strengths)),
            weight=None if part.weight is None else self._number(part.weight),
            selectors=(),
            anchor=self._tree(part, "anchor", part.anchor, ways),
            importance=self._tree(part, "importance", part.importance, ways),
        )
        everywhere = not part.selectors
        by_options: dict[tuple[tuple[str, Any], ...], list[str]] = {}
        for options, theirs in self._options(part, rule, ways):
            by_options.setdefault(options, []).extend(theirs)
        return [
            replace(
                new,
                rule=replace(rule, options=options),
                selectors=() if everywhere and set(theirs) == set(self.theirs.forms) else self._selectors(part, theirs),
            )
            for options, theirs in by_options.items()
        ]

    def _number(self, x: Any) -> Any:
        return self.theirs.take(x) if isinstance(x, (Tensor, jax.Array)) else x

    # --- which leaves ---

    @staticmethod
    def _flat(side: _Side) -> tuple[list[str], list[Any]]:
        """The names of a side's parameters, and what selectors see of them."""
        return list(side.forms), [side.shaped[name] for name in side.forms]

    def _selected(self, part: Part) -> list[str]:
        names, leaves = self._flat(self.ours)
        flags = [True] * len(names)
        for selector in part.selectors:
            if selector.function is not None:
                selector = replace(selector, function=self._without_values(selector.function))
            flags = [a and b for a, b in zip(flags, selector.select(names, leaves, self.where), strict=True)]
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    def _without_values(self, function: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
        """The selector function; where it looks at more than there is, an error that says so."""

        def select(name: str, leaf: Any) -> Any:
            try:
                return function(name, leaf)
            except Exception as error:
                raise TypeError(
                    f"{self.where}: the selector function {getattr(function, '__name__', function)!r} failed for "
                    f"{name!r}: {error}; when a penalty crosses, a selector sees names, shapes and dtypes but no "
                    "values; select by these, or by a list of names"
                ) from error

        return select

    def _ways(self, part: Part, names: Sequence[str]) -> list[_Way]:
        """The links of the selected leaves, which must be selected whole and have twins of their own."""
        chosen, text = set(names), part.rule.name
        ways = [way for way in self.ways if chosen & set(way.ours)]
        linked = [name for way in ways for name in way.ours]
        for way in ways:
            out = [name for name in way.ours if name not in chosen]
            if out:
                raise ValueError(
                    f"{self.where}: {text} selects {_some(way.ours, chosen)} but not {_some(out)}, which are together "
                    f"{', '.join(map(repr, way.theirs))} on the other side; select all of them or none"
                )
            if way.sums:
                raise ValueError(
                    f"{self.where}: {text} selects {', '.join(map(repr, way.ours))}: {way.sums}: a penalty of the "
                    "summands is none of the sum; leave them out with .on"
                )
        for name in names:
            if name not in linked:
                raise ValueError(
                    f"{self.where}: {text} selects {name!r}, which has no twin; leave it out with .on('!{name}')"
                )
            if linked.count(name) > 1:
                raise ValueError(
                    f"{self.where}: {text} selects {name!r}, which is tied here and has several leaves on the other "
                    "side: it would count once here and several times there; leave it out with .on"
                )
        return ways

    def _selectors(self, part: Part, names: Sequence[str]) -> tuple[Selector, ...]:
        """The roles of the part if they select the same leaves on the other side, else the names one by one."""
        everything, leaves = self._flat(self.theirs)
        functions = [selector.function for selector in part.selectors]
        if functions and all(f in _ROLES for f in functions):
            flags = [all(f(n, x) for f in functions if f) for n, x in zip(everything, leaves, strict=True)]
            if {n for n, flag in zip(everything, flags, strict=True) if flag} == set(names):
                return part.selectors
        if not names:  # a role or a function that selects nothing
            return (Selector(flags=tuple((name, False) for name in everything)),)
        return (Selector(globs=tuple(map(_literal, names))),)

    # --- anchors and importances ---

    def _tree(self, part: Part, what: str, tree: Any, ways: Sequence[_Way]) -> dict[str, Any] | None:
        if tree is None:
            return None
        flat = self.ours.fr.Penalty.wing.flatten(tree, scalars=True)
        by_name = dict(zip(flat.names, flat.leaves, strict=True))
        new: dict[str, Any] = {}
        for way in ways:
            missing = [name for name in way.ours if name not in by_name]
            if missing:
                raise ValueError(f"{self.where}: the {what} of {part.rule.name} lacks the leaf {missing[0]!r}")
            values = [self._value(what, name, by_name[name]) for name in way.ours]
            if all(np.ndim(x) == 0 and x == values[0] for x in values):
                moved: Sequence[Any] = [values[0]] * len(way.theirs)  # one factor for all coordinates
            else:
                dtype = next(x.dtype for x in values if np.ndim(x))
                shapes = [self.ours.forms[name] for name in way.ours]
                full = [np.broadcast_to(np.asarray(x, dtype), shape) for x, shape in zip(values, shapes, strict=True)]
                moved = way.move(*full)
            new |= dict(zip(way.theirs, moved, strict=True))
        return self.theirs.take(new)

    def _value(self, what: str, name: str, x: Any) -> Any:
        if isinstance(x, (int, float)):
            return x
        shape = self.ours.forms[name]
        if tuple(x.shape) not in (shape, ()):
            raise ValueError(f"{self.where}: the {what} of {name!r} has the shape {tuple(x.shape)}, must be {shape}")
        checked(self.where, f"the {what} of {name!r}", x)
        return np.asarray(arrays.to_host(x))

    # --- groups ---

    def _options(self, part: Part, rule: Rule, ways: Sequence[_Way]) -> list[tuple[tuple[tuple[str, Any], ...], Any]]:
        """For each link the options under which the other wing cuts its leaves into the same groups."""
        if part.rule.merges != "group":
            return [(part.rule.options, [name for way in ways for name in way.theirs])]
        found = []
        options = dict(part.rule.options)
        for way in ways:
            cuts = [np.unique(cut, return_inverse=True) for cut in way.move(*self._groups(part, way))]
            numbers = [n for present, _ in cuts for n in present]
            for name, (present, cut) in zip(way.theirs, cuts, strict=True):
                shape = self.theirs.forms[name]
                same = self._same_cut(rule, options, name, cut.reshape(shape), present.size)
                if same is None or len(set(numbers)) < len(numbers):  # or a group would span two leaves
                    raise ValueError(
                        f"{self.where}: no axes of {name!r} {shape} cut it into the groups that {part.rule.name} makes "
                        f"of {', '.join(map(repr, way.ours))}; leave it out with .on"
                    )
                found.append((same, [name]))
        return found

    def _groups(self, part: Part, way: _Way) -> list[np.ndarray]:
        """Each leaf with the number of its group in the place of every entry."""
        groups, count = [], 0
        for name in way.ours:
            shape = self.ours.forms[name]
            axes, _ = part.rule.resolve(name, shape, dict(part.rule.options))
            groups.append(count + _partition(shape, axes))
            count += math.prod(shape)
        return groups

    @staticmethod
    def _same_cut(
        rule: Rule, options: Mapping[str, Any], name: str, cut: np.ndarray, count: int
    ) -> tuple[tuple[str, Any], ...] | None:
        """`per` if the part has one and it agrees, else the axes inside a group that do.

        Args:
            rule: of the other wing.
            options: of the part.
            name: of the leaf.
            cut: for every entry the number of its group, of `range(count)`.
            count: the number of groups.
        """
        tries = [dict(options)] if options["per"] is not None else []
        axes_from_the_end = range(-cut.ndim, 0)
        subsets = chain.from_iterable(combinations(axes_from_the_end, n) for n in range(cut.ndim + 1))
        tries += [dict(options, axis=axes, per=None) for axes in subsets]
        for one in tries:
            axes, _ = rule.resolve(name, cut.shape, one)
            if _same_groups(cut, _partition(cut.shape, axes), count):
                return tuple(one.items())
        return None


def _partition(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """For every entry the number of its group."""
    counted = [1 if i - len(shape) in axes else n for i, n in enumerate(shape)]
    return np.broadcast_to(np.arange(math.prod(counted)).reshape(counted), shape)


def _same_groups(cut: np.ndarray, other: np.ndarray, count: int) -> bool:
    """Whether two numberings put the same entries together; the first one uses all of `range(count)`."""
    if cut.size == 0:
        return True
    if int(other.max()) + 1 != count:
        return False
    name_of = np.empty(count, other.dtype)
    name_of[cut] = other
    return bool((name_of[cut] == other).all())


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _some(names: Sequence[str], among: set[str] | None = None) -> str:
    return ", ".join(repr(name) for name in names if among is None or name in among)

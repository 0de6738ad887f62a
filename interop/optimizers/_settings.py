"""What never changes while a ported optimizer runs: its class, its groups, and which leaf is in which group."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import torch
from flax import serialization
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from funcreg._rule import Bound
from funcreg._selectors import leaf_name
from funcreg.jax._wing import paths_and_leaves
from funcreg.torch.attach import Handle

from ._rules import REFUSED, RULES, Rule

NO_GROUP = -1
Terms = tuple[tuple[str, tuple[float | None, ...]], ...]  # of the penalty on a leaf; None where it is no number


@jax.tree_util.register_static
@dataclass(frozen=True)
class Settings:
    """The constants of a ported optimizer; a pytree without leaves, so that a state carries them through jit.

    Attributes:
        optimizer: the name of the class, `"AdamW"`.
        groups: per parameter group its hyper-parameters, as (name, value) pairs; without the learning rate.
        group_of: the group of every JAX leaf, as (name, group) pairs; `NO_GROUP` for one that no group holds.
        frozen: the names of the JAX leaves that are never updated.
        penalized: whether a penalty was attached.
        penalty: of it, by leaf, what can be compared: rules, options and strengths.
    """

    optimizer: str
    groups: tuple[tuple[tuple[str, Any], ...], ...]
    group_of: tuple[tuple[str, int], ...]
    frozen: frozenset[str]
    penalized: bool = False
    penalty: tuple[tuple[str, Terms], ...] = ()

    @property
    def rule(self) -> Rule:
        return RULES[getattr(torch.optim, self.optimizer)]

    def hyper(self, group: int) -> dict[str, Any]:
        return dict(self.groups[group])

    def moments(self, group: int) -> tuple[str, ...]:
        """The arrays of a leaf's state that are like the leaf, by PyTorch's names."""
        return () if group == NO_GROUP else self.rule.moments(self.hyper(group))

    def scalars(self, group: int) -> dict[str, float | bool]:
        """The 0-d arrays of a leaf's state, and their first values."""
        if not self.moments(group):
            return {}
        scale = {"prox_scale": 0.0} if self.penalized and self.optimizer == "SGD" else {}
        return {**self.rule.scalars, **scale}

    def first_value(self, group: int) -> float:
        """What the moments begin with."""
        return self.hyper(group).get("initial_accumulator_value", 0.0)

    def names(self) -> list[str]:
        """The names of all arrays that some leaf has."""
        groups = range(len(self.groups))
        return list(dict.fromkeys(what for i in groups for what in (*self.moments(i), *self.scalars(i))))


# flax's checkpoints know no static nodes: what is constant is neither saved nor restored
serialization.register_serialization_state(Settings, lambda _: {}, lambda settings, _: settings)


def settings_of(where: str, pair: Any, optimizer: Optimizer) -> Settings:
    """The settings of an optimizer over the parameters of a pair; every optimizer that has no exact twin is refused."""
    rule = rule_of(where, optimizer)
    groups = groups_of(where, pair, optimizer)
    for i, group in enumerate(optimizer.param_groups):
        _refuse_narrow(where, type(optimizer), i, group)
    own = dict(pair.net.named_parameters())
    handle = handle_of(where, optimizer)
    terms = {} if handle is None else {p: _terms(parts) for p, (_, parts) in handle._bound.items()}
    each = {
        name: _Member(i, i == NO_GROUP or not own[name].requires_grad, terms.get(own[name], ()))
        for name, i in groups.items()
    }
    pair = crossing(where, pair, groups)
    for link in pair.links:
        apart = {each[name]: name for name in link.torch if name in each}
        if len(apart) > 1:
            one, other = list(apart.values())[:2]
            raise ValueError(
                f"{where}: {one!r} and {other!r} are one leaf on the JAX side, {', '.join(map(repr, link.jax))}, but "
                "differ in their group of the optimizer, in requires_grad or in their penalty; treat them alike"
            )
    members = named(pair.spread(each))
    return Settings(
        type(optimizer).__name__,
        tuple(_hyper(rule, optimizer, group) for group in optimizer.param_groups),
        tuple((name, member.group) for name, member in members.items()),
        frozenset(name for name, member in members.items() if member.frozen),
        handle is not None,
        () if handle is None else tuple((name, member.terms) for name, member in members.items()),
    )


@dataclass(frozen=True)
class _Member:
    group: int
    frozen: bool
    terms: Terms = ()


def _terms(bound: list[Bound]) -> Terms:
    """In an order of their own: that of the parts of a sum says nothing."""
    terms = [(_rule(part), tuple(map(_known, (*part.strengths, part.weight)))) for part in bound]
    return tuple(sorted(terms, key=str))


def _rule(part: Bound) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in part.rule.options if value is not None)
    return f"{'anchored ' if part.anchor is not None else ''}{part.rule.name}" + (f"({options})" if options else "")


def _known(strength: Any) -> float | None:
    return float(strength) if isinstance(strength, (int, float)) or getattr(strength, "ndim", None) == 0 else None


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree on the JAX side by their dotted names, as penalties name them."""
    paths, leaves, _ = paths_and_leaves(tree)
    by_name: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        name = leaf_name(path)
        if name in by_name:
            raise ValueError(f"the tree has two leaves that are called {name!r}; rename one of them")
        by_name[name] = leaf
    return by_name


def rule_of(where: str, optimizer: Any) -> Rule:
    if type(optimizer) in RULES:
        return RULES[type(optimizer)]
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{where}: optimizer must be a torch.optim.Optimizer, got {name}")
    if name in REFUSED and type(optimizer) is getattr(torch.optim, name, None):
        raise TypeError(f"{where}: {name} has no exact twin: {REFUSED[name]}")
    known = ", ".join(cls.__name__ for cls in RULES)
    base = next((cls.__name__ for cls in type(optimizer).__mro__ if cls in RULES), None)
    why = f"a subclass of {base}, which may step differently" if base else "an optimizer that is not known"
    raise TypeError(f"{where}: {name} is {why}; known are, by their exact class, {known}")


def groups_of(where: str, pair: Any, optimizer: Optimizer) -> dict[str, int]:
    """The group of every parameter with a twin; `NO_GROUP` for one that is not the optimizer's."""
    own: dict[Tensor, str] = {p: name for name, p in pair.net.named_parameters()}
    twinned = {name for link in pair.links for name in link.torch}
    groups = {name: NO_GROUP for name in pair.parameters if name in twinned}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p not in own:
                shape = "uninitialized, of a lazy module" if is_lazy(p) else str(list(p.shape))
                what = f"parameter {j} of group {i} ({shape})"
                raise ValueError(
                    f"{where}: {what} of the optimizer is no parameter of the net of this pair; make the optimizer of "
                    "net.parameters() of the very net that was matched"
                )
            if p.is_complex():
                raise TypeError(
                    f"{where}: the parameter {own[p]!r} is complex: PyTorch optimizes real and imaginary parts on "
                    "their own, and JAX's gradients are the conjugates of PyTorch's; store the parts as two"
                )
            if own[p] in twinned:
                groups[own[p]] = i
    return groups


def crossing(where: str, pair: Any, groups: Mapping[str, int]) -> Any:
    """The pair by which the optimizer's arrays cross: parameters that are added up there are none of the optimizer's.

    Then nothing of them crosses but zeros, which are never read: their links are as good as others.
    """
    leaves: dict[str, list[str]] = {}
    links = []
    for link in pair.links:
        held = [name for name in link.torch if groups.get(name, NO_GROUP) != NO_GROUP]
        if link.sums and held:
            raise ValueError(
                f"{where}: {', '.join(map(repr, held))} of the optimizer {'are' if len(held) > 1 else 'is'} added up "
                f"on the JAX side ({link.sums}): each of the summands has a step and a state of its own in PyTorch, "
                "the sum has one. Leave the layer out of the optimizer, or make it with one bias"
            )
        for name in link.torch:
            leaves.setdefault(name, []).extend(link.jax)
            if name in groups and not link.sums and len(leaves[name]) > len(link.jax):
                raise ValueError(
                    f"{where}: {name!r} is tied in PyTorch and has several leaves on the JAX side "
                    f"({', '.join(map(repr, leaves[name]))}), which would move apart; tie them in the flax model too"
                )
        links.append(replace(link, sums="") if set(link.torch) <= groups.keys() else link)
    return replace(pair, links=tuple(links))


def handle_of(where: str, optimizer: Optimizer) -> Handle | None:
    """The handle of an attached penalty; other hooks around the step are refused."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    handle = None
    for hook in (*before.values(), *after.values()):
        owner = getattr(hook, "__self__", None)
        if not isinstance(owner, Handle):
            raise ValueError(
                f"{where}: the optimizer has a step hook {getattr(hook, '__qualname__', hook)!r}, which may change its "
                "steps and cannot be followed; remove it first, and do in the JAX loop what it does"
            )
        handle = owner
    return handle


# the others take lr as it is: they multiply by it and do no arithmetic with it
_COMPUTE_WITH_RATE = (
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax),
    *(torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad),
)


def _refuse_narrow(where: str, cls: type, i: int, group: Mapping[str, Any]) -> None:
    """Refuse tensors with which PyTorch takes parts of a step in less than the parameters' dtype."""
    widest = max((p.dtype for p in group["params"]), key=lambda dtype: dtype.itemsize, default=torch.float32)
    lr = group["lr"]
    if cls in _COMPUTE_WITH_RATE and isinstance(lr, Tensor) and lr.dtype.itemsize < widest.itemsize:
        raise ValueError(
            f"{where}: lr of group {i} is a {lr.dtype} tensor and its parameters are {widest}: PyTorch takes parts of "
            f"their steps in {lr.dtype}; make it a float first, or a tensor of their dtype: "
            f'optimizer.param_groups[{i}]["lr"] = float(optimizer.param_groups[{i}]["lr"])'
        )
    for beta in group.get("betas", ()):
        if not isinstance(beta, Tensor):
            continue
        # NAdam's float32 product of them is rounded otherwise by tensors
        if beta.dtype.itemsize < widest.itemsize or (cls is torch.optim.NAdam and widest is torch.float64):
            raise ValueError(
                f"{where}: betas of group {i} are {beta.dtype} tensors and its parameters are {widest}: PyTorch rounds "
                f'parts of their steps otherwise; make them floats first: optimizer.param_groups[{i}]["betas"] = '
                f'tuple(map(float, optimizer.param_groups[{i}]["betas"]))'
            )


def _hyper(rule: Rule, optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    by_class = {"decoupled_weight_decay": type(optimizer) is torch.optim.AdamW}  # older releases have no such key
    with_tensor = group.get("differentiable", False)
    told = ("and rate" if isinstance(group["lr"], Tensor) else "alone") if with_tensor else ""
    group = {**group, "tensor_step": told}
    values = {name: _number(group[name] if name in group else by_class[name]) for name in rule.hyper}
    if "initial_accumulator_value" in values:  # PyTorch reads it there, not in the group
        values["initial_accumulator_value"] = float(optimizer.defaults["initial_accumulator_value"])
    return tuple(sorted(values.items()))


def _number(value: Any) -> Any:
    """Of a tensor its number: constants of a compiled step."""
    if isinstance(value, tuple | list):
        return tuple(_number(v) for v in value)
    return value if isinstance(value, (bool, str)) else number(value)


def number(x: Any) -> float:
    """Of a learning rate or the like; PyTorch warns of `float` of a tensor that requires a gradient."""
    return float(x.detach() if isinstance(x, Tensor) else x)


def filled(p: Tensor, value: float) -> Tensor:
    """Like the parameter, of one value; takes no memory."""
    return torch.full((), value, dtype=p.dtype).expand(p.shape)

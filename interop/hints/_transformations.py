"""Decay and dampening inside a transformation of `funcreg.torch.optax`, which shows nothing of what it is made of.

It is a function of gradients, state and parameters, and the parameters enter it by decay alone: with zeros in their
place it is the same transformation without decay (`_bare`). Where the difference is a multiple of the parameters, decay
is decoupled; where it is what a multiple of the parameters in the gradient would make, it is coupled. Both are measured
on random numbers, and used only where they hold to rounding. A learning rate shows in the answer to a huge gradient: a
first step of Adam is as long as it, one of SGD a multiple of the gradient.

Its other numbers are in the closures of its functions, by the names that they have in the source (`knobs`).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import funcreg.torch as fr
from funcreg.torch.optax import GradientTransformation, ScaleByScheduleState

from ._changes import Change, Steps
from ._closures import with_numbers
from ._knobs import Knob, is_one

Tree = Any
_HUGE = 1e8
_EXACT = 1e-11  # what two ways to write one update may differ by


class _Decay(NamedTuple):
    """What was measured.

    Attributes:
        coupled: whether it is added to the gradient.
        size: the factor of the parameters.
        decays: by parameter, 1 where it decays and 0 where it does not.
        rate: the learning rate of the next step; None where it does not show.
    """

    coupled: bool
    size: float
    decays: Tree
    rate: float | None


class _Form(NamedTuple):
    """Another decay: coupled or not, its size that of now times a power of the learning rate."""

    kind: str
    coupled: bool
    power: int
    words: str


_FORMS = {
    True: (
        _Form("decoupled_decay", False, 1, "taken from the parameters themselves, times the learning rate (decoupled)"),
        _Form("decay_not_scaled", False, 0, "taken from the parameters themselves, not scaled by the learning rate"),
    ),
    False: (
        _Form("decoupled_decay", True, -1, "added to the gradient (coupled)"),
        _Form("decay_not_scaled", True, 0, "of the same number added to the gradient (coupled)"),
        _Form("decay_not_scaled", False, -1, "not scaled by the learning rate, of {size:g} * params,"),
        _Form("decay_not_scaled", False, 1, "scaled by the learning rate, of {size:g} * params,"),
    ),
}


def changes(steps: Steps, state: Any, hyper: Tree) -> Iterator[Change]:
    """Other decays, dampenings and learning rates in steps of `train_step`; nothing for other steps."""
    made_by = getattr(steps[1], "made_by", None)
    if made_by is None:
        return
    for factor, words in ((2.0, "twice"), (0.5, "half of")):
        change = f"PyTorch and JAX differ by a factor in the updates; with {words} PyTorch's both sides agree"
        yield Change("factor", change, 0, steps=functools.partial(_remade, functools.partial(_longer_steps, factor)))
    transformation = made_by[1](hyper)
    if getattr(transformation.update, "penalty", None) is not None:  # a proximal step needs the parameters
        return
    yield from _decays(transformation, state)
    yield from _dampenings(transformation, state)


_BY_SIZE = ("scale_by_adam", "scale_by_rms", "scale_by_stddev", "prox_adam")  # what divides gradients by their size


def knobs(steps: Steps, hyper: Tree) -> Iterator[Knob]:
    """The numbers and flags of the loss and of the transformation, which `train_step` knows; else of the closures."""
    made_by = getattr(steps[1], "made_by", None)
    transformation = made_by[1](hyper) if made_by else None
    owners: dict[tuple[str, float], list[str]] = {}

    def note(owner: str, name: str, x: Any) -> Any:
        if is_one(name, x) and owner not in (known := owners.setdefault((name, x), [])):
            known.append(owner)
        return x

    with_numbers((made_by[0], transformation) if made_by else steps, note)
    by_size = any(owner in _BY_SIZE for several in owners.values() for owner in several)
    for (name, old), several in owners.items():
        if name == "learning_rate" and not by_size:  # it could as well be the size of the gradients
            continue
        # one strength for two penalties, say, is one number that somebody wrote down
        for chosen in [several] * (len(several) > 1) + [[owner] for owner in several]:
            make = functools.partial(_given, bool(made_by), chosen, name, old)
            who = f"PyTorch's {' and '.join(chosen)} {'has' if len(chosen) == 1 else 'have'}"
            yield Knob(who, name, old, make)
    by_prox = transformation is None or getattr(transformation.update, "penalty", None) is not None
    if not by_prox and not any(name == "weight_decay" for name, _ in owners):
        for coupled, name in ((True, "coupled weight_decay"), (False, "decoupled weight_decay")):
            yield Knob("PyTorch's transformation has", name, 0.0, functools.partial(_decayed, coupled), (1e-4, 1e-2))


def _given(made: bool, owners: list[str], name: str, old: float, new: float) -> dict[str, Any]:
    def change(owner: str, called: str, x: Any) -> Any:
        return new if owner in owners and called == name and type(x) is type(old) and x == old else x

    around = functools.partial(with_numbers, change=change)
    return {"steps": functools.partial(_remade, around, around_loss=around) if made else around}


def _decayed(coupled: bool, size: float) -> dict[str, Any]:
    def around(inner: GradientTransformation) -> GradientTransformation:
        def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
            if coupled:
                return inner.update(_map(lambda u, p: u + size * p, updates, params), state, params)
            rate = _rate(inner, params, state)
            if rate is None:
                raise ValueError("the learning rate of the transformation does not show")
            updates, state = inner.update(updates, state, params)
            return _map(lambda u, p: u - rate * size * p, updates, params), state

        return GradientTransformation(inner.init, update)

    return {"steps": functools.partial(_remade, around)}


def _decays(transformation: GradientTransformation, state: Any) -> Iterator[Change]:
    decay = _measured(transformation, state.params, state.opt_state)
    if decay is None:
        return
    now = (
        f"PyTorch's transformation adds a decay of {decay.size:g} * params to the gradient (coupled)"
        if decay.coupled
        else f"PyTorch's transformation takes a decay of {decay.size:g} * params from the parameters (decoupled)"
    )
    for form in _FORMS[decay.coupled] if decay.rate else ():
        words = form.words.format(size=decay.size * (decay.rate or 0.0) ** form.power)
        change = f"{now}; with one {words} both sides agree"
        yield Change(form.kind, change, steps=functools.partial(_remade, functools.partial(_with_decay, form)))


def _remade(
    around: Callable[[GradientTransformation], GradientTransformation],
    steps: Steps,
    around_loss: Callable[[Any], Any] = lambda loss: loss,
) -> Steps:
    loss, make, has_extra = steps[1].made_by  # pyright: ignore[reportFunctionMemberAccess]
    return fr.train_step(around_loss(loss), lambda hyper: around(make(hyper)), has_extra)


def _with_decay(form: _Form, inner: GradientTransformation) -> GradientTransformation:
    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        decay = _measured(inner, params, state)
        if decay is None or decay.rate is None:
            raise ValueError("the decay of the transformation does not show")
        size = decay.size * decay.rate**form.power
        terms = _map(lambda x, there: size * there * x, params, decay.decays)
        if form.coupled:
            updates = _map(torch.add, updates, terms)
        updates, state = _bare(inner, updates, state, params)
        return (updates if form.coupled else _map(torch.sub, updates, terms)), state

    return GradientTransformation(inner.init, update)


def _longer_steps(factor: float, inner: GradientTransformation) -> GradientTransformation:
    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        updates, state = inner.update(updates, state, params)
        return _map(lambda u: factor * u, updates), state

    return GradientTransformation(inner.init, update)


def _measured(transformation: GradientTransformation, params: Tree, state: Any) -> _Decay | None:
    """The decay of a transformation; None where it has none, or one of another form."""
    generator = torch.Generator().manual_seed(0)
    x, g = (_map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device), params) for _ in "xg")
    zeros, rate = _map(torch.zeros_like, params), _rate(transformation, params, state)
    with_, without = transformation.update(g, state, x), _bare(transformation, g, state, params)
    # in the updates, or, where Adam hides it in its first step, in the state
    apart = _map(torch.sub, with_[0], without[0])
    size = _ratio(apart, _map(lambda a, p: p * bool(a.any()), apart, x))
    decays = _map(lambda a: float(a.any()), apart)
    if (
        size is not None
        and _close(with_[1], without[1])
        and _close(apart, _map(lambda p, there: size * there * p, x, decays))
    ):
        return _Decay(False, -size, decays, rate) if size < 0 else None
    first = transformation.init(params)
    answers = (transformation.update(zeros, first, x), _bare(transformation, x, first, params))
    for size in _sizes(*answers):
        coupled = _bare(transformation, _map(lambda a, p, s=size: a + s * p, g, x), state, params)
        if _close(with_, coupled):
            return _Decay(True, size, _map(lambda p: 1.0, params), rate)
    return None


def _sizes(with_decay: Any, of_gradient: Any) -> list[float]:
    """What the parameters may be multiplied by, from what they do to an average of gradients, or of their squares."""
    found: dict[float, None] = {}
    for a, b in zip(_floats(with_decay), _floats(of_gradient), strict=True):
        ratio = _ratio(a, b)
        if ratio is not None and ratio > 0:
            found |= {float(f"{ratio:.12g}"): None, float(f"{math.sqrt(ratio):.12g}"): None}
    return [size for size in found if size != 1]


def _rate(transformation: GradientTransformation, params: Tree, state: Any) -> float | None:
    """The learning rate of the next step, where the answer to a huge gradient is it, or a multiple of the gradient."""

    def now(fresh: Any, old: Any) -> Any:
        return old if isinstance(old, ScaleByScheduleState) else fresh

    is_schedule = lambda node: isinstance(node, ScaleByScheduleState)  # noqa: E731
    fresh = pytree.tree_map(now, transformation.init(params), state, is_leaf=is_schedule)
    first, second = (
        torch.cat(
            [x.abs().flatten() for x in _floats(_bare(transformation, _map(_full, params, size), fresh, params)[0])]
        )
        for size in (_HUGE, 2 * _HUGE)
    )
    step = first.max().item()
    if (first - step).abs().max() > _EXACT * step:
        return None
    grown = second.max().item() / step if step else 0.0
    rate = step if abs(grown - 1) < _EXACT else step / _HUGE if abs(grown - 2) < _EXACT else None
    return rate and float(f"{rate:.12g}")


def _dampenings(transformation: GradientTransformation, state: Any) -> Iterator[Change]:
    momentum = _momentum(transformation, state.params)
    if momentum is None:
        return
    now = f"PyTorch's transformation adds gradients to its momentum ({momentum:g}) undamped"
    for factor, first, words in (
        (1 - momentum, False, f"gradients times 1 - {momentum:g}"),
        (1 - momentum, True, f"gradients but the first times 1 - {momentum:g}"),
        (1 / (1 - momentum), False, f"gradients divided by 1 - {momentum:g}"),
    ):
        around = functools.partial(_damped, factor, first)
        yield Change("dampening", f"{now}; with {words} both sides agree", steps=functools.partial(_remade, around))


def _momentum(transformation: GradientTransformation, params: Tree) -> float | None:
    """By what the update shrinks where a gradient is followed by none; None where the updates are no such sum."""
    zeros, ones = _map(torch.zeros_like, params), _map(_full, params, 1.0)
    first, state = _bare(transformation, ones, transformation.init(params), params)
    second, _ = _bare(transformation, zeros, state, params)
    doubled, _ = _bare(transformation, _map(_full, params, 2.0), transformation.init(params), params)
    momentum = _ratio(second, first)
    linear = _close(doubled, _map(lambda x: 2 * x, first))
    if momentum is None or not (linear and 0 < momentum < 1 and _close(second, _map(lambda x: momentum * x, first))):
        return None
    return float(f"{momentum:.12g}")


def _damped(factor: float, but_the_first: bool, inner: GradientTransformation) -> GradientTransformation:
    def init(params: Tree) -> Any:
        return inner.init(params), True

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        state, is_first = state
        by = 1.0 if is_first and but_the_first else factor
        updates, state = inner.update(_map(lambda g: by * g, updates), state, params)
        return updates, (state, False)

    return GradientTransformation(init, update)


def _bare(transformation: GradientTransformation, updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
    return transformation.update(updates, state, _map(torch.zeros_like, params))


def _map(function: Callable[..., Any], *trees: Any) -> Tree:
    first, *others = trees
    if others and not isinstance(others[0], (dict, list, tuple, Tensor)):
        return pytree.tree_map(lambda x: function(x, *others), first)
    return pytree.tree_map(function, first, *others)


def _full(x: Tensor, size: float) -> Tensor:
    return torch.full_like(x, size)


def _floats(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def _ratio(a: Any, b: Any) -> float | None:
    """The number of which `a` is a multiple of `b`, by least squares."""
    pairs = list(zip(_floats(a), _floats(b), strict=True))
    square = sum((y * y).sum().item() for _, y in pairs)
    product = sum((x * y).sum().item() for x, y in pairs)
    return product / square if square and product and math.isfinite(product / square) else None


def _close(a: Any, b: Any) -> bool:
    return all(
        bool(((x - y).abs().max() <= _EXACT * torch.maximum(x.abs().max(), y.abs().max())).item())
        for x, y in zip(_floats(a), _floats(b), strict=True)
        if x.numel()
    )

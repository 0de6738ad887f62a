"""Training steps: counts that are one off, and the decay that a hyper-parameter sets."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from funcreg._selectors import leaf_name

from .._leaves import Leaves
from .._measure import compare
from ._changes import Change, Steps
from ._knobs import USUAL, Knob

Tree = Any

# A schedule that is one step off differs from one of another slope only from some steps on.
ENOUGH_STEPS = 3

# Two ways to write one step, on the PyTorch side alone.
UNCHANGED = 1e-12


def counts(state: Any, steps: int) -> Iterator[Change]:
    """Every count in a first state (a whole number that is one leaf), started one later or one earlier."""
    if steps < ENOUGH_STEPS:
        return
    found = {i: name for i, (name, x) in enumerate(_leaves(state)) if _is_count(name, x)}
    for group in [(i,) for i in found] + ([tuple(found)] if len(found) > 1 else []):
        for by in (1, -1):
            names = " and ".join(f"`{found[i]}`" for i in group)
            change = (
                f"PyTorch counts its steps in {names} of the state; started {'higher' if by > 0 else 'lower'} by 1, as "
                f"for a schedule or a bias correction that is one step {'ahead' if by > 0 else 'behind'}, both sides "
                "agree"
            )
            around = functools.partial(_shifted, indices=group, by=by)
            yield Change("off_by_one", change, 1 if len(group) == 1 else 2, steps=around)
    schedulers = [x for _, x in _leaves(state) if isinstance(x, LRScheduler)]
    begins, steps_on = "begins with its first learning rate", "takes a step with every one of the optimizer"
    ways: list[tuple[str, Callable[[LRScheduler], None]]] = [
        (f"{begins}; with its second one, a step ahead,", lambda scheduler: scheduler.step())
    ]
    if steps > ENOUGH_STEPS:  # with a first learning rate twice, one step more is to tell it from half the slope
        ways.append((f"{steps_on}; with its first one left out, a step behind,", _hold))
    if any(isinstance(x, LambdaLR) for x in schedulers):
        ways.append((f"{begins}; with the one before it, a step behind,", _go_back))
    for words, move in ways if schedulers else ():
        change = f"PyTorch's scheduler {words} both sides agree"
        yield Change("off_by_one", change, 1, steps=functools.partial(_scheduled, move))


def _leaves(state: Any) -> list[tuple[str, Any]]:
    keyed, _ = pytree.tree_flatten_with_path(state)
    return [
        (leaf_name([str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in p]), x) for p, x in keyed
    ]


def _is_count(name: str, x: Any) -> bool:
    if name.split(".")[0] == "params":
        return False
    if isinstance(x, Tensor):
        return x.ndim == 0 and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    return isinstance(x, int) and not isinstance(x, bool)


def _shifted(steps: Steps, indices: tuple[int, ...], by: int) -> Steps:
    init, step = steps

    def shifted(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(init(*args))
        return pytree.tree_unflatten([x + by if i in indices else x for i, x in enumerate(leaves)], spec)

    return shifted, step


def _scheduled(move: Callable[[LRScheduler], None], steps: Steps) -> Steps:
    init, step = steps

    def moved(*args: Any) -> Any:
        state = init(*args)
        for _, x in _leaves(state):
            if isinstance(x, LRScheduler):
                move(x)
        return state

    return moved, step


def _hold(scheduler: LRScheduler) -> None:
    """Its next step is none: most compute a learning rate from the last one, and cannot go back."""

    def step(*args: Any, **options: Any) -> None:
        del args, options, scheduler.__dict__["step"]

    scheduler.__dict__["step"] = step


def _go_back(scheduler: LRScheduler) -> None:
    if isinstance(scheduler, LambdaLR):
        scheduler.last_epoch -= 2
        scheduler.step()


def factors(hyper: Tree) -> Iterator[Change]:
    """Every hyper-parameter, twice and half."""
    for key in _numbers(hyper):
        for factor, words in ((2.0, "twice"), (0.5, "half of")):
            change = (
                f"PyTorch and JAX differ by a factor in hyper[{key!r}]; with {words} it in PyTorch both sides agree"
            )
            yield Change("factor", change, 3, steps=functools.partial(_given, key, lambda x, by=factor: by * x))


def knobs(hyper: Tree) -> Iterator[Knob]:
    """The hyper-parameters themselves; but for learning rates, which gradients of another size look like."""
    for key in _numbers(hyper):
        if key not in _RATES:
            make = functools.partial(_with_value, key)
            yield Knob("PyTorch has", f"hyper[{key!r}]", hyper[key], make, (0.0, *USUAL.get(key, ())), stage=2)


_RATES = ("lr", "learning_rate", "rate", "step_size", "eta")


def _with_value(key: str, value: float) -> dict[str, Any]:
    return {"steps": functools.partial(_given, key, lambda _: value)}


def _given(key: str, value: Callable[[float], float], steps: Steps) -> Steps:
    """Steps that are given another value of one hyper-parameter."""
    init, step = steps

    def new(hyper: Any) -> Any:
        return {**hyper, key: value(hyper[key])}

    return (
        lambda params, hyper, *extra: init(params, new(hyper), *extra),
        lambda state, hyper, *batch: step(state, new(hyper), *batch),
    )


def _numbers(hyper: Tree) -> list[str]:
    return [key for key, x in hyper.items() if isinstance(x, float) and x > 0] if isinstance(hyper, Mapping) else []


class _Form(NamedTuple):
    """A decay by a hyper-parameter: added to the gradient, or taken from the parameters times a rate or times 1."""

    form: str
    key: str
    rate: str | None = None

    def __str__(self) -> str:
        what = f"hyper[{self.key!r}] * params"
        if self.form == "coupled":
            return f"{what} added to the gradient (coupled)"
        by = f" times hyper[{self.rate!r}] (decoupled)" if self.rate else " not scaled by a learning rate (decoupled)"
        return f"{what} taken from the parameters themselves,{by}"


def decays(hyper: Tree, params_of: Callable[[Callable[[Steps], Steps]], list[Leaves]]) -> Iterator[Change]:
    """Every hyper-parameter that is seen to be a decay, in its other forms.

    Seen to be one: without it, and with the decay put back in one of the forms, the PyTorch side goes as it did.

    Args:
        hyper: of both sides.
        params_of: the parameters of the PyTorch side in the first steps, of steps that are changed.
    """
    numbers = _numbers(hyper)
    now = params_of(lambda steps: steps) if numbers else []
    for key in numbers:
        forms = [_Form("coupled", key), *(_Form("decoupled", key, rate) for rate in numbers if rate != key)]
        forms.append(_Form("unscaled", key))
        mine = [form for form in forms if _same(now, params_of(functools.partial(_with_decay, form)))]
        if not mine or _same(now, params_of(functools.partial(_without, key))):
            continue
        for form in forms:
            if form not in mine:
                kind = "decay_not_scaled" if "unscaled" in (form.form, mine[0].form) else "decoupled_decay"
                change = f"PyTorch has {mine[0]}; with {form} both sides agree"
                yield Change(kind, change, 1, steps=functools.partial(_with_decay, form))


def _same(a: list[Leaves], b: list[Leaves]) -> bool:
    return len(a) == len(b) > 0 and all(
        not (found := compare(x[name], y[name])).apart.any() and found.errors.relative < UNCHANGED
        for x, y in zip(a, b, strict=True)
        for name in x
        if name.startswith("params")
    )


def _without(key: str, steps: Steps) -> Steps:
    init, step = steps
    return init, lambda state, hyper, *batch: step(state, {**hyper, key: 0.0}, *batch)


def _with_decay(form: _Form, steps: Steps) -> Steps:
    init, step = steps

    def changed(state: Any, hyper: Any, *batch: Any) -> Any:
        without = {**hyper, form.key: 0.0}
        if form.form == "coupled":
            with _DecayedGradient(hyper[form.key]):
                return step(state, without, *batch)
        factor = hyper[form.key] * (1.0 if form.rate is None else hyper[form.rate])
        old = _params(state)
        new, metrics = step(state, without, *batch)
        params = pytree.tree_map(lambda x, y: (x - factor * y).detach(), _params(new), old)
        return _with_params(new, params), metrics

    return init, changed


class _DecayedGradient(TorchFunctionMode):
    """Adds `decay * params` to the gradients that `torch.func.grad` and `torch.autograd.grad` return."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            inputs = (kwargs or {}).get("inputs", args[1] if len(args) > 1 else ())
            inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
            return tuple(self.decay * x + (0 if g is None else g) for g, x in zip(out, inputs, strict=True))
        return out


def _params(state: Any) -> Tree:
    return state["params"] if isinstance(state, Mapping) else state.params


def _with_params(state: Any, params: Tree) -> Any:
    if isinstance(state, Mapping):
        return {**state, "params": params}
    return state._replace(params=params) if hasattr(state, "_replace") else dataclasses.replace(state, params=params)

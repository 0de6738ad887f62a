"""The options of a `torch.optim` optimizer, changed by hooks that PyTorch calls before and after every step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ._changes import Change, Function
from ._knobs import Knob, is_one
from ._norms import under_the_root

Group = dict[str, Any]
Undo = Callable[[], None]
Prepare = Callable[[Optimizer, Group], Undo | None]  # before a step; what it returns is done after it


class Optimizers:
    """Notes the options of all optimizers that take a step while a function runs."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Group]] = []
        self.rates: dict[str, float] = {}  # the first learning rate of each, which schedulers change

    def watching(self, function: Function) -> Function:
        def watched(*args: Any) -> Any:
            handle = register_optimizer_step_pre_hook(self._note)
            try:
                return function(*args)
            finally:
                handle.remove()

        return watched

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        for group in optimizer.param_groups:
            self.rates.setdefault(type(optimizer).__name__, group["lr"])
            options = {key: x for key, x in group.items() if key not in ("params", "lr", "initial_lr")}
            if (type(optimizer).__name__, options) not in self.seen:
                self.seen.append((type(optimizer).__name__, options))


def changes(optimizers: Optimizers) -> Iterator[Change]:
    """What could be different in the optimizers that were seen."""
    decays = {name: group for name, group in optimizers.seen if _decays(group)}
    for name, group in decays.items():
        decoupled, size = _is_decoupled(name, group), group["weight_decay"]
        now = (
            f"PyTorch's {name} takes its decay ({size:g}) from the parameters themselves, times the learning rate "
            "(decoupled)"
            if decoupled
            else f"PyTorch's {name} adds its decay ({size:g}) to the gradient (coupled)"
        )
        forms = ("coupled" if decoupled else "decoupled", "unscaled")
        for form in forms:
            kind = "decay_not_scaled" if form == "unscaled" else "decoupled_decay"
            yield Change(kind, f"{now}; {THEN[form]}", called=_hooked(_decay(form)))
    for factor, words in ((2.0, "twice"), (0.5, "half of")) if optimizers.seen else ():
        change = (
            f"PyTorch and JAX differ by a factor in the updates; with {words} PyTorch's learning rate both sides agree"
        )
        yield Change("factor", change, 0, called=_hooked(_learning_rate(factor)))
    for name, group in optimizers.seen:
        if group.get("momentum") and "dampening" in group:
            yield from _dampenings(name, group)


THEN = {
    "coupled": "with the decay added to the gradient (coupled) both sides agree",
    "decoupled": "with it taken from the parameters themselves, times the learning rate (decoupled), both sides agree",
    "unscaled": "with it taken from the parameters themselves, not scaled by the learning rate, both sides agree",
}


def _learning_rate(factor: float) -> Prepare:
    def prepare(optimizer: Optimizer, group: Group) -> Undo:
        del optimizer
        old, group["lr"] = group["lr"], factor * group["lr"]
        return lambda: group.__setitem__("lr", old)

    return prepare


def _decays(group: Group) -> bool:
    decay = group.get("weight_decay", 0)
    return isinstance(decay, (int, float)) and decay > 0 and not group.get("maximize")


def _is_decoupled(name: str, group: Group) -> bool:
    return name == "AdamW" or bool(group.get("decoupled_weight_decay"))


def _decay(form: str, size: float | None = None) -> Prepare:
    """In this form, of this size; None: of its own."""

    def prepare(optimizer: Optimizer, group: Group) -> Undo | None:
        del optimizer
        own = group.get("weight_decay", 0)
        decay = own if size is None else size
        trained = [p for p in group["params"] if p.grad is not None]
        grads, before = [p.grad for p in trained], [p.detach().clone() for p in trained]
        group["weight_decay"] = 0.0
        if form == "coupled":
            for p in trained:
                p.grad = p.grad + decay * p.detach()

        def undo() -> None:
            group["weight_decay"] = own
            factor = decay * (1.0 if form == "unscaled" else group["lr"])
            for p, grad, old in zip(trained, grads, before, strict=True):
                p.grad = grad
                if form != "coupled":
                    with torch.no_grad():
                        p.sub_(factor * old)

        return undo

    return prepare


def _dampenings(name: str, group: Group) -> Iterator[Change]:
    old, momentum = group["dampening"], group["momentum"]
    now = f"PyTorch's {name} has dampening={old:g} at momentum={momentum:g}"
    for new in {0: (momentum,)}.get(old, (0.0, momentum) if old != momentum else (0.0,)):
        change = f"{now}; with dampening={new:g} both sides agree"
        yield Change("dampening", change, called=_hooked(_dampening(new, first=False)))
    damped = old or momentum
    change = f"{now}; with dampening={damped:g}, of the first gradient as well, both sides agree"
    yield Change("dampening", change, called=_hooked(_dampening(damped, first=True)))


def _dampening(value: float, first: bool) -> Prepare:
    def prepare(optimizer: Optimizer, group: Group) -> Undo | None:
        if "dampening" not in group:
            return None
        old, group["dampening"] = group["dampening"], value
        for p in group["params"] if first else ():
            state: dict[str, Tensor | None] = optimizer.state[p]
            if state.get("momentum_buffer") is None:  # PyTorch's first buffer is the gradient itself
                state["momentum_buffer"] = torch.zeros_like(p)
        return lambda: group.__setitem__("dampening", old)

    return prepare


# The defaults of optax that differ from PyTorch's, of one algorithm, beside decays and learning rates. In all of these
# optax adds eps under the root.
_OF_OPTAX: dict[str, tuple[str, Group]] = {
    "RMSprop": ("optax.rmsprop", {"alpha": 0.9}),
    "Adagrad": ("optax.adagrad", {"initial_accumulator_value": 0.1, "eps": 1e-7}),
}


def knobs(optimizers: Optimizers) -> Iterator[Knob]:
    """The numbers and flags of the optimizers that were seen."""
    for name, group in optimizers.seen:
        # a learning rate of SGD could as well be the size of the gradients
        rate = {} if name == "SGD" else {"lr": optimizers.rates[name]}
        for key, value in (*_numbers(group), *rate.items()):
            if is_one(key, value):
                yield Knob(
                    f"PyTorch's {name} has", key, value, lambda new, key=key, old=value: _given({key: (old, new)})
                )
        if group.get("weight_decay") == 0 and not _is_decoupled(name, group):
            yield Knob(
                f"PyTorch's {name} has",
                "decoupled weight_decay",
                0.0,
                lambda new: {"called": _hooked(_decay("decoupled", new))},
                (1e-4, 1e-2),
            )


def defaults(optimizers: Optimizers) -> Iterator[Change]:
    """Those of optax in place of PyTorch's, all at once."""
    for name, group in optimizers.seen:
        if name not in _OF_OPTAX:
            continue
        whose, options = _OF_OPTAX[name]
        old, new = (" and ".join(f"{key}={x[key]:g}" for key in options) for x in (group, options))
        given = _given({key: (group[key], value) for key, value in options.items()})["called"]
        under = under_the_root(options.get("eps", group["eps"]))
        change = (
            f"PyTorch's {name} has {old}, and adds eps to the root; with {new}, and eps added under the root, as by "
            f"default in {whose}, both sides agree"
        )
        yield Change("hyper_parameter", change, called=lambda f, given=given, under=under: given(under(f)))


def _numbers(group: Group) -> Iterator[tuple[str, Any]]:
    for key, value in group.items():
        if isinstance(value, tuple):
            yield from ((f"{key}[{i}]", x) for i, x in enumerate(value))
        else:
            yield key, value


def _given(values: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """These options given to every group that has the old ones: by name, old and new."""

    def prepare(optimizer: Optimizer, group: Group) -> Undo | None:
        numbers, before = dict(_numbers(group)), dict(group)
        if any(key not in numbers or numbers[key] != old for key, (old, _) in values.items()):
            return None
        for key, (_, new) in values.items():
            name, index = key.removesuffix("]").split("[") if "[" in key else (key, "")
            group[name] = tuple(new if str(i) == index else x for i, x in enumerate(group[name])) if index else new
            if key == "initial_accumulator_value":  # which the constructor has used
                for state in (optimizer.state[p] for p in group["params"]):
                    if state["step"] == 0:
                        state["sum"].fill_(new)
        return lambda: group.update(before)

    return {"called": _hooked(prepare)}


def _hooked(prepare: Prepare) -> Callable[[Function], Function]:
    def around(function: Function) -> Function:
        def changed(*args: Any) -> Any:
            with _hooks(prepare):
                return function(*args)

        return changed

    return around


@contextmanager
def _hooks(prepare: Prepare) -> Iterator[None]:
    undone: list[Undo] = []

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        undone.extend(undo for group in optimizer.param_groups if (undo := prepare(optimizer, group)) is not None)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        while undone:
            undone.pop()()

    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""torch.optim's learning-rate schedulers as functions of the number of updates, continued from where they stand.

NOTE [table]: PyTorch computes most rates from the last one, and their roundings add up: after 20 steps a cosine is 10
units in the last place from its closed form, which a parameter would show. So a copy of the scheduler is stepped when
it is ported, and its rates of the next `TABLE` steps are kept as they are. From there on the closed forms go on, a few
parts in 1e12 away by then.

NOTE [anchor]: most of PyTorch's schedulers multiply the current rate by the quotient of two values of their closed
form. So does a ported one behind its table: the current rate times `form(k) / form(k0)`. A rate that was changed by
hand on the way is continued as PyTorch would continue it. The closed forms are evaluated afresh at every step, so that
float32 rates do not drift as a recursion would.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from ._settings import number

Form = Callable[[Array], Array]  # the scheduler's own step, int32 -> a rate, or a factor of one
Rates = Callable[[Array], tuple[Array, ...]]
TABLE = 1 << 13


def schedule_of(scheduler: Any) -> Rates:
    """The learning rates of a scheduler from now on, wherever its optimizer stands.

    For `scheduler=` of `optimizer_to_jax`, where the updates of the optimizer are rightly not those of its scheduler:
    the scheduler was made later than the optimizer's state, or a GradScaler has skipped updates.

    Args:
        scheduler: of torch.optim, among those that `optimizer_to_jax` knows.

    Returns:
        A function of how many times more the scheduler is stepped, to the rate of each group.

    Raises:
        TypeError: a scheduler without an exact twin.
    """
    if not isinstance(scheduler, lr_scheduler.LRScheduler):
        raise TypeError(f"schedule_of: scheduler must be a scheduler of torch.optim, got {type(scheduler).__name__}")
    return _theirs("schedule_of", scheduler, 1)


def rates_of(where: str, scheduler: Any, optimizer: Optimizer, steps_per_epoch: int) -> Rates:
    """The learning rate of every group after `count` more updates."""
    if not isinstance(steps_per_epoch, int) or isinstance(steps_per_epoch, bool) or steps_per_epoch < 1:
        raise ValueError(f"{where}: steps_per_epoch must be a whole number >= 1, got {steps_per_epoch!r}")
    groups = len(optimizer.param_groups)
    if not isinstance(scheduler, lr_scheduler.LRScheduler):
        if isinstance(scheduler, type) or not callable(scheduler):
            got = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else type(scheduler).__name__
            raise TypeError(
                f"{where}: scheduler must be a scheduler of torch.optim or a function count -> learning rate that JAX "
                f"can trace, got {got}"
            )
        return _users(where, scheduler, groups, steps_per_epoch)
    if scheduler.optimizer is not optimizer:
        raise ValueError(f"{where}: the scheduler belongs to another optimizer; pass the one that was made for this")
    rates = _theirs(where, scheduler, steps_per_epoch)  # refuses first what no number of steps would make right
    _check_position(where, scheduler, optimizer, steps_per_epoch)
    return rates


def constant_rates(where: str, optimizer: Optimizer) -> tuple[float, ...]:
    """The rates of an optimizer without a scheduler; one that has had one is refused."""
    now = tuple(_number(group["lr"]) for group in optimizer.param_groups)
    if any("initial_lr" in group for group in optimizer.param_groups):
        same = repr(now[0]) if len(set(now)) == 1 else repr(now)
        raise ValueError(
            f"{where}: the optimizer has had a scheduler, which has left 'initial_lr' in its groups; pass it, "
            f"scheduler=..., or if the rate shall stay as it is now, scheduler=lambda count: {same}"
        )
    return now


def _check_position(where: str, scheduler: Any, optimizer: Optimizer, steps_per_epoch: int) -> None:
    """The updates that the optimizer has counted are the epochs of the scheduler times their length.

    SGD counts none. Fewer updates than steps of the scheduler are no matter of the length of an epoch: a GradScaler
    skips updates, and a fresh optimizer under an old scheduler has none.
    """
    counts = [float(state["step"]) for state in optimizer.state.values() if state.get("step") is not None]
    if not counts:
        return
    updates, epochs = int(max(counts)), _position(scheduler)  # a parameter may have had fewer gradients than others
    if updates == epochs * steps_per_epoch or (updates < epochs and steps_per_epoch == 1) or updates == 0:
        return
    if 0 < updates - epochs * steps_per_epoch < steps_per_epoch:
        likely = "the epoch is not over; port after scheduler.step()"
    elif epochs and updates % epochs == 0:
        likely = f"steps_per_epoch={updates // epochs} would agree"
    else:
        likely = "port right after scheduler.step(), with the number of updates between two of these as steps_per_epoch"
    raise ValueError(
        f"{where}: the optimizer has done {updates} updates and the {type(scheduler).__name__} has "
        f"last_epoch={epochs}, which are {epochs * steps_per_epoch} updates with steps_per_epoch={steps_per_epoch}: "
        f"{likely}. If the scheduler was made later than the optimizer's state, or updates were skipped, pass "
        "scheduler=interop.optimizers.schedule_of(scheduler), which goes on from where it stands (after `import "
        "interop.optimizers`)"
    )


def _theirs(where: str, scheduler: Any, steps_per_epoch: int) -> Rates:
    groups = scheduler.optimizer.param_groups
    forms = [_rate(where, scheduler, i, _number(group["lr"])) for i, group in enumerate(groups)]
    start = _position(scheduler)
    table = _table(where, scheduler)

    def rates(count: Array) -> tuple[Array, ...]:
        done = count // steps_per_epoch
        known = jnp.asarray(table, _dtype())[jnp.minimum(done, len(table) - 1)]
        return tuple(jnp.where(done < len(table), known[i], form(start + done)) for i, form in enumerate(forms))

    return rates


def _table(where: str, scheduler: Any) -> np.ndarray:
    """The rates that a scheduler gives from now on, by its own arithmetic; shape (TABLE, groups). NOTE [table]"""

    def step() -> None: ...

    step._wrapped_by_lr_sched = True  # pyright: ignore[reportFunctionMemberAccess]  (PyTorch asks for it)
    used = ("lr", "initial_lr")
    groups = [{key: _own(group[key]) for key in used if key in group} for group in scheduler.optimizer.param_groups]
    stand_in = SimpleNamespace(param_groups=groups, step=step, _opt_called=True)
    twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a nested sequence passes `epoch` on, which PyTorch deprecates
        for i in range(TABLE):
            rows.append([number(group["lr"]) for group in groups])
            try:
                twin.step()
            except ArithmeticError as error:
                _refuse(where, scheduler, f"which fails in PyTorch {i + 1} steps from now: {error}")
    return np.array(rows)


def _own(lr: Any) -> Any:
    """A copy; a float64 tensor as a number, whose arithmetic is the same and takes less time."""
    if not isinstance(lr, Tensor):
        return lr
    return number(lr) if lr.dtype == torch.float64 else lr.detach().clone()


def _users(where: str, schedule: Callable[[Array], Any], groups: int, steps_per_epoch: int) -> Rates:
    def rates(count: Array) -> tuple[Array, ...]:
        given = schedule(count // steps_per_epoch)
        each = tuple(given) if isinstance(given, tuple | list) else (given,) * groups
        if len(each) != groups or any(rate is None or jnp.ndim(rate) for rate in each):
            raise ValueError(f"{where}: scheduler must return one rate, or one for each of the {groups} groups")
        return tuple(jnp.asarray(rate).astype(_dtype()) for rate in each)

    name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    try:
        jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32))
    except Exception as error:
        raise TypeError(
            f"{where}: the scheduler {name!r} must be a function count -> learning rate that JAX can trace; traced, it "
            f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    jax.eval_shape(rates, jax.ShapeDtypeStruct((), jnp.int32))
    return rates


def _rate(where: str, scheduler: Any, group: int, now: float | None) -> Form:
    """The rate of one group at every step of a scheduler: from its present rate on, or from its own beginning."""
    kind = type(scheduler)
    _check_whole(where, scheduler)
    if kind in _FACTORS:
        form = _factor(where, scheduler)
        if now is not None:
            return _anchored(now, [(form, scheduler.last_epoch)])
        base = _base(where, scheduler, group)
        return lambda k: base * form(k)
    if kind is lr_scheduler.ChainedScheduler:
        children = scheduler._schedulers
        for child in children:
            if type(child) not in _FACTORS:
                _refuse(where, child, "inside a ChainedScheduler, where it is no factor of the rate")
            _check_whole(where, child)
        if now is None:
            _refuse(where, scheduler, "inside a SequentialLR, which fails or skips a step in PyTorch")
        return _anchored(now, [(_factor(where, child), child.last_epoch) for child in children])
    if kind is lr_scheduler.SequentialLR:
        return _sequential(where, scheduler, group, now)
    if kind is lr_scheduler.CosineAnnealingLR:
        form = _cosine(where, scheduler, group)
    elif kind is lr_scheduler.CosineAnnealingWarmRestarts:
        form = _warm_restarts(where, scheduler, group)
    else:
        name = next((base for base in kind.__mro__ if base in _REFUSED), None)
        if getattr(scheduler, "cycle_momentum", False):
            _refuse(where, scheduler, "which moves the momentum as well, and that is a constant here: it has no twin")
        _refuse(where, scheduler, _REFUSED[name] if name else "which is not known; known are " + ", ".join(_KNOWN))
    if now is not None and kind is lr_scheduler.CosineAnnealingLR:
        expected = float(form(jnp.int32(scheduler.last_epoch)))
        if not math.isclose(now, expected, rel_tol=1e-6, abs_tol=1e-6 * _base(where, scheduler, group)):
            _refuse(
                where,
                scheduler,
                f"whose rate for group {group} is {expected:g} at its step {scheduler.last_epoch}, but the optimizer's "
                f"is {now:g}: it was changed by hand, which this scheduler follows only until its next turn; pass a "
                "function count -> learning rate",
            )
    return form


def _anchored(now: Any, forms: Sequence[tuple[Form, int]]) -> Form:
    """See NOTE [anchor]; a form that has come to 0 stays where it is, as in PyTorch."""
    first = forms[0][1]
    starts = [float(form(jnp.int32(at))) for form, at in forms]

    def rate(k: Array) -> Array:
        value = jnp.asarray(now, _dtype())
        for (form, at), start in zip(forms, starts, strict=True):
            value = value * (form(k + (at - first)) / start) if start != 0 else value
        return value

    return rate


def _sequential(where: str, scheduler: Any, group: int, now: float | None) -> Form:
    """The parts from the present one on; each counts from its own milestone."""
    milestones, parts, here = list(map(int, scheduler._milestones)), scheduler._schedulers, scheduler.last_epoch
    for i, part in enumerate(parts):
        if i > 0 and type(part) in (lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler):
            _refuse(where, part, "as a later part of a SequentialLR, which fails in PyTorch at the milestone")
    active = sum(here >= m for m in milestones)
    forms, offsets = [], []
    for i in range(active, len(parts)):
        forms.append(_rate(where, parts[i], group, now if i == active else None))
        # the present part may have been started late: a SequentialLR counts from its construction
        offsets.append(_position(parts[i]) - here if i == active else -milestones[i - 1])
    later = milestones[active:]

    def rate(k: Array) -> Array:
        value = forms[0](k + offsets[0])
        for form, offset, milestone in zip(forms[1:], offsets[1:], later, strict=True):
            value = jnp.where(k >= milestone, form(k + offset), value)
        return value

    return rate


def _cosine(where: str, scheduler: Any, group: int) -> Form:
    """It goes down for T_max steps and up again for as many; optax's stays down."""
    base, low, period = _base(where, scheduler, group), scheduler.eta_min, scheduler.T_max
    turn = 2 * int(period) if float(period).is_integer() else 2 * period

    def rate(k: Array) -> Array:
        within = _real(k % turn) if isinstance(turn, int) else _real(k) % turn
        return low + (base - low) * (1 + jnp.cos(math.pi * within / period)) / 2

    return rate


def _warm_restarts(where: str, scheduler: Any, group: int) -> Form:
    base, low, first = _base(where, scheduler, group), scheduler.eta_min, scheduler.T_0
    starts, lengths = [0], [first]
    while scheduler.T_mult > 1 and starts[-1] + lengths[-1] < 2**31:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * scheduler.T_mult)
    lengths = [min(length, 2**31 - 1) for length in lengths]
    begins, periods = jnp.asarray(starts, jnp.int32), jnp.asarray(lengths, jnp.int32)
    cycle = sum(scheduler.last_epoch >= start for start in starts) - 1
    within = scheduler.last_epoch - starts[cycle] if scheduler.T_mult > 1 else scheduler.last_epoch % first
    if max(scheduler.last_epoch, 0) and (scheduler.T_cur, scheduler.T_i) != (within, lengths[cycle]):
        _refuse(where, scheduler, "that was stepped by fractions or out of order: it stands between two of its steps")

    def rate(k: Array) -> Array:
        if scheduler.T_mult == 1:
            within, length = k % first, jnp.int32(first)
        else:
            cycle = jnp.sum(k >= begins, dtype=jnp.int32) - 1
            within, length = k - begins[cycle], periods[cycle]
        return low + (base - low) * (1 + jnp.cos(math.pi * _real(within) / _real(length))) / 2

    return rate


# --- factors of the rate, at the scheduler's own step k ---


def _constant(s: Any) -> Form:
    return lambda k: jnp.where(k < int(s.total_iters), jnp.asarray(s.factor, _dtype()), jnp.asarray(1.0, _dtype()))


# In both the end is reached exactly: compiled, a quotient by a constant may be a product with its reciprocal, and with
# it 1 - 5 / 5 is less than 0.


def _linear(s: Any) -> Form:
    total = int(s.total_iters)

    def factor(k: Array) -> Array:
        done = _real(jnp.minimum(k, total))
        return (s.start_factor * (total - done) + s.end_factor * done) / total

    return factor


def _polynomial(s: Any) -> Form:
    total = int(s.total_iters)
    return lambda k: (_real(total - jnp.minimum(k, total)) / total) ** s.power


def _exponential(s: Any) -> Form:
    return lambda k: _power(s.gamma, _real(k))


def _step(s: Any) -> Form:
    return lambda k: _power(s.gamma, _real(k // int(s.step_size)))


def _multi_step(s: Any) -> Form:
    milestones = jnp.asarray(sorted(s.milestones.elements()), jnp.int32)
    return lambda k: _power(s.gamma, _real(jnp.sum(k >= milestones, dtype=jnp.int32)))


def _power(gamma: float, n: Array) -> Array:
    """In float32 of the logarithm: gamma itself, rounded, would be off by n roundings."""
    return gamma**n if n.dtype.itemsize > 4 or gamma <= 0 else jnp.exp(n * math.log(gamma))


_FACTORS: dict[type, Callable[[Any], Form]] = {
    lr_scheduler.ConstantLR: _constant,
    lr_scheduler.LinearLR: _linear,
    lr_scheduler.PolynomialLR: _polynomial,
    lr_scheduler.ExponentialLR: _exponential,
    lr_scheduler.StepLR: _step,
    lr_scheduler.MultiStepLR: _multi_step,
}
_KNOWN = [cls.__name__ for cls in _FACTORS] + [
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "SequentialLR",
    "ChainedScheduler",
]
_TWIN = "pass a twin that JAX can trace, a function count -> learning rate (count: updates from now on)"
_REFUSED: dict[type, str] = {
    lr_scheduler.LambdaLR: f"whose function JAX may not be able to trace; {_TWIN}",
    lr_scheduler.MultiplicativeLR: f"whose function JAX may not be able to trace; {_TWIN}",
    lr_scheduler.OneCycleLR: f"which is not known here; {_TWIN}",
    lr_scheduler.CyclicLR: f"which is not known here; {_TWIN}",
    lr_scheduler.ReduceLROnPlateau: "which decides by the values of the loss; change learning_rate in the state "
    "instead, or use optax.contrib.reduce_on_plateau",
}


def _factor(where: str, scheduler: Any) -> Form:
    if getattr(scheduler, "total_iters", 1) < 1:
        _refuse(where, scheduler, f"with total_iters={scheduler.total_iters}, for which its own two forms disagree")
    return _FACTORS[type(scheduler)](scheduler)


def _check_whole(where: str, scheduler: Any) -> None:
    """Refuse fractions of what PyTorch compares with its count of steps: there it does not follow its closed form."""
    given = [(name, getattr(scheduler, name, 0)) for name in ("total_iters", "step_size", "last_epoch")]
    milestones = getattr(scheduler, "milestones", getattr(scheduler, "_milestones", ()))
    for name, value in [*given, *(("milestones", milestone) for milestone in milestones)]:
        if not isinstance(value, Real) or not float(value).is_integer():
            what = "stands at last_epoch" if name == "last_epoch" else f"has {name}"
            remedy = "step it without an argument" if name == "last_epoch" else "make it with a whole number"
            _refuse(where, scheduler, f"which {what}={value}, no whole number, where PyTorch counts steps; {remedy}")
    if getattr(scheduler, "step_size", 1) < 1:
        _refuse(where, scheduler, f"with step_size={scheduler.step_size}; make it with one of 1 or more")


def _base(where: str, scheduler: Any, group: int) -> float:
    """The rate of a group from which a scheduler counts; it has none of a group that was added later."""
    if group >= len(scheduler.base_lrs):
        _refuse(where, scheduler, f"made before group {group} was added, which it cannot step; make it after that")
    return _number(scheduler.base_lrs[group])


def _refuse(where: str, scheduler: Any, why: str) -> Any:
    raise TypeError(f"{where}: the scheduler is a {type(scheduler).__name__}, {why}")


def _position(scheduler: Any) -> int:
    """At which of its steps a scheduler is; a chain has no count of its own."""
    return scheduler.last_epoch if hasattr(scheduler, "last_epoch") else _position(scheduler._schedulers[0])


def _real(k: Any) -> Array:
    return jnp.asarray(k).astype(_dtype())


def _dtype() -> Any:
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def _number(lr: Any) -> float:
    return number(lr)

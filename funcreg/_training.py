"""The bookkeeping of a penalty in a training loop: trees, checks, precision. No framework, no formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _rule, _trees
from ._flat import form
from ._penalty import Penalty
from ._trees import Flat


class Parts(NamedTuple):
    """A penalized loss taken apart."""

    loss: Any  # shape=()
    penalty: Any  # shape=()


@dataclass(frozen=True)
class Penalized:
    """`loss + penalty.value(params)`, called like the loss; made by `penalize`."""

    loss: Callable[..., Any]
    penalty: Penalty
    parts: bool = False

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        loss = self.loss(params, *args, **kwargs)
        check_scalar(
            "penalize",
            loss,
            "take a mean over the batch, and return auxiliary output from a function around the penalized loss",
        )
        penalty = self.penalty.value(params)
        total = self.penalty.wing.total([loss, penalty], [loss, penalty])
        return (total, Parts(loss, penalty)) if self.parts else total


def penalize(penalty_class: type[Penalty], loss: Callable[..., Any], penalty: Any, parts: bool) -> Penalized:
    if not callable(loss):
        raise TypeError(f"penalize: loss must be a function (params, *batch) -> scalar, got {loss!r}")
    check_penalty(penalty_class, "penalize", penalty, schedule=False).check_grad("penalize")
    return Penalized(loss, penalty, parts)


class AddPenaltyGradientState(NamedTuple):
    count: Any  # shape=(), dtype=int32


def add_penalty_gradient(penalty_class: type[Penalty], penalty: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    where, wing = "add_penalty_gradient", penalty_class.wing
    check_penalty(penalty_class, where, penalty)
    if isinstance(penalty, Penalty):
        penalty.check_grad(where)

    def init(params: Any) -> AddPenaltyGradientState:
        return AddPenaltyGradientState(wing.zero_count(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AddPenaltyGradientState]:
        check_params(where, params)
        check_state(where, state, AddPenaltyGradientState)
        current = at(penalty_class, where, penalty, state.count)
        current.check_grad(where)
        flat, leaves = _trees.align(wing, where, params, updates=updates)
        new = []
        for x, u, bound in zip(flat.leaves, leaves["updates"], current.bind(params)[1], strict=True):
            up = wing.upcast(u)
            # of the upcast parameter: small gradients of half precision would vanish before they are added
            new.append(wing.downcast(up + wing.cast(_rule.grad_leaf(wing, wing.upcast(x), bound), up), u))
        return flat.rebuild_zeros(new), AddPenaltyGradientState(wing.increment(state.count))

    return init, update


@dataclass(frozen=True)
class Proximal:
    """What the proximal transformations share: checks, the copy of the parameters in higher precision, the prox."""

    penalty_class: type[Penalty]
    where: str
    penalty: Any
    master_dtype: Any

    def carried_by(self, update: Any) -> Any:
        """The update function with the penalty as an attribute: `train_step` reports its value."""
        update.penalty = self.penalty
        return update

    def start(self, params: Any) -> tuple[Flat, list[Any], Any]:
        """The leaves on which the steps are done, and their copy for the state, before the first step."""
        wing = self.penalty_class.wing
        flat = wing.flatten(params)
        if isinstance(self.penalty, Penalty):
            self.penalty.check_prox(params)
        self._check_leaves(flat)
        if self.master_dtype is None:
            return flat, flat.leaves, ()
        copies = [wing.master_copy(x, self.master_dtype) for x in flat.leaves]
        return flat, copies, flat.rebuild_zeros(copies)

    def open(self, updates: Any, state: Any, params: Any, **trees: Any) -> Opened:
        """The current penalty, points and gradients, and the leaves of the state's trees, in one order."""
        wing = self.penalty_class.wing
        check_params(self.where, params)
        if self.master_dtype is not None:
            trees["master"] = state.master
        flat, lists = _trees.align(wing, self.where, params, updates=updates, **trees)
        self._check_leaves(flat)
        points = lists.pop("master", flat.leaves)
        grads = [wing.downcast(g, x) for g, x in zip(lists.pop("updates"), points, strict=True)]
        return Opened(wing, at(self.penalty_class, self.where, self.penalty, state.count), flat, points, grads, lists)

    def close(self, opened: Opened, moved: list[Any], steps: list[Any]) -> tuple[Any, Any]:
        """The updates to the prox of the moved points, and the copy for the state."""
        wing, flat = opened.wing, opened.flat
        new = wing.flatten(opened.penalty._prox(flat.rebuild(moved), flat.rebuild_zeros(steps), check=False)).leaves
        # params + updates is the new point, and x + (0 - x) is exactly 0
        updates = flat.rebuild_zeros([y - wing.cast(x, y) for y, x in zip(new, flat.leaves, strict=True)])
        return updates, () if self.master_dtype is None else flat.rebuild_zeros(new)

    def _check_leaves(self, flat: Flat) -> None:
        for name, x in zip(flat.names, flat.leaves, strict=True):
            if self.penalty_class.wing.is_complex(x):
                raise TypeError(
                    f"{self.where}: the leaf {name!r} is complex, for which this metric has no meaning: store real and "
                    "imaginary parts as a last axis of two, or train the leaf with another transformation"
                )
        if self.master_dtype is not None:
            return
        for name, x in zip(flat.names, flat.leaves, strict=True):
            if x.dtype.itemsize < 4:
                raise ValueError(
                    f"{self.where}: the leaf {name!r} is {x.dtype}, in which a threshold below half an ulp does "
                    "nothing: small weights would never reach zero; pass master_dtype=float32, which keeps a copy "
                    "in the state"
                )


class Opened(NamedTuple):
    """One step of a proximal transformation: lists of leaves in the order of the parameters."""

    wing: Any
    penalty: Penalty
    flat: Flat
    points: list[Any]
    grads: list[Any]
    lists: dict[str, list[Any]]

    def guards(self) -> list[Any]:
        return self.wing.flatten(self.penalty.guard(self.flat.rebuild(self.points))).leaves


# --- what is refused ---


def check_penalty(penalty_class: type[Penalty], where: str, penalty: Any, schedule: bool = True) -> Any:
    """A penalty of this wing, or a schedule of penalties where that is allowed."""
    if isinstance(penalty, penalty_class) or (schedule and callable(penalty) and not isinstance(penalty, Penalty)):
        return penalty
    wing = penalty_class.__module__.removesuffix("._wing")
    what = f"a penalty of {wing} such as l1(1e-4)" + (" or a function count -> Penalty" if schedule else "")
    got = f"one of {type(penalty).__module__.removesuffix('._wing')}" if isinstance(penalty, Penalty) else repr(penalty)
    raise TypeError(f"{where}: penalty must be {what}, got {got}")


def at(penalty_class: type[Penalty], where: str, penalty: Any, count: Any) -> Any:
    """The penalty at a step count."""
    if isinstance(penalty, Penalty):
        return penalty
    return check_penalty(penalty_class, f"{where}: the schedule's result", penalty(count), schedule=False)


def check_params(where: str, params: Any) -> None:
    if params is None:
        raise ValueError(f"{where}: update needs the parameters: call update(updates, state, params)")


def check_state(where: str, state: Any, expected: type) -> None:
    if not isinstance(state, expected):
        raise TypeError(
            f"{where}: state must be a {expected.__name__}, got {type(state).__name__}; call init(params) first"
        )


def check_hyper(
    wing: Any, where: str, name: str, value: Any, below: float = float("inf"), allow_inf: bool = False
) -> None:
    """A hyper-parameter in `[0, below)`; traced values are not checked."""
    if not (wing.is_scalar(value) and wing.is_real(value)):
        raise TypeError(f"{where}: {name} must be a real number or a 0-d array, got {value!r}")
    wrong = wing.concrete(value)
    if wrong is not None and not (0 <= wrong < below or (allow_inf and wrong == below)):
        domain = ">= 0 and finite" if below == float("inf") else f"in [0, {below:g})"
        raise ValueError(f"{where}: {name} must be {domain}, got {wrong:g}")


def rate_at(wing: Any, where: str, learning_rate: Any, count: Any) -> Any:
    """The learning rate at a step count."""
    if not callable(learning_rate):
        return learning_rate
    rate = learning_rate(count)
    check_hyper(wing, where, "the result of the schedule learning_rate", rate)
    return rate


def check_master_dtype(where: str, master_dtype: Any, floating: bool) -> None:
    if not floating:
        raise TypeError(
            f"{where}: master_dtype must be a real floating-point dtype such as float32, got {master_dtype}"
        )
    if master_dtype.itemsize < 4:
        raise ValueError(f"{where}: master_dtype must have 32 bits or more, got {master_dtype}")


def check_scalar(where: str, loss: Any, advice: str) -> None:
    shape = getattr(loss, "shape", None)
    if shape is None or tuple(shape) != ():
        got = f"shape {tuple(shape)}" if shape is not None else type(loss).__name__
        raise TypeError(f"{where}: the loss must return a scalar array, got {got}; {advice}")


def check_trainable(wing: Any, where: str, params: Any, advice: str) -> None:
    for name, leaf in wing.flatten(params).passed_over:
        what = form(leaf) if hasattr(leaf, "dtype") else repr(leaf)
        raise TypeError(f"{where}: the leaf {name!r} of params is no trainable floating-point array: {what}; {advice}")

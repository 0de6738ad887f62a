"""Penalties in a training loop: in the loss, as a gradient, or as a proximal step in the optimizer's own metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _flat, _penalty
from .._transform_checks import at, check_hyper, check_params, check_penalty, check_precision, check_scalar
from . import _wing
from ._wing import Params, Penalty, Strength
from .optax import GradientTransformation

Loss = Callable[..., Any]


class Parts(NamedTuple):
    """A penalized loss taken apart."""

    loss: Any  # shape=()
    penalty: Any  # shape=()


@dataclass(frozen=True)
class Penalized:
    """`loss + penalty.value(params)`, called like the loss; made by `penalize`."""

    loss: Loss
    penalty: Penalty
    parts: bool = False

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        loss = self.loss(params, *args, **kwargs)
        check_scalar(loss)
        penalty = self.penalty.value(params)
        total = _wing.total([loss, penalty], [loss, penalty])
        return (total, Parts(loss, penalty)) if self.parts else total


def penalize(loss: Loss, penalty: Penalty, parts: bool = False) -> Penalized:
    """The loss plus the value of a penalty, as a function with the loss's own arguments.

    The result is a record with the fields `loss`, `penalty` and `parts` that is called like the loss; it composes with
    grad, vmap, jvp, hessian and jit or compile. Half-precision losses are added in float32.

    Args:
        loss: `loss(params, *batch) -> scalar`.
        penalty: what to add.
        parts: return `(total, Parts(loss, penalty))` instead, for `has_aux=True`: log the loss that matters.

    Returns:
        The penalized loss.

    Raises:
        NoGradError: a part of the penalty is an indicator or a count.
        TypeError: `loss` is no function, `penalty` is no penalty of this wing, or the loss returns more than a scalar.
    """
    if not callable(loss):
        raise TypeError(f"penalize: loss must be a function (params, *batch) -> scalar, got {loss!r}")
    check_penalty(Penalty, "penalize", penalty, schedule=False).check_grad("penalize")
    return Penalized(loss, penalty, parts)


class AddPenaltyGradientState(NamedTuple):
    count: Tensor  # shape=(), dtype=int32


def add_penalty_gradient(penalty: Penalty | Callable[[Any], Penalty]) -> GradientTransformation:
    """Adds the gradient of a penalty to the updates.

    Before the preconditioner this is coupled regularization (with `l2`: `Adam(weight_decay)` of torch), after it
    decoupled regularization (with `l2`: adamw): `chain(scale_by_adam(), add_penalty_gradient(l2(wd)),
    scale_by_learning_rate(lr))` equals `adamw(lr, weight_decay=wd)`.

    Args:
        penalty: what to add, or a function `count -> Penalty` for a schedule.

    Returns:
        A transformation whose `update` needs `params`.

    Raises:
        NoGradError: a part of the penalty is an indicator or a count.
        TypeError: `penalty` is no penalty of this wing.
    """
    where = "add_penalty_gradient"
    check_penalty(Penalty, where, penalty)
    if isinstance(penalty, Penalty):
        penalty.check_grad(where)

    def init(params: Params) -> AddPenaltyGradientState:
        return AddPenaltyGradientState(_count(params))

    def update(updates: Params, state: AddPenaltyGradientState, params: Params = None) -> tuple[Params, Any]:
        check_params(where, params)
        current = at(Penalty, where, penalty, state.count)
        current.check_grad(where)
        flat, leaves = _penalty.align(_wing, where, params, updates=updates, gradient=current.grad(params))
        new = [_wing.downcast(u + g, u) for u, g in zip(leaves["updates"], leaves["gradient"], strict=True)]
        return flat.rebuild_zeros(new), AddPenaltyGradientState(state.count + 1)

    return GradientTransformation(init, update)


class ProxSgdState(NamedTuple):
    count: Tensor  # shape=(), dtype=int32
    prox_scale: Params  # c, per leaf: shape=(), dtype of the leaf
    trace: Params  # like params; empty without momentum
    master: Params  # like params, in master_dtype; empty without


def prox_sgd(
    learning_rate: Strength | Callable[[Any], Any],
    penalty: Penalty | Callable[[Any], Penalty],
    momentum: Strength | None = None,
    nesterov: bool = False,
    master_dtype: Any = None,
) -> GradientTransformation:
    r"""Proximal gradient descent, with momentum that still solves the problem as written.

    .. math::
        m_k = \mu m_{k-1} + g_k, \quad c_k = \mu c_{k-1} + 1, \quad
        w_{k+1} = \mathrm{prox}_{\eta c_k R}(w_k - \eta m_k)

    With Nesterov momentum both `m` and `c` take one step more, to `g + \mu m` and `1 + \mu c`. The prox step grows with
    the sum of the momentum's weights: with plain `\eta` the fixed points would be those of `loss + (1 - \mu) R`.

    Args:
        learning_rate: `\eta`, a number, a 0-d array (also traced), or a schedule `count -> learning rate`.
        penalty: `R`, or a function `count -> Penalty` for a schedule.
        momentum: `\mu` in `[0, 1)`; None: none.
        nesterov: Nesterov momentum.
        master_dtype: a dtype of 32 bits or more for a copy of the parameters in the state, on which the steps are done.
            Needed for half-precision parameters, in which a threshold below half an ulp does nothing; the updates then
            have this dtype.

    Returns:
        A transformation; `params + updates` is the new point and keeps exact zeros. `update` needs `params`.

    Raises:
        ValueError: a hyper-parameter out of its domain; half-precision parameters without `master_dtype`.
        NoProxError: at `init`, a sum of penalties without a closed prox.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 4.2, for the step without momentum.
    """
    where = "prox_sgd"
    check_penalty(Penalty, where, penalty)
    check_hyper(_wing, where, "learning_rate", learning_rate)
    if momentum is not None:
        check_hyper(_wing, where, "momentum", momentum, below=1.0)
    elif nesterov:
        raise ValueError("prox_sgd: nesterov=True needs momentum, got momentum=None")
    master_dtype = _dtype(where, master_dtype)

    def init(params: Params) -> ProxSgdState:
        flat = _start(where, penalty, params, master_dtype)
        if momentum is None:
            return ProxSgdState(_count(params), (), (), _master(flat, master_dtype))
        zeros = [_wing.zeros_like(x) for x in _work(flat, master_dtype)]
        return ProxSgdState(
            _count(params), _wing.total([], flat.leaves), flat.rebuild_zeros(zeros), _master(flat, master_dtype)
        )

    def update(updates: Params, state: ProxSgdState, params: Params = None) -> tuple[Params, ProxSgdState]:
        check_params(where, params)
        current = at(Penalty, where, penalty, state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        trees = {"updates": updates}
        if momentum is not None:
            trees["trace"] = state.trace
        flat, leaves = _penalty.align(_wing, where, params, **trees)
        points = _points(where, flat, state.master, master_dtype)
        grads = [_wing.downcast(g, x) for g, x in zip(leaves["updates"], points, strict=True)]
        scale, trace, factor = state.prox_scale, state.trace, 1.0
        directions = grads
        if momentum is not None:
            mu = _wing.cast(momentum, scale)
            decayed = [_wing.cast(momentum, m) * m for m in leaves["trace"]]
            moments = [g + m for g, m in zip(grads, decayed, strict=True)]
            scale = factor = mu * scale + 1
            directions = moments
            if nesterov:
                directions = [g + _wing.cast(momentum, m) * m for g, m in zip(grads, moments, strict=True)]
                factor = 1 + mu * scale
            trace = flat.rebuild_zeros(moments)
        moved = [x - _wing.cast(rate, x) * d for x, d in zip(points, directions, strict=True)]
        steps = [_wing.cast(rate, x) * _wing.cast(factor, x) for x in points]
        new = _prox(current, flat, moved, steps)
        state = ProxSgdState(state.count + 1, scale, trace, flat.rebuild_zeros(new) if master_dtype else ())
        return _updates(flat, new), state

    return GradientTransformation(init, update)


class ProxAdamState(NamedTuple):
    count: Tensor  # shape=(), dtype=int32
    mu: Params  # like params
    nu: Params  # like params
    master: Params  # like params, in master_dtype; empty without


def prox_adam(
    learning_rate: Strength | Callable[[Any], Any],
    penalty: Penalty | Callable[[Any], Penalty],
    b1: Strength = 0.9,
    b2: Strength = 0.999,
    eps: Strength = 1e-8,
    weight_decay: Strength = 0.0,
    master_dtype: Any = None,
) -> GradientTransformation:
    r"""Adam whose proximal step uses Adam's own metric: exact zeros for the objective as written.

    .. math::
        s_i = \max\bigl(\sqrt{\hat v_i},\, |\partial R(w)_i|\bigr), \quad \tau_i = \frac{\eta}{s_i + \epsilon}, \quad
        w \leftarrow \mathrm{argmin}_y\; R(y) + \sum_i \frac{(y_i - (w_i - \tau_i \hat m_i))^2}{2 \tau_i}

    where `\sqrt{\hat v_i}` is replaced by 0.3 times its root mean square over the leaf if `v_i` is 0. Its fixed points
    are the stationary points of `loss + R`. Soft-thresholding by `\eta \lambda` after an Adam step solves another
    problem, in which every coordinate has its own strength. The two guards of the metric never bind at a stationary
    point; without them a coordinate that has seen no gradient, or a tiny one, would be set to zero in the first step.
    With a zero penalty this is Adam.

    Args:
        learning_rate: `\eta`, a number, a 0-d array (also traced), or a schedule `count -> learning rate`.
        penalty: `R`, or a function `count -> Penalty` for a schedule.
        b1: decay of the first moment, in `[0, 1)`.
        b2: decay of the second moment, in `[0, 1)`.
        eps: `\epsilon`, outside the root.
        weight_decay: decoupled, as in adamw: the point is shrunk by `1 - \eta` times it before the prox.
        master_dtype: as in `prox_sgd`.

    Returns:
        A transformation; `params + updates` is the new point and keeps exact zeros. `update` needs `params`.

    Raises:
        ValueError: a hyper-parameter out of its domain; half-precision parameters without `master_dtype`.
        NoProxError: at `init`, a sum of penalties without a closed prox.

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980; proximal steps in the metric
        of an adaptive method: Yun, Lozano and Yang, "ProxGen: Adaptive Proximal Gradient Methods for Structured Neural
        Networks", 2021. The two guards are this library's.
    """
    where = "prox_adam"
    check_penalty(Penalty, where, penalty)
    check_hyper(_wing, where, "learning_rate", learning_rate)
    check_hyper(_wing, where, "b1", b1, below=1.0)
    check_hyper(_wing, where, "b2", b2, below=1.0)
    check_hyper(_wing, where, "eps", eps)
    check_hyper(_wing, where, "weight_decay", weight_decay)
    master_dtype = _dtype(where, master_dtype)

    def init(params: Params) -> ProxAdamState:
        flat = _start(where, penalty, params, master_dtype)
        zeros = [_wing.zeros_like(x) for x in _work(flat, master_dtype)]
        again = [_wing.zeros_like(x) for x in zeros]
        return ProxAdamState(
            _count(params), flat.rebuild_zeros(zeros), flat.rebuild_zeros(again), _master(flat, master_dtype)
        )

    def update(updates: Params, state: ProxAdamState, params: Params = None) -> tuple[Params, ProxAdamState]:
        check_params(where, params)
        current = at(Penalty, where, penalty, state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = state.count + 1
        flat, leaves = _penalty.align(_wing, where, params, updates=updates, mu=state.mu, nu=state.nu)
        points = _points(where, flat, state.master, master_dtype)
        guards = _wing.flatten(current.guard(flat.rebuild(points))).leaves
        mu, nu, moved, steps = [], [], [], []
        for x, g, m, v, guard in zip(points, leaves["updates"], leaves["mu"], leaves["nu"], guards, strict=True):
            g = _wing.downcast(g, x)
            m = _wing.cast(b1, x) * m + _wing.cast(1 - b1, x) * g
            v = _wing.cast(b2, x) * v + _wing.cast(1 - b2, x) * g**2
            mean = m / _correction(b1, count, x)
            second = v / _correction(b2, count, x)
            step = _wing.cast(rate, x) / (adam_metric(second, second.mean(), guard) + _wing.cast(eps, x))
            decay = 1 - _wing.cast(rate, x) * _wing.cast(weight_decay, x)
            mu.append(m)
            nu.append(v)
            moved.append(decay * x - step * mean)
            steps.append(step)
        new = _prox(current, flat, moved, steps)
        master = flat.rebuild_zeros(new) if master_dtype else ()
        return _updates(flat, new), ProxAdamState(count, flat.rebuild_zeros(mu), flat.rebuild_zeros(nu), master)

    return GradientTransformation(init, update)


def adam_metric(second_moment: Tensor, mean_square: Tensor, guard: Tensor) -> Tensor:
    """The diagonal metric of `prox_adam`, before `eps` and the learning rate; see there for formula and reasons."""
    s = torch.where(second_moment == 0, 0.3 * mean_square.sqrt(), second_moment.sqrt())
    return torch.maximum(s, guard)


def _correction(decay: Any, count: Tensor, x: Tensor) -> Tensor:
    # In float32 the power alone would put an error of 7e-6 on the step.
    return (1 - torch.as_tensor(decay, dtype=torch.float64, device=count.device) ** count).to(x.dtype)


def _count(params: Params) -> Tensor:
    leaves = _wing.flatten(params).leaves
    return torch.zeros((), dtype=torch.int32, device=leaves[0].device if leaves else None)


def _start(where: str, penalty: Any, params: Params, master_dtype: Any) -> _penalty.Flat:
    """What a proximal transformation checks before the first step."""
    flat = _wing.flatten(params)
    check_precision(where, flat, master_dtype)
    if isinstance(penalty, Penalty):
        penalty.check_prox(params)
    return flat


def _dtype(where: str, dtype: Any) -> Any:
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise TypeError(f"{where}: master_dtype must be a torch.dtype such as torch.float32, got {dtype!r}")
    return dtype


def _work(flat: _penalty.Flat, master_dtype: Any) -> list[Tensor]:
    """The leaves in the dtype in which the steps are done."""
    return [x if master_dtype is None else x.to(master_dtype) for x in flat.leaves]


def _master(flat: _penalty.Flat, master_dtype: Any) -> Params:
    return () if master_dtype is None else flat.rebuild_zeros([x.detach().clone() for x in _work(flat, master_dtype)])


def _points(where: str, flat: _penalty.Flat, master: Params, master_dtype: Any) -> list[Tensor]:
    check_precision(where, flat, master_dtype)
    return flat.leaves if master_dtype is None else _wing.flatten(master).leaves


def _prox(penalty: Penalty, flat: _penalty.Flat, moved: list[Tensor], steps: list[Any]) -> list[Tensor]:
    return _wing.flatten(penalty.prox(flat.rebuild(moved), flat.rebuild_zeros(steps))).leaves


def _updates(flat: _penalty.Flat, new: list[Tensor]) -> Params:
    """`params + updates` is the new point; `x + (0 - x)` is exactly 0."""
    return flat.rebuild_zeros([y - x.to(y.dtype) for y, x in zip(new, flat.leaves, strict=True)])


def to_flat(tree: Any) -> dict[str, Tensor]:
    """Any tree of arrays (an optimizer state, parameters) as a flat dict of names, for safetensors.

    Args:
        tree: any pytree of arrays; None is left out.

    Returns:
        Dotted path -> array.

    Raises:
        TypeError: a leaf that is no array; names it.
        ValueError: two leaves of one name.
    """
    return _flat.to_flat(_wing, tree)


def from_flat(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `to_flat`: the arrays of a flat dict in the structure of a fresh state.

    Args:
        like: a tree of the same structure, such as `init(params)`.
        flat: dotted path -> array.

    Returns:
        A tree like `like` with the arrays of `flat`.

    Raises:
        ValueError: a name is missing or too many, or a leaf has another shape or dtype; names the first.
    """
    return _flat.from_flat(_wing, like, flat)

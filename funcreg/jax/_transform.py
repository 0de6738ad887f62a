"""Penalties in a training loop: in the loss, as a gradient, or as a proximal step in the optimizer's own metric."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from optax import GradientTransformation

from .. import _flat, _training
from .._training import Parts as Parts
from .._training import Penalized, Proximal, check_hyper
from . import _wing
from ._wing import Params, Penalty, Strength


class ProxSgdState(NamedTuple):
    count: Array  # shape=(), dtype=int32
    prox_scale: Params  # c: shape=(), dtype of the widest leaf; empty without momentum
    trace: Params  # like params; empty without momentum
    master: Params  # like params, in master_dtype; empty without


class ProxAdamState(NamedTuple):
    count: Array  # shape=(), dtype=int32
    mu: Params  # like params
    nu: Params  # like params
    master: Params  # like params, in master_dtype; empty without


def penalize(loss: Callable[..., Any], penalty: Penalty, parts: bool = False) -> Penalized:
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
    return _training.penalize(Penalty, loss, penalty, parts)


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
    return GradientTransformation(*_training.add_penalty_gradient(Penalty, penalty))


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
            `count` is an int32 0-d array: in a float64 run compute the rate from a float64 copy of it.
        penalty: `R`, or a function `count -> Penalty` for a schedule.
        momentum: `\mu` in `[0, 1)`; None: none.
        nesterov: Nesterov momentum.
        master_dtype: a dtype of 32 bits or more for a copy of the parameters in the state, on which the steps are done.
            Needed for half-precision parameters, in which a threshold below half an ulp does nothing; the updates then
            have this dtype. A leaf that is wider is copied in its own dtype.

    Returns:
        A transformation; `params + updates` is the new point and keeps exact zeros. `update` needs `params`.

    Raises:
        ValueError: a hyper-parameter or a schedule's result out of its domain; half-precision parameters without
            `master_dtype`.
        TypeError: a hyper-parameter that is no real scalar; only the learning rate and the penalty may be functions.
        NoProxError: at `init`, a sum of penalties without a closed prox.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 4.2, for the step without momentum.
    """
    rule = _proximal("prox_sgd", penalty, learning_rate, master_dtype)
    if momentum is not None:
        check_hyper(_wing, "prox_sgd", "momentum", momentum, below=1.0)
    elif nesterov:
        raise ValueError("prox_sgd: nesterov=True needs momentum, got momentum=None")

    def init(params: Params) -> ProxSgdState:
        flat, points, master = rule.start(params)
        if momentum is None:
            return ProxSgdState(_wing.zero_count(params), (), (), master)
        trace = flat.rebuild_zeros([_wing.zeros_like(x) for x in points])
        return ProxSgdState(_wing.zero_count(params), _wing.total([], points), trace, master)

    def update(updates: Params, state: Any, params: Params = None) -> tuple[Params, ProxSgdState]:
        _training.check_state("prox_sgd", state, ProxSgdState)
        trees = {} if momentum is None else {"trace": state.trace}
        now = rule.open(updates, state, params, **trees)
        rate = _training.rate_at(_wing, "prox_sgd", learning_rate, state.count)

        def look_ahead(fresh: Array, old: Array) -> Array:
            return fresh + _wing.cast(momentum, old) * old

        directions, factor, scale, trace = now.grads, 1.0, state.prox_scale, state.trace
        if momentum is not None:
            directions = list(map(look_ahead, now.grads, now.lists["trace"]))
            trace = now.flat.rebuild_zeros(directions)
            factor = scale = look_ahead(jnp.ones_like(scale), scale)
        if momentum is not None and nesterov:
            directions = list(map(look_ahead, now.grads, directions))
            factor = look_ahead(jnp.ones_like(scale), scale)
        steps = [_wing.cast(rate, x) * _wing.cast(factor, x) for x in now.points]
        moved = [x - _wing.cast(rate, x) * d for x, d in zip(now.points, directions, strict=True)]
        updates, master = rule.close(now, moved, steps)
        return updates, ProxSgdState(_wing.increment(state.count), scale, trace, master)

    return GradientTransformation(init, rule.carried_by(update))


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
    With a zero penalty this is Adam. A NaN in a gradient reaches, through that mean over the leaf, also the coordinates
    whose `v_i` is 0; in all others it stays in its own.

    Args:
        learning_rate: `\eta`, a number, a 0-d array (also traced), or a schedule `count -> learning rate`.
            `count` is an int32 0-d array: in a float64 run compute the rate from a float64 copy of it.
        penalty: `R`, or a function `count -> Penalty` for a schedule.
        b1: decay of the first moment, in `[0, 1)`.
        b2: decay of the second moment, in `[0, 1)`.
        eps: `\epsilon`, outside the root.
        weight_decay: decoupled, as in adamw: the point is shrunk by `1 - \eta` times it before the prox.
        master_dtype: as in `prox_sgd`.

    Returns:
        A transformation; `params + updates` is the new point and keeps exact zeros. `update` needs `params`.

    Raises:
        ValueError: a hyper-parameter or a schedule's result out of its domain; half-precision parameters without
            `master_dtype`.
        TypeError: a hyper-parameter that is no real scalar; only the learning rate and the penalty may be functions.
        NoProxError: at `init`, a sum of penalties without a closed prox.

    Reference:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980; proximal steps in the metric
        of an adaptive method: Yun, Lozano and Yang, "ProxGen: Adaptive Proximal Gradient Methods for Structured Neural
        Networks", 2021. The two guards are this library's.
    """
    rule = _proximal("prox_adam", penalty, learning_rate, master_dtype)
    check_hyper(_wing, "prox_adam", "b1", b1, below=1.0)
    check_hyper(_wing, "prox_adam", "b2", b2, below=1.0)
    check_hyper(_wing, "prox_adam", "eps", eps)
    check_hyper(_wing, "prox_adam", "weight_decay", weight_decay)

    def init(params: Params) -> ProxAdamState:
        flat, points, master = rule.start(params)
        mu, nu = (flat.rebuild_zeros([_wing.zeros_like(x) for x in points]) for _ in range(2))
        return ProxAdamState(_wing.zero_count(params), mu, nu, master)

    def update(updates: Params, state: Any, params: Params = None) -> tuple[Params, ProxAdamState]:
        _training.check_state("prox_adam", state, ProxAdamState)
        now = rule.open(updates, state, params, mu=state.mu, nu=state.nu)
        rate = _training.rate_at(_wing, "prox_adam", learning_rate, state.count)
        count = _wing.increment(state.count)

        def leaf(x: Array, g: Array, m: Array, v: Array, guard: Array) -> tuple[Array, ...]:
            m = _average(b1, m, g)
            v = _average(b2, v, g**2)
            v_hat = v / _correction(b2, count, x)
            scaled = adam_metric(v_hat, jnp.mean(v_hat), guard) + _wing.cast(eps, x)
            lr = _wing.cast(rate, x)
            forward = x - lr * (m / _correction(b1, count, x) / scaled + _wing.cast(weight_decay, x) * x)
            return forward, lr / scaled, m, v

        rows = zip(now.points, now.grads, now.lists["mu"], now.lists["nu"], now.guards(), strict=True)
        new = [leaf(*row) for row in rows]
        moved, steps, mu, nu = ([row[i] for row in new] for i in range(4))
        updates, master = rule.close(now, moved, steps)
        return updates, ProxAdamState(count, now.flat.rebuild_zeros(mu), now.flat.rebuild_zeros(nu), master)

    return GradientTransformation(init, rule.carried_by(update))


def adam_metric(second_moment: Array, mean_square: Array, guard: Array) -> Array:
    """The diagonal metric of `prox_adam`, before `eps` and the learning rate; see there for formula and reasons."""
    idle = second_moment == 0
    return jnp.maximum(jnp.where(idle, 0.3 * _root(mean_square), _root(second_moment)), guard)


def _root(x: Array) -> Array:
    """sqrt with derivative 0 at 0, where nothing has moved yet; see NOTE [double where] in _kinks.py."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _average(decay: Any, old: Array, new: Array) -> Array:
    return _wing.cast(decay, old) * old + _wing.cast(1 - decay, old) * new


def _correction(decay: Any, count: Array, x: Array) -> Array:
    """`1 - decay**count` without the cancellation, which in float32 would put an error of 7e-6 on the step."""
    n = count.astype(x.dtype)
    if isinstance(decay, (int, float)):
        log = math.log(decay) if decay > 0 else -math.inf
    else:
        decay = jnp.asarray(decay)
        zero = decay == 0  # NOTE [double where] in _kinks.py
        log = jnp.log(jnp.where(zero, 1, decay)).astype(x.dtype)
        return jnp.where(zero, 1 - jax.lax.pow(decay.astype(x.dtype), n), -jnp.expm1(n * log))
    return -jnp.expm1(n * log)


def _proximal(where: str, penalty: Any, learning_rate: Any, master_dtype: Any) -> Proximal:
    _training.check_penalty(Penalty, where, penalty)
    if not callable(learning_rate):
        check_hyper(_wing, where, "learning_rate", learning_rate)
    if master_dtype is not None:
        try:
            master_dtype = jnp.dtype(master_dtype)
        except TypeError:
            raise TypeError(
                f"{where}: master_dtype must be a dtype such as jnp.float32, got {master_dtype!r}"
            ) from None
        _training.check_master_dtype(where, master_dtype, jnp.issubdtype(master_dtype, jnp.floating))
    return Proximal(Penalty, where, penalty, master_dtype)


def to_flat(tree: Any) -> dict[str, Array]:
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

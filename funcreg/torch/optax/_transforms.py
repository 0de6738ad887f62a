"""The transformations that optimizers are made of."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _trees
from ._base import (
    NO_PARAMS_MSG,
    EmptyState,
    GradientTransformation,
    OptState,
    Params,
    ScalarOrSchedule,
    Updates,
    identity,
    init_empty_state,
    safe_increment,
)
from ._trees import cast, map_leaves


def _square(x: Tensor) -> Tensor:
    return (x.conj() * x).real if x.is_complex() else x.square()


def _average(decay: float | Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Exponential moving average: `(1 - decay) * new + decay * old`."""
    return cast(1 - decay, new) * new + cast(decay, old) * old


def decay_correction(decay: float | Tensor, count: Tensor) -> Tensor:
    """`1 - decay**count`, float64: in float32 it would be wrong by 7e-6 at decay 0.999."""
    n = _trees.wide(count, count.device)
    if isinstance(decay, Tensor) or not 0 < decay < 1:
        return 1 - _trees.wide(decay, count.device) ** n
    # torch.compile repeats a power in every vector of every leaf, which takes longer than the rest of Adam; the result
    # of `exp` it computes once and keeps. Near 1 the difference would cancel.
    log = n * math.log(decay)
    return torch.where(log > -0.5, -torch.expm1(log), 1 - torch.exp(log))


class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`."""

    count: Tensor  # shape=(), dtype=int32
    mu: Updates  # shapes of the params, dtype=mu_dtype
    nu: Updates  # shapes and dtypes of the params


def scale_by_adam(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    eps_root: float | Tensor = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Divide the average of the gradients by the root of the average of their squares, as Adam does.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \varepsilon_{root}} + \varepsilon}

    With `nesterov` the numerator is `b1 * m / (1 - b1**(t + 1)) + (1 - b1) * g / (1 - b1**t)`.

    Args:
        b1: decay of the average of the gradients.
        b2: decay of the average of their squares.
        eps: added to the root.
        eps_root: added under the root; greater than 0 if updates are to be differentiated.
        mu_dtype: dtype in which the average of the gradients is stored; None: that of the params.
        nesterov: use Nesterov momentum (NAdam).

    Returns:
        A `GradientTransformation` with `ScaleByAdamState`.
    """

    def init(params: Params) -> ScaleByAdamState:
        mu = _trees.full_like("scale_by_adam", params, dtype=mu_dtype)
        return ScaleByAdamState(_trees.zero_count(params), mu, _trees.full_like("scale_by_adam", params))

    def update(
        updates: Updates, state: ScaleByAdamState, params: Params | None = None
    ) -> tuple[Updates, ScaleByAdamState]:
        del params
        count = safe_increment(state.count)
        correction1, correction2 = decay_correction(b1, count), decay_correction(b2, count)
        correction1_next = decay_correction(b1, safe_increment(count)) if nesterov else correction1

        def leaf(m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = _average(b1, g, m)
            v = _average(b2, _square(g), v)
            m_hat = m / cast(correction1_next, m)
            if nesterov:
                m_hat = _average(b1, g / cast(correction1, g), m_hat)
            v_hat = v / cast(correction2, v)
            return m, v, m_hat / (torch.sqrt(v_hat + cast(eps_root, v)) + cast(eps, v))

        mu, nu, updates = map_leaves("scale_by_adam", leaf, mu=state.mu, nu=state.nu, updates=updates)
        return updates, ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


class ScaleByRmsState(NamedTuple):
    """State of RMSprop."""

    nu: Updates  # shapes and dtypes of the params


class ScaleByRmsWithCountState(NamedTuple):
    """State of RMSprop with bias correction."""

    count: Tensor  # shape=(), dtype=int32
    nu: Updates  # shapes and dtypes of the params


class ScaleByRStdDevState(NamedTuple):
    """State of centered RMSprop."""

    mu: Updates  # shapes and dtypes of the params
    nu: Updates  # shapes and dtypes of the params


class ScaleByRStdDevWithCountState(NamedTuple):
    """State of centered RMSprop with bias correction."""

    count: Tensor  # shape=(), dtype=int32
    mu: Updates  # shapes and dtypes of the params
    nu: Updates  # shapes and dtypes of the params


def _root_divisor(square: Tensor, eps: float | Tensor, eps_in_sqrt: bool) -> Tensor:
    if eps_in_sqrt:
        return torch.sqrt(square + cast(eps, square))
    return torch.sqrt(square) + cast(eps, square)


def scale_by_rms(
    decay: float | Tensor, eps: float | Tensor, initial_scale: float | Tensor, eps_in_sqrt: bool, bias_correction: bool
) -> GradientTransformation:
    """Divide by the root of the average of the squared gradients; the first half of `rmsprop`."""

    def init(params: Params) -> OptState:
        nu = _trees.full_like("rmsprop", params, initial_scale)
        return ScaleByRmsWithCountState(_trees.zero_count(params), nu) if bias_correction else ScaleByRmsState(nu)

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        del params
        count = safe_increment(state.count) if bias_correction else None
        correction = 1.0 if count is None else decay_correction(decay, count)

        def leaf(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            v = _average(decay, _square(g), v)
            return v, g / _root_divisor(v / cast(correction, v), eps, eps_in_sqrt)

        nu, updates = map_leaves("rmsprop", leaf, nu=state.nu, updates=updates)
        return updates, ScaleByRmsState(nu) if count is None else ScaleByRmsWithCountState(count, nu)

    return GradientTransformation(init, update)


def scale_by_stddev(
    decay: float | Tensor, eps: float | Tensor, initial_scale: float | Tensor, eps_in_sqrt: bool, bias_correction: bool
) -> GradientTransformation:
    """Divide by the running standard deviation of the gradients; the first half of `rmsprop(centered=True)`."""

    def init(params: Params) -> OptState:
        mu, nu = _trees.full_like("rmsprop", params), _trees.full_like("rmsprop", params, initial_scale)
        if bias_correction:
            return ScaleByRStdDevWithCountState(_trees.zero_count(params), mu, nu)
        return ScaleByRStdDevState(mu, nu)

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        del params
        count = safe_increment(state.count) if bias_correction else None
        correction = 1.0 if count is None else decay_correction(decay, count)

        def leaf(m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = _average(decay, g, m)
            v = _average(decay, _square(g), v)
            variance = v / cast(correction, v) - _square(m / cast(correction, m))
            return m, v, g / _root_divisor(variance, eps, eps_in_sqrt)

        mu, nu, updates = map_leaves("rmsprop", leaf, mu=state.mu, nu=state.nu, updates=updates)
        if count is None:
            return updates, ScaleByRStdDevState(mu, nu)
        return updates, ScaleByRStdDevWithCountState(count, mu, nu)

    return GradientTransformation(init, update)


class TraceState(NamedTuple):
    """State of `trace`."""

    trace: Params  # shapes of the params, dtype=accumulator_dtype


def trace(
    decay: float | Tensor, nesterov: bool = False, accumulator_dtype: torch.dtype | None = None
) -> GradientTransformation:
    r"""Momentum: a decaying sum of the updates (the new update is not damped by `1 - decay`).

    .. math::
        t_k = g_k + \mu t_{k-1}, \qquad u_k = t_k \quad\text{or, with Nesterov, } g_k + \mu t_k

    Args:
        decay: `mu`.
        nesterov: use Nesterov momentum.
        accumulator_dtype: dtype in which the sum is stored; None: that of the params.

    Returns:
        A `GradientTransformation` with `TraceState`.
    """

    def init(params: Params) -> TraceState:
        return TraceState(_trees.full_like("trace", params, dtype=accumulator_dtype))

    def update(updates: Updates, state: TraceState, params: Params | None = None) -> tuple[Updates, TraceState]:
        del params

        def leaf(t: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            t = g + cast(decay, t) * t
            return t, g + cast(decay, t) * t if nesterov else t

        total, updates = map_leaves("trace", leaf, trace=state.trace, updates=updates)
        return updates, TraceState(total)

    return GradientTransformation(init, update)


class ScaleByScheduleState(NamedTuple):
    """State of `scale_by_learning_rate` with a schedule."""

    count: Tensor  # shape=(), dtype=int32


def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule | None = None, *, flip_sign: bool = True
) -> GradientTransformation:
    """Multiply by the learning rate, and by -1: gradients point uphill.

    Args:
        learning_rate: number, 0-d tensor or schedule; None: return the updates as they are, the sign too.
        flip_sign: multiply by -1.

    Returns:
        A `GradientTransformation` with `EmptyState`, or `ScaleByScheduleState` for a schedule.
    """
    if learning_rate is None:
        return identity()
    sign = -1 if flip_sign else 1

    def scale(updates: Updates, step: float | Tensor) -> Updates:
        return map_leaves("scale_by_learning_rate", lambda g: (cast(sign * step, g) * g,), updates=updates)[0]

    if not callable(learning_rate):

        def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
            del params
            return scale(updates, learning_rate), state

        return GradientTransformation(init_empty_state, update)

    def scheduled_init(params: Params) -> ScaleByScheduleState:
        return ScaleByScheduleState(_trees.zero_count(params))

    def scheduled_update(
        updates: Updates, state: ScaleByScheduleState, params: Params | None = None
    ) -> tuple[Updates, ScaleByScheduleState]:
        del params
        return scale(updates, learning_rate(state.count)), ScaleByScheduleState(safe_increment(state.count))

    return GradientTransformation(scheduled_init, scheduled_update)


class WeightDecaySchedule(NamedTuple):
    """State of `add_decayed_weights` with a schedule."""

    count: Tensor  # shape=(), dtype=int32


class MaskedState(NamedTuple):
    """State of a transformation with a mask."""

    inner_state: OptState


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Params | Callable[[Params], Any] | None = None
) -> GradientTransformation:
    """Add the parameters, times `weight_decay`, to the updates: `g + weight_decay * p`.

    The gradient of `0.5 * weight_decay * sum(p**2)`. Before a preconditioner this is an l2 penalty, after it decoupled
    weight decay, which the learning rate multiplies too.

    Args:
        weight_decay: number, 0-d tensor or schedule.
        mask: which leaves decay: a tree of bools like the params, a prefix of such a tree, or a function from the
            params to one.

    Returns:
        A `GradientTransformation` that needs the params. Its state is `EmptyState`, or `WeightDecaySchedule` for a
        schedule, either inside of `MaskedState` if there is a mask.
    """

    def init(params: Params) -> OptState:
        own = WeightDecaySchedule(_trees.zero_count(params)) if callable(weight_decay) else EmptyState()
        if mask is None:
            return own
        _trees.expand_mask("add_decayed_weights", mask, params)  # a wrong mask is refused here, not at the first update
        return MaskedState(own)

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        if params is None:
            raise ValueError(NO_PARAMS_MSG.format("add_decayed_weights"))
        if not callable(weight_decay):
            off = isinstance(weight_decay, (int, float)) and weight_decay == 0
            return updates if off else _decay(updates, params, weight_decay, mask), state
        count = state.count if mask is None else state.inner_state.count
        own = WeightDecaySchedule(safe_increment(count))
        return _decay(updates, params, weight_decay(count), mask), own if mask is None else MaskedState(own)

    return GradientTransformation(init, update)


def _decay(updates: Updates, params: Params, strength: Any, mask: Any) -> Updates:
    trees = {"params": params, "updates": updates}
    if mask is not None:
        trees["mask"] = _trees.expand_mask("add_decayed_weights", mask, params)
    rows, rebuild = _trees.zip_leaves("add_decayed_weights", **trees)

    def leaf(p: Any, g: Any, decays: bool = True) -> Any:
        if not (decays and _trees.is_trained(g) and _trees.is_trained(p)):
            return g
        wide = _trees.upcast(p)
        return (_trees.upcast(g) + cast(strength, wide) * wide).to(g.dtype)

    return rebuild([leaf(*row) for row in rows])


def clip_by_global_norm(max_norm: float | Tensor) -> GradientTransformation:
    r"""Shrink the updates so that the norm of all of them together is at most `max_norm`.

    .. math::
        u = g \;\text{ if } \|g\|_2 < c, \qquad u = \frac{g}{\|g\|_2} c \;\text{ otherwise}

    Updates that are all zero stay zero whatever `max_norm`, and have a derivative.

    Args:
        max_norm: `c`, number or 0-d tensor.

    Returns:
        A `GradientTransformation` with `EmptyState`.
    """

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        del params
        squares = [_square(_trees.upcast(g)).sum() for g in _trees.trained_leaves(updates)]
        if not squares:
            return updates, state
        square = squares[0]
        for other in squares[1:]:
            square = square + other.to(square.device)
        zero = square == 0  # NOTE [double where] in ../_kinks.py
        root = torch.sqrt(torch.where(zero, torch.ones_like(square), square))
        inside = torch.where(zero, torch.zeros_like(root), root) < cast(max_norm, root)

        def leaf(g: Tensor) -> tuple[Tensor]:
            return (torch.where(inside.to(g.device), g, g / cast(root, g) * cast(max_norm, g)),)

        return map_leaves("clip_by_global_norm", leaf, updates=updates)[0], state

    return GradientTransformation(init_empty_state, update)

"""A third implementation: straight from the formulas, in float64, one number at a time where that is quick enough.

Nothing here is shared with the two wings, and nothing but NumPy is imported. Names are those of `funcreg.*.functional`;
`axis` and `group_scale` too. Where the wings have a closed form and another formula is at hand, that one is used.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

WIDE = np.longdouble  # 80 bits on x86, so that the last digits of float64 can be judged; float64 on some machines
ULP = np.finfo(np.float64).eps


def _float64(x: Any) -> ndarray:
    return np.asarray(x, np.float64)


def _signed(sign_of: float, magnitude: float) -> float:
    return magnitude if sign_of > 0 else -magnitude


def groups(shape: Sequence[int], axis: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """The indices of every group: `axis` runs inside a group, all other axes count groups."""
    inside = {a % len(shape) for a in axis}
    members: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for index in np.ndindex(*shape):
        members.setdefault(tuple(i for a, i in enumerate(index) if a not in inside), []).append(index)
    yield from members.values()


def omega(size: int, group_scale: str) -> float:
    return {"sqrt_size": size**0.5, "one": 1.0}[group_scale]


# --- l1: lam * sum |x_i|; the subgradient nearest 0; argmin_y lam |y| + (y - x)^2 / (2 t) ---


def l1(x: Any, lam: float) -> float:
    return lam * sum(abs(v) for v in _float64(x).flat)


def grad_l1(x: Any, lam: float) -> ndarray:
    g = np.zeros(np.shape(x))
    for i in np.ndindex(g.shape):
        g[i] = 0.0 if x[i] == 0 else _signed(x[i], lam)  # at 0 the subdifferential is [-lam, lam]
    return g


def prox_l1(x: Any, step_size: Any, lam: float) -> ndarray:
    x, t = np.broadcast_arrays(_float64(x), _float64(step_size))
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        if abs(x[i]) > t[i] * lam:  # else 0 is optimal: |x / t| <= lam
            y[i] = x[i] - _signed(x[i], t[i] * lam)
    return y


# --- l2: lam / 2 * sum x_i^2 ---


def l2(x: Any, lam: float) -> float:
    return lam * sum(v * v for v in _float64(x).flat) / 2


def grad_l2(x: Any, lam: float) -> ndarray:
    return _float64([lam * v for v in _float64(x).flat]).reshape(np.shape(x))


def prox_l2(x: Any, step_size: Any, lam: float) -> ndarray:
    x, t = np.broadcast_arrays(_float64(x), _float64(step_size))
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        y[i] = x[i] - x[i] * t[i] * lam / (1 + t[i] * lam)  # lam y + (y - x) / t = 0
    return y


# --- elastic net: l1 |x| + l2 / 2 x^2 ---


def elastic_net(x: Any, l1: float, l2: float) -> float:
    return sum(l1 * abs(v) + l2 / 2 * v * v for v in _float64(x).flat)


def grad_elastic_net(x: Any, l1: float, l2: float) -> ndarray:
    return grad_l1(x, l1) + grad_l2(x, l2)


def prox_elastic_net(x: Any, step_size: Any, l1: float, l2: float) -> ndarray:
    x, t = np.broadcast_arrays(_float64(x), _float64(step_size))
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        if abs(x[i]) > t[i] * l1:  # l1 sign(y) + l2 y + (y - x) / t = 0, the sign is that of x
            y[i] = _signed(x[i], (abs(x[i]) - t[i] * l1) / (1 + t[i] * l2))
    return y


# --- group lasso: lam * omega * sum_g |x_g|_2 ---


def group_lasso(x: Any, lam: float, axis: Sequence[int], group_scale: str) -> float:
    x = _float64(x)
    total = 0.0
    for group in groups(x.shape, axis):
        total += omega(len(group), group_scale) * sum(x[i] ** 2 for i in group) ** 0.5
    return lam * total


def grad_group_lasso(x: Any, lam: float, axis: Sequence[int], group_scale: str) -> ndarray:
    x = _float64(x)
    g = np.zeros(x.shape)
    for group in groups(x.shape, axis):
        length = sum(x[i] ** 2 for i in group) ** 0.5
        for i in group if length != 0 else ():  # at a zero group the subdifferential is a ball around 0
            g[i] = lam * omega(len(group), group_scale) * x[i] / length
    return g


def prox_group_lasso(x: Any, step_size: Any, lam: float, axis: Sequence[int], group_scale: str) -> ndarray:
    return prox_sum(x, step_size, group=lam, axis=axis, group_scale=group_scale)


# --- sparse group lasso: l1 + group lasso ---


def sparse_group_lasso(x: Any, l1: float, group: float, axis: Sequence[int], group_scale: str) -> float:
    return l1 * np.abs(_float64(x)).sum() + group_lasso(x, group, axis, group_scale)


def grad_sparse_group_lasso(x: Any, l1: float, group: float, axis: Sequence[int], group_scale: str) -> ndarray:
    return grad_l1(x, l1) + grad_group_lasso(x, group, axis, group_scale)


def prox_sparse_group_lasso(
    x: Any, step_size: Any, l1: float, group: float, axis: Sequence[int], group_scale: str
) -> ndarray:
    return prox_sum(x, step_size, l1=l1, group=group, axis=axis, group_scale=group_scale)


# --- the indicator of x >= 0 ---


def non_negative(x: Any) -> float:
    return float("inf") if any(v < 0 for v in _float64(x).flat) else 0.0


def prox_non_negative(x: Any, step_size: Any) -> ndarray:
    del step_size
    return _float64([v if v > 0 else 0.0 for v in _float64(x).flat]).reshape(np.shape(x))


# --- the penalties that `cases.py` defines by `custom` ---


def pull(x: Any, lam: float, at: float) -> float:
    """`lam / 2 * sum (x_i - at)^2`."""
    return lam / 2 * sum((v - at) ** 2 for v in _float64(x).flat)


def grad_pull(x: Any, lam: float, at: float) -> ndarray:
    return lam * (_float64(x) - at)


def prox_pull(x: Any, step_size: Any, lam: float, at: float) -> ndarray:
    return _float64(x) + (at - _float64(x)) * _float64(step_size) * lam / (1 + _float64(step_size) * lam)


def saturating(x: Any, lam: float) -> float:
    """`lam * sum x^2 / (1 + x^2)`, which is not convex."""
    return lam * sum(1 - 1 / (1 + v * v) for v in _float64(x).flat)


def grad_saturating(x: Any, lam: float) -> ndarray:
    return lam * _float64([2 * v / (1 + v * v) ** 2 for v in _float64(x).flat]).reshape(np.shape(x))


# --- sums ---


def prox_sum(
    x: Any,
    step_size: Any,
    l1: Any = 0.0,
    quadratic: Sequence[tuple[Any, Any]] = (),
    group: float = 0.0,
    axis: Sequence[int] = (),
    group_scale: str = "one",
) -> ndarray:
    r"""argmin_y sum_i l1_i |y_i| + sum_k mu_k/2 (y - a_k)^2 + group * omega |y_g| + sum_i (y_i - x_i)^2 / (2 t_i).

    From its stationarity: with the norm s = |y_g| of a group,

        y_i (1 + t_i sum mu + t_i group omega / s) = S(x_i + t_i sum_k mu_k a_k, t_i l1_i) =: c_i,

    so that s solves sum_i (c_i / (e_i s + theta_i))^2 = 1, e_i = 1 + t_i sum mu, theta_i = t_i group omega, which
    decreases in s: bisection. No root means y_g = 0.
    """
    x, t, l1 = (a.astype(WIDE) for a in np.broadcast_arrays(_float64(x), _float64(step_size), _float64(l1)))
    point, e = x.copy(), np.ones(x.shape, WIDE)
    for mu, anchor in quadratic:
        point = point + t * mu * anchor
        e = e + t * mu
    c = np.sign(point) * np.maximum(np.abs(point) - t * l1, 0)
    y = np.zeros(x.shape, WIDE)
    for members in groups(x.shape, axis):
        where = tuple(np.array(members, int).reshape(len(members), -1).T)
        theta = t[where] * WIDE(group) * WIDE(omega(len(members), group_scale))
        y[where] = shrink_groups(c[where][None], theta[None], e[where][None])[0]
    return y.astype(np.float64)


def shrink_groups(c: ndarray, theta: ndarray, e: Any = 1.0) -> ndarray:
    """`y_i = c_i s / (e_i s + theta_i)` with the root s above, for every row; in the widest floats there are."""
    c, theta, e = (a.astype(WIDE) for a in np.broadcast_arrays(np.asarray(c), np.asarray(theta), np.asarray(e)))
    # Rows are scaled to 1: squares stay in range.
    scale = np.maximum(np.abs(c).max(-1, keepdims=True, initial=0), WIDE(np.finfo(np.float64).tiny))
    c, theta = c / scale, theta / scale
    dead = inside(c, theta) <= 1
    low, high = np.zeros_like(scale), np.sqrt(c.shape[-1] * np.ones_like(scale))
    for _ in range(110):  # the interval shrinks to 1e-33 of max |c|
        middle = (low + high) / 2
        above = np.sum((c / (e * middle + theta)) ** 2, -1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(dead[..., None], 0, c * (low / (e * low + theta + (low == 0))) * scale)


def inside(c: ndarray, theta: ndarray) -> ndarray:
    """`sum (c_i / theta_i)^2` of every row: the group is zero where it is at most 1. A coordinate of 0 counts 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(c == 0, 0, np.asarray(c, WIDE) / np.asarray(theta, WIDE))
        return np.sum(ratio**2, -1)

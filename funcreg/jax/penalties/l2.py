"""L2 with the factor 1/2: its strength is the `weight_decay` of torch and optax."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ..._penalty import make
from ..._rule import Rule
from .._wing import Penalty, Strength, check_step


def value(x: Array, lam: ArrayLike) -> Array:
    r"""Half the squared Euclidean norm.

    .. math::
        \Omega(x) = \tfrac{\lambda}{2} \sum_i x_i^2

    Args:
        x: array of any shape.
        lam: strength, `lam >= 0`; an array shaped like `x` weighs the coordinates.

    Returns:
        Scalar, dtype of `x`.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.1.1.
    """
    return jnp.vdot(lam * x, x) / 2


def grad(x: Array, lam: ArrayLike) -> Array:
    r"""Gradient of `l2`.

    .. math::
        g_i = \lambda x_i

    Args:
        x: array of any shape.
        lam: strength, `lam >= 0`.

    Returns:
        Shape and dtype of `x`.
    """
    return x * lam


def prox(x: Array, step_size: ArrayLike, lam: ArrayLike) -> Array:
    r"""Proximal operator of `l2`: shrinkage.

    .. math::
        \mathrm{argmin}_y\; \tfrac{\lambda}{2} \sum_i y_i^2 + \sum_i \frac{(y_i - x_i)^2}{2 \tau_i}
        \;=\; \frac{x_i}{1 + \tau_i \lambda}

    Args:
        x: array of any shape.
        step_size: `\tau >= 0`, scalar or shaped like `x`.
        lam: strength, `lam >= 0`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: a step whose shape does not broadcast to that of `x`.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.1.1.
    """
    check_step(x, step_size)
    return x / (1 + step_size * lam)


RULE = Rule("l2", value, grad, prox, linear=True, separable=True, merges="quadratic")


def l2(lam: Strength) -> Penalty:
    r"""L2 penalty with the factor 1/2, ridge: `lam` is the `weight_decay` of torch and optax.

    .. math::
        R(w) = \tfrac{\lambda}{2} \sum_i w_i^2

    The tutorials' and keras' `lam * sum(w**2)` has no 1/2: that is `l2(2 * lam)`.

    Args:
        lam: strength, `lam >= 0`, a number or a 0-d array.

    Returns:
        The penalty.

    Raises:
        ValueError: a negative or infinite strength.
        TypeError: a strength that is neither number nor array.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.1.1.
    """
    return make(Penalty, RULE, lam)

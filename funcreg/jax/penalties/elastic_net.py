"""Elastic net: the sum of l1 and l2, and nothing of its own."""

from jax import Array
from jax.typing import ArrayLike

from ..._checks import check_strength
from .._wing import Penalty, Strength
from . import l1 as _l1
from . import l2 as _l2


def value(x: Array, l1: ArrayLike, l2: ArrayLike) -> Array:
    r"""Elastic net.

    .. math::
        \Omega(x) = \lambda_1 \sum_i |x_i| + \tfrac{\lambda_2}{2} \sum_i x_i^2

    Args:
        x: array of any shape.
        l1: strength of the absolute values, `l1 >= 0`.
        l2: strength of the halved squares, `l2 >= 0`.

    Returns:
        Scalar, dtype of `x`.
    """
    return _l1.value(x, l1) + _l2.value(x, l2)


def grad(x: Array, l1: ArrayLike, l2: ArrayLike) -> Array:
    r"""Minimal-norm subgradient of `elastic_net`.

    .. math::
        g_i = \lambda_1\, \mathrm{sign}(x_i) + \lambda_2 x_i

    Args:
        x: array of any shape.
        l1: strength of the absolute values, `l1 >= 0`.
        l2: strength of the halved squares, `l2 >= 0`.

    Returns:
        Shape and dtype of `x`.
    """
    return _l1.grad(x, l1) + _l2.grad(x, l2)


def prox(x: Array, step_size: ArrayLike, l1: ArrayLike, l2: ArrayLike) -> Array:
    r"""Proximal operator of `elastic_net`: soft-thresholding, then shrinkage.

    .. math::
        \mathrm{argmin}_y\; \lambda_1 \sum_i |y_i| + \tfrac{\lambda_2}{2} \sum_i y_i^2
        + \sum_i \frac{(y_i - x_i)^2}{2 \tau_i}
        \;=\; \frac{\mathrm{sign}(x_i) \max(|x_i| - \tau_i \lambda_1, 0)}{1 + \tau_i \lambda_2}

    Args:
        x: array of any shape.
        step_size: `\tau >= 0`, scalar or shaped like `x`.
        l1: strength of the absolute values, `l1 >= 0`.
        l2: strength of the halved squares, `l2 >= 0`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: a step whose shape does not broadcast to that of `x`.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.3.
    """
    return _l2.prox(_l1.prox(x, step_size, l1), step_size, l2)


def elastic_net(l1: Strength, l2: Strength) -> Penalty:
    r"""Elastic net, in this library nothing but `l1(l1) + l2(l2)`.

    .. math::
        R(w) = \lambda_1 \sum_i |w_i| + \tfrac{\lambda_2}{2} \sum_i w_i^2

    scikit-learn's `alpha, l1_ratio` is `elastic_net(alpha * l1_ratio, alpha * (1 - l1_ratio))`.

    Args:
        l1: strength of the absolute values, `l1 >= 0`, a number or a 0-d array.
        l2: strength of the halved squares, `l2 >= 0`, a number or a 0-d array.

    Returns:
        The penalty.

    Raises:
        ValueError: a negative or infinite strength.
        TypeError: a strength that is neither number nor array.

    Reference:
        Zou and Hastie, "Regularization and variable selection via the elastic net", 2005.
    """
    check_strength(Penalty.wing, "elastic_net", "l1", l1)
    check_strength(Penalty.wing, "elastic_net", "l2", l2)
    return _l1.l1(l1) + _l2.l2(l2)

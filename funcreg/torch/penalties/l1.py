"""L1: real zeros, coordinate by coordinate."""

import torch
from torch import Tensor

from ..._penalty import make
from ..._rule import Rule
from .._kinks import absolute, sign
from .._wing import Penalty, Strength, check_step


def value(x: Tensor, lam: float) -> Tensor:
    r"""L1 norm.

    .. math::
        \Omega(x) = \lambda \sum_i |x_i|

    Args:
        x: array of any shape.
        lam: strength, `lam >= 0`; an array shaped like `x` weighs the coordinates.

    Returns:
        Scalar, dtype of `x`.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.2.
    """
    return torch.sum(lam * absolute(x))


def grad(x: Tensor, lam: float) -> Tensor:
    r"""Minimal-norm subgradient of `l1`.

    .. math::
        g_i = \lambda\, \mathrm{sign}(x_i), \qquad \mathrm{sign}(0) = 0

    Args:
        x: array of any shape.
        lam: strength, `lam >= 0`.

    Returns:
        Shape and dtype of `x`.
    """
    return lam * sign(x)


def prox(x: Tensor, step_size: Tensor, lam: float) -> Tensor:
    r"""Proximal operator of `l1`: soft-thresholding.

    .. math::
        \mathrm{argmin}_y\; \lambda \sum_i |y_i| + \sum_i \frac{(y_i - x_i)^2}{2 \tau_i}
        \;=\; \mathrm{sign}(x_i) \max(|x_i| - \tau_i \lambda, 0)

    The result is exactly zero where `|x| <= step_size * lam`, and exactly `x` where `step_size * lam` is 0.

    Args:
        x: array of any shape.
        step_size: `\tau >= 0`, scalar or shaped like `x`.
        lam: strength, `lam >= 0`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: a step whose shape does not broadcast to that of `x`.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.5.2.
    """
    check_step(x, step_size)
    threshold = step_size * lam
    # not x - clamp(x, -threshold, threshold): at a threshold of 0 its derivative in the threshold is 0
    return torch.relu(x - threshold) - torch.relu(-threshold - x)


RULE = Rule("l1", value, grad, prox, linear=True, separable=True, merges="soft")


def l1(lam: Strength) -> Penalty:
    r"""L1 penalty, the lasso: exact zeros when its prox is used, and small weights that never reach zero when it is
    not.

    .. math::
        R(w) = \lambda \sum_i |w_i|

    The sum runs over all selected leaves. The derivative at 0 is 0.

    Args:
        lam: strength, `lam >= 0`, a number or a 0-d array.

    Returns:
        The penalty.

    Raises:
        ValueError: a negative or infinite strength.
        TypeError: a strength that is neither number nor array.

    Reference:
        Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996; prox: Parikh and Boyd, "Proximal
        Algorithms", 2014, section 6.5.2.
    """
    return make(Penalty, RULE, lam)

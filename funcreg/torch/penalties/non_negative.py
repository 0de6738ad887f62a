"""Non-negativity: a constraint, so a prox and no gradient."""

import torch
from torch import Tensor

from ..._penalty import make
from ..._rule import Rule
from .._wing import Penalty


def value(x: Tensor) -> Tensor:
    r"""Indicator of the non-negative orthant.

    .. math::
        \Omega(x) = 0 \text{ if all } x_i \ge 0 \text{, else } \infty

    Args:
        x: array of any shape.

    Returns:
        Scalar, dtype of `x`; NaN where `x` has a NaN and no negative entry.
    """
    inside = torch.where(torch.isnan(x).any(), x.new_full([], float("nan")), x.new_full([], 0.0))
    return torch.where((x < 0).any(), x.new_full([], float("inf")), inside)


def prox(x: Tensor, step_size: Tensor) -> Tensor:
    r"""Proximal operator of `non_negative`: the projection, whatever the step.

    .. math::
        \mathrm{argmin}_{y \ge 0} \sum_i \frac{(y_i - x_i)^2}{2 \tau_i} \;=\; \max(x_i, 0)

    Args:
        x: array of any shape.
        step_size: `\tau > 0`; not used.

    Returns:
        Shape and dtype of `x`.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.2.4.
    """
    del step_size
    return torch.relu(x)


RULE = Rule("non_negative", value, None, prox, strengths=())


def non_negative() -> Penalty:
    """Constraint: every selected weight stays at or above zero.

    It has no gradient: `penalize` and `add_penalty_gradient` refuse it, `prox_sgd` and `prox_adam` apply it.

    Returns:
        The penalty.

    Reference:
        Parikh and Boyd, "Proximal Algorithms", 2014, section 6.2.4.
    """
    return make(Penalty, RULE)

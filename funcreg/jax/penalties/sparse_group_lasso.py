"""Sparse group lasso: the sum of l1 and group_lasso, and nothing of its own."""

from ..._checks import check_strength
from ..._group_axes import Axes, check_groups
from .._wing import Penalty, Strength
from .group_lasso import group_lasso
from .l1 import l1 as _l1


def sparse_group_lasso(
    l1: Strength, group: Strength, axis: Axes = None, per: str | None = None, group_scale: str = "sqrt_size"
) -> Penalty:
    r"""Sparse group lasso, in this library nothing but `l1(l1) + group_lasso(group, ...)`: zero groups, and zeros
    inside the others.

    .. math::
        R(w) = \lambda_1 \sum_i |w_i| + \lambda_2 \sum_g \omega_g \|w_g\|_2

    Its prox is a soft-threshold followed by the prox of the group lasso, exact in a diagonal metric as well.

    Args:
        l1: strength of the absolute values, `l1 >= 0`, a number or a 0-d array.
        group: strength of the group norms, `group >= 0`, a number or a 0-d array.
        axis: the axes inside one group, as in `group_lasso`.
        per: `"output"` or `"input"`, as in `group_lasso`.
        group_scale: `"sqrt_size"` or `"one"`, as in `group_lasso`.

    Returns:
        The penalty.

    Raises:
        ValueError: a negative or infinite strength, an unknown option, an axis counted from the front.
        TypeError: both of `axis` and `per`, or neither.

    Reference:
        Friedman, Hastie and Tibshirani, "A note on the group lasso and a sparse group lasso", 2010, arXiv:1001.0736.
    """
    check_strength(Penalty.wing, "sparse_group_lasso", "l1", l1)
    check_strength(Penalty.wing, "sparse_group_lasso", "group", group)
    check_groups("sparse_group_lasso", axis, per, group_scale)
    return _l1(l1) + group_lasso(group, axis, per, group_scale)

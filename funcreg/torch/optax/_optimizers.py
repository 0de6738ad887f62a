"""Optimizers: chains of the transformations, named."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._base import GradientTransformation, Params, ScalarOrSchedule, chain, identity
from ._transforms import (
    add_decayed_weights,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_stddev,
    trace,
)


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: float | Tensor | None = None,
    nesterov: bool = False,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Gradient descent, with momentum or without.

    Equals `torch.optim.SGD` (dampening 0) at a constant learning rate.

    Args:
        learning_rate: number, 0-d tensor or schedule.
        momentum: decay of `trace`; None: no momentum and no state.
        nesterov: use Nesterov momentum.
        accumulator_dtype: dtype in which the momentum is stored; None: that of the params.

    Returns:
        `chain(trace(momentum, nesterov), scale_by_learning_rate(learning_rate))`; without momentum `identity()` first.
    """
    first = identity() if momentum is None else trace(momentum, nesterov, accumulator_dtype)
    return chain(first, scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: ScalarOrSchedule,
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    eps_root: float | Tensor = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam; `eps` is added outside of the root, as in `torch.optim.Adam`.

    Args:
        learning_rate: number, 0-d tensor or schedule.
        b1: decay of the average of the gradients.
        b2: decay of the average of their squares.
        eps: added to the root.
        eps_root: added under the root.
        mu_dtype: dtype in which the average of the gradients is stored; None: that of the params.
        nesterov: use Nesterov momentum (not the NAdam of PyTorch, which changes the momentum over time).

    Returns:
        `chain(scale_by_adam(...), scale_by_learning_rate(learning_rate))`.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov), scale_by_learning_rate(learning_rate)
    )


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    eps_root: float | Tensor = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Params | Callable[[Params], Any] | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam with decoupled weight decay: `p - learning_rate * (adam(g) + weight_decay * p)`.

    The default of `weight_decay` is that of optax; it is 0.01 in `torch.optim.AdamW`.

    Args:
        learning_rate: number, 0-d tensor or schedule; it multiplies the decay too.
        b1: decay of the average of the gradients.
        b2: decay of the average of their squares.
        eps: added to the root.
        eps_root: added under the root.
        mu_dtype: dtype in which the average of the gradients is stored; None: that of the params.
        weight_decay: number, 0-d tensor or schedule.
        mask: which leaves decay, see `add_decayed_weights`.
        nesterov: use Nesterov momentum.

    Returns:
        `chain(scale_by_adam(...), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))`.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: float | Tensor = 0.9,
    eps: float | Tensor = 1e-8,
    initial_scale: float | Tensor = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | Tensor | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> GradientTransformation:
    r"""RMSprop: gradients divided by the root of the average of their squares.

    .. math::
        v_t = \rho v_{t-1} + (1 - \rho) |g_t|^2, \qquad u_t = -\eta\, g_t / \sqrt{v_t + \varepsilon}

    With `eps_in_sqrt=False` the divisor is :math:`\sqrt{v_t} + \varepsilon`; with that and `decay=0.99` this is
    `torch.optim.RMSprop`. The momentum sums up updates that the learning rate has multiplied already; PyTorch's sums
    them up before, which is another algorithm if the learning rate changes.

    Args:
        learning_rate: number, 0-d tensor or schedule.
        decay: `rho`.
        eps: added under the root or to it.
        initial_scale: `v_0`.
        eps_in_sqrt: add `eps` under the root.
        centered: subtract the square of the average gradient from `v`.
        momentum: decay of a `trace` after the learning rate; None: no momentum.
        nesterov: use Nesterov momentum.
        bias_correction: divide the averages by `1 - decay**t`.

    Returns:
        A `GradientTransformation`, a chain of three.
    """
    scale = (scale_by_stddev if centered else scale_by_rms)(decay, eps, initial_scale, eps_in_sqrt, bias_correction)
    last = identity() if momentum is None else trace(momentum, nesterov)
    return chain(scale, scale_by_learning_rate(learning_rate), last)

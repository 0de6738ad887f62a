"""Schedules: functions from the number of updates made so far to the value of a hyper-parameter.

A count may be a Python int or an integer tensor on any device. Everything is computed there in float64: in float32 the
last steps of a long schedule are wrong. Nothing branches on a value, so that every argument may be a tensor.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._base import Schedule
from ._trees import wide


def _wide(count: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """The count and the arguments of a schedule as float64 tensors on the device of the count."""
    device = count.device if isinstance(count, Tensor) else torch.device("cpu")
    return tuple(wide(value, device) for value in (count, *arguments))


def constant_schedule(value: float | Tensor) -> Schedule:
    """The same value at every count.

    Args:
        value: the value.

    Returns:
        A function of the count; `value` itself.
    """

    def schedule(count: Any) -> Any:
        del count
        return value

    return schedule


def linear_schedule(
    init_value: float | Tensor, end_value: float | Tensor, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    r"""From one value to another along a straight line.

    .. math::
        (I - E) \left(1 - \frac{\min(\max(t - B, 0), T)}{T}\right) + E

    Args:
        init_value: `I`, held until `transition_begin`.
        end_value: `E`, held from `transition_begin + transition_steps` on.
        transition_steps: `T`; with `T <= 0` the value stays at `init_value`.
        transition_begin: `B`; less than 0 is taken as 0.

    Returns:
        A function of the count; 0-d tensor, float64.
    """

    def schedule(count: Any) -> Tensor:
        t, init, end, steps, begin = _wide(count, init_value, end_value, transition_steps, transition_begin)
        frozen = steps <= 0
        steps = torch.where(frozen, torch.ones_like(steps), steps)
        elapsed = torch.minimum(torch.clamp(t - torch.clamp(begin, min=0), min=0), steps)
        return torch.where(frozen, init, (init - end) * (1 - elapsed / steps) + end)

    return schedule


def cosine_decay_schedule(
    init_value: float | Tensor, decay_steps: int, alpha: float | Tensor = 0.0, exponent: float | Tensor = 1.0
) -> Schedule:
    r"""Down along half a period of the cosine.

    .. math::
        I \left[(1 - \alpha) \left(\tfrac12 + \tfrac12 \cos \frac{\pi \min(t, T)}{T}\right)^p + \alpha\right]

    Args:
        init_value: `I`.
        decay_steps: `T > 0`, the count from which on the value is `alpha * init_value`.
        alpha: the last value as a fraction of the first.
        exponent: `p`.

    Returns:
        A function of the count; 0-d tensor, float64.

    Raises:
        ValueError: `decay_steps` is a number that is not greater than 0.
    """
    if not isinstance(decay_steps, Tensor) and not decay_steps > 0:
        raise ValueError(f"cosine_decay_schedule: decay_steps must be > 0, got {decay_steps}")

    def schedule(count: Any) -> Tensor:
        t, init, steps, last, power = _wide(count, init_value, decay_steps, alpha, exponent)
        cosine = 0.5 * (1 + torch.cos(math.pi * torch.minimum(t, steps) / steps))
        return init * ((1 - last) * cosine**power + last)

    return schedule


def warmup_cosine_decay_schedule(
    init_value: float | Tensor,
    peak_value: float | Tensor,
    warmup_steps: int,
    decay_steps: int,
    end_value: float | Tensor = 0.0,
    exponent: float | Tensor = 1.0,
) -> Schedule:
    """Up along a straight line, then down along half a period of the cosine.

    Args:
        init_value: the value at count 0.
        peak_value: the value at count `warmup_steps`.
        warmup_steps: the number of steps of the line.
        decay_steps: the number of steps of both parts together, greater than `warmup_steps`.
        end_value: the value from count `decay_steps` on.
        exponent: of the cosine, see `cosine_decay_schedule`.

    Returns:
        A function of the count; 0-d tensor, float64.

    Raises:
        ValueError: `decay_steps` and `warmup_steps` are numbers, and the first is not the greater one.
    """
    cosine_steps = decay_steps - warmup_steps
    if not isinstance(cosine_steps, Tensor) and not cosine_steps > 0:
        raise ValueError(
            f"warmup_cosine_decay_schedule: decay_steps must be > warmup_steps = {warmup_steps}, got {decay_steps}"
        )
    line = linear_schedule(init_value, peak_value, warmup_steps)

    def schedule(count: Any) -> Tensor:
        t, peak, end, warmup = _wide(count, peak_value, end_value, warmup_steps)
        alpha = end / torch.where(peak == 0, torch.ones_like(peak), peak)  # a peak of 0 stays at 0, whatever the end
        decay = cosine_decay_schedule(peak_value, cosine_steps, alpha, exponent)
        return torch.where(t < warmup, line(count), decay(t - warmup))

    return schedule


def exponential_decay(
    init_value: float | Tensor,
    transition_steps: int,
    decay_rate: float | Tensor,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | Tensor | None = None,
) -> Schedule:
    r"""By a constant factor every `transition_steps`.

    .. math::
        I r^{(t - B) / T} \quad\text{for } t > B,\qquad I \quad\text{before}

    Args:
        init_value: `I`.
        transition_steps: `T`; with `T <= 0` the value stays at `init_value`.
        decay_rate: `r`; with `r == 0` the value stays at `init_value`.
        transition_begin: `B`; less than 0 is taken as 0.
        staircase: round the exponent down to whole numbers.
        end_value: bound of the value: a lower one if `decay_rate < 1`, an upper one otherwise.

    Returns:
        A function of the count; 0-d tensor, float64.
    """

    def schedule(count: Any) -> Tensor:
        t, init, steps, rate, begin = _wide(count, init_value, transition_steps, decay_rate, transition_begin)
        frozen = (steps <= 0) | (rate == 0)
        steps = torch.where(frozen, torch.ones_like(steps), steps)
        elapsed = t - torch.clamp(begin, min=0)
        exponent = torch.floor(elapsed / steps) if staircase else elapsed / steps
        value = torch.where(elapsed <= 0, init, init * rate**exponent)
        if end_value is not None:
            end = wide(end_value, t.device)
            value = torch.where(rate < 1, torch.maximum(value, end), torch.minimum(value, end))
        return torch.where(frozen, init, value)

    return schedule

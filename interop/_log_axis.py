"""Errors on a logarithmic axis: whole decades, zeros beneath them, infinities above."""

from __future__ import annotations

import math
from collections.abc import Iterable

DIGITS = {"float64": 2.0**-52, "float32": 2.0**-23}  # spacing at 1: below it there is nothing but rounding


class LogAxis:
    """Where numbers lie between 0 and 1.

    Decades fill the range from `low` to `high`; 0, which no logarithm reaches, lies at the lower end, a gap beneath
    them; infinity at the upper end.

    Args:
        values: that it has to hold; NaN and negative ones are passed over.
        ticks: about how many labels are wanted.
        gap: the part of the axis between the decades and the zeros, or the infinities.
    """

    def __init__(self, values: Iterable[float], ticks: int = 8, gap: float = 0.08) -> None:
        found = [x for x in values if x >= 0]
        finite = [x for x in found if 0 < x < math.inf] or [DIGITS["float64"]]
        first, last = math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite)))
        self.low, self.high = first, max(last, first + 1)
        self.bottom = gap if 0.0 in found else 0.0
        self.top = 1.0 - gap if math.inf in found else 1.0
        every = max(1, math.ceil((self.high - self.low) / ticks))
        self.decades = range(self.low, self.high + 1, every)

    def at(self, x: float) -> float:
        """The place of a number >= 0."""
        if x == 0 or x == math.inf:
            return 0.0 if x == 0 else 1.0
        part = (math.log10(x) - self.low) / (self.high - self.low)
        return self.bottom + (self.top - self.bottom) * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels."""
        ends = ([(0.0, "0")] if self.bottom else []) + ([(1.0, "\u221e")] if self.top < 1 else [])
        return [*ends, *((self.at(10.0**k), f"1e{k}") for k in self.decades)]

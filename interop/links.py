"""Which arrays of one side hold the numbers of which arrays of the other, and how they are laid out.

A map moves entries and nothing else: it works on parameters, on their moments and on masks alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray[Any, Any], ...]


@dataclass(frozen=True, eq=False)
class Link:
    """Some arrays of the PyTorch side and those of the JAX side that hold the same numbers.

    Attributes:
        torch: their names there: relative to the layer in a rule, as in `state_dict()` in a pair.
        jax: their names here: path components joined by dots.
        to_jax: from the arrays of `torch`, in order, to those of `jax`; NumPy views where that is possible.
        to_torch: the way back, its exact inverse unless `sums` says otherwise.
        sums: which arrays are added up ("bias = bias_ih + bias_hh"), or nothing. Only values cross such a link:
            two parameters that are added up have each a gradient and moments of their own.
    """

    torch: tuple[str, ...]
    jax: tuple[str, ...]
    to_jax: Callable[..., Arrays]
    to_torch: Callable[..., Arrays]
    sums: str = ""

    def under(self, torch: str, jax: str) -> "Link":
        """The same link with the names of its layers in front."""
        return replace(
            self,
            torch=tuple(f"{torch}.{name}" if torch else name for name in self.torch),
            jax=tuple(f"{jax}.{name}" if jax else name for name in self.jax),
        )

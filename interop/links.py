"""Which arrays of one side hold the numbers of which arrays of the other, and how they are laid out.

A map moves entries and nothing else: it works on parameters, on their moments and on masks alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
        note: what was assumed where the shapes leave a choice, for the reader of the table; mostly nothing.
    """

    torch: tuple[str, ...]
    jax: tuple[str, ...]
    to_jax: Callable[..., Arrays]
    to_torch: Callable[..., Arrays]
    sums: str = ""
    note: str = ""

    def under(self, torch: str, jax: str) -> "Link":
        """The same link with the names of its layers in front."""
        return replace(
            self,
            torch=tuple(f"{torch}.{name}" if torch else name for name in self.torch),
            jax=tuple(f"{jax}.{name}" if jax else name for name in self.jax),
        )


class Move(NamedTuple):
    """From the arrays of one side to those of the other, and back."""

    to_jax: Callable[..., Arrays]
    to_torch: Callable[..., Arrays]


AS_IS = Move(lambda x: (x,), lambda x: (x,))


def axes(*order: int) -> Move:
    """Axes permuted as in `numpy.transpose`: axis i of the JAX array is axis order[i] of PyTorch's."""
    back = tuple(int(i) for i in np.argsort(order))
    return Move(lambda x: (x.transpose(order),), lambda x: (x.transpose(back),))


def link(torch: str, jax: str, move: Move = AS_IS) -> Link:
    """The link of one array to one array: `link("weight", "kernel", axes(1, 0))` is that of a linear layer."""
    return Link((torch,), (jax,), move.to_jax, move.to_torch)

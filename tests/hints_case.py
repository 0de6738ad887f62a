"""A case of the corpora of hints, and the numbers that they share."""

from typing import Any, NamedTuple

import jax
import numpy as np

from funcreg import interop
from interop import Report
from parity_corpus import normal


class Case(NamedTuple):
    """Two functions and their inputs, or two training steps with params, hyper and batches.

    `kind`: of the hint that is right, of two where sizes do not tell them apart; "" where none is.
    """

    kind: str
    name: str
    torch: Any
    jax: Any
    inputs: tuple[Any, ...]
    training: bool = False

    def __str__(self) -> str:
        return f"{self.kind or 'none'}: {self.name}"

    @property
    def kinds(self) -> set[str]:
        return set(self.kind.split(" and ")) if self.kind else set()

    def check(self) -> Report:
        if self.training:  # three steps are done before they would be compiled
            return interop.check_training(self.torch, self.jax, *self.inputs)
        return interop.check(self.torch, jax.jit(self.jax), *self.inputs)


X = normal(8, 6)
Y = X[::-1].copy()
W = normal(6, 6, seed=1)
LABELS = np.arange(8) % 5

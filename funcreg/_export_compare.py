"""Outputs of an exported file against recorded ones. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TOLERANCE = 32  # where bits may differ: in eps of an output's largest number, or in what an ulp in the inputs does


@dataclass
class Difference:
    """What a comparison of many outputs found.

    Attributes:
        compared: how many outputs.
        different: how many whose bits are not the same.
        outside: how many that differ by more than rounding: `TOLERANCE` times eps of their largest number, or times
            their noise. Without the latter, a result that is nothing but rounding errors, as a gradient that cancels,
            would never be right.
        worst_abs, worst_ulp: the largest difference, and the same counted in representable numbers.
        first: the first output of those counted by `outside`, or if there is none, by `different`, in words.
    """

    compared: int = 0
    different: int = 0
    outside: int = 0
    worst_abs: float = 0.0
    worst_ulp: int = 0
    first: str = ""

    def add(
        self,
        where: str,
        got: Mapping[str, np.ndarray],
        expected: Mapping[str, np.ndarray],
        noise: Mapping[str, float],
    ) -> None:
        """Take in the outputs of one call; `noise` is how far some move when the inputs move by an ulp."""
        for name, x in expected.items():
            self.compared += 1
            if name not in got:
                self._found(f"{where} {name}: is missing", True)
            elif got[name].dtype != x.dtype or got[name].shape != x.shape:
                text = f"{got[name].dtype}{list(got[name].shape)} instead of {x.dtype}{list(x.shape)}"
                self._found(f"{where} {name}: {text}", True)
            elif got[name].tobytes() != x.tobytes():
                self._compare(f"{where} {name}", got[name], x, noise.get(name, 0.0))

    def _compare(self, where: str, got: np.ndarray, x: np.ndarray, noise: float) -> None:
        if not is_float(x.dtype):
            self._found(f"{where}: {int((got != x).sum())} of {x.size} numbers differ", True)
            return
        # NaN is NaN whatever its payload
        wrong = (_integers(got) != _integers(x)) & ~(np.isnan(got) & np.isnan(x))
        if not wrong.any():
            return
        with np.errstate(invalid="ignore"):
            apart = np.abs(got.astype(np.float64) - x.astype(np.float64))[wrong]
        worst = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
        ulp = int(np.abs(_ordered(got)[wrong] - _ordered(x)[wrong]).max())
        finite = np.abs(x[np.isfinite(x)].astype(np.float64))
        allowed = TOLERANCE * max(eps(x.dtype) * float(finite.max(initial=0.0)), noise)
        self.worst_abs, self.worst_ulp = max(self.worst_abs, worst), max(self.worst_ulp, ulp)
        text = f"{where}: {int(wrong.sum())} of {x.size} numbers differ, by {worst:.3g} or {ulp} ulp at most"
        self._found(text, not worst <= allowed)

    def _found(self, text: str, outside: bool) -> None:
        if not self.first or (outside and not self.outside):
            self.first = text
        self.different += 1
        self.outside += outside


def is_float(dtype: np.dtype) -> bool:
    """Also bfloat16, which NumPy itself does not know."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def eps(dtype: np.dtype) -> float:
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def _integers(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.int16, 4: np.int32, 8: np.int64}[x.dtype.itemsize])


def _ordered(x: np.ndarray) -> np.ndarray:
    """Integers in the order of the numbers, through 0; as float64, since the largest distances do not fit otherwise."""
    bits = _integers(x).astype(np.float64)
    return np.where(bits < 0, -(2.0 ** (8 * x.dtype.itemsize - 1)) - bits, bits)

"""The leaves of the results: what each side shows of its own, and how far both are apart."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ._coarse import Seen
from ._leaves import Leaves, same_names
from ._measure import Comparison, Differences, Errors, compare, is_whole, movement, same_bits
from ._orders import Table, table
from .verdict import FLOOR

# Two calls with the same inputs that differ by more than this, relative to the leaf, are not one function: what is
# summed in another order each time (atomics of a GPU) stays far below, noise of dropout far above.
RANDOM = 1e-9


@dataclass
class Results:
    """What one side returned, and what is known of it by itself.

    Attributes:
        side: its name.
        float64, float32: the results; None where the run failed, or once they have been compared.
        dtypes: of the float64 results.
        noise: by leaf and order of magnitude, the most that the float64 results move when the inputs move by an ulp.
        drift: the same, how far float32 is from float64 where both are finite.
        still: whether there was nothing in the inputs to move.
        unstable: leaves whose finite entries do not stay the same then.
        coarse: what it computes in a lower precision also in float64.
        random: leaves that two calls with the same inputs do not agree on.
    """

    side: str
    float64: Leaves | None = None
    float32: Leaves | None = None
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    noise: dict[str, Table] = field(default_factory=dict)
    drift: dict[str, Table] = field(default_factory=dict)
    still: bool = False
    unstable: set[str] = field(default_factory=set)
    random: set[str] = field(default_factory=set)
    coarse: Seen = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.float64 is not None:
            self.keep(self.float64)
        self.drifted()

    def keep(self, leaves: Leaves) -> None:
        """Take in the float64 results, with which the others are compared."""
        self.float64 = leaves
        self.dtypes = {name: x.dtype for name, x in leaves.items()}

    def moved(self, leaves: Leaves) -> None:
        """Take in the float64 results of inputs that were moved by an ulp."""
        for name, x in (self.float64 or {}).items():
            if movement(x, leaves[name], self.noise.setdefault(name, table())):
                self.unstable.add(name)

    def repeated(self, leaves: Leaves) -> None:
        """Take in the float64 results of a second call with the same inputs."""
        for name, x in (self.float64 or {}).items():
            if name not in leaves or leaves[name].shape != x.shape:
                self.random.add(name)
            elif not same_bits(x, leaves[name]):
                apart = movement(x, leaves[name], self.noise.setdefault(name, table()))
                if apart or compare(x, leaves[name]).errors.relative > RANDOM:
                    self.random.add(name)

    def drifted(self) -> None:
        """Compare the float32 results with the float64 ones."""
        for name, x in (self.float64 or {}).items():
            if self.float32 is not None and name in self.float32 and self.float32[name].shape == x.shape:
                self.drift[name] = table()
                movement(x, self.float32[name], self.drift[name])


class Found(NamedTuple):
    """One leaf of both sides, in one precision.

    Attributes:
        shape, dtypes: the latter PyTorch's and JAX's.
        errors, size: as in `Comparison`.
        compared, alike: how many entries there are of each.
        apart: about those that are not finite on both sides in the same way; empty where there is none.
        whole: whether both sides hold whole numbers only.
        exact: whether these are integers or bools on one side at least.
        orders: of the entries, flat; None where no part of the leaf is to be judged.
        differences: by order; None as well.
    """

    shape: tuple[int, ...]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    errors: Errors
    size: float
    compared: int
    alike: int
    apart: str
    whole: bool
    exact: bool
    orders: np.ndarray | None
    differences: Differences | None


def found_in(
    where: str, ours: Leaves | None, theirs: Leaves | None, in64: dict[str, Found] | None = None
) -> dict[str, Found]:
    """Every leaf of both sides, in the order of JAX's; none without a run of both. `ours` is empty afterwards.

    In float32 the entries are told by the orders that they were found to have in float64.
    """
    if ours is None or theirs is None:
        return {}
    same_names(where, ours, theirs)
    return {name: found_of(ours.pop(name), x, (in64 or {}).get(name)) for name, x in theirs.items()}


def found_of(a: np.ndarray, b: np.ndarray, in64: Found | None = None) -> Found:
    """One leaf of both sides."""
    whole = is_whole(a) and is_whole(b)
    exact = whole and (a.dtype.kind in "biu" or b.dtype.kind in "biu")
    known = in64.orders if in64 is not None and in64.shape == a.shape else None
    both = compare(a, b, by_order=not exact and (in64 is None or known is not None), known=known)
    apart = _apart(both, a, b) if both.apart.any() else ""
    counts = int(both.compared.sum()), int(both.alike.sum())
    orders, found = both.orders, both.differences
    if found is not None and (found.largest[1:] <= FLOOR * found.sizes[1:]).all():  # as most often: no part differs
        orders = found = None
    return Found(a.shape, (a.dtype, b.dtype), both.errors, both.size, *counts, apart, whole, exact, orders, found)


def _apart(found: Comparison, ours: np.ndarray, theirs: np.ndarray) -> str:
    where = found.apart
    counts = " and ".join(
        f"{side} has {np.isnan(wide).sum()} NaN, {np.isinf(wide).sum()} infinite"
        for side, x in (("PyTorch", ours), ("JAX", theirs))
        for wide in [x[where].astype(np.complex128)]
    )
    return f"{where.sum()} of {where.size} entries are not finite on both sides in the same way: there {counts}"

"""The entries of an array by their order of magnitude: of each order, the largest of what is measured at them.

An array may hold numbers of many orders at once, and what is small beside its largest entry need not be small beside
the entry where it is. What is measured at an entry is therefore kept by the order of that entry, of which float64 has
1024 here: a table of 8 KB, however large the array.
"""

import numpy as np

ORDERS = 1024  # an order is a factor of 4
_SHIFT = np.uint64(53)  # a float64 is a sign, 11 bits of exponent and 52 of fraction: of the exponent all but one bit

Table = np.ndarray  # of `ORDERS` floats


def table() -> Table:
    return np.zeros(ORDERS)


def orders(sizes: np.ndarray) -> np.ndarray:
    """The order of each absolute value; 0 is that of zero and of numbers that a processor may take for zero."""
    return (sizes.view(np.uint64) >> _SHIFT).astype(np.intp)


def enter(into: Table, order: np.ndarray, values: np.ndarray) -> None:
    """Raises the entries of a table to these values."""
    np.maximum.at(into, order, values)


def around(of: Table) -> Table:
    """The largest values at entries of one order more or less, and at smaller ones that they reach up from.

    What moves a number by more than itself could have moved it to any order up to that of the movement: that the number
    is small is then an accident.
    """
    pooled = of.copy()
    reached = np.minimum(orders(of) + 1, ORDERS - 1)
    for order in np.flatnonzero(of):
        first, last = max(order - 1, 0), max(order + 1, reached[order])
        np.maximum(pooled[first : last + 1], of[order], out=pooled[first : last + 1])
    return pooled

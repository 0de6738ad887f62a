"""Inputs moved by an ulp or two of float64, by which a program shows its own rounding errors."""

import numpy as np

from ._measure import BLOCK

_MIX = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's
_STEP = 0x9E3779B97F4A7C15  # of the seeds, as splitmix64 has it
DRAWS = 2  # of every comparison


def nudge(x: np.ndarray, draw: int) -> np.ndarray:
    """Every number moved towards zero by one ulp or two, as its own bits decide.

    Zeros stay zeros, equal numbers stay equal and opposite ones opposite, in all arrays alike: ties and exact
    cancellation, where a derivative may jump, are not broken. Towards zero, so that a probability of 1 stays inside its
    domain. Infinities and NaN stay, and so does what is no float64 or complex128.

    Args:
        x: any array.
        draw: which of many independent decisions; those below `DRAWS` are made in every comparison.
    """
    if x.dtype == np.complex128:
        return nudge(np.ascontiguousarray(x).reshape(-1).view(np.float64), draw).view(x.dtype).reshape(x.shape)
    if x.dtype != np.float64:
        return x
    moved = np.empty(x.size)
    flat = x.reshape(-1)
    for start in range(0, x.size, BLOCK):
        moved[start : start + BLOCK] = _moved(flat[start : start + BLOCK], draw)
    return moved.reshape(x.shape)


def can_move(x: np.ndarray) -> bool:
    """Whether `nudge` changes this array, or what it is as float64."""
    return x.dtype.kind in "fcV" and bool((x != 0).any())


def _moved(x: np.ndarray, draw: int) -> np.ndarray:
    sign = x.view(np.uint64) & np.uint64(1 << 63)
    size = x.view(np.uint64) ^ sign
    seed = np.uint64((draw + 1) * _STEP % 2**64)
    with np.errstate(over="ignore"):  # hashing wraps around
        hashed = (size ^ (size >> np.uint64(31))) * _MIX + seed
        hashed = (hashed ^ (hashed >> np.uint64(29))) * _MIX
    ulps = np.uint64(1) + (hashed >> np.uint64(63))
    moved = ((size - np.minimum(ulps, size)) | sign).view(np.float64)
    return np.where(np.isfinite(x), moved, x)

"""Equality of symbolic sizes, which JAX answers although it cannot know."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_JAX = str(Path(jax.__file__).parent)
_LOCK = threading.RLock()


@contextlib.contextmanager
def watched(dim: Any) -> Iterator[list[tuple[str, str]]]:
    """The comparisons that a function makes inside, as (text, place): `n == 8` on a dimension n is False for JAX.

    `jax.export` documents that: the methods by which Python compares also serve dictionaries and cannot raise. So a
    branch that is for one size only would be left out of the file without a word. The methods belong to the class of
    the dimension; they are replaced while a function is traced, for dimensions of the same scope, and for calls that
    come from outside JAX: its own code compares sizes all the time, and knows what the answer is worth.
    """
    cls: Any = type(dim)
    equal, unequal = cls.__eq__, cls.__ne__
    found: list[tuple[str, str]] = []

    def note(ours: Any, other: Any, sign: str) -> None:
        caller = sys._getframe(2)
        file = caller.f_code.co_filename
        if file.startswith(_JAX) or ours.scope is not dim.scope or _decided(ours, other):
            return
        found.append((f"{ours} {sign} {other}", f"{file}:{caller.f_lineno}"))

    def noted_equal(self: Any, other: Any) -> bool:
        note(self, other, "==")
        return equal(self, other)

    def noted_unequal(self: Any, other: Any) -> bool:
        note(self, other, "!=")
        return unequal(self, other)

    with _LOCK:
        cls.__eq__, cls.__ne__ = noted_equal, noted_unequal
        try:
            yield found
        finally:
            cls.__eq__, cls.__ne__ = equal, unequal


def _decided(size: Any, other: Any) -> bool:
    """Whether two sizes are equal whatever the dimensions are, or different whatever they are."""
    if not isinstance(other, int | type(size)):
        return True
    difference = size - other
    if isinstance(difference, int):
        return True
    try:
        return bool(difference > 0) or bool(difference < 0)
    except jax.errors.InconclusiveDimensionOperation:
        return False

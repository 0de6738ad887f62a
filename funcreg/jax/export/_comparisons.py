"""Equality of symbolic sizes, which JAX answers although it cannot know."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_JAX = str(Path(jax.__file__).parent)
_LIBRARIES = tuple(
    {sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")} | {str(Path(__file__).parents[2])}
)
_LOCK = threading.RLock()


@contextlib.contextmanager
def watched(dim: Any) -> Iterator[list[tuple[str, str]]]:
    """The comparisons that a function makes inside, as (text, place): `n == 8` on a dimension n is False for JAX.

    `jax.export` documents that: the methods by which Python compares also serve dictionaries and cannot raise. So a
    branch that is for one size only would be left out of the file without a word. The same goes for `if n - 8` (or
    `if n % 2`), which is always true, and for `{8: a}.get(n, b)` and `n in {8}`, which find nothing, and of which only
    the hash is seen: a function's own, since libraries keep shapes in caches. The methods belong to the class of the
    dimension; they are replaced while a function is traced, for dimensions of the same scope, and for calls that
    come from outside JAX: its own code compares sizes all the time, and knows what the answer is worth.
    """
    cls: Any = type(dim)
    equal, unequal, hashed = cls.__eq__, cls.__ne__, cls.__hash__
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

    def noted_truth(self: Any) -> bool:
        note(self, 0, "==")
        return True

    def noted_hash(self: Any) -> int:
        caller = sys._getframe(1)
        file = caller.f_code.co_filename
        if self.scope is dim.scope and not file.startswith((_JAX, "<", *_LIBRARIES)):
            found.append((f"{self} among the keys of a dictionary or a set", f"{file}:{caller.f_lineno}"))
        return hashed(self)

    with _LOCK:
        cls.__eq__, cls.__ne__, cls.__bool__, cls.__hash__ = noted_equal, noted_unequal, noted_truth, noted_hash
        try:
            yield found
        finally:
            cls.__eq__, cls.__ne__, cls.__hash__ = equal, unequal, hashed
            del cls.__bool__


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

"""What JAX answers about symbolic sizes although it cannot know: equality, hashes, texts."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_JAX = str(Path(jax.__file__).parent)
_LIBRARIES = tuple(
    {sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")} | {str(Path(__file__).parents[2])}
)
_GENERATED = ("<frozen ", "<string>")  # what is typed in comes from "<stdin>" and the like
_LOCK = threading.RLock()


@contextlib.contextmanager
def watched(dim: Any) -> Iterator[list[tuple[str, str]]]:
    """What a function asks inside and gets no true answer to, as (text, place): `n == 8` on a dimension n is False.

    `jax.export` documents that: the methods by which Python compares also serve dictionaries and cannot raise. So a
    branch that is for one size only would be left out of the file without a word. The same goes for `if n - 8` (or
    `if n % 2`), which is always true, and for `{8: a}.get(n, b)` and `n in {8}`, which find nothing, and of which only
    the hash is seen, and for `str(n)`: a function's own, since libraries keep shapes in caches and put them into
    messages. The methods belong to the class of the dimension; they are replaced while a function is traced, for
    dimensions of the same scope, and for calls that come from outside JAX: its own code compares sizes all the time,
    and knows what the answer is worth. `n > 8` is an error, which only counts if the function catches it.
    """
    cls: Any = type(dim)
    kept = {name: getattr(cls, name) for name in ("__eq__", "__ne__", "__hash__", "__str__", "__repr__")}
    equal, unequal, hashed = kept["__eq__"], kept["__ne__"], kept["__hash__"]
    found: list[tuple[str, str]] = []
    errors: list[BaseException] = []

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

    def own(ours: Any) -> str:
        """Where the function's own code has called what called this; nothing if it was a library."""
        caller = sys._getframe(2)
        file = caller.f_code.co_filename
        ours = ours.scope is dim.scope and not file.startswith((_JAX, *_GENERATED, *_LIBRARIES))
        return f"{file}:{caller.f_lineno}" if ours else ""

    def noted_hash(self: Any) -> int:
        place = own(self)
        if place:
            found.append((f"{self} among the keys of a dictionary or a set", place))
        return hashed(self)

    def noted_text(self: Any) -> str:
        place, text = own(self), kept["__str__"](self)
        if place:
            found.append((f"the text of {text}", place))
        return text

    def noted_error(self: Any, *args: Any) -> None:
        Exception.__init__(self, *args)
        errors.append(self)

    error: Any = jax.errors.InconclusiveDimensionOperation
    with _LOCK:
        cls.__eq__, cls.__ne__, cls.__bool__, cls.__hash__ = noted_equal, noted_unequal, noted_truth, noted_hash
        cls.__str__ = cls.__repr__ = noted_text
        error.__init__ = noted_error
        try:
            yield found
            found += _caught(errors)
        finally:
            for name, method in kept.items():
                setattr(cls, name, method)
            del cls.__bool__, error.__init__
            errors.clear()  # they hold on to frames


def _caught(errors: list[BaseException]) -> Iterator[tuple[str, str]]:
    """Errors that the function's own code has caught: those of a function that returned, and that came as far."""
    for error in errors:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not frame.filename.startswith((_JAX, *_GENERATED, *_LIBRARIES))]
        if own:
            text = (str(error).splitlines() or [""])[0]
            yield f"what it is told by an error that it catches ({text})", f"{own[-1].filename}:{own[-1].lineno}"


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

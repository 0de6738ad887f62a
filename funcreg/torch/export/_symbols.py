"""Symbolic sizes as the traced function sees them: like the integers that they stand for, or refused."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._watch import LIBRARIES, is_own

# Libraries that know symbols: they put shapes into caches and messages, and find their way if that fails.
_KNOW_SYMBOLS = (
    *{sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")},
    *LIBRARIES,
)
_NUMBERS = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")


@contextlib.contextmanager
def like_numbers() -> Iterator[list[tuple[str, str]]]:
    """What a function may ask of a symbol and get another answer than of a number, without a guard.

    Inside, `n == 8` is a bool for the function's own code, at once and with a guard: `(n == 8) is True` would be false;
    and `n` is an int to `isinstance`, which asks for `n.__class__`. The text of a symbol and its hash have no true
    answer; they are listed as (use, place). A function may survive both: `str(n) == "8"` is false, and `{8: a}.get(n)`
    raises a TypeError that can be caught. That `type(n) is int` is false cannot be helped.
    """
    uses: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:

        def replace(cls: Any, name: str, method: Any) -> None:
            there = name in vars(cls)
            before = vars(cls).get(name)
            setattr(cls, name, method)
            stack.callback(lambda: setattr(cls, name, before) if there else delattr(cls, name))

        for cls in _NUMBERS:
            replace(cls, "__repr__", _noted(cls.__repr__, "the text", uses))
            replace(cls, "__getattribute__", _of_kind(_NUMBERS[cls]))
            for name in _COMPARISONS:
                if name in vars(cls):
                    replace(cls, name, _decided(vars(cls)[name]))
        replace(torch.SymInt, "__hash__", _noted(torch.SymInt.__hash__, "the hash", uses))
        yield uses


def _own() -> bool:
    """Whether it is the function's own code that has called the caller."""
    return is_own(sys._getframe(2), _KNOW_SYMBOLS)


def _of_kind(number: type) -> Callable[[Any, str], Any]:
    def attribute(self: Any, name: str) -> Any:
        return number if name == "__class__" and _own() else object.__getattribute__(self, name)

    return attribute


def _noted(method: Callable[[Any], Any], use: str, uses: list[tuple[str, str]]) -> Callable[[Any], Any]:
    def noted(self: Any) -> Any:
        if _own():
            caller = sys._getframe(1)
            uses.append((use, f"{caller.f_code.co_filename}:{caller.f_lineno}"))
        return method(self)

    return noted


def _decided(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def decided(self: Any, other: Any) -> Any:
        answer = method(self, other)
        return bool(answer) if _own() and isinstance(answer, torch.SymBool) else answer

    return decided

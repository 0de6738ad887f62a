"""A function made again with other numbers in its closure: those that the functions around it were called with.

Penalties are looked into as well, for their strengths, and what `funcreg` makes of penalties.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from types import CellType, FunctionType
from typing import Any, TypeVar

from funcreg._penalty import Part, Penalty
from funcreg._training import Penalized, Proximal

T = TypeVar("T")
Convert = Callable[[str, str, Any], Any]


def with_numbers(x: T, change: Convert) -> T:
    """A function, or functions in tuples, lists and dicts, with every number of their closures changed.

    Args:
        x: what is made again; where nothing is changed in it, the same object.
        change: `(owner, name, number) -> number`; `scale_by_adam`, `b1`, 0.9: in the closure of a function that
            `scale_by_adam` has made, a number of that name.
    """
    return _Copy(change).of(x)


class _Copy:
    def __init__(self, change: Convert) -> None:
        self.change, self.open = change, set[int]()

    def of(self, x: Any) -> Any:
        if isinstance(x, FunctionType):
            return self._function(x)
        if isinstance(x, functools.partial):
            old = [x.func, x.args, x.keywords]
            new = [self.of(value) for value in old]
            return x if _same(old, new) else functools.partial(new[0], *new[1], **new[2])
        if type(x) is dict:
            new = {key: self.of(value) for key, value in x.items()}
            return x if _same(x.values(), new.values()) else new
        if isinstance(x, (tuple, list)):
            new = [self.of(value) for value in x]
            if _same(x, new):
                return x
            return type(x)(*new) if hasattr(x, "_fields") else type(x)(new)
        if isinstance(x, Part):
            names = zip(x.rule.strengths, x.strengths, strict=True)
            new = tuple(self.change(x.rule.name, name, s) if isinstance(s, (int, float)) else s for name, s in names)
            return x if _same(x.strengths, new) else replace(x, strengths=new)
        if isinstance(x, (Penalty, Penalized, Proximal)):
            old = {field.name: getattr(x, field.name) for field in fields(x)}
            new = self.of(old)
            return x if new is old else replace(x, **new)
        return x

    def _function(self, f: FunctionType) -> FunctionType:
        if not (f.__closure__ or f.__dict__) or id(f) in self.open:  # the latter calls itself
            return f
        self.open.add(id(f))
        owner = f.__qualname__.split(".<locals>")[0].rsplit(".", 1)[-1]
        old, new = [], []
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            try:
                x = cell.cell_contents
            except ValueError:  # not filled yet
                x = None
            old.append(x)
            new.append(self.change(owner, name, x) if isinstance(x, (int, float)) else self.of(x))
        known = self.of(f.__dict__)
        self.open.discard(id(f))
        if _same(old, new) and known is f.__dict__:
            return f
        cells = tuple(cell if a is b else CellType(b) for cell, a, b in zip(f.__closure__ or (), old, new, strict=True))
        made = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, cells)
        made.__kwdefaults__ = f.__kwdefaults__
        made.__dict__.update(known)
        return made


def _same(old: Iterable[Any], new: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(old, new, strict=True))

"""A function made again with other numbers in its closure: those that the functions around it were called with."""

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, TypeVar

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
            new = functools.partial(self.of(x.func), *self.of(x.args), **self.of(x.keywords))
            return x if (new.func, new.args, new.keywords) == (x.func, x.args, x.keywords) else new
        if type(x) is dict:
            new = {key: self.of(value) for key, value in x.items()}
            return x if all(new[key] is value for key, value in x.items()) else new
        if isinstance(x, (tuple, list)):
            new = [self.of(value) for value in x]
            if all(a is b for a, b in zip(new, x, strict=True)):
                return x
            return type(x)(*new) if hasattr(x, "_fields") else type(x)(new)
        return x

    def _function(self, f: FunctionType) -> FunctionType:
        if not f.__closure__ or id(f) in self.open:  # the latter calls itself
            return f
        self.open.add(id(f))
        owner = f.__qualname__.split(".<locals>")[0].rsplit(".", 1)[-1]
        old, new = [], []
        for name, cell in zip(f.__code__.co_freevars, f.__closure__, strict=True):
            try:
                x = cell.cell_contents
            except ValueError:  # not filled yet
                x = None
            old.append(x)
            new.append(self.change(owner, name, x) if isinstance(x, (int, float)) else self.of(x))
        self.open.discard(id(f))
        if all(a is b for a, b in zip(old, new, strict=True)):
            return f
        cells = tuple(cell if a is b else CellType(b) for cell, a, b in zip(f.__closure__, old, new, strict=True))
        made = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, cells)
        made.__kwdefaults__ = f.__kwdefaults__
        made.__dict__.update(f.__dict__)
        return made

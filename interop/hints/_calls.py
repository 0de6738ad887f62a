"""The calls that a PyTorch function makes, and the same function with one of them made differently.

A `TorchFunctionMode` sees every call of a function or method of PyTorch before it is made, also under `torch.func` and
inside `torch.optim`, with names and arguments as they are written: `layer_norm(x, ..., eps=1e-5)`. What a function of
`torch.nn.functional` calls in turn is not seen, and nothing inside TorchScript.
"""

import functools
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

_SKIPPED = tuple(str(Path(module.__file__).parent) for module in (torch, functools) if module.__file__)
_OURS = str(Path(__file__).parent.parent)
_WING = str(Path(__file__).parent.parent.parent / "funcreg")
_UPDATES = (  # what runs inside these has no place: what is wrong in an update is wrong for all parameters
    str(Path(torch.optim.__file__).parent),
    *(str(Path(_WING, "torch", name)) for name in ("optax", "_transform.py")),
)
_SUMS = frozenset("sum nansum matmul __rmatmul__ mm mv bmm dot vdot inner einsum norm".split())
_OF_SUMS = frozenset("add add_ sub rsub mul neg pow square sqrt reshape view squeeze".split())


class Call(NamedTuple):
    """A function of PyTorch and its arguments; a method's first argument is its tensor."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "")

    def __call__(self) -> Any:
        out = self.function(*self.args, **self.kwargs)
        if isinstance(out, torch.Tensor) and (self.name in _SUMS or self.name in _OF_SUMS and self.of_sums):
            out.interop_is_sum = True  # pyright: ignore[reportAttributeAccessIssue]
        return out

    @property
    def of_sums(self) -> bool:
        """Whether an argument is a sum over an axis, or was computed from one entry by entry."""
        return any(hasattr(x, "interop_is_sum") for x in self.args if isinstance(x, torch.Tensor))

    def get(self, name: str, position: int, default: Any = None) -> Any:
        return self.kwargs.get(name, self.args[position] if position < len(self.args) else default)

    def replaced(self, name: str, position: int, value: Any) -> Any:
        """The result with another value of this argument, which may be given by name or by position."""
        if name not in self.kwargs and position < len(self.args):
            return self.function(*self.args[:position], value, *self.args[position + 1 :], **self.kwargs)
        return self.function(*self.args, **{**self.kwargs, name: value})


class Option(NamedTuple):
    """How one call could be made differently.

    Attributes:
        key: names the change; the same for calls that the same change fits.
        now: a clause, what PyTorch does: "computes gelu by erf".
        then: what it is run with instead: "the approximation by tanh".
        run: makes the call with the change.
    """

    key: Hashable
    now: str
    then: str
    run: Callable[[], Any]


class Rule(NamedTuple):
    """One way in which calls of these functions could be made differently.

    Attributes:
        kind: of the hint.
        functions: by name, as `torch.overrides` has them.
        options: of one call.
        sized: whether another number of rows would tell it from a coincidence of sizes.
    """

    kind: str
    functions: tuple[str, ...]
    options: Callable[[Call], Iterable[Option]]
    sized: bool = False


@dataclass
class Seen:
    """The calls of one run that an option fits: where they were made, in order."""

    rule: Rule
    option: Option
    places: list[str] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Notes which options fit the calls of a function, and changes nothing."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        super().__init__()
        self.rules = _by_function(rules)
        self.seen: dict[tuple[str, Hashable], Seen] = {}

    def watching(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched at its first call: one step of a training shows what all others do."""
        called = False

        def watched(*args: Any) -> Any:
            nonlocal called
            if called:
                return function(*args)
            called = True
            with self:
                return function(*args)

        return watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        call = Call(func, args, kwargs or {})
        for rule in self.rules.get(call.name, ()):
            for option in options_of(rule, call):
                entry = self.seen.setdefault((rule.kind, option.key), Seen(rule, option))
                entry.places.append(_place())
        return call()


class Changed(TorchFunctionMode):
    """Makes the calls that an option fits with its change; with `only`, of these calls the one of this number."""

    def __init__(self, rule: Rule, key: Hashable, only: int | None) -> None:
        super().__init__()
        self.rule, self.key, self.only, self.count = rule, key, only, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        call = Call(func, args, kwargs or {})
        if call.name in self.rule.functions:
            for option in options_of(self.rule, call):
                if option.key == self.key:
                    self.count += 1
                    return option.run() if self.only in (None, self.count - 1) else call()
        return call()


def options_of(rule: Rule, call: Call) -> Iterator[Option]:
    """Those of a call that has the form the rule knows: its author may call it in another way, which is no error."""
    try:
        yield from rule.options(call)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
        return


def _by_function(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        for name in rule.functions:
            table.setdefault(name, []).append(rule)
    return table


def _place() -> str:
    """The line of the user's code that makes the call, "model.py:31"; "" where there is none, or in an optimizer."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_UPDATES):
            return ""
        if file.startswith(_OURS) and not file.startswith(str(Path(__file__).parent)):
            return ""  # called by `check` itself: a function of PyTorch was passed to it
        if not file.startswith((*_SKIPPED[:1], _WING, str(Path(__file__).parent))):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""

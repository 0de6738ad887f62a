"""Who fixes a size: the operation and the line of code behind every assumption that a trace makes about a symbol."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode, resolve_name

_TORCH = str(Path(torch.__file__).parent)
LIBRARIES = (_TORCH, str(Path(__file__).parent.parent.parent), "<frozen ", "<eval_with_key>", "<__array_function__")
# What stands between a branch on a size and `evaluate_expr`.
_SYMBOLS = (
    f"{_TORCH}/fx/",
    f"{_TORCH}/__init__.py",
    f"{_TORCH}/utils/_stats.py",
    __file__,
    str(Path(__file__).with_name("_symbols.py")),
)


class Assumption(NamedTuple):
    """What a trace took for granted about sizes, such as `batch >= 16`."""

    expression: Any  # sympy
    operation: str  # of PyTorch, in which it was made; empty if unknown
    place: str  # in the function's own code; empty if unknown
    own: bool  # made by the function's own code, in a Python branch


class WatchedShapeEnv(ShapeEnv):
    """A shape environment that remembers where its guards come from.

    One that does not learn asks for a guard each time: what PyTorch has assumed before does not answer a question of
    the function's own code.
    """

    def __init__(self, calls: list[Any], learns: bool) -> None:
        # no numbers: what would need them (item, nonzero) is an error, not a new symbol
        super().__init__(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.calls, self.learns = calls, learns
        self.assumptions: list[Assumption] = []

    def evaluate_expr(self, *args: Any, **kwargs: Any) -> Any:
        before = len(self.guards)
        own = is_own(next(_frames()), (_TORCH, "<frozen "))
        evaluate = self._evaluate_expr if own else super().evaluate_expr  # the latter has a cache
        result = evaluate(*args, **kwargs)
        for guard in self.guards[before:]:
            self.assumptions.append(Assumption(guard.expr, "" if own else self._operation(), place(), own))
        return result

    def _maybe_guard_rel(self, expr: Any) -> None:
        if self.learns:
            super()._maybe_guard_rel(expr)

    def get_implications(self, e: Any) -> Any:
        return super().get_implications(e) if self.learns else ()

    def _operation(self) -> str:
        backward = torch._C._current_autograd_node()
        if backward is not None:
            return f"the derivative {backward.name()}"
        return next((name for name in map(resolve_name, reversed(self.calls)) if name), "")


class Watch(TorchFunctionMode):
    """The PyTorch functions that are being called, and the errors that they have raised."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls
        self.errors: list[tuple[str, Exception]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append(func)
        try:
            if func is torch.nn.functional.linear:
                return _linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))
        except Exception as error:
            self.errors.append((resolve_name(func) or getattr(func, "__name__", "an operation"), error))
            raise
        finally:
            self.calls.pop()

    def caught(self) -> tuple[str, Exception, str] | None:
        """The first error that reached the function's own code, with the operation and the line; after a function that
        has returned, it was caught there."""
        for operation, error in self.errors:
            own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_own(frame)]
            if own:
                frame, line = own[-1]
                return operation, error, f"{frame.f_code.co_filename}:{line}"
        return None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which under grad fixes the leading sizes of contiguous inputs with three or more
    axes: it then computes just this, in C++ that knows no symbols."""
    if bias is None or input.ndim < 3 or not input.is_contiguous():
        return torch.nn.functional.linear(input, weight, bias)
    flat = torch.nn.functional.linear(input.flatten(0, -2), weight, bias)
    return flat.reshape(*input.shape[:-1], flat.shape[-1])


def is_own(frame: FrameType, libraries: tuple[str, ...] = LIBRARIES) -> bool:
    """Whether a frame belongs to the function's own code. Typed in it comes from "<stdin>" and the like, and from
    "<string>" after `python -c`; other modules' code of that name has been generated, as that of dataclasses."""
    file = frame.f_code.co_filename
    if file == "<string>":
        return frame.f_globals.get("__name__") == "__main__"
    return not file.startswith(libraries)


def place() -> str:
    """The line of the function's own code that is being run."""
    return next((f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in _frames() if is_own(frame)), "")


def _frames() -> Iterator[FrameType]:
    """The calls that led here, the innermost first, without those of symbolic sizes."""
    frame = sys._getframe()
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_SYMBOLS):
            yield frame
        frame = frame.f_back

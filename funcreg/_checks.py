"""What an argument may be: strengths, numbers from a domain, one of several words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_strength(wing: Any, where: str, name: str, value: Any) -> None:
    """Refuse what is no strength: functions, text, negative or non-finite numbers. Traced values are not checked."""
    if callable(value) and not hasattr(value, "shape"):
        raise TypeError(
            f"{where}: {name} must be a number or an array, got a function; for a schedule give the transformation a "
            f"function count -> Penalty, such as prox_adam(learning_rate, lambda count: {where}(schedule(count)))"
        )
    if not wing.is_real(value):
        library, home = type(value).__module__.split(".")[0], wing.__name__.split(".")[1]
        if hasattr(value, "dtype") and library not in ("numpy", home, home + "lib"):
            given = f"an array of {library}; funcreg.{home} takes those of {home} and of NumPy"
        else:
            given = repr(value)
        raise TypeError(f"{where}: {name} must be a number or an array, got {given}")
    check_domain(wing, f"{where}: {name}", value)


def check_domain(wing: Any, what: str, value: Any) -> None:
    """Refuse a concrete value with an entry outside `[0, inf)`."""
    wrong = wing.concrete(value)
    if wrong is not None and not 0 <= wrong < float("inf"):
        raise ValueError(f"{what} must be {'finite' if wrong > 0 else '>= 0'}, got {wrong:g}")


def one_of(where: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse an unknown option value, listing the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{where}: {argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

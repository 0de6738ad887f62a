"""Arguments and results of an exported function by dotted name. No framework."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._export_errors import ResultError


def caller(where: str, function: Callable[..., Any], names: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    """How to call a function with arguments by name; those without a parameter go to its `*args`, in order.

    Raises:
        TypeError: no function, or one that does not take such arguments.
    """
    if not callable(function):
        raise TypeError(f"{where}: fn must be a function, got {type(function).__name__}")
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in names]
    extra = [name for name in names if name not in {p.name for p in named} and name not in keywords]
    takes_args = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in required if name not in names]
    if missing or (extra and not takes_args):
        problem = f"has no {missing[0]!r}" if missing else f"has {extra[0]!r}, which is no parameter"
        raise TypeError(f"{where}: example {problem}; the function takes ({', '.join(map(str, parameters))})")
    # by position, as the transformations of both frameworks call; parameters after a default that is kept, by keyword
    kept = next((i for i, p in enumerate(named) if p.name not in names), len(named))
    first = [p.name for p in named[:kept]]
    keywords += [p.name for p in named[kept:] if p.name in names]
    if extra and kept < len(named):
        raise TypeError(f"{where}: example must have {named[kept].name!r} too, since {extra[0]!r} comes after it")

    def call(arguments: Mapping[str, Any]) -> Any:
        return function(*(arguments[n] for n in (*first, *extra)), **{n: arguments[n] for n in keywords})

    return call


def components(where: str, result: Any, names: Sequence[str] | None) -> Any:
    """What a function returned, the components of a tuple under these names instead of "0", "1", ..."""
    if names is None:
        return result
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: outputs must be different names, got {tuple(names)}")
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        got = f"{len(result)} components" if isinstance(result, (tuple, list)) else type(result).__name__
        raise ResultError(f"{where}: outputs names {len(names)} components of a tuple, the function returned {got}")
    return dict(zip(names, result, strict=True))


def check_name(where: str, what: str, name: str, seen: Mapping[str, Any]) -> None:
    """Refuse a second leaf of one name, and names that a file cannot hold."""
    if name in seen:
        raise ValueError(f"{where}: {what} has two leaves of the name {name!r}; rename one of them")
    if not re.fullmatch(r"[ -~]+", name) or any(char in name for char in "'\"\\{}"):
        raise ValueError(
            f"{where}: {what} has a leaf of the name {name!r}; names in a file are printable ASCII without quotes, "
            "braces and backslashes: rename it"
        )

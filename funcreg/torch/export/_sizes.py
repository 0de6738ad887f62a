"""For which sizes a file is right: where one graph was traced, which is then a condition that the file checks.

PyTorch notes what it assumes about a symbol while it traces: `batch >= 16` in a convolution, which then takes another
kernel but is the same operation. At all sizes that fulfil the assumptions of a trace, the function is the graph of that
trace. So it is traced again where they do not hold, and the graph must be the same; what no trace reaches, the file
refuses. A symbol is never 0 or 1, and some sizes are checked in place of a proof: of these all that is asked is that
the function's own code does not branch on the other dimensions there; the rest the recorded cases tell.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..._export_errors import ExportError, SpecializationError
from ..._export_sizes import Sizes
from ._inputs import Inputs
from ._trace import Trace, specialized

Again = Callable[[str, Sizes, Sizes], Trace]  # where, stand-ins of the symbols, sizes of the other dimensions

_MOST_TRACES = 12
_INFIX = {
    "And": " and ",
    "Or": " or ",
    "Add": " + ",
    "Mul": " * ",
    "FloorDiv": " // ",
    "CleanDiv": " // ",
    "Mod": " % ",
    "PythonMod": " % ",
}


@dataclass(frozen=True)
class Known:
    """Sizes for which a file is known to be right: all that fulfil a condition, and those that are special."""

    condition: Any  # sympy, in symbols of the names of the dimensions
    special: dict[str, list[int]]  # of every dimension


def stand_ins(inputs: Inputs) -> Sizes:
    """For every dynamic dimension a prime of its own that is the size of no other dimension."""
    taken = {size for x in inputs.tensors.values() for size in x.shape}
    primes = (n for n in range(101, 100_000) if n not in taken and all(n % k for k in range(2, int(n**0.5) + 1)))
    return dict(zip(dict.fromkeys(inputs.sizes), primes, strict=False))


def known(
    where: str, first: Trace, again: Again, inputs: Inputs, checked: Sequence[int], run: Sequence[Sizes]
) -> Known:
    """Refuse a function that is another graph at other sizes; and where it is known to be the graph of `first`.

    Args:
        where: for errors.
        first: the graph.
        again: traces it anew.
        inputs: the example.
        checked: the sizes that need no proof, since the file is run there.
        run: the sizes of all dimensions at which it is run.

    Raises:
        SpecializationError: names the dimension, the size and what was assumed.
    """
    dims = list(first.sizes)
    traces, left = _traces(where, first, again, inputs, checked)
    special = {dim: [n for n in checked if n in (0, 1) or n in left[dim]] for dim in dims}
    for choice in itertools.product(*([None, *special[dim]] for dim in dims)):
        fixed = {dim: size for dim, size in zip(dims, choice, strict=True) if size is not None}
        if 0 < len(fixed) < len(dims):
            at = f"{where}, at {', '.join(f'{dim} = {size}' for dim, size in fixed.items())}"
            again(at, {dim: size for dim, size in first.sizes.items() if dim not in fixed}, fixed)
    return Known(_condition(traces, run), special)


def _traces(
    where: str, first: Trace, again: Again, inputs: Inputs, checked: Sequence[int]
) -> tuple[list[Trace], dict[str, set[int]]]:
    """Traces of one graph whose assumptions leave no size out but some of `checked`, and which of those they leave."""
    traces = [first]
    assumptions = first.env.assumptions
    left: dict[str, set[int]] = {dim: set() for dim in first.sizes}
    telling = _telling_sizes(assumptions) if assumptions else []
    for size in sorted(telling, key=lambda n: n in checked):
        # every dimension alone, and all of them
        for sizes in [*({**first.sizes, dim: size} for dim in first.sizes), dict.fromkeys(first.sizes, size)]:
            broken = [trace.failing(sizes) for trace in traces]
            if not all(broken):
                continue
            changed = [dim for dim in sizes if sizes[dim] != first.sizes[dim]]
            if size in checked:
                for dim in changed:
                    left[dim].add(size)
                continue
            refusal = specialized(where, changed[0], broken[0], inputs, size)
            if len(traces) == _MOST_TRACES:
                raise refusal
            try:
                new = again(where, sizes, {})
            except ExportError as error:
                raise refusal from error
            if new.module.code != first.module.code or new.outputs != first.outputs:
                raise refusal
            traces.append(new)
    return traces, left


def _telling_sizes(assumptions: Sequence[Any]) -> list[int]:
    """Sizes at which to look at assumptions: all small ones, those around powers of two, and around the numbers that
    occur in the assumptions and their quotients."""
    sizes = {*range(2, 131), *(2**k + d for k in range(8, 21) for d in (-1, 0, 1))}
    for assumption in assumptions:
        numbers = {abs(int(n)) for n in assumption.expression.atoms() if n.is_Integer and n != 0}
        sizes |= {a // b + d for a in numbers for b in (1, *numbers) for d in (-1, 0, 1)}
    return sorted(size for size in sizes if size >= 2)


def _condition(traces: Sequence[Trace], run: Sequence[Sizes]) -> Any:
    """What sizes must fulfil: all assumptions of one of the traces, or be among those that are run."""
    import sympy

    def symbol(dim: str) -> Any:
        return sympy.Symbol(dim, integer=True, positive=True)

    ways: list[Any] = []
    for trace in traces:
        names = {old: symbol(dim) for dim, old in trace.symbols.items()}
        ways.append(sympy.And(*(assumption.expression.xreplace(names) for assumption in trace.env.assumptions)))
    if sympy.Or(*ways) == True:  # noqa: E712  sympy's own True
        return sympy.true
    for sizes in run:
        equal: list[Any] = [sympy.Eq(symbol(dim), n) for dim, n in sizes.items()]
        ways.append(sympy.And(*equal))
    return sympy.Or(*ways)


def refusal(where: str, known: Known, variables: Mapping[str, str]) -> str | None:
    """When a file must refuse sizes, in TorchScript; None if never.

    Raises:
        SpecializationError: the condition has no notation there.
    """
    if known.condition == True:  # noqa: E712
        return None
    usual = [f"{variables[dim]} != {size}" for dim, sizes in known.special.items() for size in sizes]
    try:
        return " and ".join([*usual, f"not ({_text(known.condition, variables)})"])
    except NotImplementedError as error:
        raise SpecializationError(
            f"{where}: the file would be right for some sizes only, and cannot tell which ({error}, in "
            f"{known.condition}); leave the dimension out of `dynamic`, and export a file for each size"
        ) from None


def _text(x: Any, variables: Mapping[str, str]) -> str:
    """An expression in sizes. All are integers, and both languages round quotients down."""
    if x.is_Symbol:
        return variables[x.name]
    if x.is_Integer:
        return f"({x})"
    name = x.func.__name__
    if name in ("BooleanTrue", "BooleanFalse"):
        return str(bool(x))
    arguments = [_text(argument, variables) for argument in x.args]
    match name:
        case "Not":
            return f"(not {arguments[0]})"
        case "Max" | "Min":
            return functools.reduce(lambda a, b: f"{name.lower()}({a}, {b})", arguments)
        case "Pow" | "PowByNatural" if x.args[1].is_Integer and x.args[1] > 0:
            return f"({' * '.join([arguments[0]] * int(x.args[1]))})"
    if x.is_Relational:
        return f"({arguments[0]} {x.rel_op} {arguments[1]})"
    if name not in _INFIX:
        raise NotImplementedError(f"{x} has no notation")
    return f"({_INFIX[name].join(arguments)})"

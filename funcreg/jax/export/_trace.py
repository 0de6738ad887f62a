"""A function as a program of StableHLO whose dynamic dimensions are symbols, never the numbers of the example."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend
from jax import export

from ..._export_errors import (
    CapturedTensorError,
    ControlFlowError,
    ExportError,
    SpecializationError,
    UnsupportedOpError,
)
from ._comparisons import watched
from ._inputs import Inputs

_JAX, _HERE = str(Path(jax.__file__).parent), str(Path(__file__).parents[2])

LOOKS_AT_NUMBERS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def trace(where: str, call: Callable[..., Any], inputs: Inputs, platforms: Sequence[str]) -> export.Exported:
    """Export a function of a dict of named arrays.

    Raises:
        ControlFlowError: the function looks at numbers.
        CapturedTensorError: it uses an array that is no argument.
        SpecializationError: it needs a dynamic dimension to be a number, or compares it with one.
        UnsupportedOpError: it calls back into Python, or an operation that XLA does not promise to keep.
        ExportError: it fails in another way on symbolic sizes.
    """
    dims = _symbols(where, list(inputs.sizes))
    specs = {
        name: jax.ShapeDtypeStruct([dims[n] if isinstance(n, str) else n for n in spec.shape], spec.dtype)
        for name, spec in inputs.specs().items()
    }
    function = jax.jit(call)
    try:
        if dims:
            with watched(next(iter(dims.values()))) as comparisons:
                jaxpr = jax.make_jaxpr(function)(specs)
            _refuse_comparisons(where, comparisons)
        else:
            jaxpr = jax.make_jaxpr(function)(specs)
        _refuse_captured(where, jaxpr)
        return export.export(function, platforms=tuple(platforms))(specs)
    except Exception as error:
        if isinstance(error, ExportError):
            raise
        raise explained(where, error, inputs) from error


def _symbols(where: str, names: list[str]) -> dict[str, Any]:
    """A symbolic size for every dynamic dimension, all of one scope."""
    if not names:
        return {}
    scope = export.SymbolicScope()
    try:
        return {name: export.symbolic_shape(name, scope=scope)[0] for name in names}
    except ValueError as error:
        raise ValueError(
            f"{where}: dynamic: jax.export cannot call dimensions {', '.join(map(repr, names))} ({_brief(error)}); "
            "max, min, mod and floordiv are names of functions there"
        ) from None


def _refuse_comparisons(where: str, comparisons: list[tuple[str, str]]) -> None:
    if comparisons:
        text, place = comparisons[0]
        raise SpecializationError(
            f"{where}: the function asks for {text}, at {place}, and JAX has no true answer for a dynamic dimension: "
            "at some sizes the file would be wrong. Write it without a branch on the size or its text, or leave the "
            "dimension out of `dynamic`, and export a file for each size"
        )


def _refuse_captured(where: str, jaxpr: Any) -> None:
    """Refuse arrays from outside; NumPy's, and lists in the function's text, are constants of another type."""
    for constant in (x for inner in _jaxprs(jaxpr) for x in getattr(inner, "consts", ())):
        if isinstance(constant, jax.Array):
            raise CapturedTensorError(
                f"{where}: the function uses an array that is none of its arguments: {constant.dtype}"
                f"{list(constant.shape)}; pass it as an argument, and put it into the example (parameters, state, "
                "anchors, masks and keys are inputs of the file). What is to be a constant, give as a NumPy array"
            )


def _jaxprs(jaxpr: Any) -> Iterator[Any]:
    """A jaxpr and all inside it: of jit, scan, cond, custom derivatives."""
    kinds = (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)
    yield jaxpr
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, kinds)):
            if isinstance(inner, kinds):
                yield from _jaxprs(inner)


def explained(where: str, error: Exception, inputs: Inputs) -> ExportError:
    """The error of a trace, as one that says what to change."""
    place, brief = _place(error), _brief(error)
    if isinstance(error, LOOKS_AT_NUMBERS):
        return ControlFlowError(
            f"{where}: the function looks at the numbers in an array{place} ({brief}): `if`, float(), int(), "
            "np.asarray(), x[mask], nonzero. Write branches with jnp.where or jax.lax.cond, and keep shapes: multiply "
            "by the mask"
        )
    # of sizes, JAX says this by an error of its own; Python's float(), int() and math say it by a TypeError
    if isinstance(error, jax.errors.InconclusiveDimensionOperation) or "_DimExpr" in str(error):
        return SpecializationError(
            f"{where}: a dynamic dimension ({', '.join(inputs.sizes)}) has to be a number{place} ({brief}). Write it "
            "without float(), int(), math or a Python branch or loop on a size: jnp.mean instead of a division by it, "
            "jnp.asarray(x.shape[0]) for a count, jax.lax.map instead of a loop; or leave the dimension out of "
            "`dynamic`, and export a file for each size"
        )
    if isinstance(error, NotImplementedError) and "host_callback" in str(error):
        return UnsupportedOpError(
            f"{where}: the function calls back into Python (jax.debug.print, pure_callback, io_callback), which a file "
            "cannot; leave it out"
        )
    if "custom call" in str(error).lower():
        return UnsupportedOpError(
            f"{where}: the function needs an operation that XLA does not promise to keep{place} ({brief}); compute it "
            "in another way"
        )
    return ExportError(
        f"{where}: the function fails where the sizes of {', '.join(inputs.sizes) or 'its arguments'} are symbols"
        f"{place}: {type(error).__name__}: {brief}. It must be made of JAX operations, and work at every size of the "
        "dimensions in `dynamic`, each of which must be named in all inputs that have it"
    )


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _place(error: Exception) -> str:
    """The last line of the function's own code that an error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_JAX, _HERE, "<"))]
    return f", at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""

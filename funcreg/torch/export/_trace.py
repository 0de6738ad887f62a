"""A function as a graph of ATen operations whose dynamic dimensions are symbols, never the numbers of the example.

The function is run once on tensors without numbers (fake tensors). Only the dimensions that are to be dynamic are
symbols; their stand-in size is a prime that no other dimension has. Everything that would be frozen without being seen
to be (a size, a tensor that is no argument, a branch on numbers) is an error here.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode

from ..._export_errors import (
    CapturedTensorError,
    ControlFlowError,
    ExportError,
    SpecializationError,
    UnsupportedOpError,
)
from ._inputs import Inputs
from ._symbols import like_numbers
from ._watch import Assumption, Watch, WatchedShapeEnv, is_own


@dataclass(frozen=True)
class Trace:
    """A graph, and what was assumed about the dynamic dimensions when it was made."""

    module: GraphModule
    outputs: list[str]  # names
    symbols: dict[str, Any]  # name of a dimension -> sympy symbol
    env: WatchedShapeEnv
    sizes: dict[str, int]  # the stand-ins

    @property
    def placeholders(self) -> list[Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    @property
    def results(self) -> list[Node]:
        return list(self.module.graph.output_node().args[0])  # pyright: ignore[reportArgumentType]

    def failing(self, sizes: Mapping[str, int]) -> Assumption | None:
        """The first assumption that does not hold at other sizes, or None."""
        values = {self.symbols[dim]: size for dim, size in sizes.items()}
        for assumption in self.env.assumptions:
            if assumption.expression.xreplace(values) != True:  # noqa: E712  sympy's own True
                return assumption
        return None


def trace(
    where: str,
    call: Callable[..., tuple[list[str], list[Tensor]]],
    inputs: Inputs,
    sizes: Mapping[str, int],
    fixed: Mapping[str, int],
) -> Trace:
    """Trace a function of the tensors of `inputs`, which returns the names and tensors of its outputs.

    Args:
        where: for errors.
        call: the function.
        inputs: the example.
        sizes: stand-ins for the dimensions that are symbols.
        fixed: the sizes of the others. Where there are any, PyTorch may assume what it likes, and only the function's
            own branches are looked for: the graph is not for use.

    Raises:
        ControlFlowError: the function looks at numbers, or catches an error.
        CapturedTensorError: it uses a tensor that is no argument.
        SpecializationError: it makes a dynamic dimension a number.
        ExportError: it fails in another way on tensors without numbers.
    """
    from torch._dynamo.source import ConstantSource  # the slowest of the imports

    calls: list[Any] = []
    env = WatchedShapeEnv(calls, learns=not fixed)
    symbols: dict[str, Any] = {}
    dims: dict[str, Any] = dict(fixed)
    for dim, size in sizes.items():
        source = ConstantSource(dim)
        symbols[dim] = env.create_symbol(size, source, DimDynamic.DYNAMIC)
        dims[dim] = env.create_symintnode(symbols[dim], hint=size, source=source)
    with FakeTensorMode(shape_env=env):
        fakes = [
            torch.empty(
                [dims[inputs.dims[name][axis]] if axis in inputs.dims[name] else n for axis, n in enumerate(x.shape)],
                dtype=x.dtype,
                device=x.device,
            )
            for name, x in inputs.tensors.items()
        ]
    outputs: list[str] = []
    watch = Watch(calls)

    def run(*tensors: Tensor) -> list[Tensor]:
        with watch:
            outputs[:], results = call(*tensors)
        return results

    uses: list[tuple[str, str]] = []
    try:
        # rules written in Python know symbols where C++ wants numbers
        with enable_python_dispatcher(), like_numbers() as uses:
            module = make_fx(run, tracing_mode="fake")(*fakes)
    except Exception as error:
        _refuse_uses(where, uses)
        raise _explained(where, error, sizes) from error
    _refuse_uses(where, uses)
    _refuse_caught(where, watch)
    _fix_dtypes(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert len(env.assumptions) == len(env.guards) and not env.deferred_runtime_asserts
    traced = Trace(module, outputs, symbols, env, dict(sizes))
    for dim, symbol in symbols.items():
        if env.replace(symbol).is_number:
            raise specialized(where, dim, traced.failing({**sizes, dim: sizes[dim] + 1}), inputs)
    for assumption in env.assumptions:
        if assumption.own:
            dim = next(d for d, symbol in symbols.items() if symbol in assumption.expression.free_symbols)
            raise specialized(where, dim, assumption, inputs)
    return traced


def _refuse_uses(where: str, uses: Sequence[tuple[str, str]]) -> None:
    if uses:
        use, place = uses[0]
        raise SpecializationError(
            f"{where}: the function asks for {use} of a size that is dynamic, at {place}, and the answer would be a "
            "constant of the file. Remedy: no str(), f-string or print of x.shape, and no size as a key of a dict or a "
            "set; or leave the dimension out of `dynamic`, and export a file for each size"
        )


def _refuse_caught(where: str, watch: Watch) -> None:
    """Refuse a function that goes on after an error: with numbers there may be none, and it does something else."""
    found = watch.caught()
    watch.errors.clear()  # they hold on to frames
    if found:
        operation, error, place = found
        raise ControlFlowError(
            f"{where}: the function catches what {operation} raises at {place} ({type(error).__name__}: "
            f"{_brief(error)}), which it raises since there are no numbers, or else may raise for some numbers only; "
            "the file cannot choose. Leave the `try` out, and write both ways with torch.where"
        )


def _fix_dtypes(module: GraphModule) -> None:
    """Make the graph independent of the default dtype of the process that runs it: new tensors get the dtype that they
    had in the trace, and integers that PyTorch makes floats (`x.long() / 3`) are made these first."""
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        result, schema = node.meta.get("val"), node.target._schema
        if not any("Tensor" in str(argument.type) for argument in schema.arguments):
            if any(argument.name == "dtype" for argument in schema.arguments) and isinstance(result, Tensor):
                node.kwargs = {**node.kwargs, "dtype": result.dtype}
        elif torch.Tag.pointwise in node.target.tags and isinstance(result, Tensor) and result.is_floating_point():
            tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
            if "dtype" in node.kwargs or any(_holds_fractions(x.meta["val"]) for x in tensors):
                continue
            for x in tensors:
                with module.graph.inserting_before(node):
                    new = module.graph.call_function(torch.ops.aten._to_copy.default, (x,), {"dtype": result.dtype})
                new.meta["val"] = x.meta["val"].to(result.dtype)
                node.replace_input_with(x, new)


def specialized(
    where: str, dim: str, broken: Assumption | None, inputs: Inputs, size: int | None = None
) -> SpecializationError:
    """What fixed a dimension, where, and what to do."""
    name, axis = next((name, axis) for name, dims in inputs.dims.items() for axis, d in dims.items() if d == dim)
    which = f"dimension {axis} ({dim!r}) of the input {name!r}"
    if broken and broken.own and not broken.expression.func.__name__ == "Equality":
        what = f"the function branches on {which}"
    elif size is None:
        what = f"{which} becomes a fixed number"
    else:
        what = f"the function is another one where {which} is {size}"
    also = "" if size is None else f"add {size} to check_sizes, since sizes that are run need no proof; "
    operation = f" in {broken.operation}" if broken and broken.operation else ""
    place = f", at {broken.place}" if broken and broken.place else ""
    return SpecializationError(
        f"{where}: {what}{operation}{place}. Remedy: {also}no int(), float(), math function, Python branch or loop "
        f"on x.shape[{axis}] (x.new_full((), x.shape[{axis}]) is a size as a tensor); if this is inside vmap (or "
        "jacfwd and hessian, which use it: jacrev(jacrev(f)) mostly works), some operations need a number there: "
        "index with a one-hot mask instead of labels (cross_entropy, gather), run the members of an ensemble in a loop "
        "and torch.stack the results; or leave the dimension out of `dynamic`, and export a file for each size"
    )


def _explained(where: str, error: Exception, sizes: Mapping[str, int]) -> ExportError:
    """The error of a trace, as one that says what to change."""
    place = _place(error)
    if isinstance(error, ExportError):
        return error
    if isinstance(error, (DataDependentOutputException, GuardOnDataDependentSymNode)):
        return ControlFlowError(
            f"{where}: the function looks at the numbers in a tensor{place} ({_brief(error)}): `if`, `.item()`, "
            "`float()`, `int()` or indexing by a 0-d tensor. Write branches with torch.where, indexing with "
            "index_select or gather"
        )
    if isinstance(error, DynamicOutputShapeException):
        return ControlFlowError(
            f"{where}: the shape of a result depends on the numbers in a tensor{place} ({_brief(error)}), as those of "
            "x[mask], nonzero and unique do. Keep the shape and multiply by the mask, or use torch.where"
        )
    if isinstance(error, UnsupportedOperatorException):
        return UnsupportedOpError(
            f"{where}: {_brief(error)}{place} cannot be computed without numbers; write it with other operations"
        )
    if "convert all Tensors to FakeTensors" in str(error):
        found = str(error).split("Found in ")[-1]
        return CapturedTensorError(
            f"{where}: the function uses a tensor that is none of its arguments{place}: {found}; pass it as an "
            "argument, and put it into the example (parameters, state, anchors and masks are inputs of the file)"
        )
    if "dynamo-optimized" in str(error):
        return UnsupportedOpError(
            f"{where}: the function has been compiled by torch.compile{place}; export the one that was compiled "
            "(ensemble(init, step, compiled=False))"
        )
    names = ", ".join(f"{dim}={size}" for dim, size in sizes.items())
    return ExportError(
        f"{where}: the function fails on tensors without numbers{place}{f' at {names}' if names else ''}: "
        f"{type(error).__name__}: {_brief(error)}. It must be made of PyTorch operations, and work at every size of "
        "the dimensions in `dynamic`, each of which must be named in all inputs that have it"
    )


def _holds_fractions(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _place(error: Exception) -> str:
    """The last line of the function's own code that an error passed through."""
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_own(frame)]
    if not own:
        return ""
    file, line = own[-1][0].f_code.co_filename, own[-1][1]
    return f", at {file}:{line} ({linecache.getline(file, line).strip()})"

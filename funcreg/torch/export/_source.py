"""A graph of ATen operations as TorchScript source, with checks of its inputs."""

from __future__ import annotations

import builtins
import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..._export_errors import UnsupportedOpError
from ..._manifest import ArraySpec
from ._refusals import shares_memory
from ._sizes import Known, refusal
from ._trace import Trace

# Every input goes through this method. Inputs are made contiguous because a graph may hold strides.
PRELUDE = """
def _dtype_name(self, dtype: int) -> str:
{dtypes}
    return "dtype " + str(dtype)

def _take(
    self, inputs: Dict[str, Tensor], name: str, dtype: int, shape: List[int], text: str, device: Optional[Device]
) -> Tensor:
    if name not in inputs:
        raise ValueError("input " + name + " is missing; it must be " + text)
    x = inputs[name]
    fits = x.dtype == dtype and x.dim() == len(shape)
    if fits:
        for i in range(len(shape)):
            fits = fits and (shape[i] == -1 or x.size(i) == shape[i])
    if not fits:
        raise ValueError(
            "input " + name + " must be " + text + ", got " + self._dtype_name(x.dtype) + str(x.size())
        )
    if device is not None:
        if x.device != device:
            raise ValueError("input " + name + " is on " + str(x.device) + ", the first one on " + str(device))
    return x.contiguous()

def _check_names(self, inputs: Dict[str, Tensor], names: List[str]) -> None:
    if len(inputs) != len(names):
        for name in inputs.keys():
            if name not in names:
                raise ValueError("there is no input " + name + "; the inputs are " + ", ".join(names))
"""

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.truediv: "/",
}
_UNKNOWN = "for which this file is not known to be right; export the function with these sizes as its check_sizes"
_OF_BOOLS = ("add", "mul", "bitwise_and", "bitwise_or", "bitwise_xor", "where")
_ASSERTIONS = (torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default)
_CALLS = {torch.sym_float: "float", torch.sym_max: "max", torch.sym_min: "min"}


def prelude(dtypes: Sequence[torch.dtype]) -> str:
    """The methods that all functions of a file share."""
    lines = [f'    if dtype == {dtype}:\n        return "{str(dtype).removeprefix("torch.")}"' for dtype in dtypes]
    return PRELUDE.format(dtypes="\n".join(lines))


def method(
    where: str,
    name: str,
    trace: Trace,
    specs: Mapping[str, ArraySpec],
    refused: Mapping[str, Sequence[int]],
    known: Known,
    constant: Mapping[str, str],
) -> str:
    """The source of a method `name(inputs: Dict[str, Tensor]) -> Dict[str, Tensor]` that computes a graph.

    Args:
        where: for errors.
        name: of the method.
        trace: the graph.
        specs: dtype and shape of every input, in the order of the graph's.
        refused: for every dynamic dimension the sizes that were not checked.
        known: for which sizes the graph is right.
        constant: the graph's own constants -> the attributes of the module that hold them.

    Raises:
        UnsupportedOpError: an operation or an argument that TorchScript has no notation for.
    """
    names = {node: f"v{i}" for i, node in enumerate(trace.module.graph.nodes)}
    lines = [f"def {name}(self, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:"]
    lines += [f"    {line}" for line in _checks(where, trace, specs, refused, known, names)]
    writer = _Writer(where, names, constant)
    for node in trace.module.graph.nodes:
        # TorchScript would leave these out, since they return nothing
        if node.target in _ASSERTIONS:
            text = json.dumps(str(node.args[1]) if len(node.args) > 1 else "an assertion of the function failed")
            lines += [f"    if not bool({names[node.args[0]]}):", f"        raise ValueError({text})"]
        elif node.target is torch.ops.aten._linalg_check_errors.default:
            text = json.dumps(f"torch.{node.args[1]}: a matrix is singular, or not positive definite")
            lines += [f"    if bool({names[node.args[0]]}.any()):", f"        raise ValueError({text})"]
        elif node.op in ("call_function", "get_attr"):
            lines.append(f"    {names[node]} = {writer.expression(node)}")
    seen = list(trace.placeholders)
    pairs = []
    for output, node in zip(trace.outputs, trace.results, strict=True):
        # a result that is an input would change with it
        text = f"{names[node]}.clone()" if shares_memory(node, seen) else names[node]
        pairs.append(f'"{output}": {text}.contiguous()')
        seen.append(node)
    lines.append(f"    return {{{', '.join(pairs)}}}")
    return "\n".join(lines) + "\n"


def _checks(
    where: str,
    trace: Trace,
    specs: Mapping[str, ArraySpec],
    refused: Mapping[str, Sequence[int]],
    known: Known,
    names: Mapping[Node, str],
) -> list[str]:
    quoted = ", ".join(f'"{name}"' for name in specs)
    lines = [f"self._check_names(inputs, [{quoted}])"]
    first: dict[str, tuple[str, str]] = {}  # dimension -> its size, and the input that it is read from
    for i, (node, (name, spec)) in enumerate(zip(trace.placeholders, specs.items(), strict=True)):
        shape = [-1 if isinstance(entry, str) else entry for entry in spec.shape]
        sizes = f"torch.jit.annotate(List[int], {shape})"
        device = "device" if i else "None"
        lines.append(f'{names[node]} = self._take(inputs, "{name}", torch.{spec.dtype}, {sizes}, "{spec}", {device})')
        if i == 0:
            lines.append(f"device = {names[node]}.device")
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                continue
            size = f"{names[node]}.size({axis})"
            if dim not in first:
                first[dim] = (f"d{len(first)}", name)
                lines.append(f"{first[dim][0]} = {size}")
                for wrong in refused[dim]:
                    text = f"{dim} = {wrong} was not checked when this file was made: input {name}"
                    lines += [f"if {first[dim][0]} == {wrong}:", f'    raise ValueError("{text}")']
            else:
                text = f"{dim} must be the same in the inputs {first[dim][1]} and {name}"
                lines += [f"if {size} != {first[dim][0]}:", f'    raise ValueError("{text}")']
    variables = {dim: variable for dim, (variable, _) in first.items()}
    seen = " + ".join(f'"{dim} = " + str({variable}) + ", "' for dim, variable in variables.items())
    wrong = refusal(where, known, variables)
    if wrong:
        lines += [f"if {wrong}:", f'    raise ValueError({seen} + "{_UNKNOWN}")']
    return lines


class _Writer:
    """Nodes and their arguments as text."""

    def __init__(self, where: str, names: Mapping[Node, str], constant: Mapping[str, str]) -> None:
        self.where, self.names, self.constant = where, names, constant

    def expression(self, node: Node) -> str:
        """The right-hand side that computes a node."""
        target = node.target
        if node.op == "get_attr":
            return f"self.{self.constant[str(target)]}"
        if target is torch.ops.aten.sym_size.int:
            return f"{self.text(node.args[0])}.size({self.text(node.args[1])})"
        if isinstance(target, torch._ops.OpOverload):
            return self._operation(node, target)
        arguments = [self.text(argument) for argument in node.args]
        if target is operator.getitem:
            return f"{arguments[0]}[{arguments[1]}]"
        if target is operator.neg:
            return f"-{arguments[0]}"
        if target is torch.sym_sum:
            assert isinstance(node.args[0], (list, tuple))
            return " + ".join(map(self.text, node.args[0]))
        if target is operator.pow:
            return _power(node, *arguments)
        if target in _INFIX:
            return f"{arguments[0]} {_INFIX[target]} {arguments[1]}"
        if target in _CALLS:
            return f"{_CALLS[target]}({', '.join(arguments)})"
        raise UnsupportedOpError(
            f"{self.where}: {getattr(target, '__name__', target)} of a size cannot be written to the file; compute "
            "with + - * / // % ** on sizes, or with tensors, such as torch.ones_like(x).sum() for a count"
        )

    def _operation(self, node: Node, target: torch._ops.OpOverload) -> str:
        if not target._schema.returns:
            raise UnsupportedOpError(
                f"{self.where}: {target} returns nothing, and TorchScript leaves out what it takes for unused, here "
                "writes into a list of tensors; use the one that returns new tensors (torch._foreach_mul instead of "
                "torch._foreach_mul_), or a loop over the tensors"
            )
        types = {argument.name: str(argument.type) for argument in target._schema.arguments}
        positional = [argument.name for argument in target._schema.arguments if not argument.kwarg_only]
        given = [self.text(x, types[name]) for name, x in zip(positional, node.args, strict=False)]
        for name, x in node.kwargs.items():
            given.append(f"{name}={'device' if name == 'device' and x is not None else self.text(x, types[name])}")
        if target is torch.ops.aten._to_copy.default and not isinstance(node.args[0], Node):
            return f"torch.tensor({given[0]}, dtype={node.kwargs['dtype']}, device=device)"
        packet = target._schema.name.split("::")[1]
        if packet in _OF_BOOLS:  # to TorchScript a bool is the integer 1, and the result then has integers
            for i, x in enumerate(node.args):
                if isinstance(x, bool) and types[positional[i]] in ("number", "Tensor"):
                    given[i] = f"torch.tensor({x}, dtype=torch.bool, device=device)"
        # TorchScript adds mm(a, b) up in another order, and makes two operations of addmm; these call the same kernels
        if packet == "mm":
            packet = "matmul"
        elif packet == "addmm" and len(given) == 3 and _axes(node.args[0]) == 1:
            packet, given = "linear", [given[1], f"torch.ops.aten.t({given[2]})", given[0]]
        return f"torch.ops.aten.{packet}({', '.join(given)})"

    def text(self, x: Any, kind: str = "") -> str:
        """An argument; `kind` is its type in the schema, which decides what an empty list is a list of."""
        match x:
            case Node():
                return self.names[x]
            case bool() | None | str():
                return repr(x)
            case int():
                return str(x)
            case float():
                return repr(x) if math.isfinite(x) else f'float("{x}")'
            case torch.dtype() | torch.layout() | torch.memory_format():
                return str(x)
            case list() | tuple():
                return self._list(x, kind)
        raise UnsupportedOpError(
            f"{self.where}: a constant of the type {builtins.type(x).__name__} ({x!r:.40}) cannot be written to the "
            "file; make it an input"
        )

    def _list(self, entries: Sequence[Any], kind: str) -> str:
        inner = ", ".join(map(self.text, entries))
        if kind == "List[Optional[Tensor]]":
            return f"torch.jit.annotate(List[Optional[Tensor]], [{inner}])"
        if not entries:
            of = next((name for name in ("int", "float", "bool") if name in kind), "Tensor")
            return f"torch.jit.annotate(List[{of}], [])"
        return f"[{inner}]"


def _axes(x: Any) -> int:
    return x.meta["val"].ndim


def _power(node: Node, base: str, exponent: str) -> str:
    """A power of sizes. In TorchScript that of two integers is a float, which holds integers up to 2**53."""
    if not isinstance(node.meta["val"], torch.SymInt):
        return f"({base}) ** {exponent}"  # -2 ** n is -(2 ** n)
    if exponent.isdecimal() and 1 <= int(exponent) <= 8:
        return " * ".join([base] * int(exponent))
    return f"int(({base}) ** {exponent})"

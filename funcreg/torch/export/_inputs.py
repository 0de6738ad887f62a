"""The arguments of a function as named tensors: names, dynamic dimensions, examples of other sizes, and the call."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._export_errors import ResultError
from ..._manifest import ArraySpec
from .. import _wing

Dims = dict[int, str]  # axis -> name of the dimension
Tensors = dict[str, Tensor]
Function = Callable[[Mapping[str, Tensor]], dict[str, Any]]  # named tensors -> named tensors

# What TorchScript, safetensors and C++ hosts all know; complex numbers and 8-bit floats are not among them.
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Example arguments, taken apart into tensors by dotted name."""

    tensors: Tensors
    dims: dict[str, Dims]  # of every tensor
    rebuild: Callable[[Sequence[Any]], dict[str, Any]]  # tensors in the order of `tensors` -> arguments by name

    @property
    def sizes(self) -> dict[str, int]:
        """Name of every dynamic dimension -> its size in the example."""
        return {
            name: self.tensors[tensor].size(axis) for tensor, dims in self.dims.items() for axis, name in dims.items()
        }

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def specs(self) -> dict[str, ArraySpec]:
        specs = {}
        for name, x in self.tensors.items():
            shape = tuple(self.dims[name].get(axis, size) for axis, size in enumerate(x.shape))
            specs[name] = ArraySpec(dtype_name(x.dtype), shape)
        return specs

    def resized(self, sizes: Mapping[str, int]) -> Tensors:
        """New tensors, the example's entries repeated or left out along the dynamic dimensions.

        The repeats of floating-point entries are scaled: were they equal, a mean over the first few would be that over
        all.
        """
        new = {}
        for name, x in self.tensors.items():
            for axis, dim in self.dims[name].items():
                index = torch.arange(sizes[dim], device=x.device)
                length = x.size(axis)
                x = x.index_select(axis, index % length)
                if x.is_floating_point():
                    scale = 1 + (index // length) / 4
                    x = x * scale.to(x.dtype).reshape([-1] + [1] * (x.ndim - 1 - axis))
            new[name] = x.clone(memory_format=torch.contiguous_format)
        return new


@dataclass(frozen=True)
class Method:
    """A function to be exported, and example inputs for it."""

    run: Function
    inputs: Inputs


def take_apart(where: str, example: Any, dynamic: Mapping[str, Mapping[int, str]]) -> Inputs:
    """The example's tensors by dotted name, with their dynamic dimensions."""
    if not isinstance(example, Mapping) or not example:
        raise TypeError(
            f"{where}: example must be a dict of the function's arguments by name, such as "
            f"{{'params': params, 'x': x}}, got {repr(example)[:60]}"
        )
    paths, leaves, unflatten = _wing.paths_and_leaves(dict(example))
    names = [".".join(path) for path in paths]
    tensors: Tensors = {}
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is None:
            continue
        _check_name(where, "example", name, tensors)
        tensors[name] = _check_leaf(where, name, leaf)
    if not tensors:
        raise ValueError(f"{where}: example has no tensors, and so the file would have no inputs")
    devices = {x.device: name for name, x in tensors.items()}
    if len(devices) > 1:
        first, second = list(devices)[:2]
        raise ValueError(
            f"{where}: {devices[first]!r} is on {first} and {devices[second]!r} on {second}; a file works on one "
            "device: move all of the example there"
        )

    def rebuild(new: Sequence[Any]) -> dict[str, Any]:
        given = iter(new)
        return unflatten([None if leaf is None else next(given) for leaf in leaves])

    inputs = Inputs(tensors, _dims(where, tensors, dynamic), rebuild)
    _check_sizes(where, inputs)
    return inputs


def flatten_outputs(where: str, result: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """What a function returned, by dotted name; a single tensor is called `output`.

    Args:
        where: for errors.
        result: a tensor or a tree of tensors.
        names: for the components of a tuple, instead of "0", "1", ...
    """
    if names is not None:
        if len(set(names)) < len(names):
            raise ValueError(f"{where}: outputs must be different names, got {tuple(names)}")
        if not isinstance(result, (tuple, list)) or len(result) != len(names):
            got = f"{len(result)} components" if isinstance(result, (tuple, list)) else type(result).__name__
            raise ResultError(f"{where}: outputs names {len(names)} components of a tuple, the function returned {got}")
        result = dict(zip(names, result, strict=True))
    paths, leaves, _ = _wing.paths_and_leaves(result)
    flat: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        name = ".".join(path) or "output"
        if leaf is None:
            continue
        _check_name(where, "the result", name, flat)
        if not isinstance(leaf, Tensor):
            raise ResultError(
                f"{where}: the function returns {leaf!r:.60} as {name!r}, and a file can return tensors only; "
                "leave it out, or make it a tensor of what it is computed from"
            )
        if leaf.dtype not in DTYPES:
            raise ResultError(f"{where}: the output {name!r} is {leaf.dtype}; {_ALLOWED}")
        flat[name] = leaf
    if not flat:
        raise ResultError(f"{where}: the function returns no tensor")
    return flat


def caller(where: str, function: Callable[..., Any], names: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    """How to call a function with arguments by name; those without a parameter go to its `*args`, in order."""
    if not callable(function):
        raise TypeError(f"{where}: fn must be a function, got {type(function).__name__}")
    if isinstance(function, torch.nn.Module):
        raise TypeError(
            f"{where}: fn is an nn.Module, whose parameters would be frozen into the file; pass a function "
            "params, x -> torch.func.functional_call(module, params, x), and its parameters in the example"
        )
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
    # by position, since torch.func.grad and vmap take nothing else; parameters after a default that is kept, by keyword
    kept = next((i for i, p in enumerate(named) if p.name not in names), len(named))
    first = [p.name for p in named[:kept]]
    keywords += [p.name for p in named[kept:] if p.name in names]
    if extra and kept < len(named):
        raise TypeError(f"{where}: example must have {named[kept].name!r} too, since {extra[0]!r} comes after it")

    def call(arguments: Mapping[str, Any]) -> Any:
        return function(*(arguments[n] for n in (*first, *extra)), **{n: arguments[n] for n in keywords})

    return call


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_ALLOWED = "files hold " + ", ".join(map(dtype_name, DTYPES))


def _check_name(where: str, what: str, name: str, seen: Mapping[str, Any]) -> None:
    if name in seen:
        raise ValueError(f"{where}: {what} has two leaves of the name {name!r}; rename one of them")
    if not re.fullmatch(r"[ -~]+", name) or any(char in name for char in "'\"\\{}"):
        raise ValueError(
            f"{where}: {what} has a leaf of the name {name!r}; names in a file are printable ASCII without quotes, "
            "braces and backslashes: rename it"
        )


def _check_leaf(where: str, name: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        remedy = f"make it an input, torch.tensor({leaf!r})" if isinstance(leaf, (bool, int, float)) else "leave it out"
        raise TypeError(
            f"{where}: {name!r} is {leaf!r:.60}, which would be frozen into the file; {remedy}, or bind it to the "
            "function with functools.partial if it never changes"
        )
    if leaf.dtype not in DTYPES:
        raise TypeError(f"{where}: {name!r} is {leaf.dtype}; {_ALLOWED}")
    if leaf.layout != torch.strided or leaf.is_quantized or type(leaf) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{where}: {name!r} must be a plain dense tensor, got {type(leaf).__name__}, {leaf.layout}")
    return leaf.detach()


def _dims(where: str, tensors: Tensors, dynamic: Mapping[str, Mapping[int, str]]) -> dict[str, Dims]:
    """The dynamic dimensions of every tensor, from those of names and of whole arguments."""
    if not isinstance(dynamic, Mapping):
        raise TypeError(
            f"{where}: dynamic must be a dict such as {{'x': {{0: 'batch'}}}}, or {{}} if every size is fixed, got "
            f"{dynamic!r}"
        )
    dims: dict[str, Dims] = {name: {} for name in tensors}
    for given, axes in dynamic.items():
        matching = [name for name in tensors if name == given or name.startswith(f"{given}.")]
        if not matching:
            near = difflib.get_close_matches(str(given), tensors, n=3, cutoff=0.0)
            raise ValueError(f"{where}: dynamic names {given!r}, which is not in the example; it has {', '.join(near)}")
        if not isinstance(axes, Mapping):
            raise TypeError(f"{where}: dynamic[{given!r}] must be a dict of axes such as {{0: 'batch'}}, got {axes!r}")
        for axis, dim in axes.items():
            if not (isinstance(dim, str) and dim.isidentifier() and dim.isascii()):
                raise ValueError(f"{where}: dynamic[{given!r}][{axis!r}] must be a name such as 'batch', got {dim!r}")
            for name in matching:
                dims[name][_axis(where, name, tensors[name], axis)] = dim
    return dims


def _axis(where: str, name: str, x: Tensor, axis: Any) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{where}: dynamic: {name!r} of shape {tuple(x.shape)} has no axis {axis!r}")
    return axis % x.ndim


def _check_sizes(where: str, inputs: Inputs) -> None:
    first: dict[str, tuple[str, int]] = {}
    for name, dims in inputs.dims.items():
        for axis, dim in dims.items():
            size = inputs.tensors[name].size(axis)
            other, expected = first.setdefault(dim, (name, size))
            if size != expected:
                raise ValueError(
                    f"{where}: the dimension {dim!r} is {expected} in {other!r} and {size} in {name!r}; give them one "
                    "size, or two names"
                )
            if size < 2:
                raise ValueError(
                    f"{where}: the dimension {dim!r} is {size} in {name!r}; give an example of 2 or more: sizes 0 and "
                    "1 are special cases, from which the others cannot be told"
                )

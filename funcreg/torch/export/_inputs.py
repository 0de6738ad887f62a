"""The arguments of a function as named tensors: names, dynamic dimensions, examples of other sizes, and the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._export_errors import ResultError
from ..._export_names import caller as by_name
from ..._export_names import check_name, components
from ..._export_sizes import Dims, described, dims_of, sizes_of
from ..._manifest import ArraySpec
from .. import _wing

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
    dims: Dims  # of every tensor
    rebuild: Callable[[Sequence[Any]], dict[str, Any]]  # tensors in the order of `tensors` -> arguments by name

    @property
    def sizes(self) -> dict[str, int]:
        """Name of every dynamic dimension -> its size in the example."""
        return sizes_of(self.tensors, self.dims)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def specs(self) -> dict[str, ArraySpec]:
        return {name: described(name, dtype_name(x.dtype), x.shape, self.dims) for name, x in self.tensors.items()}

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
        check_name(where, "example", name, tensors)
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

    return Inputs(tensors, dims_of(where, tensors, dynamic), rebuild)


def flatten_outputs(where: str, result: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """What a function returned, by dotted name; a single tensor is called `output`.

    Args:
        where: for errors.
        result: a tensor or a tree of tensors.
        names: for the components of a tuple, instead of "0", "1", ...
    """
    paths, leaves, _ = _wing.paths_and_leaves(components(where, result, names))
    flat: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        name = ".".join(path) or "output"
        if leaf is None:
            continue
        check_name(where, "the result", name, flat)
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
    return by_name(where, function, names)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_ALLOWED = "files hold " + ", ".join(map(dtype_name, DTYPES))


def _check_leaf(where: str, name: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        remedy = "leave it out"
        if isinstance(leaf, (bool, int, float)):
            remedy = f"make it an input, torch.tensor({leaf!r})"
        elif dataclasses.is_dataclass(leaf):
            remedy = f"make it a tree, torch.export.register_dataclass({type(leaf).__name__}), or pass a dict"
        raise TypeError(
            f"{where}: {name!r} is {leaf!r:.60}, which would be frozen into the file; {remedy}, or bind it to the "
            "function with functools.partial if it never changes"
        )
    if leaf.dtype not in DTYPES:
        raise TypeError(f"{where}: {name!r} is {leaf.dtype}; {_ALLOWED}")
    if leaf.layout != torch.strided or leaf.is_quantized or type(leaf) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{where}: {name!r} must be a plain dense tensor, got {type(leaf).__name__}, {leaf.layout}")
    return leaf.detach()

"""Dynamic dimensions of an exported function: which axes they are, their sizes, and what a caller gives. No
framework."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ._manifest import ArraySpec, Manifest

Dims = dict[str, dict[int, str]]  # name of an array -> axis -> name of the dimension
Sizes = dict[str, int]  # name of a dimension -> its size


def dims_of(where: str, arrays: Mapping[str, Any], dynamic: Mapping[str, Mapping[int, str]]) -> Dims:
    """The dynamic dimensions of every array, from those of names and of whole arguments.

    Raises:
        TypeError, ValueError: a name that is not there, an axis that an array has not, no name of a dimension; or sizes
            in the example that differ, or are less than 2.
    """
    if not isinstance(dynamic, Mapping):
        raise TypeError(
            f"{where}: dynamic must be a dict such as {{'x': {{0: 'batch'}}}}, or {{}} if every size is fixed, got "
            f"{dynamic!r}"
        )
    dims: Dims = {name: {} for name in arrays}
    for given, axes in dynamic.items():
        matching = [name for name in arrays if name == given or name.startswith(f"{given}.")]
        if not matching:
            near = difflib.get_close_matches(str(given), arrays, n=3, cutoff=0.0)
            raise ValueError(
                f"{where}: dynamic names {given!r}, which is not in the example; nearest names: {', '.join(near)}"
            )
        if not isinstance(axes, Mapping):
            raise TypeError(f"{where}: dynamic[{given!r}] must be a dict of axes such as {{0: 'batch'}}, got {axes!r}")
        for axis, dim in axes.items():
            if not (isinstance(dim, str) and dim.isidentifier() and dim.isascii()):
                raise ValueError(f"{where}: dynamic[{given!r}][{axis!r}] must be a name such as 'batch', got {dim!r}")
            for name in matching:
                dims[name][_axis(where, name, arrays[name].shape, axis)] = dim
    _check_example(where, arrays, dims)
    return dims


def _axis(where: str, name: str, shape: Sequence[int], axis: Any) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise ValueError(f"{where}: dynamic: {name!r} of shape {tuple(shape)} has no axis {axis!r}")
    return axis % len(shape)


def _check_example(where: str, arrays: Mapping[str, Any], dims: Dims) -> None:
    first: dict[str, tuple[str, int]] = {}
    for name, axes in dims.items():
        for axis, dim in axes.items():
            size = arrays[name].shape[axis]
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


def sizes_of(arrays: Mapping[str, Any], dims: Dims) -> Sizes:
    """The size of every dynamic dimension."""
    return {dim: arrays[name].shape[axis] for name, axes in dims.items() for axis, dim in axes.items()}


def described(name: str, dtype: str, shape: Sequence[int], dims: Dims) -> ArraySpec:
    """An array of the example, its dynamic dimensions by name."""
    return ArraySpec(dtype, tuple(dims[name].get(axis, size) for axis, size in enumerate(shape)))


def to_check(where: str, check_sizes: Sequence[int], least: int = 0) -> tuple[int, ...]:
    """The option `check_sizes`, checked."""
    sizes = tuple(check_sizes)
    wrong = [n for n in sizes if isinstance(n, bool) or not isinstance(n, int) or n < least]
    if wrong or not sizes:
        raise ValueError(f"{where}: check_sizes must be integers >= {least}, one at least, got {check_sizes!r}")
    return sizes


def combinations(example: Sizes, check_sizes: Sequence[int]) -> list[Sizes]:
    """Sizes of all dimensions: those of the example; every size for all; and different ones, in turn.

    And the sizes 0 and 1, special cases that tracing tells nothing of, of some dimensions with the example's of the
    others.
    """
    dims, n = list(example), len(check_sizes)
    cases = [dict(example)]
    if dims:
        cases += [dict.fromkeys(dims, size) for size in check_sizes]
        cases += [{dim: check_sizes[(i + k) % n] for k, dim in enumerate(dims)} for i in range(n)]
        special = [size for size in (0, 1) if size in check_sizes]
        choices = itertools.product(*([*special, example[dim]] for dim in dims))
        cases += [dict(zip(dims, choice, strict=True)) for choice in choices]
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def check_given(manifest: Manifest, method: str, given: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Hold what a caller gives, dtype and shape by name, against the manifest.

    Raises:
        ValueError: in the words of the files that check their inputs themselves.
    """
    inputs = manifest.methods[method].inputs
    sizes: dict[str, tuple[int, str]] = {}
    for name in given:
        if name not in inputs:
            raise ValueError(f"there is no input {name}; the inputs are {', '.join(inputs)}")
    for name, spec in inputs.items():
        if name not in given:
            raise ValueError(f"input {name} is missing; it must be {spec}")
        dtype, shape = given[name]
        fits = dtype == spec.dtype and len(shape) == len(spec.shape)
        if not fits or any(isinstance(n, int) and n != size for n, size in zip(spec.shape, shape, strict=True)):
            raise ValueError(f"input {name} must be {spec}, got {ArraySpec(dtype, tuple(shape))}")
        for dim, size in zip(spec.shape, shape, strict=True):
            if isinstance(dim, int):
                continue
            expected, other = sizes.setdefault(dim, (size, name))
            if size != expected:
                raise ValueError(f"{dim} must be the same in the inputs {other} and {name}")
            if size in manifest.sizes[dim]["refused"]:
                raise ValueError(f"{dim} = {size} was not checked when this file was made: input {name}")

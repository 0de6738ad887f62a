"""The arguments of a function as named arrays: dtypes, dynamic dimensions, examples of other sizes; and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._export_errors import ResultError
from ..._export_names import check_name, components
from ..._export_sizes import Dims, Sizes, described, dims_of, sizes_of
from ..._manifest import DTYPES, ArraySpec
from .. import _wing

Arrays = dict[str, np.ndarray]

_ALLOWED = f"files hold {', '.join(DTYPES)}"


@dataclass(frozen=True)
class Inputs:
    """Example arguments, taken apart into arrays by dotted name."""

    arrays: Arrays
    dims: Dims
    rebuild: Callable[[Mapping[str, Any]], dict[str, Any]]  # arrays by name -> arguments by name

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.arrays, self.dims)

    def specs(self) -> dict[str, ArraySpec]:
        return {name: described(name, x.dtype.name, x.shape, self.dims) for name, x in self.arrays.items()}

    def resized(self, sizes: Sizes) -> Arrays:
        """New arrays, the example's entries repeated or left out along the dynamic dimensions."""
        new = {}
        for name, x in self.arrays.items():
            for axis, dim in self.dims[name].items():
                x = x.take(np.arange(sizes[dim]) % x.shape[axis], axis)
            new[name] = x.copy()
        return new


def take_apart(where: str, example: Any, dynamic: Mapping[str, Mapping[int, str]]) -> Inputs:
    """The example's arrays by dotted name, with their dynamic dimensions."""
    if not isinstance(example, Mapping) or not example:
        got = "an empty one" if isinstance(example, Mapping) else repr(example)[:60]
        raise TypeError(
            f"{where}: example must be a dict of the function's arguments by name, such as "
            f"{{'params': params, 'x': x}}, got {got}"
        )
    paths, leaves, unflatten = _wing.paths_and_leaves(dict(example))
    names = [".".join(path) for path in paths]
    arrays: Arrays = {}
    for name, leaf in zip(names, leaves, strict=True):
        check_name(where, "example", name, arrays)
        arrays[name] = _checked(where, name, leaf)
    if not arrays:
        raise ValueError(f"{where}: example has no arrays, and so the file would have no inputs")
    return Inputs(arrays, dims_of(where, arrays, dynamic), lambda new: unflatten([new[name] for name in names]))


def _checked(where: str, name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{where}: {name!r} is a typed PRNG key, which no file can hold; pass jax.random.key_data(key), and let "
            "the function call jax.random.wrap_key_data"
        )
    if not isinstance(leaf, jax.Array | np.ndarray):
        number = isinstance(leaf, (bool, int, float, np.generic))
        remedy = f"make it an input, jnp.asarray({leaf!r})" if number else "leave it out"
        raise TypeError(
            f"{where}: {name!r} is {leaf!r:.60}, which would be frozen into the file; {remedy}, or bind it to the "
            "function with functools.partial if it never changes"
        )
    if leaf.dtype.name not in DTYPES:
        raise TypeError(f"{where}: {name!r} is {leaf.dtype}; {_ALLOWED}")
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise TypeError(
            f"{where}: {name!r} is {leaf.dtype}, which JAX without x64 narrows; convert it, or export inside "
            "jax.enable_x64(True)"
        )
    return np.asarray(leaf)


def spec_of(aval: Any) -> ArraySpec:
    """Dtype and shape of an argument or result of an exported program."""
    return ArraySpec(aval.dtype.name, tuple(n if isinstance(n, int) else str(n) for n in aval.shape))


def flatten_outputs(where: str, result: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """What a function returned, by dotted name; a single array is called `output`."""
    paths, leaves, _ = _wing.paths_and_leaves(components(where, result, names))
    flat: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        name = ".".join(path) or "output"
        check_name(where, "the result", name, flat)
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ResultError(
                f"{where}: the function returns {leaf!r:.60} as {name!r}, and a file can return arrays only; leave it "
                "out, or make it an array of what it is computed from"
            )
        if leaf.dtype.name not in DTYPES:
            raise ResultError(f"{where}: the output {name!r} is {leaf.dtype}; {_ALLOWED}")
        flat[name] = leaf
    if not flat:
        raise ResultError(f"{where}: the function returns no array")
    return flat

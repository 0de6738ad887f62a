"""What a function computes in a lower precision although its inputs are float64: hard-coded dtypes.

Such a function rounds to float32 (or less) also in the float64 run, where that looks like a fault.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import arrays
from ._refusals import TO_NUMPY

Seen = dict[str, str]  # by dtype, the first operation that returns it, or the constant that is of it
LARGEST = 2**20  # numbers of a constant that are looked at


def resolution(dtype: str) -> float:
    """The relative spacing of a dtype's numbers."""
    return float(jax.numpy.finfo(dtype).eps)


def is_coarse(dtype: Any) -> bool:
    """Floats and complex numbers of less than 64 bits a number; ml_dtypes' floats are of NumPy's kind V."""
    return dtype.kind in "fV" and dtype.itemsize < 8 or dtype == np.complex64


def rounded_to_float32(x: Any) -> bool:
    """Whether a constant was rounded to float32, or less, on its way here, whatever its dtype is now.

    0.1 as float32 is still that number as float64. A number of few digits, such as 0.5 or -1e9 (a whole one), is the
    same in every precision and tells nothing; of others, one in 2**29 is a number of float32 by chance.
    """
    if not isinstance(getattr(x, "dtype", np.dtype(np.float64)), np.dtype):  # a key of JAX's generator
        return False
    numbers = np.asarray(x).reshape(-1)[:LARGEST]
    if numbers.dtype.kind not in "fcV":
        return False
    wide = numbers.astype(np.complex128 if numbers.dtype.kind == "c" else np.float64).view(np.float64)
    wide = wide[np.isfinite(wide)]
    bits = wide.view(np.uint64) & np.uint64(2**52 - 1)
    whole = wide == np.rint(wide)
    return bool(((bits % (1 << 29) == 0) | whole).all() and ((bits % (1 << 36) != 0) & ~whole).any())


class Watch(TorchDispatchMode):
    """Notes the operations of PyTorch that return something of a lower precision, or read constants of one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype in TO_NUMPY and is_coarse(TO_NUMPY[x.dtype]):
                self.seen.setdefault(TO_NUMPY[x.dtype].name, _name(func))
        if "float32" not in self.seen and any(map(_is_constant, pytree.tree_leaves((args, kwargs)))):
            self.seen["float32"] = f"a constant in {_name(func)}"
        return result


def _name(func: Any) -> str:
    return str(func.overloadpacket).removeprefix("aten.")


def _is_constant(x: Any) -> bool:
    """A number, or a tensor of float32 itself: those that the function was given are of float64."""
    if isinstance(x, torch.Tensor):
        return x.dtype in (torch.float32, torch.complex64) and rounded_to_float32(arrays.to_host(x))
    return isinstance(x, float) and rounded_to_float32(x)


def of_jax(function: Callable[..., Any], args: tuple[Any, ...]) -> Seen:
    """The same of a function of JAX, read from its trace; nothing where it cannot be traced."""
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}  # numbers stay numbers

    def of_arrays(*traced: jax.Array) -> Any:
        new = dict(zip(arrays, traced, strict=True))
        return function(*treedef.unflatten([new.get(i, x) for i, x in enumerate(leaves)]))

    try:
        jaxpr = jax.make_jaxpr(of_arrays)(*arrays.values())
    except Exception:  # a function that JAX cannot trace, with `float(x)` or NumPy in it, may still be called
        return {}
    seen: Seen = {}
    for name, dtype in _operations(jaxpr.jaxpr):
        if is_coarse(dtype):
            seen.setdefault(dtype.name, name)
    if "float32" not in seen and any(map(rounded_to_float32, _constants(jaxpr))):
        seen["float32"] = "a constant"
    return seen


def _constants(jaxpr: Any) -> Iterator[Any]:
    """What a traced function holds of its own: arrays that it closes over, and numbers in its text."""
    yield from getattr(jaxpr, "consts", ())
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for inner in _inner(tuple(equation.params.values()), closed=True):
            yield from _constants(inner)


def _operations(jaxpr: Any) -> Iterator[tuple[str, np.dtype[Any]]]:
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            if isinstance(getattr(out.aval, "dtype", None), np.dtype):
                yield equation.primitive.name, out.aval.dtype
        for inner in _inner(tuple(equation.params.values())):
            yield from _operations(inner)


def _inner(value: Any, closed: bool = False) -> Iterator[Any]:
    """The programs inside an operation, such as the body of a loop; `closed` together with their constants."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _inner(item, closed)
    elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield value if closed or not hasattr(value, "jaxpr") else value.jaxpr

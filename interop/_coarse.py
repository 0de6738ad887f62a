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

from ._refusals import TO_NUMPY

Seen = dict[str, str]  # by dtype, the first operation that returns it


def resolution(dtype: str) -> float:
    """The relative spacing of a dtype's numbers."""
    return float(jax.numpy.finfo(dtype).eps)


def is_coarse(dtype: Any) -> bool:
    """Floats and complex numbers of less than 64 bits a number; ml_dtypes' floats are of NumPy's kind V."""
    return dtype.kind in "fV" and dtype.itemsize < 8 or dtype == np.complex64


class Watch(TorchDispatchMode):
    """Notes the operations of PyTorch that return something of a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype in TO_NUMPY and is_coarse(TO_NUMPY[x.dtype]):
                self.seen.setdefault(TO_NUMPY[x.dtype].name, str(func.overloadpacket).removeprefix("aten."))
        return result


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
    return seen


def _operations(jaxpr: Any) -> Iterator[tuple[str, np.dtype[Any]]]:
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            if isinstance(getattr(out.aval, "dtype", None), np.dtype):
                yield equation.primitive.name, out.aval.dtype
        for inner in _inner(tuple(equation.params.values())):
            yield from _operations(inner)


def _inner(value: Any) -> Iterator[Any]:
    """The programs inside an operation, such as the body of a loop."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _inner(item)
    elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield value if hasattr(value, "eqns") else value.jaxpr

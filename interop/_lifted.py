"""The same function with its casts from float64 to float32 left out: what it would compute in float64.

Much code casts to float32 by itself, whatever it is given: norms and softmaxes of language models,
`jax.nn.dot_product_attention`, layers of `flax.nnx` whose dtype was fixed when they were made. In float32 that changes
nothing, but in the float64 run its rounding looks like a fault; without the casts there is none. Constants of float32
stay what they are, and so do casts to lower precisions still, which round in float32 as well.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Any]
_NARROW = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where an operation holds a program that it only calls
_OPERATIONS = {"jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


# --- PyTorch ---


class _Lift(TorchDispatchMode):
    """Operations that are told to make float32 of the float64 they are given return that."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = dict(kwargs or {})
        wide = any(isinstance(x, torch.Tensor) and x.dtype in _NARROW.values() for x in pytree.tree_leaves(args))
        if wide and kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = _NARROW[kwargs["dtype"]]
        return func(*args, **kwargs)


def of_torch(function: Function) -> Function:
    def lifted(*args: Any) -> Any:
        with _Lift():
            return function(*args)

    return lifted


# --- JAX ---


def of_jax(function: Function) -> Function:
    """The function traced, and its operations done anew; one that JAX cannot trace raises."""

    def lifted(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}  # numbers stay numbers

        def of_arrays(*traced: jax.Array) -> Any:
            new = dict(zip(arrays, traced, strict=True))
            return function(*treedef.unflatten([new.get(i, x) for i, x in enumerate(leaves)]))

        program, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays.values())
        results = jax.jit(lambda *given: _run(program.jaxpr, program.consts, given))(*arrays.values())
        return jax.tree.structure(shapes).unflatten(results)

    return lifted


def _run(jaxpr: Any, consts: Iterable[Any], args: Iterable[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for equation in jaxpr.eqns:
        found = _done(jaxpr, equation, [read(x) for x in equation.invars])
        values.update(zip(equation.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _done(jaxpr: Any, equation: Any, given: list[Any]) -> Sequence[Any]:
    """The results of one operation of a program, where what it is given may be wider than it was.

    Loops and branches, but for `scan`, are done as they were.
    """
    name, params = equation.primitive.name, equation.params
    if name == "convert_element_type" and _dtype(given[0]) == _wide_of(params["new_dtype"]):
        return given
    if name in _OPERATIONS:
        inner = next(params[key] for key in _CALLS if key in params)
        closed = isinstance(inner, ClosedJaxpr)
        return _run(inner.jaxpr if closed else inner, inner.consts if closed else (), given)
    if name == "scan":
        return _scanned(params, given)
    is_wider = any(_dtype(x) != v.aval.dtype for x, v in zip(given, equation.invars, strict=True))
    if not is_wider or any(map(_is_program, jax.tree.leaves(params, is_leaf=_is_program))):
        inputs = [v for v in equation.invars if not isinstance(v, Literal)]
        alone = jaxpr.replace(constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation])
        known = [_as(x, v.aval) for x, v in zip(given, equation.invars, strict=True) if not isinstance(v, Literal)]
        return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*known)
    params = {key: (_wide_of(x) or x) if _is_dtype(x) else x for key, x in params.items()}
    found = equation.primitive.bind(*map(_widened, given), **params)
    return found if equation.primitive.multiple_results else [found]


def _scanned(params: dict[str, Any], given: list[Any]) -> Sequence[Any]:
    body, first, second = params["jaxpr"], params["num_consts"], params["num_consts"] + params["num_carry"]

    def step(carry: Any, x: Any) -> Any:
        found = _run(body.jaxpr, body.consts, (*given[:first], *carry, *x))
        carried = found[: len(carry)]
        return tuple(c.astype(before.dtype) for c, before in zip(carried, carry, strict=True)), found[len(carry) :]

    carry = tuple(map(jax.numpy.asarray, map(_widened, given[first:second])))
    last, ys = lax.scan(step, carry, given[second:], length=params["length"], reverse=params["reverse"])
    return [*last, *ys]


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _is_dtype(x: Any) -> bool:
    return isinstance(x, np.dtype) or isinstance(x, type) and issubclass(x, np.generic)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _wide_of(dtype: Any) -> np.dtype[Any] | None:
    """What float32 is without the cast; None of any other dtype, such as those of keys."""
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype)
    wide = {"float32": np.float64, "complex64": np.complex128}.get(name)
    return None if wide is None else np.dtype(wide)


def _widened(x: Any) -> Any:
    wide = _wide_of(_dtype(x))
    return x if wide is None else lax.convert_element_type(x, wide)


def _as(x: Any, aval: Any) -> Any:
    return lax.convert_element_type(x, aval.dtype) if _dtype(x) != aval.dtype else x

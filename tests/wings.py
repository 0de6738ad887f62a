"""The two wings behind one set of names: a property is written once and holds on both.

@each_wing
def test_value_is_zero_at_zero(wing):
    with wing.precision("float64"):
        params = wing.array({"w": np.zeros((2, 3))}, "float64")
        assert wing.numpy(wing.fr.l1(0.1).value(params)) == 0
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import funcreg.jax
import funcreg.torch

with warnings.catch_warnings():
    # When torch's forward mode is first used, torch itself calls torch.jit.script, which it has deprecated.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


@contextmanager
def inductor() -> Iterator[None]:
    """torch.compile to machine code: what its inductor imports is deprecated by torch itself."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", DeprecationWarning)
        yield


@dataclass(frozen=True)
class Wing:
    """What a test needs from one framework. Transforms are the framework's own, their `in_axes` as in JAX."""

    name: str  # "torch" or "jax"
    fr: ModuleType
    leaf: Callable[[np.ndarray, str], Any]
    leaf_numpy: Callable[[Any], np.ndarray]
    grad: Callable[..., Callable[..., Any]]
    value_and_grad: Callable[..., Callable[..., Any]]
    vmap: Callable[..., Callable[..., Any]]
    hessian: Callable[..., Callable[..., Any]]
    jacfwd: Callable[..., Callable[..., Any]]
    jacrev: Callable[..., Callable[..., Any]]
    jit: Callable[..., Callable[..., Any]]  # jax.jit; torch.compile(fullgraph=True, backend="aot_eager")
    quick: Callable[..., Callable[..., Any]]  # the fastest way to run a function a few times: jax.jit; torch: as it is
    precision: Callable[[str], AbstractContextManager[Any]]  # float64 exists only inside `precision("float64")`
    layout: Mapping[str, int]  # of a dense kernel: the axis that counts outputs, and the one that counts inputs

    def array(self, tree: Any, dtype: str = "float32") -> Any:
        """Dicts, lists and tuples of NumPy arrays as the same of this wing's arrays; a list of numbers is one array."""
        if isinstance(tree, dict):
            return {key: self.array(value, dtype) for key, value in tree.items()}
        if isinstance(tree, list | tuple) and not (tree and all(isinstance(value, int | float) for value in tree)):
            return type(tree)(self.array(value, dtype) for value in tree)
        return self.leaf(np.asarray(tree), dtype)

    def numpy(self, tree: Any) -> Any:
        """The way back, to NumPy arrays; half precision comes as float32, which holds it exactly."""
        if isinstance(tree, dict):
            return {key: self.numpy(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.numpy(value) for value in tree)
        return self.leaf_numpy(tree)

    def __str__(self) -> str:
        return self.name


def dtype_name(x: Any) -> str:
    """`float32` of either framework's or NumPy's array."""
    return str(x.dtype).removeprefix("torch.")


def _torch_leaf(x: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.tensor(x, dtype=getattr(torch, dtype))


def _torch_numpy(x: torch.Tensor) -> np.ndarray:
    # force: a derivative that torch knows to be zero comes as a ZeroTensor, which has no memory
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy(force=True)


def _torch_vmap(function: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0) -> Callable[..., Any]:
    return torch.func.vmap(function, in_dims=in_axes, out_dims=out_axes)


def _torch_value_and_grad(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """(value, gradient), as JAX orders them."""

    def both(*args: Any) -> tuple[Any, Any]:
        gradient, value = torch.func.grad_and_value(function, **options)(*args)
        return value, gradient

    return both


def _jax_leaf(x: np.ndarray, dtype: str) -> jax.Array:
    array = jnp.asarray(x, getattr(jnp, dtype))
    assert dtype_name(array) == dtype, f"{dtype} needs `with wing.precision({dtype!r})`"
    return array


def _jax_numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x)


TORCH = Wing(
    "torch",
    funcreg.torch,
    _torch_leaf,
    _torch_numpy,
    torch.func.grad,
    _torch_value_and_grad,
    _torch_vmap,
    torch.func.hessian,
    torch.func.jacfwd,
    torch.func.jacrev,
    lambda function: torch.compile(function, fullgraph=True, backend="aot_eager"),
    lambda function: function,
    lambda dtype: nullcontext(),
    {"output": 0, "input": 1},  # nn.Linear and nn.Conv: (out, in, ...)
)
JAX = Wing(
    "jax",
    funcreg.jax,
    _jax_leaf,
    _jax_numpy,
    jax.grad,
    jax.value_and_grad,
    jax.vmap,
    jax.hessian,
    jax.jacfwd,
    jax.jacrev,
    jax.jit,
    jax.jit,
    lambda dtype: jax.enable_x64(dtype == "float64"),
    {"output": -1, "input": -2},  # flax Dense and Conv: (..., in, out)
)
WINGS = (TORCH, JAX)

each_wing = pytest.mark.parametrize("wing", WINGS, ids=str)

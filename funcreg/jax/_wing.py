"""What the bookkeeping needs from JAX, and Penalty as a JAX pytree. The only file that knows pytrees."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, tree_util
from jax.typing import ArrayLike

from .. import _penalty
from .._selectors import leaf_name
from .._trees import Flat

Params = Any  # any pytree of arrays: linen variables, nnx states, equinox modules, dicts
Strength = ArrayLike


def flatten(tree: Params, scalars: bool = False) -> Flat:
    """Take a tree apart; what is no floating-point array, and every nnx Variable that is no Param, is passed over.

    Args:
        tree: any pytree.
        scalars: also keep Python numbers and bools (trees of step sizes, importances, selectors).

    Raises:
        TypeError: a container that JAX's pytrees do not know, or an array of another library.
    """
    _refuse_linen("params", tree)
    paths, leaves, unflatten = paths_and_leaves(tree)
    is_param = [
        not _is_variable(node) or isinstance(node, sys.modules["flax.nnx"].Param)
        for node in jax.tree.leaves(tree, is_leaf=_is_variable)
        for _ in jax.tree.leaves(node)
    ]
    collection = any(len(path) > 1 and path[0] == "params" for path in paths) or (
        isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)  # also an empty one
    )
    chosen = []
    passed_over = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        kept = isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        kept = kept or (scalars and isinstance(leaf, bool | int | float | np.generic | np.ndarray | jax.Array))
        if not kept:
            _refuse_opaque(".".join(path), leaf)
        if kept and is_param[i] and (not collection or (len(path) > 1 and path[0] == "params")):
            chosen.append(i)
        else:
            passed_over.append((leaf_name(path), leaf))

    def rebuild(new: list[Any], others: Callable[[Any], Any] = lambda leaf: leaf) -> Params:
        by_index = dict(zip(chosen, new, strict=True))
        return unflatten([by_index[i] if i in by_index else others(leaf) for i, leaf in enumerate(leaves)])

    return Flat(
        [leaf_name(paths[i]) for i in chosen],
        [leaves[i] for i in chosen],
        rebuild,
        lambda new: rebuild(new, _zero),
        passed_over,
    )


def paths_and_leaves(tree: Any) -> tuple[list[list[str]], list[Any], Callable[[list[Any]], Any]]:
    """Every leaf with the components of its path, and the way back to the tree; an nnx Variable adds no component."""
    nodes, _ = tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    paths: list[list[str]] = []
    for path, node in nodes:  # a Variable is one node here and holds its leaves, mostly one
        paths += [[_component(key) for key in path]] * len(jax.tree.leaves(node))
    leaves, treedef = jax.tree.flatten(tree)
    return paths, leaves, lambda new: jax.tree.unflatten(treedef, new)


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # a Variable can only be there if its user has imported flax
    return nnx is not None and isinstance(node, nnx.Variable)


def _component(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _refuse_linen(where: str, tree: Any) -> None:
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(tree, linen.Module):
        raise TypeError(
            f"{where}: got the linen module {type(tree).__name__}, which holds no parameters; pass its variables, "
            "variables = module.init(key, x)"
        )


def _refuse_opaque(name: str, leaf: Any) -> None:
    if isinstance(leaf, str | bytes | np.generic | np.ndarray | jax.Array):
        return
    module = any(cls.__name__ == "Module" for cls in type(leaf).__mro__)  # torch's, flax's
    if module or isinstance(leaf, Iterable) or (is_dataclass(leaf) and not isinstance(leaf, type)):
        raise TypeError(
            f"params: the leaf {name!r} is a {type(leaf).__module__}.{type(leaf).__name__}, which JAX's pytrees do not "
            "look into: use dicts, lists, tuples and arrays, or register the class"
        )


def _zero(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.zeros(leaf.shape, jax.dtypes.float0) if key else jnp.zeros_like(leaf)
    return type(leaf)(0) if isinstance(leaf, bool | int | float | np.generic) else leaf


def zeros_like(x: Array) -> Array:
    return jnp.zeros_like(x)


def where(condition: Array, x: Array, y: Array) -> Array:
    return jnp.where(condition, x, y)


def is_complex(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def is_scalar(x: Any) -> bool:
    """Numbers and 0-d arrays."""
    return isinstance(x, int | float | np.number) or (isinstance(x, jax.Array | np.ndarray) and x.ndim == 0)


def upcast(x: Array) -> Array:
    """Half precision (and float8) to float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def downcast(y: Array, x: Array) -> Array:
    return y.astype(jax.dtypes.canonicalize_dtype(x.dtype))  # NumPy's float64 without x64


def cast(value: Any, x: Array) -> Any:
    """A strength, step or anchor in the dtype of `x`; Python numbers stay numbers, which promote nothing."""
    if isinstance(value, int | float | np.number):
        return float(value)
    return jnp.asarray(value).astype(x.dtype)


def is_real(x: Any) -> bool:
    """Real numbers and arrays of them; bools are neither."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def concrete(value: Any) -> float | None:
    """The most suspicious entry (NaN, else negative, else the largest) of a value that is not traced."""
    if isinstance(value, jax.core.Tracer) or np.size(value) == 0:
        return None
    smallest, largest = np.min(np.asarray(value)), np.max(np.asarray(value))
    return float(largest if smallest >= 0 else smallest)


def check_step(x: Array, step_size: Any) -> None:
    """Refuse a step whose shape does not broadcast to that of `x`."""
    shape = jnp.shape(step_size)
    pairs = zip(reversed(shape), reversed(x.shape), strict=False)
    if len(shape) > x.ndim or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"prox: step_size must have a shape that broadcasts to that of x, {list(x.shape)}, got {list(shape)}"
        )


def total(values: list[Array], leaves: list[Array]) -> Array:
    """The sum of scalars in the widest dtype of the leaves, float32 at least."""
    dtype = jnp.dtype(jnp.float32)
    for leaf in leaves:
        dtype = max(dtype, leaf.dtype, key=lambda d: d.itemsize) if not is_complex(leaf) else dtype
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # NumPy's float64 without x64
    if not values:
        return jnp.zeros((), dtype)
    return jnp.sum(jnp.stack([v.astype(dtype) for v in values]))


def own(tree: Params) -> Params:
    """A copy that neither writing into a NumPy array nor donating a JAX one changes."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and getattr(leaf, "weak_type", False):
            return jnp.array(leaf, leaf.dtype)  # updates have none: the second step would be another program
        return jnp.array(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf

    return jax.tree.map(copy, tree)


def as_numpy(x: Any) -> np.ndarray:
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def zero_count(params: Params) -> Array:
    """A step count."""
    del params
    return jnp.zeros((), jnp.int32)


def increment(count: Array) -> Array:
    return count + 1


def master_copy(x: Array, dtype: Any) -> Array:
    """A copy in the wider of two dtypes."""
    dtype = max(dtype, jax.dtypes.canonicalize_dtype(x.dtype), key=lambda d: d.itemsize)
    return jnp.array(x, dtype)  # a copy also where the dtype is the same: both may be donated


def value_and_grad(function: Callable[..., Any], *args: Any) -> tuple[tuple[Any, Any], Any]:
    """((value, auxiliary output), gradient in the first argument)."""
    return jax.value_and_grad(function, has_aux=True)(*args)


def member_array(value: Any, count: int, like: Params) -> Array:
    """A hyper-parameter as an array with a member axis; numbers in the dtype of the parameters, float32 at least.

    Without JAX's weak types: an array that has one and an array that has not are two programs.
    """
    dtype = getattr(value, "dtype", None)
    if isinstance(value, float) and dtype is None:
        reals = [x.dtype for x in flatten(like).leaves if not is_complex(x) and x.dtype.itemsize >= 4]
        dtype = jax.dtypes.canonicalize_dtype(reals[0]) if reals else jnp.float32
    if isinstance(value, jax.Array) and value.ndim > 0 and not value.weak_type:
        return value
    array = jnp.asarray(value, None if dtype is None else jax.dtypes.canonicalize_dtype(dtype))
    return jnp.full((count,), array, array.dtype) if array.ndim == 0 else array


def tree_form(tree: Any) -> Any:
    """Structure, and kinds, shapes and dtypes of the leaves, to be compared by `==`."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(type(x), *(getattr(x, name, None) for name in ("shape", "dtype", "weak_type"))) for x in leaves]


def is_array(x: Any) -> bool:
    """Arrays that a file can hold: no typed PRNG keys."""
    return isinstance(x, jax.Array | np.ndarray) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def stored(x: Array) -> Array:
    return x


def like_array(name: str, value: Any, x: Array) -> Array:
    """An array from a file, in the dtype it has there."""
    array = jnp.array(value)
    if array.dtype != value.dtype:
        raise ValueError(
            f"from_flat: the leaf {name!r} is {value.dtype}, which JAX without x64 would narrow to {array.dtype}; call "
            "it inside jax.enable_x64(True)"
        )
    spread = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and len(x.sharding.device_set) > 1
    return jax.device_put(array, x.sharding) if spread else array


def save_file(path: Path, flat: Mapping[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    # in C order: safetensors writes arrays of another order wrongly. asarray: ascontiguousarray makes 0-d arrays 1-d
    save_file({name: np.asarray(x, order="C") for name, x in flat.items()}, path, metadata)


def load_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@dataclass(frozen=True, eq=False, repr=False)
class Penalty(_penalty.Penalty):
    __doc__ = _penalty.Penalty.__doc__
    wing = sys.modules[__name__]


def _unflatten(static: tuple[Any, ...], children: Iterable[Any]) -> Penalty:
    return _penalty.unflatten_penalty(Penalty, static, list(children))


tree_util.register_pytree_node(Penalty, _penalty.flatten_penalty, _unflatten)


def params(model: Any) -> Params:
    """The parameters of a model as one tree.

    Args:
        model: linen variables (their `params` collection is taken), an nnx module (its `Param` variables as a pure dict
            that `nnx.update` takes back), or an equinox-style module, which is a pytree itself (what is no
            floating-point array becomes None).

    Returns:
        A tree of arrays.

    Raises:
        TypeError: a model without parameters, or a linen module, which holds none.
    """
    _refuse_linen("params", model)
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(model, (nnx.Module, nnx.State)):
        module = isinstance(model, nnx.Module)
        tree = nnx.to_pure_dict(nnx.state(model, nnx.Param) if module else nnx.filter_state(model, nnx.Param))
        return _refuse_empty(tree, model)
    if isinstance(model, Mapping) and "params" in model:
        return model["params"]
    inexact = lambda x: isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return _refuse_empty(jax.tree.map(lambda x: x if inexact(x) else None, model), model)


def _refuse_empty(tree: Params, model: Any) -> Params:
    if not jax.tree.leaves(tree):
        raise TypeError(
            f"params: found no parameters in {type(model).__name__}; expected linen variables, an nnx module or a "
            "pytree of arrays"
        )
    return tree

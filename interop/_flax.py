"""The flax side of a pair, whatever it was given as: its leaves by name, and the way back to its structure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer

from ._names import Path, natural

Tree = Any


@dataclass(frozen=True, eq=False)
class Leaf:
    """An array of the flax side.

    Attributes:
        name: dotted path; the collection is in front unless it is `params`.
        path: its path without the collection, so that the statistics of a batch norm lie beside its scale.
        trained: whether the optimizer sees it.
        value: the array, or what has its shape and dtype.
    """

    name: str
    path: Path
    trained: bool
    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


@dataclass(frozen=True, eq=False)
class Side:
    """The flax side of a pair.

    Attributes:
        leaves: by name, in the order of the structure.
        keys: for every container its children in the order of definition or of calls, or None where JAX has sorted
            them, as jit does.
        build: the structure that was given, around other leaves.
        build_params: the part of it that the optimizer sees.
        twin: the module at a path, where there is one.
        calls: whether the order of the keys is one of calls, as in what linen's `init` makes.
        also: further paths to a leaf, of an nnx Variable that is shared: (path, name).
    """

    leaves: dict[str, Leaf]
    keys: dict[Path, list[str] | None]
    build: Callable[[Mapping[str, Any]], Tree]
    build_params: Callable[[Mapping[str, Any]], Tree]
    twin: Callable[[Path], Any] = lambda path: None
    calls: bool = False
    also: list[tuple[Path, str]] = field(default_factory=list)


def read(where: str, flax: Any) -> Side:
    """What a flax model or its arrays hold.

    Raises:
        TypeError: something else; an unbound linen module; leaves that are no arrays, or traced ones.
        ValueError: two leaves of one name.
    """
    from flax import linen, nnx

    if isinstance(flax, linen.Module):
        if flax.scope is None:
            raise TypeError(
                f"{where}: the linen module {type(flax).__name__} holds no arrays; pass its variables, "
                "variables = module.init(key, x), or module.bind(variables)"
            )
        side = _read_mapping(where, flax.variables)
        return replace(side, twin=lambda path: _linen_twin(flax, path))
    if isinstance(flax, nnx.Module):
        return _read_module(where, flax)
    if isinstance(flax, nnx.State):
        return _read_state(where, flax)
    if isinstance(flax, Mapping):
        return _read_mapping(where, flax)
    raise TypeError(
        f"{where}: flax must be an nnx module, its nnx.State, linen variables or a tree of parameters (dicts of "
        f"arrays), got {type(flax).__module__}.{type(flax).__name__}{_hint(flax)}"
    )


def _hint(flax: Any) -> str:
    """What is nearly right, and how it is said rightly."""
    from flax import linen, nnx

    if isinstance(flax, tuple) and len(flax) == 2 and isinstance(flax[0], linen.Module):
        return "; of a linen module and its variables pass module.bind(variables)"
    if isinstance(flax, type) and issubclass(flax, (linen.Module, nnx.Module)):
        return f": the class {flax.__name__}; pass an instance"
    if isinstance(getattr(flax, "params", None), Mapping | nnx.State):
        return (
            "; of a train state pass state.params, or with batch statistics {'params': state.params, 'batch_stats': "
            "state.batch_stats}"
        )
    return "; are the arguments swapped? The PyTorch model is the first" if isinstance(flax, torch.nn.Module) else ""


# --- dicts: linen variables, parameters ---


def _read_mapping(where: str, tree: Mapping[Any, Any]) -> Side:
    variables = isinstance(tree.get("params"), Mapping)
    leaves: dict[str, Leaf] = {}
    keys: dict[Path, list[str] | None] = {}

    def walk(node: Any, name: Path, path: Path, trained: bool) -> Any:
        """The names of the leaves in the place of the leaves."""
        if isinstance(node, Mapping):
            names = [str(key) for key in node]
            if path not in keys:
                keys[path] = None if _sorted_by_jax(node) else names
            new = {key: walk(child, (*name, str(key)), (*path, str(key)), trained) for key, child in node.items()}
            return new if type(node) is dict else type(node)(new)  # pyright: ignore[reportCallIssue]
        if type(node) in (list, tuple):
            keys[path] = [str(i) for i in range(len(node))]
            children = enumerate(node)
            return type(node)(walk(child, (*name, str(i)), (*path, str(i)), trained) for i, child in children)
        if node is None:
            return None
        dotted = ".".join(name)
        if hasattr(node, "unbox"):
            raise TypeError(
                f"{where}: the leaf {dotted!r} is a {type(node).__name__}, a box with metadata; pass "
                "flax.linen.unbox(variables)"
            )
        if path in taken:  # of another collection: both stay apart
            path = (*path[:-1], f"{name[0]}.{path[-1]}")
        _add(where, leaves, Leaf(dotted, path, trained, _array(where, dotted, node)))
        return dotted

    taken: set[Path] = set()
    if not variables:
        names = walk(tree, (), (), True)
        build = partial(_filled, names)
        return Side(leaves, keys, build, build, calls=True)
    collections = {}
    for collection in ("params", *(key for key in tree if key != "params")):
        if not isinstance(tree[collection], Mapping):
            raise TypeError(
                f"{where}: beside params every entry of linen variables must be a collection, a dict; "
                f"{collection!r} is a {type(tree[collection]).__name__}"
            )
        in_front = () if collection == "params" else (str(collection),)
        collections[collection] = walk(tree[collection], in_front, (), collection == "params")
        taken = {leaf.path for leaf in leaves.values()}
    whole = {key: collections[key] for key in tree}
    names = whole if type(tree) is dict else type(tree)(whole)  # pyright: ignore[reportCallIssue]
    return Side(leaves, keys, partial(_filled, names), partial(_filled, collections["params"]), calls=True)


def _sorted_by_jax(node: Mapping[Any, Any]) -> bool:
    """Whether a dict may have been, which then has sorted all in it: `kernel, bias` in one of its layers denies it."""
    names = [str(key) for key in node]
    if names not in (sorted(names), sorted(names, key=natural)):
        return False
    if names != sorted(names, key=natural):
        return True
    return all(_sorted_by_jax(child) for child in node.values() if isinstance(child, Mapping))


def _filled(names: Any, values: Mapping[str, Any]) -> Any:
    """A tree of names with what they stand for."""
    if isinstance(names, Mapping):
        new = {key: _filled(child, values) for key, child in names.items()}
        return new if type(names) is dict else type(names)(new)  # pyright: ignore[reportCallIssue]
    if isinstance(names, (list, tuple)):
        return type(names)(_filled(child, values) for child in names)
    return None if names is None else values[names]


def _linen_twin(module: Any, path: Path) -> Any:
    """The submodule at a path if `setup` has made it; those of a compact method exist only while it runs."""
    for key in path:
        name, _, index = key.rpartition("_")
        try:
            child = getattr(module, key, None)
            if child is None and index.isdigit():
                child = getattr(module, name)[int(index)]
        except (AttributeError, IndexError, TypeError, KeyError):
            return None
        if child is None:
            return None
        module = child
    return module


# --- nnx ---


def _read_state(where: str, state: Any) -> Side:
    from flax import nnx

    leaves: dict[str, Leaf] = {}
    keys: dict[Path, list[str] | None] = {}
    places: dict[str, tuple[Any, Any]] = {}
    flat = nnx.to_flat_state(state)
    pure = not any(isinstance(variable, nnx.Variable) for _, variable in flat)  # nothing says what is trained: all
    for path, variable in flat:
        boxed = isinstance(variable, nnx.Variable)
        if boxed and not _is_weight(variable):
            continue
        name = ".".join(map(str, path))
        value = variable.get_value() if boxed else variable
        trained = isinstance(variable, nnx.Param) if boxed else pure
        if not trained and isinstance(value, (bool, int, float)):  # a counter or an option, no array
            continue
        value = _array(where, name, value)
        _add(where, leaves, Leaf(name, tuple(map(str, path)), trained, value))
        # not the array: a pair would keep it alive
        places[name] = path, variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype)) if boxed else None

    def build(values: Mapping[str, Any], only_params: bool = False) -> Tree:
        new = []
        for name, (path, variable) in places.items():
            if leaves[name].trained or not only_params:
                new.append((path, values[name] if variable is None else variable.replace(values[name])))
        return nnx.from_flat_state(new)

    return Side(leaves, keys, build, lambda values: build(values, only_params=True))


def _read_module(where: str, model: Any) -> Side:
    from flax import nnx

    side = _read_state(where, nnx.state(model))
    twins: dict[Path, Any] = {}
    keys: dict[Path, list[str] | None] = {}
    found: list[tuple[Path, Any]] = []

    def walk(node: Any, path: Path, above: tuple[int, ...]) -> None:
        if isinstance(node, nnx.Variable):
            found.append((path, node))
            return
        if isinstance(node, nnx.Module):
            twins[path] = node
            children = {
                key: child for key, child in vars(node).items() if not key.startswith(("_pytree__", "_object__"))
            }
        elif isinstance(node, Mapping):
            children = {str(key): child for key, child in node.items()}
        elif isinstance(node, (list, tuple)):
            children = {str(i): child for i, child in enumerate(node)}
        else:
            return
        if id(node) in above:
            return  # a child that knows its parent
        keys[path] = list(children)
        for key, child in children.items():
            walk(child, (*path, key), (*above, id(node)))

    walk(model, (), ())
    named = {id(variable): ".".join(path) for path, variable in found if ".".join(path) in side.leaves}
    # definition order; a shared Variable is where it is defined first, and has the name that its state gives it
    leaves: dict[str, Leaf] = {}
    also: list[tuple[Path, str]] = []
    for path, variable in found:
        name = named.get(id(variable))
        if name is not None and name not in leaves:
            old = side.leaves[name]
            leaves[name] = Leaf(name, path, old.trained, old.value)
        elif name is not None:
            also.append((path, name))
    for name, leaf in side.leaves.items():  # what lies in containers that nobody but flax looks into
        leaves.setdefault(name, leaf)
    return Side(leaves, keys, side.build, side.build_params, twins.get, also=also)


def _is_weight(variable: Any) -> bool:
    """Not the state of random streams, and not what a call leaves behind."""
    from flax import nnx

    return not isinstance(variable, (nnx.RngState, nnx.Intermediate, nnx.Perturbation, nnx.Cache))


# --- leaves ---


def _array(where: str, name: str, value: Any) -> Any:
    if isinstance(value, Tracer):
        raise TypeError(
            f"{where}: the leaf {name!r} is a {type(value).__name__}, a traced array of jax.jit, grad, vmap or another "
            f"transformation; call {where} outside the transformed function"
        )
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"{where}: the leaf {name!r} is a {type(value).__module__}.{type(value).__name__}, not an array of JAX or "
            "NumPy and not a jax.ShapeDtypeStruct; of linen variables pass the collections that hold weights and "
            "statistics: {key: variables[key] for key in ('params', 'batch_stats')}"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where}: the leaf {name!r} is a PRNG key, which PyTorch has not; leave it out of the tree")
    return value


def _add(where: str, leaves: dict[str, Leaf], leaf: Leaf) -> None:
    if leaf.name in leaves:
        raise ValueError(f"{where}: two leaves of the flax side have the name {leaf.name!r}; rename one of them")
    leaves[leaf.name] = leaf

"""Trees of either framework, walked by one rule: containers keep their class and order, leaves have dotted names."""

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import jax
import numpy as np
import torch
from jax import tree_util
from torch.utils import _pytree as pytree

from funcreg._penalty import Penalty
from funcreg._selectors import leaf_name

Tree = Any
Path = tuple[str, ...]
ARRAYS = (torch.Tensor, jax.Array, np.ndarray, np.generic)


def rebuild(
    where: str, tree: Tree, convert: Callable[[str, Any], Any], flax_as_dicts: bool = False, path: Path = ()
) -> Tree:
    """The same tree with every array replaced; None, Python numbers and strings stay.

    Neither framework's `tree_map`: PyTorch's knows no class of JAX's and JAX's none of PyTorch's, and JAX's sorts the
    keys of dicts, which mixed ones cannot be.

    Args:
        where: the public function, for errors.
        tree: the tree.
        convert: called with `"the leaf 'hidden.weight'"` (words for an error) and the array.
        flax_as_dicts: FrozenDict and nnx State become dicts, an nnx Variable what it holds.
        path: where in the tree we are.
    """

    def child(key: Any, node: Any) -> Any:
        return rebuild(where, node, convert, flax_as_dicts, path if key is None else (*path, str(key)))

    if isinstance(tree, ARRAYS):  # before numbers: np.float64 is a float
        return convert(name_of(path), tree)
    if tree is None or isinstance(tree, (bool, int, float, complex, str, bytes)):
        return tree
    if type(tree) in (dict, OrderedDict, defaultdict):
        new = copy.copy(tree)  # keeps the order, and the factory of a defaultdict
        for key, node in tree.items():
            new[key] = child(key, node)
        return new
    if type(tree) in (list, tuple):
        return type(tree)(child(i, node) for i, node in enumerate(tree))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(child(field, getattr(tree, field)) for field in tree._fields))  # pyright: ignore[reportAttributeAccessIssue]
    _refuse_whole_models(where, path, tree)
    if flax_as_dicts and isinstance(tree, _flax("flax.core", "FrozenDict") + _flax("flax.nnx", "State")):
        mapping: Any = tree
        return {key: child(key, node) for key, node in mapping.items()}
    variable = isinstance(tree, _flax("flax.nnx", "Variable"))  # adds no component to a name, as in the JAX wing
    for nodes, unflatten in (_children_jax(tree), _children_torch(tree)):
        if not (len(nodes) == 1 and nodes[0][1] is tree):  # a leaf is its own only child
            new = [child(None if variable else key, node) for key, node in nodes]
            return new[0] if variable and flax_as_dicts else unflatten(new)
    _refuse_opaque(where, path, tree)


def level(where: str, node: Any, path: Path) -> list[tuple[Any, Any]]:
    """The children of a container that one of the frameworks knows, with their keys; None is the key of a Variable."""
    _refuse_whole_models(where, path, node)
    variable = isinstance(node, _flax("flax.nnx", "Variable"))
    for nodes, _ in (_children_jax(node), _children_torch(node)):
        if not (len(nodes) == 1 and nodes[0][1] is node):  # a leaf is its own only child
            return [(None if variable else key, child) for key, child in nodes]
    _refuse_opaque(where, path, node)
    return []


def name_of(path: Path) -> str:
    """Words for an error; names as the wings have them, without a leading `params`."""
    return f"the leaf {leaf_name(path)!r}" if path else "the array"


def _children_jax(node: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]]:
    keyed, treedef = tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(_component(path), child) for path, child in keyed], treedef.unflatten


def _children_torch(node: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]]:
    children, spec = pytree.tree_flatten(node, is_leaf=lambda x: x is not node)
    try:
        keys = [_component(path) for path, _ in pytree.tree_flatten_with_path(node, lambda x: x is not node)[0]]
    except ValueError:  # a class registered without names for its children
        keys = list(range(len(children)))
    return list(zip(keys, children, strict=True)), lambda new: pytree.tree_unflatten(new, spec)


def _component(path: tuple[Any, ...]) -> Any:
    if not path:
        return ""
    (key,) = path  # one level was taken apart
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


def _flax(module: str, name: str) -> tuple[type, ...]:
    """A class of flax, where its user has imported flax: nothing else can have made an object of it."""
    there = sys.modules.get(module)
    return (getattr(there, name),) if there is not None else ()


def _refuse_whole_models(where: str, path: Path, node: Any) -> None:
    if isinstance(node, torch.nn.Module):
        remedy = "pass fr.params(net), its parameters by name, or net.state_dict()"
    elif isinstance(node, _flax("flax.nnx", "Module")):
        remedy = "pass nnx.state(model, nnx.Param), or nnx.state(model) for the other variables as well"
    elif isinstance(node, _flax("flax.linen", "Module")):
        remedy = "it holds no arrays; pass its variables, variables = module.init(key, x)"
    elif isinstance(node, torch.optim.Optimizer):
        remedy = "pass optimizer.state_dict()"
    elif isinstance(node, Penalty):
        remedy = "a Penalty belongs to its wing; make it with the factories of the other one, which have the same names"
    elif isinstance(node, Iterator):
        remedy = "pass a dict or a list: dict(net.named_parameters()), not net.parameters()"
    else:
        return
    spot = f" at {leaf_name(path)!r}" if path else ""
    raise TypeError(f"{where}: got {_article(type(node).__name__)}{spot}; {remedy}")


def _refuse_opaque(where: str, path: Path, node: Any) -> None:
    kind = f"{type(node).__module__}.{type(node).__name__}"
    if hasattr(node, "__dlpack__") or hasattr(node, "__array__"):
        why = "an array of another library; pass np.asarray of it"
    elif is_dataclass(node) or hasattr(node, "__iter__"):
        why = (
            "a container that neither JAX's nor PyTorch's pytrees look into: use dicts, lists and tuples, or register "
            "the class (jax.tree_util.register_dataclass, torch.utils._pytree.register_dataclass)"
        )
    else:
        why = "neither an array nor a container, nor None, a Python number or a string; leave it out of the tree"
    spot = f"the leaf {leaf_name(path)!r}" if path else "the tree"
    raise TypeError(f"{where}: {spot} is a {kind}, {why}")


def _article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"

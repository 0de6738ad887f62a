"""Trees of tensors, matched by structure, and numbers beside them. The only file of this package that knows pytrees."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..._selectors import leaf_name

Tree = Any


def is_trained(leaf: Any) -> bool:
    """Floating-point and complex tensors are trained, every other leaf is passed over."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def upcast(x: Tensor) -> Tensor:
    """Half precision (and float8) to float32."""
    return x.float() if x.dtype.itemsize < 4 else x


def cast(value: float | Tensor, like: Tensor) -> Any:
    """A hyper-parameter beside a leaf: a Python number, or a tensor of the dtype and device of the leaf."""
    return _move(value, like.dtype, like.device) if isinstance(value, Tensor) else float(value)


def wide(value: float | Tensor, device: torch.device) -> Tensor:
    """A number as a 0-d float64 tensor."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    if isinstance(value, Tensor):
        return _move(value, dtype, device)
    return torch.full((), float(value), dtype=dtype, device=device)


def _move(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a blocking copy from the host would wait for the accelerator; in the other direction the host has to wait
    return value.to(dtype=dtype, device=device, non_blocking=value.device.type == "cpu")


def zero_update(where: str, leaf: Any) -> Any:
    """The update that leaves a leaf as it is."""
    if isinstance(leaf, Tensor):
        return torch.zeros_like(leaf)
    if leaf is None or isinstance(leaf, str):
        return leaf
    if isinstance(leaf, (bool, int, float)):
        return type(leaf)(0)
    hint = "; pass dict(model.named_parameters())" if isinstance(leaf, torch.nn.Module) else ""
    raise TypeError(f"{where}: leaves must be torch tensors, None or numbers, got a {type(leaf).__name__}{hint}")


def zero_updates(where: str, tree: Tree) -> Tree:
    """The updates that leave every leaf as it is."""
    return pytree.tree_map(lambda leaf: zero_update(where, leaf), tree)


def full_like(where: str, tree: Tree, value: float | Tensor = 0.0, dtype: torch.dtype | None = None) -> Tree:
    """A tree of constant tensors, one for each trained leaf."""

    def leaf(p: Any) -> Any:
        if not is_trained(p):
            return zero_update(where, p)
        zeros = torch.zeros_like(p, dtype=dtype)
        return zeros + cast(value, zeros) if isinstance(value, Tensor) or value != 0 else zeros

    return pytree.tree_map(leaf, tree)


def trained_leaves(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if is_trained(leaf)]


def zero_count(tree: Tree) -> Tensor:
    """An int32 zero on the device of the first trained leaf."""
    for leaf in trained_leaves(tree):
        return leaf.new_zeros((), dtype=torch.int32)  # new_zeros: under vmap a count per member, not one expanded
    return torch.zeros((), dtype=torch.int32)


def zip_leaves(where: str, **trees: Tree) -> tuple[list[tuple[Any, ...]], Callable[[list[Any]], Tree]]:
    """Match trees of one structure, dicts by key.

    Returns:
        The rows of corresponding leaves, and the way back from one leaf a row to a tree like the first.

    Raises:
        ValueError: the structures or the shapes of two tensors differ; the message names the first leaf that does.
    """
    (first_name, first), *others = trees.items()
    leaves, spec = pytree.tree_flatten(first)
    columns = [leaves]
    for name, tree in others:
        column, other_spec = pytree.tree_flatten(tree)
        if other_spec != spec:
            _check_structure(where, name, tree, first_name, first)
            column = spec.flatten_up_to(tree)  # only the order of keys differs: by key, not by position
        if any(_shapes_differ(a, b) for a, b in zip(column, leaves, strict=True)):
            _check_structure(where, name, tree, first_name, first)
        columns.append(column)
    return list(zip(*columns, strict=True)), lambda new: pytree.tree_unflatten(new, spec)


def map_leaves(where: str, leaf: Callable[..., tuple[Tensor, ...]], **trees: Tree) -> tuple[Tree, ...]:
    """Replace the corresponding leaves of several trees, of which the last one holds the updates.

    `leaf(*tensors)` returns one tensor for each tree. It sees no half precision, and what it returns takes the dtype of
    the leaf that it replaces. Where one of the leaves is not trained, the update is zero and the others stay.
    """
    *states, updates = trees
    names = [f"state.{name}" for name in states] + [updates]  # as the user knows them, for the messages
    rows, rebuild = zip_leaves(where, **dict(zip(names, trees.values(), strict=True)))
    new = []
    for row in rows:
        if all(is_trained(x) for x in row):
            new.append(tuple(y.to(x.dtype) for x, y in zip(row, leaf(*map(upcast, row)), strict=True)))
        else:
            new.append((*row[:-1], zero_update(where, row[-1])))
    return tuple(rebuild([values[i] for values in new]) for i in range(len(trees)))


def select(condition: Tensor, tree: Tree, other: Tree) -> Tree:
    """The leaves of `tree` where a 0-d condition holds, elsewhere those of `other`, which sets dtypes and key order."""

    def leaf(y: Any, x: Any) -> Any:
        return torch.where(condition.to(y.device), x.to(y.dtype), y) if isinstance(y, Tensor) else y

    return pytree.tree_map(leaf, other, tree)


def expand_mask(where: str, mask: Tree, tree: Tree) -> Tree:
    """A tree of bools, a prefix of one or a function to one, as one bool for each leaf of `tree`."""
    if callable(mask):
        mask = mask(tree)
    flags, spec = pytree.tree_flatten(mask)
    if not all(type(flag).__name__ in ("bool", "bool_") for flag in flags):  # bool_ is that of NumPy
        raise ValueError(f"{where}: mask must hold Python bools only, got {flags}")
    if spec == pytree.tree_structure(tree):
        return mask
    _check_structure(where, "mask", mask, "params", tree, prefix=True)
    parts = [_constant(flag, part) for flag, part in zip(flags, spec.flatten_up_to(tree), strict=True)]
    return pytree.tree_unflatten(parts, spec)


def _constant(value: Any, tree: Tree) -> Tree:
    return pytree.tree_map(lambda _: value, tree)


def _component(key: Any) -> str:
    return str(key.name if isinstance(key, pytree.GetAttrKey) else getattr(key, "key", getattr(key, "idx", key)))


def _shapes_differ(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape


def _check_structure(where: str, name: str, tree: Tree, like_name: str, like: Tree, prefix: bool = False) -> None:
    difference = _first_difference(tree, like, (), prefix)
    if difference is not None:
        path, seen, expected = difference
        at = f"at {leaf_name(path)!r}" if path else "at the root"
        raise ValueError(f"{where}: {name} has {seen} {at}, where {like_name} has {expected}")


def _first_difference(
    tree: Tree, like: Tree, path: tuple[str, ...], prefix: bool
) -> tuple[tuple[str, ...], str, str] | None:
    """Where two trees part, and what each has there."""
    children, expected = _children(tree), _children(like)
    if children is None and (prefix or (expected is None and not _shapes_differ(tree, like))):
        return None
    if children is None or expected is None or not _same_kind(tree, like):
        return path, _describe(tree), _describe(like)
    for key in [*expected, *children]:
        if key not in children or key not in expected:
            inner, leaf = _first_leaf(expected[key] if key in expected else children[key], (*path, key))
            return inner, *((_describe(leaf), "nothing") if key in children else ("nothing", _describe(leaf)))
        difference = _first_difference(children[key], expected[key], (*path, key), prefix)
        if difference is not None:
            return difference
    return None


def _children(tree: Tree) -> dict[str, Tree] | None:
    keyed, _ = pytree.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return None if len(keyed) == 1 and not keyed[0][0] else {_component(path[0]): child for path, child in keyed}


def _same_kind(a: Any, b: Any) -> bool:
    return type(a) is type(b) or (isinstance(a, dict) and isinstance(b, dict))


def _first_leaf(tree: Tree, path: tuple[str, ...]) -> tuple[tuple[str, ...], Any]:
    children = _children(tree)
    if not children:
        return path, tree
    key = next(iter(children))
    return _first_leaf(children[key], (*path, key))


def _describe(node: Any) -> str:
    if isinstance(node, Tensor):
        return f"a tensor of shape {tuple(node.shape)}"
    return "None" if node is None else f"a value of type {type(node).__name__}"

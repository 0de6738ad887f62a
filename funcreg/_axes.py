"""Axes that count members or examples: their lengths, and what is refused. No framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._flat import form, forms


def check_axes(where: str, axes: Any) -> None:
    """`batch_axes`: an axis or None, or a tuple of these."""
    for axis in axes if isinstance(axes, tuple) else (axes,):
        if not (axis is None or (isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0)):
            raise TypeError(
                f"{where}: batch_axes must be an axis counted from the front, None, or a tuple with one of these per "
                f"batch argument; got {axes!r}"
            )


def check_chunk(where: str, name: str, chunk: Any) -> None:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int)):
        raise TypeError(f"{where}: {name} must be an int or None, got {chunk!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{where}: {name} must be >= 1, got {chunk}")


def axis_of_each(where: str, axes: Any, batch: Sequence[Any]) -> tuple[int | None, ...]:
    """One axis per batch argument."""
    each = axes if isinstance(axes, tuple) else (axes,) * len(batch)
    if len(each) != len(batch):
        raise ValueError(f"{where}: batch_axes has {len(each)} entries, but the batch has {len(batch)} arguments")
    return each


def arrays_of(wing: Any, batch: Sequence[Any]) -> list[list[tuple[str, Any]]]:
    """For each batch argument, the names and arrays in it."""
    found = []
    for i, argument in enumerate(batch):
        paths, leaves, _ = wing.paths_and_leaves(argument)
        names = [f"batch argument {i}" + (f" {'.'.join(path)!r}" if path else "") for path in paths]
        found.append(list(zip(names, leaves, strict=True)))
    return found


def length(where: str, name: str, array: Any, axis: int) -> int:
    shape = getattr(array, "shape", None)
    if shape is None:
        raise TypeError(f"{where}: {name} must be an array, got {array!r}")
    if axis >= len(shape):
        raise ValueError(f"{where}: {name} has no axis {axis}: its shape is {list(shape)}")
    return shape[axis]


_STACK = "stack([params, ...]) makes trees with that axis"


def count_members(wing: Any, where: str = "ensemble", **trees: Any) -> int:
    """The length of the leading axis of every leaf of every tree."""
    count, first = 0, ""
    for what, tree in trees.items():
        paths, leaves, _ = wing.paths_and_leaves(tree)
        for path, leaf in zip(paths, leaves, strict=True):
            name = what + (f" {'.'.join(path)!r}" if path else "")
            shape = getattr(leaf, "shape", None)
            if shape is None:
                raise TypeError(f"{where}: {name} must be an array with a leading axis member, got {leaf!r}")
            if len(shape) == 0:
                raise ValueError(f"{where}: {name} has no leading axis member: it is {form(leaf)}; {_STACK}")
            if not first:
                count, first = shape[0], name
            if shape[0] != count:
                raise ValueError(f"{where}: {first} has {count} members, but {name} has {shape[0]}; {_STACK}")
    if not first:
        raise ValueError(f"{where}: found no array in {', '.join(trees)}")
    if count == 0:
        raise ValueError(f"{where}: {first} has 0 members; an ensemble has at least one")
    return count


def check_alike(wing: Any, where: str, trees: Sequence[Any]) -> None:
    """Refuse an empty list, and trees that differ in names, shapes or dtypes."""
    if not isinstance(trees, (list, tuple)):
        raise TypeError(f"{where}: members must be a list of trees, got {type(trees).__name__}")
    if len(trees) == 0:
        raise ValueError(f"{where}: got an empty list; an ensemble has at least one member")
    for path, leaf in zip(*wing.paths_and_leaves(trees[0])[:2], strict=True):
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{where}: the leaf {'.'.join(path)!r} must be an array, got {leaf!r}")
    first = forms(wing, trees[0])
    for i, tree in enumerate(trees):
        other = forms(wing, tree)
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{where}: the leaf {name!r} is {first.get(name, 'missing')} in member 0 and "
                    f"{other.get(name, 'missing')} in member {i}"
                )

"""The member axis of an ensemble: what has it, how long it is, what is refused. No framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ._flat import form


@dataclass
class Plan:
    """The options of one ensemble, and the shapes of its first batch."""

    wing: Any
    batch_axes: Any
    chunk: int | None
    shapes: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        axes = self.batch_axes if isinstance(self.batch_axes, tuple) else (self.batch_axes,)
        for axis in axes:
            if not (axis is None or (isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0)):
                raise TypeError(
                    "ensemble: batch_axes must be None (a batch for all), the member axis of every batch array, or a "
                    f"tuple with one of these per batch argument; got {self.batch_axes!r}"
                )
        if self.chunk is not None and (isinstance(self.chunk, bool) or not isinstance(self.chunk, int)):
            raise TypeError(f"ensemble: chunk must be an int or None, got {self.chunk!r}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"ensemble: chunk must be >= 1, got {self.chunk}")

    def spread(self, hyper: Any, count: int, like: Any) -> Any:
        """Hyper-parameters with a member axis; one number for all members becomes one per member."""
        _, leaves, unflatten = self.wing.paths_and_leaves(hyper)
        return unflatten([self.wing.member_array(leaf, count, like) for leaf in leaves])

    def axes(self, batch: Sequence[Any], count: int) -> tuple[int | None, ...]:
        """The member axis of each batch argument; refuses a batch of another shape than the first one."""
        axes = self.batch_axes if isinstance(self.batch_axes, tuple) else (self.batch_axes,) * len(batch)
        if len(axes) != len(batch):
            raise ValueError(f"ensemble: batch_axes has {len(axes)} entries, the batch has {len(batch)} arguments")
        shapes = []
        for i, (axis, argument) in enumerate(zip(axes, batch, strict=True)):
            names, leaves, _ = self.wing.paths_and_leaves(argument)
            for path, leaf in zip(names, leaves, strict=True):
                name = f"batch argument {i}" + (f" {'.'.join(path)!r}" if path else "")
                shape = list(getattr(leaf, "shape", ()))
                if axis is not None:
                    if axis >= len(shape) or shape[axis] != count:
                        has = f"has {shape[axis]}" if axis < len(shape) else f"has shape {shape}"
                        raise ValueError(
                            f"ensemble: axis {axis} of {name} must have an entry for each of the {count} members; it "
                            f"{has}"
                        )
                    del shape[axis]
                shapes.append((name, shape))
        if not self.shapes:
            self.shapes = shapes
        for (name, shape), (_, first) in zip(shapes, self.shapes, strict=False):
            if shape != first:
                raise ValueError(
                    f"ensemble: {name} has shape {shape}, the first batch had {first}; a partial batch would weigh its "
                    "examples more and compile a second program: drop it (drop_last=True) or pad it, and make another "
                    "ensemble for another batch size"
                )
        return axes


def count_members(wing: Any, where: str, **trees: Any) -> int:
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
                raise ValueError(f"{where}: {name} has no leading axis member: it is {form(leaf)}")
            if not first:
                count, first = shape[0], name
            if shape[0] != count:
                raise ValueError(f"{where}: {first} has {count} members, but {name} has {shape[0]}")
    if not first:
        raise ValueError(f"{where}: found no array in {', '.join(trees)}")
    if count == 0:
        raise ValueError(f"{where}: {first} has 0 members; an ensemble has at least one")
    return count


def check_alike(wing: Any, where: str, trees: Sequence[Any]) -> None:
    """Refuse an empty list, and trees that differ in names, shapes or dtypes."""
    if len(trees) == 0:
        raise ValueError(f"{where}: got an empty list; an ensemble has at least one member")
    forms = []
    for tree in trees:
        paths, leaves, _ = wing.paths_and_leaves(tree)
        forms.append({".".join(path): form(leaf) for path, leaf in zip(paths, leaves, strict=True)})
    for i, other in enumerate(forms):
        for name in [*forms[0], *other]:
            if forms[0].get(name) != other.get(name):
                raise ValueError(
                    f"{where}: the leaf {name!r} is {forms[0].get(name, 'missing')} in member 0 and "
                    f"{other.get(name, 'missing')} in member {i}"
                )

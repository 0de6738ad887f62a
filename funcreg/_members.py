"""The member axis of an ensemble: what has it, how long it is, what is refused. No framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._axes import arrays_of, axis_of_each, check_axes, check_chunk, count_members, length


@dataclass
class Plan:
    """The options of one ensemble, the shapes of its first batch, and what the last call looked like."""

    wing: Any
    batch_axes: Any
    chunk: int | None
    donate: bool = False
    shapes: list[Any] = field(default_factory=list)
    checked: tuple[Any, ...] = (None, 0, (), [], False)

    def __post_init__(self) -> None:
        check_axes("ensemble", self.batch_axes)
        check_chunk("ensemble", "chunk", self.chunk)
        if not isinstance(self.donate, bool):
            raise TypeError(f"ensemble: donate must be True or False, got {self.donate!r}")

    def start(self, params: Any, hyper: Any, extra: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
        """The number of members, and the arguments of `init`, all with a member axis."""
        hyper = self._spread(hyper, count_members(self.wing, params=params), params)
        named = dict(zip(("params", "hyper", "extra"), (params, hyper, *extra), strict=False))
        return count_members(self.wing, **named), (params, hyper, *extra)

    def prepare(self, state: Any, hyper: Any, batch: tuple[Any, ...]) -> tuple[int, Any, tuple[int | None, ...], Any]:
        """The number of members, their hyper-parameters, the member axis of each batch argument; what `done` takes."""
        form = self.wing.tree_form((state, hyper, batch))
        checked = self.checked
        if form != checked[0]:  # the checks take as long as a small step: once for calls that look alike
            count = count_members(self.wing, state=state)
            spread = self._spread(hyper, count, state)
            count_members(self.wing, state=state, hyper=spread)
            old, new = (self.wing.paths_and_leaves(tree)[1] for tree in (hyper, spread))
            plain = all(x is y for x, y in zip(old, new, strict=True))
            checked = (form, count, *self._axes(batch, count), plain)
        _, count, axes, shapes, plain = checked
        hyper = hyper if plain else self._spread(hyper, count, state)
        return count, hyper, axes, checked

    def done(self, checked: tuple[Any, ...]) -> None:
        """A step has worked: the following batches have its shapes."""
        self.checked, self.shapes = checked, checked[3]

    def _spread(self, hyper: Any, count: int, like: Any) -> Any:
        """Hyper-parameters with a member axis; one number for all members becomes one per member."""
        paths, leaves, unflatten = self.wing.paths_and_leaves(hyper)
        for path, leaf in zip(paths, leaves, strict=True):
            if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float))):
                raise TypeError(f"ensemble: hyper {'.'.join(path)!r} must be an array or a number, got {leaf!r}")
        return unflatten([self.wing.member_array(leaf, count, like) for leaf in leaves])

    def _axes(self, batch: Sequence[Any], count: int) -> tuple[tuple[int | None, ...], list[Any]]:
        """The member axis of each batch argument, and the shapes; refuses others than those of the first batch."""
        axes = axis_of_each("ensemble", self.batch_axes, batch)
        shapes = []
        for axis, arrays in zip(axes, arrays_of(self.wing, batch), strict=True):
            for name, array in arrays:
                shape = list(getattr(array, "shape", ()))
                if axis is not None:
                    entries = length("ensemble", name, array, axis)
                    if entries != count:
                        raise ValueError(
                            f"ensemble: axis {axis} of {name} counts members; it has {entries}, the parameters {count}"
                        )
                    del shape[axis]
                shapes.append((name, shape))
        first = self.shapes or shapes
        if [name for name, _ in shapes] != [name for name, _ in first]:
            now, before = (", ".join(name for name, _ in given) for given in (shapes, first))
            raise ValueError(f"ensemble: the batch has {now}, but the first one had {before}")
        for (name, shape), (_, one) in zip(shapes, first, strict=True):
            if shape != one:
                raise ValueError(
                    f"ensemble: {name} has shape {shape}, the first batch had {one}; a partial batch would weigh its "
                    "examples more and compile a second program: drop it (drop_last=True) or pad it, and make another "
                    "ensemble for another batch size"
                )
        return axes, shapes


def naming_member(i: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function for one member; an error says which."""
    try:
        return function(*args)
    except Exception as error:
        error.add_note(f"This is member {i} of the ensemble.")
        raise

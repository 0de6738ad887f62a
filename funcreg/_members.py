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
    shapes: list[Any] = field(default_factory=list)
    checked: tuple[Any, ...] = (None, 0, (), False)

    def __post_init__(self) -> None:
        check_axes("ensemble", self.batch_axes)
        check_chunk("ensemble", "chunk", self.chunk)

    def start(self, params: Any, hyper: Any, extra: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
        """The number of members, and the arguments of `init`, all with a member axis."""
        hyper = self._spread(hyper, count_members(self.wing, params=params), params)
        return count_members(self.wing, params=params, hyper=hyper, extra=extra), (params, hyper, *extra)

    def prepare(self, state: Any, hyper: Any, batch: tuple[Any, ...]) -> tuple[int, Any, tuple[int | None, ...]]:
        """The number of members, their hyper-parameters, and the member axis of each batch argument."""
        form = self.wing.tree_form((state, hyper, batch))
        if (
            form != self.checked[0]
        ):  # what looks like the last call has passed the checks, which take longer than a step
            count = count_members(self.wing, state=state)
            spread = self._spread(hyper, count, state)
            count_members(self.wing, state=state, hyper=spread)
            plain = self.wing.tree_form(hyper) == self.wing.tree_form(spread)
            self.checked = (form, count, self._axes(batch, count), plain)
        _, count, axes, plain = self.checked
        return count, hyper if plain else self._spread(hyper, count, state), axes

    def _spread(self, hyper: Any, count: int, like: Any) -> Any:
        """Hyper-parameters with a member axis; one number for all members becomes one per member."""
        _, leaves, unflatten = self.wing.paths_and_leaves(hyper)
        return unflatten([self.wing.member_array(leaf, count, like) for leaf in leaves])

    def _axes(self, batch: Sequence[Any], count: int) -> tuple[int | None, ...]:
        """The member axis of each batch argument; refuses a batch of another shape than the first one."""
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


def naming_member(i: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function for one member; an error says which."""
    try:
        return function(*args)
    except Exception as error:
        error.add_note(f"This is member {i} of the ensemble.")
        raise

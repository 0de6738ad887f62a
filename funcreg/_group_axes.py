"""Which axes of a leaf make up one group. Bookkeeping, the same on both wings but for the layout of their layers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ._checks import one_of
from ._penalty import AnyPenalty, make
from ._rule import Rule

Axes = int | Sequence[int] | None


def check_groups(where: str, axis: Axes, per: str | None, group_scale: str) -> None:
    """Refuse options that name no groups."""
    if (axis is None) == (per is None):
        given = "both" if axis is not None else "neither"
        raise TypeError(
            f"{where}: give one of axis (the axes inside one group, such as axis=-1) and per ('output' or 'input'), "
            f"got {given}"
        )
    if per is not None:
        one_of(where, "per", per, ("output", "input"))
    one_of(where, "group_scale", group_scale, ("sqrt_size", "one"))
    axes = _axes(axis) or ()
    for a in axes:
        if isinstance(a, bool) or not isinstance(a, int) or a >= 0:
            raise ValueError(f"{where}: axis is counted from the end, -1 is the last one, got {a!r}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"{where}: axis must not name an axis twice, got {axis!r}")


def _axes(axis: Axes) -> tuple[int, ...] | None:
    return None if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)


def make_group_lasso(
    penalty_class: type[AnyPenalty], rule: Rule, lam: Any, axis: Axes, per: str | None, group_scale: str
) -> AnyPenalty:
    """Check the options of a group lasso and put them into its rule."""
    check_groups("group_lasso", axis, per, group_scale)
    axes = _axes(axis)
    options = (("axis", None if axes is None else tuple(sorted(axes))), ("per", per), ("group_scale", group_scale))
    return make(penalty_class, replace(rule, options=options), lam)


def resolve_group(
    name: str, shape: Sequence[int], options: Mapping[str, Any], layout: Mapping[str, int]
) -> tuple[list[int], str]:
    """The axes inside one group of a leaf, and the group scale.

    Args:
        name: of the leaf, for errors.
        shape: of the leaf.
        options: `axis` or `per`, and `group_scale`.
        layout: the axis of a kernel that counts outputs, and the one that counts inputs.

    Raises:
        ValueError: the leaf does not have the axis.
    """
    axes = options["axis"]
    ndim = len(shape)
    if axes is None:
        if ndim < 2:
            return [], options["group_scale"]
        counted = layout[options["per"]] % ndim
        return [i - ndim for i in range(ndim) if i != counted], options["group_scale"]
    if axes and -axes[0] > ndim:
        raise ValueError(
            f"group_lasso: the leaf {name!r} of shape {tuple(shape)} has no axis {axes[0]}; exclude it with .on "
            "or use per="
        )
    return list(axes), options["group_scale"]

"""Trees of parameters as named leaves, and trees that belong to them: anchors, steps, updates. Matched by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ._selectors import leaf_name


class Flat(NamedTuple):
    """A parameter tree taken apart: the leaves a penalty may act on, their names, and the ways back to a tree."""

    names: list[str]
    leaves: list[Any]
    rebuild: Callable[[list[Any]], Any]  # leaves that were passed over come back as they were
    rebuild_zeros: Callable[[list[Any]], Any]  # leaves that were passed over come back as zeros
    passed_over: list[tuple[str, Any]]  # leaves that no penalty acts on, with their names

    def check_names(self, where: str) -> None:
        """Refuse two leaves of one name: a selector could not tell them apart."""
        if len(set(self.names)) < len(self.names):
            name = next(n for i, n in enumerate(self.names) if n in self.names[:i])
            raise ValueError(f"{where}: two leaves have the name {name!r}; rename one of them")


def align(wing: Any, where: str, params: Any, **trees: Any) -> tuple[Flat, dict[str, list[Any]]]:
    """The leaves of several trees in the order of the parameters, matched by name.

    Raises:
        ValueError: a tree lacks a leaf of the parameters, has one more, or has one of another shape; names the first.
    """
    flat = wing.flatten(params)
    flat.check_names("params")
    lists = {}
    names = set(flat.names)
    for what, tree in trees.items():
        by_name = leaves_by_name(wing, f"{where}: {what}", tree, scalars=False)
        for name in by_name:
            if name not in names:
                there = name in wing.flatten(params, scalars=True).names
                reason = "is no floating-point array in the parameters" if there else "the parameters do not have"
                raise ValueError(f"{where}: {what} has a leaf {name!r} that {reason}")
        for name in names - by_name.keys():
            _refuse_none(wing, f"{where}: {what}", tree, name)
        lists[what] = [
            fitting(f"{where}: {what}", by_name, name, x, scalar=False)
            for name, x in zip(flat.names, flat.leaves, strict=True)
        ]
    return flat, lists


def _refuse_none(wing: Any, what: str, tree: Any, name: str) -> None:
    """Say so if a leaf is missing because it is None, as `.grad` of what took no part in a loss is."""
    paths, leaves, _ = wing.paths_and_leaves(tree)
    if any(leaf is None and leaf_name(path) == name for path, leaf in zip(paths, leaves, strict=True)):
        raise ValueError(
            f"{what}: the leaf {name!r} is None; give it zeros if it took no part in the loss, or leave it out of the "
            "parameters if it is not trained"
        )


def leaves_by_name(wing: Any, what: str, tree: Any, scalars: bool = True) -> dict[str, Any]:
    flat = wing.flatten(tree, scalars=scalars)
    flat.check_names(what)
    return dict(zip(flat.names, flat.leaves, strict=True))


def fitting(what: str, by_name: Mapping[str, Any], name: str, x: Any, scalar: bool) -> Any:
    """The leaf of another tree that belongs to a parameter."""
    if name not in by_name:
        have = ", ".join(list(by_name)[:5])
        raise ValueError(f"{what}: the leaf {name!r} of the parameters is missing; {what} has {have or 'no leaves'}")
    shape = tuple(getattr(by_name[name], "shape", ()))
    if shape != tuple(x.shape) and not (scalar and shape == ()):
        raise ValueError(f"{what}: the leaf {name!r} must have the parameter's shape {tuple(x.shape)}, got {shape}")
    return by_name[name]

"""The results of a function as NumPy arrays by dotted name, from whichever framework they come."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from funcreg._selectors import leaf_name, nearest

from . import _trees, arrays
from ._carry import Carrier
from ._refusals import checked
from ._trees import ARRAYS, Path

Leaves = dict[str, np.ndarray]
WHOLE = "(result)"  # the name of a result that is one array


def named(where: str, tree: Any, carrier: Carrier | None = None, torch_side: bool = False, copy: bool = True) -> Leaves:
    """The leaves of a result; numbers are leaves as well, None and strings are none.

    Args:
        where: the public function and the side, for errors.
        tree: what a function returned.
        carrier: of a pair: on the PyTorch side trees of parameters get the names and layouts of their twins, and on
            both a component `params` is dropped wherever it is.
        torch_side: whether the result is PyTorch's.
        copy: whether the arrays have memory of their own: what a function returns may be its input, or memory that its
            next call writes to.
    """
    leaves: Leaves = {}
    for path, x in _walk(where, tree, (), carrier if torch_side else None, np.array if copy else np.asarray):
        name = leaf_name(path if carrier is None else [key for key in path if key != "params"]) or WHOLE
        if name in leaves:
            raise ValueError(f"{where}: two leaves of the result have the name {name!r}; rename a key")
        leaves[name] = x
    return leaves


def _walk(
    where: str, node: Any, path: Path, carrier: Carrier | None, take: Callable[[Any], np.ndarray]
) -> Iterator[tuple[Path, np.ndarray]]:
    if isinstance(node, (bool, int, float, complex)) and not isinstance(node, np.generic):
        yield path, np.asarray(node)
    elif isinstance(node, ARRAYS):
        checked(where, _trees.name_of(path), node)
        yield path, take(arrays.to_host(node))
    elif node is None or isinstance(node, (str, bytes)):
        return
    elif carrier is not None and carrier.is_known(where, node):
        twins = carrier.leaves(where, {name: take(arrays.to_host(x)) for name, x in node.items()})
        yield from (((*path, *name.split(".")), x) for name, x in twins.items())
    else:
        for key, child in children(where, node, path):
            yield from _walk(where, child, path if key is None else (*path, str(key)), carrier, take)


def children(where: str, node: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        yield from node.items()
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        yield from zip(node._fields, node, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)
    else:
        yield from _trees.level(where, node, path)


def some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def same_names(where: str, ours: Leaves, theirs: Leaves) -> None:
    """Refuse results of different trees or shapes; there is nothing to compare."""
    for side, other, here, there in (("PyTorch", "JAX", ours, theirs), ("JAX", "PyTorch", theirs, ours)):
        more = [name for name in here if name not in there]
        if more:
            raise ValueError(
                f"{where}: the result of the {side} side has {some(more)}, which that of the {other} side lacks; "
                f"nearest names there: {nearest(more[0], list(there))}; return trees of the same names, or pass pair= "
                "for trees of parameters"
            )
    for name, x in ours.items():
        if x.shape != theirs[name].shape:
            raise ValueError(
                f"{where}: {name!r} has the shape {x.shape} on the PyTorch side and {theirs[name].shape} on the JAX "
                "side; bring both to one layout inside the functions, or pass pair= for trees of parameters"
            )
    if not ours:
        raise ValueError(f"{where}: the results hold no arrays; return what is to be compared")

"""The layers of both sides: units with a rule on the PyTorch side, the subtrees that could be their twins in flax."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch

from . import rules
from ._flax import Side
from ._names import Path

Shapes = dict[str, tuple[int, ...]]  # by relative name


@dataclass(eq=False)
class Torch:
    """A layer of the PyTorch side with a rule, or one bare parameter or buffer of a module that has none.

    Attributes:
        path: of the layer, or of the bare array.
        module: the layer; None for a bare array.
        prefix: what the names that its rule has for its arrays are preceded by.
        names: of its arrays, as in the state dict.
        forms: the leaves it could have in flax; a bare array has none.
        shape: of a bare array.
        repeats: all of its arrays are tied to those of an earlier one.
        why_bare: why the module of a bare array has no rule.
    """

    path: Path
    module: Any  # an nn.Module, or a Cell of a recurrent one
    prefix: str
    names: tuple[str, ...]
    forms: list[Shapes]
    shape: tuple[int, ...] = ()
    repeats: bool = False
    why_bare: str = ""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @cached_property
    def sizes(self) -> frozenset[int]:
        """How many numbers a twin of it could hold."""
        return frozenset(map(entries, self.forms)) if self.module is not None else frozenset({prod(self.shape)})

    def __str__(self) -> str:
        if self.module is None:
            return f"{self.name} {self.shape}"
        return (
            f"{self.name or 'the model itself'} ({kind_of(self.module)}: {brief(self.forms[0]) if self.forms else '?'})"
        )


@dataclass(eq=False)
class Flax:
    """A subtree of the flax side that could be a layer, or one bare leaf.

    Attributes:
        path: of the subtree, or of the bare leaf.
        names: the whole name of each leaf, by relative name; a bare leaf has the relative name "".
        shapes: their shapes, by relative name.
        kind: the class of the flax layer where it is known, or "".
        repeats: all of its leaves are shared with an earlier one.
    """

    path: Path
    names: dict[str, str]
    shapes: Shapes
    kind: str = ""
    repeats: bool = False

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @cached_property
    def size(self) -> int:
        """How many numbers it holds."""
        return entries(self.shapes)

    @property
    def bare(self) -> bool:
        return "" in self.names

    def __str__(self) -> str:
        return (
            f"{self.names['']} {self.shapes['']}" if self.bare else f"{self.name or 'the top'} ({brief(self.shapes)})"
        )


@dataclass(eq=False)
class Node:
    """A container with its children in order, or one item."""

    path: Path
    children: list[Node] = field(default_factory=list)
    item: Any = None  # Torch or Flax

    def items(self) -> Iterator[Any]:
        """In order; without a generator for each level, which hundreds of levels would pass every item through."""
        open_ones: list[Node] = [self]
        while open_ones:
            node = open_ones.pop()
            if node.item is not None:
                yield node.item
            open_ones.extend(reversed(node.children))


def brief(shapes: Mapping[str, tuple[int, ...]]) -> str:
    text = [f"{name} {shape}" for name, shape in shapes.items()]
    return ", ".join(text[:4]) + (f" and {len(text) - 4} more" if len(text) > 4 else "")


def entries(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))


def form(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[tuple[str, tuple[int, ...]]]:
    """What tells whether a subtree of flax has the leaves of a layer."""
    return frozenset((name, tuple(shape)) for name, shape in shapes.items())


def fits(ours: Torch, theirs: Flax) -> bool:
    """Whether the arrays could be twins: leaf names and shapes, and the class where flax shows it."""
    if theirs.size not in ours.sizes:  # most pairs of layers, and much faster
        return False
    if ours.module is None:
        return len(theirs.shapes) == 1 and ours.shape in theirs.shapes.values()
    twins = rules.rule_of(ours.module).twins.split()
    told = theirs.kind and twins
    return not theirs.bare and (not told or theirs.kind in twins) and rules.fits(ours.module, theirs.shapes)


def kind_of(module: Any) -> str:
    """The class of a layer, or of the recurrent module that a cell is part of."""
    return type(getattr(module, "module", module)).__name__


# --- PyTorch ---


def torch_nodes(
    net: torch.nn.Module, state: Mapping[str, Any], first: Mapping[str, str], left_out: set[str]
) -> tuple[Node, dict[Path, list[str]]]:
    """The tree of a model's layers and bare arrays, and the children of every module in the order of definition.

    Args:
        net: the model.
        state: its state dict.
        first: for every name in it the first name of the same tensor.
        left_out: names that shall have no partner; what remains of their layer are bare arrays.
    """
    keys: dict[Path, list[str]] = {}

    def walk(module: torch.nn.Module, path: Path, above: Iterable[str]) -> Node | None:
        prefix = "".join(f"{part}." for part in path)
        under = [name for name in above if name.startswith(prefix)]
        names = [name for name in under if name not in left_out]
        if not names:
            return None
        arrays = [name for name in under if not is_count(name)]
        keys[path] = [*module._parameters, *module._buffers, *module._modules]
        try:
            parts, why = (rules.parts(module) if rules.rule_of(module) else []), ""
        except rules.NoRule as error:
            parts, why = [], str(error)
        if parts and not any(name in left_out and isinstance(state[name], torch.Tensor) for name in arrays):
            return _layer(path, parts, prefix, names, first, keys)
        node = Node(path)
        for own in (*module._parameters, *module._buffers):
            name = prefix + own
            if name in names and isinstance(state[name], torch.Tensor):
                bare = Torch(
                    (*path, own), None, prefix, (name,), [], tuple(state[name].shape), first[name] != name, why
                )
                node.children.append(Node(bare.path, item=bare))
        for own, child in module._modules.items():
            below = walk(child, (*path, own), under) if child is not None else None
            if below is not None:
                node.children.append(below)
        return _without_wrapper(node)

    return walk(net, (), state) or Node(()), keys


def _layer(
    path: Path, parts: list[Any], prefix: str, names: list[str], first: Mapping[str, str], keys: dict[Path, list[str]]
) -> Node:
    """A layer, or a recurrent one as a container of its cells, each of which is a layer in flax."""
    node = Node(path)
    for part in parts:
        own = [name for name in names if name.endswith(getattr(part, "suffix", ""))]
        try:
            forms = [{name: tuple(shape) for name, shape in leaves.items()} for leaves in rules.leaves_of(part)]
        except rules.Mismatch as error:
            remedy = f"; rename={{{'.'.join(path)!r}: None}} leaves it out" if path else ""
            raise ValueError(f"match: {'.'.join(path) or 'the model'}: {error}{remedy}") from error
        below = path if len(parts) == 1 else (*path, _cell_name(part))
        item = Torch(below, part, prefix, tuple(own), forms, repeats=all(first[name] != name for name in own))
        node.children.append(Node(below, item=item))
    if len(parts) == 1:
        return node.children[0]
    keys[path] = [child.path[-1] for child in node.children]
    return node


def _cell_name(cell: Any) -> str:
    """`l0`, or `l0_forward` and `l0_backward` as flax calls the directions."""
    name = cell.suffix.removeprefix("_").removesuffix("_reverse")
    return name + ("_backward" if cell.reverse else "_forward") if cell.module.bidirectional else name


def is_count(name: str) -> bool:
    """What PyTorch's batch norm counts and flax's does not."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _without_wrapper(node: Node) -> Node:
    """A container of one item is that item."""
    return node.children[0] if len(node.children) == 1 and node.children[0].item is not None else node


# --- flax ---


def flax_nodes(side: Side, layers: Iterable[Torch]) -> Node:
    """The tree of what could be layers: the largest subtrees whose leaves some layer of the other side would have.

    A module of the user's that holds nothing but such a layer is its container.
    """
    of_size: dict[int, list[Any]] = {}
    for one in {(kind_of(x.module), frozenset(map(form, x.forms))): x for x in layers}.values():
        for size in one.sizes:
            of_size.setdefault(size, []).append(one.module)
    could_be: dict[frozenset[Any], bool] = {}
    held: Counter[Path] = Counter()  # how many numbers are below a path
    tree: dict[str, Any] = {}
    paths = [(leaf.path, name, False) for name, leaf in side.leaves.items()]
    for path, name, repeats in [*paths, *((path, name, True) for path, name in side.also)]:
        *above, own = path
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[own] = (name, repeats)
        held.update({path[:n]: prod(side.leaves[name].shape) for n in range(len(path))})

    def flat(node: Any) -> Iterator[tuple[Path, tuple[str, bool]]]:
        if isinstance(node, tuple):
            yield (), node
        else:
            for key, child in node.items():
                for path, leaf in flat(child):
                    yield (key, *path), leaf

    def could_be_layer(node: Any) -> bool:
        shapes = {".".join(rest): side.leaves[name].shape for rest, (name, _) in flat(node)}
        return any(rules.fits(module, shapes) for module in of_size.get(entries(shapes), ()))

    def opened(node: Any, path: Path) -> Node:
        return _without_wrapper(Node(path, [walk(child, (*path, key)) for key, child in node.items()]))

    def walk(node: Any, path: Path) -> Node:
        if not isinstance(node, tuple) and held[path] not in of_size:  # no layer, and its leaves need not be listed
            return opened(node, path)
        leaves = {".".join(rest): leaf for rest, leaf in flat(node)}
        names = {relative: name for relative, (name, _) in leaves.items()}
        shapes = {relative: side.leaves[name].shape for relative, name in names.items()}
        known = form(shapes)
        if not isinstance(node, tuple) and known not in could_be:
            could_be[known] = any(rules.fits(module, shapes) for module in of_size.get(entries(shapes), ()))
        kind = _kind(side, path)
        only = next(iter(node.values())) if len(node) == 1 and not isinstance(node, tuple) else None
        wraps = isinstance(only, dict) and not kind and side.twin(path) is not None and could_be_layer(only)
        if isinstance(node, tuple) or (could_be[known] and not wraps):
            repeats = all(again for _, again in leaves.values())
            return Node(path, item=Flax(path, names, shapes, kind, repeats))
        return opened(node, path)

    return walk(tree, ())


def _kind(side: Side, path: Path) -> str:
    """The class of a flax layer: of the module itself, or told by the name that linen gives on its own."""
    twin = side.twin(path)
    by_name = re.fullmatch(r"([A-Za-z]+)_\d+", path[-1]) if path else None
    kind = type(twin).__name__ if twin is not None else by_name[1] if by_name else ""
    known = {name for rule in rules.RULES.values() for name in rule.twins.split()}
    return kind if kind in known else ""

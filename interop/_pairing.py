"""Which layer is whose twin: containers first, then what they hold, by names, order and shapes.

NOTE [regions]: layers that fit each other by their arrays are of one kind. Two containers that hold equally many layers
of each kind could be twins. They are looked at from the largest to the smallest: if both sides have equally many of
them, names or a known order say which is whose, and each pair is a region of its own in which the same goes on; if
not, they are opened. So a layer is only compared with those of its own block, and blocks with blocks.

A kind with one layer on each side needs no more. In a kind with several, names that leave no choice win over the order;
the order counts where it is known on both sides and no name speaks against it; everything else is refused.

NOTE [linen's numbers]: linen counts constructions, not calls: in `Dense(2)(relu(Dense(2)(x)))` Python constructs the
outer layer first, which is Dense_0 and called last. The keys that `init` makes are in the order of calls, and win over
the numbers; where a transformation has sorted them only the numbers are left.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ._layers import Flax, Node, Torch, fits, form, kind_of
from ._names import Path, distinct_roles, label, numbers, pair_by_label, pair_by_stem, roles, same_role, stems

Keys = Mapping[Path, list[str] | None]
Signature = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class Pairing:
    """The pairs found so far, and what could not be paired.

    Attributes:
        torch_keys: for every module its children in the order of definition.
        flax_keys: for every container its children in order, or None where the order says nothing.
        calls: whether that order is one of calls, which wins over numbers.
        pairs: the twins, with the evidence: "name", "order" or "shape".
        lonely: layers of kinds of which the sides have not equally many.
        unclear: nodes that nothing tells apart, with the reason.
        crossed: pairs of which another node of the same region has the first one's name.
        counted: names of nodes whose order is only that of linen's numbers.
    """

    torch_keys: Keys
    flax_keys: Keys
    calls: bool
    pairs: list[tuple[Torch, Flax, str]] = field(default_factory=list)
    lonely: list[tuple[list[Torch], list[Flax]]] = field(default_factory=list)
    unclear: list[tuple[list[Node], list[Node], str]] = field(default_factory=list)
    crossed: list[tuple[Node, Node, Path]] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)

    def solve(self, ours: Sequence[Node], theirs: Sequence[Node]) -> None:
        """Pair everything below two lists of nodes."""
        left = [item for node in ours for item in node.items()]
        right = [item for node in theirs for item in node.items()]
        kinds = _kinds(left, right)
        counts, their_counts = (Counter(kinds[x] for x in side if x in kinds) for side in (left, right))
        odd = {kind for kind in (*counts, *their_counts) if counts[kind] != their_counts[kind]}
        if odd:
            self.lonely.append(([x for x in left if kinds.get(x) in odd], [y for y in right if kinds.get(y) in odd]))
        else:
            self._region(kinds, list(ours), list(theirs), 0, 0)

    def _region(self, kinds: Mapping[Torch | Flax, int], ours: list[Node], theirs: list[Node], i: int, j: int) -> None:
        """NOTE [regions]; names count from the components `i` and `j` on."""

        def signature(node: Node) -> Signature:
            return tuple(sorted(Counter(kinds[item] for item in node.items() if item in kinds).items()))

        signatures = {node: signature(node) for node in (*ours, *theirs)}
        by_label = {label(path[j:]): path for node in theirs for path in _paths(node)}
        while True:
            sizes = {node: sum(n for _, n in signatures[node]) for node in (*ours, *theirs)}
            ours, theirs = ([node for node in side if sizes[node]] for side in (ours, theirs))
            if not ours:
                return
            largest = max(sizes.values())
            for s in dict.fromkeys(signatures[node] for node in (*ours, *theirs) if sizes[node] == largest):
                left, right = ([node for node in side if signatures[node] == s] for side in (ours, theirs))
                if len(left) != len(right):
                    ours, theirs = (_opened(side, group) for side, group in ((ours, left), (theirs, right)))
                    signatures |= {node: signature(node) for node in (*ours, *theirs) if node not in signatures}
                    continue
                ours, theirs = ([node for node in side if signatures[node] != s] for side in (ours, theirs))
                for a, b, how in self._bijection(left, right, i, j):
                    namesake = by_label.get(label(a.path[i:]), b.path)
                    if how != "name" and _tells(a.path[i:]) and not _along(namesake, b.path):
                        self.crossed.append((a, b, namesake))
                    if a.item is not None and b.item is not None:
                        self.pairs.append((a.item, b.item, how))
                    else:  # one of them may be an item: a unit that the other side keeps in a container of its own
                        self._region(kinds, _inside(a), _inside(b), len(a.path), len(b.path))

    def _bijection(self, ours: list[Node], theirs: list[Node], i: int, j: int) -> list[tuple[Node, Node, str]]:
        """The pairs among nodes that could all be twins of one another, or none and a note of what is unclear."""
        if len(ours) == 1:
            return [(ours[0], theirs[0], "shape")]
        paths, their_paths = [node.path[i:] for node in ours], [node.path[j:] for node in theirs]
        by_label = pair_by_label(paths, their_paths)
        if by_label is not None:
            return [(node, theirs[k], "name") for node, k in zip(ours, by_label, strict=True)]
        partner = pair_by_stem(paths, their_paths)
        if partner is not None and len(partner) > 1:
            pairs: list[tuple[Node, Node, str]] = []
            for stem, their_stem in partner.items():
                group = [node for node, path in zip(ours, paths, strict=True) if stems(path) == stem]
                others = [node for node, path in zip(theirs, their_paths, strict=True) if stems(path) == their_stem]
                pairs += [(a, b, "name") for a, b, _ in self._ordered(group, others)]
            return pairs if len(pairs) == len(ours) else []
        pairs = self._ordered(ours, theirs)
        if partner is None and _names_object([x.path[i:] for x, _, _ in pairs], [y.path[j:] for _, y, _ in pairs]):
            self.unclear.append((ours, theirs, "the order pairs names that speak of different things"))
            return []
        return pairs

    def _ordered(self, ours: list[Node], theirs: list[Node]) -> list[tuple[Node, Node, str]]:
        first = _in_order(ours, self.torch_keys, 0, False)
        second = _in_order(theirs, self.flax_keys, 0, self.calls)
        if first is None or second is None:
            side = "PyTorch's" if first is None else "flax's"
            self.unclear.append((ours, theirs, f"the order on {side} side is not known, and the names do not decide"))
            return []
        if self.calls and len(theirs) > 1:
            unsorted = any(self.flax_keys.get(y.path[:n]) for y in theirs for n in range(len(y.path)))
            if not unsorted and re.fullmatch(r"[A-Z]\w*_\d+", second[0].path[-1]):
                self.counted += [".".join(y.path) for y in second]
        return [(a, b, "order") for a, b in zip(first, second, strict=True)]


def _opened(nodes: list[Node], group: list[Node]) -> list[Node]:
    """The nodes, those of the group replaced by their children in place."""
    return [child for node in nodes for child in (node.children if node in group else [node])]


def _inside(node: Node) -> list[Node]:
    return [node] if node.item is not None else list(node.children)


def _paths(node: Node) -> Iterator[Path]:
    yield node.path
    for child in node.children:
        yield from _paths(child)


def _tells(path: Path) -> bool:
    """Whether a name says what a layer is for, by words and not by a number."""
    return bool(roles(path[-1:])) and not any(n for _, n in label(path))


def _along(a: Path, b: Path) -> bool:
    """Whether one path is a leading part of the other: a layer and what it is wrapped in."""
    n = min(len(a), len(b))
    return a[:n] == b[:n]


def _kinds(left: Sequence[Torch], right: Sequence[Flax]) -> dict[Torch | Flax, int]:
    """Numbers the kinds; layers that only repeat tied arrays are left out unless both sides have them."""
    types: dict[Hashable, Torch | Flax] = {}
    type_of: dict[Torch | Flax, Hashable] = {}
    for item in (*left, *right):
        if isinstance(item, Torch):
            key: Hashable = (kind_of(item.module), item.shape, frozenset(map(form, item.forms)))
        else:
            key = (form(item.shapes), item.kind)
        types.setdefault(key, item)
        type_of[item] = key
    number = {key: n for n, key in enumerate(types)}
    ours = [key for key, x in types.items() if isinstance(x, Torch)]
    theirs = [key for key, y in types.items() if isinstance(y, Flax)]
    for a in ours:
        for b in theirs:
            if number[a] != number[b] and fits(types[a], types[b]):  # pyright: ignore[reportArgumentType]
                old = number[b]
                number |= {key: number[a] for key, n in number.items() if n == old}
    kinds = {item: number[key] for item, key in type_of.items()}
    for kind in set(kinds.values()):
        a, b = ([x for x in side if kinds[x] == kind] for side in (left, right))
        once, their_once = ([x for x in side if not x.repeats] for side in (a, b))
        options = ((a, b), (once, their_once), (a, their_once), (once, b))
        for some, others in options:
            if len(some) == len(others):
                for item in {*a, *b} - {*some, *others}:
                    del kinds[item]
                break
    return kinds


def _in_order(nodes: Sequence[Node], keys: Keys, depth: int, calls: bool) -> list[Node] | None:
    """The nodes in order, or None where it is not known: by the keys of each container, or by numbers of one stem.

    Keys in the order of calls win over numbers; where they are only those of definition they must agree.
    """
    if len(nodes) == 1:
        return list(nodes)
    branches: dict[str, list[Node]] = {}
    for node in nodes:
        if len(node.path) <= depth:
            return None
        branches.setdefault(node.path[depth], []).append(node)
    known = keys.get(nodes[0].path[:depth])
    names = list(branches)
    by_stem: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(names, key=lambda name: numbers((name,))):
        by_stem.setdefault(stems((name,)), []).append(name)
    if known is not None and all(name in known for name in names):
        names.sort(key=known.index)
        if not calls and any([name for name in names if name in group] != group for group in by_stem.values()):
            return None  # fc2 before fc1: numbers and order contradict each other
    elif len(by_stem) == 1 and len({tuple(map(len, numbers((name,)))) for name in names}) == 1:
        (names,) = by_stem.values()
    elif len(names) > 1:
        return None
    parts = [_in_order(branches[name], keys, depth + 1, calls) for name in names]
    return None if None in parts else [node for part in parts if part is not None for node in part]


def _names_object(ours: Sequence[Path], theirs: Sequence[Path]) -> bool:
    """Whether a pairing by order contradicts a name: equal to that of another, or of a clearly different role.

    Where a side calls all of them by one word, only numbers tell them apart.
    """
    if len(set(map(stems, ours))) == 1 or len(set(map(stems, theirs))) == 1:
        return False
    labels = {label(path): n for n, path in enumerate(theirs)}
    our_roles, their_roles = distinct_roles(ours), distinct_roles(theirs)
    for n, path in enumerate(ours):
        if our_roles[n] and labels.get(label(path), n) != n:
            return True
        if our_roles[n] and their_roles[n] and not same_role(our_roles[n], their_roles[n]):
            return True
    return False

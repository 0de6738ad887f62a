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

NOTE [two orders]: a shortcut that is defined last in PyTorch may be called first in flax. Where its convolution is told
by shape, two convolutions of one container have changed places, and the k-th norm is not the k-th norm. So a group that
such a layer divides otherwise on the two sides is not paired by order; its members follow the layers that they come
after: the norm behind a convolution is that behind the convolution's twin, if this pairs all of them.

NOTE [calls]: PyTorch's order is that of definition, and the calls may come in another one: w1, w2, w3 are called as
w2(silu(w1(x)) * w3(x)), and what flax calls gate, up, down are w1, w3, w2. Where the trace shows such an order, neither
counts, unless the user has numbered the layers of both sides.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

from ._layers import Flax, Node, Torch, fits, form, kind_of
from ._names import Label, Path, distinct_roles, label, numbers, pair_by_label, pair_by_stem, roles, same_role, stems

Keys = Mapping[Path, list[str] | None]
Signature = tuple[tuple[int, int], ...]
Twins = tuple[Node, Node]
Pairs = list[tuple[Node, Node, str]]


@dataclass(eq=False)
class Pairing:
    """The pairs found so far, and what could not be paired.

    Attributes:
        torch_keys: for every module its children in the order of definition.
        flax_keys: for every container its children in order, or None where the order says nothing.
        calls: whether that order is one of calls, which wins over numbers.
        torch_calls: the layers and bare arrays of PyTorch in the order in which they are first called, as far as known.
        pairs: the twins, with the evidence: "name", "order" or "shape".
        lonely: layers of kinds of which the sides have not equally many.
        unclear: nodes that nothing tells apart, with the reason.
        crossed: pairs of which another node of the same region has the first one's name.
        counted: names of nodes whose order is only that of linen's numbers.
    """

    torch_keys: Keys
    flax_keys: Keys
    calls: bool
    torch_calls: Sequence[str] = ()
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
        everywhere = list(theirs)
        groups: list[_Group] = []
        prefix, their_prefix = (side[0].path[:n] if side else () for side, n in ((ours, i), (theirs, j)))
        while True:
            sizes = {node: sum(n for _, n in signatures[node]) for node in (*ours, *theirs)}
            ours, theirs = ([node for node in side if sizes[node]] for side in (ours, theirs))
            if not ours:
                break
            largest = max(sizes.values())
            for s in dict.fromkeys(signatures[node] for node in (*ours, *theirs) if sizes[node] == largest):
                left, right = ([node for node in side if signatures[node] == s] for side in (ours, theirs))
                if len(left) != len(right):
                    ours, theirs = (_opened(side, group) for side, group in ((ours, left), (theirs, right)))
                    signatures |= {node: signature(node) for node in (*ours, *theirs) if node not in signatures}
                    continue
                ours, theirs = ([node for node in side if signatures[node] != s] for side in (ours, theirs))
                groups += self._bijection(left, right, i, j)
        by_label: dict[Label, Path] = {}
        for a, b, how in self._settled(groups, i, j, prefix, their_prefix):
            called = label(a.path[i:])
            if how != "name" and called != label(b.path[j:]) and _tells(a.path[i:]):
                by_label = by_label or {label(path[j:]): path for node in everywhere for path in _paths(node)}
                namesake = by_label.get(called, b.path)
                if not _along(namesake, b.path):
                    self.crossed.append((a, b, namesake))
            if a.item is not None and b.item is not None:
                self.pairs.append((a.item, b.item, how))
            else:  # one of them may be an item: a unit that the other side keeps in a container of its own
                self._region(kinds, _inside(a), _inside(b), len(a.path), len(b.path))

    def _bijection(self, ours: list[Node], theirs: list[Node], i: int, j: int) -> list["_Group"]:
        """The pairs among nodes that could all be twins of one another, or what is unclear."""
        if len(ours) == 1:
            return [_Group(ours, theirs, [(ours[0], theirs[0], "shape")])]
        paths, their_paths = [node.path[i:] for node in ours], [node.path[j:] for node in theirs]
        by_label = pair_by_label(paths, their_paths)
        if by_label is not None:
            pairs = [(node, theirs[k], "name") for node, k in zip(ours, by_label, strict=True)]
            return [_Group(ours, theirs, pairs)]
        partner = pair_by_stem(paths, their_paths)
        if partner is not None and len(partner) > 1:
            groups = []
            for stem, their_stem in partner.items():
                some = [node for node, path in zip(ours, paths, strict=True) if stems(path) == stem]
                others = [node for node, path in zip(theirs, their_paths, strict=True) if stems(path) == their_stem]
                groups.append(self._ordered(some, others, "name"))
            return groups
        group = self._ordered(ours, theirs, "order")
        group.names_count = partner is None
        if group.names_count and _object(group.pairs, i, j):
            group.why = "the order pairs names that speak of different things"
        return [group]

    def _ordered(self, ours: list[Node], theirs: list[Node], how: str) -> "_Group":
        first = _in_order(ours, self.torch_keys, 0, False)
        second = _in_order(theirs, self.flax_keys, 0, self.calls)
        if first is None or second is None:
            side = "PyTorch's" if first is None else "flax's"
            why = f"the order on {side} side is not known, and the names do not decide"
            if first is not None and self.calls:
                why += " (pass variables straight from module.init: jit, eval_shape and tree.map sort the keys)"
            return _Group(ours, theirs, why=why)
        if self.calls and len(theirs) > 1:
            unsorted = any(self.flax_keys.get(y.path[:n]) for y in theirs for n in range(len(y.path)))
            if not unsorted and re.fullmatch(r"[A-Z]\w*_\d+", second[0].path[-1]):
                self.counted += [".".join(y.path) for y in second]
        pairs = [(a, b, how) for a, b in zip(first, second, strict=True)]
        return _Group(ours, theirs, pairs, by_order=len(pairs) > 1)

    # --- NOTE [two orders] ---

    def _settled(self, groups: list["_Group"], i: int, j: int, ours: Path, theirs: Path) -> Pairs:
        """The pairs of a region's groups, those by order only where the two orders do not differ."""
        sure = [pair for group in groups if not group.by_order and not group.why for pair in group.pairs]
        for x, y, how in self.pairs:
            if how == "rename" and x.path[:i] == ours and y.path[:j] == theirs and len(x.path) > i and len(y.path) > j:
                sure.append((Node(x.path, item=x), Node(y.path, item=y), how))
        moved = self._moved(sure, groups) if any(group.by_order for group in groups) else {}
        doubtful = []
        for group in groups:
            if group.by_order and not group.why and (called := self._otherwise_called(group, i, j)):
                group.why = f"PyTorch defines {_listed(x for x, _, _ in group.pairs)}, and calls {_listed(called)}"
                group.ours, group.called = called, True
                doubtful.append(group)
            twins = next((r for r in moved if self._divides(r, group.pairs)), None) if group.by_order else None
            if twins is not None and not group.why:
                doubtful.append(group)
                both = f"{_named(twins[0])} and {_named(moved[twins])}"
                group.why = f"{both} come in another order in flax, so that order is no evidence"
        certain = sure + [pair for group in groups if group.by_order and not group.why for pair in group.pairs]
        for group in groups:
            again = self._following(group, certain) if group.why else []
            if group.called and not again:
                again = [(x, y, "order") for x, (_, y, _) in zip(group.ours, group.pairs, strict=True)]
                doubtful.remove(group)
            if again and group in doubtful and not (group.names_count and _object(again, i, j)):
                group.pairs, group.why = again, ""
            elif group.why:
                some, others = [x for x, _, _ in again], [y for _, y, _ in again]
                self.unclear.append((some or group.ours, others or group.theirs, group.why))
        return [pair for group in groups if not group.why for pair in group.pairs]

    def _moved(self, sure: Pairs, groups: list["_Group"]) -> dict[Twins, Node]:
        """Twins told without the order that have changed places with a layer of their class, and with which."""
        pairs = [(x, y) for x, y, _ in sure]
        of_group = [[(x, y) for x, y, _ in group.pairs] for group in groups if group.by_order]
        every = [*pairs, *(twins for some in of_group for twins in some)]
        ours = self._places([x for x, _ in every], self.torch_keys, False)
        theirs = self._places([y for _, y in every], self.flax_keys, self.calls)
        moved: dict[Twins, Node] = {}
        for (a, a2), (b, b2) in combinations(pairs, 2):
            if _class(a) == _class(b) and ours(a, b) * theirs(a2, b2) < 0:
                moved |= {(a, a2): b, (b, b2): a}
        for some in of_group:  # whichever of them are twins, so many come before
            for a, a2 in pairs:
                sides = sorted(ours(a, b) for b, _ in some), sorted(theirs(a2, b2) for _, b2 in some)
                if _class(a) == _class(some[0][0]) and 0 not in sides[0] + sides[1] and sides[0] != sides[1]:
                    moved.setdefault((a, a2), some[0][0])
        return moved

    def _divides(self, twins: Twins, pairs: Pairs) -> bool:
        """Whether a layer lies among the members of a group, elsewhere on the one side than on the other."""
        ours, theirs = [x for x, _, _ in pairs], [y for _, y, _ in pairs]
        before = self._places([twins[0], *ours], self.torch_keys, False)
        their_before = self._places([twins[1], *theirs], self.flax_keys, self.calls)
        sides = [before(twins[0], x) for x in ours], [their_before(twins[1], y) for y in theirs]
        among = any(len(set(side) - {0}) > 1 for side in sides)
        return among and (0 in sides[1] or sides[0] != sides[1])

    @staticmethod
    def _places(nodes: list[Node], keys: Keys, calls: bool) -> Callable[[Node, Node], int]:
        """(a, b) -> -1 if a comes first, 1 if b does, 0 if it is not known."""
        whole = _in_order(nodes, keys, 0, calls)
        place = {node: n for n, node in enumerate(whole or ())}

        def compared(a: Node, b: Node) -> int:
            if whole is not None:
                return -1 if place[a] < place[b] else 1
            two = _in_order([a, b], keys, 0, calls)
            return 0 if two is None else -1 if two[0] is a else 1

        return compared

    # --- NOTE [calls] ---

    def _otherwise_called(self, group: "_Group", i: int, j: int) -> list[Node]:
        """The PyTorch side of a group in the order of its calls, if that is another one and counts; else nothing."""
        ours, theirs = [x for x, _, _ in group.pairs], [y for _, y, _ in group.pairs]
        automatic = any(re.fullmatch(r"[A-Z]\w*_\d+", part) for y in theirs for part in y.path[j:])
        paths, their_paths = [x.path[i:] for x in ours], [y.path[j:] for y in theirs]
        if not automatic and len(set(map(stems, paths))) == 1 and len(set(map(stems, their_paths))) == 1:
            return []  # numbered by the user on both sides
        places = [self._place(x) for x in ours]
        if None in places:
            return []
        called = [x for _, _, x in sorted(zip(places, range(len(ours)), ours, strict=True), key=lambda one: one[:2])]
        return called if called != ours else []

    def _place(self, node: Node) -> int | None:
        """Which of PyTorch's calls is the first of a node, or of the layer that it is part of."""
        place = self._first_calls.get(node.path)
        above = (self._called.get(node.path[:n]) for n in range(len(node.path) - 1, 0, -1))
        return place if place is not None else next((place for place in above if place is not None), None)

    @cached_property
    def _called(self) -> dict[Path, int]:
        return {tuple(name.split(".")): n for n, name in enumerate(self.torch_calls)}

    @cached_property
    def _first_calls(self) -> dict[Path, int]:
        first: dict[Path, int] = {}
        for path, place in self._called.items():
            for n in range(1, len(path) + 1):
                first.setdefault(path[:n], place)
        return first

    def _following(self, group: "_Group", certain: Pairs) -> Pairs:
        """The members of a group paired by the layers that they come after, or nothing.

        Where PyTorch calls them in another order than it defines them, it must be one member for each layer.
        """
        first = _in_order([*group.ours, *(x for x, _, _ in certain)], self.torch_keys, 0, False)
        second = _in_order([*group.theirs, *(y for _, y, _ in certain)], self.flax_keys, 0, self.calls)
        if first is None or second is None:
            return []
        twin = {x: y for x, y, _ in certain}
        behind = {node and twin[node]: members for node, members in _behind(first, group.ours).items()}
        theirs = _behind(second, group.theirs)
        if {node: len(some) for node, some in behind.items()} != {node: len(some) for node, some in theirs.items()}:
            return []
        if group.called and any(len(some) > 1 for some in behind.values()):
            return []
        return [(x, y, "order") for node in behind for x, y in zip(behind[node], theirs[node], strict=True)]


@dataclass(eq=False)
class _Group:
    """Nodes of one region that could all be twins of one another.

    Attributes:
        pairs: of all of them, or nothing.
        by_order: whether only the order tells them apart.
        names_count: whether names may speak against the order.
        why: what is unclear, or nothing.
        called: whether PyTorch calls them in another order than it defines them; then `ours` are in that of the calls.
    """

    ours: list[Node]
    theirs: list[Node]
    pairs: Pairs = field(default_factory=list)
    by_order: bool = False
    names_count: bool = False
    why: str = ""
    called: bool = False


def _listed(nodes: Iterable[Node]) -> str:
    some = [_named(node) for node in nodes]
    return ", ".join(some[:6]) + (" ..." if len(some) > 6 else "")


def _class(node: Node) -> str:
    return kind_of(node.item.module) if node.item is not None else ""


def _object(pairs: Pairs, i: int, j: int) -> bool:
    return _names_object([x.path[i:] for x, _, _ in pairs], [y.path[j:] for _, y, _ in pairs])


def _behind(order: list[Node], members: list[Node]) -> dict[Node | None, list[Node]]:
    """Those of the members that come after each other node, up to the next."""
    found: dict[Node | None, list[Node]] = {}
    last = None
    for node in order:
        if node in members:
            found.setdefault(last, []).append(node)
        else:
            last = node
    return found


def _named(node: Node) -> str:
    return ".".join(node.path)


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
        a, b = ([x for x in side if kinds.get(x) == kind] for side in (left, right))
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
    if len(nodes) < 2:
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

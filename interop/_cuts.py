"""A model cut apart at its layers: every layer, and every step between layers, by itself.

NOTE [cuts]: in one run of a model what each layer is given and what it returns are replaced by known values, on both
sides by the same ones: those that PyTorch has in an ordinary run. What arrives at a layer is then made only by the
steps since the layers before it, and what a layer returns only by the layer. The same holds backwards: of the results
`arrived` and `computed` the derivatives are taken with known cotangents (PyTorch's gradients), with respect to the
values that were put in. The derivative with respect to what a layer was given is then only the layer's, and that with
respect to what it "returned" only that of the steps behind it. No fault reaches further than its own piece.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from funcreg._selectors import leaf_name

from . import _leaves
from ._trees import ARRAYS
from ._twins import Call, Group, Plan

Arrays = dict[str, Any]

# Names of arrays. Arguments of a cut model:
PARAM, INPUT, GIVEN, RETURNED = "param", "input", "given", "returned"
# and its results:
ARRIVED, COMPUTED, OUT = "arrived", "computed", "out"


def key(kind: str, *parts: Any) -> str:
    return "/".join((kind, *map(str, parts)))


def kind_of(name: str) -> str:
    return name.partition("/")[0]


def call_of(name: str) -> int:
    """The index of the call that an array belongs to."""
    return int(name.split("/")[1])


class Cut:
    """Puts known values in the place of what layers are given and return; NOTE [cuts].

    Attributes:
        found: what was there before, `arrived` and `computed`.
    """

    def __init__(self, plan: Plan, values: Mapping[str, Any]) -> None:
        self.plan, self.values = plan, values
        self.found: Arrays = {}
        self.count: dict[Group, int] = {}

    def enter(self, group: Group, name: str, given: Arrays) -> tuple[Any, Arrays]:
        """A layer is called: a token of the call, and what it is to be given instead."""
        n = self.count[group] = self.count.get(group, -1) + 1
        calls = self.plan.of.get(group, [])
        if n >= len(calls):
            return None, given
        call = calls[n]
        new = {}
        for array, x in given.items():
            if key(GIVEN, call.index, array) in self.values:
                self.found[key(ARRIVED, call.index, array)] = x
                new[array] = self.given(call, array, x)
        return call, given | new

    def leave(self, call: Call | None, result: Any) -> Any:
        if call is None:
            return result
        self.found[key(COMPUTED, call.index)] = result
        return self.returned(call, result)

    def given(self, call: Call, array: str, x: Any) -> Any:
        del x
        return self.values[key(GIVEN, call.index, array)]

    def returned(self, call: Call, result: Any) -> Any:
        del result
        return self.values[key(RETURNED, call.index)]


@dataclass(eq=False)
class Seen:
    """One call of a layer in an ordinary run."""

    group: Group
    name: str
    arrived: Arrays
    given: Arrays = field(default_factory=dict)
    returned: Any = None

    @property
    def whole(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.given) and self.returned is not None


class Tape:
    """Notes the calls of an ordinary run.

    Args:
        tap: what becomes of every array that is noted: the one to note, and the one to go on with.
        changed: (number of the call, result) -> the result to go on with.
    """

    def __init__(
        self,
        tap: Callable[[Any], tuple[Any, Any]] = lambda x: (x, x),
        changed: Callable[[int, Any], Any] = lambda n, x: x,
    ) -> None:
        self.tap, self.changed = tap, changed
        self.calls: list[Seen] = []

    def enter(self, group: Group, name: str, given: Arrays) -> tuple[Any, Arrays]:
        seen = Seen(group, name, given)
        self.calls.append(seen)
        further = {}
        for array, x in given.items():
            seen.given[array], further[array] = self.tap(x)
        return len(self.calls) - 1, further

    def leave(self, n: int, result: Any) -> Any:
        seen = self.calls[n]
        seen.returned, further = self.tap(self.changed(n, result))
        return further


Hook = Cut | Tape


def named_outputs(where: str, out: Any) -> Arrays:
    """The arrays of a model's result by name; what is no array is left out."""
    found: Arrays = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if isinstance(node, ARRAYS):
            found[leaf_name(path) or _leaves.WHOLE] = node
        elif node is not None and not isinstance(node, (str, bytes, bool, int, float, complex)):
            for name, child in _leaves.children(where, node, path):
                walk(child, path if name is None else (*path, str(name)))

    walk(out, ())
    return found

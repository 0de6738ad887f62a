"""Which calls of a PyTorch model are which of a flax model: layers in groups, their calls in order."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import _activations, _calls
from ._activations import Slot
from .pair import Pair


@dataclass(eq=False)
class Group:
    """A layer and its twin. A layer that is shared or tied on one side only has several twins on the other.

    Attributes:
        modules: of PyTorch, by name.
        flax: the paths of the twins; of a recurrent layer those of its cells.
        ours, theirs: how they are called.
        slots: what is known of the layout of their arrays, by name.
        span: how many calls in flax are one of PyTorch: a recurrent layer of flax is one of PyTorch's layers of cells.
    """

    modules: dict[str, nn.Module]
    flax: list[str]
    ours: _calls.Convention
    theirs: _calls.Convention
    slots: dict[str, Slot]
    span: int = 1

    def slot(self, array: str) -> Slot:
        return self.slots.get(array, self.slots["input"])

    @property
    def recurrent(self) -> bool:
        return any(isinstance(module, nn.RNNBase) for module in self.modules.values())


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer, the same on both sides.

    Attributes:
        index: among all calls of PyTorch.
        group: the layer.
        name: of the PyTorch layer, with the number of the call if there are several.
        flax: the path of the twin.
    """

    index: int
    group: Group
    name: str
    flax: str


@dataclass(eq=False)
class Plan:
    """The calls that both sides make.

    Attributes:
        calls: in PyTorch's order.
        of: the same by group.
        notes: which calls only one side makes.
    """

    calls: list[Call]
    of: dict[Group, list[Call]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def groups(pair: Pair, net: nn.Module) -> list[Group]:
    """The layers of a pair, those that share a module or a path in one group."""
    named = {name: module for name, module in net.named_modules(remove_duplicate=False)}
    found: list[Group] = []
    for name, flax in pair.layers:
        module = named[name]
        mine = [g for g in found if flax in g.flax or any(m is module for m in g.modules.values())]
        if mine:
            group = mine[0]
            for other in mine[1:]:
                group.modules |= other.modules
                group.flax += [path for path in other.flax if path not in group.flax]
                found.remove(other)
            if not any(m is module for m in group.modules.values()):
                group.modules[name] = module
            group.flax += [flax] if flax not in group.flax else []
            continue
        slots = _activations.slots(pair, module, name, flax)
        span = module.num_layers if isinstance(module, nn.RNNBase) else 1
        found.append(Group({name: module}, [flax], *_calls.conventions(module), slots, span))
    return found


def plan(ours: Sequence[tuple[int, Group, str]], theirs: Iterable[tuple[Group, str]]) -> Plan:
    """The calls of both sides, in the order in which each side makes them.

    Args:
        ours: the layers that PyTorch calls: the number of the call, the layer and its name.
        theirs: those that flax calls, with their paths.
    """
    paths: dict[Group, list[str]] = {}
    for group, path in theirs:
        paths.setdefault(group, []).append(path)
    totals = Counter(name for _, _, name in ours)
    made: Counter[Group] = Counter()
    numbers: Counter[str] = Counter()
    result = Plan([])
    for index, group, name in ours:
        there = paths.get(group, [])
        n, made[group] = made[group], made[group] + 1
        numbers[name] += 1
        if n >= len(there):
            continue
        label = f"{name} (call {numbers[name]})" if totals[name] > 1 else name
        call = Call(index, group, label, there[n])
        result.calls.append(call)
        result.of.setdefault(group, []).append(call)
    for group in dict.fromkeys([*made, *paths]):
        if made[group] != len(paths.get(group, [])):
            result.notes.append(
                f"{_some(group.modules)}: {made[group]} calls seen in PyTorch, {len(paths.get(group, []))} of "
                f"{_some(group.flax)} in flax (not made, or inside jax.vmap or jax.checkpoint, which show no values)"
            )
    return result


def _some(names: Iterable[Any]) -> str:
    return ", ".join(str(name) or "the model itself" for name in names)

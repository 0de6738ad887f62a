"""From the runs of `locate` to its answer: every piece of the model judged, and the first that differs put in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ._cuts import AFTER, ARRIVED, COMPUTED, GIVEN, INPUT, OUT, PARAM, RETURNED, key
from ._judged import leaf_of
from ._locate_runs import GRADIENT, Runs, argument_of
from ._measure import compare
from ._text import ORDER
from ._twins import Call, Group
from .location import Layer, Location, worst_leaf, worst_of
from .report import Leaf
from .verdict import Evidence, Verdict, by_conditioning

FORWARD, BACKWARD = "forward", "gradient"
_LISTED = 5  # further places


class Piece(NamedTuple):
    """A piece of the model: its place in words, a direction, and what was found there."""

    where: str
    direction: str
    leaf: Leaf


def judged(runs: Runs) -> Location:
    """The answer."""
    leaves = _Leaves(runs)
    rows = leaves.rows()
    pieces = sorted(
        (piece for piece in _pieces(runs, leaves) if piece.leaf.verdict is not Verdict.ROUNDING),
        key=lambda piece: (ORDER.index(piece.leaf.verdict), piece.direction == BACKWARD),
    )
    first = pieces[0] if pieces else Piece("", "", _NOTHING)
    reasons = [*_about(pieces), *_parameters_that_differ(runs), *runs.plan.notes, *_layouts(runs), *_statistics(runs)]
    verdict = worst_of([piece.leaf.verdict for piece in pieces])
    return Location(verdict, first.where, first.direction, tuple(rows), leaves.ends(), tuple(reasons))


_NOTHING = Leaf("", (), Verdict.ROUNDING, None, None, ("", ""), None)


class _Leaves:
    """Everything that was compared, by the call that it belongs to.

    Attributes:
        of: (what, number of the call) -> the leaves.
        result, inputs: of the model: its results, and the gradients of its inputs.
        parameters: gradients, by layer, or None where they belong to none.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.of: dict[tuple[str, int], list[Leaf]] = {}
        self.result: list[Leaf] = []
        self.inputs: list[Leaf] = []
        self.parameters: dict[Group | None, list[Leaf]] = {}
        layers = {path: group for group in runs.groups for path in group.flax}
        ours, theirs = runs.ours.float64 or {}, runs.theirs.float64 or {}
        for name in ours:
            if name not in theirs or name.startswith(AFTER):
                continue
            leaf = self._leaf(name)
            kind, _, rest = name.partition("/")
            if kind == OUT:
                self.result.append(leaf)
            elif kind == GRADIENT + INPUT:
                self.inputs.append(leaf)
            elif kind == GRADIENT + PARAM:
                group = next(
                    (g for path, g in layers.items() if f"{rest}.".startswith(f"{path}." if path else "")), None
                )
                self.parameters.setdefault(group, []).append(replace(leaf, name=rest))
            else:
                self.of.setdefault((kind, int(rest.split("/")[0])), []).append(leaf)
        for name, (ours_shape, theirs_shape) in runs.shapes.items():
            leaf = _of_other_shape(name, ours_shape, theirs_shape)
            kind, _, rest = name.partition("/")
            if kind == OUT:
                self.result.append(leaf)
            else:
                result = ARRIVED if kind == GIVEN else COMPUTED
                self.of.setdefault((result, int(rest.split("/")[0])), []).append(leaf)

    def _leaf(self, name: str) -> Leaf:
        leaf = leaf_of(name, self.runs.ours, self.runs.theirs)
        layout = self.runs.layouts.get(argument_of(name.removeprefix(GRADIENT)))
        if layout is not None and layout.guessed and leaf.verdict is Verdict.ROUNDING:
            reason = (
                f"agrees only with its axes in the order {', '.join(map(str, layout.order))}, which axes of equal "
                "length do not tell from a fault; use inputs whose axes all have different lengths"
            )
            return replace(leaf, verdict=Verdict.INCONCLUSIVE, reason=reason)
        return leaf

    def get(self, call: Call, *kinds: str) -> Leaf | None:
        found = [leaf for kind in kinds for leaf in self.of.get((kind, call.index), [])]
        if GRADIENT + GIVEN in kinds and call is self.runs.plan.of[call.group][-1]:  # the sum over its calls
            found += self.parameters.get(call.group, [])
        return worst_leaf(found)

    def rows(self) -> list[Layer]:
        bare = [
            Layer(self._torch_name(leaf.name), leaf.name, inside_gradient=leaf)
            for leaf in self.parameters.get(None, [])
        ]
        return bare + [
            Layer(
                call.name,
                call.flax,
                self.runs.values.get(call.index),
                self.get(call, ARRIVED),
                self.get(call, COMPUTED),
                self.runs.free_gradients.get(call.index),
                self.get(call, GRADIENT + RETURNED),
                self.get(call, GRADIENT + GIVEN),
            )
            for call in self.runs.plan.calls
        ]

    def _torch_name(self, leaf: str) -> str:
        return next(link.torch[0] for link in self.runs.pair.links if leaf in link.jax)

    def bare(self) -> Iterator[tuple[str, Leaf]]:
        for leaf in self.parameters.get(None, []):
            yield self._torch_name(leaf.name), leaf

    def ends(self) -> tuple[Layer, Layer]:
        off = max(self.runs.result.values(), default=None)
        result = Layer("(result)", "", off, worst_leaf(self.result))
        return Layer("(input)", "", handed_back=worst_leaf(self.inputs)), result


def _of_other_shape(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> Leaf:
    reason = f"the shape is {ours} in PyTorch and {theirs} in flax, which is no other layout of it"
    return Leaf(name, ours, Verdict.SEMANTIC, None, None, ("", ""), None, reason)


# --- places ---


def _pieces(runs: Runs, leaves: _Leaves) -> Iterator[Piece]:
    """All pieces in their order: forwards from the input on, then backwards from the result on."""
    calls = {call.index: call for call in runs.plan.calls}
    behind: dict[int, list[int]] = {}
    for call in calls.values():
        for maker in _makers(runs, calls, str(call.index), call.index):
            behind.setdefault(maker, []).append(call.index)

    def found(where: str, direction: str, leaf: Leaf | None) -> Iterator[Piece]:
        if leaf is not None:
            yield Piece(where, direction, leaf)

    for call in calls.values():
        before = _makers(runs, calls, str(call.index), call.index)
        yield from found(_gap(calls, before, call), FORWARD, leaves.get(call, ARRIVED))
        yield from found(f"inside `{call.name}`", FORWARD, leaves.get(call, COMPUTED))
    for leaf in leaves.result:
        before = _makers(runs, calls, leaf.name, len(runs.torch.calls))
        yield from found(_gap(calls, before, None), FORWARD, leaf)
    for call in reversed(calls.values()):
        leaf = leaves.get(call, GRADIENT + RETURNED)
        after = behind.get(call.index, [])
        reader = _reader(runs, call, after) if leaf and leaf.verdict is not Verdict.ROUNDING else None
        yield from found(_gap(calls, [call.index], calls.get(reader) if reader is not None else None), BACKWARD, leaf)
        yield from found(f"inside `{call.name}`", BACKWARD, leaves.get(call, GRADIENT + GIVEN))
    for name, leaf in leaves.bare():
        yield from found(f"in the use of `{name}`", BACKWARD, leaf)
    first = next((call for call in calls.values() if not _makers(runs, calls, str(call.index), call.index)), None)
    for leaf in leaves.inputs:
        yield from found(_gap(calls, [], first), BACKWARD, leaf)


def _gap(calls: Mapping[int, Call], before: Sequence[int], after: Call | None) -> str:
    """The steps between two layers, or between one and an end of the model."""
    if before and after:
        return f"between `{calls[max(before)].name}` and `{after.name}`"
    if after:
        return f"before `{after.name}`"
    return f"after `{calls[max(before)].name}`" if before else "between the input and the result"


def _makers(runs: Runs, calls: Mapping[int, Call], reader: str, number: int) -> list[int]:
    """The calls that something is made of; where no gradient tells, the one before it."""
    if reader in runs.torch.unknown:
        return [index for index in calls if index < number][-1:] if not runs.torch.is_input(reader) else []
    found: set[int] = set()
    todo = set(runs.torch.before[reader])
    while todo:
        index = todo.pop()
        if index in calls:
            found.add(index)
        else:  # a call that only PyTorch makes is a step like any other
            todo |= runs.torch.before[str(index)]
    return sorted(found)


def _reader(runs: Runs, call: Call, after: Sequence[int]) -> int | None:
    """Which of the layers that read a result hands a wrong gradient back to it; None: it is the model's result."""
    if len(after) < 2 and not (after and runs.reaches_result(call.index)):
        return after[0] if after else None
    candidates = [*after, None] if runs.reaches_result(call.index) else list(after)
    return max(candidates, key=lambda index: runs.handed_back(call.index, index))


# --- words ---


def _about(pieces: Sequence[Piece]) -> list[str]:
    """What is known of the first piece, and where else it is."""
    if not pieces:
        return []
    first = pieces[0]
    said = [f"{first.where}: {_what(first)}{f': {first.leaf.reason}' if first.leaf.reason else ''}"]
    others = [p for p in pieces[1:] if p.leaf.verdict is first.leaf.verdict and p.direction == first.direction]
    others = [p for n, p in enumerate(others) if p.where not in {first.where, *(q.where for q in others[:n])}]
    if others:
        more = f" and at {len(others) - _LISTED} more places" if len(others) > _LISTED else ""
        said.append(f"by itself also {', '.join(p.where for p in others[:_LISTED])}{more}")
    return said


def _what(piece: Piece) -> str:
    """Which array it is, and by how much it is off."""
    kind, _, rest = piece.leaf.name.removeprefix(GRADIENT).partition("/")
    array = rest.partition("/")[2]
    name = {
        ARRIVED: f"the {array} handed over",
        COMPUTED: "the output",
        OUT: "the result" + (f" {rest!r}" if rest != "(result)" else ""),
        GIVEN: f"the gradient of the {array}",
        RETURNED: "the gradient handed back",
        INPUT: f"the gradient of input {rest}",
    }.get(kind, f"the gradient of {piece.leaf.name}")
    off = piece.leaf.float64
    return f"{name} differs by {off.relative:.1e} of its largest entry" if off else f"{name} differs"


def _parameters_that_differ(runs: Runs) -> list[str]:
    names = list(runs.flax.differing)
    some = [f"{name} by {runs.flax.differing[name]:.1e} of its largest entry" for name in names[:_LISTED]]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    remedy = "; to compare the same values, pair.to_jax(net)" if names else ""
    return [f"flax_model holds other values than net: {', '.join(some)}{more}{remedy}"] if names else []


def _layouts(runs: Runs) -> list[str]:
    """Layouts that no class of layers asks for."""
    said = []
    for name, layout in runs.layouts.items():
        if name.startswith(INPUT) and layout.moves:
            said.append(f"{name.replace('/', ' ')} is given to flax with its channels last, {layout.shape}")
        elif name.startswith(OUT) and layout.moves:
            said.append(f"the result is compared with its axes in the order {', '.join(map(str, layout.order))}")
    return said


def _statistics(runs: Runs) -> list[str]:
    """Buffers that the call has changed, and not in the same way."""
    said = []
    for link in runs.pair.links:
        if not all(name in runs.torch.changed for name in link.torch):
            continue
        made = link.to_jax(*(runs.torch.statistics[name] for name in link.torch))
        for name, ours in zip(link.jax, made, strict=True):
            theirs = runs.after.get(key(AFTER, name))
            if theirs is None or theirs.shape != ours.shape:
                continue
            found = compare(ours, np.asarray(theirs))
            evidence = Evidence(found.size, found.errors.absolute, 0.0)
            if found.apart.any() or by_conditioning(evidence) is not Verdict.ROUNDING:
                said.append(f"{link.torch[0]} by {found.errors.relative:.1e}")
    more = f" and {len(said) - _LISTED} more" if len(said) > _LISTED else ""
    return (
        [
            f"the call updates running statistics differently: {', '.join(said[:_LISTED])}{more} (PyTorch keeps the "
            "unbiased variance, flax the biased one; momentum m is 1 - m there): outputs in evaluation mode will differ"
        ]
        if said
        else []
    )

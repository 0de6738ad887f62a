"""A change that is made to the PyTorch side before it is run again."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .._leaves import WHOLE, Leaves
from ._calls import Changed, Rule, Seen

Function = Callable[..., Any]
Steps = tuple[Function, Function]


def _same(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Change:
    """What is done differently, at one of three places: while a function runs, to a pair of steps, to the results.

    Attributes:
        kind: of the hint; its row in the table.
        change: the sentence of the hint.
        stage: within a kind, later stages are tried only where none before explains the difference.
        sized: see `Rule`.
        called: of `check` the function, of `check_training` the step, with the change.
        steps: of `check_training` the pair of functions, with the change.
        results: the results, with the change.
    """

    kind: str
    change: str
    stage: int = 0
    sized: bool = False
    called: Callable[[Function], Function] = _same
    steps: Callable[[Steps], Steps] = _same
    results: Callable[[Leaves], Leaves] = _same


_SINGLE = 32  # calls of one form that are changed one at a time


def of_calls(seen: Seen) -> Iterator[Change]:
    """The change made to all calls that it fits (stage 1), and to each of them (stage 2)."""
    rule, option, places = seen.rule, seen.option, seen.places

    def sentence(where: str) -> str:
        return f"PyTorch {option.now}{where}; with {option.then} both sides agree"

    everywhere = f" in {len(places)} calls{_at(places)}" if len(places) > 1 else _at(places)
    yield Change(rule.kind, sentence(everywhere), 1, rule.sized, rerun(rule, option.key))
    # Those inside an optimizer have no place of their own: what is wrong there is wrong for all parameters.
    alone = [number for number, place in enumerate(places) if place] if len(places) > 1 else []
    for number in alone[:_SINGLE]:
        place = places[number]
        where = f" in call {number + 1} of {len(places)}{_at([place])}"
        yield Change(rule.kind, sentence(where), 2, rule.sized, rerun(rule, option.key, number))


def rerun(rule: Rule, key: Any, only: int | None = None) -> Callable[[Function], Function]:
    """A function with the calls that an option of this key fits, or one of them, made as it says."""

    def around(function: Function) -> Function:
        def changed(*args: Any) -> Any:
            with Changed(rule, key, only):
                return function(*args)

        return changed

    return around


def _at(places: list[str]) -> str:
    known = list(dict.fromkeys(place for place in places if place))
    return f" ({', '.join(known[:3])}{', ...' if len(known) > 3 else ''})" if known else ""


def of_results(names: set[str]) -> Iterator[Change]:
    """The leaves that differ, twice or half."""
    for factor, words in ((2.0, "twice its results"), (0.5, "half of its results")):
        one = "the result" if names == {WHOLE} else ", ".join(f"`{name}`" for name in sorted(names)[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        change = f"PyTorch and JAX differ by a factor in {one}{more}; with {words} of PyTorch both sides agree"
        yield Change("factor", change, 0, True, results=functools.partial(_scaled, names, factor))


def _scaled(names: set[str], factor: float, leaves: Leaves) -> Leaves:
    return {name: np.asarray(x * factor) if name in names else x for name, x in leaves.items()}


def of_masks(inputs: Any, skip: int = 0) -> Iterator[Change]:
    """Inputs of nothing but zeros and ones, or bools, exchanged.

    Args:
        inputs: what is given to the function.
        skip: how many arguments of the function come before them.
    """
    for number, (path, x) in enumerate(pytree.tree_flatten_with_path(inputs)[0]):
        x = np.asarray(x)
        if x.dtype.kind in "biuf" and np.isin(x, (0, 1)).all() and x.any() and not x.all():
            what = "bools" if x.dtype.kind == "b" else "zeros and ones"
            now = f"PyTorch reads the mask of {what} in input{pytree.keystr(path)} as it is"
            change = f"{now}; with its opposite both sides agree"
            yield Change("mask_polarity", change, 3, called=functools.partial(_negated, number, skip))


def _negated(number: int, skip: int, function: Function) -> Function:
    def changed(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args[skip:])
        x = leaves[number]
        leaves[number] = ~x if x.dtype == torch.bool else 1 - x
        return function(*args[:skip], *pytree.tree_unflatten(leaves, spec))

    return changed

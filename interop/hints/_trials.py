"""Runs of the two sides in float64, from which a change is judged: of `check` one, of `check_training` one a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._leaves import Leaves
from .._sides import Side
from . import _draws, _steps, _transformations
from ._changes import Change, Function, Steps, of_masks
from ._knobs import Knob

Tree = Any
Given = tuple[Tree, ...]
_KEPT = 2**26  # bytes of JAX's results that are kept between two trials


class Trial(ABC):
    """Both sides, to be run on what was given, or on a draw like it."""

    given: Given

    @abstractmethod
    def theirs(self, given: Given) -> Iterator[Leaves]: ...

    @abstractmethod
    def ours(self, change: Change, given: Given) -> Iterator[Leaves]: ...

    @abstractmethod
    def scalable(self, differing: set[str]) -> set[str]:
        """The leaves that may be multiplied by a number, if all of them are."""

    @abstractmethod
    def of_inputs(self) -> Iterator[Change]:
        """What could be different in the inputs."""

    def of_steps(self) -> Iterator[Change]:
        """What could be different in training steps."""
        return iter(())

    def knobs(self) -> Iterator[Knob]:
        """The hyper-parameters of training steps."""
        return iter(())

    @abstractmethod
    def draws(self) -> Iterator[tuple[bool, Given]]:
        """Other inputs, and whether they have more rows."""


class CheckTrial(Trial):
    """The functions of `check`."""

    def __init__(self, torch_side: Side, jax_side: Side, torch_fn: Function, jax_fn: Function, inputs: Given) -> None:
        self.sides, self.functions, self.given = (torch_side, jax_side), (torch_fn, jax_fn), inputs

    def theirs(self, given: Given) -> Iterator[Leaves]:
        yield _raised(self.sides[1].call(self.functions[1], given, 64))

    def ours(self, change: Change, given: Given) -> Iterator[Leaves]:
        side = self.sides[0]
        function = change.called(side.function(self.functions[0], 64))
        yield change.results(_raised(side.call(function, given, 64)))

    def scalable(self, differing: set[str]) -> set[str]:
        return differing

    def of_inputs(self) -> Iterator[Change]:
        return of_masks(self.given)

    def draws(self) -> Iterator[tuple[bool, Given]]:
        yield False, _draws.mild(self.given)
        yield False, _draws.strong(self.given)
        for length in _draws.lengths(self.given):
            yield True, _draws.longer(self.given, length)


class ProbesTrial(CheckTrial):
    """The functions of `check_probes`; what is given are the inputs of each probe, whose results come one by one.

    Args:
        differing: how many of the probes, the first ones, show a difference. The others stay as they are when numbers
            are drawn: where a variance is exactly 0, that of other numbers is nothing but rounding.
    """

    def __init__(self, *args: Any, differing: int) -> None:
        super().__init__(*args)
        self.differing = differing

    def theirs(self, given: Given) -> Iterator[Leaves]:
        for inputs in given:
            yield from super().theirs(inputs)

    def ours(self, change: Change, given: Given) -> Iterator[Leaves]:
        for inputs in given:
            yield from super().ours(change, inputs)

    def draws(self) -> Iterator[tuple[bool, Given]]:
        for longer, drawn in super().draws():
            yield longer, (*drawn[: self.differing], *self.given[self.differing :])

    def of_inputs(self) -> Iterator[Change]:
        found = {change.change: change for inputs in self.given for change in of_masks(inputs)}
        return iter(found.values())


class TrainingTrial(Trial):
    """The steps of `check_training`; what is given is `(params, hyper, batches)`.

    Args:
        start: `start(side, steps, params, hyper)`: a run in float64, whose `advance(batch)` returns the results.
    """

    def __init__(
        self,
        start: Callable[[Side, Steps, Tree, Tree], Any],
        torch_side: Side,
        jax_side: Side,
        torch_steps: Steps,
        jax_steps: Steps,
        given: tuple[Tree, Tree, Sequence[tuple[Tree, ...]]],
    ) -> None:
        self.start, self.sides, self.given = start, (torch_side, jax_side), given
        self.steps = (torch_steps, jax_steps)
        self.steps = (torch_steps, self._theirs())

    def theirs(self, given: Given) -> Iterator[Leaves]:
        yield from self._run(1, self.steps[1], given)

    def _theirs(self) -> Steps:
        """Of JAX, with wide counts where its step takes them."""
        wide = _with_wide_counts(self.steps[1])
        params, hyper, batches = self.given
        try:
            next(self._run(1, wide, (params, hyper, batches[:1])))
        except Exception:
            return self.steps[1]
        return wide

    def ours(self, change: Change, given: Given) -> Iterator[Leaves]:
        init, step = change.steps(self.steps[0])
        yield from map(change.results, self._run(0, (init, change.called(step)), given))

    def scalable(self, differing: set[str]) -> set[str]:
        return {name for name in differing if name.startswith("metrics.")}  # parameters go into the next step

    def of_inputs(self) -> Iterator[Change]:
        return of_masks(self.given[2][0], skip=2)

    def of_steps(self) -> Iterator[Change]:
        params, hyper, batches = self.given
        first = self.start(self.sides[0], self.steps[0], params, hyper)
        yield from _steps.counts(first.state, len(batches))
        yield from _steps.factors(hyper)
        with self.sides[0].precision(64):
            given = self.sides[0].given(hyper, 64)
            yield from _transformations.changes(self.steps[0], first.state, given)
        few = (params, hyper, batches[: _steps.ENOUGH_STEPS])
        yield from _steps.decays(hyper, lambda around: self._all(0, around(self.steps[0]), few))

    def knobs(self) -> Iterator[Knob]:
        hyper = self.given[1]
        with self.sides[0].precision(64):
            yield from _transformations.knobs(self.steps[0], self.sides[0].given(hyper, 64))
        yield from _steps.knobs(hyper)

    def draws(self) -> Iterator[tuple[bool, Given]]:
        params, hyper, batches = self.given
        yield False, (_draws.mild(params), self._moved(hyper), [_draws.mild(batch) for batch in batches])
        yield True, (params, hyper, [_draws.longer(batch, next(_draws.lengths(batch), 0)) for batch in batches])

    def _moved(self, hyper: Tree) -> Tree:
        """Hyper-parameters moved a little, so that a product of two of them is not taken for a third.

        Only those that both sides use: where one has a constant instead, they would be made to differ.
        """
        if not isinstance(hyper, dict):
            return hyper
        params, _, batches = self.given
        moved = dict(hyper)
        for key, x in hyper.items():
            if isinstance(x, float) or (isinstance(x, np.ndarray) and x.dtype.kind == "f"):
                other = _draws.mild(np.asarray(x))
                other = float(other) if isinstance(x, float) else other
                runs = [(params, hyper, batches[:1]), (params, {**hyper, key: other}, batches[:1])]
                if all(_apart(*(self._all(side, self.steps[side], given) for given in runs)) for side in (0, 1)):
                    moved[key] = other
        return moved

    def _all(self, side: int, steps: Steps, given: Given) -> list[Leaves]:
        """All results, or none where the steps cannot be run."""
        try:
            return list(self._run(side, steps, given))
        except Exception:
            return []

    def _run(self, side: int, steps: Steps, given: Given) -> Iterator[Leaves]:
        params, hyper, batches = given
        run = self.start(self.sides[side], steps, params, hyper)
        for batch in batches:
            yield run.advance(batch)


def _with_wide_counts(steps: Steps) -> Steps:
    """Steps of JAX whose counts are of 64 bits.

    JAX divides an integer of 32 bits in float32 also with x64, and with it most schedules of optax: they would keep a
    right change from 1e-12. Steps that insist on 32 bits are left as they are.
    """
    init, step = steps

    def convert(x: Any) -> Any:
        narrow = isinstance(x, jax.Array) and x.ndim == 0 and x.dtype == jnp.int32
        return x.astype(jnp.int64) if narrow else x

    def first(*args: Any) -> Any:
        return jax.tree.map(convert, init(*args))

    return first, step


class Kept(Trial):
    """A trial that keeps the first results of JAX, which do not change from trial to trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.given, self.kept = trial, trial.given, list[tuple[Given, list[Leaves]]]()
        self._draws: list[tuple[bool, Given]] = []

    def ours(self, change: Change, given: Given) -> Iterator[Leaves]:
        return self.trial.ours(change, given)

    def scalable(self, differing: set[str]) -> set[str]:
        return self.trial.scalable(differing)

    def of_inputs(self) -> Iterator[Change]:
        return self.trial.of_inputs()

    def of_steps(self) -> Iterator[Change]:
        return self.trial.of_steps()

    def knobs(self) -> Iterator[Knob]:
        return self.trial.knobs()

    def draws(self) -> Iterator[tuple[bool, Given]]:
        self._draws = self._draws or list(self.trial.draws())
        return iter(self._draws)

    def theirs(self, given: Given) -> Iterator[Leaves]:
        first = next((leaves for known, leaves in self.kept if known is given), None)
        if first is None:
            first = []
            self.kept.append((given, first))
        yield from first
        for step, leaves in enumerate(self.trial.theirs(given)):
            if step < len(first):
                continue
            if sum(x.nbytes for one in first for x in one.values()) < _KEPT:
                first.append(leaves)
            yield leaves


def _apart(a: list[Leaves], b: list[Leaves]) -> bool:
    return len(a) == len(b) and any((x[name] != y[name]).any() for x, y in zip(a, b, strict=True) for name in x)


def _raised(leaves: Leaves | Exception) -> Leaves:
    if isinstance(leaves, Exception):
        raise leaves
    return leaves

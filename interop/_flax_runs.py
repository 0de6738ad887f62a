"""The runs of `locate` on the flax side: free, then cut."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ._activations import Layout
from ._coarse import of_jax
from ._cut_flax import SIDE, Model, with_gradients
from ._cuts import AFTER, INPUT, OUT, PARAM, Arrays, Cut, Hook, Seen, Tape, key
from ._locate_inputs import FlaxArrays
from ._twins import Group


class FlaxRuns:
    """A flax model with what it is called with.

    Attributes:
        inputs: the layout of each input.
        calls: of layers, in a free run.
        out: its results.
    """

    def __init__(self, arrays: FlaxArrays, call: Callable[..., Any], given: Sequence[Any]) -> None:
        self.arrays, self.given = arrays, tuple(given)
        self.model = Model(arrays.module, call, arrays.build)
        self.inputs: dict[int, Layout] = {}
        self.calls: list[Seen] = []
        self.out: Arrays = {}

    def look(self, way: dict[int, Layout], groups: Sequence[Group], wanted: Counter[Group]) -> None:
        """Notes the calls of a free run that gets the inputs in these layouts.

        Args:
            way: the layout of each input.
            groups: the layers.
            wanted: how many calls of each there should be.
        """
        self.inputs = way
        failed: Exception | None = None
        try:
            self._look(groups, opened=False)
            few = wanted - Counter(seen.group for seen in self.calls)
        except Exception as error:  # flax's recurrent layers start in float32, which a loop refuses to mix with float64
            failed, few = error, wanted
        if few:  # NOTE [hidden layers]
            try:
                self._look(groups, opened=True)
            except Exception:
                if failed is None:
                    self._look(groups, opened=False)
                else:
                    raise failed from None

    def _look(self, groups: Sequence[Group], opened: bool) -> None:
        tape = Tape()
        self.model.opened = opened
        with self.model.precision(64):
            self.out, _ = self._called(self._arguments(64, None), groups, tape)
        self.calls = tape.calls

    def _called(self, values: Arrays, groups: Sequence[Group], hook: Hook) -> tuple[Arrays, Arrays]:
        leaves = {name: values[key(PARAM, name)] for name in self.arrays.leaves}
        inputs = [values.get(key(INPUT, i), x) for i, x in enumerate(self._others())]
        out, after = self.model.run(leaves, inputs, groups, hook, values)
        return out, after

    def _arguments(self, bits: int, draw: int | None) -> Arrays:
        """All leaves and inputs; inside `precision`."""
        leaves = {key(PARAM, name): x for name, x in self.arrays.leaves.items()}
        inputs = {key(INPUT, i): layout(np.asarray(self.given[i])) for i, layout in self.inputs.items()}
        return SIDE.given(leaves | inputs, bits, draw)

    def _others(self) -> tuple[Any, ...]:
        """The inputs that are no arrays, in the present precision."""
        bits = 64 if jax.config.read("jax_enable_x64") else 32
        others = tuple(None if i in self.inputs else x for i, x in enumerate(self.given))
        return SIDE.given(others, bits)


class CutProgram:
    """A flax model cut at its layers, in every precision.

    Args:
        runs: the model.
        groups: the layers.
        hook: of all arguments -> what calls go through.
    """

    def __init__(self, runs: FlaxRuns, groups: Sequence[Group], hook: Callable[[Arrays], Cut]) -> None:
        self.runs = runs

        def run(values: Arrays) -> Arrays:
            cut = hook(values)
            out, after = runs._called(values, groups, cut)
            statistics = {key(AFTER, n): after[n] for n in runs.arrays.leaves if n in after and n not in trained}
            return {**cut.found, **{key(OUT, name): x for name, x in out.items()}, **statistics}

        trained = runs.arrays.trained
        self.function = run

    def look(self) -> None:
        """Runs the model once, for what the hook does."""
        with self.runs.model.precision(64):
            self.function(self.runs._arguments(64, None))

    def __call__(
        self,
        values: Mapping[str, np.ndarray],
        cotangents: Mapping[str, np.ndarray],
        bits: int,
        draw: int | None = None,
        watched: bool = False,
    ) -> tuple[Arrays, Arrays, Any]:
        """Results, gradients, and what is computed in a lower precision."""
        with self.runs.model.precision(bits):
            known = SIDE.given(dict(values), bits, draw)
            arguments = self.runs._arguments(bits, draw) | known
            seeds = SIDE.given(dict(cotangents), bits, draw)
            found, pulled = with_gradients(self.function, arguments, seeds)
            return found, pulled, of_jax(self.function, (arguments,)) if watched else {}

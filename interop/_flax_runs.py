"""The runs of `locate` on the flax side: free, then cut."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._activations import Layout, Slot, expected, fitting
from ._coarse import of_jax
from ._cut_flax import SIDE, Model, with_gradients
from ._cuts import AFTER, GIVEN, INPUT, OUT, PARAM, RETURNED, Arrays, Cut, Hook, Seen, Tape, key
from ._locate_inputs import FlaxArrays
from ._twins import Call, Group, Plan


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
    """A flax model cut at its layers, or free, in every precision.

    Args:
        runs: the model.
        groups: the layers.
        plan: their calls.
    """

    def __init__(self, runs: FlaxRuns, groups: Sequence[Group], plan: Plan) -> None:
        self.runs, self.groups, self.plan = runs, groups, plan

    def look(self, cut: Cut) -> None:
        """Runs the model once, for what the hook does."""
        with self.runs.model.precision(64):
            self.runs._called(self.runs._arguments(64, None), self.groups, cut)

    def __call__(
        self,
        values: Mapping[str, np.ndarray],
        cotangents: Mapping[str, np.ndarray],
        bits: int,
        draw: int | None = None,
        watched: bool = False,
        free: bool = False,
    ) -> tuple[Arrays, Arrays, Any]:
        """Results, gradients, and what is computed in a lower precision.

        A free run has gradients as well with respect to what layers return: to zeros that are added to it.
        """
        leaves = self.runs.arrays

        def run(values: Arrays) -> Arrays:
            cut = (_Free if free else Cut)(self.plan, values)
            out, after = self.runs._called(values, self.groups, cut)
            statistics = {key(AFTER, n): after[n] for n in leaves.leaves if n in after and n not in leaves.trained}
            return {**cut.found, **{key(OUT, name): x for name, x in out.items()}, **statistics}

        if free:
            values = {name: np.zeros_like(x) for name, x in values.items()}
        with self.runs.model.precision(bits):
            known = SIDE.given(dict(values), bits, draw)
            arguments = self.runs._arguments(bits, draw) | known
            seeds = SIDE.given(dict(cotangents), bits, draw)
            found, pulled = with_gradients(run, arguments, seeds)
            return found, pulled, of_jax(run, (arguments,)) if watched else {}


class _Free(Cut):
    """Leaves everything as it is."""

    def given(self, call: Call, array: str, x: Any) -> Any:
        return x

    def returned(self, call: Call, result: Any) -> Any:
        value = super().returned(call, result)
        return result + value.astype(result.dtype) if value.shape == result.shape else result


class Discovery(Cut):
    """A cut run that finds out how arrays lie, from their shapes.

    Attributes:
        layouts: by the name of an argument of the cut model.
        shapes: for arrays that have no common shape both of theirs, PyTorch's and flax's.
        known: the arguments that both sides have.
        several: the layouts of those that have more than one.
    """

    def __init__(
        self,
        plan: Plan,
        values: Mapping[str, np.ndarray],
        layouts: dict[str, Layout],
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        super().__init__(plan, values)
        self.layouts, self.shapes = layouts, shapes
        self.known: list[str] = []
        self.several: dict[str, list[Layout]] = {}

    def given(self, call: Call, array: str, x: Any) -> Any:
        return self._put(call.group.slot(array), key(GIVEN, call.index, array), x)

    def returned(self, call: Call, result: Any) -> Any:
        return self._put(call.group.slot("output"), key(RETURNED, call.index), result)

    def _put(self, slot: Slot, name: str, x: Any) -> Any:
        self.known.append(name)
        self.fit(slot, name, self.values[name], x)
        return jnp.asarray(self.layouts[name](self.values[name]))

    def fit(self, slot: Slot, name: str, ours: np.ndarray, theirs: Any) -> None:
        """Sets the layout of an array that both sides have."""
        found = fitting(slot, ours.shape, tuple(theirs.shape))
        self.layouts[name] = found[0] if found else expected(slot, ours.shape)
        if not found:
            self.shapes[name] = (ours.shape, tuple(theirs.shape))
        if len(found) > 1:
            self.several[name] = found

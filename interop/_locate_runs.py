"""All runs of `locate`: each side free, and cut at its layers in both precisions and with numbers moved by an ulp."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from torch import nn

from . import _activations, _cut_flax, _cut_torch, _twins
from ._activations import Layout, Slot
from ._compare import Results
from ._cuts import ARRIVED, COMPUTED, GIVEN, INPUT, OUT, PARAM, RETURNED, Arrays, Cut, Seen, Tape, key
from ._locate_inputs import WHERE, FlaxArrays, flax_arrays
from ._measure import compare
from ._nudge import DRAWS
from ._trees import ARRAYS
from ._twins import Call, Group, Plan
from .pair import Pair

Function = Callable[..., Any]
Sizes = tuple[int, ...]
GRADIENT = "gradient of "


@dataclass(eq=False)
class FlaxRun:
    """Flax's free run in float64.

    Attributes:
        inputs: the layout of each input.
        calls: of the layers.
        out: the results of the model, by name.
        after: its leaves afterwards.
    """

    inputs: dict[int, Layout]
    calls: list[Seen]
    out: Arrays
    after: Arrays


class Runs:
    """What both models compute, freely and cut apart, in flax's layouts.

    Attributes:
        pair: of the models.
        net: PyTorch's.
        flax: what the flax model holds.
        torch, jax: the free runs.
        plan: the calls that both sides make.
        ours, theirs: of the cut models: results by name (`_cuts`), and gradients by `GRADIENT` + name.
        layouts: by the name of an argument of the cut model, or of a result of the model.
        shapes: for arrays that have no common shape both of theirs, PyTorch's and flax's.
        cotangents: of the cut model's results, in PyTorch's layout.
        gradients: of PyTorch's free run, of the same arguments.
    """

    def __init__(
        self,
        net: nn.Module,
        flax_model: Any,
        pair: Pair,
        inputs: Sequence[Any],
        torch_call: Function | None,
        flax_call: Function | None,
    ) -> None:
        self.net, self.pair, self.given = net, pair, tuple(inputs)
        self.flax: FlaxArrays = flax_arrays(net, flax_model, pair)
        self.call = torch_call or (lambda model, *xs: model(*xs))
        groups = _twins.groups(pair, net)
        self.torch = _noted("PyTorch", "torch_call", lambda: _cut_torch.Run(net, groups, self.call, inputs))
        self.model = _cut_flax.Model(self.flax.module, flax_call or (lambda module, *xs: module(*xs)), self.flax.build)
        self.jax = self._flax_run(groups, own_layout=flax_call is not None)
        broken = {seen.group for seen in (*self.torch.calls, *self.jax.calls) if not seen.whole}
        self.groups = [group for group in groups if group not in broken]
        self.plan: Plan = _twins.plan(
            [(n, seen.group, seen.name) for n, seen in enumerate(self.torch.calls) if seen.group in self.groups],
            [(seen.group, seen.name) for seen in self.jax.calls if seen.group in self.groups],
        )
        self.out_names = _paired(self.torch.outputs, self.jax.out)
        self.layouts: dict[str, Layout] = {key(INPUT, i): layout for i, layout in self.jax.inputs.items()}
        self.shapes: dict[str, tuple[Sizes, Sizes]] = {}
        self.values = self._discovered()
        seeds = self._seeds()
        self.gradients = self.torch.gradients(seeds)
        self.cotangents = {key(OUT, name): x for name, x in seeds.items()} | {
            _result_of(name): x for name, x in self.gradients.items() if name in self.values
        }
        self.ours, self.theirs = self._cut_torch(), self._cut_flax()

    def carried(self, name: str, x: np.ndarray) -> np.ndarray | None:
        """An array of PyTorch's in flax's layout; None if it has none there."""
        layout = self.layouts.get(name)
        return layout(x) if layout is not None else None

    # --- free runs ---

    def _flax_run(self, groups: Sequence[Group], own_layout: bool) -> FlaxRun:
        """Flax's free run; an image that PyTorch's first layer of images reads is turned, if flax can take it so."""
        arrays = {i: np.asarray(x) for i, x in enumerate(self.given) if isinstance(x, ARRAYS)}
        as_is = {i: _activations.expected(Slot(), x.shape) for i, x in arrays.items()}
        ways = [as_is]
        first = next((n for n, seen in enumerate(self.torch.calls) if seen.group.slot("input").channels), None)
        image = None if first is None else self.torch.values[key(GIVEN, first, "input")]
        if first is not None and image is not None and not own_layout:
            turned = _activations.expected(self.torch.calls[first].group.slot("input"), image.shape)
            same = [i for i, x in arrays.items() if x.shape == image.shape and turned.moves]
            ways = [as_is | dict.fromkeys(same, turned), as_is] if same else ways
        found: list[tuple[float, FlaxRun]] = []
        failures: list[Exception] = []
        for way in ways:
            tape = Tape()
            try:
                with _cut_flax.in_precision(64):
                    leaves = _cut_flax.given(self.flax.leaves, 64)
                    out, after = self.model.run(leaves, self._inputs(way, 64), groups, tape)
                    run = FlaxRun(way, tape.calls, _numpy(out), _numpy(after))
            except Exception as error:
                failures.append(error)
                continue
            found.append((self._off(first, tape.calls) if len(ways) > 1 else 0.0, run))
        if not found:
            raise _with_note(failures[0], "flax", "flax_call")
        return min(found, key=lambda one: one[0])[1]

    def _off(self, first: int | None, calls: Sequence[Seen]) -> float:
        """How far off what the first layer of images reads is."""
        assert first is not None
        group = self.torch.calls[first].group
        theirs = next((np.asarray(seen.given["input"]) for seen in calls if seen.group is group), None)
        ours = self.torch.values[key(GIVEN, first, "input")]
        layout = None if theirs is None else _activations.chosen(group.slot("input"), ours, theirs)
        return np.inf if layout is None else _activations.distance(layout(ours), theirs)

    def _inputs(self, way: Mapping[int, Layout], bits: int, draw: int | None = None) -> tuple[Any, ...]:
        turned = tuple(way[i](np.asarray(x)) if i in way else x for i, x in enumerate(self.given))
        return _cut_flax.given(turned, bits, draw)

    def free_differences(self) -> tuple[dict[int, float], dict[int, float]]:
        """For each call how far its result, and the gradient of it, are off in the free runs, by the largest entry."""
        order: dict[Group, list[Seen]] = {}
        numbers: dict[int, int] = {}  # of flax's calls, by PyTorch's
        for n, seen in enumerate(self.jax.calls):
            order.setdefault(seen.group, []).append(seen)
            calls = self.plan.of.get(seen.group, [])
            if len(order[seen.group]) <= len(calls):
                numbers[n] = calls[len(order[seen.group]) - 1].index
        values, changes = {}, {}
        for n, index in numbers.items():
            theirs = np.asarray(self.jax.calls[n].returned)
            values[index] = self._relative(key(RETURNED, index), self.torch.values[key(RETURNED, index)], theirs)
            changes[n] = np.zeros(theirs.shape)
        pulled = self._flax_gradients(changes)
        gradients = {
            index: self._relative(key(RETURNED, index), self.gradients[key(RETURNED, index)], pulled[key("change", n)])
            for n, index in numbers.items()
            if key("change", n) in pulled and key(RETURNED, index) in self.gradients
        }
        return _known(values), _known(gradients)

    def _flax_gradients(self, changes: Mapping[int, np.ndarray]) -> Arrays:
        """Gradients of the free run with respect to what layers return: to zeros that are added there."""
        with _cut_flax.in_precision(64):
            leaves = _cut_flax.given(self.flax.leaves, 64)
            inputs = self._inputs(self.jax.inputs, 64)

            def run(arguments: Arrays) -> Arrays:
                def changed(n: int, x: Any) -> Any:
                    return x + arguments[key("change", n)].astype(x.dtype) if key("change", n) in arguments else x

                traced = {name: arguments.get(key(PARAM, name), x) for name, x in leaves.items()}
                out, _ = self.model.run(traced, inputs, self.groups, Tape(changed=changed), arguments)
                return {key(OUT, name): x for name, x in out.items()}

            floats = [n for n in changes if jnp.issubdtype(self.jax.calls[n].returned.dtype, jnp.floating)]
            arguments = {key("change", n): jnp.asarray(changes[n]) for n in floats}
            arguments |= {key(PARAM, name): leaves[name] for name in list(self.flax.trained)[:1]}
            return _cut_flax.differentiated(run, arguments, self._flax_cotangents(self.cotangents, 64))[1]

    def reaches_result(self, index: int) -> bool:
        """Whether a result of the model is made of what a call returns, with no layer in between."""
        return any(index in self.torch.before[key(OUT, name)] for name in self.torch.outputs)

    def handed_back(self, index: int, reader: int | None) -> float:
        """How far off a gradient is that one layer alone, or the result of the model (None), hands back to a call."""
        chosen = {
            name: x
            for name, x in self.cotangents.items()
            if name.startswith(f"{ARRIVED}/{reader}/" if reader is not None else f"{OUT}/")
        }
        name = GRADIENT + key(RETURNED, index)
        ours, theirs = self._run_torch(64, cotangents=chosen)[0][name], self._run_flax(64, cotangents=chosen)[0][name]
        found = compare(ours, theirs)
        return np.inf if found.apart.any() else found.errors.absolute

    def _relative(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> float | None:
        x = self.carried(name, ours)
        return None if x is None or x.shape != theirs.shape else compare(x, theirs).errors.relative

    # --- cut runs ---

    def _discovered(self) -> dict[str, np.ndarray]:
        """The values that go into the cut models, of the arrays that both sides have; sets the layouts."""
        cut = _Discovery(self.plan, self.torch.values, self.layouts, self.shapes)
        with _cut_flax.in_precision(64):
            leaves = _cut_flax.given(self.flax.leaves, 64)
            out, _ = self.model.run(leaves, self._inputs(self.jax.inputs, 64), self.groups, cut)
            for name, theirs in self.out_names.items():
                cut.fit(Slot(free=True), key(OUT, name), _cut_torch.array(self.torch.outputs[name]), out[theirs])
        return {name: self.torch.values[name] for name in cut.known}

    def _seeds(self) -> dict[str, np.ndarray]:
        """Cotangents of the results that have gradients, by name."""
        floats = [n for n, x in self.torch.outputs.items() if n in self.out_names and x.is_floating_point()]
        rng = np.random.default_rng(0)
        shapes = {name: tuple(self.torch.outputs[name].shape) for name in floats}
        if list(shapes.values()) == [()]:
            return {floats[0]: np.ones(())}
        return {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def _cut_torch(self) -> Results:
        results = _collected("PyTorch", self._run_torch)
        again = {key(OUT, name): _cut_torch.array(x) for name, x in self.torch.outputs.items()}
        again |= {_result_of(name): x for name, x in self.values.items() if name.startswith(RETURNED)}
        _repeated(results, {name: self.carried(argument_of(name), x) for name, x in again.items()})
        return results

    def _cut_flax(self) -> Results:
        return _collected("JAX", self._run_flax)

    def _run_torch(
        self, bits: int, draw: int | None = None, cotangents: Arrays | None = None, watched: bool = False
    ) -> tuple[Arrays, Any]:
        """A cut run of PyTorch's model: results and gradients as flax has them, and what is of a lower precision."""
        found, pulled, coarse = _cut_torch.cut_run(
            self.net,
            self.groups,
            lambda values: Cut(self.plan, values),
            self.call,
            self.given,
            self.values,
            self.cotangents if cotangents is None else cotangents,
            bits,
            draw,
            watched,
        )
        return self._in_flax_layout(found, pulled), coarse

    def _run_flax(
        self, bits: int, draw: int | None = None, cotangents: Arrays | None = None, watched: bool = False
    ) -> tuple[Arrays, Any]:
        """The same of flax's."""
        fed = {name: self.layouts[name](x) for name, x in self.values.items()}
        with _cut_flax.in_precision(bits):
            leaves = _cut_flax.given(self.flax.leaves, bits, draw)
            inputs = self._inputs(self.jax.inputs, bits, draw)
            trained = {name: x for name, x in leaves.items() if name in self.flax.trained}

            def cut_model(values: Arrays) -> Arrays:
                cut = Cut(self.plan, values)
                new = [values.get(key(INPUT, i), x) for i, x in enumerate(inputs)]
                own = {name: values.get(key(PARAM, name), x) for name, x in leaves.items()}
                out, _ = self.model.run(own, new, self.groups, cut, values)
                return {**cut.found, **{key(OUT, name): out[theirs] for name, theirs in self.out_names.items()}}

            found, pulled, coarse = _cut_flax.differentiated(
                cut_model,
                _cut_flax.arguments(trained, inputs, _cut_flax.given(fed, bits, draw)),
                self._flax_cotangents(self.cotangents if cotangents is None else cotangents, bits, draw),
                watched,
            )
        good = {name: x for name, x in found.items() if argument_of(name) not in self.shapes}
        return good | {GRADIENT + name: x for name, x in pulled.items()}, coarse

    def _flax_cotangents(self, cotangents: Arrays, bits: int, draw: int | None = None) -> Arrays:
        carried = {name: self.carried(argument_of(name), x) for name, x in cotangents.items()}
        return _cut_flax.given({name: x for name, x in carried.items() if x is not None}, bits, draw)

    def _in_flax_layout(self, found: Arrays, pulled: Arrays) -> Arrays:
        """Results and gradients of PyTorch's cut model as flax has them."""
        new = {}
        for name, x in found.items():
            if (carried := self.carried(argument_of(name), x)) is not None:
                if argument_of(name) not in self.shapes:
                    new[name] = carried
        for name, x in pulled.items():
            if (carried := self.carried(name, x)) is not None:
                new[GRADIENT + name] = carried
        return new | {GRADIENT + name: x for name, x in self._parameters(pulled).items()}

    def _parameters(self, pulled: Arrays) -> Arrays:
        """Gradients of parameters that have one leaf of their own in flax, or several."""
        uses = [name for link in self.pair.links for name in link.torch]
        found = {}
        for link in self.pair.links:
            ours = [key(PARAM, name) for name in link.torch]
            alone = all(uses.count(name) == 1 for name in link.torch) and not link.sums
            if alone and all(name in pulled for name in ours) and self.flax.trained.issuperset(link.jax):
                made = link.to_jax(*(pulled[name] for name in ours))
                found |= {key(PARAM, name): x for name, x in zip(link.jax, made, strict=True)}
        return found


class _Discovery(Cut):
    """A cut run of flax that finds out how arrays lie."""

    def __init__(
        self,
        plan: Plan,
        values: Mapping[str, np.ndarray],
        layouts: dict[str, Layout],
        shapes: dict[str, tuple[Sizes, Sizes]],
    ) -> None:
        super().__init__(plan, values)
        self.layouts, self.shapes, self.known = layouts, shapes, list[str]()

    def given(self, call: Call, array: str, x: Any) -> Any:
        return self._put(call.group.slot(array), key(GIVEN, call.index, array), x)

    def returned(self, call: Call, result: Any) -> Any:
        return self._put(call.group.slot("output"), key(RETURNED, call.index), result)

    def _put(self, slot: Slot, name: str, x: Any) -> Any:
        self.known.append(name)
        self.fit(slot, name, self.values[name], x)
        return jnp.asarray(self.layouts[name](self.values[name]))

    def fit(self, slot: Slot, name: str, ours: np.ndarray, theirs: Any) -> None:
        theirs = np.asarray(theirs)
        layout = _activations.chosen(slot, ours, theirs)
        self.layouts[name] = layout or _activations.expected(slot, ours.shape)
        if layout is None:
            self.shapes[name] = (ours.shape, theirs.shape)


def _collected(side: str, run: Callable[..., tuple[Arrays, Any]]) -> Results:
    """All cut runs of one side; no more than one of those that are only looked at is held at a time."""
    found, coarse = run(64, watched=True)
    results = Results(side, found, run(32)[0], coarse=coarse)
    for draw in range(DRAWS):
        results.moved(run(64, draw)[0])
    return results


def _repeated(results: Results, again: Mapping[str, np.ndarray | None]) -> None:
    """Take in what the same pieces have computed in another run."""
    assert results.float64 is not None
    results.repeated({**results.float64, **{name: x for name, x in again.items() if x is not None}})


def _paired(ours: Arrays, theirs: Arrays) -> dict[str, str]:
    """The results of the models by PyTorch's names, with flax's."""
    if len(ours) == len(theirs) == 1:
        return dict(zip(ours, theirs, strict=True))
    if set(ours) == set(theirs) and ours:
        return {name: name for name in ours}
    raise ValueError(
        f"{WHERE}: PyTorch returns {_some(ours)}, flax {_some(theirs)}; torch_call=lambda net, *xs: ... and "
        "flax_call=lambda model, *xs: ... choose what is compared: trees of the same names, or one array each"
    )


def _some(names: Arrays) -> str:
    return ", ".join(map(repr, names)) or "no arrays"


def _result_of(name: str) -> str:
    """The result of the cut model that is compared with an argument: what arrives with what was given."""
    return {GIVEN: ARRIVED, RETURNED: COMPUTED}[name.partition("/")[0]] + name[name.index("/") :]


def argument_of(name: str) -> str:
    kind, slash, rest = name.partition("/")
    return {ARRIVED: GIVEN, COMPUTED: RETURNED}.get(kind, kind) + slash + rest


def _noted(side: str, option: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        raise _with_note(error, side, option) from None


def _with_note(error: Exception, side: str, option: str) -> Exception:
    error.add_note(
        f"{WHERE}: raised on the {side} side; {option}=lambda model, *xs: model(...) says how the model is called "
        "(options such as train=False, the layout of inputs)"
    )
    return error


def _known(numbers: Mapping[int, float | None]) -> dict[int, float]:
    return {index: x for index, x in numbers.items() if x is not None}


def _numpy(tree: Arrays) -> Arrays:
    return {name: np.array(x) for name, x in tree.items() if hasattr(x, "shape")}

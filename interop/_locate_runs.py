"""All runs of `locate`: each side free, and cut at its layers in both precisions and with numbers moved by an ulp."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from . import _activations, _cut_torch, _twins
from ._activations import Layout, Slot
from ._compare import Results
from ._cuts import AFTER, ARRIVED, COMPUTED, GIVEN, INPUT, OUT, PARAM, RETURNED, Arrays, key
from ._flax_runs import CutProgram, Discovery, FlaxRuns
from ._locate_inputs import WHERE, FlaxArrays, flax_arrays
from ._measure import compare
from ._nudge import DRAWS
from ._trees import ARRAYS
from ._twins import Call, Group, Plan
from .pair import Pair

Function = Callable[..., Any]
Sizes = tuple[int, ...]
GRADIENT = "gradient of "
_TRIES = 5  # until no layout changes any more


class Runs:
    """What both models compute, freely and cut apart, in flax's layouts.

    Attributes:
        pair: of the models.
        net: PyTorch's.
        flax: what the flax model holds.
        torch: PyTorch's free run.
        plan, flax_plan: the calls that both sides make, with each layer's in the order of either side.
        ours, theirs: of the cut models: results by name (`_cuts`), and gradients by `GRADIENT` + name.
        layouts: by the name of an argument of the cut model, or of a result of the model.
        shapes: for arrays that have no common shape both of theirs, PyTorch's and flax's.
        cotangents: of the cut model's results, in PyTorch's layout.
        gradients: of PyTorch's free run, of the same arguments.
        values, free_gradients: how far off, by the largest entry, what each call returns is in the free run, and its
            gradient.
        result: the same of the results of the model, by name.
        after: flax's batch statistics after a call.
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
        self.call = torch_call or _plain_call
        groups = _twins.groups(pair, net)
        self.torch = _noted("PyTorch", "torch_call", lambda: _cut_torch.Run(net, groups, self.call, inputs))
        self.jax = FlaxRuns(self.flax, flax_call or _plain_call, inputs)
        _noted("flax", "flax_call", lambda: self._look(groups, own_layout=flax_call is not None))
        broken = {seen.group for seen in (*self.torch.calls, *self.jax.calls) if not seen.whole}
        self.groups = [group for group in groups if group not in broken]
        self.plan: Plan = _twins.plan(
            [(n, seen.group, seen.name) for n, seen in enumerate(self.torch.calls) if seen.group in self.groups],
            [(seen.group, seen.name) for seen in self.jax.calls if seen.group in self.groups],
        )
        self.flax_plan = _twins.in_order_of_values(self.plan, self._distance)
        self.out_names = _paired(self.torch.outputs, self.jax.out)
        self.layouts: dict[str, Layout] = {key(INPUT, i): layout for i, layout in self.jax.inputs.items()}
        self.shapes: dict[str, tuple[Sizes, Sizes]] = {}
        self.known: dict[str, np.ndarray] = {}
        self.after: Arrays = {}
        several = self._discovered()
        seeds = self._seeds()
        self.gradients = self.torch.gradients(seeds)
        self.cotangents = {key(OUT, name): x for name, x in seeds.items()} | {
            _result_of(name): x for name, x in self.gradients.items() if name in self.known
        }
        self.program = CutProgram(self.jax, self.groups, self.flax_plan)
        self._settle(several)
        self.ours, self.theirs = self._collected_torch(), _collected("JAX", self.run_flax)
        self._free()

    def carried(self, name: str, x: np.ndarray) -> np.ndarray | None:
        """An array of PyTorch's in flax's layout; None if it has none there."""
        layout = self.layouts.get(name)
        return layout(x) if layout is not None else None

    # --- free runs ---

    def _look(self, groups: Sequence[Group], own_layout: bool) -> None:
        """How flax is called; an image that PyTorch's first layer of images reads is turned, if flax can take it so."""
        arrays = {i: np.asarray(x) for i, x in enumerate(self.given) if isinstance(x, ARRAYS)}
        as_is = {i: _activations.expected(Slot(), x.shape) for i, x in arrays.items()}
        ways = [as_is]
        first = next((n for n, seen in enumerate(self.torch.calls) if seen.group.slot("input").channels), None)
        if first is not None and not own_layout:
            shape = self.torch.values[key(GIVEN, first, "input")].shape
            turned = _activations.expected(self.torch.calls[first].group.slot("input"), shape)
            same = [i for i, x in arrays.items() if x.shape == shape and turned.moves]
            ways = [as_is | dict.fromkeys(same, turned), as_is] if same else ways
        wanted = Counter(seen.group for seen in self.torch.calls)
        failures: list[Exception] = []
        good = []
        for way in ways:
            try:
                self.jax.look(way, groups, wanted)
                good.append(way)
            except Exception as error:
                failures.append(error)
        if not good:
            raise failures[0]
        if len(good) > 1:  # all axes have the same length
            good.sort(key=lambda way: self._off(way, groups, wanted, first or 0))
        if good[0] is not self.jax.inputs:
            self.jax.look(good[0], groups, wanted)

    def _off(self, way: dict[int, Layout], groups: Sequence[Group], wanted: Counter[Group], first: int) -> float:
        """How far off what the first layer of images reads is with the inputs in these layouts."""
        self.jax.look(way, groups, wanted)
        group = self.torch.calls[first].group
        theirs = next((np.array(seen.arrived["input"]) for seen in self.jax.calls if seen.group is group), None)
        if theirs is None:
            return np.inf
        ours = self.torch.values[key(GIVEN, first, "input")]
        found = _activations.fitting(group.slot("input"), ours.shape, theirs.shape)
        return _activations.distance(found[0](ours), theirs) if found else np.inf

    def _distance(self, call: Call, number: int) -> float:
        """How far what a call reads is from what flax's call of this number, of the same layer, reads."""
        seen = [seen for seen in self.jax.calls if seen.group is call.group][number]
        found = [np.inf]
        for array, x in seen.arrived.items():
            if key(GIVEN, call.index, array) in self.torch.values:
                ours = self.torch.values[key(GIVEN, call.index, array)]
                layouts = _activations.fitting(call.group.slot(array), ours.shape, tuple(x.shape))
                found.append(_activations.distance(layouts[0](ours), np.array(x)) if layouts else np.inf)
        return max(found[1:] or found)

    def _free(self) -> None:
        """Compares the free runs."""
        self.values: dict[int, float] = {}
        self.free_gradients: dict[int, float] = {}
        self.result: dict[str, float] = {}
        seeds = {name: x for name, x in self.cotangents.items() if name.startswith(OUT)}
        found, _ = self.run_flax(64, cotangents=seeds, free=True)
        for call in self.plan.calls:
            name = key(RETURNED, call.index)
            self._note(self.values, call.index, name, self.torch.values[name], found.get(_result_of(name)))
            if name in self.gradients and GRADIENT + name in found:
                self._note(self.free_gradients, call.index, name, self.gradients[name], found[GRADIENT + name])
        for name in self.out_names:
            ours = _cut_torch.array(self.torch.outputs[name])
            self._note(self.result, name, key(OUT, name), ours, found.get(key(OUT, name)))

    def _note(self, where: dict[Any, float], at: Any, name: str, ours: np.ndarray, theirs: np.ndarray | None) -> None:
        x = self.carried(name, ours)
        if x is not None and theirs is not None and x.shape == theirs.shape:
            where[at] = compare(x, theirs).errors.relative

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
        ours, theirs = self.run_torch(64, cotangents=chosen)[0][name], self.run_flax(64, cotangents=chosen)[0][name]
        found = compare(ours, theirs)
        return np.inf if found.apart.any() else found.errors.absolute

    # --- cut runs ---

    def _discovered(self) -> dict[str, list[Layout]]:
        """Sets the layouts, and the values that go into the cut models; returns those that shapes do not tell."""
        found = Discovery(self.flax_plan, self.torch.values, self.layouts, self.shapes)
        CutProgram(self.jax, self.groups, self.flax_plan).look(found)
        for name, theirs in self.out_names.items():
            ours = _cut_torch.array(self.torch.outputs[name])
            found.fit(Slot(free=True), key(OUT, name), ours, self.jax.out[theirs])
        self.known = {name: self.torch.values[name] for name in found.known}
        return found.several

    def _settle(self, several: Mapping[str, list[Layout]]) -> None:
        """Chooses between layouts by what arrives, or is computed, if everything before it is right."""
        for _ in range(_TRIES if several else 0):
            theirs, _ = self.run_flax(64)
            ours = {name: self.known[name] for name in several if name in self.known}
            ours |= {key(OUT, name): _cut_torch.array(x) for name, x in self.torch.outputs.items()}
            chosen = {
                name: _activations.best(found, ours[name], theirs[result])
                for name, found in several.items()
                if (result := _result_of(name)) in theirs
            }
            if all(self.layouts[name].order == layout.order for name, layout in chosen.items()):
                break
            self.layouts |= chosen

    def _seeds(self) -> dict[str, np.ndarray]:
        """Cotangents of the results that have gradients, by name."""
        floats = [n for n, x in self.torch.outputs.items() if n in self.out_names and x.is_floating_point()]
        rng = np.random.default_rng(0)
        shapes = {name: tuple(self.torch.outputs[name].shape) for name in floats}
        if list(shapes.values()) == [()]:
            return {floats[0]: np.ones(())}
        return {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def _collected_torch(self) -> Results:
        results = _collected("PyTorch", self.run_torch)
        again = {key(OUT, name): _cut_torch.array(x) for name, x in self.torch.outputs.items()}
        again |= {_result_of(name): x for name, x in self.known.items()}
        carried = {name: x for name, y in again.items() if (x := self.carried(argument_of(name), y)) is not None}
        results.repeated({**(results.float64 or {}), **carried})
        return results

    def run_torch(
        self, bits: int, draw: int | None = None, cotangents: Arrays | None = None, watched: bool = False
    ) -> tuple[Arrays, Any]:
        """A cut run of PyTorch's model: results and gradients as flax has them, and what is of a lower precision."""
        found, pulled, coarse = _cut_torch.cut_run(
            self.net,
            self.groups,
            self.plan,
            self.call,
            self.given,
            self.known,
            self.cotangents if cotangents is None else cotangents,
            bits,
            draw,
            watched,
        )
        return self._in_flax_layout(found, pulled), coarse

    def run_flax(
        self,
        bits: int,
        draw: int | None = None,
        cotangents: Arrays | None = None,
        watched: bool = False,
        free: bool = False,
    ) -> tuple[Arrays, Any]:
        """The same of flax's; also free, with the gradients of what layers return."""
        fed = {name: self.layouts[name](x) for name, x in self.known.items()}
        seeds = self._carried_cotangents(self.cotangents if cotangents is None else cotangents)
        found, pulled, coarse = self.program(fed, seeds, bits, draw, watched, free)
        for ours, theirs in self.out_names.items():
            found[key(OUT, ours)] = found.pop(key(OUT, theirs))
        self.after |= {name: x for name, x in found.items() if name.startswith(AFTER) and bits == 64}
        good = {name: x for name, x in found.items() if argument_of(name) not in self.shapes}
        return good | {GRADIENT + name: x for name, x in pulled.items()}, coarse

    def _carried_cotangents(self, cotangents: Arrays) -> Arrays:
        """In flax's layout and under its names."""
        carried = {name: self.carried(argument_of(name), x) for name, x in cotangents.items()}
        names = {key(OUT, ours): key(OUT, theirs) for ours, theirs in self.out_names.items()}
        return {names.get(name, name): x for name, x in carried.items() if x is not None}

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


def _plain_call(model: Any, *inputs: Any) -> Any:
    return model(*inputs)


def _collected(side: str, run: Callable[..., tuple[Arrays, Any]]) -> Results:
    """All cut runs of one side; no more than one of those that are only looked at is held at a time."""
    found, coarse = run(64, watched=True)
    results = Results(side, found, run(32)[0], coarse=coarse)
    for draw in range(DRAWS):
        results.moved(run(64, draw)[0])
    return results


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
    kind, slash, rest = name.partition("/")
    return {GIVEN: ARRIVED, RETURNED: COMPUTED}.get(kind, kind) + slash + rest


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

"""The PyTorch side of `locate`: an ordinary run with its gradients, and runs of the model cut at its layers."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import arrays
from ._coarse import Seen as Coarse
from ._coarse import Watch
from ._cuts import GIVEN, INPUT, OUT, PARAM, RETURNED, Arrays, Cut, Hook, Seen, Tape, key, named_outputs
from ._nudge import nudge
from ._sides import TorchSide
from ._twins import Call, Group, Plan

Function = Callable[..., Any]
SIDE = TorchSide("locate", None)


def prepared(net: nn.Module, bits: int, draw: int | None = None) -> nn.Module:
    """A copy in this precision that wants the gradients of all its parameters; with `draw`, moved by an ulp."""
    copied = copy.deepcopy(net).to(torch.float64 if bits == 64 else torch.float32)
    for x in (*copied.parameters(), *copied.buffers()):
        if draw is not None and x.dtype == torch.float64:
            x.data.copy_(torch.from_numpy(nudge(x.detach().cpu().numpy(), draw)))
    for x in copied.parameters():
        x.requires_grad_(x.is_floating_point())
    return copied


@contextmanager
def hooked(net: nn.Module, groups: Sequence[Group], hook: Hook) -> Iterator[None]:
    """Calls of the layers go through the hook; the model is a copy of our own, and its classes stay untouched."""
    names = {name: module for name, module in net.named_modules(remove_duplicate=False)}
    wrapped: list[Any] = []
    for group in groups:
        for name in group.modules:
            module: Any = names[name]
            if module not in wrapped:
                module.forward = _wrapper(hook, group, name, module, module.forward)
                wrapped.append(module)
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward


def _wrapper(hook: Hook, group: Group, name: str, module: nn.Module, call: Function) -> Function:
    @functools.wraps(call)  # its signature is looked at
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = group.ours.given(module, args, kwargs)
        token, new = hook.enter(group, name, given)
        args, kwargs = group.ours.replaced(module, args, kwargs, new)
        out = call(*args, **kwargs)
        return group.ours.with_result(out, hook.leave(token, group.ours.result(out)))

    return forward


class Run:
    """An ordinary run of the model in float64, in PyTorch's layouts.

    Attributes:
        calls: of the layers.
        values: arguments of the cut model: what layers were given and returned, and the inputs.
        outputs: of the model.
        before: for each call, and for each result of the model as "out/name", the calls whose results it is made of.
        unknown: those of which this is not known, since no gradient flows there.
        statistics: buffers after the run.
        changed: the names of those that it has changed.
    """

    def __init__(self, net: nn.Module, groups: Sequence[Group], call: Function, inputs: Sequence[Any]) -> None:
        with SIDE.precision(64), torch.enable_grad():
            model = prepared(net, 64)
            given = _wanted(SIDE.given(tuple(inputs), 64))
            before = {name: x.detach().clone() for name, x in model.named_buffers()}
            tape = Tape(_tapped)
            with hooked(model, groups, tape):
                out = named_outputs(SIDE.where, call(model, *given))
        self.calls: list[Seen] = tape.calls
        self.outputs: Arrays = out
        self.statistics = {name: array(x) for name, x in model.named_buffers()}
        self.changed = {name for name, x in model.named_buffers() if not torch.equal(x, before[name])}
        self.tensors: Arrays = {key(INPUT, i): x for i, x in enumerate(given) if isinstance(x, Tensor)}
        for index, seen in enumerate(tape.calls):
            self.tensors |= {key(GIVEN, index, name): x for name, x in seen.given.items()}
            if seen.returned is not None:
                self.tensors[key(RETURNED, index)] = seen.returned
        self.values = {name: array(x) for name, x in self.tensors.items()}
        self.before, self.unknown = _traced_back(tape.calls, out)

    def is_input(self, reader: str) -> bool:
        """Whether what a call reads is an input of the model as it is."""
        given = [x for name, x in self.values.items() if name.startswith(f"{GIVEN}/{reader}/")]
        inputs = [x for name, x in self.values.items() if name.startswith(f"{INPUT}/")]
        return any(a.shape == b.shape and a.dtype == b.dtype and (a == b).all() for a in given for b in inputs)

    def gradients(self, cotangents: Mapping[str, np.ndarray]) -> Arrays:
        """The gradients of all that layers are given and return, from cotangents of the outputs; once."""
        with SIDE.precision(64):
            results = {name: torch.from_numpy(x) for name, x in cotangents.items()}
            pulled = _pulled(self.outputs, self.tensors, results)
        self._forget()
        return pulled

    def _forget(self) -> None:
        """Lets go of the graph and of the copy of the model."""
        self.outputs = {name: x.detach() for name, x in self.outputs.items()}
        self.tensors = {}
        for seen in self.calls:
            seen.arrived = seen.given = {}
            seen.returned = None


def _tapped(x: Any) -> tuple[Any, Any]:
    """Two copies, so that nobody writes to the one that is noted; a gradient reaches it even where none came from."""
    if not isinstance(x, Tensor):
        return x, x
    noted = x.clone()
    if noted.is_floating_point() and not noted.requires_grad:
        noted.requires_grad_()
    return noted, noted.clone()


def _traced_back(calls: Sequence[Seen], out: Arrays) -> tuple[dict[str, set[int]], set[str]]:
    """For each call and output the calls that it reads from, by the graph of the gradients."""
    makers = {seen.returned.grad_fn: n for n, seen in enumerate(calls) if getattr(seen.returned, "grad_fn", None)}
    arrived = {str(n): list(seen.arrived.values()) for n, seen in enumerate(calls)}
    arrived |= {key(OUT, name): [x] for name, x in out.items()}
    found: dict[str, set[int]] = {}
    unknown: set[str] = set()
    for name, xs in arrived.items():
        floats = [x for x in xs if isinstance(x, Tensor) and x.is_floating_point()]
        if not floats or any(x.grad_fn is None and not x.requires_grad for x in floats):
            unknown.add(name)
        todo = [x.grad_fn for x in floats if x.grad_fn is not None]
        seen_nodes: set[Any] = set()
        makers_of: set[int] = set()
        while todo:
            node = todo.pop()
            if node in seen_nodes or node is None:
                continue
            seen_nodes.add(node)
            if node in makers:
                makers_of.add(makers[node])
            else:
                todo += [parent for parent, _ in node.next_functions]
        found[name] = makers_of
    return found, unknown


def cut_run(
    net: nn.Module,
    groups: Sequence[Group],
    plan: Plan,
    call: Function,
    inputs: Sequence[Any],
    values: Mapping[str, np.ndarray],
    cotangents: Mapping[str, np.ndarray],
    bits: int,
    draw: int | None = None,
    watched: bool = False,
) -> tuple[Arrays, Arrays, Coarse]:
    """What a model cut at its layers computes, its gradients, and what it computes in a lower precision."""
    with SIDE.precision(bits), torch.enable_grad():
        model = prepared(net, bits, draw)
        given = _wanted(SIDE.given(tuple(inputs), bits, draw))
        known = {name: _leaf(x) for name, x in SIDE.given(dict(values), bits, draw).items()}
        cut = _Cut(plan, known)
        with hooked(model, groups, cut), Watch() if watched else nullcontext() as watch:
            out = named_outputs(SIDE.where, call(model, *given))
        found = {**cut.found, **{key(OUT, name): x for name, x in out.items()}}
        arguments = {key(INPUT, i): x for i, x in enumerate(given) if isinstance(x, Tensor)} | known
        arguments |= {key(PARAM, name): x for name, x in model.named_parameters() if x.requires_grad}
        pulled = _pulled(found, arguments, SIDE.given(dict(cotangents), bits, draw))
        return {name: array(x) for name, x in found.items()}, pulled, watch.seen if watch else {}


class _Cut(Cut):
    """Hands out copies, to which the model may write."""

    def given(self, call: Call, array: str, x: Any) -> Any:
        return super().given(call, array, x).clone()

    def returned(self, call: Call, result: Any) -> Any:
        return super().returned(call, result).clone()


def _pulled(results: Arrays, arguments: Arrays, cotangents: Arrays) -> Arrays:
    """The gradients of all arguments that can have one; zero where none comes."""
    chosen = [name for name, x in results.items() if name in cotangents and x.requires_grad]
    wanted = {name: x for name, x in arguments.items() if x.requires_grad}
    if not wanted:
        return {}
    got: Sequence[Any] = [None] * len(wanted)
    if chosen:
        got = torch.autograd.grad(
            [results[name] for name in chosen],
            list(wanted.values()),
            [cotangents[name].to(results[name].dtype) for name in chosen],
            allow_unused=True,
        )
    return {
        name: array(torch.zeros_like(x) if g is None else g) for (name, x), g in zip(wanted.items(), got, strict=True)
    }


def _wanted(inputs: Any) -> Any:
    return tuple(_leaf(x) if isinstance(x, Tensor) else x for x in inputs)


def _leaf(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def array(x: Any) -> np.ndarray:
    return np.array(arrays.to_host(x))

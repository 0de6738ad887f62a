"""From an optimizer of torch.optim, mid-run, to an optax transformation and its state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from funcreg._selectors import leaf_name

from ..arrays import to_jax
from ._settings import Settings, crossing, filled, groups_of, handle_of, named, number, settings_of
from ._transformation import TorchOptimizerState, rebuild, refuse_wide, scalar_dtype, torch_optimizer
from .schedules import constant_rates, rates_of

_WHERE = "optimizer_to_jax"


def optimizer_to_jax(
    pair: Any, optimizer: Optimizer, scheduler: Any = None, steps_per_epoch: int = 1
) -> tuple[optax.GradientTransformation, TorchOptimizerState]:
    """`Pair.optimizer_to_jax`, which says what it does."""
    settings = settings_of(_WHERE, pair, optimizer)
    own = dict(pair.net.named_parameters())
    refuse_wide(_WHERE, {name: own[name] for name in groups_of(_WHERE, pair, optimizer)})
    handle = handle_of(_WHERE, optimizer)
    penalty, pieces = None, {}
    if handle is not None:
        if handle._net is not pair.net:
            raise ValueError(
                f"{_WHERE}: the penalty is attached for another module than the net of this pair, whose names may "
                "differ; attach it with the net that was matched"
            )
        if settings.optimizer != "SGD":
            pieces = _pieces(pair, [name for name, _ in handle._bound.values()])
        penalty = pair.penalty_to_jax(handle.penalty)
    first = tuple(jnp.asarray(number(group["lr"]), scalar_dtype()) for group in optimizer.param_groups)
    if scheduler is None:
        rates: Any = constant_rates(_WHERE, optimizer)
    else:
        rates = rates_of(_WHERE, scheduler, optimizer, steps_per_epoch)
        if not isinstance(scheduler, LRScheduler):  # a function may differ from what PyTorch's group has
            first = rates(jnp.zeros((), jnp.int32))
    state = TorchOptimizerState(
        jnp.zeros((), jnp.int32),
        first,
        _state(pair, optimizer, settings),
        settings,
    )
    return torch_optimizer(settings, rates, penalty, pieces), state


def _state(pair: Any, optimizer: Optimizer, settings: Settings) -> dict[str, Any]:
    """The optimizer's state by its own names, each a tree like the parameters of the JAX side."""
    own = dict(pair.net.named_parameters())
    groups = groups_of(_WHERE, pair, optimizer)
    pair = crossing(_WHERE, pair, groups)
    states = {
        name: _of_parameter(settings, group, name, own[name], optimizer.state.get(own[name]) or {})
        for name, group in groups.items()
    }
    holders = {
        what: {leaf for leaf, i in settings.group_of if what in settings.moments(i)} for what in settings.names()
    }
    blank = pair.parameters_to_jax({name: filled(own[name], 0.0) for name in groups})
    trees: dict[str, Any] = {}
    for what in settings.names():
        if holders[what]:
            values = {name: states[name].get(what, filled(own[name], 0.0)) for name in groups}
            tree = pair.parameters_to_jax(values)
            trees[what] = rebuild(tree, {leaf: x for leaf, x in named(tree).items() if leaf in holders[what]})
        else:
            boxes = named(pair.spread({name: Scalar(states[name].get(what)) for name in groups}))
            arrays = {leaf: to_jax(box.value) for leaf, box in boxes.items() if box.value is not None}
            trees[what] = rebuild(blank, arrays)
    return trees


def _of_parameter(settings: Settings, group: int, name: str, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one parameter, checked; of one that has had no gradient yet, what PyTorch would start with."""
    moments, scalars = settings.moments(group), settings.scalars(group)
    if not moments:
        return {}
    known = {"momentum_buffer", "max_exp_avg_sq", "grad_avg", "prox_scale", "step", *moments, *scalars}
    what = f"the state of {name!r}"
    for key in state.keys() - known:
        raise ValueError(f"{_WHERE}: {what} has {key!r}, which {settings.optimizer} does not keep; was it changed?")
    if settings.optimizer == "SGD":
        buffer = state.get("momentum_buffer")
        state = {"has_buffer": False} if buffer is None else {"prox_scale": 0.0, **state, "has_buffer": True}
    if "step" in scalars and not state or state.get("has_buffer") is False:
        first = {key: filled(p, settings.first_value(group)) for key in moments}
        return {**first, **{key: _scalar(key, x) for key, x in scalars.items()}}
    values: dict[str, Any] = {}
    for key in (*moments, *scalars):
        x = state.get(key)
        if x is None:
            raise ValueError(
                f"{_WHERE}: {what} lacks {key!r}, which {settings.optimizer} needs with its present options; load the "
                "whole state_dict, or set options when the optimizer is made"
            )
        if key in moments and (x.shape != p.shape or x.dtype != p.dtype):
            why = "it is the state of another parameter"
            if x.shape == p.shape:
                why = "net.to(...) came after it: optimizer.load_state_dict(optimizer.state_dict()) converts the state"
            raise ValueError(
                f"{_WHERE}: {key!r} in {what} is {x.dtype} of shape {list(x.shape)}, the parameter {p.dtype} of shape "
                f"{list(p.shape)}; {why}"
            )
        values[key] = x if key in moments else _scalar(key, x)
    return values


@dataclass(frozen=True)
class Scalar:
    """A 0-d array on its way through `pair.spread`, which compares what comes to one leaf."""

    value: Any


def _scalar(key: str, x: Any) -> Any:
    if key == "has_buffer":
        return np.bool_(x)
    if key == "prox_scale":
        return np.dtype(scalar_dtype()).type(x)
    if isinstance(x, Tensor):
        return x.detach().cpu().numpy()[()]
    double = torch.get_default_dtype() == torch.float64  # the dtype that PyTorch would take
    return np.float64(x) if double else np.float32(x)


def _pieces(pair: Any, names: list[str]) -> dict[str, tuple[str, ...]]:
    """The leaves of which one parameter is made, by each: the metric of Adam and RMSprop has a mean over all of it."""
    by_name = {name: link for link in pair.links for name in link.torch}
    refused = [name for name in dict.fromkeys(names) if len(by_name[name].torch) > 1]
    if refused:
        link = by_name[refused[0]]
        raise ValueError(
            f"{_WHERE}: the attached penalty acts on {', '.join(map(repr, refused))}, and the JAX side holds "
            f"{', '.join(map(repr, link.torch))} as {', '.join(link.jax)}: the metric of its proximal step is a mean "
            "over one parameter, which nobody knows there; leave these out, handle.penalty = "
            f"handle.penalty.on({[f'!{name}' for name in refused]})"
        )
    whole = {name: tuple(leaf_name(leaf.split(".")) for leaf in by_name[name].jax) for name in names}
    return {leaf: leaves for leaves in whole.values() for leaf in leaves if len(leaves) > 1}

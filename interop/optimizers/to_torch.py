"""From the state of an optax transformation to an optimizer of torch.optim."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
import torch
from flax import nnx
from jax.core import Tracer
from torch import Tensor
from torch.optim import Optimizer

from funcreg._selectors import leaf_name

from .._refusals import TO_TORCH
from ._optax_states import REMEMBER_NOTHING, chained, from_optax
from ._settings import NO_GROUP, Settings, Terms, crossing, filled, groups_of, handle_of, named, number, settings_of
from ._transformation import TorchOptimizerState, check_rates, rebuild

_WHERE = "optimizer_to_torch"


def optimizer_to_torch(pair: Any, opt_state: Any, optimizer: Optimizer) -> None:
    """`Pair.optimizer_to_torch`, which says what it does."""
    settings = settings_of(_WHERE, pair, optimizer)
    _refuse_holders(opt_state)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(opt_state)):
        raise TypeError(f"{_WHERE}: opt_state holds traced arrays; call it outside of jax.jit, grad and vmap")
    pure = _pure(opt_state)
    ours = _ours(pure)
    if ours is not None:
        if any(isinstance(part, optax.ScaleByScheduleState) for part in chained(pure)):
            raise TypeError(
                f"{_WHERE}: the state is in a chain with a schedule, whose factor PyTorch's rates would lack; give the "
                "schedule to optimizer_to_jax, scheduler=..."
            )
        _compare(ours.settings, settings)
        arrays, rates = ours.state, ours.learning_rate
        check_rates(_WHERE, rates, len(settings.groups))
    else:
        arrays, rates = from_optax(_WHERE, pure, optimizer, settings)
    groups = groups_of(_WHERE, pair, optimizer)
    pair = crossing(_WHERE, pair, groups)
    own = dict(pair.net.named_parameters())
    moments = _moments(pair, settings, arrays, groups)
    scalars = _scalars(pair, settings, arrays, groups)
    states = {
        name: _of_parameter(settings, i, name, own[name], optimizer.param_groups[i], moments, scalars[name])
        for name, i in groups.items()
        if i != NO_GROUP
    }
    bound = _bound(optimizer)
    for name, state in states.items():
        if own[name] not in bound:
            state.pop("prox_scale", None)
        optimizer.state.pop(own[name], None)
        if state:
            optimizer.state[own[name]] = state
    for group, rate in zip(optimizer.param_groups, rates or (), strict=False):
        _set_rate(optimizer, group, np.asarray(rate))


def _refuse_holders(opt_state: Any) -> None:
    """What holds a state beside other things is taken apart by the caller, who knows the rest."""
    kind, remedy = type(opt_state).__name__, None
    if isinstance(opt_state, nnx.State):
        kind, remedy = "nnx.State", "pass the opt_state of the nnx.Optimizer itself, optimizer.opt_state"
    elif hasattr(opt_state, "opt_state"):  # nnx.Optimizer, flax's TrainState and ours
        remedy = "pass its opt_state"
    elif isinstance(opt_state, optax.GradientTransformation):
        remedy = "pass the state, which its init and update return"
    elif isinstance(opt_state, tuple) and any(isinstance(x, optax.GradientTransformation) for x in opt_state):
        remedy = "pass the second one, the state"
        kind += " with a transformation in it"
    if remedy:
        raise TypeError(f"{_WHERE}: opt_state must be the state of a transformation, got {kind}; {remedy}")


def _pure(opt_state: Any) -> Any:
    """Without the Variables in which `nnx.Optimizer` holds the arrays."""

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    def value(node: Any) -> Any:
        return next(iter(jax.tree.leaves(node)), optax.MaskedNode()) if is_variable(node) else node

    return jax.tree.map(value, opt_state, is_leaf=is_variable)


def _ours(state: Any) -> TorchOptimizerState | None:
    """The state of our transformation, alone or in a chain with others that remember nothing, such as clipping."""
    own = [part for part in chained(state) if not isinstance(part, REMEMBER_NOTHING)]
    return own[0] if len(own) == 1 and isinstance(own[0], TorchOptimizerState) else None


def _bound(optimizer: Optimizer) -> Mapping[Tensor, Any]:
    handle = handle_of(_WHERE, optimizer)
    return {} if handle is None else handle._bound


def _compare(ours: Settings, theirs: Settings) -> None:
    if ours.optimizer != theirs.optimizer:
        raise ValueError(f"{_WHERE}: the state is one of {ours.optimizer}, the optimizer is {theirs.optimizer}")
    if len(ours.groups) != len(theirs.groups):
        raise ValueError(
            f"{_WHERE}: the state has {len(ours.groups)} parameter groups, the optimizer {len(theirs.groups)}"
        )
    if ours.penalized != theirs.penalized:
        raise ValueError(
            f"{_WHERE}: a penalty was attached to the optimizer of the {'state' if ours.penalized else 'other side'} "
            "only; attach the same one to both"
        )
    for (name, here), (_, there) in zip(ours.penalty, theirs.penalty, strict=False):
        if not _same_terms(here, there):
            raise ValueError(
                f"{_WHERE}: the penalty on {name!r} is {_said(here)} in the state and {_said(there)} in the optimizer; "
                "attach the one of the run, and set handle.penalty afterwards to change it"
            )
    for i in range(len(ours.groups)):
        here, there = ours.hyper(i), theirs.hyper(i)
        for name in here:
            if here[name] != there[name] and name != "tensor_step":  # which only rounds
                raise ValueError(
                    f"{_WHERE}: {name} of group {i} is {here[name]} in the state and {there[name]} in the optimizer; "
                    "make the optimizer with the hyper-parameters of the run"
                )
    there = dict(theirs.group_of)
    for name, group in ours.group_of:
        if there.get(name) != group:
            raise ValueError(
                f"{_WHERE}: the leaf {name!r} is in {_group(group)} of the state and in {_group(there.get(name))} of "
                "the optimizer; give the groups the same parameters in the same order of groups"
            )


def _same_terms(here: Terms, there: Terms) -> bool:
    """Strengths may come from parameters of another precision; one that is an array is not known."""
    return [rule for rule, _ in here] == [rule for rule, _ in there] and all(
        a is None or b is None or math.isclose(a, b, rel_tol=1e-6)
        for (_, ours), (_, theirs) in zip(here, there, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _said(terms: Terms) -> str:
    parts = [(rule, [f"{x:g}" for x in strengths if x is not None]) for rule, strengths in terms]
    return " + ".join(f"{rule} of strength {', '.join(known)}" if known else rule for rule, known in parts) or "none"


def _group(i: int | None) -> str:
    return "no group" if i in (None, NO_GROUP) else f"group {i}"


def _moments(
    pair: Any, settings: Settings, arrays: Mapping[str, Any], groups: Mapping[str, int]
) -> dict[str, dict[str, Tensor]]:
    """The arrays that are like parameters, by their names and those of the parameters; zeros where there are none."""
    own = dict(pair.net.named_parameters())
    zeros = pair.parameters_to_jax({name: filled(own[name], 0.0) for name in groups})
    blank = named(zeros)
    result = {}
    for what in settings.names():
        holders = [leaf for leaf, group in settings.group_of if what in settings.moments(group)]
        if holders:
            given = named(arrays.get(what, {}))
            values = dict(blank)
            for leaf in holders:
                values[leaf] = _present(given, what, leaf)
                shape = np.shape(values[leaf])
                if shape != blank[leaf].shape:
                    raise ValueError(
                        f"{_WHERE}: the state's {what!r} of {leaf!r} must have the shape {blank[leaf].shape}, "
                        f"got {shape}"
                    )
            result[what] = pair.parameters_to_torch(rebuild(zeros, values))
    return result


def _scalars(
    pair: Any, settings: Settings, arrays: Mapping[str, Any], groups: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """The 0-d arrays, by the names of the parameters and their own; those of all leaves of a parameter must agree."""
    result: dict[str, dict[str, Any]] = {name: {} for name in groups}
    given = {what: named(arrays.get(what, {})) for what in settings.names()}
    for link in pair.links:
        leaves = [leaf_name(leaf.split(".")) for leaf in link.jax]
        for name in link.torch:
            for what in settings.scalars(groups.get(name, NO_GROUP)):
                values = [np.asarray(_present(given[what], what, leaf)) for leaf in leaves]
                if any(x != values[0] for x in values):
                    each = ", ".join(f"{leaf}: {x}" for leaf, x in zip(leaves, values, strict=True))
                    raise ValueError(
                        f"{_WHERE}: the leaves of the parameter {name!r} differ in {what!r} ({each}), of which it has "
                        "but one; they must have had gradients in the same updates"
                    )
                result[name][what] = values[0][()]
    return result


def _present(given: Mapping[str, Any], what: str, leaf: str) -> Any:
    if leaf not in given:
        raise ValueError(
            f"{_WHERE}: the state has no {what!r} of the leaf {leaf!r}; it is the state of other parameters"
        )
    return given[leaf]


def _of_parameter(
    settings: Settings, group: int, name: str, p: Tensor, options: Mapping[str, Any], moments: Any, scalars: Any
) -> dict[str, Any]:
    """What PyTorch keeps of one parameter; nothing of one that has had no gradient, which starts when it gets one."""
    state: dict[str, Any] = {}
    for what in settings.moments(group):
        x = moments[what][name]
        if x.dtype != p.dtype:
            raise ValueError(
                f"{_WHERE}: the state's {what!r} of {name!r} is {x.dtype}, the parameter {p.dtype}; convert the one or "
                "the other (net.to(...) before the optimizer is made)"
            )
        state[what] = torch.empty_like(p, requires_grad=False).copy_(x)
    if not scalars.get("has_buffer", True) or (scalars.get("step") == 0 and settings.optimizer != "Adagrad"):
        return {}
    for what, x in scalars.items():
        if what == "prox_scale":
            state[what] = float(x)
        elif what != "has_buffer":
            on = p.device if options.get("capturable") or (what == "step" and options.get("fused")) else "cpu"
            state[what] = torch.tensor(float(x), dtype=_scalar_dtype(what, x, options), device=on)
    return state


def _scalar_dtype(what: str, x: Any, options: Mapping[str, Any]) -> torch.dtype:
    if what == "mu_product":
        return TO_TORCH[np.dtype(x.dtype)]  # its own: rounded at every step
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not options.get("fused") else torch.float32


def _set_rate(optimizer: Optimizer, group: dict[str, Any], rate: np.ndarray) -> None:
    """The rate of a group; a float64 one that the state only has in float32 stays as precise as it is."""
    old = group["lr"]
    if rate.dtype.type(number(old)) == rate:
        return
    if isinstance(old, Tensor) and sum(other["lr"] is old for other in optimizer.param_groups) == 1:
        with torch.no_grad():
            old.fill_(float(rate))
    elif isinstance(old, Tensor):  # the default of groups that have none of their own
        group["lr"] = torch.full_like(old, float(rate), requires_grad=old.requires_grad)
    else:
        group["lr"] = float(rate)

"""States of `funcreg.torch` as those of `funcreg.jax` and optax, and back: the same named tuples around other trees."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import nnx
from torch import Tensor

from funcreg._training import AddPenaltyGradientState
from funcreg.jax import TrainState
from funcreg.jax import _transform as jax_transform
from funcreg.torch import _transform as torch_transform
from funcreg.torch import optax as torch_optax
from funcreg.torch.optax import _transforms as torch_transforms

from ..arrays import to_jax, to_torch
from ._transformation import refuse_wide

# optax has no public names for some of its states; the fields are the same on both sides
_COUNTED = type(optax.scale_by_rms(bias_correction=True).init({}))
_COUNTED_CENTERED = type(optax.scale_by_stddev(bias_correction=True).init({}))
_SCHEDULED_DECAY = type(optax.add_decayed_weights(lambda count: count).init({}))
_TWINS: dict[type, type] = {
    torch_transform.ProxSgdState: jax_transform.ProxSgdState,
    torch_transform.ProxAdamState: jax_transform.ProxAdamState,
    AddPenaltyGradientState: AddPenaltyGradientState,
    torch_optax.EmptyState: optax.EmptyState,
    torch_optax.MaskedState: optax.MaskedState,
    torch_optax.MultiStepsState: optax.MultiStepsState,
    torch_optax.ScaleByAdamState: optax.ScaleByAdamState,
    torch_optax.ScaleByRmsState: optax.ScaleByRmsState,
    torch_optax.ScaleByRStdDevState: optax.ScaleByRStdDevState,
    torch_optax.ScaleByScheduleState: optax.ScaleByScheduleState,
    torch_optax.TraceState: optax.TraceState,
    torch_transforms.ScaleByRmsWithCountState: _COUNTED,
    torch_transforms.ScaleByRStdDevWithCountState: _COUNTED_CENTERED,
    torch_transforms.WeightDecaySchedule: _SCHEDULED_DECAY,
}
_BACK = {theirs: ours for ours, theirs in _TWINS.items()}
_LIKE_PARAMS = {"mu", "nu", "trace", "master", "acc_grads"}
_INNER = {"inner_state", "inner_opt_state", "skip_state"}


def opt_state_to_jax(pair: Any, state: Any) -> Any:
    """`Pair.opt_state_to_jax`, which says what it does."""

    def tree(values: Any) -> Any:
        if isinstance(values, Mapping):
            refuse_wide("opt_state_to_jax", values, "run in float32 from the start")
        return pair.parameters_to_jax(values)

    if isinstance(state, TrainState):
        return TrainState(
            tree(state.params),
            opt_state_to_jax(pair, state.opt_state),
            _extra_to_jax(pair, state.params, state.extra),
        )
    return _convert("opt_state_to_jax", state, _TWINS, tree, to_jax)


def opt_state_to_torch(pair: Any, state: Any) -> Any:
    """`Pair.opt_state_to_torch`, which says what it does."""
    where = "opt_state_to_torch"
    if isinstance(state, TrainState):
        return TrainState(
            pair.parameters_to_torch(state.params),
            opt_state_to_torch(pair, state.opt_state),
            _extra_to_torch(where, pair, state.params, state.extra),
        )
    return _convert(where, state, _BACK, pair.parameters_to_torch, to_torch)


def _convert(
    where: str, state: Any, twins: Mapping[type, type], tree: Callable[[Any], Any], array: Callable[[Any], Any]
) -> Any:
    if type(state) in twins:
        fields = {}
        for name, value in state._asdict().items():
            if name in _LIKE_PARAMS:
                fields[name] = () if isinstance(value, tuple) and not value else tree(value)
            elif name in _INNER:
                fields[name] = _convert(where, value, twins, tree, array)
            else:  # a count
                fields[name] = array(value)
        return twins[type(state)](**fields)
    if type(state) in (tuple, list):
        return type(state)(_convert(where, part, twins, tree, array) for part in state)
    if state is None:
        return None
    known = ", ".join(cls.__name__ for cls in twins)
    raise TypeError(
        f"{where}: a {type(state).__name__} of {type(state).__module__} has no twin on the other side; those that have "
        f"are {known}, and tuples of them (for torch.optim: pair.optimizer_to_jax, pair.optimizer_to_torch)"
    )


def _extra_to_jax(pair: Any, params: dict[str, Tensor], extra: Any) -> Any:
    if not extra:
        return extra
    whole = pair.to_jax({**params, **extra})
    if isinstance(whole, nnx.State):
        return nnx.filter_state(whole, nnx.Not(nnx.Param))
    return {name: tree for name, tree in whole.items() if name != "params"}


def _extra_to_torch(where: str, pair: Any, params: Any, extra: Any) -> Any:
    if not extra:
        return extra
    if isinstance(extra, nnx.State):
        whole = nnx.merge_state(params, extra)
    elif isinstance(extra, dict):
        whole = {"params": params, **extra}
    else:
        raise TypeError(
            f"{where}: extra must be a dict of collections or an nnx.State of what is no Param, got "
            f"{type(extra).__name__}; carry anything else across on its own, by to_torch"
        )
    state = pair.to_torch(whole)
    return {name: state[name] for name, _ in pair.net.named_buffers() if name in state}

"""Which states of optax's own optimizers mean the same as one of torch.optim's, and what the others mean instead."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from torch.optim import Optimizer

from ._settings import Settings, named, number

_ADAM_LIKE = {"Adam": ("exp_avg", "exp_avg_sq"), "Adamax": ("exp_avg", "exp_inf")}
_ADAM_LIKE["AdamW"] = _ADAM_LIKE["Adam"]
_RMS = (optax.ScaleByRmsState, optax.ScaleByRStdDevState)
_COUNTED_RMS = tuple(
    cls for name in ("ScaleByRmsWithCountState", "ScaleByRStdDevWithCountState") if (cls := getattr(optax, name, None))
)
_DIFFERENT = {
    "Adagrad": "optax.adagrad adds eps inside the root, PyTorch outside",
    "NAdam": "optax.nadam has no momentum_decay",
    "RAdam": "optax.radam scales eps by the bias correction, PyTorch does not",
}
_OURS = "of funcreg.jax, which goes on in funcreg.torch.{0}: its state is pair.opt_state_to_torch(opt_state)"
_ELSEWHERE = {  # by name: some have no public one
    "ProxSgdState": _OURS.format("prox_sgd"),
    "ProxAdamState": _OURS.format("prox_adam"),
    "MultiStepsState": "which sums the gradients of several calls, where torch.optim leaves that to backward(): where "
    "mini_step is 0, pass opt_state.inner_opt_state",
    "PartitionState": "which has a transformation for each label, where torch.optim has one for all groups: make an "
    "optimizer of the parameters of each label and pass it opt_state.inner_states[label].inner_state",
}
REMEMBER_NOTHING = (optax.EmptyState, optax.ScaleByScheduleState)  # nothing that PyTorch's optimizers would


def from_optax(
    where: str, opt_state: Any, optimizer: Optimizer, settings: Settings
) -> tuple[dict[str, Any], tuple[Any, ...] | None]:
    """The state of `optax.adam` and the like under PyTorch's names, and the rates where it holds them.

    Its hyper-parameters are not in the state: they are the caller's promise.
    """
    name = settings.optimizer
    if name in _DIFFERENT:
        raise TypeError(
            f"{where}: no optax optimizer goes on as {name}: {_DIFFERENT[name]}; train with the transformation of "
            "optimizer_to_jax"
        )
    links = list(chained(opt_state))
    scheduled = any(isinstance(link, optax.ScaleByScheduleState) for link in links)
    rates = None
    for link in links:
        if hasattr(link, "hyperparams"):
            _compare_injected(where, settings, link)
            if "learning_rate" in _schedules(link):  # what it holds is the rate of the last update, not of the next
                scheduled = True
            elif "learning_rate" in link.hyperparams:
                rates = (_injected_rate(where, link),) * len(optimizer.param_groups)
    own = [link for link in links if not isinstance(link, REMEMBER_NOTHING) and not hasattr(link, "hyperparams")]
    used = rates or tuple(number(group["lr"]) for group in optimizer.param_groups)
    arrays = _arrays(where, settings, used, own, scheduled)
    if scheduled and not any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{where}: the rate of this state comes from a schedule, which is not in it, and the optimizer has no "
            "scheduler: make one for it, stepped as far as help(pair.optimizer_to_torch) shows; "
            "torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0) where the optimizer's rate shall stay"
        )
    return arrays, rates


def _injected_rate(where: str, injected: Any) -> Any:
    rate = injected.hyperparams["learning_rate"]
    if np.shape(rate) != ():
        raise ValueError(
            f"{where}: learning_rate of the state (inject_hyperparams) must be a number, got one of shape "
            f"{np.shape(rate)}; of several members take one first (fr.unstack)"
        )
    return rate


def _schedules(injected: Any) -> Mapping[str, Any]:
    """The hyper-parameters of an `inject_hyperparams` that are functions of the count, with their states."""
    return getattr(injected, "hyperparams_states", {})


def _compare_injected(where: str, settings: Settings, injected: Any) -> None:
    """Refuse hyper-parameters of `inject_hyperparams` that are not those of the optimizer."""
    groups = [settings.hyper(i) for i in range(len(settings.groups))]
    for i, hyper in enumerate(groups):
        b1, b2 = hyper.get("betas", (None, None))
        decay = hyper.get("alpha", hyper.get("momentum"))  # of rmsprop, of trace
        twins = {**hyper, "b1": b1, "b2": b2, "decay": decay, "eps_root": 0.0}  # the last one PyTorch has not
        for name, x in injected.hyperparams.items():
            theirs = twins.get(name)
            if theirs is None:
                continue
            ours = np.asarray(x)
            if name in _schedules(injected):
                raise TypeError(
                    f"{where}: {name} of the state follows a schedule of inject_hyperparams, and PyTorch keeps it "
                    "constant; train with a constant one"
                )
            # a mask of the decay is groups without it in PyTorch
            masked = name == "weight_decay" and theirs == 0 and any(other[name] for other in groups)
            if ours.shape or (ours.dtype.type(theirs) != ours and not masked):  # the state may hold it in float32
                raise ValueError(
                    f"{where}: {name} of group {i} is {ours[()]!s} in the state (inject_hyperparams) and {theirs} "
                    "in the optimizer; both must be made with the same hyper-parameters"
                )


def chained(state: Any) -> Iterator[Any]:
    """The states of a chain, in order, out of `inject_hyperparams` as well.

    What is masked and remembers nothing, as the decay of `adamw(mask=...)`, is as if it were not masked.
    """
    if isinstance(state, optax.MaskedState):
        inside = list(chained(state.inner_state))
        yield from inside if all(isinstance(part, REMEMBER_NOTHING) for part in inside) else (state,)
    elif hasattr(state, "_fields"):
        yield state
        if hasattr(state, "hyperparams"):
            yield from chained(state.inner_state)
    elif isinstance(state, tuple | list):
        for part in state:
            yield from chained(part)
    else:
        yield state


def _arrays(where: str, settings: Settings, rates: Sequence[Any], own: list[Any], scheduled: bool) -> dict[str, Any]:
    name = settings.optimizer
    kinds = [type(state) for state in own]
    for i in range(len(settings.groups)):
        _refuse_options(where, name, settings.hyper(i), kinds)
    if name == "SGD" and not settings.names() and not own:
        return {}
    if name == "SGD" and settings.names() and kinds == [optax.TraceState]:
        return {"momentum_buffer": own[0].trace, "has_buffer": _everywhere(settings, np.True_)}
    if name in _ADAM_LIKE and kinds == [optax.ScaleByAdamState]:
        first, second = _ADAM_LIKE[name]
        return {first: own[0].mu, second: own[0].nu, "step": _everywhere(settings, np.float32(own[0].count))}
    if name == "Adadelta" and kinds == [optax.ScaleByAdaDeltaState]:
        # the count, which optax has not and PyTorch's formula does not use, only says that there is a state
        return {"square_avg": own[0].e_g, "acc_delta": own[0].e_x, "step": _everywhere(settings, np.float32(1))}
    if name == "RMSprop" and kinds and issubclass(kinds[0], _RMS + _COUNTED_RMS):
        return _rmsprop(where, settings, rates, own, scheduled)
    for kind in kinds:
        if kind.__name__ in _ELSEWHERE:
            raise TypeError(f"{where}: the state holds {kind.__name__}, {_ELSEWHERE[kind.__name__]}")
    got = ", ".join(kind.__name__ for kind in kinds) or "nothing"
    raise TypeError(
        f"{where}: {name} with its present options cannot go on from this optax state, which holds {got}; it goes on "
        "from optax's optimizer of the same name and options, alone or in optax.chain with transformations that "
        "remember nothing, or from the transformation of optimizer_to_jax"
    )


def _refuse_options(where: str, name: str, hyper: Mapping[str, Any], kinds: list[type]) -> None:
    why = None
    if hyper.get("amsgrad"):
        why = "amsgrad=True takes the maximum of the uncorrected second moments, optax.amsgrad of the corrected ones"
    elif hyper.get("dampening"):
        why = f"dampening={hyper['dampening']:g} has no counterpart in optax.trace"
    if why:
        raise TypeError(
            f"{where}: {name} cannot go on from an optax state ({', '.join(kind.__name__ for kind in kinds)}): {why}; "
            "train with the transformation of optimizer_to_jax"
        )


def _rmsprop(where: str, settings: Settings, rates: Sequence[Any], own: list[Any], scheduled: bool) -> dict[str, Any]:
    second, *rest = own
    arrays: dict[str, Any] = {
        "square_avg": second.nu,
        "step": _everywhere(settings, np.float32(second.count if "count" in second._fields else 1)),
    }
    centered = hasattr(second, "mu")
    traced = [type(state) for state in rest] == [optax.TraceState]
    for i in range(len(settings.groups)):
        hyper = settings.hyper(i)
        if hyper["centered"] != centered or (hyper["momentum"] > 0) != traced or (rest and not traced):
            raise TypeError(
                f"{where}: RMSprop with centered={hyper['centered']}, momentum={hyper['momentum']:g} cannot go on from "
                f"{', '.join(type(state).__name__ for state in own)}; make both with the same options"
            )
    if centered:
        arrays["grad_avg"] = second.mu
    if traced:
        if scheduled:
            raise TypeError(
                f"{where}: optax.rmsprop's trace is the sum of steps, each taken with its own learning rate; under a "
                "schedule PyTorch's momentum_buffer cannot be had from it"
            )
        if any(float(rate) == 0 for rate in rates):
            raise ValueError(
                f"{where}: optax.rmsprop's trace comes after the learning rate, PyTorch's momentum_buffer before it; "
                "at a rate of 0 the one cannot be had from the other: call it at another rate"
            )
        of = dict(settings.group_of)
        trace = named(rest[0].trace)
        # optax's trace comes after the learning rate and PyTorch's buffer before it
        arrays["momentum_buffer"] = {
            leaf: x / -float(rates[of[leaf]]) for leaf, x in trace.items() if of.get(leaf, -1) >= 0
        }
    return arrays


def _everywhere(settings: Settings, x: Any) -> dict[str, Any]:
    return {leaf: x for leaf, _ in settings.group_of}

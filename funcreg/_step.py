"""One pure training step: what `train_step` returns, for both wings. No framework, no formula."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from ._flat import forms
from ._penalty import Penalty
from ._training import Parts, Penalized, at, check_scalar, check_trainable


class TrainState(NamedTuple):
    """What one training step hands to the next: a tree of arrays.

    Attributes:
        params: the parameters.
        opt_state: the state of the transformation.
        extra: with `has_extra`, what the loss carries along, such as batch-norm statistics; else `()`.
    """

    params: Any
    opt_state: Any
    extra: Any = ()


def train_step(
    penalty_class: type[Penalty], apply_updates: Callable[..., Any], loss: Any, make: Any, has_extra: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if not callable(loss):
        raise TypeError(f"train_step: loss must be a function (params, *batch) -> scalar, got {loss!r}")
    if not callable(make) or hasattr(make, "update"):
        raise TypeError(
            "train_step: make must be a function hyper -> transformation, such as lambda hyper: "
            f"prox_adam(hyper['lr'], l1(hyper['lam'])), got {type(make).__name__}"
        )
    wing = penalty_class.wing
    bare, in_loss = loss, []
    while isinstance(bare, Penalized):
        bare, in_loss = bare.loss, [*in_loss, bare.penalty]
    takes_hyper = _takes_hyper(bare)

    def transformation(hyper: Any) -> Any:
        try:
            made = make(hyper)
        except (KeyError, TypeError, AttributeError) as error:
            error.add_note(
                f"train_step: make was called with hyper = {_brief(hyper)}; the arguments are init(params, hyper) and "
                "step(state, hyper, *batch)."
            )
            raise
        if not (hasattr(made, "init") and hasattr(made, "update")):
            raise TypeError(f"train_step: make must return a transformation (init, update), got {made!r}")
        return made

    def init(params: Any, hyper: Any, extra: Any = ()) -> TrainState:
        given = not (isinstance(extra, tuple) and extra == ())
        if given != has_extra:
            raise TypeError(
                "train_step: has_extra=True, but init got no extra; call init(params, hyper, extra)"
                if has_extra
                else "train_step: init got extra, but has_extra=False; say has_extra=True, with a loss (params, extra, "
                "*batch) -> (scalar, new_extra)"
            )
        check_trainable(wing, "train_step", params, "leave it out, or put it into extra (has_extra=True)")
        params = wing.own(params)
        return TrainState(params, transformation(hyper).init(params), wing.own(extra))

    def objective(params: Any, extra: Any, hyper: Any, batch: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """What is differentiated, and (bare loss, the penalties in it, new extra)."""
        keywords = {"hyper": hyper} if takes_hyper else {}
        if has_extra:
            value, extra = _split(wing, bare(params, wing.own(extra), *batch, **keywords), extra)
        else:
            value = bare(params, *batch, **keywords)
        penalties = [penalty.value(params) for penalty in in_loss]
        total, parts = value, None
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Parts):
            total, parts = value
        advice = "has_extra=True if it returns (scalar, new_extra)" if isinstance(total, tuple) else "take its mean"
        check_scalar("train_step", total, advice)
        if in_loss:
            total = wing.total([total, *penalties], [total, *penalties])
        if parts is None:
            return total, (value, penalties, extra)
        return total, (parts.loss, [parts.penalty, *penalties], extra)

    def step(state: TrainState, hyper: Any, *batch: Any) -> tuple[TrainState, dict[str, Any]]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"train_step: state must be a TrainState, which init(params, hyper) returns, got {type(state).__name__}"
            )
        params, opt_state, extra = state
        chosen = transformation(hyper)
        (_, (value, penalties, extra)), grads = wing.value_and_grad(objective, params, extra, hyper, batch)
        by_prox = getattr(chosen.update, "penalty", None)
        if by_prox is not None:
            penalties.append(at(penalty_class, "train_step", by_prox, getattr(opt_state, "count", None)).value(params))
        metrics = {"loss": value}
        if penalties:
            metrics["penalty"] = wing.total(penalties, penalties)
            metrics["objective"] = wing.total([value, *penalties], [value, *penalties])
        updates, opt_state = chosen.update(grads, opt_state, params)
        return TrainState(apply_updates(params, updates), opt_state, extra), metrics

    # What a comparison needs to run the step again with another transformation: `interop.check_training`.
    step.made_by = (loss, make, has_extra)  # pyright: ignore[reportFunctionMemberAccess]
    return init, step


def _takes_hyper(loss: Callable[..., Any]) -> bool:
    """Whether the loss asks for the hyper-parameters: by a parameter of that name to which nothing is bound."""
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):  # a builtin
        return False
    parameter = parameters.get("hyper")
    bound = isinstance(loss, functools.partial) and "hyper" in loss.keywords
    if parameter is None or bound or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        return False
    later = [*parameters.values()][[*parameters].index("hyper") + 1 :]
    if any(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in later):
        raise TypeError(
            "train_step: the loss gets hyper by name and the batch by position: put the parameter hyper after the "
            f"batch, or behind *; got ({', '.join(parameters)})"
        )
    return True


def _brief(hyper: Any) -> str:
    if hasattr(hyper, "shape"):
        return f"an array of shape {tuple(hyper.shape)}"
    return f"a dict with {', '.join(map(repr, hyper)) or 'nothing'}" if isinstance(hyper, dict) else repr(hyper)


def _split(wing: Any, returned: Any, extra: Any) -> tuple[Any, Any]:
    """(value, new extra), where the new extra has the form of the old one."""
    if not (isinstance(returned, tuple) and len(returned) == 2) or isinstance(returned[1], Parts):
        raise TypeError(
            f"train_step: with has_extra=True the loss must return (scalar, new_extra), got {type(returned).__name__}"
        )
    old, new = forms(wing, extra), forms(wing, returned[1])
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"train_step: the loss must return the new extra in the form of the old one; the leaf {name!r} was "
                f"{old.get(name, 'not there')} and is {new.get(name, 'not there')}"
            )
    return returned

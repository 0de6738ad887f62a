"""One pure training step: what `train_step` returns, for both wings. No framework, no formula."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from ._flat import form
from ._penalty import Penalty
from ._training import Parts, Penalized, at, check_scalar


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
    bare, in_loss = (loss.loss, loss.penalty) if isinstance(loss, Penalized) else (loss, None)
    takes_hyper = _takes_hyper(bare)

    def transformation(hyper: Any) -> Any:
        made = make(hyper)
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
        params = wing.own(params)
        return TrainState(params, transformation(hyper).init(params), wing.own(extra))

    def objective(params: Any, extra: Any, hyper: Any, batch: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """What is differentiated, and (bare loss, penalty in it or None, new extra)."""
        keywords = {"hyper": hyper} if takes_hyper else {}
        if has_extra:
            value, extra = _split(wing, bare(params, wing.own(extra), *batch, **keywords), extra)
        else:
            value = bare(params, *batch, **keywords)
        parts = None
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Parts):
            value, parts = value
        advice = "has_extra=True if it returns (scalar, new_extra)" if isinstance(value, tuple) else "take its mean"
        check_scalar("train_step", value, advice)
        if parts is not None:
            return value, (parts.loss, parts.penalty, extra)
        if in_loss is None:
            return value, (value, None, extra)
        penalty = in_loss.value(params)
        return wing.total([value, penalty], [value, penalty]), (value, penalty, extra)

    def step(state: TrainState, hyper: Any, *batch: Any) -> tuple[TrainState, dict[str, Any]]:
        params, opt_state, extra = state
        chosen = transformation(hyper)
        (total, (value, penalty, extra)), grads = wing.value_and_grad(objective, params, extra, hyper, batch)
        by_prox = getattr(chosen.update, "penalty", None)
        if by_prox is not None:
            by_prox = at(penalty_class, "train_step", by_prox, getattr(opt_state, "count", None)).value(params)
            total = wing.total([total, by_prox], [total, by_prox])
            penalty = by_prox if penalty is None else wing.total([penalty, by_prox], [penalty, by_prox])
        updates, opt_state = chosen.update(grads, opt_state, params)
        metrics = {"loss": value} | ({} if penalty is None else {"penalty": penalty, "objective": total})
        return TrainState(apply_updates(params, updates), opt_state, extra), metrics

    return init, step


def _takes_hyper(loss: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(loss).parameters.get("hyper")
    except (TypeError, ValueError):  # a builtin
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _split(wing: Any, returned: Any, extra: Any) -> tuple[Any, Any]:
    """(value, new extra), where the new extra has the form of the old one."""
    if not (isinstance(returned, tuple) and len(returned) == 2) or isinstance(returned[1], Parts):
        raise TypeError(
            f"train_step: with has_extra=True the loss must return (scalar, new_extra), got {type(returned).__name__}"
        )
    old, new = (
        {".".join(p): x for p, x in zip(*wing.paths_and_leaves(t)[:2], strict=True)} for t in (extra, returned[1])
    )
    for name in [*old, *new]:
        forms = [form(leaves[name]) if name in leaves else "nothing" for leaves in (old, new)]
        if forms[0] != forms[1]:
            raise ValueError(
                f"train_step: the loss must return the new extra in the form of the old one; the leaf {name!r} was "
                f"{forms[0]} and is {forms[1]}"
            )
    return returned

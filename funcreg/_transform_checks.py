"""What the transformations refuse, in the same words on both wings."""

from typing import Any

from ._penalty import Flat, Penalty


def check_penalty(penalty_class: type[Penalty], where: str, penalty: Any, schedule: bool = True) -> Any:
    """A penalty of this wing, or a schedule of penalties where that is allowed."""
    if isinstance(penalty, penalty_class) or (schedule and callable(penalty) and not isinstance(penalty, Penalty)):
        return penalty
    wing = penalty_class.__module__.removesuffix("._wing")
    what = f"a penalty of {wing} such as l1(1e-4)" + (" or a function count -> Penalty" if schedule else "")
    got = f"one of {type(penalty).__module__.removesuffix('._wing')}" if isinstance(penalty, Penalty) else repr(penalty)
    raise TypeError(f"{where}: penalty must be {what}, got {got}")


def at(penalty_class: type[Penalty], where: str, penalty: Any, count: Any) -> Any:
    """The penalty at a step count."""
    if isinstance(penalty, Penalty):
        return penalty
    return check_penalty(penalty_class, f"{where}: the schedule's result", penalty(count), schedule=False)


def check_params(where: str, params: Any) -> None:
    if params is None:
        raise ValueError(f"{where}: update needs the parameters: call update(updates, state, params)")


def check_hyper(wing: Any, where: str, name: str, value: Any, below: float = float("inf")) -> None:
    """A hyper-parameter in `[0, below)`; schedules and traced values are not checked."""
    if callable(value) and not hasattr(value, "shape"):
        return
    if isinstance(value, bool) or not wing.is_scalar(value):
        raise TypeError(f"{where}: {name} must be a number or a 0-d array, got {value!r}")
    smallest = wing.concrete(value)
    if smallest is not None and not 0 <= smallest < below:
        domain = ">= 0 and finite" if below == float("inf") else f"in [0, {below:g})"
        raise ValueError(f"{where}: {name} must be {domain}, got {smallest:g}")


def check_precision(where: str, flat: Flat, master_dtype: Any) -> None:
    if master_dtype is not None:
        if master_dtype.itemsize < 4:
            raise ValueError(f"{where}: master_dtype must have 32 bits or more, got {master_dtype}")
        return
    for name, x in zip(flat.names, flat.leaves, strict=True):
        if x.dtype.itemsize < 4:
            raise ValueError(
                f"{where}: the leaf {name!r} is {x.dtype}, in which a threshold below half an ulp does nothing: small "
                "weights would never reach zero; pass master_dtype=float32, which keeps a copy in the state"
            )


def check_scalar(loss: Any) -> None:
    shape = getattr(loss, "shape", None)
    if shape is None or tuple(shape) != ():
        got = f"shape {tuple(shape)}" if shape is not None else type(loss).__name__
        raise TypeError(
            f"penalize: the loss must return a scalar array, got {got}; take a mean over the batch, and return "
            "auxiliary output from a function around the penalized loss"
        )

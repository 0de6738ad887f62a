"""What a transformation is, how transformations are chained, and how updates are applied."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _trees

Params = Any  # a tree of tensors: a dict[str, Tensor], or any pytree
Updates = Any  # a tree like that of the params
OptState = Any  # a tree: NamedTuples of tensors and of trees like the params
Schedule = Callable[[Any], Any]  # count -> value; both Python numbers or 0-d tensors
ScalarOrSchedule = float | Tensor | Schedule

NO_PARAMS_MSG = "{}: it needs the current parameters and got None; call update(grads, state, params)"


class TransformInitFn(Protocol):
    """`init(params)`: the state before the first update."""

    def __call__(self, params: Params) -> OptState: ...


class TransformUpdateFn(Protocol):
    """`update(updates, state, params=None)`: the new updates and the new state."""

    def __call__(self, updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]: ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions that transforms gradients into updates.

    Attributes:
        init: `params -> state`.
        update: `(updates, state, params=None) -> (updates, state)`. It changes none of its arguments.
    """

    init: TransformInitFn
    update: TransformUpdateFn


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


def init_empty_state(params: Params) -> EmptyState:
    del params
    return EmptyState()


def identity() -> GradientTransformation:
    """The transformation that returns the updates as they are.

    Returns:
        A `GradientTransformation` with `EmptyState`.
    """

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        del params
        return updates, state

    return GradientTransformation(init_empty_state, update)


def chain(*args: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other: each takes the updates of the one before it.

    Args:
        *args: transformations, the one that sees the gradients first.

    Returns:
        A `GradientTransformation`; its state is the tuple of their states.

    Raises:
        TypeError: an argument that is no transformation.
    """

    for i, transform in enumerate(args):
        if not (hasattr(transform, "init") and hasattr(transform, "update")):
            raise TypeError(f"chain: argument {i} must be a transformation (init, update), got {transform!r}")

    def init(params: Params) -> OptState:
        return tuple(transform.init(params) for transform in args)

    def update(updates: Updates, state: OptState, params: Params | None = None) -> tuple[Updates, OptState]:
        if not isinstance(state, (tuple, list)):
            raise TypeError(
                f"chain: state must be a tuple of {len(args)} states, got {type(state).__name__}; call init(params) "
                "first"
            )
        if len(state) != len(args):
            raise ValueError(f"chain: state must have {len(args)} parts, got {len(state)}; call init(params) first")
        new = []
        for transform, own in zip(args, state, strict=True):
            updates, own = transform.update(updates, own, params)
            new.append(own)
        return updates, tuple(new)

    return GradientTransformation(init, update)


def apply_updates(params: Params, updates: Updates) -> Params:
    """Add the updates to the parameters: `p + u`.

    Args:
        params: tree of tensors.
        updates: tree of the same structure and shapes; None leaves the parameter as it is.

    Returns:
        New params, each with the dtype it had. Leaves that are not tensors are returned as they are.

    Raises:
        ValueError: the trees differ in structure or in a shape.
    """
    rows, rebuild = _trees.zip_leaves("apply_updates", params=params, updates=updates)
    return rebuild([p if not isinstance(p, Tensor) or u is None else (p + u).to(p.dtype) for p, u in rows])


def safe_increment(count: Tensor) -> Tensor:
    """`count + 1` that stays at the largest integer of its dtype instead of overflowing.

    Args:
        count: integer tensor.

    Returns:
        Tensor of the same shape and dtype.
    """
    return torch.clamp(count, max=torch.iinfo(count.dtype).max - 1) + 1

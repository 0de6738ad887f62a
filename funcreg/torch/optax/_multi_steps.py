"""Gradient accumulation over several calls of update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._wing import concrete
from . import _trees
from ._base import GradientTransformation, OptState, Params, Updates, safe_increment
from ._trees import cast, map_leaves, select


class MultiStepsState(NamedTuple):
    """State of `MultiSteps`."""

    mini_step: Tensor  # shape=(), dtype=int32; gradients accumulated so far
    gradient_step: Tensor  # shape=(), dtype=int32; updates made so far
    inner_opt_state: OptState
    acc_grads: Updates  # shapes of the params, dtype=accumulator_dtype
    skip_state: Any = ()


class MultiSteps:
    """Accumulate the gradients of k calls and update at the last one; the other calls return zeros.

    A gradient that is None counts as zero here, since the mean is over all k calls.

    Nothing branches on the counters: the wrapped optimizer runs at every call, and its result is selected or not.

    Args:
        opt: the optimizer that is given the accumulated gradients.
        every_k_schedule: `k >= 1`, a number or a function of the updates made so far.
        use_grad_mean: accumulate the mean of the gradients; if False their sum.
        should_skip_update_fn: `(updates, gradient_step, params) -> (skip, skip_state)`; a call for which `skip`, a 0-d
            bool tensor, is true changes nothing but `skip_state`.
        accumulator_dtype: dtype in which gradients are stored between calls: float32, for float64 params too.

    Raises:
        TypeError: `every_k_schedule` is no integer, no 0-d tensor of integers and no function.
        ValueError: `every_k_schedule` is less than 1.
    """

    def __init__(
        self,
        opt: GradientTransformation,
        every_k_schedule: int | Tensor | Callable[[Any], Any],
        use_grad_mean: bool = True,
        should_skip_update_fn: Callable[..., tuple[Any, Any]] | None = None,
        accumulator_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not callable(every_k_schedule):
            _check_every_k(every_k_schedule)
        self._opt = opt
        self._every_k_schedule = every_k_schedule
        self._use_grad_mean = use_grad_mean
        self._should_skip_update_fn = should_skip_update_fn
        self._accumulator_dtype = accumulator_dtype

    def init(self, params: Params) -> MultiStepsState:
        """The state before the first call.

        Args:
            params: tree of tensors.

        Returns:
            `MultiStepsState` with zeros and the first state of the wrapped optimizer.
        """
        mini_step, gradient_step = _trees.zero_count(params), _trees.zero_count(params)
        skip_state: Any = ()
        if self._should_skip_update_fn is not None:
            zeros = _trees.full_like("MultiSteps", params)
            skip_state = self._should_skip_update_fn(zeros, gradient_step, params)[1]
        acc_grads = _trees.full_like("MultiSteps", params, dtype=self._accumulator_dtype)
        return MultiStepsState(mini_step, gradient_step, self._opt.init(params), acc_grads, skip_state)

    def update(
        self, updates: Updates, state: MultiStepsState, params: Params | None = None
    ) -> tuple[Updates, MultiStepsState]:
        """Accumulate, and every k-th time update.

        Args:
            updates: gradients of this call.
            state: state that `init` or the last call returned.
            params: parameters, for the wrapped optimizer.

        Returns:
            The updates, zero at all calls but every k-th, and the new state.
        """
        schedule = self._every_k_schedule
        k = schedule(state.gradient_step) if callable(schedule) else schedule
        emit = state.mini_step == k - 1

        def leaf(acc: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            acc = acc + (g - acc) / cast(state.mini_step + 1, g) if self._use_grad_mean else g + acc
            return torch.where(emit.to(g.device), torch.zeros_like(acc), acc), acc

        rows, rebuild = _trees.zip_leaves("MultiSteps", **{"state.acc_grads": state.acc_grads}, updates=updates)
        grads = rebuild([torch.zeros_like(acc) if g is None and acc is not None else g for acc, g in rows])
        acc_grads, grads = map_leaves("MultiSteps", leaf, acc_grads=state.acc_grads, updates=grads)
        stepped, inner = self._opt.update(grads, state.inner_opt_state, params)
        zeros = _trees.zero_updates("MultiSteps", stepped)
        new_updates = select(emit, stepped, zeros)
        new_state = MultiStepsState(
            mini_step=(safe_increment(state.mini_step) % k).to(torch.int32),
            gradient_step=torch.where(emit, safe_increment(state.gradient_step), state.gradient_step),
            inner_opt_state=select(emit, inner, state.inner_opt_state),
            acc_grads=acc_grads,
            skip_state=state.skip_state,
        )
        if self._should_skip_update_fn is None:
            return new_updates, new_state

        skip, skip_state = self._should_skip_update_fn(updates, state.gradient_step, params)
        if not isinstance(skip, Tensor) or skip.dtype != torch.bool or skip.ndim != 0:
            seen = f"{skip.dtype} of shape {tuple(skip.shape)}" if isinstance(skip, Tensor) else type(skip).__name__
            raise ValueError(f"MultiSteps: should_skip_update_fn must return a 0-d bool tensor first, got {seen}")
        kept = select(skip, state._replace(skip_state=()), new_state._replace(skip_state=()))
        return select(skip, zeros, new_updates), kept._replace(skip_state=skip_state)

    def has_updated(self, state: MultiStepsState) -> Tensor:
        """Whether the call that returned this state made an update.

        Args:
            state: state of this transformation.

        Returns:
            0-d tensor, bool.
        """
        return (state.mini_step == 0) & (state.gradient_step > 0)

    def gradient_transformation(self) -> GradientTransformation:
        """This object as a pair of functions.

        Returns:
            `GradientTransformation(init, update)`.
        """
        return GradientTransformation(self.init, self.update)


def _check_every_k(k: Any) -> None:
    """Refuse what counts no calls; a tensor is looked at where that waits for nothing."""
    if isinstance(k, Tensor):
        whole = k.ndim == 0 and not k.is_floating_point() and not k.is_complex() and k.dtype != torch.bool
    else:
        whole = isinstance(k, int) and not isinstance(k, bool)
    if not whole:
        raise TypeError(
            f"MultiSteps: every_k_schedule must be an int, a 0-d tensor of integers or a function, got {k!r}"
        )
    least = concrete(k)
    if least is not None and least < 1:
        raise ValueError(f"MultiSteps: every_k_schedule must be >= 1, got {least:g}")

"""Gradients of single examples: their values, norms, and clipping."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import Array

from .. import _examples
from .._training import check_hyper, check_scalar, check_trainable
from . import _wing
from ._kinks import norm
from ._wing import Params, Strength


def per_example(
    loss: Callable[..., Any], chunk_size: int | None = None, batch_axes: Any = 0
) -> Callable[..., tuple[Array, Params]]:
    r"""The loss and its gradient for every example of a batch by itself.

    .. math::
        \ell_i = \ell(w; b_i), \qquad g_i = \nabla_w\, \ell_i, \qquad i = 1 \ldots B

    where `b_i` is the batch that holds example `i` alone: its arrays keep the batch axis, with length 1, so that
    `loss` is the one that a training step takes. For a loss that is a mean over the batch, the mean of the `g_i` is the
    gradient of the batch.

    Args:
        loss: `loss(params, *batch) -> scalar`, without a penalty, which belongs to the parameters and not to the
            examples: add its gradient after the aggregation, or take a proximal step. One that the loss adds by itself
            is not seen.
        chunk_size: how many examples at a time: memory for activations is that of one chunk. None: all.
        batch_axes: the axis of every batch argument that counts examples; or a tuple with one entry per argument, None
            for an argument that all examples share (class weights, a mask).

    Returns:
        `f(params, *batch) -> (values, grads)`: `[B]`, and a tree like `params` with leaves `[B, ...]`.

    Raises:
        TypeError: a penalized loss, or a loss that returns no scalar.
        ValueError: batch arguments of different lengths, an empty batch, or a module that normalizes by statistics of
            the batch (batch norm in training mode): the gradient of a single example does not exist there. Modules
            inside of a function that is compiled as a whole are not looked at.
    """
    _examples.check_options(loss, chunk_size, batch_axes)

    def values_and_grads(params: Params, *batch: Any) -> tuple[Array, Params]:
        check_trainable(_wing, "per_example", params, "let the loss have it by itself, or as a shared batch argument")
        axes, count = _examples.example_axes(_wing, batch_axes, batch)

        def one(params: Params, rows: list[Any]) -> Array:
            value = _examples.naming_rows(loss, params, rows)
            check_scalar("per_example", value, "take a mean over the batch, which holds one example")
            return value

        def of_example(examples: list[Any]) -> tuple[Array, Params]:
            own = iter(examples)
            rows = [
                x if axis is None else jax.tree.map(lambda row, a=axis: jnp.expand_dims(row, a), next(own))
                for x, axis in zip(batch, axes, strict=True)
            ]
            return jax.value_and_grad(one)(params, rows)

        split = [
            jax.tree.map(lambda x, a=axis: jnp.moveaxis(x, a, 0), x)
            for x, axis in zip(batch, axes, strict=True)
            if axis is not None
        ]
        with _refuse_batch_statistics():
            if chunk_size is None or chunk_size >= count:
                return jax.vmap(of_example)(split)
            return jax.lax.map(of_example, split, batch_size=chunk_size)

    return values_and_grads


_LOCK = threading.RLock()


@contextlib.contextmanager
def _refuse_batch_statistics() -> Iterator[None]:
    """Look at every flax module that is called. A loss that is jitted already was traced before, and is not seen."""
    with contextlib.ExitStack() as stack:
        linen, nnx = (sys.modules.get(f"flax.{name}") for name in ("linen", "nnx"))
        if linen is not None:

            def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
                if isinstance(context.module, linen.BatchNorm) and context.method_name == "__call__":
                    _check(context.module.use_running_average, kwargs, args[1:])
                return method(*args, **kwargs)

            stack.enter_context(linen.intercept_methods(intercept))
        if nnx is not None:  # which has no interceptors
            method, caller = nnx.BatchNorm.__call__, threading.get_ident()

            def call(module: Any, *args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() == caller:  # the class is that of all threads
                    _check(module.use_running_average, kwargs, args[1:])
                return method(module, *args, **kwargs)

            stack.enter_context(_LOCK)
            stack.enter_context(mock.patch.object(nnx.BatchNorm, "__call__", call))
        yield


def _check(of_module: bool | None, kwargs: dict[str, Any], args: tuple[Any, ...]) -> None:
    at_call = kwargs.get("use_running_average", args[0] if args else None)
    if not (of_module if at_call is None else at_call):
        raise _examples.batch_statistics("BatchNorm with use_running_average=False")


def per_example_norms(grads: Params) -> Array:
    r"""The Euclidean norm of every example's gradient over the whole tree.

    .. math::
        n_i = \sqrt{\textstyle\sum_{\text{leaves}} \sum_j g_{ij}^2}

    No square over- or underflows; half precision is computed in float32.

    Args:
        grads: a tree with leaves `[B, ...]`, such as `per_example` returns.

    Returns:
        `[B]`, float32 or wider.

    Raises:
        ValueError: leaves of different lengths, or no array.
    """
    _examples.count_examples(_wing, "per_example_norms", grads)
    leaves = [_wing.upcast(g) for g in _wing.flatten(grads).leaves]
    norms = [jnp.squeeze(norm(jnp.reshape(g, (g.shape[0], -1)), [-1]), -1) for g in leaves]
    widest = jnp.result_type(*(n.dtype for n in norms))
    return jnp.squeeze(norm(jnp.stack([n.astype(widest) for n in norms], -1), [-1]), -1)


def clip_per_example(
    grads: Params, max_norm: Strength, reduction: str = "mean", weights: Array | None = None
) -> tuple[Params, Array]:
    r"""Aggregate the gradients of single examples, each clipped to a norm over the whole tree.

    .. math::
        g = \frac1B \sum_i \omega_i \min\Bigl(1, \frac{C}{n_i}\Bigr) g_i, \qquad
        n_i = \|g_i\|_2 \text{ over all leaves}

    and without the `1/B` for `reduction="sum"`. The bound is exact: no constant is added to the norm. A penalty comes
    after this: add `penalty.grad(params)` to the result, or hand it to a proximal transformation.

    Args:
        grads: a tree with leaves `[B, ...]`, such as `per_example` returns.
        max_norm: `C >= 0`, a number or a 0-d array.
        reduction: `"mean"` divides by `B` (not by the sum of the weights), `"sum"` does not.
        weights: `\omega`, `[B]`; None: all 1.

    Returns:
        `(g, norms)`: a tree without the examples' axis, in the dtypes of `grads`; and `[B]`, the norms before clipping.

    Raises:
        ValueError: a negative `max_norm`, an unknown reduction, or leaves and weights of different lengths.
    """
    count = _examples.check_clip(_wing, "clip_per_example", grads, weights, reduction)
    check_hyper(_wing, "clip_per_example", "max_norm", max_norm, allow_inf=True)
    norms = per_example_norms(grads)
    bound = _wing.cast(max_norm, norms)
    over = ~(norms <= bound)  # NaN is over: it stays NaN
    scale = jnp.where(over, bound / jnp.where(over, norms, 1), 1)
    scale = scale if weights is None else scale * _wing.cast(weights, scale)
    scale = scale / count if reduction == "mean" else scale

    def aggregate(g: Array) -> Array:
        wide = _wing.upcast(g)
        return _wing.downcast(jnp.einsum("b,b...->...", scale.astype(wide.dtype), wide), g)

    flat = _wing.flatten(grads)
    return flat.rebuild([aggregate(g) for g in flat.leaves]), norms

"""Gradients of single examples: their values, norms, and clipping."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from .. import _examples
from .._training import check_hyper, check_scalar, check_trainable
from . import _wing
from ._kinks import norm
from ._wing import Params, Strength


def per_example(
    loss: Callable[..., Any], chunk_size: int | None = None, batch_axes: Any = 0
) -> Callable[..., tuple[Tensor, Params]]:
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

    def values_and_grads(params: Params, *batch: Any) -> tuple[Tensor, Params]:
        check_trainable(_wing, "per_example", params, "let the loss have it by itself, or as a shared batch argument")
        params = _wing.detached(params)
        axes, _ = _examples.example_axes(_wing, batch_axes, batch)

        def one(params: Params, *example: Any) -> Tensor:
            pairs = zip(example, axes, strict=True)
            rows = [x if a is None else pytree.tree_map(lambda x, a=a: x.unsqueeze(a), x) for x, a in pairs]
            value = _examples.naming_rows(loss, params, rows)
            check_scalar("per_example", value, "take a mean over the batch, which holds one example")
            return value

        vmapped = torch.func.vmap(torch.func.grad_and_value(one), in_dims=(None, *axes), chunk_size=chunk_size)
        with _refuse_batch_statistics():
            grads, values = vmapped(params, *batch)
        return values, grads

    return values_and_grads


@contextlib.contextmanager
def _refuse_batch_statistics() -> Iterator[None]:
    def check(module: torch.nn.Module, args: Any) -> None:
        del args
        if threading.get_ident() != caller:  # the hook is that of all threads
            return
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            what = "in training mode" if module.training else "without running statistics"
            raise _examples.batch_statistics(f"{type(module).__name__} {what}")

    if torch.compiler.is_compiling():
        yield
        return
    caller = threading.get_ident()
    hook = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def per_example_norms(grads: Params) -> Tensor:
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
    widest = functools.reduce(torch.promote_types, [g.dtype for g in leaves])
    return norm(torch.stack([norm(g.reshape(g.shape[0], -1)).to(widest) for g in leaves], -1))


def clip_per_example(
    grads: Params, max_norm: Strength, reduction: str = "mean", weights: Tensor | None = None
) -> tuple[Params, Tensor]:
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
    within = norms <= _wing.cast(max_norm, norms)
    factor = torch.where(within, torch.ones_like(norms), _wing.cast(max_norm, norms) / torch.where(within, 1, norms))
    if weights is not None:
        factor = factor * torch.as_tensor(weights).to(factor)
    if reduction == "mean":
        factor = factor / count
    flat = _wing.flatten(grads)
    new = [_wing.downcast(torch.tensordot(factor.to(_wing.upcast(g)), _wing.upcast(g), 1), g) for g in flat.leaves]
    return flat.rebuild(new), norms

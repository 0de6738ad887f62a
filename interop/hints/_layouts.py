"""Layouts that cross without an error: square kernels, mirrored ones, and images flattened in another order."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._calls import Call, Option, Rule

_CONVOLUTIONS = tuple(f"conv{transpose}{n}d" for n in (1, 2, 3) for transpose in ("", "_transpose"))


def _square(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim >= 2 and x.shape[-1] == x.shape[-2] > 1


def _transposed(call: Call) -> Iterator[Option]:
    names = {"linear": ("input", "weight"), "addmm": ("input", "mat1", "mat2")}.get(call.name, ("input", "other"))
    for position in {"linear": (1,), "addmm": (1, 2)}.get(call.name, (0, 1)):
        x = call.get(names[position], position)
        if _square(x):
            run = functools.partial(call.replaced, names[position], position, x.mT)
            what = "left factor" if position == 0 else "kernel"
            now = f"applies a {x.shape[-2]}x{x.shape[-1]} {what} in {call.name}"
            yield Option((call.name, position), now, "its transpose", run)


def _transposed_in_einsum(call: Call) -> Iterator[Option]:
    for position, x in enumerate(call.args):
        if _square(x):
            run = functools.partial(call.replaced, "", position, x.mT)
            now = f"applies a {x.shape[-2]}x{x.shape[-1]} operand {position} in einsum({call.args[0]!r})"
            yield Option((call.args[0], position), now, "its last two axes exchanged", run)


def _transposed_in_attention(call: Call) -> Iterator[Option]:
    packed = call.get("in_proj_weight", 5)
    out = call.get("out_proj_weight", 11)
    if packed is not None:
        size = packed.shape[1]
        new = packed.reshape(-1, size, size).mT.reshape(packed.shape)
        run = functools.partial(call.replaced, "in_proj_weight", 5, new)
        yield Option("in", "applies in_proj_weight in multi_head_attention", "the transpose of each of its blocks", run)
    run = functools.partial(call.replaced, "out_proj_weight", 11, out.mT)
    yield Option("out", "applies out_proj.weight in multi_head_attention", "its transpose", run)


def _kernels_of_convolutions(call: Call) -> Iterator[Option]:
    weight = call.get("weight", 1)
    if weight.ndim >= 4 and weight.shape[-1] == weight.shape[-2] > 1:
        run = functools.partial(call.replaced, "weight", 1, weight.mT)
        yield Option("space", f"applies a kernel in {call.name}", "its height and width exchanged", run)
    if weight.shape[0] == weight.shape[1] > 1:
        run = functools.partial(call.replaced, "weight", 1, weight.transpose(0, 1))
        yield Option("channels", f"applies a kernel in {call.name}", "its input and output channels exchanged", run)


def _flipped(call: Call) -> Iterator[Option]:
    weight = call.get("weight", 1)
    axes = tuple(range(2, weight.ndim))
    if max(weight.shape[2:], default=1) > 1:
        run = functools.partial(call.replaced, "weight", 1, weight.flip(axes))
        now = f"applies a kernel in {call.name} as it lies"
        yield Option("flip", now, "one that is mirrored along its spatial axes", run)


def _flattened(call: Call) -> Iterator[Option]:
    """A reshape that merges all axes behind the first k: channels could come last among them, or first."""
    x = call.args[0]
    out = call()
    k = out.ndim - 1
    if x.ndim < k + 2 or x.shape[:k] != out.shape[:k] or min(x.shape[k:]) < 2:
        return
    shape = "x".join(map(str, x.shape[k:]))
    now = f"flattens axes of {shape} in this order in {call.name}"
    for key, order, then in (
        ("last", (k, -1), "the first of them moved to the end"),
        ("first", (-1, k), "the last of them moved to the front"),
    ):
        if key == "last" or x.ndim > k + 2:  # of two axes both are the exchange
            yield Option((key, k), now, then, functools.partial(_merge, x.movedim(*order), out.shape))


def _merge(x: Tensor, shape: Any) -> Tensor:
    return x.reshape(shape)


def _split(call: Call) -> Iterator[Option]:
    """The way back: a last axis that is split into channels and space, or into heads."""
    x = call.args[0]
    out = call()
    k = x.ndim - 1
    if out.ndim < k + 2 or x.shape[:k] != out.shape[:k] or min(out.shape[k:]) < 2:
        return
    axes = list(out.shape[k:])
    now = f"splits an axis into {'x'.join(map(str, axes))} in {call.name}"
    for key, order in (("last", (-1, k)), ("first", (k, -1))):
        if key == "last" or len(axes) > 2:
            stored = (*axes[1:], axes[0]) if key == "last" else (axes[-1], *axes[:-1])
            run = functools.partial(_split_from, x, (*out.shape[:k], *stored), order)
            yield Option(("split", key, k), now, f"{'x'.join(map(str, stored))}, its axes then put in that order", run)


def _split_from(x: Tensor, shape: tuple[int, ...], order: tuple[int, int]) -> Tensor:
    return x.reshape(shape).movedim(*order)


_RESHAPES = ("flatten", "reshape", "view", "unflatten")

RULES = (
    Rule("transposed_kernel", ("linear", "matmul", "mm", "mv", "bmm", "addmm"), _transposed),
    Rule("transposed_kernel", ("einsum",), _transposed_in_einsum),
    Rule("transposed_kernel", ("multi_head_attention_forward",), _transposed_in_attention),
    Rule("transposed_kernel", _CONVOLUTIONS, _kernels_of_convolutions),
    Rule("flipped_kernel", _CONVOLUTIONS, _flipped),
    Rule("flatten_order", _RESHAPES, _flattened),
    Rule("flatten_order", _RESHAPES, _split),
)

"""How the arrays of a PyTorch layer lie in its flax twin: the moves and alternatives of which rules are made."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .links import AS_IS, Link, Move, axes, link

Shapes = Mapping[str, tuple[int, ...]]


class NoRule(ValueError):
    """A PyTorch layer of a class whose flax twin nobody has declared."""


class Mismatch(ValueError):
    """A PyTorch layer and a flax layer that are not twins: their arrays do not fit, or one lacks what the other has."""


@dataclass(frozen=True)
class Layout:
    """One way in which flax may hold the arrays of a layer.

    Attributes:
        links: one for each array of the PyTorch layer, or group of arrays that are mixed.
        options: attributes that flax's layer has if it is laid out like this (`transpose_kernel`), where the shapes of
            its arrays do not tell.
        says: in words what distinguishes it from another one of the same shapes.
        channels_last: whether it is that of a layer of images; None if that makes no difference.
    """

    links: tuple[Link, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    channels_last: bool | None = None


# What a rule says of a layer: (module, shapes of the flax layer or None) -> the ways to hold its arrays, best first.
Layouts = Callable[[Any, Shapes | None], list[Layout]]


def leaves(
    names: Mapping[str, str | tuple[str, Move]], says: str = "", options: Mapping[str, Any] | None = None
) -> Layouts:
    """Array for array: `{"weight": ("kernel", axes(1, 0)), "bias": "bias"}`; what the module lacks is left out."""

    moves = {torch: (jax, AS_IS) if isinstance(jax, str) else jax for torch, jax in names.items()}

    def layouts(module: Any, shapes: Shapes | None) -> list[Layout]:
        del shapes
        there = [torch for torch in moves if getattr(module, torch, None) is not None]
        return [Layout(tuple(link(torch, *moves[torch]) for torch in there), options or {}, says)]

    return layouts


def either(*choices: Layouts) -> Layouts:
    """One of several layouts, the first where nothing decides."""
    return lambda module, shapes: [layout for choice in choices for layout in choice(module, shapes)]


def flipped(*order: int) -> Move:
    """Axes permuted, then all but the last two reversed: a transposed convolution written as a convolution."""
    forth, back = axes(*order)

    def flip(x: np.ndarray) -> np.ndarray:
        return np.flip(x, tuple(range(x.ndim - 2)))

    return Move(lambda x: (flip(forth(x)[0]),), lambda x: back(flip(x)))


def reshaped(torch: tuple[int, ...], jax: tuple[int, ...]) -> Move:
    """The same entries in the same order, in another shape."""
    return Move(lambda x: (x.reshape(jax),), lambda x: (x.reshape(torch),))


def split_gates(n: int) -> Move:
    """A weight (n * out, in) as n kernels (in, out), a bias (n * out,) as n biases: one for each gate."""
    return Move(
        lambda x: tuple(np.split(x.T, n, axis=-1)),
        lambda *parts: (np.concatenate(parts, axis=-1).T,),
    )


def split_heads(heads: int, n: int) -> Move:
    """A weight (n * heads * size, in) as n kernels (in, heads, size), a bias as n biases (heads, size)."""
    return Move(
        lambda x: tuple(part.T.reshape(*part.shape[1:], heads, -1) for part in np.split(x, n)),
        lambda *parts: (np.concatenate([part.reshape(*part.shape[:-2], -1).T for part in parts]),),
    )


def merge_heads(heads: int) -> Move:
    """A weight (out, heads * size) as a kernel (heads, size, out)."""
    return Move(
        lambda x: (x.T.reshape(heads, -1, len(x)),),
        lambda x: (x.reshape(-1, x.shape[-1]).T,),
    )


def linear(module: Any, shapes: Shapes | None) -> list[Layout]:
    """A Dense's kernel (in, out); or a DenseGeneral's, in which the features of either side are several axes."""
    note = ""
    names: dict[str, Any] = {"weight": ("kernel", axes(1, 0)), "bias": "bias"}
    kernel = (shapes or {}).get("kernel", ())
    if len(kernel) > 2:
        ours = module.in_features, module.out_features
        bias = (shapes or {}).get("bias")
        for n in range(1, len(kernel)):  # axes of the input
            if ours == (math.prod(kernel[:n]), math.prod(kernel[n:])) and bias in (None, kernel[n:]):
                names["weight"] = "kernel", _then(axes(1, 0), reshaped(ours, kernel))
                names["bias"] = "bias", reshaped(ours[1:], kernel[n:])
                if n > 1:
                    note = f"PyTorch's {ours[0]} input features taken to be in the order of flax's axes {kernel[:n]}"
                break
    (layout,) = leaves(names)(module, None)
    return [Layout(tuple(replace(one, note=note if "weight" in one.torch else "") for one in layout.links))]


def normalized(names: Mapping[str, str]) -> Layouts:
    """The affine map of a norm over several axes, which are in PyTorch's order, or channels last as flax has images."""

    def layouts(module: Any, shapes: Shapes | None) -> list[Layout]:
        n = len(module.normalized_shape)
        last = {torch: (jax, axes(*range(1, n), 0)) for torch, jax in names.items()}
        (as_is,) = leaves(names, "the axes in PyTorch's order")(module, shapes)
        if n == 1:
            return [as_is]
        (moved,) = leaves(last, "the first axis as the last (channels last)")(module, shapes)
        return [replace(as_is, channels_last=False), replace(moved, channels_last=True)]

    return layouts


def slope(module: Any, shapes: Shapes | None) -> list[Layout]:
    """PReLU's: flax's own layer has one scalar, a layer of one's own may have one for each channel."""
    per_channel = leaves({"weight": "negative_slope"})
    if module.num_parameters > 1:
        return per_channel(module, shapes)
    return either(leaves({"weight": ("negative_slope", reshaped((1,), ()))}), per_channel)(module, shapes)


def attention(module: Any, shapes: Shapes | None) -> list[Layout]:
    """Packed or separate projections as (in, heads, size), the projection of the output as (heads, size, out)."""
    del shapes
    heads, parts = module.num_heads, ("query", "key", "value")
    kernels = tuple(f"{part}.kernel" for part in parts)
    if module.in_proj_weight is not None:
        links = [Link(("in_proj_weight",), kernels, *split_heads(heads, 3))]
    else:
        ours = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        links = [link(torch, jax, split_heads(heads, 1)) for torch, jax in zip(ours, kernels, strict=True)]
    if module.in_proj_bias is not None:
        links += [Link(("in_proj_bias",), tuple(f"{part}.bias" for part in parts), *split_heads(heads, 3))]
    links += [link("out_proj.weight", "out.kernel", merge_heads(heads))]
    if module.out_proj.bias is not None:
        links += [link("out_proj.bias", "out.bias")]
    return [Layout(tuple(links))]


def _then(first: Move, second: Move) -> Move:
    return Move(lambda x: second.to_jax(*first.to_jax(x)), lambda x: first.to_torch(*second.to_torch(x)))


def fixed(links: Callable[[Any], Iterable[Link]]) -> Layouts:
    """A rule of the user's: links, whatever the flax layer looks like."""
    return lambda module, shapes: [Layout(tuple(links(module)))]

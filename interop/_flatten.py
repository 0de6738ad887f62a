"""A flatten between convolutions and dense layers: PyTorch flattens (C, H, W), flax (H, W, C).

The rows of the dense kernel count in another order: PyTorch's row `c * HW + hw` is flax's row `hw * C + c`. Only the
number of channels `C` is needed. No array shows the flatten; the order of definition does, and what it leaves open is
refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from funcreg._selectors import matches

from ._layers import Torch
from .links import Arrays, Link

_CONVOLUTIONS = {
    nn.Conv1d: 1, nn.ConvTranspose1d: 1, nn.Conv2d: 2, nn.ConvTranspose2d: 2, nn.Conv3d: 3, nn.ConvTranspose3d: 3
}  # fmt: skip
_FLAT = (nn.Linear, nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm)


_CHANNEL_NORMS = {nn.BatchNorm2d: "num_features", nn.BatchNorm3d: "num_features", nn.GroupNorm: "num_channels"}


class _Channels(NamedTuple):
    name: str
    count: int
    axes: int


class Unclear(ValueError):
    """Why a flatten is not known; the name of the layer in front."""


def channels(layers: Sequence[Torch], given: Mapping[str, int | None]) -> dict[str, int]:
    """For each layer behind a flatten the number of channels in front of it.

    Args:
        layers: in the order of definition.
        given: glob -> channels, or None for no permutation.

    Raises:
        ValueError: a flatten that the order of definition leaves open, or an option that fits no layer.
    """
    found: dict[str, int] = {}
    problems: list[str] = []
    used: set[str] = set()
    convs: list[_Channels] = []  # since the last dense layer, without those that a later one has read
    flattened: dict[int, int] = {}  # size -> channels: a second head may read it again
    last_out: int | None = None
    last = max((n for n, x in enumerate(layers) if type(x.module) in _CONVOLUTIONS), default=-1)
    for n, layer in enumerate(layers):
        module: Any = layer.module
        if type(module) in _CONVOLUTIONS:
            new = _Channels(layer.name, module.out_channels, _CONVOLUTIONS[type(module)])
            convs = [c for c in convs if c.count != module.in_channels] + [new]
            flattened = {}
            continue
        if type(module) in _CHANNEL_NORMS and convs:
            count = getattr(module, _CHANNEL_NORMS[type(module)])
            if all(c.count != count for c in convs):  # of several that were concatenated
                convs = [_Channels(layer.name, count, convs[-1].axes)]
            continue
        size = _features(module)
        if size is None:
            continue
        keys = [glob for glob in given if matches(glob, layer.name)]
        used.update(keys)
        if keys:
            count = given[keys[0]]
            if count is not None and (type(module) not in _FLAT or count < 1 or size % count):
                problems.append(f"flatten: {layer.name} has {size} features, which are no multiple of {count} channels")
            elif count is not None:
                found[layer.name] = flattened[size] = count
        elif convs or size in flattened:
            try:
                count = _count(layer, size, convs, flattened, last_out, closed=n > last)
            except Unclear as error:
                problems.append(str(error))
            else:
                if count is not None:
                    found[layer.name] = flattened[size] = count
        if isinstance(module, nn.Linear) or not isinstance(module, _FLAT):
            convs = []
            last_out = getattr(module, "out_features", None)
    unknown = [glob for glob in given if glob not in used]
    if unknown:
        problems.append(f"flatten: {unknown[0]!r} is no layer whose input could have been flattened")
    if problems:
        raise ValueError("match: " + "\n  ".join(problems))
    return found


def _features(module: Any) -> int | None:
    """The length of the last axis of what a layer reads, if it could have been flattened."""
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    for name in ("in_features", "input_size", "embed_dim"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return module.num_features if type(module) is nn.BatchNorm1d else None


def _count(
    layer: Torch,
    size: int,
    convs: Sequence[_Channels],
    flattened: Mapping[int, int],
    last_out: int | None,
    closed: bool,
) -> int | None:
    """The channels in front of a layer, or None if it reads them as they are, or reads a dense layer."""
    name = layer.name
    if not convs:
        if size == last_out:
            if flattened:
                raise Unclear(
                    f"{name} reads {size} features: those of the dense layer before it, or those that were flattened "
                    f"before; {_remedy(name, flattened[size])}"
                )
            return None
        return flattened[size]
    last, count, axes = convs[-1]
    if {conv.count for conv in convs} == {size}:
        return None
    if len(convs) > 1:
        several = " and ".join(f"{conv.name} ({conv.count})" for conv in convs)
        raise Unclear(f"{name} reads {size} features of one of several convolutions, {several}; {_remedy(name, count)}")
    if size % count:
        raise Unclear(
            f"{name} reads {size} features, no multiple of the {count} channels of {last}, the last convolution before "
            f"it; {_remedy(name, None)}"
        )
    if not closed:
        raise Unclear(
            f"{name} reads {size} features, perhaps the {count} channels of {last} flattened, but convolutions follow "
            f"it; {_remedy(name, count)}"
        )
    if type(layer.module) not in _FLAT:
        raise Unclear(
            f"{name} reads {size} features, perhaps the {count} channels of {last} flattened; a "
            f"{type(layer.module).__name__} cannot be permuted; {_remedy(name, None)}"
        )
    root = round((size // count) ** (1 / axes))
    if root**axes != size // count:
        raise Unclear(
            f"{name} reads {size} features, perhaps the {count} channels of {last} at {size // count} places, which "
            f"are no {'square' if axes == 2 else 'cube'}; {_remedy(name, count)}"
        )
    return count


def _remedy(name: str, count: int | None) -> str:
    says = f"flatten={{{name!r}: {count}}} says that {count} channels were flattened, " if count else ""
    return f"{says}flatten={{{name!r}: None}} that its rows stay as they are"


def permuted(link: Link, channels: int) -> Link:
    """The link of a layer behind a flatten: the first axis of its flax arrays counts places, then channels."""

    def to_jax(*arrays: np.ndarray) -> Arrays:
        return tuple(_swapped(x, (channels, -1)) for x in link.to_jax(*arrays))

    def to_torch(*arrays: np.ndarray) -> Arrays:
        return link.to_torch(*(_swapped(x, (-1, channels)) for x in arrays))

    return replace(link, to_jax=to_jax, to_torch=to_torch)


def _swapped(x: np.ndarray, counts: tuple[int, int]) -> np.ndarray:
    return x.reshape(*counts, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

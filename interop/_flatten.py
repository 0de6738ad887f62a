"""A flatten between convolutions and dense layers: PyTorch flattens (C, H, W), flax (H, W, C).

The rows of the dense kernel count in another order: PyTorch's row `c * HW + hw` is flax's row `hw * C + c`. Only the
number of channels `C` is needed. No array shows the flatten: the order of definition does, and what it leaves open is
refused. So is the way back, from a dense layer to the image that a convolution reads, unless it is given.

NOTE [gates]: a dense layer between the last convolution and the flatten may read the pooled image and scale its
channels (squeeze-excite). So an image stays there to be flattened until a layer has read it so. A layer behind a dense
one is beside that flatten only if its features are not those of other layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from funcreg._selectors import matches

from ._layers import Torch
from .links import Arrays, Link

Given = int | None | tuple[int | None, int | None] | list[tuple[int | None, int]]

_CONVOLUTIONS = {
    (nn.Conv1d, nn.ConvTranspose1d): 1,
    (nn.Conv2d, nn.ConvTranspose2d): 2,
    (nn.Conv3d, nn.ConvTranspose3d): 3,
}
_NORMS = (nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm)  # of what may have been flattened
_CHANNEL_NORMS = {nn.BatchNorm2d: "num_features", nn.BatchNorm3d: "num_features", nn.GroupNorm: "num_channels"}


class Channels(NamedTuple):
    """How many channels a layer's rows count first in PyTorch, and how many its columns; None: none.

    `pieces`: instead of `rows`, the channels and the size of each piece of rows that are concatenated.
    """

    rows: int | None
    columns: int | None = None
    pieces: tuple[tuple[int | None, int], ...] = ()


class _Images(NamedTuple):
    """The output of a convolution that no later one has read, and that was not flattened yet.

    `behind`: whether a dense layer came after it, see NOTE [gates].
    """

    name: str
    channels: int
    axes: int
    behind: bool = False


class _Unclear(ValueError):
    """What the order of definition leaves open, and how to say it."""


def channels(layers: Sequence[Torch], given: Mapping[str, Given]) -> dict[str, Channels]:
    """For each layer beside a flatten the channels of the image.

    Args:
        layers: with a rule, in the order of definition.
        given: the option `flatten` of `match`.

    Raises:
        TypeError: an option of another form.
        ValueError: a flatten that the order of definition leaves open, or an option that fits no layer.
    """
    options = {glob: _checked_option(glob, value) for glob, value in given.items()}
    used: set[str] = set()
    found: dict[str, Channels] = {}
    problems: list[str] = []
    last = max((n for n, x in enumerate(layers) if _axes(x.module)), default=-1)
    modules: list[Any] = [getattr(x.module, "module", x.module) for x in layers]  # of a cell
    seen = _Seen(frozenset(size for module in modules for size in _made(module)))
    for n, (layer, module) in enumerate(zip(layers, modules, strict=True)):
        glob = next((glob for glob in options if matches(glob, layer.name)), None)
        try:
            if _axes(module):
                problems += seen.convolution(layer, module)
            elif type(module) in _CHANNEL_NORMS:
                seen.channel_norm(layer, getattr(module, _CHANNEL_NORMS[type(module)]))
            elif (size := _features(module)) is not None:
                if glob is not None:
                    used |= {glob for glob in options if matches(glob, layer.name)}
                    answer = options[glob]
                    _check_counts(layer, module, size, answer)
                else:
                    answer = Channels(seen.rows(layer, module, size, closed=n > last))
                if answer != Channels(None):
                    found[layer.name] = answer
                seen.dense(layer, module, size, answer.rows, open_ended=glob is None)
        except _Unclear as error:
            problems.append(str(error))
            seen.dense(layer, module, _features(module) or 0, None, open_ended=glob is None)
        seen.earlier += _made(module)
    problems += [
        f"flatten: {glob!r} is no layer that reads or writes something flattened"
        for glob in options
        if glob not in used
    ]
    if problems:
        raise ValueError("match: " + "\n  ".join(problems))
    return found


@dataclass
class _Seen:
    """What came before, while the layers are walked through.

    Attributes:
        made: the features that dense, recurrent and embedding layers of the whole model give.
        earlier: those of the layers before.
        images: outputs of convolutions that may still be flattened.
        tokens: whether a norm or an attention over the channels has shown that they are the last axis.
        flattened: size -> channels of what was flattened since the last convolution: a second head may read it again.
        out: the features of the last dense layer.
        pending: dense layers and norms that may write what a convolution reads as an image, with their features.
    """

    made: frozenset[int]
    earlier: list[int] = field(default_factory=list)
    images: list[_Images] = field(default_factory=list)
    tokens: bool = False
    flattened: dict[int, int] = field(default_factory=dict)
    out: int | None = None
    pending: list[tuple[Torch, int]] = field(default_factory=list)

    def convolution(self, layer: Torch, module: Any) -> list[str]:
        """Notes a convolution; what is to be asked about the dense layers before it."""
        pending, self.pending = self.pending, []
        self.images = [image for image in self.images if image.channels != module.in_channels]
        self.images.append(_Images(layer.name, module.out_channels, _axes(module)))
        self.flattened, self.tokens = {}, False
        count, asked = module.in_channels, []
        for dense, size in pending:
            above = dense.path[:-1]
            near = layer.path[: len(above)] == above or above[: len(layer.path) - 1] == layer.path[:-1]
            places = size // count
            image = size % count == 0 and count > 1 and places > (1 if _axes(module) == 1 else 3)
            if near and image:  # two or three places in a plane are scales and shifts
                norm = isinstance(dense.module, _NORMS)
                says = f"{{{dense.name!r}: {count if norm else (None, count)}}}"
                asked.append(
                    f"{dense.name} gives {size} features, perhaps an image of the {count} channels that {layer.name} "
                    f"reads; flatten={says} says so, flatten={{{dense.name!r}: None}} that they stay as they are"
                )
        return asked

    def channel_norm(self, layer: Torch, count: int) -> None:
        if self.images and all(image.channels != count for image in self.images):  # of several, concatenated
            self.images = [_Images(layer.name, count, self.images[-1].axes)]

    def dense(self, layer: Torch, module: Any, size: int, rows: int | None, open_ended: bool) -> None:
        if rows is not None:
            self.flattened[size] = rows
            self.images = []
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)):
            self.tokens |= any(image.channels == size for image in self.images)
        if isinstance(module, _NORMS):
            if open_ended and self.pending and self.pending[-1][1] == size:
                self.pending.append((layer, size))
            return
        self.images = [image._replace(behind=True) for image in self.images]
        self.out = getattr(module, "out_features", None)
        self.pending = [(layer, self.out)] if open_ended and isinstance(module, nn.Linear) and self.out else []

    def made_elsewhere(self, size: int) -> bool:
        """Whether features are what other layers give: as they are, in equal parts, or two or three concatenated."""
        parts = any(made % size == 0 and made // size in (2, 3, 4, 6) for made in self.earlier)
        known = sorted([*self.earlier, *(image.channels for image in self.images)])
        some = {n: min(known.count(n), 3) for n in known}  # three of one size are enough for a sum of three
        known = [n for n, times in some.items() for _ in range(times)]
        return size in self.made or parts or any(size in map(sum, combinations(known, n)) for n in (2, 3))

    def rows(self, layer: Torch, module: Any, size: int, closed: bool) -> int | None:
        """The channels of what a layer reads, or None if it is not flattened.

        Args:
            layer: the layer.
            module: it, or the module that it is a cell of.
            size: the features that it reads.
            closed: whether no convolution follows in the whole model.
        """
        name = layer.name
        fresh = [image for image in self.images if not image.behind]
        if not fresh and size in self.flattened:
            if size == self.out:
                raise _Unclear(
                    f"{name} reads {size} features: those of the dense layer before it, or those that were flattened "
                    f"before; {_remedy(name, self.flattened[size])}"
                )
            return self.flattened[size]
        images = fresh or self._behind(size)
        if not images or {image.channels for image in images} in ({size}, {1}):  # pooled, or of one channel
            return None
        last, count, axes, behind = images[-1]
        perhaps = f"{name} reads {size} features, perhaps the {count} channels of {last} flattened"
        if len(images) > 1:
            several = " and ".join(f"{image.name} ({image.channels})" for image in images)
            raise _Unclear(
                f"{name} reads {size} features of one of several convolutions, {several}; {_remedy(name, count)}"
            )
        if size % count:
            raise _Unclear(
                f"{name} reads {size} features, no multiple of the {count} channels of {last}, the last convolution "
                f"before it; {_remedy(name, None, self._pieces(size, images[-1]))}"
            )
        if not closed:
            raise _Unclear(f"{perhaps}, but convolutions follow it; {_remedy(name, count)}")
        if not isinstance(module, (nn.Linear, *_NORMS)):
            kind = type(module).__name__
            raise _Unclear(f"{perhaps}, which has no twin for a {kind}; {_remedy(name, None)}")
        if not _is_image(size, images[-1]):
            what = "square" if axes == 2 else "cube"
            raise _Unclear(f"{perhaps}, but {size // count} places are no {what}; {_remedy(name, count)}")
        if behind and (self.tokens or self.made_elsewhere(size) or not self._gates(count)):
            raise _Unclear(f"{perhaps}, but a dense layer lies between them; {_remedy(name, count)}")
        return count

    @staticmethod
    def _pieces(size: int, image: _Images) -> list[tuple[int | None, int]]:
        """The largest square or cubic image that fits, and the rest behind it, as an example."""
        side = max(n for n in range(size + 1) if image.channels * n**image.axes <= size)
        flattened = image.channels * side**image.axes
        return [(image.channels, flattened), (None, size - flattened)] if side > 1 else []

    def _behind(self, size: int) -> list[_Images]:
        """The images that a layer behind a dense one may read flattened."""
        if size == self.out or any(image.channels == size for image in self.images):
            return []
        images = [
            image
            for image in self.images
            if image.channels > 1 and (size % image.channels == 0 or size >= image.channels * 2**image.axes)
        ]
        gated = any(self._gates(image.channels) and _is_image(size, image) for image in images)
        return [] if self.made_elsewhere(size) and (self.tokens or not gated) else images

    def _gates(self, count: int) -> bool:
        """Whether the last dense layer gives a scale, or a scale and a shift, for each channel."""
        return self.out in (count, 2 * count)


def _made(module: Any) -> list[int]:
    """The features that a layer without images may give."""
    names = () if _axes(module) else ("out_features", "hidden_size", "embed_dim", "embedding_dim")
    sizes = [size for name in names if isinstance(size := getattr(module, name, None), int)]
    return sizes + [2 * size for size in sizes if getattr(module, "bidirectional", False)]


def _is_image(size: int, image: _Images) -> bool:
    """Whether features are those of a square or a cube of more than one place."""
    places, rest = divmod(size, image.channels)
    return rest == 0 and places > 1 and round(places ** (1 / image.axes)) ** image.axes == places


def _axes(module: Any) -> int:
    """The spatial axes of a convolution; 0 for everything else."""
    return next((n for kinds, n in _CONVOLUTIONS.items() if isinstance(module, kinds)), 0)


def _features(module: Any) -> int | None:
    """The length of the last axis of what a layer reads, if it could have been flattened."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    for name in ("in_features", "input_size", "embed_dim"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return module.num_features if isinstance(module, nn.BatchNorm1d) else None


def _remedy(name: str, count: int | None, pieces: Sequence[Any] = ()) -> str:
    says = f"flatten={{{name!r}: {count}}} says that {count} channels were flattened, " if count else ""
    if pieces:
        (channels, first), (_, rest) = pieces
        says = f"flatten={{{name!r}: {pieces}}} says that {channels} channels were flattened into the first {first} "
        says += f"features and the other {rest} were not, "
    none = f"flatten={{{name!r}: None}} {'' if says else 'says '}that its rows stay as they are"
    return f"{says}{none}, which is right only if it reads nothing flattened"


def _checked_option(glob: Any, value: Any) -> Channels:
    if isinstance(value, list) and isinstance(glob, str) and value and all(map(_is_piece, value)):
        return Channels(None, None, tuple(value))
    pair: Any = value if isinstance(value, tuple) else (value, None)
    fine = len(pair) == 2 and all(x is None or (isinstance(x, int) and x > 0 and x is not True) for x in pair)
    if not isinstance(glob, str) or not fine:
        raise TypeError(
            "match: flatten must be a dict of layer names and channels (a positive int; None for none; a tuple for "
            "rows and columns of a dense layer; a list of (channels or None, size) for features that are concatenated)"
            f", got {glob!r}: {value!r}"
        )
    return Channels(*pair)


def _is_piece(piece: Any) -> bool:
    fine = isinstance(piece, tuple) and len(piece) == 2 and piece[1] is not None
    return fine and all(x is None or (type(x) is int and x > 0) for x in piece)


def _check_counts(layer: Torch, module: Any, size: int, answer: Channels) -> None:
    """Refuse channels that a layer's features are no multiple of."""
    sizes = (size, getattr(module, "out_features", 0))
    if answer.pieces and sum(n for _, n in answer.pieces) != size:
        given = " + ".join(str(n) for _, n in answer.pieces)
        raise _Unclear(f"flatten: {layer.name} has {size} features, not {given}")
    for count, features in [*zip(answer[:2], sizes, strict=True), *answer.pieces]:
        if count is not None and (features == 0 or features % count or not isinstance(module, (nn.Linear, *_NORMS))):
            raise _Unclear(f"flatten: {layer.name} has {features} features there, no multiple of {count} channels")


def permuted(link: Link, counts: Channels) -> Link:
    """The link of a layer beside a flatten: its flax arrays count places first, then channels.

    The rows are the first axis of a kernel and the only axis of a norm's arrays, the columns the last axis of a kernel
    and of a bias.
    """

    ends = list(accumulate(n for _, n in counts.pieces))

    def swap(x: np.ndarray, to_jax: bool) -> np.ndarray:
        if ends:
            some = zip(counts.pieces, np.split(x, ends[:-1]), strict=True)
            return np.concatenate([swapped(part, count, 0, to_jax) for (count, _), part in some])
        return swapped(swapped(x, counts.rows, 0, to_jax), counts.columns, x.ndim - 1, to_jax)

    def swapped(x: np.ndarray, count: int | None, axis: int, to_jax: bool) -> np.ndarray:
        if count is None:
            return x
        x = np.moveaxis(x, axis, 0)
        split = (count, -1) if to_jax else (-1, count)
        x = x.reshape(*split, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
        return np.moveaxis(x, 0, axis)

    def to_jax(*arrays: np.ndarray) -> Arrays:
        return tuple(swap(x, True) for x in link.to_jax(*arrays))

    def to_torch(*arrays: np.ndarray) -> Arrays:
        return link.to_torch(*(swap(x, False) for x in arrays))

    return replace(link, to_jax=to_jax, to_torch=to_torch)

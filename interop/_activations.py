"""What a layer reads and writes, carried from PyTorch's layout into flax's.

The class of a layer says which axes hold its features (`Slot`), and the pair in which order. The other axes are the
same on both sides unless their lengths speak against it. Where several layouts have the shape that is seen, values
decide, and the layout is `guessed` if it is not the first of them: a fault that swaps these axes would look the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from torch import nn

from ._flow import CONVOLUTIONS
from ._measure import compare
from .links import Link
from .pair import Pair

Shape = tuple[int, ...]
Array = np.ndarray

# Among layouts of one shape another than the first is taken if it leaves so small a part of the first one's difference.
_BY_FAR = 1e-6
_FREE_AXES = 5  # up to so many all orders are tried


@dataclass(frozen=True, eq=False)
class Slot:
    """What the class of a layer says of an array that it reads or writes.

    Attributes:
        features: how many axes hold the features: the last ones in flax.
        channels: whether PyTorch has them as its axis of channels, the second of a batch.
        unbatched: the number of axes without a batch, for `channels`.
        swapped: whether PyTorch has time first and flax the batch.
        index: the features in flax's order and shape, as numbers of PyTorch's; None if they are the same.
        free: whether the layer treats all axes that hold no features alike, so that they may be in another order.
    """

    features: int = 0
    channels: bool = False
    unbatched: int = 0
    swapped: bool = False
    index: Array | None = None
    free: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """A way from PyTorch's layout into flax's; it moves entries and nothing else.

    Attributes:
        order: of PyTorch's axes.
        features: how many of them, at the end, are permuted together by `index`.
        index: for each of flax's features the number of PyTorch's.
        shape: flax's.
        guessed: whether another layout has the same shape and comes first.
    """

    order: Shape
    features: int
    index: Array | None
    shape: Shape
    guessed: bool = False

    def __call__(self, x: Array) -> Array:
        x = x.transpose(self.order)
        if self.index is not None:
            x = x.reshape(*x.shape[: x.ndim - self.features], -1)[..., self.index.ravel()]
        return np.ascontiguousarray(x.reshape(self.shape))

    @property
    def moves(self) -> bool:
        """Whether axes change places."""
        return self.order != tuple(range(len(self.order)))


def expected(slot: Slot, ours: Shape) -> Layout:
    """The layout that the class of the layer asks for."""
    order = list(range(len(ours)))
    if slot.channels:
        axis = 0 if len(ours) == slot.unbatched else 1
        order = [*order[:axis], *order[axis + 1 :], axis] if len(ours) > 1 else order
    elif slot.swapped and len(ours) > 2:
        order[:2] = [1, 0]
    sizes = tuple(ours[i] for i in order)
    if slot.index is not None:
        sizes = sizes[: len(sizes) - slot.features] + slot.index.shape
    return Layout(tuple(order), slot.features, slot.index, sizes)


def chosen(slot: Slot, ours: Array, theirs: Array) -> Layout | None:
    """The layout in which an array of PyTorch's is to be compared with one of flax's; None: none has that shape."""
    found = list(_candidates(slot, ours.shape, theirs.shape))
    if len(found) < 2:
        return found[0] if found else None
    differences = [distance(layout(ours), theirs) for layout in found]
    best = int(np.argmin(differences))
    if differences[best] <= _BY_FAR * differences[0] and differences[0] > 0:
        return replace(found[best], guessed=True)
    return found[0]


def distance(a: Array, b: Array) -> float:
    found = compare(a, b)
    return np.inf if found.apart.any() else found.errors.absolute


def _candidates(slot: Slot, ours: Shape, theirs: Shape) -> Iterator[Layout]:
    """Layouts of that shape, the one that the layer asks for first."""
    first = expected(slot, ours)
    if first.shape == theirs:
        yield first
    n = len(ours) - slot.features
    features = first.shape[n:]
    ending = theirs[len(theirs) - len(features) :] == features
    if slot.free and ending and n == len(theirs) - len(features) and 1 < n <= _FREE_AXES:
        for order in _orders(first.order[:n]):
            if tuple(ours[i] for i in order) + features == theirs and (*order, *first.order[n:]) != first.order:
                yield replace(first, order=(*order, *first.order[n:]), shape=theirs)
    elif ending and len(theirs) != len(first.shape) and math.prod(theirs) == math.prod(first.shape):
        yield replace(first, shape=theirs)  # several axes of one side are one of the other
    if first.shape != theirs and ours == theirs:  # as a norm over another axis than the last reads it
        yield Layout(tuple(range(len(ours))), 0, None, theirs)


def _orders(axes: Shape) -> list[Shape]:
    """All orders of some axes: channels last and batch first before the others."""
    likely = [(axes[0], *axes[2:], axes[1]), (axes[1], axes[0], *axes[2:])]
    return [*likely, *(order for order in permutations(axes) if order not in likely)]


# --- what the classes of layers say ---


def slots(pair: Pair, module: nn.Module, name: str, flax: str) -> dict[str, Slot]:
    """Of a layer's arguments and, as "output", of its result; any other name has the slot of "input".

    Args:
        pair: knows in which order features are.
        module: the PyTorch layer.
        name: its name.
        flax: that of its twin.
    """
    m: Any = module
    if isinstance(m, CONVOLUTIONS):
        images = Slot(1, channels=True, unbatched=len(m.kernel_size) + 1)
        return {"input": images, "output": images}
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)):
        index = _index(pair, name, flax, "running_mean", "weight")
        images = Slot(1, channels=True, index=index)
        return {"input": images, "output": images}
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        n = len(m.normalized_shape)
        features = Slot(n, index=_index(pair, name, flax, "weight"), free=True)
        return {"input": features, "output": features}
    if isinstance(m, nn.Linear):
        rows, columns = _dense(pair, m, name, flax)
        return {"input": Slot(1, index=rows, free=True), "output": Slot(1, index=columns, free=True)}
    if isinstance(m, nn.Embedding):
        return {"input": Slot(free=True), "output": Slot(1, free=True)}
    if isinstance(m, (nn.MultiheadAttention, nn.RNNBase)):
        features = Slot(1, swapped=not m.batch_first)
        return {"input": features, "output": features, "mask": Slot()}
    if isinstance(m, nn.RNNCellBase):
        return {"input": Slot(1), "output": Slot(1)}
    return {"input": Slot(free=True), "output": Slot(free=True)}


def _link(pair: Pair, name: str, flax: str) -> Link | None:
    """The link of an array to one leaf of the twin."""
    first = pair.torch.first.get(name)
    for link in pair.links:
        if link.torch == (first,) and len(link.jax) == 1 and f".{link.jax[0]}".find(f".{flax}." if flax else ".") >= 0:
            return link
    return None


def _index(pair: Pair, name: str, flax: str, *arrays: str) -> Array | None:
    """The order of a norm's features, from one of its arrays."""
    for array in arrays:
        whole = f"{name}.{array}" if name else array
        link = _link(pair, whole, flax)
        if link is not None:
            shape = pair.torch.forms[link.torch[0]].shape
            return _unless_in_order(link.to_jax(np.arange(math.prod(shape)).reshape(shape))[0], shape)
    return None


def _dense(pair: Pair, module: nn.Linear, name: str, flax: str) -> tuple[Array | None, Array | None]:
    """The order of a dense layer's rows and columns, from its kernel."""
    link = _link(pair, f"{name}.weight" if name else "weight", flax)
    rows, columns = module.in_features, module.out_features
    if link is None:
        return None, None
    (by_row,) = link.to_jax(np.broadcast_to(np.arange(rows), (columns, rows)))
    (by_column,) = link.to_jax(np.broadcast_to(np.arange(columns)[:, None], (columns, rows)))
    sizes = [math.prod(by_row.shape[:n]) for n in range(by_row.ndim + 1)]
    n = next((n for n in range(1, by_row.ndim) if sizes[n] == rows), None)
    if n is None or by_row.size != rows * columns:
        return None, None
    of_rows = by_row.reshape(*by_row.shape[:n], -1)[..., 0]
    of_columns = by_column.reshape(rows, *by_column.shape[n:])[0]
    return _unless_in_order(of_rows, (rows,)), _unless_in_order(of_columns, (columns,))


def _unless_in_order(index: Array, shape: Shape) -> Array | None:
    return None if index.shape == shape and (index.ravel() == np.arange(index.size)).all() else index

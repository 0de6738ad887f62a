"""Steps that move and merge axes, named as in PyTorch and with its arguments.

What they cannot say, such as what becomes of an image whose axes are mixed, they leave to NOTE [unknown steps].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .values import Array, Flat, Image, NotUnderstood, Number, Piece, Plain, Rest, Several, Sizes, listed


def flat(x: Image) -> Plain | Flat:
    """(n, features) of an image."""
    if x.places == 1:
        return Plain(x.channels, x.writers)
    if not x.sure:
        return Plain(None, x.writers)
    if x.channels is None:
        raise NotUnderstood
    return Flat((Piece(x.channels, x.channels * x.places if x.places else None),))


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if isinstance(x, Plain):
        return Plain(None, x.writers, "flattened" if x.given and start_dim == 1 else "")
    if isinstance(x, Flat) and start_dim in (1, -1):
        return x
    if not isinstance(x, Image):
        raise NotUnderstood
    start, end = x.axis(start_dim), x.axis(end_dim)
    if start == 0 or end != x.axes + 1:
        raise NotUnderstood
    return flat(x) if start == 1 else replace(x, axes=x.axes - (end - start))


def view(x: Any, shape: Sequence[Any], same: bool) -> Any:
    """Another shape; `same`: whether the first axis is known to be the same."""
    if any(isinstance(n, Rest) and n.each is None for n in shape):
        raise NotUnderstood
    shape = [one for n in shape for one in (n.each or () if isinstance(n, Rest) else (n,))]
    given = [n.value if isinstance(n, Number) else n for n in shape]
    known = [n if isinstance(n, int) else None for n in given]
    if len(known) < 2:
        raise NotUnderstood
    count, space = known[1], known[2:]
    places = math.prod(n for n in space if n) if None not in space and -1 not in space else None
    if isinstance(x, Plain):
        return _view_of_plain(x, count, space, places, same)
    if isinstance(x, Image) and not x.sure:
        if space and x.channels is not None and count == x.channels:
            return replace(x, axes=len(space), places=places or x.places)
        return flat(x) if not space else replace(x.changed(), features=known[-1] if known[-1] != -1 else None)
    if not same:
        raise NotUnderstood
    if isinstance(x, Image):
        if not space:
            return flat(x)
        if x.channels is not None and count == x.channels:
            return replace(x, axes=len(space), places=places or x.places)
    if isinstance(x, Flat):
        if not space:
            return x
        if len(x.pieces) == 1 and x.pieces[0].channels == count:
            return Image(count, len(space), places)
    raise NotUnderstood


def _view_of_plain(x: Plain, count: int | None, space: list[int | None], places: int | None, same: bool) -> Any:
    """Perhaps of an image: NOTE [claims]."""
    if not space:
        return Plain(count if count != -1 else None, x.writers, "flattened" if x.given else "")
    whole = x.features if same else None
    if count == -1:
        count = whole // places if whole and places else None
    elif places is None and count and whole and space.count(-1) == 1 and None not in space:
        places = whole // count
    proven = same or (x.features is not None and count is not None and places is not None)
    if not proven and not x.given:
        parts = replace(x, viewed=x.viewed or x.claims(None, None))  # of a batch in which there may be frames
        return Plain(None, x.writers, "", replace(parts, features=None).claims(count, places))
    return Image(count, len(space), places, False, x.claims(count, places))


def transpose(x: Any, dim0: int, dim1: int) -> Any:
    if isinstance(x, Image):
        dims = list(range(x.axes + 2))
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return permute(x, dims)
    if isinstance(x, Plain):
        of_three = {dim0 % 3, dim1 % 3} == {1, 2} and min(dim0, dim1) > -3
        return Image(x.features, 1, None, False) if of_three else x.changed()
    raise NotUnderstood


def permute(x: Any, *dims: Any) -> Any:
    order = listed(dims[0]) if len(dims) == 1 else list(dims)
    if not all(isinstance(n, int) for n in order):
        raise NotUnderstood
    order = [n % len(order) for n in order]
    last = len(order) - 1
    from_last = order[:2] == [0, last]
    if isinstance(x, Plain):
        if len(order) > 2 and from_last:
            return Image(x.features, last - 1, None, last > 2)
        return x.changed()
    if not isinstance(x, Image) or len(order) != x.axes + 2:
        raise NotUnderstood
    if not x.sure and last > 2 and from_last and order[2:] == sorted(order[2:]):
        return Image(None, x.axes)  # an image whose channels are last becomes one of PyTorch's
    space = [n for n in order if n > 1]
    if order[-1] == 1 and (space == sorted(space) or not x.sure):
        return Plain(x.channels, x.writers)
    if order[:2] == [0, 1]:
        return x
    raise NotUnderstood


def movedim(x: Any, source: int, destination: int) -> Any:
    if not isinstance(x, Image) or not isinstance(source, int) or not isinstance(destination, int):
        raise NotUnderstood
    order = [n for n in range(x.axes + 2) if n != x.axis(source)]
    order.insert(x.axis(destination), x.axis(source))
    return permute(x, order)


def unsqueeze(x: Any, dim: int) -> Any:
    if isinstance(x, Plain):
        if dim in (-1, 2):
            return Image(x.features, 1, 1, False, x.claims(x.features, 1))
        return Plain(x.features if dim in (0, 1) else None, x.writers)
    if isinstance(x, Image) and dim % (x.axes + 3) > 1:
        return replace(x, axes=x.axes + 1)
    raise NotUnderstood


def squeeze(x: Any, dim: Any = None) -> Any:
    if isinstance(x, Plain):
        return x.changed()
    if not isinstance(x, Image):
        raise NotUnderstood
    if dim is not None:
        return _without(x, {x.axis(n) for n in listed(dim)})
    if x.places != 1:
        raise NotUnderstood
    return Plain(x.channels, x.writers)


def _without(x: Image, dims: set[int]) -> Any:
    """Without some axes of the space, or without channels."""
    if 0 in dims:
        raise NotUnderstood
    if 1 in dims:
        return Plain()
    axes = x.axes - len(dims)
    return replace(x, axes=axes) if axes else Plain(x.channels, x.writers)


def expand(x: Any, *sizes: Any) -> Any:
    del sizes
    if isinstance(x, Image) and x.places == 1:
        return replace(x, places=None)
    raise NotUnderstood


def repeat(x: Any, *sizes: Any) -> Any:
    if isinstance(x, Image) and len(sizes) == x.axes + 2 and sizes[:2] == (1, 1):
        return replace(x, places=None)
    raise NotUnderstood


def pad(x: Any, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> Any:
    del mode, value
    if isinstance(x, Image) and len(pad) <= 2 * x.axes:
        return replace(x, places=None)
    raise NotUnderstood


def reduce(x: Any, dim: Any, keepdim: bool) -> Any:
    """The mean over some axes, or any of its kind."""
    if dim is None:
        return Number()
    if isinstance(x, Plain):
        return Plain(None, x.writers if keepdim else frozenset())
    if not isinstance(x, Image) or not all(isinstance(n, int) for n in listed(dim)):
        raise NotUnderstood
    dims = {x.axis(n) for n in listed(dim)}
    if not keepdim:
        return _without(x, dims)
    one = x.places == 1 or dims >= set(range(2, x.axes + 2))
    return replace(x, channels=1 if 1 in dims else x.channels, places=1 if one else None)


def split(x: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        return _parted(x, dim, lambda count: sizes if count % sizes == 0 else None)
    if isinstance(x, Plain):
        return Several(x.changed())
    if not isinstance(x, Image) or x.claims or x.axis(dim) != 1 or not all(isinstance(n, int) for n in sizes):
        raise NotUnderstood
    return tuple(replace(x, channels=n) for n in sizes)


def chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return _parted(x, dim, lambda count: count // chunks if count % chunks == 0 else None)


def _parted(x: Any, dim: int, part: Callable[[int], int | None]) -> Any:
    """In equal parts."""
    if isinstance(x, Plain):
        return Several(x.changed())
    if not isinstance(x, Image):
        raise NotUnderstood
    if x.axis(dim) > 1:
        return Several(replace(x, places=None))
    count = part(x.channels) if x.axis(dim) == 1 and x.channels and not x.claims else None
    if count is None:
        raise NotUnderstood
    return Several(replace(x, channels=count))


def getitem(x: Any, index: Any) -> Any:
    if isinstance(x, Several):
        return x.each
    if isinstance(x, tuple):
        return x[index]
    if isinstance(x, Sizes):
        return size(x, index) if isinstance(index, int) else _part_of_sizes(x, index)
    index = index if isinstance(index, tuple) else (index,)
    if isinstance(x, Plain):
        news = len(index) - len([n for n in index if n is not None])
        if news and index == (*(n for n in index if n == slice(None) or n is Ellipsis), *(None,) * news):
            return Image(x.features, news, 1, False, x.claims(x.features, 1))
        return x.changed()
    if not isinstance(x, Image):
        raise NotUnderstood
    return _part(x, _without_ellipsis(index, x.axes + 2))


def _without_ellipsis(index: tuple[Any, ...], axes: int) -> tuple[Any, ...]:
    if Ellipsis not in index:
        return index
    n = index.index(Ellipsis)
    missing = axes - len([one for one in index if one is not None and one is not Ellipsis])
    return (*index[:n], *(slice(None),) * missing, *index[n + 1 :])


def _part(x: Image, index: tuple[Any, ...]) -> Any:
    if not index or not isinstance(index[0], slice):
        raise NotUnderstood
    count, axes = x.channels, x.axes
    if len(index) > 1 and index[1] != slice(None):
        if isinstance(index[1], (int, Number)) and all(isinstance(n, (int, slice, Number)) for n in index[2:]):
            return Plain()  # of one channel only places are left
        some = index[1]
        if x.claims or count is None or not isinstance(some, slice):
            raise NotUnderstood
        if not all(n is None or isinstance(n, int) for n in (some.start, some.stop, some.step)):
            raise NotUnderstood
        count = len(range(count)[some])
    for n in index[2:]:
        if not (n is None or isinstance(n, (int, slice, Number))):
            raise NotUnderstood
        axes += (n is None) - isinstance(n, (int, Number))
    if axes == 0:
        return Plain(count, x.writers)
    return replace(x, channels=count, axes=axes, places=1 if x.places == 1 else None)


def _part_of_sizes(sizes: Sizes, index: Any) -> Any:
    if not isinstance(index, slice) or index.step is not None or not isinstance(index.start or 0, int):
        raise NotUnderstood
    if index.stop is not None:
        return Several(Number()) if (index.start or 0) < 0 or sizes.start else _first_sizes(sizes, index)
    return replace(sizes, start=sizes.start + (index.start or 0))


def _first_sizes(sizes: Sizes, index: slice) -> Any:
    if not isinstance(index.stop, int) or index.stop < 0:
        return Several(Number())
    return tuple(size(sizes, axis) for axis in range(index.start or 0, index.stop))


def rest(sizes: Any) -> Rest:
    """Of `*x.shape[2:]`."""
    if not isinstance(sizes, Sizes):
        raise NotUnderstood
    if not isinstance(sizes.of, Image):
        return Rest()
    axes = sizes.of.axes + 2
    return Rest(each=tuple(size(replace(sizes, start=0), n) for n in range(sizes.start % axes, axes)))


def size(sizes: Sizes, axis: int) -> Number:
    """One of the sizes of an array."""
    x = sizes.of
    axis = axis if axis < 0 else axis + sizes.start
    if axis == 0:
        return Number(None, sizes.first)
    lengths = ((sizes.name, axis),)
    if isinstance(x, Image) and axis == 1:
        return Number(x.channels, lengths)
    if isinstance(x, Plain) and axis == -1:
        return Number(x.features, lengths)
    return Number(x.shape[axis] if isinstance(x, Array) else None, lengths)

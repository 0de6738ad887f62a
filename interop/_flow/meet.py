"""Steps in which several arrays meet, and steps that work on every channel of an image by itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .known import Flow
from .values import Array, Flat, Image, NotUnderstood, Number, Piece, Plain, Several, Sizes, listed


def together(flow: Flow, found: Sequence[Any]) -> Any:
    """Elementwise, of one or several."""
    arrays = [x for x in found if isinstance(x, Array)]
    found = [x.each if isinstance(x, Several) else x for x in found if not isinstance(x, (Number, Sizes, Array))]
    if not found:
        return Plain(None, frozenset(x.name for x in arrays)) if arrays else Number()
    if all(isinstance(x, Image) for x in found):
        return _images(flow, found, arrays)
    plains = [x for x in found if isinstance(x, Plain)]
    if len(plains) == len(found):
        sizes = {x.features for x in plains}
        writers = frozenset().union(*(x.writers for x in plains), {x.name for x in arrays})
        given = plains[0].given if len(plains) == 1 else ""
        viewed = frozenset().union(*(x.viewed for x in plains))
        return Plain(sizes.pop() if len(sizes) == 1 else None, writers, given, viewed)
    flats = {x for x in found if isinstance(x, Flat)}
    if len(flats) != 1 or arrays:
        raise NotUnderstood
    flat = flats.pop()
    if len(plains) + sum(isinstance(x, Flat) for x in found) != len(found):
        raise NotUnderstood
    if plains and (len(flat.pieces) != 1 or not all(x.writers for x in plains)):
        raise NotUnderstood
    channels = [piece.channels for piece in flat.pieces]
    # a dense layer's output is in the order of the flattened image that it is added to
    flow.claims |= {claim for x in plains for claim in x.claims(channels[0], None)}
    return flat


def _images(flow: Flow, images: Sequence[Image], arrays: Sequence[Array]) -> Image:
    sure = any(x.sure for x in images)
    if sure:
        images = [flow.image(x) for x in images]
        flow.over |= {(x.name, max(image.axes for image in images)) for x in arrays}
    counts = {x.channels for x in images if x.channels != 1} or {1}
    if len(counts) > 1:
        raise NotUnderstood
    spread = any(len(x.shape) > 1 for x in arrays)
    same = len({x.places for x in images}) == 1 and not (spread and images[0].places == 1)
    claims = frozenset().union(*(x.claims for x in images))
    return Image(counts.pop(), max(x.axes for x in images), images[0].places if same else None, sure, claims)


def cat(flow: Flow, tensors: Any, dim: Any = 0, axis: Any = None) -> Any:
    dim = dim if axis is None else axis
    parts = [Plain(x.shape[-1], frozenset({x.name})) if isinstance(x, Array) else x for x in listed(tensors)]
    images = [x for x in parts if isinstance(x, Image)]
    if images:  # an input beside an image is one
        beside = Image(None, images[0].axes, None, False)
        images = [x if isinstance(x, Image) else beside for x in parts if isinstance(x, Image) or _is_input(x)]
        if len(images) < len(parts):
            raise NotUnderstood
        return _cat_of_images(flow, images, dim)
    if all(isinstance(x, Plain) for x in parts):
        sizes = [x.features for x in parts if x.features is not None]
        whole = sum(sizes) if dim == -1 and len(sizes) == len(parts) else None
        return Plain(whole, frozenset().union(*(x.writers for x in parts)))
    if dim not in (1, -1) or not all(isinstance(x, (Flat, Plain)) for x in parts):
        raise NotUnderstood
    pieces = [x.pieces if isinstance(x, Flat) else (Piece(None, x.features),) for x in parts]
    return Flat(tuple(piece for some in pieces for piece in some))


def _is_input(x: Any) -> bool:
    return isinstance(x, Plain) and x.given == "whole"


def _cat_of_images(flow: Flow, parts: Sequence[Image], dim: Any) -> Image:
    dim = parts[0].axis(dim)
    sure = any(x.sure for x in parts)
    if sure:
        parts = [flow.image(x) for x in parts]
    counts = [x.channels for x in parts if x.channels]
    if dim == 0 or not counts:
        raise NotUnderstood
    places = parts[0].places if dim == 1 and len({x.places for x in parts}) == 1 else None
    claims = frozenset().union(*(x.claims for x in parts))
    whole = sum(counts) if len(counts) == len(parts) else None
    return Image(whole if dim == 1 else counts[0], parts[0].axes, places, sure, claims)


def pooled(flow: Flow, x: Any, size: Any = None, name: str = "") -> Any:
    """Of other places; `size`: how many along each axis, if it is told; of one place remains one."""
    if not isinstance(x, Image):
        raise NotUnderstood
    x = flow.image(x, name)
    one = x.places == 1 or (size is not None and all(n == 1 for n in listed(size)))
    return replace(x, places=1 if one else None)


def resized(flow: Flow, x: Any, name: str = "") -> Any:
    """Of other places, also where there was one."""
    return replace(pooled(flow, x, None, name), places=None)


def scaled(flow: Flow, x: Any, up: int, down: int) -> Any:
    """Of other channels."""
    if not isinstance(x, Image):
        raise NotUnderstood
    x = flow.image(x)
    return replace(x, channels=x.channels * up // down if x.channels else None, places=None)


def glu(flow: Flow, x: Any, dim: int = -1) -> Any:
    if isinstance(x, Plain):
        return x.changed()
    if isinstance(x, Image) and x.axis(dim) == 1:
        return scaled(flow, x, 1, 2)
    return pooled(flow, x)

"""What a step of a model may give, as far as layouts go: an image, a flattened one, or what is the same in flax."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Lengths = tuple[Any, ...]  # the length of an axis as a product of lengths that are not known; see `batches`


class NotUnderstood(Exception):
    """A step that is not in the table, or not with these arguments: NOTE [unknown steps]."""


class Claim(NamedTuple):
    """NOTE [claims]: the output of a layer, of so many features, is an image of so many channels and places.

    The features are those of the array that was viewed: other than the layer's, it was made of parts of its output.
    """

    layer: str
    channels: int | None
    places: int | None
    features: int | None


@dataclass(frozen=True)
class Plain:
    """An array that lies in flax as in PyTorch: features last.

    Attributes:
        features: the length of the last axis, if known.
        writers: the layers and arrays whose columns it has.
        given: "whole" if it is an input of the model, "flattened" if it was one.
        viewed: what holds if it is an image; an unknown step came after the view.
    """

    features: int | None = None
    writers: frozenset[str] = frozenset()
    given: str = ""
    viewed: frozenset[Claim] = frozenset()

    def claims(self, channels: int | None, places: int | None) -> frozenset[Claim]:
        """Those of a view of it as an image; it is of parts where there was another view, or more than one writer."""
        parts = self.features is None and (self.viewed or len(self.writers) > 1)
        return frozenset(Claim(writer, channels, places, 0 if parts else self.features) for writer in self.writers)

    def changed(self) -> "Plain":
        """Of other axes."""
        return Plain(None, self.writers, "", self.viewed)


@dataclass(frozen=True)
class Image:
    """An array (n, channels, *space), which flax has with channels last.

    Attributes:
        channels: how many, if known.
        axes: of the space.
        places: in the space, if known.
        sure: whether it is one; if not, it only has the shape of one.
        claims: what holds if it is one.
    """

    channels: int | None
    axes: int
    places: int | None = None
    sure: bool = True
    claims: frozenset[Claim] = frozenset()

    @property
    def writers(self) -> frozenset[str]:
        return frozenset(claim.layer for claim in self.claims)

    def changed(self) -> Plain:
        """Of other axes, which make no image."""
        if self.sure:
            raise NotUnderstood
        return Plain(None, self.writers, "", self.claims)

    def axis(self, n: int) -> int:
        """An axis that may be counted from the end."""
        if not -self.axes - 2 <= n < self.axes + 2:
            raise NotUnderstood
        return n % (self.axes + 2)


class Piece(NamedTuple):
    """A part of the features: of a flattened image, or (channels None) of anything else. Size None: not known."""

    channels: int | None
    size: int | None


@dataclass(frozen=True)
class Flat:
    """Flattened images (n, features), next to one another and to other features."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Unknown:
    """NOTE [unknown steps]: made of images of so many channels."""

    channels: frozenset[int]

    def doubtful(self, size: int) -> bool:
        """Whether so many features may be such images flattened, or next to something else."""
        smaller = [count for count in self.channels if 1 < count < size]
        return any(size % count == 0 for count in smaller) if size in self.channels else bool(smaller)


@dataclass(frozen=True)
class Number:
    """A size or a scalar.

    Attributes:
        value: if it is known.
        lengths: the product that it is, if it is one of lengths.
    """

    value: int | None = None
    lengths: Lengths | None = None


@dataclass(frozen=True)
class Rest(Number):
    """All that is left of a shape, `*x.shape[2:]`; `each` is None where it is not known how many sizes that are."""

    each: tuple[Number, ...] | None = None


@dataclass(frozen=True)
class Sizes:
    """The shape of an array.

    Attributes:
        of: the array.
        name: which array it is.
        first: the length of its first axis.
        start: the axis at which this part of the shape begins.
    """

    of: Any
    name: Any
    first: Lengths
    start: int = 0


@dataclass(frozen=True)
class Array:
    """A parameter or buffer."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Several:
    """A tuple of such results."""

    each: Any


def results(values: Any) -> Iterator[Any]:
    """What steps gave, in nested arguments."""
    if isinstance(values, (list, tuple)) and not isinstance(values, Piece):
        for value in values:
            yield from results(value)
    elif isinstance(values, dict):
        yield from results(list(values.values()))
    elif isinstance(values, slice):
        yield from results([values.start, values.stop, values.step])
    elif isinstance(values, Several):
        yield values.each
    elif isinstance(values, (Plain, Image, Flat, Unknown, Number, Sizes, Array)):
        yield values


def listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (list, tuple)) else [x]

"""What is known of a model, and how it comes to be known: who reads what, and which views turn out to be images."""

from dataclasses import dataclass, field, replace
from typing import Any

from .values import Array, Claim, Flat, Image, Plain, Unknown, results


@dataclass
class Flow:
    """What is known of a model.

    Attributes:
        every: the channels that its convolutions give.
        read: layer -> what it reads, one for each call.
        seen: layers that every call is known of.
        uncalled: layers that the steps of the model do not call.
        claims: those that hold.
        unclear: what reads an image (a layer, or nothing: the model returns it), and what would hold of its writers.
        beside: bare arrays that meet flattened images of so many channels: (name, channels).
        inputs: layers that read an input of the model which was flattened.
        cut: layers that read an input of the model which was cut into pieces, such as patches.
        over: bare arrays that meet images of so many axes in space: (name, axes).
        calls: what the steps call or read, layers and bare arrays, in order.
    """

    every: frozenset[int] = frozenset()
    read: dict[str, list[Any]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    uncalled: set[str] = field(default_factory=set)
    claims: set[Claim] = field(default_factory=set)
    unclear: list[tuple[str, Claim]] = field(default_factory=list)
    beside: set[tuple[str, int]] = field(default_factory=set)
    inputs: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    over: set[tuple[str, int]] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def image(self, x: Any, name: str = "", count: int | None = None) -> Any:
        """What a layer reads that reads images: the claims hold."""
        if isinstance(x, Image):
            self.claims |= x.claims
            return replace(x, sure=True, claims=frozenset(), channels=x.channels or count)
        if isinstance(x, Plain) and x.features is None and count:
            doubtful = x.viewed or {Claim(writer, count, None, None) for writer in x.writers}
            self.unclear += [(name, claim._replace(channels=claim.channels or count)) for claim in doubtful]
        return x

    def unknown(self, values: Any, name: str = "") -> Any:
        """NOTE [unknown steps]: what a step that is not understood makes of its arguments."""
        found = list(results(values))
        images = [x for x in found if isinstance(x, (Flat, Unknown)) or (isinstance(x, Image) and x.sure)]
        if not images:
            others = [x for x in found if isinstance(x, (Plain, Image))]
            viewed = [x.viewed if isinstance(x, Plain) else x.claims for x in others]
            return Plain(None, frozenset().union(*(x.writers for x in others)), "", frozenset().union(*viewed))
        counts = frozenset().union(*(self.counts(x) for x in images))
        arrays = {x.name: x.shape for x in found if isinstance(x, Array)}
        flat = any(isinstance(x, Flat) for x in images)
        if flat or name in _PRODUCTS:
            for array, shape in arrays.items():
                fitting = [n for n in counts if any(size > n > 1 and size % n == 0 for size in shape)]
                self.beside |= {(array, n) for n in fitting}
        return Unknown(counts)

    def counts(self, x: Any) -> frozenset[int]:
        """The channels that something may have been made of."""
        if isinstance(x, Unknown):
            return x.channels
        if isinstance(x, Flat):
            return frozenset(piece.channels for piece in x.pieces if piece.channels is not None)
        return frozenset({x.channels}) if isinstance(x, Image) and x.channels else self.every


_PRODUCTS = set("linear matmul mm bmm addmm baddbmm einsum bilinear tensordot".split())

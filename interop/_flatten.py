"""A flatten between convolutions and dense layers: PyTorch flattens (C, H, W), flax (H, W, C).

The rows of the dense kernel count in another order: PyTorch's row `c * HW + hw` is flax's row `hw * C + c`. Only the
number of channels `C` is needed, and `_flow` tells it, for several images side by side too. So it tells the way back,
from a dense layer to the image that a convolution reads. What it does not tell is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from funcreg._selectors import matches

from ._flow import CONVOLUTIONS, NORMS, Claim, Flat, Flow, Image, Piece, Plain, Unknown
from ._layers import Torch
from .links import Arrays, Link

Count = int | list[tuple[int | None, int]] | None
Given = Count | tuple[Count, int | None]
Rows = int | tuple[Piece, ...] | None


class Channels(NamedTuple):
    """How many channels a layer's rows count first in PyTorch, or each piece of them, and its columns; None: none."""

    rows: Rows
    columns: int | None = None


class _Unclear(ValueError):
    """What is not known of a layer, and how to say it."""


def channels(
    net: nn.Module, layers: Sequence[Torch], given: Mapping[str, Given], flow: Flow
) -> tuple[dict[str, Channels], list[str]]:
    """For each layer beside a flatten the channels of the image, and remarks.

    Args:
        net: the model.
        layers: its layers with a rule, and its bare arrays.
        given: the option `flatten` of `match`.
        flow: what reaches the layers.

    Raises:
        TypeError: an option of another form.
        ValueError: a flatten in doubt, or an option that fits no layer.
    """
    options = {glob: _checked_option(glob, value) for glob, value in given.items()}
    names = {module: name for name, module in net.named_modules()}
    convolutions = [module for module in names if isinstance(module, CONVOLUTIONS)]
    beside = _Beside(convolutions, flow, names)
    used: set[str] = set()
    found: dict[str, Channels] = {}
    problems: list[str] = []
    for layer in layers:
        if layer.module is None:
            globs = [glob for glob in options if options[glob] == Channels(None) and matches(glob, layer.name)]
            counts = [count for name, count in sorted(beside.flow.beside) if name in layer.names]
            used |= set(globs) if counts else set()
            problems += [_bare(layer.name, count) for count in counts[:1] if not globs]
            continue
        module: Any = getattr(layer.module, "module", layer.module)  # of a cell
        size = _features(module)
        globs = [glob for glob in options if matches(glob, layer.name)]
        try:
            if is_cube(module):
                used |= set(globs)
                found[layer.name] = beside.cube(layer, module, options[globs[0]] if globs else None)
            elif size is not None and globs:
                used |= set(globs)
                _check_counts(layer, module, size, options[globs[0]])
                found[layer.name] = options[globs[0]]
            elif not globs:
                found[layer.name] = beside.channels(layer, module, size)
        except _Unclear as error:
            problems.append(str(error))
    problems += [
        f"flatten: {glob!r} is no layer that reads or writes something flattened"
        for glob in options
        if glob not in used
    ]
    problems += beside.unwritable()
    if problems:
        raise ValueError("match: " + "\n  ".join(problems))
    inputs = [(name, "flattened") for name in flow.inputs] + [(name, "cut into pieces") for name in flow.cut]
    remarks = [
        f"{name} reads an input of the model {how}: its rows stay in PyTorch's order, channels first; "
        f"flatten={{{name!r}: channels}} if flax is given images with channels last"
        for name, how in dict.fromkeys(inputs)
        if found.get(name) == Channels(None) and not any(matches(glob, name) for glob in options)
    ]
    return {name: answer for name, answer in found.items() if answer != Channels(None)}, remarks


def _bare(name: str, count: int) -> str:
    return (
        f"{name} meets {count} channels flattened, and no option permutes it: give its module a rule "
        f"(interop.rules.register), or flatten={{{name!r}: None}} leaves it in PyTorch's order"
    )


class _Beside:
    """What a model's flow says of its layers.

    Attributes:
        convolutions: of the model.
        flow: what reaches its layers.
        names: of its modules.
        claims: layer -> what holds of the images that it writes.
        widths: the features that layers give.
    """

    def __init__(self, convolutions: list[Any], flow: Flow, names: Mapping[nn.Module, str]) -> None:
        self.convolutions, self.flow, self.names = convolutions, flow, names
        self.claims: dict[str, set[Claim]] = {}
        for claim in flow.claims:
            if claim.places != 1 and claim.channels != 1:
                self.claims.setdefault(claim.layer, set()).add(claim)
        given = ("out_features", "out_channels", "embedding_dim", "hidden_size", "embed_dim")
        self.widths = {getattr(module, name, None) for module in names for name in given}

    def channels(self, layer: Torch, module: Any, size: int | None) -> Channels:
        """Those of one layer.

        Raises:
            _Unclear: they are not known.
        """
        name = self.names.get(module, layer.name)
        first = str(getattr(layer.module, "suffix", "_l0")).startswith("_l0")  # cells of later layers read cells
        if size is None or not first:
            return Channels(None)
        if name not in self.flow.seen:
            self._refuse_unseen(layer, module, size)
            return Channels(None)
        answers = {_rows(layer, module, size, x) for x in self.flow.read.get(name, [])} or {None}
        written = self._written(layer, name, module)
        if len(answers) > 1:
            says = [_option(layer.name, answer) for answer in answers]
            raise _Unclear(
                f"{layer.name} reads something flattened in one call and not in another, or of other channels, so that "
                f"it has no single twin; {' or '.join(sorted(says))} chooses one of them"
            )
        (rows,) = answers
        return Channels(rows or written) if isinstance(module, NORMS) else Channels(rows, written)

    def cube(self, layer: Torch, module: Any, given: Channels | None) -> Channels:
        """Of a norm over a cube: its channels if its axes are those of an image, which flax has as the last."""
        size, *others = module.normalized_shape
        name = self.names.get(module, layer.name)
        if given is not None:
            if given in (Channels(None), Channels(size)):
                return given
            raise _Unclear(f"flatten: {layer.name} is a norm over axes of {size}, which are no image of {given.rows}")
        found = self.flow.read.get(name, []) if name in self.flow.seen else []
        answers = {_of_image(x, len(others)) for x in found} or {None}
        if answers == {True}:
            return Channels(size)
        if answers == {False}:
            return Channels(None)
        raise _Unclear(
            f"{layer.name} is a norm over {len(others) + 1} axes of {size}, whose order no shape tells: "
            f"{_option(layer.name, size)} says that they are channels, height, ... of an image, which flax has with "
            f"channels last, {_option(layer.name, None)} that they are in flax as in PyTorch"
        )

    def _written(self, layer: Torch, name: str, module: Any) -> int | None:
        """The channels of the image that a layer writes."""
        claims = self.claims.get(name, set())
        out = module.out_features if isinstance(module, nn.Linear) else _features(module)
        norm = isinstance(module, NORMS)
        for reader, claim in self.flow.unclear:
            count = claim.channels or 0
            if claim.layer != name or not out or count < 2 or claim.places == 1:
                continue
            if claim.features not in (None, out):
                raise _Unclear(_part_of_image(layer.name))
            if out > count and out % count == 0:
                which = f"that {reader} reads" if reader else "that the model returns"
                raise _Unclear(_asked_to_write(layer.name, norm, out, count, which))
        if not claims:
            return None
        (count, *more) = {claim.channels for claim in claims}
        if more or not count or not out or out % count:
            raise _Unclear(_part_of_image(layer.name))
        if not all(x.features == out and x.places in (None, out // count) for x in claims):
            raise _Unclear(_part_of_image(layer.name))
        readers = [
            reader
            for reader, found in self.flow.read.items()
            for x in found
            if isinstance(x, Plain) and name in x.writers and self._is_dense(reader)
        ]
        if readers:
            raise _Unclear(
                f"{layer.name} writes an image of {count} channels, and {readers[0]} reads the same features; "
                f"{_option(layer.name, count if norm else (None, count))} with "
                f"{_option(readers[0], count)} permutes both, {_option(layer.name, None)} with "
                f"{_option(readers[0], None)} none"
            )
        return None if count == out else count

    def _is_dense(self, name: str) -> bool:
        return any(isinstance(m, nn.Linear) for m, known in self.names.items() if known == name)

    def unwritable(self) -> list[str]:
        """Images that are written by what cannot be permuted."""
        kinds = {name: module for module, name in self.names.items()}
        return [
            f"{name} gives an image of {claim.channels} channels, and no option permutes it; its module needs a rule "
            "of your own (interop.rules.register)"
            for name, claims in self.claims.items()
            for claim in list(claims)[:1]
            if not isinstance(kinds.get(name), (nn.Linear, *NORMS))
        ]

    def _refuse_unseen(self, layer: Torch, module: Any, size: int) -> None:
        """A layer of which the calls are not known, if it could stand beside a flatten."""
        counts = sorted({m.out_channels for m in self.convolutions if m.out_channels > 1})
        multiples = [n for n in counts if size > n and size % n == 0]
        name = self.names.get(module, layer.name)
        why = "its calls could not be traced (torch.fx)"
        if name in self.flow.uncalled:
            why = "forward does not call it"
        asked = []
        if multiples or (counts and size > counts[0] and size not in self.widths):
            what = f"perhaps {multiples[-1]} channels flattened" if multiples else "perhaps with an image flattened"
            remedy = _remedy(layer.name, multiples[-1] if multiples else None)
            asked.append(f"{layer.name} reads {size} features, {what}: {why}; {remedy}")
        for conv in self.convolutions if isinstance(module, nn.Linear) else ():
            count, out = conv.in_channels, module.out_features
            least = 1 if len(conv.kernel_size) == 1 else 3  # two or three places in a plane: scales and shifts
            if count > 1 and out % count == 0 and out // count > least:
                which = f"that {self.names[conv]} reads: {why}"
                asked.append(_asked_to_write(layer.name, False, out, count, which))
        if asked:
            raise _Unclear("\n  ".join(asked))


def _rows(layer: Torch, module: Any, size: int, x: Any) -> Rows:
    """The channels of what a layer reads, or None if its rows stay as they are."""
    name = layer.name
    if isinstance(x, Unknown) and x.doubtful(size):
        counts = [n for n in sorted(x.channels, reverse=True) if 1 < n < size and size % n == 0]
        perhaps = f"perhaps {counts[0]} channels flattened" if counts else "perhaps with an image flattened"
        raise _Unclear(
            f"{name} reads {size} features, {perhaps}: they come from convolutions by steps that are not known; "
            f"{_remedy(name, counts[0] if counts else None)}; if neither is so, its rows need a rule "
            "(interop.rules.register)"
        )
    if not isinstance(x, Flat):
        return None
    known = sum(piece.size or 0 for piece in x.pieces)
    open_ones = [piece for piece in x.pieces if piece.size is None]
    if len(open_ones) > 1:
        some = ", ".join(f"({piece.channels}, {piece.size or 'size'})" for piece in x.pieces)
        raise _Unclear(
            f"{name} reads {size} features, {len(x.pieces)} pieces side by side whose sizes are not known; "
            f"flatten={{{name!r}: [{some}]}} with the sizes, which add up to {size}, permutes each piece, "
            f"flatten={{{name!r}: None}} none"
        )
    pieces = tuple(piece if piece.size is not None else Piece(piece.channels, size - known) for piece in x.pieces)
    total = sum(piece.size or 0 for piece in pieces)
    if total != size or any(piece.size < 1 or piece.size % (piece.channels or 1) for piece in pieces if piece.size):
        some = " and ".join(str(piece.channels) for piece in pieces if piece.channels)
        raise _Unclear(
            f"{name} reads {size} features, no multiple of the {some} channels that are flattened before it; "
            f"{_remedy(name, None)}"
        )
    pieces = tuple(piece if piece.channels not in (1, piece.size) else Piece(None, piece.size) for piece in pieces)
    if all(piece.channels is None for piece in pieces):
        return None
    if not isinstance(module, (nn.Linear, *NORMS)):
        raise _Unclear(
            f"{name} reads {size} features, {pieces[0].channels} channels flattened, which has no twin for a "
            f"{type(module).__name__}; {_remedy(name, None)}"
        )
    return pieces[0].channels if len(pieces) == 1 else pieces


def is_cube(module: Any) -> bool:
    """Whether a norm over several axes has the same shape with the first axis as the last."""
    held = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None
    shape = module.normalized_shape if held else ()
    return len(shape) > 1 and len(set(shape)) == 1 and shape[0] > 1


def _of_image(x: Any, axes: int) -> bool | None:
    """Whether the last axes of what is read, one more than told, begin with the channels of an image."""
    if isinstance(x, Image) and x.sure:
        return x.axes == axes
    return False if isinstance(x, Plain) and not x.given else None


def _features(module: Any) -> int | None:
    """The length of the last axis of what a layer reads, if it could have been flattened."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    for name in ("in_features", "input_size", "embed_dim"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return module.num_features if isinstance(module, nn.BatchNorm1d) else None


def _part_of_image(name: str) -> str:
    return (
        f"{name} writes a part of an image, or several of different channels; {_option(name, None)} leaves its columns "
        "as they are, which is right if its twin views its image in PyTorch's order and then transposes it; anything "
        "else needs a rule (interop.rules.register)"
    )


def _asked_to_write(name: str, norm: bool, size: int, count: int, which: str) -> str:
    return (
        f"{name} gives {size} features, perhaps an image of the {count} channels {which}; "
        f"{_option(name, count if norm else (None, count))} says so, {_option(name, None)} that they stay as they are"
    )


def _remedy(name: str, count: int | None) -> str:
    says = f"flatten={{{name!r}: {count}}} says that {count} channels were flattened, " if count else ""
    return f"{says}flatten={{{name!r}: None}} that its rows stay as they are"


def _option(name: str, value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], Piece):
        value = [tuple(piece) for piece in value]
    return f"flatten={{{name!r}: {value}}}"


def _checked_option(glob: Any, value: Any) -> Channels:
    rows, columns, *more = value if isinstance(value, tuple) and len(value) > 1 else (value, None)
    counts = [columns, *([rows] if not isinstance(rows, list) else [])]
    fine = not more and all(x is None or _is_count(x) for x in counts)
    if isinstance(rows, list):
        pairs = all(isinstance(p, tuple) and len(p) == 2 and (p[0] is None or _is_count(p[0])) for p in rows)
        fine = fine and bool(rows) and pairs and all(_is_count(size) for _, size in rows)
    if not isinstance(glob, str) or not fine:
        raise TypeError(
            "match: flatten must be a dict of layer names and channels (a positive int; None for none; a list of "
            "(channels, size) for pieces side by side; a tuple for rows and columns of a dense layer), got "
            f"{glob!r}: {value!r}"
        )
    return Channels(tuple(Piece(*p) for p in rows) if isinstance(rows, list) else rows, columns)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and x > 0 and x is not True


def _check_counts(layer: Torch, module: Any, size: int, answer: Channels) -> None:
    """Refuse channels that a layer's features are no multiple of."""
    for count, features in zip(answer, (size, getattr(module, "out_features", 0)), strict=True):
        if isinstance(count, tuple):
            total = sum(piece.size or 0 for piece in count)
            if total != features or not isinstance(module, (nn.Linear, *NORMS)):
                raise _Unclear(f"flatten: {layer.name} has {features} features there, the pieces have {total}")
        pieces = count if isinstance(count, tuple) else (Piece(count, features),)
        for part, length in pieces:
            if part is not None and (not length or length % part or not isinstance(module, (nn.Linear, *NORMS))):
                raise _Unclear(f"flatten: {layer.name} has {length} features there, no multiple of {part} channels")


def says(count: Rows, size: int) -> str:
    """What the table says of rows or columns that are permuted."""
    pieces = count if isinstance(count, tuple) else (Piece(count, size),)
    return ", ".join(
        f"{part} channels x {(length or 0) // part}" if part else f"{length} as they are" for part, length in pieces
    )


def permuted(link: Link, counts: Channels) -> Link:
    """The link of a layer beside a flatten: its flax arrays count places first, then channels.

    The rows are the first axis of a kernel and the only axis of a norm's arrays, the columns the last axis of a kernel
    and of a bias.
    """

    def swap(x: np.ndarray, to_jax: bool) -> np.ndarray:
        for count, axis in ((counts.rows, 0), (counts.columns, x.ndim - 1)):
            if count is not None:
                order = _order(count, x.shape[axis])
                x = np.take(x, order if to_jax else np.argsort(order), axis)
        return x

    def to_jax(*arrays: np.ndarray) -> Arrays:
        return tuple(swap(x, True) for x in link.to_jax(*arrays))

    def to_torch(*arrays: np.ndarray) -> Arrays:
        return link.to_torch(*(swap(x, False) for x in arrays))

    return replace(link, to_jax=to_jax, to_torch=to_torch)


def _order(count: Rows, size: int) -> np.ndarray:
    """For each of flax's rows PyTorch's."""
    pieces = count if isinstance(count, tuple) else (Piece(count, size),)
    starts = np.cumsum([0, *(piece.size or 0 for piece in pieces)])
    parts = [
        start + np.arange(piece.size or 0).reshape(piece.channels or 1, -1).T.ravel()
        for start, piece in zip(starts, pieces, strict=False)
    ]
    return np.concatenate(parts)

"""The table of a pair: what is whose twin, by which evidence, and how its arrays are laid out."""

from collections.abc import Sequence
from textwrap import fill
from typing import NamedTuple

import numpy as np

from .links import Link


class Row(NamedTuple):
    """One link.

    `by` is the evidence ("name", "order", "shape", "rename") and `also` what its maps do not show.
    """

    link: Link
    torch_shapes: tuple[tuple[int, ...], ...]
    jax_shapes: tuple[tuple[int, ...], ...]
    by: str
    also: str = ""


def table(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The rows as aligned text, the notes below, wrapped."""
    lines = [("PyTorch", "shape", "flax", "shape", "by", "how")]
    for row in rows:
        ours = _column(row.link.torch, row.torch_shapes)
        theirs = _column(row.link.jax, row.jax_shapes)
        for i in range(max(len(ours), len(theirs))):
            (a, shape), (b, other) = (side[i] if i < len(side) else ("", "") for side in (ours, theirs))
            lines.append((a, shape, b, other, row.by if i == 0 else "", happens(row) if i == 0 else ""))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    width = max(map(len, text))
    rule = "-" * width
    below = [_wrapped(f"note: {note}", max(width, 72)) for note in notes]
    return "\n".join([text[0], rule, *text[1:], *([rule, *below] if notes else [])])


def _wrapped(text: str, width: int) -> str:
    """As wide as the table; names are never broken."""
    return fill(text, width, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)


def _column(names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[tuple[str, str]]:
    return [(name, "x".join(map(str, shape)) or "-") for name, shape in zip(names, shapes, strict=True)]


def happens(row: Row) -> str:
    """What the maps of a link do, seen from what becomes of the strides of an empty array."""
    link = row.link
    words = []
    if link.sums:
        words.append(link.sums)
    elif len(link.torch) == 1 and len(link.jax) > 1:
        parts = [name.split(".") for name in link.jax]
        words.append(f"{', '.join(part[-2] if len(part) > 1 else part[-1] for part in parts)} split")
    elif len(link.torch) > 1:
        words.append("merged" if len(link.jax) == 1 else "regrouped")
    elif not row.also:
        words.append(_move(link, row.torch_shapes[0]))
    words += [row.also] if row.also else []
    return "; ".join(word for word in words if word) or "as it is"


def _move(link: Link, shape: tuple[int, ...]) -> str:
    x = np.empty(shape, np.int8)  # whose memory is never touched
    (y,) = link.to_jax(x)
    if not np.shares_memory(x, y):
        return "rearranged" if x.size else ""
    flips = "" if all(s >= 0 for s in y.strides) else "flipped"
    by_stride = dict(zip(x.strides, range(x.ndim), strict=True))
    order = [by_stride.get(abs(s)) for s in y.strides]
    if x.ndim == 2 and y.shape == x.shape[::-1] and (flips or 1 in x.shape):
        moved = "transposed"  # of an axis of one entry the strides say nothing
    elif len(by_stride) < x.ndim or None in order or sorted(order) != list(range(x.ndim)):  # pyright: ignore[reportArgumentType]
        moved = "" if y.shape == x.shape else "reshaped" if x.size else ""
    elif order == list(range(x.ndim)):
        moved = ""
    else:
        moved = "transposed" if x.ndim == 2 else f"axes {', '.join(map(str, order))}"
    return "; ".join(word for word in (moved, flips) if word)

"""LSTM, GRU and RNN: one flax cell for each layer and direction of PyTorch's, and which gate is which.

PyTorch adds two biases in every gate, `bias_ih` and `bias_hh`; flax has one. Going to JAX they are added up, coming
back the sum becomes `bias_ih` and `bias_hh` becomes zero, except in the n gate of a GRU, where the reset gate
multiplies the second one: `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`. flax.linen.GRUCell has both there;
flax.nnx.GRUCell has no `b_hn`, so that only a GRU whose `b_hn` is zero goes to it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from ._layouts import Layout, Layouts, Mismatch, Shapes, split_gates
from .links import Arrays, Link

Naming = Callable[[str, str], list[Link]]  # (suffix of PyTorch's names, prefix of flax's) -> the links of one cell


@dataclass(frozen=True)
class Cell:
    """One layer and direction of an `nn.LSTM`, `nn.GRU` or `nn.RNN`: what flax calls a cell.

    Attributes:
        module: the whole.
        suffix: of the names of its arrays: "_l0", "_l1_reverse"; nothing in an `nn.LSTMCell`.
    """

    module: Any
    suffix: str = ""

    def __repr__(self) -> str:
        return f"{type(self.module).__name__}({self.module.extra_repr()}), arrays *{self.suffix}"

    @property
    def reverse(self) -> bool:
        return self.suffix.endswith("_reverse")


def cells(module: Any) -> list[Cell]:
    """The cells of a recurrent module, in PyTorch's order: both directions of a layer, then the next layer."""
    if isinstance(module, nn.RNNCellBase):
        return [Cell(module)]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [Cell(module, f"_l{i}{direction}") for i in range(module.num_layers) for direction in directions]


def refused(module: Any) -> str:
    """Why no flax cell can hold the arrays, or nothing."""
    if not module.bias:
        return "bias=False has no twin: flax's cells have biases, which would be trained; use bias=True"
    if getattr(module, "proj_size", 0):
        return f"proj_size={module.proj_size} has no twin: flax's cells do not project their state"
    return ""


def recurrent(*namings: Naming) -> Layouts:
    """The layouts of a module that is made of cells, for the ways in which flax names the arrays of a cell."""

    def layouts(module: Any, shapes: Shapes | None) -> list[Layout]:
        ours = [module] if isinstance(module, Cell) else cells(module)
        return [
            Layout(
                tuple(one for pair in zip(ours, prefixes, strict=True) for one in _placed(links, *pair, len(ours) > 1))
            )
            for links in namings
            for prefixes in _prefixes(ours, links, shapes)
        ]

    return layouts


def _placed(links: Naming, cell: Cell, prefix: str, told: bool) -> list[Link]:
    """The links of a cell; `told`: whether the prefix is all that there is to tell the direction by."""
    placed = links(cell.suffix, prefix)
    if told and (note := place_note(cell, prefix[:-1])):
        placed[0] = replace(placed[0], note=note)
    return placed


def place_note(module: Any, path: str) -> str:
    """A word on a cell of the reverse direction whose name in flax does not say so, or nothing."""
    if not isinstance(module, Cell) or not module.reverse or not path or _direction(path):
        return ""
    return f"{path} taken for the reverse direction by its place, its name does not tell"


def _prefixes(ours: list[Cell], links: Naming, shapes: Shapes | None) -> Iterator[list[str]]:
    """Where in the flax layer the cells are: bare, in `RNN`s and `Bidirectional`s, or in a list or layer of these."""
    if shapes is None:
        yield from ([""], ["cell."]) if len(ours) == 1 else ()
        if [cell.reverse for cell in ours] == [False, True]:
            yield ["forward_rnn.cell.", "backward_rnn.cell."]
        return
    names = {name for one in links("", "") for name in one.jax}
    first = min(names)
    found = {name.removesuffix(first) for name in shapes if f".{name}".endswith(f".{first}")}
    prefixes = sorted((p for p in found if all(p + name in shapes for name in names)), key=_natural)
    told = [_direction(prefix) for prefix in prefixes]
    if len(prefixes) == len(ours) and all(
        len(ours) == 1 or way in ("", "backward" if cell.reverse else "forward")
        for way, cell in zip(told, ours, strict=True)
    ):
        yield prefixes


def _direction(prefix: str) -> str:
    """What the names in flax say: `Bidirectional` calls its two halves forward_rnn and backward_rnn."""
    ways = [way for part in prefix.split(".") for way in ("forward", "backward") if part.startswith(way)]
    return ways[-1] if ways else ""


def _natural(prefix: str) -> list[tuple[int, str]]:
    """layers_2 before layers_10, and forward before backward."""
    parts = re.split(r"(\d+)", prefix.replace("backward", "forward~"))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


@dataclass(frozen=True)
class Biases:
    """The arrays that hold the biases in flax, and how PyTorch's two give them."""

    names: str
    to_jax: Callable[..., Arrays]
    to_torch: Callable[..., Arrays]
    remark: str = ""


def naming(inputs: str, hidden: str, biases: Biases) -> Naming:
    """The links of a cell whose gates have these kernels, in PyTorch's order."""

    def links(suffix: str, prefix: str) -> list[Link]:
        def kernels(torch: str, names: list[str]) -> Link:
            return Link((torch + suffix,), tuple(f"{prefix}{name}.kernel" for name in names), *split_gates(len(names)))

        ours = f"bias_ih{suffix}", f"bias_hh{suffix}"
        theirs = tuple(f"{prefix}{name}.bias" for name in biases.names.split())
        sums = f"{', '.join(theirs)} = {' + '.join(ours)}{biases.remark}"
        return [
            kernels("weight_ih", inputs.split()),
            kernels("weight_hh", hidden.split()),
            Link(ours, theirs, biases.to_jax, biases.to_torch, sums),
        ]

    return links


def one_bias(names: str) -> Biases:
    """`bias_ih + bias_hh` in every gate."""
    n = len(names.split())

    def to_jax(b_ih: np.ndarray, b_hh: np.ndarray) -> Arrays:
        return tuple(np.split(b_ih + b_hh, n))

    def to_torch(*biases: np.ndarray) -> Arrays:
        b_ih = np.concatenate(biases)
        return b_ih, np.zeros_like(b_ih)

    return Biases(names, to_jax, to_torch)


def gru_of_linen() -> Biases:
    """r and z have one bias, n has both."""

    def to_jax(b_ih: np.ndarray, b_hh: np.ndarray) -> Arrays:
        (r, z, n), (h_r, h_z, h_n) = np.split(b_ih, 3), np.split(b_hh, 3)
        return r + h_r, z + h_z, n, h_n

    def to_torch(r: np.ndarray, z: np.ndarray, n: np.ndarray, h_n: np.ndarray) -> Arrays:
        zeros = np.zeros_like(r)
        return np.concatenate([r, z, n]), np.concatenate([zeros, zeros, h_n])

    return Biases("ir iz in hn", to_jax, to_torch, " (in the n gate one each)")


def gru_of_nnx() -> Biases:
    """r, z and n have one bias; the one inside the reset gate is missing."""

    def to_jax(b_ih: np.ndarray, b_hh: np.ndarray) -> Arrays:
        (r, z, n), (h_r, h_z, h_n) = np.split(b_ih, 3), np.split(b_hh, 3)
        if h_n.astype(bool).any():
            raise Mismatch(
                "GRU: the last third of bias_hh, the bias of the n gate inside the reset gate, is not zero, and "
                "flax.nnx.GRUCell has no such bias; use flax.linen.GRUCell, which has it, or a cell of your own and "
                "register(), or train with that third kept at zero"
            )
        return (np.concatenate([r + h_r, z + h_z, n]),)

    def to_torch(bias: np.ndarray) -> Arrays:
        return bias, np.zeros_like(bias)

    return Biases("dense_i", to_jax, to_torch, " (the n gate of bias_hh must be zero)")


LSTM = recurrent(  # gates in PyTorch's order: input, forget, cell, output
    naming("ii if ig io", "hi hf hg ho", one_bias("hi hf hg ho")),  # linen
    naming("ii if_ ig io", "hi hf hg ho", one_bias("hi hf hg ho")),  # nnx.LSTMCell
    naming("dense_i", "dense_h", one_bias("dense_h")),  # nnx.OptimizedLSTMCell
)
GRU = recurrent(  # reset, update, new
    naming("ir iz in", "hr hz hn", gru_of_linen()),
    naming("dense_i", "dense_h", gru_of_nnx()),
)
RNN = recurrent(
    naming("i", "h", one_bias("i")),  # linen.SimpleCell
    naming("dense_i", "dense_h", one_bias("dense_i")),  # nnx.SimpleCell
)

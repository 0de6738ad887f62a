"""Calling a function of either framework from NumPy inputs, in float64 and in float32.

NOTE [two contexts]: enabling x64 in JAX also changes what float32 code computes (the bias correction of `optax.adam`,
by 7e-6 of a step: Python's numbers become float64), so that a float32 run belongs outside x64, as it is in use.
PyTorch's counterpart is the default dtype, by which it makes new tensors: float64 in the float64 run.
"""

import copy
import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from . import _leaves, _lifted, arrays
from ._carry import Carrier
from ._coarse import Seen, Watch, of_jax
from ._leaves import Leaves
from ._nudge import can_move, nudge
from ._trees import Tree, rebuild

Function = Callable[..., Any]
_FLOATS = {64: (np.dtype(np.float64), np.dtype(np.complex128)), 32: (np.dtype(np.float32), np.dtype(np.complex64))}


class Side(ABC):
    """One framework: how inputs go in, and how results come out.

    Attributes:
        name: "PyTorch" or "JAX".
        called_by: the public function, for errors.
        where: that and the side.
        lifted: whether casts from float64 to float32 are left out.
    """

    name: str

    def __init__(self, where: str, carrier: Carrier | None, lifted: bool = False) -> None:
        self.called_by, self.where = where, f"{where}, {self.name} side"
        self.carrier, self.lifted = carrier, lifted

    @abstractmethod
    def precision(self, bits: int) -> Any:
        """A context: what the framework makes by itself is of this precision."""

    @abstractmethod
    def given(self, tree: Tree, bits: int, draw: int | None = None) -> Tree:
        """A tree of NumPy arrays as the framework's, floats in this precision, with `draw` moved by an ulp.

        Integers and bools stay as they are. Inside `precision`. Leaf by leaf: a tree may be a whole model, and is not
        to be held a second time.
        """

    @abstractmethod
    def function(self, function: Function, bits: int) -> Function:
        """The function to be called in this precision."""

    @abstractmethod
    def watched(self, function: Function, given: tuple[Any, ...]) -> tuple[Any, Seen]:
        """The result of the function and what it computes in a lower precision; inside `precision(64)`."""

    def is_still(self, tree: Tree) -> bool:
        """Whether a tree of inputs has nothing that can be moved by an ulp."""
        moving: list[bool] = []
        rebuild(
            self.where, tree, lambda _, x: moving.append(can_move(np.asarray(arrays.to_host(x)))), flax_as_dicts=True
        )
        return not any(moving)

    def results(self, tree: Tree, copy: bool = True) -> Leaves:
        """The arrays of a result by name; without `copy` they may change with the next call."""
        return _leaves.named(self.where, tree, self.carrier, self.name == "PyTorch", copy)

    def call(
        self, function: Function, inputs: tuple[Tree, ...], bits: int, draw: int | None = None
    ) -> Leaves | Exception:
        """The named results of one call, or what the function raised; with `draw`, of inputs moved by an ulp.

        Only the first are to be kept: those of moved inputs may change with the next call.
        """
        _give_back()
        with self.precision(bits):
            given = self.given(inputs, bits, draw)
            ready = self.function(function, bits)
            try:
                results = ready(*given)
            except Exception as error:
                return error
            del given  # before there are copies of the results
            return self.results(results, copy=draw is None)

    def call_again(self, function: Function, inputs: tuple[Tree, ...]) -> tuple[Leaves, Seen]:
        """The results of one more call in float64, not to be kept, and what it computes in a lower precision."""
        _give_back()
        with self.precision(64):
            given = self.given(inputs, 64)
            results, seen = self.watched(self.function(function, 64), given)
            return self.results(results, copy=False), seen


class TorchSide(Side):
    """PyTorch's.

    Attributes:
        flushing: whether subnormal numbers are taken for zero, as by XLA; in one thread, since it is set of one.
    """

    name = "PyTorch"

    def __init__(self, where: str, carrier: Carrier | None, lifted: bool = False, flushing: bool = False) -> None:
        super().__init__(where, carrier, lifted)
        self.flushing = flushing

    @contextmanager
    def precision(self, bits: int) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if bits == 64 else torch.float32)
        try:
            with _flushed() if self.flushing else nullcontext():
                yield
        finally:
            torch.set_default_dtype(before)

    def given(self, tree: Tree, bits: int, draw: int | None = None) -> Tree:
        def convert(name: str, x: Any) -> torch.Tensor:
            return arrays.to_torch(_cast(self.where, name, x, bits, draw))

        return rebuild(self.where, tree, convert, flax_as_dicts=True)

    def watched(self, function: Function, given: tuple[Any, ...]) -> tuple[Any, Seen]:
        with Watch() as watch:
            return function(*given), watch.seen

    def function(self, function: Function, bits: int) -> Function:
        """A module is called as a copy of this precision, so that statistics it writes do not reach the next call."""
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(torch.float64 if bits == 64 else torch.float32)
        return _lifted.of_torch(function) if self.lifted and bits == 64 else function


class JaxSide(Side):
    name = "JAX"

    def precision(self, bits: int) -> Any:
        return jax.enable_x64(bits == 64)

    def function(self, function: Function, bits: int) -> Function:
        return _lifted.of_jax(function) if self.lifted and bits == 64 else function

    def watched(self, function: Function, given: tuple[Any, ...]) -> tuple[Any, Seen]:
        seen = of_jax(function, given)  # first: a function may donate what it is given
        return function(*given), seen

    def given(self, tree: Tree, bits: int, draw: int | None = None) -> Tree:
        def convert(name: str, x: Any) -> jax.Array:
            return arrays.to_jax(_narrowed(self.where, name, _cast(self.where, name, x, bits, draw)))

        carried = tree if self.carrier is None else self.carrier.inputs(self.where, tree)
        return rebuild(self.where, carried, convert)


@contextmanager
def _flushed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps for every thread that computes as much as it had at once."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries of C have none
        if trim is not None:
            trim(0)


def _cast(where: str, name: str, leaf: Any, bits: int, draw: int | None) -> np.ndarray:
    """A leaf as a NumPy array: floats and complex numbers in this precision, all others as they are."""
    x = np.asarray(arrays.to_host(leaf))
    if x.dtype.kind not in "biufcV":
        raise TypeError(f"{where}: {name} is an array of {x.dtype}; inputs are arrays of numbers")
    if x.dtype.kind in "biu":
        return x
    wide = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64, copy=False)
    if draw is not None:
        wide = nudge(wide, draw)
    floating, complex_ = _FLOATS[bits]
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite in its run
        return wide.astype(complex_ if x.dtype.kind == "c" else floating, copy=False)


def _narrowed(where: str, name: str, x: np.ndarray) -> np.ndarray:
    """Integers as JAX holds them: of 32 bits without x64, which must not change a value."""
    if jax.config.read("jax_enable_x64") or x.dtype not in (np.int64, np.uint64):
        return x
    narrow = x.astype(np.int32 if x.dtype == np.int64 else np.uint32)
    if (narrow != x).any():
        raise ValueError(
            f"{where}: {name} is {x.dtype} and holds {x[narrow != x][0]}, which JAX cannot hold in the float32 run, "
            "without x64; pass smaller integers"
        )
    return narrow

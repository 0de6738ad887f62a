"""Two functions called as they are given, in all the runs that a comparison takes, and their leaves judged."""

import re
from collections.abc import Callable
from typing import Any

from ._closer import closer
from ._compare import Results, found_in
from ._judged import is_doubtful, judged
from ._nudge import DRAWS
from ._sides import Side
from .report import Leaf

Tree = Any

RANDOMNESS = (
    "the {side} side is random: two calls with the same inputs differ; draw masks and noise once, outside, and pass "
    "them to both sides as inputs, or put the model into evaluation mode"
)

_CLOSED_OVER = (
    "; inputs are float64 in this run, and what the function closes over keeps its dtype: pass it as an input too, the "
    "buffers of a net with its parameters (the pair carries its whole state dict)"
)

_CARRIED = (
    "{where}: with pair, a dict of all of PyTorch's parameters arrives as variables['params'] or nnx.state(model, "
    "nnx.Param) (of linen: module.apply({{'params': params}}, x)), a dict of the whole state as what match was given"
)


def compared_as_given(
    torch_side: Side,
    jax_side: Side,
    torch_fn: Callable[..., Tree],
    jax_fn: Callable[..., Tree],
    inputs: tuple[Tree, ...],
) -> tuple[dict[str, Leaf], list[str], bool]:
    """The leaves by name, the reasons, and whether a side computes in a lower precision in its float64 run."""
    where = torch_side.called_by
    reasons: list[str] = []
    torch_calls = _Calls(torch_side, torch_fn, inputs, reasons)
    jax_calls = _Calls(jax_side, jax_fn, inputs, reasons)
    ours, theirs = torch_calls.results, jax_calls.results
    # The order is that of the least memory: no result is held longer than until the next one it is compared with.
    torch_calls.wide()
    torch_calls.around()
    torch_calls.narrow()
    jax_calls.wide()
    in64 = found_in(where, ours.float64, theirs.float64)
    jax_calls.around()
    jax_calls.narrow()
    theirs.float64 = None
    in32 = found_in(where, ours.float32, theirs.float32, in64)
    names = in64 or in32  # no names where one side has float64 only and the other float32 only
    leaves = {name: judged(name, ours, theirs, in64.get(name), in32.get(name)) for name in names}
    doubtful = [name for name, leaf in leaves.items() if is_doubtful(leaf, in64.get(name), in32.get(name))]
    coarse = bool(ours.coarse or theirs.coarse)
    if doubtful and not (reasons or coarse):
        whole = {name: in64[name].whole for name in doubtful}
        for name, found in closer((torch_side, jax_side), (torch_fn, jax_fn), inputs, whole).items():
            leaves[name] = judged(name, ours, theirs, in64[name], in32[name], closer=found)
    return leaves, reasons, coarse


class _Calls:
    """The calls of one side, in this order: `wide`, `around`, `narrow`; a precision that fails is among the reasons."""

    def __init__(self, side: Side, function: Callable[..., Tree], inputs: tuple[Tree, ...], reasons: list[str]) -> None:
        self.side, self.function, self.inputs, self.reasons = side, function, inputs, reasons
        self.results = Results(side.name)
        self.failed: Exception | None = None

    def wide(self) -> None:
        """In float64."""
        leaves = self.side.call(self.function, self.inputs, 64)
        if isinstance(leaves, Exception):
            self.failed = leaves
        else:
            self.results.keep(leaves)

    def around(self) -> None:
        """In float64 once more, and with inputs moved by an ulp: randomness, and noise of its own."""
        results = self.results
        if self.failed is not None:
            return
        again, results.coarse = self.side.call_again(self.function, self.inputs)
        results.repeated(again)
        del again
        if results.random:
            self.reasons.append(RANDOMNESS.format(side=self.side.name))
            return
        results.still = self.side.is_still(self.inputs)
        for draw in range(0 if results.still else DRAWS):
            leaves = self.side.call(self.function, self.inputs, 64, draw)
            if not isinstance(leaves, Exception):  # what raises beside its inputs has no noise to show
                results.moved(leaves)
            del leaves  # before the next ones are there

    def narrow(self) -> None:
        """In float32."""
        leaves = self.side.call(self.function, self.inputs, 32)
        if not isinstance(leaves, Exception):
            self.results.float32 = leaves
            self.results.drifted()
        elif self.failed is None:
            self.reasons.append(f"the {self.side.name} side fails in float32: {brief(leaves)}")
        else:
            self.failed.add_note(f"{self.side.where}: raised in float64; in float32: {brief(leaves)}")
            if self.side.name == "JAX" and self.side.carrier is not None:
                self.failed.add_note(_CARRIED.format(where=self.side.where))
            raise self.failed
        if self.failed is not None:
            remedy = _CLOSED_OVER if _mixes_dtypes(self.failed) else ""
            self.reasons.append(f"the {self.side.name} side fails in float64: {brief(self.failed)}{remedy}")


def _mixes_dtypes(error: Exception) -> bool:
    """Whether this is how PyTorch or JAX says that one operand is float64 and another float32."""
    words = set(re.findall(r"\w+", str(error).lower()))
    return isinstance(error, RuntimeError | TypeError) and (
        {"double", "float"} <= words or {"float64", "float32"} <= words
    )


def brief(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200] if first else ''}"

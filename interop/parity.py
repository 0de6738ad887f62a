"""`check`: do a PyTorch function and a JAX function compute the same thing?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ._carry import Carrier
from ._closer import closer
from ._compare import Results, found_in
from ._judged import in_place_of, is_doubtful, judged
from ._nudge import DRAWS
from ._sides import JaxSide, Side, TorchSide
from .arrays import outside_compilation
from .hints import CheckTrial, hints_of
from .pair import Pair
from .report import Leaf, Report, summed_up
from .verdict import Verdict

Tree = Any

RANDOMNESS = (
    "the {side} side is random: two calls with the same inputs differ; draw masks and noise once, outside, and pass "
    "them to both sides as inputs, or put the model into evaluation mode"
)


@outside_compilation
def check(
    torch_fn: Callable[..., Tree],
    jax_fn: Callable[..., Tree],
    *inputs: Tree,
    pair: Pair | None = None,
    hints: bool = True,
) -> Report:
    """Whether two functions compute the same thing up to rounding; a verdict, and what it rests on.

    Both are called with the same NumPy inputs, as tensors and as JAX arrays: in float64 (JAX with x64, PyTorch with
    that default dtype), and in float32 (x64 off). Each side is called in float64 once more, which shows randomness, and
    with inputs that are moved by an ulp, which shows its own rounding errors. Results are compared leaf by leaf, by
    dotted names; `interop.verdict` has the rules. Where they leave the matter open, both sides are called some more
    times, for a look at single entries.

    Gradients are functions too: `check(torch.func.grad(loss), jax.grad(loss_jax), params, x)`, and so are per-example
    gradients: `check(fr.per_example(loss), frj.per_example(loss_jax), params, x, y)`.

    A verdict is about these inputs. A fault that they do not excite is not seen: the derivative of `abs` at 0 needs an
    exact zero, a wrong epsilon needs small numbers.

    Args:
        torch_fn: called with tensors. An `nn.Module` is called as a copy in the precision of the run. It must hold no
            arrays of its own of a fixed precision: parameters are inputs.
        jax_fn: called with JAX arrays; faster under `jax.jit`, which compiles it for each precision.
        inputs: arrays of NumPy or trees of them. Floats are given in the precision of the run; integers and bools as
            they are, but as JAX has them without x64 in its float32 run; Python numbers and None untouched.
        pair: of `interop.match`. In inputs and in results of `torch_fn`, a dict of all parameters by name (of their
            gradients, say) is carried to the tree that an optimizer sees on the JAX side, `variables["params"]` or
            `nnx.state(model, nnx.Param)`; a dict of the whole state, with buffers, to what `match` was given. Such
            leaves are reported by their names on the JAX side.
        hints: where the verdict is semantic, try the changes of `interop.hints.KINDS` on the PyTorch side, and report
            those with which both sides agree. Each takes a call of `torch_fn`, for a network a hundred and more in all;
            where that takes long, a bar is shown.

    Returns:
        The report; `print` shows it. A function that fails in float64 but not in float32 (a bfloat16 kernel), results
        of a hard-coded lower precision, and randomness make it inconclusive and are named, with the errors
        that can be measured. Casts to float32 inside, as attention and norms have them, are named, and left out of the
        float64 runs where they would hide whether the sides agree; its constants cannot be.

    Raises:
        ValueError: results of different trees or shapes, or without arrays; integers that JAX cannot hold without x64;
            a dict that has only some of the pair's names.
        TypeError: not functions; inputs or results that hold something other than arrays, or traced ones.
        Exception: what a function raises in both precisions, with a note that says which side.

    Example:
        >>> import jax, numpy as np, torch
        >>> from funcreg import interop
        >>> x = np.linspace(-3, 3, 50)
        >>> report = interop.check(torch.nn.functional.gelu, jax.nn.gelu, x)  # flax's is the approximation by tanh
        >>> print(report.verdict, f"{report.leaves[0].float64.absolute:.1e}")
        semantic 4.7e-04
        >>> exact = interop.check(torch.nn.functional.gelu, lambda x: jax.nn.gelu(x, approximate=False), x)
        >>> print(exact.verdict)
        rounding
    """
    sides = sides_of("check", pair)
    leaves, reasons = compared(*sides, torch_fn, jax_fn, inputs)
    report = summed_up(leaves, reasons, Verdict.INCONCLUSIVE if reasons else Verdict.ROUNDING)
    if not hints or report.verdict is not Verdict.SEMANTIC:
        return report
    return replace(report, hints=hints_of(CheckTrial(*sides, torch_fn, jax_fn, inputs), report))


def sides_of(where: str, pair: Pair | None) -> tuple[TorchSide, JaxSide]:
    carrier = None if pair is None else Carrier(pair)
    return TorchSide(where, carrier), JaxSide(where, carrier)


def compared(
    torch_side: TorchSide,
    jax_side: JaxSide,
    torch_fn: Callable[..., Tree],
    jax_fn: Callable[..., Tree],
    inputs: tuple[Tree, ...],
) -> tuple[list[Leaf], list[str]]:
    """The leaves of both sides, judged, and why the whole is inconclusive, if it is."""
    for name, function in (("torch_fn", torch_fn), ("jax_fn", jax_fn)):
        if not callable(function):
            raise TypeError(f"{torch_side.called_by}: {name} must be a function, got {type(function).__name__}")
    leaves, reasons, coarse = _compared(torch_side, jax_side, torch_fn, jax_fn, inputs)
    if coarse and not reasons and any(leaf.verdict is Verdict.INCONCLUSIVE for leaf in leaves.values()):
        ours = TorchSide(torch_side.called_by, torch_side.carrier, lifted=True)
        theirs = JaxSide(jax_side.called_by, jax_side.carrier, lifted=True)
        try:
            again, failed, _ = _compared(ours, theirs, torch_fn, jax_fn, inputs)
        except Exception:  # what cannot be run without its casts stays as it is
            again, failed = {}, []
        for name in leaves if not failed else ():
            leaves[name] = in_place_of(leaves[name], again.get(name))
    return list(leaves.values()), reasons


def _compared(
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
            raise self.failed
        if self.failed is not None:
            self.reasons.append(f"the {self.side.name} side fails in float64: {brief(self.failed)}")


def brief(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200] if first else ''}"

"""`check`: do a PyTorch function and a JAX function compute the same thing?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ._called import compared_as_given
from ._carry import Carrier
from ._compare import RANDOM
from ._judged import in_place_of
from ._measure import compare
from ._sides import JaxSide, TorchSide
from .arrays import outside_compilation
from .hints import CheckTrial, hints_of
from .pair import Pair
from .report import Leaf, Report, summed_up
from .verdict import Verdict

Tree = Any

LIFTED = "with these casts left out the sides were compared in float64"
FLUSHED = (
    "PyTorch computes with numbers below 2.2e-308, which XLA takes for zero; the sides were compared with these taken "
    "for zero on both"
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
            `nnx.state(model, nnx.Param)`; a dict of the whole state, where there are buffers, to what `match` was
            given. Such leaves are reported by their names on the JAX side.
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
    functions = torch_fn, jax_fn
    leaves, reasons, coarse = compared_as_given(torch_side, jax_side, *functions, inputs)
    if coarse and not reasons and any(leaf.verdict is Verdict.INCONCLUSIVE for leaf in leaves.values()):
        ours = TorchSide(torch_side.called_by, torch_side.carrier, lifted=True)
        theirs = JaxSide(jax_side.called_by, jax_side.carrier, lifted=True)
        _reconsider(leaves, LIFTED, ours, theirs, functions, inputs)
    settled = all(leaf.verdict is Verdict.ROUNDING for leaf in leaves.values())
    if not (settled or reasons) and _has_subnormals(torch_side, torch_fn, inputs):
        ours = TorchSide(torch_side.called_by, torch_side.carrier, flushing=True)
        _reconsider(leaves, FLUSHED, ours, jax_side, functions, inputs)
    return list(leaves.values()), reasons


def _reconsider(
    leaves: dict[str, Leaf],
    why: str,
    torch_side: TorchSide,
    jax_side: JaxSide,
    functions: tuple[Callable[..., Tree], Callable[..., Tree]],
    inputs: tuple[Tree, ...],
) -> None:
    """Compare the sides anew, in another way, for a verdict on those leaves that are not settled."""
    try:
        again, reasons, _ = compared_as_given(torch_side, jax_side, *functions, inputs)
    except Exception:  # what cannot be run in this way stays as it is
        return
    for name, leaf in leaves.items() if not reasons else ():
        if leaf.verdict is not Verdict.ROUNDING and name in again:
            leaves[name] = in_place_of(leaf, again[name], why)


def _has_subnormals(side: TorchSide, function: Callable[..., Tree], inputs: tuple[Tree, ...]) -> bool:
    """Whether PyTorch's results in float64 change by more than rounding when subnormal numbers are taken for zero."""
    flushing = TorchSide(side.called_by, side.carrier, flushing=True)
    before, after = side.call(function, inputs, 64), flushing.call(function, inputs, 64)
    if isinstance(before, Exception) or isinstance(after, Exception) or before.keys() != after.keys():
        return False
    found = (compare(x, after[name]) for name, x in before.items())
    return any(both.apart.any() or both.errors.relative > RANDOM for both in found)

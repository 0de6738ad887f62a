"""`check`: do a PyTorch function and a JAX function compute the same thing?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ._carry import Carrier
from ._compare import Results, leaf_of
from ._leaves import same_names
from ._nudge import DRAWS
from ._sides import JaxSide, Side, TorchSide
from .arrays import outside_compilation
from .hints import CheckTrial, hints_of
from .pair import Pair
from .report import Report, summed_up
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
    dotted names; `interop.verdict` has the rules.

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
        of a hard-coded lower precision, and randomness make it inconclusive and are named, with the errors that can be
        measured.

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
    where = "check"
    for name, function in (("torch_fn", torch_fn), ("jax_fn", jax_fn)):
        if not callable(function):
            raise TypeError(f"{where}: {name} must be a function, got {type(function).__name__}")
    carrier = None if pair is None else Carrier(pair)
    reasons: list[str] = []
    torch_side, jax_side = TorchSide(where, carrier), JaxSide(where, carrier)
    ours = _results(torch_side, torch_fn, inputs, reasons)
    theirs = _results(jax_side, jax_fn, inputs, reasons)
    for a, b in ((ours.float64, theirs.float64), (ours.float32, theirs.float32)):
        if a is not None and b is not None:
            same_names(where, a, b)
    names = _names(ours, theirs)
    if names is None:  # one side has float64 only and the other float32 only
        return Report(Verdict.INCONCLUSIVE, (), tuple(reasons))
    at_least = Verdict.INCONCLUSIVE if reasons else Verdict.ROUNDING
    report = summed_up([leaf_of(name, ours, theirs) for name in names], reasons, at_least)
    if not hints or report.verdict is not Verdict.SEMANTIC:
        return report
    return replace(report, hints=hints_of(CheckTrial(torch_side, jax_side, torch_fn, jax_fn, inputs), report))


def _results(side: Side, function: Callable[..., Tree], inputs: tuple[Tree, ...], reasons: list[str]) -> Results:
    """All runs of one side; a precision that it fails in is among the reasons."""
    results = Results(side.name)
    failed: dict[int, Exception] = {}
    for bits in (64, 32):
        leaves = side.call(function, inputs, bits)
        if isinstance(leaves, Exception):
            failed[bits] = leaves
        elif bits == 64:
            results.float64 = leaves
        else:
            results.float32 = leaves
    if len(failed) == 2:
        failed[64].add_note(f"{side.where}: raised in float64; in float32: {_brief(failed[32])}")
        raise failed[64]
    for bits, error in failed.items():
        reasons.append(f"the {side.name} side fails in float{bits}: {_brief(error)}")
    if results.float64 is not None:
        again, results.coarse = side.call_again(function, inputs)
        results.repeated(again)
        for draw in range(DRAWS if not results.random else 0):
            leaves = side.call(function, inputs, 64, draw)
            if not isinstance(leaves, Exception):  # what raises beside its inputs has no noise to show
                results.moved(leaves)
    if results.random:
        reasons.append(RANDOMNESS.format(side=side.name))
    return results


def _names(ours: Results, theirs: Results) -> list[str] | None:
    for a, b in ((ours.float64, theirs.float64), (ours.float32, theirs.float32)):
        if a is not None and b is not None:
            return list(b)
    return None


def _brief(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200] if first else ''}"

"""`probes`: inputs on which faults show that a normal draw does not excite; `check_probes`: a check on all of them.

The derivative of `abs` at 0 needs an exact zero, the one of `max` an exact tie, an epsilon small numbers, the threshold
of a softplus large ones, the variance by `mean(x**2) - mean(x)**2` a large mean, the norm of a group a group of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from . import arrays
from ._called import brief
from ._judged import NOTHING
from ._leaves import some
from ._trees import rebuild
from .hints import ProbesTrial, hints_of
from .hints._search import EXPLAINED
from .pair import Pair
from .parity import compared, sides_of
from .report import Leaf, Report, summed_up
from .verdict import Verdict

Tree = Any
Draw = Callable[[np.ndarray], np.ndarray]

# What becomes of numbers drawn from the normal distribution.
INPUTS: dict[str, Draw] = {
    "normal": lambda x: x,
    "zeros": np.zeros_like,
    "negative zeros": lambda x: np.copysign(0.0, x),
    "ties": lambda x: np.clip(np.round(x), -1, 1),  # three values, and 0 is one of them
    "constant": lambda x: np.full_like(x, 0.5),  # a variance that is exactly 0
    "tiny": lambda x: 1e-6 * x,
    "large": lambda x: x + np.copysign(20.0, x),  # where thresholds and saturation begin
    "huge": lambda x: 1e3 * x,  # beyond what exp can hold, in both precisions
    "large mean": lambda x: 1e3 + 1e-2 * x,
}


def _some_zeros(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.where(generator.random(x.shape) < 0.3, 0.0, x)


def _dead_units(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    del generator
    x = x.copy()
    if x.ndim:
        x[1::2], x[..., 1::2] = 0.0, 0.0
    return x


def _ties(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    del generator
    unit = np.sqrt(np.mean(x**2)) if x.any() else 1.0
    return np.round(x / unit) * unit


PARAMETERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "parameters: some zeros": _some_zeros,
    "parameters: dead units": _dead_units,
    "parameters: ties": _ties,
    "parameters: zeros": lambda x, _: 0.0 * x,
}
LONGER = 16


def probes(
    *examples: Tree, params: Tree = None, long_axis: int | None = None, seed: int = 0
) -> dict[str, tuple[Tree, ...]]:
    """Inputs that excite faults, by name, for `check_probes` or one by one for `check`.

    Floats are drawn anew: normal, zeros, negative zeros, ties (three values, 0 among them), constant, tiny (1e-6),
    large (20 and more), huge (1e3), large mean (1e3 with a deviation of 1e-2); where there are bools, also all true and
    all false, with normal floats. Integers, such as labels, Python numbers and None stay as in the example, since
    nobody but you knows which are allowed.

    Args:
        examples: one for each input of the functions: an array, a tree of arrays, or a shape, a tuple of integers.
        params: parameters, which come before the other inputs. They stay as they are, but in four more probes, with
            normal inputs: exact zeros in three of ten entries; every second unit zero, along the first axis and the
            last; entries rounded to a few values, which tie; all zeros.
        long_axis: an axis of every array of the examples; adds `long`, with normal floats, 16 times as long there.
        seed: of the draws.

    Returns:
        By name, the tuple of inputs, NumPy arrays in float64.

    Raises:
        ValueError: neither examples nor params; an array without `long_axis`.
        TypeError: what is no tree of arrays.

    Example:
        >>> from funcreg import interop
        >>> found = interop.probes((4, 3))
        >>> list(found)
        ['normal', 'zeros', 'negative zeros', 'ties', 'constant', 'tiny', 'large', 'huge', 'large mean']
        >>> print(found["ties"][0][0])
        [ 0. -0.  1.]
    """
    where = "probes"
    if not examples and params is None:
        raise ValueError(f"{where}: pass an example of each input, an array, a tree of arrays or a shape; or params=")
    shaped = tuple(np.zeros(x) if _is_shape(x) else x for x in examples)
    front = () if params is None else (params,)
    generator = np.random.default_rng(seed)
    kinds: set[str] = set()

    def drawn(x: np.ndarray) -> np.ndarray:
        kinds.add(x.dtype.kind)
        return generator.normal(size=x.shape) if x.dtype.kind == "f" else x

    normal = _mapped(where, shaped, drawn)

    def made(change: Draw, kinds: str = "f") -> tuple[Tree, ...]:
        return (*front, *_mapped(where, normal, lambda x: change(x) if x.dtype.kind in kinds else x))

    found = {name: made(change) for name, change in INPUTS.items() if name == "normal" or "f" in kinds}
    if "b" in kinds:
        found |= {"all true": made(np.ones_like, "b"), "all false": made(np.zeros_like, "b")}
    if long_axis is not None:
        found["long"] = made(lambda x: _lengthened(x, long_axis, generator), "fbiu")
    if params is not None:
        for name, change in PARAMETERS.items():
            changed = _mapped(where, params, lambda x, f=change: f(x, generator) if x.dtype.kind == "f" else x)
            found[name] = (changed, *normal)
    return found


def check_probes(
    torch_fn: Callable[..., Tree],
    jax_fn: Callable[..., Tree],
    probes: Mapping[str, tuple[Tree, ...]],
    pair: Pair | None = None,
    hints: bool = True,
) -> Report:
    """`check` on every probe, as one report; its leaves are named `probe/leaf`.

    What is infinite or NaN on both sides alike, such as the exponential of huge inputs, is no part of the verdict: a
    leaf without any other entry is left out, and the reasons say so. A probe on which a side raises is named and makes
    the report inconclusive, if no other one shows a difference.

    Args:
        torch_fn, jax_fn, pair: as of `check`.
        probes: inputs by name, as `interop.probes` makes them; add your own.
        hints: as in `check`; a change is a hint where both sides agree with it on every probe that was compared, but
            for those on which rounding alone keeps them from twelve digits, such as `large mean`.

    Returns:
        The report; its reasons carry the name of the probe, by which `check` can be called on it alone.

    Raises:
        ValueError: no probes; else as `check`.
        Exception: what a function raises on every probe.

    Example:
        >>> import jax, jax.numpy as jnp, torch
        >>> from funcreg import interop
        >>> ours = torch.func.grad(lambda w: w.abs().sum())
        >>> theirs = jax.grad(lambda w: jnp.sum(jnp.abs(w)))
        >>> print(interop.check(ours, theirs, *interop.probes((4, 3))["normal"]).verdict)
        rounding
        >>> report = interop.check_probes(ours, theirs, interop.probes((4, 3)))
        >>> print(report.verdict, sorted(leaf.name for leaf in report.leaves if leaf.verdict == "semantic"))
        semantic ['negative zeros/(result)', 'ties/(result)', 'zeros/(result)']
        >>> print([hint.kind for hint in report.hints])
        ['subgradient']
    """
    where = "check_probes"
    if not probes:
        raise ValueError(f"{where}: probes is empty; pass what interop.probes makes, or inputs by name")
    found: dict[str, list[Leaf]] = {}
    reasons: list[str] = []
    raised: dict[str, Exception] = {}
    trusted = True
    for probe, inputs in probes.items():
        try:
            of_probe, why = compared(*sides_of(f"{where}, {probe}", pair), torch_fn, jax_fn, inputs)
        except Exception as error:
            raised[probe] = error
            continue
        trusted = trusted and not why
        nothing = [leaf.name for leaf in of_probe if NOTHING in leaf.reason]
        if nothing:
            why.append(f"no part of the verdict, as infinite or NaN everywhere on both sides: {some(nothing)}")
        found[probe] = [leaf for leaf in of_probe if leaf.name not in nothing]
        reasons += [f"{probe}: {reason}" for reason in why]
    if len(raised) == len(probes):
        raise next(iter(raised.values()))
    reasons += [f"{probe}: not compared, it raises {brief(error)}" for probe, error in raised.items()]
    leaves = [replace(leaf, name=f"{probe}/{leaf.name}") for probe, mine in found.items() for leaf in mine]
    sure = trusted and not raised and leaves
    report = summed_up(leaves, reasons, Verdict.ROUNDING if sure else Verdict.INCONCLUSIVE)
    if not hints or report.verdict is not Verdict.SEMANTIC:
        return report
    told = [probe for probe in found if all(_has_digits(leaf) for leaf in found[probe])]
    apart = [probe for probe in told if any(leaf.verdict is Verdict.SEMANTIC for leaf in found[probe])]
    if not apart:
        return report
    told = [*apart, *(probe for probe in told if probe not in apart)]  # most changes are done with after one call
    leaves = [replace(leaf, step=i) for i, probe in enumerate(told, start=1) for leaf in found[probe]]
    inputs = tuple(probes[probe] for probe in told)
    trial = ProbesTrial(*sides_of(where, pair), torch_fn, jax_fn, inputs, differing=len(apart))
    return replace(report, hints=hints_of(trial, replace(report, leaves=tuple(leaves))))


def _has_digits(leaf: Leaf) -> bool:
    """Whether what an ulp in the inputs does to this leaf is far less than what a hint may leave of a difference."""
    excess = leaf.judgement.excess if leaf.judgement else None
    return not excess or leaf.float64 is None or leaf.float64.relative / excess < EXPLAINED / 10


def _is_shape(x: Any) -> bool:
    return type(x) is tuple and all(type(n) is int for n in x)


def _mapped(where: str, tree: Tree, change: Draw) -> Tree:
    """Every array of a tree changed, floats of all precisions as float64."""

    def convert(name: str, leaf: Any) -> np.ndarray:
        x = np.asarray(arrays.to_host(leaf))
        if x.dtype.kind not in "biufcV":
            raise TypeError(f"{where}: {name} is an array of {x.dtype}; inputs are arrays of numbers")
        return change(x.astype(np.float64) if x.dtype.kind in "fV" else x)

    return rebuild(where, tree, convert)


def _lengthened(x: np.ndarray, axis: int, generator: np.random.Generator) -> np.ndarray:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"probes: long_axis is {axis}, but an example has the shape {x.shape}; every array needs it")
    long = np.concatenate([x] * LONGER, axis)
    return generator.normal(size=long.shape) if x.dtype.kind == "f" else long

"""Losses: what is averaged, what counts, and factors."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._calls import Call, Option, Rule

# Where `reduction` stands.
_REDUCTIONS = {
    "mse_loss": 4,
    "l1_loss": 4,
    "smooth_l1_loss": 4,
    "huber_loss": 2,
    "binary_cross_entropy": 5,
    "binary_cross_entropy_with_logits": 5,
    "kl_div": 4,
    "cross_entropy": 6,
    "nll_loss": 6,
    "poisson_nll_loss": 7,
    "gaussian_nll_loss": 5,
    "cosine_embedding_loss": 6,
    "margin_ranking_loss": 6,
    "soft_margin_loss": 4,
    "hinge_embedding_loss": 5,
}
_SMOOTHINGS = (0.1, 0.0, 0.05, 0.2, 0.01, 0.15, 0.3, 0.02, 0.25, 0.4, 0.5)
_LABELS = 16  # different labels that are tried as the one that is ignored


def _subsets(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Of axes 0, 1, ...: all of them first; of many, only a few at either end."""
    axes = range(len(sizes))
    if len(sizes) <= 3:
        chosen = [s for n in range(len(sizes), 0, -1) for s in itertools.combinations(axes, n)]
    else:
        chosen = [tuple(axes), tuple(axes[1:]), tuple(axes[2:]), (0,), (0, 1), tuple(axes[-1:])]
    yield from (subset for subset in chosen if math.prod(sizes[i] for i in subset) > 1)


def _over(call: Call, sizes: tuple[int, ...], mean: bool) -> Iterator[Option]:
    for subset in _subsets(sizes):
        n = math.prod(sizes[i] for i in subset)
        which = (
            "all"
            if len(subset) == len(sizes)
            else f"{'axis' if len(subset) == 1 else 'axes'} " + ", ".join(map(str, subset))
        )
        now = f"takes the {'mean' if mean else 'sum'} over {which} ({n} entries) in {call.name}"
        then = (
            f"the {'sum' if mean else 'mean'} over {which}" if which != "all" else ("the sum" if mean else "the mean")
        )
        run = functools.partial(_times, call, float(n) if mean else 1.0 / n)
        yield Option((mean, subset), now, then, run)


def _times(call: Call, factor: float) -> Any:
    return call() * factor


def _mean_or_sum(call: Call) -> Iterator[Option]:
    x, dim = call.args[0], call.get("dim", 1, call.kwargs.get("axis"))
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return
    dims = range(x.ndim) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    axes = sorted(d % x.ndim for d in dims)
    for option in _over(call, tuple(x.shape[d] for d in axes), call.name == "mean"):
        mean, subset = option.key  # pyright: ignore[reportGeneralTypeIssues]
        yield option._replace(key=(mean, tuple(axes[i] for i in subset)))


def _divided(call: Call) -> Iterator[Option]:
    """A mean by hand: a sum that is divided by a whole number."""
    n = call.args[1]
    if type(n) is int and n > 2 and call.of_sums:
        yield Option("divided", f"divides by {n}, as for a mean", "no division", lambda: call.args[0])


def _reduced_loss(call: Call) -> Iterator[Option]:
    reduction = call.get("reduction", _REDUCTIONS[call.name], "mean")
    if reduction not in ("mean", "sum", "batchmean"):
        return
    position, x = _REDUCTIONS[call.name], call.args[0]
    target = call.args[1] if len(call.args) > 1 else call.kwargs["target"]
    by_class = call.name in ("cross_entropy", "nll_loss")
    if not by_class:
        sizes = tuple(x.shape)
        if reduction == "batchmean":
            yield from _over(call, sizes[:1], True)
            for option in _over(call, sizes[1:], False):
                yield option._replace(key=("batchmean", option.key), then="the mean over all")
        else:
            yield from _over(call, sizes, reduction == "mean")
        return
    sizes = tuple(target.shape) if not target.is_floating_point() else (x.shape[0], *x.shape[2:])
    if reduction == "sum":
        yield from _over(call, sizes, False)
        return
    total = functools.partial(call.replaced, "reduction", position, "sum")
    n = math.prod(sizes)
    if n > 1:
        now = f"takes the mean over all ({n} entries) in {call.name}"
        yield Option((True, "all"), now, "the sum", total)
        yield from (o for o in _over(call, sizes, True) if o.key != (True, tuple(range(len(sizes)))))


def _smoothing(call: Call) -> Iterator[Option]:
    old = call.get("label_smoothing", 7, 0.0)
    for new in _SMOOTHINGS:
        if new != old:
            run = functools.partial(call.replaced, "label_smoothing", 7, new)
            said = f"label_smoothing={old:g}" if old else "no label smoothing"
            then = f"label_smoothing={new:g}" if new else "none"
            yield Option((old, new), f"uses {said} in cross_entropy", then, run)


def _ignored(call: Call) -> Iterator[Option]:
    target = call.get("target", 1)
    if target.is_floating_point():
        return
    old, classes = call.get("ignore_index", 4, -100), call.args[0].shape[1 if call.args[0].ndim > 1 else 0]
    mean = call.get("reduction", _REDUCTIONS[call.name], "mean") == "mean"
    try:
        labels = [int(i) for i in target.unique()]
    except RuntimeError:  # under vmap a label has no value
        labels = [0, classes - 1, -1]
    if old in labels:
        now = f"leaves out entries of label {old} (ignore_index) in {call.name}"
        if 0 <= old < classes:
            yield Option(("all", old), now, "all of them", functools.partial(call.replaced, "ignore_index", 4, -100))
        if mean:
            yield Option(("counted", old), now, "these as zeros that count in the mean", lambda: _counted(call, old))
        return
    for label in sorted(labels, key=lambda i: (i not in (0, classes - 1), i))[:_LABELS]:
        now = f"leaves out no labels in {call.name}"
        run = functools.partial(call.replaced, "ignore_index", 4, label)
        yield Option(("ignore", label), now, f"ignore_index={label}", run)
        if mean:
            then = f"ignore_index={label}, whose entries count in the mean as zeros,"
            yield Option(("ignore, counted", label), now, then, functools.partial(_counted, call, label))


def _counted(call: Call, label: int) -> Tensor:
    kwargs = {**call.kwargs, "ignore_index": label, "reduction": "sum"}
    return call.function(*call.args[:3], **kwargs) / call.get("target", 1).numel()


_SCALED = ("sum", "mean", *_REDUCTIONS)


def _factors(call: Call) -> Iterator[Option]:
    for factor in (2.0, 0.5):
        run = functools.partial(_times, call, factor)
        words = "twice" if factor == 2 else "half of"
        if call.name in _SCALED:
            yield Option(factor, f"takes {call.name}", f"{words} it", run)
            continue
        number = next((x for x in call.args[:2] if isinstance(x, (int, float)) and not isinstance(x, bool)), None)
        if number is not None:
            verb = "multiplies" if call.name == "mul" else "divides"
            yield Option((call.name, number, factor), f"{verb} by {number:g}", f"{words} the result", run)


RULES = (
    Rule("mean_or_sum", ("mean", "sum"), _mean_or_sum, sized=True),
    Rule("mean_or_sum", tuple(_REDUCTIONS), _reduced_loss, sized=True),
    Rule("mean_or_sum", ("div",), _divided, sized=True),
    Rule("label_smoothing", ("cross_entropy",), _smoothing),
    Rule("ignore_index", ("cross_entropy", "nll_loss"), _ignored),
    Rule("factor", (*_SCALED, "mul", "div"), _factors, sized=True),
)

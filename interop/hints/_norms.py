"""Norms and variances: the small number in a denominator, and by what a sum of squares is divided."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._calls import Call, Option, Rule
from ._changes import rerun

# Of PyTorch's and flax's layers, of optimizers of both, and those that ports write by hand.
EPSILONS = (1e-6, 1e-5, 1e-8, 1e-3, 1e-12, 1e-7, 1e-4, 1e-10, 1e-9, 2.0**-23, 0.0)
_POSITIONS = {
    "layer_norm": 4,
    "group_norm": 4,
    "batch_norm": 7,
    "instance_norm": 7,
    "rms_norm": 3,
    "normalize": 3,
    "cosine_similarity": 3,
    "pairwise_distance": 3,
}
_SUMS = ("add", "add_", "_foreach_add_", "_foreach_add", "clamp", "clamp_min")


def _eps_of_layers(call: Call) -> Iterator[Option]:
    position = _POSITIONS[call.name]
    default = 1e-12 if call.name == "normalize" else 1e-8 if call.name == "cosine_similarity" else 1e-5
    old = call.get("eps", position, None if call.name == "rms_norm" else default)
    said = "the eps of its dtype" if old is None else f"eps={old:g}"
    for new in EPSILONS:
        if new != old:
            run = functools.partial(call.replaced, "eps", position, new)
            yield Option((call.name, old, new), f"uses {said} in {call.name}", f"eps={new:g}", run)


def _eps_by_hand(call: Call) -> Iterator[Option]:
    """`x + 1e-5` and `clamp(x, min=1e-12)`: a number that is small enough to be an epsilon."""
    bound = call.name.startswith("clamp")
    if bound:
        name, position = "min", 1
    else:
        position = 0 if isinstance(call.args[0], float) else 1
        name = "other"
    old = call.get(name, position)
    if not (isinstance(old, float) and 0 < old <= 1e-2):
        return
    what = f"bounds a number by {old:g} from below" if bound else f"adds {old:g}"
    for new in EPSILONS:
        if new != old:
            run = functools.partial(call.replaced, name, position, new)
            yield Option((what, new), what, f"{new:g}", run)
    if not bound:
        yield from _places(call, old, call.args[1 - position])


def _places(call: Call, eps: float, x: Any) -> Iterator[Option]:
    """`sqrt(x) + eps`, `sqrt(x + eps)` and both: made of one another by what is returned in place of this sum."""
    if not all(bool((one >= 0).all()) for one in _listed(x)):  # no root, and nothing to take a root of
        return
    what = f"adds {eps:g}"

    def option(key: Any, now: str, then: str, each: Callable[[Tensor], Tensor]) -> Option:
        return Option((what, key), f"{what} {now}", then, lambda: _in_place_of(call, x, each))

    yield option("under", "to a root", "that added under it", lambda y: (y * y + eps).sqrt())
    yield option("beside", "under a root", "that added to it", lambda y: (y.sqrt() + eps) ** 2)
    for root in EPSILONS if call.name.endswith("_") else ():  # as of optimizers, of which some have both
        then = f"{root:g} added under it as well"
        yield option(("both", root), "to a root", then, lambda y, root=root: (y * y + root).sqrt() + eps)


def _in_place_of(call: Call, x: Any, each: Callable[[Tensor], Tensor]) -> Any:
    """What the call would have returned if it computed this of every array."""
    new = [each(one) for one in _listed(x)]
    if call.name.endswith("_"):
        for old, one in zip(_listed(x), new, strict=True):
            old.copy_(one)
        return x
    return new if isinstance(x, (list, tuple)) else new[0]


def _listed(x: Any) -> Any:
    return x if isinstance(x, (list, tuple)) else [x]


def under_the_root(eps: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The change of a function that adds this number to roots: it is added under them."""
    return rerun(_BY_HAND, (f"adds {eps:g}", "under"))


def _variance(call: Call) -> Iterator[Option]:
    flags = [x for x in call.args[1:3] if isinstance(x, bool)]
    given = call.kwargs.get("correction", call.kwargs.get("unbiased", flags[0] if flags else 1))
    old = 1 if given is None else int(given)
    if old not in (0, 1):
        return
    words = ("divides the sum of squares by n (a biased variance)", "divides the sum of squares by n - 1 (unbiased)")
    then = ("by n", "by n - 1")

    def run() -> Any:
        out = call()
        both = isinstance(out, tuple)
        x, result = call.args[0], out[0] if both else out
        n = x.numel() // max(result.numel(), 1)
        factor = (n - 1) / n if old else n / (n - 1)
        new = result * (math.sqrt(factor) if call.name.startswith("std") else factor)
        return (new, out[1]) if both else new

    yield Option(old, f"{words[old]} in {call.name}", then[1 - old], run)


def _covariance(call: Call) -> Iterator[Option]:
    old = call.kwargs.get("correction", 1)
    if old in (0, 1):
        by = ("by n (a biased covariance)", "by n - 1 (unbiased)")
        run = functools.partial(call.replaced, "correction", len(call.args), 1 - old)
        yield Option(old, f"divides the sum of products {by[old]} in cov", ("by n", "by n - 1")[1 - old], run)


def _variance_by_hand(call: Call) -> Iterator[Option]:
    """`sum(...) / n` and `sum(...) / (n - 1)`."""
    if call.of_sums:
        yield from _next_to(call)


def _other_count(call: Call) -> Iterator[Option]:
    """The same of what is no sum: steps between two ends, levels of a pixel."""
    if not call.of_sums:
        yield from _next_to(call)


def _next_to(call: Call) -> Iterator[Option]:
    n = call.args[1]
    if type(n) is int and n > 2:
        for new in (n - 1, n + 1):
            run = functools.partial(call.replaced, "other", 1, new)
            yield Option((new - n,), f"divides by {n}", f"{new}", run)


def _running_variance(call: Call) -> Iterator[Option]:
    """PyTorch's batch norm keeps an average of unbiased variances, flax's one of biased ones; both divide by biased."""
    running, momentum = call.get("running_var", 2), call.get("momentum", 6, 0.1)
    if call.name == "instance_norm" or running is None or not call.get("training", 5, False):
        return

    def run() -> Tensor:
        x = call.args[0]
        n = x.numel() // x.shape[1]
        kept = running.clone() * (1 - momentum)
        out = call()
        with torch.no_grad():
            running.copy_(kept + (running - kept) * ((n - 1) / n))
        return out

    now = "averages unbiased variances (by n - 1) in batch_norm's running_var"
    yield Option("running", now, "biased ones (by n)", run)


_BY_HAND = Rule("eps", _SUMS, _eps_by_hand)

RULES = (
    Rule("eps", tuple(_POSITIONS), _eps_of_layers),
    _BY_HAND,
    Rule("biased_variance", ("var", "std", "var_mean", "std_mean"), _variance, sized=True),
    Rule("biased_variance", ("cov",), _covariance, sized=True),
    Rule("biased_variance", ("div",), _variance_by_hand, sized=True),
    Rule("off_by_one", ("div",), _other_count, sized=True),
    Rule("biased_variance", ("batch_norm",), _running_variance, sized=True),
)

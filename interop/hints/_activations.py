"""Activations, masks, and derivatives where there is none."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._calls import Call, Option, Rule


def _gelu(call: Call) -> Iterator[Option]:
    words = {"none": "exactly, by erf", "tanh": "by its approximation with tanh"}
    old = call.get("approximate", 1, "none")
    new = "tanh" if old == "none" else "none"
    run = functools.partial(call.replaced, "approximate", 1, new)
    yield Option(old, f"computes gelu {words[old]}", f"gelu {words[new]},", run)


def _erf(call: Call) -> Iterator[Option]:
    """Of `x / sqrt(2)`, as in a gelu by hand; `ndtr(x)` is half of 1 and this."""
    half = call.name == "special_ndtr"

    def run() -> Tensor:
        x = call.args[0] * (1.0 if half else math.sqrt(2))
        y = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * (1 + y) if half else y

    what = "ndtr" if half else "erf"
    yield Option(what, f"computes {what}, as in an exact gelu", "the approximation of gelu with tanh,", run)


def _masks(call: Call) -> Iterator[Option]:
    for name, position in _MASKS[call.name]:
        mask = call.get(name, position)
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            run = functools.partial(call.replaced, name, position, ~mask)
            if _leaves_nothing(call, ~mask):
                run = functools.partial(_uniform, call, name, position, ~mask)
            now = f"reads a mask of bools in {call.name} as it is"
            yield Option((call.name, name), now, "its opposite", run)


def _leaves_nothing(call: Call, mask: Tensor) -> bool:
    """Whether a softmax has nothing left in a row: NaN, in flax all weights the same. So it is with the opposite of a
    causal mask."""
    fills = call.name.startswith("masked_fill")
    if fills and call.get("value", 2) != -math.inf:
        return False
    out = ~mask if call.name == "scaled_dot_product_attention" else mask
    return bool(out.all(-1).any())


def _uniform(call: Call, name: str, position: int, mask: Tensor) -> Any:
    """The call with another mask, and a huge number in place of an infinity."""
    x = call.args[0] if call.args else call.get("query", 0)
    least = torch.finfo(x.dtype).min / 4
    if call.name.startswith("masked_fill"):
        return call.function(x, mask, least)
    out = ~mask if call.name == "scaled_dot_product_attention" else mask
    return call.replaced(name, position, torch.zeros_like(mask, dtype=x.dtype).masked_fill(out, least))


_MASKS = {
    "scaled_dot_product_attention": (("attn_mask", 3),),
    "multi_head_attention_forward": (("key_padding_mask", 14), ("attn_mask", 16)),
    "masked_fill": (("mask", 1),),
    "masked_fill_": (("mask", 1),),
    "where": (("condition", 0),),
}


def _computed(call: Call) -> Iterator[Option]:
    """A mask of bools that is multiplied, or made a number."""
    for position, x in enumerate(call.args[:2]):
        if isinstance(x, Tensor) and x.dtype == torch.bool:
            run = functools.partial(call.replaced, "", position, ~x)
            yield Option((call.name, position), f"reads a mask of bools in {call.name} as it is", "its opposite", run)


def _choice(call: Call) -> Iterator[Option]:
    """`where(condition, a, b)`, also as a method, whose first argument is then `a`."""
    if len(call.args) != 3:
        return
    args = call.args
    condition = 0 if isinstance(args[0], Tensor) and args[0].dtype == torch.bool else 1
    new = tuple(~x if i == condition else x for i, x in enumerate(args))
    now = "reads a mask of bools in where as it is"
    yield Option("where", now, "its opposite", lambda: call.function(*new))


# --- derivatives at kinks: the same values, written so that the derivative there is another one ---


def _at(kink: str, old: str, new: str, run: Callable[[], Any], key: Any = None) -> Option:
    return Option((kink, new, key), f"takes {old} as the derivative of {kink}", new, run)


def _abs_upwards(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, -x)


def _abs(call: Call) -> Iterator[Option]:
    yield _at("abs at 0", "0", "1", lambda: _abs_upwards(call.args[0]))


def _l1_loss(call: Call) -> Iterator[Option]:
    reduction = call.get("reduction", 4, "mean")

    def run() -> Tensor:
        each = _abs_upwards(call.args[0] - call.args[1])
        return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()

    yield _at("the distance at 0 in l1_loss", "0", "1", run)


def _norm(call: Call) -> Iterator[Option]:
    x, order = call.args[0], call.get("p", 1, call.kwargs.get("ord"))
    dim, keepdim = call.get("dim", 2, call.kwargs.get("axis")), call.get("keepdim", 3, False)

    def over(each: Tensor) -> Tensor:
        return each.sum() if dim is None else each.sum(dim, keepdim=keepdim)

    spectral = call.name == "linalg_norm" and order == 2 and x.ndim == 2 and dim is None
    if order in (None, 2, 2.0, "fro") and not spectral:
        yield _at("a Euclidean norm at 0", "0", "NaN", lambda: over(x * x).sqrt())
    elif order in (1, 1.0) and not (call.name == "linalg_norm" and x.ndim == 2 and dim is None):
        yield _at("a norm of absolute values at 0", "0", "1", lambda: over(_abs_upwards(x)))


def _sqrt(call: Call) -> Iterator[Option]:
    x = call.args[0]

    def run() -> Tensor:  # at 0 neither root is of an entry, so that no infinite derivative is multiplied by 0
        zero = x == 0
        return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())

    yield _at("sqrt at 0", "infinity", "0", run)


def _relu(call: Call) -> Iterator[Option]:
    x = call.args[0]
    zero = torch.zeros_like(x)
    yield _at("relu at 0", "0", "1/2", lambda: torch.maximum(x, zero))
    yield _at("relu at 0", "0", "1", lambda: torch.where(x < 0, zero, x))  # at NaN it stays 1


def _leaky_relu(call: Call) -> Iterator[Option]:
    x, slope = call.args[0], call.get("negative_slope", 1, 0.01)
    yield _at("leaky_relu at 0", f"{slope:g}", "1", lambda: torch.where(x >= 0, x, slope * x))


def _clamp(call: Call) -> Iterator[Option]:
    defaults = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}.get(call.name, (None, None))
    low = call.get("min", 1, defaults[0])
    high = call.get("max", 2, defaults[1])
    if call.name == "hardtanh":
        low, high = call.get("min_val", 1, -1.0), call.get("max_val", 2, 1.0)
    elif call.name == "relu6":
        low, high = defaults
    elif call.name == "clamp_max":
        low, high = None, call.get("max", 1)
    x = call.args[0]

    def half() -> Tensor:
        y = x if low is None else torch.maximum(x, _like(low, x))
        return y if high is None else torch.minimum(y, _like(high, x))

    def none() -> Tensor:
        y = x if low is None else torch.where(x > low, x, _like(low, x))
        return y if high is None else torch.where(y < high, y, _like(high, x))

    def whole() -> Tensor:
        y = x if low is None else torch.where(x >= low, x, _like(low, x))
        return y if high is None else torch.where(y <= high, y, _like(high, x))

    inside = call.name.startswith("clamp")
    for new, changed in (("1/2", half), ("0" if inside else "1", none if inside else whole)):
        run = functools.partial(_but_at_nan, x, call, changed)
        yield _at(f"{call.name} at its bounds", "1" if inside else "0", new, run)


def _but_at_nan(x: Tensor, call: Call, changed: Callable[[], Tensor]) -> Tensor:
    """At NaN the derivative stays: it is no kink, and libraries differ there as well."""
    return torch.where(x.isnan(), call(), changed())


def _like(bound: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=x.dtype, device=x.device).expand_as(x)


def _maximum(call: Call) -> Iterator[Option]:
    a, b = (call.get("input", 0), call.get("other", 1))
    wins = torch.ge if call.name == "maximum" else torch.le
    beats = torch.gt if call.name == "maximum" else torch.lt
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield _at(f"{call.name} at a tie", "1/2", "1 for the first", lambda: torch.where(wins(a, b), a, b))
        yield _at(f"{call.name} at a tie", "1/2", "1 for the second", lambda: torch.where(beats(a, b), a, b))


def _largest(call: Call) -> Iterator[Option]:
    """`max` over an axis gives the derivative to one entry, `amax` to all that are as large."""
    x, dim = call.args[0], call.get("dim", 1)
    if not isinstance(dim, int):
        return
    keepdim = call.get("keepdim", 2, False)
    if call.name in ("max", "min"):
        shared = torch.amax if call.name == "max" else torch.amin

        def run() -> Any:
            out = call()
            return type(out)((shared(x, dim, keepdim=keepdim), out.indices))

        yield _at(f"{call.name} at a tie", "1 for one entry", "equal shares for all", run)
    else:
        first = torch.max if call.name == "amax" else torch.min
        yield _at(
            f"{call.name} at a tie", "equal shares", "1 for one entry", lambda: first(x, dim, keepdim=keepdim).values
        )


_KINKS: dict[Callable[[Call], Iterator[Option]], tuple[str, ...]] = {
    _abs: ("abs", "absolute"),
    _l1_loss: ("l1_loss",),
    _norm: ("norm", "linalg_norm", "linalg_vector_norm"),
    _sqrt: ("sqrt",),
    _relu: ("relu", "relu_"),
    _leaky_relu: ("leaky_relu",),
    _clamp: ("clamp", "clamp_min", "clamp_max", "hardtanh", "relu6"),
    _maximum: ("maximum", "minimum"),
    _largest: ("max", "min", "amax", "amin"),
}

RULES = (
    Rule("gelu", ("gelu",), _gelu),
    Rule("gelu", ("erf", "special_erf", "special_ndtr"), _erf),
    Rule("mask_polarity", tuple(name for name in _MASKS if name != "where"), _masks),
    Rule("mask_polarity", ("where",), _choice),
    Rule("mask_polarity", ("mul", "mul_", "to", "float", "double", "type_as"), _computed),
    *(Rule("subgradient", names, options) for options, names in _KINKS.items()),
)

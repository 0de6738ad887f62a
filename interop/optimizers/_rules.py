"""The update formulas of torch.optim, one function per optimizer, in PyTorch's order of operations.

NOTE [order]: every product, quotient and sum is taken as PyTorch takes it (`addcdiv` multiplies before it divides,
`lerp` has two forms, NOTE [rounding]), so that a float64 run takes PyTorch's steps bit for bit, but for its square
roots: on x86 they are those of a library which rounds one in a hundred the other way. The formulas are those of the
loops over single tensors, `differentiable=True` included; those of `foreach` and `fused` differ from them by rounding,
and so do those of `capturable=True`, which run on accelerators only and take `beta**t` there in float32. `beta**t` is
bit for bit that of Python on the CPU, where XLA calls the same C library; where it does not, a last place of it is
1e-13 of `1 - beta**t` at the first steps.

A rule maps one parameter, its gradient, its state under PyTorch's names, the hyper-parameters of its group and the
learning rate to the new parameter and the new state. `step` has been counted already. Hyper-parameters are Python
numbers; the learning rate and what is computed from the step are 0-d arrays: float64 where JAX has it, as in PyTorch,
where they are Python's. `counted` is the step in the dtype of PyTorch's tensor, and `tensor_step` says that PyTorch
computes with that tensor: "alone", or "and rate" if its rate is one as well.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import jax.numpy as jnp
import torch
from jax import Array

from ._fma import fma, narrowed, plus, quotient, root
from ._tensor_step import corrections, over

Leaf = dict[str, Array]
Hyper = Mapping[str, Any]
Step = tuple[Array, Leaf]


def sgd(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    d = _decayed(p, g, h)
    if h["momentum"] == 0:
        return _add(p, d, -lr), {}
    # the first buffer is the gradient itself, without dampening
    damped = _add(_times(s["momentum_buffer"], h["momentum"]), d, 1 - h["dampening"])
    buffer = jnp.where(s["has_buffer"], damped, d)
    d = _add(d, buffer, h["momentum"]) if h["nesterov"] else buffer
    return _add(p, d, -lr), {"has_buffer": jnp.ones_like(s["has_buffer"]), "momentum_buffer": buffer}


def adam(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    b1, b2 = h["betas"]
    p, d = _shrunk_or_decayed(p, g, h, lr)
    m = _lerp(s["exp_avg"], d, 1 - b1)
    v = _addcmul(_times(s["exp_avg_sq"], b2), d, d, 1 - b2)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:  # the largest one before its correction
        v = new["max_exp_avg_sq"] = jnp.maximum(s["max_exp_avg_sq"], v)
    if h["tensor_step"]:
        t, is_tensor = s["counted"], h["tensor_step"] == "and rate"
        size = -over(lr, corrections(b1, t)[0], is_tensor)
        scale = corrections(b2, t)[1].astype(size.dtype) * size
        denominator = _plus(_quotient(_root(v), scale), over(jnp.asarray(h["eps"], lr.dtype), size))
        return _addcdiv(p, m, denominator, 1.0), new
    denominator = _plus(_quotient(_root(v), _half_power(_one_minus_power(b2, s["step"]))), h["eps"])
    return _addcdiv(p, m, denominator, -(lr / _one_minus_power(b1, s["step"]))), new


def rmsprop(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    d = _decayed(p, g, h)
    v = _addcmul(_times(s["square_avg"], h["alpha"]), d, d, 1 - h["alpha"])
    new = {"square_avg": v}
    if h["centered"]:
        mean = new["grad_avg"] = _lerp(s["grad_avg"], d, 1 - h["alpha"])
        v = _addcmul(v, mean, mean, -1.0)
    average = _plus(_root(v), h["eps"])
    if h["momentum"] == 0:
        return _addcdiv(p, d, average, -lr), new
    buffer = new["momentum_buffer"] = _addcdiv(_times(s["momentum_buffer"], h["momentum"]), d, average, 1.0)
    return _add(p, buffer, -lr), new


def adagrad(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    d = _decayed(p, g, h)
    rate = lr / plus(1.0, (s["step"] - 1) * h["lr_decay"])
    total = _addcmul(s["sum"], d, d, 1.0)
    return _addcdiv(p, d, _plus(_root(total), h["eps"]), -rate), {"sum": total}


def adamax(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    b1, b2 = h["betas"]
    d = _decayed(p, g, h)
    m = _lerp(s["exp_avg"], d, 1 - b1)
    largest = jnp.maximum(_times(s["exp_inf"], b2), _plus(jnp.abs(d), h["eps"]))
    return _addcdiv(p, m, largest, -(lr / _one_minus_power(b1, s["step"]))), {"exp_avg": m, "exp_inf": largest}


def adadelta(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    rho, eps = h["rho"], h["eps"]
    d = _decayed(p, g, h)
    v = _addcmul(_times(s["square_avg"], rho), d, d, 1 - rho)
    delta = _product(_ratio(_root(_plus(s["acc_delta"], eps)), _root(_plus(v, eps))), d)
    return _add(p, delta, -lr), {
        "square_avg": v,
        "acc_delta": _addcmul(_times(s["acc_delta"], rho), delta, delta, 1 - rho),
    }


def nadam(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    b1, b2 = h["betas"]
    p, d = _shrunk_or_decayed(p, g, h, lr)
    t, psi = s["step"], h["momentum_decay"]
    mu = b1 * (1.0 - 0.5 * (0.96 ** (t * psi)))
    mu_next = b1 * (1.0 - 0.5 * (0.96 ** ((t + 1) * psi)))
    # PyTorch keeps the product in its default dtype, float32, whatever that of the parameter
    mu_product = s["mu_product"] * _as(s["mu_product"], mu)
    product = _as(lr, mu_product)
    m = _lerp(s["exp_avg"], d, 1 - b1)
    v = _addcmul(_times(s["exp_avg_sq"], b2), d, d, 1 - b2)
    denominator = _plus(_root(_quotient(v, _one_minus_power(b2, t))), h["eps"])
    if h["tensor_step"]:
        is_tensor = h["tensor_step"] == "and rate"
        following = plus(1.0, -(mu_product * _as(mu_product, mu_next)))
        p = _addcdiv(p, d, denominator, over(-lr * plus(1.0, -mu), 1.0 - mu_product, is_tensor))
        p = _addcdiv(p, m, denominator, over(-lr * mu_next, following, is_tensor))
        return p, {"mu_product": mu_product, "exp_avg": m, "exp_avg_sq": v}
    p = _addcdiv(p, d, denominator, -lr * plus(1.0, -mu) / (1.0 - product))
    p = _addcdiv(p, m, denominator, -lr * mu_next / plus(1.0, -(product * mu_next)))
    return p, {"mu_product": mu_product, "exp_avg": m, "exp_avg_sq": v}


def radam(p: Array, g: Array, s: Leaf, h: Hyper, lr: Array) -> Step:
    b1, b2 = h["betas"]
    p, d = _shrunk_or_decayed(p, g, h, lr)
    t = s["step"]
    m = _lerp(s["exp_avg"], d, 1 - b1)
    v = _addcmul(_times(s["exp_avg_sq"], b2), d, d, 1 - b2)
    move = _times(_quotient(m, _one_minus_power(b1, t)), lr)
    longest = 2 / (1 - b2) - 1
    if longest > 5:  # the length of the average never exceeds it
        length = _average_length(b2, t)
        rectified = length > 5
        length = jnp.where(rectified, length, 6.0)  # any length whose root is real
        longest_terms = (longest - 4) * (longest - 2)
        rect = _half_power((length - 4) * (length - 2) * longest / (longest_terms * length))
        adaptive = _inverse(_plus(_root(v), h["eps"]), _half_power(_one_minus_power(b2, t)))
        move = jnp.where(rectified, _times(_product(move, adaptive), rect), move)
    return _add(p, move, -1.0), {"exp_avg": m, "exp_avg_sq": v}


# --- PyTorch's operations ---


def _as(like: Array, x: Any) -> Array:
    return jnp.asarray(x).astype(like.dtype)


def _kernel(operation: Callable[..., Array]) -> Callable[..., Array]:
    """As a kernel of PyTorch's takes half precision: in float32, with one rounding at the end. Numbers stay wide."""

    @wraps(operation)
    def taken(first: Array, *others: Any) -> Array:
        if first.dtype.itemsize >= 4:
            return operation(first, *others)
        wide = (x.astype(jnp.float32) if getattr(x, "dtype", None) == first.dtype else x for x in (first, *others))
        return narrowed(operation(*wide), first.dtype)

    return taken


@_kernel
def _times(x: Array, number: Any) -> Array:
    return x * _as(x, number)


def _plus(x: Array, number: Any) -> Array:
    return _sum(x, _as(x, number))  # as in `_add`


@_kernel
def _sum(x: Array, y: Array) -> Array:
    return x + y


@_kernel
def _quotient(x: Array, number: Any) -> Array:
    return quotient(x, number)


@_kernel
def _inverse(x: Array, number: Any) -> Array:
    return _as(x, number) / x


@_kernel
def _product(x: Array, y: Array) -> Array:
    return x * y


@_kernel
def _ratio(x: Array, y: Array) -> Array:
    return x / y


@_kernel
def _root(x: Array) -> Array:
    return root(x)


def _add(a: Array, x: Array, alpha: Any) -> Array:
    return _addmul(a, x, _as(a, alpha))  # PyTorch's additions take their numbers in half precision


@_kernel
def _addmul(a: Array, x: Array, alpha: Array) -> Array:
    return fma(alpha, x, a)


@_kernel
def _addcmul(a: Array, x: Array, y: Array, value: float) -> Array:
    return fma(value * x, y, a)


@_kernel
def _addcdiv(a: Array, x: Array, y: Array, value: Any) -> Array:
    return plus(a, _as(a, value) * x / y)


@_kernel
def _lerp(start: Array, end: Array, weight: float) -> Array:
    if weight < 0.5:
        return fma(_as(start, weight), end - start, start)
    return fma(_as(start, -(1 - weight)), end - start, end)


def _half_power(x: Array) -> Array:
    """Python's `x ** 0.5`, which is no square root: it may be a last place off."""
    return jnp.where(jnp.isnan(x), x, x**0.5)


def _decayed(p: Array, g: Array, h: Hyper) -> Array:
    """The gradient as the rules see it: of a maximum, and with weight decay."""
    g = -g if h["maximize"] else g
    return _add(g, p, h["weight_decay"]) if h["weight_decay"] != 0 else g


def _shrunk_or_decayed(p: Array, g: Array, h: Hyper, lr: Array) -> tuple[Array, Array]:
    if not h["decoupled_weight_decay"]:
        return p, _decayed(p, g, h)
    return _times(p, plus(1.0, -(lr * h["weight_decay"]))), -g if h["maximize"] else g


def _one_minus_power(beta: float, t: Array) -> Array:
    """`1 - beta**t`: in float64 with PyTorch's rounding, in float32 without the cancellation that it would suffer."""
    if t.dtype.itemsize > 4:
        return 1 - beta**t
    return -jnp.expm1(t * (math.log(beta) if beta > 0 else -math.inf))


_BERNOULLI = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160)


def _average_length(beta: float, t: Array) -> Array:
    r"""RAdam's `2 / (1 - beta) - 1 - 2 t beta**t / (1 - beta**t)`, a small difference of large numbers at first.

    In float32 it would be off by 1e-4 and more, which decides whether a step is rectified; there the series of
    `x / (e^x - 1)` in `x = -t log(beta)` is summed without the terms that cancel.
    """
    longest = 2 / (1 - beta) - 1
    if t.dtype.itemsize > 4 or beta == 0:
        return longest - 2 * t * (beta**t) / _one_minus_power(beta, t)
    a = -math.log(beta)
    x = t * a
    near = jnp.minimum(x, 1.0)
    series = sum(b * near ** (2 * i + 2) for i, b in enumerate(_BERNOULLI))
    small = (longest - 2 / a) + t - 2 / a * series
    return jnp.where(x < 1, small, longest - 2 * t / jnp.expm1(x))


# --- which rule an optimizer has ---


@dataclass(frozen=True)
class Rule:
    """What is known of one optimizer.

    Attributes:
        formula: see above.
        hyper: the hyper-parameters that change results, besides `lr`.
        moments: of a group's hyper-parameters, the names of the state's arrays that are like the parameter.
        scalars: the names of its 0-d arrays and their first values.
    """

    formula: Callable[[Array, Array, Leaf, Hyper, Array], Step]
    hyper: tuple[str, ...]
    moments: Callable[[Hyper], tuple[str, ...]]
    scalars: Mapping[str, float | bool]


def _with_step(formula: Any, hyper: str, moments: Callable[[Hyper], tuple[str, ...]], **scalars: float) -> Rule:
    return Rule(formula, ("weight_decay", "maximize", *hyper.split()), moments, {"step": 0.0, **scalars})


def _always(*moments: str) -> Callable[[Hyper], tuple[str, ...]]:
    return lambda _: moments


def _sgd_moments(h: Hyper) -> tuple[str, ...]:
    return ("momentum_buffer",) if h["momentum"] != 0 else ()


def _adam_moments(h: Hyper) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if h["amsgrad"] else ()))


def _rmsprop_moments(h: Hyper) -> tuple[str, ...]:
    momentum = ("momentum_buffer",) if h["momentum"] > 0 else ()
    return ("square_avg", *momentum, *(("grad_avg",) if h["centered"] else ()))


_ADAM = _with_step(adam, "betas eps amsgrad decoupled_weight_decay tensor_step", _adam_moments)
RULES: dict[type, Rule] = {
    torch.optim.SGD: Rule(
        sgd,
        ("weight_decay", "maximize", "momentum", "dampening", "nesterov"),
        _sgd_moments,
        {"has_buffer": False},  # PyTorch's buffer is None instead
    ),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: _with_step(rmsprop, "alpha eps momentum centered", _rmsprop_moments),
    torch.optim.Adagrad: _with_step(adagrad, "lr_decay eps initial_accumulator_value", _always("sum")),
    torch.optim.Adamax: _with_step(adamax, "betas eps", _always("exp_avg", "exp_inf")),
    torch.optim.Adadelta: _with_step(adadelta, "rho eps", _always("square_avg", "acc_delta")),
    torch.optim.NAdam: _with_step(
        nadam,
        "betas eps momentum_decay decoupled_weight_decay tensor_step",
        _always("exp_avg", "exp_avg_sq"),
        mu_product=1.0,
    ),
    torch.optim.RAdam: _with_step(radam, "betas eps decoupled_weight_decay", _always("exp_avg", "exp_avg_sq")),
}
REFUSED = {  # by name: older releases of PyTorch lack some
    "Adafactor": "its factored second moment belongs to the axes of PyTorch's layout; optax.adafactor with "
    "min_dim_size_to_factor=1 comes within 1e-9 from a fresh start",
    "Muon": "its Newton-Schulz iteration runs in bfloat16, so that no two implementations agree; start "
    "optax.contrib.muon afresh",
    "Rprop": "it moves in its first step, in which optax.rprop does not; start optax.rprop afresh",
    "LBFGS": "it calls the loss several times a step; start optax.lbfgs afresh",
    "SparseAdam": "it changes the moments of the touched rows only; use Adam on dense gradients",
    "ASGD": "nothing in optax averages as it does; use SGD, and optax.ema of the parameters",
}

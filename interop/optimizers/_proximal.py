"""The proximal step of an attached penalty: the points and metrics of `funcreg.torch.attach`, on JAX.

The same as `prox_sgd` and `prox_adam` where those have the optimizer's options, and the same as attach for the rest:
AdamW's decay before the prox, RMSprop's metric, dampening.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from funcreg import _rule
from funcreg._rule import Bound
from funcreg.jax import _wing
from funcreg.jax._transform import adam_metric

from ._rules import _as, _decayed, _one_minus_power


class Stepped(NamedTuple):
    """A leaf before and after the optimizer's own step."""

    old: Array
    grad: Array
    moved: Array
    before: Mapping[str, Array]  # its state
    after: Mapping[str, Array]
    step: Array | None  # its count, shape=(), dtype of the learning rate
    lr: Array
    pieces: Sequence[Mapping[str, Array]]  # the new states of all leaves of its PyTorch parameter


def proximal_step(
    optimizer: str, name: str, bound: list[Bound], leaf: Stepped, hyper: Mapping[str, Any]
) -> tuple[Array, dict[str, Array]]:
    """The new point of a leaf with parts of the penalty, and what its state keeps of the prox."""
    if optimizer == "SGD":
        point, step, kept = _sgd(leaf, hyper)
    else:
        guard = _rule.guard_leaf(_wing, leaf.old, bound)
        point, step = (_rmsprop if optimizer == "RMSprop" else _adam)(leaf, hyper, guard)
        kept = {}
    return _rule.prox_leaf(_wing, name, bound, point, step), kept


def _sgd(leaf: Stepped, hyper: Mapping[str, Any]) -> tuple[Array, Array, dict[str, Array]]:
    momentum = hyper["momentum"]
    if momentum == 0:
        return leaf.moved, _as(leaf.old, leaf.lr), {}
    scale = leaf.before["prox_scale"]
    scale = jnp.where(leaf.before["has_buffer"], momentum * scale + (1 - hyper["dampening"]), jnp.ones_like(scale))
    factor = 1 + momentum * scale if hyper["nesterov"] else scale
    return leaf.moved, _as(leaf.old, leaf.lr * _as(leaf.lr, factor)), {"prox_scale": scale}


def _adam(leaf: Stepped, hyper: Mapping[str, Any], guard: Array) -> tuple[Array, Array]:
    b1, b2 = hyper["betas"]
    old, lr = leaf.old, leaf.lr
    assert leaf.step is not None
    what = "max_exp_avg_sq" if hyper["amsgrad"] else "exp_avg_sq"
    second = leaf.after[what]
    scale = _as(old, _one_minus_power(b2, leaf.step))
    step = _step_size(second / scale, _mean(leaf, what) / scale, guard, hyper, lr)
    shrunk = old * _as(old, 1 - lr * hyper["weight_decay"]) if hyper["decoupled_weight_decay"] else old
    return shrunk - step * leaf.after["exp_avg"] / _as(old, _one_minus_power(b1, leaf.step)), step


def _rmsprop(leaf: Stepped, hyper: Mapping[str, Any], guard: Array) -> tuple[Array, Array]:
    second = leaf.after["square_avg"]
    step = _step_size(second, _mean(leaf, "square_avg"), guard, hyper, leaf.lr)
    return leaf.old - step * _decayed(leaf.old, leaf.grad, hyper), step


def _mean(leaf: Stepped, what: str) -> Array:
    """Over the whole parameter, of which the leaf may be a piece."""
    parts = [state[what] for state in leaf.pieces]
    if len(parts) == 1:
        return jnp.mean(parts[0])
    return jnp.sum(jnp.stack([jnp.sum(part) for part in parts])) / sum(part.size for part in parts)


def _step_size(second: Array, mean_square: Array, guard: Array, hyper: Mapping[str, Any], lr: Array) -> Array:
    return _as(second, lr) / (adam_metric(second, mean_square, guard) + hyper["eps"])

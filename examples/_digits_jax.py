"""The JAX half of `sparse_digits.py`. Its twin is `_digits_torch.py`: `diff` the two."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array, grad
from safetensors.flax import load_file as load_file
from safetensors.flax import save_file as save_file

import funcreg.jax as fr
from _digits import LEARNING_RATE, UNITS, Arrays, Digits, Run

# --- what regularizes and optimizes: the same text on both wings ---


def penalties(lam: Any) -> dict[str, Any]:
    """L1 on every weight, group lasso on the weights that enter a hidden unit, and their sum; biases are free."""
    l1, group_lasso = fr.l1(lam).on(fr.weights), fr.group_lasso(lam, per="output").on("hidden").on(fr.weights)
    return {"l1": l1, "group_lasso": group_lasso, "both": l1 + group_lasso}


def methods(loss: Callable[..., Any], penalty: Any, lr: float) -> dict[str, tuple[Any, Any, Any]]:
    """Three ways to train with a penalty: what is differentiated, the optimizer, what is done after its step."""
    return {
        "autodiff": (fr.penalize(loss, penalty), optax.adam(lr), lambda params: params),
        "soft": (loss, optax.adam(lr), lambda params: penalty.prox(params, lr)),  # the threshold is lr * lam
        "prox_adam": (loss, fr.prox_adam(lr, penalty), lambda params: params),
    }


def make_step(total: Callable[..., Any], optimizer: Any, after: Callable[[Any], Any]) -> Callable[..., Any]:
    """One step of one of them, a pure function."""

    def step(params: Any, opt_state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        grads = grad(total)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return after(optax.apply_updates(params, updates)), opt_state

    return step


# --- the model and the loop: each framework's own ---


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Dense(UNITS, name="hidden")(x))
        return nn.Dense(10, name="output")(x)


MODEL = MLP()


def logits(params: dict[str, Any], x: Array) -> Array:
    return MODEL.apply({"params": params}, x)


def loss(params: dict[str, Any], x: Array, y: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def array(x: np.ndarray) -> Array:
    return jnp.asarray(x)


def from_numpy(params: Arrays, dtype: str = "float32") -> dict[str, Any]:
    """flax keeps a kernel as the transpose of torch's weight."""
    return {
        layer: {
            "kernel": jnp.asarray(np.swapaxes(params[f"{layer}.weight"], -1, -2).astype(dtype)),
            "bias": jnp.asarray(params[f"{layer}.bias"].astype(dtype)),
        }
        for layer in ("hidden", "output")
    }


def to_numpy(params: dict[str, Any]) -> Arrays:
    arrays = {}
    for layer, leaves in params.items():
        arrays[f"{layer}.weight"] = np.swapaxes(np.asarray(leaves["kernel"]), -1, -2)
        arrays[f"{layer}.bias"] = np.asarray(leaves["bias"])
    return arrays


def train(
    data: Digits,
    init: Arrays,
    batches: np.ndarray,
    penalty: Any,
    method: str,
    look_at: list[int],
    tick: Callable[[int], Any] = lambda steps: None,
    dtype: str = "float32",
) -> Run:
    """Train by one method; compute the objective after the steps in `look_at`, which ends with the last one."""
    total, optimizer, after = methods(loss, penalty, LEARNING_RATE)[method]
    objective = jax.jit(fr.penalize(loss, penalty, parts=True))
    step = make_step(total, optimizer, after)
    x, y = jnp.asarray(data.x_train.astype(dtype)), jnp.asarray(data.y_train, jnp.int32)
    index = jnp.asarray(batches, jnp.int32)

    @jax.jit
    def run(start: Array, end: Array, carry: Any) -> Any:
        # Not a scan: a loop from a traced start to a traced end is compiled once for all lengths.
        return jax.lax.fori_loop(start, end, lambda i, carry: step(*carry, x[index[i]], y[index[i]]), carry)

    params = from_numpy(init, dtype)
    carry = params, optimizer.init(params)
    curve = []
    done = 0
    for end in look_at:
        carry = run(jnp.int32(done), jnp.int32(end), carry)
        value, parts = objective(carry[0], x, y)
        curve.append(float(value))
        tick(end - done)
        done = end
    return Run(to_numpy(carry[0]), look_at, curve, float(parts.loss))

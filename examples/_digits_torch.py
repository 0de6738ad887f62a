"""The PyTorch half of `sparse_digits.py`. Its twin is `_digits_jax.py`: `diff` the two."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file as load_file
from safetensors.torch import save_file as save_file
from torch import Tensor, nn
from torch.func import functional_call, grad

import funcreg.torch as fr
from _digits import LEARNING_RATE, UNITS, Arrays, Digits, Run
from funcreg.torch import optax

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
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, UNITS)
        self.output = nn.Linear(UNITS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.relu(self.hidden(x)))


MODEL = MLP()


def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(MODEL, params, (x,))


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(params, x), y)


def array(x: np.ndarray) -> Tensor:
    return torch.tensor(x)


def from_numpy(params: Arrays, dtype: str = "float32") -> dict[str, Tensor]:
    return {name: torch.tensor(w.astype(dtype)) for name, w in params.items()}


def to_numpy(params: dict[str, Tensor]) -> Arrays:
    return {name: w.numpy() for name, w in params.items()}


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
    objective = fr.penalize(loss, penalty, parts=True)
    step = make_step(total, optimizer, after)
    x, y = torch.tensor(data.x_train.astype(dtype)), torch.tensor(data.y_train)
    index = torch.tensor(batches)
    params = from_numpy(init, dtype)
    opt_state = optimizer.init(params)
    curve = []
    done = 0
    for end in look_at:
        for i in range(done, end):
            params, opt_state = step(params, opt_state, x[index[i]], y[index[i]])
        value, parts = objective(params, x, y)
        curve.append(float(value))
        tick(end - done)
        done = end
    return Run(to_numpy(params), look_at, curve, float(parts.loss))

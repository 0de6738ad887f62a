"""Gradient accumulation: k micro-batches through MultiSteps(prox_adam) are one big batch, to rounding.

A batch that does not fit into memory is taken in k parts, whose gradients are collected for one real step. Where does
the penalty belong? Into the transformation inside MultiSteps: there it acts once per real step, however many parts
there are. In the loss of a part it adds up: in the usual loop, k times `(loss / k + penalty).backward()` and then one
step, it counts k times. (`((loss + penalty) / k).backward()` counts it once, but has no exact zeros.)

The task is a lasso regression on scikit-learn's bundled diabetes data, in float64: 400 patients in batches of 100, or
in micro-batches of 25 with k = 4, for 30 epochs. The lines are the same in PyTorch and in JAX. What to look at:

    apart         the largest difference of the weights, after any real step, from PyTorch with big batches: below
                  1e-12, so only by rounding. Also for a plain loop with fr.attach: k times backward() on loss / k,
                  and one optimizer.step(), which is where the prox is.
    exact zeros   of the 10 weights in the end: the same number for all, and not 0.
    strength      of a penalty added to the loss of every part, relative to what was meant: k = 4.
"""

import jax
import numpy as np
import optax
import torch
from sklearn.datasets import load_diabetes

import funcreg.jax
import funcreg.torch

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told otherwise
K, LAM, LEARNING_RATE = 4, 0.1, 0.02


def loss(w, x, y):
    return ((x @ w - y) ** 2).mean()


def parts(k):
    """The rows of every part of every batch, for 30 epochs."""
    return [slice(start, start + 100 // k) for start in range(0, 400, 100 // k)] * 30


def train(fr, optax, grad, jit, x, y, k):
    """The weights after every real step, [steps, features]."""
    w = 0 * x[0]
    optimizer = fr.prox_adam(LEARNING_RATE, fr.l1(LAM))
    if k > 1:
        optimizer = optax.MultiSteps(optimizer, every_k_schedule=k, accumulator_dtype=w.dtype)
    state, update, gradient = optimizer.init(w), jit(optimizer.update), jit(grad(loss))
    path = []
    for rows in parts(k):
        updates, state = update(gradient(w, x[rows], y[rows]), state, w)  # of MultiSteps: 0, but for every k-th part
        w = optax.apply_updates(w, updates)
        path.append(np.asarray(w))
    return np.array(path)[k - 1 :: k]


def train_attached(x, y, k):
    """The same with a plain PyTorch loop."""
    net = torch.nn.Linear(10, 1, bias=False, dtype=x.dtype)
    torch.nn.init.zeros_(net.weight)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    funcreg.torch.attach(optimizer, net, funcreg.torch.l1(LAM))
    path = []
    for i, rows in enumerate(parts(k), start=1):
        (loss(net.weight[0], x[rows], y[rows]) / k).backward()
        if i % k == 0:
            optimizer.step()
            optimizer.zero_grad()
            path.append(net.weight[0].detach().numpy().copy())
    return np.array(path)


def run() -> dict[str, float]:
    x, y = (column[:400] for column in load_diabetes(return_X_y=True, scaled=False))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    tx, ty = torch.tensor(x), torch.tensor(y)
    in_torch = funcreg.torch, funcreg.torch.optax, torch.func.grad, lambda f: f, tx, ty
    in_jax = funcreg.jax, optax, jax.grad, jax.jit, jax.numpy.array(x), jax.numpy.array(y)
    big = train(*in_torch, k=1)
    paths = {
        "PyTorch, MultiSteps": train(*in_torch, k=K),
        "PyTorch, attach": train_attached(tx, ty, k=K),
        "JAX, big batches": train(*in_jax, k=1),
        "JAX, MultiSteps": train(*in_jax, k=K),
    }
    results = {f"apart: {name}": np.abs(path - big).max() for name, path in paths.items()}
    paths["PyTorch, big batches"] = big
    results |= {f"exact zeros: {name}": (path[-1] == 0).sum() for name, path in paths.items()}

    w, penalty = torch.ones(10, dtype=tx.dtype, requires_grad=True), funcreg.torch.l1(LAM)
    for rows in parts(K)[:K]:
        (loss(w, tx[rows], ty[rows]) / K + penalty.value(w)).backward()
    of_loss = torch.func.grad(loss)(w.detach(), tx[:100], ty[:100])
    results["strength: l1 in the loss of every part"] = ((w.grad - of_loss) / penalty.grad(w.detach())).mean().item()
    return results


def main() -> None:
    for name, value in run().items():
        print(f"{name:.<60} {value:.2g}")


if __name__ == "__main__":
    main()

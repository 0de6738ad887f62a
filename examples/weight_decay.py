"""Is weight decay an L2 penalty? For SGD yes, with a factor 2; for Adam(weight_decay) yes; for AdamW no.

Ridge regression on scikit-learn's bundled diabetes data has a closed solution, so the question has an answer in
numbers. The objective is the tutorials' `mean((x @ w - y)**2) + lam * sum(w**2)`. The gradient of its second term is
`2 * lam * w`: to mean the same, `weight_decay` must be `2 * lam`, and so must the strength of `fr.l2`, which is half
the sum of squares. Every optimizer starts at 0 and sees all of the data in every step. What to look at:

    from ridge   how far from the ridge solution, whose largest weight is 0.31, an optimizer ends: below 1e-9 where it
                 solves that problem, 0.05 for SGD(weight_decay=lam), which has half the penalty, and 0.3 for AdamW,
                 which is on its way to the solution without a penalty (0.08 from there): it divides the gradient of
                 the loss by the gradient's own size, and leaves that of the penalty as it is.
    apart        how far two ways to write one optimizer ever come apart on the way: below 1e-12, so only by rounding.
                 The gradient of l2 *before* Adam's preconditioner is Adam(weight_decay), *after* it AdamW. In PyTorch
                 and in JAX these are the same lines under other imports.
"""

import jax
import numpy as np
import optax
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

import funcreg.jax
import funcreg.torch

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told otherwise
LAM, STEPS = 0.05, 1000


def loss(w, x, y):
    return ((x @ w - y) ** 2).mean()


def by_torch_optim(x, y, optimizer_class, lr, weight_decay=0.0, penalty=None):
    """The weights after every step, [steps, features]."""
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    optimizer = optimizer_class([w], lr=lr, weight_decay=weight_decay)
    path = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (loss(w, x, y) if penalty is None else loss(w, x, y) + penalty(w)).backward()
        optimizer.step()
        path.append(w.detach().numpy().copy())
    return np.array(path)


def by_optax(fr, optax, grad, jit, x, y, l2):
    """The same with a chain of transformations, for either wing."""
    decay, scale = fr.add_penalty_gradient(fr.l2(2 * LAM)), optax.scale_by_adam()
    adam = [decay, scale] if l2 == "before" else [scale, decay]
    optimizer = optax.chain(*adam, optax.scale_by_learning_rate(0.02))
    w = 0 * x[0]
    state, update, gradient = optimizer.init(w), jit(optimizer.update), jit(grad(loss))
    path = []
    for _ in range(STEPS):
        updates, state = update(gradient(w, x, y), state, w)
        w = optax.apply_updates(w, updates)
        path.append(np.asarray(w))
    return np.array(path)


def run() -> dict[str, float]:
    x, y = load_diabetes(return_X_y=True, scaled=False)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    ridge = Ridge(alpha=len(x) * LAM, fit_intercept=False).fit(x, y).coef_  # sklearn sums where the loss takes a mean
    no_penalty = np.linalg.lstsq(x, y)[0]

    data, l2 = (torch.tensor(x), torch.tensor(y)), funcreg.torch.l2(2 * LAM).value
    optim = torch.optim
    sgd, adam, adamw = (*data, optim.SGD, 0.2), (*data, optim.Adam, 0.02), (*data, optim.AdamW, 0.02)
    paths = {
        "SGD on loss + lam * sum(w**2)": by_torch_optim(*sgd, penalty=lambda w: LAM * (w**2).sum()),
        "SGD on loss + l2(2 * lam)": by_torch_optim(*sgd, penalty=l2),
        "SGD(weight_decay=2 * lam)": by_torch_optim(*sgd, weight_decay=2 * LAM),
        "SGD(weight_decay=lam)": by_torch_optim(*sgd, weight_decay=LAM),
        "Adam on loss + l2(2 * lam)": by_torch_optim(*adam, penalty=l2),
        "Adam(weight_decay=2 * lam)": by_torch_optim(*adam, weight_decay=2 * LAM),
        "AdamW(weight_decay=2 * lam)": by_torch_optim(*adamw, weight_decay=2 * LAM),
    }
    adam, adamw = paths["Adam(weight_decay=2 * lam)"], paths["AdamW(weight_decay=2 * lam)"]
    results = {f"from ridge: {name}": np.abs(path[-1] - ridge).max() for name, path in paths.items()}
    results["from no penalty: AdamW(weight_decay=2 * lam)"] = np.abs(adamw[-1] - no_penalty).max()

    in_torch = funcreg.torch, funcreg.torch.optax, torch.func.grad, lambda f: f, *data
    in_jax = funcreg.jax, optax, jax.grad, jax.jit, jax.numpy.array(x), jax.numpy.array(y)
    for name, wing in {"PyTorch": in_torch, "JAX": in_jax}.items():
        results[f"apart: Adam(weight_decay), l2 before Adam in {name}"] = np.abs(by_optax(*wing, "before") - adam).max()
        results[f"apart: AdamW, l2 after Adam in {name}"] = np.abs(by_optax(*wing, "after") - adamw).max()
    return results


def main() -> None:
    for name, value in run().items():
        print(f"{name:.<60} {value:.2g}")


if __name__ == "__main__":
    main()

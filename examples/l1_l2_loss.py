"""L1 on one layer, L2 on all of them, nothing on the biases: the regularized loss of the tutorials, written down once.

A small network learns scikit-learn's bundled handwritten digits three times, from the same initial values with the
same batches and for the same objective, which is the loss plus the penalties:

    by hand     the tutorials' loop, which adds up sums over the weights
    penalize    the same objective as a function for torch.func.grad, with the bare loss, the one to log, beside it
    attach      the plain loop with the penalty attached to the optimizer; the loss in the loop stays bare

What to look at: "by hand" and "penalize" agree to three digits after training (the same sums in another order, in
float32, and 600 steps amplify the rounding), and have 0 weights that are exactly zero: the gradient of |w| pushes a
weight past zero, never onto it. "attach" takes proximal steps instead. It ends at an objective that is no worse, with
more than half of the 4096 weights of the hidden layer exactly zero, and none of the output layer, where there is only
L2.
"""

import argparse
import copy
from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call, grad

import funcreg.torch as fr
from funcreg.torch import optax

# The first row that matches a parameter counts. l2 has a factor 1/2: l2(1e-3) is 0.5e-3 * sum(w**2).
PENALTY = fr.layerwise({"*.bias": None, "hidden": fr.l1(1e-3) + fr.l2(1e-4), "output": fr.l2(1e-3)})


def run(seed: int = 0, steps: int = 600) -> dict[str, float]:
    torch.manual_seed(seed)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    batches = torch.randint(len(x), (steps, 128))
    start = nn.Sequential(OrderedDict(hidden=nn.Linear(64, 64), relu=nn.ReLU(), output=nn.Linear(64, 10)))

    by_hand = copy.deepcopy(start)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=3e-3)
    for batch in batches:
        loss = nn.functional.cross_entropy(by_hand(x[batch]), y[batch])
        hidden, output = by_hand.hidden.weight, by_hand.output.weight
        loss = loss + 1e-3 * hidden.abs().sum() + 0.5e-4 * (hidden**2).sum() + 0.5e-3 * (output**2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def loss_function(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(start, params, (x,)), y)

    objective = fr.penalize(loss_function, PENALTY, parts=True)  # called like the loss
    params = {name: p.detach() for name, p in fr.params(start).items()}
    adam = optax.adam(3e-3)
    state = adam.init(params)
    for batch in batches:
        grads, (bare, penalty) = grad(objective, has_aux=True)(params, x[batch], y[batch])
        updates, state = adam.update(grads, state, params)
        params = optax.apply_updates(params, updates)

    attached = copy.deepcopy(start)
    optimizer = torch.optim.Adam(attached.parameters(), lr=3e-3)
    fr.attach(optimizer, attached, PENALTY)  # the only line that differs from training without a penalty
    for batch in batches:
        loss = nn.functional.cross_entropy(attached(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    results = {}
    for name, end in {"by hand": fr.params(by_hand), "penalize": params, "attach": fr.params(attached)}.items():
        total, (bare, penalty) = objective(end, x, y)  # on all images
        results[f"{name}: bare loss"] = bare.item()
        results[f"{name}: loss + penalty"] = total.item()
        results[f"{name}: exact zeros of 4096 in hidden.weight"] = (end["hidden.weight"] == 0).sum().item()
        results[f"{name}: exact zeros of 640 in output.weight"] = (end["output.weight"] == 0).sum().item()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and the batches")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each loop")
    for name, value in run(**vars(parser.parse_args())).items():
        print(f"{name:.<60} {value:.6g}")


if __name__ == "__main__":
    main()

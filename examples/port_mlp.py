"""From PyTorch to flax in the middle of a training run: parameters, penalty and Adam's state, and back from a file.

A network learns scikit-learn's bundled handwritten digits in PyTorch, with Adam and an L1 penalty that `fr.attach` puts
on it: exact zeros from a plain loop. After half of the steps it moves to flax linen, and goes on there:

    pair = interop.match(net, variables)                 which array is which, found once; print it
    params = pair.to_jax(net)                            kernels are transposed
    tx, state = pair.optimizer_to_jax(optimizer)         Adam, its moments and counts, and the penalty, mid-run

PyTorch goes on as well, with the same batches, to compare. The JAX run is saved as flax's msgpack, and read back into a
fresh PyTorch model. What to look at:

    logits apart           before the second half, on all images, relative to the largest: rounding
    weights apart          after 200 more steps on either side, in float64: rounding
    weights apart, fresh   the same if only the parameters were ported, and Adam started anew: what most ports do
    exact zeros in ...     of 4736 weights
    zero in one only       weights: none
    reloaded               arrays whose bits differ between the JAX run and the model read from its file: 0
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen as nn
from torch.nn.functional import cross_entropy

import _digits
import funcreg.jax
import funcreg.torch as fr
from funcreg import interop

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told otherwise
PENALTY = fr.l1(1e-3).on(fr.weights)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(64, param_dtype=jnp.float64)(x))
        return nn.Dense(10, param_dtype=jnp.float64)(x)


def train_torch(net: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any, batches: np.ndarray) -> None:
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()


def train_jax(tx: optax.GradientTransformation, params: Any, state: Any, x: Any, y: Any, batches: np.ndarray) -> Any:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(Net().apply(params, x), y).mean()

    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x[batch], y[batch]), state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    return params


def apart(net: torch.nn.Module, pair: interop.Pair, params: Any) -> float:
    """The largest difference of any parameter."""
    other = pair.to_torch(params)
    return max((p - other[name]).abs().max().item() for name, p in net.state_dict().items())


def run(seed: int = 0, steps: int = 400) -> dict[str, float]:
    data = _digits.load()
    batches = np.array_split(_digits.draw_batches(seed, steps, 128, len(data.x_train)), 2)
    x, y = torch.tensor(data.x_train, dtype=torch.float64), torch.tensor(data.y_train)
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    fr.attach(optimizer, net, PENALTY)
    train_torch(net, optimizer, x, y, batches[0])

    images, labels = interop.to_jax((x, y))
    pair = interop.match(net, Net().init(jax.random.key(0), images[:1]))
    print(pair)
    params = pair.to_jax(net)
    tx, state = pair.optimizer_to_jax(optimizer)
    logits = net(x).detach().numpy()
    results = {"logits apart": np.abs(Net().apply(params, images) - logits).max().item() / np.abs(logits).max().item()}

    fresh = funcreg.jax.prox_adam(3e-3, pair.penalty_to_jax(PENALTY))
    forgetful = train_jax(fresh, params, fresh.init(params), images, labels, batches[1])
    params = train_jax(tx, params, state, images, labels, batches[1])
    train_torch(net, optimizer, x, y, batches[1])
    results["weights apart"] = apart(net, pair, params)
    results["weights apart, fresh"] = apart(net, pair, forgetful)
    weights = {name: p.detach().numpy() for name, p in net.named_parameters() if p.ndim == 2}
    ours = {name: p.numpy() for name, p in pair.to_torch(params).items()}
    results["exact zeros in PyTorch"] = sum(int((w == 0).sum()) for w in weights.values())
    results["exact zeros in JAX"] = sum(int((ours[name] == 0).sum()) for name in weights)
    results["zero in one only"] = sum(int(((w == 0) != (ours[name] == 0)).sum()) for name, w in weights.items())

    with tempfile.TemporaryDirectory() as folder:
        interop.save(Path(folder) / "net.msgpack", params)
        net.load_state_dict(pair.to_torch(interop.load(Path(folder) / "net.msgpack")))
    results["reloaded"] = sum(p.numpy().tobytes() != ours[name].tobytes() for name, p in net.state_dict().items())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and the batches (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="in all, half of them on each side (%(default)s)")
    for name, value in run(**vars(parser.parse_args())).items():
        print(f"{name:.<60} {value:.4g}")


if __name__ == "__main__":
    main()

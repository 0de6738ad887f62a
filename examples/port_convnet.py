"""A convolutional network from PyTorch to flax, with batch norm's statistics and the flatten before the dense layer.

PyTorch keeps images as (channels, height, width), flax as (height, width, channels). Kernels are transposed for that,
and so, silently, are the rows of the dense layer behind the flatten: the 256 numbers that it reads come in another
order. `interop.match` finds that flatten, permutes the rows and says so in its table. The network is trained on
scikit-learn's bundled handwritten digits in PyTorch, ported, compared, trained on in flax, and brought back.

    eval apart             of the logits on the test images, largest difference of the largest logit; running statistics
    train apart            the same with the statistics of the batch
    gradients apart        of every parameter, largest difference of its largest entry; carried back by the pair
    accuracy: PyTorch      on the test images
    accuracy: ported       the same
    accuracy: as it lies   the same network with the dense layer's rows as PyTorch has them: every shape fits, nothing
                           complains, most digits are misread
    came back              after one epoch in flax, of which PyTorch knows nothing: logits of the two models apart
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen
from torch import nn
from torch.nn.functional import cross_entropy

import _digits
from funcreg import interop

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told otherwise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(x.flatten(1))


class FlaxNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for channels, stride in ((8, 1), (16, 2)):
            x = linen.Conv(channels, (3, 3), stride, padding=1, use_bias=False, param_dtype=jnp.float64)(x)
            # PyTorch's momentum is 0.1, of the new; flax's is of the old. Its default is 0.99.
            norm = linen.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=jnp.float64)
            x = linen.relu(norm(x))
        return linen.Dense(10, param_dtype=jnp.float64)(x.reshape(len(x), -1))


def loss(params: Any, statistics: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": params, "batch_stats": statistics}
    logits, new = FlaxNet().apply(variables, x, train=True, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]


def train_torch(net: Net, x: torch.Tensor, y: torch.Tensor, batches: np.ndarray) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()


def train_jax(variables: Any, x: jax.Array, y: jax.Array, batches: np.ndarray) -> Any:
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, statistics: Any, state: Any, batch: jax.Array) -> Any:
        grads, statistics = jax.grad(loss, has_aux=True)(params, statistics, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state

    params, statistics = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    for batch in batches:
        params, statistics, state = step(params, statistics, state, batch)
    return {"params": params, "batch_stats": statistics}


def apart(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def run(seed: int = 0, steps: int = 60) -> dict[str, float]:
    data = _digits.load()
    batches = np.array_split(_digits.draw_batches(seed, 2 * steps, 128, len(data.x_train)), 2)
    images, test = (torch.tensor(x, dtype=torch.float64).reshape(-1, 1, 8, 8) for x in (data.x_train, data.x_test))
    labels = torch.tensor(data.y_train)
    torch.manual_seed(seed)
    net = Net().double()
    train_torch(net, images, labels, batches[0])

    x, y, x_test = (interop.to_jax(t.movedim(1, -1) if t.ndim == 4 else t) for t in (images, labels, test))
    pair = interop.match(net, FlaxNet().init(jax.random.key(0), x[:1]))
    print(pair)
    variables = pair.to_jax(net)
    results, flax = {}, FlaxNet()
    some = batches[1][0]
    gradients, _ = jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"], x[some], y[some])
    logits, _ = flax.apply(variables, x[some], train=True, mutable=["batch_stats"])
    with torch.no_grad():
        results["eval apart"] = apart(flax.apply(variables, x_test), net.eval()(test))
    net.train()
    there = net(images[some])  # which moves the running statistics
    results["train apart"] = apart(logits, there.detach())
    net.zero_grad()
    cross_entropy(there, labels[some]).backward()
    back = pair.parameters_to_torch(gradients)
    results["gradients apart"] = max(apart(back[name], p.grad) for name, p in net.named_parameters())

    as_it_lies = interop.match(net, variables, flatten={"fc": None}).to_jax(net)
    with torch.no_grad():
        right = net.eval()(test).argmax(1).numpy() == data.y_test
    results["accuracy: PyTorch"] = right.mean()
    for name, ported in (("ported", pair.to_jax(net)), ("as it lies", as_it_lies)):
        results[f"accuracy: {name}"] = (flax.apply(ported, x_test).argmax(1) == data.y_test).mean().item()

    variables = train_jax(variables, x, y, batches[1])
    net.load_state_dict(pair.to_torch(variables))
    with torch.no_grad():
        results["came back"] = apart(net(test), flax.apply(variables, x_test))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and the batches (%(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="on each side (%(default)s)")
    for name, value in run(**vars(parser.parse_args())).items():
        print(f"{name:.<60} {value:.4g}")


if __name__ == "__main__":
    main()

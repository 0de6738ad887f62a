"""Three faults in a port from PyTorch to flax, each planted alone: found, named and located.

A small network on scikit-learn's bundled handwritten digits, and a training step, in PyTorch and in flax linen. Each
fault is one that ports have, and none of them raises, or changes a shape, or keeps the port from learning:

    gelu        flax's gelu is an approximation by tanh unless told otherwise, PyTorch's is the exact one
    relu        `jnp.maximum(x, 0)` has the derivative 1/2 at 0, PyTorch's relu 0: the blank columns of an image meet
                biases of 0. The values agree to the last bits, and only gradients differ
    decay       `torch.optim.Adam(weight_decay=...)` adds the decay to the gradient, `optax.adamw` takes it from the
                parameters

Three lines tell them:

    interop.check(torch.func.grad_and_value(loss), jax.value_and_grad(loss_of_flax), params, x, y, pair=pair)
    interop.check_training((init, step), (init_of_flax, step_of_flax), params, hyper, batches, pair)
    interop.locate(net, flax_model, pair, x)

The verdict says whether there is a fault. The hint says which: with the change that it names, made to the PyTorch side
and run again, both sides agree. The location says where in the model. What to look at:

    ...: apart               the largest difference of any gradient, value or parameter, relative to its array, in
                             float64
    ...: apart after hint    the same with the change of the hint: rounding
    ...: named, located      1 if hint and location say what was planted, and nothing else; of the training step there
                             is no place to say, since all layers agree
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F
from flax import linen

import _digits
import funcreg.jax as frj
import funcreg.torch as fr
from funcreg import interop

jax.config.update("jax_disable_most_optimizations", True)  # small programs, run a few times: compiling takes longest
Activation = Callable[[jax.Array], jax.Array]
HYPER = {"lr": 1e-2, "decay": 0.1}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(8, 16)
        torch.nn.init.zeros_(self.embed.bias)
        self.norm = torch.nn.LayerNorm(16)
        self.fc1, self.fc2 = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.embed(x))  # [batch, column, width]
        h = h + self.fc2(F.gelu(self.fc1(self.norm(h))))
        return self.head(h.mean(1))


def exact_gelu(x: jax.Array) -> jax.Array:
    return linen.gelu(x, approximate=False)


class FlaxNet(linen.Module):
    """The port; its two activations are where a fault is planted."""

    relu: Activation = linen.relu
    gelu: Activation = exact_gelu

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.relu(linen.Dense(16, name="embed")(x))
        h = h + linen.Dense(16, name="fc2")(
            self.gelu(linen.Dense(32, name="fc1")(linen.LayerNorm(1e-5, name="norm")(h)))
        )
        return linen.Dense(10, name="head")(h.mean(1))


def decoupled_decay(hyper: Any) -> optax.GradientTransformation:  # planted
    return optax.adamw(hyper["lr"], weight_decay=hyper["decay"])


def adam_with_decay(hyper: Any) -> Any:
    return fr.optax.chain(fr.optax.add_decayed_weights(hyper["decay"]), fr.optax.adam(hyper["lr"]))


class Findings:
    """What is said about one port: the model, its gradients, and its training step."""

    def __init__(self, model: FlaxNet, seed: int) -> None:
        torch.manual_seed(seed)
        net = Net()
        data = _digits.load()
        x, y = data.x_train[:24].reshape(3, 8, 8, 8).swapaxes(2, 3), data.y_train[:24].reshape(3, 8)

        def loss(params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

        def loss_of_flax(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

        pair = interop.match(net, jax.jit(FlaxNet().init)(jax.random.key(0), jnp.zeros((1, 8, 8))))
        params = {name: p.detach().numpy() for name, p in net.named_parameters()}
        both = torch.func.grad_and_value(loss), jax.jit(lambda *args: jax.value_and_grad(loss_of_flax)(*args)[::-1])
        report = interop.check(*both, params, x[0], y[0], pair=pair)
        if report.verdict == "rounding":  # the model agrees: what about its training?
            init, step = frj.train_step(loss_of_flax, decoupled_decay)
            steps = fr.train_step(loss, adam_with_decay), (init, jax.jit(step))
            report = interop.check_training(*steps, params, HYPER, list(zip(x, y, strict=True)), pair)
        self.report, self.location = report, interop.locate(net, model, pair, x[0])

    def numbers(self, kinds: set[str], where: str) -> dict[str, float]:
        named = {hint.kind for hint in self.report.hints}
        results = {"apart": max(leaf.float64.relative for leaf in self.report.leaves if leaf.float64)}
        if self.report.hints:
            results["apart after hint"] = self.report.hints[0].difference
        return results | {"named": float(named == kinds), "located": float(self.location.where == where)}


def run(seed: int = 0) -> dict[str, float]:
    ports = {
        "gelu": (FlaxNet(gelu=linen.gelu), {"gelu"}, "between `fc1` and `fc2`"),
        "relu": (
            FlaxNet(relu=lambda x: jnp.maximum(x, 0)),
            {"subgradient"},
            "between `embed` and `norm`",
        ),
        "decay": (FlaxNet(), {"decoupled_decay"}, ""),
    }
    results: dict[str, float] = {}
    for name, (model, kinds, where) in ports.items():
        found = Findings(model, seed)
        print(f"{name}: {found.report.verdict}")
        for hint in found.report.hints:
            print(f"    {hint.change}")
        print(f"    the model: {found.location.verdict} {found.location.direction} {found.location.where}".rstrip())
        results |= {f"{name}: {label}": number for label, number in found.numbers(kinds, where).items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values (%(default)s)")
    for name, value in run(**vars(parser.parse_args())).items():
        print(f"{name:.<60} {value:.4g}")


if __name__ == "__main__":
    main()

"""A small pre-norm transformer from PyTorch to flax nnx in the middle of its training, and back.

AdamW with two parameter groups (weights decay; biases, norms and the positions do not) and a learning rate that warms
up and falls along a cosine. The images of scikit-learn's bundled handwritten digits are read row by row: 8 tokens of 8
pixels. The first third of the steps is taken in PyTorch, the second in JAX, the third in PyTorch again, beside a run
that never leaves PyTorch and sees the same batches:

    pair = interop.match(net, model)                                        one look at both models
    nnx.update(model, pair.to_jax(net))                                     packed qkv is split into heads
    tx, state = pair.optimizer_to_jax(optimizer, scheduler)                 both groups, moments, counts, the schedule
    net.load_state_dict(pair.to_torch(nnx.state(model, nnx.Param)))
    pair.optimizer_to_torch(state, optimizer)

    apart after ...        largest difference of any parameter from the unbroken run, in float64: rounding
    keys' biases after ... theirs, left out above: a softmax does not see them, so that their gradients are nothing but
                           rounding, 1e-18, which Adam divides by its own size. They go where rounding leads them
    decay: AdamW's own     the same after the second third, had the port become optax.adamw with its own defaults: it
                           decays every parameter alike, at 1e-4, with moments that begin anew
    rate apart             of the two learning rates at the end of the second third
    accuracy               on the images not seen, at the end
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen, nnx
from torch import nn
from torch.nn.functional import cross_entropy, gelu

import _digits
from funcreg import interop

jax.config.update("jax_enable_x64", True)  # JAX computes in float32 unless told otherwise
WIDTH, HEADS, BLOCKS = 32, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.positions = nn.Parameter(torch.randn(8, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def attend(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    del options
    return linen.dot_product_attention(query, key, value)  # nnx's own takes its softmax in float32, also of float64


class FlaxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        # flax's epsilon is 1e-6 by default; match would refuse that
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, param_dtype=jnp.float64, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, param_dtype=jnp.float64, rngs=rngs)
        kinds = {"attention_fn": attend, "param_dtype": jnp.float64}
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs, **kinds)
        self.fc1 = nnx.Linear(WIDTH, 4 * WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.fc2 = nnx.Linear(4 * WIDTH, WIDTH, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))  # PyTorch's gelu is the exact one


class FlaxTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(8, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((8, WIDTH)))
        self.blocks = nnx.List([FlaxBlock(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, param_dtype=jnp.float64, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def set_up(net: Transformer, steps: int) -> tuple[torch.optim.AdamW, Any]:
    matrices = [p for name, p in net.named_parameters() if p.ndim == 2 and name != "positions"]
    others = [p for name, p in net.named_parameters() if p.ndim < 2 or name == "positions"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.98))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 10)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [steps // 10])


def train_torch(net: Transformer, optimizer: Any, scheduler: Any, x: Any, y: Any, batches: np.ndarray) -> None:
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        scheduler.step()


def train_jax(model: FlaxTransformer, tx: Any, state: Any, x: Any, y: Any, batches: np.ndarray) -> Any:
    """Trains the model in place and returns the state of its optimizer."""
    optimizer = nnx.Optimizer(model, optax.GradientTransformation(lambda _: state, tx.update), wrt=nnx.Param)

    def loss(model: FlaxTransformer, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def step(model: FlaxTransformer, optimizer: nnx.Optimizer, batch: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, x[batch], y[batch]))

    for batch in batches:
        step(model, optimizer, jnp.asarray(batch))
    return optimizer.opt_state


def apart(a: Any, b: Any) -> tuple[float, float]:
    """The largest difference of the biases of the keys, and that of all others."""
    differences = {name: (p - b[name]).abs() for name, p in a.items()}
    keys = [d[WIDTH : 2 * WIDTH].max().item() for name, d in differences.items() if name.endswith("in_proj_bias")]
    for name, d in differences.items():
        if name.endswith("in_proj_bias"):
            d[WIDTH : 2 * WIDTH] = 0
    return max(keys), max(d.max().item() for d in differences.values())


def run(seed: int = 0, steps: int = 90) -> dict[str, float]:
    data = _digits.load()
    thirds = np.array_split(_digits.draw_batches(seed, steps, 64, len(data.x_train)), 3)
    x, x_test = (torch.tensor(a, dtype=torch.float64).reshape(-1, 8, 8) for a in (data.x_train, data.x_test))
    y = torch.tensor(data.y_train)
    torch.manual_seed(seed)
    net, unbroken = Transformer().double(), Transformer().double()
    unbroken.load_state_dict(net.state_dict())
    optimizer, scheduler = set_up(net, steps)
    own_optimizer, own_scheduler = set_up(unbroken, steps)
    train_torch(net, optimizer, scheduler, x, y, thirds[0])
    for third in thirds[:2]:
        train_torch(unbroken, own_optimizer, own_scheduler, x, y, third)

    model = FlaxTransformer(nnx.Rngs(seed))
    pair = interop.match(net, model)
    print(pair)
    images, labels = interop.to_jax((x, y))
    tx, state = pair.optimizer_to_jax(optimizer, scheduler)
    results: dict[str, float] = {}

    nnx.update(model, pair.to_jax(net))
    adamw = optax.adamw(5e-3, b2=0.98)
    train_jax(model, adamw, adamw.init(nnx.state(model, nnx.Param)), images, labels, thirds[1])
    with_defaults = pair.to_torch(nnx.state(model, nnx.Param))

    nnx.update(model, pair.to_jax(net))
    state = train_jax(model, tx, state, images, labels, thirds[1])
    net.load_state_dict(pair.to_torch(nnx.state(model, nnx.Param)))
    keys, results["apart after the second third"] = apart(net.state_dict(), unbroken.state_dict())
    results["keys' biases after the second third"] = keys
    _, results["decay: AdamW's own"] = apart(with_defaults, unbroken.state_dict())
    for _ in thirds[1]:
        scheduler.step()
    pair.optimizer_to_torch(state, optimizer)
    results["rate apart"] = abs(optimizer.param_groups[0]["lr"] - own_optimizer.param_groups[0]["lr"])

    train_torch(net, optimizer, scheduler, x, y, thirds[2])
    train_torch(unbroken, own_optimizer, own_scheduler, x, y, thirds[2])
    _, results["apart after the last third"] = apart(net.state_dict(), unbroken.state_dict())
    with torch.no_grad():
        results["accuracy"] = (net(x_test).argmax(1).numpy() == data.y_test).mean()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and the batches (%(default)s)")
    parser.add_argument("--steps", type=int, default=90, help="in all, a third of them in JAX (%(default)s)")
    for name, value in run(**vars(parser.parse_args())).items():
        print(f"{name:.<60} {value:.4g}")


if __name__ == "__main__":
    main()

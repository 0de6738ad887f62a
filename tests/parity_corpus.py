"""Pairs of functions whose answer is known: the same mathematics written differently, or a fault that ports have.

The thresholds of `interop.verdict` were chosen on one half and are reported on the other. The halves: the pairs of each
truth in the order of their names, every second one is held out, but none by which the rules have been changed
(`hard`). `python tests/parity_corpus.py` prints the table.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax import lax, nn

import funcreg.jax as frj
import funcreg.torch as frt
from funcreg import interop
from interop import Report, Verdict


class Pair(NamedTuple):
    """Two functions and their inputs, or two training steps with params, hyper and batches."""

    name: str
    truth: Verdict
    torch: Any
    jax: Any
    inputs: tuple[Any, ...]
    training: bool = False
    hard: bool = False

    def __str__(self) -> str:
        return self.name

    def check(self) -> Report:
        if not self.training:
            return interop.check(self.torch, jax.jit(self.jax), *self.inputs, hints=False)
        init, step = self.jax
        return interop.check_training(self.torch, (init, jax.jit(step)), *self.inputs, hints=False)


PAIRS: list[Pair] = []


def same(name: str, torch_fn: Callable[..., Any], jax_fn: Callable[..., Any], *inputs: Any) -> None:
    PAIRS.append(Pair(name, Verdict.ROUNDING, torch_fn, jax_fn, inputs))


def differ(name: str, torch_fn: Callable[..., Any], jax_fn: Callable[..., Any], *inputs: Any) -> None:
    PAIRS.append(Pair(name, Verdict.SEMANTIC, torch_fn, jax_fn, inputs))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- activations ---

X = 3 * normal(8, 16)

same("gelu, exact", F.gelu, lambda x: nn.gelu(x, approximate=False), X)
same("gelu, by tanh", lambda x: F.gelu(x, approximate="tanh"), nn.gelu, X)
differ("gelu, exact and by tanh", F.gelu, nn.gelu, X)
same("softplus", F.softplus, nn.softplus, X)
differ("softplus, linear above 20", F.softplus, nn.softplus, 25 + X / 3)
same("log softmax", lambda x: F.log_softmax(x, -1), nn.log_softmax, X)
differ("leaky relu, another slope", F.leaky_relu, lambda x: nn.leaky_relu(x, 0.011), X)

# --- norms ---


def layer_norm_jax(x, eps, fast=False):
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.var(x, -1, keepdims=True)
    if fast:  # as flax has it
        var = nn.relu(jnp.mean(x * x, -1, keepdims=True) - mean * mean)
    return (x - mean) / jnp.sqrt(var + eps)


def layer_norm_torch(eps):
    return lambda x: F.layer_norm(x, (x.shape[-1],), eps=eps)


SHIFTED = 1000 + 0.01 * normal(8, 32)
same("layer norm", layer_norm_torch(1e-5), lambda x: layer_norm_jax(x, 1e-5), X)
same("layer norm at mean 1000", layer_norm_torch(1e-6), lambda x: layer_norm_jax(x, 1e-6), SHIFTED)
same("layer norm at mean 1000, fast variance", layer_norm_torch(1e-6), lambda x: layer_norm_jax(x, 1e-6, True), SHIFTED)
differ("layer norm, eps 1e-5 and 1e-6", layer_norm_torch(1e-5), lambda x: layer_norm_jax(x, 1e-6), X)
differ("layer norm, eps 1e-5 and 1.001e-5", layer_norm_torch(1e-5), lambda x: layer_norm_jax(x, 1.001e-5), X)
differ("layer norm at mean 1000, eps", layer_norm_torch(1e-5), lambda x: layer_norm_jax(x, 1e-6), SHIFTED)
differ(
    "rms norm, eps of the dtype and 1e-6",
    lambda x: F.rms_norm(x, (x.shape[-1],)),
    lambda x: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6),
    X,
)
differ("variance, unbiased and biased", lambda x: torch.var(x, 0), lambda x: jnp.var(x, 0), X)
same("variance, unbiased", lambda x: torch.var(x, 0), lambda x: jnp.var(x, 0, ddof=1), X)


def running_variance(x, unbiased):
    mean = jnp.mean(x, 0, keepdims=True)
    factor = x.shape[0] / (x.shape[0] - 1) if unbiased else 1.0
    return 0.9 + 0.1 * factor * jnp.mean((x - mean) ** 2, 0)


def torch_running_variance(x):
    mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    F.batch_norm(x, mean, var, training=True)
    return var


differ("batch norm's running variance", torch_running_variance, lambda x: running_variance(x, False), X)
same("batch norm's running variance, unbiased", torch_running_variance, lambda x: running_variance(x, True), X)


def batch_norm_bias_gradient(torch_side):
    def torch_loss(b, x):
        return (F.batch_norm(x + b, None, None, training=True) * torch.sin(x)).sum()

    def jax_loss(b, x):
        h = x + jnp.broadcast_to(b, x.shape)
        h = (h - jnp.mean(h, 0, keepdims=True)) / jnp.sqrt(jnp.var(h, 0, keepdims=True) + 1e-5)
        return jnp.sum(h * jnp.sin(x))

    return torch.func.grad(torch_loss) if torch_side else jax.grad(lambda b, x: jax_loss(b[None], x))


same(
    "gradient that is nothing but rounding: bias in front of a batch norm",
    batch_norm_bias_gradient(True),
    batch_norm_bias_gradient(False),
    normal(16, seed=1),
    X,
)

# --- layers and layouts ---

W = normal(16, 16, seed=1) / 4
IMAGE, KERNEL = normal(2, 3, 8, 8), normal(4, 3, 3, 3, seed=1)


def conv_jax(x, w, padding, strides=(1, 1)):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NCHW", "OIHW", "NCHW"))


same("dense", F.linear, lambda x, w: x @ w.T, X, W)
differ("dense, square kernel not transposed", F.linear, lambda x, w: x @ w, X, W)
same("matmul of 2000 terms", torch.matmul, jnp.matmul, normal(4, 2000), normal(2000, 4, seed=1))
same("conv", lambda x, w: F.conv2d(x, w, padding=1), lambda x, w: conv_jax(x, w, "SAME"), IMAGE, KERNEL)
differ(
    "conv, stride 2, padding 1 and SAME",
    lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    lambda x, w: conv_jax(x, w, "SAME", (2, 2)),
    IMAGE,
    KERNEL,
)
differ(
    "flatten of an image in the other layout",
    lambda x, w: x.flatten(1) @ w,
    lambda x, w: x.transpose(0, 2, 3, 1).reshape(2, -1) @ w,
    IMAGE,
    normal(192, 4),
)


def attention_jax(q, k, v, mask, keep=True):
    scores = q @ k.T / q.shape[-1] ** 0.5
    return nn.softmax(jnp.where(mask if keep else ~mask, scores, -jnp.inf), -1) @ v


MASK = np.tril(np.ones((8, 8), bool)) ^ (np.arange(8) == 3)
MASK[0, 0] = MASK[3, 3] = True
QKV = (X / 3, normal(8, 16, seed=1), normal(8, 16, seed=2))
sdpa = functools.partial(F.scaled_dot_product_attention, dropout_p=0.0)
same("attention", lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), attention_jax, *QKV, MASK)
differ(
    "attention, polarity of the mask",
    lambda q, k, v, m: sdpa(q, k, v, attn_mask=m),
    lambda q, k, v, m: attention_jax(q, k, v, m.at[-1, 0].set(False), keep=False),
    *QKV,
    MASK & (np.arange(8) != 5),
)


def gru_torch(x, h, wi, wh, bi, bh):
    return torch.gru_cell(x, h, wi, wh, bi, bh)


def gru_jax(x, h, wi, wh, bi, bh, summed):
    gates = [part[None] for part in jnp.split(bi + bh if summed else bi, 3)]
    mine = [part[None] for part in jnp.split(jnp.zeros_like(bh) if summed else bh, 3)]
    a = [x @ w.T + jnp.broadcast_to(b, h.shape) for w, b in zip(jnp.split(wi, 3), gates, strict=True)]
    c = [h @ w.T + jnp.broadcast_to(b, h.shape) for w, b in zip(jnp.split(wh, 3), mine, strict=True)]
    r, z = nn.sigmoid(a[0] + c[0]), nn.sigmoid(a[1] + c[1])
    return (1 - z) * jnp.tanh(a[2] + r * c[2]) + z * h


GRU = (X / 3, normal(8, 5), normal(15, 16, seed=1), normal(15, 5, seed=2), normal(15, seed=3), normal(15, seed=4))
same("gru cell", gru_torch, lambda *a: gru_jax(*a, summed=False), *GRU)
differ("gru cell, biases of the candidate summed", gru_torch, lambda *a: gru_jax(*a, summed=True), *GRU)

# --- losses and penalties ---

Y = normal(8, 16, seed=5)
LABELS = np.arange(8) % 5
same("mean squared error", F.mse_loss, lambda x, y: jnp.mean((x - y) ** 2), X, Y)
differ("mean and sum", F.mse_loss, lambda x, y: jnp.sum((x - y) ** 2), X, Y)
same("huber", lambda x, y: F.huber_loss(x, y), lambda x, y: jnp.mean(optax.huber_loss(x, y)), X, Y)
differ(
    "smooth l1 and huber",
    lambda x, y: F.smooth_l1_loss(x, y, beta=0.5),
    lambda x, y: jnp.mean(optax.huber_loss(x, y, delta=0.5)),
    X,
    Y,
)


def cross_entropy_jax(x, labels, weight=None, smoothing=0.0):
    target = jnp.eye(x.shape[-1], dtype=x.dtype)[labels] * (1 - smoothing) + smoothing / x.shape[-1]
    each = -jnp.sum(target * nn.log_softmax(x, -1), -1)
    return jnp.mean(each if weight is None else each * weight[labels])


same(
    "cross entropy with label smoothing",
    lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    lambda x, y: cross_entropy_jax(x, y, smoothing=0.1),
    X,
    LABELS,
)
differ(
    "cross entropy, weights normalised",
    lambda x, y, w: F.cross_entropy(x, y, w),
    cross_entropy_jax,
    X,
    LABELS,
    1 + np.abs(normal(16)),
)
differ("median of an even number", lambda x: torch.median(x, 0).values, lambda x: jnp.median(x, axis=0), X)
ZEROED = np.where(np.abs(X) < 1.5, 0.0, X)
differ(
    "gradient of abs at zeros",
    torch.func.grad(lambda w: w.abs().sum()),
    jax.grad(lambda w: jnp.sum(jnp.abs(w))),
    ZEROED,
)
same("gradient of l1 at zeros", lambda w: frt.l1(0.1).grad(w), lambda w: frj.l1(0.1).grad(w), ZEROED)
differ(
    "gradient of maximum with 0 at zeros",
    torch.func.grad(lambda w: torch.relu(w).sum()),
    jax.grad(lambda w: jnp.sum(jnp.maximum(w, 0.0))),
    ZEROED,
)
same(
    "prox of group lasso",
    lambda w: frt.group_lasso(0.3, axis=-1).prox(w, 0.5),
    lambda w: frj.group_lasso(0.3, axis=-1).prox(w, 0.5),
    ZEROED,
)
differ(
    "norm of a group with and without the root of its size",
    lambda w: frt.group_lasso(0.3, axis=-1).prox(w, 0.5),
    lambda w: frj.group_lasso(0.3, axis=-1, group_scale="one").prox(w, 0.5),
    ZEROED,
)
U, _, V = np.linalg.svd(normal(6, 4), full_matrices=False)
same(
    "gradient of the nuclear norm, nearly rank deficient",
    torch.func.grad(lambda w: torch.linalg.svdvals(w).sum()),
    lambda w: (lambda u, s, v: u @ v)(*jnp.linalg.svd(w, full_matrices=False)),
    (U * [2.0, 1.0, 1e-3, 1e-7]) @ V,
)
same(
    "norm of the clipped gradient",
    lambda g: g * torch.clamp(1.0 / g.norm(), max=1.0),
    lambda g: g / jnp.maximum(jnp.linalg.norm(g), 1.0),
    X,
)
differ(
    "norm of the clipped gradient, with 1e-6",
    lambda g: g * torch.clamp(1.0 / (g.norm() + 1e-6), max=1.0),
    lambda g: g / jnp.maximum(jnp.linalg.norm(g), 1.0),
    X,
)

# --- badly conditioned, unstable, chaotic ---

HILBERT = 1 / (np.arange(8)[:, None] + np.arange(8)[None] + 1.0)
same("solution of a Hilbert system", torch.linalg.solve, lambda a, b: jnp.linalg.inv(a) @ b, HILBERT, normal(8, 2))
differ(
    "solution of a Hilbert system, a ridge of 1e-6",
    lambda a, b: torch.linalg.solve(a + 1e-6 * torch.eye(8), b),
    lambda a, b: jnp.linalg.inv(a) @ b,
    HILBERT,
    normal(8, 2),
)
NEAR = 1 + 0.02 * normal(16)
same(
    "polynomial near its root, expanded",
    lambda x: (x - 1) ** 5,
    lambda x: x**5 - 5 * x**4 + 10 * x**3 - 10 * x**2 + 5 * x - 1,
    NEAR,
)
same("sum with cancellation", torch.sum, lambda x: jnp.sum(x[::-1]), 1e6 * normal(4000) - 1e6 * normal(4000)[::-1])
same("tiny numbers", lambda x: (x * x).sum(0), lambda x: jnp.sum(x**2, 0), 1e-12 * X)


def logistic(x, rate, steps=30):
    for _ in range(steps):
        x = rate * x * (1 - x)
    return x


def logistic_expanded(x, rate, steps=30):
    for _ in range(steps):
        x = rate * (x - x * x)
    return x


UNIT = np.linspace(0.1, 0.9, 16)
same("thirty steps of a chaotic map", lambda x: logistic(x, 3.9), lambda x: logistic_expanded(x, 3.9), UNIT)
differ("a chaotic map, 1e-6 apart", lambda x: logistic(x, 3.9), lambda x: logistic_expanded(x, 3.900001), UNIT)

# --- pairs by which the rules have been changed ---


def hard(judge, *args):
    judge(*args)
    PAIRS[-1] = PAIRS[-1]._replace(hard=True)


SMALL = 1e-3 * normal(16)
SPD = normal(16, 8).T @ normal(16, 8) + 0.1 * np.eye(8)
hard(same, "one minus cosine, small", lambda x: 1 - torch.cos(x), lambda x: 2 * jnp.sin(x / 2) ** 2, SMALL)
hard(same, "log1p, small", torch.log1p, lambda x: jnp.log(1 + x), SMALL**2)
hard(
    same,
    "variance at a large mean",
    lambda x: x.var(unbiased=False),
    lambda x: jnp.mean(x**2) - jnp.mean(x) ** 2,
    1e4 + X,
)
hard(differ, "log determinant, jitter 1e-8", torch.logdet, lambda a: jnp.linalg.slogdet(a + 1e-8 * jnp.eye(8))[1], SPD)
hard(
    differ,
    "learning rate of float32",
    lambda w, g: w - 1e-3 * g,
    lambda w, g: w - float(np.float32(1e-3)) * g,
    X,
    X[::-1].copy(),
)
hard(
    differ,
    "unit vectors, eps added",
    lambda x: F.normalize(x, dim=-1),
    lambda x: x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8),
    X,
)

SCALES = np.array([1e12, -30.0, -9.0, -7.0, -5.0, -3.0, -0.5, 1e-9, 0.5, 3.0, 9.0])
hard(same, "gelu, exact, of all scales", F.gelu, lambda x: nn.gelu(x, approximate=False), SCALES)
hard(differ, "gelu, exact and by tanh, beside a huge entry", F.gelu, nn.gelu, np.array([1e15, 1.0, -1.0]))
hard(
    differ,
    "softmax, another temperature in its tails",
    lambda x: torch.softmax(x, 0),
    lambda x: nn.softmax(jnp.where(x < -50, 1.01 * x, x)),
    np.array([0.0, -3.0, -60.0, -90.0]),
)
FLAT = np.concatenate([1e8 + 0.01 * normal(1, 16), 3 * normal(3, 16, seed=1)])
hard(same, "layer norm, one row at mean 1e8", layer_norm_torch(1e-5), lambda x: layer_norm_jax(x, 1e-5), FLAT)
hard(
    differ,
    "layer norm, one row at mean 1e8, another eps in the others",
    layer_norm_torch(1e-5),
    lambda x: layer_norm_jax(x, jnp.where(jnp.arange(4) == 0, 1e-5, 1.01e-5)[:, None]),
    FLAT,
)
POINTS = normal(12, 4) * 10.0 ** np.linspace(-4, 4, 12)[:, None]
hard(
    same,
    "distances of points of all scales, expanded",
    lambda x: ((x[:, None] - x[None]) ** 2).sum(-1),
    lambda x: jnp.sum(x * x, -1)[:, None] + jnp.sum(x * x, -1)[None] - 2 * x @ x.T,
    POINTS,
)
TERMS = (1e6 * normal(50_000), normal(50_000, seed=1))
hard(
    same,
    "fifty thousand sums that cancel",
    lambda x, y, z: x + y - z,
    lambda x, y, z: x - (z - y),
    *TERMS,
    TERMS[0] * (1 + 1e-9 * TERMS[1]),
)
hard(
    same,
    "attention, JAX's own with a softmax in float32",
    lambda q, k, v: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
    nn.dot_product_attention,
    *(normal(2, 5, 3, 8, seed=i) for i in range(3)),
)
hard(
    differ,
    "attention in float32, another scale",
    lambda q, k, v: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
    lambda q, k, v: nn.dot_product_attention(q, k, v, scale=8**-0.5 * (1 + 2e-7)),
    *(normal(2, 5, 3, 8, seed=i) for i in range(3)),
)
hard(
    differ,
    "whole numbers, one apart, floats on one side",
    lambda n: n * 10**7,
    lambda n: n.astype(float) * 10**7 + 1,
    np.arange(5) + 10**4,
)

# --- optimizers: a few steps on a badly scaled quadratic, as a function of the parameters ---

STEPS = 6


def quadratic(w, a):
    return ((a @ w - 1.0) ** 2).sum() / 2


def by_torch_optim(make):
    def run(w, a):
        w = w.clone().requires_grad_()
        optimizer = make([w])
        for _ in range(STEPS):
            optimizer.zero_grad()
            quadratic(w, a).backward()
            optimizer.step()
        return w.detach()

    return run


def by_optax(transformation):
    def run(w, a):
        def step(_, carry):
            w, state = carry
            updates, state = transformation.update(jax.grad(quadratic)(w, a), state, w)
            return optax.apply_updates(w, updates), state

        return lax.fori_loop(0, STEPS, step, (w, transformation.init(w)))[0]

    return run


def optimizers(judge, name, ours, theirs):
    judge(name, by_torch_optim(ours), by_optax(theirs), normal(7), normal(9, 7, seed=1))


optimizers(differ, "adamw, default decays", lambda w: torch.optim.AdamW(w, 0.1), optax.adamw(0.1))
optimizers(
    differ,
    "sgd, dampening",
    lambda w: torch.optim.SGD(w, 0.01, momentum=0.9, dampening=0.9),
    optax.sgd(0.01, momentum=0.9),
)
optimizers(
    same,
    "rmsprop, eps outside the root",
    lambda w: torch.optim.RMSprop(w, 0.01),
    optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False),
)
optimizers(
    differ,
    "rmsprop, eps in the root",
    lambda w: torch.optim.RMSprop(w, 0.01),
    optax.rmsprop(0.01, decay=0.99),
)
optimizers(differ, "radam, where eps stands", lambda w: torch.optim.RAdam(w, 0.1), optax.radam(0.1))
optimizers(same, "adam, b2 0.9999", lambda w: torch.optim.Adam(w, 0.1, (0.9, 0.9999)), optax.adam(0.1, b2=0.9999))

# --- training ---


def loss(np_like):
    def of(params, x, y):
        hidden = np_like.tanh(x @ params["hidden"])
        return ((hidden @ params["out"] - y) ** 2).mean()

    return of


PARAMS = {"hidden": normal(6, 5), "out": normal(5, 2, seed=1)}
HYPER = {"lr": 0.05, "lam": 0.02}


def train(judge, name, ours, theirs, steps=5, hyper=None, loss_jax=None, scale=1.0):
    """`ours` and `theirs`: hyper -> transformation; twelve rows a batch."""
    batches = [(scale * normal(12, 6, seed=i), normal(12, 2, seed=100 + i)) for i in range(steps)]
    sides = (frt.train_step(loss(torch), ours), frj.train_step(loss_jax or loss(jnp), theirs))
    truth = Verdict.ROUNDING if judge is same else Verdict.SEMANTIC
    PAIRS.append(Pair(f"training: {name}", truth, *sides, (PARAMS, hyper or HYPER, batches), True))


def adam_then_threshold(h):
    """The tempting wrong composition: a soft threshold of lr * lam after the step of Adam."""
    adam = optax.adam(h["lr"])

    def update(updates, state, params):
        updates, state = adam.update(updates, state, params)
        moved = optax.apply_updates(params, updates)
        cut = jax.tree.map(lambda w: frj.functional.prox_l1(w, h["lr"], h["lam"]), moved)
        return jax.tree.map(jnp.subtract, cut, params), state

    return optax.GradientTransformation(adam.init, update)


train(
    same,
    "prox_adam",
    lambda h: frt.prox_adam(h["lr"], frt.l1(h["lam"])),
    lambda h: frj.prox_adam(h["lr"], frj.l1(h["lam"])),
)
train(
    differ,
    "prox_adam and a threshold after adam",
    lambda h: frt.prox_adam(h["lr"], frt.l1(h["lam"])),
    adam_then_threshold,
)
train(
    same,
    "prox_sgd, group lasso, momentum",
    lambda h: frt.prox_sgd(h["lr"], frt.group_lasso(h["lam"], axis=-1), momentum=0.9),
    lambda h: frj.prox_sgd(h["lr"], frj.group_lasso(h["lam"], axis=-1), momentum=0.9),
)
train(
    same,
    "adamw and its parts",
    lambda h: frt.optax.adamw(h["lr"], weight_decay=h["lam"]),
    lambda h: optax.chain(
        optax.scale_by_adam(), frj.add_penalty_gradient(frj.l2(h["lam"])), optax.scale_by_learning_rate(h["lr"])
    ),
)
train(
    differ,
    "decay coupled and decoupled",
    lambda h: frt.optax.chain(frt.optax.add_decayed_weights(h["lam"]), frt.optax.adam(h["lr"])),
    lambda h: optax.adamw(h["lr"], weight_decay=h["lam"]),
)
train(
    same,
    "a schedule",
    lambda h: frt.optax.sgd(frt.optax.cosine_decay_schedule(0.1, 8)),
    lambda h: optax.sgd(optax.cosine_decay_schedule(0.1, 8)),
)
train(
    differ,
    "a schedule that is one step off",
    lambda h: frt.optax.sgd(frt.optax.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: optax.linear_schedule(0.1, 0.0, 8)(count + 1)),
)
train(
    differ,
    "the loss of the other side is a sum",
    lambda h: frt.optax.sgd(h["lr"]),
    lambda h: optax.sgd(h["lr"] / 2),
    loss_jax=lambda params, x, y: 2 * jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2),
)
train(
    differ,
    "adam, eps 1e-8 and 1e-7",
    lambda h: frt.optax.adam(h["lr"]),
    lambda h: optax.adam(h["lr"], eps=1e-7),
)
train(
    same,
    "chaotic, a learning rate far too large",
    lambda h: frt.optax.sgd(h["lr"], momentum=0.9),
    lambda h: optax.sgd(h["lr"], momentum=0.9),
    steps=30,
    hyper={"lr": 0.5},
    scale=3.0,
)
train(
    differ,
    "chaotic, momentum 0.9 and 0.9001",
    lambda h: frt.optax.sgd(h["lr"], momentum=0.9),
    lambda h: optax.sgd(h["lr"], momentum=0.9001),
    steps=30,
    hyper={"lr": 0.5},
    scale=3.0,
)


def held_out() -> set[str]:
    """The names of the half on which the thresholds are reported."""
    names = {
        v: sorted(p.name for p in PAIRS if p.truth is v and not p.hard) for v in (Verdict.ROUNDING, Verdict.SEMANTIC)
    }
    return {name for of_truth in names.values() for name in of_truth[1::2]}


def right(pairs: list[tuple[Pair, Report]]) -> tuple[int, int]:
    """How many verdicts are right, and how many say the opposite of the truth."""
    hits = sum(report.verdict is pair.truth for pair, report in pairs)
    wrong = sum(report.verdict not in (pair.truth, Verdict.INCONCLUSIVE) for pair, report in pairs)
    return hits, wrong


def close_in_float32(report: Report) -> bool:
    """What the usual closeness test says of the float32 run, with the tolerances of torch.testing and atol 1e-5."""
    for leaf in report.leaves:
        errors = leaf.float32
        if errors is None or leaf.judgement is None:  # without one, infinities or NaN of one side
            return False
        size = errors.absolute / errors.relative if errors.relative else 0.0
        if errors.absolute > 1e-5 + 1.3e-6 * size:
            return False
    return True


def table(results: list[tuple[Pair, Report]]) -> str:
    """Every pair with its verdict, its largest errors and the measures of both rules."""
    lines = []
    for pair, report in results:
        leaf = max(report.worst(), key=lambda leaf: (leaf.verdict is report.verdict, leaf.judgement is not None))
        judged, mark = leaf.judgement, {pair.truth: " ", Verdict.INCONCLUSIVE: "?"}.get(report.verdict, "!")
        numbers = f"{leaf.float64.relative:.1e} {leaf.float32.relative:.1e}" if leaf.float64 and leaf.float32 else ""
        numbers += f" {judged.ratio:.1e} {judged.excess:.1e}" if judged and judged.ratio is not None else ""
        rules = f" {judged.by_precision or '-'!s:12} {judged.by_conditioning or '-'!s:12}" if judged else ""
        lines.append(f"{mark} {pair.truth:9} {report.verdict:12} {numbers:32} {rules}  {pair.name}")
    return "\n".join(lines)


def main() -> None:
    results = [(pair, pair.check()) for pair in PAIRS if not sys.argv[1:] or sys.argv[1] in pair.name]
    aside = held_out()
    print("  truth     verdict      64 rel  32 rel  64/32   by an ulp   by precision  by conditioning")
    for label, half in (
        ("thresholds chosen on", [r for r in results if r[0].name not in aside]),
        ("held out", [r for r in results if r[0].name in aside]),
    ):
        hits, wrong = right(half)
        print(f"--- {label}: {hits} of {len(half)} right, {wrong} wrong", table(half), sep="\n")
    close = sum(close_in_float32(report) == (pair.truth is Verdict.ROUNDING) for pair, report in results)
    print(f"--- a closeness test in float32: {close} of {len(results)} right")


if __name__ == "__main__":
    main()

"""Functions that differ by what none of the kinds of hints explains, and mixtures of two that one of them explains."""

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

from hints_case import LABELS, Case, W, X, Y
from hints_functions import IMAGE, MASK, QKV, ZEROED, _ignoring
from parity_corpus import conv_jax, cross_entropy_jax, gru_jax, layer_norm_jax, normal

CASES: list[Case] = []


def other(name: str, torch_fn: Callable[..., Any], jax_fn: Callable[..., Any], *inputs: Any) -> None:
    CASES.append(Case("", name, torch_fn, jax_fn, inputs))


def _length(x):
    return jnp.linalg.norm(x, axis=-1, keepdims=True)


def _root(x, eps):
    return jnp.sqrt(jnp.sum(x * x) + eps)


def _both():
    def ours(x):
        return {"value": x.square().sum(), "gradient": x}

    return ours, lambda x: {"value": 2 * jnp.sum(x * x), "gradient": 3 * x}


def _scores():
    def ours(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    return ours, lambda q, k, v: jax.nn.softmax(q @ k.T / q.shape[-1], -1) @ v


def _strided():
    return lambda x, w: F.conv2d(x, w, stride=2, padding=1), lambda x, w: conv_jax(x, w, "SAME", (2, 2))


def _turned():
    return lambda x, w: F.conv2d(x, w), lambda x, w: conv_jax(x, jnp.rot90(w, axes=(2, 3)), "VALID")


def _hubers():
    return (
        lambda x, y: F.smooth_l1_loss(x, y, beta=0.3),
        lambda x, y: jnp.mean(optax.huber_loss(x, y, delta=0.3)),
    )


def _smoothed():
    def theirs(x, y):
        hot = jax.nn.one_hot(y, 6, dtype=x.dtype)
        return jnp.mean(optax.softmax_cross_entropy(x, 0.9 * hot + 0.1 / 5 * (1 - hot)))

    return lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), theirs


def _smoothed_by(smoothing):
    return F.cross_entropy, lambda x, y: cross_entropy_jax(x, y, smoothing=smoothing)


def _shifted_mask():
    return (
        lambda x, m: (x @ x.T).masked_fill(~m, -torch.inf).softmax(-1),
        lambda x, m: jax.nn.softmax(jnp.where(jnp.roll(m, 1, 0).at[0, 0].set(True), x @ x.T, -jnp.inf), -1),
    )


def _slopes():
    ours = torch.func.grad(lambda w: w.abs().sum())
    return ours, jax.grad(lambda w: jnp.sum(jnp.where(w > 0, w, jnp.where(w == 0, 0.3 * w, -w))))


def _gru():
    inputs = normal(8, 6), normal(8, 5), normal(15, 6, seed=1), normal(15, 5, seed=2), normal(15), normal(15, seed=4)
    return torch.gru_cell, lambda *a: gru_jax(*a, summed=True), *inputs


def _gelu_and_eps():
    return lambda x: F.layer_norm(F.gelu(x), (6,)), lambda x: layer_norm_jax(linen.gelu(x), 1e-6)


def _variance_and_eps():
    def ours(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()

    return ours, lambda x: layer_norm_jax(x, 1e-3)


def _flattened_and_mirrored():
    def theirs(x, w):
        return conv_jax(x, w[:, :, ::-1, ::-1], "SAME").transpose(0, 2, 3, 1).reshape(2, -1)

    return lambda x, w: F.conv2d(x, w, padding=1).flatten(1), theirs


other("softplus, linear above 20", F.softplus, jax.nn.softplus, 25 + X)
other("leaky relu, another slope", F.leaky_relu, lambda x: jax.nn.leaky_relu(x, 0.011), X)
other("elu, another alpha", F.elu, lambda x: jax.nn.elu(x, 1.1), X)
other("relu and gelu", torch.relu, linen.gelu, X)
other("a sigmoid instead of gelu's erf", F.gelu, lambda x: x * jax.nn.sigmoid(1.702 * x), X)
other("softmax over another axis", lambda x: x.softmax(0), lambda x: jax.nn.softmax(x, 1), X)
other("a residual connection is missing", lambda x, w: x + torch.tanh(x @ w), lambda x, w: jnp.tanh(x @ w), X, W)
other("layer norm, eps 1e-5 and 1.001e-5", lambda x: F.layer_norm(x, (6,)), lambda x: layer_norm_jax(x, 1.001e-5), X)
other("layer norm, eps 1e-5 and 1.001e-6", lambda x: F.layer_norm(x, (6,)), lambda x: layer_norm_jax(x, 1.001e-6), X)
other("unit vectors, eps added", lambda x: F.normalize(x, dim=-1), lambda x: x / (_length(x) + 1e-8), X)
other("an epsilon under the root and its root beside", lambda x: x / (x.norm() + 1e-3), lambda x: x / _root(x, 1e-6), X)
other("variances over another axis", lambda x: x.var(0), lambda x: jnp.var(x, 1)[:6], normal(6, 6))
other("by n + 1", lambda x: x.var(0), lambda x: jnp.var(x, 0, ddof=-1), X)
other("median of an even number", lambda x: x.median(0).values, lambda x: jnp.median(x, axis=0), X)
other("exclusive sums", lambda x: x.cumsum(0), lambda x: jnp.cumsum(x, 0) - x, X)
other("a factor of 3", lambda x: x.square().sum(), lambda x: 3 * jnp.sum(x * x), X)
other("a factor of 2.000001", lambda x: x.square().mean(), lambda x: 2.000001 * jnp.mean(x * x), X)
other("two factors, of a value and a gradient", *_both(), X)
other("scores by the width, not its root", *_scores(), *QKV)
other("a mean of fewer rows", lambda x: x.mean(0), lambda x: jnp.mean(x[1:], 0), X)
other("a mean over another axis", lambda x: x.mean(0), lambda x: jnp.mean(x, 1), normal(6, 6))
other("stride 2, padding 1 and SAME", *_strided(), IMAGE, normal(4, 3, 3, 3))
other("a kernel turned by a quarter", *_turned(), IMAGE, normal(4, 3, 3, 3))
other("axes flattened backwards", lambda x: x.flatten(1), lambda x: x.transpose(0, 3, 2, 1).reshape(2, -1), IMAGE)
other("smooth l1 and huber", *_hubers(), 3 * X, Y)
other("cross entropy, weights normalised", F.cross_entropy, cross_entropy_jax, X, LABELS, 1 + np.abs(normal(6)))
other("label smoothing over the other classes", *_smoothed(), X, LABELS)
other("label smoothing by 0.123", *_smoothed_by(0.123), X, LABELS)
other("two labels ignored", F.cross_entropy, lambda x, y: _ignoring(x, jnp.where(y == 1, 0, y)), X, LABELS)
other("a mask that is one off", *_shifted_mask(), X, MASK)
other("slopes at 0 that no one takes", *_slopes(), ZEROED)
other("gru, biases summed", *_gru())
other("a learning rate that is a little off", lambda w, g: w - 1e-3 * g, lambda w, g: w - 1.0001e-3 * g, X, Y)
other("two: gelu and eps", *_gelu_and_eps(), X)
other("two: transposed and a sum", lambda x, w: (x @ w).square().mean(), lambda x, w: jnp.sum((x @ w.T) ** 2), X, W)
other("two: biased variance and eps", *_variance_and_eps(), X)
other("two: flattened and mirrored", *_flattened_and_mirrored(), IMAGE, normal(3, 3, 3, 3))

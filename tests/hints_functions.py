"""Functions with a fault that ports have, by the kind of hint that is right for it."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax import lax

import funcreg.jax as frj
from hints_case import LABELS, Case, W, X
from parity_corpus import attention_jax, conv_jax, cross_entropy_jax, layer_norm_jax, normal

CASES: list[Case] = []


def fault(kind: str, name: str, torch_fn: Callable[..., Any], jax_fn: Callable[..., Any], *inputs: Any) -> None:
    CASES.append(Case(kind, name, torch_fn, jax_fn, inputs))


IMAGE = normal(2, 3, 4, 4, seed=2)
ZEROED = np.where(np.abs(X) < 0.6, 0.0, X)
MASK = np.tril(np.ones((8, 8), bool))
MASK[2, 1] = False


# --- layouts ---

fault("transposed_kernel", "dense", F.linear, lambda x, w: x @ w, X, W)
fault(
    "transposed_kernel",
    "one of three layers, gradients of all",
    torch.func.grad(lambda p, x: (torch.tanh(torch.tanh(x @ p["a"]) @ p["b"]) @ p["c"]).square().mean()),
    jax.grad(lambda p, x: jnp.mean((jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"].T) @ p["c"]) ** 2)),
    {"a": W / 2, "b": normal(6, 6, seed=2) / 2, "c": normal(6, 6, seed=3) / 2},
    X,
)
fault(
    "transposed_kernel",
    "height and width of a convolution",
    lambda x, w: F.conv2d(x, w, padding=1),
    lambda x, w: conv_jax(x, w.transpose(0, 1, 3, 2), "SAME"),
    IMAGE,
    normal(4, 3, 3, 3),
)
fault(
    "flipped_kernel",
    "a filter that is convolved, not correlated",
    lambda x, w: F.conv2d(x, w),
    lambda x, w: conv_jax(x, w[:, :, ::-1, ::-1], "VALID"),
    IMAGE,
    normal(4, 3, 2, 3),
)
fault(
    "flipped_kernel",
    "transposed convolution, gradient",
    torch.func.grad(lambda w, x: F.conv_transpose1d(x, w, stride=2).square().sum()),
    jax.grad(
        lambda w, x: jnp.sum(
            lax.conv_general_dilated(  # PyTorch's mirrors the kernel, which this forgets
                x, w, (1,), [(2, 2)], lhs_dilation=(2,), dimension_numbers=("NCH", "IOH", "NCH")
            )
            ** 2
        )
    ),
    normal(3, 4, 3),
    normal(2, 3, 5, seed=1),
)
fault(
    "flatten_order",
    "channels last, before a dense layer",
    lambda x, w: x.flatten(1) @ w,
    lambda x, w: x.transpose(0, 2, 3, 1).reshape(2, -1) @ w,
    IMAGE,
    normal(48, 4),
)
fault(
    "flatten_order",
    "heads and their width exchanged",
    lambda x: x.reshape(8, 2, 3).softmax(-1),
    lambda x: jax.nn.softmax(jnp.swapaxes(x.reshape(8, 3, 2), 1, 2), -1),
    X,
)
fault(
    "flatten_order",
    "per example",
    torch.func.vmap(torch.func.grad(lambda w, x: (x.reshape(-1) @ w).square().sum()), (None, 0)),
    jax.vmap(jax.grad(lambda w, x: jnp.sum((x.transpose(1, 2, 0).reshape(-1) @ w) ** 2)), (None, 0)),
    normal(48, 2),
    IMAGE,
)

# --- norms ---

fault(
    "eps",
    "layer norm of flax",
    lambda x: F.layer_norm(x, (6,)),
    lambda x: linen.LayerNorm(use_scale=False, use_bias=False, use_fast_variance=False).apply({}, x),
    X / 30,
)
fault(
    "eps",
    "by hand, in the second of two",
    lambda x: _norm_torch(torch.sin(_norm_torch(x, 1e-5)), 1e-5),
    lambda x: layer_norm_jax(jnp.sin(layer_norm_jax(x, 1e-5)), 1e-3),
    X,
)

fault(
    "eps",
    "under a root, and beside it, gradient",
    torch.func.grad(lambda x: (x / (x.square().sum(-1, keepdim=True) + 1e-4).sqrt()).exp().sum()),
    jax.grad(lambda x: jnp.sum(jnp.exp(x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-4)))),
    X,
)
fault(
    "eps",
    "beside a root, and under it",
    lambda x: x / (x.norm() + 1e-6),
    lambda x: x / jnp.sqrt(jnp.sum(x * x) + 1e-6),
    X / 1e3,
)


def _norm_torch(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


fault("biased_variance", "a variance", lambda x: x.var(0), lambda x: jnp.var(x, 0), X)
fault("biased_variance", "a covariance", lambda x: x.T.cov(), lambda x: jnp.cov(x.T, ddof=0), X)
fault(
    "biased_variance",
    "standard deviation in a norm, gradient",
    torch.func.grad(lambda x: ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)).sin().sum()),
    jax.grad(
        lambda x: jnp.sum(jnp.sin((x - jnp.mean(x, -1, keepdims=True)) / jnp.std(x, -1, keepdims=True))),
    ),
    X,
)


def _batch_norm_torch(x, mean, var):
    y = F.batch_norm(x, mean, var, training=True)
    return {"y": y, "mean": mean, "var": var}


def _batch_norm_jax(x, mean, var):
    layer = linen.BatchNorm(
        use_running_average=False, momentum=0.9, epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False
    )
    y, state = layer.apply({"batch_stats": {"mean": mean, "var": var}}, x, mutable=["batch_stats"])
    return {"y": y, **state["batch_stats"]}


fault("biased_variance", "batch norm of flax", _batch_norm_torch, _batch_norm_jax, X, normal(6), np.ones(6))

# --- activations, masks, kinks ---

fault("gelu", "linen's default", torch.nn.GELU(), linen.gelu, X)
fault(
    "gelu",
    "by erf, by hand, gradient of a layer",
    torch.func.grad(lambda w, x: (h := x @ w, (0.5 * h * (1 + torch.erf(h / 2**0.5))).square().mean())[1]),
    jax.grad(lambda w, x: jnp.mean(linen.gelu(x @ w) ** 2)),
    W,
    X,
)
fault("gelu", "by the normal distribution", lambda x: x * torch.special.ndtr(x), linen.gelu, X)
QKV = (X, normal(8, 6, seed=1), normal(8, 6, seed=2))


def _opposite(mask):  # both it and its opposite leave something in every row
    return mask.at[:, 0].set(jnp.arange(8) % 2 == 0).at[:, -1].set(jnp.arange(8) % 2 == 1)


BOTH = np.array(_opposite(jnp.asarray(MASK)))
fault(
    "mask_polarity",
    "attention",
    lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    lambda q, k, v, m: attention_jax(q, k, v, m, keep=False),
    *QKV,
    BOTH,
)
CAUSAL = np.tril(np.ones((8, 8), bool))  # of whose opposite the first row leaves nothing


def _uniform_where_nothing_is_left(q, k, v, out):
    scores = q @ k.T / np.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(out, jnp.finfo(scores.dtype).min, scores)) @ v


fault(
    "mask_polarity",
    "attention, causal",
    lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    _uniform_where_nothing_is_left,
    *QKV,
    CAUSAL,
)
fault(
    "mask_polarity",
    "scores by hand, causal",
    lambda q, k, v, m: (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~m, -math.inf).softmax(-1) @ v,
    _uniform_where_nothing_is_left,
    *QKV,
    CAUSAL,
)
fault(
    "mask_polarity",
    "masked_fill of what is computed inside, gradient",
    torch.func.grad(lambda x: x.masked_fill(x > 0.3, -1.0).exp().sum()),
    jax.grad(lambda x: jnp.sum(jnp.exp(jnp.where(x > 0.3, x, -1.0)))),
    X,
)
fault(
    "mask_polarity",
    "a mask of ones and zeros",
    lambda x, m: (x * m).sum() / m.sum(),
    lambda x, m: jnp.sum(x * (1 - m)) / jnp.sum(1 - m),
    X,
    (X > 0.2) * 1.0,
)
fault(
    "subgradient",
    "abs",
    torch.func.grad(lambda w: w.abs().sum()),
    jax.grad(lambda w: jnp.sum(jnp.abs(w))),
    ZEROED,
)
fault(
    "subgradient",
    "norm of a zero group",
    torch.func.grad(lambda w: w.norm(dim=1).sum()),
    jax.grad(lambda w: jnp.sum(jnp.linalg.norm(w, axis=1))),
    ZEROED * (np.arange(8) != 3)[:, None],
)
fault(
    "subgradient",
    "clamp, below a dense layer",
    torch.func.grad(lambda w, x: (x.clamp(min=0) @ w.clamp(-1, 1)).square().sum()),
    jax.grad(lambda w, x: jnp.sum((jnp.maximum(x, 0) @ jnp.clip(w, -1, 1)) ** 2)),
    np.clip(W, -1, 1),
    X,
)
fault(
    "subgradient",
    "relu and maximum",
    torch.func.grad(lambda w: torch.relu(w).sum()),
    jax.grad(lambda w: jnp.sum(jnp.maximum(w, 0.0))),
    ZEROED,
)
fault(
    "subgradient",
    "ties of max",
    torch.func.grad(lambda w: w.max(1).values.sum()),
    jax.grad(lambda w: jnp.sum(jnp.max(w, 1))),
    np.minimum(X, 0.1),
)

# --- losses ---

fault("mean_or_sum", "squared error", F.mse_loss, lambda x, y: jnp.sum((x - y) ** 2), X, X[::-1].copy())
fault(
    "mean_or_sum",
    "of the loss over the outputs only, beside a penalty, gradient",
    torch.func.grad(lambda w, x: ((x @ w) ** 2).mean() + 0.1 * w.square().sum()),
    jax.grad(lambda w, x: jnp.mean(jnp.sum((x @ w) ** 2, -1)) + 0.1 * jnp.sum(w**2)),
    W,
    X,
)
fault(
    "mean_or_sum",
    "divergence",
    lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"),
    lambda a, b: jnp.mean(jax.nn.softmax(b) * (jax.nn.log_softmax(b) - jax.nn.log_softmax(a))),
    X,
    X[::-1].copy(),
)
fault(
    "label_smoothing",
    "value",
    lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    cross_entropy_jax,
    X,
    LABELS,
)
fault(
    "label_smoothing",
    "gradient, on the other side",
    torch.func.grad(lambda w, x, y: F.cross_entropy(x @ w, y)),
    jax.grad(
        lambda w, x, y: jnp.mean(
            optax.softmax_cross_entropy(x @ w, optax.smooth_labels(jax.nn.one_hot(y, 6, dtype=w.dtype), 0.05))
        )
    ),
    W,
    X,
    LABELS,
)


def _ignoring(x, y, counted=False):
    each = optax.softmax_cross_entropy_with_integer_labels(x, y)
    kept = (y != 0).astype(x.dtype)
    return jnp.sum(each * kept) / (y.size if counted else jnp.sum(kept))


fault("ignore_index", "padding that counts", F.cross_entropy, _ignoring, X, LABELS)
fault(
    "ignore_index",
    "all count on the other side, gradient",
    torch.func.grad(lambda w, x, y: F.cross_entropy(x @ w, y, ignore_index=0)),
    jax.grad(lambda w, x, y: cross_entropy_jax(x @ w, y)),
    W,
    X,
    LABELS,
)
fault(
    "ignore_index",
    "in the mean",
    lambda x, y: F.cross_entropy(x, y, ignore_index=0),
    lambda x, y: _ignoring(x, y, counted=True),
    X,
    LABELS,
)
fault("factor", "the half of l2", lambda w: w.square().sum(), lambda w: frj.l2(1.0).value(w), X)
fault(
    "factor",
    "of a penalty beside the loss, gradient",
    torch.func.grad(lambda w, x: ((x @ w) ** 2).mean() + 0.05 * w.square().sum()),
    jax.grad(lambda w, x: jnp.mean((x @ w) ** 2) + 0.1 * jnp.sum(w**2)),
    W,
    X,
)
fault(
    "transposed_kernel",
    "an operand of einsum",
    lambda x, w: torch.einsum("bi,oi->bo", x, w),
    lambda x, w: jnp.einsum("bi,io->bo", x, w),
    X,
    W,
)
fault(
    "eps",
    "group norm, gradient",
    torch.func.grad(lambda x: F.group_norm(x, 2, eps=1e-5).exp().sum()),
    jax.grad(
        lambda x: jnp.sum(
            jnp.exp(
                linen.GroupNorm(2, epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False).apply({}, x)
            )
        )
    ),
    X,
)
fault(
    "biased_variance",
    "by hand",
    lambda x: ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1),
    lambda x: jnp.var(x, 0),
    X,
)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x, mask):
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


def _attention_of_flax(x, mask):
    weights = {name: jnp.asarray(p.detach().double().numpy(), x.dtype) for name, p in Attention().named_parameters()}
    packed = weights["attention.in_proj_weight"].reshape(3, 2, 3, 6)
    q, k, v = (jnp.einsum("bti,hdi->bthd", x, w) for w in packed)
    heads = linen.dot_product_attention(q, k, v, mask=mask[:, None, None])  # flax keeps what is true
    return heads.reshape(x.shape) @ weights["attention.out_proj.weight"].T


fault(
    "mask_polarity",
    "padding in a layer of attention",
    Attention(),
    _attention_of_flax,
    normal(2, 4, 6),
    np.array([[True, True, False, True], [False, True, True, False]]),
)
fault(
    "subgradient",
    "a root by hand, and a norm that is safe",
    torch.func.grad(lambda w: w.square().sum(1).sqrt().sum()),
    jax.grad(lambda w: jnp.sum(optax.safe_norm(w, 0.0, axis=1))),
    ZEROED * (np.arange(8) != 3)[:, None],
)
fault("mean_or_sum", "a mean by hand", lambda x: (x**2).sum(0) / len(x), lambda x: jnp.sum(x**2, 0), X)

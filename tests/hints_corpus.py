"""Faults that ports have, by the kind of hint that is right for them; and differences that none of these kinds explains.

`python tests/hints_corpus.py [WORD]` prints every pair with the hints that it gets.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax import lax

import funcreg.jax as frj
import funcreg.torch as frt
from funcreg import interop
from interop import Report
from parity_corpus import attention_jax, conv_jax, cross_entropy_jax, gru_jax, layer_norm_jax, loss, normal


class Case(NamedTuple):
    """Two functions and their inputs, or two training steps with params, hyper and batches.

    `kind`: of the hint that is right, of two where sizes do not tell them apart; "" where none is.
    """

    kind: str
    name: str
    torch: Any
    jax: Any
    inputs: tuple[Any, ...]
    training: bool = False
    pair: Any = None

    def __str__(self) -> str:
        return f"{self.kind or 'none'}: {self.name}"

    @property
    def kinds(self) -> set[str]:
        return set(self.kind.split(" and ")) if self.kind else set()

    def check(self) -> Report:
        if self.training:
            init, step = self.jax
            return interop.check_training(self.torch, (init, jax.jit(step)), *self.inputs)
        return interop.check(self.torch, jax.jit(self.jax), *self.inputs, pair=self.pair)


CASES: list[Case] = []


def fault(kind: str, name: str, torch_fn: Callable[..., Any], jax_fn: Callable[..., Any], *inputs: Any) -> None:
    CASES.append(Case(kind, name, torch_fn, jax_fn, inputs))


X = normal(8, 6)
W = normal(6, 6, seed=1)
IMAGE = normal(2, 3, 4, 4, seed=2)
ZEROED = np.where(np.abs(X) < 0.6, 0.0, X)
MASK = np.tril(np.ones((8, 8), bool))
MASK[2, 1] = False
LABELS = np.arange(8) % 5


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
    "group norm, gradient",
    torch.func.grad(lambda x: F.group_norm(x, 3, eps=1e-5).sin().sum()),
    jax.grad(
        lambda x: jnp.sum(
            jnp.sin(
                linen.GroupNorm(3, epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False).apply({}, x)
            )
        )
    ),
    X,
)


def _norm_torch(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


fault("biased_variance", "a variance", lambda x: x.var(0), lambda x: jnp.var(x, 0), X)
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

# --- training ---

PARAMS = {"hidden": normal(6, 5), "out": normal(5, 2, seed=1)}
HYPER = {"lr": 0.05, "wd": 0.1}
BATCHES = [(normal(12, 6, seed=i), normal(12, 2, seed=100 + i)) for i in range(4)]
O = frt.optax


def train(
    kind: str, name: str, ours: Any, theirs: Any, ours_loss: Any = None, theirs_loss: Any = None, params: Any = PARAMS
) -> None:
    """`ours`: hyper -> transformation, or (init, step); `theirs`: hyper -> transformation."""
    steps = ours if isinstance(ours, tuple) else frt.train_step(ours_loss or loss(torch), ours)
    inputs = (params, HYPER, BATCHES)
    CASES.append(Case(kind, name, steps, frj.train_step(theirs_loss or loss(jnp), theirs), inputs, training=True))


def by_torch_optim(make: Callable[..., torch.optim.Optimizer], schedule: Any = None) -> Any:
    """A step with an optimizer of PyTorch, `make(params, hyper)`, that lives in the state."""

    def init(params: Any, hyper: Any) -> Any:
        params = {name: p.clone().requires_grad_() for name, p in params.items()}
        optimizer = make(list(params.values()), hyper)
        return {"params": params, "optimizer": optimizer, "schedule": schedule and schedule(optimizer)}

    def step(state: Any, hyper: Any, *batch: Any) -> Any:
        del hyper
        value = loss(torch)(state["params"], *batch)
        state["optimizer"].zero_grad()
        value.backward()
        state["optimizer"].step()
        if state["schedule"]:
            state["schedule"].step()
        return state, {"loss": value.detach()}

    return init, step


def by_hand(decay: Callable[..., tuple[Any, Any]], momentum: float = 0.9) -> Any:
    """A pure step: `decay(grad, p, hyper)` is the new gradient, and what is taken from `p` beside its step."""

    def init(params: Any, hyper: Any) -> Any:
        del hyper
        return {"params": params, "moments": {name: torch.zeros_like(p) for name, p in params.items()}, "count": 0}

    def step(state: Any, hyper: Any, *batch: Any) -> Any:
        grads, value = torch.func.grad_and_value(loss(torch))(state["params"], *batch)
        rate = hyper["lr"] / (1 + state["count"])
        params, moments = {}, {}
        for name, p in state["params"].items():
            grad, taken = decay(grads[name], p, hyper)
            moments[name] = momentum * state["moments"][name] + grad
            params[name] = p - rate * moments[name] - taken
        return {"params": params, "moments": moments, "count": state["count"] + 1}, {"loss": value}

    return init, step


def inverse_time(h: Any) -> Any:
    return lambda count: h["lr"] / (1 + count)


def taken(size: Any) -> Any:
    """Decay that no learning rate scales."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params: (jax.tree.map(lambda u, p: u - size * p, updates, params), state),
    )


def coupled(h: Any) -> Any:
    return optax.chain(optax.add_decayed_weights(h["wd"]), optax.adam(h["lr"]))


def decoupled(h: Any) -> Any:
    return optax.adamw(h["lr"], weight_decay=h["wd"])


train(
    "decoupled_decay",
    "a transformation, of constants",
    lambda h: O.chain(O.add_decayed_weights(0.1), O.adam(0.05)),
    decoupled,
)
train("decoupled_decay", "a transformation, of hyper", lambda h: O.adamw(h["lr"], weight_decay=h["wd"]), coupled)
train(
    "decoupled_decay",
    "torch.optim",
    by_torch_optim(lambda p, h: torch.optim.Adam(p, 0.05, weight_decay=0.1)),
    decoupled,
)
train(
    "decoupled_decay",
    "torch.optim, the other way",
    by_torch_optim(lambda p, h: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    coupled,
)
train(
    "decoupled_decay",
    "in the loss",
    lambda h: O.adam(h["lr"]),
    decoupled,
    ours_loss=lambda params, x, y, *, hyper: loss(torch)(params, x, y) + frt.l2(hyper["wd"]).value(params),
)
train(
    "decay_not_scaled",
    "a transformation",
    lambda h: O.adamw(0.05, weight_decay=0.1),
    lambda h: optax.chain(optax.adam(h["lr"]), taken(h["wd"])),
)
train(
    "decay_not_scaled",
    "torch.optim",
    by_torch_optim(lambda p, h: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    lambda h: optax.chain(optax.adam(h["lr"]), taken(h["wd"])),
)
train(
    "decay_not_scaled",
    "by hand, on this side",
    by_hand(lambda g, p, h: (g, h["wd"] * p)),
    lambda h: optax.chain(optax.sgd(inverse_time(h), 0.9), taken(h["wd"] * h["lr"])),
)
train(
    "dampening",
    "torch.optim",
    by_torch_optim(lambda p, h: torch.optim.SGD(p, 0.05, 0.9, 0.9)),
    lambda h: optax.sgd(0.05, 0.9),
)
train(
    "dampening",
    "a transformation, and ema",
    lambda h: O.sgd(h["lr"], 0.9),
    lambda h: optax.chain(optax.ema(0.9, debias=False), optax.scale(-h["lr"])),
)
train(
    "dampening",
    "torch.optim, all but the first",
    by_torch_optim(lambda p, h: torch.optim.SGD(p, 0.05, 0.8, 0.8)),
    lambda h: optax.chain(optax.ema(0.8, debias=False), optax.scale(-h["lr"])),
)
train(
    "off_by_one",
    "a schedule",
    lambda h: O.sgd(O.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: optax.linear_schedule(0.1, 0.0, 8)(count + 1)),
)
train(
    "off_by_one",
    "a count by hand, on this side",
    by_hand(lambda g, p, h: (g, 0.0)),
    lambda h: optax.sgd(lambda count: inverse_time(h)(count + 1), 0.9),
)
train(
    "off_by_one",
    "a scheduler",
    by_torch_optim(
        lambda p, h: torch.optim.Adam(p, 0.05), lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.3)
    ),
    lambda h: optax.adam(lambda count: 0.05 * 0.3 ** ((count + 1) // 2)),
)
train(
    "mean_or_sum and factor",
    "of two outputs, in training",
    lambda h: O.adam(h["lr"], eps=0.1),
    lambda h: optax.adam(h["lr"], eps=0.1),
    theirs_loss=lambda params, x, y: jnp.mean(jnp.sum((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2, -1)),
)
train("eps", "of Adam", lambda h: O.adam(h["lr"]), lambda h: optax.adam(h["lr"], eps=1e-7))
train(
    "eps",
    "of torch.optim",
    by_torch_optim(lambda p, h: torch.optim.Adam(p, 0.05)),
    lambda h: optax.adam(0.05, eps=1e-6),
)
train(
    "subgradient",
    "in training",
    lambda h: O.sgd(h["lr"]),
    lambda h: optax.sgd(h["lr"]),
    ours_loss=lambda params, x, y: loss(torch)(params, x, y) + 0.1 * params["hidden"].abs().sum(),
    theirs_loss=lambda params, x, y: loss(jnp)(params, x, y) + 0.1 * jnp.sum(jnp.abs(params["hidden"])),
    params={**PARAMS, "hidden": np.where(np.abs(PARAMS["hidden"]) < 0.5, 0.0, PARAMS["hidden"])},
)
train("factor", "of the learning rate", lambda h: O.adam(h["lr"]), lambda h: optax.adam(2 * h["lr"]))


# --- differences of no such kind, and mixtures of two ---


def other(name: str, torch_fn: Callable[..., Any], jax_fn: Callable[..., Any], *inputs: Any) -> None:
    fault("", name, torch_fn, jax_fn, *inputs)


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


Y = X[::-1].copy()
other("softplus, linear above 20", F.softplus, jax.nn.softplus, 25 + X)
other("leaky relu, another slope", F.leaky_relu, lambda x: jax.nn.leaky_relu(x, 0.011), X)
other("elu, another alpha", F.elu, lambda x: jax.nn.elu(x, 1.1), X)
other("relu and gelu", torch.relu, linen.gelu, X)
other("a sigmoid instead of gelu's erf", F.gelu, lambda x: x * jax.nn.sigmoid(1.702 * x), X)
other("softmax over another axis", lambda x: x.softmax(0), lambda x: jax.nn.softmax(x, 1), X)
other("a residual connection is missing", lambda x, w: x + torch.tanh(x @ w), lambda x, w: jnp.tanh(x @ w), X, W)
other("layer norm, eps 1e-5 and 1.001e-5", lambda x: F.layer_norm(x, (6,)), lambda x: layer_norm_jax(x, 1.001e-5), X)
other("unit vectors, eps added", lambda x: F.normalize(x, dim=-1), lambda x: x / (_length(x) + 1e-8), X)
other("an epsilon under and beside the root", lambda x: x / (x.norm() + 1e-6), lambda x: x / _root(x, 1e-6), X / 1e3)
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
other("learning rate in float32", lambda w, g: w - 1e-3 * g, lambda w, g: w - float(np.float32(1e-3)) * g, X, Y)
other("two: gelu and eps", *_gelu_and_eps(), X)
other("two: transposed and a sum", lambda x, w: (x @ w).square().mean(), lambda x, w: jnp.sum((x @ w.T) ** 2), X, W)
other("two: biased variance and eps", *_variance_and_eps(), X)
other("two: flattened and mirrored", *_flattened_and_mirrored(), IMAGE, normal(3, 3, 3, 3))

train("", "momentum 0.9 and 0.9001", lambda h: O.sgd(h["lr"], 0.9), lambda h: optax.sgd(h["lr"], 0.9001))
train("", "nesterov", lambda h: O.sgd(h["lr"], 0.9), lambda h: optax.sgd(h["lr"], 0.9, nesterov=True))
train("", "adam, another b1", lambda h: O.adam(h["lr"]), lambda h: optax.adam(h["lr"], b1=0.95))
train("", "rmsprop, eps in the root", lambda h: O.rmsprop(h["lr"], eps_in_sqrt=False), lambda h: optax.rmsprop(h["lr"]))
train(
    "", "another decay", lambda h: O.adamw(h["lr"], weight_decay=0.1), lambda h: optax.adamw(h["lr"], weight_decay=0.13)
)
train("", "no decay", by_torch_optim(lambda p, h: torch.optim.Adam(p, 0.05)), decoupled)
train("", "l1, and decay of that strength", lambda h: frt.prox_adam(h["lr"], frt.l1(h["wd"])), decoupled)
train(
    "",
    "gradients clipped",
    lambda h: O.sgd(h["lr"]),
    lambda h: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(h["lr"])),
)
train(
    "",
    "another schedule",
    lambda h: O.sgd(O.linear_schedule(0.1, 0, 8)),
    lambda h: optax.sgd(optax.cosine_decay_schedule(0.1, 8)),
)
train(
    "",
    "two steps off",
    lambda h: O.sgd(O.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: optax.linear_schedule(0.1, 0.0, 8)(count + 2)),
)
train(
    "",
    "dampening 0.5 at momentum 0.9",
    lambda h: O.sgd(h["lr"], 0.9),
    lambda h: optax.chain(optax.scale(0.5), optax.trace(0.9), optax.scale(-0.9 * h["lr"])),
)
train(
    "",
    "two: decoupled decay and eps",
    lambda h: O.chain(O.add_decayed_weights(h["wd"]), O.adam(h["lr"])),
    lambda h: optax.adamw(h["lr"], eps=1e-3, weight_decay=h["wd"]),
)
train(
    "",
    "two: off by one and a factor",
    lambda h: O.sgd(O.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: 2 * optax.linear_schedule(0.1, 0.0, 8)(count + 1)),
)
train(
    "",
    "two: a sum, and a decay that is decoupled",
    lambda h: O.chain(O.add_decayed_weights(h["wd"]), O.adam(h["lr"])),
    decoupled,
    theirs_loss=lambda params, x, y: jnp.sum((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2),
)
train(
    "",
    "decay of one leaf only",
    lambda h: O.adamw(h["lr"], weight_decay=h["wd"]),
    lambda h: optax.adamw(h["lr"], weight_decay=h["wd"], mask={"hidden": True, "out": False}),
)


def main() -> None:
    for case in CASES:
        if not sys.argv[1:] or sys.argv[1] in str(case):
            with jax.numpy_dtype_promotion("standard"):
                report = case.check()
            right = {hint.kind for hint in report.hints} == case.kinds
            print(" " if right else "!", f"{report.verdict:12}", case)
            for hint in report.hints:
                print(f"      {hint.kind}: {hint.change} ({hint.difference:.0e})")


if __name__ == "__main__":
    main()

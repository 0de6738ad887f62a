"""The two wings on real data: the same network from the same numbers on the same batches ends at the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sklearn.datasets import load_digits

import funcreg.jax as fj
import funcreg.torch as ft

STEPS, BATCH, HIDDEN = 200, 64, 32


@functools.cache
def _digits():
    data = load_digits()
    order = np.random.default_rng(1).integers(0, len(data.target), (STEPS, BATCH))
    return data.data[order] / 16, np.eye(10)[data.target[order]]


def _initial():
    """As torch initialises them, kernels (out, in)."""
    rng = np.random.default_rng(0)
    return {
        "hidden": {"weight": rng.uniform(-1, 1, (HIDDEN, 64)) / 8, "bias": rng.uniform(-1, 1, HIDDEN) / 8},
        "head": {"weight": rng.uniform(-1, 1, (10, HIDDEN)) / 6, "bias": rng.uniform(-1, 1, 10) / 6},
    }


# In each community's own idiom: the torch side holds (out, in), the JAX side (in, out) and other names.


def _torch_loss(params, x, y):
    h = torch.nn.functional.linear(x, params["hidden"]["weight"], params["hidden"]["bias"]).relu()
    logits = torch.nn.functional.linear(h, params["head"]["weight"], params["head"]["bias"])
    return torch.nn.functional.cross_entropy(logits, y)


def _jax_loss(params, x, y):
    h = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    logits = h @ params["head"]["kernel"] + params["head"]["bias"][None]
    return optax.softmax_cross_entropy(logits, y).mean()


def _to_jax(params):
    return {
        layer: {"kernel": jnp.asarray(leaves["weight"].T), "bias": jnp.asarray(leaves["bias"])}
        for layer, leaves in params.items()
    }


def _train_torch(penalty):
    params = jax.tree.map(torch.tensor, _initial())
    optimizer = ft.prox_adam(3e-3, penalty)
    state = optimizer.init(params)
    for x, y in zip(*map(torch.tensor, _digits()), strict=True):
        grads = torch.func.grad(_torch_loss)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        params = ft.optax.apply_updates(params, updates)
    return jax.tree.map(lambda p: p.numpy(), params)


def _train_attached(penalty):
    net = torch.nn.Sequential()
    for name, leaves in _initial().items():
        layer = torch.nn.Linear(*reversed(leaves["weight"].shape), dtype=torch.float64)
        layer.load_state_dict({leaf: torch.tensor(value) for leaf, value in leaves.items()})
        net.add_module(name, layer)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    ft.attach(optimizer, net, penalty)
    for x, y in zip(*map(torch.tensor, _digits()), strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net.head(net.hidden(x).relu()), y).backward()
        optimizer.step()
    return {
        layer: {leaf: getattr(getattr(net, layer), leaf).detach().numpy() for leaf in ("weight", "bias")}
        for layer in ("hidden", "head")
    }


def _train_jax(penalty):
    optimizer = fj.prox_adam(3e-3, penalty)

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(_jax_loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    params = run(_to_jax(_initial()), tuple(map(jnp.asarray, _digits())))
    return {
        layer: {"weight": np.asarray(leaves["kernel"]).T, "bias": np.asarray(leaves["bias"])}
        for layer, leaves in params.items()
    }


# What a line looks like on both sides, but for the module: the same words, each in the layout of its wing.
PENALTIES = {
    "l1": lambda fr: fr.l1(2e-3).on(fr.weights),
    "group per output": lambda fr: fr.group_lasso(2e-3, per="output"),
    "group per input": lambda fr: fr.group_lasso(2e-3, per="input").on(fr.weights) + fr.l2(1e-3),
    "sparse group": lambda fr: fr.layerwise(
        {"hidden": fr.sparse_group_lasso(1e-3, 1e-3, per="output"), "*.bias": None, "*": fr.elastic_net(1e-3, 1e-3)}
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_digits_run_agrees_between_the_wings(name, x64):
    in_torch = _train_torch(PENALTIES[name](ft))
    with x64():
        in_jax = _train_jax(PENALTIES[name](fj))
    for layer, leaves in in_torch.items():
        for leaf, value in leaves.items():
            where = f"{layer}.{leaf}"
            np.testing.assert_allclose(in_jax[layer][leaf], value, rtol=0, atol=1e-9, err_msg=where)
            np.testing.assert_array_equal(in_jax[layer][leaf] == 0, value == 0, err_msg=where)
            assert np.abs(value - _initial()[layer][leaf]).max() > 0.05, where
    zero = in_torch["hidden"]["weight"] == 0
    assert 0.05 < zero.mean() < 0.95
    if name == "group per output":  # whole units
        np.testing.assert_array_equal(zero.all(axis=1), zero.any(axis=1))
    if name == "group per input":  # whole pixels
        np.testing.assert_array_equal(zero.all(axis=0), zero.any(axis=0))


def test_a_digits_run_agrees_with_a_plain_torch_loop(x64):
    attached = _train_attached(PENALTIES["l1"](ft))
    with x64():
        in_jax = _train_jax(PENALTIES["l1"](fj))
    for layer, leaves in attached.items():
        for leaf, value in leaves.items():
            np.testing.assert_allclose(in_jax[layer][leaf], value, rtol=0, atol=1e-9, err_msg=f"{layer}.{leaf}")
            np.testing.assert_array_equal(in_jax[layer][leaf] == 0, value == 0, err_msg=f"{layer}.{leaf}")

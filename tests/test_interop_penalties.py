"""`pair.penalty_to_jax` and back: value, gradient and prox are those of the twins, to the last digits."""

import flax.linen as fnn
import jax
import numpy as np
import pytest
import torch
from torch import nn

import funcreg.torch as frt
from cases import CASES, STEP
from funcreg import interop


class Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)


class LinenMha(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        return fnn.Dense(6, name="fc")(fnn.MultiHeadDotProductAttention(2, name="attn")(x))


class LinenMlp(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        return fnn.Dense(2, name="out")(fnn.Dense(4, name="hidden")(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 2)


class Convnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(12, 4)


class LinenConvnet(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        x = fnn.BatchNorm(use_running_average=True, name="norm")(fnn.Conv(3, (2, 2), padding="VALID", name="conv")(x))
        return fnn.Dense(4, name="fc")(x.reshape(1, -1))


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(5, 3), nn.Linear(3, 4)


class LinenEmbedder(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        return fnn.Dense(4, name="fc")(fnn.Embed(5, 3, name="embed")(x))


NETS = {
    "mlp": (Mlp, LinenMlp, np.zeros((1, 3), np.float32)),
    "convnet": (Convnet, LinenConvnet, np.zeros((1, 3, 3, 2), np.float32)),
    "mha": (Mha, LinenMha, np.zeros((1, 4, 6), np.float32)),
    "embedding": (Embedder, LinenEmbedder, np.zeros((1, 3), np.int32)),
}


def pair_of(name):
    """In float64; the parameters hold zeros, kinks and random numbers."""
    make, linen, x = NETS[name]
    torch.manual_seed(0)
    net = make().double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
            p.view(-1)[::5] = 0.0
            if p.ndim > 1:
                p[0] = 0.0  # a group
    shapes = jax.eval_shape(linen().init, jax.random.key(0), x)
    return net, interop.match(net, jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float64), shapes))


def same_value_grad_and_prox(pair, ours, theirs, params, metric=False):
    """Both wings on the same point, carried over by the pair; with a metric instead of a scalar step if asked."""
    steps = {name: STEP * (1 + torch.rand_like(p)) for name, p in params.items()} if metric else STEP
    their_steps = pair.parameters_to_jax(steps) if metric else STEP
    smooth = all(part.rule.grad is not None for part in ours.parts)

    @jax.jit
    def functions(params, steps):
        return theirs.value(params), theirs.grad(params) if smooth else None, theirs.prox(params, steps)

    value, gradient, prox = functions(pair.parameters_to_jax(params), their_steps)
    np.testing.assert_allclose(float(value), float(ours.value(params)), rtol=1e-12)
    if smooth:
        same(pair.parameters_to_torch(gradient), ours.grad(params))
    same(pair.parameters_to_torch(prox), ours.prox(params, steps))


def same(got, wanted):
    assert set(got) == set(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(got[name].detach().numpy(), x.detach().numpy(), rtol=1e-12, atol=1e-12)


SHARED = [case for case in CASES if case.record.factory != "custom"]


@pytest.mark.parametrize("net_name", NETS)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_a_penalty_is_the_same_function_of_the_twins(case, net_name, x64):
    net, pair = pair_of(net_name)
    params = {name: p.detach() for name, p in net.named_parameters()}
    axis = case.options.get("axis")
    deepest = 0 if axis is None else max((-a for a in ([axis] if isinstance(axis, int) else axis)), default=0)
    penalty = case.make(frt).on(lambda name, leaf: leaf.ndim >= deepest)
    with x64():
        try:
            theirs = pair.penalty_to_jax(penalty)
        except ValueError as error:
            # the columns of a packed in_proj_weight run through query, key and value, which are three leaves in flax
            assert net_name == "mha" and "no axes of" in str(error), error
            penalty = penalty.on("!*in_proj*")
            try:
                theirs = pair.penalty_to_jax(penalty)
            except ValueError as again:
                assert "no axes of" in str(again)
                penalty = penalty.on("fc")
                theirs = pair.penalty_to_jax(penalty)
        same_value_grad_and_prox(pair, penalty, theirs, params, metric=net_name == "mlp")
        back = pair.penalty_to_torch(theirs)
        np.testing.assert_allclose(float(back.value(params)), float(penalty.value(params)), rtol=1e-12)
        same(back.prox(params, STEP), penalty.prox(params, STEP))

"""`interop.match`: the right twins or a refusal, both ways bit for bit, flattens, ties, and everything by name."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from flax.core import FrozenDict
from torch import nn

import funcreg
import funcreg.torch as fr
from funcreg import interop

ROOT = Path(funcreg.__file__).parent.parent


def leaves_of(tree):
    """dotted name -> NumPy array, of dicts and of nnx states."""
    if isinstance(tree, nnx.State):
        return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(tree)}
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(str(key.key) for key in path): np.asarray(x) for path, x in paths}


def links_by_name(pair):
    return {link.torch: link.jax for link in pair.links}


def twins_of(pair):
    """Layer -> layer, told by the first array of each."""
    return {link.torch[0].rpartition(".")[0]: link.jax[0].rpartition(".")[0] for link in reversed(pair.links)}


DTYPE = jnp.float64  # of nnx models; they are abstract, or small and made without x64, which makes it float32

# --- models in two or three versions ---


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        return self.out(weights @ self.v(x))


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln1, self.attn, self.ln2 = nn.LayerNorm(d), Attention(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """Every matrix is square: only names and order tell them apart."""

    def __init__(self, d=4, depth=2):
        super().__init__()
        self.embed = nn.Embedding(7, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, d)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def attend(query, key, value, out, x):
    return out(jax.nn.softmax(query(x) @ jnp.swapaxes(key(x), -1, -2)) @ value(x))


class LinenAttention(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        d = x.shape[-1]
        return attend(*(fnn.Dense(d, name=name) for name in ("query", "key", "value", "out")), x)


class LinenBlock(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        d = x.shape[-1]
        x = x + LinenAttention(name="attention")(fnn.LayerNorm(epsilon=1e-5)(x))
        hidden = jnp.tanh(fnn.Dense(d)(fnn.LayerNorm(epsilon=1e-5)(x)))
        return x + fnn.Dense(d)(hidden)


class LinenTransformer(fnn.Module):
    depth: int = 2

    @fnn.compact
    def __call__(self, x):
        x = fnn.Embed(7, 4)(x)
        for i in range(self.depth):
            x = LinenBlock(name=f"blocks_{i}")(x)
        return fnn.Dense(4, name="head")(fnn.LayerNorm(epsilon=1e-5, name="norm")(x))


class NnxAttention(nnx.Module):
    def __init__(self, d, rngs):
        self.query, self.key, self.value, self.out = (nnx.Linear(d, d, param_dtype=DTYPE, rngs=rngs) for _ in range(4))

    def __call__(self, x):
        return attend(self.query, self.key, self.value, self.out, x)


class NnxBlock(nnx.Module):
    def __init__(self, d, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(d, epsilon=1e-5, param_dtype=DTYPE, rngs=rngs) for _ in range(2))
        self.attn = NnxAttention(d, rngs)
        self.mlp = nnx.Sequential(nnx.Linear(d, d, param_dtype=DTYPE, rngs=rngs), jnp.tanh, nnx.Linear(d, d, param_dtype=DTYPE, rngs=rngs))

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class NnxTransformer(nnx.Module):
    def __init__(self, d=4, depth=2, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.head = nnx.Linear(d, d, param_dtype=DTYPE, rngs=rngs)  # defined in another order than in PyTorch
        self.norm = nnx.LayerNorm(d, epsilon=1e-5, param_dtype=DTYPE, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(d, rngs) for _ in range(depth)])
        self.embed = nnx.Embed(7, d, param_dtype=DTYPE, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BasicBlock(nn.Module):
    def __init__(self, ins, outs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.layer2 = nn.Sequential(BasicBlock(4, 8, 2), BasicBlock(8, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def linen_norm(**options):
    return fnn.BatchNorm(use_running_average=True, epsilon=1e-5, **options)


class ResNetBlock(fnn.Module):
    outs: int
    stride: int = 1

    @fnn.compact
    def __call__(self, x):
        y = fnn.Conv(self.outs, (3, 3), self.stride, padding=((1, 1), (1, 1)), use_bias=False)(x)
        y = fnn.relu(linen_norm()(y))
        y = linen_norm()(fnn.Conv(self.outs, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)(y))
        if self.stride > 1:
            x = fnn.Conv(self.outs, (1, 1), self.stride, use_bias=False, name="conv_proj")(x)
            x = linen_norm(name="norm_proj")(x)
        return fnn.relu(x + y)


class LinenResNet(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        x = fnn.Conv(4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="conv_init")(x)
        x = fnn.relu(linen_norm(name="bn_init")(x))
        for outs, stride in ((4, 1), (4, 1), (8, 2), (8, 1)):
            x = ResNetBlock(outs, stride)(x)
        return fnn.Dense(5)(x.mean((1, 2)))


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2),
    )  # fmt: skip


class LinenConvnet(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        for _ in range(2):
            x = fnn.relu(linen_norm()(fnn.Conv(4, (3, 3), padding="VALID")(x)))
        x = linen_norm()(x.reshape(x.shape[0], -1))
        x = jnp.tanh(fnn.Dense(6)(x))
        return fnn.Dense(2)(jnp.tanh(fnn.Dense(6)(x)))


class NnxConvnet(nnx.Module):
    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.conv1, self.conv2 = (nnx.Conv(n, 4, (3, 3), padding="VALID", param_dtype=DTYPE, rngs=rngs) for n in (3, 4))
        self.bn1, self.bn2, self.bn3 = (
            nnx.BatchNorm(n, epsilon=1e-5, momentum=0.9, use_running_average=True, param_dtype=DTYPE, rngs=rngs)
            for n in (4, 4, 64)
        )
        self.fc1, self.fc2, self.fc3 = (nnx.Linear(a, b, param_dtype=DTYPE, rngs=rngs) for a, b in ((64, 6), (6, 6), (6, 2)))

    def __call__(self, x):
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = jax.nn.relu(norm(conv(x)))
        x = self.bn3(x.reshape(x.shape[0], -1))
        return self.fc3(jnp.tanh(self.fc2(jnp.tanh(self.fc1(x)))))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(3, 3, 2, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


class LinenLstm(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        for _ in range(2):
            x = fnn.RNN(fnn.OptimizedLSTMCell(3, param_dtype=x.dtype))(x)
        return fnn.Dense(2)(x)


class Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.fc = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


class LinenMha(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        return fnn.Dense(6)(fnn.MultiHeadDotProductAttention(2)(x))


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.fc(self.embed(x)))


class LinenTied(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        embed = fnn.Embed(5, 3)
        return embed.attend(fnn.Dense(3)(embed(x)))


def in_order_of_calls(module, x):
    """The variables as `init` makes them, abstract and in float64; no transformation has sorted their keys."""
    seen = []

    def shapes(tree):
        if isinstance(tree, dict):
            return {key: shapes(child) for key, child in tree.items()}
        return jax.ShapeDtypeStruct(tree.shape, np.float64)

    jax.eval_shape(lambda: seen.append(shapes(module.init(jax.random.key(0), x))))
    return seen[0]


def linen(module):
    """`init` as it is, with the keys in the order of calls, and as jit leaves it, with sorted keys."""

    def made(x):
        return module, in_order_of_calls(module, x)

    def jitted(x):
        return module, jax.tree.map(lambda x: x, in_order_of_calls(module, x))

    return made, jitted


IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
TOKENS = np.arange(6).reshape(2, 3)
SERIES = np.random.default_rng(1).standard_normal((2, 5, 3))
FEATURES = np.random.default_rng(2).standard_normal((2, 5, 6))


@dataclass
class Twins:
    name: str
    torch: Callable[[], nn.Module]
    flax: Callable[[Any], Any]
    x: np.ndarray


def mlp(sizes=(6, 6, 6, 6)):
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class LinenMlp(fnn.Module):
    """Called in the order of the sizes; `names` if they are not linen's own."""

    sizes: tuple[int, ...] = (6, 6, 6, 6)
    names: tuple[str | None, ...] = (None, None, None)

    @fnn.compact
    def __call__(self, x):
        for n, name in zip(self.sizes[1:-1], self.names, strict=False):
            x = jnp.tanh(fnn.Dense(n, name=name)(x))
        return fnn.Dense(self.sizes[-1], name=self.names[-1])(x)


TWINS = [
    *(Twins(f"mlp, compact linen {i}", mlp, m, FEATURES) for i, m in enumerate(linen(LinenMlp()))),
    Twins("mlp, linen named against the alphabet", mlp, linen(LinenMlp(names=("z", "y", "x")))[0], FEATURES),
    *(Twins(f"convnet, linen {i}", convnet, m, IMAGES) for i, m in enumerate(linen(LinenConvnet()))),
    Twins("convnet, nnx", convnet, lambda x: (NnxConvnet, None), IMAGES),
    *(Twins(f"resnet, linen {i}", ResNet, m, IMAGES) for i, m in enumerate(linen(LinenResNet()))),
    *(Twins(f"transformer, linen {i}", Transformer, m, TOKENS) for i, m in enumerate(linen(LinenTransformer()))),
    Twins("transformer, nnx", Transformer, lambda x: (NnxTransformer, None), TOKENS),
    *(Twins(f"lstm, linen {i}", Lstm, m, SERIES) for i, m in enumerate(linen(LinenLstm()))),
    *(Twins(f"mha, linen {i}", Mha, m, FEATURES) for i, m in enumerate(linen(LinenMha()))),
    *(Twins(f"tied, linen {i}", Tied, m, TOKENS % 5) for i, m in enumerate(linen(LinenTied()))),
]
each_twins = pytest.mark.parametrize("twins", TWINS, ids=lambda twins: twins.name)


def random_net(make):
    """With statistics and norms that are no identities."""
    torch.manual_seed(0)
    net = make().double().eval()
    with torch.no_grad():
        for name, x in net.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else x + 0.1 * torch.randn_like(x))
    return net


@each_twins
@pytest.mark.relaxed_promotion  # flax's own layers mix ranks
def test_twins_compute_the_same_and_come_back_bit_for_bit(twins, x64):
    net = random_net(twins.torch)
    x = torch.tensor(twins.x)
    wanted = net(x).detach().numpy()
    given = twins.x.transpose(0, 2, 3, 1) if twins.x.ndim == 4 else twins.x
    module, variables = twins.flax(jnp.asarray(given, jnp.int32 if given.dtype == np.int64 else jnp.float32))
    with x64():
        given = jnp.asarray(given)
        if variables is None:
            abstract = nnx.eval_shape(module)  # nnx's batch norm keeps float32 statistics for float64 parameters
            nnx.update(abstract, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, DTYPE), nnx.state(abstract)))
            # batch norm's running variance differs by design, which strict=True says
            pair = interop.match(net, abstract, strict=False)
            values = pair.to_jax(net)
            graph = nnx.graphdef(abstract)
            got = jax.jit(lambda values, x: nnx.merge(graph, values)(x))(values, given)
        else:
            pair = interop.match(net, variables)
            values = pair.to_jax(net)
            assert jax.tree.structure(values) == jax.tree.structure(variables)
            got = jax.jit(module.apply)(values, given)
        back = pair.to_torch(values)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-12, atol=1e-12)
    state = net.state_dict()
    if "lstm" not in twins.name:  # whose two biases are added up
        assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
    net.load_state_dict(back)
    np.testing.assert_allclose(net(x).detach().numpy(), wanted, rtol=1e-12, atol=1e-12)

"""`interop.match`: the right twins or a refusal, both ways bit for bit, flattens, ties, and everything by name."""

import copy
import doctest
import importlib
import os
import pickle
import subprocess
import sys
import warnings
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
from torch._subclasses.fake_tensor import FakeTensorMode

import funcreg
import funcreg.torch as fr
from funcreg import interop
from interop import rules

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


DTYPE = jnp.float64  # of nnx models

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
        first, second = (nnx.Linear(d, d, param_dtype=DTYPE, rngs=rngs) for _ in range(2))
        self.mlp = nnx.Sequential(first, jnp.tanh, second)

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
    shortcut_first: bool = False

    @fnn.compact
    def __call__(self, x):
        if self.shortcut_first and self.stride > 1:
            r = linen_norm()(fnn.Conv(self.outs, (1, 1), self.stride, use_bias=False)(x))
        y = fnn.Conv(self.outs, (3, 3), self.stride, padding=((1, 1), (1, 1)), use_bias=False)(x)
        y = fnn.relu(linen_norm()(y))
        y = linen_norm()(fnn.Conv(self.outs, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)(y))
        if self.shortcut_first and self.stride > 1:
            return fnn.relu(r + y)
        if self.stride > 1:
            x = fnn.Conv(self.outs, (1, 1), self.stride, use_bias=False, name="conv_proj")(x)
            x = linen_norm(name="norm_proj")(x)
        return fnn.relu(x + y)


class LinenResNet(fnn.Module):
    shortcut_first: bool = False

    @fnn.compact
    def __call__(self, x):
        x = fnn.Conv(4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False, name="conv_init")(x)
        x = fnn.relu(linen_norm(name="bn_init")(x))
        for outs, stride in ((4, 1), (4, 1), (8, 2), (8, 1)):
            x = ResNetBlock(outs, stride, self.shortcut_first)(x)
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
        sizes = ((64, 6), (6, 6), (6, 2))
        self.fc1, self.fc2, self.fc3 = (nnx.Linear(a, b, param_dtype=DTYPE, rngs=rngs) for a, b in sizes)

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


def in_order_of_calls(module, x, dtype=np.float64):
    """The variables as `init` makes them, but abstract; no transformation has sorted their keys."""
    seen = []

    def shapes(tree):
        if isinstance(tree, dict):
            return {key: shapes(child) for key, child in tree.items()}
        return jax.ShapeDtypeStruct(tree.shape, dtype)

    jax.eval_shape(lambda: seen.append(shapes(module.init(jax.random.key(0), x))))
    return seen[0]


def linen(module):
    return lambda x: (module, in_order_of_calls(module, x))


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

    def __str__(self):
        return self.name


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
    Twins("mlp, compact linen", mlp, linen(LinenMlp()), FEATURES),
    Twins("mlp, linen named against the alphabet", mlp, linen(LinenMlp(names=("z", "y", "x"))), FEATURES),
    Twins("convnet, linen", convnet, linen(LinenConvnet()), IMAGES),
    Twins("convnet, nnx", convnet, lambda x: (NnxConvnet, None), IMAGES),
    Twins("resnet, linen", ResNet, linen(LinenResNet()), IMAGES),
    Twins("resnet, linen, the shortcut first", ResNet, linen(LinenResNet(shortcut_first=True)), IMAGES),
    Twins("transformer, linen", Transformer, linen(LinenTransformer()), TOKENS),
    Twins("transformer, nnx", Transformer, lambda x: (NnxTransformer, None), TOKENS),
    Twins("lstm, linen", Lstm, linen(LinenLstm()), SERIES),
    Twins("mha, linen", Mha, linen(LinenMha()), FEATURES),
    Twins("tied, linen", Tied, linen(LinenTied()), TOKENS % 5),
]
each_twins = pytest.mark.parametrize("twins", TWINS, ids=str)


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
            pair = interop.match(net, abstract)
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


@pytest.mark.parametrize(
    "twins", [t for t in TWINS if not any(word in t.name for word in ("nnx", "alphabet", "first"))], ids=str
)
def test_sorted_keys_give_the_same_twins(twins):
    """As jit leaves them; what has names against the alphabet is refused instead."""
    net, x = twins.torch(), twins.x.transpose(0, 2, 3, 1) if twins.x.ndim == 4 else twins.x
    _, variables = twins.flax(jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else jnp.float32))
    by_jax = jax.tree.map(lambda x: x, variables)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "match: .* paired by linen's numbers")  # which are right in these
        assert links_by_name(interop.match(net, by_jax)) == links_by_name(interop.match(net, variables))


# --- which twin: names, order, shapes ---


def shaped(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def dense(ins, outs):
    return {"kernel": shaped(ins, outs), "bias": shaped(outs)}


def conv(k, ins, outs):
    return {"kernel": shaped(k, k, ins, outs), "bias": shaped(outs)}


def net_of(**children):
    net = nn.Module()
    for name, child in children.items():
        setattr(net, name, child)
    return net


def squares(*names):
    return net_of(**{name: nn.Linear(3, 3) for name in names})


def flax_squares(*names):
    return {name: dense(3, 3) for name in names}


NORM = {"scale": shaped(3), "bias": shaped(3)}
PAIRED = {
    "natural order of numbers": (
        squares(*(f"fc{i}" for i in range(12))),
        flax_squares(*sorted(f"Dense_{i}" for i in range(12))),
        {f"fc{i}": f"Dense_{i}" for i in range(12)},
    ),
    "numbers that start elsewhere": (
        squares("fc1", "fc2", "fc3"), flax_squares("fc0", "fc1", "fc2"), {"fc1": "fc0", "fc2": "fc1", "fc3": "fc2"}
    ),
    "equal names in another order": (squares("b", "a"), flax_squares("a", "b"), {"a": "a", "b": "b"}),
    "equal names against the definition": (squares("l2", "l1"), flax_squares("l1", "l2"), {"l1": "l1", "l2": "l2"}),
    "equal names against the calls": (squares("l1", "l2"), flax_squares("l2", "l1"), {"l1": "l1", "l2": "l2"}),
    "abbreviations, sorted": (
        squares("q", "k", "v", "o"), flax_squares("key", "out", "query", "value"),
        {"q": "query", "k": "key", "v": "value", "o": "out"},
    ),
    "abbreviations without vowels, sorted": (
        squares("rslt", "attn"), flax_squares("attention", "result"), {"rslt": "result", "attn": "attention"}
    ),
    "wq, wk, wv, wo": (
        squares("wq", "wk", "wv", "wo"), flax_squares("key", "out", "query", "value"),
        {"wq": "query", "wk": "key", "wv": "value", "wo": "out"},
    ),
    "names win over the order of calls": (
        squares("up", "down"), flax_squares("down_proj", "up_proj"), {"up": "up_proj", "down": "down_proj"}
    ),
    "the last one left": (
        squares("norm1", "norm2", "skip"), flax_squares("Norm_0", "Norm_1", "shortcut"),
        {"norm1": "Norm_0", "norm2": "Norm_1", "skip": "shortcut"},
    ),
    "calls win over linen's numbers": (  # Dense(3)(relu(Dense(3)(x))): the outer one is made first
        squares("fc1", "fc2"), flax_squares("Dense_1", "Dense_0"), {"fc1": "Dense_1", "fc2": "Dense_0"}
    ),
    "containers before layers": (
        net_of(encoder=mlp((3, 3, 3)), decoder=mlp((3, 3, 3))),
        {"Dec": flax_squares("Dense_0", "Dense_1"), "Enc": flax_squares("Dense_0", "Dense_1")},
        {f"{a}.{i}": f"{b}.Dense_{i // 2}" for a, b in (("encoder", "Enc"), ("decoder", "Dec")) for i in (0, 2)},
    ),
    "layers of another class": (
        net_of(a=nn.GroupNorm(3, 3), b=nn.LayerNorm(3)), {"LayerNorm_0": NORM, "GroupNorm_0": NORM},
        {"a": "GroupNorm_0", "b": "LayerNorm_0"},
    ),
    "wrapped": (net_of(module=net_of(fc=nn.Linear(3, 3))), flax_squares("fc"), {"module.fc": "fc"}),
    "the model is one layer": (nn.Linear(3, 3), dense(3, 3), {"": ""}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:match. Dense_0, Dense_1, .* linen's numbers")  # sorted
@pytest.mark.parametrize("name", PAIRED)
def test_the_right_twin_is_found(name):
    net, flax, wanted = PAIRED[name]
    assert twins_of(interop.match(net, flax)) == wanted


NORM_8 = {"scale": shaped(8), "bias": shaped(8)}


def residual(ins=4):
    return net_of(
        conv1=nn.Conv2d(ins, 8, 3), norm1=nn.GroupNorm(2, 8), conv2=nn.Conv2d(8, 8, 3), norm2=nn.GroupNorm(2, 8),
        downsample=nn.Sequential(nn.Conv2d(ins, 8, 1), nn.GroupNorm(2, 8)),
    )  # fmt: skip


def test_norms_follow_their_convolutions_where_the_orders_differ():
    names = ["Conv_0", "GroupNorm_0", "Conv_1", "GroupNorm_1", "Conv_2", "GroupNorm_2"]
    flax = dict(zip(names, [conv(1, 4, 8), NORM_8, conv(3, 4, 8), NORM_8, conv(3, 8, 8), NORM_8], strict=True))
    ours = ["downsample.0", "downsample.1", "conv1", "norm1", "conv2", "norm2"]
    assert twins_of(interop.match(residual(), flax)) == dict(zip(ours, names, strict=True))
    same = {**flax, "Conv_0": conv(1, 8, 8), "Conv_1": conv(3, 8, 8)}
    assert twins_of(interop.match(residual(8), same)) == dict(zip(ours, names, strict=True))
    with pytest.raises(ValueError, match="come in another order in flax, so that order is no evidence"):
        interop.match(residual(), dict(sorted(flax.items())))  # numbers do not tell which norm follows which layer
    last = ["Conv_0", "Conv_1", "Conv_2", "GroupNorm_0", "GroupNorm_1", "GroupNorm_2"]
    with pytest.raises(ValueError, match="order is no evidence"):
        interop.match(residual(), {name: flax[name] for name in last})
    flax = dict(zip(["scc", "scn", "c1", "one", "c2", "two"], flax.values(), strict=True))
    with pytest.raises(ValueError) as error:
        interop.match(residual(), flax)
    rename = {"norm1": "one", "norm2": "two", "downsample.1": "scn"}
    assert f"rename={rename}" in str(error.value)
    assert twins_of(interop.match(residual(), flax, rename=rename))["downsample.1"] == "scn"


def test_forward_hooks_are_noted():
    net = squares("fc1", "fc2")
    net.fc1.register_forward_hook(lambda module, inputs, output: 2 * output)
    (note,) = interop.match(net, flax_squares("fc1", "fc2")).notes
    assert note == "fc1: forward hooks stay behind, and what they change with them"


def sorted_by_jax(tree):
    return jax.tree.map(lambda x: x, tree)


@pytest.mark.parametrize("compiler", [False, True])
def test_numbers_of_sorted_keys_are_noted_with_a_warning(compiler, monkeypatch):
    """Nothing tells whether linen's Dense_0 was called first, where a transformation has sorted the keys. The warning
    is about the caller's line, also where PyTorch's compiler has been imported."""
    if compiler:
        importlib.import_module("torch._dynamo")
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    net = squares("fc1", "fc2")
    with pytest.warns(UserWarning, match="match: Dense_0, Dense_1: paired by linen's numbers") as warned:
        (note,) = interop.match(net, sorted_by_jax(flax_squares("Dense_0", "Dense_1"))).notes
    assert warned[0].filename == __file__
    assert note.startswith("Dense_0, Dense_1: paired by linen's numbers, which count constructions")
    assert interop.match(net, sorted_by_jax(flax_squares("fc1", "fc2"))).notes == ()
    # no transformation leaves these in such an order
    assert interop.match(net, flax_squares("Dense_0", "Dense_1")).notes == ()
    assert interop.match(net, flax_squares("Dense_1", "Dense_0")).notes == ()


class Gated(nn.Module):
    """w1, w2, w3, called as w1, w3, w2."""

    def __init__(self, names=("w1", "w2", "w3")):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(3, 3))

    def forward(self, x):
        first, last, second = (getattr(self, name) for name in self.names)
        return last(torch.sigmoid(first(x)) * second(x))


def test_what_is_proposed_is_beside_what_was_renamed():
    net, flax = squares("a", "b", "c"), sorted_by_jax(flax_squares("x", "y", "z"))
    with pytest.raises(ValueError, match=r"correct and paste: rename=\{'a': 'x', 'b': 'y', 'c': 'z'\}"):
        interop.match(net, flax)
    with pytest.raises(ValueError, match=r"correct and add to what you have renamed: rename=\{'b': 'x', 'c': 'z'\}"):
        interop.match(net, flax, rename={"a": "y"})
    assert len(twins_of(interop.match(net, flax, rename={"a": "y", "b": "x", "c": "z"}))) == 3


@pytest.mark.parametrize("names", [("gate", "up", "down"), ("Dense_0", "Dense_1", "Dense_2")])
def test_calls_in_another_order_than_the_definitions_are_refused(names):
    flax = {name: dense(3, 3) for name in names}
    rename = dict(zip(["w1", "w3", "w2"], names, strict=True))
    with pytest.raises(ValueError, match="PyTorch defines w1, w2, w3, and calls w1, w3, w2") as error:
        interop.match(Gated(), flax)
    assert f"rename={rename}" in str(error.value)
    assert twins_of(interop.match(Gated(), flax, rename=rename)) == rename


def test_calls_in_another_order_do_not_matter_where_names_or_numbers_tell():
    for names in (["w1", "w3", "w2"], ["fc1", "fc2", "fc3"]):  # equal names; numbers of the user's own on both sides
        twins = twins_of(interop.match(Gated(), {name: dense(3, 3) for name in names}))
        assert twins == dict(zip(["w1", "w2", "w3"], sorted(names), strict=True))
    named = {name: dense(3, 3) for name in ("gate", "value", "out")}
    assert twins_of(interop.match(Gated(("gate", "out", "value")), named)) == {name: name for name in named}


def test_norms_follow_their_convolutions_where_a_shortcut_is_called_first():
    def forward(self, x):
        y = self.downsample(x)
        return y + self.norm2(self.conv2(self.norm1(self.conv1(x))))

    net = residual()
    net.__class__ = type("Net", (nn.Module,), {"forward": forward})
    names = ["Conv_0", "GroupNorm_0", "Conv_1", "GroupNorm_1", "Conv_2", "GroupNorm_2"]
    layers = [conv(3, 4, 8), NORM_8, conv(3, 8, 8), NORM_8, conv(1, 4, 8), NORM_8]
    pair = interop.match(net, dict(zip(names, layers, strict=True)))
    ours = ["conv1", "norm1", "conv2", "norm2", "downsample.0", "downsample.1"]
    assert twins_of(pair) == dict(zip(ours, names, strict=True))


class Bare(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.pos, self.cls = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(1, 1, 3))
        self.fc = nn.Linear(3, 3)
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)  # in no state dict


BARE = {"pos_embedding": shaped(4, 3), "cls_token": shaped(1, 1, 3), "fc": dense(3, 3)}


def test_bare_arrays_are_paired_as_they_lie():
    pair = interop.match(Bare(4, 3), BARE, rename={"mask": None})
    names = links_by_name(pair)
    assert names["pos",] == ("pos_embedding",) and names["cls",] == ("cls_token",)
    assert pair.notes == ("left out: mask; to_torch gives them as they are in the model",)
    given = torch.arange(12.0).reshape(4, 3)
    out = pair.to_jax({**Bare(4, 3).state_dict(), "pos": given})
    np.testing.assert_array_equal(out["pos_embedding"], given)


def test_a_square_bare_array_needs_a_word():
    flax = {**BARE, "pos_embedding": shaped(3, 3)}
    with pytest.raises(ValueError, match=r"'pos' has a shape, \(3, 3\).*rename=\{'pos': 'pos_embedding'\}"):
        interop.match(Bare(3, 3), flax, rename={"mask": None})
    with pytest.raises(ValueError, match=r"'pos' has a shape, \(2, 2, 2, 2\)"):  # as a convolution's kernel could be
        interop.match(Bare(2, 2, 2, 2), {**BARE, "pos_embedding": shaped(2, 2, 2, 2)}, rename={"mask": None})
    pair = interop.match(Bare(3, 3), flax, rename={"mask": None, "pos": "pos_embedding"})
    given = torch.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(pair.to_jax({**Bare(3, 3).state_dict(), "pos": given})["pos_embedding"], given)


def with_array(layer, *shape):
    """A layer and an array that is added to what it gives."""
    net = type("Net", (nn.Module,), {"forward": lambda self, x: self.layer(x) + self.pos})()
    net.layer, net.pos = layer, nn.Parameter(torch.zeros(shape))
    return net


@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (4, 4, 4)])
def test_a_bare_array_beside_an_image_may_have_its_channels_last(shape):
    net = with_array(nn.Conv2d(3, 4, 3), *shape)
    flax = {"layer": conv(3, 3, 4), "pos": shaped(*shape)}
    with pytest.raises(ValueError, match=r"bare array 'pos' .* would also have with the channels last, of the image"):
        interop.match(net, flax)
    assert ("pos",) in links_by_name(interop.match(net, flax, rename={"pos": "pos"}))


def test_a_bare_array_beside_tokens_lies_as_it_is():
    net = with_array(nn.Linear(3, 4), 1, 4, 4)
    assert ("pos",) in links_by_name(interop.match(net, {"layer": dense(3, 4), "pos": shaped(1, 4, 4)}))


def test_layers_that_compute_something_of_their_own_have_no_rule():
    class Twice(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    replaced = nn.Linear(3, 4)
    replaced.forward = lambda x: 2 * nn.functional.linear(x, replaced.weight, replaced.bias)
    for layer, why in ((Twice(3, 4), "a forward of its own"), (replaced, "has had its forward replaced")):
        with pytest.raises(ValueError, match=f"no partner(.|\\n)*{why}"):
            interop.match(nn.Sequential(layer), {"fc": dense(3, 4)})


# --- rename ---


def test_rename_of_layers_subtrees_globs_and_arrays():
    two = net_of(encoder=mlp((3, 3, 3)), decoder=mlp((3, 3, 3)))
    flax = {"A": flax_squares("Dense_0", "Dense_1"), "B": flax_squares("Dense_0", "Dense_1")}
    wanted = {"encoder.0": "B.Dense_0", "encoder.2": "B.Dense_1", "decoder.0": "A.Dense_0", "decoder.2": "A.Dense_1"}
    assert twins_of(interop.match(two, flax, rename={"encoder": "B"})) == wanted
    assert twins_of(interop.match(two, flax, rename={"encoder": "B", "decoder.0": "A.Dense_0"})) == wanted
    crossed = interop.match(two, flax, rename={"encoder": "B", "encoder.0": "B.Dense_1"})
    assert twins_of(crossed) == {**wanted, "encoder.0": "B.Dense_1", "encoder.2": "B.Dense_0"}
    assert twins_of(interop.match(squares("a", "b"), flax_squares("a", "b"), rename={"a": "b", "b": "a"})) == {
        "a": "b", "b": "a",
    }  # fmt: skip
    blocks = net_of(blocks=nn.ModuleList(squares("x", "y") for _ in range(2)))
    flax = {f"Block_{i}": flax_squares("s", "t") for i in range(2)}
    pair = interop.match(blocks, flax, rename={"blocks.*.x": "Block_*.t"})
    assert twins_of(pair) == {f"blocks.{i}.{a}": f"Block_{i}.{b}" for i in range(2) for a, b in ("xt", "ys")}
    loose = interop.match(
        net_of(fc=nn.Linear(3, 4), z=nn.Linear(4, 4)),
        {"w": shaped(3, 4), "b": shaped(4), "z": dense(4, 4)},
        rename={"fc.weight": "w", "fc.bias": "params.b"},
    )
    assert links_by_name(loose)["fc.weight",] == ("w",) and links_by_name(loose)["fc.bias",] == ("b",)
    by_array = {"a.weight": "b.kernel", "a.bias": "b.bias"}
    assert twins_of(interop.match(squares("a", "b"), flax_squares("a", "b"), rename=by_array)) == {"a": "b", "b": "a"}
    whole = interop.match(nn.Linear(3, 4), {"w": shaped(3, 4), "b": shaped(4)}, rename={"weight": "w", "bias": "b"})
    assert links_by_name(whole) == {("weight",): ("w",), ("bias",): ("b",)}
    net = net_of(fc=nn.Linear(3, 4), z=nn.Linear(4, 4))
    np.testing.assert_array_equal(loose.to_jax(net)["w"], net.fc.weight.detach().T)


def test_what_is_left_out_stays_as_it_was():
    net = net_of(fc=nn.Linear(3, 4), z=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    flax = {
        "params": {"b": shaped(4), "z": dense(4, 4), "bn": {"scale": shaped(4), "bias": shaped(4)}},
        "batch_stats": {"bn": {"mean": shaped(4), "var": shaped(4)}},
    }
    net.bn.num_batches_tracked += 7
    pair = interop.match(net, flax, rename={"fc.weight": None})
    assert links_by_name(pair)["fc.bias",] == ("b",)
    values = pair.to_jax(net)
    with torch.no_grad():  # what is left out may be trained on, and is not set back
        net.fc.weight += 1
        net.bn.num_batches_tracked += 1
    now = {name: x.clone() for name, x in net.state_dict().items()}
    back = pair.to_torch(values)
    assert list(back) == list(now) and all(torch.equal(back[name], x) for name, x in now.items())
    back["fc.weight"] += 1  # a copy
    assert torch.equal(net.fc.weight, now["fc.weight"])
    assert pair.to_torch(values).keys() == net.state_dict().keys()


def test_rename_none_leaves_subtrees_out():
    net = net_of(aux=mlp((3, 3)), fc=nn.Linear(3, 3))
    pair = interop.match(net, flax_squares("fc"), rename={"aux": None})
    assert twins_of(pair) == {"fc": "fc"}
    assert interop.match(net, flax_squares("fc"), rename={"aux.*": None}).notes == pair.notes
    deep = net_of(a=net_of(b=Bare(4, 3)))
    assert interop.match(deep, BARE, rename={"*.mask": None}).notes == (
        "left out: a.b.mask; to_torch gives them as they are in the model",
    )


# --- refusals ---


class WithForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = {
    "names of different things": (squares("gate", "up"), flax_squares("wide", "narrow"), {}, (
        "cannot tell which is which", "PyTorch  gate, up", "correct and paste: rename={'gate': 'wide', 'up': 'narrow'}",
    )),
    "gains and offsets": (
        nn.ParameterDict({"gamma": torch.ones(3), "beta": torch.ones(3)}), {"scale": shaped(3), "bias": shaped(3)}, {},
        ("the order pairs names that speak of different things",),
    ),
    "unknown order": (
        squares("gate", "up"), jax.tree.map(lambda x: x, flax_squares("a", "c")), {},
        ("the order on flax's side is not known",),
    ),
    "numbers against definition": (squares("fc2", "fc1"), flax_squares("Dense_0", "Dense_1"), {}, (
        "the order on PyTorch's side is not known",
    )),
    "containers alike": (
        net_of(encoder=mlp((3, 3, 3)), decoder=mlp((3, 3, 3))),
        {"A": flax_squares("Dense_0", "Dense_1"), "B": flax_squares("Dense_0", "Dense_1")}, {},
        ("PyTorch  encoder, decoder", "rename={'encoder': 'A', 'decoder': 'B'}"),
    ),
    "crossed names": (
        net_of(enc=nn.Linear(3, 4), dec=nn.Linear(4, 3)), {"enc": dense(4, 3), "dec": dense(3, 4)}, {},
        ("enc (Linear: kernel (3, 4), bias (4,)) fits dec", "has the name of enc", "rename={'enc': 'dec'}"),
    ),
    "crossed containers": (
        net_of(encoder=mlp((3, 3, 3)), decoder=mlp((3, 3, 3, 3))),
        {"decoder": flax_squares("Dense_0", "Dense_1"), "encoder": flax_squares("Dense_0", "Dense_1", "Dense_2")}, {},
        ("decoder fits encoder by its arrays, but has the name of decoder",),
    ),
    "a layer too many": (squares("a"), {"Dense_0": dense(3, 3), "out": dense(3, 4)}, {}, (
        "flax     out (kernel (3, 4), bias (4,))", "no partner for 0 of the PyTorch side and 1 of the flax side",
    )),
    "one too few": (net_of(a=nn.Linear(3, 3), b=nn.Linear(3, 4)), flax_squares("Dense_0"), {}, (
        "PyTorch  b (Linear: kernel (3, 4), bias (4,))", "rename={'name': None} leaves one of PyTorch's out",
    )),
    "two for one": (squares("a"), flax_squares("x", "y"), {}, (
        "no partner for 1", "nearest: x (kernel (3, 3), bias (3,)) (fits)",
    )),
    "transposed": (net_of(fc=nn.Linear(3, 4, bias=False)), {"fc": {"kernel": shaped(4, 3)}}, {}, (
        "nearest: fc (kernel (4, 3)) (fits after a transpose)",
    )),
    "no bias": (net_of(fc=nn.Linear(3, 4)), {"fc": {"kernel": shaped(3, 4)}}, {}, ("(flax lacks bias)",)),
    "more than a bias": (net_of(fc=nn.Linear(3, 4, bias=False)), {"fc": dense(3, 4)}, {}, ("(flax has bias besides)",)),
    "no statistics": (net_of(bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 3)), {"bn": NORM, "fc": dense(3, 3)}, {}, (
        "flax lacks mean, var: pass the batch statistics too, all of linen's variables or nnx.state(model)",
    )),
    "another class": (net_of(n=nn.LayerNorm(3)), {"GroupNorm_0": NORM}, {}, ("the same arrays, but a GroupNorm",)),
    "a forward of its own": (net_of(fc=WithForward(3, 4)), {"fc": dense(3, 4)}, {}, (
        "WithForward is a Linear with a forward of its own", "interop.rules.register",
    )),
    "a buffer": (Bare(4, 3), BARE, {}, ("PyTorch  mask (3,)",)),
    "a bare array transposed": (Bare(4, 3), {**BARE, "pos_embedding": shaped(3, 4)}, {"rename": {"mask": None}}, (
        "pos_embedding (3, 4) (fits after a transpose)",
    )),
    "rename: no such layer": (squares("fc"), flax_squares("x"), {"rename": {"fcc": "x"}}, (
        "the PyTorch side has no 'fcc'; nearest names: fc",
    )),
    "rename: no such twin": (squares("fc"), flax_squares("x"), {"rename": {"fc": "xx"}}, (
        "'fc' -> 'xx', which the flax side has not; nearest names: x",
    )),
    "rename: misfit": (
        net_of(a=nn.Linear(3, 4), b=nn.Linear(4, 3)), {"a": dense(3, 4), "b": dense(4, 3)}, {"rename": {"a": "b"}},
        ("a (Linear: kernel (3, 4), bias (4,)) cannot be b (kernel (4, 3), bias (3,))",),
    ),
    "rename: twice": (squares("a", "b"), flax_squares("x", "y"), {"rename": {"a": "x", "b": "x"}}, (
        "'a' and 'b' are both renamed to 'x'",
    )),
    "rename: not the same array": (
        squares("a", "b"), flax_squares("x", "y"), {"rename": {"a.weight": "x.bias"}},
        ("a.weight and x.bias are not the same array of a and x",),
    ),
    "rename: one layer for two": (
        squares("a", "b"), flax_squares("x", "y"), {"rename": {"a.weight": "x.kernel", "a.bias": "y.bias"}},
        ("'x.kernel' is part of the layer x (kernel (3, 3), bias (3,)); name the layer",),
    ),
    "rename: part of another entry": (
        net_of(e=squares("a", "b")), {"x": flax_squares("a", "b")}, {"rename": {"e.a": "x", "e.b": "x.b"}},
        ("'x.b' is part of what another entry renames",),
    ),
    "rename: stars": (squares("a1", "a2"), flax_squares("x1", "x2"), {"rename": {"a*": "x1"}}, ("1 stars and 'x1' 0",)),
    "rename: more stars": (squares("a1", "a2"), flax_squares("x1", "x2"), {"rename": {"a*": "x*.*"}}, (
        "'a*' has 1 stars and 'x*.*' 2",
    )),
    "rename: two entries": (squares("a", "b"), flax_squares("x", "y"), {"rename": {"a": "x", "*": None}}, (
        "'a' is renamed by 'a' and by '*'",
    )),
    "rename: arrays of no layer": (
        net_of(a=nn.Linear(3, 4)), {"w": shaped(4, 3), "b": shaped(4)}, {"rename": {"a.weight": "w", "a.bias": "b"}},
        ("a.weight -> w (4, 3)", "these are not the arrays that a (Linear"),
    ),
    "nothing in flax": (squares("fc"), {}, {}, ("PyTorch  fc",)),
    "a cache": (nn.Linear(3, 3), {"params": dense(3, 3), "cache": {"x": shaped(2)}}, {}, ("cache.x (2,)",)),
    "two leaves of one name": (nn.Linear(3, 3), {"a.b": shaped(3), "a": {"b": shaped(3)}}, {}, (
        "two leaves of the flax side have the name 'a.b'",
    )),
    "flatten: no multiple": (
        net_of(a=nn.Conv2d(3, 8, 3), fc=nn.Linear(16, 8)), {"a": conv(3, 3, 8), "fc": dense(16, 8)},
        {"flatten": {"fc": 5}}, ("fc has 16 features there, no multiple of 5 channels",),
    ),
    "flatten: no such layer": (squares("fc"), flax_squares("fc"), {"flatten": {"fx": 3}}, ("'fx' is no layer",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_guessed(name):
    net, flax, options, texts = REFUSED[name]
    with pytest.raises(ValueError) as error:
        interop.match(net, flax, **options)
    for text in texts:
        assert text in str(error.value)


def test_a_long_list_is_cut():
    net = squares(*(f"a{i}" for i in range(200)))
    with pytest.raises(ValueError, match=r"(?s)no partner for 200 .*PyTorch  and 150 more.*flax     and 151 more"):
        interop.match(net, flax_squares(*(f"b{i}" for i in range(201))))


def test_the_rename_of_a_refusal_can_be_pasted():
    net, flax, _, _ = REFUSED["names of different things"]
    assert twins_of(interop.match(net, flax, rename={"gate": "wide", "up": "narrow"})) == {
        "gate": "wide",
        "up": "narrow",
    }


# --- flattens, forward ---


class Heads(nn.Module):
    """Two heads on one flatten, and an image made of a dense layer's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.policy, self.value = nn.Conv2d(3, 4, 3), nn.Linear(144, 5), nn.Linear(144, 8)
        self.norm, self.deconv = nn.BatchNorm1d(8), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).flatten(1)
        image = self.deconv(self.norm(self.value(x)).reshape(-1, 2, 2, 2))
        return torch.cat([self.policy(x), image.sum((2, 3)), image[:, 0, 0], image[:, 0, :, 1]], 1)


class LinenHeads(fnn.Module):
    @fnn.compact
    def __call__(self, x):
        x = jnp.tanh(fnn.Conv(4, (3, 3), padding="VALID", name="conv")(x)).reshape(x.shape[0], -1)
        policy, value = fnn.Dense(5, name="policy")(x), linen_norm(name="norm")(fnn.Dense(8, name="value")(x))
        image = fnn.Conv(3, (1, 1), name="deconv")(value.reshape(-1, 2, 2, 2))
        return jnp.concatenate([policy, image.sum((1, 2)), image[:, 0, :, 0], image[:, :, 1, 0]], 1)


@pytest.mark.relaxed_promotion
def test_rows_and_columns_beside_a_flatten(x64):
    net = random_net(Heads)
    x = jnp.asarray(IMAGES.transpose(0, 2, 3, 1), jnp.float32)
    variables = in_order_of_calls(LinenHeads(), x)
    options = {"policy": 4, "value": (4, 2), "norm": 2}
    pair = interop.match(net, variables, flatten=options)
    assert "transposed, rows permuted (4 channels x 36), columns permuted (2 channels x 4)" in str(pair)
    assert "entries permuted (2 channels x 4)" in str(pair)
    with x64():
        values = pair.to_jax(net)
        got = LinenHeads().apply(values, jnp.asarray(IMAGES.transpose(0, 2, 3, 1)))
        back = pair.to_torch(values)
    wanted = net(torch.tensor(IMAGES)).detach().numpy()
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())
    assert str(interop.match(net, variables)) == str(pair)  # the flow tells as much


# --- ties ---


def test_tied_weights_stay_tied():
    net = Tied()
    pair = interop.match(net, {"Embed_0": {"embedding": shaped(5, 3)}, "Dense_0": dense(3, 3)})
    assert pair.notes == ("embed.weight = head.weight are tied, and are one in flax: Embed_0.embedding",)
    assert pair.parameters == ("embed.weight", "fc.weight", "fc.bias")
    back = pair.to_torch(pair.to_jax(net))
    assert back["embed.weight"] is back["head.weight"]
    net.load_state_dict(back)
    assert net.head.weight is net.embed.weight
    gradients = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    assert leaves_of(pair.parameters_to_jax(gradients))["Embed_0.embedding"].shape == (5, 3)
    loose = {**net.state_dict(), "head.weight": torch.zeros(5, 3)}
    with pytest.raises(ValueError, match="'head.weight' and 'embed.weight' are one tied array, but have different"):
        pair.to_jax(loose)


def test_ties_that_flax_has_not_are_reported_and_carry_values_only():
    net = Tied()
    flax = {"embed": {"embedding": shaped(5, 3)}, "fc": dense(3, 3), "head": {"kernel": shaped(3, 5)}}
    pair = interop.match(net, flax)
    assert "tied in PyTorch but not in flax: embed.embedding and head.kernel get the same values" in pair.notes[0]
    values = pair.to_jax(net)
    np.testing.assert_array_equal(values["head"]["kernel"], values["embed"]["embedding"].T)
    assert torch.equal(pair.to_torch(values)["head.weight"], net.head.weight)
    values["head"]["kernel"] = values["head"]["kernel"] + 1
    with pytest.raises(ValueError, match=r"'embed.weight' is one tied array.*'embed.embedding', 'head.kernel'"):
        pair.to_torch(values)
    gradients = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    for cross in (pair.parameters_to_jax, lambda _: pair.parameters_to_torch(pair.to_jax(net))):
        with pytest.raises(ValueError, match="'embed.weight' is tied in PyTorch and has two leaves on the flax side"):
            cross(gradients)


class Shared(nnx.Module):
    def __init__(self, tie=True):
        rngs = nnx.Rngs(0)
        self.z = nnx.Linear(3, 3, rngs=rngs)
        self.a = self.z if tie else nnx.Linear(3, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_an_nnx_variable_that_is_shared():
    tied = squares("z", "a")
    tied.a = tied.z
    model = Shared()
    pair = interop.match(tied, model)
    assert links_by_name(pair) == {("z.weight",): ("a.kernel",), ("z.bias",): ("a.bias",)}  # named as by nnx.state
    nnx.update(model, pair.to_jax(tied))
    np.testing.assert_array_equal(model.z.kernel.get_value(), tied.z.weight.detach().T)
    assert torch.equal(pair.to_torch(model)["a.weight"], tied.z.weight)
    with pytest.raises(
        ValueError, match=r"shares 'a.kernel' where the PyTorch side has z.weight and a.weight; tie them"
    ):
        interop.match(squares("z", "a"), model)
    assert len(interop.match(tied, Shared(tie=False)).links) == 4


# --- structures ---


def test_tied_weights_that_do_not_fit_are_refused_by_name():
    net = net_of(emb=nn.Embedding(11, 4), head=nn.Linear(4, 11, bias=False))
    net.head.weight = net.emb.weight
    with pytest.raises(ValueError, match=r"(?s)no partner for 1 .*emb \(Embedding.*embedding \(12, 4\)"):
        interop.match(net, nnx.eval_shape(lambda: nnx.Embed(12, 4, rngs=nnx.Rngs(0))))


class Only(nnx.Module):
    def __init__(self, make):
        self.rnn = make()


def nnx_lstm():
    return nnx.RNN(nnx.LSTMCell(8, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


def test_a_model_of_nothing_but_a_recurrent_layer():
    gru = nn.GRU(8, 16, batch_first=True)
    flax = nnx.eval_shape(lambda: Only(lambda: nnx.RNN(nnx.GRUCell(8, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))))
    assert twins_of(interop.match(net_of(rnn=gru), flax)) == {"rnn": "rnn.cell.dense_i"}
    assert "rnn / rnn: " in interop.match(net_of(rnn=nn.LSTM(8, 16, batch_first=True)), Only(nnx_lstm)).notes[0]
    flax = Only(lambda: nnx.RNN(nnx.LSTMCell(8, 16, rngs=nnx.Rngs(0)), time_major=True, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="rnn / rnn: RNN.time_major is True, it must be False"):
        interop.match(net_of(rnn=nn.LSTM(8, 16, batch_first=True)), flax)


def test_biases_that_are_summed_are_noted():
    net = net_of(rnn=nn.GRU(8, 16, batch_first=True))
    flax = nnx.eval_shape(lambda: Only(lambda: nnx.RNN(nnx.GRUCell(8, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))))
    pair = interop.match(net, flax)
    assert pair.notes == (
        "rnn.bias_ih_l0 + rnn.bias_hh_l0: flax has their sum; values cross, but not the gradients, optimizer state and "
        "penalties of each",
    )
    with pytest.raises(ValueError, match=r"pair.to_jax: 'rnn.bias_ih_l0', 'rnn.bias_hh_l0': GRU: the last third of"):
        pair.to_jax(net)
    with torch.no_grad():
        net.rnn.bias_hh_l0[-16:] = 0
    pair.to_jax(net)


def test_the_halves_of_a_bidirectional_need_no_options_of_their_own():
    lstm = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
    flax = Only(lambda: nnx.Bidirectional(nnx_lstm(), nnx_lstm(), rngs=nnx.Rngs(0)))
    pair = interop.match(net_of(rnn=lstm), flax)
    assert "does not tell" not in str(pair)
    nnx.update(flax, pair.to_jax(pair.net))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(flax.rnn(jnp.asarray(x)), lstm(torch.tensor(x))[0].detach(), rtol=1e-4, atol=1e-5)
    flax.rnn.merge_fn = jnp.add
    with pytest.raises(ValueError, match="Bidirectional.merge_fn"):
        interop.match(net_of(rnn=lstm), flax)

    class Both(fnn.Module):
        def setup(self):
            self.rnn = fnn.Bidirectional(*(fnn.RNN(fnn.OptimizedLSTMCell(16)) for _ in range(2)))

        def __call__(self, x):
            return self.rnn(x)

    bound = Both().bind(Both().init(jax.random.key(0), jnp.asarray(x)))
    pair = interop.match(net_of(rnn=lstm), bound)
    assert "does not tell" not in str(pair)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_of_no_features_cross_and_are_trained():
    net = net_of(left=nn.Linear(0, 3), right=nn.Linear(3, 0), embed=nn.Embedding(0, 3), norm=nn.LayerNorm(0))
    norm = {"scale": shaped(0), "bias": shaped(0)}
    params = {"left": dense(0, 3), "right": dense(3, 0), "embed": {"embedding": shaped(0, 3)}, "norm": norm}
    pair = interop.match(net, params)
    values = pair.to_jax(net)
    assert jax.tree.map(np.shape, values) == jax.tree.map(np.shape, params)
    back = pair.to_torch(values)
    assert all(torch.equal(back[name], x) for name, x in net.state_dict().items())
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        tx, state = pair.optimizer_to_jax(optimizer)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, values), state, pair.to_jax(net))
        assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, params)
        pair.optimizer_to_torch(state, optimizer)


def test_the_structure_that_was_given_comes_back():
    net = net_of(fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    params = {"bn": {"bias": shaped(4), "scale": shaped(4)}, "fc": dense(3, 4)}
    variables = {"batch_stats": {"bn": {"mean": shaped(4), "var": shaped(4)}}, "params": params}
    pair = interop.match(net, variables)
    values = pair.to_jax(net)
    assert list(values) == ["batch_stats", "params"] and list(values["params"]) == ["bn", "fc"]
    assert links_by_name(pair)["bn.running_mean",] == ("batch_stats.bn.mean",)
    frozen = interop.match(net, FrozenDict(variables)).to_jax(net)
    assert isinstance(frozen, FrozenDict) and isinstance(frozen["params"]["fc"], FrozenDict)
    gradients = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    assert jax.tree.structure(pair.parameters_to_jax(gradients)) == jax.tree.structure(params)
    only = net_of(fc=net.fc)
    assert set(leaves_of(interop.match(only, {"fc": dense(3, 4)}).to_jax(only))) == {"fc.kernel", "fc.bias"}
    back = interop.match(only, {"params": {"fc": dense(3, 4)}}).to_torch({"fc": values["params"]["fc"]})
    assert torch.equal(back["fc.weight"], net.fc.weight)


def test_two_collections_may_have_leaves_of_one_path():
    net = nn.Module()
    net.a, net.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(4))
    pair = interop.match(net, {"params": {"x": {"w": shaped(3)}}, "state": {"x": {"w": shaped(4)}}})
    assert links_by_name(pair) == {("a",): ("x.w",), ("b",): ("state.x.w",)}
    assert pair.to_jax(net)["state"]["x"]["w"].shape == (4,)


def test_compiled_code_is_left_or_refused():
    net = nn.Linear(3, 3)
    pair = interop.match(net, dense(3, 3))
    function = lambda x: (pair.to_jax(net), x + 1)[1]  # noqa: E731
    assert torch.equal(torch.compile(function, backend="eager")(torch.zeros(1)), torch.ones(1))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="to_jax: called inside torch.compile"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1))


def test_nnx_modules_and_states_give_a_state_of_weights_and_statistics(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", jnp.float32)
    net = random_net(convnet).float()

    def make():
        model = NnxConvnet()
        model.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        return model

    model = nnx.eval_shape(make)
    for flax in (model, nnx.state(model)):
        pair = interop.match(net, flax, strict=False)
        state = pair.to_jax(net)
        assert isinstance(state, nnx.State) and "drop" not in state
        kinds = {type(v) for _, v in nnx.to_flat_state(state)}
        assert kinds == {nnx.Param, nnx.BatchStat}
        assert all(torch.equal(x, net.state_dict()[name]) for name, x in pair.to_torch(state).items())
        gradients = {name: torch.ones_like(p) for name, p in net.named_parameters()}
        tree = pair.parameters_to_jax(gradients)
        assert jax.tree.structure(tree) == jax.tree.structure(nnx.state(model, nnx.Param))
    nnx.update(model, state)
    np.testing.assert_array_equal(model.bn1.mean.get_value(), net[1].running_mean)
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in pair.to_torch(model).items())


def test_bound_linen_modules_show_their_options():
    class Setup(fnn.Module):
        def setup(self):
            self.norm, self.layers = fnn.LayerNorm(use_fast_variance=False), [fnn.Dense(3) for _ in range(2)]

        def __call__(self, x):
            return self.layers[1](self.layers[0](self.norm(x)))

    variables = in_order_of_calls(Setup(), np.ones((1, 3), np.float32), np.float32)
    net = net_of(norm=nn.LayerNorm(3), layers=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]))
    with pytest.raises(ValueError, match="norm / norm: LayerNorm.epsilon is 1e-06, it must be 1e-05"):
        interop.match(net, Setup().bind(variables))
    pair = interop.match(net, Setup().bind(variables), strict=False)
    assert pair.notes == ("norm / norm: LayerNorm.epsilon is 1e-06, it must be 1e-05",)
    assert set(pair.to_jax(net)) == {"params"}


def test_options_that_are_not_seen_are_noted():
    class Compact(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            x = fnn.Conv(4, (3, 3), strides=2)(x)  # SAME, which is not padding=1 at a stride of two
            return fnn.Dense(2)(fnn.BatchNorm(use_running_average=True)(x))

    net = net_of(conv=nn.Conv2d(3, 4, 3, 2, 1), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 2))
    variables = in_order_of_calls(Compact(), np.ones((1, 4, 4, 3), np.float32), np.float32)
    for flax in (variables, Compact().bind(variables)):
        biased, unseen = interop.match(net, flax).notes
        assert biased.startswith("bn / BatchNorm_0: in training") and "the biased one (/ n) in flax" in biased
        assert unseen.startswith("conv and 1 more: options (epsilon, momentum, padding, strides, ...) are not compared")
    state = nnx.state(nnx.eval_shape(lambda: nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))))
    (unseen,) = interop.match(nn.Conv2d(3, 4, 3), state).notes
    assert unseen.startswith("the model: options")
    (row,) = interop.match(nn.Embedding(3, 4, padding_idx=0), {"embedding": shaped(3, 4)}).notes
    assert row.startswith("the model / the model: padding_idx=0")
    assert interop.match(nn.Linear(3, 3), dense(3, 3)).notes == ()


def test_options_that_differ_are_all_listed():
    net = net_of(norm=nn.LayerNorm(3), conv=nn.Conv2d(3, 4, 3))
    model = nnx.eval_shape(
        lambda: nnx.Dict(
            norm=nnx.LayerNorm(3, use_fast_variance=False, rngs=nnx.Rngs(0)),
            conv=nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
        )
    )
    with pytest.raises(ValueError, match=r"(?s)norm / norm: LayerNorm.epsilon.*conv / conv: Conv.padding is 'SAME'"):
        interop.match(net, model)
    assert len(interop.match(net, model, strict=False).notes) == 2
    # what no option of flax changes is a note also if strict
    options = {"momentum": 0.9, "epsilon": 1e-5, "use_fast_variance": False}
    model = nnx.eval_shape(lambda: nnx.Dict(bn=nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))))
    (note,) = interop.match(net_of(bn=nn.BatchNorm1d(3)), model).notes
    assert "variance" in note
    # the fast variance is the same function, less exact: a note, once for all layers
    model = nnx.eval_shape(
        lambda: nnx.Dict({n: nnx.LayerNorm(3, epsilon=1e-5, rngs=nnx.Rngs(0)) for n in ("norm1", "norm2")})
    )
    (note,) = interop.match(net_of(norm1=nn.LayerNorm(3), norm2=nn.LayerNorm(3)), model).notes
    assert note.startswith("norm1 / norm1 and 1 more: use_fast_variance=True: flax takes mean")


# --- what is no model, no array, no value ---


def test_nearly_right_arguments_are_told_what_is_right():
    net, module = nn.Linear(3, 3), fnn.Dense(3)
    variables = {"params": dense(3, 3)}

    @dataclass
    class TrainState:
        params: Any

    for wrong, text in (
        ((net.state_dict(), variables), "pass the model itself"),
        ((variables, net), "are the arguments swapped"),
        ((module, net), "are the arguments swapped"),
        ((net, net), "are the arguments swapped"),
        ((nn.Linear, variables), "the class Linear; pass an instance"),
        ((net, fnn.Dense), "the class Dense; pass an instance"),
        ((net, (module, variables)), r"pass module.bind\(variables\)"),
        ((net, TrainState(dense(3, 3))), "pass state.params"),
        ((torch.optim.swa_utils.AveragedModel(net), variables), r"match\(averaged.module"),
    ):
        with pytest.raises(TypeError, match=text):
            interop.match(*wrong)


def test_another_size_is_named():
    net = net_of(a=nn.Linear(3, 32), b=nn.Linear(32, 2))
    with pytest.raises(ValueError, match=r"a \(Linear.*nearest: a \(.*\) \(32 here, 64 there\)"):
        interop.match(net, {"a": dense(3, 64), "b": dense(64, 2)})
    with pytest.raises(ValueError, match="the same but for their sizes: make one of the models as wide as the other"):
        interop.match(net, {"a": dense(3, 64), "b": dense(64, 2)})


def test_notes_are_as_wide_as_the_table():
    with pytest.warns(UserWarning, match="linen's numbers"):
        text = str(interop.match(squares("fc1", "fc2"), sorted_by_jax(flax_squares("Dense_0", "Dense_1"))))
    first, *others = text[text.index("note:") :].splitlines()
    assert first.startswith("note: Dense_0, Dense_1: paired by linen's numbers")
    assert others and all(line.startswith("      ") for line in others)
    assert max(map(len, (first, *others))) <= 72


def test_wrong_arguments_are_refused_by_name():
    net, flax = nn.Linear(3, 3), dense(3, 3)
    with FakeTensorMode():
        fake = nn.Linear(3, 3)
    cases = [
        (lambda: interop.match(flax, flax), "net must be an nn.Module, got builtins.dict"),
        (lambda: interop.match(net, [1]), "flax must be an nnx module, its nnx.State, linen variables or a tree"),
        (lambda: interop.match(net, LinenMlp()), r"LinenMlp holds no arrays.*variables = module.init"),
        (lambda: interop.match(net, {**flax, "bias": "x"}), "the leaf 'bias' is a builtins.str, not an array"),
        (lambda: interop.match(net, {"params": flax, "step": 3}), "'step' is a int"),
        (lambda: interop.match(net, {**flax, "bias": fnn.Partitioned(jnp.ones(3), ("a",))}), r"linen.unbox"),
        (lambda: interop.match(net, {**flax, "key": jax.random.key(0)}), "'key' is a PRNG key"),
        (
            lambda: jax.eval_shape(lambda v: interop.match(net, v), dense(3, 3)),
            "is a .*Tracer, a traced array",
        ),
        (
            lambda: interop.match(nn.Linear(3, 3, device="meta"), flax),
            "'weight' of the PyTorch side is a tensor on the",
        ),
        (lambda: interop.match(fake, flax), "'weight' of the PyTorch side is a FakeTensor"),
        (lambda: interop.match(net, flax, rename=["a"]), "rename must be a dict"),
        (lambda: interop.match(net, flax, rename={"weight": 3}), "rename must be a dict of strings"),
        (lambda: interop.match(net, flax, flatten={"": 0}), "flatten must be a dict of layer names and channels"),
    ]
    for call, text in cases:
        with pytest.raises(TypeError, match=text):
            call()


def test_sources_are_checked_as_a_whole_and_by_name(x64):
    net = net_of(fc=nn.Linear(3, 4), out=nn.Linear(4, 2))
    pair = interop.match(net, {"fc": dense(3, 4), "out": dense(4, 2)})
    state = net.state_dict()
    values = pair.to_jax(state)

    def state_with(**others):
        return {**state, **{name.replace("_", "."): x for name, x in others.items()}}

    wrong = [
        (ValueError, {k: v for k, v in state.items() if k != "out.bias"}, "the source lacks 'out.bias'"),
        (ValueError, state_with(fc_wieght=torch.ones(3)), "has 'fc.wieght'.*nearest names: fc.weight"),
        (ValueError, state_with(fc_weight=torch.ones(3, 4)), r"'fc.weight' has the shape \(3, 4\), must be \(4, 3\)"),
        (
            ValueError,
            state_with(fc_bias=torch.ones(4).double()),
            r"'fc.bias' is float64, but float32 in the PyTorch model and float32 on the flax side \('fc.bias'\)",
        ),
        (ValueError, state_with(fc_bias=torch.ones(2, 4)), "leading axes do not cross"),
        (TypeError, state_with(fc_bias=torch.ones(4, device="meta")), "'fc.bias' is a tensor on the meta device"),
        (TypeError, state_with(fc_bias=[1.0] * 4), "'fc.bias' is a builtins.list, not an array"),
        (TypeError, torch.optim.SGD(net.parameters(), 0.1), "source must be the nn.Module, its state dict"),
    ]
    for kind, source, text in wrong:
        with pytest.raises(kind, match=text):
            pair.to_jax(source)
    kernel = values["fc"]["kernel"]
    for kind, leaf, text in [
        (ValueError, kernel.T, r"'fc.kernel' has the shape \(4, 3\), must be \(3, 4\)"),
        (
            ValueError,
            kernel.astype(jnp.bfloat16),
            "'fc.kernel' is bfloat16, but 'fc.weight' of the PyTorch model is float32",
        ),
        (TypeError, shaped(3, 4), "'fc.kernel' is a ShapeDtypeStruct"),
        (TypeError, "kernel", "'fc.kernel' is a builtins.str"),
        (ValueError, None, "the source lacks 'fc.kernel'"),
    ]:
        with pytest.raises(kind, match=text):
            pair.to_torch({**values, "fc": {**values["fc"], "kernel": leaf}})
    with pytest.raises(
        ValueError, match=r"has 'more.kernel', 'more.bias', which the flax side that was matched has not"
    ):
        pair.to_torch({**values, "more": values["fc"]})
    with pytest.raises(TypeError, match="a traced array of jax.jit"):
        jax.jit(lambda values: pair.to_torch(values)["fc.weight"].numpy())(values)
    with pytest.raises(RuntimeError, match="called inside torch.func.vmap"):
        torch.func.vmap(lambda x: pair.to_jax({**state, "fc.bias": x}) and x)(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="called while JAX traces a function"):
        jax.jit(lambda x: (pair.to_jax(net), x)[1])(1.0)
    double = interop.match(net.double(), {"fc": dense(3, 4), "out": dense(4, 2)})
    assert double.notes == ("fc.weight and 3 more: float64 in PyTorch, float32 in flax; values keep their own",)
    wide = jax.tree.map(lambda x: shaped(*x.shape, dtype=np.float64), {"fc": dense(3, 4), "out": dense(4, 2)})
    with pytest.raises(ValueError, match="is float64, which JAX without x64 would narrow to float32"):
        interop.match(net, wide).to_jax(net)
    with x64():
        assert interop.match(net, wide).to_jax(net)["fc"]["bias"].dtype == np.float64


def test_values_are_copies():
    net = nn.Linear(3, 3)
    pair = interop.match(net, dense(3, 3))
    values = pair.to_jax(net)
    old = np.asarray(values["kernel"]).copy()
    with torch.no_grad():
        net.weight.zero_()
    np.testing.assert_array_equal(values["kernel"], old)
    back = pair.to_torch(values)
    back["weight"].zero_()
    np.testing.assert_array_equal(values["kernel"], old)
    assert np.asarray(values["kernel"]).flags.c_contiguous and back["weight"].is_contiguous()


# --- parameters: gradients, moments, masks, objects ---


def test_parameters_cross_in_any_dtype_and_come_back():
    net = net_of(attn=nn.MultiheadAttention(6, 2), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(16, 2), bn=nn.BatchNorm1d(2))
    attn = {
        **{name: {"kernel": shaped(6, 2, 3), "bias": shaped(2, 3)} for name in ("query", "key", "value")},
        "out": {"kernel": shaped(2, 3, 6), "bias": shaped(6)},
    }
    params = {"attn": attn, "conv": conv(3, 3, 4), "fc": dense(16, 2), "bn": {"scale": shaped(2), "bias": shaped(2)}}
    pair = interop.match(
        net, {"params": params, "batch_stats": {"bn": {"mean": shaped(2), "var": shaped(2)}}}, flatten={"fc": 4}
    )
    rng = np.random.default_rng(0)
    for make in (
        lambda p: torch.tensor(rng.integers(0, 99, tuple(p.shape)), dtype=torch.int32),
        lambda p: torch.tensor(rng.random(tuple(p.shape)) > 0.5),
        lambda p: torch.tensor(rng.random(tuple(p.shape)), dtype=torch.bfloat16),
    ):
        values = {name: make(p) for name, p in net.named_parameters()}
        tree = pair.parameters_to_jax(values)
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        back = pair.parameters_to_torch(tree)
        assert list(back) == list(values) and all(torch.equal(back[name], x) for name, x in values.items())
    weight = torch.arange(32.0).reshape(2, 16)  # behind the flatten: rows permuted like the weight's
    moved = pair.parameters_to_jax({**{k: torch.zeros(v.shape) for k, v in values.items()}, "fc.weight": weight})
    np.testing.assert_array_equal(moved["fc"]["kernel"], weight.T.reshape(4, 4, 2).swapaxes(0, 1).reshape(16, 2))

    groups = {name: "decay" if p.ndim > 1 else "none" for name, p in net.named_parameters()}
    spread = pair.spread(groups)
    assert spread["attn"]["query"] == {"kernel": "decay", "bias": "none"} and spread["fc"]["kernel"] == "decay"
    assert jax.tree.structure(spread) == jax.tree.structure(params)


def test_parameters_are_refused_by_name():
    net = net_of(lstm=nn.LSTM(3, 4), fc=nn.Linear(4, 2))
    gates = {f"h{g}": dense(4, 4) for g in "ifgo"} | {f"i{g}": {"kernel": shaped(3, 4)} for g in "ifgo"}
    pair = interop.match(net, {"lstm": gates, "fc": dense(4, 2)})
    ones = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match="bias.*added up have gradients and moments of their own"):
        pair.parameters_to_jax(ones)
    with pytest.raises(ValueError, match="bias.*added up have gradients and moments of their own"):
        pair.parameters_to_torch(pair.to_jax(net))
    pair = interop.match(net.fc, dense(4, 2))
    for values, text in [
        ({"weight": torch.ones(2, 4)}, "values lack 'bias'"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2), "bais": 1}, "values have 'bais'.*nearest names: bias"),
        ({"weight": torch.ones(4, 2), "bias": torch.ones(2)}, r"'weight' has the shape \(4, 2\), must be \(2, 4\)"),
        ({"weight": torch.ones(5, 2, 4), "bias": torch.ones(2)}, "leading axes do not cross"),
        ({"weight": torch.ones(2, 4).double(), "bias": torch.ones(2)}, "'weight' is float64, which JAX without x64"),
    ]:
        with pytest.raises(ValueError, match=text):
            pair.parameters_to_jax(values)
    with pytest.raises(TypeError, match="'weight' is a builtins.float, not an array"):
        pair.parameters_to_jax({"weight": 1.0, "bias": 2.0})
    with pytest.raises(TypeError, match="values must be a dict by parameter name"):
        pair.parameters_to_jax(torch.ones(2))
    with pytest.raises(ValueError, match="values lack 'bias'"):
        pair.spread({"weight": 1})


def test_one_leaf_of_several_parameters_takes_one_object():
    net = net_of(lstm=nn.LSTM(3, 4), fc=nn.Linear(4, 2))
    gates = {f"h{g}": dense(4, 4) for g in "ifgo"} | {f"i{g}": {"kernel": shaped(3, 4)} for g in "ifgo"}
    pair = interop.match(net, {"lstm": gates, "fc": dense(4, 2)})
    one = dict.fromkeys(pair.parameters, "a")
    assert set(jax.tree.leaves(pair.spread(one))) == {"a"}
    with pytest.raises(ValueError, match=r"made of several parameters, which must agree; got .*'lstm.bias_hh_l0': 'b'"):
        pair.spread({**one, "lstm.bias_hh_l0": "b"})


def test_what_only_one_side_trains_is_refused_for_parameters():
    net = nn.Module()
    net.register_buffer("table", torch.ones(4, 3))
    net.scale = nn.Parameter(torch.ones(2))
    pair = interop.match(net, {"params": {"table": shaped(4, 3), "scale": shaped(2)}})
    assert set(pair.to_jax(net)["params"]) == {"table", "scale"}
    with pytest.raises(ValueError, match="'table' is a parameter of the flax side, but a buffer in PyTorch"):
        pair.parameters_to_jax({"scale": torch.ones(2)})
    pair = interop.match(net, {"params": {"table": shaped(4, 3)}, "state": {"scale": shaped(2)}})
    with pytest.raises(ValueError, match="'scale' and 'state.scale' are linked, but only one side trains them"):
        pair.parameters_to_jax({"scale": torch.ones(2)})


# --- memory ---


MEMORY = """
import os, threading, time
import numpy as np, torch, jax
from funcreg import interop

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def stacked(n, depth):
    net = torch.nn.Sequential(*(torch.nn.Linear(n, n, bias=False) for _ in range(depth)))
    leaf = {"kernel": jax.ShapeDtypeStruct((n, n), np.float32)}
    return net, {f"Dense_{i}": leaf for i in range(depth)}

net, flax = stacked(3, 2)
interop.match(net, flax).to_jax(net)  # what is loaded and compiled once
net, flax = stacked(500, 60)
size = 60 * 500 * 500 * 4
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0002)

thread = threading.Thread(target=watch)
thread.start()
pair = interop.match(net, flax)
values = pair.to_jax(net)
done = True
thread.join()
print((max(peak, resident()) - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident memory is read from /proc")
@pytest.mark.slow
def test_memory_is_one_copy_beside_the_model():
    """60 MB of parameters: with the model's own that is two copies, and some leaves on their way."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment, check=True)
    assert 0.9 < float(run.stdout) < 1.5


# --- dtypes ---


def test_values_keep_their_dtype_and_are_never_rounded(x64):
    """A float64 model beside flax's float32 default: values cross as they are; what would be rounded is refused."""
    net = net_of(fc=nn.Linear(3, 4)).double()
    net.fc.weight.data.fill_(0.1)
    pair = interop.match(net, {"fc": dense(3, 4)})
    assert pair.notes == ("fc.weight and 1 more: float64 in PyTorch, float32 in flax; values keep their own",)
    with x64():
        there = pair.to_jax(net)
        assert there["fc"]["kernel"].dtype == np.float64 and there["fc"]["kernel"][0, 0] == 0.1
        assert pair.to_torch(there)["fc.weight"].dtype == torch.float64
        narrow = jax.tree.map(lambda x: x.astype(np.float32), there)
    assert pair.to_torch(narrow)["fc.weight"].dtype == torch.float32  # which load_state_dict widens exactly
    net.float()
    assert pair.to_jax(net)["fc"]["kernel"].dtype == np.float32
    with pytest.raises(ValueError, match=r"'fc\.(kernel|bias)' is float64, but .* of the PyTorch model is float32"):
        pair.to_torch(there)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "bfloat16"])
def test_other_kinds_of_numbers_do_not_cross(dtype):
    net = net_of(fc=nn.Linear(3, 4))
    pair = interop.match(net, {"fc": dense(3, 4)})
    state = {name: x.detach().to(getattr(torch, dtype)) for name, x in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"'fc.weight' is {dtype}, but float32 in the PyTorch model"):
        pair.to_jax(state)
    with pytest.raises(ValueError, match=f"'fc.bias' is {dtype}, but 'fc.bias' of the PyTorch model is float32"):
        pair.to_torch({"fc": {"kernel": np.zeros((3, 4), np.float32), "bias": interop.to_jax(state["fc.bias"])}})


# --- files ---


@pytest.mark.parametrize("ending", [".safetensors", ".msgpack"])
def test_models_cross_by_files(tmp_path, ending):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    variables = {
        "params": {
            "Dense_0": dense(3, 4),
            "BatchNorm_0": {k: np.ones(4, "f") for k in ("scale", "bias")},
            "Dense_1": dense(4, 2),
        },
        "batch_stats": {"BatchNorm_0": {k: np.ones(4, "f") for k in ("mean", "var")}},
    }
    pair = interop.match(net, variables)
    interop.save(tmp_path / f"net{ending}", net.state_dict())
    ported = pair.to_jax(interop.load(tmp_path / f"net{ending}"))
    interop.save(tmp_path / f"flax{ending}", ported)
    state = pair.to_torch(interop.load(tmp_path / f"flax{ending}"))
    assert state.keys() == net.state_dict().keys()
    for name, x in net.state_dict().items():
        assert torch.equal(state[name], x), name
    file = tmp_path / f"broken{ending}"
    interop.save(file, {"params": ported["params"]})
    with pytest.raises(ValueError, match="lacks 'batch_stats.BatchNorm_0.mean'"):
        pair.to_torch(interop.load(file))
    interop.save(file, {**ported, "batch_stats": {**ported["batch_stats"], "more": {"mean": np.ones(2)}}})
    with pytest.raises(ValueError, match="'batch_stats.more.mean', which the flax side that was matched has not"):
        pair.to_torch(interop.load(file))


def test_the_example_of_the_docstring():
    result = doctest.testmod(sys.modules["interop.match"])
    assert result.attempted > 5 and result.failed == 0


# --- what an nnx module and a tree may hold besides ---


def test_plain_arrays_of_a_module_are_its_buffers():
    net = net_of(fc=nn.Linear(3, 4))
    net.register_buffer("mask", torch.arange(2.0))
    model = nnx.Dict(fc=nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    model.mask = jnp.zeros(2)
    model.count = nnx.Variable(0)
    pair = interop.match(net, model)
    nnx.update(model, pair.to_jax(net))
    assert model.mask.tolist() == [0, 1] and model.count.get_value() == 0
    gradients = pair.parameters_to_jax(dict(net.named_parameters()))
    assert jax.tree.structure(gradients) == jax.tree.structure(nnx.state(model, nnx.Param))


def test_trees_may_hold_lists():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tree = {"layers": [{"w": dense(3, 4)}, {"w": dense(4, 2)}]}
    pair = interop.match(net, tree)
    there = pair.to_jax(net)
    assert jax.tree.structure(there) == jax.tree.structure(tree)
    assert there["layers"][1]["w"]["kernel"].shape == (4, 2)
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in pair.to_torch(there).items())


# --- names that differ in little ---


def nnx_dict(*names):
    return nnx.Dict({name: nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i, name in enumerate(names)})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("a1b", "ab1"), ("ab1", "a1b")),
        (("w", "W"), ("W", "w")),
        (("a", "A"), ("A", "a")),
        (("x_", "x"), ("x", "x_")),
        (("conv", "proj"), ("proj", "conv")),
        (("h", "w", "head"), ("w", "head", "h")),
        (("b\u00b2", "b\u00b9"), ("b\u00b9", "b\u00b2")),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_equal_names_are_twins_whatever_the_order(ours, theirs, wrapped):
    net = net_of(**{name: nn.Linear(4, 4) for name in ours})
    pair = interop.match(nn.Sequential(net) if wrapped else net, nnx_dict(*theirs))
    for link in pair.links:
        assert link.torch[0].removeprefix("0.").split(".")[0] == link.jax[0].split(".")[0]


def test_single_letters_are_words():
    pair = interop.match(net_of(h=nn.Linear(4, 4), w=nn.Linear(4, 4)), nnx_dict("width", "height"))
    assert twins_of(pair) == {"h": "height", "w": "width"}
    pair = interop.match(net_of(l1=nn.Linear(4, 4), l2=nn.Linear(4, 4)), nnx_dict("fc1", "fc2"))
    assert twins_of(pair) == {"l1": "fc1", "l2": "fc2"}


def test_what_is_assumed_is_among_the_notes():
    net = net_of(up=nn.ConvTranspose1d(4, 4, 3))
    notes = interop.match(net, {"up": {"kernel": shaped(3, 4, 4), "bias": shaped(4)}}).notes
    assert any(note.startswith("up / up: ") and "transpose_kernel" in note for note in notes)


@pytest.mark.parametrize("options", [{"rename": "fc"}, {"flatten": 3}, {"rename": ["fc"]}])
def test_options_are_dicts(options):
    (name,) = options
    with pytest.raises(TypeError, match=f"match: {name} must be a dict by names of the PyTorch side, got "):
        interop.match(net_of(fc=nn.Linear(3, 4)), {"fc": dense(3, 4)}, **options)


def test_leaves_of_either_byte_order_cross():
    net = nn.Linear(3, 2)
    values = interop.match(net, dense(3, 2)).to_jax(net)
    swapped = {name: np.asarray(x).astype(x.dtype.newbyteorder(">")) for name, x in values.items()}
    for pair in (interop.match(net, dense(3, 2)), interop.match(net, swapped)):
        state = pair.to_torch(swapped)
        assert all(torch.equal(state[name], x) for name, x in net.state_dict().items())
        assert all(np.array_equal(x, values[name]) for name, x in pair.to_jax(net).items())
        assert not pair.notes


def test_a_pair_is_copied_but_not_pickled():
    net = nn.Linear(3, 2)
    pair = interop.match(net, dense(3, 2))
    with pytest.raises(TypeError, match=r"a Pair cannot be pickled: .* call interop.match\(net, flax\) again"):
        pickle.dumps(pair)
    assert copy.copy(pair).net is net
    other = copy.deepcopy(pair)
    with torch.no_grad():
        net.weight.fill_(7)
    assert not torch.equal(other.net.weight, net.weight)
    assert np.array_equal(other.to_jax(other.net)["kernel"], other.net.weight.detach().numpy().T)


@pytest.mark.parametrize(
    "call",
    [
        lambda pair, optimizer: pair.penalty_to_jax(fr.l1(0.1)),
        lambda pair, optimizer: pair.optimizer_to_jax(optimizer),
        lambda pair, optimizer: pair.opt_state_to_jax(()),
    ],
)
def test_compiled_code_of_penalties_and_optimizers_is_left_or_refused(call):
    net = nn.Linear(3, 3)
    pair = interop.match(net, dense(3, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    function = lambda x: (call(pair, optimizer), x + 1)[1]  # noqa: E731
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, backend="eager")(torch.zeros(1)), torch.ones(1))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_to_jax: called inside torch.compile"):
        torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1))


def test_a_layer_and_its_array_are_not_renamed_apart():
    net, flax = squares("fc", "head"), {"a": dense(3, 3), "b": dense(3, 3)}
    with pytest.raises(ValueError, match="rename: fc.weight: another entry renames the whole layer; drop one"):
        interop.match(net, flax, rename={"fc": "a", "fc.weight": "b.kernel"})


@pytest.mark.parametrize("names", [("fc", "fc.kernel"), ("fc.kernel", "fc")])
def test_flat_names_that_cannot_be_a_tree(names):
    pair = interop.match(net_of(fc=nn.Linear(3, 4)), {"fc": dense(3, 4)})
    with pytest.raises(ValueError, match="pair: the source has 'fc"):
        pair.to_torch({name: np.ones(3, "f") for name in names})


def test_a_shared_module_is_renamed_by_either_name():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = torch.nn.Linear(3, 3)
            self.c = torch.nn.Linear(3, 3)

    tree = {name: {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)} for name in ("first", "last")}
    for own in ("a", "b"):
        for partner, other in (("first", "last"), ("last", "first")):
            pair = interop.match(Net(), tree, rename={own: partner, "c": other})
            assert [link.jax for link in pair.links] == [
                (f"{name}.{leaf}",) for name in (partner, other) for leaf in ("kernel", "bias")
            ]


@pytest.mark.parametrize("nested", [False, True])
def test_layers_are_compared_with_those_of_their_size_only(nested, monkeypatch):
    """The work grows with the number of layers, not with its square."""
    compared = []
    found = rules.links_of
    monkeypatch.setattr(rules, "links_of", lambda *args: (compared.append(args), found(*args))[1])

    def comparisons(n):
        net, tree = torch.nn.Sequential(), {}
        for i in range(n):
            held = {"kernel": np.zeros((3 + i, 4 + i)), "bias": np.zeros(4 + i)}
            layer = torch.nn.Linear(3 + i, 4 + i)
            net, tree = (
                (torch.nn.Sequential(layer, net), {"layers_0": held, "layers_1": tree})
                if nested and i
                else (torch.nn.Sequential(*net, layer), {**tree, f"layers_{i}": held})
            )
        compared.clear()
        interop.match(net, tree)
        return len(compared)

    assert comparisons(24) <= 2 * comparisons(12) + 4

"""`interop.match`: the right twins or a refusal, both ways bit for bit, flattens, ties, and everything by name."""

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
from torch import nn

import funcreg
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
    "abbreviations, sorted": (
        squares("q", "k", "v", "o"), flax_squares("key", "out", "query", "value"),
        {"q": "query", "k": "key", "v": "value", "o": "out"},
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
    "a multiple of the channels that is no flatten": (
        net_of(conv=nn.Conv2d(3, 4, 1), fc=nn.Linear(4, 16), out=nn.Linear(16, 2)),
        {"conv": conv(1, 3, 4), "fc": dense(4, 16), "out": dense(16, 2)},
        {"conv": "conv", "fc": "fc", "out": "out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_the_right_twin_is_found(name):
    net, flax, wanted = PAIRED[name]
    assert twins_of(interop.match(net, flax)) == wanted


def test_numbers_of_sorted_keys_are_noted():
    """Nothing tells whether linen's Dense_0 was called first, where a transformation has sorted the keys."""
    (note,) = interop.match(squares("fc1", "fc2"), flax_squares("Dense_0", "Dense_1")).notes
    assert note.startswith("Dense_0, Dense_1: paired by linen's numbers, which count constructions")
    assert interop.match(squares("fc1", "fc2"), flax_squares("fc1", "fc2")).notes == ()
    assert interop.match(squares("fc1", "fc2"), flax_squares("Dense_1", "Dense_0")).notes == ()


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
    assert pair.notes == ("left out: mask; to_torch gives what they are now",)
    given = torch.arange(12.0).reshape(4, 3)
    out = pair.to_jax({**Bare(4, 3).state_dict(), "pos": given})
    np.testing.assert_array_equal(out["pos_embedding"], given)


def test_a_square_bare_array_needs_a_word():
    flax = {**BARE, "pos_embedding": shaped(3, 3)}
    with pytest.raises(ValueError, match=r"'pos' is square, \(3, 3\).*rename=\{'pos': 'pos_embedding'\}"):
        interop.match(Bare(3, 3), flax, rename={"mask": None})
    pair = interop.match(Bare(3, 3), flax, rename={"mask": None, "pos": "pos_embedding"})
    given = torch.arange(9.0).reshape(3, 3)
    np.testing.assert_array_equal(pair.to_jax({**Bare(3, 3).state_dict(), "pos": given})["pos_embedding"], given)


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
    old = {name: x.clone() for name, x in net.state_dict().items()}
    values = pair.to_jax(net)
    with torch.no_grad():
        net.fc.weight += 1
        net.bn.num_batches_tracked += 1
    back = pair.to_torch(values)
    assert list(back) == list(old) and all(torch.equal(back[name], x) for name, x in old.items())
    back["fc.weight"] += 1  # a copy: the pair keeps what it has
    assert torch.equal(pair.to_torch(values)["fc.weight"], old["fc.weight"])
    assert pair.to_torch(values).keys() == net.state_dict().keys()


def test_rename_none_leaves_subtrees_out():
    net = net_of(aux=mlp((3, 3)), fc=nn.Linear(3, 3))
    pair = interop.match(net, flax_squares("fc"), rename={"aux": None})
    assert twins_of(pair) == {"fc": "fc"}
    assert interop.match(net, flax_squares("fc"), rename={"aux.*": None}).notes == pair.notes


# --- refusals ---


class WithForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = {
    "names of different things": (squares("gate", "up"), flax_squares("wide", "narrow"), {}, (
        "cannot tell which is which", "PyTorch  gate, up", "correct and paste: rename={'gate': 'wide', 'up': 'narrow'}",
    )),
    "unknown order": (squares("gate", "up"), flax_squares("a", "c"), {}, ("the order on flax's side is not known",)),
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
        "flax lacks mean, var, which linen keeps in batch_stats: pass all variables",
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
    "rename: stars": (squares("a1", "a2"), flax_squares("x1", "x2"), {"rename": {"a*": "x1"}}, ("1 stars and 'x1' 0",)),
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
    "no multiple of the channels": (
        net_of(conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(100, 5)), {"conv": conv(3, 3, 8), "fc": dense(100, 5)}, {},
        ("fc reads 100 features, no multiple of the 8 channels of conv", "flatten={'fc': None}"),
    ),
    "several convolutions": (
        net_of(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 5), fc=nn.Linear(128, 5)),
        {"a": conv(3, 3, 8), "b": conv(5, 3, 8), "fc": dense(128, 5)}, {},
        ("fc reads 128 features of one of several convolutions, a (8) and b (8)", "flatten={'fc': 8}"),
    ),
    "a dense layer between convolutions": (
        net_of(a=nn.Conv2d(3, 8, 3), time=nn.Linear(32, 8), b=nn.Conv2d(8, 8, 5)),
        {"a": conv(3, 3, 8), "time": dense(32, 8), "b": conv(5, 8, 8)}, {},
        ("time reads 32 features, perhaps the 8 channels of a flattened, but convolutions follow it",),
    ),
    "features beside the channels": (
        net_of(a=nn.Conv2d(3, 8, 3), fc=nn.Linear(16, 8)), {"a": conv(3, 3, 8), "fc": dense(16, 8)}, {},
        ("2 places are no square",),
    ),
    "a second dense layer or a second head": (
        net_of(a=nn.Conv2d(3, 8, 3), b=nn.Linear(32, 32), c=nn.Linear(32, 2)),
        {"a": conv(3, 3, 8), "b": dense(32, 32), "c": dense(32, 2)}, {},
        ("c reads 32 features: those of the dense layer before it, or those that were flattened before",),
    ),
    "an image of a dense layer": (
        net_of(fc=nn.Linear(5, 32), bn=nn.BatchNorm1d(32), a=nn.ConvTranspose2d(8, 3, 3)),
        {"params": {"fc": dense(5, 32), "bn": {"scale": shaped(32), "bias": shaped(32)}, "a": conv(3, 8, 3)},
         "batch_stats": {"bn": {"mean": shaped(32), "var": shaped(32)}}}, {},
        ("fc gives 32 features, perhaps an image of the 8 channels that a reads", "flatten={'fc': (None, 8)}"),
    ),
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


def test_the_rename_of_a_refusal_can_be_pasted():
    net, flax, _, _ = REFUSED["names of different things"]
    assert twins_of(interop.match(net, flax, rename={"gate": "wide", "up": "narrow"})) == {
        "gate": "wide",
        "up": "narrow",
    }

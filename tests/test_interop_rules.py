"""Every rule: outputs, gradients and statistics of a layer and its twin agree, and every array comes back."""

import doctest
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from interop import rules

pytestmark = pytest.mark.relaxed_promotion  # flax mixes dtypes and ranks

F64 = {"param_dtype": jnp.float64}


@dataclass(frozen=True)
class Case:
    """A PyTorch layer and its twins.

    Attributes:
        torch: makes the layer.
        linen: makes linen's.
        nnx: makes nnx's.
        inputs: the shapes of PyTorch's inputs.
        image: whether the channels are PyTorch's second axis and flax's last.
        integers: if not 0, the input is integers below it.
    """

    torch: Callable[[], nn.Module]
    linen: Callable[[], Any]
    nnx: Callable[[], Any] | None
    inputs: tuple[tuple[int, ...], ...] = ((2, 3),)
    image: bool = False
    integers: int = 0

    def draw(self) -> tuple[np.ndarray, ...]:
        if self.integers:
            return tuple(np.random.randint(self.integers, size=shape) for shape in self.inputs)
        return tuple(np.random.randn(*shape) for shape in self.inputs)

    def to_flax(self, x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x, 1, -1) if self.image else x


class Twin:
    """A flax layer of either kind as a pure function of a flat dict of its arrays.

    Attributes:
        layer: linen's or nnx's.
        shapes: of its arrays, by dotted names relative to it.
        statistics: which of these are no parameters.
    """

    def __init__(self, case: Case, kind: str) -> None:
        self.kind, make = kind, getattr(case, kind)
        if kind == "linen":
            self.layer = make()
            self.mode = {"use_running_average": True} if isinstance(self.layer, linen.BatchNorm) else {}
            x = [case.to_flax(x) for x in case.draw()]
            self.tree = jax.eval_shape(lambda key: self.layer.init(key, *x, **self.mode), jax.random.key(0))
            leaves = named(self.tree)  # behind the name of their collection
            self.shapes = {name.split(".", 1)[1]: x.shape for name, x in leaves.items()}
            self.statistics = {name.split(".", 1)[1] for name in leaves if name.startswith("batch_stats")}
        else:
            self.layer = nnx.eval_shape(make)
            self.graph, state, self.rest = nnx.split(self.layer, nnx.Any(nnx.Param, nnx.BatchStat), ...)
            self.flat = nnx.to_flat_state(state)
            self.shapes = {dotted(path): variable.shape for path, variable in self.flat}
            self.statistics = {dotted(p) for p, variable in self.flat if isinstance(variable, nnx.BatchStat)}

    @functools.partial(jax.jit, static_argnums=(0, 4), compiler_options={"xla_backend_optimization_level": 0})
    def run(self, parameters: Any, statistics: Any, x: Any, train: bool, direction: Any) -> Any:
        """Output, gradients of its inner product with `direction` by parameters and inputs, and the new statistics."""
        floats = [one for one in x if one.dtype == jnp.float64]

        def apply(parameters: Any, floats: Any) -> Any:
            return self({**parameters, **statistics}, floats or x, train)

        y, pull, new = jax.vjp(apply, parameters, floats, has_aux=True)
        return y, *pull(direction.reshape(y.shape)), new

    def __call__(self, arrays: dict[str, Any], x: tuple[Any, ...], train: bool) -> tuple[Any, dict[str, Any]]:
        """Its output, and its statistics after it."""
        if self.kind == "linen":
            leaves = [arrays[name.split(".", 1)[1]] for name in named(self.tree)]
            tree = jax.tree.unflatten(jax.tree.structure(self.tree), leaves)
            y, new = self.layer.apply(tree, *x, mutable=["batch_stats"], **dict.fromkeys(self.mode, not train))
            return y, new.get("batch_stats", {})
        state = nnx.from_flat_state([(path, old.replace(arrays[dotted(path)])) for path, old in self.flat])
        layer = nnx.merge(self.graph, state, self.rest)
        layer.train() if train else layer.eval()
        carry = {}
        if isinstance(layer, nnx.RNN):  # which draws its zeros by itself, and counts that
            carry["initial_carry"] = layer.cell.initialize_carry((2, 3), nnx.Rngs(0))
        y = layer(*x, **carry)
        return y, {dotted(path): x[...] for path, x in nnx.to_flat_state(nnx.state(layer, nnx.BatchStat))}


def dotted(path: Any) -> str:
    return ".".join(map(str, path))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of linen's, by dotted names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def conv(n: int, i: int = 4, o: int = 4, bias: bool = True, groups: int = 1, size: int = 7, **kw: Any) -> Case:
    """A square kernel (3 along every axis, as many channels in as out), unless told otherwise."""
    kw = {"kernel_size": 3, "stride": 1, "dilation": 1, "padding": 0, "padding_mode": "zeros"} | kw
    spread = {k: (kw[k],) * n if isinstance(kw[k], int) else kw[k] for k in ("kernel_size", "stride", "dilation")}
    padding = {"zeros": [(kw["padding"],) * 2] * n, "circular": "CIRCULAR", "reflect": "REFLECT"}
    flax = {
        "strides": spread["stride"],
        "padding": kw["padding"].upper() if isinstance(kw["padding"], str) else padding[kw["padding_mode"]],
        "kernel_dilation": spread["dilation"],
        "feature_group_count": groups,
        "use_bias": bias,
        **F64,
    }
    return Case(
        lambda: getattr(nn, f"Conv{n}d")(i, o, groups=groups, bias=bias, **kw),
        lambda: linen.Conv(o, spread["kernel_size"], **flax),
        lambda: nnx.Conv(i, o, spread["kernel_size"], rngs=nnx.Rngs(0), **flax),
        ((2, i, *(size + axis for axis in range(n))),),
        image=True,
    )


def conv_transpose(
    n: int, i: int = 3, o: int = 3, k: int = 3, s: int = 1, p: int = 0, extra: int = 0, d: int = 1, **kw: Any
) -> Case:
    kw = {"transpose_kernel": False, "use_bias": True} | kw
    pad = d * (k - 1) - p
    flax = {"strides": (s,) * n, "padding": [(pad, pad + extra)] * n, "kernel_dilation": (d,) * n, **kw, **F64}
    return Case(
        lambda: getattr(nn, f"ConvTranspose{n}d")(i, o, k, s, p, extra, bias=kw["use_bias"], dilation=d),
        lambda: linen.ConvTranspose(o, (k,) * n, **flax),
        lambda: nnx.ConvTranspose(i, o, (k,) * n, rngs=nnx.Rngs(0), **flax),
        ((2, i, *(4 + axis for axis in range(n))),),
        image=True,
    )


def batch_norm(n: int, affine: bool = True) -> Case:
    flax = {"momentum": 0.9, "use_scale": affine, "use_bias": affine, "use_fast_variance": False, **F64}
    return Case(
        lambda: getattr(nn, f"BatchNorm{n}d")(4, affine=affine),
        lambda: linen.BatchNorm(**flax),
        lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0), **flax),
        ((5, 4, 3, 2, 3)[: n + 2],) if n > 1 else ((5, 4),),
        image=True,
    )


def norm(torch_class: Any, name: str, *args: Any, bias: bool | None = None, **flax: Any) -> Case:
    kw = {} if bias is None else {"bias": bias}
    flax = {"use_fast_variance": False, **({} if bias is None else {"use_bias": bias}), **flax, **F64}
    return Case(
        lambda: torch_class(*args, **kw),
        lambda: getattr(linen, name)(**flax),
        lambda: getattr(nnx, name)(4, rngs=nnx.Rngs(0), **flax),
        ((5, 3, 4),),
    )


def in_float64(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """nnx's own attention takes its softmax in float32."""
    del options
    return linen.dot_product_attention(query, key, value)


OF_NNX = {"decode": False, "attention_fn": in_float64, **F64}


def recurrent(torch_class: Any, cell: str) -> Case:
    of_nnx = {"dtype": jnp.float64} if cell == "SimpleCell" else {}  # alone in having a dtype of its own
    return Case(
        lambda: torch_class(3, 4, batch_first=True),
        lambda: linen.RNN(getattr(linen, cell)(4, **F64)),
        lambda: nnx.RNN(getattr(nnx, cell)(3, 4, rngs=nnx.Rngs(0), **of_nnx, **F64), rngs=nnx.Rngs(0)),
        ((2, 3, 3),),
    )


CASES = {
    "linear": Case(
        lambda: nn.Linear(3, 4), lambda: linen.Dense(4, **F64), lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0), **F64)
    ),
    "linear square without bias": Case(
        lambda: nn.Linear(3, 3, bias=False),
        lambda: linen.Dense(3, use_bias=False, **F64),
        lambda: nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0), **F64),
    ),
    "linear to several axes": Case(
        lambda: nn.Linear(3, 8),
        lambda: linen.DenseGeneral((2, 4), **F64),
        lambda: nnx.LinearGeneral(3, (2, 4), rngs=nnx.Rngs(0), **F64),
    ),
    "conv1d": conv(1, 4, 6),
    "conv1d groups": conv(1, 4, 6, groups=2, bias=False),
    "conv2d square": conv(2, 3, 3),
    "conv2d stride padding": conv(2, 3, 5, stride=2, padding=1, size=8),
    "conv2d dilation groups": conv(2, 4, 4, kernel_size=(2, 3), dilation=(2, 1), groups=4, bias=False),
    "conv2d circular": conv(2, 3, 4, padding=1, padding_mode="circular"),
    "conv2d reflect": conv(2, 3, 4, padding=1, padding_mode="reflect"),
    "conv2d same": conv(2, 3, 4, kernel_size=(5, 3), dilation=(1, 2), padding="same"),
    "conv3d": conv(3, 2, 2, size=4, bias=False),
    "conv_transpose1d": conv_transpose(1, 3, 4, s=2, p=1, extra=1),
    "conv_transpose2d square": conv_transpose(2),
    "conv_transpose2d square, kernel transposed": conv_transpose(2, transpose_kernel=True),
    "conv_transpose2d dilation": conv_transpose(2, 3, 2, k=4, s=2, p=1, d=2, use_bias=False),
    "conv_transpose2d kernel transposed": conv_transpose(2, 3, 2, s=2, p=1, extra=1, transpose_kernel=True),
    "conv_transpose3d": conv_transpose(3, 2, 2, s=2),
    "embedding": Case(
        lambda: nn.Embedding(5, 4),
        lambda: linen.Embed(5, 4, **F64),
        lambda: nnx.Embed(5, 4, rngs=nnx.Rngs(0), **F64),
        ((2, 6),),
        integers=5,
    ),
    "layer_norm": norm(nn.LayerNorm, "LayerNorm", 4, 1e-6),
    "layer_norm over channels and space": Case(
        lambda: nn.LayerNorm((3, 4, 5), 1e-6),
        lambda: linen.LayerNorm(reduction_axes=(-1, -2, -3), feature_axes=(-3, -2, -1), use_fast_variance=False, **F64),
        None,
        ((2, 3, 4, 5),),
        image=True,
    ),
    "layer_norm without bias": norm(nn.LayerNorm, "LayerNorm", 4, 1e-6, bias=False),
    "rms_norm": norm(nn.RMSNorm, "RMSNorm", 4, 1e-6),
    "rms_norm without eps": norm(nn.RMSNorm, "RMSNorm", 4, epsilon=float(np.finfo(np.float64).eps)),
    "group_norm": Case(
        lambda: nn.GroupNorm(2, 4),
        lambda: linen.GroupNorm(2, epsilon=1e-5, use_fast_variance=False, **F64),
        lambda: nnx.GroupNorm(4, 2, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0), **F64),
        ((2, 4, 3, 3),),
        image=True,
    ),
    "batch_norm1d": batch_norm(1),
    "batch_norm2d": batch_norm(2),
    "batch_norm2d without affine": batch_norm(2, affine=False),
    "batch_norm3d": batch_norm(3),
    "attention": Case(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        lambda: linen.MultiHeadAttention(2, **F64),
        lambda: nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0), **OF_NNX),
        ((2, 3, 6),) * 3,
    ),
    "attention without bias": Case(
        lambda: nn.MultiheadAttention(4, 2, bias=False, batch_first=True),
        lambda: linen.MultiHeadDotProductAttention(2, use_bias=False, **F64),
        lambda: nnx.MultiHeadAttention(2, 4, use_bias=False, rngs=nnx.Rngs(0), **OF_NNX),
        ((2, 3, 4), (2, 5, 4), (2, 5, 4)),
    ),
    "attention with other keys": Case(
        lambda: nn.MultiheadAttention(6, 3, kdim=4, vdim=4, batch_first=True),
        lambda: linen.MultiHeadAttention(3, **F64),
        lambda: nnx.MultiHeadAttention(3, 6, in_kv_features=4, rngs=nnx.Rngs(0), **OF_NNX),
        ((2, 3, 6), (2, 5, 4), (2, 5, 4)),
    ),
    "attention with other keys and other values": Case(
        lambda: nn.MultiheadAttention(6, 3, kdim=4, vdim=2, batch_first=True),
        lambda: linen.MultiHeadAttention(3, **F64),
        None,
        ((2, 3, 6), (2, 5, 4), (2, 5, 2)),
    ),
    "lstm": recurrent(nn.LSTM, "OptimizedLSTMCell"),
    "lstm, a layer for each gate": recurrent(nn.LSTM, "LSTMCell"),
    "gru": recurrent(nn.GRU, "GRUCell"),
    "rnn": recurrent(nn.RNN, "SimpleCell"),
    "prelu": Case(lambda: nn.PReLU(init=0.1), linen.PReLU, nnx.PReLU, ((4, 3),)),
}


def run_torch(module: nn.Module, x: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
    """Output, gradients by the parameters' names and by the inputs, of the inner product with a random direction."""
    inputs = [torch.tensor(one, requires_grad=one.dtype.kind == "f") for one in x]
    y = module(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    direction = np.random.randn(*y.shape)
    (y * torch.tensor(direction)).sum().backward()
    grads = {name: p.grad.numpy() for name, p in module.named_parameters()}
    return y.detach().numpy(), direction, grads, [one.grad.numpy() for one in inputs if one.grad is not None]


@functools.cache
def twin_of(name: str, kind: str) -> Twin:
    with jax.enable_x64(True):
        return Twin(CASES[name], kind)


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arbitrary values, for initial zeros and ones would hide errors; variances are positive."""
    arrays = {name: 0.5 * np.random.randn(*shape) for name, shape in shapes.items()}
    return {name: np.abs(x) + 0.1 if name.endswith("var") else np.asarray(x) for name, x in arrays.items()}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(x.shape) for k, x in module.state_dict().items() if k not in rules.without_twin(module)}


def across(links: list[rules.Link], arrays: dict[str, np.ndarray], to: str) -> dict[str, np.ndarray]:
    """The arrays of one side as those of the other."""
    moved = {}
    for one in links:
        sources, targets, move = (one.torch, one.jax, one.to_jax) if to == "jax" else (one.jax, one.torch, one.to_torch)
        moved.update(zip(targets, move(*(arrays[name] for name in sources)), strict=True))
    return moved


def counted_once(link: rules.Link, grads: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Where two biases are added up, both have the gradient of the sum; it is to be taken once."""
    if not link.sums:
        return grads
    b_ih, b_hh = grads
    twice = len(b_hh) - 4 if link.jax[-1].endswith("hn.bias") else len(b_hh)  # not in the n gate of linen's GRU
    return b_ih, np.concatenate([np.zeros(twice), b_hh[twice:]])


def assert_close(ours: np.ndarray, theirs: Any, what: str) -> None:
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and theirs.dtype in (np.float64, np.int64), what
    np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-12 * np.abs(ours).max(initial=0.1), err_msg=what)


KINDS = [(name, kind) for name, case in CASES.items() for kind in ("linen", "nnx") if getattr(case, kind) is not None]
RUNS = [  # both starts in both modes where the mode matters, else one start in each
    (name, kind, start, train)
    for name, kind in KINDS
    for start, train in (("torch", True), ("jax", False), ("torch", False), ("jax", True))
    if "batch_norm" in name or (start == "torch") == train
]


@pytest.mark.parametrize(("name", "kind", "start", "train"), RUNS)
def test_a_layer_and_its_twin_agree(name: str, kind: str, start: str, train: bool, x64: Any) -> None:
    """Outputs, gradients by parameters and inputs, statistics; from PyTorch's arrays and from flax's."""
    case = CASES[name]
    with x64():
        module, twin = case.torch().double().train(train), twin_of(name, kind)
        links = rules.links_of(module, twin.shapes, twin.layer)
        if start == "torch":
            ours = drawn(shapes_of(module))
            if name == "gru" and kind == "nnx":
                ours["bias_hh_l0"][8:] = 0.0  # it has no such biases
            theirs = across(links, ours, "jax")
        else:
            theirs = drawn(twin.shapes)
            ours = across(links, theirs, "torch")
        module.load_state_dict({k: torch.tensor(x.copy()) for k, x in ours.items()}, strict=False)

        x = case.draw()
        y, direction, grads, by_inputs = run_torch(module, x)
        z, their_grads, by_their_inputs, new = twin.run(
            {k: v for k, v in theirs.items() if k not in twin.statistics},
            {k: theirs[k] for k in twin.statistics},
            [case.to_flax(one) for one in x],
            train if twin.statistics else True,  # compiled once if it does not matter
            case.to_flax(direction),
        )
        assert_close(case.to_flax(y).reshape(z.shape), z, "output")
        for one in links:
            if set(one.torch) <= grads.keys():  # not of statistics
                mapped = one.to_jax(*counted_once(one, tuple(grads[k] for k in one.torch)))
                for leaf, grad in zip(one.jax, mapped, strict=True):
                    assert_close(grad, their_grads[leaf], leaf)
        for grad, their_grad in zip(by_inputs, by_their_inputs, strict=True):
            assert_close(case.to_flax(grad), their_grad, "input")
        if twin.statistics:
            n = y.size // 4 if train else 2  # values of a channel
            old, now = ours["running_var"], module.running_var.numpy()
            assert_close(module.running_mean.numpy(), new["mean"], "mean")
            assert_close((now - 0.9 * old) * (n - 1) / n + 0.9 * old if train else now, new["var"], "var")


DTYPES = [np.float32, jnp.bfloat16, np.bool_, np.int64, np.object_]


def anything(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Every bit pattern may occur, NaNs and -0.0 too."""
    if dtype is np.object_:
        return np.array([object() for _ in range(int(np.prod(shape)))], dtype=object).reshape(shape)
    if dtype is np.bool_:
        return np.asarray(np.random.choice([True, False], shape))
    return np.frombuffer(np.random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours == theirs).all() if ours.dtype == object else ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_array_comes_back_bit_for_bit(name: str, kind: str) -> None:
    """Both ways round; parameters, and with them moments, masks and whatever else has an entry for each of theirs."""
    module, twin = CASES[name].torch(), twin_of(name, kind)
    links = [one for one in rules.links_of(module, twin.shapes, twin.layer) if not one.sums]
    shapes = shapes_of(module)
    for dtype in DTYPES:
        ours = {k: anything(shapes[k], dtype) for one in links for k in one.torch}
        theirs = across(links, ours, "jax")
        for k, x in across(links, theirs, "torch").items():
            assert_same_bits(x, ours[k])
        theirs = {k: anything(x.shape, dtype) for k, x in theirs.items()}
        for k, x in across(links, across(links, theirs, "torch"), "jax").items():
            assert_same_bits(x, theirs[k])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_links_hold_every_array_once(name: str, kind: str) -> None:
    module, twin = CASES[name].torch(), twin_of(name, kind)
    links = rules.links_of(module, twin.shapes, twin.layer)
    assert sorted(k for one in links for k in one.torch) == sorted(shapes_of(module))
    assert sorted(k for one in links for k in one.jax) == sorted(twin.shapes)
    assert rules.fits(module, twin.shapes) and rules.covers(module)
    if name != "linear to several axes":  # which may be any
        assert any(held == twin.shapes for held in rules.leaves_of(module))


@pytest.mark.parametrize("name", [name for name in CASES if name in ("lstm", "gru", "rnn")])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_biases_that_are_added_up_come_back_in_the_first(name: str, kind: str) -> None:
    """Values of flax's come back exactly; `bias_hh` is zero where it was added, and the sum stays the same."""
    module, twin = CASES[name].torch(), twin_of(name, kind)
    (link,) = [one for one in rules.links_of(module, twin.shapes) if one.sums]
    theirs = tuple(np.random.randn(*twin.shapes[k]).astype(np.float32) for k in link.jax)
    b_ih, b_hh = link.to_torch(*theirs)
    for x, back in zip(theirs, link.to_jax(b_ih, b_hh), strict=True):
        assert_same_bits(back, x)
    kept = 4 if (name, kind) == ("gru", "linen") else 0
    assert not b_hh[: len(b_hh) - kept].any() and b_hh[len(b_hh) - kept :].all()
    assert all(k in link.sums for k in (*link.torch, *link.jax)) and " = " in link.sums


def test_a_gru_whose_missing_bias_is_not_zero_is_refused() -> None:
    twin = twin_of("gru", "nnx")
    (link,) = [one for one in rules.links_of(nn.GRU(3, 4), twin.shapes) if one.sums]
    with pytest.raises(
        rules.Mismatch, match="the last third of bias_hh, .* is not zero, and flax.nnx.GRUCell has no such bias"
    ):
        link.to_jax(np.zeros(12), np.eye(12)[11])


class Recurrent(linen.Module):
    """Two layers of both directions, as linen's users write them."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(2):
            cells = [linen.RNN(linen.OptimizedLSTMCell(4, **F64)) for _ in range(2)]
            x = linen.Bidirectional(*cells)(x)
        return x


class RecurrentOfNnx(nnx.List):
    """And nnx's."""

    def __init__(self) -> None:
        super().__init__()
        for features in (3, 8):
            cells = [nnx.LSTMCell(features, 4, rngs=nnx.Rngs(0), **F64) for _ in range(2)]
            self.append(nnx.Bidirectional(*(nnx.RNN(cell, rngs=False) for cell in cells), rngs=False))

    def __call__(self, x: Any) -> Any:
        zeros = jnp.zeros((2, 2, 2, 4))
        for layer in self:
            x = layer(x, initial_carry=tuple(map(tuple, zeros)))
        return x


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_and_directions_of_an_lstm(kind: str, x64: Any) -> None:
    """As a whole and cell by cell."""
    module, x = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True), ((2, 5, 3),)
    case = Case(lambda: module.double(), Recurrent, RecurrentOfNnx, x)
    if kind == "linen":
        cells = [f"OptimizedLSTMCell_{i}" for i in range(4)]
    else:
        cells = [f"{i}.{way}_rnn.cell" for i in range(2) for way in ("forward", "backward")]
    with x64():
        twin, (x,) = Twin(case, kind), case.draw()
        ours = {k: v.detach().numpy() for k, v in case.torch().state_dict().items()}
        theirs = across(rules.links_of(module, twin.shapes), ours, "jax")
        links = []
        for cell, part in zip(cells, rules.parts(module), strict=True):
            shapes = {k.removeprefix(f"{cell}."): shape for k, shape in twin.shapes.items() if k.startswith(cell)}
            assert shapes in rules.leaves_of(part)
            links += [one.under("", cell) for one in rules.links_of(part, shapes)]
        assert {k: x.tobytes() for k, x in across(links, ours, "jax").items()} == {
            k: x.tobytes() for k, x in theirs.items()
        }
        run = jax.jit(lambda arrays, x: twin(arrays, (x,), True)[0])
        assert_close(module(torch.tensor(x))[0].detach().numpy(), run(theirs, x), "output")


@pytest.mark.parametrize(
    ("cell", "twin"), [(nn.LSTMCell, "LSTMCell"), (nn.GRUCell, "GRUCell"), (nn.RNNCell, "SimpleCell")]
)
def test_single_cells(cell: Any, twin: str, x64: Any) -> None:
    with x64():
        module, layer = cell(3, 4).double(), getattr(linen, twin)(4, **F64)
        x, states = np.random.randn(2, 3), np.random.randn(2, 2, 4)
        h, c = states
        carry = (c, h) if twin == "LSTMCell" else h
        tree = jax.eval_shape(layer.init, jax.random.key(0), carry, x)["params"]
        flat = named(tree)
        links = rules.links_of(module, {k: x.shape for k, x in flat.items()}, layer)
        theirs = across(links, {k: v.detach().numpy() for k, v in module.state_dict().items()}, "jax")
        params = jax.tree.unflatten(jax.tree.structure(tree), [theirs[k] for k in flat])
        _, y = layer.apply({"params": params}, jax.tree.map(jnp.asarray, carry), jnp.asarray(x))
        state = (torch.tensor(h), torch.tensor(c)) if twin == "LSTMCell" else torch.tensor(h)
        ours = module(torch.tensor(x), state)
        assert_close((ours[0] if isinstance(ours, tuple) else ours).detach().numpy(), y, "output")


def test_directions_in_an_order_of_their_own_are_told_by_their_names() -> None:
    """Sorted, `backward` comes first, and both have the same shapes."""
    cell = {f"{k}.{leaf}": shape for k in ("dense_i", "dense_h") for leaf, shape in [("kernel", (4, 16))]}
    cell |= {"dense_h.bias": (16,)}
    shapes = {f"{way}.{k}": shape for way in ("backward_rnn.cell", "forward_rnn.cell") for k, shape in cell.items()}
    links = rules.links_of(nn.LSTM(4, 4, bidirectional=True), shapes)
    assert {(one.torch[0], one.jax[0]) for one in links if one.torch[0].startswith("weight_ih")} == {
        ("weight_ih_l0", "forward_rnn.cell.dense_i.kernel"),
        ("weight_ih_l0_reverse", "backward_rnn.cell.dense_i.kernel"),
    }
    shapes = {f"{way}.0.{k}": shape for way in ("backward", "forward") for k, shape in cell.items()}
    assert not rules.fits(nn.LSTM(4, 4, num_layers=2), shapes)  # two directions are not two layers
    shapes = {f"feedforward.LSTM_{i}.{k}": shape for i in range(2) for k, shape in cell.items()}
    notes = [one.note for one in rules.links_of(nn.LSTM(4, 4, bidirectional=True), shapes) if one.note]
    assert notes == ["feedforward.LSTM_1 taken for the reverse direction by its place, its name does not tell"]
    layers = {f"layer_{i}.{k}": shape for i in range(11) for k, shape in cell.items()}
    links = rules.links_of(nn.LSTM(4, 4, num_layers=11), layers)
    assert all(one.jax[0].startswith(f"layer_{i // 3}.") for i, one in enumerate(links))  # layer_2 before layer_10


@pytest.mark.parametrize(
    ("module", "shapes", "sentence"),
    [
        (
            nn.Linear(3, 4),
            {"kernel": (4, 3), "bias": (4,)},
            "Linear(in_features=3, out_features=4, bias=True): kernel should be (3, 4) in the flax layer and is (4, 3)",
        ),
        (nn.Linear(3, 4), {"kernel": (3, 4)}, "bias (4,) is missing in the flax layer"),
        (
            nn.Linear(3, 4, bias=False),
            {"kernel": (3, 4), "bias": (4,)},
            "bias (4,) of the flax layer has no counterpart",
        ),
        (
            nn.Linear(6, 4),
            {"kernel": (2, 2, 4), "bias": (4,)},
            "kernel should be (6, 4) in the flax layer and is (2, 2, 4)",
        ),
        (
            nn.Linear(4, 6),
            {"kernel": (4, 2, 3), "bias": (3, 2)},
            "kernel should be (4, 6) in the flax layer and is (4, 2, 3)",
        ),
        (nn.Conv2d(3, 4, 3), {"kernel": (4, 3, 3, 3), "bias": (4,)}, "kernel should be (3, 3, 3, 4)"),
        (nn.ConvTranspose2d(3, 4, 2), {"kernel": (3, 3, 3, 4), "bias": (4,)}, "kernel should be (2, 2, 3, 4)"),
        (
            nn.BatchNorm2d(4),
            {"scale": (4,), "bias": (4,)},
            "mean (4,) is missing in the flax layer; var (4,) is missing",
        ),
        (
            nn.MultiheadAttention(4, 2),
            {"query.kernel": (4, 4, 1)},
            "key.kernel (4, 2, 2) is missing in the flax layer",
        ),
        (nn.LSTM(3, 4), {"cell.ii.kernel": (3, 4)}, "cell.hf.kernel (4, 4) is missing in the flax layer"),
        (
            nn.LSTM(3, 4, num_layers=2),
            {"dense_i.kernel": (3, 16)},
            "its 2 cells are not the cells of the flax layer, which has dense_i.kernel (3, 16)",
        ),
        (nn.PReLU(3), {"negative_slope": ()}, "negative_slope should be (3,) in the flax layer and is ()"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_does_not_fit_is_told_by_name_and_both_shapes(module: nn.Module, shapes: Any, sentence: str) -> None:
    assert not rules.fits(module, shapes)
    with pytest.raises(rules.Mismatch, match=re.escape(sentence)):
        rules.links_of(module, shapes)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 3, groups=2), "groups=2 has no twin: flax's ConvTranspose has no groups"),
        (nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats=False has no twin"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv=True and add_zero_attn=True have no twin"),
        (nn.MultiheadAttention(4, 2, add_zero_attn=True), "add_bias_kv=True and add_zero_attn=True have no twin"),
        (nn.LSTM(3, 4, bias=False), "bias=False has no twin: flax's cells have biases, which would be trained"),
        (nn.LSTM(3, 4, proj_size=2), "proj_size=2 has no twin"),
        (nn.LazyLinear(4), "weight belongs to a lazy module and has no shape yet; run the model once"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            "its array parametrizations.weight.original0 (4, 1) is in no",
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_has_no_twin_is_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    for ask in (rules.leaves_of, lambda module: rules.links_of(module, {"kernel": (3, 4)})):
        with pytest.raises(rules.Mismatch, match=re.escape(reason)):
            ask(module)


@pytest.mark.parametrize(
    ("module", "shapes", "twin"),
    [
        (nn.LayerNorm(4, bias=False), {"scale": (4,)}, linen.RMSNorm()),
        (nn.LayerNorm(4), {"scale": (4,), "bias": (4,)}, linen.GroupNorm(2)),
        (nn.GroupNorm(2, 4), {"scale": (4,), "bias": (4,)}, linen.InstanceNorm()),
        (nn.Conv1d(4, 4, 3), {"kernel": (3, 4, 4), "bias": (4,)}, linen.ConvTranspose(4, (3,))),
        (nn.Conv1d(4, 4, 3), {"kernel": (3, 4, 4), "bias": (4,)}, linen.ConvLocal(4, (3,))),
    ],
)
def test_other_layers_of_the_same_arrays_are_refused(module: nn.Module, shapes: Any, twin: Any) -> None:
    assert rules.fits(module, shapes) and not rules.fits(module, shapes, twin)
    with pytest.raises(rules.Mismatch, match=f"flax's {type(twin).__name__} are not the same layer, whatever"):
        rules.links_of(module, shapes, twin)


def test_the_convention_of_a_transposed_convolution_is_that_of_its_twin_or_stated() -> None:
    module, shapes = nn.ConvTranspose1d(3, 3, 3), {"kernel": (3, 3, 3), "bias": (3,)}
    weight = module.weight.detach().numpy()
    for twin, expected in (
        (linen.ConvTranspose(3, (3,)), np.transpose(weight, (2, 0, 1))[::-1]),
        (linen.ConvTranspose(3, (3,), transpose_kernel=True), np.transpose(weight, (2, 1, 0))),
    ):
        link, _ = rules.links_of(module, shapes, twin)
        assert link.note == "" and (link.to_jax(weight)[0] == expected).all()
    link, _ = rules.links_of(module, shapes)
    assert link.note == "transpose_kernel=False, flax's default: assumed, for transpose_kernel=True has the same shapes"
    assert (link.to_jax(weight)[0] == np.transpose(weight, (2, 0, 1))[::-1]).all()
    (link, _) = rules.links_of(nn.ConvTranspose1d(3, 4, 3), {"kernel": (3, 4, 3), "bias": (4,)})
    assert link.note == ""  # only transpose_kernel=True has these shapes


def test_a_norm_over_channels_and_space_follows_the_channels() -> None:
    weight = np.arange(24).reshape(2, 3, 4)
    module = nn.LayerNorm((2, 3, 4))
    for shape, expected in (((2, 3, 4), weight), ((3, 4, 2), np.moveaxis(weight, 0, -1))):
        for link in rules.links_of(module, {"scale": shape, "bias": shape}):
            assert (link.to_jax(weight)[0] == expected).all() and link.note == ""
            assert (link.to_torch(expected)[0] == weight).all()
    link, _ = rules.links_of(nn.LayerNorm((3, 3)), {"scale": (3, 3), "bias": (3, 3)})
    assert link.note.startswith("the axes in PyTorch's order: assumed")


def test_several_axes_of_the_input_are_linked_in_order() -> None:
    weight = np.arange(24).reshape(4, 6)
    (link,) = rules.links_of(nn.Linear(6, 4, bias=False), {"kernel": (2, 3, 4)}, linen.DenseGeneral(4, (-2, -1)))
    assert link.note == "PyTorch's 6 input features taken to be in the order of flax's axes (2, 3)"
    assert (link.to_jax(weight)[0] == weight.T.reshape(2, 3, 4)).all()
    assert (link.to_torch(weight.T.reshape(2, 3, 4))[0] == weight).all()


def test_a_slope_for_each_channel_needs_a_layer_that_has_them() -> None:
    (link,) = rules.links_of(nn.PReLU(3), {"negative_slope": (3,)})
    assert link.torch == ("weight",) and rules.leaves_of(nn.PReLU(3)) == [{"negative_slope": (3,)}]
    assert rules.leaves_of(nn.PReLU()) == [{"negative_slope": ()}, {"negative_slope": (1,)}]


@settings(max_examples=5)
@given(
    k=st.integers(1, 4),
    s=st.integers(1, 3),
    d=st.integers(1, 2),
    p=st.integers(0, 3),
    groups=st.integers(1, 2),
    features=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    extra=st.integers(0, 2),
    transpose_kernel=st.booleans(),
)
def test_convolutions_of_any_options(
    k: int, s: int, d: int, p: int, groups: int, features: tuple[int, int], extra: int, transpose_kernel: bool
) -> None:
    """Of one axis, which is enough to mix up sizes."""
    (i, o), span = features, d * (k - 1) + 1
    options = {"kernel_size": k, "stride": s, "dilation": d, "padding": p, "groups": groups}
    cases = [
        conv(1, groups * i, groups * o, size=span + extra, **options),
        conv_transpose(
            1, i, o, k, s, min(p, span - 1), min(extra, max(s, d) - 1), d, transpose_kernel=transpose_kernel
        ),
    ]
    with jax.enable_x64(True):
        for case in cases:
            module, twin, (x,) = case.torch().double(), Twin(case, "linen"), case.draw()
            ours = drawn(shapes_of(module))
            module.load_state_dict({name: torch.tensor(value) for name, value in ours.items()})
            theirs = across(rules.links_of(module, twin.shapes, twin.layer), ours, "jax")
            y, _ = twin(jax.tree.map(jnp.asarray, theirs), (jnp.asarray(case.to_flax(x)),), True)
            assert_close(case.to_flax(module(torch.tensor(x)).detach().numpy()), y, "output")
            assert rules.differences(module, twin.layer) == []


def test_what_flax_does_not_have_is_said_with_the_reason() -> None:
    assert list(rules.without_twin(nn.BatchNorm2d(4))) == ["num_batches_tracked"]
    assert "flax counts no batches" in rules.without_twin(nn.BatchNorm2d(4))["num_batches_tracked"]
    assert rules.without_twin(nn.Linear(3, 4)) == {}


def test_units_and_their_parts() -> None:
    """What a rule speaks of is not looked into; a recurrent module of several cells is that many."""
    assert rules.covers(nn.MultiheadAttention(4, 2)) and rules.covers(nn.LSTM(3, 4))
    assert not rules.covers(nn.Sequential(nn.Linear(3, 4))) and not rules.covers(nn.ReLU())
    one, several = nn.LSTM(3, 4), nn.GRU(3, 4, num_layers=2, bidirectional=True)
    assert rules.parts(one) == [one]
    assert [part.suffix for part in rules.parts(several)] == ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert rules.leaves_of(several) == []  # wherever the cells are


class Scale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n))
        self.register_buffer("seen", torch.zeros(()))


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))


@pytest.mark.parametrize("module", [Scale(3), nn.Bilinear(2, 3, 4), nn.EmbeddingBag(3, 4)])
def test_a_layer_without_a_rule_names_the_remedy(module: nn.Module) -> None:
    with pytest.raises(rules.NoRule, match=rf"{type(module).__name__}; declare it: interop.rules.register\("):
        rules.links_of(module, {})
    assert not rules.covers(module) and not rules.fits(module, {})


def test_a_subclass_with_a_forward_of_its_own_has_no_rule() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, *args: Any) -> Any:
            raise NotImplementedError

    class Named(nn.Linear):
        pass

    with pytest.raises(rules.NoRule, match="Standardized is a Conv2d with a forward of its own"):
        rules.leaves_of(Standardized(3, 4, 3))
    assert rules.leaves_of(Named(3, 4)) == rules.leaves_of(nn.Linear(3, 4))


def test_a_rule_of_ones_own(own_rules: None) -> None:
    rules.register(
        Scale,
        lambda module: [rules.link("gain", "scale")],
        differences=lambda module, twin: [f"{twin} counts nothing"],
        without_twin={"seen": "a counter"},
    )
    (link,) = rules.links_of(Scale(3), {"scale": (3,)})
    assert (link.torch, link.jax) == (("gain",), ("scale",)) and rules.covers(Scale(3))
    assert rules.leaves_of(Scale(3)) == [{"scale": (3,)}] and rules.without_twin(Scale(3)) == {"seen": "a counter"}
    assert rules.differences(Scale(3), "It") == ["It counts nothing"]
    with pytest.raises(rules.Mismatch, match=re.escape("scale should be (3,) in the flax layer and is (4,)")):
        rules.links_of(Scale(3), {"scale": (4,)})

    rules.register(
        nn.Linear, lambda module: [rules.link("weight", "w"), rules.link("bias", "b")]
    )  # one may know better
    assert rules.leaves_of(nn.Linear(3, 4)) == [{"w": (4, 3), "b": (4,)}]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [("gain", "its array seen () is in no link"), ("gain seen other", "the rule links an array other")],
)
def test_a_rule_that_forgets_an_array_is_refused(names: str, sentence: str, own_rules: None) -> None:
    rules.register(Scale, lambda module: [rules.link(name, name) for name in names.split()])
    with pytest.raises(rules.Mismatch, match=re.escape(sentence)):
        rules.leaves_of(Scale(3))


def test_the_example_of_register_runs(own_rules: None) -> None:
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(rules.register, globs={})
    assert doctest.DocTestRunner().run(example).failed == 0 and example.examples


def test_names_of_layers_go_in_front() -> None:
    link = rules.link("weight", "kernel").under("net.0", "Dense_0")
    assert (link.torch, link.jax) == (("net.0.weight",), ("Dense_0.kernel",))
    assert (link.under("", "").torch, link.under("", "params").jax) == (("net.0.weight",), ("params.Dense_0.kernel",))

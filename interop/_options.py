"""Options of a PyTorch layer and of its flax twin that no array shows, and which of them differ.

What is not mentioned here must have flax's default: an option nobody thought of is reported, not passed over.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from . import _padding as _pads
from ._recurrent import Cell

_NO_MATTER = set(  # to what the layer computes from given arrays: initial values, names, or seen in the shapes
    "self name parent rngs keep_rngs param_dtype dtype deterministic broadcast_dropout use_running_average unroll cell "
    "features in_features out_features hidden_features num_features num_embeddings kernel_size use_bias use_scale "
    "qkv_features in_kv_features return_carry forward_rnn backward_rnn negative_slope_init "
    "state_axes broadcast_rngs variable_axes variable_broadcast variable_carry split_rngs".split()
)


class Option(NamedTuple):
    """One attribute of the flax layer: what the PyTorch layer needs it to be, and what it is."""

    name: str
    needed: Any
    seen: Any
    why: str = ""

    @property
    def differs(self) -> bool:
        a, b = self.needed, self.seen
        if isinstance(a, float) and isinstance(b, float):
            return not np.isclose(a, b, rtol=1e-9, atol=0)  # 1 - 0.9 is not 0.1
        return a != b


# What a rule knows of the options: (PyTorch layer, flax layer) -> options, and sentences that hold for all such pairs.
Options = Callable[[Any, Any], Iterable[Option | str]]


def none(module: Any, twin: Any) -> Iterator[Option | str]:
    """Nothing but what every layer has."""
    del module, twin
    yield from ()


def linear(module: Any, twin: Any) -> Iterator[Option | str]:
    if hasattr(twin, "axis"):  # DenseGeneral, LinearGeneral
        axis = _axes(twin.axis)
        yield Option("axis", tuple(range(-len(axis), 0)), axis)


def conv(module: Any, twin: Any) -> Iterator[Option | str]:
    n = len(module.kernel_size)
    yield Option("strides", module.stride, _spread(twin.strides, n))
    yield Option("kernel_dilation", module.dilation, _spread(twin.kernel_dilation, n))
    yield Option("input_dilation", (1,) * n, _spread(twin.input_dilation, n))
    yield Option("feature_group_count", module.groups, twin.feature_group_count)
    yield _padding(*_pads.of_conv(module, twin.padding), twin)


def conv_transpose(module: Any, twin: Any) -> Iterator[Option | str]:
    n = len(module.kernel_size)
    yield Option("strides", module.stride, _spread(twin.strides, n))
    yield Option("kernel_dilation", module.dilation, _spread(twin.kernel_dilation, n))
    yield Option("transpose_kernel", twin.transpose_kernel, twin.transpose_kernel)  # the arrays follow it
    yield _padding(*_pads.of_conv_transpose(module, twin.padding), twin)


def embedding(module: Any, twin: Any) -> Iterator[Option | str]:
    del twin
    yield from always(module)


def layer_norm(module: Any, twin: Any) -> Iterator[Option | str]:
    yield from _last_axes(module, twin)
    yield Option("epsilon", module.eps, twin.epsilon)
    yield from _fast_variance(twin)


def rms_norm(module: Any, twin: Any) -> Iterator[Option | str]:
    yield from _last_axes(module, twin)
    yield Option("use_fast_variance", None, None)  # there is no mean to subtract
    if module.eps is not None:
        yield Option("epsilon", module.eps, twin.epsilon)
    else:  # PyTorch computes in float32 at least
        dtype = torch.float64 if module.weight is not None and module.weight.dtype == torch.float64 else torch.float32
        yield Option("epsilon", torch.finfo(dtype).eps, twin.epsilon, f"eps=None is the resolution of {dtype}")


def group_norm(module: Any, twin: Any) -> Iterator[Option | str]:
    groups = module.num_channels // twin.group_size if twin.num_groups is None else twin.num_groups
    yield Option("num_groups", module.num_groups, groups)
    yield Option("group_size", None, None)
    yield Option("epsilon", module.eps, twin.epsilon)
    yield from _fast_variance(twin)


def batch_norm(module: Any, twin: Any) -> Iterator[Option | str]:
    yield Option("axis", (-1,), _axes(twin.axis))
    yield Option("epsilon", module.eps, twin.epsilon)
    yield from _fast_variance(twin)
    if module.momentum is None:
        why = "PyTorch averages over all batches alike, by num_batches_tracked; flax has no such average"
        yield Option("momentum", None, twin.momentum, why)
    else:
        why = f"the weight of the old value; PyTorch's momentum={module.momentum} is that of the new one"
        yield Option("momentum", 1.0 - module.momentum, float(twin.momentum), why)
    yield from always(module)


def attention(module: Any, twin: Any) -> Iterator[Option | str]:
    yield Option("num_heads", module.num_heads, twin.num_heads)
    yield Option("num_kv_heads", module.num_heads, getattr(twin, "num_kv_heads", module.num_heads))
    yield Option("dropout_rate", float(module.dropout), float(twin.dropout_rate))
    yield Option("decode", False, bool(twin.decode))
    default = inspect.signature(type(twin).__init__).parameters["attention_fn"].default
    yield Option("attention_fn", None, None)
    if twin.attention_fn is not default:
        yield f"attention_fn is {getattr(twin.attention_fn, '__name__', twin.attention_fn)}, which is not looked into"
    elif type(twin).__module__.startswith("flax.nnx") and module.out_proj.weight.dtype == torch.float64:
        if twin.dropout_rate == 0.0:
            yield "nnx's attention_fn takes the softmax in float32, also of float64 (jax.nn.dot_product_attention)"
    yield from always(module)


def recurrent(module: Any, twin: Any) -> Iterator[Option | str]:
    reverse = isinstance(module, Cell) and module.reverse
    module = module.module if isinstance(module, Cell) else module
    if hasattr(twin, "time_major") and hasattr(module, "batch_first"):  # an nn.LSTMCell sees no time
        yield Option("time_major", not module.batch_first, twin.time_major)
    if hasattr(twin, "forward_rnn"):  # Bidirectional, whose call decides for both of its RNNs
        yield Option("merge_fn", True, _concatenates(twin.merge_fn), "PyTorch concatenates the two directions")
        return
    if hasattr(twin, "cell"):  # RNN
        yield Option("reverse", reverse, twin.reverse)
        yield Option("keep_order", reverse or twin.keep_order, twin.keep_order)  # no matter if it is not reversed
        return
    if hasattr(twin, "gate_fn"):
        yield Option("gate_fn", "sigmoid", _function(twin.gate_fn))
    yield Option("activation_fn", getattr(module, "nonlinearity", "tanh"), _function(twin.activation_fn))
    yield from always(module)


def always(module: Any) -> Iterator[str]:
    """What is different in all pairs of such layers, whatever the options of the flax layer are."""
    module = getattr(module, "module", module)  # of a Cell
    if isinstance(module, nn.Embedding):
        if module.padding_idx is not None:
            yield (
                f"padding_idx={module.padding_idx}: PyTorch keeps the gradient of that row zero, flax's Embed trains it"
            )
        if module.max_norm is not None:
            yield (
                f"max_norm={module.max_norm}: PyTorch rescales the rows that it looks up, in place; flax's Embed does "
                "not"
            )
        if module.scale_grad_by_freq:
            yield "scale_grad_by_freq=True: PyTorch divides gradients by how often a row occurs; flax's Embed does not"
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        yield (
            "in training the running variance takes in the unbiased variance of a batch (/ (n - 1)) in PyTorch, the "
            "biased one (/ n) in flax: the outputs of training agree, the statistics and so later evaluations do not. "
            "After a step of flax, (var - m * old) * n / (n - 1) + m * old is PyTorch's: m its momentum here, old the "
            "variance before, n the values of a channel in the batch"
        )
    elif isinstance(module, nn.MultiheadAttention):
        if not module.batch_first:
            yield "batch_first=False: PyTorch attends over the first axis, flax over the last but one; swap them"
        yield "boolean masks: True blocks in PyTorch, True keeps in flax; pass the opposite"
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            yield "the state is (h, c) in PyTorch and (c, h) in flax"
        if getattr(module, "dropout", 0.0):
            yield f"dropout={module.dropout} between the layers: flax's cells have none; put a Dropout between them"


def differences(module: Any, twin: Any, options: Options, whole: Any = None) -> list[str]:
    """Sentences on every option of a flax layer, and of the cells in it, that differs from the PyTorch layer's.

    `whole` is the Bidirectional that the layer is an RNN of, whose call decides in its place.
    """
    said = []
    ours = getattr(module, "module", module)  # of a Cell
    for layer in _with_cells(twin) if whole is None else (whole, twin.cell):
        looked_at = {"dtype"}
        for one in [*options(module, layer), _dtype(ours, layer)]:
            if isinstance(one, str):
                said.append(one)
                continue
            looked_at.add(one.name)
            if one.differs:
                why = f" ({one.why})" if one.why else ""
                said.append(f"{type(layer).__name__}.{one.name} is {one.seen!r}, it must be {one.needed!r}{why}")
        said += _unknown(layer, looked_at)
    hooks = len(ours._forward_hooks) + len(ours._forward_pre_hooks)
    if hooks:
        said.append(f"{hooks} forward hooks of the PyTorch layer have no twin")
    return list(dict.fromkeys(said))


def _with_cells(twin: Any) -> Iterator[Any]:
    yield twin
    for rnn in (twin, getattr(twin, "forward_rnn", None), getattr(twin, "backward_rnn", None)):
        if rnn is not None and hasattr(rnn, "cell"):
            yield rnn.cell


def _dtype(module: Any, layer: Any) -> Option:
    ours = next((str(p.dtype).removeprefix("torch.") for p in module.parameters()), None)
    theirs = getattr(layer, "dtype", None)
    if theirs is None or ours is None:
        return Option("dtype", None, None)
    return Option("dtype", ours, np.dtype(theirs).name, "in which the layer computes")


def _unknown(layer: Any, looked_at: set[str]) -> Iterator[str]:
    """On what flax's own class can be told when it is made, where that was told and nobody has looked at it."""
    flax = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("flax."))
    for name, parameter in inspect.signature(flax.__init__).parameters.items():
        initial = name.endswith(("_init", "_metadata")) and name != "carry_init"
        if name in looked_at or name in _NO_MATTER or initial or parameter.default is parameter.empty:
            continue
        value = getattr(layer, name, parameter.default)
        if value is not parameter.default and not _equal(value, parameter.default):
            yield f"{type(layer).__name__}.{name} is {value!r}, of which PyTorch's layer has nothing"


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError):  # an array beside something else
        return False


def _padding(needed: Any, same: bool, why: str, twin: Any) -> Option:
    return Option("padding", needed, needed if same else twin.padding, why)


def _fast_variance(twin: Any) -> Iterator[Option | str]:
    yield Option("use_fast_variance", None, None)  # the same function
    if twin.use_fast_variance:
        yield (
            "use_fast_variance=True: flax takes mean(x**2) - mean(x)**2, of which float32 keeps no correct digit where "
            "the mean is large beside the deviation; False computes it as PyTorch does"
        )


def _last_axes(module: Any, twin: Any) -> Iterator[Option]:
    last = tuple(range(-len(module.normalized_shape), 0))
    yield Option("reduction_axes", last, _axes(twin.reduction_axes))
    yield Option("feature_axes", last, _axes(twin.feature_axes))


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(sorted(axes))


def _spread(value: Any, n: int) -> tuple[int, ...]:
    """flax's shorthands: None is 1, one number holds for all axes."""
    return (value or 1,) * n if value is None or isinstance(value, int) else tuple(value)


_KNOWN = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}


def _function(function: Callable[..., Any]) -> Any:
    """Its name if it has the values of a known one, whatever it is called; else the function."""
    x = np.linspace(-6, 6, 49, dtype=np.float32)
    try:
        y = np.asarray(function(jnp.asarray(x)))
    except Exception:  # a function of the user's, of which we know nothing: it is shown instead
        return function
    return next((name for name, known in _KNOWN.items() if np.allclose(y, known(x), atol=1e-5)), function)


def _concatenates(merge: Callable[..., Any]) -> Any:
    try:
        same = np.array_equal(merge(jnp.zeros((1, 2)), jnp.ones((1, 2))), [[0, 0, 1, 1]])
    except Exception:  # likewise
        same = False
    return same or merge

"""What differs although the arrays fit is said, one sentence each; what fits is not complained of."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from interop import rules
from test_interop_rules import CASES, KINDS, twin_of

STATED = {  # what holds for every pair of these
    "batch_norm": ["unbiased variance"],
    "attention": ["True blocks in PyTorch"],
    "lstm": ["(h, c) in PyTorch"],
}


@pytest.mark.relaxed_promotion  # flax mixes dtypes and ranks
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_nothing_is_said_of_a_layer_whose_twin_does_the_same(name: str, kind: str) -> None:
    said = rules.differences(CASES[name].torch().double(), twin_of(name, kind).layer)
    if "attention" in name and kind == "nnx":  # the test's own attention_fn
        said = [one for one in said if "attention_fn" not in one]
    expected = next((words for key, words in STATED.items() if name.startswith(key)), [])
    assert len(said) == len(expected) and all(word in one for word, one in zip(expected, said, strict=True)), said


def conv(*args: Any, **options: Any) -> linen.Conv:
    return linen.Conv(4, (3, 3), *args, **options)


VALID = {"padding": "VALID"}
NORM = {"use_fast_variance": False}

# PyTorch's layer, its twin, and what has to be in the one sentence on it besides those of STATED.
DIFFERENT = {
    "epsilon": (nn.LayerNorm(4), linen.LayerNorm(**NORM), "LayerNorm.epsilon is 1e-06, it must be 1e-05"),
    "epsilon of a group norm": (nn.GroupNorm(2, 4), linen.GroupNorm(2, **NORM), "epsilon is 1e-06, it must be 1e-05"),
    "epsilon of a batch norm": (nn.BatchNorm1d(4, 1e-3), linen.BatchNorm(momentum=0.9, **NORM), "it must be 0.001"),
    "no epsilon": (nn.RMSNorm(4), linen.RMSNorm(), "it must be 1.1920928955078125e-07 (eps=None is the resolution of"),
    "axes": (
        nn.LayerNorm((3, 4), 1e-6),
        linen.LayerNorm(feature_axes=(-2, -1), **NORM),
        "reduction_axes is (-1,), it must be (-2, -1)",
    ),
    "fast variance": (nn.LayerNorm(4, 1e-6), linen.LayerNorm(), "no correct digits where the mean is large"),
    "groups": (nn.GroupNorm(2, 4, 1e-6), linen.GroupNorm(4, **NORM), "num_groups is 4, it must be 2"),
    "group size": (nn.GroupNorm(1, 4, 1e-6), linen.GroupNorm(None, 2, **NORM), "num_groups is 2, it must be 1"),
    "momentum": (nn.BatchNorm1d(4), linen.BatchNorm(**NORM), "momentum is 0.99, it must be 0.9"),
    "average of all": (
        nn.BatchNorm1d(4, momentum=None),
        linen.BatchNorm(**NORM),
        "must be None (PyTorch averages over",
    ),
    "batch norm's axis": (nn.BatchNorm1d(4), linen.BatchNorm(axis=1, momentum=0.9, **NORM), "axis is (1,)"),
    "across devices": (nn.BatchNorm1d(4), linen.BatchNorm(axis_name="i", momentum=0.9, **NORM), "axis_name is 'i'"),
    "flax's padding": (nn.Conv2d(3, 4, 3), conv(), "padding is 'SAME', it must be [(0, 0), (0, 0)]"),
    "stride 2": (
        nn.Conv2d(3, 4, 3, 2, 1),
        conv(2),
        "it must be [(1, 1), (1, 1)] (on spatial axis 1 they agree only where size % 2 is [1])",
    ),
    "strides": (nn.Conv2d(3, 4, 3, 2), conv(**VALID), "strides is (1, 1), it must be (2, 2)"),
    "dilation": (nn.Conv2d(3, 4, 3, dilation=2), conv(**VALID), "kernel_dilation is (1, 1), it must be (2, 2)"),
    "groups of channels": (nn.Conv2d(4, 4, 3, groups=2), conv(**VALID), "feature_group_count is 1, it must be 2"),
    "spread input": (nn.Conv2d(3, 4, 3), conv(input_dilation=2, **VALID), "input_dilation is (2, 2)"),
    "causal": (nn.Conv1d(3, 4, 3, padding=1), linen.Conv(4, (3,), padding="CAUSAL"), "must be [(1, 1)]"),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), conv(), "padding is 'SAME', it must be 'CIRC"),
    "circular by another width": (
        nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),
        conv(padding="CIRCULAR"),
        "in front of it jnp.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)], mode='wrap')",
    ),
    "replicated": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), conv(), "mode='edge')"),
    "masked": (nn.Conv2d(3, 4, 3), conv(mask=np.ones((3, 3, 3, 4)), **VALID), "Conv.mask is "),
    "transposed, SAME": (
        nn.ConvTranspose2d(3, 4, 3, 2, 1, 1),
        linen.ConvTranspose(4, (3, 3), (2, 2)),
        "padding is 'SAME', it must be [(1, 2), (1, 2)]",
    ),
    "transposed, PyTorch's padding": (
        nn.ConvTranspose1d(3, 4, 4, 2, 0),
        linen.ConvTranspose(4, (4,), (2,), padding=0),
        "padding is 0, it must be [(3, 3)] (dilation * (kernel_size - 1) - padding",
    ),
    "transposed, dilation": (
        nn.ConvTranspose1d(3, 4, 3, dilation=2, padding=2),
        linen.ConvTranspose(4, (3,), padding=2),
        "kernel_dilation is (1,), it must be (2,)",
    ),
    "transposed, strides": (
        nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1),
        linen.ConvTranspose(4, (3,), padding=1),
        "strides is (1,), it must be (2,)",
    ),
    "padding_idx": (nn.Embedding(5, 4, 0), linen.Embed(5, 4), "padding_idx=0: PyTorch keeps the gradient"),
    "max_norm": (nn.Embedding(5, 4, max_norm=1.0), linen.Embed(5, 4), "max_norm=1.0: PyTorch rescales"),
    "frequencies": (nn.Embedding(5, 4, scale_grad_by_freq=True), linen.Embed(5, 4), "scale_grad_by_freq=True"),
    "axis": (nn.Linear(3, 4), linen.DenseGeneral(4, axis=0), "axis is (0,), it must be (-1,)"),
    "dropout of attention": (
        nn.MultiheadAttention(4, 2, 0.1, batch_first=True),
        linen.MultiHeadAttention(2),
        "dropout_rate is 0.0, it must be 0.1",
    ),
    "heads": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        linen.MultiHeadAttention(4),
        "num_heads is 4, it must be 2",
    ),
    "decoding": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        linen.MultiHeadAttention(2, decode=True),
        "decode is True, it must be False",
    ),
    "batch in second place": (nn.MultiheadAttention(4, 2), linen.MultiHeadAttention(2), "attends over the first axis"),
    "an attention of one's own": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        linen.MultiHeadAttention(2, attention_fn=print),
        "attention_fn is <built-in function print>",
    ),
    "gate": (
        nn.LSTM(3, 4),
        linen.LSTMCell(4, gate_fn=linen.hard_sigmoid),
        "hard_sigmoid",
    ),
    "activation": (nn.GRU(3, 4), linen.GRUCell(4, activation_fn=linen.relu), "it must be 'tanh'"),
    "activation of PyTorch": (nn.RNN(3, 4, nonlinearity="relu"), linen.SimpleCell(4), "is 'tanh', it must be 'relu'"),
    "residual": (nn.RNN(3, 4), linen.SimpleCell(4, residual=True), "SimpleCell.residual is True"),
    "first state": (nn.RNN(3, 4), linen.SimpleCell(4, carry_init=linen.initializers.ones), "carry_init"),
    "time first": (nn.GRU(3, 4), linen.RNN(linen.GRUCell(4)), "RNN.time_major is False, it must be True"),
    "time second": (
        nn.GRU(3, 4, batch_first=True, bidirectional=True),
        linen.Bidirectional(*(linen.RNN(linen.GRUCell(4)) for _ in range(2)), time_major=True),
        "Bidirectional.time_major is True, it must be False",
    ),
    "merged": (
        nn.GRU(3, 4, batch_first=True, bidirectional=True),
        linen.Bidirectional(*(linen.RNN(linen.GRUCell(4)) for _ in range(2)), merge_fn=jnp.add),
        "merge_fn",
    ),
    "reversed": (nn.GRU(3, 4, batch_first=True), linen.RNN(linen.GRUCell(4), reverse=True), "RNN.reverse is True"),
    "dropout between layers": (nn.GRU(3, 4, 2, dropout=0.5), linen.GRUCell(4), "dropout=0.5 between the layers"),
    "a cell in an RNN": (
        nn.RNN(3, 4, batch_first=True),
        linen.RNN(linen.SimpleCell(4, activation_fn=linen.relu)),
        "SimpleCell.activation_fn",
    ),
    "computes in half": (
        nn.Linear(3, 4),
        linen.Dense(4, dtype=jnp.bfloat16),
        "dtype is 'bfloat16', it must be 'float32'",
    ),
    "an option nobody thought of": (nn.Linear(3, 4), linen.Dense(4, precision="highest"), "precision is 'highest', of"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_said(name: str) -> None:
    module, twin, expected = DIFFERENT[name]
    stated = [word for words in STATED.values() for word in words]
    said = [one for one in rules.differences(module, twin) if not any(word in one for word in stated)]
    assert len(said) == 1 and expected in said[0], said


def of_nnx(name: str, *args: Any, **kw: Any) -> Any:
    return nnx.eval_shape(lambda: getattr(nnx, name)(*args, rngs=nnx.Rngs(0), **kw))


@pytest.mark.parametrize(
    ("module", "twin", "expected"),
    [
        (nn.LayerNorm(4), ("LayerNorm", 4, NORM), "epsilon is 1e-06, it must be 1e-05"),
        (nn.GroupNorm(2, 4, 1e-6), ("GroupNorm", 4, 4, NORM), "num_groups is 4, it must be 2"),
        (nn.BatchNorm2d(4), ("BatchNorm", 4, NORM), "momentum is 0.99, it must be 0.9"),
        (nn.Conv2d(3, 4, 3, 2, 1), ("Conv", 3, 4, (3, 3), 2, {}), "size % 2 is [1]"),
        (nn.ConvTranspose1d(3, 4, 3, 2), ("ConvTranspose", 3, 4, 3, 2, {}), "padding is 'SAME', it must be [(2, 2)]"),
        (nn.Linear(3, 4), ("Linear", 3, 4, {"dtype": jnp.float16}), "dtype is 'float16'"),
        (nn.Linear(3, 4), ("LinearGeneral", 3, 4, {"axis": 0}), "axis is (0,), it must be (-1,)"),
        (nn.RNN(3, 4), ("SimpleCell", 3, 4, {"residual": True}), "residual is True"),
        (nn.GRU(3, 4), ("GRUCell", 3, 4, {"gate_fn": jnp.tanh}), "gate_fn"),
        (nn.Embedding(5, 4, 0), ("Embed", 5, 4, {}), "padding_idx=0"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_what_differs_from_nnx_is_said(module: nn.Module, twin: tuple[Any, ...], expected: str) -> None:
    *args, options = twin
    said = rules.differences(module, of_nnx(*args, **options))
    said = [one for one in said if "unbiased" not in one]
    assert len(said) == 1 and expected in said[0], said


def test_the_softmax_of_nnx_in_float32_is_said_of_float64() -> None:
    module, twin = nn.MultiheadAttention(4, 2, batch_first=True), of_nnx("MultiHeadAttention", 2, 4)
    assert not any("softmax" in one for one in rules.differences(module, twin))
    assert any("softmax in float32" in one for one in rules.differences(module.double(), twin))


def test_what_else_a_layer_does_is_said() -> None:
    class Noisy(linen.Dense):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + 1

    class Renamed(linen.Dense):
        pass

    class Short(nnx.Linear):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(3, 4, precision="highest", rngs=rngs)

    module = nn.Linear(3, 4)
    (said,) = rules.differences(module, nnx.eval_shape(lambda: Short(nnx.Rngs(0))))
    assert said == "Short.precision is 'highest', of which PyTorch's layer has nothing"
    assert "Noisy is not flax's own layer" in rules.differences(module, Noisy(4))[0]
    assert rules.differences(module, Renamed(4)) == [] == rules.differences(module, None)
    module.register_forward_hook(print)
    assert "1 forward hooks" in rules.differences(module, linen.Dense(4))[0]


@settings(max_examples=20)
@example(3, 2, 1, 1, "SAME")  # where the size is odd
@example(3, 2, 1, 1, "SAME_LOWER")  # everywhere
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(["SAME", "SAME_LOWER", "VALID"]),
)
def test_paddings_agree_where_it_is_said(size: int, stride: int, dilation: int, padding: int, word: str) -> None:
    """What JAX itself makes of the words, with PyTorch's convolution, over inputs of many sizes."""
    module = nn.Conv1d(1, 1, size, stride, padding, dilation, bias=False).double()
    twin = linen.Conv(1, (size,), stride, padding=word, kernel_dilation=dilation)
    agree = []
    span = dilation * (size - 1) + 1
    for n in range(span, span + 2 * stride):
        x = torch.randn(1, 1, n, dtype=torch.float64)
        pads = jax.lax.padtype_to_pads((n,), (span,), (stride,), word)
        y = nn.functional.conv1d(nn.functional.pad(x, pads[0]), module.weight, None, stride, 0, dilation)
        ours = module(x)
        agree.append(ours.shape == y.shape and torch.allclose(ours, y, rtol=1e-12))
    said = rules.differences(module, twin)
    assert bool(said) is not all(agree)
    assert not said or ("agree only where" in said[0]) is any(agree)


@pytest.mark.parametrize("word", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "extra"), [(4, 2, 1, 0), (2, 2, 0, 0), (3, 2, 1, 1), (3, 1, 1, 0), (2, 3, 0, 1)]
)
def test_transposed_paddings_agree_where_it_is_said(
    size: int, stride: int, padding: int, extra: int, word: str, x64: Any
) -> None:
    with x64():
        module = nn.ConvTranspose1d(1, 1, size, stride, padding, extra, bias=False).double()
        twin = linen.ConvTranspose(1, (size,), (stride,), padding=word, use_bias=False)
        x = torch.randn(1, 1, 5, dtype=torch.float64)
        (link,) = rules.links_of(module, {"kernel": (size, 1, 1)}, twin)
        (kernel,) = link.to_jax(module.weight.detach().numpy())
        y = twin.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.asarray(x[0].T[None].numpy()))
        ours = module(x).detach().numpy()
        agree = ours.shape == (1, 1, y.shape[1]) and np.allclose(ours[0, 0], y[0, :, 0], rtol=1e-12)
        assert bool(rules.differences(module, twin)) is not agree

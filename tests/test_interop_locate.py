"""`interop.locate`: every fault of the corpus where it is, nothing where there is none, and layouts are no faults."""

import doctest
import json
import sys
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen, nnx
from torch import nn

from funcreg import interop
from interop import _activations, _calls
from interop._activations import Slot
from locate_corpus import FAULTS, WIDTH, Perceptron, PerceptronLinen, PerceptronNNX, Siamese, X, doubled

# One of each kind; the whole corpus is slow.
QUICK = (
    "gelu by tanh",
    "an activation forgotten",
    "softmax over the batch",
    "a branch that stops the gradient in PyTorch",
    "everything detached in PyTorch",
    "a derivative of one's own with a factor",
    "a gradient that is clipped",
    "abs with another derivative at 0",
    "the derivative of a norm at 0",
    "a kernel without gradient",
    "a square kernel not transposed, linen",
    "the second input scaled",
    "the second tower without gradient",
    "the logarithm of zero",
)
CLEAN = ("gelu by tanh", "the derivative of a norm at 0", "the second input scaled")


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Compiled without optimizations: it takes half the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def of_corpus(quick):
    return [pytest.param(f, marks=() if f.name in quick else pytest.mark.slow, id=f.name) for f in FAULTS]


# --- the corpus ---


def test_the_corpus_has_faults_of_every_kind():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 35
    assert {*QUICK, *CLEAN} <= set(names)
    assert sum(fault.direction == "gradient" for fault in FAULTS) >= 12
    kinds = [type(fault.make(True).flax) for fault in FAULTS]
    assert sum(issubclass(kind, nnx.Module) for kind in kinds) >= 10
    assert sum(issubclass(kind, linen.Module) for kind in kinds) >= 10


@pytest.mark.relaxed_promotion  # flax's recurrent layers start in float32
@pytest.mark.parametrize("fault", of_corpus(QUICK))
def test_a_fault_is_found_where_it_is(fault):
    found = fault.locate(planted=True)
    assert (found.where, found.direction, found.verdict) == (fault.where, fault.direction, "semantic"), found


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("fault", of_corpus(CLEAN))
def test_without_the_fault_nothing_is_found(fault):
    found = fault.locate(planted=False)
    assert (found.where, found.direction, found.verdict) == ("", "", "rounding"), found
    assert all(layer.free < 1e-12 for layer in found.layers if layer.free is not None)


# --- models of the tests ---


class Two(nn.Module):
    def __init__(self, between=torch.tanh, after=lambda x: x):
        super().__init__()
        self.a, self.b, self.between, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), between, after

    def forward(self, x):
        return self.after(self.b(self.between(self.a(x))))


class TwoNNX(nnx.Module):
    def __init__(self, between=jnp.tanh, after=lambda x: x, dtype=None):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=rngs, dtype=dtype)
        self.b, self.between, self.after = nnx.Linear(WIDTH, WIDTH, rngs=rngs), between, after

    def __call__(self, x):
        return self.after(self.b(self.between(self.a(x))))


def paired(net, model):
    pair = interop.match(net, model, strict=False)
    nnx.update(model, pair.to_jax(net))
    return net, model, pair


def located(net, model, *inputs, **options):
    return interop.locate(*paired(net, model), *inputs, **options)


# --- the record ---


def test_what_is_found_can_be_printed_and_written():
    found = located(Two(F.relu), TwoNNX(jnp.tanh), X)
    assert [(layer.name, layer.flax) for layer in found.layers] == [("a", "a"), ("b", "b")]
    a, b = found.layers
    assert a.verdict == "rounding" or a.handed_back.verdict == "semantic"
    assert (b.handed_over.verdict, b.inside.verdict, b.verdict) == ("semantic", "rounding", "semantic")
    assert b.free > 0.01 and a.free < 1e-14 and found.ends[1].free > 0.01
    text = str(found)
    assert text.startswith("verdict: semantic, forward: between `a` and `b`\n")
    assert text.count("!") >= 1 and "(input)" in text and "(result)" in text
    read = json.loads(found.to_json())
    assert read["where"] == found.where and read["layers"][1]["verdict"] == "semantic"
    assert read["layers"][1]["handed_over"]["float64"]["absolute"] == b.handed_over.float64.absolute
    with pytest.raises(TypeError, match="no truth value"):
        bool(found)
    with pytest.raises(AttributeError):
        found.where = ""


def test_a_long_table_shows_the_ends_and_what_differs():
    found = located(Two(), TwoNNX(), X)
    many = interop.Location(
        found.verdict, "", "", tuple(found.layers[0] for _ in range(200)), found.ends, found.reasons
    )
    assert len(str(many).splitlines()) < 12 and "... and 198 more calls" in str(many)


@pytest.mark.parametrize(
    "between, after, direction, where, also",
    [
        (jax.nn.relu, lambda x: x, "forward", "between `a` and `b`", "after `b`"),
        (doubled, lambda x: 2 * doubled(x / 2), "gradient", "after `b`", "between `a` and `b`"),
        (doubled, lambda x: x, "forward", "after `b`", None),
    ],
)
def test_of_several_faults_the_first_comes_first(between, after, direction, where, also):
    """Values before gradients; forwards from the input on, backwards from the result on."""
    found = located(Two(torch.tanh, lambda x: 2 * torch.tanh(x / 2)), TwoNNX(between, after), X)
    assert (found.direction, found.where) == (direction, where)
    said = [reason for reason in found.reasons if reason.startswith("by itself also ")]
    assert said == ([f"by itself also {also}"] if also else [])


# --- what is to be said besides ---


def test_values_that_were_not_carried_over_are_named():
    net, model, pair = paired(Two(), TwoNNX())
    found = interop.locate(net, TwoNNX(), pair, X)
    assert found.where == "inside `a`"
    (said,) = [reason for reason in found.reasons if reason.startswith("flax_model holds other values")]
    assert "a.kernel by" in said and "pair.to_jax(net)" in said


def test_a_bare_linen_module_gets_the_values_of_pytorch():
    net = Perceptron()
    flax = PerceptronLinen()
    variables = flax.init(jax.random.key(0), jnp.ones(X.shape))
    assert interop.locate(net, flax, interop.match(net, variables), X).verdict == "rounding"
    assert interop.locate(net, flax, interop.match(net, variables["params"]), X).verdict == "rounding"


@pytest.mark.relaxed_promotion
def test_a_hard_coded_dtype_is_inconclusive():
    found = located(Two(), TwoNNX(dtype=jnp.float32), X)
    assert (found.verdict, found.where, found.direction) == ("inconclusive", "inside `a`", "forward")
    assert "dtype is hard-coded" in found.reasons[0]
    worse = located(Two(), TwoNNX(doubled, dtype=jnp.float32), X)  # what is sure comes before what is not
    assert (worse.verdict, worse.where, worse.direction) == ("semantic", "between `a` and `b`", "gradient")


class Embedded(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, WIDTH, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(1))

    def __call__(self, tokens):
        return self.head(self.embed(tokens))


def test_an_embedding_of_nnx_is_run_in_float64():
    net = nn.Sequential(OrderedDict(embed=nn.Embedding(5, WIDTH), head=nn.Linear(WIDTH, 2)))
    model = Embedded()
    pair = interop.match(net, model)
    nnx.update(model, pair.to_jax(net))
    assert interop.locate(net, model, pair, np.array([[0, 3, 4]])).verdict == "rounding"
    assert model.embed.dtype == jnp.float32
    model.embed.embedding[...] = model.embed.embedding[...].at[3].add(1e-3)
    assert interop.locate(net, model, pair, np.array([[0, 3, 4]])).where == "inside `embed`"


class Attending(nnx.Module):
    def __init__(self):
        self.attn = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x, mask):
        return self.attn(x, mask=mask[None, None])


class AttendingTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x, mask):
        return self.attn(x, x, x, attn_mask=~mask, need_weights=False)[0]


@pytest.mark.slow
def test_attention_of_nnx_is_run_in_float64():
    net, model = AttendingTorch(), Attending()
    pair = interop.match(net, model)
    nnx.update(model, pair.to_jax(net))
    x, mask = np.random.default_rng(0).normal(size=(2, 4, WIDTH)), np.tril(np.ones((4, 4), bool))
    assert interop.locate(net, model, pair, x, mask).verdict == "rounding"
    model.attn.key.kernel[...] = model.attn.key.kernel[...].at[0].add(1e-3)
    assert interop.locate(net, model, pair, x, mask).where == "inside `attn`"


def test_randomness_is_inconclusive_and_named():
    found = located(Two(lambda x: F.dropout(x, 0.4)), TwoNNX(lambda x: x), X)
    assert (found.verdict, found.where) == ("inconclusive", "between `a` and `b`")
    assert "two calls of the PyTorch side" in found.reasons[0]


def test_a_loss_is_part_of_the_model():
    def mean(net, x, y):
        return F.mse_loss(net(x), y)

    net, model, pair = paired(Two(), TwoNNX())
    for factor, where in ((1.0, ""), (2.0, "after `b`")):
        found = interop.locate(
            net,
            model,
            pair,
            X,
            X[::-1].copy(),
            torch_call=mean,
            flax_call=lambda model, x, y, factor=factor: factor * jnp.mean((model(x) - y) ** 2),
        )
        assert found.where == where


def test_what_a_model_writes_in_place_changes_nothing():
    assert located(Two(torch.relu_, torch.relu_), TwoNNX(jax.nn.relu, jax.nn.relu), X).verdict == "rounding"


class Remat(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(WIDTH, name="b")(jnp.tanh(linen.remat(linen.Dense)(WIDTH, name="a")(x)))


def test_layers_that_cannot_be_seen_are_named():
    net = Two()
    variables = Remat().init(jax.random.key(0), jnp.ones(X.shape))
    found = interop.locate(net, Remat(), interop.match(net, variables), X)
    assert found.verdict == "rounding" and [layer.name for layer in found.layers] == ["b"]
    assert found.reasons[0].startswith("a: calls seen in PyTorch 1, of a in flax 0")


class Often(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.a, self.b, self.times = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.a(x))
        return self.b(x)


class OftenNNX(nnx.Module):
    def __init__(self, times):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.times = times

    def __call__(self, x):
        for _ in range(self.times):
            x = jnp.tanh(self.a(x))
        return self.b(x)


@pytest.mark.parametrize("ours, theirs", [(2, 1), (1, 2)])
def test_another_number_of_calls(ours, theirs):
    found = located(Often(ours), OftenNNX(theirs), X)
    assert found.verdict == "semantic" and found.where.endswith("and `b`")
    assert f"a: calls seen in PyTorch {ours}, of a in flax {theirs}" in " ".join(found.reasons)


class BothWays(nnx.Module):
    """The towers of the corpus, called in the other order."""

    def __init__(self, scale):
        rngs = nnx.Rngs(0)
        self.tower, self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)
        self.scale = scale

    def __call__(self, x, y):
        second, first = self.tower(y), self.tower(x)
        return self.head(jnp.tanh(first) * jnp.tanh(self.scale * second))


@pytest.mark.parametrize("scale, where", [(1.0, ""), (1.1, "between `tower (call 2)` and `head`")])
def test_calls_of_a_shared_layer_in_another_order(scale, where):
    found = located(Siamese(), BothWays(scale), X, X[::-1].copy())
    assert found.where == where
    assert "tower: flax makes its calls in another order" in " ".join(found.reasons)


# --- layouts ---


class Times(nn.Module):
    """Time first, as PyTorch's layers may have it."""

    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


class TimesLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(2, name="attn")(x.swapaxes(0, 1))
        return linen.Dense(3, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize("shape, verdict", [((5, 3, WIDTH), "rounding"), ((4, 4, WIDTH), "inconclusive")])
def test_axes_of_equal_length_leave_a_layout_open(shape, verdict):
    net, x = Times(), np.random.default_rng(0).normal(size=shape)
    variables = TimesLinen().init(jax.random.key(0), jnp.ones(shape))
    found = interop.locate(net, TimesLinen(), interop.match(net, variables), x)
    assert found.verdict == verdict, found
    assert found.layers[0].verdict == "rounding"  # attention tells by itself
    if verdict == "inconclusive":
        assert found.where == "between `attn` and `head`" and "axes of equal length" in found.reasons[0]


class Cube(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class CubeNNX(nnx.Module):
    def __init__(self, own_layout):
        self.conv, self.own_layout = nnx.Conv(3, 3, (3, 3), padding=1, rngs=nnx.Rngs(0)), own_layout

    def __call__(self, x):
        return self.conv(x.transpose(0, 2, 3, 1) if self.own_layout else x).mean((1, 2))


@pytest.mark.parametrize("own_layout", [False, True])
def test_images_whose_axes_all_have_one_length(own_layout):
    """The first layer tells whether flax turns its images itself."""
    x = np.random.default_rng(0).normal(size=(3, 3, 3, 3))
    found = located(Cube(), CubeNNX(own_layout), x)
    assert found.verdict == "rounding"
    assert any("channels last" in reason for reason in found.reasons) is not own_layout


def test_masks_of_attention_say_the_same_on_both_sides():
    """PyTorch's True hides, flax's keeps; bools, minus infinity and padding alike."""
    hides = np.triu(np.ones((3, 3), bool), 1)
    padding = np.array([[False, False, True], [False, False, False]])
    added = torch.zeros(3, 3).masked_fill(torch.from_numpy(hides), -torch.inf)
    attn, x = nn.MultiheadAttention(WIDTH, 2, batch_first=True), torch.zeros(2, 3, WIDTH)
    ours, theirs = _calls.conventions(attn)
    flax = linen.MultiHeadDotProductAttention(2)
    wanted = theirs.given(flax, (jnp.zeros((2, 3, WIDTH)),), {"mask": ~(hides | padding[:, None])[:, None]})["mask"]
    assert wanted.shape == (2, 2, 3, 3) and not wanted.all()
    for mask in (torch.from_numpy(hides), added):
        options = {"attn_mask": mask, "key_padding_mask": torch.from_numpy(padding)}
        np.testing.assert_array_equal(ours.given(attn, (x, x, x), options)["mask"], wanted)
    assert "mask" not in ours.given(attn, (x, x, x), {"attn_mask": added + 0.5})  # a bias, no mask
    assert ours.given(attn, (x, x, x), {})["mask"].all()


def fits(slot, ours, theirs):
    return [layout.order for layout in _activations.fitting(slot, ours, theirs)]


def test_layouts_by_shape():
    channels = Slot(1, channels=True, unbatched=3)
    assert fits(channels, (2, 3, 4, 5), (2, 4, 5, 3)) == [(0, 2, 3, 1)]
    assert fits(channels, (3, 4, 5), (4, 5, 3)) == [(1, 2, 0)]
    assert fits(channels, (2, 3, 4, 4), (2, 3, 4, 4)) == [(0, 1, 2, 3)]  # as a norm over another axis reads it
    assert fits(channels, (6, 3, 4, 5), (2, 3, 4, 5, 3)) == [(0, 2, 3, 1)]  # two axes of a batch are one
    assert fits(channels, (2, 3, 4, 5), (2, 4, 5, 4)) == []
    time_first = Slot(1, swapped=True)
    assert fits(time_first, (5, 2, 6), (2, 5, 6)) == [(1, 0, 2)]
    assert fits(time_first, (4, 4, 6), (4, 4, 6))[0] == (1, 0, 2)  # what the layer asks for, whatever the lengths
    free = Slot(1, free=True)
    assert fits(free, (5, 2, 6), (2, 5, 6)) == [(1, 0, 2)]
    assert fits(free, (4, 4, 6), (4, 4, 6)) == [(0, 1, 2), (1, 0, 2)]
    assert fits(free, (8, 6), (2, 4, 6)) == [(0, 1)]
    assert fits(free, (8, 6), (2, 5, 6)) == []
    assert fits(Slot(free=True), (2, 3, 4, 4), (2, 4, 4, 3))[0] == (0, 2, 3, 1)


def test_a_layout_carries_features_in_the_order_of_the_pair():
    index = np.arange(12).reshape(3, 4).T.ravel()  # 3 channels of 4 places, places first
    (layout,) = _activations.fitting(Slot(1, index=index), (2, 12), (2, 12))
    x = np.arange(24.0).reshape(2, 12)
    np.testing.assert_array_equal(layout(x), x.reshape(2, 3, 4).transpose(0, 2, 1).reshape(2, 12))
    heads = np.arange(12).reshape(2, 6)
    (layout,) = _activations.fitting(Slot(1, index=heads), (5, 12), (5, 2, 6))
    assert layout(np.zeros((5, 12))).shape == (5, 2, 6)
    assert layout(np.zeros((5, 12))).flags.c_contiguous


def test_values_decide_only_if_the_first_layout_is_wrong_by_far():
    x = np.random.default_rng(0).normal(size=(4, 4, 6))
    found = _activations.fitting(Slot(1, free=True), x.shape, x.shape)
    assert not _activations.best(found, x, x).guessed
    swapped = _activations.best(found, x, x.swapaxes(0, 1))
    assert swapped.guessed and swapped.order == (1, 0, 2)
    for seed in range(4):
        other = np.random.default_rng(seed).normal(size=x.shape)
        assert not _activations.best(found, x, other).guessed  # a fault, in whichever order
        assert not _activations.best(found, x, x.swapaxes(0, 1) + 0.1 * other).guessed
    assert not _activations.best(found, np.zeros_like(x), np.zeros_like(x)).guessed


# --- models stay as they are ---


class Failing(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))

    def __call__(self, x):
        self.a(x)
        raise ArithmeticError("no result")


def test_an_error_of_the_model_says_its_side_and_restores_classes():
    before = nnx.Linear.__call__, Failing.__call__, vars(Failing)["__call__"]
    with pytest.raises(ArithmeticError) as raised:
        located(Two(), Failing(), X)
    assert "raised on the flax side" in "".join(raised.value.__notes__)
    assert (nnx.Linear.__call__, Failing.__call__, vars(Failing)["__call__"]) == before


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return torch.tanh(self.bn(self.a(x)))


class BatchNormedNNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.bn = nnx.BatchNorm(WIDTH, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.bn(self.a(x)))


@pytest.mark.relaxed_promotion
def test_training_mode_agrees_but_for_the_running_variance_and_changes_no_model():
    net, model, pair = paired(BatchNormed().train(), BatchNormedNNX())
    model.train()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    state = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    found = interop.locate(net, model, pair, X)
    assert found.verdict == "rounding"
    (said,) = [reason for reason in found.reasons if "running statistics" in reason]
    assert "bn.running_var by" in said and "bn.running_mean" not in said
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in before.items())
    assert all(p.grad is None for p in net.parameters()) and not hasattr(net.a, "_interop_path")
    after = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, state, after)
    assert not hasattr(model.a, "_interop_path")


# --- what is refused ---


def complex_net():
    net = Two()
    net.a.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.complex64))
    return net


def dropping():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))


REFUSED = {
    "swapped": (lambda n, m, p: (m, n, p), TypeError, "are the arguments swapped"),
    "variables": (lambda n, m, p: (n, {"params": {}}, p), TypeError, r"module.bind\(variables\)"),
    "no pair": (lambda n, m, p: (n, m, {}), TypeError, "pair must be what interop.match returns, got dict"),
    "another net": (lambda n, m, p: (nn.Linear(2, 2), m, p), ValueError, "make the pair of this model"),
    "another flax model": (lambda n, m, p: (n, PerceptronNNX(), p), ValueError, "make the pair of this model"),
    "complex": (lambda n, m, p: (complex_net(), m, p), ValueError, "'a.weight' is complex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(case):
    change, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        interop.locate(*change(*paired(Two(), TwoNNX())), X)


def test_dropout_in_training_mode_is_refused_with_what_to_do():
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), lambda x: x)
    net, model, pair = paired(dropping(), model)
    with pytest.raises(ValueError, match=r"1 \(Dropout\) drops with a rate of 0.3.*net.eval\(\).*draw masks"):
        interop.locate(net, model, pair, X)
    assert interop.locate(net.eval(), model, pair, X).verdict == "rounding"


def test_results_of_different_trees_are_refused_with_what_to_do():
    net, model, pair = paired(Two(after=lambda x: {"y": x, "z": x}), TwoNNX(after=lambda x: (x, x)))
    with pytest.raises(ValueError, match="PyTorch returns 'y', 'z', flax '0', '1'; torch_call=.*choose"):
        interop.locate(net, model, pair, X)


def test_example():
    module = sys.modules["interop.locate"]
    (one,) = [test for test in doctest.DocTestFinder(recurse=False).find(module.locate, "locate")]
    assert doctest.DocTestRunner().run(one).failed == 0

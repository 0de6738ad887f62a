"""`pair.penalty_to_jax` and back: value, gradient and prox are those of the twins, to the last digits."""

import flax.linen as fnn
import jax
import numpy as np
import pytest
import torch
from torch import nn

import funcreg.jax as frj
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


# --- selectors ---


def selected(penalty, params):
    """The names of the leaves that a penalty acts on."""
    flat, bound = penalty.bind(params)
    return {name for name, parts in zip(flat.names, bound, strict=True) if parts}


SELECTORS = {
    "a glob": ("fc", {"fc.kernel", "fc.bias"}),
    "globs": (["*.weight", "!norm"], {"conv.kernel", "fc.kernel"}),
    "a function": (lambda name, leaf: leaf.ndim == 4, {"conv.kernel"}),
    "a tree of bools": ({"conv": True, "fc": {"weight": True, "bias": False}, "norm": False},
                        {"conv.kernel", "conv.bias", "fc.kernel"}),
    "the role of weights": (frt.weights, {"conv.kernel", "fc.kernel"}),
    "the role of biases": (frt.biases, {"conv.bias", "fc.bias", "norm.bias"}),
    "the role of norms": (frt.norms, {"norm.scale", "norm.bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_select_the_twins(name):
    net, pair = pair_of("convnet")
    selector, wanted = SELECTORS[name]
    params = {name: p.detach() for name, p in net.named_parameters()}
    theirs = pair.penalty_to_jax(frt.l1(0.1).on(selector))
    shapes = {name: form.shape for name, form in pair.flax.forms.items() if name in pair.flax.trained}
    tree = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    assert selected(theirs, tree) == wanted
    # also of a model with more leaves than the twins
    assert selected(theirs, {**tree, "more.w": np.zeros(3, np.float32)}) == wanted
    if "role" in name:
        assert theirs.parts[0].selectors[0].function is selector
    back = pair.penalty_to_torch(theirs)
    assert selected(back, params) == selected(frt.l1(0.1).on(selector), params)


def test_everything_stays_everything():
    _, pair = pair_of("convnet")
    assert repr(pair.penalty_to_jax(frt.l1(0.1))) == "l1(0.1)"
    assert repr(pair.penalty_to_torch(frj.l2(0.5))) == "l2(0.5)"


def test_a_selector_that_selects_nothing_selects_nothing():
    _, pair = pair_of("mlp")
    theirs = pair.penalty_to_jax(frt.l1(0.1).on(frt.norms))
    assert theirs.parts[0].selectors[0].function is frt.norms
    theirs = pair.penalty_to_jax(frt.l1(0.1).on(lambda name, leaf: False))
    tree = {name: {"kernel": np.ones(shape, np.float32), "bias": np.ones(shape[1], np.float32)}
            for name, shape in (("hidden", (3, 4)), ("out", (4, 2)))}  # fmt: skip
    assert selected(theirs, tree) == set()


def test_rows_of_a_table_and_names_with_brackets():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2)})
    flax = {name: {"kernel": jax.ShapeDtypeStruct((3, n), np.float32), "bias": jax.ShapeDtypeStruct((n,), np.float32)}
            for name, n in (("[a]*", 3), ("b", 2))}  # fmt: skip
    pair = interop.match(net, flax)
    table = frt.layerwise({"a.weight": frt.l1(0.5), "*.bias": None, "*": frt.l2(0.25)})
    theirs = pair.penalty_to_jax(table)
    tree = {name: {leaf: np.zeros(s.shape, np.float32) for leaf, s in leaves.items()} for name, leaves in flax.items()}
    l1, l2 = (type(theirs)((part,)) for part in theirs.parts)
    assert (l1.parts[0].rule.name, l2.parts[0].rule.name) == ("l1", "l2")
    assert selected(l1, tree) == {"[a]*.kernel"} and selected(l2, tree) == {"b.kernel"}


# --- anchors, strengths ---


@pytest.mark.parametrize("net_name", ["mlp", "mha"])
def test_anchors_and_importances_cross_with_their_parameters(net_name, x64):
    net, pair = pair_of(net_name)
    params = {name: p.detach() for name, p in net.named_parameters()}
    anchor = {name: torch.randn_like(p) for name, p in params.items()}
    importance = {name: torch.rand_like(p) for name, p in params.items()}
    scalars = {name: 0.5 + i for i, name in enumerate(params)}
    first = next(iter(params))
    for factors in (None, importance, scalars, {**importance, first: torch.tensor(2.0).double()}):
        penalty = frt.anchored(frt.l2(0.3), anchor, factors) + 0.5 * frt.l1(0.25)
        with x64():
            theirs = pair.penalty_to_jax(penalty)
            same_value_grad_and_prox(pair, penalty, theirs, params)
            back = pair.penalty_to_torch(theirs)
        same(back.grad(params), penalty.grad(params))


def test_an_anchor_has_the_leaves_that_are_selected():
    net, pair = pair_of("mha")
    part = frt.anchored(frt.l2(0.3), {"fc.weight": net.fc.weight.detach().float()})
    assert list(pair.penalty_to_jax(part.on("fc.weight")).parts[0].anchor) == ["fc.kernel"]
    with pytest.raises(ValueError, match="the anchor of l2 lacks the leaf 'attn.in_proj_weight'"):
        pair.penalty_to_jax(part)
    with pytest.raises(ValueError, match=r"the anchor of 'fc.weight' has the shape \(3,\), must be \(6, 6\)"):
        pair.penalty_to_jax(frt.anchored(frt.l2(0.3), {"fc.weight": torch.ones(3)}).on("fc.weight"))


def test_strengths_may_be_arrays_and_must_be_concrete(x64):
    _, pair = pair_of("mlp")
    theirs = pair.penalty_to_jax(torch.tensor(2.0) * frt.l1(torch.tensor(0.5)))
    assert isinstance(theirs.parts[0].strengths[0], jax.Array) and isinstance(theirs.parts[0].weight, jax.Array)
    back = pair.penalty_to_torch(theirs)
    assert isinstance(back.parts[0].strengths[0], torch.Tensor) and float(back.parts[0].weight) == 2
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda lam: (pair.penalty_to_torch(frj.l1(lam)), lam)[1])(0.5)


# --- groups ---


def test_per_stays_where_it_means_the_same_and_becomes_axes_elsewhere():
    _, pair = pair_of("mha")
    penalty = frt.group_lasso(0.5, per="output")
    by_name = {}
    for part in pair.penalty_to_jax(penalty).parts:
        options = dict(part.rule.options)
        for glob in part.selectors[0].globs:
            by_name[glob] = options["per"] or options["axis"]
    assert by_name == {
        **{f"attn.{name}.kernel": (-3,) for name in ("query", "key", "value")},  # (in, heads, each): a row is a unit
        **{f"attn.{name}.bias": () for name in ("query", "key", "value")},
        "attn.out.kernel": "output", "attn.out.bias": "output", "fc.kernel": "output", "fc.bias": "output",
    }  # fmt: skip
    back = pair.penalty_to_torch(pair.penalty_to_jax(penalty))
    assert all(dict(part.rule.options)["group_scale"] == "sqrt_size" for part in back.parts)
    convnet = pair_of("convnet")[1]
    assert [dict(p.rule.options)["per"] for p in convnet.penalty_to_jax(penalty).parts] == ["output"]


# --- refusals ---


def test_what_cannot_cross_is_refused_by_name():
    _, mha = pair_of("mha")
    _, mlp = pair_of("mlp")
    recurrent = nn.Module()
    recurrent.lstm, recurrent.fc = nn.LSTM(3, 4), nn.Linear(4, 2)
    gates = {f"h{g}": {"kernel": np.zeros((4, 4), np.float32), "bias": np.zeros(4, np.float32)} for g in "ifgo"}
    gates |= {f"i{g}": {"kernel": np.zeros((3, 4), np.float32)} for g in "ifgo"}
    fc = {"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)}
    lstm = interop.match(recurrent, {"lstm": gates, "fc": fc})
    tied = nn.Module()
    tied.a, tied.b = nn.Linear(3, 3), nn.Linear(3, 3)
    tied.b.weight = tied.a.weight
    leaf = {"kernel": np.zeros((3, 3), np.float32), "bias": np.zeros(3, np.float32)}
    twice = interop.match(tied, {"a": leaf, "b": leaf})
    alone = interop.match(tied, {"a": leaf}, rename={"b": None})
    cases = [
        (mlp, frt.custom("mine", lambda x, lam: lam * x.sum(), lam=1.0), "'mine' is a penalty of one's own"),
        (mlp, frj.l1(0.1), "penalty must be one of funcreg.torch, got funcreg.jax"),
        (mlp, "l1", "penalty must be one of funcreg.torch, got builtins.str"),
        (mlp, frt.l1(0.1).on("hiden"), "the glob 'hiden' matches no leaf; nearest names: hidden"),
        (
            mha,
            frt.group_lasso(0.5, per="input").on("*in_proj_weight"),
            "no axes of 'attn.query.kernel'.*in_proj_weight",
        ),
        (lstm, frt.l1(0.1), "l1 selects 'lstm.bias_ih_l0', 'lstm.bias_hh_l0': .*none of the sum"),
        (lstm, frt.l1(0.1).on("*bias_ih*"), "selects 'lstm.bias_ih_l0' but not 'lstm.bias_hh_l0'"),
        (twice, frt.l1(0.1), "selects 'a.weight', which is tied here and has several leaves"),
        (alone, frt.l1(0.1), r"selects 'b.bias', which has no twin; leave it out with .on\('!b.bias'\)"),
    ]
    for pair, penalty, text in cases:
        with pytest.raises((ValueError, TypeError), match=text):
            pair.penalty_to_jax(penalty)
    with pytest.raises(
        ValueError, match=r"l1 selects 'attn.query.kernel' but not 'attn.key.kernel', 'attn.value.kernel'"
    ):
        mha.penalty_to_torch(frj.l1(0.1).on("attn.query"))
    with pytest.raises(ValueError, match="no axes of 'attn.in_proj_weight'"):
        mha.penalty_to_torch(frj.group_lasso(0.1, per="output").on("*.kernel"))
    with pytest.raises(TypeError, match="penalty must be one of funcreg.jax, got funcreg.torch"):
        mlp.penalty_to_torch(frt.l1(0.1))
    assert len(lstm.penalty_to_jax(frt.l1(0.1).on("!*bias_[ih]h_l0")).parts) == 1

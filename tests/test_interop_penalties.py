"""`pair.penalty_to_jax` and back: value, gradient and prox are those of the twins, to the last digits."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

import funcreg.jax as frj
import funcreg.torch as frt
from cases import CASES, STEP
from funcreg import interop
from wings import TORCH


def dense(ins, outs):
    return {"kernel": (ins, outs), "bias": (outs,)}


# Layers of each layout: PyTorch's, and the shapes of flax's leaves; the dense layer reads a flatten of the convolution.
# Few shapes, each of which JAX compiles for.
LAYERS = {
    "embed": (lambda: nn.Embedding(5, 4), {"embedding": (5, 4)}),
    "hidden": (lambda: nn.Linear(4, 4), dense(4, 4)),
    "conv": (lambda: nn.Conv2d(4, 4, 2), {"kernel": (2, 2, 4, 4), "bias": (4,)}),
    "norm": (lambda: nn.BatchNorm2d(4), {"scale": (4,), "bias": (4,)}),
    "fc": (lambda: nn.Linear(16, 4), dense(16, 4)),
    "attn": (
        lambda: nn.MultiheadAttention(4, 2),
        {
            **{name: {"kernel": (4, 2, 2), "bias": (2, 2)} for name in ("query", "key", "value")},
            "out": {"kernel": (2, 2, 4), "bias": (4,)},
        },
    ),
}
CONVNET = ("conv", "norm", "fc")


def pair_of(*layers):
    """A model of these layers with its pair, in float64; the parameters hold zeros, kinks and random numbers."""
    torch.manual_seed(0)
    net = nn.Module()  # without a forward, so that nothing tells where the image is flattened
    for name in layers:
        setattr(net, name, LAYERS[name][0]())
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
            p.view(-1)[::5] = 0.0
            if p.ndim > 1:
                p[0] = 0.0  # a group
    shapes = {"params": {name: LAYERS[name][1] for name in layers}}
    if "norm" in layers:
        shapes["batch_stats"] = {"norm": {"mean": (4,), "var": (4,)}}
    leaf = lambda shape: jax.ShapeDtypeStruct(shape, np.float64)  # noqa: E731
    flatten = {"fc": 4} if {"conv", "fc"} <= {*layers} else None
    return net, interop.match(net, jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple)), flatten=flatten)


def same_value_grad_and_prox(pair, ours, theirs, params, metric=False):
    """Both wings on the same point, carried over by the pair; with a metric instead of a scalar step if asked."""
    steps = {name: STEP * (1 + torch.rand_like(p)) for name, p in params.items()} if metric else STEP
    their_steps = pair.parameters_to_jax(steps) if metric else STEP
    their_params = pair.parameters_to_jax(params)
    smooth = all(part.rule.grad is not None for part in ours.parts)

    @jax.jit
    def functions(params, steps):
        return theirs.value(params), theirs.grad(params) if smooth else None, theirs.prox(params, steps)

    value, gradient, prox = functions(their_params, their_steps)
    np.testing.assert_allclose(float(value), float(ours.value(params)), rtol=1e-12)
    if smooth:
        same(pair.parameters_to_torch(gradient), ours.grad(params))
    same(pair.parameters_to_torch(prox), ours.prox(params, steps))


def same(got, wanted):
    assert set(got) == set(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(got[name].detach().numpy(), x.detach().numpy(), rtol=1e-12, atol=1e-12)


SHARED = [case for case in CASES if case.record.factory != "custom"]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_a_penalty_is_the_same_function_of_the_twins(case, x64):
    net, pair = pair_of(*LAYERS)
    params = {name: p.detach() for name, p in net.named_parameters()}
    axis = case.options.get("axis")
    deepest = 0 if axis is None else max((-a for a in ([axis] if isinstance(axis, int) else axis)), default=0)
    names = {name for name, p in params.items() if p.ndim >= deepest}
    # the columns of the packed weight run through query, key and value, and so do their biases as one group
    apart = {name for name in names if _groups_across_leaves(case, params[name]) and "in_proj" in name}
    for name in apart:
        with pytest.raises(ValueError, match=f"no axes of 'attn.query.*of 'attn.in_proj_.*{name[-4:]}'"):
            pair.penalty_to_jax(case.make(frt).on(name))
    penalty = case.make(frt).on(lambda name, leaf: name in names - apart)
    with x64():
        theirs = pair.penalty_to_jax(penalty)
        same_value_grad_and_prox(pair, penalty, theirs, params)
        back = pair.penalty_to_torch(theirs)
    np.testing.assert_allclose(float(back.value(params)), float(penalty.value(params)), rtol=1e-12)
    same(back.prox(params, STEP), penalty.prox(params, STEP))


def test_groups_shrink_alike_in_a_metric(x64):
    net, pair = pair_of("hidden")
    params = {name: p.detach() for name, p in net.named_parameters()}
    penalty = frt.sparse_group_lasso(0.125, 0.25, axis=-1).on("*.weight")
    with x64():
        same_value_grad_and_prox(pair, penalty, pair.penalty_to_jax(penalty), params, metric=True)


def _groups_across_leaves(case, leaf):
    """Whether a group of the case runs along the first axis of a PyTorch leaf."""
    (axes, _) = case.resolved(TORCH, tuple(leaf.shape)) or ((), "")
    return -leaf.ndim in axes


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
    net, pair = pair_of(*CONVNET)
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
    _, pair = pair_of(*CONVNET)
    assert repr(pair.penalty_to_jax(frt.l1(0.1))) == "l1(0.1)"
    assert repr(pair.penalty_to_torch(frj.l2(0.5))) == "l2(0.5)"
    named = pair.penalty_to_jax(frt.l1(0.1).on(["conv", "norm", "fc"]))
    tree = {name: np.zeros(form.shape, np.float32) for name, form in pair.flax.forms.items() if "stats" not in name}
    assert selected(named, {**tree, "more.w": np.zeros(3, np.float32)}) == set(tree)  # and not what another model has


def test_a_selector_that_selects_nothing_selects_nothing():
    _, pair = pair_of("hidden", "fc")
    theirs = pair.penalty_to_jax(frt.l1(0.1).on(frt.norms))
    assert theirs.parts[0].selectors[0].function is frt.norms
    theirs = pair.penalty_to_jax(frt.l1(0.1).on(lambda name, leaf: False))
    tree = {name: {"kernel": np.ones(shape, np.float32), "bias": np.ones(shape[1], np.float32)}
            for name, shape in (("hidden", (4, 4)), ("fc", (16, 4)))}  # fmt: skip
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


def test_anchors_and_importances_cross_with_their_parameters(x64):
    net, pair = pair_of("attn", "hidden")
    params = {name: p.detach() for name, p in net.named_parameters()}
    anchor = {name: torch.randn_like(p) for name, p in params.items()}
    importance = {name: torch.rand_like(p) for name, p in params.items()}
    first, *others = params
    mixed = {**importance, first: torch.tensor(2.0).double(), **dict.fromkeys(others[-2:], 0.5)}
    for factors in (None, mixed):
        penalty = frt.anchored(frt.l2(0.3), anchor, factors) + 0.5 * frt.l1(0.25)
        with x64():
            theirs = pair.penalty_to_jax(penalty)
            same_value_grad_and_prox(pair, penalty, theirs, params)
            back = pair.penalty_to_torch(theirs)
        same(back.grad(params), penalty.grad(params))


def test_an_anchor_has_the_leaves_that_are_selected():
    net, pair = pair_of("attn", "fc")
    part = frt.anchored(frt.l2(0.3), {"fc.weight": net.fc.weight.detach().float()})
    assert list(pair.penalty_to_jax(part.on("fc.weight")).parts[0].anchor) == ["fc.kernel"]
    with pytest.raises(ValueError, match="the anchor of l2 lacks the leaf 'attn.in_proj_weight'"):
        pair.penalty_to_jax(part)
    with pytest.raises(ValueError, match=r"the anchor of 'fc.weight' has the shape \(3,\), must be \(4, 16\)"):
        pair.penalty_to_jax(frt.anchored(frt.l2(0.3), {"fc.weight": torch.ones(3)}).on("fc.weight"))


def test_strengths_may_be_arrays_and_must_be_concrete(x64):
    _, pair = pair_of("hidden", "embed")
    theirs = pair.penalty_to_jax(torch.tensor(2.0) * frt.l1(torch.tensor(0.5)))
    assert isinstance(theirs.parts[0].strengths[0], jax.Array) and isinstance(theirs.parts[0].weight, jax.Array)
    back = pair.penalty_to_torch(theirs)
    assert isinstance(back.parts[0].strengths[0], torch.Tensor) and float(back.parts[0].weight) == 2
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda lam: (pair.penalty_to_torch(frj.l1(lam)), lam)[1])(0.5)


# --- groups ---


def test_per_stays_where_it_means_the_same_and_becomes_axes_elsewhere():
    _, pair = pair_of("attn", "fc")
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
    convnet = pair_of(*CONVNET)[1]
    assert [dict(p.rule.options)["per"] for p in convnet.penalty_to_jax(penalty).parts] == ["output"]


# --- refusals ---


def test_what_cannot_cross_is_refused_by_name():
    _, mha = pair_of("attn", "fc")
    _, mlp = pair_of("hidden", "embed")
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


def test_a_selector_that_reads_values_is_refused_and_one_of_dtypes_sees_them():
    net, pair = pair_of("hidden")
    reads = lambda name, leaf: bool(leaf.sum() > 0)  # noqa: E731
    why = (
        "the selector function '<lambda>' failed for .*hidden.*; when a penalty crosses, a selector sees names, shapes"
    )
    with pytest.raises(TypeError, match=f"pair.penalty_to_jax: {why}"):
        pair.penalty_to_jax(frt.l1(0.1).on(reads))
    with pytest.raises(TypeError, match=f"pair.penalty_to_torch: {why}"):
        pair.penalty_to_torch(frj.l1(0.1).on(reads))
    wide = pair.penalty_to_jax(frt.l1(0.1).on(lambda name, leaf: leaf.dtype == torch.float64))
    assert str(wide) == "l1(0.1) on ['hidden.kernel', 'hidden.bias']"
    wide = pair.penalty_to_torch(frj.l1(0.1).on(lambda name, leaf: leaf.dtype == np.float64))
    assert str(wide) == "l1(0.1) on ['hidden.weight', 'hidden.bias']"

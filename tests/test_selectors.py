"""Selectors: which leaves `.on` gives to a penalty. Matching is the same plain Python on both wings."""

import fnmatch
import functools
from dataclasses import dataclass

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from funcreg._selectors import glob_match
from wings import JAX, TORCH, each_wing

SHAPES = {
    "hidden": {"weight": (3, 2), "bias": (3,)},
    "layers": [{"weight": (2, 3), "bias": (2,)}, {"weight": (1, 2), "bias": (1,)}],
    "hidden2": {"weight": (2, 2)},
    "weight": (4,),
    "scale": (),
}
HIDDEN = ["hidden.bias", "hidden.weight"]
LAYERS = ["layers.0.bias", "layers.0.weight", "layers.1.bias", "layers.1.weight"]
WEIGHTS = ["hidden.weight", "hidden2.weight", "layers.0.weight", "layers.1.weight", "weight"]
BIASES = ["hidden.bias", "layers.0.bias", "layers.1.bias"]
EVERY = sorted([*WEIGHTS, *BIASES, "scale"])


def _params(wing, shapes=SHAPES):
    if isinstance(shapes, dict):
        return {key: _params(wing, value) for key, value in shapes.items()}
    if isinstance(shapes, list):
        return [_params(wing, value) for value in shapes]
    return wing.array(np.full(shapes, 0.5))


def _chosen(wing, selector, params=None):
    """The names that a selector selects, sorted: torch trees keep insertion order, JAX trees are sorted."""
    params = _params(wing) if params is None else params
    rows = wing.fr.summary(wing.fr.l1(1.0).on(selector), params).rows
    return sorted(row.name for row in rows if row.parts != "-")


# --- globs ---

TOKENS = ["a", "b", ".", "*", "?", "[ab]", "[!a]", "[a-c]", "[", "]", "-", "c"]
TEXTS = st.text(alphabet="abc.-]![", max_size=6)


@given(st.lists(st.sampled_from(TOKENS), max_size=6).map("".join), TEXTS)
def test_globs_match_the_whole_text_as_fnmatch_does(glob, text):
    assert glob_match(glob, text) == fnmatch.fnmatchcase(text, glob)


# `[!]` is no class that excludes nothing: the first `]` of a class stands for itself, also after the `!`.
@pytest.mark.parametrize("text", ["a", "]", "[!]", "b]", "]]", "a]"])
@pytest.mark.parametrize(
    "glob", ["[]]", "[]", "[!]", "[!]]", "[!]]]", "[!]a]", "[]a]", "[a]]", "[c-a]", "[!c-a]", "[a-]"]
)
def test_odd_brackets_match_as_in_fnmatch(glob, text):
    assert glob_match(glob, text) == fnmatch.fnmatchcase(text, glob)


def test_many_stars_take_no_exponential_time():
    assert not glob_match("*a" * 30 + "b", "a" * 3000)


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("hidden.weight", ["hidden.weight"]),
        ("hidden", HIDDEN),  # a whole leading part, so not hidden2
        ("layers", LAYERS),
        ("layers.1", LAYERS[2:]),
        ("layers.*.weight", LAYERS[1::2]),
        ("*.weight", WEIGHTS),  # also the bare `weight`
        ("*.bias", BIASES),
        ("*weight", WEIGHTS),
        ("*", EVERY),
        ("hid*", [*HIDDEN, "hidden2.weight"]),
        ("layers*weight", LAYERS[1::2]),  # `*` crosses dots
        ("layers.?", LAYERS),
        ("layers.[!0]", LAYERS[2:]),
        ("layers.[0-1].bias", LAYERS[::2]),
        ("hidden?", ["hidden2.weight"]),
        (["hidden", "*.1.bias"], [*HIDDEN, "layers.1.bias"]),
        (("hidden", "scale"), [*HIDDEN, "scale"]),
        ("!*.bias", [*WEIGHTS, "scale"]),  # exclusions alone start from all
        (["!*.bias", "!hidden"], ["hidden2.weight", *LAYERS[1::2], "scale", "weight"]),
        (["*.weight", "!hidden"], ["hidden2.weight", *LAYERS[1::2], "weight"]),
        (["!hidden", "*.weight"], ["hidden2.weight", *LAYERS[1::2], "weight"]),  # wherever they stand
        (["hidden", "!hidden.bias", "hidden.bias"], ["hidden.weight"]),  # exclusions win
    ],
    ids=str,
)
@each_wing
def test_globs_select_by_name_and_by_whole_leading_parts(wing, globs, expected):
    assert _chosen(wing, globs) == sorted(expected)


@each_wing
def test_a_bare_leaf_is_selected_by_a_star(wing):
    assert float(wing.fr.l1(1.0).on("*").value(wing.array([1.0, -2.0]))) == 3


@pytest.mark.parametrize(
    "glob", ["hiden.weight", "Hidden", "hidden.weights", "idden", "weight.*", "!hiden.weight", "layers.2"]
)
@pytest.mark.parametrize("function", ["value", "grad", "prox", "summary"])
@each_wing
def test_a_glob_that_matches_nothing_raises_and_shows_the_nearest_names(wing, glob, function):
    penalty = wing.fr.l1(1.0).on(["*", glob])  # the others do not cover for it
    calls = {
        "value": penalty.value,
        "grad": penalty.grad,
        "prox": lambda params: penalty.prox(params, 0.1),
        "summary": lambda params: wing.fr.summary(penalty, params),
    }
    with pytest.raises(ValueError, match="matches no leaf; nearest names: ") as error:
        calls[function](_params(wing))
    assert str(error.value).startswith(f"l1: the glob {glob!r} matches no leaf")
    if "hiden" in glob:
        assert "hidden.weight" in str(error.value)


@each_wing
def test_a_glob_that_matches_only_what_is_passed_over_says_so(wing):
    params = {"w": wing.array([1.0]), "n": wing.array(np.array([1]), "int32"), "flag": True}
    for glob, what in (("n", "int32"), ("!n", "int32"), ("fl*", "bool")):
        with pytest.raises(ValueError, match=f"leaf '(n|flag)' exists but is {what}, which penalties pass over$"):
            wing.fr.l1(1.0).on(["*", glob]).value(params)
    with pytest.raises(ValueError, match="leaf 'n' exists but is int32"):
        wing.fr.layerwise({"n": wing.fr.l1(1.0), "*": None}).value(params)
    variables = {"params": {"w": wing.array([1.0])}, "batch_stats": {"mean": wing.array([1.0])}}
    with pytest.raises(
        ValueError, match="leaf 'batch_stats.mean' exists but is no parameter, which penalties pass over"
    ):
        wing.fr.l1(1.0).on("batch_stats").value(variables)


@each_wing
def test_a_glob_on_an_empty_tree_raises(wing):
    with pytest.raises(ValueError, match="no leaf; nearest names: \\(no leaves\\)"):
        wing.fr.l1(1.0).on("*").value({})


# --- twice ---


@each_wing
def test_on_twice_intersects(wing):
    params = _params(wing)
    twice = wing.fr.l1(1.0).on("*.weight").on("layers")
    other = wing.fr.l1(1.0).on("layers").on(wing.fr.weights)
    for penalty in (twice, other):
        rows = wing.fr.summary(penalty, params).rows
        assert sorted(row.name for row in rows if row.parts != "-") == LAYERS[1::2]
    assert repr(twice) == "l1(1) on '*.weight' on 'layers'"


@each_wing
def test_on_reaches_every_part_of_a_sum(wing):
    params = _params(wing)
    penalty = (wing.fr.l1(1.0).on("*.weight") + wing.fr.l2(1.0)).on("hidden")
    rows = {row.name: row.parts for row in wing.fr.summary(penalty, params).rows}
    assert rows["hidden.weight"] == "l1 + l2"
    assert rows["hidden.bias"] == "l2"
    assert {rows[name] for name in EVERY if name not in HIDDEN} == {"-"}


# --- what is not selected ---


@each_wing
def test_a_role_or_a_function_that_selects_nothing_is_silent(wing):
    params = {"w": wing.array([1.0])}
    for selector in (wing.fr.norms, lambda name, leaf: False):
        assert float(wing.fr.l1(1.0).on(selector).value(params)) == 0


@each_wing
def test_unselected_leaves_have_no_value_no_gradient_and_an_identity_prox(wing):
    params = {"in": wing.array([1.0, -2.0]), "out": wing.array([5.0, float("nan")])}
    penalty = wing.fr.l1(1.0).on("in")
    assert float(penalty.value(params)) == 3  # the NaN does not count
    gradient, new = penalty.grad(params), penalty.prox(params, 1.5)
    np.testing.assert_array_equal(wing.numpy(gradient["out"]), [0, 0])
    np.testing.assert_array_equal(wing.numpy(gradient["in"]), [1, -1])
    np.testing.assert_array_equal(wing.numpy(new["out"]), [5, np.nan])
    np.testing.assert_array_equal(wing.numpy(new["in"]), [0, -0.5])
    assert float(wing.fr.penalize(lambda params: (0 * params["in"]).sum(), penalty)(params)) == 3


# --- roles ---


def _torch_model():
    return torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(2, 3),
            "conv": torch.nn.Conv2d(1, 2, 3),
            "norm1": torch.nn.LayerNorm(3),
            "bn": torch.nn.BatchNorm1d(3),
            "ln_2": torch.nn.LayerNorm(3),
            "embedding": torch.nn.Embedding(4, 2),
            "attention": torch.nn.MultiheadAttention(4, 2),
            "seq": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2)),
        }
    )


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(2, (3,))(x)
        x = linen.BatchNorm(use_running_average=True)(x)
        x = linen.Dense(4)(x)
        x = linen.LayerNorm()(x)
        x = linen.MultiHeadDotProductAttention(num_heads=2)(x)
        return linen.GroupNorm(num_groups=1, name="gn_norm")(x) + linen.Embed(3, 4)(jnp.zeros((), int))[None, None]


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 3, rngs=rngs)
        self.conv = nnx.Conv(1, 2, (3,), rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.bn1 = nnx.BatchNorm(3, rngs=rngs)
        self.embed = nnx.Embed(4, 2, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.RMSNorm(2, rngs=rngs)])


def _linen_model():
    shapes = jax.eval_shape(_Linen().init, jax.random.key(0), jnp.ones((1, 3, 2)))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@functools.cache
def _nnx_model():
    return _Nnx(nnx.Rngs(0))


TORCH_ROLES = {
    "weights": ["linear.weight", "conv.weight", "embedding.weight", "seq.0.weight"]
    + ["attention.in_proj_weight", "attention.out_proj.weight"],
    # in_proj_bias is not called `bias`: the role is the name, so it takes a glob
    "biases": ["linear.bias", "conv.bias", "norm1.bias", "bn.bias", "ln_2.bias", "seq.0.bias", "seq.1.bias"]
    + ["attention.out_proj.bias"],
    # the bias of a normalization layer in an nn.Sequential cannot be told from others
    "norms": ["norm1.weight", "norm1.bias", "bn.weight", "bn.bias", "ln_2.weight", "ln_2.bias", "seq.1.weight"],
}
LINEN_ROLES = {
    "weights": ["Conv_0.kernel", "Dense_0.kernel", "Embed_0.embedding"]
    + [f"MultiHeadDotProductAttention_0.{part}.kernel" for part in ("query", "key", "value", "out")]
    # flax's attention has biases of two axes (head, entry): a matrix by its axes
    + [f"MultiHeadDotProductAttention_0.{part}.bias" for part in ("query", "key", "value")],
    "biases": ["Conv_0.bias", "BatchNorm_0.bias", "Dense_0.bias", "LayerNorm_0.bias", "gn_norm.bias"]
    + [f"MultiHeadDotProductAttention_0.{part}.bias" for part in ("query", "key", "value", "out")],
    "norms": [f"{name}.{own}" for name in ("BatchNorm_0", "LayerNorm_0", "gn_norm") for own in ("scale", "bias")],
}
NNX_ROLES = {
    "weights": ["linear.kernel", "conv.kernel", "embed.embedding", "layers.0.kernel"],
    "biases": ["linear.bias", "conv.bias", "norm.bias", "bn1.bias", "layers.0.bias"],
    "norms": ["norm.scale", "norm.bias", "bn1.scale", "bn1.bias", "layers.1.scale"],
}


@pytest.mark.parametrize("role", ["weights", "biases", "norms"])
def test_roles_of_a_torch_model(role):
    params = TORCH.fr.params(_torch_model())
    assert _chosen(TORCH, getattr(TORCH.fr, role), params) == sorted(TORCH_ROLES[role])


@pytest.mark.parametrize("role", ["weights", "biases", "norms"])
def test_roles_of_a_linen_model(role):
    assert _chosen(JAX, getattr(JAX.fr, role), _linen_model()) == sorted(LINEN_ROLES[role])


@pytest.mark.parametrize("role", ["weights", "biases", "norms"])
def test_roles_of_an_nnx_model(role):
    model = _nnx_model()
    for tree in (JAX.fr.params(model), nnx.state(model), model):
        assert _chosen(JAX, getattr(JAX.fr, role), tree) == sorted(NNX_ROLES[role])


@each_wing
def test_weights_counts_the_axes_of_one_member_of_an_ensemble(wing):
    members = {"weight": wing.array(np.ones((3, 2, 2))), "bias": wing.array(np.ones((3, 2)))}
    values = wing.vmap(wing.fr.l1(1.0).on(wing.fr.weights).value)(members)
    np.testing.assert_array_equal(wing.numpy(values), [4, 4, 4])  # the bias has one axis, not two


# --- functions ---


@each_wing
def test_a_function_sees_the_name_and_the_leaf(wing):
    seen = {}

    def tall(name, leaf):
        seen[name] = tuple(leaf.shape)
        return leaf.ndim == 2 and leaf.shape[0] > leaf.shape[1]

    assert _chosen(wing, tall) == ["hidden.weight"]
    assert sorted(seen) == EVERY
    assert seen["layers.0.weight"] == (2, 3)


@pytest.mark.parametrize("answer", [1, None, "yes", np.bool_(True)], ids=str)
@each_wing
def test_a_function_must_answer_true_or_false(wing, answer):
    penalty = wing.fr.l1(1.0).on(lambda name, leaf: answer)
    with pytest.raises(TypeError, match="must return True or False.*got .* for 'hidden.bias'"):
        penalty.value({"hidden": {"bias": wing.array([1.0])}})


@each_wing
def test_a_function_that_looks_at_values_is_refused_by_name(wing):
    """It could not be traced: which leaves are selected is a static fact."""
    penalty = wing.fr.l1(1.0).on(lambda name, leaf: leaf.sum() > 0)
    with pytest.raises(TypeError, match="from the name and the shape of a leaf.*for 'w'"):
        penalty.value({"w": wing.array([1.0])})


@dataclass(frozen=True)
class Deeper:
    than: int

    def __call__(self, name, leaf):
        return name.count(".") > self.than


class Shallow:
    def __call__(self, name, leaf):
        return "." not in name


@each_wing
def test_a_function_may_be_an_object_that_can_be_called(wing):
    assert _chosen(wing, Deeper(1)) == LAYERS
    assert _chosen(wing, Shallow()) == ["scale", "weight"]
    assert _chosen(wing, functools.partial(lambda size, name, leaf: leaf.ndim == size, 0)) == ["scale"]


# --- trees of bools ---


@each_wing
def test_a_tree_of_bools_selects_the_leaves_that_are_true(wing):
    flags = {
        "hidden": {"weight": True, "bias": False},
        "layers": [{"weight": False, "bias": True}, {"weight": True, "bias": False}],
        "hidden2": {"weight": False},
        "weight": False,
        "scale": True,
    }
    assert _chosen(wing, flags) == ["hidden.weight", "layers.0.bias", "layers.1.weight", "scale"]


@each_wing
def test_a_prefix_of_bools_selects_whole_subtrees(wing):
    flags = {"hidden": True, "layers": [False, {"weight": True, "bias": False}]}
    flags |= {"hidden2": False, "weight": False, "scale": False}
    assert _chosen(wing, flags) == [*HIDDEN, "layers.1.weight"]
    assert _chosen(wing, True) == EVERY
    assert _chosen(wing, False) == []


@each_wing
def test_a_list_of_bools_is_a_tree(wing):
    params = [wing.array([1.0]), wing.array([2.0])]
    assert _chosen(wing, [False, True], params) == ["1"]
    assert _chosen(wing, (True, False), params) == ["0"]


@each_wing
def test_a_list_of_trees_of_bools_is_a_tree(wing):
    params = [{"w": wing.array([1.0]), "b": wing.array([2.0])}, {"w": wing.array([4.0])}]
    assert _chosen(wing, [{"w": True, "b": False}, {"w": False}], params) == ["0.w"]


@each_wing
def test_trees_of_bools_go_by_name_and_not_by_order(wing):
    params = {"b": wing.array([1.0]), "a": wing.array([2.0])}
    assert _chosen(wing, {"a": True, "b": False}, params) == ["a"]
    assert _chosen(wing, {"b": False, "a": True}, params) == ["a"]


@each_wing
def test_a_tree_of_bools_may_be_shaped_like_variables_with_a_params_collection(wing):
    variables = {"params": {"w": wing.array([1.0]), "b": wing.array([2.0])}, "stats": {"w": wing.array([4.0])}}
    assert _chosen(wing, {"params": {"w": True, "b": False}, "stats": {"w": True}}, variables) == ["w"]
    assert _chosen(wing, {"w": True, "b": False}, variables) == ["w"]
    assert _chosen(wing, {"params": True, "stats": False}, variables) == ["b", "w"]


@each_wing
def test_a_leaf_or_a_layer_that_is_called_params_is_no_collection(wing):
    leaves = {"params": wing.array([1.0]), "other": wing.array([2.0])}
    assert _chosen(wing, {"params": True, "other": False}, leaves) == ["params"]
    assert _chosen(wing, {"params": False, "other": True}, leaves) == ["other"]
    layers = {"params.weight": wing.array([1.0]), "head.weight": wing.array([2.0])}  # as a torch module names them
    assert _chosen(wing, {"params": True, "head": False}, layers) == ["params.weight"]


@each_wing
def test_a_tree_of_bools_that_leaves_out_a_leaf_is_refused_by_name(wing):
    penalty = wing.fr.l1(1.0).on({"hidden": True})
    with pytest.raises(ValueError, match=r"l1: the tree of bools says nothing about the leaf '\w+'; it names hidden"):
        penalty.value({"hidden": wing.array([1.0]), "other": wing.array([1.0])})


@jax.tree_util.register_dataclass
@dataclass
class _Layer:
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight + self.bias


def test_a_tree_of_bools_may_be_a_model_that_can_be_called():
    """equinox modules are pytrees with a `__call__`; a map over one gives a module of bools, and no function."""
    layer = _Layer(jnp.ones((2, 2)), jnp.ones(2))
    matrices = jax.tree.map(lambda x: x.ndim == 2, layer)
    assert _chosen(JAX, matrices, layer) == ["weight"]
    model = _nnx_model()
    kernels = nnx.map_state(lambda path, x: path[-1] == "kernel", nnx.state(model, nnx.Param))
    assert _chosen(JAX, kernels, model) == ["conv.kernel", "layers.0.kernel", "linear.kernel"]


# --- what is no selector ---


@pytest.mark.parametrize(
    "wrong",
    [3, 0.5, None, {}, {"w"}, b"*", {"w": 1}, {"w": "*"}, {"w": True, "b": 0.0}, [1], ["*", 3], ["*", True], [None]],
    ids=repr,
)
@each_wing
def test_what_is_no_selector_is_refused_when_given(wing, wrong):
    with pytest.raises(TypeError, match="^(on|params): "):
        wing.fr.l1(1.0).on(wrong)


@pytest.mark.parametrize(
    "model",
    [torch.nn.Linear(1, 1), linen.Dense(1), nnx.Linear(1, 1, rngs=nnx.Rngs(0))],
    ids=["torch", "linen", "nnx"],
)
@each_wing
def test_a_model_is_no_selector_though_it_can_be_called(wing, model):
    says = "^on: expected a glob, .* or a tree of bools, got (Linear|Dense)"
    with pytest.raises(TypeError, match=says):
        wing.fr.l1(1.0).on(model)


@pytest.mark.parametrize("wrong", ["", "!", [], (), ["*", ""]], ids=repr)
@each_wing
def test_empty_globs_are_refused_when_given(wing, wrong):
    with pytest.raises(TypeError, match="^on: (a glob must be a non-empty string|an empty list selects nothing)"):
        wing.fr.l1(1.0).on(wrong)


# --- traced, printed ---

SELECTORS = {
    "globs": lambda fr: ["layers.[!1].?eight", "h*n", "!*.b[a-j]as"],
    "weights": lambda fr: fr.weights,
    "norms": lambda fr: fr.norms,
    "function": lambda fr: lambda name, leaf: leaf.ndim == 2 and name.startswith("layers"),
    "bools": lambda fr: {"hidden": True, "layers": False, "norm": True},
}


@pytest.fixture
def fresh_dynamo():
    """Dynamo counts recompilations by the code of a test, which all its parameters share."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("selector", SELECTORS)
@each_wing
def test_selectors_are_traced_without_a_graph_break(wing, selector, fresh_dynamo):
    params = _params(wing, {"hidden": {"weight": (3, 2)}, "layers": [{"weight": (2, 2)}], "norm": {"bias": (3,)}})
    penalty = wing.fr.l1(0.25).on(SELECTORS[selector](wing.fr))
    traced = wing.jit(lambda params: penalty.prox(params, 0.5))(params)
    jax.tree.map(np.testing.assert_array_equal, wing.numpy(traced), wing.numpy(penalty.prox(params, 0.5)))
    zeros = wing.numpy(penalty.grad(params))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(zeros)) and any(
        np.all(leaf == 0) for leaf in jax.tree.leaves(zeros)
    )


@each_wing
def test_repr_says_where(wing):
    fr = wing.fr
    assert repr(fr.l1(1e-4).on("*.weight")) == "l1(0.0001) on '*.weight'"
    assert repr(fr.l1(1e-4).on(["*.weight", "!head"])) == "l1(0.0001) on ['*.weight', '!head']"
    assert repr(fr.l1(1e-4).on(fr.weights)) == "l1(0.0001) on weights"
    assert repr(fr.l1(1e-4).on({"w": True, "b": False})) in (
        "l1(0.0001) on {'w': True, 'b': False}",
        "l1(0.0001) on {'b': False, 'w': True}",  # JAX sorts
    )

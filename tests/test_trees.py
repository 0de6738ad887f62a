"""Trees of parameters: step sizes per leaf, dtypes, complex, 0-d, empty and huge ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from wings import JAX, TORCH, dtype_name, each_wing


def _fast(wing, function):
    """JAX op by op is slow; torch is as fast as it is."""
    return jax.jit(function) if wing is JAX else function


# --- step sizes ---


@each_wing
def test_a_step_per_leaf_and_per_coordinate(wing):
    params = {"a": wing.array([3.0, -4.0]), "b": {"c": wing.array([5.0])}}
    penalty = wing.fr.l1(1.0)
    scalar = wing.leaf(np.array(2.0), "float32")
    for steps in (
        {"a": wing.array([1.0, 3.0]), "b": {"c": wing.array([2.0])}},
        {"a": wing.array([1.0, 3.0]), "b": {"c": scalar}},
        {"a": wing.array([1.0, 3.0]), "b": {"c": 2.0}},
        {"a": wing.array([1.0, 3.0]), "b": {"c": 2}},
        {"b": {"c": 2.0}, "a": wing.array([1.0, 3.0])},
    ):
        new = wing.numpy(penalty.prox(params, steps))
        np.testing.assert_array_equal(new["a"], [2, -1])
        np.testing.assert_array_equal(new["b"]["c"], [3])
    for step in (2.0, 2, np.float32(2), np.array(2.0), scalar):
        new = wing.numpy(penalty.prox(params, step))
        np.testing.assert_array_equal(new["a"], [1, -2])
        np.testing.assert_array_equal(new["b"]["c"], [3])


@each_wing
def test_leaves_without_a_part_need_no_step(wing):
    params = {"a": wing.array([3.0]), "b": wing.array([5.0]), "n": 3}
    new = wing.fr.l1(1.0).on("a").prox(params, {"a": 1.0})
    assert (float(new["a"][0]), float(new["b"][0]), new["n"]) == (2, 5, 3)


@each_wing
def test_a_step_tree_that_does_not_fit_is_refused_by_the_first_leaf(wing):
    params = {"a": wing.array([3.0, 1.0]), "b": wing.array([5.0])}
    prox = wing.fr.l1(1.0).prox
    with pytest.raises(ValueError, match="^step_size: the leaf 'b' of the parameters is missing; step_size has a$"):
        prox(params, {"a": 1.0})
    for wrong in ([1.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match=r"^step_size: the leaf 'a' must have the parameter's shape \(2,\), got"):
            prox(params, {"a": wing.array(wrong), "b": 1.0})
    with pytest.raises(ValueError, match="^prox: step_size has a leaf 'typo' that the parameters do not have$"):
        prox(params, {"a": 1.0, "b": 1.0, "typo": 1.0})
    new = prox({**params, "n": 3}, {"a": 1.0, "b": 1.0, "n": 0})  # that of a leaf that is passed over
    assert (float(new["a"][0]), new["n"]) == (2, 3)


@pytest.mark.parametrize("wrong", ["0.1", None, [0.1], "array"], ids=repr)
@each_wing
def test_what_is_no_step_size_is_refused_by_name(wing, wrong):
    wrong = wing.array([0.1]) if wrong == "array" else wrong
    with pytest.raises((TypeError, ValueError), match="^(prox: )?step_size"):
        wing.fr.l1(1.0).prox({"a": wing.array([3.0, 1.0])}, wrong)


@pytest.mark.parametrize("wrong", [None, "x", True, 1j], ids=repr)
@each_wing
def test_what_is_no_number_is_refused_as_a_step_with_its_value(wing, wrong):
    params = {"a": wing.array([3.0, 1.0])}
    with pytest.raises((TypeError, ValueError), match=f"^(prox: )?step_size.*(got|has) .*{wrong!r}|has no leaves"):
        wing.fr.l1(1.0).prox(params, wrong)
    if wrong is True:
        with pytest.raises(TypeError, match="^prox: step_size of the leaf 'a' must be a real number or .*, got True$"):
            wing.fr.l1(1.0).prox(params, {"a": True})


@each_wing
def test_an_infinite_step_is_refused(wing):
    params, infinity = {"a": wing.array([3.0, 1.0])}, float("inf")
    penalty = wing.fr.elastic_net(0.1, 0.1)
    for wrong in (infinity, np.float32(infinity), wing.leaf(np.array(infinity), "float32")):
        with pytest.raises(ValueError, match="^prox: step_size must be finite, got inf$"):
            penalty.prox(params, wrong)
    for wrong in (infinity, wing.array([1.0, infinity])):
        with pytest.raises(ValueError, match="^prox: step_size of the leaf 'a' must be finite, got inf$"):
            penalty.prox(params, {"a": wrong})


@pytest.mark.parametrize("step", [-0.1, float("nan")], ids=str)
@each_wing
def test_a_negative_step_is_refused(wing, step):
    params = {"a": wing.array([3.0, 1.0])}
    for wrong in (step, np.float32(step), wing.leaf(np.array(step), "float32")):
        with pytest.raises(ValueError, match=f"^prox: step_size must be >= 0, got {step:g}$"):
            wing.fr.l1(1.0).prox(params, wrong)


@pytest.mark.parametrize("step", [-0.1, float("nan")], ids=str)
@each_wing
def test_a_negative_step_in_a_tree_is_refused_by_name(wing, step):
    params = {"a": wing.array([3.0, 1.0])}
    for wrong in (step, wing.array([1.0, step])):
        with pytest.raises(ValueError, match=f"step_size.*'a'.* >= 0, got {step:g}"):
            wing.fr.l1(1.0).prox(params, {"a": wrong})


@each_wing
def test_a_traced_step_is_not_checked(wing):
    params = {"a": wing.array([3.0])}
    new = wing.vmap(lambda step: wing.fr.l1(1.0).prox(params, step)["a"])(wing.array([-1.0, 1.0]))
    np.testing.assert_array_equal(wing.numpy(new), [[4], [2]])
    slope = wing.grad(lambda step: wing.fr.l1(1.0).prox(params, step)["a"].sum())(wing.leaf(np.array(1.0), "float32"))
    assert float(slope) == -1


ZEROS = {
    "l1": lambda fr, lam: fr.l1(lam),
    "l2": lambda fr, lam: fr.l2(lam),
    "elastic_net": lambda fr, lam: fr.elastic_net(lam, lam),
    "group_lasso": lambda fr, lam: fr.group_lasso(lam, axis=-1),
    "group_lasso per output": lambda fr, lam: fr.group_lasso(lam, per="output", group_scale="one"),
    "sparse_group_lasso": lambda fr, lam: fr.sparse_group_lasso(lam, lam, axis=-1) + fr.l2(lam),
}


@pytest.mark.parametrize("name", ZEROS)
@each_wing
def test_a_step_or_a_strength_of_zero_returns_the_point_exactly(wing, name):
    rng = np.random.default_rng(0)
    # sizes over sixty decades, and zeros
    w = rng.normal(size=(300, 5)) * 10.0 ** rng.integers(-30, 30, size=(300, 5)) * (rng.random((300, 5)) > 0.1)
    params = {"w": wing.array(w)}
    zero, random = {"w": wing.array(np.zeros((300, 5)))}, {"w": wing.array(rng.uniform(size=(300, 5)))}
    for lam, step in ((1.0, 0.0), (1.0, zero), (1.0, {"w": 0.0}), (0.0, 0.7), (0.0, random)):
        new = _fast(wing, lambda params, lam=lam, step=step: ZEROS[name](wing.fr, lam).prox(params, step))(params)
        np.testing.assert_array_equal(wing.numpy(new["w"]), wing.numpy(params["w"]))


@each_wing
def test_a_step_of_zero_in_some_coordinates_leaves_them_alone(wing):
    params = {"w": wing.array([0.3, -0.7, 1.1, -0.9])}
    steps = {"w": wing.array([0.0, 2.0, 0.0, 0.1])}
    for penalty in (wing.fr.l1(1.0), wing.fr.elastic_net(1.0, 1.0)):
        new = wing.numpy(penalty.prox(params, steps)["w"])
        np.testing.assert_array_equal(new[[0, 2]], wing.numpy(params["w"])[[0, 2]])
        assert new[1] == 0 and -0.9 < new[3] < 0


# --- NaN ---


@each_wing
def test_nan_stays_in_its_coordinate_or_group(wing):
    nan = float("nan")
    params = {"w": wing.array(np.array([[nan, 1.0], [2.0, -3.0]])), "b": wing.array([nan, 1.0])}
    for penalty in (wing.fr.l1(0.5), wing.fr.l2(0.5), wing.fr.elastic_net(0.5, 0.5)):
        for tree in (penalty.grad(params), penalty.prox(params, 0.5)):
            np.testing.assert_array_equal(np.isnan(wing.numpy(tree["w"])), [[True, False], [False, False]])
            np.testing.assert_array_equal(np.isnan(wing.numpy(tree["b"])), [True, False])
        assert np.isnan(float(penalty.value(params)))
    group = wing.fr.group_lasso(0.5, axis=-1).on("w")
    steps = {"w": wing.array(np.array([[0.5, 0.1], [0.2, 0.3]]))}
    for tree in (group.grad(params), group.prox(params, 0.5), group.prox(params, steps)):
        np.testing.assert_array_equal(np.isnan(wing.numpy(tree["w"])).any(1), [True, False])
    anchored = wing.fr.anchored(wing.fr.l2(1.0), {"w": wing.array(np.zeros((2, 2))), "b": wing.array([0.0, nan])})
    assert np.isnan(wing.numpy(anchored.prox(params, 0.5)["b"])).all()


# --- dtypes ---

HALF = ["float16", "bfloat16"]
RULES = {
    "l1": lambda fr: fr.l1(0.25),
    "l2": lambda fr: fr.l2(0.25),
    "group_lasso": lambda fr: fr.group_lasso(0.25, axis=-1),
    "anchored": lambda fr: fr.anchored(fr.l2(0.25), {"w": _float32(fr, np.ones((2, 2)))}),
    "arrays": lambda fr: _float32(fr, np.array(0.5)) * fr.l1(_float32(fr, np.array(0.5))),
}


def _float32(fr, x):
    return (TORCH if fr is TORCH.fr else JAX).leaf(x, "float32")


@pytest.mark.parametrize("dtype", [*HALF, "float32", "float64"])
@pytest.mark.parametrize("name", RULES)
@each_wing
def test_values_are_float32_at_least_and_gradients_and_prox_keep_the_dtype(wing, name, dtype):
    with wing.precision("float64" if dtype == "float64" else "float32"):
        params = {"w": wing.array(np.array([[1.0, -2.0], [0.0, 4.0]]), dtype)}
        penalty = RULES[name](wing.fr)
        steps = {"w": wing.leaf(np.full((2, 2), 0.5), "float32")}

        def everything(params):
            trees = penalty.grad(params), penalty.prox(params, 0.5), penalty.prox(params, steps)
            return penalty.value(params), *trees

        value, *trees = _fast(wing, everything)(params)
        assert dtype_name(value) == ("float64" if dtype == "float64" else "float32")
        assert [dtype_name(tree["w"]) for tree in trees] == [dtype] * 3


@pytest.mark.parametrize("dtype", HALF)
@each_wing
def test_half_precision_accumulates_in_float32(wing, dtype):
    """In bfloat16 a sum saturates at 256; squares of 300 are infinite in float16."""
    params = {f"{i}": wing.array(np.full(100, 1.0), dtype) for i in range(50)}
    assert float(_fast(wing, wing.fr.l1(1.0).value)(params)) == 5000
    big = {"w": wing.array(np.full(4, 300.0), dtype)}
    assert float(wing.fr.l2(2.0).value(big)) == 360_000
    assert float(wing.fr.group_lasso(1.0, axis=-1, group_scale="one").value(big)) == 600
    np.testing.assert_array_equal(wing.numpy(wing.fr.group_lasso(1.0, axis=-1, group_scale="one").grad(big)["w"]), 0.5)


@pytest.mark.parametrize("dtype", HALF)
@each_wing
def test_penalize_adds_in_float32(wing, dtype):
    """A half-precision loss of 256 plus a penalty of 0.25 would be 256."""
    params = {"w": wing.array([0.25], dtype)}
    total = wing.fr.penalize(lambda params: 1024 * params["w"].sum(), wing.fr.l1(1.0))(params)
    assert dtype_name(total) == "float32"
    assert float(total) == 256.25


@each_wing
def test_mixed_dtypes_keep_each_its_own(wing):
    with wing.precision("float64"):
        params = {dtype: wing.array([3.0], dtype) for dtype in (*HALF, "float32", "float64")}
        penalty = wing.fr.elastic_net(0.5, 0.25) + wing.fr.l1(wing.leaf(np.array(0.5), "float64"))
        assert dtype_name(penalty.value(params)) == "float64"
        assert float(penalty.value(params)) == 4 * (3 + 1.125)
        for tree in (penalty.grad(params), penalty.prox(params, 1.0)):
            assert {key: dtype_name(leaf) for key, leaf in tree.items()} == {key: key for key in params}
        anchors = {key: wing.array([1.0], "float32") for key in params}
        moved = wing.fr.anchored(wing.fr.l2(1.0), anchors).prox(params, wing.leaf(np.array(1.0), "float32"))
        assert {key: (dtype_name(leaf), float(leaf[0])) for key, leaf in moved.items()} == {
            key: (key, 2) for key in params
        }


def test_float64_numpy_parameters_without_x64_become_float32_as_everywhere_in_jax():
    """No warning either: warnings are errors here."""
    params = {"w": np.array([3.0, -1.0])}
    penalty = JAX.fr.l1(1.0)
    assert dtype_name(penalty.value(params)) == "float32" and float(penalty.value(params)) == 4
    for tree in (penalty.grad(params), penalty.prox(params, 0.5), penalty.on("!w").grad(params)):
        assert dtype_name(tree["w"]) == "float32"
    np.testing.assert_array_equal(penalty.prox(params, 0.5)["w"], [2.5, -0.5])


# --- complex ---


@each_wing
def test_a_complex_leaf_is_refused_by_name(wing):
    params = {"w": wing.array([1.0]), "z": wing.array(np.array([1 + 2j]), "complex64")}
    penalty = wing.fr.l1(1.0)
    calls = [
        penalty.value,
        penalty.grad,
        lambda params: penalty.prox(params, 0.1),
        wing.fr.prox_adam(0.1, penalty).init,
        functools.partial(wing.fr.summary, penalty),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="l1: the leaf 'z' is complex.*exclude the leaf with .on"):
            call(params)


@each_wing
def test_a_complex_leaf_that_is_not_selected_is_left_alone(wing):
    params = {"w": wing.array([3.0]), "z": wing.array(np.array([1 + 2j]), "complex64")}
    penalty = wing.fr.l1(1.0).on("!z")
    assert float(penalty.value(params)) == 3 and dtype_name(penalty.value(params)) == "float32"
    new, gradient = penalty.prox(params, 1.0), penalty.grad(params)
    assert dtype_name(new["z"]) == dtype_name(gradient["z"]) == "complex64"
    assert (complex(new["z"][0]), complex(gradient["z"][0])) == (1 + 2j, 0)
    rows = {row.name: row.parts for row in wing.fr.summary(penalty, params).rows}
    assert rows == {"w": "l1", "z": "-"}


@each_wing
def test_magnitudes_are_shrunk_by_the_remedy_of_the_message(wing):
    """Real and imaginary parts as a last axis of two, group_lasso(axis=-1)."""
    params = {"z": wing.array(np.array([[3.0, 4.0], [0.3, -0.4]]))}
    new = wing.fr.group_lasso(1.0, axis=-1, group_scale="one").prox(params, 1.0)
    np.testing.assert_allclose(wing.numpy(new["z"]), [[2.4, 3.2], [0, 0]], rtol=1e-6)


# --- 0-d, empty, bare ---


@each_wing
def test_scalar_leaves(wing):
    params = {"s": wing.array(np.array(-4.0))}
    for penalty, value, slope, point in (
        (wing.fr.l1(1.0), 4, -1, -3),
        (wing.fr.l2(1.0), 8, -4, -2),
        (wing.fr.group_lasso(1.0, per="output"), 4, -1, -3),
    ):
        assert (float(penalty.value(params)), float(penalty.grad(params)["s"])) == (value, slope)
        for step in (1.0, {"s": wing.array(np.array(1.0))}):
            new = penalty.prox(params, step)["s"]
            assert tuple(new.shape) == () and float(new) == point
    with pytest.raises(ValueError, match=r"group_lasso: the leaf 's' of shape \(\) has no axis -1; exclude it"):
        wing.fr.group_lasso(1.0, axis=-1).value(params)


EMPTY = [(0,), (0, 3), (3, 0)]


@each_wing
def test_empty_leaves(wing):
    params = {str(shape): wing.array(np.zeros(shape)) for shape in EMPTY} | {"w": wing.array([4.0])}
    steps = params | {"w": 1.0}
    penalties = [
        wing.fr.l1(1.0),
        wing.fr.elastic_net(1.0, 0.0),
        wing.fr.group_lasso(1.0, axis=-1),
        wing.fr.group_lasso(1.0, per="output"),
        wing.fr.group_lasso(1.0, per="input"),
    ]

    def everything(params):
        return [(p.value(params), p.grad(params), p.prox(params, 1.0), p.prox(params, steps)) for p in penalties]

    for value, gradient, *points in _fast(wing, everything)(params):
        assert float(value) == 4 and float(gradient["w"][0]) == 1
        assert [float(point["w"][0]) for point in points] == [3, 3]
        for tree in (gradient, *points):
            assert [tuple(tree[str(shape)].shape) for shape in EMPTY] == EMPTY
    for make in (wing.fr.prox_adam, wing.fr.prox_sgd):
        transformation = make(0.1, wing.fr.l1(0.1))
        updates, _ = _fast(wing, transformation.update)(params, transformation.init(params), params)
        assert [tuple(updates[str(shape)].shape) for shape in EMPTY] == EMPTY
        assert float(updates["w"][0]) < 0


@pytest.mark.parametrize("tree", [{}, [], (), {"n": 3, "inner": {}}, {"name": "net"}], ids=str)
@each_wing
def test_trees_without_parameters(wing, tree):
    penalty = wing.fr.l1(1.0) + wing.fr.l2(1.0)
    value = penalty.value(tree)
    assert float(value) == 0 and dtype_name(value) == "float32" and tuple(value.shape) == ()
    assert penalty.prox(tree, 0.1) == tree
    assert penalty.grad(tree) == ({"n": 0, "inner": {}} if "n" in tree else tree)
    for transformation in (
        wing.fr.prox_adam(0.1, penalty),
        wing.fr.prox_sgd(0.1, penalty),
        wing.fr.add_penalty_gradient(penalty),
    ):
        zeros = penalty.grad(tree)
        updates, _ = transformation.update(zeros, transformation.init(tree), tree)
        assert updates == zeros


@each_wing
def test_a_bare_leaf_is_a_tree(wing):
    w = wing.array([3.0, -4.0])
    for penalty in (wing.fr.l1(1.0), wing.fr.l1(1.0).on("*"), wing.fr.l1(1.0).on(True)):
        assert float(penalty.value(w)) == 7
        np.testing.assert_array_equal(wing.numpy(penalty.grad(w)), [1, -1])
        np.testing.assert_array_equal(wing.numpy(penalty.prox(w, 1.0)), [2, -3])
        np.testing.assert_array_equal(wing.numpy(penalty.prox(w, wing.array([1.0, 2.0]))), [2, -2])
    np.testing.assert_array_equal(
        wing.numpy(wing.fr.anchored(wing.fr.l2(1.0), wing.array([1.0, 0.0])).prox(w, 1.0)), [2, -2]
    )
    assert wing.fr.summary(wing.fr.l1(1.0), w).rows[0].name == ""
    transformation = wing.fr.prox_sgd(1.0, wing.fr.l1(1.0), momentum=0.5)
    updates, _ = transformation.update(wing.array([0.0, 1.0]), transformation.init(w), w)
    np.testing.assert_array_equal(wing.numpy(updates), [-1, 0])


# --- huge ---


def _huge(wing, leaves):
    rng = np.random.default_rng(0)
    shapes = {"weight": (4, 3), "bias": (4,)}
    return {
        f"layers.{i // 2}.{own}": wing.array(rng.normal(size=shapes[own]))
        for i in range(leaves)
        for own in (("weight", "bias")[i % 2],)
    }


@each_wing
def test_bookkeeping_is_not_quadratic_in_the_number_of_leaves(wing, monkeypatch):
    """Counted, not timed: name comparisons of a transformation's update, per leaf."""

    class Name(str):
        compared = 0

        def __eq__(self, other):
            Name.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    counts = {}
    for leaves in (20, 80):
        params = {Name(f"leaf{i}"): wing.array([1.0]) for i in range(leaves)}
        transformation = wing.fr.add_penalty_gradient(wing.fr.l1(0.1))
        state = transformation.init(params)
        Name.compared = 0
        monkeypatch.setattr(f"funcreg.{wing.name}._wing.leaf_name", lambda path: Name(path[-1]))
        transformation.update({key: wing.array([0.0]) for key in params}, state, params)
        counts[leaves] = Name.compared
    assert counts[80] <= 8 * counts[20]


@each_wing
def test_five_hundred_leaves(wing):
    """An order of magnitude more than a usual network; compiled by JAX in seconds."""
    params = _huge(wing, 500)
    penalty = wing.fr.l1(0.01).on("*.weight")
    value, new = _fast(wing, lambda params: (penalty.value(params), penalty.prox(params, 10.0)))(params)
    weights = [wing.numpy(leaf) for key, leaf in params.items() if key.endswith("weight")]
    assert float(value) == pytest.approx(0.01 * sum(np.abs(leaf).sum() for leaf in weights), rel=1e-5)
    assert len(new) == 500
    for key in ("layers.0.weight", "layers.249.weight"):
        w = wing.numpy(params[key])
        np.testing.assert_allclose(wing.numpy(new[key]), np.sign(w) * np.maximum(np.abs(w) - 0.1, 0), atol=1e-6)
    assert new["layers.249.bias"] is params["layers.249.bias"] if wing is TORCH else True


def test_a_large_tree_traces_in_a_bounded_number_of_operations():
    """What XLA is given grows with the leaves: some operations for each, no more."""
    sizes = {}
    for leaves in (10, 100):
        params = _huge(JAX, leaves)
        penalty = JAX.fr.l1(0.01) + JAX.fr.l2(0.01)
        sizes[leaves] = len(
            jax.make_jaxpr(lambda params, penalty=penalty: (penalty.value(params), penalty.prox(params, 0.1)))(
                params
            ).eqns
        )
    assert sizes[100] - sizes[10] <= 90 * 25


def test_non_contiguous_and_expanded_tensors():
    base = torch.arange(12.0).reshape(3, 4) - 5
    for w in (base.T, base[:, ::2], base[0].expand(3, 4), base.as_strided((2, 2), (1, 1))):
        for penalty in (TORCH.fr.l1(1.0), TORCH.fr.group_lasso(0.5, axis=-2)):
            copy = w.clone(memory_format=torch.contiguous_format)
            torch.testing.assert_close(penalty.value({"w": w}), penalty.value({"w": copy}))
            torch.testing.assert_close(penalty.prox({"w": w}, 1.0)["w"], penalty.prox({"w": copy}, 1.0)["w"])
            torch.testing.assert_close(w, copy)  # nothing is written into the argument


def test_numpy_parameters_on_the_jax_wing():
    params = {"w": np.array([3.0, -4.0], np.float32)}
    assert float(JAX.fr.l1(1.0).value(params)) == 7
    new = JAX.fr.l1(1.0).prox(params, {"w": np.array([1.0, 2.0], np.float32)})
    assert isinstance(new["w"], jax.Array)
    np.testing.assert_array_equal(new["w"], [2, -2])
    np.testing.assert_array_equal(params["w"], [3, -4])
    assert float(jnp.sum(JAX.fr.l1(1.0).grad(params)["w"])) == 0

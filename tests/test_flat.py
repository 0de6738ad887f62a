"""`to_flat` and `from_flat`: states and parameters through safetensors files, and what a file must not slip in."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from wings import JAX, TORCH, dtype_name, each_wing

OPTAX = {"torch": TORCH.fr.optax, "jax": optax}


def _params(wing, dtype="float32"):
    rng = np.random.default_rng(0)
    return wing.array(
        {"hidden": {"weight": rng.normal(size=(3, 2)), "bias": rng.normal(size=3)}, "s": np.array(0.5)}, dtype
    )


def _chain(wing):
    """One of every kind of state."""
    optax = OPTAX[wing.name]
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.trace(0.9),
        wing.fr.add_penalty_gradient(wing.fr.l2(1e-2)),
        wing.fr.prox_sgd(optax.linear_schedule(0.1, 0.01, 10), wing.fr.l1(0.3), momentum=0.9, nesterov=True),
    )


TRANSFORMATIONS = {
    "prox_adam": lambda wing: wing.fr.prox_adam(0.1, wing.fr.l1(0.3)),
    "prox_adam master": lambda wing: wing.fr.prox_adam(
        0.1, wing.fr.l1(0.3), master_dtype=torch.float32 if wing is TORCH else jnp.float32
    ),
    "prox_sgd": lambda wing: wing.fr.prox_sgd(0.1, wing.fr.l1(0.3)),
    "chain": _chain,
    "adamw": lambda wing: OPTAX[wing.name].adamw(0.1),
    "MultiSteps": lambda wing: OPTAX[wing.name].MultiSteps(wing.fr.prox_adam(0.1, wing.fr.l1(0.3)), every_k_schedule=3),
}


def _update(wing, transformation):
    def step(params, state, gradients):
        updates, state = transformation.update(gradients, state, params)
        return OPTAX[wing.name].apply_updates(params, updates), state

    return jax.jit(step) if wing is JAX else step


def _gradients(wing, i, dtype="float32"):
    rng = np.random.default_rng(i)
    return wing.array(
        {"hidden": {"weight": rng.normal(size=(3, 2)), "bias": rng.normal(size=3)}, "s": np.array(0.1)}, dtype
    )


def _through_a_file(wing, flat, path):
    """As a user saves and loads."""
    if wing is TORCH:
        safetensors.torch.save_file(flat, path)
        return safetensors.torch.load_file(path)
    safetensors.numpy.save_file({name: np.asarray(x) for name, x in flat.items()}, path)
    return safetensors.numpy.load_file(path)


def _leaves(wing, tree):
    return torch.utils._pytree.tree_leaves(tree) if wing is TORCH else jax.tree.leaves(tree)


def _structure(wing, tree):
    return torch.utils._pytree.tree_structure(tree) if wing is TORCH else jax.tree.structure(tree)


def _same(wing, left, right):
    assert _structure(wing, left) == _structure(wing, right)
    for x, y in zip(_leaves(wing, left), _leaves(wing, right), strict=True):
        assert dtype_name(x) == dtype_name(y)
        np.testing.assert_array_equal(wing.leaf_numpy(x), wing.leaf_numpy(y))


# --- names ---


@each_wing
def test_the_names_are_paths(wing):
    state = TRANSFORMATIONS["prox_adam"](wing).init(_params(wing))
    names = ["count"] + [
        f"{moment}.{leaf}" for moment in ("mu", "nu") for leaf in ("hidden.bias", "hidden.weight", "s")
    ]
    flat = wing.fr.to_flat(state)
    assert sorted(flat) == names
    assert dtype_name(flat["count"]) == "int32"
    chain = sorted(wing.fr.to_flat(_chain(wing).init(_params(wing))))
    assert "2.count" in chain and "3.trace.hidden.weight" in chain and "1.trace.hidden.weight" in chain
    assert sorted(wing.fr.to_flat({"params": {"w": wing.array([1.0])}})) == [
        "params.w"
    ]  # the path, not the leaf's name
    assert wing.fr.to_flat({}) == {} and wing.fr.from_flat({}, {}) == {}


@each_wing
def test_none_is_left_out_and_comes_back(wing):
    tree = {"w": wing.array([1.0]), "none": None, "list": [None, wing.array([2.0])]}
    flat = wing.fr.to_flat(tree)
    assert sorted(flat) == ["list.1", "w"]
    again = wing.fr.from_flat(tree, flat)
    assert again["none"] is None and again["list"][0] is None
    assert float(again["list"][1][0]) == 2


def test_nnx_states_and_models_go_through_a_flat_dict():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    flat = JAX.fr.to_flat(state)
    assert sorted(flat) == ["bias", "kernel"]
    other = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(1)), nnx.Param)
    again = JAX.fr.from_flat(other, flat)
    np.testing.assert_array_equal(again["kernel"][...], model.kernel[...])
    nnx.update(model, again)


# --- files ---


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@each_wing
def test_resumed_training_equals_unbroken_training_bit_for_bit(wing, name, tmp_path):
    transformation = TRANSFORMATIONS[name](wing)
    # optax's own adamw and MultiSteps mix dtypes
    context = jax.numpy_dtype_promotion("standard" if name in ("adamw", "MultiSteps") else "strict")
    with context:
        step = _update(wing, transformation)
        params = _params(wing)
        state = transformation.init(params)
        start = state
        for i in range(4):
            params, state = step(params, state, _gradients(wing, i))
        assert any(
            np.any(wing.leaf_numpy(x) != wing.leaf_numpy(y))
            for x, y in zip(_leaves(wing, state), _leaves(wing, start), strict=True)
        )
        flat = {**{f"state.{key}": x for key, x in wing.fr.to_flat(state).items()}}
        flat |= {f"params.{key}": x for key, x in wing.fr.to_flat(params).items()}
        loaded = _through_a_file(wing, flat, tmp_path / "checkpoint.safetensors")
        like = {"state": TRANSFORMATIONS[name](wing).init(_params(wing)), "params": _params(wing)}
        resumed = wing.fr.from_flat(like, loaded)
        _same(wing, resumed["state"], state)
        _same(wing, resumed["params"], params)
        again, again_state = resumed["params"], resumed["state"]
        traces = step._cache_size() if wing is JAX else 0
        for i in range(4, 9):
            params, state = step(params, state, _gradients(wing, i))
            again, again_state = step(again, again_state, _gradients(wing, i))
        assert wing is TORCH or step._cache_size() == traces  # a resumed state is no new type
        _same(wing, again, params)
        _same(wing, again_state, state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@each_wing
def test_other_dtypes_go_through_a_file(wing, dtype, tmp_path):
    with wing.precision("float64" if dtype == "float64" else "float32"):
        params = _params(wing, dtype)
        tree = {"params": params, "count": wing.leaf(np.array(3), "int32"), "done": wing.leaf(np.array([True]), "bool")}
        loaded = _through_a_file(wing, wing.fr.to_flat(tree), tmp_path / "tree.safetensors")
        _same(wing, wing.fr.from_flat(tree, loaded), tree)


def test_tensors_that_a_file_refuses_are_made_ready_for_it(tmp_path):
    """Transposed and expanded ones, and parameters."""
    tree = {
        "t": torch.arange(6.0).reshape(2, 3).T,
        "e": torch.ones(()).expand(3),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    flat = TORCH.fr.to_flat(tree)
    loaded = _through_a_file(TORCH, flat, tmp_path / "tree.safetensors")
    again = TORCH.fr.from_flat(tree, loaded)
    torch.testing.assert_close(again["t"], tree["t"])
    assert not flat["p"].requires_grad and again["e"].tolist() == [1, 1, 1]


def test_numpy_arrays_come_from_a_file_on_either_wing(tmp_path):
    for wing in (TORCH, JAX):
        tree = {"w": wing.array([1.0, 2.0]), "h": wing.array([1.0, 2.0], "bfloat16")}
        flat = {"w": np.array([3, 4], np.float32), "h": np.array([5, 6], ml_dtypes.bfloat16)}
        if wing is TORCH:
            flat.pop("h"), tree.pop("h")  # torch does not read NumPy's bfloat16
        again = wing.fr.from_flat(tree, flat)
        assert again["w"].tolist() == [3, 4]
        assert type(again["w"]) is type(tree["w"])


# --- refused ---


@each_wing
def test_a_flat_dict_that_does_not_fit_is_refused_by_name(wing):
    fr = wing.fr
    like = {"w": wing.array([1.0, 2.0]), "n": wing.leaf(np.array(3), "int32")}
    fits = fr.to_flat(like)
    for flat, message in (
        ({"n": fits["n"]}, "flat is missing 'w'; `like` must be a state of the same transformation"),
        ({}, "flat is missing 'n'"),
        ({**fits, "x": fits["w"]}, "flat has 'x', which `like` has not"),
        ({**fits, "w": wing.array([1.0])}, r"the leaf 'w' must be float32\[2\], got float32\[1\]"),
        ({**fits, "w": wing.array(np.ones((2, 1)))}, r"the leaf 'w' must be float32\[2\], got float32\[2, 1\]"),
        ({**fits, "w": wing.array([1.0, 2.0], "float16")}, r"the leaf 'w' must be float32\[2\], got float16\[2\]"),
        ({**fits, "w": np.array([1.0, 2.0])}, r"the leaf 'w' must be float32\[2\], got float64\[2\]"),
        ({**fits, "n": np.array(3)}, r"the leaf 'n' must be int32\[\], got int64\[\]"),
    ):
        with pytest.raises(ValueError, match=f"^from_flat: {message}"):
            fr.from_flat(like, flat)


@pytest.mark.parametrize("wrong", [0.5, [1.0, 2.0], None, "w"], ids=repr)
@each_wing
def test_what_is_no_array_in_a_flat_dict_is_refused_by_name(wing, wrong):
    with pytest.raises((TypeError, ValueError), match="^from_flat: the leaf 'w' must be .*float32"):
        wing.fr.from_flat({"w": wing.array([1.0, 2.0])}, {"w": wrong})


def test_a_float64_file_is_not_narrowed_without_x64(x64):
    with x64():
        like = {"w": jnp.ones(2, jnp.float64)}
        flat = {name: np.asarray(x) for name, x in JAX.fr.to_flat(like).items()}
    for form in (like, {"w": np.ones(2)}):  # without x64 no such array can be made
        with pytest.raises(ValueError, match="'w' .*float64"):
            JAX.fr.from_flat(form, flat)
    with pytest.raises(ValueError, match=r"the leaf 'w' must be float32\[2\], got float64\[2\]"):
        JAX.fr.from_flat({"w": jnp.ones(2)}, flat)
    with x64():
        assert JAX.fr.from_flat(like, flat)["w"].dtype == np.float64


@pytest.mark.parametrize("leaf", [3, 0.5, "text", True, optax.sgd], ids=["int", "float", "string", "bool", "function"])
@each_wing
def test_what_is_no_array_is_refused_by_name(wing, leaf):
    with pytest.raises(TypeError, match=f"^to_flat: the leaf 'inner.0' must be an array, got {type(leaf).__name__}$"):
        wing.fr.to_flat({"inner": [leaf]})
    with pytest.raises(TypeError, match="^from_flat: the leaf 'inner.0' .*must be an array"):
        wing.fr.from_flat({"inner": [leaf]}, {"inner.0": wing.array([1.0])})


def test_prng_keys_are_refused_by_name():
    with pytest.raises(TypeError, match="to_flat: the leaf 'rng' must be an array, got PRNGKeyArray"):
        JAX.fr.to_flat({"rng": jax.random.key(0)})
    raw = JAX.fr.to_flat({"rng": jax.random.PRNGKey(7)})
    assert raw["rng"].tolist() == [0, 7]


@each_wing
def test_two_leaves_of_one_name_are_refused(wing):
    tree = {"a.b": wing.array([1.0]), "a": {"b": wing.array([2.0])}}
    with pytest.raises(ValueError, match="^to_flat: two leaves have the name 'a.b'; rename one of them$"):
        wing.fr.to_flat(tree)
    with pytest.raises(ValueError, match="^from_flat: two leaves have the name 'a.b'"):
        wing.fr.from_flat(tree, {"a.b": wing.array([1.0])})


def test_a_restored_tensor_is_a_tensor_of_its_own():
    """Training in place must not write into the dict that came from the file."""
    flat = {"w": torch.ones(2)}
    again = TORCH.fr.from_flat({"w": torch.zeros(2)}, flat)
    again["w"].add_(1)
    assert flat["w"].tolist() == [1, 1]
    array = {"w": np.ones(2, np.float32)}
    TORCH.fr.from_flat({"w": torch.zeros(2)}, array)["w"].add_(1)
    assert array["w"].tolist() == [1, 1]


def test_a_flat_state_does_not_move_with_the_training():
    params = {"w": torch.ones(2)}
    flat = TORCH.fr.to_flat(params)
    params["w"].add_(1)
    assert flat["w"].tolist() == [1, 1]


@each_wing
def test_a_penalty_goes_through_a_flat_dict(wing):
    """Its strengths may have been learned."""
    penalty = wing.fr.l1(wing.leaf(np.array(0.5), "float32")) + wing.fr.l2(wing.leaf(np.array(0.25), "float32"))
    flat = wing.fr.to_flat(penalty)
    assert sorted(float(x) for x in flat.values()) == [0.25, 0.5]
    assert float(wing.fr.from_flat(penalty, flat).value({"w": wing.array([2.0])})) == 1.5

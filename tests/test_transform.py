"""`penalize` and `add_penalty_gradient`, and what all four transformations refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wings import JAX, TORCH, dtype_name, each_wing

# What a lower-case word is in optax: the torch wing brings its own, which is held to it in test_torch_optax.py.
OPTAX = {"torch": TORCH.fr.optax, "jax": optax}
OTHER = {"torch": JAX, "jax": TORCH}


def _problem(wing, dtype="float64", seed=0):
    """Parameters with zeros at the kinks, a batch, and a loss that is linear in nothing."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(3, 4))
    weight[0, 0] = weight[2] = 0
    params = wing.array({"hidden": {"weight": weight}, "bias": rng.normal(size=4)}, dtype)
    x, y = wing.array((rng.normal(size=(5, 3)), rng.normal(size=(5, 4))), dtype)

    def loss(params, x, y, scale=1.0):
        return scale * (((x @ params["hidden"]["weight"] + params["bias"][None]) - y) ** 4).mean()

    return params, (x, y), loss


def _penalty(fr):
    return fr.l1(0.3).on("hidden") + fr.group_lasso(0.2, axis=-1).on("hidden") + 2 * fr.l2(0.5).on("bias")


def _fast(wing, function):
    """JAX op by op is slow; torch is as fast as it is."""
    return jax.jit(function) if wing is JAX else function


def _close(left, right, tolerance=1e-14):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), left, right)


# --- penalize ---


@each_wing
def test_penalize_adds_the_value_and_keeps_the_arguments(wing):
    with wing.precision("float64"):
        params, (x, y), loss = _problem(wing)
        penalty = _penalty(wing.fr)
        total = wing.fr.penalize(loss, penalty)
        assert (total.loss, total.penalty, total.parts) == (loss, penalty, False)
        value = float(penalty.value(params))
        assert value > 1
        np.testing.assert_allclose(float(total(params, x, y)), float(loss(params, x, y)) + value, rtol=1e-15)
        np.testing.assert_allclose(
            float(total(params, x, y=y, scale=3.0)), 3 * float(loss(params, x, y)) + value, rtol=1e-15
        )


@each_wing
def test_penalize_with_parts_logs_the_bare_loss(wing):
    with wing.precision("float64"):
        params, batch, loss = _problem(wing)
        penalty = _penalty(wing.fr)
        both = _fast(wing, wing.value_and_grad(wing.fr.penalize(loss, penalty, parts=True), has_aux=True))
        (total, parts), gradient = both(params, *batch)
        assert isinstance(parts, wing.fr.Parts)
        np.testing.assert_allclose(float(parts.loss), float(loss(params, *batch)), rtol=1e-15)
        np.testing.assert_allclose(float(parts.penalty), float(penalty.value(params)), rtol=1e-15)
        np.testing.assert_allclose(float(total), float(parts.loss) + float(parts.penalty), rtol=1e-15)
        without = _fast(wing, wing.grad(wing.fr.penalize(loss, penalty)))(params, *batch)
        _close(wing.numpy(gradient), wing.numpy(without))


@each_wing
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_penalize_adds_half_precision_in_float32(wing, dtype):
    # 1 + 1e-3 is 1 in bfloat16, and 1.0009766 in float16: added in half precision the penalty would be lost or changed.
    params = wing.array({"w": np.full(2, 0.5)}, dtype)
    one = wing.array(np.array(1.0), dtype)
    total, parts = wing.fr.penalize(lambda params: one + 0 * params["w"].sum(), wing.fr.l1(1e-3), parts=True)(params)
    assert dtype_name(total) == dtype_name(parts.penalty) == "float32"
    assert dtype_name(parts.loss) == dtype
    assert float(total) == float(np.float32(1) + np.float32(1e-3))
    gradient = wing.grad(wing.fr.penalize(lambda params: params["w"].sum(), wing.fr.l1(0.5)))(params)
    assert dtype_name(gradient["w"]) == dtype
    np.testing.assert_array_equal(wing.numpy(gradient["w"]), [1.5, 1.5])


@each_wing
def test_the_gradient_of_a_penalized_loss_is_the_sum_of_both_at_kinks_too(wing):
    with wing.precision("float64"):
        params, batch, loss = _problem(wing)
        penalty = _penalty(wing.fr)
        gradient = wing.numpy(_fast(wing, wing.grad(wing.fr.penalize(loss, penalty)))(params, *batch))
        bare, added = wing.numpy(_fast(wing, wing.grad(loss))(params, *batch)), wing.numpy(penalty.grad(params))
        _close(gradient, jax.tree.map(np.add, bare, added))
        np.testing.assert_array_equal(gradient["hidden"]["weight"][2], bare["hidden"]["weight"][2])  # a zero group


@each_wing
def test_a_penalized_loss_goes_through_vmap(wing):
    with wing.precision("float64"):
        members = [_problem(wing, seed=seed)[0] for seed in range(3)]
        _, batch, loss = _problem(wing)
        stacked = wing.array(jax.tree.map(lambda *w: np.stack(w), *map(wing.numpy, members)), "float64")
        one = wing.value_and_grad(wing.fr.penalize(loss, _penalty(wing.fr)))
        values, gradients = _fast(wing, wing.vmap(one, in_axes=(0, None, None)))(stacked, *batch)
        for i, member in enumerate(members):
            value, gradient = _fast(wing, one)(member, *batch)
            np.testing.assert_allclose(wing.numpy(values)[i], float(value), rtol=1e-14)
            _close(jax.tree.map(lambda g, i=i: g[i], wing.numpy(gradients)), wing.numpy(gradient))


@each_wing
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own, at the first jvp
def test_a_penalized_loss_goes_through_jvp_and_hessian(wing):
    with wing.precision("float64"):
        params, batch, loss = _problem(wing)
        tangent = _problem(wing, seed=7)[0]
        total = wing.fr.penalize(loss, _penalty(wing.fr))
        jvp = torch.func.jvp if wing is TORCH else jax.jvp
        value, slope = _fast(wing, lambda p, t: jvp(lambda p: total(p, *batch), (p,), (t,)))(params, tangent)
        gradient = wing.numpy(_fast(wing, wing.grad(total))(params, *batch))
        products = jax.tree.map(lambda g, t: np.sum(g * t), gradient, wing.numpy(tangent))
        np.testing.assert_allclose(float(slope), sum(jax.tree.leaves(products)), rtol=1e-13)
        np.testing.assert_allclose(float(value), float(total(params, *batch)), rtol=1e-14)

        # l1 has no curvature, also at a zero; l2 has its strength
        params["bias"] = wing.array(np.array([0.0, 0.5, -1.0, 2.0]), "float64")
        hessian = lambda f: wing.numpy(_fast(wing, wing.hessian(f))(params, *batch)["bias"]["bias"])  # noqa: E731
        curved = wing.fr.penalize(loss, wing.fr.l1(0.3) + wing.fr.l2(0.5))
        np.testing.assert_allclose(hessian(curved) - hessian(loss), 0.5 * np.eye(4), atol=1e-12)


@each_wing
def test_a_penalized_loss_compiles_without_a_graph_break(wing):
    with wing.precision("float64"):
        params, batch, loss = _problem(wing)

        def step(params, penalty, *batch):
            return wing.value_and_grad(wing.fr.penalize(loss, penalty))(params, *batch)

        value, gradient = wing.jit(step)(params, _penalty(wing.fr), *batch)
        expected, expected_gradient = step(params, _penalty(wing.fr), *batch)
        np.testing.assert_allclose(float(value), float(expected), rtol=1e-14)
        _close(wing.numpy(gradient), wing.numpy(expected_gradient))


@each_wing
def test_penalize_refuses_what_it_cannot_add(wing):
    fr = wing.fr
    params, batch, loss = _problem(wing, "float32")
    with pytest.raises(
        TypeError, match=r"penalize: the loss must return a scalar array, got shape \(4,\); take a mean"
    ):
        fr.penalize(lambda params: params["bias"], fr.l1(1.0))(params)
    with pytest.raises(TypeError, match="penalize: the loss must return a scalar array, got tuple"):
        fr.penalize(lambda params: (loss(params, *batch), 1), fr.l1(1.0))(params)
    with pytest.raises(TypeError, match="penalize: loss must be a function"):
        fr.penalize(fr.l1(1.0), loss)
    with pytest.raises(TypeError, match="penalize: penalty must be a penalty of funcreg.* got 0.1"):
        fr.penalize(loss, 0.1)
    with pytest.raises(
        TypeError, match=f"penalize: penalty must be a penalty of funcreg.{wing}.* funcreg.{OTHER[wing.name]}$"
    ):
        fr.penalize(loss, OTHER[wing.name].fr.l1(0.1))
    with pytest.raises(TypeError, match="penalize: penalty must be a penalty"):
        fr.penalize(loss, lambda count: fr.l1(0.1))  # a schedule has no step to count here
    for indicator in (fr.non_negative(), fr.l2(1.0) + fr.non_negative().on("bias")):
        with pytest.raises(fr.NoGradError, match="penalize: non_negative .* prox_sgd or prox_adam"):
            fr.penalize(loss, indicator)


# --- add_penalty_gradient ---


def _gradients(params, steps):
    rng = np.random.default_rng(3)
    return [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(steps)]


def _descend(wing, transformation, params, steps=20):
    """The parameters after some steps on random gradients."""
    state = transformation.init(params)
    update = _fast(wing, transformation.update)
    for grads in _gradients(wing.numpy(params), steps):
        updates, state = update(wing.array(grads, "float64"), state, params)
        params = OPTAX[wing.name].apply_updates(params, updates)
    return params


@each_wing
@pytest.mark.relaxed_promotion  # optax's own transformations mix dtypes
def test_penalty_gradient_after_the_preconditioner_is_adamw(wing):
    o, decay = OPTAX[wing.name], 0.3
    with wing.precision("float64"):
        params, *_ = _problem(wing)
        ours = o.chain(
            o.scale_by_adam(), wing.fr.add_penalty_gradient(wing.fr.l2(decay)), o.scale_by_learning_rate(0.1)
        )
        after = _descend(wing, ours, params)
        _close(wing.numpy(after), wing.numpy(_descend(wing, o.adamw(0.1, weight_decay=decay), params)), 1e-12)
        without = _descend(wing, o.adam(0.1), params)
        moved = np.abs(wing.numpy(after)["bias"] - wing.numpy(without)["bias"])
        assert moved.min() > 1e-3  # the decay is not lost in the tolerance


@each_wing
@pytest.mark.relaxed_promotion
def test_penalty_gradient_before_the_preconditioner_is_adam_with_weight_decay(wing):
    o, decay, steps = OPTAX[wing.name], 0.3, 20
    with wing.precision("float64"):
        params, *_ = _problem(wing)
        ours = o.chain(
            wing.fr.add_penalty_gradient(wing.fr.l2(decay)), o.scale_by_adam(), o.scale_by_learning_rate(0.1)
        )
        after = wing.numpy(_descend(wing, ours, params, steps))

    held = jax.tree.map(torch.tensor, wing.numpy(params))  # torch.optim.Adam on the same gradients
    optimizer = torch.optim.Adam(jax.tree.leaves(held), lr=0.1, weight_decay=decay)
    for grads in _gradients(wing.numpy(params), steps):
        for p, g in zip(jax.tree.leaves(held), jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    _close(after, jax.tree.map(lambda p: p.numpy(), held), 1e-12)


@each_wing
def test_penalty_gradient_takes_a_schedule_of_penalties(wing):
    with wing.precision("float64"):
        params, *_ = _problem(wing)
        zeros = wing.array(jax.tree.map(np.zeros_like, wing.numpy(params)), "float64")

        def schedule(count):
            return wing.fr.l1(0.5) * (count.double() if wing is TORCH else count.astype(jnp.float64))

        transformation = wing.fr.add_penalty_gradient(schedule)
        state = transformation.init(params)
        for count in range(3):
            assert int(state.count) == count and dtype_name(state.count) == "int32"
            updates, state = transformation.update(zeros, state, params)
            expected = jax.tree.map(lambda p, count=count: 0.5 * count * np.sign(p), wing.numpy(params))
            _close(wing.numpy(updates), expected, 0)


@each_wing
def test_penalty_gradient_keeps_the_dtype_of_the_updates(wing):
    params = wing.array({"w": np.array([0.5, -2.0])}, "bfloat16")
    transformation = wing.fr.add_penalty_gradient(wing.fr.l1(0.25))
    for dtype in ("bfloat16", "float32"):
        updates, _ = transformation.update(wing.array({"w": np.ones(2)}, dtype), transformation.init(params), params)
        assert dtype_name(updates["w"]) == dtype
        np.testing.assert_array_equal(wing.numpy(updates["w"]), [1.25, 0.75])


@each_wing
def test_penalty_gradient_is_added_before_it_is_rounded_to_half_precision(wing):
    params = wing.array({"w": np.full(2, 2.0**-10)}, "float16")
    transformation = wing.fr.add_penalty_gradient(wing.fr.l2(2.0**-17))
    updates, _ = transformation.update(wing.array({"w": np.zeros(2)}), transformation.init(params), params)
    np.testing.assert_array_equal(wing.numpy(updates["w"]), 2.0**-27)  # 0 in float16
    assert dtype_name(updates["w"]) == "float32"


@each_wing
def test_penalty_gradient_refuses_indicators_when_it_is_built(wing):
    fr = wing.fr
    with pytest.raises(fr.NoGradError, match="add_penalty_gradient: non_negative"):
        fr.add_penalty_gradient(fr.l1(1.0) + fr.non_negative())
    params, *_ = _problem(wing, "float32")
    late = fr.add_penalty_gradient(lambda count: fr.non_negative())  # a schedule: at the first step
    with pytest.raises(fr.NoGradError, match="add_penalty_gradient: non_negative"):
        late.update(params, late.init(params), params)


# --- what all transformations refuse ---


TRANSFORMATIONS = {
    "add_penalty_gradient": lambda fr, penalty: fr.add_penalty_gradient(penalty),
    "prox_sgd": lambda fr, penalty: fr.prox_sgd(0.1, penalty),
    "prox_sgd momentum": lambda fr, penalty: fr.prox_sgd(0.1, penalty, momentum=0.9),
    "prox_adam": lambda fr, penalty: fr.prox_adam(0.1, penalty),
}


@pytest.fixture(params=TRANSFORMATIONS)
def make(request):
    """One of the transformations, of a wing and a penalty; `make.name` is what its errors begin with."""

    def make(fr, penalty):
        return TRANSFORMATIONS[request.param](fr, penalty)

    make.name = request.param.split()[0]
    return make


@each_wing
def test_an_update_without_parameters_says_what_to_call(wing, make):
    params, *_ = _problem(wing, "float32")
    transformation = make(wing.fr, wing.fr.l1(0.1))
    state = transformation.init(params)
    remedy = rf"{make.name}: update needs the parameters: call update\(updates, state, params\)"
    with pytest.raises(ValueError, match=remedy):
        transformation.update(params, state)
    with pytest.raises(ValueError, match=remedy):
        transformation.update(params, state, None)


@each_wing
def test_trees_that_do_not_match_name_the_first_leaf_that_differs(wing, make):
    params, *_ = _problem(wing, "float32")
    transformation = make(wing.fr, wing.fr.l1(0.1))
    state = transformation.init(params)
    array = lambda *shape: wing.array(np.zeros(shape))  # noqa: E731
    for wrong, message in (
        (
            {"hidden": {"weight": array(3, 4)}},
            r"updates: the leaf 'bias' of the parameters is missing; .* hidden.weight",
        ),
        ({"hidden": {"weight": array(3, 4)}, "bias": array(4), "more": array(2)}, "updates has a leaf 'more' that the"),
        (
            {"hidden": {"weight": array(4, 3)}, "bias": array(4)},
            r"updates: the leaf 'hidden.weight' must have the parameter's shape \(3, 4\), got \(4, 3\)",
        ),
        (
            {"hidden": {"weight": array(3, 4)}, "bias": array(1)},
            r"updates: the leaf 'bias' must have .* \(4,\), got \(1,\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"{make.name}: {message}"):
            transformation.update(wrong, state, params)
    if make.name == "prox_adam":  # the state of another model
        other = transformation.init({"hidden": {"weight": array(2, 2)}, "bias": array(4)})
        with pytest.raises(ValueError, match=r"prox_adam: mu: the leaf 'hidden.weight' .* \(3, 4\), got \(2, 2\)"):
            transformation.update(params, other, params)


@each_wing
def test_a_gradient_that_is_none_is_refused_with_the_remedy(wing, make):
    params = wing.array({"a": np.ones(2), "b": np.ones(2)})
    transformation = make(wing.fr, wing.fr.l1(0.1))
    # JAX's pytrees have no leaf there
    reason = "is None; give it zeros" if wing is TORCH else "of the parameters is missing"
    with pytest.raises(ValueError, match=f"{make.name}: updates: the leaf 'b' {reason}"):
        transformation.update({"a": params["a"], "b": None}, transformation.init(params), params)


@each_wing
def test_updates_for_a_leaf_that_is_passed_over_are_refused_with_the_reason(wing, make):
    params = {**wing.array({"w": np.ones(2)}), "i": wing.array([0, 1], "int32")}
    transformation = make(wing.fr, wing.fr.l1(0.1))
    state = transformation.init(params)
    wrong = wing.array({"w": np.ones(2), "i": np.zeros(2)})
    with pytest.raises(ValueError, match=f"{make.name}: updates has a leaf 'i' that is no floating-point array in the"):
        transformation.update(wrong, state, params)
    right = {**wrong, "i": wing.array([0, 0], "int32")}
    assert transformation.update(right, state, params)[0].keys() == {"w", "i"}


@each_wing
def test_a_state_of_something_else_says_what_to_call(wing, make):
    params = wing.array({"w": np.ones(2)})
    transformation = make(wing.fr, wing.fr.l1(0.1))
    for wrong in (params, None, ()):
        with pytest.raises(TypeError, match=rf"{make.name}: state must be a \w+State, got \w+; call init\(params\)"):
            transformation.update(params, wrong, params)


@each_wing
def test_updates_are_matched_by_name_and_not_by_order(wing, make):
    rng = np.random.default_rng(0)
    params = wing.array({"b": rng.normal(size=3), "a": rng.normal(size=3)})
    grads = wing.array({"b": rng.normal(size=3), "a": rng.normal(size=3)})
    transformation = make(wing.fr, wing.fr.l1(0.1))
    updates, _ = transformation.update(grads, transformation.init(params), params)
    turned = dict(reversed(grads.items()))
    again, _ = transformation.update(turned, transformation.init(params), params)
    for name in params:
        np.testing.assert_array_equal(wing.numpy(updates[name]), wing.numpy(again[name]))


@each_wing
def test_a_penalty_must_be_one_of_this_wing(wing, make):
    fr, other = wing.fr, OTHER[wing.name]
    with pytest.raises(TypeError, match=rf"{make.name}: penalty must be .* got one of funcreg.{other}$"):
        make(fr, other.fr.l1(0.1))
    with pytest.raises(
        TypeError, match=rf"{make.name}: penalty must be a penalty .* or a function count -> .* got 0.1"
    ):
        make(fr, 0.1)
    params, *_ = _problem(wing, "float32")
    for wrong in (0.1, other.fr.l1(0.1)):
        late = make(fr, lambda count, wrong=wrong: wrong)
        with pytest.raises(TypeError, match=f"{make.name}: the schedule's result: penalty must be"):
            late.update(params, late.init(params), params)


@each_wing
def test_leaves_that_are_no_arrays_of_floats_get_a_zero_update(wing, make):
    integers = torch.arange(3) if wing is TORCH else jnp.arange(3)
    params = {"w": wing.array(np.ones(2)), "steps": integers, "none": None}
    transformation = make(wing.fr, wing.fr.l1(0.1))
    updates, _ = transformation.update(params, transformation.init(params), params)
    assert updates["none"] is None
    assert dtype_name(updates["steps"]) == dtype_name(integers)
    np.testing.assert_array_equal(wing.numpy(updates["steps"]), [0, 0, 0])
    assert np.all(wing.numpy(updates["w"]) != 0)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_no_update_on_torch_waits_for_the_device(make, device):
    # Neither meta nor fake tensors have values: reading one, as an update that waited would, raises.
    fr = TORCH.fr

    def run(device):
        params = {"w": torch.ones(4, 3, device=device), "b": torch.ones(3, device=device)}
        rate, lam = torch.tensor(0.1, device=device), torch.tensor(1e-3, device=device)
        penalty = fr.l1(lam) + fr.group_lasso(1e-3, per="output") + fr.anchored(fr.l2(1e-2), params)
        for transformation in (make(fr, penalty), fr.prox_adam(rate, penalty, weight_decay=lam)):
            state = transformation.init(params)
            for _ in range(2):
                updates, state = transformation.update(params, state, params)
                params = fr.optax.apply_updates(params, updates)
            assert state.count.device == params["w"].device
            assert updates["w"].device == params["w"].device

    if device == "meta":
        run("meta")
    else:
        with FakeTensorMode():
            run("cuda")

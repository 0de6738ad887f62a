"""`prox_sgd`: its rule against a reference, and that momentum does not change the problem that it solves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import oracles_training as oracles
from wings import JAX, TORCH, dtype_name, each_wing

OPTAX = {"torch": TORCH.fr.optax, "jax": optax}
KINDS = {  # momentum, nesterov
    "plain": (None, False),
    "momentum": (0.9, False),
    "nesterov": (0.9, True),
    "momentum=0": (0.0, False),
}
each_kind = pytest.mark.parametrize("momentum, nesterov", KINDS.values(), ids=KINDS)


def _fast(wing, function):
    """JAX op by op is slow; torch is as fast as it is."""
    return jax.jit(function) if wing is JAX else function


def _follow(wing, transformation, params, gradients, dtype="float64"):
    """The parameters and states after every one of some steps on given gradients."""
    update = _fast(wing, transformation.update)
    state = transformation.init(params)
    for g in gradients:
        updates, state = update(wing.array(g, dtype), state, params)
        params = OPTAX[wing.name].apply_updates(params, updates)
        yield params, state


# --- the rule ---


@each_wing
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_fifty_steps_equal_the_reference(wing, nesterov):
    with wing.precision("float64"):
        params, anchors, importances, gradients = oracles.all_leaves()
        penalty = oracles.all_penalties(wing.fr, wing.array(anchors, "float64"), wing.array(importances, "float64"))
        terms = oracles.all_terms(anchors, importances, wing.layout)

        def step(momentum, grads, state, params):
            transformation = wing.fr.prox_sgd(0.05, penalty, momentum=momentum, nesterov=nesterov)
            updates, state = transformation.update(grads, state, params)
            return OPTAX[wing.name].apply_updates(params, updates), state

        step = _fast(wing, step)
        for momentum in (0.9, 0.5):
            got = wing.array(params, "float64")
            state = wing.fr.prox_sgd(0.05, penalty, momentum=momentum, nesterov=nesterov).init(got)
            reference, expected = oracles.ProxSgd(terms, 0.05, momentum, nesterov), params
            for g in gradients:
                got, state = step(momentum, wing.array(g, "float64"), state, got)
                expected = reference.step(expected, g)
                for name, new in wing.numpy(got).items():
                    np.testing.assert_allclose(new, expected[name], rtol=0, atol=1e-12, err_msg=name)
                    np.testing.assert_array_equal(new == 0, expected[name] == 0, err_msg=name)
            assert sum(np.sum(w == 0) for w in expected.values()) > 20


@each_wing
def test_fifty_steps_without_momentum_equal_the_reference(wing):
    with wing.precision("float64"):
        params, anchors, importances, gradients = oracles.all_leaves(seed=1)
        penalty = oracles.all_penalties(wing.fr, wing.array(anchors, "float64"), wing.array(importances, "float64"))
        reference = oracles.ProxSgd(oracles.all_terms(anchors, importances, wing.layout), 0.1)
        trajectory = _follow(wing, wing.fr.prox_sgd(0.1, penalty), wing.array(params, "float64"), gradients)
        for (got, _), g in zip(trajectory, gradients, strict=True):
            params = reference.step(params, g)
            for name, new in wing.numpy(got).items():
                np.testing.assert_allclose(new, params[name], rtol=0, atol=1e-12, err_msg=name)
                np.testing.assert_array_equal(new == 0, params[name] == 0, err_msg=name)
    assert sum(np.sum(w == 0) for w in params.values()) > 20


@each_wing
@pytest.mark.relaxed_promotion  # optax mixes dtypes
@each_kind
def test_with_a_zero_penalty_it_is_sgd(wing, momentum, nesterov):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    gradients = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(20)]
    with wing.precision("float64"):
        start = wing.array(params, "float64")
        ours = wing.fr.prox_sgd(0.1, wing.fr.l1(0.0), momentum=momentum, nesterov=nesterov)
        *_, (got, _) = _follow(wing, ours, start, gradients)
        sgd = OPTAX[wing.name].sgd(0.1, momentum=momentum, nesterov=nesterov)
        *_, (expected, _) = _follow(wing, sgd, start, gradients)
        for leaf in params:
            np.testing.assert_allclose(wing.numpy(got)[leaf], wing.numpy(expected)[leaf], rtol=0, atol=1e-13)


@each_wing
def test_the_prox_step_grows_with_the_weights_of_the_momentum(wing):
    # c = 1, 1.9, 2.71, ...; without a gradient l1 shrinks a weight by lr * lam * c, or one step more with nesterov.
    with wing.precision("float64"):
        params = {"w": np.array([10.0])}
        for nesterov in (False, True):
            transformation = wing.fr.prox_sgd(0.1, wing.fr.l1(1.0), momentum=0.9, nesterov=nesterov)
            weight, c = 10.0, 0.0
            zeros = [{"w": np.zeros(1)}] * 5
            for got, state in _follow(wing, transformation, wing.array(params, "float64"), zeros):
                c = 0.9 * c + 1
                weight -= 0.1 * (1 + 0.9 * c if nesterov else c)
                np.testing.assert_allclose(float(state.prox_scale), c, rtol=1e-15)
                np.testing.assert_allclose(wing.numpy(got)["w"], [weight], rtol=1e-14)


@each_wing
def test_without_momentum_the_state_is_a_count(wing):
    params = wing.array({"w": np.ones((2, 3))})
    transformation = wing.fr.prox_sgd(0.1, wing.fr.l1(0.1))
    state = transformation.init(params)
    assert (state.prox_scale, state.trace, state.master) == ((), (), ())
    *_, (_, state) = _follow(wing, transformation, params, [{"w": np.ones((2, 3))}] * 3, "float32")
    assert (state.prox_scale, state.trace, state.master) == ((), (), ())
    assert int(state.count) == 3 and dtype_name(state.count) == "int32"


@each_wing
def test_rate_and_penalty_follow_schedules(wing):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)) / 4}
    gradients = [{"w": rng.normal(size=(4, 3))} for _ in range(10)]
    number = lambda count: count.double() if wing is TORCH else count.astype(jnp.float64)  # noqa: E731
    with wing.precision("float64"):
        transformation = wing.fr.prox_sgd(
            lambda count: 0.1 / (1 + number(count)), lambda count: wing.fr.l1(0.2) * number(count), momentum=0.5
        )
        reference = oracles.ProxSgd({}, 0.1, 0.5)
        for count, (got, _) in enumerate(_follow(wing, transformation, wing.array(params, "float64"), gradients)):
            reference.lr, reference.terms = 0.1 / (1 + count), {"w": [oracles.Term("l1", 0.2 * count)]}
            params = reference.step(params, gradients[count])
            np.testing.assert_allclose(wing.numpy(got)["w"], params["w"], rtol=0, atol=1e-14)
    assert np.sum(params["w"] == 0) >= 1


# --- where it ends ---

LAM = 0.3


@functools.cache
def _lasso():
    """A well-conditioned lasso: Gram matrix, correlations and the solution."""
    rng = np.random.default_rng(0)
    a, w = rng.normal(size=(200, 30)), np.zeros(30)
    w[rng.permutation(30)[:9]] = rng.normal(size=9)
    b = a @ w + 0.5 * rng.normal(size=200)
    return a.T @ a / 200, a.T @ b / 200, oracles.lasso(a, b, LAM)


def _solve(wing, transformation, steps=600):
    gram, correlation, solution = _lasso()
    gram, correlation = wing.array((gram, correlation), "float64")
    params = {"w": wing.array(np.random.default_rng(1).normal(size=30), "float64")}

    def step(params, state):
        updates, state = transformation.update({"w": gram @ params["w"] - correlation}, state, params)
        return OPTAX[wing.name].apply_updates(params, updates), state

    carry = params, transformation.init(params)
    if wing is JAX:
        carry = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, lambda _, carry: step(*carry), carry))(carry)
    else:
        for _ in range(steps):
            carry = step(*carry)
    return wing.numpy(carry[0])["w"], solution


@each_wing
@each_kind
def test_momentum_ends_at_the_lasso_solution(wing, momentum, nesterov):
    with wing.precision("float64"):
        rate = 0.02 if momentum else 0.2
        w, solution = _solve(wing, wing.fr.prox_sgd(rate, wing.fr.l1(LAM), momentum=momentum, nesterov=nesterov))
    assert 3 <= np.sum(solution != 0) <= 15
    np.testing.assert_array_equal(w != 0, solution != 0)
    np.testing.assert_allclose(w, solution, rtol=0, atol=1e-9)


@each_wing
def test_a_prox_step_of_the_bare_rate_ends_somewhere_else(wing):
    # The control of the test above: torch.optim's and optax's momentum with prox(., lr), the tempting composition.
    with wing.precision("float64"):
        sgd = OPTAX[wing.name].sgd(0.02, momentum=0.9)

        def update(updates, state, params):
            u, state = sgd.update(updates, state, params)
            new = wing.fr.functional.prox_l1(params["w"] + u["w"], 0.02, LAM)
            return {"w": new - params["w"]}, state

        wrong = OPTAX[wing.name].GradientTransformation(sgd.init, update)
        with jax.numpy_dtype_promotion("standard"):  # optax's
            w, solution = _solve(wing, wrong)
    assert np.sum(w != 0) > np.sum(solution != 0)
    assert np.abs(w - solution).max() > 0.05


# --- hyper-parameters, dtypes, refusals ---


@each_wing
def test_hyper_parameters_may_be_batched(wing):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    gradients = [{k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(4)]
    with wing.precision("float64"):
        params = wing.array(params, "float64")

        def run(hyper, gradients):
            transformation = wing.fr.prox_sgd(
                hyper["lr"], wing.fr.l1(hyper["lam"]), momentum=hyper["momentum"], nesterov=True
            )
            p, state = params, transformation.init(params)
            for g in gradients:
                updates, state = transformation.update(g, state, p)
                p = OPTAX[wing.name].apply_updates(p, updates)
            return p

        hypers = wing.array(
            {k: np.array(v) for k, v in {"lr": [0.1, 0.2], "lam": [0.0, 0.5], "momentum": [0.9, 0.0]}.items()},
            "float64",
        )
        gradients = [wing.array(g, "float64") for g in gradients]
        together = wing.numpy(_fast(wing, wing.vmap(run, in_axes=(0, None)))(hypers, gradients))
        for i in range(2):
            member = wing.numpy(_fast(wing, run)({name: value[i] for name, value in hypers.items()}, gradients))
            for leaf in member:
                np.testing.assert_allclose(together[leaf][i], member[leaf], rtol=0, atol=1e-12)
        assert np.abs(together["w"][0] - together["w"][1]).max() > 0.1


@each_wing
def test_an_update_compiles_without_a_graph_break(wing):
    params = wing.array({"w": np.random.default_rng(0).normal(size=(4, 3))})
    transformation = wing.fr.prox_sgd(0.1, wing.fr.l1(0.1) + wing.fr.l2(0.1), momentum=0.9, nesterov=True)
    state = transformation.init(params)
    updates, new = transformation.update(params, state, params)
    updates_compiled, new_compiled = wing.jit(transformation.update)(params, state, params)
    np.testing.assert_allclose(wing.numpy(updates_compiled)["w"], wing.numpy(updates)["w"], rtol=0, atol=2e-7)
    np.testing.assert_allclose(float(new_compiled.prox_scale), float(new.prox_scale), rtol=1e-7)


@each_wing
def test_a_master_copy_trains_half_precision_to_exact_zeros(wing):
    # Steps of 1e-3 / 4 at weights of 1/4 are less than half an ulp of bfloat16 (5e-4): only the copy can take them.
    params = {"w": np.array([0.25, -0.25, 0.125])}
    half = wing.array(params, "bfloat16")
    with pytest.raises(ValueError, match=r"prox_sgd: the leaf 'w' is .*bfloat16, .* half an ulp .* master_dtype="):
        wing.fr.prox_sgd(1e-3, wing.fr.l1(0.25)).init(half)
    transformation = wing.fr.prox_sgd(
        1e-3, wing.fr.l1(0.25), momentum=0.5, master_dtype=torch.float32 if wing is TORCH else jnp.float32
    )
    state, update = transformation.init(half), _fast(wing, transformation.update)
    with jax.numpy_dtype_promotion("standard"):  # optax adds updates of another dtype
        for _ in range(300):
            updates, state = update(wing.array({"w": np.zeros(3)}, "bfloat16"), state, half)
            half = OPTAX[wing.name].apply_updates(half, updates)
    assert dtype_name(updates["w"]) == dtype_name(state.master["w"]) == dtype_name(state.trace["w"]) == "float32"
    assert dtype_name(half["w"]) == "bfloat16"
    # the steps sum up to 1e-3 * (c_1 + ... + c_300) = 1e-3 * (2 * 300 - 2)
    left = 0.25 - 0.25e-3 * 598
    np.testing.assert_allclose(wing.numpy(state.master)["w"], [left, -left, 0], atol=1e-5)
    assert wing.numpy(half)["w"][2] == 0
    np.testing.assert_allclose(wing.numpy(half)["w"], [left, -left, 0], rtol=2**-8)


@each_wing
def test_what_it_refuses(wing):
    fr = wing.fr
    with pytest.raises(ValueError, match="prox_sgd: nesterov=True needs momentum, got momentum=None"):
        fr.prox_sgd(0.1, fr.l1(0.1), nesterov=True)
    for momentum in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"prox_sgd: momentum must be in \[0, 1\), got {momentum:g}"):
            fr.prox_sgd(0.1, fr.l1(0.1), momentum=momentum)
    with pytest.raises(ValueError, match="prox_sgd: learning_rate must be >= 0 and finite, got -0.1"):
        fr.prox_sgd(-0.1, fr.l1(0.1))
    with pytest.raises(TypeError, match="prox_sgd: learning_rate must be a real number or a 0-d array, got"):
        fr.prox_sgd(wing.array(np.ones(2)), fr.l1(0.1))
    with pytest.raises(fr.NoProxError, match="l1 and non_negative .* 'w'"):
        fr.prox_sgd(0.1, fr.l1(0.1) + fr.non_negative()).init(wing.array({"w": np.ones(2)}))
    with pytest.raises(TypeError, match="prox_sgd.* unexpected keyword .*dampening"):
        fr.prox_sgd(0.1, fr.l1(0.1), dampening=0.1)


@each_wing
def test_an_indicator_keeps_the_parameters_in_its_set(wing):
    transformation = wing.fr.prox_sgd(0.1, wing.fr.non_negative(), momentum=0.9)
    *_, (after, _) = _follow(
        wing, transformation, wing.array({"w": np.ones(2)}), [{"w": np.array([5.0, -5.0])}] * 4, "float32"
    )
    assert wing.numpy(after)["w"][0] == 0
    assert wing.numpy(after)["w"][1] > 1

"""`prox_adam`: its rule against a reference, where it ends, what it leaves alive, and everything it is called in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sklearn.datasets import load_digits

import oracles_training as oracles
from wings import JAX, TORCH, dtype_name, each_wing

OPTAX = {"torch": TORCH.fr.optax, "jax": optax}
RELU = {"torch": torch.relu, "jax": jax.nn.relu}
LOG_SOFTMAX = {"torch": functools.partial(torch.log_softmax, dim=-1), "jax": jax.nn.log_softmax}


def _fast(wing, function):
    """JAX op by op is slow; torch is as fast as it is."""
    return jax.jit(function) if wing is JAX else function


def _number(wing, count):
    """A count as a float64 number for a schedule; dividing it as it is would give torch a float32."""
    return count.double() if wing is TORCH else count.astype(jnp.float64)


def _train(wing, transformation, params, gradient, steps):
    """`steps` steps on `gradient(params)`, in one compiled loop on JAX."""

    def step(params, state):
        updates, state = transformation.update(gradient(params), state, params)
        return OPTAX[wing.name].apply_updates(params, updates), state

    carry = params, transformation.init(params)
    if wing is JAX:
        carry = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, lambda _, carry: step(*carry), carry))(carry)
    else:
        for _ in range(steps):
            carry = step(*carry)
    return carry[0]


def _follow(wing, transformation, params, gradients, dtype="float64"):
    """The parameters after every one of some steps on given gradients."""
    update = _fast(wing, transformation.update)
    state = transformation.init(params)
    for g in gradients:
        updates, state = update(wing.array(g, dtype), state, params)
        params = OPTAX[wing.name].apply_updates(params, updates)
        yield params


def _random_gradients(params, steps, seed=0):
    """Gradients of very different sizes, some of them always zero."""
    rng = np.random.default_rng(seed)
    scales = {k: 10 ** rng.uniform(-4, 0, v.shape) * (rng.random(v.shape) > 0.2) for k, v in params.items()}
    return [{k: scale * rng.normal(size=scale.shape) for k, scale in scales.items()} for _ in range(steps)]


# --- the rule ---


OPTIONS = {
    "defaults": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "others": {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "weight_decay": 0.3},
}


@each_wing
def test_fifty_steps_equal_the_reference(wing):
    with wing.precision("float64"):
        params, anchors, importances, gradients = oracles.all_leaves()
        penalty = oracles.all_penalties(wing.fr, wing.array(anchors, "float64"), wing.array(importances, "float64"))
        terms = oracles.all_terms(anchors, importances, wing.layout)

        # the options as arguments: one compilation for both rows of OPTIONS
        def step(hyper, grads, state, params):
            updates, state = wing.fr.prox_adam(0.01, penalty, **hyper).update(grads, state, params)
            return OPTAX[wing.name].apply_updates(params, updates), state

        step = _fast(wing, step)
        for options, hyper in OPTIONS.items():
            got = wing.array(params, "float64")
            state = wing.fr.prox_adam(0.01, penalty, **hyper).init(got)
            reference, expected = oracles.ProxAdam(terms, lr=0.01, **hyper), params
            for g in gradients:
                got, state = step(hyper, wing.array(g, "float64"), state, got)
                expected = reference.step(expected, g)
                new = wing.numpy(got)
                for name in expected:
                    where = f"{options}, {name}"
                    np.testing.assert_allclose(new[name], expected[name], rtol=0, atol=1e-12, err_msg=where)
                    np.testing.assert_array_equal(new[name] == 0, expected[name] == 0, err_msg=where)
            assert sum(np.sum(w == 0) for w in expected.values()) > 30


@each_wing
def test_rate_and_penalty_follow_schedules(wing):
    # Both are asked for the count before the step, 0 at first, as optax does.
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)) / 4}
    gradients = _random_gradients(params, 20)
    with wing.precision("float64"):
        transformation = wing.fr.prox_adam(
            lambda count: 0.1 / (1 + _number(wing, count)), lambda count: wing.fr.l1(0.02) * _number(wing, count)
        )
        start = wing.array(params, "float64")
        for count, got in enumerate(_follow(wing, transformation, start, gradients)):
            if count == 0:  # one object that is given the strengths of every step
                reference = oracles.ProxAdam({}, lr=0.1)
            reference.lr = 0.1 / (1 + count)
            reference.terms = {"w": [oracles.Term("l1", 0.02 * count)]}
            params = reference.step(params, gradients[count])
            np.testing.assert_allclose(wing.numpy(got)["w"], params["w"], rtol=0, atol=1e-13)
    assert np.sum(params["w"] == 0) >= 1


# --- with a zero penalty it is Adam ---


def _zero_penalties(fr):
    zero = fr.l1(0.0) + fr.group_lasso(0.0, axis=-1).on("a") + fr.l2(0.0)
    return {"lam=0": zero, "no leaf": fr.l1(0.5).on(lambda name, leaf: False)}


@each_wing
@pytest.mark.relaxed_promotion  # optax mixes dtypes
@pytest.mark.parametrize("weight_decay", [0.0, 0.3], ids=["adam", "adamw"])
@pytest.mark.parametrize(
    "dtype, tolerance",
    # 60 steps, in each of which the sides may round weights of up to 4 differently, by half an ulp of 2.4e-7. The error
    # of 7e-6 that optax has in its bias correction in float32 is within that: 60 steps of 0.01 make 4e-6 of it.
    [("float64", 1e-12), ("float32", 8e-6)],
)
def test_with_a_zero_penalty_it_is_adam(wing, dtype, tolerance, weight_decay):
    o = OPTAX[wing.name]
    optax_adam = o.adamw(0.01, weight_decay=weight_decay) if weight_decay else o.adam(0.01)
    torch_adam = torch.optim.AdamW if weight_decay else torch.optim.Adam
    ours = {
        name: wing.fr.prox_adam(0.01, penalty, weight_decay=weight_decay)
        for name, penalty in _zero_penalties(wing.fr).items()
    }
    for seed in range(2):
        rng = np.random.default_rng(seed)
        params = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=4), "c": rng.normal(size=())}
        gradients = _random_gradients(params, 60, seed)
        held = {k: torch.tensor(v, dtype=getattr(torch, dtype)) for k, v in params.items()}
        optimizer = torch_adam(held.values(), lr=0.01, weight_decay=weight_decay)
        for g in gradients:
            for name, p in held.items():
                p.grad = torch.tensor(g[name], dtype=p.dtype)
            optimizer.step()
        with wing.precision(dtype):
            start = wing.array(params, dtype)
            *_, expected = _follow(wing, optax_adam, start, gradients, dtype)
            for name, transformation in ours.items():
                *_, got = _follow(wing, transformation, start, gradients, dtype)
                for leaf in params:
                    new = wing.numpy(got)[leaf]
                    for other, values in (("optax", wing.numpy(expected)[leaf]), ("torch.optim", held[leaf].numpy())):
                        np.testing.assert_allclose(
                            new, values, rtol=0, atol=tolerance, err_msg=f"{name}, {leaf}, {other}, seed {seed}"
                        )
        assert np.abs(held["a"].numpy() - params["a"]).max() > 0.1


@each_wing
def test_the_bias_correction_is_as_exact_as_float32(wing):
    # 1 - 0.999 in float32 is wrong by 7e-6, and with it the first steps; the correction must not be computed like that.
    params = {"w": np.zeros(3)}
    gradients = [{"w": np.array([1.0, 1e-3, -30.0])}] * 5
    transformation = wing.fr.prox_adam(1.0, wing.fr.l1(0.0))
    for count, got in enumerate(_follow(wing, transformation, wing.array(params), gradients, "float32")):
        expected = -(count + 1) / (1 + 1e-8 / np.abs(gradients[0]["w"])) * np.sign(gradients[0]["w"])
        np.testing.assert_allclose(wing.numpy(got)["w"], expected, rtol=8e-7)  # seven ulps


# --- where it ends ---

LAM = 0.3


def _regression(wing, lam=LAM, outputs=0):
    """A badly scaled least-squares problem: gradient, objective, solution, and a random start."""
    a, b = oracles.badly_scaled(outputs=outputs)
    solution = oracles.group_lasso(a, b, lam) if outputs else oracles.lasso(a, b, lam)
    gram, correlation = wing.array((a.T @ a / len(a), a.T @ b / len(a)), "float64")
    omega = lam * np.sqrt(max(outputs, 1))

    def objective(w):
        rows = np.abs(w) if not outputs else np.sqrt(np.sum(w**2, axis=1))
        return np.sum((a @ w - b) ** 2) / (2 * len(a)) + omega * np.sum(rows)

    start = {"w": wing.array(np.random.default_rng(1).normal(size=solution.shape), "float64")}
    return lambda params: {"w": gram @ params["w"] - correlation}, objective, solution, start


def _decaying(wing, rate):
    return lambda count: rate / (1 + _number(wing, count) / 2000)


@each_wing
def test_it_ends_at_the_lasso_solution_of_a_badly_scaled_problem(wing):
    with wing.precision("float64"):
        gradient, objective, solution, start = _regression(wing)
        transformation = wing.fr.prox_adam(_decaying(wing, 0.1), wing.fr.l1(LAM))
        w = wing.numpy(_train(wing, transformation, start, gradient, 1500))["w"]
    assert objective(w) - objective(solution) <= 1e-9
    np.testing.assert_array_equal(w != 0, solution != 0)
    assert 3 <= np.sum(w != 0) <= 15
    np.testing.assert_allclose(w, solution, rtol=0, atol=1e-9)


@each_wing
def test_soft_thresholding_after_adam_does_not_end_there(wing):
    # The control of the test above: the tempting composition, on the same problem, for as many steps.
    with wing.precision("float64"):
        gradient, objective, solution, start = _regression(wing)
        o, rate = OPTAX[wing.name], _decaying(wing, 0.1)
        adam = o.scale_by_adam()

        def update(updates, state, params):
            count, state = state
            u, state = adam.update(updates, state, params)
            lr = rate(count)
            new = {"w": wing.fr.functional.prox_l1(params["w"] - lr * u["w"], lr, LAM)}
            return {"w": new["w"] - params["w"]}, (count + 1, state)

        zero = torch.zeros((), dtype=torch.int32) if wing is TORCH else jnp.zeros((), jnp.int32)
        wrong = o.GradientTransformation(lambda params: (zero, adam.init(params)), update)
        with jax.numpy_dtype_promotion("standard"):  # optax's
            w = wing.numpy(_train(wing, wrong, start, gradient, 1500))["w"]
    assert objective(w) - objective(solution) > 1e-2
    assert np.any((w != 0) != (solution != 0))


@each_wing
def test_it_ends_at_the_group_lasso_solution_of_a_badly_scaled_problem(wing):
    lam = 0.5
    with wing.precision("float64"):
        gradient, objective, solution, start = _regression(wing, lam, outputs=4)
        transformation = wing.fr.prox_adam(_decaying(wing, 0.1), wing.fr.group_lasso(lam, axis=-1))
        w = wing.numpy(_train(wing, transformation, start, gradient, 1500))["w"]
    assert objective(w) - objective(solution) <= 1e-9
    np.testing.assert_array_equal(w != 0, solution != 0)
    assert 3 <= np.sum(np.any(w != 0, axis=1)) <= 20
    np.testing.assert_allclose(w, solution, rtol=0, atol=1e-9)


# --- what it leaves alive ---


@functools.cache
def _digits():
    """Handwritten digits in [0, 1] and one-hot labels; some pixels at the border are zero on every image."""
    data = load_digits()
    return data.data / 16, np.eye(10)[data.target]


def _mlp(wing, dtype="float32", hidden=32, seed=0):
    """Parameters and cross-entropy of a network on the digits, kernels (in, out) on both wings."""
    rng = np.random.default_rng(seed)
    uniform = lambda *shape: rng.uniform(-1, 1, shape) / np.sqrt(shape[0])  # noqa: E731
    params = {
        "hidden": {"kernel": uniform(64, hidden), "bias": rng.uniform(-1, 1, hidden) / 8},
        "head": {"kernel": uniform(hidden, 10), "bias": rng.uniform(-1, 1, 10) / np.sqrt(hidden)},
    }

    def loss(params, x, y):
        h = RELU[wing.name](x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        return -(y * LOG_SOFTMAX[wing.name](h @ params["head"]["kernel"] + params["head"]["bias"][None])).sum(-1).mean()

    return wing.array(params, dtype), loss


@each_wing
def test_one_step_leaves_random_weights_alive(wing):
    params, loss = _mlp(wing)
    images, labels = (part[:128] for part in _digits())
    gradient = _fast(wing, wing.grad(loss))(params, *wing.array((images, labels)))
    unseen = np.all(images == 0, axis=0)
    assert np.sum(unseen) >= 3

    def step(penalty):
        transformation = wing.fr.prox_adam(3e-3, penalty)
        updates, _ = transformation.update(gradient, transformation.init(params), params)
        return OPTAX[wing.name].apply_updates(params, updates)

    step = _fast(wing, step)
    for unit in (wing.fr.l1(1.0), wing.fr.group_lasso(1.0, axis=-1).on("*.kernel")):
        for lam in (1e-5, 1e-4, 1e-3, 1e-2):
            new = wing.numpy(step(lam * unit))
            weights = np.concatenate([new[layer]["kernel"].ravel() for layer in ("hidden", "head")])
            assert np.mean(weights != 0) >= 0.98, f"{unit}, {lam}"
            # pixels without a gradient wait for one; the others may die
            assert np.mean(new["hidden"]["kernel"][unseen] != 0) >= 0.9, f"{unit}, {lam}"


@each_wing
def test_weights_on_pixels_that_are_always_zero_are_zero_in_the_end(wing):
    params, loss = _mlp(wing, hidden=16)
    images, labels = wing.array(_digits())
    blank = np.all(_digits()[0] == 0, axis=0)
    assert np.sum(blank) == 3
    gradient = wing.grad(lambda params: loss(params, images, labels))
    before = float(loss(params, images, labels))
    transformation = wing.fr.prox_adam(5e-3, wing.fr.l1(2e-3).on("*.kernel"))
    after = _train(wing, transformation, params, gradient, 150)
    kernel = wing.numpy(after)["hidden"]["kernel"]
    assert np.all(kernel[blank] == 0)
    assert 0.2 < np.mean(kernel[~blank] != 0) < 0.95
    assert float(loss(after, images, labels)) < before / 3


@each_wing
def test_a_low_rank_model_with_a_zero_factor_trains(wing):
    # At the first step all of A has a zero gradient, and at the next ones, in a warmup, one below lam: without the
    # guard by |grad R| a step of A is lr / eps long, A dies, and then B never gets a gradient.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, 16))
    target = x @ rng.normal(size=(16, 2)) @ rng.normal(size=(2, 8)) / 4
    x, target = wing.array((x, target))
    params = wing.array({"a": rng.normal(size=(16, 4)) / 4, "b": np.zeros((4, 8))})
    loss = lambda params: ((x @ params["a"] @ params["b"] - target) ** 2).mean()  # noqa: E731
    start = float(loss(params))
    clip = torch.clamp if wing is TORCH else jnp.clip

    def rate(count):
        return 2e-2 * clip((count.float() if wing is TORCH else count.astype(jnp.float32)) / 40 + 0.01, max=1.0)

    for penalty in (wing.fr.l1(5e-3), wing.fr.group_lasso(3e-3, axis=-1)):
        after = _train(wing, wing.fr.prox_adam(rate, penalty), params, wing.grad(loss), 300)
        assert float(loss(after)) < 0.02 * start
        assert np.mean(wing.numpy(after)["a"] != 0) > 0.3


@each_wing
def test_rows_of_an_embedding_keep_until_they_are_seen(wing):
    # A coordinate without a gradient moves as one with a typical gradient would: by lr * lam / (0.3 RMS of s) a step.
    # With the guard |grad R| alone it would move by lr, and all of these rows would be gone after 34 steps.
    rng = np.random.default_rng(0)
    table = 0.1 * rng.normal(size=(200, 8))
    gradients = []
    for _ in range(60):  # batches with words of the first half only, the frequent ones more often
        rows = np.minimum(rng.zipf(1.5, 32) - 1, 99)
        g = np.zeros_like(table)
        np.add.at(g, rows, rng.normal(size=(32, 8)) / 32)
        gradients.append({"table": g})
    assert np.sum(np.any([np.any(g["table"] != 0, axis=1) for g in gradients], axis=0)) >= 80
    for lam in (1e-6, 1e-5, 1e-4):
        transformation = wing.fr.prox_adam(3e-3, wing.fr.l1(lam))
        *_, after = _follow(wing, transformation, wing.array({"table": table}), gradients, "float32")
        kept = np.linalg.norm(wing.numpy(after)["table"], axis=1) / np.linalg.norm(table, axis=1)
        assert np.all(kept[100:] > 0.5)


# --- traced hyper-parameters ---


def _hypers(wing):
    values = {"lr": [0.01, 0.02, 0.05, 0.1], "lam": [0.0, 0.01, 0.05, 0.2], "b1": [0.9, 0.5, 0.0, 0.8]}
    return wing.array({k: np.array(v) for k, v in {**values, "weight_decay": [0.0, 0.1, 0.3, 0.0]}.items()}, "float64")


@each_wing
def test_hyper_parameters_may_be_batched(wing):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)) / 4, "b": rng.normal(size=3)}
    gradients = _random_gradients(params, 5)
    with wing.precision("float64"):
        params = wing.array(params, "float64")

        def run(hyper, gradients):
            penalty = wing.fr.l1(hyper["lam"]).on("b") + wing.fr.group_lasso(hyper["lam"], axis=-1).on("w")
            transformation = wing.fr.prox_adam(hyper["lr"], penalty, b1=hyper["b1"], weight_decay=hyper["weight_decay"])
            p, state = params, transformation.init(params)
            for g in gradients:
                updates, state = transformation.update(g, state, p)
                p = OPTAX[wing.name].apply_updates(p, updates)
            return p

        hypers, gradients = _hypers(wing), [wing.array(g, "float64") for g in gradients]
        together = wing.numpy(_fast(wing, wing.vmap(run, in_axes=(0, None)))(hypers, gradients))
        one = _fast(wing, run)
        for i in range(4):
            member = wing.numpy(one({name: value[i] for name, value in hypers.items()}, gradients))
            for leaf in member:
                np.testing.assert_allclose(together[leaf][i], member[leaf], rtol=0, atol=1e-12)
        assert np.ptp(together["w"], axis=0).max() > 0.1


@each_wing
def test_an_update_compiles_without_a_graph_break(wing):
    rng = np.random.default_rng(0)
    params, grads = wing.array(({"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)},) * 2)
    penalty = wing.fr.l1(0.1) + wing.fr.group_lasso(0.1, per="output").on("w") + wing.fr.l2(0.1)

    def step(penalty, lr, grads, state, params):
        return wing.fr.prox_adam(lr, penalty, weight_decay=0.1).update(grads, state, params)

    state = wing.fr.prox_adam(0.1, penalty).init(params)
    lr = wing.array(np.array(0.1))
    updates, new = step(penalty, lr, grads, state, params)
    compiled = wing.jit(step)
    for _ in range(2):
        updates_compiled, new_compiled = compiled(penalty, lr, grads, state, params)
        for leaf in params:
            got, expected = wing.numpy(updates_compiled[leaf]), wing.numpy(updates[leaf])
            np.testing.assert_allclose(got, expected, rtol=0, atol=4e-7)  # weights reach 2; XLA fuses products
            np.testing.assert_array_equal(got == -wing.numpy(params)[leaf], expected == -wing.numpy(params)[leaf])
            np.testing.assert_allclose(wing.numpy(new_compiled.nu[leaf]), wing.numpy(new.nu[leaf]), rtol=1e-6)
        assert int(new_compiled.count) == int(new.count) == 1


# --- dtypes and odd leaves ---


@each_wing
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_refused_with_the_reason(wing, dtype):
    params = wing.array({"hidden": {"weight": np.ones((2, 2))}}, dtype)
    reason = rf"prox_adam: the leaf 'hidden.weight' is .*{dtype}, .* half an ulp .* master_dtype=float32"
    with pytest.raises(ValueError, match=reason):
        wing.fr.prox_adam(0.1, wing.fr.l1(0.1)).init(params)
    whole = wing.array({"hidden": {"weight": np.ones((2, 2))}})
    transformation = wing.fr.prox_adam(0.1, wing.fr.l1(0.1))
    with pytest.raises(ValueError, match=reason):  # parameters that were narrowed after init
        transformation.update(params, transformation.init(whole), params)


@each_wing
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_master_copy_trains_half_precision_to_exact_zeros(wing, dtype):
    # Steps of 1e-4 at weights of 1/4 are less than half an ulp of bfloat16 (5e-4): only the copy can take them.
    rng = np.random.default_rng(0)
    params = {"w": rng.choice([-0.25, 0.25], (6, 3)), "b": rng.choice([-0.125, 0.125], 3)}
    sizes = {"w": rng.choice([0.0, 1.0], (6, 3)), "b": np.ones(3)}
    gradients = [
        {k: np.asarray(size * rng.choice([-0.0625, 0.0625], size.shape)) for k, size in sizes.items()}
        for _ in range(150)
    ]
    master = torch.float32 if wing is TORCH else jnp.float32
    transformation = wing.fr.prox_adam(1e-3, wing.fr.l1(0.25), master_dtype=master)
    half = wing.array(params, dtype)
    state = transformation.init(half)
    update = _fast(wing, transformation.update)
    whole_steps = _follow(wing, wing.fr.prox_adam(1e-3, wing.fr.l1(0.25)), wing.array(params), gradients, "float32")
    for g, whole in zip(gradients, whole_steps, strict=True):  # noqa: B007
        updates, state = update(wing.array(g, dtype), state, half)
        assert {dtype_name(u) for u in updates.values()} == {"float32"}
        with jax.numpy_dtype_promotion("standard"):  # optax adds updates of another dtype
            half = OPTAX[wing.name].apply_updates(half, updates)
    for leaf in params:
        assert dtype_name(half[leaf]) == dtype
        assert dtype_name(state.mu[leaf]) == dtype_name(state.nu[leaf]) == dtype_name(state.master[leaf]) == "float32"
        got, expected = wing.numpy(half)[leaf], wing.numpy(whole)[leaf]
        # the copy walks as float32 parameters do; what the model sees is the copy, rounded
        np.testing.assert_allclose(wing.numpy(state.master)[leaf], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(got, wing.numpy(wing.array(wing.numpy(state.master)[leaf], dtype)))
        np.testing.assert_array_equal(got == 0, expected == 0)
    assert np.all(wing.numpy(half)["b"] == 0)  # they were 1/8, a rate of 1e-3 can do that in 125 steps
    assert np.all((wing.numpy(half)["w"] != 0) & (np.abs(wing.numpy(half)["w"]) < 0.125))


@each_wing
def test_a_master_copy_in_half_precision_is_refused(wing):
    types = torch if wing is TORCH else jnp
    for transformation in (wing.fr.prox_adam, wing.fr.prox_sgd):
        with pytest.raises(ValueError, match="master_dtype must have 32 bits or more, got .*bfloat16"):
            transformation(0.1, wing.fr.l1(0.1), master_dtype=types.bfloat16).init(wing.array({"w": np.ones(2)}))


@each_wing
def test_a_master_dtype_must_be_a_real_floating_one(wing):
    types = torch if wing is TORCH else jnp
    for wrong in (types.int64, types.int32, types.complex64, types.bool if wing is TORCH else types.bool_, "nonsense"):
        with pytest.raises(TypeError, match="prox_adam: master_dtype must be a .*such as .*float32, got"):
            wing.fr.prox_adam(0.1, wing.fr.l1(0.1), master_dtype=wrong)


@each_wing
def test_a_master_dtype_does_not_narrow_a_wider_leaf(wing):
    with wing.precision("float64"):
        params = {"half": wing.array([1.0, 1.0], "float16"), "double": wing.array([0.123456789012], "float64")}
        master = torch.float32 if wing is TORCH else jnp.float32
        zeros = {"half": wing.array([0.0, 0.0], "float16"), "double": wing.array([0.0], "float64")}
        for make, lam in ((wing.fr.prox_sgd, 10.0), (wing.fr.prox_adam, 0.123456789012)):
            transformation = make(1.0, wing.fr.l1(lam), master_dtype=master)
            state = transformation.init(params)
            assert {name: dtype_name(x) for name, x in state.master.items()} == {"half": "float32", "double": "float64"}
            updates, state = transformation.update(zeros, state, params)
            assert {name: dtype_name(x) for name, x in updates.items()} == {"half": "float32", "double": "float64"}
            with jax.numpy_dtype_promotion("standard"):  # optax adds updates of another dtype
                new = OPTAX[wing.name].apply_updates(params, updates)
            assert {name: dtype_name(x) for name, x in new.items()} == {"half": "float16", "double": "float64"}
            assert float(new["double"][0]) == 0


@each_wing
def test_float32_stays_float32_beside_wider_hyper_parameters(wing):
    with wing.precision("float64"):
        wide = wing.array(np.array(0.1), "float64")
        params = wing.array({"w": np.ones((2, 3)), "b": np.ones(())})
        penalty = wing.fr.l1(wide) + wing.fr.group_lasso(wide, axis=-1).on("w")
        transformation = wing.fr.prox_adam(wide, penalty, b1=wide, b2=wide, eps=wide, weight_decay=wide)
        updates, state = _fast(wing, transformation.update)(params, transformation.init(params), params)
        assert {dtype_name(x) for tree in (updates, state.mu, state.nu) for x in tree.values()} == {"float32"}


@each_wing
def test_a_nan_gradient_stays_with_its_coordinate(wing):
    # It can spread to coordinates that never had a gradient, whose metric is a mean over the leaf; to no other.
    params = {"w": np.array([0.5, -0.5, 0.25, 1.0]), "b": np.array([1.0, 2.0])}
    clean = {"w": np.array([0.1, 0.2, -0.3, 0.4]), "b": np.array([0.1, 0.2])}
    bad = {"w": np.array([0.1, np.nan, -0.3, 0.4]), "b": clean["b"]}
    transformation = wing.fr.prox_adam(0.01, wing.fr.l1(0.1))
    *_, expected = _follow(wing, transformation, wing.array(params), [clean, clean], "float32")
    *_, got = _follow(wing, transformation, wing.array(params), [bad, clean], "float32")
    np.testing.assert_array_equal(np.isnan(wing.numpy(got)["w"]), [False, True, False, False])
    keep = [0, 2, 3]
    np.testing.assert_array_equal(wing.numpy(got)["w"][keep], wing.numpy(expected)["w"][keep])
    np.testing.assert_array_equal(wing.numpy(got)["b"], wing.numpy(expected)["b"])


@each_wing
def test_empty_and_scalar_leaves_train_with_the_others(wing):
    params = {"empty": np.zeros((0, 3)), "scalar": np.array(0.5), "idle": np.array(0.5), "w": np.ones((2, 3))}
    gradients = [{"empty": np.zeros((0, 3)), "scalar": np.array(0.1), "idle": np.array(0.0), "w": np.ones((2, 3))}] * 3
    fr = wing.fr
    penalty = fr.l1(0.3) + fr.l2(0.1) + fr.group_lasso(0.1, axis=-1).on(["empty", "w"])
    *_, after = _follow(wing, fr.prox_adam(0.1, penalty), wing.array(params), gradients, "float32")
    after = wing.numpy(after)
    assert after["empty"].shape == (0, 3)
    assert after["scalar"].shape == () and 0 < after["scalar"] < 0.5
    # no gradient ever, but a penalty: it shrinks, by at most the rate a step
    assert 0.2 - 1e-6 <= after["idle"] < 0.5
    assert np.all(np.isfinite(after["w"]))


@each_wing
def test_a_rate_of_zero_moves_nothing(wing):
    # as in the first step of a warmup; float32, where a detour of the prox would show
    params, anchors, importances, gradients = oracles.all_leaves()
    penalty = oracles.all_penalties(wing.fr, wing.array(anchors), wing.array(importances))
    start = wing.array(params)
    transformation = wing.fr.prox_adam(0.0, penalty)
    updates, _ = _fast(wing, transformation.update)(wing.array(gradients[0]), transformation.init(start), start)
    moved = [name for name, u in wing.numpy(updates).items() if np.any(u != 0)]
    assert moved == []


@each_wing
def test_complex_leaves_are_right_or_refused_by_name(wing):
    # A leaf without a penalty; Adam's second moment of it is the mean of |g|^2.
    types = torch if wing is TORCH else jnp
    params = {"w": wing.array(np.ones(2)), "z": types.ones(2, dtype=types.complex64) * (3 + 4j)}
    transformation = wing.fr.prox_adam(0.5, wing.fr.l1(0.1).on("w"))
    try:
        updates, _ = transformation.update(params, transformation.init(params), params)
    except TypeError as error:
        assert "'z'" in str(error)
    else:
        np.testing.assert_allclose(np.asarray(updates["z"]), [-0.3 - 0.4j] * 2, rtol=1e-6)


@each_wing
def test_an_update_can_be_differentiated_in_its_strengths(wing):
    # Through three steps of training, beside a coordinate that never has a gradient.
    with wing.precision("float64"):
        x, start = wing.array((np.array([1.0, 0.0, 2.0]), np.array([0.5, 0.5, 0.2])), "float64")
        loss = lambda params: ((params["w"] * x).sum() - 1) ** 2  # noqa: E731

        def trained(lam):
            transformation = wing.fr.prox_adam(0.1, wing.fr.l1(lam))
            params = {"w": start}
            state = transformation.init(params)
            for _ in range(3):
                updates, state = transformation.update(wing.grad(loss)(params), state, params)
                params = OPTAX[wing.name].apply_updates(params, updates)
            return loss(params)

        at = lambda lam: wing.array(np.array(lam), "float64")  # noqa: E731
        slope = float(_fast(wing, wing.grad(trained))(at(0.1)))
        trained = _fast(wing, trained)
        difference = (float(trained(at(0.1 + 1e-5))) - float(trained(at(0.1 - 1e-5)))) / 2e-5
    assert abs(difference) > 1e-3
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_parameters_and_state_can_be_donated():
    # A buffer that is in both could not be. The copy of a leaf that is float32 already is a copy all the same.
    for master in (None, jnp.float32):
        params = JAX.array({"w": np.ones(3)})
        transformation = JAX.fr.prox_adam(0.1, JAX.fr.l1(0.1), master_dtype=master)

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def step(grads, state, params, transformation=transformation):
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = transformation.init(params)
        for _ in range(3):
            params, state = step(JAX.array({"w": np.ones(3)}), state, params)
        assert step._cache_size() == 1
        assert np.all(np.asarray(params["w"]) < 0.8)


@each_wing
def test_a_tree_that_is_one_bare_array_trains(wing):
    params = wing.array(np.array([0.5, -0.5]))
    transformation = wing.fr.prox_adam(0.1, wing.fr.l1(0.3))
    updates, _ = _fast(wing, transformation.update)(params, transformation.init(params), params)
    np.testing.assert_allclose(wing.numpy(params + updates), [0.34, -0.34], atol=1e-6)  # .5 - .1 - .1 * .3 / .5


@each_wing
@pytest.mark.parametrize(
    "name, value",
    [("learning_rate", -0.1), ("b1", 1.0), ("b2", -0.1), ("b2", 1.5), ("eps", -1e-8), ("weight_decay", -1.0)],
)
def test_hyper_parameters_out_of_their_domain_are_refused(wing, name, value):
    arguments = {"learning_rate": 0.1, "penalty": wing.fr.l1(0.1)}
    with pytest.raises(ValueError, match=rf"prox_adam: {name} must be .*, got {value:g}"):
        wing.fr.prox_adam(**{**arguments, name: value})
    with pytest.raises(ValueError, match=rf"prox_adam: {name} must be .*, got {value:g}"):
        wing.fr.prox_adam(**{**arguments, name: wing.array(np.array(value))})


@each_wing
@pytest.mark.parametrize("name", ["b1", "b2", "eps", "weight_decay", "momentum"])
def test_what_takes_no_schedule_says_so_by_name(wing, name):
    make = wing.fr.prox_sgd if name == "momentum" else wing.fr.prox_adam
    with pytest.raises(TypeError, match=rf"{make.__name__}: {name} must be a real number or a 0-d array, got <fun"):
        make(0.1, wing.fr.l1(0.1), **{name: lambda count: 0.9})
    imaginary = torch.tensor(1j) if wing is TORCH else jnp.asarray(1j)
    for wrong in (imaginary, 1j, True, "0.9"):
        with pytest.raises(TypeError, match=f"{make.__name__}: {name} must be a real number"):
            make(0.1, wing.fr.l1(0.1), **{name: wrong})


@each_wing
@pytest.mark.parametrize("transformation", ["prox_adam", "prox_sgd"])
def test_the_result_of_a_schedule_is_checked_by_name(wing, transformation):
    params = wing.array({"w": np.ones(2)})
    make = getattr(wing.fr, transformation)
    for wrong, error, text in (
        (None, TypeError, "None"),
        ("0.1", TypeError, "'0.1'"),
        (wing.array([0.1, 0.1]), TypeError, ""),
        (-0.1, ValueError, "-0.1"),
        (wing.array(np.array(-0.1)), ValueError, "-0.1"),
        (float("nan"), ValueError, "nan"),
    ):
        rule = make(lambda count, wrong=wrong: wrong, wing.fr.l1(0.1))
        state = rule.init(params)
        message = rf"{transformation}: the result of the schedule learning_rate must be .*, got .*{text}"
        with pytest.raises(error, match=message):
            rule.update(params, state, params)


@each_wing
@pytest.mark.parametrize("name", ["b1", "b2"])
def test_a_decay_of_zero_has_its_derivative(wing, name):
    with wing.precision("float64"):
        start, target = (wing.array(np.linspace(*ends, 6), "float64") for ends in ((-1, 1), (0.3, -2)))

        def run(decay):
            rule = wing.fr.prox_adam(0.1, wing.fr.l1(0.3), **{"b1": 0.9, "b2": 0.99, name: decay})
            state, w = rule.init(start), start
            for _ in range(3):
                updates, state = rule.update(w - target, state, w)
                w = w + updates
            return (w**2).sum()

        number = lambda value: wing.leaf(np.array(value), "float64")  # noqa: E731
        slope = float(_fast(wing, wing.grad(run))(number(0.0)))
        quotient = (float(run(number(1e-6))) - float(run(number(0.0)))) / 1e-6
        assert abs(slope) > 1e-3
        assert slope == pytest.approx(quotient, rel=1e-4)


@each_wing
def test_a_sum_without_a_prox_is_refused_at_init(wing):
    params = wing.array({"w": np.ones((2, 3))})
    penalty = wing.fr.group_lasso(0.1, axis=-1) + wing.fr.group_lasso(0.1, axis=-2)
    with pytest.raises(wing.fr.NoProxError, match="group_lasso and group_lasso .* 'w'"):
        wing.fr.prox_adam(0.1, penalty).init(params)


# --- inside optax's own wrappers ---


def _small():
    rng = np.random.default_rng(0)
    return {"w": rng.normal(size=(4, 3)) / 4, "b": rng.normal(size=3)}


def _assert_same(got, expected, tolerance=2e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), got, expected)


@pytest.mark.relaxed_promotion  # optax's wrappers mix dtypes
def test_it_works_in_masked():
    fr, params = JAX.fr, _small()
    gradients = _random_gradients(params, 10)
    start = JAX.array(params)
    masked = optax.masked(fr.prox_adam(0.05, fr.l1(0.2).on("w")), {"w": True, "b": False})
    *_, got = _follow(JAX, masked, start, gradients, "float32")
    *_, alone = _follow(
        JAX, fr.prox_adam(0.05, fr.l1(0.2)), {"w": start["w"]}, [{"w": g["w"]} for g in gradients], "float32"
    )
    np.testing.assert_array_equal(got["w"], alone["w"])
    assert np.any(np.asarray(got["w"]) == 0)
    np.testing.assert_allclose(got["b"], params["b"] + sum(g["b"] for g in gradients), atol=1e-6)  # masked: passed on


@pytest.mark.relaxed_promotion
def test_it_works_in_partition():
    fr, params = JAX.fr, _small()
    gradients = _random_gradients(params, 10)
    start = JAX.array(params)
    labels = {"w": "sparse", "b": "plain"}
    parted = optax.partition({"sparse": fr.prox_adam(0.05, fr.l1(0.2).on("w")), "plain": optax.adam(0.05)}, labels)
    *_, got = _follow(JAX, parted, start, gradients, "float32")
    *_, whole = _follow(JAX, fr.prox_adam(0.05, fr.l1(0.2).on("w")), start, gradients, "float32")
    _assert_same(got, whole, 4e-6)  # optax's adam on b: an error of 7e-6 of each of ten steps of 0.05
    assert np.any(np.asarray(got["w"]) == 0)


@each_wing
@pytest.mark.relaxed_promotion
def test_it_works_last_in_a_chain(wing):
    fr, o, params = wing.fr, OPTAX[wing.name], _small()
    gradients = _random_gradients(params, 10)
    start = wing.array(params)
    chained = o.chain(o.clip_by_global_norm(0.1), fr.prox_adam(0.05, fr.l1(0.2)))
    *_, got = _follow(wing, chained, start, gradients, "float32")
    clipped = []
    for g in gradients:
        norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        clipped.append({k: x * min(1, 0.1 / norm) for k, x in g.items()})
    *_, expected = _follow(wing, fr.prox_adam(0.05, fr.l1(0.2)), start, clipped, "float32")
    _assert_same(wing.numpy(got), wing.numpy(expected), 1e-5)  # eight bits of the clipped gradients: the scales differ
    np.testing.assert_array_equal(wing.numpy(got)["w"] == 0, wing.numpy(expected)["w"] == 0)
    assert np.any(wing.numpy(got)["w"] == 0)


@each_wing
@pytest.mark.relaxed_promotion
def test_it_works_in_multi_steps(wing):
    fr, o, params = wing.fr, OPTAX[wing.name], _small()
    gradients = _random_gradients(params, 12)
    start = wing.array(params)
    transformation = o.MultiSteps(fr.prox_adam(0.05, fr.l1(0.2)), 3).gradient_transformation()
    *_, got = _follow(wing, transformation, start, gradients, "float32")
    means = [
        {k: np.mean([g[k] for g in gradients[i : i + 3]], axis=0) for k in params} for i in range(0, len(gradients), 3)
    ]
    *_, expected = _follow(wing, fr.prox_adam(0.05, fr.l1(0.2)), start, means, "float32")
    _assert_same(wing.numpy(got), wing.numpy(expected), 1e-6)
    assert np.any(wing.numpy(got)["w"] == 0)


@pytest.mark.relaxed_promotion
def test_it_works_in_inject_hyperparams():
    fr, params = JAX.fr, _small()
    gradients = _random_gradients(params, 10)
    start = JAX.array(params)
    *_, expected = _follow(JAX, fr.prox_adam(0.05, fr.l1(0.2), weight_decay=0.1), start, gradients, "float32")

    direct = optax.inject_hyperparams(fr.prox_adam)(learning_rate=0.05, penalty=fr.l1(0.2), weight_decay=0.1)
    state = direct.init(start)
    assert {"learning_rate", "b1", "b2", "eps", "weight_decay"} <= set(state.hyperparams)
    *_, got = _follow(JAX, direct, start, gradients, "float32")
    _assert_same(got, expected, 1e-6)

    @optax.inject_hyperparams
    def make(learning_rate, lam):
        return fr.prox_adam(learning_rate, fr.l1(lam), weight_decay=0.1)

    injected = make(learning_rate=0.05, lam=0.0)
    state = injected.init(start)
    state.hyperparams["lam"] = jnp.float32(0.2)  # strengths change between steps without another trace
    p, update = start, jax.jit(injected.update)
    for g in gradients:
        updates, state = update(JAX.array(g), state, p)
        p = optax.apply_updates(p, updates)
    _assert_same(p, expected, 1e-6)
    assert update._cache_size() == 1

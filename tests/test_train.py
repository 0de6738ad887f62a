"""One pure step, and ensembles of it: members under vmap are the members one by one."""

import functools
from contextlib import nullcontext
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import funcreg.jax
import funcreg.torch
from cases import CASES
from wings import JAX, TORCH, each_wing, inductor

MEMBERS, STEPS, EXAMPLES = 32, 3, 6
SHAPES = {"kernel": (2, 3, 2, 4), "matrix": (3, 4)}
PROX = [case for case in CASES if case.record.has_prox]
GRAD = [case for case in CASES if case.record.has_gradient]


def optax_of(wing):
    return wing.fr.optax if wing is TORCH else optax


def descend(wing, *transformations):
    o = optax_of(wing)
    return lambda hyper: o.chain(*(t(hyper) for t in transformations), o.scale_by_learning_rate(hyper["lr"]))


# How a penalty takes part: a loss that knows the hyper-parameters, and what makes the transformation from them.
PROXIMAL = {
    "prox_sgd": lambda wing, at: lambda h: wing.fr.prox_sgd(h["lr"], at(h)),
    "prox_sgd momentum": lambda wing, at: lambda h: wing.fr.prox_sgd(h["lr"], at(h), momentum=h["momentum"]),
    "prox_sgd nesterov": lambda wing, at: lambda h: wing.fr.prox_sgd(h["lr"], at(h), h["momentum"], nesterov=True),
    "prox_adam": lambda wing, at: lambda h: wing.fr.prox_adam(h["lr"], at(h), b1=h["momentum"], weight_decay=0.1),
}
ADDED = {
    "coupled": lambda wing, at: descend(
        wing, lambda h: wing.fr.add_penalty_gradient(at(h)), lambda h: optax_of(wing).scale_by_adam()
    ),
    "decoupled": lambda wing, at: descend(
        wing, lambda h: optax_of(wing).scale_by_adam(), lambda h: wing.fr.add_penalty_gradient(at(h))
    ),
    "penalize": lambda wing, at: descend(wing, lambda h: optax_of(wing).scale_by_adam()),
}
# prox_adam with every penalty and every set of options. The others hand the penalty to the same two methods: one is
# a sum of entries, the other a sum of parts, in groups.
FEW = [next(case for case in CASES if case.record.factory == name) for name in ("l1", "sparse_group_lasso")]
QUICK = [*FEW, *(case for case in CASES if case.name in ("group_lasso middle axes", "group_lasso per input"))]
COMBINATIONS = [
    pytest.param(name, case, marks=() if case in QUICK else pytest.mark.slow, id=f"{name}-{case}")
    for names, cases in ((PROXIMAL, PROX), (ADDED, GRAD))
    for name in names
    for case in cases
    if name == "prox_adam" or case in FEW
]


def problem(wing, dtype="float64", members=MEMBERS):
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((members, *shape)) for name, shape in SHAPES.items()}
    for x in params.values():
        x[:, 0] = 0.0
    hyper = {
        "lr": np.geomspace(1e-3, 1e-1, members),
        "strength": np.geomspace(1e-3, 1e0, members),
        "momentum": np.linspace(0.5, 0.95, members),
    }
    batch = {name: rng.standard_normal((EXAMPLES, *shape)) for name, shape in SHAPES.items()}
    return wing.array(params, dtype), wing.array(hyper, dtype), wing.array(batch, dtype)


def distance(params, batch):
    return sum(
        (0.5 * (params[name] - batch[name]) ** 2).sum(list(range(1, batch[name].ndim))) for name in SHAPES
    ).mean()


def jax_distance(params, batch):
    flat = [(0.5 * (params[name][None] - batch[name]) ** 2).reshape(EXAMPLES, -1).sum(1) for name in SHAPES]
    return sum(flat).mean()


def loss_of(wing):
    return distance if wing is TORCH else jax_distance


def one_by_one(wing, init, step, params, hyper, batches):
    """The Python loop over the members that `ensemble` stands for."""
    step = wing.quick(step)
    ends, measured = [], []
    for member, own in zip(wing.fr.unstack(params), wing.fr.unstack(hyper), strict=True):
        state = init(member, own)
        metrics = []
        for batch in batches:
            state, values = step(state, own, *batch)
            metrics.append(values)
        ends.append(state)
        measured.append(metrics)
    return ends, measured


def assert_near(wing, got, want, bound):
    got, want = wing.fr.to_flat(got), wing.fr.to_flat(want)
    assert got.keys() == want.keys() and got
    for name, x in got.items():
        x, y = wing.numpy(x).astype(float), wing.numpy(want[name]).astype(float)
        assert x.shape == y.shape
        assert np.all(np.abs(x - y) <= bound * np.maximum(1, np.abs(y))), name


@pytest.mark.relaxed_promotion  # optax mixes dtypes
@each_wing
@pytest.mark.parametrize(("how", "case"), COMBINATIONS)
def test_members_are_trained_as_if_alone(wing, how, case):
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)

        def at(h):
            penalty = case.make(wing.fr, *(h["strength"] * s for s in case.strengths))
            return penalty.on("kernel") if "middle axes" in case.name else penalty

        loss = loss_of(wing)
        if how == "penalize":

            def loss(params, batch, hyper):
                return wing.fr.penalize(loss_of(wing), at(hyper), parts=True)(params, batch)

        init, step = wing.fr.train_step(loss, {**PROXIMAL, **ADDED}[how](wing, at))
        ends, _ = one_by_one(wing, init, step, params, hyper, [(batch,)] * STEPS)
        init, step = wing.fr.ensemble(init, step, compiled=wing is JAX)  # inductor takes ten seconds each
        state = init(params, hyper)
        for _ in range(STEPS):
            state, metrics = step(state, hyper, batch)
        assert_near(wing, state, wing.fr.stack(ends), 1e-12)
        # the strengths and rates matter: no two members end at the same point
        assert len({x.tobytes() for x in wing.numpy(state.params["matrix"])}) == MEMBERS
        assert metrics["loss"].shape == (MEMBERS,)


@pytest.mark.relaxed_promotion  # optax mixes dtypes
@each_wing
def test_metrics_keep_the_bare_loss_apart(wing):
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)
        member, own = wing.fr.unstack(params)[3], wing.fr.unstack(hyper)[3]
        bare = wing.numpy(loss_of(wing)(member, batch))
        l1 = wing.fr.l1(0.3)
        in_loss = wing.numpy(l1.value(member))
        by_prox = wing.numpy(wing.fr.l2(0.7).value(member))
        penalized = wing.fr.penalize(loss_of(wing), l1)

        def parts(params, batch, hyper):
            return wing.fr.penalize(loss_of(wing), wing.fr.l1(hyper["momentum"]), parts=True)(params, batch)

        by_hyper = float(wing.numpy(own["momentum"])) / 0.3 * in_loss
        proximal = lambda h: wing.fr.prox_adam(1e-2, wing.fr.l2(0.7))  # noqa: E731
        scheduled = lambda h: wing.fr.prox_adam(1e-2, lambda count: wing.fr.l2(0.7))  # noqa: E731
        plain = lambda h: optax_of(wing).adam(1e-2)  # noqa: E731
        for loss, make, penalty in [
            (loss_of(wing), plain, None),
            (penalized, plain, in_loss),
            (parts, plain, by_hyper),
            (loss_of(wing), proximal, by_prox),
            (loss_of(wing), scheduled, by_prox),
            (penalized, proximal, in_loss + by_prox),
        ]:
            init, step = wing.fr.train_step(loss, make)
            _, metrics = wing.quick(step)(init(member, own), own, batch)
            assert metrics.keys() == ({"loss"} if penalty is None else {"loss", "penalty", "objective"})
            np.testing.assert_allclose(wing.numpy(metrics["loss"]), bare, rtol=1e-14)
            if penalty is not None:
                np.testing.assert_allclose(wing.numpy(metrics["penalty"]), penalty, rtol=1e-14)
                np.testing.assert_allclose(wing.numpy(metrics["objective"]), bare + penalty, rtol=1e-14)


@each_wing
def test_a_step_is_the_gradient_the_update_and_their_sum(wing):
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)
        member, own = wing.fr.unstack(params)[5], wing.fr.unstack(hyper)[5]
        make = PROXIMAL["prox_adam"](wing, lambda h: wing.fr.l1(h["strength"]))
        init, step = wing.fr.train_step(loss_of(wing), make)
        state, transformation = init(member, own), make(own)
        opt_state = transformation.init(member)
        step, update, grad = wing.quick(step), wing.quick(transformation.update), wing.quick(wing.grad(loss_of(wing)))
        for _ in range(3):
            state, _ = step(state, own, batch)
            updates, opt_state = update(grad(member, batch), opt_state, member)
            member = {name: member[name] + updates[name] for name in member}
        assert_near(wing, state.params, member, 1e-15)
        assert_near(wing, state.opt_state, opt_state, 1e-15)


@each_wing
def test_a_step_changes_none_of_its_arguments(wing):
    params, hyper, batch = problem(wing, "float32")
    init, step = wing.fr.ensemble(
        *wing.fr.train_step(loss_of(wing), PROXIMAL["prox_adam"](wing, lambda h: wing.fr.l1(h["strength"]))),
        compiled=wing is JAX,
    )
    state = init(params, hyper)
    before = {name: np.array(wing.numpy(x)) for name, x in wing.fr.to_flat(state).items()}
    step(state, hyper, batch)
    for name, x in wing.fr.to_flat(state).items():
        assert np.array_equal(before[name], wing.numpy(x))
    if wing is TORCH:  # nor does training in place change the state, which `init` copied
        params["matrix"].add_(1)
        assert np.array_equal(before["params.matrix"], state.params["matrix"].numpy())


def batch_axes_case(wing, which):
    """(batch_axes, the batch arguments for all members, those of member i)"""
    rng = np.random.default_rng(3)
    x = wing.array(rng.standard_normal((MEMBERS, EXAMPLES, 4)), "float64")
    y = wing.array(rng.standard_normal((EXAMPLES, 3)), "float64")
    last = wing.array(rng.standard_normal((EXAMPLES, 3, MEMBERS)), "float64")
    return {
        "bagging": (0, (x,), lambda i: (x[i],)),
        "some shared": ((0, None), (x, y), lambda i: (x[i], y)),
        "last axis": ((0, 2), (x, last), lambda i: (x[i], last[..., i])),
    }[which]


@each_wing
@pytest.mark.parametrize(
    ("which", "chunk", "donate"),
    [
        *(("bagging", *how) for how in ((None, False), (5, False), (5, True), (16, False), (100, True))),
        *((which, *how) for which in ("some shared", "last axis") for how in ((None, False), (5, True))),
    ],
)
def test_batches_shared_and_per_member_in_chunks(wing, which, chunk, donate):
    with wing.precision("float64"):
        axes, batch, of_member = batch_axes_case(wing, which)
        params, hyper, _ = problem(wing)
        params = {"matrix": params["matrix"]}

        def loss(params, x, y=None):
            prediction = x @ params["matrix"].T
            return ((prediction if y is None else prediction - y) ** 2).mean()

        make = PROXIMAL["prox_adam"](wing, lambda h: wing.fr.l1(h["strength"]))
        init, step = wing.fr.train_step(loss, make)
        ends = []
        for i, (member, own) in enumerate(zip(wing.fr.unstack(params), wing.fr.unstack(hyper), strict=True)):
            state = init(member, own)
            for _ in range(2):
                state, _ = step(state, own, *of_member(i))
            ends.append(state)
        init, step = wing.fr.ensemble(init, step, batch_axes=axes, chunk=chunk, compiled=wing is JAX, donate=donate)
        state = init(params, hyper)
        for _ in range(2):
            state, metrics = step(state, hyper, *batch)
        assert_near(wing, state, wing.fr.stack(ends), 1e-12)
        assert metrics["objective"].shape == (MEMBERS,)


@each_wing
def test_extra_is_carried(wing):
    """A running mean in the loss, as batch norm keeps it; the loss may overwrite what it gets."""
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)

        def loss(params, extra, batch):
            mean = 0.9 * extra["mean"] + 0.1 * batch["matrix"].mean()
            value = loss_of(wing)(params, batch) + mean
            if wing is TORCH:
                extra["mean"].copy_(mean.detach())
                return value, extra
            return value, {"mean": mean}

        init, step = wing.fr.train_step(loss, lambda h: wing.fr.prox_sgd(h["lr"], wing.fr.l1(h["strength"])), True)
        init, step = wing.fr.ensemble(init, step, compiled=wing is JAX)
        extra = wing.array({"mean": np.arange(float(MEMBERS))}, "float64")
        state = init(params, hyper, extra)
        later = state
        for _ in range(2):
            later, _ = step(later, hyper, batch)
        at = 0.1 * wing.numpy(batch["matrix"]).mean()
        want = 0.9 * (0.9 * np.arange(MEMBERS) + at) + at
        np.testing.assert_allclose(wing.numpy(later.extra["mean"]), want, rtol=1e-14)
        assert np.array_equal(wing.numpy(state.extra["mean"]), np.arange(MEMBERS))


@each_wing
def test_one_number_for_all_members(wing):
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)
        make = lambda h: wing.fr.prox_adam(h["lr"], wing.fr.l1(h["strength"]))  # noqa: E731
        ends = []
        for lr in (0.01, np.float64(0.01), wing.array(np.asarray(0.01), "float64"), np.full(MEMBERS, 0.01)):
            init, step = wing.fr.ensemble(*wing.fr.train_step(loss_of(wing), make), compiled=wing is JAX)
            own = {"lr": lr, "strength": hyper["strength"]}
            ends.append(step(init(params, own), own, batch)[0])
        for end in ends[1:]:
            assert_near(wing, end, ends[0], 0)


@each_wing
def test_a_penalty_may_be_a_hyper_parameter(wing):
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)
        by_lam = wing.fr.ensemble(
            *wing.fr.train_step(loss_of(wing), lambda h: wing.fr.prox_adam(0.01, wing.fr.l1(h["lam"]))),
            compiled=wing is JAX,
        )
        lams = {"lam": hyper["strength"]}
        want, _ = by_lam[1](by_lam[0](params, lams), lams, batch)
        init, step = wing.fr.ensemble(
            *wing.fr.train_step(loss_of(wing), lambda h: wing.fr.prox_adam(0.01, h["penalty"])), compiled=wing is JAX
        )
        penalties = {"penalty": wing.vmap(wing.fr.l1)(hyper["strength"])}
        got, _ = step(init(params, penalties), penalties, batch)
        assert_near(wing, got, want, 0)


@pytest.mark.slow
@each_wing
def test_a_compiled_step_is_compiled_once(wing):
    """New hyper-parameters, states and batches of the same shapes run the program that is there."""
    params, hyper, batch = problem(wing, "float32", members=3)
    traces = []

    def loss(params, batch):
        if wing is JAX:
            traces.append(1)  # JAX runs the Python of a function when it traces it, and never again
        return loss_of(wing)(params, batch)

    pair = wing.fr.train_step(loss, lambda h: wing.fr.prox_adam(h["lr"], wing.fr.l1(h["strength"])))
    init, step = wing.fr.ensemble(*pair)
    donating = wing.fr.ensemble(*pair, donate=True)[1]
    eager = wing.fr.ensemble(*pair, compiled=False)[1]
    with inductor() if wing is TORCH else nullcontext():
        torch._dynamo.utils.counters.clear()
        state = slow = init(params, hyper)
        step(state, {**hyper, "lr": 0.5}, batch)
        traced = len(traces)
        for i in range(4):
            own = {"lr": 0.01 * (i + 1), "strength": hyper["strength"] / (i + 1), "momentum": hyper["momentum"]}
            state, _ = step(state, own, batch)
            if wing is TORCH:
                assert all(x.is_contiguous() and x.stride(0) > 0 for x in jax.tree.leaves(state))
        assert len(traces) == traced
        if wing is TORCH:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        for i in range(4):
            own = {"lr": 0.01 * (i + 1), "strength": hyper["strength"] / (i + 1), "momentum": hyper["momentum"]}
            slow, _ = eager(slow, own, batch)
        assert_near(wing, state, slow, 1e-6)
        # in the memory of the state that is passed in
        want, _ = eager(state, hyper, batch)
        before = [x.data_ptr() if wing is TORCH else x for x in jax.tree.leaves(state)]
        after, _ = donating(state, hyper, batch)
        assert_near(wing, after, want, 1e-6)
        for x, old in zip(jax.tree.leaves(after), before, strict=True):
            assert x.data_ptr() == old if wing is TORCH else old.is_deleted()


@each_wing
@pytest.mark.parametrize("chunk", [None, 2])
def test_donating_a_state_whose_leaves_change_places(wing, chunk):
    """The new `extra` is the old parameter, in whose memory the new one is written."""
    params = wing.array({"w": np.arange(12.0).reshape(3, 4)})

    def loss(params, extra, x):
        return ((params["w"] - x) ** 2).sum(), {"before": params["w"]}

    pair = wing.fr.train_step(loss, lambda h: optax_of(wing).sgd(0.1), has_extra=True)
    x, ends = wing.array(np.ones(4)), []
    for donate in (False, True):
        init, step = wing.fr.ensemble(*pair, chunk=chunk, compiled=wing is JAX, donate=donate)
        state = init(params, {}, {"before": params["w"] * 0})
        for _ in range(3):
            state, _ = step(state, {}, x)
        ends.append(state)
    assert_near(wing, ends[1], ends[0], 0)


@each_wing
def test_penalties_around_penalties_all_count(wing):
    with wing.precision("float64"):
        params, hyper, batch = problem(wing)
        member, own = wing.fr.unstack(params)[3], wing.fr.unstack(hyper)[3]
        fr, bare = wing.fr, loss_of(wing)
        inner, outer = fr.l1(0.3), fr.l2(0.7)
        want = wing.numpy(bare(member, batch)) + wing.numpy((inner + outer).value(member))

        def parts(params, batch):
            return fr.penalize(bare, inner, parts=True)(params, batch)

        for loss in (fr.penalize(fr.penalize(bare, inner), outer), fr.penalize(parts, outer)):
            init, step = fr.train_step(loss, lambda h: fr.optax.sgd(0.1) if wing is TORCH else optax.sgd(0.1))
            state, metrics = step(init(member, own), own, batch)
            np.testing.assert_allclose(wing.numpy(metrics["loss"]), wing.numpy(bare(member, batch)), rtol=1e-14)
            np.testing.assert_allclose(wing.numpy(metrics["objective"]), want, rtol=1e-14)
            moved = wing.numpy(member["matrix"]) - 0.1 * wing.numpy(
                wing.grad(lambda p: bare(p, batch) + (inner + outer).value(p))(member)["matrix"]
            )
            np.testing.assert_allclose(wing.numpy(state.params["matrix"]), moved, rtol=1e-12, atol=1e-14)


@each_wing
def test_hyper_reaches_a_loss_that_asks_for_it(wing):
    params, hyper, batch = problem(wing, "float32", members=1)
    member = wing.fr.unstack(params)[0]

    def scaled(params, batch, hyper):
        return loss_of(wing)(params, batch) * hyper["scale"]

    def loss(of):
        init, step = wing.fr.train_step(of, lambda h: wing.fr.prox_sgd(0.1, wing.fr.l1(0.1)))
        own = {"scale": 2.0}
        return float(wing.numpy(step(init(member, own), own, batch)[1]["loss"]))

    bare = float(wing.numpy(loss_of(wing)(member, batch)))
    assert loss(scaled) == pytest.approx(2 * bare)
    assert loss(functools.partial(scaled, hyper={"scale": 100.0})) == pytest.approx(100 * bare)
    with pytest.raises(TypeError, match="put the parameter hyper after the batch"):
        wing.fr.train_step(lambda params, hyper, batch: scaled(params, batch, hyper), lambda h: None)


@each_wing
def test_a_batch_that_fails_fixes_no_shape(wing):
    params, hyper, batch = problem(wing, "float32", members=2)
    pair = wing.fr.train_step(loss_of(wing), lambda h: wing.fr.prox_sgd(0.1, wing.fr.l1(0.1)))
    init, step = wing.fr.ensemble(*pair, compiled=wing is JAX)
    state = init(params, hyper)
    wrong = wing.array({name: np.ones((EXAMPLES, *SHAPES[name][:-1], 9)) for name in SHAPES})
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        step(state, hyper, wrong)
    step(state, hyper, batch)
    more = {**batch, "other": batch["matrix"]}
    refused(wing, lambda: step(state, hyper, more), ValueError, "'other'.* but the first one had")


@pytest.mark.slow
def test_many_ensembles_in_one_process():
    """torch.compile allows eight programs for one code object; every number of members and every loss is one."""
    fr = funcreg.torch
    torch._dynamo.reset()
    for i in range(9):
        pair = fr.train_step(lambda p, x: ((p["w"] * x) ** 2).sum(), lambda h: fr.prox_sgd(h["lr"], fr.l1(0.1)))
        init, step = fr.ensemble(*pair)
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="eager", options=None)):
            state = init({"w": torch.ones(i + 1, i + 2)}, {"lr": 0.1})
            state, metrics = step(state, {"lr": 0.1}, torch.ones(i + 2))
        # the gradient at 1 is 2, and the threshold 0.1 * 0.1
        torch.testing.assert_close(state.params["w"], torch.full((i + 1, i + 2), 1 - 0.1 * 2 - 0.01))
        assert metrics["loss"].tolist() == [i + 2] * (i + 1)


@pytest.mark.parametrize("second", [jnp.full(3, 0.1), jnp.asarray(0.1), 0.1, np.full(3, 0.1, np.float32)])
def test_weak_types_do_not_trace_again(second):
    traces = []

    def loss(params, x):
        traces.append(1)
        return ((params["w"] * x) ** 2).sum()

    fr = funcreg.jax
    init, step = fr.ensemble(*fr.train_step(loss, lambda h: fr.prox_adam(h["lr"], fr.l1(0.1))))
    hyper = {"lr": jnp.array([0.1, 0.2, 0.3])}
    state, _ = step(init({"w": jnp.full((3, 4), 1.0)}, hyper), hyper, jnp.ones(4))
    traced = len(traces)
    state, _ = step(state, {"lr": second}, jnp.ones(4))
    step(state, hyper, jnp.ones(4))
    assert len(traces) == traced


@each_wing
def test_stack_and_unstack_are_inverse(wing):
    trees = [wing.array({"a": np.full((2, 3), float(i)), "b": [np.full(4, -i)]}) for i in range(3)]
    stacked = wing.fr.stack(trees)
    assert stacked["a"].shape == (3, 2, 3) and stacked["b"][0].shape == (3, 4)
    for tree, back in zip(trees, wing.fr.unstack(stacked), strict=True):
        assert_near(wing, back, tree, 0)


# --- what is refused, before anything runs ---


def refused(wing, call, error, message):
    with pytest.raises(error, match=message):
        call()


@each_wing
def test_unequal_members_are_refused_by_name(wing):
    params, hyper, batch = problem(wing, "float32", members=4)
    init, step = wing.fr.ensemble(
        *wing.fr.train_step(loss_of(wing), PROXIMAL["prox_adam"](wing, lambda h: wing.fr.l1(h["strength"]))),
        compiled=wing is JAX,
    )
    short = {**params, "matrix": params["matrix"][:3]}
    refused(wing, lambda: init(short, hyper), ValueError, "params 'kernel' has 4 members, but params 'matrix' has 3")
    few = {**hyper, "lr": hyper["lr"][:2]}
    refused(wing, lambda: init(params, few), ValueError, "params 'kernel' has 4 members, but hyper 'lr' has 2")
    state = init(params, hyper)
    refused(wing, lambda: step(state, few, batch), ValueError, "has 4 members, but hyper 'lr' has 2")
    empty = {name: x[:0] for name, x in params.items()}
    refused(wing, lambda: init(empty, {k: v[:0] for k, v in hyper.items()}), ValueError, "0 members")
    refused(wing, lambda: init({}, hyper), ValueError, "found no array in params")
    scalar = {**params, "matrix": wing.array(np.asarray(1.0))}
    refused(wing, lambda: init(scalar, hyper), ValueError, "params 'matrix' has no leading axis member")
    refused(wing, lambda: init({**params, "matrix": 1.0}, hyper), TypeError, "params 'matrix' must be an array")
    negative = {**hyper, "strength": hyper["strength"] - 2 * hyper["strength"][1]}
    with pytest.raises(ValueError, match="lam must be >= 0") as caught:
        init(params, negative)
    assert "This is member 0 of the ensemble." in caught.value.__notes__


@each_wing
def test_wrong_batches_are_refused(wing):
    params, hyper, batch = problem(wing, "float32", members=4)
    make = PROXIMAL["prox_adam"](wing, lambda h: wing.fr.l1(h["strength"]))
    pair = wing.fr.train_step(loss_of(wing), make)
    init, step = wing.fr.ensemble(*pair, compiled=wing is JAX)
    state, _ = step(init(params, hyper), hyper, batch)
    last = {name: x[:4] for name, x in batch.items()}
    refused(
        wing, lambda: step(state, hyper, last), ValueError, r"'kernel' has shape \[4, 2, 3, 2, 4\], the first .*\[6"
    )
    step(state, hyper, batch)  # and the ensemble still works
    fr = wing.fr
    for axes, message in [
        (0, r"axis 0 of batch argument 0 'kernel' counts members; it has 6, the parameters 4"),
        ((None, 0), "batch_axes has 2 entries, but the batch has 1"),
        (9, "has no axis 9"),
    ]:
        init, step = fr.ensemble(*pair, batch_axes=axes, compiled=False)
        refused(wing, lambda step=step: step(state, hyper, batch), ValueError, message)
    refused(wing, lambda: fr.ensemble(*pair, batch_axes="0"), TypeError, "batch_axes must be .*got '0'")
    refused(wing, lambda: fr.ensemble(*pair, batch_axes=(0, True)), TypeError, "batch_axes must be")
    refused(wing, lambda: fr.ensemble(*pair, chunk=0), ValueError, "chunk must be >= 1, got 0")
    refused(wing, lambda: fr.ensemble(*pair, chunk=2.0), TypeError, "chunk must be an int or None, got 2.0")


@each_wing
def test_wrong_losses_are_refused(wing):
    params, hyper, batch = problem(wing, "float32", members=1)
    member, own = wing.fr.unstack(params)[0], wing.fr.unstack(hyper)[0]
    make = lambda h: wing.fr.prox_sgd(h["lr"], wing.fr.l1(0.1))  # noqa: E731
    good = loss_of(wing)

    def step_of(loss, has_extra=False, extra=()):
        init, step = wing.fr.train_step(loss, make, has_extra)
        state = init(member, own, extra) if has_extra else init(member, own)
        return lambda: step(state, own, batch)

    start = wing.array({"mean": np.zeros(2)})
    refused(wing, step_of(lambda p, b: p["matrix"]), TypeError, r"scalar array, got shape \(3, 4\)")
    refused(wing, step_of(lambda p, b: (good(p, b), start)), TypeError, "has_extra=True if it returns")
    refused(wing, step_of(lambda p, e, b: good(p, b), True, start), TypeError, r"must return \(scalar, new_extra\)")
    other = wing.array({"mean": np.zeros(3)})
    refused(
        wing, step_of(lambda p, e, b: (good(p, b), other), True, start), ValueError, r"'mean' was float32\[2\] and is"
    )
    refused(wing, step_of(lambda p, e, b: (good(p, b), {}), True, start), ValueError, "'mean' was .* and is not there")
    init, _ = wing.fr.train_step(good, make, True)
    refused(wing, lambda: init(member, own), TypeError, "init got no extra")
    init, _ = wing.fr.train_step(good, make)
    refused(wing, lambda: init(member, own, start), TypeError, "has_extra=False")
    refused(wing, lambda: wing.fr.train_step(3, make), TypeError, "loss must be a function")
    refused(wing, lambda: wing.fr.train_step(good, make(own)), TypeError, "make must be a function hyper -> transf")
    init, _ = wing.fr.train_step(good, lambda h: 3)
    refused(wing, lambda: init(member, own), TypeError, "make must return a transformation")
    refused(wing, lambda: wing.fr.stack([]), ValueError, "stack: got an empty list")
    refused(wing, lambda: wing.fr.stack(start), TypeError, "members must be a list of trees, got dict")
    refused(wing, lambda: wing.fr.stack([{"a": "x"}]), TypeError, "the leaf 'a' must be an array, got 'x'")
    whole = {**member, "n": wing.leaf(np.zeros(2), "int32")}
    init, step = wing.fr.train_step(good, make)
    refused(wing, lambda: init(whole, own), TypeError, r"leaf 'n' of params is no trainable .*int32\[2\]")
    refused(wing, lambda: step(member, own, batch), TypeError, "state must be a TrainState, .* got dict")
    with pytest.raises(KeyError) as caught:
        init(member, {})
    assert "make was called with hyper = a dict with nothing; the arguments are init" in caught.value.__notes__[0]
    with pytest.raises(TypeError) as caught:
        step(init(member, own), wing.leaf(np.zeros((2, 3)), "float32"))  # a batch in the place of hyper
    said = "hyper = an array of shape (2, 3); the arguments are init(params, hyper) and step(state, hyper, *batch)"
    assert said in caught.value.__notes__[0]
    init, _ = wing.fr.ensemble(init, step, compiled=False)
    members = wing.fr.stack([member])
    refused(wing, lambda: init(members, {"lr": "x"}), TypeError, "hyper 'lr' must be an array or a number, got 'x'")
    unequal = [wing.array({"a": np.zeros(2)}), wing.array({"a": np.zeros(3)})]
    refused(
        wing,
        lambda: wing.fr.stack(unequal),
        ValueError,
        r"'a' is float32\[2\] in member 0 and float32\[3\] in member 1",
    )


def test_parameters_of_a_module_do_not_record_the_run():
    net = torch.nn.Linear(4, 3)
    init, step = funcreg.torch.train_step(
        lambda p, x: torch.func.functional_call(net, p, (x,)).square().mean(),
        lambda h: funcreg.torch.prox_adam(0.01, funcreg.torch.l1(0.1)),
    )
    state = init(funcreg.torch.params(net), {})
    state, _ = step(state, {}, torch.ones(2, 4))
    assert not any(x.requires_grad for x in state.params.values())


def small_net():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))


@functools.cache
def members_of_batch_norm():
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1)) for _ in range(3)
    ]
    return nets, torch.randn(8, 4), torch.randn(8, 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_batch_norm_of_torch_as_extra(compiled):
    """Statistics that `functional_call` writes into: those of three modules, trained by torch.optim one by one."""
    fr = funcreg.torch
    nets, x, y = members_of_batch_norm()
    params = fr.stack([dict(net.named_parameters()) for net in nets])
    extra = fr.stack([dict(net.named_buffers()) for net in nets])

    def loss(params, extra, x, y):
        out = torch.func.functional_call(nets[0], (params, extra), (x,))
        return (out - y).square().mean(), extra

    init, step = fr.ensemble(*fr.train_step(loss, lambda h: fr.optax.sgd(h["lr"]), has_extra=True), compiled=compiled)
    hyper = {"lr": torch.tensor([0.01, 0.03, 0.1])}
    state = init(params, hyper, extra)
    with inductor():
        for _ in range(3):
            state, _ = step(state, hyper, x, y)
    for i, net in enumerate(nets):
        mirror = small_net()
        mirror.load_state_dict(net.state_dict())
        optimizer = torch.optim.SGD(mirror.parameters(), lr=float(hyper["lr"][i]))
        for _ in range(3):
            optimizer.zero_grad()
            (mirror(x) - y).square().mean().backward()
            optimizer.step()
        for name, value in {**dict(mirror.named_parameters()), **dict(mirror.named_buffers())}.items():
            got = {**state.params, **state.extra}[name][i]
            torch.testing.assert_close(got, value.detach(), rtol=2e-5, atol=2e-6)

"""What composes penalties: sums, multiples, `layerwise`, `anchored`, `custom`; and the Penalty as a pytree."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch._dynamo.testing

from funcreg._rule import NoGradError, NoProxError
from wings import JAX, TORCH, dtype_name, each_wing


def _params(wing, dtype="float32"):
    return wing.array({"hidden": {"weight": np.array([[1.0, -2.0], [0.0, 4.0]]), "bias": np.array([0.5, -1.0])}}, dtype)


def _equal(wing, left, right):
    left, right = wing.numpy(left), wing.numpy(right)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _close(wing, left, right, tolerance=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        wing.numpy(left),
        wing.numpy(right),
    )


def _fast(wing, function):
    """JAX op by op is slow; torch is as fast as it is."""
    return jax.jit(function) if wing is JAX else function


@pytest.fixture
def fresh_dynamo():
    """Dynamo counts recompilations by the code of a test, which all its parameters share."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- sums and multiples ---


@each_wing
def test_values_and_gradients_add(wing):
    fr, params = wing.fr, _params(wing)
    p, q = fr.l1(0.5), fr.l2(0.25)
    total = 2 * p + q.on("*.weight") * 4
    # 2 * 0.5 * (7 + 1.5) + 4 * 0.25 / 2 * 21
    assert float(total.value(params)) == 8.5 + 10.5
    gradient = wing.numpy(total.grad(params))
    np.testing.assert_array_equal(gradient["hidden"]["weight"], [[2, -3], [0, 5]])
    np.testing.assert_array_equal(gradient["hidden"]["bias"], [1, -1])
    assert repr(total) == "2 * l1(0.5) + 4 * l2(0.25) on '*.weight'"


@each_wing
def test_sum_of_a_list(wing):
    fr, params = wing.fr, _params(wing)
    total = sum([fr.l1(0.5), fr.l2(0.25), fr.l1(0.5).on("hidden.bias")])
    assert repr(total) == "l1(0.5) + l2(0.25) + l1(0.5) on 'hidden.bias'"
    assert float(total.value(params)) == 0.5 * 8.5 + 0.125 * 22.25 + 0.75
    p = fr.l1(0.5)
    assert p + 0 is p and 0 + p is p and 0.0 + p is p


def _scalars(wing):
    array = functools.partial(wing.leaf, dtype="float32")
    scalars = {"float": 2.5, "int": 2, "numpy float32": np.float32(2.5), "numpy float64": np.float64(2.5)}
    scalars |= {"numpy int": np.int64(2), "numpy 0-d": np.array(2.5, np.float32), "array": array(np.array(2.5))}
    return scalars


@pytest.mark.parametrize("kind", _scalars(TORCH))
@each_wing
def test_a_penalty_is_multiplied_by_any_scalar_from_both_sides(wing, kind):
    factor = _scalars(wing)[kind]
    params = _params(wing)
    expected = float(factor) * 8.5
    for penalty in (factor * wing.fr.l1(1.0), wing.fr.l1(1.0) * factor, wing.fr.l1(factor)):
        assert type(penalty) is wing.fr.Penalty
        assert float(penalty.value(params)) == expected
        assert dtype_name(penalty.value(params)) == "float32"
        np.testing.assert_array_equal(
            wing.numpy(penalty.grad(params)["hidden"]["bias"]), [float(factor), -float(factor)]
        )
    assert float((factor * (2 * wing.fr.l1(1.0))).value(params)) == 2 * expected
    half = wing.numpy((factor * wing.fr.l1(1.0)).prox(params, 0.5))
    np.testing.assert_array_equal(half["hidden"]["weight"][1], [0, 4 - float(factor) / 2])


@each_wing
def test_a_multiple_reaches_every_part_also_nonlinear_ones(wing):
    def value(x, lam):
        return (lam * x**2).sum() + 1

    def prox(x, step_size, lam):
        return x / (1 + 2 * step_size * lam)

    custom = wing.fr.custom("ridge", value, prox=prox, lam=0.5)
    x = {"w": wing.array([2.0])}
    assert float((3 * custom).value(x)) == 9  # not lam * 3: the value is not proportional to it
    assert float((3 * custom).grad(x)["w"][0]) == 6
    assert float((3 * custom).prox(x, 1.0)["w"][0]) == 0.5
    assert float((3 * (custom + wing.fr.l2(1.0))).prox(x, 1.0)["w"][0]) == pytest.approx(2 / (1 + 3 + 3))


@each_wing
def test_multiplying_by_zero_gives_nothing_and_an_identity(wing):
    params = _params(wing)
    penalty = 0 * (wing.fr.l1(1.0) + wing.fr.l2(1.0))
    assert float(penalty.value(params)) == 0
    _equal(wing, penalty.prox(params, 0.3), params)


@pytest.mark.parametrize("wrong", [True, False, "2", None, [2.0]], ids=repr)
@each_wing
def test_a_penalty_is_multiplied_by_nothing_else(wing, wrong):
    penalty = wing.fr.l1(1.0)
    with pytest.raises(TypeError):
        penalty * wrong
    with pytest.raises(TypeError):
        wrong * penalty


@each_wing
def test_penalties_do_not_multiply_and_arrays_do_not_either(wing):
    penalty = wing.fr.l1(1.0)
    vector = wing.array([1.0, 2.0])
    for wrong in (penalty, vector, np.ones(2)):
        with pytest.raises(TypeError):
            penalty * wrong
        with pytest.raises(TypeError):
            wrong * penalty


@pytest.mark.parametrize("wrong", [1, 0.5, None, "l1", True], ids=repr)
@each_wing
def test_nothing_but_a_penalty_is_added(wing, wrong):
    with pytest.raises(TypeError):
        wing.fr.l1(1.0) + wrong
    with pytest.raises(TypeError):
        wrong + wing.fr.l1(1.0)


def test_penalties_of_two_wings_do_not_mix():
    torch_l1, jax_l1 = TORCH.fr.l1(1.0), JAX.fr.l1(1.0)
    for mix in (
        lambda: torch_l1 + jax_l1,
        lambda: sum([jax_l1, torch_l1]),
        lambda: TORCH.fr.layerwise({"a": torch_l1, "b": jax_l1}),
        lambda: JAX.fr.layerwise({"a": None, "b": jax_l1, "c": torch_l1}),
    ):
        with pytest.raises(TypeError, match="wing"):
            mix()


@pytest.mark.parametrize("factor", [-1, -0.5, float("nan"), float("inf")], ids=str)
@each_wing
def test_a_wrong_factor_is_refused(wing, factor):
    says = "finite" if factor == float("inf") else ">= 0"
    for wrong in (factor, np.float32(factor), wing.leaf(np.array(factor), "float32")):
        with pytest.raises(ValueError, match=f"^penalty: factor must be {says}, got {factor:g}$"):
            wrong * wing.fr.l1(1.0)


@each_wing
def test_multiples_inside_traced_functions(wing, fresh_dynamo):
    params = _params(wing)
    lams = wing.array([0.5, 2.0])

    def left(lam):
        return (lam * wing.fr.l1(1.0) + wing.fr.l2(2.0) * lam).value(params)

    expected = [0.5 * 8.5 + 0.5 * 22.25, 2 * 8.5 + 2 * 22.25]
    np.testing.assert_allclose(wing.numpy(wing.vmap(left)(lams)), expected, rtol=1e-6)
    np.testing.assert_allclose(float(wing.jit(left)(lams[1])), expected[1], rtol=1e-6)
    np.testing.assert_allclose(wing.numpy(wing.jit(wing.vmap(left))(lams)), expected, rtol=1e-6)
    np.testing.assert_allclose(float(wing.grad(left)(lams[0])), 8.5 + 22.25, rtol=1e-6)


# --- the prox of a sum ---


@each_wing
def test_a_sum_without_a_closed_prox_is_refused_with_the_leaf_and_the_parts(wing):
    fr, params = wing.fr, _params(wing)
    penalty = fr.l1(0.1) + fr.l2(0.1) + fr.non_negative().on("*.bias")
    calls = {
        "prox": lambda: penalty.prox(params, 0.1),
        "zero step": lambda: penalty.prox(params, 0.0),
        "init": lambda: fr.prox_adam(0.1, penalty).init(params),
        "sgd": lambda: fr.prox_sgd(0.1, penalty).init(params),
    }
    if wing is JAX:
        calls["traced"] = lambda: jax.eval_shape(penalty.prox, params, 0.1)
    for call in calls.values():
        with pytest.raises(NoProxError, match="sum of l1 and non_negative is not implemented.*'hidden.bias'"):
            call()
    assert issubclass(NoProxError, ValueError) and fr.NoProxError is NoProxError
    _equal(wing, penalty.on("*.weight").prox(params, 0.0), params)  # alone on their leaves


@each_wing
def test_no_prox_error_at_trace_time(wing):
    penalty = wing.fr.group_lasso(0.1, axis=-1) + wing.fr.group_lasso(0.1, axis=-2)
    params = {"w": wing.array(np.ones((2, 2)))}
    if wing is JAX:
        with pytest.raises(NoProxError, match="group_lasso and group_lasso.*'w'"):
            jax.make_jaxpr(penalty.prox)(params, 0.1)
    with pytest.raises(NoProxError, match="group_lasso and group_lasso.*'w'"):
        wing.vmap(penalty.prox, in_axes=(None, 0))(params, wing.array([0.1]))


SUMS = {
    "l1 twice": (lambda fr: fr.l1(0.25) + fr.l1(0.5), lambda fr: fr.l1(0.75)),
    "l2 twice": (lambda fr: fr.l2(0.25) + fr.l2(0.5), lambda fr: fr.l2(0.75)),
    "weighted": (lambda fr: 2 * fr.l1(0.25) + fr.l1(0.5) * 0.5, lambda fr: fr.l1(0.75)),
    "elastic net": (lambda fr: fr.elastic_net(0.5, 0.25), lambda fr: fr.l1(0.5) + fr.l2(0.25)),
    "other order": (lambda fr: fr.l2(0.25) + fr.l1(0.5), lambda fr: fr.l1(0.5) + fr.l2(0.25)),
    "group twice": (
        lambda fr: fr.group_lasso(0.25, axis=-1) + fr.group_lasso(0.5, axis=-1),
        lambda fr: fr.group_lasso(0.75, axis=-1),
    ),
    "sparse group lasso": (
        lambda fr: fr.sparse_group_lasso(0.25, 0.5, axis=-1),
        lambda fr: fr.group_lasso(0.5, axis=-1) + fr.l1(0.25),
    ),
    "all that merges": (
        lambda fr: sum([fr.group_lasso(0.125, axis=-1), fr.l2(0.25), fr.l1(0.25), fr.l2(0.25), fr.l1(0.25)]),
        lambda fr: fr.sparse_group_lasso(0.5, 0.125, axis=-1) + fr.l2(0.5),
    ),
    "two routes to one axis": (
        lambda fr: fr.group_lasso(0.25, axis=(-1,)) + fr.group_lasso(0.5, axis=-1),
        lambda fr: fr.group_lasso(0.75, axis=-1),
    ),
}


@pytest.mark.parametrize("name", SUMS)
@each_wing
def test_equal_sums_are_equal(wing, name):
    left, right = (make(wing.fr) for make in SUMS[name])
    with wing.precision("float64"):
        params = {"w": wing.array(np.random.default_rng(0).normal(size=(4, 3)), "float64")}
        metric = {"w": wing.array(np.random.default_rng(1).uniform(size=(4, 3)), "float64")}
        _close(wing, left.value(params), right.value(params), 1e-15)
        _close(wing, left.grad(params), right.grad(params), 1e-15)
        for step in (0.5, metric):
            new = _fast(wing, left.prox)(params, step)
            _close(wing, new, _fast(wing, right.prox)(params, step), 1e-15)
            assert float(abs(new["w"] - params["w"]).max()) > 0.1


@each_wing
def test_elastic_net_and_sparse_group_lasso_are_sums_with_no_rule_of_their_own(wing):
    fr = wing.fr
    assert repr(fr.elastic_net(0.5, 0.25)) == "l1(0.5) + l2(0.25)"
    assert repr(fr.sparse_group_lasso(0.5, 0.25, per="output")).startswith("l1(0.5) + group_lasso(0.25, per='output'")
    assert len(fr.elastic_net(0.5, 0.25).parts) == 2


@each_wing
def test_the_prox_of_a_sum_minimises_it(wing):
    """Random competitors, in a diagonal metric: quadratic parts with anchors and importances, l1 and a group."""
    fr, rng = wing.fr, np.random.default_rng(0)
    with wing.precision("float64"):
        tree = functools.partial(wing.array, dtype="float64")
        w, a, importance = (rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.uniform(size=(2, 3)))
        penalty = fr.anchored(fr.l2(0.7), {"w": tree(a)}, {"w": tree(importance)}) + fr.l1(0.3) + fr.l2(0.2)
        penalty = penalty + fr.group_lasso(0.2, axis=-1) + fr.anchored(fr.l2(0.3), {"w": tree(w)})
        step = rng.uniform(0.1, 3, size=(2, 3))
        best = wing.numpy(_fast(wing, penalty.prox)({"w": tree(w)}, {"w": tree(step)}))["w"]

        def objective(y):
            y = np.asarray(y)
            value = 0.35 * (importance * (y - a) ** 2).sum((-2, -1)) + 0.3 * np.abs(y).sum((-2, -1))
            value += 0.1 * (y**2).sum((-2, -1)) + 0.2 * np.sqrt(3) * np.sqrt((y**2).sum(-1)).sum(-1)
            return value + 0.15 * ((y - w) ** 2).sum((-2, -1)) + ((y - w) ** 2 / (2 * step)).sum((-2, -1))

        scales = 10.0 ** rng.uniform(-6, 0, size=(5000, 1, 1))
        assert objective(best) <= objective(best + scales * rng.normal(size=(5000, 2, 3))).min()
        np.testing.assert_allclose(
            objective(best) - ((best - w) ** 2 / (2 * step)).sum(), float(penalty.value({"w": tree(best)})), rtol=1e-14
        )


@each_wing
def test_anchored_parts_that_are_not_quadratic_never_merge(wing):
    fr, params = wing.fr, _params(wing)
    shifted = fr.anchored(fr.l1(0.1), params)
    for penalty in (
        shifted + fr.l1(0.1),
        shifted + shifted,
        shifted + fr.group_lasso(0.1, axis=-1),
        fr.anchored(fr.sparse_group_lasso(0.1, 0.1, axis=-1), params),
    ):
        with pytest.raises(NoProxError, match="'hidden.weight'|'hidden.bias'"):
            penalty.prox(params, 0.1)
        assert float(penalty.value(params)) >= 0
    # one alone with quadratic parts does: argmin of |y - 3| + y^2 / 2 + (y - 4)^2 / 2, at the kink
    one = fr.anchored(fr.l1(1.0), {"w": wing.array([1.5])}) + fr.l2(1.0)
    np.testing.assert_array_equal(wing.numpy(one.prox({"w": wing.array([4.0])}, 1.0)["w"]), [1.5])


# --- strengths ---

STRENGTHS = {
    "l1: lam": lambda fr, s: fr.l1(s),
    "l2: lam": lambda fr, s: fr.l2(s),
    "group_lasso: lam": lambda fr, s: fr.group_lasso(s, axis=-1),
    "elastic_net: l1": lambda fr, s: fr.elastic_net(s, 0.1),
    "elastic_net: l2": lambda fr, s: fr.elastic_net(0.1, s),
    "sparse_group_lasso: l1": lambda fr, s: fr.sparse_group_lasso(s, 0.1, axis=-1),
    "sparse_group_lasso: group": lambda fr, s: fr.sparse_group_lasso(0.1, s, axis=-1),
    "cauchy: scale": lambda fr, s: fr.custom("cauchy", lambda x, lam, scale: lam * scale * x.sum(), lam=1.0, scale=s),
}


@pytest.mark.parametrize("where", STRENGTHS)
@each_wing
def test_negative_and_infinite_strengths_are_refused(wing, where):
    make = functools.partial(STRENGTHS[where], wing.fr)
    for value, says in ((-0.1, ">= 0"), (-3, ">= 0"), (float("nan"), ">= 0"), (float("inf"), "finite")):
        for wrong in (value, np.float32(value), np.array(value), wing.leaf(np.array(value), "float32")):
            with pytest.raises(ValueError) as error:
                make(wrong)
            assert str(error.value) == f"{where} must be {says}, got {value:g}"


@pytest.mark.parametrize("where", STRENGTHS)
@pytest.mark.parametrize("wrong", ["0.1", None, True, [0.1], {"lam": 0.1}, 1j], ids=repr)
@each_wing
def test_strengths_that_are_no_numbers_are_refused(wing, where, wrong):
    with pytest.raises(TypeError) as error:
        STRENGTHS[where](wing.fr, wrong)
    assert str(error.value) == f"{where} must be a number or an array, got {wrong!r}"


@pytest.mark.parametrize("kind", ["complex64", "bool"])
@each_wing
def test_strengths_of_another_kind_than_real_are_refused(wing, kind):
    for wrong in (np.ones((), kind)[()], np.ones((), kind), wing.leaf(np.ones(()), kind)):
        with pytest.raises(TypeError, match="l1: lam must be a number or an array, got"):
            wing.fr.l1(wrong)


@pytest.mark.parametrize("where", STRENGTHS)
@each_wing
def test_a_schedule_as_strength_is_refused_with_the_remedy(wing, where):
    for schedule in (optax.constant_schedule(0.1), lambda count: 0.1, float):
        with pytest.raises(TypeError, match=rf"^{where} must be a number .*got a function; .*count -> Penalty"):
            STRENGTHS[where](wing.fr, schedule)


@each_wing
def test_traced_strengths_are_not_checked(wing, fresh_dynamo):
    params = _params(wing)

    def value(lam):
        return (2 * wing.fr.l1(lam) + wing.fr.elastic_net(lam, lam)).value(params)

    lams = wing.array([-1.0, 1.0])
    values = wing.numpy(wing.vmap(value)(lams))
    assert values[0] == -values[1] < 0
    assert float(wing.jit(value)(lams[0])) == values[0]
    assert float(wing.grad(value)(lams[0])) > 0


@each_wing
def test_arrays_of_strengths_want_a_vmap(wing):
    lams = wing.array([0.5, 1.0, 0.0])
    for penalty in (wing.fr.l1(lams), wing.fr.l1(lams) + wing.fr.l2(0.1)):
        calls = (penalty.value, penalty.grad, lambda params, p=penalty: p.prox(params, 0.1))
        for call in calls:
            with pytest.raises(ValueError, match=r"l1: lam must be a scalar, got an array of shape \(3,\).*vmap"):
                call(_params(wing))
    values = wing.vmap(lambda p: p.value(_params(wing)))(wing.fr.l1(lams))
    np.testing.assert_array_equal(wing.numpy(values), [4.25, 8.5, 0])


@each_wing
def test_arrays_of_strengths_are_checked_in_every_entry(wing):
    with pytest.raises(ValueError, match="^l1: lam must be >= 0, got -1$"):
        wing.fr.l1(wing.array([0.5, -1.0]))
    for bad, says in ((float("nan"), ">= 0, got nan"), (float("inf"), "finite, got inf")):
        with pytest.raises(ValueError, match=f"^l1: lam must be {says}$"):
            wing.fr.l1(wing.array([0.5, bad]))


# --- layerwise ---


@each_wing
def test_layerwise_the_first_row_that_matches_wins(wing):
    fr, params = wing.fr, _params(wing)
    penalty = fr.layerwise({"hidden.weight": fr.l1(1.0), "*.bias": None, "*": fr.l2(1e4)})
    assert float(penalty.value(params)) == 7
    np.testing.assert_array_equal(wing.numpy(penalty.grad(params)["hidden"]["bias"]), [0, 0])
    assert repr(penalty) == "l1(1) on 'hidden.weight' + l2(10000) on '*'"
    penalty = fr.layerwise({"hidden": fr.l2(2.0), "*": None})
    assert float(penalty.value(params)) == 22.25


@each_wing
def test_layerwise_rows_may_be_sums_and_may_select(wing):
    fr, params = wing.fr, _params(wing)
    penalty = fr.layerwise({"hidden": 2 * (fr.l1(1.0).on("*.weight") + fr.l2(2.0).on(fr.biases))})
    assert float(penalty.value(params)) == 2 * 7 + 2 * 1.25
    new = wing.numpy(penalty.prox(params, 0.25))
    np.testing.assert_array_equal(new["hidden"]["weight"], [[0.5, -1.5], [0, 3.5]])
    np.testing.assert_array_equal(new["hidden"]["bias"], [0.25, -0.5])


@each_wing
def test_layerwise_composes(wing):
    fr, params = wing.fr, _params(wing)
    rows = fr.layerwise({"*.weight": fr.l1(1.0), "*.bias": fr.l2(2.0)})
    assert float((0.5 * rows).value(params)) == 0.5 * (7 + 1.25)
    assert float((rows + fr.l1(1.0)).value(params)) == 7 + 1.25 + 8.5
    assert float(rows.on("*.bias").value(params)) == 1.25
    assert float(fr.anchored(rows, params).value(params)) == 0
    nested = fr.layerwise({"hidden": rows})
    assert float(nested.value(params)) == 8.25


@each_wing
def test_layerwise_refuses_a_leaf_in_no_row_and_a_row_that_matches_nothing(wing):
    fr, params = wing.fr, _params(wing)
    with pytest.raises(ValueError, match="'hidden.bias' is in no row; add a row '\\*' \\(None: no penalty\\)"):
        fr.layerwise({"*.weight": fr.l1(1.0)}).value(params)
    for rows in ({"*": fr.l1(1.0), "head": fr.l2(1.0)}, {"head": None, "*": fr.l1(1.0)}):
        for call in ("value", "grad", "check_prox"):
            with pytest.raises(ValueError, match="the glob 'head' matches no leaf; nearest names: hidden"):
                getattr(fr.layerwise(rows), call)(params)


@each_wing
def test_layerwise_refuses_a_row_that_never_applies(wing):
    fr, params = wing.fr, _params(wing)
    never = "never applies: every leaf it matches is taken by an earlier row"
    for rows, message in (
        ({"*": fr.l1(1.0), "*.bias": None}, rf"row '\*.bias' {never} \('\*'\); move it up$"),
        (
            {"*.bias": None, "*.weight": fr.l1(1.0), "hidden": fr.l2(1.0)},
            rf"'hidden' {never} \('\*.bias', '\*.weight'\)",
        ),
    ):
        penalty = fr.layerwise(rows)
        for call in (penalty.value, penalty.grad, penalty.check_prox, lambda p, q=penalty: fr.summary(q, p)):
            with pytest.raises(ValueError, match=message):
                call(params)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "at least one row must be a penalty"),
        ({"*": None}, "at least one row must be a penalty"),
        ({"*": 0.1}, "row '\\*' must be a penalty or None, got 0.1"),
        ({"*": "l1"}, "row '\\*' must be a penalty or None, got 'l1'"),
        ({"": None}, "a glob must be a non-empty string"),
        ({3: None}, "a glob must be a non-empty string.*got 3"),
        ({"!*.bias": None}, "a row cannot exclude, got '!\\*.bias'"),
        ([("*", None)], "rows must be a dict"),
        (None, "rows must be a dict"),
    ],
    ids=str,
)
@each_wing
def test_layerwise_refuses_what_is_no_table(wing, rows, message):
    with pytest.raises(TypeError, match=f"^layerwise: .*{message}"):
        wing.fr.layerwise(rows)


# --- anchored ---


@each_wing
def test_anchored_is_the_penalty_of_the_distance(wing):
    fr = wing.fr
    params, anchor = {"w": wing.array([1.0, -2.0, 3.0])}, {"w": wing.array([1.0, 0.0, 5.0])}
    for make, value, gradient in (
        (fr.l2(0.5), 2, [0, -1, -1]),
        (fr.l1(0.5), 2, [0, -0.5, -0.5]),
        (0.5 * fr.l2(1.0), 2, [0, -1, -1]),
    ):
        penalty = fr.anchored(make, anchor)
        assert float(penalty.value(params)) == value
        np.testing.assert_array_equal(wing.numpy(penalty.grad(params)["w"]), gradient)
        np.testing.assert_array_equal(wing.numpy(wing.grad(penalty.value)(params)["w"]), gradient)
    np.testing.assert_array_equal(wing.numpy(fr.anchored(fr.l2(1.0), anchor).prox(params, 1.0)["w"]), [1, -1, 4])
    np.testing.assert_array_equal(wing.numpy(fr.anchored(fr.l1(0.5), anchor).prox(params, 1.0)["w"]), [1, -1.5, 3.5])
    assert repr(fr.anchored(fr.l2(0.5), anchor).on("w")) == "anchored(l2(0.5)) on 'w'"


@each_wing
def test_anchored_with_importance_is_the_quadratic_of_ewc(wing):
    """1/2 sum F (w - a)^2: the 1/2 of the paper; a coordinate of importance 0 moves freely."""
    fr = wing.fr
    params, anchor = (
        {"w": wing.array([1.0, -2.0, 3.0]), "b": wing.array([7.0])},
        {
            "w": wing.array([2.0, 0.0, 5.0]),
            "b": wing.array([5.0]),
        },
    )
    penalty = fr.anchored(fr.l2(2.0), anchor, {"w": wing.array([4.0, 0.0, 0.5]), "b": 0.25})
    assert float(penalty.value(params)) == 4 + 0 + 2 + 1
    np.testing.assert_array_equal(wing.numpy(penalty.grad(params)["w"]), [-8, 0, -2])
    np.testing.assert_allclose(wing.numpy(penalty.prox(params, 1.0)["w"]), [(1 + 16) / 9, -2, 4], rtol=1e-6)
    np.testing.assert_allclose(wing.numpy(penalty.prox(params, 1.0)["b"]), [(7 + 2.5) / 1.5], rtol=1e-6)
    l1 = fr.anchored(fr.l1(1.0), anchor, {"w": wing.array([0.5, 0.0, 1.0]), "b": 1.0})
    np.testing.assert_array_equal(wing.numpy(l1.prox(params, 1.0)["w"]), [1.5, -2, 4])
    assert repr(penalty) == "anchored(l2(2), importance)"


@each_wing
def test_importances_of_zero_leave_the_point_exactly(wing):
    rng = np.random.default_rng(0)
    params, anchor = ({"w": wing.array(rng.normal(size=100))} for _ in range(2))
    for make in (wing.fr.l2(1.0), wing.fr.l1(1.0)):
        penalty = wing.fr.anchored(make, anchor, {"w": 0.0})
        _equal(wing, penalty.prox(params, 0.7), params)
        assert float(penalty.value(params)) == 0


@pytest.mark.parametrize("kind", ["step", "lam", "step tree"])
@pytest.mark.parametrize("rule", ["l1", "l2", "group_lasso"])
@each_wing
def test_a_step_or_a_strength_of_zero_returns_the_point_exactly_also_when_anchored(wing, rule, kind):
    rng = np.random.default_rng(0)
    lam = 0.0 if kind == "lam" else 0.7
    make = wing.fr.group_lasso(lam, axis=-1) if rule == "group_lasso" else getattr(wing.fr, rule)(lam)
    params = {"w": wing.array(rng.normal(size=(50, 3)))}
    penalty = wing.fr.anchored(make, {"w": wing.array(rng.normal(size=(50, 3)))})
    step = {"w": wing.array(np.full((50, 3), 0.0))} if kind == "step tree" else 0.0 if kind == "step" else 0.3
    _equal(wing, _fast(wing, lambda params: penalty.prox(params, step))(params), params)


@each_wing
def test_an_anchored_l1_ends_on_the_anchor_exactly(wing):
    rng = np.random.default_rng(0)
    params, anchor = ({"w": wing.array(rng.normal(size=100))} for _ in range(2))
    _equal(wing, wing.fr.anchored(wing.fr.l1(1.0), anchor).prox(params, 100.0), anchor)


@each_wing
def test_only_the_selected_leaves_need_an_anchor(wing):
    fr, params = wing.fr, _params(wing)
    anchor = {"hidden": {"weight": params["hidden"]["weight"] + 1}, "head": wing.array([3.0])}  # one more, too
    penalty = fr.anchored(fr.l2(2.0).on("*.weight"), anchor)
    assert float(penalty.value(params)) == 4
    assert float(fr.anchored(fr.l2(2.0), anchor).on("*.weight").value(params)) == 4


@each_wing
def test_an_anchor_that_does_not_fit_is_refused_by_the_first_leaf(wing):
    fr, params = wing.fr, _params(wing)
    lacks = {"hidden": {"weight": params["hidden"]["weight"]}}
    penalty = fr.anchored(fr.l2(1.0), lacks)
    for call in (penalty.value, penalty.grad, lambda params: penalty.prox(params, 0.1)):
        with pytest.raises(
            ValueError, match="anchor: the leaf 'hidden.bias' of the parameters is missing; anchor has hidden.weight"
        ):
            call(params)
    other = {"hidden": {"weight": abs(params["hidden"]["weight"]), "bias": wing.array([1.0])}}
    with pytest.raises(
        ValueError, match=r"anchor: the leaf 'hidden.bias' must have the parameter's shape \(2,\), got \(1,\)"
    ):
        fr.anchored(fr.l2(1.0), other).value(params)
    with pytest.raises(ValueError, match=r"importance: the leaf 'hidden.bias' must have .* \(2,\), got \(1,\)"):
        fr.anchored(fr.l2(1.0), params, other).value(params)
    with pytest.raises(ValueError, match="importance: the leaf 'hidden.bias' of the parameters is missing"):
        fr.anchored(fr.l2(1.0), params, {"hidden": {"weight": other["hidden"]["weight"]}}).value(params)
    scalar = {"hidden": {"weight": 1.0, "bias": 0.0}}
    with pytest.raises(ValueError, match=r"anchor: the leaf 'hidden.\w+' must have the parameter's shape"):
        fr.anchored(fr.l2(1.0), scalar).value(params)  # a scalar is an importance, not an anchor


@each_wing
def test_anchored_refuses_wrong_arguments(wing):
    fr, params = wing.fr, _params(wing)
    with pytest.raises(TypeError, match="^anchored: l2 has an anchor already$"):
        fr.anchored(fr.anchored(fr.l2(1.0), params) + fr.l1(0.1), params)
    with pytest.raises(TypeError, match="^anchored: penalty must be a penalty such as l2.*, got float$"):
        fr.anchored(0.1, params)
    with pytest.raises(TypeError, match="importance needs .* sum over coordinates .*got group_lasso"):
        fr.anchored(fr.group_lasso(0.1, axis=-1), params, params)
    with pytest.raises(TypeError, match="importance needs .* sum over coordinates .*got mine"):
        fr.anchored(fr.custom("mine", lambda x, lam: lam * x.sum(), lam=1.0), params, params)
    with pytest.raises(TypeError, match="^anchored: anchor must be a tree"):
        fr.anchored(fr.l2(1.0), None)  # would be no anchor at all


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")], ids=str)
@each_wing
def test_a_wrong_importance_is_refused(wing, value):
    params = {"w": wing.array([1.0, 2.0]), "b": wing.array([1.0])}
    for importance in ({"w": wing.array([1.0, value]), "b": 1.0}, {"w": value, "b": 1.0}):
        with pytest.raises(ValueError, match=f"importance.*'w'.* got {value:g}"):
            wing.fr.anchored(wing.fr.l2(1.0), params, importance).value(params)


@each_wing
def test_a_negative_importance_is_not_looked_for_under_a_trace(wing):
    params = {"w": wing.array([1.0])}

    def value(importance):
        return wing.fr.anchored(wing.fr.l2(2.0), {"w": wing.array([3.0])}, {"w": importance}).value(params)

    np.testing.assert_array_equal(wing.numpy(wing.vmap(value)(wing.array([-1.0, 1.0]))), [-4, 4])


def test_training_in_place_does_not_move_the_anchor():
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    penalty = TORCH.fr.anchored(TORCH.fr.l2(2.0), TORCH.fr.params(net), TORCH.fr.params(net))
    ones = torch.ones(2)
    importance = {"w": ones}
    other = TORCH.fr.anchored(TORCH.fr.l2(2.0), {"w": ones}, importance)
    with torch.no_grad():
        before = {name: p.clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.add_(1)
        ones.add_(1)
    expected = sum(p.sum() for p in before.values())  # importance: the values themselves
    torch.testing.assert_close(penalty.value(TORCH.fr.params(net)).detach(), expected)
    assert float(other.value({"w": torch.tensor([3.0, 3.0])})) == 8


def test_an_anchor_of_numpy_arrays_does_not_move_with_them():
    array = np.ones(2, np.float32)
    penalty = JAX.fr.anchored(JAX.fr.l2(2.0), {"w": array}, {"w": array})
    array += 1
    assert float(penalty.value({"w": jnp.array([3.0, 3.0])})) == 8


def test_an_anchor_survives_the_donation_of_the_parameters():
    """The usual first line of a JAX training step; it deletes the arrays that it is given."""
    params = {"w": jnp.ones(3)}
    penalty = JAX.fr.anchored(JAX.fr.l2(2.0), params, params)
    step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    assert float(penalty.value(step(params))) == 3


@pytest.mark.parametrize("leaf", ["Parameter", "tensor that requires grad"])
def test_a_gradient_does_not_flow_back_into_the_anchor_of_the_parameters_themselves(leaf):
    """The anchor is the very tensor that trains: w - a would have derivative 1 - 1."""
    w = torch.tensor([1.0, 2.0])
    params = {"w": torch.nn.Parameter(w) if leaf == "Parameter" else w.requires_grad_()}
    penalty = TORCH.fr.anchored(TORCH.fr.l2(2.0), params, params)
    with torch.no_grad():
        params["w"] += 1
    penalty.value(params).backward()
    assert params["w"].grad is not None
    torch.testing.assert_close(params["w"].grad, torch.tensor([2.0, 4.0]))


@each_wing
def test_the_anchor_under_vmap_and_grad(wing):
    """An ensemble with one anchor per member; and a learned anchor."""
    fr = wing.fr
    anchors, w = {"w": wing.array(np.array([[0.0, 0.0], [1.0, 2.0]]))}, {"w": wing.array([1.0, 2.0])}

    def value(anchor, importance):
        return fr.anchored(fr.l2(2.0), anchor, {"w": importance}).value(w)

    values = wing.vmap(value, in_axes=(0, None))(anchors, wing.array([1.0, 0.5]))
    np.testing.assert_array_equal(wing.numpy(values), [3, 0])
    gradient, importance = wing.grad(value, argnums=(0, 1))({"w": wing.array([0.0, 0.0])}, wing.array([1.0, 0.5]))
    np.testing.assert_array_equal(wing.numpy(gradient["w"]), [-2, -2])
    np.testing.assert_array_equal(wing.numpy(importance), [1, 4])
    stacked = wing.vmap(lambda anchor: fr.anchored(fr.l2(2.0), anchor))(anchors)
    np.testing.assert_array_equal(wing.numpy(wing.vmap(lambda p: p.value(w))(stacked)), [5, 0])


# --- custom ---


def cauchy(x, lam, scale):
    return (lam * (1 + (x / scale) ** 2)).sum()


def grad_cauchy(x, lam, scale):
    return 2 * lam * x / scale**2


def prox_cauchy(x, step_size, lam, scale):
    return x / (1 + 2 * step_size * lam / scale**2)


@each_wing
def test_custom_gets_its_strengths_by_name_in_any_order(wing):
    params = {"w": wing.array([1.0, 2.0])}
    for strengths in ({"lam": 0.5, "scale": 2.0}, {"scale": 2.0, "lam": 0.5}):
        penalty = wing.fr.custom("cauchy", cauchy, grad_cauchy, prox_cauchy, **strengths)
        assert float(penalty.value(params)) == 1 + 0.125 * 5
        np.testing.assert_array_equal(wing.numpy(penalty.grad(params)["w"]), [0.25, 0.5])
        np.testing.assert_array_equal(wing.numpy(penalty.prox(params, 4.0)["w"]), [0.5, 1])
        assert repr(penalty).startswith("cauchy(")


@each_wing
def test_custom_without_a_gradient_uses_the_frameworks_own(wing):
    params = {"w": wing.array([1.0, 2.0])}
    penalty = wing.fr.custom("cauchy", cauchy, lam=0.5, scale=2.0)
    np.testing.assert_array_equal(wing.numpy(penalty.grad(params)["w"]), [0.25, 0.5])
    np.testing.assert_array_equal(wing.numpy(wing.grad(penalty.value)(params)["w"]), [0.25, 0.5])
    wing.fr.penalize(lambda params: 0 * params["w"].sum(), penalty)
    with pytest.raises(NoProxError, match="cauchy has no proximal operator, on the leaf 'w'"):
        penalty.prox(params, 0.1)
    with pytest.raises(NoProxError, match="cauchy has no proximal operator, on the leaf 'w'"):
        wing.fr.prox_adam(0.1, penalty).init(params)


@each_wing
def test_custom_composes(wing, fresh_dynamo):
    fr = wing.fr
    params = {"w": wing.array([1.0, 2.0]), "b": wing.array([5.0])}
    penalty = 2 * fr.custom("cauchy", cauchy, grad_cauchy, prox_cauchy, lam=0.25, scale=2.0).on("w") + fr.l2(1.0)
    np.testing.assert_allclose(wing.numpy(penalty.prox(params, 4.0)["w"]), [1 / 6, 2 / 6], rtol=1e-6)
    values = wing.vmap(lambda lam: fr.custom("cauchy", cauchy, lam=lam, scale=2.0).on("w").value(params))(
        wing.array([0.5, 1.0])
    )
    np.testing.assert_array_equal(wing.numpy(values), [1.625, 3.25])
    assert float(wing.jit(lambda p: penalty.value(p))(params)) == float(penalty.value(params))
    with pytest.raises(NoProxError, match="cauchy and l1"):
        (penalty + fr.l1(0.1)).prox(params, 0.1)


@each_wing
def test_custom_without_strengths(wing):
    penalty = wing.fr.custom("sum", lambda x: x.sum(), prox=lambda x, step_size: x - step_size)
    params = {"w": wing.array([1.0, 2.0])}
    assert float(penalty.value(params)) == 3
    np.testing.assert_array_equal(wing.numpy(penalty.prox(params, 0.5)["w"]), [0.5, 1.5])
    assert float((2 * penalty).value(params)) == 6


@each_wing
def test_custom_refuses_what_is_no_function_and_a_value_that_is_no_scalar(wing):
    for argument in ("value", "grad", "prox"):
        arguments = {"value": cauchy, argument: 0.5}
        with pytest.raises(TypeError, match=f"^custom: {argument} must be a function, got 0.5$"):
            wing.fr.custom("mine", **arguments)
    with pytest.raises(TypeError, match="^custom: value must be a function, got None$"):
        wing.fr.custom("mine", None)
    vector = wing.fr.custom("mine", lambda x, lam: lam * x, lam=1.0)
    with pytest.raises((TypeError, ValueError), match=r"mine: .*scalar"):
        vector.value({"w": wing.array([1.0, 2.0])})


BROADCAST = {
    "row": (lambda x: x[:1], r"\(2, 3\), got the shape \(1, 3\)"),
    "scalar": (lambda x: x.sum(), r"\(2, 3\), got the shape \(\)"),
    "more axes": (lambda x: x[None], r"\(2, 3\), got the shape \(1, 2, 3\)"),
    "number": (lambda x: 0.0, r"\(2, 3\), got float"),
}


@pytest.mark.parametrize("kind", BROADCAST)
@each_wing
def test_custom_refuses_a_grad_or_prox_that_would_be_broadcast(wing, kind):
    fr, (wrong, message) = wing.fr, BROADCAST[kind]
    penalty = fr.custom(
        "mine", lambda x, lam: lam * x.sum(), lambda x, lam: wrong(x), lambda x, step_size, lam: wrong(x), lam=1.0
    )
    params = {"w": wing.array(np.ones((2, 3)))}
    for p in (penalty, 2 * penalty, fr.anchored(penalty, params), penalty + fr.l2(1.0)):
        with pytest.raises(TypeError, match=f"^mine: grad must return an array of the leaf's shape {message}$"):
            p.grad(params)
        with pytest.raises(TypeError, match=f"^mine: prox must return an array of the leaf's shape {message}$"):
            p.prox(params, 0.5)
    transformation = fr.prox_sgd(0.1, penalty)
    state = transformation.init(params)
    with pytest.raises(TypeError, match="^mine: prox must return"):
        transformation.update(params, state, params)
    if wing is JAX:  # before anything is computed
        with pytest.raises(TypeError, match="^mine: prox must return"):
            jax.eval_shape(lambda p: penalty.prox(p, 0.5), params)


# --- no gradient ---


@each_wing
def test_an_indicator_has_no_gradient(wing):
    fr = wing.fr
    penalty = fr.l1(0.1) + fr.non_negative().on("w")
    params = {"w": wing.array([1.0, -2.0])}
    with pytest.raises(NoGradError, match="non_negative is an indicator or a count and has no gradient"):
        penalty.grad(params)
    assert issubclass(NoGradError, ValueError) and fr.NoGradError is NoGradError
    for where, build in (
        ("penalize", lambda: fr.penalize(lambda params: params["w"].sum(), penalty)),
        ("add_penalty_gradient", lambda: fr.add_penalty_gradient(penalty)),
    ):
        with pytest.raises(NoGradError, match=f"^{where}: non_negative is an indicator or a count"):
            build()
    schedule = fr.add_penalty_gradient(lambda count: penalty)  # known only when the schedule is asked
    with pytest.raises(NoGradError, match="^add_penalty_gradient: non_negative"):
        schedule.update(params, schedule.init(params), params)
    np.testing.assert_array_equal(wing.numpy(fr.non_negative().prox(params, 0.3)["w"]), [1, 0])
    transformation = fr.prox_adam(0.1, fr.non_negative())
    updates, _ = transformation.update({"w": wing.array([1.0, 1.0])}, transformation.init(params), params)
    np.testing.assert_allclose(wing.numpy(updates["w"] + params["w"]), [0.9, 0], rtol=1e-6)


# --- the pytree ---


def _pytree(wing):
    """(leaves, flatten, unflatten) of the framework's own pytrees."""
    if wing is TORCH:
        pytree = torch.utils._pytree
        return pytree.tree_leaves, pytree.tree_flatten, lambda leaves, spec: pytree.tree_unflatten(leaves, spec)
    return jax.tree.leaves, jax.tree.flatten, lambda leaves, spec: jax.tree.unflatten(spec, leaves)


def _rich(wing):
    """One of everything."""
    fr, params = wing.fr, _params(wing)
    return (
        0.5 * fr.l1(0.1).on("*.weight")
        + fr.elastic_net(0.2, 0.3).on(fr.biases)
        + fr.group_lasso(0.4, per="output").on("hidden.weight")
        + fr.anchored(fr.l2(0.5), params, {"hidden": {"weight": 0.5, "bias": params["hidden"]["bias"] ** 2}})
        + fr.layerwise({"*.bias": None, "*": fr.l2(0.6)})
        + fr.custom("cauchy", cauchy, grad_cauchy, prox_cauchy, lam=0.7, scale=2.0).on(
            {"hidden": {"weight": False, "bias": True}}
        )
    )


@each_wing
def test_a_penalty_is_a_pytree_of_its_strengths(wing):
    leaves, flatten, unflatten = _pytree(wing)
    fr = wing.fr
    assert [float(x) for x in leaves(fr.l1(0.5))] == [0.5]
    assert [float(x) for x in leaves(2 * fr.elastic_net(0.5, 0.25).on("w"))] == [0.5, 2, 0.25, 2]
    assert leaves(fr.non_negative()) == []
    assert [float(x) for x in leaves(fr.custom("c", cauchy, scale=3.0, lam=2.0))] == [3, 2]
    assert len(leaves(fr.anchored(fr.l2(0.5), _params(wing)))) == 3
    penalty = _rich(wing)
    values, spec = flatten(penalty)
    again = unflatten(values, spec)
    assert type(again) is fr.Penalty
    params = _params(wing)
    assert float(again.value(params)) == pytest.approx(float(penalty.value(params)), rel=1e-6)
    _close(wing, again.grad(params), penalty.grad(params))
    doubled = unflatten([2 * x for x in flatten(fr.l1(0.5))[0]], flatten(fr.l1(0.5))[1])
    assert float(doubled.value(params)) == 8.5
    # transforms put anything in place of the leaves
    assert unflatten([None] * len(values), spec) is not None
    assert unflatten([object()] * len(values), spec) is not None


def test_numbers_flatten_to_tensors_of_no_axis_that_promote_nothing():
    params = {"w": torch.ones(2)}
    for number in (0.5, 1, np.float64(0.5), np.float32(0.5), np.int32(1), np.array(0.5), np.array(0.5, np.float32)):
        penalty = number * TORCH.fr.l1(number)
        leaves, spec = torch.utils._pytree.tree_flatten(penalty)
        assert [(type(x), x.dtype, x.shape) for x in leaves] == [(torch.Tensor, torch.float64, ())] * 2
        again = torch.utils._pytree.tree_unflatten(leaves, spec)
        assert again.value(params).dtype == again.grad(params)["w"].dtype == torch.float32
        members = torch.func.vmap(lambda x, number=number: x * TORCH.fr.l1(number))(torch.ones(2))
        assert members.parts[0].strengths[0].shape == (2,)


@each_wing
def test_an_anchored_penalty_comes_out_of_a_vmap_whatever_its_trees_hold(wing):
    fr = wing.fr
    anchor = {"w": wing.array([1.0, 2.0]), "steps": 3, "name": None}
    members = wing.vmap(lambda lam: fr.anchored(fr.l2(lam), anchor, {"w": 0.5}))(wing.array([2.0, 4.0]))
    params = {"w": wing.array([2.0, 2.0])}
    np.testing.assert_array_equal(wing.numpy(wing.vmap(lambda p: p.value(params))(members)), [0.5, 1])


@each_wing
def test_the_static_part_is_hashable_and_equal_for_equal_penalties(wing):
    _, flatten, _ = _pytree(wing)
    first, second = (flatten(_rich(wing))[1] for _ in range(2))
    assert first == second
    if wing is JAX:
        assert hash(first) == hash(second)
    hash(first.context if wing is TORCH else first)
    for other in (wing.fr.l1(0.1), wing.fr.l2(0.1).on("*"), wing.fr.l1(0.1).on("*.weight"), 2 * wing.fr.l1(0.1)):
        assert flatten(other)[1] != flatten(wing.fr.l1(0.1).on("*"))[1]


@each_wing
def test_equality_is_identity(wing):
    p, q = wing.fr.l1(wing.array([0.1, 0.2])), wing.fr.l1(wing.array([0.1, 0.2]))
    assert p == p and p != q
    assert len({p, q, p}) == 2


@each_wing
def test_a_penalty_is_frozen(wing):
    with pytest.raises(AttributeError):
        wing.fr.l1(0.1).parts = ()


@each_wing
def test_a_penalty_is_an_argument_without_retracing(wing, fresh_dynamo):
    traces = []

    def value(penalty, params):
        traces.append(1)
        return penalty.value(params)

    params = _params(wing)

    def make(lam):
        return wing.fr.l1(lam).on("*.weight") + 2 * wing.fr.l2(lam).on(wing.fr.weights)

    if wing is JAX:
        jitted = jax.jit(value)
    else:
        counter = torch._dynamo.testing.CompileCounter()
        jitted = torch.compile(lambda penalty, params: penalty.value(params), fullgraph=True, backend=counter)
    for lam in (0.5, 1.0, 1.5):
        lam_array = wing.leaf(np.array(lam), "float32")
        assert float(jitted(make(lam_array), params)) == lam * (7 + 21)
    if wing is JAX:
        assert len(traces) == 1
        assert float(jitted(make(0.25), params)) == 0.25 * 28  # a number is a weakly typed array: another trace
        assert float(jitted(make(2.0), params)) == 2 * 28
        assert len(traces) == 2
    else:
        assert counter.frame_count == 1


@each_wing
def test_a_penalty_is_an_argument_of_every_transform(wing, fresh_dynamo):
    """torch.func wraps every leaf of every argument, those that are not differentiated as well."""
    params, fr = {"w": wing.array([1.0, -2.0])}, wing.fr

    def value(params, penalty):
        return penalty.value(params)

    for penalty in (fr.l2(0.5), fr.l2(wing.leaf(np.array(0.5), "float32")), 0.25 * fr.l2(2.0)):
        np.testing.assert_array_equal(wing.numpy(wing.grad(value)(params, penalty)["w"]), [0.5, -1])
        np.testing.assert_array_equal(wing.numpy(wing.hessian(value)(params, penalty)["w"]["w"]), [[0.5, 0], [0, 0.5]])
        np.testing.assert_array_equal(wing.numpy(wing.jacfwd(value)(params, penalty)["w"]), [0.5, -1])
        np.testing.assert_array_equal(wing.numpy(wing.jacrev(value)(params, penalty)["w"]), [0.5, -1])
        members = {"w": wing.array(np.array([[1.0, -2.0], [0.0, 4.0]]))}
        gradients = wing.vmap(wing.grad(value), in_axes=(0, None))(members, penalty)
        np.testing.assert_array_equal(wing.numpy(gradients["w"]), [[0.5, -1], [0, 2]])
    # a tensor: Dynamo refuses to wrap one that it makes from a number inside the transform
    traced = wing.jit(wing.grad(value))(params, fr.l2(wing.leaf(np.array(0.5), "float32")))
    np.testing.assert_array_equal(wing.numpy(traced["w"]), [0.5, -1])


@each_wing
def test_a_penalty_goes_into_and_comes_out_of_vmap_and_jit(wing, fresh_dynamo):
    params = _params(wing)
    lams = wing.array([0.5, 1.0])
    members = wing.vmap(lambda lam: lam * wing.fr.elastic_net(lam, 0.25))(lams)
    assert type(members) is wing.fr.Penalty
    np.testing.assert_allclose(
        wing.numpy(wing.vmap(lambda p: p.value(params))(members)),
        [0.5 * (0.5 * 8.5 + 0.125 * 22.25), 8.5 + 0.125 * 22.25],
        rtol=1e-6,
    )
    stacked = wing.vmap(lambda p: p.prox(params, 1.0)["hidden"]["bias"])(wing.vmap(wing.fr.l1)(lams))
    np.testing.assert_array_equal(wing.numpy(stacked), [[0, -0.5], [0, 0]])
    made = wing.jit(lambda lam: wing.fr.l1(lam).on("*.weight"))(lams[1])
    assert float(made.value(params)) == 7


@each_wing
def test_a_penalty_is_differentiable_in_its_strengths(wing):
    params = _params(wing)
    gradient = wing.grad(lambda penalty: penalty.value(params))(2.0 * wing.fr.elastic_net(0.5, 0.25))
    assert type(gradient) is wing.fr.Penalty
    leaves, _, _ = _pytree(wing)
    np.testing.assert_allclose(
        [float(x) for x in leaves(gradient)], [17, 0.5 * 8.5, 22.25, 0.25 * 22.25 / 2], rtol=1e-6
    )
    # through the prox: d/dlam of sum(soft(w, lam)) = -sum of signs of the survivors, d/da of an l2 anchor
    slope = wing.grad(lambda lam: wing.fr.l1(lam).prox(params, 1.0)["hidden"]["weight"].sum())(
        wing.leaf(np.array(0.5), "float32")
    )
    assert float(slope) == -1
    hidden = wing.grad(
        lambda a: wing.fr.anchored(wing.fr.l2(1.0), {"hidden": a}).prox(params, 1.0)["hidden"]["bias"].sum()
    )(params["hidden"])
    np.testing.assert_array_equal(wing.numpy(hidden["bias"]), [0.5, 0.5])


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
@each_wing
def test_a_penalty_can_be_pickled_and_copied(wing, how):
    penalty, params = _rich(wing), _params(wing)
    make = {"pickle": lambda p: pickle.loads(pickle.dumps(p)), "deepcopy": copy.deepcopy, "copy": copy.copy}[how]
    again = make(penalty)
    assert repr(again) == repr(penalty)
    assert float(again.value(params)) == float(penalty.value(params))
    _equal(wing, again.grad(params), penalty.grad(params))
    _, flatten, _ = _pytree(wing)
    assert flatten(again)[1] == flatten(penalty)[1]
    if how == "deepcopy":
        assert again.parts[4].anchor is not penalty.parts[4].anchor


def test_a_penalty_anchored_at_a_module_can_be_copied():
    net = torch.nn.Linear(2, 2)
    penalty = TORCH.fr.anchored(TORCH.fr.l2(1.0), TORCH.fr.params(net))
    again = copy.deepcopy(penalty)
    assert float(again.value(TORCH.fr.params(net)).detach()) == 0

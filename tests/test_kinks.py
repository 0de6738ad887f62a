"""Where formulas have no derivative, and where numbers are no numbers: both wings do the same."""

import numpy as np
import pytest

import oracles
from cases import CASES, STEP
from wings import JAX, TORCH, dtype_name, each_wing

with_gradient = pytest.mark.parametrize("case", [c for c in CASES if c.record.has_gradient], ids=str)
SHAPE = (3, 4)
on_a_matrix = pytest.mark.parametrize("case", [c for c in CASES if "middle" not in c.name], ids=str)


@each_wing
@with_gradient
def test_the_derivative_of_the_value_is_the_gradient_kinks_included(wing, case):
    params = case.params(wing, "float64")
    with wing.precision("float64"):
        penalty = case.make(wing.fr)
        run = wing.quick(lambda params: (wing.grad(penalty.value)(params), penalty.grad(params)))
        derivative, gradient = wing.numpy(run(wing.array(params, "float64")))
    for name, x in params.items():
        assert np.all(np.isfinite(derivative[name]))
        scale = np.abs(gradient[name]).max(initial=0)
        assert np.all(np.abs(derivative[name] - gradient[name]) <= 4 * oracles.ULP * scale), name
        assert np.array_equal(derivative[name] == 0, gradient[name] == 0)
        if case.record.factory != "custom":  # whose gradient at 0 is its own affair
            assert np.all(gradient[name][x == 0] == 0)


@each_wing
@with_gradient
def test_the_same_in_float32_and_half_precision(wing, case):
    shape = next(name for name in ("matrix", "kernel", "vector") if name in case.shapes)
    dtypes = ("float32", "bfloat16", "float16")
    params = {dtype: wing.array(case.params(wing, dtype)[shape], dtype) for dtype in dtypes}
    penalty = case.make(wing.fr)
    derivative, gradient = wing.quick(lambda p: (wing.grad(penalty.value)(p), penalty.grad(p)))(params)
    for dtype in dtypes:
        assert dtype_name(derivative[dtype]) == dtype_name(gradient[dtype]) == dtype
        a, b = wing.numpy(derivative[dtype]), wing.numpy(gradient[dtype])
        eps = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
        assert np.all(np.abs(a - b) <= 4 * eps * np.abs(b).max())
        assert np.array_equal(a == 0, b == 0)


@each_wing
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_norm_of_a_group_neither_overflows_nor_vanishes_in_float32(wing, scale):
    x = scale * np.array([[3.0, -4.0], [0.0, 0.0], [0.0, 1.0]])
    penalty = wing.fr.group_lasso(2.0, axis=-1, group_scale="one")
    run = wing.quick(lambda p: (penalty.value(p), penalty.grad(p)["w"], wing.grad(penalty.value)(p)["w"]))
    value, *gradients = wing.numpy(run(wing.array({"w": x}, "float32")))
    np.testing.assert_allclose(value, 12 * scale, rtol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, [[1.2, -1.6], [0.0, 0.0], [0.0, 2.0]], rtol=1e-6)


@each_wing
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_groups_of_the_largest_numbers_keep_their_direction(wing, dtype):
    functional, largest = wing.fr.functional, float(np.finfo(dtype).max)
    with wing.precision(dtype):
        for direction in ([0.6, -0.8], [0.1, 0.01], [-0.5, 0.5]):
            direction = np.array([direction])
            x = wing.array(largest * direction, dtype)
            run = wing.quick(
                lambda x: (
                    functional.group_lasso(x / 2, 1.0, [-1], "one"),
                    functional.grad_group_lasso(x, 1.0, [-1], "one"),
                    wing.grad(lambda x: functional.group_lasso(x, 1.0, [-1], "one"))(x),
                    functional.prox_group_lasso(x, 0.1, 1.0, [-1], "one"),
                    functional.prox_group_lasso(x, abs(x) / 4, 1.0, [-1], "one"),
                    wing.grad(lambda step: (functional.prox_group_lasso(x, step, 1.0, [-1], "one") / 4).sum())(x / 8),
                )
            )
            value, *gradients, same, metric, slope = wing.numpy(run(x))
            length = np.linalg.norm(direction)
            np.testing.assert_allclose(value / largest, length / 2, rtol=1e-6)
            for gradient in gradients:
                np.testing.assert_allclose(gradient, direction / length, rtol=1e-6)
            np.testing.assert_array_equal(same, wing.numpy(x))
            want = oracles.prox_group_lasso(direction, np.abs(direction) / 4, 1.0, [-1], "one")
            np.testing.assert_allclose(metric / largest, want, rtol=1e-5)
            assert np.all(np.isfinite(slope) & (slope != 0))


@each_wing
def test_the_prox_moves_with_its_strength_and_its_step_from_zero_on(wing):
    f = wing.fr.functional
    with wing.precision("float64"):
        x, zero = wing.array([2.0, -2.0, 0.0], "float64"), wing.leaf(np.array(0.0), "float64")
        for prox in (
            lambda step, lam: f.prox_l1(x, step, lam),
            lambda step, lam: f.prox_elastic_net(x, step, lam, 0.0 * lam),
            lambda step, lam: (wing.fr.l1(lam) + wing.fr.l2(0.0)).prox({"w": x}, step)["w"],
        ):
            for jacobian in (wing.jacrev, wing.jacfwd):
                for function in (lambda lam, prox=prox: prox(0.5, lam), lambda step, prox=prox: prox(step, 0.5)):
                    np.testing.assert_array_equal(wing.numpy(jacobian(function)(zero)), [-0.5, 0.5, 0])


@pytest.mark.parametrize("case", [c for c in CASES if "per" not in c.options], ids=str)  # layouts differ by wing
def test_both_wings_have_the_same_derivatives_at_kinks(case):
    """Of the value and of both proxes, with respect to the parameters and to the strengths."""
    shapes = [name for name in ("scalar", "matrix") if name in case.shapes] or case.shapes[-1:]
    params = {name: x for name, x in case.params(TORCH, "float64").items() if name in shapes}
    # With half of the steps back at STEP, some entries are on their threshold in the diagonal metric as well.
    steps = case.steps(TORCH, params, "float64")
    steps = {name: np.where(np.arange(x.size).reshape(x.shape) % 2, steps[name], STEP) for name, x in params.items()}
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(x.shape) for name, x in params.items()}
    results = []
    for wing in (TORCH, JAX):
        with wing.precision("float64"):
            steps_, weights_ = wing.array(steps, "float64"), wing.array(weights, "float64")

            def total(params, strengths, wing=wing, steps=steps_, weights=weights_):
                penalty = case.make(wing.fr, *strengths)
                out = penalty.value(params) if case.record.has_gradient else 0.0
                if case.record.has_prox:
                    for moved in (penalty.prox(params, STEP), penalty.prox(params, steps)):
                        out = out + sum((weights[name] * y).sum() for name, y in moved.items())
                return out

            strengths = [wing.array(s, "float64") for s in case.strengths]
            results.append(wing.numpy(wing.quick(wing.grad(total, (0, 1)))(wing.array(params, "float64"), strengths)))
    (ours, of_strengths), (theirs, of_strengths_too) = results
    for name in params:
        assert np.all(np.isfinite(ours[name])), name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12, atol=1e-13, err_msg=name)
    assert np.all(np.isfinite(of_strengths))
    np.testing.assert_allclose(of_strengths, of_strengths_too, rtol=1e-12, atol=1e-13)


@each_wing
@with_gradient
def test_the_hessian_is_finite_at_kinks_and_right_elsewhere(wing, case):
    rng = np.random.default_rng(0)
    shape = (1, 2, 3)
    smooth = rng.uniform(0.5, 2.0, shape) * rng.choice([-1, 1], shape)
    kinks = [np.zeros(shape), np.where(np.arange(6).reshape(shape) % 2, smooth, 0.0)]
    with wing.precision("float64"):
        penalty = case.make(wing.fr)
        run = wing.quick(wing.vmap(wing.hessian(lambda x: penalty.value({"w": x}))))
        at_smooth, *at_kinks = wing.numpy(run(wing.array(np.stack([smooth, *kinks]), "float64")))
    assert np.all(np.isfinite(at_kinks))
    h = 1e-5
    for i in np.ndindex(shape):
        e = np.zeros(shape)
        e[i] = h
        column = (case.oracle("grad_", wing, smooth + e) - case.oracle("grad_", wing, smooth - e)) / (2 * h)
        np.testing.assert_allclose(at_smooth[(..., *i)], column, rtol=0, atol=1e-9)


# --- group lasso: derivatives of the prox that is solved, not written down ---

THETA = np.array([1.0, 2.0, 4.0, 8.0])
SPHERE = THETA / 2  # sum (v / theta)^2 = 4 / 4: exactly on the sphere inside which the group is zero
ROWS = {  # point, thresholds, and whether the group is zero
    "zero": (0 * SPHERE, THETA, True),
    "inside": (0.7 * SPHERE, THETA, True),
    "on the sphere": (SPHERE, THETA, True),
    "outside by 1e-12": ((1 + 1e-12) * SPHERE, THETA, False),
    "outside by 1e-6": ((1 + 1e-6) * SPHERE, THETA, False),
    "outside": (np.array([1.5, -2.0, 0.3, 7.0]), THETA, False),
    "far outside": (1e6 * np.array([1.5, -2.0, 0.3, 7.0]), THETA, False),
    "a zero entry": (np.array([1.5, 0.0, 0.3, 7.0]), THETA, False),
    "a zero threshold": (np.array([1.5, -2.0, 0.3, 1.0]), np.array([0.0, 2.0, 4.0, 8.0]), False),
    "neither entry nor threshold": (np.array([0.0, -3.0, 0.3, 7.0]), np.array([0.0, 2.0, 4.0, 8.0]), False),
    "no thresholds": (np.array([1.5, -2.0, 0.3, 7.0]), 0 * THETA, False),
    "nothing": (0 * SPHERE, 0 * THETA, True),
    "wide": (np.array([1.5, -2.0, 0.3, 7.0]), np.array([1e-6, 1e6, 1e-3, 1e3]), False),
}
SMOOTH = ("outside", "a zero entry", "a zero threshold")


def _group_prox(wing):
    return lambda v, theta, lam: wing.fr.functional.prox_group_lasso(v, theta, lam, [-1], "one")


def test_the_derivatives_of_the_group_prox_are_finite_and_the_same_everywhere():
    v, theta = (np.stack([row[i] for row in ROWS.values()]) for i in (0, 1))
    dead = np.array([row[2] for row in ROWS.values()])
    results = []
    for wing in (TORCH, JAX):
        with wing.precision("float64"):
            args = wing.array(v, "float64"), wing.array(theta, "float64"), wing.array(1.0, "float64")
            forward, backward = (
                wing.numpy(wing.quick(wing.vmap(mode(_group_prox(wing), (0, 1, 2)), (0, 0, None)))(*args))
                for mode in (wing.jacfwd, wing.jacrev)
            )
        for a, b in zip(forward, backward, strict=True):
            assert np.all(np.isfinite(a)) and np.all(np.isfinite(b))
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
            assert np.all(a[dead] == 0)
        results.append(forward)
    for ours, theirs in zip(*results, strict=True):
        for i, row in enumerate(ROWS):
            # 1e-12 off the sphere the norm itself, 1e-12, is only known to 1e-16
            bound = 1e-3 if row == "outside by 1e-12" else 1e-9
            np.testing.assert_allclose(ours[i], theirs[i], rtol=bound, atol=bound, err_msg=row)


@each_wing
@pytest.mark.parametrize("metric", [True, False])
def test_the_derivatives_of_the_group_prox_are_right_off_the_kinks(wing, metric):
    """The first against differences of the oracle, the second against differences of the first."""
    v = np.stack([ROWS[row][0] for row in SMOOTH])
    theta = np.stack([ROWS[row][1] for row in SMOOTH]) if metric else np.array([0.5, 1.5, 2.0])
    inputs = (v, theta, np.full(len(SMOOTH), 1.0))
    weights = np.array([0.3, -1.0, 0.7, 0.5])
    with wing.precision("float64"):
        w = wing.array(weights, "float64")

        def weighted(v, theta, lam):
            return (w * _group_prox(wing)(v, theta, lam)).sum()

        gradient = wing.quick(wing.vmap(wing.grad(weighted, (0, 1, 2))))
        second = wing.quick(wing.vmap(wing.hessian(weighted, (0, 1, 2))))
        arrays = [wing.array(a, "float64") for a in inputs]
        first, hessian = wing.numpy(gradient(*arrays)), wing.numpy(second(*arrays))

        def oracle(v, theta, lam):
            rows = [oracles.prox_group_lasso(*row, [-1], "one") for row in zip(v, theta, lam, strict=True)]
            return np.array(rows) @ weights

        h = 1e-5
        for k, given in enumerate(inputs):
            for j in np.ndindex(given.shape[1:]):
                if metric and k == 1 and j == (0,):
                    rows = [0, 1]  # the other row's threshold is 0, and cannot be less
                else:
                    rows = [0, 1, 2]
                step = np.zeros(given.shape)
                step[(rows, *j)] = h
                up, down = ([a + s * step if i == k else a for i, a in enumerate(inputs)] for s in (1, -1))
                np.testing.assert_allclose(
                    first[k][(rows, *j)], ((oracle(*up) - oracle(*down)) / (2 * h))[rows], rtol=1e-8, atol=1e-9
                )
                above, below = (wing.numpy(gradient(*(wing.array(a, "float64") for a in side))) for side in (up, down))
                for m in range(3):
                    difference = (above[m] - below[m])[rows] / (2 * h)
                    found = hessian[m][k][(rows, ..., *j)] if j else hessian[m][k][rows]
                    np.testing.assert_allclose(found, difference, rtol=1e-7, atol=1e-7)


# --- what is no number ---


def _run(wing, case, x, step):
    """Value, gradients and both proxes of one leaf."""
    penalty = case.make(wing.fr)

    def run(x, step):
        out = {}
        if case.record.has_gradient:
            out["grad"] = penalty.grad({"w": x})["w"]
            out["derivative"] = wing.grad(penalty.value)({"w": x})["w"]
        if case.record.has_prox:
            out["prox"] = penalty.prox({"w": x}, STEP)["w"]
            out["metric prox"] = penalty.prox({"w": x}, {"w": step})["w"]
        return penalty.value({"w": x}), out

    quick = wing.quick(run)
    return lambda x: wing.numpy(quick(wing.array(x), wing.array(step)))


def _together(wing, case, place):
    """The entries that share a group with the one at `place`."""
    resolved = case.resolved(wing, SHAPE)
    mask = np.zeros(SHAPE, bool)
    for group in oracles.groups(SHAPE, resolved[0] if resolved else []):
        if place in group:
            mask[tuple(np.array(group).T)] = True
    return mask


@each_wing
@on_a_matrix
def test_nan_and_infinity_stay_in_their_coordinate_or_group(wing, case):
    rng = np.random.default_rng(0)
    x, step, place = np.abs(rng.standard_normal(SHAPE)), rng.uniform(0.1, 1, SHAPE), (1, 2)
    together = _together(wing, case, place)
    run = _run(wing, case, x, step)
    _, clean = run(x)
    for bad in (np.nan, np.inf):
        hurt = x.copy()
        hurt[place] = bad
        value, out = run(hurt)
        if case.record.factory != "custom":
            np.testing.assert_equal(float(value), bad if case.record.has_gradient or np.isnan(bad) else 0.0)
        for what, y in out.items():
            if np.isnan(bad):
                assert np.all(np.isnan(y[together])), what
            elif "prox" in what and case.record.factory != "custom":
                assert not np.isfinite(y[place])
            np.testing.assert_array_equal(y[~together], clean[what][~together])


@each_wing
def test_infinity_of_a_sum_over_coordinates_is_infinity(wing):
    x = wing.array({"w": np.array([np.inf, -np.inf, 1.0])})

    def run(x):
        fr = wing.fr
        return {
            "values": [fr.l1(0.5).value(x), fr.l2(0.5).value(x), fr.non_negative().value(x)],
            "grads": [fr.l1(0.5).grad(x)["w"], fr.l2(0.5).grad(x)["w"], wing.grad(fr.l1(0.5).value)(x)["w"]],
            "proxes": [p.prox(x, 0.5)["w"] for p in (fr.l1(0.5), fr.l2(2.0), fr.non_negative())],
        }

    out = wing.numpy(wing.quick(run)(x))
    assert all(value == np.inf for value in out["values"])
    np.testing.assert_array_equal(out["grads"], [[0.5, -0.5, 0.5], [np.inf, -np.inf, 0.5], [0.5, -0.5, 0.5]])
    np.testing.assert_array_equal(out["proxes"], [[np.inf, -np.inf, 0.75], [np.inf, -np.inf, 0.5], [np.inf, 0, 1]])


@each_wing
def test_the_indicator_is_zero_infinity_or_nan(wing):
    value = wing.quick(lambda x: wing.fr.non_negative().value({"w": x}))
    rows = [
        ([0.0, 2.0], 0.0),
        ([-0.0, 0.0], 0.0),
        ([3e38, 3e38], 0.0),  # whose sum is infinite in float32
        ([np.inf, 1.0], 0.0),
        ([1.0, -1e-30], np.inf),
        ([1.0, -np.inf], np.inf),
        ([1.0, np.nan], np.nan),
    ]
    for entries, want in rows:
        np.testing.assert_equal(float(value(wing.array(entries))), want, err_msg=str(entries))

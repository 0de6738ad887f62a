"""Values, gradients and prox maps of every case against the NumPy oracles; the table itself; what is refused."""

import inspect

import numpy as np
import pytest

import oracles
from cases import CASES, ERRORS, RECORDS, STEP, rounded
from wings import dtype_name, each_wing

each_case = pytest.mark.parametrize("case", CASES, ids=str)
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def factories(wing):
    """The public functions of a wing that make penalties."""
    home = f"{wing.fr.__name__}.penalties."
    return {name for name, f in vars(wing.fr).items() if inspect.isfunction(f) and f.__module__.startswith(home)}


def evaluate(wing, case, params, steps):
    """Everything a penalty computes."""
    penalty = case.make(wing.fr)

    def all_of_it(params, steps):
        out = {"value": penalty.value(params)}
        if case.record.has_gradient:
            out["grad"] = penalty.grad(params)
        if case.record.has_prox:
            out["prox"] = penalty.prox(params, STEP)
            out["metric prox"] = penalty.prox(params, steps)
        return out

    return wing.quick(all_of_it)(params, steps)


def expected(wing, case, params, steps):
    """The same from the oracles."""
    out = {"value": sum(case.oracle("", wing, x) for x in params.values())}
    if case.record.has_gradient:
        out["grad"] = {name: case.oracle("grad_", wing, x) for name, x in params.items()}
    if case.record.has_prox:
        out["prox"] = {name: case.oracle("prox_", wing, x, STEP) for name, x in params.items()}
        out["metric prox"] = {name: case.oracle("prox_", wing, x, steps[name]) for name, x in params.items()}
    return out


@each_wing
def test_every_factory_is_in_the_table(wing):
    assert factories(wing) == {record.factory for record in RECORDS}


@each_wing
@each_case
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_matches_the_oracle(wing, case, dtype):
    eps = EPS[dtype]
    params = case.params(wing, dtype)
    steps = case.steps(wing, params, dtype)
    with wing.precision(dtype):
        out = evaluate(wing, case, wing.array(params, dtype), wing.array(steps, dtype))
        assert dtype_name(out["value"]) == dtype
        got = wing.numpy(out)
    want = expected(wing, case, params, steps)
    assert got.keys() == want.keys()
    assert got["value"] == want["value"] or abs(got["value"] - want["value"]) <= 16 * eps * want["value"]
    on_the_threshold = all(float(np.float16(s)) == s for s in case.strengths)
    for what in got.keys() - {"value"}:
        assert got[what].keys() == params.keys()
        for name, x in params.items():
            y, oracle = got[what][name], want[what][name]
            assert y.shape == x.shape and y.dtype == dtype
            # A gradient is as exact as its largest entry, a prox as the point that it moves.
            scale = np.abs(oracle if what == "grad" else x).max(initial=0) + abs(oracle).max(initial=0)
            assert np.all(np.abs(y - oracle) <= 4 * eps * scale), (what, name)
            if on_the_threshold:
                assert np.array_equal(y == 0, oracle == 0), (what, name)


@each_wing
@each_case
def test_half_precision_accumulates_in_float32_and_keeps_its_dtype(wing, case):
    shapes = [name for name in ("vector", "matrix") if name in case.shapes] or list(case.shapes)
    exact, arrays, exact_steps, step_arrays = {}, {}, {}, {}
    for dtype in ("bfloat16", "float16"):
        params = {name: x for name, x in case.params(wing, dtype).items() if name in shapes}
        for name, step in case.steps(wing, params, dtype).items():
            exact[f"{name} {dtype}"], exact_steps[f"{name} {dtype}"] = params[name], step
            arrays[f"{name} {dtype}"] = wing.array(params[name], dtype)
            step_arrays[f"{name} {dtype}"] = wing.array(step, dtype)
    out = evaluate(wing, case, arrays, step_arrays)
    want = expected(wing, case, exact, exact_steps)
    value = float(wing.numpy(out["value"]))
    assert dtype_name(out["value"]) == "float32"
    assert value == want["value"] or abs(value - want["value"]) <= 16 * EPS["float32"] * want["value"]
    for what in out.keys() - {"value"}:
        for name, x in exact.items():
            dtype = name.split()[-1]
            assert dtype_name(out[what][name]) == dtype
            oracle = want[what][name]
            # float32 inside, rounded to the nearest once; 2^-25 is half the distance of float16's subnormals
            bound = EPS[dtype] / 2 * np.abs(oracle) + 8 * EPS["float32"] * (np.abs(x).max() + np.abs(oracle)) + 2.0**-25
            assert np.all(np.abs(wing.numpy(out[what][name]) - oracle) <= bound), (what, name)


@each_wing
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_neither_saturates_nor_overflows(wing, dtype):
    fr = wing.fr
    norm = fr.group_lasso(1.0, axis=-1, group_scale="one")
    ones = wing.array({"a": np.ones(3000), "b": np.ones((2, 50))}, dtype)  # bfloat16 counts to 256
    large = wing.array({"w": np.full((1, 4), 300.0)}, dtype)  # 300^2 is infinite in float16

    def run(ones, large):
        values = fr.l1(1.0).value(ones), fr.l2(1.0).value(large), norm.value(large)
        return values, norm.grad(large)["w"], norm.prox(large, 300.0)["w"]

    values, grad, prox = wing.numpy(wing.quick(run)(ones, large))
    assert [float(value) for value in values] == [3100, 180_000, 600]
    assert np.array_equal(grad, np.full((1, 4), 0.5))
    assert np.array_equal(prox, np.full((1, 4), 150.0))


@each_wing
@each_case
def test_traits_are_what_the_functions_are(wing, case):
    record, rng = case.record, np.random.default_rng(0)
    with wing.precision("float64"):
        penalty = case.make(wing.fr)
        rules = [part.rule for part in penalty.parts]
        assert record.has_gradient == all(rule.grad is not None for rule in rules)
        assert record.has_prox == all(rule.prox is not None for rule in rules)
        if record.factory != "custom":  # of a custom penalty the library knows no other trait
            assert record.quadratic == all(rule.merges == "quadratic" for rule in rules)
            assert record.separable == all(rule.separable or not rule.strengths for rule in rules)

        def both(x):
            return penalty.value({"w": x}), penalty.grad({"w": x})["w"] if record.has_gradient else x

        run = wing.quick(wing.vmap(both))
        x, y = 2 * rng.standard_normal((2, 20, 1, 2, 3))  # 20 pairs of leaves
        if record.factory == "non_negative":
            x, y = np.abs(x), np.abs(y)
        (at_x, grad_x), (at_y, grad_y), (between, grad_between) = (
            wing.numpy(run(wing.array(leaf, "float64"))) for leaf in (x, y, (x + y) / 2)
        )
        assert np.all(at_x + at_y - 2 * between > -1e-12) == record.convex
        if record.has_gradient:
            affine = np.allclose(grad_x + grad_y, 2 * grad_between, rtol=0, atol=1e-12)
            assert affine == record.quadratic
        coordinates = np.arange(6).reshape(1, 2, 3)
        only = [wing.numpy(run(wing.array(np.where(coordinates == i, x, 0.0), "float64")))[0] for i in range(6)]
        nothing = wing.numpy(run(wing.array(0 * x, "float64")))[0]
        adds_up = np.allclose(np.sum(only, 0) - 5 * nothing, at_x, rtol=1e-12)
        assert adds_up == (record.separable or case.options.get("axis") == ())


@each_wing
@pytest.mark.parametrize("record, error", ERRORS, ids=[f"{r.oracle or r.factory}: {e.name}" for r, e in ERRORS])
def test_wrong_input_is_refused_by_name(wing, record, error):
    with pytest.raises(error.exception) as caught:
        error.call(wing)
    assert error.message in str(caught.value)


# --- group lasso in a diagonal metric: the one prox that is solved and not written down ---


def adversarial_groups(condition, size, scale=1.0, reach=8, count=1000):
    """Points and thresholds that spread over `condition`, near the sphere on which a group becomes zero and far off.

    Newton's method takes the most steps for large groups whose entries follow their thresholds, `10^reach` outside of
    the sphere: 13 for conditions of 1e12.
    """
    rng = np.random.default_rng(int(np.log10(condition)) + size)
    spread = np.log10(condition) / 2
    theta = 10 ** rng.uniform(-spread, spread, (count, size))
    v = theta ** rng.choice([0, 0.5, 1], (count, 1)) * rng.standard_normal((count, size))
    v[rng.random(v.shape) < 0.1] = 0
    theta[rng.random(v.shape) < 0.3 / size] = 0
    v[:5], theta[5:10] = 0, 0
    on_sphere = np.sqrt(oracles.inside(v, theta)).astype(np.float64)
    near = 1 + rng.choice([-1, 1], count) * 10 ** rng.uniform(-8, -1, count)
    far = 10 ** rng.uniform(-2, reach, count)
    rows = (on_sphere > 0) & np.isfinite(on_sphere)
    v[rows] *= (np.where(rng.random(count) < 0.5, near, far)[rows] / on_sphere[rows])[:, None]
    return scale * v, scale * theta


@each_wing
@pytest.mark.parametrize("dtype, bound", [("float64", 1e-15), ("float32", 5e-7)])
def test_group_prox_in_a_diagonal_metric_is_exact(wing, dtype, bound):
    if np.finfo(oracles.WIDE).eps > 1e-18:
        bound += 2e-15  # where long double is no wider than double the oracle rounds as well
    inputs = [adversarial_groups(condition, size) for condition in (1e2, 1e4, 1e8, 1e12) for size in (2, 7, 64)]
    if dtype == "float32":
        inputs += [adversarial_groups(1e4, 7, scale, reach=3) for scale in (1e-30, 1e30)]
    tiny = np.finfo(dtype).tiny  # JAX makes smaller numbers 0 on the CPU
    prox = wing.fr.functional.prox_group_lasso
    with wing.precision(dtype):
        run = wing.quick(lambda v, theta: prox(v, theta, 1.0, [-1], "one"))
        for v, theta in inputs:
            v, theta = rounded(wing, v, dtype), rounded(wing, theta, dtype)
            y = wing.numpy(run(wing.array(v, dtype), wing.array(theta, dtype)))
            want = oracles.shrink_groups(v, theta)
            largest = np.abs(v).max(-1, keepdims=True)
            assert np.all(np.abs(y - want) <= bound * largest + tiny)
            assert np.all(y[v == 0] == 0)
            # Whether a group is zero is decided right, except within rounding of the sphere.
            dead = np.all(want == 0, -1)
            judged = (np.abs(oracles.inside(v, theta) - 1) > 50 * EPS[dtype]) & (
                dead | (np.abs(want).max(-1) > 4 * tiny)
            )
            assert 0.1 < np.mean(dead) < 0.9 and np.mean(judged) > 0.7
            assert np.array_equal(np.all(y == 0, -1)[judged], dead[judged])

"""Properties of proximal operators that need no reference, limits, and sums."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import oracles
from cases import CASES, STEP, rounded
from wings import JAX, TORCH, each_wing

SHAPE = (3, 4)  # of the one leaf most tests here look at
# Cases that differ from another only in an axis or a number are left to the oracles; "middle" axes do not fit SHAPE.
TABLE = [c for c in CASES if not any(text in c.name for text in ("middle", "not exact", "per input", "entries"))]
with_prox = pytest.mark.parametrize("case", [c for c in TABLE if c.record.has_prox], ids=str)
convex = pytest.mark.parametrize("case", [c for c in TABLE if c.record.has_prox and c.record.convex], ids=str)
with_strengths = pytest.mark.parametrize("case", [c for c in TABLE if c.record.strengths], ids=str)

# Half of the entries are kinks: zeros of both signs, the thresholds of the table's strengths.
_kinks = st.sampled_from([0.0, -0.0, 0.125, -0.125, 0.25, -0.25, 0.5])
points = arrays(np.float64, SHAPE, elements=_kinks | st.floats(-4, 4, allow_subnormal=False))
metrics = arrays(np.float64, SHAPE, elements=st.sampled_from([STEP]) | st.floats(0.0625, 8))


def prox_of(wing, penalty):
    """(point, steps) -> prox, on one leaf "w" of NumPy arrays in float64."""
    run = wing.quick(lambda x, step: penalty.prox({"w": x}, {"w": step})["w"])
    return lambda x, step: wing.numpy(run(wing.array(x, "float64"), wing.array(step, "float64")))


def competitors(rng, x, y):
    """Points that might do better than `y`: near it, far from it, with entries and groups set to 0 or back to `x`."""
    for size in (2.0, 1e-1, 1e-3, 1e-6):
        for sparse in (1.0, 0.3):
            yield y + size * rng.standard_normal(y.shape) * (rng.random(y.shape) < sparse)
    yield x
    for i in range(y.shape[0]):
        yield np.where(np.arange(y.shape[0])[:, None] == i, 0.0, y)
    for j in range(y.shape[1]):
        yield np.where(np.arange(y.shape[1]) == j, 0.0, y)
    for _ in range(3):
        yield np.where(rng.random(y.shape) < 0.5, 0.0, y)
        yield np.where(rng.random(y.shape) < 0.5, y, x)
        yield y * (1 + 1e-3 * rng.standard_normal())


def assert_minimises(value, is_convex, x, step, y):
    """`y` minimises `value(y) + sum (y - x)^2 / (2 step)`.

    For a convex value that is to say that `(x - y) / step` is a subgradient of it at `y`: the competitor's distance is
    not given to it, so that an error of `y` shows to first order.
    """
    rng = np.random.default_rng(0)
    residual = (x - y) / step
    for z in competitors(rng, x, y):
        distance = 0.0 if is_convex else np.sum((z - y) ** 2 / (2 * step))
        before, after = value(y), value(z)
        gain = before + np.sum(residual * (z - y)) - after - distance
        size = (
            abs(before)
            + (abs(after) if np.isfinite(after) else 0)
            + np.sum((np.abs(x) + np.abs(y)) / step * np.abs(z - y))
        )
        assert gain <= 16 * oracles.ULP * size, (gain, z)


@each_wing
@with_prox
def test_prox_minimises_its_objective(wing, case):
    with wing.precision("float64"):
        prox = prox_of(wing, case.make(wing.fr))

        @settings(max_examples=12)
        @given(points, metrics)
        def check(x, step):
            y = prox(x, step)
            assert_minimises(lambda z: case.oracle("", wing, z), case.record.convex, x, step, y)

        check()


@each_wing
@convex
def test_prox_is_firmly_nonexpansive(wing, case):
    with wing.precision("float64"):
        prox = prox_of(wing, case.make(wing.fr))

        @settings(max_examples=40)
        @given(points, points, metrics)
        def check(x, z, step):
            moved = prox(x, step) - prox(z, step)
            # in the norm of the metric 1 / step
            assert np.sum(moved**2 / step) <= np.sum(moved * (x - z) / step) + 1e-14 * np.sum((x**2 + z**2) / step)

        check()


@each_wing
@with_prox
def test_the_gradient_of_the_moreau_envelope_is_the_residual_of_the_prox(wing, case):
    rng = np.random.default_rng(0)
    x, step = rng.standard_normal(SHAPE), 10 ** rng.uniform(-1, 1, SHAPE)
    x[0], x[:, 0], x[1, 1] = 0.0, 0.0, 0.125
    with wing.precision("float64"):
        penalty = case.make(wing.fr)

        def envelope(x, step):
            y = penalty.prox({"w": x}, {"w": step})
            return penalty.value(y) + ((y["w"] - x) ** 2 / (2 * step)).sum()

        gradient = wing.numpy(wing.quick(wing.grad(envelope))(wing.array(x, "float64"), wing.array(step, "float64")))
        residual = (x - prox_of(wing, penalty)(x, step)) / step
    np.testing.assert_allclose(gradient, residual, rtol=0, atol=1e-13 * np.max(np.abs(residual)))


@each_wing
@pytest.mark.parametrize("case", [c for c in CASES if c.record.has_prox and c.record.has_gradient], ids=str)
def test_prox_leaves_along_the_minimal_norm_subgradient(wing, case):
    """`(x - prox_t(x)) / t -> grad(x)` as `t -> 0`, kinks included."""
    step = 2.0**-30
    params = {name: x for name, x in case.params(wing, "float64").items() if x.size}
    with wing.precision("float64"):
        penalty = case.make(wing.fr)
        run = wing.quick(lambda params: (penalty.prox(params, step), penalty.grad(params)))
        moved, gradient = wing.numpy(run(wing.array(params, "float64")))
    for name, x in params.items():
        np.testing.assert_allclose((x - moved[name]) / step, gradient[name], rtol=0, atol=1e-6)
        assert np.any(gradient[name]) or not np.any(x) or len(case.strengths) == 2


@each_wing
@pytest.mark.parametrize("case", [c for c in TABLE if c.record.has_prox and c.record.strengths], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_step_zero_and_strength_zero_return_the_input_exactly(wing, case, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 5, 6)) * (rng.random((4, 5, 6)) < 0.9)
    x[0, 0], x[1, 1], x[2] = -0.0, 1e-6 * x[1, 1], 1e6 * x[2]
    x = rounded(wing, x, dtype)
    step = rounded(wing, 10 ** rng.uniform(-2, 1, x.shape), dtype)
    nothing = (0.0, *case.strengths[1:]) if case.record.factory == "custom" else (0.0,) * len(case.strengths)
    with wing.precision(dtype):
        penalty, idle = case.make(wing.fr), case.make(wing.fr, *nothing)

        def proxes(x, step):
            zero = penalty.prox({"w": x}, 0.0), penalty.prox({"w": x}, {"w": 0 * step})
            return *zero, idle.prox({"w": x}, STEP), idle.prox({"w": x}, {"w": step})

        got = wing.numpy(wing.quick(proxes)(wing.array(x, dtype), wing.array(step, dtype)))
    for what, y in zip(("step 0", "steps 0", "strength 0", "strength 0, steps"), got, strict=True):
        assert np.array_equal(y["w"], x), what


# --- limits ---


def everything(wing, penalty, params, step):
    """Value, gradient and both proxes."""
    run = wing.quick(lambda p, t: (penalty.value(p), penalty.grad(p), penalty.prox(p, STEP), penalty.prox(p, t)))
    return wing.numpy(run(wing.array(params, "float64"), wing.array(step, "float64")))


_column = (5, 1)
LIMITS = {
    "elastic_net without l2 is l1": (lambda fr: fr.elastic_net(0.3, 0.0), lambda fr: fr.l1(0.3), SHAPE),
    "elastic_net without l1 is l2": (lambda fr: fr.elastic_net(0.0, 0.3), lambda fr: fr.l2(0.3), SHAPE),
    "groups of one are l1": (lambda fr: fr.group_lasso(0.3, axis=-1), lambda fr: fr.l1(0.3), _column),
    "groups of one, scale one": (
        lambda fr: fr.group_lasso(0.3, axis=-1, group_scale="one"),
        lambda fr: fr.l1(0.3),
        _column,
    ),
    "groups without axes are l1": (lambda fr: fr.group_lasso(0.3, axis=()), lambda fr: fr.l1(0.3), SHAPE),
    "one group per entry of a vector": (lambda fr: fr.group_lasso(0.3, per="output"), lambda fr: fr.l1(0.3), (5,)),
    "sparse group without groups is l1": (
        lambda fr: fr.sparse_group_lasso(0.3, 0.0, axis=-1),
        lambda fr: fr.l1(0.3),
        SHAPE,
    ),
    "sparse group without l1 is group": (
        lambda fr: fr.sparse_group_lasso(0.0, 0.3, axis=-1),
        lambda fr: fr.group_lasso(0.3, axis=-1),
        SHAPE,
    ),
    "the scale is the root of the size": (
        lambda fr: fr.group_lasso(0.3, axis=-1),
        lambda fr: fr.group_lasso(0.6, axis=-1, group_scale="one"),
        SHAPE,  # groups of four
    ),
}


@each_wing
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(wing, limit):
    left, right, shape = LIMITS[limit]
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal(shape) * (rng.random(shape) < 0.8), "zeros": np.zeros(shape)}
    step = {name: 10 ** rng.uniform(-1, 0.5, shape) for name in params}
    with wing.precision("float64"):
        got, want = (everything(wing, make(wing.fr), params, step) for make in (left, right))
    assert abs(got[0] - want[0]) <= 4 * oracles.ULP * want[0]
    for tree, other in zip(got[1:], want[1:], strict=True):
        for name in params:
            assert np.all(np.abs(tree[name] - other[name]) <= 8 * oracles.ULP * np.abs(params[name]).max() + 1e-300)


def test_per_output_and_per_input_name_the_same_weights_on_both_wings():
    """torch has (out, in) and (out, in, h, w), flax (in, out) and (h, w, in, out)."""
    rng = np.random.default_rng(0)
    ours = {"dense": rng.standard_normal((3, 4)), "conv": rng.standard_normal((3, 2, 5, 5))}
    theirs = {"dense": ours["dense"].T, "conv": ours["conv"].transpose(2, 3, 1, 0)}
    for per, units in (("output", {"dense": 3, "conv": 3}), ("input", {"dense": 4, "conv": 2})):
        values = []
        for wing, params in ((TORCH, ours), (JAX, theirs)):
            with wing.precision("float64"):
                penalty = wing.fr.group_lasso(1.0, per=per, group_scale="one")
                run = wing.quick(lambda p, penalty=penalty: [penalty.value(leaf) for leaf in p.values()])
                values.append(wing.numpy(run(wing.array({k: {k: x} for k, x in params.items()}, "float64"))))
                ones = {k: {k: np.ones_like(x)} for k, x in params.items()}
                counted = sorted(n * (params[k].size / n) ** 0.5 for k, n in units.items())  # n norms of size / n ones
                np.testing.assert_allclose(sorted(wing.numpy(run(wing.array(ones, "float64")))), counted, rtol=1e-14)
        np.testing.assert_allclose(sorted(values[0]), sorted(values[1]), rtol=1e-14)


# --- sums ---

_rng = np.random.default_rng(5)
A, B, F = _rng.standard_normal(SHAPE), _rng.standard_normal(SHAPE), _rng.uniform(0, 3, SHAPE)
F[0, :2] = 0.0


@dataclass(frozen=True)
class Sum:
    """A sum of penalties: how it is built, its value by the formula, its prox by the oracle (None: only minimality)."""

    name: str
    make: Any  # (fr, tree of A, tree of B, tree of F) -> Penalty
    value: Any
    prox: Any = None

    def __str__(self):
        return self.name


def _rows(y):
    return 2.0 * np.sum(np.sqrt(np.sum(y**2, -1)))  # omega = sqrt(4)


def _columns(y):
    return np.sum(np.sqrt(np.sum(y**2, 0)))


def _abs(y):
    return np.sum(np.abs(y))


def _half(y):
    return np.sum(y**2) / 2


_by_row = {"axis": [-1], "group_scale": "sqrt_size"}

SUMS = [
    Sum(
        "l1 + l2",
        lambda fr, a, b, f: fr.l1(0.2) + fr.l2(0.5),
        lambda y: 0.2 * _abs(y) + 0.5 * _half(y),
        lambda x, t: oracles.prox_sum(x, t, l1=0.2, quadratic=[(0.5, 0)]),
    ),
    Sum(
        "l1 + l1",
        lambda fr, a, b, f: fr.l1(0.2) + fr.l1(0.1),
        lambda y: 0.2 * _abs(y) + 0.1 * _abs(y),
        lambda x, t: oracles.prox_l1(x, t, 0.3),
    ),
    Sum(
        "group + group",
        lambda fr, a, b, f: fr.group_lasso(0.1, axis=-1) + fr.group_lasso(0.15, axis=-1),
        lambda y: 0.25 * _rows(y),
        lambda x, t: oracles.prox_group_lasso(x, t, 0.25, [-1], "sqrt_size"),
    ),
    Sum(
        "group + l1 + l2",
        lambda fr, a, b, f: fr.group_lasso(0.1, axis=-1) + fr.l1(0.2) + fr.l2(0.5),
        lambda y: 0.1 * _rows(y) + 0.2 * _abs(y) + 0.5 * _half(y),
        lambda x, t: oracles.prox_sum(x, t, l1=0.2, quadratic=[(0.5, 0)], group=0.1, **_by_row),
    ),
    Sum(
        "elastic net + sparse group + l1, with factors",
        lambda fr, a, b, f: (
            0.5 * fr.elastic_net(0.2, 0.6) + fr.sparse_group_lasso(0.02, 0.05, axis=-1) * 2 + fr.l1(0.06)
        ),
        lambda y: 0.2 * _abs(y) + 0.3 * _half(y) + 0.1 * _rows(y),
        lambda x, t: oracles.prox_sum(x, t, l1=0.2, quadratic=[(0.3, 0)], group=0.1, **_by_row),
    ),
    Sum(
        "anchored l2 + l1",
        lambda fr, a, b, f: fr.anchored(fr.l2(0.5), a) + fr.l1(0.2),
        lambda y: 0.5 * _half(y - A) + 0.2 * _abs(y),
        lambda x, t: oracles.prox_sum(x, t, l1=0.2, quadratic=[(0.5, A)]),
    ),
    Sum(
        "two anchors",
        lambda fr, a, b, f: fr.anchored(fr.l2(0.5), a) + 2 * fr.anchored(fr.l2(0.25), b) + fr.l2(0.1),
        lambda y: 0.5 * _half(y - A) + 0.5 * _half(y - B) + 0.1 * _half(y),
        lambda x, t: oracles.prox_sum(x, t, quadratic=[(0.5, A), (0.5, B), (0.1, 0)]),
    ),
    Sum(
        "importance + group",
        lambda fr, a, b, f: fr.anchored(fr.l2(0.5), a, importance=f) + fr.group_lasso(0.1, axis=-1),
        lambda y: 0.5 * np.sum(F * (y - A) ** 2) / 2 + 0.1 * _rows(y),
        lambda x, t: oracles.prox_sum(x, t, quadratic=[(0.5 * F, A)], group=0.1, **_by_row),
    ),
    Sum(
        "importance with a factor + l1",
        lambda fr, a, b, f: 2 * fr.anchored(fr.l2(0.25), a, importance=f) + fr.l1(0.2),
        lambda y: 0.5 * np.sum(F * (y - A) ** 2) / 2 + 0.2 * _abs(y),
        lambda x, t: oracles.prox_sum(x, t, l1=0.2, quadratic=[(0.5 * F, A)]),
    ),
    Sum(
        "anchored l1",
        lambda fr, a, b, f: fr.anchored(fr.l1(0.2), a),
        lambda y: 0.2 * _abs(y - A),
        lambda x, t: A + oracles.prox_l1(x - A, t, 0.2),
    ),
    Sum(
        "anchored l1 with importance + l2",
        lambda fr, a, b, f: fr.anchored(fr.l1(0.2), a, importance=f) + fr.l2(0.5),
        lambda y: 0.2 * np.sum(F * np.abs(y - A)) + 0.5 * _half(y),
    ),
    Sum(
        "anchored group + anchored l2",
        lambda fr, a, b, f: (
            fr.anchored(fr.group_lasso(0.3, axis=-2, group_scale="one"), b) + fr.anchored(fr.l2(0.5), a)
        ),
        lambda y: 0.3 * _columns(y - B) + 0.5 * _half(y - A),
    ),
    Sum(
        "non_negative + anchored l2",
        lambda fr, a, b, f: fr.non_negative() + fr.anchored(fr.l2(0.5), a),
        lambda y: np.inf if np.any(y < 0) else 0.5 * _half(y - A),
        lambda x, t: np.maximum(oracles.prox_sum(x, t, quadratic=[(0.5, A)]), 0),
    ),
    Sum(
        "custom + l2, with a factor",
        lambda fr, a, b, f: 2 * (CASES[-2].make(fr) + fr.l2(0.1)),
        lambda y: 2 * oracles.pull(y, 0.5, 1.0) + 0.2 * _half(y),
        lambda x, t: oracles.prox_sum(x, t, quadratic=[(1.0, 1.0), (0.2, 0)]),
    ),
    Sum(
        "group and factor zero",
        lambda fr, a, b, f: fr.group_lasso(0.1, axis=-1) + 0.0 * fr.l1(0.2) + 0 * fr.l2(0.5),
        lambda y: 0.1 * _rows(y),
        lambda x, t: oracles.prox_group_lasso(x, t, 0.1, [-1], "sqrt_size"),
    ),
]


@each_wing
@pytest.mark.parametrize("total", SUMS, ids=str)
def test_the_prox_of_a_sum_is_exact(wing, total):
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal(SHAPE)
    x[0], x[1, :2] = 0.02, 0.0
    metric = 10 ** rng.uniform(-1, 0.5, SHAPE)
    with wing.precision("float64"):
        penalty = total.make(wing.fr, *(wing.array({"w": leaf}, "float64") for leaf in (A, B, F)))
        point = wing.array({"w": x}, "float64")
        run = wing.quick(lambda p, t: (penalty.value(p), penalty.prox(p, 0.7)["w"], penalty.prox(p, t)["w"]))
        value, scalar_prox, metric_prox = wing.numpy(run(point, wing.array({"w": metric}, "float64")))
    assert value == total.value(x) or abs(value - total.value(x)) <= 16 * oracles.ULP * abs(value)
    for step, y in ((np.full(SHAPE, 0.7), scalar_prox), (metric, metric_prox)):
        assert_minimises(total.value, True, x, step, y)
        if total.prox is not None:
            want = total.prox(x, step)
            assert np.all(np.abs(y - want) <= 16 * oracles.ULP * (1 + np.abs(x).max()))
            assert np.array_equal(y == 0, want == 0)


REFUSED = {
    "anchored l1 and l1": lambda fr, a: fr.anchored(fr.l1(0.1), a) + fr.l1(0.1),
    "anchored group and l1": lambda fr, a: fr.anchored(fr.group_lasso(0.1, axis=-1), a) + fr.l1(0.1),
    "groups along different axes": lambda fr, a: fr.group_lasso(0.1, axis=-1) + fr.group_lasso(0.1, axis=-2),
    "groups with different scales": lambda fr, a: (
        fr.group_lasso(0.1, axis=-1) + fr.group_lasso(0.1, axis=-1, group_scale="one")
    ),
    "l1 and non_negative": lambda fr, a: fr.l1(0.1) + fr.l2(0.1) + fr.non_negative(),
    "custom and l1": lambda fr, a: CASES[-2].make(fr) + fr.l1(0.1),
}


@each_wing
@pytest.mark.parametrize("name", REFUSED)
def test_a_sum_without_a_closed_prox_is_refused_by_leaf_and_parts(wing, name):
    params = wing.array({"layer": {"w": A, "v": B}})
    penalty = REFUSED[name](wing.fr, params)
    with pytest.raises(wing.fr.NoProxError) as caught:
        penalty.prox(params, 0.5)
    # JAX sorts keys, torch does not: either leaf may be the first
    assert "on the leaf 'layer." in str(caught.value)
    parts = {part.rule.name for part in penalty.parts} - {"l2"}
    assert all(part in str(caught.value).split("is not implemented")[0] for part in parts)
    first, *others = penalty.parts
    apart = type(penalty)((first,)).on("layer.w") + type(penalty)(tuple(others)).on("layer.v")
    apart.prox(params, 0.5)  # on different leaves they do not meet


# --- one penalty per member ---


@each_wing
@with_strengths
def test_vmap_over_strengths_is_the_loop_and_a_penalty_is_a_vmap_result(wing, case):
    rng = np.random.default_rng(0)
    strengths = [np.array(s * np.array([0.0, 1.0, 3.0])) for s in case.strengths]
    x, step = rng.standard_normal(SHAPE), 10 ** rng.uniform(-1, 0.5, SHAPE)
    x[0] = 0.0
    with wing.precision("float64"):
        params, steps = wing.array({"w": x}, "float64"), wing.array({"w": step}, "float64")

        def use(penalty):
            out = [penalty.value(params), penalty.grad(params)["w"]]
            if case.record.has_prox:
                out += [penalty.prox(params, STEP)["w"], penalty.prox(params, steps)["w"]]
            return out

        def make(*strengths):
            return case.make(wing.fr, *strengths)

        batched = [wing.array(s, "float64") for s in strengths]
        at_once = wing.numpy(wing.quick(wing.vmap(lambda *s: use(make(*s))))(*batched))
        members = wing.vmap(make)(*batched)
        through = wing.numpy(wing.quick(wing.vmap(use))(members))
        one = wing.quick(use)
        for i in range(3):
            alone = wing.numpy(one(make(*(wing.array(s[i], "float64") for s in strengths))))
            for a, b, want in zip(at_once, through, alone, strict=True):
                assert np.all(np.abs(a[i] - want) <= 8 * oracles.ULP * np.abs(want).max() + 1e-300)
                assert np.array_equal(a, b)
    assert np.any(at_once[0][2] != at_once[0][1])

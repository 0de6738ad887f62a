"""Penalties inside the frameworks' transforms: vmap of grad, jit, torch.compile, arguments, results, derivatives."""

import numpy as np
import pytest
import torch

import oracles
from cases import CASES
from wings import TORCH, each_wing, inductor

# Leaves of a small network; "norm" has the names of a normalization layer.
NETWORK = {
    "hidden.weight": (3, 4),
    "hidden.bias": (3,),
    "norm.weight": (3,),
    "out.weight": (2, 3),
}

# What `.on` takes, and the leaves it selects.
CHOICES = {
    "glob": lambda wing: ("*.weight", {"hidden.weight", "norm.weight", "out.weight"}),
    "globs with negation": lambda wing: (["hidden", "out", "!*.bias"], {"hidden.weight", "out.weight"}),
    "negation": lambda wing: (["!norm", "!*.bias"], {"hidden.weight", "out.weight"}),
    "character class": lambda wing: ("[ho]*.w?ight", {"hidden.weight", "out.weight"}),
    "weights": lambda wing: (wing.fr.weights, {"hidden.weight", "out.weight"}),
    "biases": lambda wing: (wing.fr.biases, {"hidden.bias"}),
    "norms": lambda wing: (wing.fr.norms, {"norm.weight"}),
    "function": lambda wing: (lambda name, leaf: len(leaf.shape) == 1, {"hidden.bias", "norm.weight"}),
    "tree of bools": lambda wing: (
        {"hidden": True, "norm.weight": False, "out.weight": True},
        {"hidden.weight", "hidden.bias", "out.weight"},
    ),
    "everything": lambda wing: ("*", set(NETWORK)),
}


def members(seed=0, *batch, shapes=None):
    """Parameters with some exact zeros, as any training with a prox has them."""
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal((*batch, *shape)) for name, shape in (shapes or NETWORK).items()}
    for x in params.values():
        x[..., 0] = 0.0
    return params


def metric(shapes, full=("hidden.weight",)):
    """A step per coordinate for the leaves in `full`, a scalar for the others."""
    rng = np.random.default_rng(9)
    return {name: 10 ** rng.uniform(-1, 0.5, shape if name in full else ()) for name, shape in shapes.items()}


def use(penalty, record, params, steps):
    """All that a penalty has."""
    out = {"value": penalty.value(params)}
    if record.has_gradient:
        out["grad"] = penalty.grad(params)
    if record.has_prox:
        out["prox"] = penalty.prox(params, steps)
    return out


def assert_same(got, want, ulps=8):
    """Trees equal up to a few units in the last place of the largest entry of a leaf."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for name in want:
            assert_same(got[name], want[name], ulps)
    elif isinstance(want, tuple | list):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b, ulps)
    else:
        assert got.shape == want.shape and got.dtype == want.dtype
        scale = np.abs(want[np.isfinite(want)]).max(initial=0)
        np.testing.assert_allclose(got, want, rtol=0, atol=ulps * np.finfo(want.dtype).eps * scale)


def traced(wing, function):
    """The compiled function, and a list that grows by one with every compilation of it."""
    traces = []
    if wing.name == "torch":

        def backend(graph, inputs):
            traces.append(1)
            return graph.forward

        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend=backend), traces

    def counted(*args):
        traces.append(1)  # JAX runs the Python of a function when it traces it, and never again
        return function(*args)

    return wing.jit(counted), traces


FLAT = [case for case in CASES if "middle" not in case.name]  # whose axes the leaves of NETWORK have, or all but
QUICK = [case for case in FLAT if "group" not in case.name or "rows" in case.name]  # the others compile the same loops
MATRICES = [case for case in FLAT if case.options.get("axis") == (-2, -1)]  # for which they need two axes


@each_wing
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow, id=str(c)) for c in FLAT]
)
def test_compiled_equals_eager(wing, case):
    """jit; torch.compile(fullgraph=True)."""
    network = {name: x for name, x in NETWORK.items() if name != "norm.weight"}
    # The 16 steps of the group lasso in a diagonal metric take long to trace; all its cases run the same.
    full = () if "group" in case.name and "rows" not in case.name else ("hidden.weight",)
    with wing.precision("float64"):
        params, steps = wing.array(members(shapes=network), "float64"), wing.array(metric(network, full), "float64")

        def run(params, steps):
            return use(case.make(wing.fr).on(wing.fr.weights), case.record, params, steps)

        eager = wing.numpy(run(params, steps))
        torch._dynamo.reset()
        assert_same(wing.numpy(wing.jit(run)(params, steps)), eager)


@each_wing
@pytest.mark.parametrize("choice", CHOICES)
def test_selectors_are_traced(wing, choice):
    """torch.compile(fullgraph=True) runs the matching of names in its own interpreter of Python."""
    selector, chosen = CHOICES[choice](wing)
    x = members()
    with wing.precision("float64"):
        params = wing.array(x, "float64")
        penalty = wing.fr.l1(0.5)
        torch._dynamo.reset()
        got = wing.numpy(wing.jit(lambda params: penalty.on(selector).grad(params))(params))
    for name in NETWORK:
        np.testing.assert_array_equal(got[name], 0.5 * np.sign(x[name]) * (name in chosen))


@each_wing
@pytest.mark.parametrize("case", [c for c in FLAT if c.record.has_gradient], ids=str)
def test_vmap_of_grad_over_members_is_the_loop(wing, case):
    stacked = members(1, 3)
    if case in MATRICES:
        stacked = {name: x for name, x in stacked.items() if x.ndim == 3}
    with wing.precision("float64"):
        penalty = case.make(wing.fr)
        at_once = wing.quick(wing.vmap(wing.value_and_grad(penalty.value)))
        values, grads = wing.numpy(at_once(wing.array(stacked, "float64")))
    for i in range(3):
        for name, x in stacked.items():
            assert_same(grads[name][i], case.oracle("grad_", wing, x[i]), ulps=8)
        want = sum(case.oracle("", wing, x[i]) for x in stacked.values())
        assert abs(values[i] - want) <= 16 * oracles.ULP * want


def _mixed(fr, lam, factor, anchor, importance):
    """Every kind of strength there is."""
    return (
        fr.elastic_net(lam, 2.0 * lam)
        + factor * fr.group_lasso(lam, axis=-1).on(fr.weights)
        + fr.anchored(fr.l2(lam), anchor, importance).on("hidden")
    )


PAIRS = [(0.1, 0.5), (0.2, 0.25), (0.0, 1.0)]


def _strengths(wing):
    """(lam, factor) -> penalty, parameters, and PAIRS as arrays."""
    anchor = wing.array(members(2), "float64")
    importance = wing.array({name: np.abs(x) for name, x in members(3).items()}, "float64")
    arrays = [tuple(wing.array(s, "float64") for s in pair) for pair in PAIRS]
    return (
        lambda lam, factor: _mixed(wing.fr, lam, factor, anchor, importance),
        wing.array(members(), "float64"),
        arrays,
    )


@each_wing
def test_array_strengths_do_not_recompile_inside_or_in_a_penalty_argument(wing):
    with wing.precision("float64"):
        make, params, arrays = _strengths(wing)

        def run(penalty, params):
            return penalty.value(params), penalty.prox(params, 0.5)

        inside, traces_inside = traced(wing, lambda lam, factor, params: run(make(lam, factor), params))
        argument, traces_argument = traced(wing, run)
        plain = wing.quick(lambda lam, factor, params: run(make(lam, factor), params))
        values = []
        for pair in arrays:
            want = wing.numpy(plain(*pair, params))
            assert_same(wing.numpy(inside(*pair, params)), want)
            assert_same(wing.numpy(argument(make(*pair), params)), want)
            values.append(float(want[0]))
    assert len(traces_inside) == 1
    assert len(traces_argument) == 1
    assert len(set(values)) == 3


@each_wing
def test_a_penalty_is_the_result_of_vmap_and_of_compiled_functions(wing):
    with wing.precision("float64"):
        make, params, arrays = _strengths(wing)
        one = wing.quick(lambda lam, factor: make(lam, factor).value(params))
        want = np.array([wing.numpy(one(*pair)) for pair in arrays])
        torch._dynamo.reset()
        # A penalty for every member, made by vmap and used by vmap, compiled.
        lams, factors = (wing.array(s, "float64") for s in np.array(PAIRS).T)
        penalties = wing.vmap(make)(lams, factors)
        assert type(penalties) is wing.fr.Penalty
        values = wing.jit(wing.vmap(lambda penalty: penalty.value(params)))(penalties)
        assert_same(wing.numpy(values), want)
        # Out of a compiled function, scaled by an array inside it.
        scaled = wing.jit(lambda penalty, factor: factor * penalty)(make(*arrays[0]), wing.array(3.0, "float64"))
        assert type(scaled) is wing.fr.Penalty
        np.testing.assert_allclose(wing.numpy(wing.quick(scaled.value)(params)), 3 * want[0], rtol=1e-14)


@each_wing
def test_number_strengths_recompile_at_most_once(wing):
    """On JAX a number is a traced scalar like any other; torch.compile makes it symbolic when it sees a second one."""
    with wing.precision("float32"):
        params = wing.array(members())

        def run(penalty, lam, params):
            return penalty.value(params), wing.fr.l1(lam).prox(params, 0.5)

        compiled, traces = traced(wing, run)
        for lam in (0.1, 0.2, 0.3, 0.4):
            penalty = 0.5 * wing.fr.l1(lam).on(wing.fr.weights)
            got, want = compiled(penalty, lam, params), run(penalty, lam, params)
            assert_same(wing.numpy(got), wing.numpy(want))
    assert len(traces) == (1 if wing.name == "jax" else 2)


@each_wing
def test_equal_penalties_share_a_compiled_program_and_other_selectors_do_not(wing):
    with wing.precision("float32"):
        params = wing.array(members())
        compiled, traces = traced(wing, lambda penalty, params: penalty.value(params))
        for selector in ("*.weight", wing.fr.weights, ["hidden", "!*.bias"]):
            for lam in (0.1, 0.2):
                penalty = wing.fr.group_lasso(wing.array(lam), axis=-1).on(selector)
                np.testing.assert_allclose(compiled(penalty, params), penalty.value(params), rtol=1e-6)
    assert len(traces) == 3


@each_wing
def test_penalties_are_differentiable_in_every_strength(wing):
    """d/d lam, factor, anchor and importance of `l1(lam) + factor * anchored(l2(lam), a, F)`, against the formula."""
    w, a, importance = members(0), members(1), {name: np.abs(x) for name, x in members(2).items()}
    lam, factor = 0.3, 0.7
    with wing.precision("float64"):
        params = wing.array(w, "float64")

        def value(lam, factor, a, importance):
            fr = wing.fr
            return (fr.l1(lam) + factor * fr.anchored(fr.l2(lam), a, importance)).value(params)

        args = [wing.array(x, "float64") for x in (lam, factor, a, importance)]
        got = wing.numpy(wing.quick(wing.grad(value, (0, 1, 2, 3)))(*args))
    distance = {name: sum((importance[name] * (w[name] - a[name]) ** 2).flat) / 2 for name in w}
    np.testing.assert_allclose(got[0], sum(np.abs(x).sum() for x in w.values()) + factor * sum(distance.values()))
    np.testing.assert_allclose(got[1], lam * sum(distance.values()))
    for name in w:
        np.testing.assert_allclose(got[2][name], factor * lam * importance[name] * (a[name] - w[name]), atol=1e-15)
        np.testing.assert_allclose(got[3][name], factor * lam * (w[name] - a[name]) ** 2 / 2, atol=1e-15)


@each_wing
def test_training_steps_compose(wing):
    """vmap of (gradient of a penalized loss, then a proximal step) over members and their strengths, compiled."""
    case = next(c for c in CASES if c.name == "sparse_group_lasso rows")
    stacked = members(3, 2)
    strengths = [np.array([s, 2 * s]) for s in case.strengths]
    with wing.precision("float64"):

        def step(params, *strengths):
            penalty = case.make(wing.fr, *strengths)
            loss = wing.fr.penalize(lambda p: sum(((x - 1.0) ** 2).sum() for x in p.values()), penalty)
            gradient = wing.grad(loss)(params)
            return penalty.prox({k: x - 0.1 * gradient[k] for k, x in params.items()}, 0.1)

        torch._dynamo.reset()
        args = [wing.array(x, "float64") for x in (stacked, *strengths)]
        got = wing.numpy(wing.jit(wing.vmap(step))(*args))
    for i in range(2):
        one = [float(s[i]) for s in strengths]
        oracle = case.record.oracle_of("grad_"), case.record.oracle_of("prox_")
        for leaf, x in stacked.items():
            rest = (*one, *case.resolved(wing, x.shape[1:]))
            moved = x[i] - 0.1 * (2 * (x[i] - 1.0) + oracle[0](x[i], *rest))
            np.testing.assert_allclose(got[leaf][i], oracle[1](moved, 0.1, *rest), rtol=1e-13, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elastic_net", "sparse_group_lasso rows"])
def test_inductor_equals_eager(name):
    """torch's own compiler, to machine code."""
    case = next(c for c in CASES if c.name == name)
    params, steps = TORCH.array(members()), TORCH.array(metric(NETWORK))

    def run(params, steps):
        return use(case.make(TORCH.fr).on("hidden.weight"), case.record, params, steps)

    with inductor():
        compiled = torch.compile(run, fullgraph=True)(params, steps)
    assert_same(TORCH.numpy(compiled), TORCH.numpy(run(params, steps)))

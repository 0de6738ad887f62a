"""`interop.check` and `check_training`: right about a corpus of known pairs, and about what cannot be compared."""

import doctest
import functools
import json
import math
import sys
import tracemalloc

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import funcreg.jax as frj
import funcreg.torch as frt
import parity_corpus
from funcreg import interop
from interop import Verdict, verdict
from interop._measure import BLOCK, compare, movement
from interop._nudge import DRAWS, nudge
from interop._orders import table
from interop.verdict import Evidence, judge

ROUNDING, SEMANTIC, INCONCLUSIVE = Verdict
X = np.random.default_rng(0).normal(size=(4, 3))


# --- the corpus ---


@functools.cache
def results(held_out):
    """The pairs of one half, checked. Compiled without optimizations: it takes half the time."""
    aside = parity_corpus.held_out()
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction divides by an integer power
            return [(pair, pair.check()) for pair in parity_corpus.PAIRS if (pair.name in aside) == held_out]
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_the_corpus_is_balanced_and_so_are_its_halves():
    truths = {pair.name: pair.truth for pair in parity_corpus.PAIRS}
    assert len(truths) == len(parity_corpus.PAIRS) >= 70
    aside = parity_corpus.held_out()
    for half in (aside, set(truths) - aside):
        semantic = sum(truths[name] is SEMANTIC for name in half)
        assert 0.45 * len(half) <= semantic <= 0.55 * len(half)
    assert sum(pair.training for pair in parity_corpus.PAIRS) >= 10


@pytest.mark.parametrize("held_out", [pytest.param(False, marks=pytest.mark.slow), True])
def test_verdicts_on_the_corpus(held_out):
    """At least 95% right and none the opposite of the truth, also on the half that is held out."""
    mine = results(held_out)
    hits, wrong = parity_corpus.right(mine)
    assert wrong == 0 and hits >= 0.95 * len(mine), parity_corpus.table(mine)


@pytest.mark.parametrize(
    "name, first, second",
    [("one minus cosine, small", ROUNDING, None), ("polynomial near its root, expanded", None, ROUNDING)],
)
def test_neither_rule_is_enough(name, first, second):
    """Each has no opinion on pairs that the other one decides rightly."""
    (pair,) = [pair for pair in parity_corpus.PAIRS if pair.name == name]
    (leaf,) = pair.check().leaves
    assert (leaf.judgement.by_precision, leaf.judgement.by_conditioning, leaf.verdict) == (first, second, ROUNDING)


# --- the rules ---

AGREE = Evidence(1.0, 2e-16, 1e-16, size32=1.0, difference32=1e-7, drift32=1e-7)
CASES = {  # evidence: by_precision, by_conditioning, both
    "plain rounding": (AGREE, ROUNDING, ROUNDING, ROUNDING),
    "another function": (AGREE._replace(difference64=1e-3, difference32=1e-3), SEMANTIC, SEMANTIC, SEMANTIC),
    "hidden by noise of float32": (
        AGREE._replace(difference64=1e-8, difference32=0.05, drift32=0.05),
        None,
        SEMANTIC,
        SEMANTIC,
    ),
    "hidden by noise that one side does not have by itself": (
        AGREE._replace(difference64=1e-9, difference32=0.05),
        ROUNDING,
        SEMANTIC,
        INCONCLUSIVE,
    ),
    "rounding errors that do not follow the inputs": (
        AGREE._replace(difference64=2e-11, difference32=1e-2, drift32=1e-2),
        ROUNDING,
        None,
        ROUNDING,
    ),
    "the same, and float32 has no digits": (
        AGREE._replace(difference64=2e-8, difference32=0.5, drift32=0.5),
        None,
        None,
        INCONCLUSIVE,
    ),
    "badly conditioned": (
        AGREE._replace(difference64=1e-8, noise64=1e-8, difference32=3.0, drift32=3.0),
        None,
        ROUNDING,
        ROUNDING,
    ),
    "float32 without a digit, float64 differs": (
        AGREE._replace(difference64=1e-5, noise64=1e-11, difference32=1.0, drift32=1.0),
        None,
        SEMANTIC,
        SEMANTIC,
    ),
    "the same, and the inputs' ulps do not show it": (
        AGREE._replace(difference64=1e-5, noise64=1e-15, difference32=1.0, drift32=1.0),
        None,
        None,
        INCONCLUSIVE,
    ),
    "chaos has reached float64": (
        AGREE._replace(difference64=0.5, noise64=0.5, difference32=1.0, drift32=1.0),
        None,
        None,
        INCONCLUSIVE,
    ),
    "a jump at the inputs": (AGREE._replace(difference64=1.0, noise64=1.0, difference32=1.0), SEMANTIC, None, SEMANTIC),
    "a jump at the inputs, and in float32": (
        Evidence(59.0, 1.0, 1.0, size32=59.0, difference32=1.0, drift32=1.0),
        SEMANTIC,
        None,
        INCONCLUSIVE,
    ),
    "a jump in float32 of what no ulp can move": (
        Evidence(59.0, 1.0, 0.0, size32=59.0, difference32=1.0, drift32=1.0, still=True),
        SEMANTIC,
        SEMANTIC,
        INCONCLUSIVE,
    ),
    "integers that jump with an ulp, and in float32": (
        Evidence(2000.0, 1.0, 1.0, size32=2000.0, difference32=1.0, drift32=1.0, exact=True),
        None,
        None,
        INCONCLUSIVE,
    ),
    "integers that float32 cannot hold": (
        Evidence(1e11, 1.0, 0.0, size32=1e11, difference32=4e3, drift32=4e3, exact=True, still=True),
        None,
        SEMANTIC,
        SEMANTIC,
    ),
    "integers": (
        Evidence(1e14, 1.0, 0.0, size32=1e14, difference32=1.0, drift32=0.0, exact=True),
        SEMANTIC,
        SEMANTIC,
        SEMANTIC,
    ),
    "a zero of rounding errors": (
        Evidence(1e-17, 1e-17, 5e-18, size32=1e-8, difference32=1e-8, drift32=1e-8),
        None,
        ROUNDING,
        ROUNDING,
    ),
    "float32 agrees exactly": (AGREE._replace(difference64=1e-8, difference32=0.0), SEMANTIC, SEMANTIC, SEMANTIC),
    "between the thresholds": (AGREE._replace(difference64=1e-13 * 5, difference32=1e-8), None, None, INCONCLUSIVE),
    "below the floor, exact in float32": (
        AGREE._replace(difference64=8e-14, noise64=0.0, difference32=0.0, drift32=0.0),
        ROUNDING,
        ROUNDING,
        ROUNDING,
    ),
    "no float32 run": (
        Evidence(1.0, 1e-3, 1e-16),
        None,
        SEMANTIC,
        SEMANTIC,
    ),
    "equal": (Evidence(1.0, 0.0, 0.0, size32=1.0, difference32=0.0, drift32=0.0), ROUNDING, ROUNDING, ROUNDING),
    "zero on both sides": (Evidence(0.0, 0.0, 0.0, size32=0.0, difference32=0.0, drift32=0.0), *[ROUNDING] * 3),
}


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("case", CASES)
def test_the_rules_whatever_the_scale(case, scale):
    evidence, first, second, both = CASES[case]
    judgement = judge(Evidence(*(x if x is None else x * scale for x in evidence)))
    assert (judgement.by_precision, judgement.by_conditioning, judgement.verdict) == (first, second, both)
    assert bool(judgement.reason) == (both is INCONCLUSIVE)


@pytest.mark.parametrize("rule", [verdict.by_precision, verdict.by_conditioning])
def test_a_growing_difference_never_becomes_rounding_again(rule):
    opinions = [rule(AGREE._replace(difference64=10.0**exponent)) for exponent in range(-18, 1)]
    order = [ROUNDING, None, SEMANTIC]
    ranks = [order.index(opinion) for opinion in opinions]
    assert ranks == sorted(ranks) and ranks[0] == 0 and ranks[-1] == 2


def test_rules_that_contradict_each_other_are_quoted():
    judgement = judge(CASES["hidden by noise that one side does not have by itself"][0])
    assert "contradict" in judgement.reason
    assert "2.0e-08 of that in float32 (rounding)" in judgement.reason
    assert "4.5e+06 times what an ulp in the inputs does" in judgement.reason and "(semantic)" in judgement.reason


# --- measuring ---


@pytest.mark.parametrize("draw", range(DRAWS))
def test_nudging_moves_by_an_ulp_or_two_and_breaks_no_tie(draw):
    x = np.concatenate([X.ravel(), [0.0, -0.0, 1.0, 5e-324, 1e308, np.inf, -np.inf, np.nan]])
    moved = nudge(x, draw)
    finite = np.isfinite(x) & (x != 0)
    ulps = x.view(np.int64)[finite] - moved.view(np.int64)[finite]
    assert set(ulps[:-2]) == {1, 2} and moved[x == 5e-324] == 0  # never past zero
    np.testing.assert_array_equal(moved[~finite], x[~finite])
    assert np.signbit(moved[np.flatnonzero(x == 0)[1]])
    np.testing.assert_array_equal(nudge(-x, draw), -moved)
    np.testing.assert_array_equal(nudge(x[::-1].copy(), draw), moved[::-1])
    np.testing.assert_array_equal(nudge(X.reshape(3, 4), draw).ravel(), moved[: X.size])


def test_nudging_draws_twice_and_leaves_what_is_not_float64():
    assert (nudge(X, 0) != nudge(X, 1)).any()
    for x in (np.arange(4), np.array([True]), X.astype(np.float32)):
        assert nudge(x, 0) is x
    z = X + 1j * X[::-1]
    np.testing.assert_array_equal(nudge(z, 0), nudge(z.real.copy(), 0) + 1j * nudge(z.imag.copy(), 0))
    assert nudge(np.array(1.0 + 2j), 0).shape == ()


def test_errors_are_absolute_relative_and_in_ulps():
    a = np.array([4.0, 1e-3, 0.0])
    b = np.array([4.0, np.nextafter(1e-3, 1), 0.0])
    errors = compare(a, b).errors
    assert errors.absolute == b[1] - a[1] and errors.relative == errors.absolute / 4 and errors.ulp == 1
    assert compare(np.float32([1]), np.nextafter(np.float32([1]), np.float32(2))).errors.ulp == 1
    assert compare(np.array([3]), np.array([5])).errors.absolute == 2
    assert compare(np.array([3j]), np.array([4.0])).errors.absolute == 5
    assert compare(np.zeros((0, 2)), np.zeros((0, 2))).errors == (0, 0, 0)


@pytest.mark.parametrize("at", [0, BLOCK, 2 * BLOCK + 2])
def test_a_leaf_of_several_blocks_is_one_leaf(at):
    a = np.random.default_rng(0).uniform(1, 2, 2 * BLOCK + 3)
    b = a.copy()
    b[at], b[5] = a[at] + 3, a[5] + 1e-3
    found = compare(a, b)
    assert found.errors == pytest.approx((3, 3 / b[at], 3 / np.spacing(b[at]))) and found.size == b[at]
    moves = table()
    assert not movement(a, b, moves) and moves.max() == pytest.approx(3)
    np.testing.assert_array_equal(nudge(a, 0)[at:], nudge(a[at:].copy(), 0))
    b[at] = np.nan
    found = compare(a, b)
    assert found.errors.absolute == pytest.approx(1e-3) and np.flatnonzero(found.apart).tolist() == [at]
    moves = table()
    assert movement(a, b, moves) and moves.max() == found.errors.absolute


def test_what_is_not_finite_is_told_apart_and_not_compared():
    a = np.array([1.0, np.nan, np.inf, np.inf, np.nan, 2.0])
    b = np.array([1.5, np.nan, np.inf, -np.inf, 7.0, np.inf])
    found = compare(a, b)
    np.testing.assert_array_equal(found.compared, [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.alike, [0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(found.apart, [0, 0, 0, 1, 1, 1])
    assert found.errors.absolute == 0.5 and found.size == 1.5


# --- check ---


def test_both_precisions_are_run_in_their_own_contexts(x64):
    """float32 outside x64 even where the caller is in it; PyTorch's default dtype follows, and is restored."""
    seen = []

    def ours(x, n, factor):
        seen.append((str(x.dtype), str(torch.ones(1).dtype), str(n.dtype), type(factor)))
        return x * factor

    def theirs(x, n, factor):
        seen.append((str(x.dtype), str(jnp.ones(1).dtype), str(n.dtype), type(factor)))
        return x * factor

    with x64():
        assert interop.check(ours, theirs, X.astype(np.float32), np.arange(3), 2.0).verdict is ROUNDING
    assert set(seen) == {
        ("torch.float64", "torch.float64", "torch.int64", float),
        ("torch.float32", "torch.float32", "torch.int64", float),
        ("float64", "float64", "int64", float),
        ("float32", "float32", "int32", float),
    }
    with pytest.raises(ZeroDivisionError):
        interop.check(lambda x: 1 / 0, lambda x: x, X)
    assert torch.get_default_dtype() is torch.float32


def test_gradients_are_functions_and_trees_are_compared_by_name():
    def ours(p):
        return (p["b"].sin() * p["a"][0]).sum()

    def theirs(p):
        return jnp.sum(jnp.sin(p["b"]) * p["a"][0])

    params = {"b": X, "a": [X[::-1].copy()]}
    report = interop.check(torch.func.grad(ours), jax.grad(theirs), params)
    assert report.verdict is ROUNDING and {leaf.name for leaf in report.leaves} == {"a.0", "b"}
    report = interop.check(torch.func.grad(ours), jax.grad(lambda p: 2 * theirs(p)), params)
    assert [leaf.verdict for leaf in report.leaves] == [SEMANTIC] * 2
    assert report.leaves[0].shape == (4, 3) and report.leaves[0].float32.relative == pytest.approx(0.5)


def mlp():
    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True, epsilon=1e-5, momentum=0.9)(jnp.tanh(linen.Dense(3)(x)))
            return linen.Dense(2)(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.two(self.norm(torch.tanh(self.one(x))))

    net, model = Net().eval(), Flax()
    return net, model, interop.match(net, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3))))


def test_a_pair_carries_states_gradients_and_per_example_gradients():
    net, model, pair = mlp()
    state = {name: x.detach().numpy() for name, x in net.state_dict().items()}
    params = {name: x.detach().numpy() for name, x in net.named_parameters()}

    def ours(state, params, x):
        buffers = {name: b for name, b in state.items() if name not in params}

        def loss(params, x):
            return torch.func.functional_call(net, {**params, **buffers}, (x,)).square().sum()

        gradient = torch.func.grad(loss)
        each = torch.func.vmap(gradient, (None, 0))(params, x[:, None])
        return {"loss": loss(params, x), "state": state, "of": (gradient(params, x), each)}

    @jax.jit
    def theirs(state, params, x):
        def loss(params, x):
            return jnp.sum(model.apply({**state, "params": params}, x) ** 2)

        gradient = jax.grad(loss)
        each = jax.vmap(gradient, (None, 0))(params, x[:, None])
        return {"loss": loss(params, x), "state": state, "of": (gradient(params, x), each)}

    report = interop.check(ours, theirs, state, params, X, pair=pair)
    assert report.verdict is ROUNDING
    shapes = {leaf.name: leaf.shape for leaf in report.leaves}
    assert len(shapes) == 1 + 8 + 2 * 6  # num_batches_tracked has no twin
    assert shapes["state.batch_stats.BatchNorm_0.mean"] == (3,)
    assert shapes["of.0.Dense_1.kernel"] == (3, 2) and shapes["of.1.Dense_1.kernel"] == (4, 3, 2)


def test_a_pair_shows_which_leaf_differs_and_wants_all_names():
    net, _, pair = mlp()
    params = {name: x.detach().numpy() for name, x in net.named_parameters()}
    report = interop.check(
        lambda p: p, lambda p: {**p, "Dense_0": jax.tree.map(jnp.sin, p["Dense_0"])}, params, pair=pair
    )
    wrong = {leaf.name for leaf in report.leaves if leaf.verdict is SEMANTIC}
    assert wrong == {"Dense_0.kernel", "Dense_0.bias"}
    for given, message in (
        ({**params, "three": X}, "has 'three'; nearest names: "),
        ({"one.weight": X}, "lacks 'one.bias'"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.check(lambda p: p, lambda p: p, given, pair=pair)
    with pytest.raises(TypeError, match="pair must be what interop.match returns, got dict"):
        interop.check(lambda p: p, lambda p: p, params, pair={})


@pytest.mark.relaxed_promotion
def test_a_module_is_called_as_a_copy():
    net = nn.BatchNorm1d(3)  # in training mode, it writes its statistics
    report = interop.check(net, lambda x: (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5), X)
    assert report.verdict is ROUNDING
    assert torch.equal(net.running_mean, torch.zeros(3)) and net.running_mean.dtype is torch.float32


def test_inputs_are_not_changed_by_a_function_that_writes_to_them():
    x = X.copy()
    assert interop.check(lambda x: x.mul_(2), lambda x: x * 2, x).verdict is ROUNDING
    np.testing.assert_array_equal(x, X)


def test_kinks_and_exact_cancellation_are_not_broken_by_the_moved_inputs():
    tied = np.repeat(X[:, :1], 3, axis=1)
    report = interop.check(
        torch.func.grad(lambda x: torch.amax(x, 1).sum()), jax.grad(lambda x: jnp.sum(jnp.max(x, 1))), tied
    )
    assert report.verdict is ROUNDING
    report = interop.check(
        torch.func.grad(lambda x: (x - x.flip(1)).abs().sum()),
        jax.grad(lambda x: jnp.sum(jnp.abs(x - x[:, ::-1]))),
        tied,
    )
    assert report.verdict is ROUNDING  # 1 at 0 on one side, but twice, with opposite signs
    report = interop.check(
        torch.func.grad(lambda x: (x - x.mean(1, keepdim=True)).abs().max()), jax.grad(lambda x: jnp.max(jnp.abs(x))), X
    )
    assert report.verdict is SEMANTIC


@pytest.mark.parametrize("leaves", [1, 10])
def test_results_are_let_go_as_soon_as_they_are_compared(leaves):
    """The most of NumPy's memory at one time, in copies of the float64 results; one leaf is moved as a whole."""
    size = 1_000_000
    sides = (lambda t: {k: x.sin() for k, x in t.items()}, lambda t: jax.tree.map(jnp.sin, t))
    inputs = {str(i): np.random.default_rng(i).normal(size=size // leaves) for i in range(leaves)}
    interop.check(*sides, {"few": X})  # what is imported once
    tracemalloc.start()
    try:
        report = interop.check(*sides, inputs)
        peak = tracemalloc.get_traced_memory()[1] / (8 * size)
    finally:
        tracemalloc.stop()
    assert report.verdict is ROUNDING and 2.4 < peak < (4.0 if leaves == 1 else 3.3)


# --- what cannot be compared ---


def one_reason(report):
    """The verdict with all reasons in one string."""
    return report.verdict, " | ".join(report.reasons)


def test_nan_on_one_side_is_semantic():
    found, why = one_reason(interop.check(torch.sqrt, lambda x: jnp.sqrt(jnp.abs(x)), X))
    count = int((X < 0).sum())
    assert found is SEMANTIC and f"{count} of 12 entries" in why and f"PyTorch has {count} NaN" in why


def test_nan_on_both_sides_is_left_out_and_said():
    found, why = one_reason(interop.check(torch.sqrt, jnp.sqrt, X))
    assert found is ROUNDING and f"{(X < 0).sum()} of 12 entries are the same infinity or NaN on both sides" in why
    assert interop.check(torch.sqrt, lambda x: 2 * jnp.sqrt(x), X).verdict is SEMANTIC
    found, why = one_reason(interop.check(lambda x: x * torch.nan, lambda x: x * jnp.nan, X))
    assert found is INCONCLUSIVE and "no entry is finite on either side" in why


def test_nan_that_comes_and_goes_with_an_ulp_is_no_fault():
    def ours(x):
        return torch.sqrt((x - 1) ** 3 - (x**3 - 3 * x**2 + 3 * x - 1))  # of rounding errors: NaN where negative

    def theirs(x):
        return jnp.sqrt((x**3 - 3 * x**2 + 3 * x - 1) - (x - 1) ** 3)

    found, why = one_reason(interop.check(ours, theirs, 1 + X / 10))
    assert found is INCONCLUSIVE and "changes with an ulp in the inputs" in why


def test_an_overflow_in_float32_only_is_said():
    found, why = one_reason(
        interop.check(lambda x: torch.logsumexp(x, 0), lambda x: jnp.log(jnp.sum(jnp.exp(x), 0)), 100 + X)
    )
    assert found is INCONCLUSIVE and "float64 agrees, but in float32" in why and "JAX has 0 NaN, 3 infinite" in why


def kernel(x):
    if x.dtype != torch.float32:
        raise RuntimeError("no kernel for float64")
    return 2 * x


def test_a_function_without_float64_is_inconclusive_and_its_float32_errors_are_said():
    report = interop.check(kernel, lambda x: 2.5 * x, X)
    assert one_reason(report)[0] is INCONCLUSIVE
    assert "the PyTorch side fails in float64: RuntimeError: no kernel for float64" in report.reasons
    assert report.leaves[0].float64 is None and report.leaves[0].float32.relative == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("side", "torch_fn", "jax_fn"),
    [
        ("PyTorch", lambda x: torch.eye(9, dtype=torch.float32) @ x, lambda x: x),
        ("JAX", lambda x: x + 1, lambda x: jax.lax.add(jnp.ones(9, jnp.float32), x)),
    ],
)
def test_what_a_function_closes_over_in_float32_is_said_where_float64_fails_for_it(side, torch_fn, jax_fn):
    report = interop.check(torch_fn, jax_fn, np.linspace(1, 2, 9))
    assert report.verdict is INCONCLUSIVE
    assert f"{side} side fails in float64" in report.reasons[0] and "pass it as an input too" in report.reasons[0]


def test_a_function_without_float32_is_judged_by_conditioning_alone():
    def only_wide(x):
        assert x.dtype == jnp.float64
        return 2 * x

    assert interop.check(lambda x: 2.5 * x, only_wide, X).verdict is SEMANTIC
    report = interop.check(lambda x: 2 * x, only_wide, X)
    assert report.verdict is INCONCLUSIVE and report.leaves[0].float64.absolute == 0
    assert any("the JAX side fails in float32: AssertionError" in reason for reason in report.reasons)
    assert not interop.check(kernel, only_wide, X).leaves  # nothing in common


def test_a_hard_coded_float32_is_named_and_not_taken_for_a_fault():
    found, why = one_reason(interop.check(lambda x: x / 3, lambda x: x.astype(jnp.float32) / 3, X))
    assert found is INCONCLUSIVE and "the result of JAX (float32) is of a lower precision" in why
    inside = lambda x: (x.astype(jnp.float32) / 3).astype(x.dtype)  # noqa: E731
    for function in (inside, jax.jit(inside)):
        found, why = one_reason(interop.check(lambda x: x / 3, function, X))
        assert found is ROUNDING and "JAX computes in float32 (convert_element_type) also in the float64 run" in why
    found, why = one_reason(interop.check(lambda x: (x.bfloat16() / 3).to(x.dtype), lambda x: x / 3, X))
    assert found is INCONCLUSIVE and "PyTorch computes in bfloat16 (_to_copy)" in why
    # a difference that float32 does not account for is a fault all the same
    assert interop.check(lambda x: x / 3, lambda x: inside(x) * 1.001, X).verdict is SEMANTIC


TENTHS = np.arange(1, 10, dtype=np.float32) / 10
TABLE = torch.tensor(TENTHS)


@pytest.mark.parametrize(
    ("side", "torch_fn", "jax_fn"),
    [
        ("PyTorch", lambda x: x * np.float32(0.1), lambda x: x * 0.1),
        ("PyTorch", lambda x: x * TABLE, lambda x: x * (jnp.arange(1.0, 10) / 10)),
        ("JAX", lambda x: x * 0.1, jax.jit(lambda x: x * np.float32(0.1))),
        ("JAX", lambda x: x * torch.arange(1.0, 10) / 10, jax.jit(lambda x: x * TENTHS)),
    ],
)
def test_a_constant_of_float32_is_named_and_not_taken_for_a_fault(side, torch_fn, jax_fn):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        report = interop.check(torch_fn, jax_fn, np.linspace(1, 2, 9))
    assert report.verdict is INCONCLUSIVE
    assert f"{side} computes in float32 (a constant" in report.leaves[0].reason


def test_a_constant_of_few_digits_or_of_float64_excuses_nothing():
    with jax.numpy_dtype_promotion("standard"):
        report = interop.check(lambda x: x * 0.5 + 1e-7 * x.sin(), jax.jit(lambda x: x * np.float32(0.5)), TENTHS)
    assert report.verdict is SEMANTIC
    assert interop.check(lambda x: x * 3.14159265, lambda x: x * jnp.pi, TENTHS).verdict is SEMANTIC


def test_no_difference_of_integers_is_rounding():
    numbers = np.array([1, 2, 10**9])
    assert interop.check(lambda n: n + (n > 5), lambda n: n, numbers).verdict is SEMANTIC
    with jax.enable_x64(True):
        big = np.array([2**53, 7])
        assert compare(big, big + np.array([1, 0])).errors.absolute == 1


def test_jumps_by_rounding_are_no_fault_and_said():
    report = interop.check(lambda x: (x / 0.1).floor(), lambda x: jnp.floor(x * 10), np.arange(1, 60) / 10)
    assert report.verdict is INCONCLUSIVE and "the result jumps" in report.leaves[0].reason
    assert interop.check(torch.round, lambda x: jnp.floor(x + 0.5), np.arange(-4, 4) + 0.5).verdict is SEMANTIC


def test_errors_that_the_inputs_do_not_show_are_no_fault_where_float32_has_no_digits():
    x = np.linspace(1e-6, 1e-5, 9)
    report = interop.check(lambda x: (1 - torch.cos(x)) / x**2, lambda x: 2 * jnp.sin(x / 2) ** 2 / x**2, x)
    assert report.verdict is INCONCLUSIVE


@pytest.mark.parametrize(
    "side, functions",
    [
        ("PyTorch", (lambda x: F.dropout(x, 0.5), lambda x: x)),
        ("JAX", (lambda x: x, lambda x: x * np.random.default_rng().normal())),
    ],
)
def test_randomness_on_one_side_is_named(side, functions):
    report = interop.check(*functions, X)
    assert report.verdict is INCONCLUSIVE and f"the {side} side is random" in report.reasons[0]
    assert "draw masks and noise once, outside" in report.reasons[0]


def test_randomness_of_one_leaf_does_not_excuse_another():
    report = interop.check(lambda x: (F.dropout(x, 0.5), x), lambda x: (x, 2 * x), X)
    assert [leaf.verdict for leaf in report.leaves] == [INCONCLUSIVE, SEMANTIC]


@pytest.mark.parametrize(
    "ours, theirs, error, message",
    [
        (lambda x: {"a": x, "bias": x}, lambda x: {"a": x, "b": x}, ValueError, "has 'bias', which.*nearest.*: b"),
        (lambda x: {"a": x}, lambda x: {"a": x, "b": x}, ValueError, "JAX side has 'b', which that of the PyTorch"),
        (lambda x: x.T, lambda x: x, ValueError, r"has the shape \(3, 4\) on the PyTorch side and \(4, 3\)"),
        (lambda x: None, lambda x: None, ValueError, "the results hold no arrays"),
        (lambda x: nn.Linear(3, 4), lambda x: x, TypeError, "got a Linear; pass fr.params"),
        (3, lambda x: x, TypeError, "torch_fn must be a function, got int"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(ours, theirs, error, message):
    with pytest.raises(error, match=message):
        interop.check(ours, theirs, X)


def test_inputs_that_one_side_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"'1' is int64 and holds 1099511627776, which JAX cannot hold"):
        interop.check(lambda x, n: x, lambda x, n: x, X, np.array([1, 2**40]))
    with pytest.raises(TypeError, match="is an array of <U1"):
        interop.check(lambda x: x, lambda x: x, np.array(["a"]))


def test_what_raises_in_both_precisions_raises_with_the_side():
    with pytest.raises(AttributeError) as caught:
        interop.check(lambda x: x, lambda x: x.nothing, X)
    assert "check, JAX side: raised in float64; in float32: AttributeError" in caught.value.__notes__[-1]
    net, model = nn.Linear(3, 2), linen.Dense(2)
    variables = model.init(jax.random.key(0), X)
    inputs = {name: p.detach().numpy() for name, p in net.named_parameters()}, X
    pair = interop.match(net, variables)
    with pytest.raises(Exception, match="collection") as caught:  # what arrives is variables["params"]
        interop.check(lambda p, x: torch.func.functional_call(net, p, (x,)), model.apply, *inputs, pair=pair)
    assert "module.apply({'params': params}, x)" in caught.value.__notes__[-1]


def test_integers_and_kinds_of_dtypes():
    order = (lambda x: torch.argsort(x, 0), lambda x: jnp.argsort(x, 0))
    assert interop.check(*order, X).verdict is ROUNDING
    assert interop.check(order[0], lambda x: jnp.argsort(-x, 0), X).verdict is SEMANTIC
    found, why = one_reason(interop.check(lambda x: x > 0, lambda x: jnp.where(x > 0, 1.0, 0.0), X))
    assert found is ROUNDING and "the dtypes differ in kind: bool on the PyTorch side, float64 on" in why


# --- the report ---


def test_a_report_has_no_truth_value_and_says_its_verdict_first():
    report = interop.check(lambda x: {"same": x, "other": x}, lambda x: {"same": x, "other": 2 * x}, X)
    with pytest.raises(TypeError, match="compare report.verdict"):
        bool(report)
    assert report.verdict == "semantic"
    lines = str(report).splitlines()
    assert lines[0] == "verdict: semantic"
    head, rule, first, second = lines[-4:]
    assert head.startswith("leaf   shape  verdict") and set(rule) == {"-"}
    assert first.startswith("other  4x3    semantic") and second.startswith("same   4x3    rounding")
    assert head.index("float32 max") == first.index(f"{report.leaves[1].float32.absolute:.1e}", head.index("float32"))


def test_a_report_is_plain_json():
    report = interop.check(lambda x: 1e308 * x, lambda x: -1e308 * x, np.array([1.5]))
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    (leaf,) = plain["leaves"]
    assert leaf["float64"]["absolute"] == "inf" and not math.isfinite(float(leaf["float64"]["absolute"]))
    assert plain["verdict"] == leaf["verdict"] == "semantic"


# --- training ---

PARAMS = {"w": np.array([1.0, -2.0, 0.5])}
BATCHES = [(x, x @ [0.5, 0.0, 1.0]) for x in np.random.default_rng(1).normal(size=(6, 5, 3))]


def ours(make):
    return frt.train_step(lambda params, x, y: ((x @ params["w"] - y) ** 2).mean(), make)


def theirs(make):
    init, step = frj.train_step(lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2), make)
    return init, jax.jit(step)


def test_the_step_from_which_a_trajectory_differs():
    def rate(count):
        return jnp.where(count < 3, 0.1, 0.05)

    report = interop.check_training(
        ours(lambda h: frt.optax.sgd(h["lr"])), theirs(lambda h: optax.sgd(rate)), PARAMS, {"lr": 0.1}, BATCHES
    )
    assert report.verdict is SEMANTIC
    assert report.reasons[0] == "params.w differs from step 4 on; before, all is rounding, up to step 3 of 6"
    assert {leaf.step for leaf in report.leaves if leaf.verdict is SEMANTIC and leaf.name == "params.w"} == {4, 5, 6}
    assert [(leaf.name, leaf.step) for leaf in report.worst()] == [("params.w", 4), ("metrics.loss", 5)]


def test_metrics_of_one_side_are_named_and_left_out():
    report = interop.check_training(
        ours(lambda h: frt.prox_sgd(h["lr"], frt.l2(0.0))),
        theirs(lambda h: optax.sgd(h["lr"])),
        PARAMS,
        {"lr": 0.1},
        BATCHES[:2],
    )
    assert report.verdict is ROUNDING
    assert report.reasons == ("not compared, since only one side has them: metrics.penalty, metrics.objective",)


def map_of(rate, library):
    """A state that is a chaotic map of itself; what it does has no gradient and no loss."""

    def init(params, hyper):
        return {"params": params}

    def step(state, hyper, x):
        w = state["params"]["w"]
        w = rate * w * (1 - w) if library is torch else rate * (w - w * w)
        return {"params": {"w": w}}, None

    return init, step


def test_chaos_is_not_taken_for_a_fault_and_its_end_is_said():
    start = {"w": np.linspace(0.1, 0.9, 5)}
    run = lambda rate, steps: interop.check_training(  # noqa: E731
        map_of(3.9, torch), map_of(rate, jnp), start, None, [X] * steps
    )
    assert run(3.9, 40).verdict is ROUNDING  # float32 has lost all its digits long before
    report = run(3.9, 90)
    assert report.verdict is INCONCLUSIVE and "params.w cannot be judged from step" in report.reasons[0]
    assert run(3.900001, 90).verdict is SEMANTIC


def test_what_becomes_of_an_overflow_of_both_sides_is_no_fault():
    """The derivative of relu at NaN: 1 for PyTorch, 0 for JAX, which keeps finite parameters."""

    def steps(relu, value_and_grad):
        def step(state, hyper, x):
            w = state["params"]["w"]
            value, gradient = value_and_grad(lambda w: (relu(w * x - w * x) ** 2).sum())(w)
            return {"params": {"w": w - gradient}}, {"loss": value}

        return lambda params, hyper: {"params": params}, step

    def grad_and_value(f):
        return lambda w: torch.func.grad_and_value(f)(w)[::-1]

    start, huge = {"w": np.array([10.0])}, [np.array([1.0]), np.array([1e308])]
    ours = steps(torch.relu, grad_and_value)
    report = interop.check_training(ours, steps(jax.nn.relu, jax.value_and_grad), start, None, huge)
    assert report.verdict is INCONCLUSIVE and "params.w cannot be judged from step 2" in report.reasons[0]
    assert "up to each framework" in report.leaves[-2].reason and report.hints == ()
    alone = steps(lambda x: jax.nn.relu(jnp.nan_to_num(x)), jax.value_and_grad)  # only PyTorch overflows
    assert interop.check_training(ours, alone, start, None, huge).verdict is SEMANTIC


def test_batches_are_moved_as_well_as_parameters():
    """Parameters that begin at zero show no rounding errors of their own."""

    def steps(polynomial):
        step = lambda state, hyper, x: ({"params": {"w": state["params"]["w"] + polynomial(x)}}, None)  # noqa: E731
        return lambda params, hyper: {"params": params}, step

    factored = steps(lambda x: (x - 1) ** 5)
    expanded = steps(lambda x: x**5 - 5 * x**4 + 10 * x**3 - 10 * x**2 + 5 * x - 1)
    report = interop.check_training(factored, expanded, {"w": np.zeros((4, 3))}, None, [1 + X / 100])
    assert report.verdict is ROUNDING and report.leaves[0].float64.relative > 1e-12


def test_randomness_in_training_is_named():
    init, step = ours(lambda h: frt.optax.sgd(0.1))
    noisy = lambda state, hyper, x, y: step(state, hyper, x, F.dropout(y, 0.5))  # noqa: E731
    report = interop.check_training((init, noisy), theirs(lambda h: optax.sgd(0.1)), PARAMS, None, BATCHES[:3])
    assert report.verdict is INCONCLUSIVE and "the PyTorch side is random" in report.reasons[0]
    assert {leaf.verdict for leaf in report.leaves} == {INCONCLUSIVE}


def test_training_of_a_pair():
    net = nn.Linear(3, 2)
    pair = interop.match(net, {"params": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}})
    params = {name: x.detach().numpy() for name, x in net.named_parameters()}
    steps = (
        frt.train_step(lambda p, x: (x @ p["weight"].T + p["bias"]).square().mean(), lambda h: frt.optax.sgd(h)),
        frj.train_step(
            lambda p, x: jnp.mean((x @ p["kernel"] + jnp.broadcast_to(p["bias"], (4, 2))) ** 2), lambda h: optax.sgd(h)
        ),
    )
    report = interop.check_training(*steps, params, 0.1, [X, X], pair=pair)  # one array a batch
    assert report.verdict is ROUNDING
    assert {leaf.name for leaf in report.leaves} == {"params.kernel", "params.bias", "metrics.loss"}


def test_bad_arguments_of_check_training():
    steps = (ours(lambda h: frt.optax.sgd(0.1)), theirs(lambda h: optax.sgd(0.1)))
    with pytest.raises(ValueError, match="batches is empty"):
        interop.check_training(*steps, PARAMS, None, [])
    with pytest.raises(TypeError, match=r"jax_steps must be \(init, step\), two functions, got function"):
        interop.check_training(steps[0], lambda: 0, PARAMS, None, BATCHES)
    bare = (lambda params, hyper: params["w"], lambda state, hyper, x, y: (state, None))
    with pytest.raises(TypeError, match="the state, a Tensor, has no params") as caught:
        interop.check_training(bare, bare, PARAMS, None, BATCHES)
    assert "raised in step 1 of the float64 run" in caught.value.__notes__[-1]
    with pytest.raises(TypeError, match=r"step must return \(state, metrics\), got NoneType"):
        interop.check_training((bare[0], lambda *a: None), bare, PARAMS, None, BATCHES)


@pytest.mark.parametrize("module", ["verdict", "parity", "training"])
@pytest.mark.relaxed_promotion
def test_the_examples_of_the_docstrings(module):
    result = doctest.testmod(sys.modules[f"interop.{module}"])
    assert result.attempted > 3 and result.failed == 0

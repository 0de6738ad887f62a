"""`interop.probes`: faults that a normal draw misses are excited, and what is harmless stays harmless."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import funcreg.torch as frt
from funcreg import interop
from interop import Verdict

ROUNDING, SEMANTIC, INCONCLUSIVE = Verdict
SHAPE = (6, 8)


def gradient(ours, theirs):
    return torch.func.grad(lambda x: ours(x).sum()), jax.grad(lambda x: jnp.sum(theirs(x)))


def attention(q, k, mask):
    return torch.softmax(torch.where(mask, q @ k.T, -torch.inf), -1)


def attention_jax(q, k, mask):
    return jax.nn.softmax(jnp.where(mask, q @ k.T, -1e30), -1)


def positions(x):
    return jnp.minimum(jnp.arange(len(x)), 20)[:, None].astype(x.dtype)


W = {"w": np.random.default_rng(1).normal(size=(8, 8))}
MISSED = {  # sides, examples, options, the probes on which the fault is seen
    "subgradient of abs": (gradient(torch.abs, jnp.abs), [SHAPE], {}, {"zeros", "negative zeros", "ties"}),
    "subgradient of a clamp": (
        gradient(lambda x: x.clamp(min=0), lambda x: jnp.maximum(x, 0.0)),
        [SHAPE],
        {},
        {"zeros", "negative zeros", "ties"},
    ),
    "threshold of softplus": ((F.softplus, jax.nn.softplus), [SHAPE], {}, {"large"}),
    "ties of max": (
        gradient(lambda x: x.max(1).values, lambda x: jnp.max(x, 1)),
        [SHAPE],
        {},
        {"zeros", "negative zeros", "ties", "constant"},
    ),
    "least norm of a unit vector": (
        (
            lambda x: F.normalize(x, eps=1e-12),
            lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-3),
        ),
        [SHAPE],
        {},
        {"tiny"},
    ),
    "sign of a zero": (
        (lambda x: torch.copysign(torch.ones_like(x), x), lambda x: jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)),
        [SHAPE],
        {},
        {"negative zeros", "ties"},
    ),
    "fully masked rows": ((attention, attention_jax), [(6, 4), (6, 4), np.eye(6, dtype=bool)], {}, {"all false"}),
    "positions beyond a table": (
        (lambda x: x + torch.arange(len(x))[:, None], lambda x: x + positions(x)),
        [SHAPE],
        {"long_axis": 0},
        {"long"},
    ),
    "norm of a group of zeros": (
        gradient(lambda p: p["w"].norm(dim=1), lambda p: jnp.linalg.norm(p["w"], axis=1)),
        [],
        {"params": W},
        {"parameters: dead units", "parameters: zeros"},
    ),
    "penalty of zeros": (
        (lambda p: frt.l1(1.0).grad(p), jax.grad(lambda p: jnp.sum(jnp.abs(p["w"])))),
        [],
        {"params": W},
        {f"parameters: {name}" for name in ("some zeros", "dead units", "ties", "zeros")},
    ),
}


@pytest.mark.parametrize("name", MISSED)
def test_faults_that_a_normal_draw_misses(name):
    sides, examples, options, where = MISSED[name]
    found = interop.probes(*examples, **options)
    report = interop.check_probes(sides[0], jax.jit(sides[1]), found, hints=False)
    assert report.hints == ()
    assert {leaf.name.split("/")[0] for leaf in report.leaves if leaf.verdict is SEMANTIC} == where
    assert report.verdict is SEMANTIC


def test_a_wrong_epsilon_is_a_hundred_times_larger_on_small_numbers():
    def layer_norm(x):
        return (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-6)

    found = interop.probes(SHAPE)
    report = interop.check_probes(
        lambda x: F.layer_norm(x, (8,)), jax.jit(layer_norm), {k: found[k] for k in ("normal", "tiny")}
    )
    normal, tiny = (leaf.float64.relative for leaf in report.leaves)
    assert report.verdict is SEMANTIC and tiny > 0.5 > 100 * normal > 0


def test_a_large_mean_shows_a_variance_that_loses_its_digits():
    def deviation(x):
        return jnp.sqrt(jnp.mean(x**2, 1) - jnp.mean(x, 1) ** 2)

    found = interop.probes(SHAPE)
    report = interop.check_probes(
        lambda x: x.std(1, unbiased=False), deviation, {k: found[k] for k in ("normal", "large mean")}
    )
    assert report.verdict is INCONCLUSIVE
    assert [leaf.verdict for leaf in report.leaves] == [ROUNDING, INCONCLUSIVE]
    assert report.reasons[0].startswith("large mean/(result): float64 agrees, but in float32")


def unit(x):
    return (x - x.mean()) / (abs(x - x.mean()).mean() + 1e-3)


@pytest.mark.parametrize(
    "sides, kind",
    [
        (gradient(torch.abs, jnp.abs), "subgradient"),
        ((lambda x: x.T.cov(), lambda x: jnp.cov(x.T, ddof=0)), "biased_variance"),
        ((lambda x: F.gelu(unit(x)), lambda x: jax.nn.gelu(unit(x))), "gelu"),
    ],
)
def test_a_hint_explains_every_probe(sides, kind):
    """Of those with few digits, and of those whose results are rounding alone, it need not."""
    report = interop.check_probes(sides[0], jax.jit(sides[1]), interop.probes(SHAPE))
    assert report.verdict is SEMANTIC and [hint.kind for hint in report.hints] == [kind]
    assert all(leaf.step == 0 for leaf in report.leaves)


def test_what_explains_one_probe_only_is_no_hint():
    def theirs(x):
        return jnp.where(jnp.abs(x) > 20, 1.1, 1.0) * jax.nn.gelu(x)

    found = interop.probes(SHAPE)
    assert [h.kind for h in interop.check(F.gelu, theirs, *found["normal"]).hints] == ["gelu"]
    assert interop.check_probes(F.gelu, jax.jit(theirs), {k: found[k] for k in ("normal", "large")}).hints == ()


def test_what_is_infinite_on_both_sides_does_not_spoil_the_verdict():
    found = interop.probes(SHAPE)
    exp = (lambda x: torch.exp(x.abs().sum()), lambda x: jnp.exp(jnp.sum(jnp.abs(x))))
    report = interop.check_probes(*exp, found)
    assert report.verdict is ROUNDING
    assert len(report.leaves) < len(found) and not any(leaf.name.startswith("huge/") for leaf in report.leaves)
    assert "huge: no part of the verdict, as infinite or NaN everywhere on both sides: '(result)'" in report.reasons
    # on one side only, it is a fault
    stable = lambda x: jnp.exp(jnp.minimum(jnp.sum(jnp.abs(x)), 700.0))  # noqa: E731
    assert interop.check_probes(exp[0], stable, found).verdict is SEMANTIC
    nothing = interop.check_probes(*exp, {"huge": found["huge"]})
    assert nothing.verdict is INCONCLUSIVE and not nothing.leaves


def test_sound_pairs_agree_on_all_probes():
    def ours(p, x):
        h = F.layer_norm(x @ p["w"], (8,)).relu()
        return {"softmax": h.softmax(-1), "loss": h.square().mean()}

    def theirs(p, x):
        h = x @ p["w"]
        h = (h - h.mean(1, keepdims=True)) * jax.lax.rsqrt(h.var(1, keepdims=True) + 1e-5)
        h = jax.nn.relu(h)
        return {"softmax": jax.nn.softmax(h, -1), "loss": jnp.mean(h**2)}

    report = interop.check_probes(ours, jax.jit(theirs), interop.probes(SHAPE, params=W, long_axis=0))
    assert report.verdict is ROUNDING, report
    assert len(report.leaves) == 2 * 14


def test_a_probe_on_which_a_side_raises_is_named():
    sides = (torch.linalg.cholesky, jnp.linalg.cholesky)
    good = np.eye(3) + 0.1
    report = interop.check_probes(*sides, {"good": (good,), "zeros": (np.zeros((3, 3)),)})
    assert report.verdict is INCONCLUSIVE and [leaf.name for leaf in report.leaves] == ["good/(result)"]
    assert report.reasons[0].startswith("zeros: not compared, it raises _LinAlgError: linalg.cholesky")
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        interop.check_probes(*sides, {"zeros": (np.zeros((3, 3)),)})
    assert "check_probes, zeros, PyTorch side: raised in float64" in caught.value.__notes__[0]


def test_a_probe_without_a_common_precision_makes_it_inconclusive():
    def ours(x):
        return x if x.dtype == torch.float32 or x.sum() > 0 else 1 / 0

    def theirs(x):
        return x if x.dtype == jnp.float64 or x.sum() > 0 else 1 / 0

    report = interop.check_probes(ours, theirs, {"good": (np.ones(3),), "bad": (-np.ones(3),)})
    assert report.verdict is INCONCLUSIVE and [leaf.name for leaf in report.leaves] == ["good/(result)"]
    assert report.reasons[0].startswith("bad: the PyTorch side fails in float64: ZeroDivisionError")


def test_randomness_on_a_probe_is_said():
    report = interop.check_probes(lambda x: F.dropout(x, 0.5), lambda x: x, {"one": (np.ones(9),)})
    assert report.verdict is INCONCLUSIVE and report.reasons[0].startswith("one: the PyTorch side is random")


def test_probes_are_what_their_names_say():
    example = {"x": np.zeros((40, 50), np.float32), "label": np.arange(40), "keep": np.ones(40, bool), "rate": 0.1}
    found = interop.probes(example, None, params=W, long_axis=0, seed=3)
    x = {name: inputs[1]["x"] for name, inputs in found.items()}
    assert all(np.array_equal(inputs[0]["w"], W["w"]) for name, inputs in found.items() if ":" not in name)
    assert {x[name].dtype for name in x} == {np.dtype(np.float64)}
    assert all(inputs[1]["rate"] == 0.1 and inputs[2] is None for inputs in found.values())
    labels = {name: inputs[1]["label"] for name, inputs in found.items()}
    assert labels["long"].tolist() == [*range(40)] * 16 and all(
        (v[:40] == np.arange(40)).all() for v in labels.values()
    )
    keep = {name: inputs[1]["keep"].mean() for name, inputs in found.items()}
    assert keep["all false"] == 0 and keep["all true"] == keep["normal"] == 1 and keep["long"] == 1
    size = {name: float(np.abs(v).max()) for name, v in x.items()}
    assert (x["zeros"] == 0).all() and not np.signbit(x["zeros"]).any()
    assert (x["negative zeros"] == 0).all() and 0.4 < np.signbit(x["negative zeros"]).mean() < 0.6
    assert set(x["ties"].ravel()) == {-1.0, 0.0, 1.0} and set(x["constant"].ravel()) == {0.5}
    assert size["tiny"] < 1e-5 and 20 < np.abs(x["large"]).min() <= size["large"] < 30 and 2e3 < size["huge"] < 1e4
    assert abs(x["large mean"].mean() - 1e3) < 1e-3 and 0.009 < x["large mean"].std() < 0.011
    assert x["long"].shape == (640, 50) and 0.9 < x["long"].std() < 1.1
    changed = {name: inputs[0]["w"] for name, inputs in found.items() if ":" in name}
    assert 0.15 < (changed["parameters: some zeros"] == 0).mean() < 0.45
    dead = changed["parameters: dead units"] == 0
    assert dead[1::2].all() and dead[:, 1::2].all() and not dead[::2, ::2].any()
    assert len(np.unique(changed["parameters: ties"])) < 10 and (changed["parameters: zeros"] == 0).all()
    again = interop.probes(example, None, params=W, long_axis=0, seed=3)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert not np.array_equal(interop.probes((9,), seed=1)["normal"][0], interop.probes((9,))["normal"][0])


def test_what_makes_no_probes_is_refused():
    with pytest.raises(ValueError, match="probes: pass an example of each input"):
        interop.probes()
    with pytest.raises(ValueError, match=r"long_axis is 1, but an example has the shape \(3,\)"):
        interop.probes((3,), long_axis=1)
    with pytest.raises(TypeError, match="is an array of <U1"):
        interop.probes(np.array(["a"]))
    with pytest.raises(ValueError, match="check_probes: probes is empty"):
        interop.check_probes(torch.sin, jnp.sin, {})


@pytest.mark.relaxed_promotion
def test_the_examples_of_the_docstrings():
    result = doctest.testmod(sys.modules["interop.probes"])
    assert result.attempted > 6 and result.failed == 0

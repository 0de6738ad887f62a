"""Gradients of single examples are those of a loop; clipping is exact; what has no such gradient is refused."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import funcreg.jax
import funcreg.torch
from wings import TORCH, each_wing

EXAMPLES = 7


def problem(wing, dtype="float64"):
    rng = np.random.default_rng(0)
    params = {"hidden": rng.standard_normal((5, 4)), "bias": rng.standard_normal(5), "scale": rng.standard_normal(())}
    x, y = rng.standard_normal((EXAMPLES, 4)), rng.standard_normal((EXAMPLES, 5))
    return wing.array(params, dtype), wing.array(x, dtype), wing.array(y, dtype)


def loss(params, x, y):
    """Written for batches: a mean over the first axis."""
    assert x.ndim == y.ndim == 2
    return ((x @ params["hidden"].T * params["scale"] - y) ** 2).mean()


def loop(wing, function, params, rows):
    """(values, grads) one example after the other, stacked by NumPy."""
    pairs = [wing.value_and_grad(function)(params, *row) for row in rows]
    values = np.stack([wing.numpy(value) for value, _ in pairs])
    return values, {name: np.stack([wing.numpy(grad[name]) for _, grad in pairs]) for name in params}


def assert_equal_trees(wing, got, want, rtol):
    for name, x in want.items():
        scale = np.abs(x).max() if x.size else 1
        assert np.abs(wing.numpy(got[name]) - x).max() <= rtol * max(scale, 1e-300), name
        assert got[name].shape == x.shape


@each_wing
@pytest.mark.parametrize("chunk_size", [None, 1, 3, EXAMPLES, 100])
def test_gradients_are_those_of_a_loop(wing, chunk_size):
    with wing.precision("float64"):
        params, x, y = problem(wing)
        values, grads = wing.fr.per_example(loss, chunk_size=chunk_size)(params, x, y)
        want = loop(wing, loss, params, [(x[i : i + 1], y[i : i + 1]) for i in range(EXAMPLES)])
        np.testing.assert_allclose(wing.numpy(values), want[0], rtol=1e-12)
        assert_equal_trees(wing, grads, want[1], 1e-12)
        whole = wing.grad(loss)(params, x, y)
        assert_equal_trees(wing, {k: g.mean(0) for k, g in grads.items()}, wing.numpy(whole), 1e-12)


@each_wing
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_shared_arguments_other_axes_and_trees(wing, chunk_size):
    with wing.precision("float64"):
        params, x, y = problem(wing)
        weights = wing.array(np.linspace(1, 2, 5), "float64")

        def weighted(params, batch, weights, y):
            assert batch["x"].shape[0] == 1 and y.shape[1] == 1 and weights.shape == (5,)
            return (weights[None] * (batch["x"] @ params["hidden"].T * params["scale"] - y.T) ** 2).sum()

        function = wing.fr.per_example(weighted, chunk_size, batch_axes=(0, None, 1))
        values, grads = function(params, {"x": x}, weights, y.T)
        rows = [({"x": x[i : i + 1]}, weights, y.T[:, i : i + 1]) for i in range(EXAMPLES)]
        want = loop(wing, weighted, params, rows)
        np.testing.assert_allclose(wing.numpy(values), want[0], rtol=1e-12)
        assert_equal_trees(wing, grads, want[1], 1e-12)


@each_wing
def test_it_composes_with_compilation_and_members(wing):
    with wing.precision("float64"):
        params, x, y = problem(wing)
        function = wing.fr.per_example(loss)
        compiled = wing.jit(function)(params, x, y)
        members = wing.fr.stack([params, {k: 2 * v for k, v in params.items()}])
        _, by_member = wing.vmap(function, (0, None, None))(members, x, y)
        values, grads = function(params, x, y)
        np.testing.assert_allclose(wing.numpy(compiled[0]), wing.numpy(values), rtol=1e-14)
        assert_equal_trees(wing, compiled[1], wing.numpy(grads), 1e-13)
        assert_equal_trees(wing, {k: g[0] for k, g in by_member.items()}, wing.numpy(grads), 1e-13)


@each_wing
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_clipping_is_exact(wing, reduction, weighted):
    with wing.precision("float64"):
        params, x, y = problem(wing)
        _, grads = wing.fr.per_example(loss)(params, x, y)
        flat = np.concatenate([wing.numpy(g).reshape(EXAMPLES, -1) for g in grads.values()], 1)
        norms = np.sqrt((flat**2).sum(1))
        bound = np.median(norms)
        weights = np.linspace(0, 2, EXAMPLES) if weighted else np.ones(EXAMPLES)
        want = (np.minimum(1, bound / norms) * weights) @ flat / (EXAMPLES if reduction == "mean" else 1)
        got, measured = wing.fr.clip_per_example(
            grads, bound, reduction=reduction, weights=wing.array(weights, "float64") if weighted else None
        )
        np.testing.assert_allclose(wing.numpy(measured), norms, rtol=1e-13)
        np.testing.assert_allclose(wing.numpy(wing.fr.per_example_norms(grads)), norms, rtol=1e-13)
        flat_got = np.concatenate([wing.numpy(got[name]).ravel() for name in grads])
        np.testing.assert_allclose(flat_got, want, rtol=1e-12, atol=1e-14)
        assert {k: g.shape for k, g in got.items()} == {k: p.shape for k, p in params.items()}
        plain, _ = wing.fr.clip_per_example(grads, float("inf"))
        assert_equal_trees(wing, plain, wing.numpy({k: g.mean(0) for k, g in grads.items()}), 1e-13)


@each_wing
def test_clipping_at_kinks_and_limits(wing):
    grads = {"a": np.array([[0.0, 0.0], [3.0, 4.0], [np.nan, 1.0], [3e30, 4e30]])}
    norms = wing.numpy(wing.fr.per_example_norms(wing.array(grads)))
    np.testing.assert_allclose(norms, [0, 5, np.nan, 5e30], rtol=1e-6)
    got, _ = wing.fr.clip_per_example(wing.array({"a": grads["a"][[0, 1, 3]]}), 1.0, reduction="sum")
    np.testing.assert_allclose(wing.numpy(got["a"]), [1.2, 1.6], rtol=1e-6)
    nothing, _ = wing.fr.clip_per_example(wing.array({"a": grads["a"][:2]}), 0.0)
    assert np.array_equal(wing.numpy(nothing["a"]), [0, 0])
    alive, _ = wing.fr.clip_per_example(wing.array(grads), 1.0)
    assert np.all(np.isnan(wing.numpy(alive["a"])))

    def through(scale):  # differentiable also at the zero gradient
        tree = {"a": wing.array(grads["a"][:2]) * scale}
        return wing.fr.clip_per_example(tree, 1.0)[0]["a"].sum()

    assert np.isfinite(wing.numpy(wing.grad(through)(wing.array(np.asarray(0.1)))))


@each_wing
def test_half_precision_norms_do_not_overflow(wing):
    grads = wing.array({"a": np.full((2, 400), 300.0), "b": np.full((2,), 0.5)}, "float16")
    norms = wing.fr.per_example_norms(grads)
    np.testing.assert_allclose(wing.numpy(norms), 6000, rtol=1e-6)
    got, _ = wing.fr.clip_per_example(grads, 60.0)
    assert str(got["a"].dtype).endswith("float16")
    np.testing.assert_allclose(wing.numpy(got["a"]), 3, rtol=2e-3)


@each_wing
def test_wrong_input_is_refused_by_name(wing):
    params, x, y = problem(wing, "float32")
    fr = wing.fr
    penalized = fr.penalize(loss, fr.l1(0.1))
    for call, error, message in [
        (lambda: fr.per_example(penalized), TypeError, "add penalty.grad"),
        (lambda: fr.per_example(3), TypeError, "loss must be a function"),
        (lambda: fr.per_example(loss, chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
        (lambda: fr.per_example(loss, batch_axes=-1), TypeError, "batch_axes must be an axis counted from the front"),
        (lambda: fr.per_example(loss)(params, x, y[:3]), ValueError, "argument 0 has 7 .* argument 1 has 3"),
        (lambda: fr.per_example(loss)(params, x[:0], y[:0]), ValueError, "has 0 examples"),
        (lambda: fr.per_example(loss)(params), ValueError, "no batch argument counts examples"),
        (lambda: fr.per_example(loss, batch_axes=(0,))(params, x, y), ValueError, "1 entries, .* 2 arguments"),
        (lambda: fr.per_example(loss, batch_axes=5)(params, x, y), ValueError, "argument 0 has no axis 5"),
        (lambda: fr.per_example(loss)(params, x, 1.0), TypeError, "argument 1 must be an array, got 1.0"),
        (lambda: fr.per_example(lambda p, x: x @ p["hidden"].T)(params, x), TypeError, "must return a scalar"),
        (lambda: fr.clip_per_example({"a": x}, -1.0), ValueError, "max_norm must be >= 0"),
        (lambda: fr.clip_per_example({"a": x}, 1.0, reduction="max"), ValueError, "'mean' or 'sum', got 'max'"),
        (lambda: fr.clip_per_example({"a": x}, 1.0, weights=x), ValueError, r"weights must have shape \[7\]"),
        (lambda: fr.clip_per_example({"a": x, "b": y[:3]}, 1.0), ValueError, "'a' has 7 examples, but 'b' has 3"),
        (lambda: fr.clip_per_example({"a": x[:0]}, 1.0), ValueError, "0 examples"),
        (lambda: fr.per_example_norms({"a": wing.leaf(np.ones((2, 2)), "complex64")}), TypeError, "'a' is complex"),
        (
            lambda: fr.per_example(loss)({"n": wing.leaf(np.ones(2), "int32")}, x),
            TypeError,
            "'n' of params is .*shared batch argument",
        ),
        (lambda: fr.per_example_norms({}), ValueError, "no floating-point array"),
    ]:
        with pytest.raises(error, match=message):
            call()

    def squeezed(params, x):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError) as caught:
        fr.per_example(squeezed)(params, x)
    assert any("batches of one example: [1, 4]" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_of_torch_is_refused_in_training_mode(tracked):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2, track_running_stats=tracked))

    def loss(params, x):
        return torch.func.functional_call(net, params, (x,)).square().mean()

    params = {name: p.detach() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match="BatchNorm2d .* normalizes by statistics of the batch"):
        funcreg.torch.per_example(loss)(params, torch.ones(3, 1, 4, 4))
    net.eval()
    if tracked:
        values, _ = funcreg.torch.per_example(loss)(params, torch.ones(3, 1, 4, 4))
        assert values.shape == (3,)
    else:
        with pytest.raises(ValueError, match="statistics of the batch"):
            funcreg.torch.per_example(loss)(params, torch.ones(3, 1, 4, 4))
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_other_threads_may_train_batch_norm_meanwhile():
    net, other = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)

    def loss(params, x):
        thread = threading.Thread(target=lambda: done.append(other(torch.ones(3, 2))))
        thread.start()
        thread.join()
        return torch.func.functional_call(net, params, (x,)).square().mean()

    done = []
    funcreg.torch.per_example(loss)(funcreg.torch.params(net), torch.ones(3, 2))
    assert len(done) == 1


@pytest.mark.parametrize("at_call", [True, False])
def test_batch_norm_of_linen_is_refused_in_training_mode(at_call):
    class Net(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x):
            given = {"use_running_average": not self.train}
            norm = nn.BatchNorm(**({} if at_call else given))
            return norm(nn.Dense(3)(x), **(given if at_call else {}))

    variables = Net(False).init(jax.random.key(0), jnp.ones((1, 4)))

    def loss(train):
        def function(params, x):
            own = {**variables, "params": params}
            return (Net(train).apply(own, x, mutable=["batch_stats"])[0] ** 2).mean()

        return function

    with pytest.raises(ValueError, match="BatchNorm .* normalizes by statistics of the batch"):
        funcreg.jax.per_example(loss(True))(variables["params"], jnp.ones((5, 4)))
    values, _ = funcreg.jax.per_example(loss(False))(variables["params"], jnp.ones((5, 4)))
    assert values.shape == (5,)


def test_batch_norm_of_nnx_is_refused_in_training_mode():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    net = Net(nnx.Rngs(0))

    def loss(params, x):
        graph, _, rest = nnx.split(net, nnx.Param, ...)
        return (nnx.merge(graph, params, rest)(x) ** 2).mean()

    before = nnx.BatchNorm.__call__
    params = nnx.state(net, nnx.Param)
    net.train()
    with pytest.raises(ValueError, match="BatchNorm .* normalizes by statistics of the batch"):
        funcreg.jax.per_example(loss)(params, jnp.ones((5, 4)))
    net.eval()
    values, _ = funcreg.jax.per_example(loss)(params, jnp.ones((5, 4)))
    assert values.shape == (5,)
    assert nnx.BatchNorm.__call__ is before


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_convnet(chunk_size):
    """torch modules with a flatten, which need the batch axis."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.GroupNorm(1, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    ).double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    x, y = torch.randn(EXAMPLES, 1, 4, 4, dtype=torch.float64), torch.arange(EXAMPLES) % 3

    def loss(params, x, y):
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    values, grads = funcreg.torch.per_example(loss, chunk_size)(params, x, y)
    want = loop(TORCH, loss, params, [(x[i : i + 1], y[i : i + 1]) for i in range(EXAMPLES)])
    np.testing.assert_allclose(values.numpy(), want[0], rtol=1e-12)
    assert_equal_trees(TORCH, grads, want[1], 1e-12)

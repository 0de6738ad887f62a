"""`funcreg.torch.optax` against optax itself: the same calls, the same numbers, the same states."""

import inspect
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.utils import _pytree as pytree

import funcreg.torch.optax as fo

pytestmark = pytest.mark.relaxed_promotion  # optax mixes dtypes
STEPS = 100


class Layer(NamedTuple):
    gain: Any


def _float64_count(schedule_factory):
    """optax computes these schedules in float32 for an int32 count, even with x64 on."""
    return lambda *args, **kwargs: lambda count: schedule_factory(*args, **kwargs)(jnp.asarray(count, jnp.float64))


OURS = SimpleNamespace(**vars(fo), float32=torch.float32, float64=torch.float64, where=torch.where)
THEIRS = SimpleNamespace(
    **{
        **{name: value for name, value in vars(optax).items() if not name.startswith("__")},
        "linear_schedule": _float64_count(optax.linear_schedule),
        "exponential_decay": _float64_count(optax.exponential_decay),
        "warmup_cosine_decay_schedule": _float64_count(optax.warmup_cosine_decay_schedule),
    },
    float32=jnp.float32,
    float64=jnp.float64,
    where=jnp.where,
)

MASK = {"w": True, "layers": [{"z": False, "b": True}, Layer(False)]}
PREFIX_MASK = {"w": False, "layers": [True, Layer(True)]}


def _mask_function(params):
    return {"w": params["w"].ndim > 1, "layers": [False, Layer(params["w"].ndim == 1)]}


def _skip_large(o):
    def skip(updates, gradient_step, params):
        del gradient_step, params
        return updates["w"][0, 0] > 1.0, {"seen": updates["w"][0, 0]}

    return skip


# name -> optimizer, built from either module
CASES = {
    "sgd": lambda o: o.sgd(0.1),
    "sgd momentum": lambda o: o.sgd(0.1, 0.9),
    "sgd nesterov": lambda o: o.sgd(0.1, momentum=0.9, nesterov=True),
    "sgd float32 momentum": lambda o: o.sgd(0.1, 0.9, True, o.float32),
    "sgd linear": lambda o: o.sgd(o.linear_schedule(0.1, 0.01, 40, 10), 0.5),
    "sgd constant": lambda o: o.sgd(o.constant_schedule(0.3)),
    "adam": lambda o: o.adam(0.1),
    "adam options": lambda o: o.adam(0.1, 0.8, 0.99, 1e-3, 1e-2),
    "adam nesterov": lambda o: o.adam(0.1, b1=0.95, nesterov=True),
    "adam float32 mu": lambda o: o.adam(0.1, mu_dtype=o.float32),
    "adam float32 mu nesterov": lambda o: o.adam(0.1, mu_dtype=o.float32, nesterov=True),
    "adam b1=0": lambda o: o.adam(0.1, b1=0.0, b2=0.0),
    "adam warmup": lambda o: o.adam(o.warmup_cosine_decay_schedule(0.0, 0.1, 10, 60, 0.001)),
    "adamw": lambda o: o.adamw(0.1),
    "adamw options": lambda o: o.adamw(0.1, 0.8, 0.99, 1e-3, 1e-2, weight_decay=0.3, nesterov=True),
    "adamw mask": lambda o: o.adamw(0.1, weight_decay=0.3, mask=MASK),
    "adamw prefix mask": lambda o: o.adamw(0.1, weight_decay=0.3, mask=PREFIX_MASK),
    "adamw mask function": lambda o: o.adamw(0.1, weight_decay=0.3, mask=_mask_function),
    "adamw schedules": lambda o: o.adamw(
        o.exponential_decay(0.1, 10, 0.7, 5, True), weight_decay=o.cosine_decay_schedule(0.5, 50), mask=MASK
    ),
    "rmsprop": lambda o: o.rmsprop(0.1),
    "rmsprop options": lambda o: o.rmsprop(0.1, 0.99, 1e-3, 0.5),
    "rmsprop eps outside": lambda o: o.rmsprop(0.1, decay=0.99, eps=1e-2, eps_in_sqrt=False),
    "rmsprop centered": lambda o: o.rmsprop(0.1, eps=1e-2, initial_scale=0.5, centered=True, momentum=0.9),
    "rmsprop centered eps outside": lambda o: o.rmsprop(0.1, initial_scale=0.5, eps_in_sqrt=False, centered=True),
    "rmsprop momentum": lambda o: o.rmsprop(o.cosine_decay_schedule(0.1, 80, 0.1, 2.0), momentum=0.9),
    "rmsprop nesterov": lambda o: o.rmsprop(0.1, momentum=0.9, nesterov=True),
    "rmsprop bias correction": lambda o: o.rmsprop(0.1, bias_correction=True),
    "rmsprop centered bias correction": lambda o: o.rmsprop(0.1, eps=1e-2, centered=True, bias_correction=True),
    "scale_by_adam": lambda o: o.scale_by_adam(0.7, 0.9, eps_root=0.1),
    "scale_by_learning_rate": lambda o: o.scale_by_learning_rate(0.1, flip_sign=False),
    "scale_by_learning_rate None": lambda o: o.scale_by_learning_rate(),
    "trace": lambda o: o.chain(o.trace(0.3), o.trace(decay=0.5, nesterov=True), o.scale_by_learning_rate(0.01)),
    "add_decayed_weights": lambda o: o.chain(o.add_decayed_weights(0.2), o.adam(0.1)),
    "add_decayed_weights 0": lambda o: o.chain(o.add_decayed_weights(), o.sgd(0.1)),
    "add_decayed_weights schedule": lambda o: o.chain(
        o.add_decayed_weights(o.exponential_decay(0.1, 3, 0.9)), o.sgd(0.1)
    ),
    "clip_by_global_norm": lambda o: o.chain(o.clip_by_global_norm(3.5), o.adam(0.1, eps=1.0), o.identity()),
    "MultiSteps": lambda o: o.MultiSteps(o.adamw(0.1), 3, accumulator_dtype=o.float64),
    "MultiSteps float32": lambda o: o.MultiSteps(o.sgd(0.1, 0.9), every_k_schedule=4),
    "MultiSteps sum": lambda o: o.MultiSteps(o.sgd(0.1, 0.9), 3, False, accumulator_dtype=o.float64),
    "MultiSteps schedule": lambda o: o.MultiSteps(
        o.adam(o.cosine_decay_schedule(0.1, 20)), lambda n: o.where(n < 5, 1, 4), accumulator_dtype=o.float64
    ).gradient_transformation(),
    "MultiSteps skip": lambda o: o.MultiSteps(
        o.adam(0.1), 2, should_skip_update_fn=_skip_large(o), accumulator_dtype=o.float64
    ),
}


def draw(seed, lead=()):
    """A nested tree of random arrays: dicts whose keys are not sorted, a list, a NamedTuple, a 0-d leaf."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.standard_normal((*lead, *shape))

    return {
        "w": array(3, 2),
        "layers": [{"z": array(4), "b": array()}, Layer(array(2, 1))],
    }


def to_torch(tree, dtype=None):
    return pytree.tree_map(lambda x: torch.tensor(x, dtype=dtype), tree)


def flat(tree, path=""):
    """Leaves as NumPy arrays by path, with the name of every NamedTuple on the way: equal keys are equal structures."""
    if hasattr(tree, "_fields"):
        name = type(tree).__name__
        return {f"{path}/{name}": np.zeros(())} | {
            k: v for field in tree._fields for k, v in flat(getattr(tree, field), f"{path}/{name}.{field}").items()
        }
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], f"{path}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, child in enumerate(tree) for k, v in flat(child, f"{path}/{i}").items()}
    return {path: np.asarray(tree)}


def our_trajectory(optimizer, params, grads):
    """Params, states and updates after each step, stacked."""
    state = optimizer.init(params)
    rows = []
    for i in range(STEPS):
        updates, state = optimizer.update(pytree.tree_map(lambda g, i=i: g[i], grads), state, params)
        params = fo.apply_updates(params, updates)
        rows.append(flat({"params": params, "state": state, "updates": updates}))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def their_trajectory(name, params, grads):
    with jax.enable_x64(True):
        optimizer = CASES[name](THEIRS)
        # its lax.cond would be compiled anew at every step; the others are faster without compilation
        update = jax.jit(optimizer.update) if name.startswith("MultiSteps") else optimizer.update
        params, state, rows = jax.tree.map(jnp.asarray, params), optimizer.init(params), []
        for i in range(STEPS):
            updates, state = update(jax.tree.map(lambda g, i=i: jnp.asarray(g[i]), grads), state, params)
            params = optax.apply_updates(params, updates)
            rows.append(flat({"params": params, "state": state, "updates": updates}))
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
    return max(float(np.max(np.abs(a[k] - b[k]) / np.maximum(1, np.abs(b[k])))) for k in a)


def tensors(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def assert_close(a, b, tolerance):
    left, right = tensors(a), tensors(b)
    assert len(left) == len(right) > 0
    for x, y in zip(left, right, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_that_of_optax(name):
    params, grads = draw(0), draw(1, (STEPS,))
    ours = our_trajectory(CASES[name](OURS), to_torch(params), to_torch(grads))
    theirs = their_trajectory(name, params, grads)
    assert largest_difference(ours, theirs) <= 1e-12


@pytest.mark.parametrize("name", ["adamw", "rmsprop centered", "clip_by_global_norm"])
def test_trajectory_of_complex_parameters_is_that_of_optax(name):
    draws = np.random.default_rng(2).standard_normal((STEPS + 1, 3, 2)).view(complex)[..., 0]
    params, grads = {"w": draws[0]}, {"w": draws[1:]}
    ours = our_trajectory(CASES[name](OURS), to_torch(params), to_torch(grads))
    assert largest_difference(ours, their_trajectory(name, params, grads)) <= 1e-12


SCHEDULES = {
    "constant": lambda o: o.constant_schedule(0.3),
    "linear": lambda o: o.linear_schedule(0.3, 0.1, 7),
    "linear begin": lambda o: o.linear_schedule(0.1, 0.3, 7, transition_begin=4),
    "linear negative begin": lambda o: o.linear_schedule(0.1, 0.3, 7, -3),
    "linear frozen": lambda o: o.linear_schedule(0.1, 0.3, 0),
    "linear negative steps": lambda o: o.linear_schedule(0.1, 0.3, -2),
    "cosine": lambda o: o.cosine_decay_schedule(0.3, 11),
    "cosine options": lambda o: o.cosine_decay_schedule(0.3, 11, 0.2, 1.7),
    "warmup cosine": lambda o: o.warmup_cosine_decay_schedule(0.01, 0.3, 5, 20),
    "warmup cosine options": lambda o: o.warmup_cosine_decay_schedule(0.01, 0.3, 5, 20, 0.02, 0.5),
    "warmup cosine no warmup": lambda o: o.warmup_cosine_decay_schedule(0.01, 0.3, 0, 20),
    "warmup cosine no peak": lambda o: o.warmup_cosine_decay_schedule(0.01, 0.0, 5, 20, 0.3),
    "exponential": lambda o: o.exponential_decay(0.3, 5, 0.7),
    "exponential begin": lambda o: o.exponential_decay(0.3, 5, 0.7, 6),
    "exponential negative begin": lambda o: o.exponential_decay(0.3, 5, 0.7, -6),
    "exponential staircase": lambda o: o.exponential_decay(0.3, 5, 0.7, 2, staircase=True),
    "exponential lower bound": lambda o: o.exponential_decay(0.3, 5, 0.7, end_value=0.1),
    "exponential upper bound": lambda o: o.exponential_decay(0.3, 5, 1.5, end_value=0.9),
    "exponential bound from the start": lambda o: o.exponential_decay(0.3, 5, 0.7, 4, end_value=0.4),
    "exponential frozen": lambda o: o.exponential_decay(0.3, 0, 0.7),
    "exponential rate 0": lambda o: o.exponential_decay(0.3, 5, 0.0, end_value=0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_that_of_optax(name):
    ours = SCHEDULES[name](OURS)
    with jax.enable_x64(True):
        theirs = SCHEDULES[name](THEIRS)
        expected = np.broadcast_to(theirs(jnp.arange(31.0)), 31).tolist()
    assert [float(ours(count)) for count in range(31)] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    counts = torch.arange(31, dtype=torch.int32)
    assert [float(ours(count)) for count in counts] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    if name != "constant":
        torch.testing.assert_close(torch.func.vmap(ours)(counts), torch.tensor(expected, dtype=torch.float64))


def test_arguments_of_schedules_may_be_batched():
    steps, rates = torch.tensor([0, 3, 9]), torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)
    makers = [
        lambda n, r: fo.linear_schedule(r, 1.0, n, n),
        lambda n, r: fo.exponential_decay(r + 1, n, r, n, end_value=r),
        lambda n, r: fo.cosine_decay_schedule(r, n + 1, r, r),
        lambda n, r: fo.warmup_cosine_decay_schedule(0.0, r, n, n + 5, r),
    ]
    for make in makers:
        for count in (0, 4, 20):
            batched = torch.func.vmap(lambda n, r, make=make, count=count: make(n, r)(count))(steps, rates)
            loop = [make(int(n), float(r))(count) for n, r in zip(steps, rates, strict=True)]
            torch.testing.assert_close(batched, torch.stack(loop), rtol=1e-14, atol=0)


def test_clip_selects_by_the_global_norm():
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "n": None, "i": torch.tensor([100])}
    for max_norm, factor in [(10.0, 1.0), (5.0, 1.0), (2.5, 0.5), (torch.tensor(1.0, dtype=torch.float64), 0.2)]:
        clipped, _ = fo.clip_by_global_norm(max_norm).update(grads, fo.EmptyState())
        assert_close((clipped["a"], clipped["b"]), (torch.tensor([3 * factor]), torch.tensor([4 * factor])), 1e-6)
        assert clipped["n"] is None and clipped["a"].dtype == torch.float32
    assert fo.clip_by_global_norm(1.0).update({}, fo.EmptyState()) == ({}, fo.EmptyState())


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_clip_of_zero_gradients_is_zero_and_has_a_derivative(max_norm):
    def clipped(g):
        return fo.clip_by_global_norm(max_norm).update({"w": g}, fo.EmptyState())[0]["w"].sum()

    zero = torch.zeros(3)
    assert clipped(zero) == 0
    assert torch.isfinite(torch.func.grad(clipped)(zero)).all()


def test_clip_measures_half_precision_in_float32():
    grads = {"w": torch.full((1000,), 300.0, dtype=torch.float16)}  # the sum of squares is no float16
    clipped = fo.clip_by_global_norm(1.0).update(grads, fo.EmptyState())[0]["w"]
    torch.testing.assert_close(clipped, torch.full((1000,), 1000**-0.5, dtype=torch.float16))
    nan = fo.clip_by_global_norm(1.0).update({"w": torch.tensor([1.0, float("nan")])}, fo.EmptyState())[0]["w"]
    assert nan.isnan().all()


def test_multi_steps_tells_when_it_has_updated():
    optimizer = fo.MultiSteps(fo.sgd(1.0), 3)
    params = {"w": torch.zeros(2)}
    state = optimizer.init(params)
    assert not optimizer.has_updated(state)
    seen = []
    for i in range(7):
        updates, state = optimizer.update({"w": torch.full((2,), float(i))}, state, params)
        seen.append((bool(optimizer.has_updated(state)), float(updates["w"][0])))
    assert seen == [(False, 0), (False, 0), (True, -1), (False, 0), (False, 0), (True, -4), (False, 0)]


def test_multi_steps_counts_a_missing_gradient_as_zero():
    optimizer = fo.MultiSteps(fo.sgd(1.0), 2)
    params = {"w": torch.zeros(2), "v": torch.zeros(1), "n": None}
    _, state = optimizer.update({"w": torch.ones(2), "v": torch.ones(1), "n": None}, optimizer.init(params), params)
    updates, state = optimizer.update({"w": torch.ones(2), "v": None, "n": None}, state, params)
    assert updates["w"].tolist() == [-1, -1] and updates["v"].tolist() == [-0.5] and updates["n"] is None
    assert state.acc_grads["v"].tolist() == [0]


def test_dict_mask_is_honoured_leaf_by_leaf():
    params = {"w": torch.ones(2), "b": torch.ones(2)}
    zeros = pytree.tree_map(torch.zeros_like, params)
    masks = [{"w": True, "b": False}, {"b": False, "w": True}, lambda p: {"w": True, "b": np.bool_(False)}]
    for mask in masks:
        for decay in (0.5, lambda count: 0.5):
            transform = fo.add_decayed_weights(decay, mask)
            updates, state = transform.update(zeros, transform.init(params), params)
            assert updates["w"].tolist() == [0.5, 0.5] and updates["b"].tolist() == [0, 0]
            assert type(state).__name__ == "MaskedState"


VMAPPED = {
    "sgd": lambda h: fo.sgd(h, momentum=h, nesterov=True),
    "adam": lambda h: fo.adam(h, b1=1 - h, b2=1 - h / 10, eps=h / 100, eps_root=h / 100, nesterov=True),
    "adamw schedule": lambda h: fo.adamw(fo.warmup_cosine_decay_schedule(0.0, h, 2, 9), weight_decay=h, mask=MASK),
    "rmsprop": lambda h: fo.rmsprop(h, 1 - h, h / 10, h, centered=True, momentum=h, bias_correction=True),
    "clip": lambda h: fo.chain(fo.clip_by_global_norm(20 * h), fo.trace(h), fo.scale_by_learning_rate(h)),
    "MultiSteps": lambda h: fo.MultiSteps(fo.adam(fo.exponential_decay(h, 2, h)), lambda n: torch.where(n < 2, 1, 2)),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_over_hyper_parameters_equals_a_loop(name):
    def run(h, params, grads):
        optimizer = VMAPPED[name](h)
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
            params = fo.apply_updates(params, updates)
        return params, state

    values = torch.tensor([0.01, 0.05, 0.1, 0.2], dtype=torch.float64)
    params, grads = to_torch(draw(0)), [to_torch(draw(i)) for i in range(1, 6)]
    batched = torch.func.vmap(run, (0, None, None))(values, params, grads)
    loop = [run(float(h), params, grads) for h in values]
    assert_close(batched, pytree.tree_map(lambda *x: torch.stack(x), *loop), 1e-12)


def test_vmap_of_init_and_update_over_an_ensemble_equals_a_loop():
    optimizer = fo.MultiSteps(fo.chain(fo.clip_by_global_norm(4.0), fo.adamw(fo.cosine_decay_schedule(0.1, 9))), 2)
    params, grads = to_torch(draw(0, (4,))), to_torch(draw(1, (4,)))
    state = torch.func.vmap(optimizer.init)(params)
    counts = [x for x in tensors(state) if x.dtype == torch.int32]
    assert len(counts) == 4 and all(x.shape == (4,) and x.is_contiguous() for x in counts)
    batched, loop = params, [pytree.tree_map(lambda x, i=i: x[i], (params, grads)) for i in range(4)]
    states = [optimizer.init(p) for p, _ in loop]
    for _ in range(3):
        updates, state = torch.func.vmap(optimizer.update)(grads, state, batched)
        batched = fo.apply_updates(batched, updates)
        for i, (p, g) in enumerate(loop):
            updates, states[i] = optimizer.update(g, states[i], p)
            loop[i] = (fo.apply_updates(p, updates), g)
    expected = [(p, s) for (p, _), s in zip(loop, states, strict=True)]
    assert_close((batched, state), pytree.tree_map(lambda *x: torch.stack(x), *expected), 1e-12)


def test_updates_can_be_differentiated():
    params, grads = to_torch(draw(0)), to_torch(draw(1))

    def after_two_steps(h):
        optimizer = fo.adamw(h, b1=1 - h, eps_root=1e-8, weight_decay=h)
        state, p = optimizer.init(params), params
        for _ in range(2):
            updates, state = optimizer.update(grads, state, p)
            p = fo.apply_updates(p, updates)
        return sum((x * y).sum() for x, y in zip(tensors(p), tensors(grads), strict=True))

    h, d = torch.tensor(0.1, dtype=torch.float64), 1e-6
    numeric = (after_two_steps(h + d) - after_two_steps(h - d)) / (2 * d)
    torch.testing.assert_close(torch.func.grad(after_two_steps)(h), numeric, rtol=1e-6, atol=0)


def test_compiled_equals_eager_and_is_compiled_once():
    schedule = fo.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)
    mask = {"w": True, "b": False, "i": True}
    adamw = fo.adamw(schedule, weight_decay=torch.tensor(0.1), mask=mask, nesterov=True)
    optimizer = fo.MultiSteps(fo.chain(fo.clip_by_global_norm(1.0), adamw), 2)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    params = {"w": torch.randn(3, 2), "b": torch.randn(()), "i": torch.tensor(3)}
    eager = compiled = (params, optimizer.init(params))
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(5):
        grads = {"b": torch.randn(()), "w": torch.randn(3, 2), "i": torch.tensor(0)}  # another order of keys
        eager = step(*eager, grads)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            compiled = fast(*compiled, grads)
    assert_close(compiled, eager, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_no_update_waits_for_the_device(name):
    """A tensor on the meta device has no value: whatever asks for one raises."""
    optimizer = CASES[name](OURS)
    params = pytree.tree_map(lambda x: torch.empty(x.shape, device="meta"), draw(0))
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
        params = fo.apply_updates(params, updates)
    assert {x.device.type for x in tensors((state, params))} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_dtypes_are_kept(name, dtype):
    optimizer = CASES[name](OURS)
    params = to_torch(draw(0), dtype)
    state = optimizer.init(params)
    dtypes = [x.dtype for x in tensors(state)]
    assert {x.dtype for x in tensors(state) if x.ndim == 0} <= {torch.int32, *dtypes}
    for i in range(2):
        updates, state = optimizer.update(to_torch(draw(i), dtype), state, params)
        assert {x.dtype for x in tensors(updates)} == {dtype}
        params = fo.apply_updates(params, updates)
        assert {x.dtype for x in tensors(params)} == {dtype}
        assert [x.dtype for x in tensors(state)] == dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyper_parameters_promote_nothing(dtype):
    h = torch.tensor(0.125, dtype=torch.float64)
    optimizer = fo.chain(
        fo.clip_by_global_norm(h),
        fo.trace(h),
        fo.adamw(h, h, h, h, h, weight_decay=h, nesterov=True),
        fo.rmsprop(fo.linear_schedule(h, h, 3), h, h, h, momentum=h),
    )
    params = {"w": torch.ones(3, dtype=dtype), "b": torch.ones((), dtype=dtype)}
    updates, state = optimizer.update(params, optimizer.init(params), params)
    new = fo.apply_updates(params, updates)
    assert {x.dtype for x in tensors((updates, new))} == {dtype}
    assert {x.dtype for x in tensors(state)} == {dtype, torch.int32}


def test_half_precision_is_computed_in_float32():
    """In float16, 1e-8 is 0, and an update 0 / 0."""
    eps = torch.tensor(1e-8)
    params = {"w": torch.zeros(3, dtype=torch.float16)}
    for optimizer in (fo.adam(0.1), fo.adam(0.1, eps=eps), fo.rmsprop(0.1), fo.rmsprop(0.1, eps=eps, centered=True)):
        updates, _ = optimizer.update(params, optimizer.init(params))
        assert updates["w"].tolist() == [0, 0, 0]
    for b2 in (0.999, torch.tensor(0.999)):  # as a bfloat16, this is 1
        optimizer = fo.scale_by_adam(0.9, b2, eps=0.0)
        grads = {"w": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)}
        updates, _ = optimizer.update(grads, optimizer.init(grads))
        assert torch.equal(updates["w"], torch.sign(grads["w"]))


def test_bias_correction_is_right_in_float32():
    """`1 - b2**t` in float32 is off by 7e-6 at b2 = 0.999 (1e-4 at 0.9999), as it is in optax without x64."""
    for b2 in (0.999, 0.9999):
        optimizer = fo.scale_by_adam(b2=b2, eps=0.0)
        params = {"w": torch.tensor([2.0, -3.0])}
        updates, _ = optimizer.update(params, optimizer.init(params))
        torch.testing.assert_close(updates["w"], torch.tensor([1.0, -1.0]), rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_left_alone_and_states_can_be_pickled(name):
    optimizer = CASES[name](OURS)
    params, grads = to_torch(draw(0)), to_torch(draw(1))
    _, state = optimizer.update(grads, optimizer.init(params), params)
    before = [x.clone() for x in tensors((params, grads, state))]
    once = optimizer.update(grads, state, params)
    fo.apply_updates(params, once[0])
    assert all(torch.equal(x, y) for x, y in zip(before, tensors((params, grads, state)), strict=True))
    restored = pickle.loads(pickle.dumps(state))
    assert pytree.tree_structure(restored) == pytree.tree_structure(state)
    again = optimizer.update(grads, restored, params)
    assert all(torch.equal(x, y) for x, y in zip(tensors(once), tensors(again), strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd nesterov", "rmsprop centered", "clip_by_global_norm", "MultiSteps"])
def test_leaves_that_are_not_trained_are_passed_over(name):
    optimizer = CASES[name](OURS)
    others = {"none": None, "int": torch.tensor([3, 4]), "bool": torch.tensor(True), "number": 7, "text": "x"}
    params = {"w": torch.ones(2), **others}
    grads = {"w": torch.ones(2), "none": None, "int": torch.tensor([9, 9]), "bool": torch.tensor(True), "number": 5}
    grads["text"] = "x"
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        assert updates["int"].tolist() == [0, 0] and updates["none"] is None and updates["text"] == "x"
        params = fo.apply_updates(params, updates)
    assert not torch.equal(params["w"], torch.ones(2))
    assert params["int"].tolist() == [3, 4] and params["bool"].item() is True
    assert params["none"] is None and params["number"] == 7 and params["text"] == "x"


def test_leaf_without_gradient_stays():
    optimizer = fo.adamw(0.1, weight_decay=0.5)
    params = {"w": torch.ones(2), "v": torch.ones(2)}
    state = optimizer.init(params)
    _, state = optimizer.update({"w": torch.ones(2), "v": torch.ones(2)}, state, params)
    updates, new = optimizer.update({"w": torch.ones(2), "v": None}, state, params)
    assert updates["v"] is None
    assert fo.apply_updates(params, updates)["v"].tolist() == [1, 1]
    assert torch.equal(new[0].mu["v"], state[0].mu["v"]) and not torch.equal(new[0].mu["w"], state[0].mu["w"])


def test_dicts_are_matched_by_key():
    """PyTorch's pytrees keep the order in which keys were inserted."""
    params = {"a": torch.zeros(2), "b": torch.zeros(2), "c": {"x": torch.zeros(2), "y": torch.zeros(2)}}
    grads = {"a": torch.ones(2), "b": 2 * torch.ones(2), "c": {"x": 3 * torch.ones(2), "y": 4 * torch.ones(2)}}
    shuffled = OrderedDict(c={"y": grads["c"]["y"], "x": grads["c"]["x"]}, b=grads["b"], a=grads["a"])
    for name in ("sgd nesterov", "adamw", "rmsprop centered", "MultiSteps", "clip_by_global_norm"):
        optimizer = CASES[name](OURS)
        results = []
        for given in (grads, shuffled):
            p, state = params, optimizer.init(params)
            for _ in range(3):
                updates, state = optimizer.update(given, state, p)
                p = fo.apply_updates(p, updates)
            results.append(flat((p, state)))
        assert results[0].keys() == results[1].keys()
        for key in results[0]:
            np.testing.assert_allclose(results[0][key], results[1][key], rtol=1e-6)


def _grads(**change):
    return {"w": torch.ones(3, 2), "layer": {"b": torch.ones(2), "g": torch.ones(1)}} | change


MISMATCHES = {
    "shape": (_grads(layer={"b": torch.ones(3), "g": torch.ones(1)}), r"shape \(3,\) at 'layer.b'.* \(2,\)"),
    "missing": (_grads(layer={"g": torch.ones(1)}), r"nothing at 'layer.b'.* shape \(2,\)"),
    "missing branch": ({"w": torch.ones(3, 2)}, r"nothing at 'layer.b'.* shape \(2,\)"),
    "extra": (_grads(z=[torch.ones(4)]), r"shape \(4,\) at 'z.0'.* nothing"),
    "leaf for branch": (_grads(layer=torch.ones(2)), r"shape \(2,\) at 'layer'.* type dict"),
    "container": ([torch.ones(3, 2), torch.ones(2)], r"type list at the root.* type dict"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatched_trees_are_refused_by_leaf_name(name):
    wrong, message = MISMATCHES[name]
    params = _grads()
    for optimizer in (
        fo.adam(0.1),
        fo.sgd(0.1, 0.9),
        fo.rmsprop(0.1),
        fo.add_decayed_weights(0.1),
        fo.MultiSteps(fo.sgd(1.0), 2),
    ):
        state = optimizer.init(params)
        with pytest.raises(ValueError, match=f"^[A-Za-z_]+: updates has .*{message}"):
            optimizer.update(wrong, state, params)
    with pytest.raises(ValueError, match=f"^apply_updates: updates has .*{message}"):
        fo.apply_updates(params, wrong)


def test_wrong_calls_say_what_to_do():
    params = _grads()
    with pytest.raises(ValueError, match=r"add_decayed_weights: .*update\(grads, state, params\)"):
        fo.adamw(0.1).update(params, fo.adamw(0.1).init(params))
    with pytest.raises(ValueError, match=r"chain: state must have 2 parts, got 1"):
        fo.adam(0.1).update(params, (fo.EmptyState(),), params)
    with pytest.raises(TypeError, match=r"chain: state must be a tuple of 2 states, got dict; call init\(params\)"):
        fo.adam(0.1).update(params, {"a": 1, "b": 2}, params)
    with pytest.raises(TypeError, match=r"chain: argument 1 must be a transformation \(init, update\), got 0.1"):
        fo.chain(fo.sgd(0.1), 0.1)
    with pytest.raises(ValueError, match=r"mask has nothing at 'layer.b', where params has a tensor of shape \(2,\)"):
        fo.adamw(0.1, mask={"w": True, "layer": {"g": True}}).init(params)
    with pytest.raises(ValueError, match="add_decayed_weights: mask must hold Python bools only"):
        fo.adamw(0.1, mask={"w": "yes", "layer": True}).init(params)
    with pytest.raises(ValueError, match="cosine_decay_schedule: decay_steps must be > 0, got 0"):
        fo.cosine_decay_schedule(1.0, 0)
    with pytest.raises(ValueError, match="warmup_cosine_decay_schedule: decay_steps must be > warmup_steps = 5, got 5"):
        fo.warmup_cosine_decay_schedule(0.0, 1.0, 5, 5)
    with pytest.raises(ValueError, match="MultiSteps: every_k_schedule must be >= 1, got 0"):
        fo.MultiSteps(fo.sgd(1.0), 0)
    with pytest.raises(ValueError, match="MultiSteps: every_k_schedule must be >= 1, got 0"):
        fo.MultiSteps(fo.sgd(1.0), torch.tensor(0))
    for wrong in (2.5, "2", None, True, torch.tensor(2.5), torch.tensor([2])):
        with pytest.raises(TypeError, match="MultiSteps: every_k_schedule must be an int, a 0-d tensor of integers or"):
            fo.MultiSteps(fo.sgd(1.0), wrong)
    multi = fo.MultiSteps(fo.sgd(1.0), 2, should_skip_update_fn=lambda *_: (False, ()))
    with pytest.raises(ValueError, match="should_skip_update_fn must return a 0-d bool tensor first, got bool"):
        multi.update(params, multi.init(params), params)
    with pytest.raises(TypeError, match="scale_by_adam: leaves must be torch tensors.*Linear.*named_parameters"):
        fo.adam(0.1).init(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="ndarray"):
        fo.sgd(0.1).update({"w": np.ones(2)}, fo.sgd(0.1).init({}), {})


def test_count_does_not_overflow():
    count = torch.tensor([0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    expected = np.asarray(optax.safe_increment(jnp.asarray(count.numpy())))
    assert fo.safe_increment(count).tolist() == expected.tolist() == [1, 2**31 - 1, 2**31 - 1]


FUNCTIONS = """chain sgd adam adamw rmsprop scale_by_adam scale_by_learning_rate trace add_decayed_weights identity
clip_by_global_norm apply_updates MultiSteps constant_schedule linear_schedule cosine_decay_schedule safe_increment
warmup_cosine_decay_schedule exponential_decay MultiSteps.init MultiSteps.update MultiSteps.has_updated
MultiSteps.gradient_transformation""".split()


def _get(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_that_of_optax(name):
    ours = list(inspect.signature(_get(fo, name)).parameters.values())
    theirs = inspect.signature(_get(optax, name)).parameters
    kept = [p for p in theirs.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def described(parameters):
        return [(p.name, p.kind, getattr(p.default, "__name__", str(p.default).split(".")[-1])) for p in parameters]

    assert described(ours) == described(kept)


def test_public_names_exist_in_optax():
    modules = {name for name, value in vars(fo).items() if inspect.ismodule(value)}
    public = {name for name in vars(fo) if not name.startswith("_")} - modules
    assert {name for name in public if not hasattr(optax, name)} == set()
    assert {name for name in FUNCTIONS if "." not in name} <= public
    for name in public:
        if hasattr(getattr(fo, name), "_fields"):
            assert getattr(fo, name)._fields == getattr(optax, name)._fields
            assert getattr(fo, name)._field_defaults == getattr(optax, name)._field_defaults


def test_absent_parameter_raises_type_error():
    with pytest.raises(TypeError, match="amsgrad"):
        fo.adam(0.1, amsgrad=True)
    with pytest.raises(TypeError, match="value"):
        fo.adam(0.1).update({}, fo.adam(0.1).init({}), {}, value=1.0)

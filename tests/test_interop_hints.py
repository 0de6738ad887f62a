"""Hints of `interop.check` and `check_training`: right where a known change explains a difference, silent elsewhere."""

import contextlib
import copy
import doctest
import json
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import funcreg.jax as frj
import funcreg.torch as frt
import hints_corpus
from funcreg import interop
from hints_case import LABELS, W, X, Y
from hints_steps import BATCHES, HYPER, PARAMS, by_torch_optim, coupled, decoupled
from interop import Hint, Verdict
from interop.hints import KINDS, RULES, _draws, _knobs, _threads
from interop.hints._calls import Recorder
from interop.hints._changes import of_calls
from interop.hints._closures import with_numbers
from interop.hints._knobs import Knob
from interop.hints._search import EXPLAINED
from parity_corpus import layer_norm_jax, loss, normal


@contextlib.contextmanager
def quickly():
    """Compiled without optimizations: it takes half the time. optax's bias correction divides by an integer power."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def kinds_of(report):
    return {hint.kind for hint in report.hints}


@pytest.mark.parametrize(
    ("ours", "theirs", "kinds"),
    [
        (lambda x: x / 255, lambda x: x / 256, {"off_by_one"}),
        (lambda x: torch.tanh(x / 255), jnp.tanh, set()),
        (lambda x: x.T @ x / 255, lambda x: x.T @ x / 256, {"biased_variance"}),
    ],
)
def test_what_is_divided_is_called_a_variance_or_a_mean_only_if_it_is_a_sum(ours, theirs, kinds):
    with quickly():
        assert kinds_of(interop.check(ours, theirs, X)) == kinds


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.relu, jax.nn.relu),
        (lambda x: x.clamp(min=0), lambda x: jnp.maximum(x, 0)),
        (lambda x: x.clamp(-1, 1), lambda x: jnp.clip(x, -1, 1)),
    ],
)
def test_another_derivative_at_nan_is_not_explained_by_that_at_a_kink(ours, theirs):
    x = np.array([0.5, np.nan, -0.3, 2.0])
    with quickly():
        report = interop.check(
            torch.func.grad(lambda x: (ours(x) ** 2).sum()), jax.grad(lambda x: (theirs(x) ** 2).sum()), x
        )
    assert report.verdict is Verdict.SEMANTIC and report.hints == ()


# --- the corpus ---


def of_corpus():
    """One case of each kind and every sixth of those that are of none are quick; the whole corpus is slow."""
    kinds: Counter[str] = Counter()
    for case in hints_corpus.CASES:
        kinds[case.kind] += 1
        quick = kinds[case.kind] == 1 or (not case.kind and kinds[""] % 6 == 0)
        yield pytest.param(case, marks=() if quick else pytest.mark.slow, id=str(case))


@pytest.mark.parametrize("case", list(of_corpus()))
def test_a_hint_is_given_where_it_is_right_and_only_there(case):
    with quickly():
        report = case.check()
    assert report.verdict == "semantic"
    assert kinds_of(report) == case.kinds and len(report.hints) == len(case.kinds), report
    assert all(hint.difference < EXPLAINED for hint in report.hints)


def test_the_corpus_covers_every_kind_and_what_is_of_none():
    found = [kind for case in hints_corpus.CASES for kind in case.kinds]
    assert set(found) == set(KINDS) and len(KINDS) == 17
    assert all(found.count(kind) >= 2 for kind in KINDS), found
    assert sum(not case.kinds for case in hints_corpus.CASES) >= 50
    assert len({str(case) for case in hints_corpus.CASES}) == len(hints_corpus.CASES)


# --- what a hint says ---


def test_the_difference_is_that_after_the_change():
    report = interop.check(F.gelu, jax.nn.gelu, X)
    (hint,) = report.hints
    changed = interop.check(lambda x: F.gelu(x, approximate="tanh"), jax.nn.gelu, X)
    assert hint.kind == "gelu" and hint.difference == changed.leaves[0].float64.relative
    assert hint.change.startswith("PyTorch computes gelu exactly, by erf; with gelu by its approximation with tanh")


def test_the_call_and_its_line_are_named():
    class Net(nn.Module):
        def forward(self, x):
            x = F.layer_norm(x, (6,))
            return F.layer_norm(torch.sin(x), (6,))

    (hint,) = interop.check(Net(), lambda x: layer_norm_jax(jnp.sin(layer_norm_jax(x, 1e-5)), 1e-6), X).hints
    place = f"test_interop_hints.py:{Net.forward.__code__.co_firstlineno + 2}"
    assert hint.kind == "eps"
    assert hint.change == (
        f"PyTorch uses eps=1e-05 in layer_norm in call 2 of 2 ({place}); with eps=1e-06 both sides agree"
    )


def test_a_report_shows_its_hints():
    report = interop.check(lambda x: x.var(0), lambda x: jnp.var(x, 0), X)
    assert f"hint: {report.hints[0].change} (" in str(report)
    (plain,) = json.loads(report.to_json())["hints"]
    assert plain["kind"] == "biased_variance" and plain["difference"] < EXPLAINED


# --- what might look like an explanation, and is none ---


@pytest.mark.parametrize(
    "theirs, kinds",
    [
        (lambda x: jnp.mean(x**2, 0) * 2, {"factor"}),
        (lambda x: jnp.sum(x**2, 0), {"mean_or_sum"}),
    ],
    ids=["a factor of 2", "a sum of 2 rows"],
)
def test_a_batch_of_two_rows_tells_a_factor_from_a_sum(theirs, kinds):
    """By more rows: on the given ones both come to the same numbers."""
    assert kinds_of(interop.check(lambda x: (x**2).mean(0), theirs, normal(2, 5))) == kinds


def test_what_holds_on_the_given_numbers_only_is_no_explanation():
    """Below its bend Huber's loss is half of the square; other draws lie above it."""
    inside = X / np.abs(X).max() * 0.9
    zeros = np.zeros_like(inside)
    report = interop.check(F.huber_loss, lambda x, y: jnp.mean((x - y) ** 2), inside, zeros)
    assert report.verdict == "semantic" and report.hints == ()
    assert kinds_of(
        interop.check(lambda x, y: F.mse_loss(x, y) / 2, lambda x, y: jnp.mean((x - y) ** 2), inside, zeros)
    )


@pytest.mark.relaxed_promotion
def test_a_change_that_only_comes_closer_is_no_explanation():
    """From 2.5e-12 to 0.5e-12, with an epsilon that is not the other side's."""
    ones = np.ones(8, int)  # which have no neighbours, so that the least difference is semantic
    report = interop.check(lambda x: x + 4e-12, lambda x: x + 1.5e-12, ones)
    assert report.verdict == "semantic" and report.hints == ()


def test_every_leaf_that_differs_must_be_explained():
    def ours(x):
        return {"a": F.gelu(x), "b": x.sin()}

    report = interop.check(ours, lambda x: {"a": jax.nn.gelu(x), "b": jnp.sin(1.1 * x)}, X)
    assert report.hints == ()
    report = interop.check(ours, lambda x: {"a": jax.nn.gelu(x), "b": jnp.sin(x)}, X)
    assert kinds_of(report) == {"gelu"}


def test_a_leaf_that_agrees_must_stay_as_it_is():
    """Exchanging all variances mends one leaf and breaks another; the call that is at fault is found."""

    def ours(x):
        return {"a": x.var(0), "b": x.var(0)}

    (hint,) = interop.check(ours, lambda x: {"a": jnp.var(x, 0, ddof=1), "b": jnp.var(x, 0)}, X).hints
    assert "call 2 of 2" in hint.change


def test_hyper_parameters_are_moved_where_both_sides_use_them():
    """0.05 * 0.5 = 0.025: decay of another number, coupled and not, that comes to the same on these numbers only."""
    hyper = {"lr": 0.5, "wd": 0.05}
    ours = frt.train_step(loss(torch), lambda h: frt.optax.adamw(h["lr"], weight_decay=h["wd"]))
    init, step = frj.train_step(
        loss(jnp), lambda h: optax.chain(optax.add_decayed_weights(0.1 * h["lr"]), optax.adam(h["lr"]))
    )
    with quickly():
        report = interop.check_training(ours, (init, jax.jit(step)), PARAMS, hyper, BATCHES)
        assert report.verdict == "semantic" and report.hints == ()
        init, step = frj.train_step(loss(jnp), coupled)
        report = interop.check_training(ours, (init, jax.jit(step)), PARAMS, hyper, BATCHES)
        assert kinds_of(report) == {"decoupled_decay"}


def test_two_steps_do_not_show_that_a_schedule_is_one_off():
    ours = frt.train_step(loss(torch), lambda h: frt.optax.sgd(frt.optax.linear_schedule(0.1, 0.0, 8)))
    theirs = frj.train_step(loss(jnp), lambda h: optax.sgd(lambda k: optax.linear_schedule(0.1, 0.0, 8)(k + 1)))
    with quickly():
        report = interop.check_training(ours, theirs, PARAMS, HYPER, BATCHES[:2])
    assert report.verdict == "semantic" and report.hints == ()


# --- hyper-parameters of another value ---


@pytest.mark.parametrize("start, right", [(0.9, 0.8713), (0.0, 0.314), (0.999, 0.0), (0.01, 1.3e-5)])
def test_the_other_value_is_found_wherever_it_is(start, right):
    """Of a number that does what a momentum does: it enters by its powers."""

    def residual(change):
        value = change.results
        return np.array([value**k - right**k for k in range(1, 4)])

    knob = Knob("PyTorch's SGD has", "momentum", start, lambda value: {"results": value})
    (change,) = _knobs.changes([knob], residual)
    assert change.results == right
    assert change.change == f"PyTorch's SGD has momentum={start:g}; with momentum={right:g} both sides agree"


def test_entries_that_jump_do_not_move_the_value():
    """As those that a proximal step sets to zero with one strength, and not with the other."""

    def residual(change):
        jumps = (change.results != 0.0042) * (np.array([0.4, -0.7, 0.3]) + 2 * change.results)
        return np.concatenate([np.linspace(1, 3, 9) * (change.results - 0.0042), jumps])

    knob = Knob("PyTorch's l1 has", "lam", 0.003, lambda value: {"results": value})
    found = [change.results for change in _knobs.changes([knob, knob], residual)]
    assert found == [0.0042], "and none is looked for after one that leaves nothing"


def test_a_number_that_explains_nothing_is_not_turned():
    away = np.array([1.0, 0.0])
    tried = []

    def residual(change):
        tried.append(change)
        return away + np.array([0.0, change.results])

    assert not [*_knobs.changes([Knob("", "weight_decay", 0.0, lambda value: {"results": value})], residual)]
    assert len(tried) == 4  # the usual values, and beside the best of them
    assert not [*_knobs.changes([Knob("", "weight_decay", 0.0, lambda value: {"results": value})], lambda _: None)]


def test_numbers_in_closures_are_exchanged_in_a_copy():
    made = frt.optax.chain(frt.optax.clip_by_global_norm(1.0), frt.optax.adamw(0.1, b1=0.9, weight_decay=0.2))
    seen = {}

    def change(owner, name, x):
        seen[owner, name] = x
        return 0.5 if (owner, name) == ("add_decayed_weights", "weight_decay") else x

    other = with_numbers(made, change)
    assert seen["scale_by_adam", "b1"] == 0.9 and seen["add_decayed_weights", "weight_decay"] == 0.2
    assert seen["clip_by_global_norm", "max_norm"] == 1.0
    params = {"w": torch.ones(3, dtype=torch.float64)}
    for transformation, decay in ((made, 0.2), (other, 0.5)):
        updates, _ = transformation.update({"w": torch.zeros(3)}, transformation.init(params), params)
        torch.testing.assert_close(updates["w"], torch.full((3,), -0.1 * decay))
    assert with_numbers(made, lambda owner, name, x: x) is made

    def itself(n, count=0.5):
        return itself(n - 1) + count if n else 0.0

    assert with_numbers(itself, change) is itself


def test_the_defaults_of_the_other_library_are_named():
    steps = by_torch_optim(lambda p, h: torch.optim.Adagrad(p, 0.05))
    with quickly():
        (hint,) = interop.check_training(
            steps, frj.train_step(loss(jnp), lambda h: optax.adagrad(0.05)), PARAMS, HYPER, BATCHES
        ).hints
    assert hint.change == (
        "PyTorch's Adagrad has initial_accumulator_value=0 and eps=1e-10, and adds eps to the root; with "
        "initial_accumulator_value=0.1 and eps=1e-07, and eps added under the root, as by default in optax.adagrad, "
        "both sides agree"
    )


def test_another_value_is_looked_for_only_where_nothing_else_explains_it():
    """Twice a hyper-parameter is another value as well."""
    ours = frt.train_step(loss(torch), lambda h: frt.optax.adamw(h["lr"], weight_decay=h["wd"]))
    theirs = frj.train_step(loss(jnp), lambda h: optax.adamw(h["lr"], weight_decay=0.2))
    with quickly():
        report = interop.check_training(ours, theirs, PARAMS, HYPER, BATCHES)
    assert [hint.kind for hint in report.hints] == ["factor"]


# --- what the search leaves alone ---


def test_calls_inside_an_optimizer_are_not_changed_one_by_one():
    recorder = Recorder(RULES)
    params = {"w": torch.ones(3), "b": torch.ones(3)}
    transformation = frt.prox_adam(0.1, frt.l1(0.1))
    with recorder:
        transformation.update(params, transformation.init(params), params)
    assert recorder.seen and not any(place for seen in recorder.seen.values() for place in seen.places)
    assert all(change.stage == 1 for seen in recorder.seen.values() for change in of_calls(seen))


@pytest.mark.parametrize("quicker", [1, 2])
def test_threads_are_as_many_as_are_quick_and_afterwards_as_before(quicker, monkeypatch):
    before, now = torch.get_num_threads(), [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    clock = [0.0]
    monkeypatch.setattr(_threads.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += 1.0 if now[0] == quicker else 5.0

    with _threads.as_suits(run):
        assert now == [quicker]
    assert now == [2]
    with pytest.raises(ZeroDivisionError), _threads.as_suits(run):
        raise ZeroDivisionError
    monkeypatch.undo()
    assert now == [2] and torch.get_num_threads() == before


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_without_hints_nothing_is_run_again():
    counts = {}
    for name, ours, hints in (("off", F.gelu, False), ("on", F.gelu, True), ("agree", lambda x: F.gelu(x) * 1, True)):
        theirs = (lambda x: jax.nn.gelu(x, approximate=False)) if name == "agree" else jax.nn.gelu
        ours, theirs = Counted(ours), Counted(theirs)
        report = interop.check(ours, theirs, X, hints=hints)
        assert bool(report.hints) == (name == "on")
        counts[name] = (ours.calls, theirs.calls)
    of_subnormals = 2  # what is not rounding is asked of PyTorch again with numbers that XLA takes for zero
    assert counts["off"] == (counts["agree"][0] + of_subnormals, counts["agree"][1])
    assert counts["on"][0] > counts["off"][0]


def test_jax_is_run_once_for_all_changes():
    theirs = [Counted(lambda x: jnp.sin(jnp.sum(x))) for _ in range(2)]
    for function, hints in zip(theirs, (False, True), strict=True):
        assert interop.check(lambda x: x.abs().sum().cos(), function, X, hints=hints).hints == ()
    assert theirs[1].calls == theirs[0].calls + 1


def test_what_is_given_is_not_changed_and_nothing_is_left_behind(capsys):
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    net.train()
    state, x = copy.deepcopy(net.state_dict()), X.copy()
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    assert interop.check(net, lambda x: x, x).hints == ()
    steps = by_torch_optim(lambda p, h: torch.optim.Adam(p, 0.05, weight_decay=0.1))
    params, batches = copy.deepcopy(PARAMS), copy.deepcopy(BATCHES)
    with quickly():
        interop.check_training(steps, frj.train_step(loss(jnp), decoupled), params, HYPER, iter(batches))
    assert all(torch.equal(a, state[name]) for name, a in net.state_dict().items())
    np.testing.assert_array_equal(x, X)
    for a, b in zip(jax.tree.leaves((params, batches)), jax.tree.leaves((PARAMS, BATCHES)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == hooks
    assert torch.get_default_dtype() is torch.float32 and not jax.config.read("jax_enable_x64")
    assert torch.overrides._get_current_function_mode_stack() == []
    assert capsys.readouterr() == ("", "")


def test_a_function_that_cannot_be_run_again_has_no_hints():
    def ours(x):
        if torch.overrides._get_current_function_mode_stack():
            raise RuntimeError("modes are not for me")
        return F.gelu(x)

    report = interop.check(ours, jax.nn.gelu, X)
    assert report.verdict == "semantic" and report.hints == ()


def test_a_change_with_which_a_function_raises_is_no_explanation():
    def ours(x):
        y = F.gelu(x)
        if (y - 0.5 * x * (1 + torch.special.erf(x / 2**0.5))).abs().max() > 1e-6:
            raise ValueError("no gelu")
        return y

    report = interop.check(ours, lambda x: 1.1 * jax.nn.gelu(x), X)
    assert report.verdict == "semantic" and report.hints == ()


def test_a_function_that_does_otherwise_when_watched_has_no_hints():
    """Else every change would seem to explain it."""

    def ours(x):
        watched = torch.overrides._get_current_function_mode_stack()
        return F.gelu(x.abs(), approximate="tanh" if watched else "none")

    report = interop.check(ours, lambda x: jax.nn.gelu(jnp.abs(x)), X)
    assert report.verdict == "semantic" and report.hints == ()


def test_a_step_of_jax_that_insists_on_counts_of_32_bits_is_taken_as_it_is():
    ours = frt.train_step(loss(torch), lambda h: frt.optax.sgd(2 * h["lr"]))
    init, step = frj.train_step(loss(jnp), lambda h: optax.sgd(h["lr"]))

    def counting(state, hyper, *batch):
        assert state["count"].dtype == jnp.int32
        new, metrics = step(state["inner"], hyper, *batch)
        return {"inner": new, "params": new.params, "count": state["count"] + jnp.int32(1)}, metrics

    def start(params, hyper):
        inner = init(params, hyper)
        return {"inner": inner, "params": inner.params, "count": jnp.zeros([], jnp.int32)}

    with quickly():
        report = interop.check_training(ours, (start, counting), PARAMS, HYPER, BATCHES)
    assert kinds_of(report) == {"factor"}


@pytest.mark.parametrize("wing", [frt, frj])
def test_a_step_keeps_what_it_was_made_of(wing):
    """By which its transformation can be changed."""
    made_by = ((lambda params, x: None), (lambda hyper: None), True)
    _, step = wing.train_step(*made_by)
    assert step.made_by == made_by


# --- draws ---


def test_moved_numbers_keep_what_a_kink_needs():
    x = np.array([0.0, -0.0, 1.5, -1.5, 1.5, 3.0, np.inf, np.nan])
    for draw, least, most in ((_draws.mild, 0.99, 1.0), (_draws.strong, 0.5, 2.0)):
        y = draw({"x": x})["x"]
        assert y[0] == y[1] == 0 and y[2] == -y[3] == y[4] and np.isinf(y[6]) and np.isnan(y[7])
        ratio = draw(X) / X
        assert least <= ratio.min() < ratio.max() <= most and len(np.unique(ratio)) == X.size


def test_masks_and_labels_stay_in_their_range():
    mask, hot = X > 0, np.eye(3)
    for draw in (_draws.mild, _draws.strong):
        np.testing.assert_array_equal(draw(mask), mask)
        np.testing.assert_array_equal(draw(hot), hot)
    np.testing.assert_array_equal(_draws.mild(LABELS), LABELS)
    np.testing.assert_array_equal(_draws.strong(LABELS), np.roll(LABELS, 1))


def test_longer_draws_have_as_many_rows_again():
    tree = {"x": X, "w": W, "labels": LABELS}
    assert list(_draws.lengths(tree)) == [8, 6]
    longer = _draws.longer(tree, 8)
    assert longer["x"].shape == (16, 6) and longer["labels"].shape == (16,) and longer["w"].shape == (6, 6)
    np.testing.assert_array_equal(longer["x"][:8], X)
    assert (longer["x"][8:] != X).all()


@pytest.mark.parametrize("module", ["report", "hints"])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(sys.modules[f"interop.{module}"])
    assert result.attempted and not result.failed


def test_a_hint_is_a_record():
    report = interop.check(lambda x, y: F.mse_loss(x, y), lambda x, y: jnp.sum((x - y) ** 2), X, Y)
    assert isinstance(report.hints[0], Hint) and report.verdict is Verdict.SEMANTIC

"""What `interop.check` makes of single entries, of whole numbers, and of casts to lower precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jax import lax, nn

from funcreg import interop
from interop import Verdict, _lifted
from interop._closer import Suspects
from interop._measure import BLOCK, compare, is_whole, movement
from interop._nudge import can_move
from interop._orders import around, enter, orders, table
from interop.verdict import PART_DRIFT, TINY64, Evidence, judge, stands_out

ROUNDING, SEMANTIC, INCONCLUSIVE = Verdict
X = np.random.default_rng(0).normal(size=(4, 3))
BESIDE_HUGE = np.array([1e15, 1.0, -1.0])


# --- orders of magnitude ---


def test_an_order_is_a_factor_of_four_and_the_first_is_that_of_zeros():
    found = orders(np.array([0.0, 5e-324, TINY64 / 2, 0.49, 0.5, 1.9, 2.0, 7.9, 8.0])).tolist()
    assert found[:3] == [0, 0, 0]
    assert [order - found[3] for order in found[3:]] == [0, 1, 1, 2, 2, 3]


def test_a_table_is_pooled_with_its_neighbours_and_with_what_reaches_up():
    one, thousand = (int(orders(np.array([x]))[0]) for x in (1.0, 1e3))
    of = table()
    enter(of, np.array([one]), np.array([1e-16]))
    assert np.flatnonzero(around(of)).tolist() == [one - 1, one, one + 1]
    enter(of, np.array([one]), np.array([1e3]))  # that it is about 1 is an accident
    assert np.flatnonzero(around(of)).tolist() == list(range(one - 1, thousand + 2))


@pytest.mark.parametrize("at", [1, BLOCK, 2 * BLOCK + 2])
def test_differences_know_where_they_are(at):
    a = np.full(2 * BLOCK + 3, 1e9)
    a[at] = 2.0
    b = a.copy()
    b[at], b[0] = 2.5, 1e9 + 1
    found = compare(a, b, by_order=True)
    small, large = orders(np.array([2.5, 1e9]))
    assert found.differences.largest[[small, large]].tolist() == [0.5, 1.0]
    assert found.differences.where[[small, large]].tolist() == [at, 0]
    assert found.differences.sizes[small] == 2.5 and found.orders[at] == small
    in32 = compare(a.astype(np.float32), (2 * b).astype(np.float32), by_order=True, known=found.orders)
    assert in32.differences.largest[small] == 3.0  # of order 1 in float64, wherever float32 has it


def test_a_zero_on_one_side_has_no_order_and_movement_is_of_the_entry_before():
    found = compare(np.array([0.0, 1e-18, 1.0]), np.array([1e-18, 2e-18, 1.0]), by_order=True)
    assert found.orders[0] == 0 < found.orders[1] and found.errors.absolute == 1e-18
    into = table()
    assert not movement(np.array([1e-12]), np.array([1e-3]), into)
    assert np.flatnonzero(into).tolist() == orders(np.array([1e-12])).tolist()


# --- parts ---

PART = Evidence(1.0, 1e-4, 1e-16, size32=1.0, difference32=1e-4, drift32=1e-7, at=0)


def test_a_part_stands_out_only_if_neither_noise_nor_float32_explains_it():
    assert stands_out(PART)
    assert not stands_out(PART._replace(noise64=1e-7))
    assert not stands_out(PART._replace(difference64=1e-11, drift32=0.05, difference32=0.05))
    drifted = PART._replace(drift32=1e-5)
    scaled = 2.0**-29 * drifted.drift32
    assert stands_out(drifted._replace(difference64=1.1 * PART_DRIFT * scaled))
    assert not stands_out(drifted._replace(difference64=0.9 * PART_DRIFT * scaled))
    assert stands_out(PART._replace(size32=None, difference32=None, drift32=None))  # beyond what float32 holds


def test_the_part_that_stands_out_most_decides_and_gives_the_measures():
    whole = Evidence(1e15, 1e-3, 0.1, size32=1e15, difference32=1e7, drift32=1e7)
    worse = PART._replace(difference64=1e-3, difference32=1e-3, at=7)
    judgement = judge(whole, [PART, worse])
    assert judge(whole).verdict is ROUNDING and judgement.verdict is SEMANTIC
    assert judgement.part is worse and judgement.ratio == 1.0
    assert judge(whole._replace(difference64=1e14, difference32=1e14), [PART]).part is None


def test_a_fault_beside_a_huge_entry_is_seen_named_and_explained():
    report = interop.check(F.gelu, nn.gelu, BESIDE_HUGE)
    (leaf,) = report.leaves
    assert report.verdict is SEMANTIC and "the entry [2], of 1.6e-01, differs by 1.5e-04" in leaf.reason
    assert leaf.float64.relative == pytest.approx(9.6e-4, rel=0.01) and leaf.judgement.part.at == 2
    assert [hint.kind for hint in report.hints] == ["gelu"]
    assert report.to_dict()["leaves"][0]["judgement"]["part"]["at"] == 2


def test_a_change_that_leaves_the_small_entries_apart_is_no_hint():
    report = interop.check(F.gelu, lambda x: jnp.where(x > 1e9, x, 1.001 * nn.gelu(x)), BESIDE_HUGE)
    assert report.verdict is SEMANTIC and report.hints == ()


def test_what_cancels_beside_a_huge_entry_is_rounding():
    """A spectrum of one huge and otherwise small numbers; zeros of one side; tails of a formula that saturates."""
    spike = np.where(np.arange(64) == 20, 1e12, X.sum())
    turns = np.outer(np.arange(64), np.arange(64)) / 64

    def direct(x):
        return jnp.real(jnp.exp(-2j * jnp.pi * turns) @ x)

    with jax.numpy_dtype_promotion("standard"):
        assert interop.check(lambda x: torch.fft.fft(x).real, direct, spike).verdict is ROUNDING
    tails = np.linspace(-9, 9, 73)
    report = interop.check(lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)), jax.scipy.stats.norm.cdf, tails)
    assert report.verdict is ROUNDING


def test_numbers_too_small_for_float64_are_no_difference():
    def tail(x):
        return jnp.where(x < 38, jnp.exp(-x * x / 2), 0.0)

    report = interop.check(lambda x: torch.exp(-x * x / 2), tail, np.array([38.5, 39.0]))
    assert report.verdict is ROUNDING and 0 < report.leaves[0].float64.absolute < TINY64


def test_a_result_that_was_too_small_on_its_way_is_no_fault():
    """PyTorch keeps 1e-310, which XLA takes for zero: times 1e300 that is 1e-10, or nothing."""
    small = np.linspace(1, 2, 9) * 1e-155

    def raised(x):
        x = x * x
        for _ in range(10):
            x = x * 1e30
        return x

    report = interop.check(raised, raised, small)
    assert report.verdict is ROUNDING and "XLA takes for zero" in report.reasons[0]
    assert torch.tensor([1e-310], dtype=torch.float64).mul(1.0).item() > 0  # PyTorch is as it was
    wrong = interop.check(raised, lambda x: raised(x) + 1e-12, small, hints=False)
    assert wrong.verdict is SEMANTIC


# --- a second look ---


def test_suspects_are_released_by_whatever_moves_them():
    ours = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    theirs = ours + [1e-6, 1e-6, 1e-15, 1e-6, 1e-6]
    of = Suspects.of(ours, theirs, whole=False)
    assert of.at.tolist() == [0, 1, 4]  # not those an ulp explains, nor zeros of one side
    of.in_float32(ours.astype(np.float32), np.float32([1, 1, 1, 1e-6, 1.5]))
    of.release_rounded()
    assert of.at.tolist() == [0, 1]  # nor those of which float32 has no digits
    of.moved(of.ours, ours + [0, 1e-9, 0, 0, 0])
    assert of.at.tolist() == [0]
    (worst,) = of.worst()
    assert worst.at == 0 and worst.difference64 == pytest.approx(1e-6) and worst.noise64 == 0


def test_a_fault_in_some_rows_is_not_hidden_by_a_badly_conditioned_one():
    rows = np.concatenate([1e8 + 0.01 * X[:1], X[1:]])

    def ours(x):
        return F.layer_norm(x, (3,))

    def theirs(x, eps):
        return (x - jnp.mean(x, -1, keepdims=True)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + eps)

    assert interop.check(ours, lambda x: theirs(x, 1e-5), rows).verdict is ROUNDING
    others = np.array([[1e-5], [1.01e-5], [1.01e-5], [1.01e-5]])
    report = interop.check(ours, lambda x: theirs(x, jnp.asarray(others, x.dtype)), rows, hints=False)
    assert report.verdict is SEMANTIC and report.leaves[0].judgement.part.at >= 3


# --- whole numbers ---


def test_whole_numbers_are_told_by_their_values():
    assert is_whole(np.array([True])) and is_whole(np.array([3.0, -0.0])) and is_whole(np.arange(3))
    for x in (np.array([0.5]), np.array([np.nan]), np.array([2.0**60]), np.array([1 + 0j])):
        assert not is_whole(x)


def test_whole_numbers_of_floats_and_of_integers_are_compared_exactly():
    n = np.arange(5) + 10**4
    theirs = lambda n: n.astype(float) * 10**7  # noqa: E731
    assert interop.check(lambda n: n * 10**7, theirs, n).verdict is ROUNDING
    assert interop.check(lambda n: n * 10**7, lambda n: theirs(n) + 1, n).verdict is SEMANTIC


def test_jumps_that_come_and_go_with_the_precision_are_no_fault():
    """0.1 added ten times is below 1, or not, as the order of the sums and the precision have it."""

    def from_the_end(x):
        return jnp.floor(jnp.sum(x) - jnp.cumsum(x)[::-1] + x[:1])

    report = interop.check(lambda x: torch.floor(x.cumsum(0)), from_the_end, np.full(100, 0.1))
    assert report.verdict is INCONCLUSIVE and "the result jumps" in report.reasons[0]
    assert interop.check(lambda x: x.round(), lambda x: jnp.round(x) + 1, np.arange(9.0)).verdict is SEMANTIC


def test_integers_that_cannot_be_moved_show_jumps_by_their_precision():
    n = np.arange(60)
    assert not can_move(n) and not can_move(np.zeros(3)) and can_move(np.ones(1)) and can_move(np.ones(1, complex))
    report = interop.check(lambda n: (n * 0.1 / 0.05).floor().long(), lambda n: n * 2, n)
    assert report.verdict is INCONCLUSIVE and "the result jumps" in report.reasons[0]
    assert interop.check(lambda n: (n * 0.5).floor().long(), lambda n: (n + 1) // 2, n).verdict is SEMANTIC


# --- casts ---


def softmax_in_float32(x):
    return nn.softmax(x.astype(jnp.float32)).astype(x.dtype)


def in_a_loop(x):
    def step(c, row):
        return (c.astype(jnp.float32) + row).astype(x.dtype), jnp.sin(row.astype(jnp.float32))

    with jax.numpy_dtype_promotion("standard"):
        last, each = lax.scan(step, jnp.zeros_like(x[0]), x)
    return jnp.concatenate([last[None], each.astype(x.dtype)])


@pytest.mark.parametrize(
    ("function", "wide"),
    [
        (softmax_in_float32, lambda x: nn.softmax(x)),
        (jax.jit(softmax_in_float32), lambda x: nn.softmax(x)),
        (jax.grad(lambda x: jnp.sum(softmax_in_float32(x) ** 2)), jax.grad(lambda x: jnp.sum(nn.softmax(x) ** 2))),
        (lambda x: (x.astype(jnp.float32) @ x.T.astype(jnp.float32)).astype(x.dtype), lambda x: x @ x.T),
        (in_a_loop, lambda x: jnp.concatenate([jnp.sum(x, 0)[None], jnp.sin(x)])),
        (lambda x: nn.relu(x.astype(jnp.float32)).astype(x.dtype) / 3, lambda x: nn.relu(x) / 3),
    ],
)
def test_jax_without_its_casts(function, wide, x64):
    with x64():
        x = jnp.asarray(X)
        found = _lifted.of_jax(function)(x)
        assert found.dtype == jnp.float64 and not np.allclose(function(x), wide(x), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found, wide(x), rtol=0, atol=1e-15)


def test_pytorch_without_its_casts():
    x = torch.tensor(X)
    for function, wide in (
        (lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype), lambda x: torch.softmax(x, -1)),
        (lambda x: (x.float() / 3).type_as(x), lambda x: x / 3),
        (lambda x: x.sum(0, dtype=torch.float32), lambda x: x.sum(0)),
        (torch.func.grad(lambda x: (x.float() ** 3).sum().to(x.dtype)), torch.func.grad(lambda x: (x**3).sum())),
    ):
        found = _lifted.of_torch(function)(x)
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, wide(x), rtol=0, atol=1e-14)
        assert not torch.allclose(function(x).double(), wide(x), rtol=0, atol=1e-12)


def test_casts_are_named_and_do_not_hide_whether_the_sides_agree():
    ours = lambda x: torch.softmax(x, -1)  # noqa: E731
    report = interop.check(ours, softmax_in_float32, X)
    assert report.verdict is ROUNDING
    assert "JAX computes in float32 (convert_element_type)" in report.reasons[0]
    assert "with these casts left out" in report.reasons[0]
    report = interop.check(ours, lambda x: softmax_in_float32(x * (1 + 1e-8)), X, hints=False)
    assert report.verdict is SEMANTIC

"""`interop.testing`: parity as an assertion and as a fixture; what is inconclusive fails unless allowed by name."""

import builtins
import doctest
import importlib
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

import funcreg.jax as frj
import funcreg.torch as frt
from interop import Verdict
from interop.testing import Parity, agreed, assert_parity, assert_training_parity

pytest_plugins = ["pytester"]
X = np.linspace(-1, 1, 6)


def coarse(x):
    """Of two leaves, one in bfloat16."""
    return {"fine": x, "coarse": (x.to(torch.bfloat16) if isinstance(x, torch.Tensor) else x.astype(jnp.bfloat16))}


def test_agreement_returns_the_report():
    assert assert_parity(torch.sin, jnp.sin, X).verdict is Verdict.ROUNDING


def test_a_difference_fails_with_the_report():
    with pytest.raises(AssertionError) as caught:
        assert_parity(lambda x: {"a": x, "b": x}, lambda x: {"a": x, "b": x**2}, X)
    said = str(caught.value)
    assert said.startswith("the two sides do not agree: b\nverdict: semantic") and "float64 max" in said


def test_what_is_inconclusive_fails_unless_it_is_allowed_by_name():
    with pytest.raises(AssertionError, match=r"cannot be said to agree \(inconclusive\): coarse"):
        assert_parity(coarse, coarse, X)
    with pytest.raises(AssertionError, match="coarse"):
        assert_parity(coarse, coarse, X, allow_inconclusive=["f*"])
    for glob in ("coarse", "c*"):
        assert assert_parity(coarse, coarse, X, allow_inconclusive=[glob]).verdict is Verdict.INCONCLUSIVE
    with pytest.raises(
        ValueError, match="allow_inconclusive has 'course', which matches no leaf; there are fine, coarse"
    ):
        assert_parity(coarse, coarse, X, allow_inconclusive=["course"])
    with pytest.raises(TypeError, match="must be a list of names, got the string 'coarse'"):
        assert_parity(coarse, coarse, X, allow_inconclusive="coarse")


def test_a_difference_is_never_allowed():
    other = lambda x: {"fine": 2 * x, "coarse": x.astype(jnp.bfloat16)}  # noqa: E731
    with pytest.raises(AssertionError, match="do not agree: fine"):
        assert_parity(coarse, other, X, allow_inconclusive=["*"])


def test_nothing_compared_is_no_agreement():
    only32 = lambda x: x if x.dtype == torch.float32 else 1 / 0  # noqa: E731
    only64 = lambda x: x if x.dtype == jnp.float64 else 1 / 0  # noqa: E731
    with pytest.raises(AssertionError, match="inconclusive.*nothing compared"):
        assert_parity(only32, only64, X)


def steps(scale):
    ours = frt.train_step(lambda p, x: (p["w"] * x).square().mean(), lambda h: frt.optax.sgd(h["lr"]))
    theirs = frj.train_step(lambda p, x: scale * jnp.mean((p["w"] * x) ** 2), lambda h: optax.sgd(h["lr"]))
    return ours, theirs, {"w": np.ones(6)}, {"lr": 0.1}, [X, X]


def test_training(monkeypatch):
    assert assert_training_parity(*steps(1.0)).verdict is Verdict.ROUNDING
    with pytest.raises(AssertionError, match="do not agree: params.w, metrics.loss\nverdict: semantic"):
        assert_training_parity(*steps(1.5))


def test_the_fixture_keeps_the_page_of_a_failure(tmp_path):
    parity = Parity(tmp_path)
    parity(torch.sin, jnp.sin, X)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(AssertionError) as caught:
        parity(torch.sin, jnp.cos, X)
    assert str(caught.value).endswith(f"as a page: {tmp_path / 'parity-2.html'}")
    assert "compute different things" in (tmp_path / "parity-2.html").read_text()
    assert parity.training(*steps(1.0)).verdict is Verdict.ROUNDING
    with pytest.raises(AssertionError, match="parity-4.html"):
        parity.training(*steps(1.5))
    assert len([*tmp_path.iterdir()]) == 2


def test_pytest_finds_the_fixture(pytester):
    pytester.makeconftest('pytest_plugins = ["interop.testing"]')
    pytester.makepyfile(
        """
        import jax.numpy as jnp, numpy as np, torch

        def test_good(parity):
            parity(torch.sin, jnp.sin, np.ones(3))

        def test_bad(parity, tmp_path):
            try:
                parity(torch.sin, jnp.cos, np.ones(3))
            finally:
                assert [p.name for p in tmp_path.iterdir()] == ["parity-1.html"]
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*AssertionError: the two sides do not agree: (result)*", "*as a page: *parity-1.html*"]
    )


def test_pytest_shows_the_test_and_the_report_not_our_frames(pytester):
    pytester.makeconftest('pytest_plugins = ["interop.testing"]')
    pytester.makepyfile(
        """
        import jax.numpy as jnp, numpy as np, torch
        import funcreg.jax as frj, funcreg.torch as frt, optax
        from interop.testing import assert_parity, assert_training_parity

        X = np.ones(3)

        def steps(rate):
            ours = frt.train_step(lambda p, x: (p["w"] * x).square().mean(), lambda h: frt.optax.sgd(0.1))
            return ours, frj.train_step(lambda p, x: jnp.mean((p["w"] * x) ** 2), lambda h: optax.sgd(rate))

        def test_function():
            assert_parity(torch.sin, jnp.cos, X)

        def test_steps():
            assert_training_parity(*steps(0.13), {"w": X}, None, [X])

        def test_fixture(parity):
            parity(torch.sin, jnp.cos, X)

        def test_fixture_steps(parity):
            parity.training(*steps(0.13), {"w": X}, None, [X])
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(failed=4)
    assert "testing.py" not in result.stdout.str()
    assert result.stdout.str().count("E       AssertionError: the two sides do not agree") == 4


def test_pytest_is_not_needed(monkeypatch):
    """The module without pytest: all but the fixture."""
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "pytest":
            raise ImportError(name)
        return real(name, *args, **options)

    before = sys.modules.pop("interop.testing")
    monkeypatch.setattr(builtins, "__import__", without)
    try:
        module = importlib.import_module("interop.testing")
    finally:
        monkeypatch.undo()
        sys.modules["interop.testing"] = before
    assert not hasattr(module, "parity")
    assert module.assert_parity(torch.sin, jnp.sin, X).verdict is Verdict.ROUNDING


def test_randomness_can_be_allowed_only_by_name():
    noisy = lambda x: {"noise": F.dropout(x, 0.5), "rest": x}  # noqa: E731
    plain = lambda x: {"noise": x, "rest": x}  # noqa: E731
    with pytest.raises(AssertionError, match=r"inconclusive\): noise\n.*\n  the PyTorch side is random"):
        assert_parity(noisy, plain, X)
    assert assert_parity(noisy, plain, X, allow_inconclusive=["noise"]).verdict is Verdict.INCONCLUSIVE


@pytest.mark.relaxed_promotion
def test_the_examples_of_the_docstrings():
    for module in ("testing", "report"):
        result = doctest.testmod(sys.modules[f"interop.{module}"], optionflags=doctest.ELLIPSIS)
        assert result.attempted >= 4 and result.failed == 0


def test_agreed_is_about_the_verdict_not_about_what_is_allowed(tmp_path):
    report = assert_parity(torch.sin, jnp.sin, X)
    assert agreed("here", report, ["(result)"], tmp_path / "page.html") is report
    assert not [*tmp_path.iterdir()]

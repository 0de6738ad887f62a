"""Exported files of both wings are compared with each other, and with the live functions."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import funcreg.jax as frj
import funcreg.torch as frt
from funcreg import interop
from funcreg._export_names import caller
from funcreg.jax.export._inputs import take_apart
from interop.exported import exported

pytestmark = pytest.mark.usefixtures("fresh_process", "fresh_jax_process")

BATCH = {"x": {0: "batch"}, "y": {0: "batch"}}
NAMES = ("state", "metrics")
PARAMS = {"hidden": np.array([0.5, -0.3, 0.02]), "offset": np.array(0.1)}
HYPER = {"lr": np.array(0.05), "lam": np.array(0.3)}


def torch_loss(params, x, y):
    return ((x @ params["hidden"] + params["offset"] - y.to(x.dtype)) ** 2).mean()


def jax_loss(params, x, y):
    return jnp.mean((x @ params["hidden"] + params["offset"] - y.astype(x.dtype)) ** 2)


def steps(fr, loss, **options):
    return fr.train_step(loss, lambda hyper: fr.prox_adam(hyper["lr"], fr.l1(hyper["lam"]).on("hidden"), **options))


TORCH, JAX = steps(frt, torch_loss), steps(frj, jax_loss)


def data(dtype):
    """Labels are integers; of 64 bits in PyTorch's files, as its own are."""
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(6, 3)).astype(dtype), "y": rng.integers(-2, 3, 6).astype(np.int32)}


def numbers(dtype):
    """Parameters and hyper-parameters."""
    return {key: x.astype(dtype) for key, x in PARAMS.items()}, {key: x.astype(dtype) for key, x in HYPER.items()}


def torch_file(folder, dtype, step=TORCH[1]):
    params, hyper = interop.to_torch(numbers(dtype))
    example = {"state": TORCH[0](params, hyper), "hyper": hyper, **interop.to_torch(data(dtype))}
    example["y"] = example["y"].long()
    path = folder / f"torch_{dtype.__name__}.pt"
    frt.export.export_step(step, example, path, dynamic=BATCH, outputs=NAMES, overwrite=True)
    return frt.export.load_exported(path, trusted=True)


def jax_file(folder, dtype, step=JAX[1]):
    with jax.enable_x64(dtype is np.float64):
        params, hyper = interop.to_jax(numbers(dtype))
        example = {"state": JAX[0](params, hyper), "hyper": hyper, **data(dtype)}
        path = folder / f"jax_{dtype.__name__}.jax"
        frj.export.export_step(step, example, path, dynamic=BATCH, outputs=NAMES, check_sizes=(1,), overwrite=True)
        return frj.export.load_exported(path, trusted=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def torch_files(folder):
    return torch_file(folder, np.float64), torch_file(folder, np.float32)


@pytest.fixture(scope="module")
def jax_files(folder):
    return jax_file(folder, np.float64), jax_file(folder, np.float32)


def inputs():
    """All inputs of the step by name, after some steps: the moments are not zero."""
    rng = np.random.default_rng(1)
    moments = {
        f"state.opt_state.{moment}.{name}": scale * rng.uniform(0.5, 1.5, size=x.shape)
        for moment, scale in (("mu", -0.3), ("nu", 0.2))
        for name, x in PARAMS.items()
    }
    return {
        **{f"state.params.{name}": x for name, x in PARAMS.items()},
        **moments,
        "state.opt_state.count": np.array(7, np.int32),
        **{f"hyper.{name}": x for name, x in HYPER.items()},
        **data(np.float64),
    }


def live(step):
    """A step of the JAX wing as a function of named arrays."""
    with jax.enable_x64(True):
        params, hyper = interop.to_jax(numbers(np.float64))
        example = {"state": JAX[0](params, hyper), "hyper": hyper, **data(np.float64)}
        rebuild = take_apart("test", example, {}).rebuild
    call = caller("test", jax.jit(step), list(example))
    return lambda given: dict(zip(NAMES, call(rebuild(given)), strict=True))


OUTPUTS = {
    *(f"state.{of}.{name}" for of in ("params", "opt_state.mu", "opt_state.nu") for name in PARAMS),
    *("state.opt_state.count", "metrics.loss", "metrics.penalty", "metrics.objective"),
}


def test_files_of_the_two_wings_agree(torch_files, jax_files):
    report = interop.check(exported(*torch_files), exported(*jax_files), inputs())
    assert {leaf.name for leaf in report.leaves} == OUTPUTS
    assert report.verdict is interop.Verdict.ROUNDING, report
    hidden = next(leaf for leaf in report.leaves if leaf.name == "state.params.hidden")
    assert hidden.dtypes == ("float64", "float64") and hidden.float32.absolute < 1e-6


def test_a_file_agrees_with_the_live_function_of_the_other_wing(torch_files):
    report = interop.check(exported(*torch_files), live(JAX[1]), inputs())
    assert {leaf.name for leaf in report.leaves} == OUTPUTS
    assert report.verdict is interop.Verdict.ROUNDING, report


def test_a_file_of_another_function_is_told(torch_files):
    """Adam's b2 as of another library."""
    report = interop.check(exported(*torch_files), live(steps(frj, jax_loss, b2=0.99)[1]), inputs())
    assert report.verdict is interop.Verdict.SEMANTIC
    wrong = {leaf.name for leaf in report.leaves if leaf.verdict is interop.Verdict.SEMANTIC}
    assert "state.opt_state.nu.hidden" in wrong and "metrics.loss" not in wrong


def test_a_float32_file_of_another_function_is_no_rounding(torch_files, jax_files, folder):
    """In float64 all is well, and the rules would have gone by that."""
    other = torch_file(folder, np.float32, steps(frt, torch_loss, b2=0.99)[1])
    report = interop.check(exported(torch_files[0], other), exported(*jax_files), inputs())
    assert report.verdict is interop.Verdict.INCONCLUSIVE
    (reason,) = [reason for reason in report.reasons if "fails in" in reason]
    assert "the PyTorch side fails in float32: ValueError: exported: 'state." in reason
    assert "they are files of two functions, or float32 has no digits left" in reason


def test_a_single_file_is_inconclusive(torch_files, jax_files):
    given = {**inputs(), "y": inputs()["y"].astype(np.int64)}
    report = interop.check(torch_files[1], live(JAX[1]), given)
    assert report.verdict is interop.Verdict.INCONCLUSIVE
    assert any("fails in float64: ValueError" in r and "must be float32" in r for r in report.reasons), report.reasons
    assert all(leaf.float32.relative < 1e-5 for leaf in report.leaves)


def prox(x, lam):
    return frt.l1(lam).prox({"params": {"w": x}}, 1.0)


def test_names_are_those_of_the_live_tree(folder):
    """A leading `params` is dropped on both sides; a float64 strength stays one in the float32 file."""
    files = []
    for dtype in (torch.float64, torch.float32):
        example = {"x": torch.ones(3, dtype=dtype), "lam": torch.tensor(0.5, dtype=torch.float64)}
        path = folder / f"prox{dtype.itemsize}.pt"
        frt.export.export_step(prox, example, path, dynamic={})
        files.append(frt.export.load_exported(path, trusted=True))
    given = {"x": np.array([-2.0, 0.3, 0.7]), "lam": np.array(0.1)}
    theirs = lambda given: frj.l1(given["lam"]).prox({"params": {"w": given["x"]}}, 1.0)  # noqa: E731
    report = interop.check(exported(*files), theirs, given)
    assert [leaf.name for leaf in report.leaves] == ["w"] and report.verdict is interop.Verdict.ROUNDING
    frt.export.export_penalty(frt.l1(0.1), {"w": torch.ones(3)}, folder / "penalty.pt")
    penalty = frt.export.load_exported(folder / "penalty.pt", trusted=True)
    with pytest.raises(ValueError, match="a file of a penalty has several functions"):
        exported(penalty, penalty)
    with pytest.raises(ValueError, match=r"'w' .* must be float64\[3\]|input x must be float64\[3\], got float64\[2\]"):
        exported(*files)({"x": torch.ones(2, dtype=torch.float64), "lam": torch.tensor(0.1, dtype=torch.float64)})


def test_files_that_are_no_pair(torch_files, jax_files):
    wide, narrow = torch_files
    with pytest.raises(TypeError, match="float32 must be what load_exported of one of the wings returned, got fu"):
        exported(wide, torch_loss)
    with pytest.raises(ValueError, match="float64 is a file of torch and float32 of jax"):
        exported(wide, jax_files[1])
    with pytest.raises(ValueError, match="both files are of one precision; export the function with float64 inputs"):
        exported(narrow, narrow)
    with pytest.raises(ValueError, match="the two files have inputs in float32 and float64, in this order"):
        exported(narrow, wide)


def test_docstring_example():
    result = doctest.testmod(sys.modules["interop.exported"])
    assert result.failed == 0 and result.attempted > 3

"""Functions exported by the JAX wing: the file computes what the function does, at sizes that were never seen."""

import doctest
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcreg.jax as fr
from export_jax_cases import BATCH, CASES, batch, exported
from funcreg._export_compare import Difference
from funcreg._export_names import caller
from funcreg._manifest import FileSpec
from funcreg.jax.export.__main__ import main
from funcreg.jax.export._inputs import flatten_outputs, take_apart

pytestmark = pytest.mark.usefixtures("fresh_jax_process")


def expect(got, expected):
    """Equal up to what a compiler may do: 32 eps of the largest number."""
    found = Difference()
    found.add("", {name: np.asarray(x) for name, x in got.items()}, {k: np.asarray(x) for k, x in expected.items()}, {})
    assert got.keys() == expected.keys() and found.compared == len(expected) and not found.outside, found.first


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A case, exported once: (what `CASES` has, report, loaded)."""
    done = {}

    def get(name):
        if name not in done:
            given = CASES[name]()
            done[name] = given, *exported(tmp_path_factory.mktemp(name), *given)
        return done[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_case(case, name):
    (fn, example, dynamic, outputs), report, loaded = case(name)
    inputs = take_apart("test", example, dynamic)
    method = loaded.manifest.methods["forward"]
    dims = list(inputs.sizes)
    # at the example's sizes and at 1; and where a state comes out, from the state after that, at the example's again
    fed_back = [name for name in method.outputs if name.startswith("state.")]
    cases = 2 + 2 * (len(report.manifest.sizes) == 2) + bool(fed_back)  # with two dimensions, 1 for either of them
    assert report.compared == cases * len(method.outputs)
    assert [sorted(case["carried"]) for case in report.manifest.cases[1:]] == [sorted(fed_back)] * (cases - 1)
    assert loaded.manifest.sizes == {dim: {"refused": [0]} for dim in dims}
    sizes = {dim: 11 + 2 * k for k, dim in enumerate(dims)}
    given = inputs.resized(sizes)
    call = caller("test", jax.jit(fn), list(example))  # some take arguments by position only
    expected = flatten_outputs("test", call(inputs.rebuild(given)), outputs)
    got = loaded(given)
    expect(got, expected)
    for key, spec in method.outputs.items():
        shape = tuple(n if isinstance(n, int) else eval(n, {}, sizes) for n in spec.shape)
        assert (got[key].dtype.name, got[key].shape) == (spec.dtype, shape)


@pytest.mark.parametrize("name", ["prox_adam", "ensemble"])
def test_files_of_fixed_sizes_have_the_bits_of_jit(tmp_path, name):
    """What rounds in another way is the compiler, and only where a dimension is dynamic."""
    function, example, _, outputs = CASES[name]()
    report, _ = exported(tmp_path, function, example, {}, outputs)
    assert report.bitwise and report.compared == 2 * len(report.manifest.methods["forward"].outputs)


def test_outputs_are_fed_back_and_train(case):
    """Under the names of the wing, whatever optax calls its types."""
    (fn, example, _, _), report, loaded = case("prox_adam")
    method = report.manifest.methods["forward"]
    states = [name for name in method.inputs if name.startswith("state.")]
    assert "state.opt_state.mu.head.kernel" in states
    assert all(method.outputs[name] == method.inputs[name] for name in states)
    state, hyper = example["state"], example["hyper"] | {"lam": jnp.asarray(0.05)}
    flat, run, live = {"state": state}, jax.jit(loaded), jax.jit(fn)
    rng = np.random.default_rng(2)
    for _ in range(60):
        x, y = rng.normal(size=(8, 4)).astype(np.float32), rng.integers(0, 3, 8).astype(np.int32)
        state, metrics = live(state, hyper, x, y)
        results = run({**flat, "hyper": hyper, "x": x, "y": y})
        flat = {name: x for name, x in results.items() if name.startswith("state.")}
    assert flat["state.opt_state.count"] == 60
    np.testing.assert_allclose(results["metrics.loss"], metrics["loss"], rtol=1e-4)
    zeros = [np.asarray(tree) == 0 for tree in (flat["state.params.head.kernel"], state.params["head"]["kernel"])]
    assert (zeros[0] == zeros[1]).all() and 2 < zeros[0].sum() < 12


def test_sixty_four_bits(tmp_path, x64):
    with x64():
        inputs = {"lam": np.asarray(0.25), **batch(np.float64)}
        _, loaded = exported(tmp_path, lambda x, y, lam: fr.l1(lam).prox({"x": x}, 0.5), inputs, BATCH)
        # jax itself would take these, and narrow or widen them
        wrong = {**inputs, "x": inputs["x"].astype(np.float32)}
        with pytest.raises(ValueError, match=r"input x must be float64\[batch, 4\], got float32\[8, 4\]"):
            loaded(wrong)
        x = inputs["x"]
        np.testing.assert_array_equal(loaded(inputs)["x"], np.sign(x) * np.maximum(np.abs(x) - 0.125, 0))
    with pytest.raises(ValueError, match=r"float64.*, which JAX without x64 narrows; call the file inside jax.enable"):
        loaded(inputs)
    with pytest.raises(TypeError, match=r"'x' is float64, which JAX without x64 narrows; convert it, or ex"):
        fr.export.export_step(lambda x: x, {"x": np.ones(3)}, tmp_path / "g.jax", dynamic={})


INPUTS = {
    "missing": ({"y": None}, ValueError, r"input y is missing; it must be int32\[batch\]"),
    "unknown": ({"z": np.ones(1)}, ValueError, "there is no input z; the inputs are w, x, y"),
    "float64": ({"w": np.ones(4)}, ValueError, r"input w must be float32\[4\], got float64\[4\]"),
    "shape": ({"x": np.ones((8, 3), np.float32)}, ValueError, r"x must be float32\[batch, 4\], got float32\[8, 3\]"),
    "axes": ({"x": np.ones(4, np.float32)}, ValueError, r"x must be float32\[batch, 4\], got float32\[4\]"),
    "batch": ({"y": np.zeros(7, np.int32)}, ValueError, "batch must be the same in the inputs x and y"),
    "size": (
        {"x": np.ones((1, 4), np.float32), "y": np.zeros(1, np.int32)},
        ValueError,
        "batch = 1 was not checked when this file was made: input x",
    ),
    "number": ({"w": 1.0}, TypeError, "the input 'w' must be an array, got float"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file, made once: (folder, loaded, inputs); size 1 is not checked."""
    folder = tmp_path_factory.mktemp("small")
    example = {"w": np.ones(4, np.float32), **batch()}
    fn = lambda w, x, y: {"a": (x @ w).sum() + jnp.sum(y).astype(np.float32), "b": w * 2}  # noqa: E731
    _, loaded = exported(folder, fn, example, BATCH, check_sizes=(2,))
    return folder, loaded, example


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_checked_before_jax_sees_them(small, name):
    _, loaded, example = small
    changes, error, message = INPUTS[name]
    given = {key: x for key, x in {**example, **changes}.items() if x is not None}
    with pytest.raises(error, match=message):
        loaded(given)
    with pytest.raises(ValueError, match="there is no method 'value'; the file has forward"):
        loaded(example, "value")


# --- files ---


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small file, to be damaged: its path."""
    for path in small[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "f.jax"


def changed(path, change):
    """Change the manifest."""
    manifest = path.with_name(path.name + ".json")
    given = json.loads(manifest.read_text())
    change(given)
    manifest.write_text(json.dumps(given))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "IntegrityError", "is not the file that its"),
    "flipped": (flip, "IntegrityError", "is not the file that its manifest describes"),
    "no manifest": (lambda path: path.with_name("f.jax.json").unlink(), "FileNotFoundError", "belong together"),
    "no JSON": (lambda path: path.with_name("f.jax.json").write_text("{"), "IntegrityError", "is not the manifest of"),
    "newer schema": (lambda path: changed(path, lambda m: m.update(schema=2)), "VersionError", "has schema 2"),
    "newer jax": (
        lambda path: changed(path, lambda m: m.update(framework_version="1.0.0")),
        "VersionError",
        "was made by jax 1.0.0, and this is",
    ),
    "torch": (lambda path: changed(path, lambda m: m.update(framework="torch")), "VersionError", "made by torch; load"),
    "no platforms": (lambda path: changed(path, lambda m: m.update(self_check={})), "IntegrityError", "no platforms"),
    "another signature": (
        lambda path: changed(path, lambda m: m["methods"]["forward"]["inputs"]["w"].update(dtype="float16")),
        "IntegrityError",
        "takes something else than its manifest says",
    ),
    "another file": (
        lambda path: changed(path, lambda m: m["files"].update(stablehlo=m["files"]["cases"])),
        "IntegrityError",
        "the manifest does not describe f.jax",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(copy, name):
    damage, error, message = DAMAGE[name]
    assert fr.export.load_exported(copy, trusted=True)
    damage(copy)
    with pytest.raises(Exception, match=message) as raised:
        fr.export.load_exported(copy, trusted=True)
    assert type(raised.value).__name__ == error


def test_trust_is_written_out(small):
    with pytest.raises(TypeError, match="a .jax file is a program .* say trusted=True if you know where it comes from"):
        fr.export.load_exported(small[0] / "f.jax", trusted=1)
    with pytest.raises(TypeError, match="trusted"):
        fr.export.load_exported(small[0] / "f.jax")


def test_files_are_there_or_not(copy):
    options = {"example": {"x": jnp.arange(3.0)}, "path": copy, "dynamic": {}}
    counter = itertools.count()
    before = {path.name: path.read_bytes() for path in copy.parent.iterdir()}
    assert sorted(before) == ["f.jax", "f.jax.json", "f.jax.safetensors"]
    with pytest.raises(FileExistsError, match="f.jax is there already; pass overwrite=True"):
        fr.export.export_step(lambda x: x, **options)
    with pytest.raises(fr.export.SelfCheckError):
        fr.export.export_step(lambda x: x + next(counter), **options, overwrite=True)
    assert {path.name: path.read_bytes() for path in copy.parent.iterdir()} == before
    fr.export.export_step(lambda x: x, **options, overwrite=True)
    assert list(fr.export.load_exported(copy, trusted=True).manifest.methods["forward"].inputs) == ["x"]


def rewritten(path, change):
    """The recorded outputs changed, and the manifest's hash with them."""
    from safetensors.numpy import load, save

    cases = path.with_name("f.jax.safetensors")
    arrays = load(cases.read_bytes())
    change(arrays)
    cases.write_bytes(save(arrays))
    spec = FileSpec.of(cases)
    changed(path, lambda manifest: manifest["files"]["cases"].update(sha256=spec.sha256, bytes=spec.bytes))


def test_verification(copy):
    report = fr.export.verify_exported(copy)
    assert (report.compared, report.manifest.self_check["compared"]) == (4, 4)
    assert "4 outputs in a fresh process are" in str(report) and "in   x: float32[batch, 4]" in str(report)
    rewritten(copy, lambda arrays: arrays.update({"1.out.b": arrays["1.out.b"] * np.float32(1 + 2e-6)}))
    assert not fr.export.verify_exported(copy).bitwise
    rewritten(copy, lambda arrays: arrays.update({"1.out.b": arrays["1.out.b"] * np.float32(1 + 4e-6)}))
    message = r"in 1 of 4 outputs; first at \{'batch': 2\} b: 4 of 4 numbers differ, by 1.\d+e-05"
    with pytest.raises(fr.export.SelfCheckError, match=message):
        fr.export.verify_exported(copy)
    rewritten(copy, lambda arrays: arrays.pop("1.out.b"))
    with pytest.raises(fr.export.IntegrityError, match="the output b of the case {'batch': 2} is not in the file"):
        fr.export.verify_exported(copy)
    flip(copy.with_name("f.jax.safetensors"))
    with pytest.raises(fr.export.IntegrityError, match="is not the file that its manifest describes"):
        fr.export.verify_exported(copy)


def test_a_result_that_is_all_rounding_is_held_against_its_noise(tmp_path):
    """A gradient that cancels, as that of an attention's key bias: eps of its largest number says nothing about it."""
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    report, _ = exported(tmp_path, lambda x: {"a": (x - x.mean(0)[None]).sum(0)}, {"x": x}, {}, check_sizes=(1,))
    path = tmp_path / "f.jax"
    rewritten(path, lambda arrays: arrays.update({"0.out.a": arrays["0.out.a"] + np.float32(3e-6)}))
    assert report.bitwise and not fr.export.verify_exported(path).bitwise
    rewritten(path, lambda arrays: arrays.update({"0.out.a": arrays["0.out.a"] + np.float32(3e-4)}))
    with pytest.raises(fr.export.SelfCheckError, match="a: 3 of 3 numbers differ, by 0.0003.* than 32 times round"):
        fr.export.verify_exported(path)


def test_the_command(copy, tmp_path, capsys):
    """In a process of its own, which starts another for each file; one of them is crashed by its cases."""
    other = tmp_path / "other"
    other.mkdir()
    for path in copy.parent.glob("f.jax*"):
        (other / path.name).write_bytes(path.read_bytes())
    rewritten(other / "f.jax", lambda arrays: arrays.update({"0.in.x": arrays["0.in.x"][:, :3]}))
    command = [sys.executable, "-m", "funcreg.jax.export", "verify", str(copy), str(other / "f.jax")]
    environment = {**os.environ, "PYTHONPATH": str(Path(fr.__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(f"{copy}: step") and "4 outputs in a fresh process" in done.stdout
    assert done.returncode == 1 and "the self-check in a fresh process did not finish: exit code 1" in done.stderr
    assert main(["verify", str(copy)]) == 0 and capsys.readouterr().out.startswith(f"{copy}: step")
    assert main(["verify", str(tmp_path / "none.jax")]) == 2 and "none.jax is not there" in capsys.readouterr().err


def test_several_platforms(tmp_path):
    report, loaded = exported(tmp_path, lambda x: x @ x.T, {"x": np.eye(3)[1:] > 0}, {}, platforms=("cpu", "cuda"))
    assert loaded.module.platforms == ("cpu", "cuda")
    assert report.manifest.self_check["platforms"] == ["cpu", "cuda"] and report.bitwise


@pytest.mark.parametrize("module", ["_step", "_load"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"funcreg.jax.export.{module}"))
    assert result.failed == 0 and result.attempted > 3

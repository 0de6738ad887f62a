"""An exported file in a C++ program without Python: the same bits, and its own words about wrong inputs."""

import fcntl
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcreg.torch as fr

pytestmark = pytest.mark.slow  # the compiler takes twenty seconds
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cpp_host"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
PLACES = [
    *("-isystem", TORCH / "include", "-isystem", TORCH / "include/torch/csrc/api/include"),
    *(f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"),
]


def compiler(name="g++"):
    """Its path; without it tests are skipped, but not where FUNCREG_REQUIRE_CPP=1 says that they must run."""
    found = shutil.which(name)
    if found is None and os.environ.get("FUNCREG_REQUIRE_CPP") == "1":
        pytest.fail(f"FUNCREG_REQUIRE_CPP=1, and there is no {name}: install it")
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


@pytest.fixture(scope="session")
def host(request):
    """The program, compiled once for a torch and a source; workers wait for the one that compiles."""
    command = [compiler(), *FLAGS, EXAMPLE / "host.cpp"]
    key = hashlib.sha256(f"{command} {PLACES} {torch.__version__}".encode() + command[-1].read_bytes()).hexdigest()
    folder = request.config.cache.mkdir("cpp_host")
    program = folder / f"host-{key[:16]}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            new = program.with_suffix(".new")
            done = subprocess.run([*map(str, [*command, "-o", new, *PLACES])], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            new.rename(program)
    return program


@pytest.fixture(scope="module")
def example():
    """The scripts of the example."""
    sys.path.insert(0, str(EXAMPLE))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def folder(example, tmp_path_factory):
    """step.pt, start.pt and data.pt."""
    folder = tmp_path_factory.mktemp("cpp_host")
    example("export_digits").write(folder)
    return folder


def run(host, *arguments, **environment):
    """A run in an empty environment: env -i."""
    return subprocess.run([host, *map(str, arguments)], capture_output=True, text=True, env=environment)


def as_many_threads():
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_training_in_cpp_has_the_bits_of_python(host, folder, example):
    compare = example("compare")
    printed, theirs = compare.run_host(host, folder, as_many_threads())
    ours, _ = compare.train(example("export_digits").step)
    assert compare.different(ours, theirs) == []
    assert (len(ours), sum(x.numel() for x in ours.values())) == (16, 7831)
    # it is training that was compared: the last batch is one digit, the three before it 53
    losses = ours["metrics.loss"]
    assert losses.shape == (200,) and losses[-8:].mean() < 0.75 * losses[:8].mean()
    assert ours["state.opt_state.count"] == 200 and (ours["state.params.hidden.weight"] == 0).sum() > 64
    assert f"step 200  metrics.loss {losses[-1]:.6g}" in printed


def test_the_comparison_sees_one_bit(example):
    compare = example("compare")
    x = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(3)}
    assert compare.different(x, dict(x)) == []
    assert compare.different(x, {**x, "a": torch.tensor([1.0, -0.0])}) == ["a"]
    assert compare.different(x, {**x, "a": torch.nextafter(x["a"], torch.tensor(2.0))}) == ["a"]
    assert compare.different(x, {**x, "a": x["a"].view(torch.int32)}) == ["a"]
    assert compare.different(x, {**x, "b": torch.tensor([3])}) == ["b"]
    with pytest.raises(ValueError, match=r"only one side has \['b'\]"):
        compare.different(x, {"a": x["a"]})


def test_another_instruction_set_is_within_the_stated_bound(host, folder, example):
    """Without AVX, 200 steps: seen 5e-7 of the largest number of an array; the bound leaves room for other machines."""
    compare = example("compare")
    _, usual = compare.run_host(host, folder, as_many_threads())
    _, plain = compare.run_host(host, folder, {**as_many_threads(), "ATEN_CPU_CAPABILITY": "default"})
    assert usual.keys() == plain.keys() and len(usual) == 16
    for name, x in usual.items():
        assert (x.double() - plain[name].double()).abs().max() <= 1e-5 * x.double().abs().max(), name


def test_the_program_links_no_python(host):
    done = subprocess.run(["ldd", host], capture_output=True, text=True, check=True)
    assert "libtorch_cpu" in done.stdout
    assert "python" not in re.sub(r"=> \S+", "", done.stdout)  # names, not the folders that they are found in


def test_penalties_in_cpp_have_the_bits_of_python(host, tmp_path, example):
    compare = example("compare")
    generator = torch.Generator().manual_seed(1)
    params = {"layer.weight": torch.randn(6, 5, generator=generator), "layer.bias": torch.randn(6, generator=generator)}
    anchor = {name: x + 0.5 for name, x in params.items()}
    penalty = (
        fr.sparse_group_lasso(0.1, 0.3, per="output").on("layer.weight")
        + fr.anchored(fr.l2(0.2), anchor)
        + fr.non_negative().on("layer.bias")
    )
    methods = ("value", "prox")  # an indicator has no gradient
    fr.export.export_penalty(penalty, params, tmp_path / "penalty.pt", methods=methods)
    loaded = fr.export.load_exported(tmp_path / "penalty.pt", trusted=True)
    generated = {
        name: torch.full(spec.shape, 0.25, dtype=getattr(torch, spec.dtype))
        for name, spec in loaded.manifest.methods["prox"].inputs.items()
    }
    inputs = {**generated, **{f"params.{name}": x for name, x in params.items()}}
    compared = 0
    for method in methods:
        given = {name: inputs[name] for name in loaded.manifest.methods[method].inputs}
        torch.save(given, tmp_path / "in.pt")
        done = run(host, "call", tmp_path / "penalty.pt", method, tmp_path / "in.pt", tmp_path / "out.pt")
        assert (done.returncode, done.stderr) == (0, "")
        theirs = dict(torch.load(tmp_path / "out.pt"))
        assert compare.different(loaded(given, method), theirs) == []
        compared += len(theirs)
    assert compared == 3  # the value, and the prox of two leaves
    assert (theirs["params.layer.weight"] == 0).any() and (theirs["params.layer.bias"] >= 0).all()


WRONG = {
    "missing": ({"x": None}, "input x is missing; it must be float32[batch, 64]"),
    "unknown": ({"z": torch.zeros(2)}, "there is no input z; the inputs are state.params.hidden.weight, "),
    "dtype": ({"x": torch.zeros(8, 64, dtype=torch.float64)}, "input x must be float32[batch, 64], got float64[8, 64]"),
    "shape": ({"x": torch.zeros(8, 63)}, "input x must be float32[batch, 64], got float32[8, 63]"),
    "axes": ({"hyper.l1": torch.ones(1)}, "input hyper.l1 must be float32[], got float32[1]"),
    "batch": ({"y": torch.zeros(7, dtype=torch.int64)}, "batch must be the same in the inputs x and y"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_end_with_the_files_own_words(host, folder, tmp_path, name):
    changes, message = WRONG[name]
    inputs = torch.load(folder / "start.pt")
    inputs |= {key: x[:8] for key, x in torch.load(folder / "data.pt").items()}
    inputs = {key: x for key, x in {**inputs, **changes}.items() if x is not None}
    torch.save(inputs, tmp_path / "in.pt")
    done = run(host, "call", folder / "step.pt", "forward", tmp_path / "in.pt", tmp_path / "out.pt")
    assert done.returncode == 1
    assert done.stderr.startswith("host: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()


USES = {
    "no verb": ([], 2, "usage: host call"),
    "no file": (["train", "{}/none.pt", "{}/start.pt", "{}/data.pt", "1", "8", "{}/o.pt"], 1, "none.pt"),
    "no function": (
        ["train", "{}/data.pt", "{}/start.pt", "{}/data.pt", "1", "8", "{}/o.pt"],
        1,
        "data.pt is not an exp",
    ),
    "no tensors": (
        ["call", "{}/step.pt", "forward", "{}/step.pt", "{}/o.pt"],
        1,
        "step.pt is not a dict of tensors as",
    ),
    "a word": (["train", "{}/step.pt", "{}/start.pt", "{}/data.pt", "2x", "8", "{}/o.pt"], 1, "number, got '2x'"),
    "a gap": (["train", "{}/step.pt", "{}/start.pt", "{}/data.pt", "2", "8,,9", "{}/o.pt"], 1, "number, got ''"),
    "no data": (["train", "{}/step.pt", "{}/start.pt", "{}/none.pt", "1", "8", "{}/o.pt"], 1, "cannot open"),
    "sizes": (["train", "{}/step.pt", "{}/start.pt", "{}/data.pt", "1", "8,0", "{}/o.pt"], 1, "sizes must be 1 or"),
    "rows": (["train", "{}/step.pt", "{}/start.pt", "{}/data.pt", "1", "1798", "{}/o.pt"], 1, "have 1798 rows or more"),
    "steps": (["train", "{}/step.pt", "{}/start.pt", "{}/data.pt", "0", "8", "{}/o.pt"], 1, "steps must be 1 or more"),
    "method": (["call", "{}/step.pt", "value", "{}/start.pt", "{}/o.pt"], 1, "the file has no method value"),
}


@pytest.mark.parametrize("name", USES)
def test_wrong_arguments_are_told(host, folder, name):
    arguments, code, message = USES[name]
    done = run(host, *(argument.format(folder) for argument in arguments))
    assert done.returncode == code and message in done.stderr
    assert not (folder / "o.pt").exists()


def test_a_missing_compiler_fails_where_it_is_required(monkeypatch):
    monkeypatch.delenv("FUNCREG_REQUIRE_CPP", raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no g--"):
        compiler("g--")
    monkeypatch.setenv("FUNCREG_REQUIRE_CPP", "1")
    with pytest.raises(pytest.fail.Exception, match="FUNCREG_REQUIRE_CPP=1, and there is no g--"):
        compiler("g--")
    assert "export FUNCREG_REQUIRE_CPP=1" in (ROOT / ".ci/run").read_text()


def test_the_recipe_of_the_example(tmp_path):
    """The first commands of its README, with CMake, as they stand there."""
    compiler()
    compiler("cmake")
    if torch.version.cuda is not None:
        pytest.skip("PyTorch's CMake files want a CUDA toolkit for this build")
    commands = re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)[0]
    assert commands.count("build/host") == 4
    commands = commands.replace("build/host", str(tmp_path)).replace("pip install", "echo pip install")  # it is there
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **as_many_threads(), "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euc", commands], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 16 arrays (7831 numbers) differ between C++ and Python" in done.stdout
    assert re.search(r"C\+\+: \d+ microseconds per step, \d\.\d\d of eager", done.stdout)

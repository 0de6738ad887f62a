"""The files of an export: whole or not there, checked before they are loaded, and verified anywhere."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import funcreg
import funcreg.torch as fr
from export_cases import BATCH, same_bits
from funcreg import _artifact
from funcreg.torch.export import __main__ as command
from funcreg.torch.export import _check, _selfcheck, _torchscript

ASK = _check.ask  # before the shared process takes its place
ROOT = Path(funcreg.__file__).parent.parent
NAMES = ["f.pt", "f.pt.json", "f.pt.safetensors"]


def mean(w, x):
    return w * x.sum(0) / x.shape[0]


def export(path, function=mean, **options):
    example = {"w": torch.linspace(0.1, 1.0, 4), "x": torch.randn(8, 4)}
    return fr.export.export_step(function, example, path, dynamic={"x": BATCH}, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory, fresh_process):
    path = tmp_path_factory.mktemp("original") / "f.pt"
    report = export(path)
    return path, report


@pytest.fixture
def copy(original, tmp_path):
    """An exported file that a test may damage."""
    for name in NAMES:
        (tmp_path / name).write_bytes((original[0].parent / name).read_bytes())
    return tmp_path / "f.pt"


def edit(path, change):
    """Change a manifest."""
    beside = path.with_name(path.name + ".json")
    manifest = json.loads(beside.read_text())
    change(manifest)
    beside.write_text(json.dumps(manifest))


def replace(path, kind, data):
    """Other bytes for a file, with a manifest that says so: what the hash cannot tell."""

    def change(manifest):
        spec = manifest["files"][kind]
        (path.parent / spec["name"]).write_bytes(data)
        spec["sha256"], spec["bytes"] = hashlib.sha256(data).hexdigest(), len(data)

    edit(path, change)


# --- what is written ---


def test_the_files_and_the_manifest(original):
    path, report = original
    assert sorted(file.name for file in path.parent.iterdir()) == NAMES
    assert len({file.stat().st_mode for file in path.parent.iterdir()}) == 1
    manifest = json.loads((path.parent / "f.pt.json").read_text())
    assert manifest["schema"] == 1 and manifest["kind"] == "step" and manifest["function"] == "mean"
    assert manifest["framework"] == "torch" and manifest["framework_version"] == torch.__version__
    assert manifest["methods"]["forward"]["inputs"]["x"] == {"dtype": "float32", "shape": ["batch", 4]}
    assert manifest["methods"]["forward"]["outputs"] == {"output": {"dtype": "float32", "shape": [4]}}
    assert manifest["sizes"] == {"batch": {"refused": [0]}}
    for spec in manifest["files"].values():
        data = (path.parent / spec["name"]).read_bytes()
        assert (spec["sha256"], spec["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    check = manifest["self_check"]
    assert check["bitwise"] and check["compared"] == 5 and check["threads"] == torch.get_num_threads()
    assert check["cpu_capability"] == torch.backends.cpu.get_cpu_capability() and check["device"] == "cpu"
    assert [case["sizes"]["batch"] for case in manifest["cases"]] == [8, 1, 2, 5, 16]
    with safe_open(path.parent / "f.pt.safetensors", "pt") as arrays:
        # what has no dynamic dimension is stored once
        of_cases = [f"{i}.{key}" for i in range(5) for key in ("in.x", "out.output")]
        assert sorted(arrays.keys()) == sorted(["in.w", *of_cases])
    assert report.manifest.to_json() == (path.parent / "f.pt.json").read_text()
    assert "in   x: float32[batch, 4]" in str(report)
    assert "5 outputs in a fresh process are equal bit for bit" in str(report)


def test_repeated_rows_differ(original):
    """A mean over the first eight rows is not that over sixteen."""
    x = load_file(original[0].parent / "f.pt.safetensors")["4.in.x"]
    assert torch.equal(x[8:], x[:8] * 1.25)


def test_the_signature_in_the_file_is_that_of_the_manifest(original):
    exported = fr.export.load_exported(original[0], trusted=True)
    assert json.loads(exported.module.signature())["methods"] == json.loads(original[1].manifest.to_json())["methods"]


@pytest.mark.usefixtures("fresh_process")
def test_an_existing_file_is_kept_unless_told(copy):
    before = {name: (copy.parent / name).read_bytes() for name in NAMES}
    with pytest.raises(FileExistsError, match="f.pt is there already; pass overwrite=True"):
        export(copy)
    with pytest.raises(fr.export.ControlFlowError):
        export(copy, lambda w, x: w if x.sum() > 0 else x, overwrite=True)
    assert {name: (copy.parent / name).read_bytes() for name in NAMES} == before
    export(copy, lambda w, x: (w * x).sum(0), overwrite=True)
    loaded = fr.export.load_exported(copy, trusted=True)
    assert loaded({"w": torch.ones(4), "x": torch.ones(3, 4)})["output"].tolist() == [3.0] * 4
    assert sorted(file.name for file in copy.parent.iterdir()) == NAMES
    copy.unlink()  # a manifest alone is a file, too
    with pytest.raises(FileExistsError, match=r"f.pt.json is there already"):
        export(copy)


@pytest.mark.usefixtures("fresh_process")
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """By a check that fails, by a process that dies, and by a disk that fills up between the files."""
    monkeypatch.setattr(_check, "ask", lambda job: "not JSON")
    with pytest.raises(fr.export.SelfCheckError, match="did not finish"):
        export(tmp_path / "f.pt")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    moved = []

    def full(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise OSError("no space left")
        Path(source).rename(target)

    monkeypatch.setattr(_artifact.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        export(tmp_path / "f.pt")
    assert not list(tmp_path.iterdir()) and moved


def test_the_manifest_is_moved_last(tmp_path, monkeypatch):
    """And an old one is gone before: no reader takes new files for those that it describes."""
    order = []
    beside = tmp_path / "f.pt.json"
    beside.touch()

    def note(source, target):
        del source
        assert not beside.exists()
        order.append(Path(target).name)

    monkeypatch.setattr(_artifact.os, "replace", note)
    with _artifact.staged("test", tmp_path / "f.pt", True) as folder:
        for name in ("f.pt.json", "a", "f.pt", "z"):
            (folder / name).touch()
    assert order == ["a", "f.pt", "z", "f.pt.json"]


# --- loading ---


def test_trust_is_written_out(copy):
    for trusted in (False, None, 1, "yes"):
        with pytest.raises(TypeError, match="say trusted=True if you know where it comes from"):
            fr.export.load_exported(copy, trusted=trusted)
    with pytest.raises(TypeError, match="trusted"):
        fr.export.load_exported(copy)


def test_a_flipped_bit_is_refused_before_the_loader_sees_it(copy, monkeypatch):
    monkeypatch.setattr(_torchscript, "from_bytes", lambda data: pytest.fail("loaded"))
    data = copy.read_bytes()
    for position in range(0, len(data), len(data) // 50):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        copy.write_bytes(damaged)
        with pytest.raises(fr.export.IntegrityError, match="is not the file that its manifest describes: sha256"):
            fr.export.load_exported(copy, trusted=True)
    copy.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=f"of {len(data) - 5} bytes, .* of {len(data)} expected"):
        fr.export.load_exported(copy, trusted=True)
    with pytest.raises(fr.export.IntegrityError):
        fr.export.verify_exported(copy)


MANIFESTS = [
    ("newer schema", lambda m: m.update(schema=2), fr.export.VersionError, "has schema 2, and this version of funcreg"),
    ("no schema", lambda m: m.pop("schema"), fr.export.IntegrityError, "is not the manifest of an exported function"),
    ("schema in words", lambda m: m.update(schema="1"), fr.export.IntegrityError, "is not the manifest .*schema '1'"),
    ("a field more", lambda m: m.update(more=1), fr.export.IntegrityError, "is damaged"),
    ("a field less", lambda m: m.pop("sizes"), fr.export.IntegrityError, "is damaged"),
    ("newer torch", lambda m: m.update(framework_version="9.0"), fr.export.VersionError, "newer files are not read by"),
    ("JAX", lambda m: m.update(framework="jax"), fr.export.VersionError, "was made by jax; load it there"),
    (
        "other inputs",
        lambda m: m["methods"]["forward"]["inputs"].pop("w"),
        fr.export.IntegrityError,
        "takes and returns something else than its manifest says",
    ),
    (
        "other sizes",
        lambda m: m["sizes"]["batch"].update(refused=[]),
        fr.export.IntegrityError,
        "takes and returns something else",
    ),
    (
        "another folder",
        lambda m: m["files"]["torchscript"].update(name="../f.pt"),
        fr.export.IntegrityError,
        "a file that is not in the folder of its manifest: '../f.pt'",
    ),
    (
        "another file",
        lambda m: m["files"]["torchscript"].update(name="g.pt"),
        fr.export.IntegrityError,
        "the manifest does not describe f.pt, but g.pt, f.pt.safetensors; copy both again",
    ),
]


@pytest.mark.parametrize("name, change, error, message", MANIFESTS, ids=[row[0] for row in MANIFESTS])
def test_a_manifest_that_does_not_fit(name, change, error, message, copy):
    edit(copy, change)
    with pytest.raises(error, match=message):
        fr.export.load_exported(copy, trusted=True)


def test_files_that_are_not_there(copy):
    with pytest.raises(FileNotFoundError, match="g.pt is not there"):
        fr.export.load_exported(copy.with_name("g.pt"), trusted=True)
    copy.with_name("f.pt.json").rename(copy.with_name("g.json"))
    with pytest.raises(FileNotFoundError, match=r"f.pt.json is not there"):
        fr.export.load_exported(copy, trusted=True)
    copy.with_name("g.json").write_text("[")
    copy.with_name("g.json").rename(copy.with_name("f.pt.json"))
    with pytest.raises(fr.export.IntegrityError, match="is not the manifest"):
        fr.export.load_exported(copy, trusted=True)
    for path in (copy.parent, copy.with_name("g.pt")):
        with pytest.raises(FileNotFoundError, match="is a folder; name the file|is not there"):
            fr.export.verify_exported(path)
    for read in (fr.export.verify_exported, lambda path: fr.export.load_exported(path, trusted=True)):
        with pytest.raises(TypeError, match="_exported: path must be a string or a Path, got NoneType"):
            read(None)


# --- the check finds what is wrong ---


class Twin(torch.nn.Module):
    """What a traced function would be as a file."""

    def __init__(self, traced, said: str) -> None:
        super().__init__()
        self.traced, self.said = traced, said

    @torch.jit.export
    def signature(self) -> str:
        return self.said

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"output": self.traced(inputs["w"], inputs["x"])}


@pytest.mark.usefixtures("fresh_process")
def test_a_traced_twin_is_caught(copy):
    """`torch.jit.trace` of the same function: right at the size of its example, twice as much at the double."""
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(mean)(torch.ones(4), torch.ones(8, 4))
    with _torchscript.quiet():
        twin = torch.jit.trace(traced, (torch.ones(4), torch.ones(8, 4)), check_trace=False)
        script = torch.jit.script(Twin(twin, fr.export.load_exported(copy, trusted=True).manifest.signature()))
    wrong = script({"w": torch.ones(4), "x": torch.ones(16, 4)})["output"]
    assert wrong.tolist() == [2.0] * 4 and mean(torch.ones(4), torch.ones(16, 4)).tolist() == [1.0] * 4
    replace(copy, "torchscript", _torchscript.to_bytes(script))
    with pytest.raises(
        fr.export.SelfCheckError, match=r"in 4 of 5 outputs; first torchscript forward case 1 batch=1, output"
    ):
        fr.export.verify_exported(copy)


@pytest.mark.usefixtures("fresh_process")
def test_a_reference_that_is_one_ulp_off_is_caught(copy):
    arrays = load_file(copy.with_name("f.pt.safetensors"))
    x = arrays["2.out.output"]
    x[3] = torch.nextafter(x[3], torch.tensor(float("inf")))
    save_file(arrays, copy.with_name("new"))
    replace(copy, "cases", copy.with_name("new").read_bytes())
    with pytest.raises(
        fr.export.SelfCheckError,
        match=r"in 1 of 5 outputs; first torchscript forward case 2 batch=2, output: 1 of 4 .* or 1 ulp .* nothing may",
    ):
        fr.export.verify_exported(copy)
    # on another machine this is within the bound, and is reported
    edit(copy, lambda manifest: manifest["self_check"].update(cpu_capability="VSX"))
    report = fr.export.verify_exported(copy)
    assert not report.bitwise and report.worst_ulp == 1 and "(1 ulp)" in str(report)
    x[3] *= 1 + 1e-4
    save_file(arrays, copy.with_name("new"))
    replace(copy, "cases", copy.with_name("new").read_bytes())
    with pytest.raises(fr.export.SelfCheckError, match="between which 32 eps of the largest number may differ"):
        fr.export.verify_exported(copy)


COMPARISONS = [
    ([0.0], [-0.0], 1, 0.0, 0),
    ([1.0, float("nan")], [1.0, float("nan")], 0, 0.0, 0),
    ([-float("nan")], [float("nan")], 0, 0.0, 0),  # of other bits
    ([float("nan")], [1.0], 1, float("inf"), 1),
    ([float("inf")], [float("inf")], 0, 0.0, 0),
    ([-1e-45], [1e-45], 1, 2.8e-45, 0),  # below the smallest normal number, which some machines take for 0
    ([1.0, 2.0], [1.0, 3.0], 1, 1.0, 1),
]


@pytest.mark.parametrize("got, expected, different, distance, outside", COMPARISONS)
def test_comparison(got, expected, different, distance, outside):
    found = _selfcheck._Found()
    _selfcheck._compare("here", torch.tensor(got), torch.tensor(expected), found)
    assert (len(found.different), len(found.outside)) == (different, outside)
    assert found.worst_abs == pytest.approx(distance)
    for other in (torch.tensor(expected, dtype=torch.float64), torch.tensor([expected])):
        found = _selfcheck._Found()
        _selfcheck._compare("here", torch.tensor(got), other, found)
        assert found.outside == {"here"} and "instead of" in found.first


def test_ulps_count_through_zero():
    smallest = torch.tensor([1e-45, -1e-45]).view(torch.int32)
    zeros = torch.tensor([-0.0, 0.0]).view(torch.int32)
    assert _selfcheck._ulps(smallest[:1], smallest[1:]) == 2
    assert _selfcheck._ulps(zeros[:1], zeros[1:]) == 0
    assert _selfcheck._ulps(torch.tensor([1.5]).view(torch.int32), torch.tensor([1.0]).view(torch.int32)) == 2**22


# --- a process of its own ---


def test_the_command_verifies_in_a_process_without_this_package(copy, tmp_path, capfd):
    """The real thing, without the shared process; the package is not even importable there."""
    spy = tmp_path / "sitecustomize.py"
    spy.write_text("raise SystemExit('not isolated')")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    arguments = [sys.executable, "-W", "error", "-m", "funcreg.torch.export", "verify", copy, copy]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 outputs in a fresh process are equal bit for bit") == 2
    code = "import sys, _selfcheck; _selfcheck.main({'manifests': [], 'path': []}); print('funcreg' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=_check.PROGRAM.parent, env={"PYTHONPATH": ""}
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.usefixtures("fresh_process")
def test_exit_codes(copy, capsys):
    assert command.main(["verify", str(copy)]) == 0
    assert "in   x: float32[batch, 4]" in capsys.readouterr().out
    arrays = load_file(copy.with_name("f.pt.safetensors"))
    arrays["0.out.output"] += 1
    save_file(arrays, copy.with_name("new"))
    replace(copy, "cases", copy.with_name("new").read_bytes())
    assert command.main(["verify", str(copy)]) == 1
    assert "does not return what was recorded" in capsys.readouterr().err
    copy.write_bytes(b"")
    assert command.main(["verify", str(copy)]) == 2
    assert command.main(["verify", str(copy.with_name("none.pt"))]) == 2
    with pytest.raises(SystemExit, match="2"):
        command.main([])


def test_a_process_that_dies_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(_check, "ask", ASK)
    monkeypatch.setattr(_check, "PROGRAM", tmp_path / "none.py")
    with pytest.raises(fr.export.SelfCheckError, match="did not finish: exit code 2, .*can't open file"):
        _check.run("test", [])


# --- warnings ---


def test_warnings_of_torch_jit_are_contained(original):
    """At the call and nowhere else, in many threads at once; the suite runs with warnings as errors."""
    before = list(warnings.filters)
    problems = []

    def work():
        try:
            for _ in range(5):
                exported = fr.export.load_exported(original[0], trusted=True)
                got = exported({"w": torch.ones(4), "x": torch.ones(3, 4)})["output"]
                assert same_bits(got, torch.ones(4))
                _torchscript.compiled("test", "def f(self, x: Tensor) -> Tensor:\n    return x\n", {})
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert warnings.filters == before
    with pytest.raises(DeprecationWarning, match="torch.jit.load"):
        torch.jit.load(original[0])
    for message in ("another", "`torch.jit.load` is deprecated, says someone else"):
        with _torchscript.quiet(), pytest.raises(DeprecationWarning, match=message):
            warnings.warn(message, DeprecationWarning, stacklevel=1)


def test_importing_the_wing_does_not_import_the_tracer():
    code = "import sys, funcreg.torch as fr; fr.export.export_step; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    loaded = set(done.stdout.split())
    assert "funcreg.torch.export._step" in loaded
    assert not {"funcreg.torch.export._trace", "torch._dynamo", "sympy", "safetensors"} & loaded


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(cases=[]),
        lambda manifest: manifest["cases"][0].pop("sizes"),
        lambda manifest: manifest["cases"][1].pop("carried"),
        lambda manifest: manifest["cases"][1].update(method="backward"),
        lambda manifest: manifest["files"].pop("cases"),
        lambda manifest: manifest.update(sizes={}),
        lambda manifest: manifest.update(framework_version="2/13"),
        lambda manifest: manifest.update(methods=[]),
        lambda manifest: manifest["methods"]["forward"].update(outputs={}),
        lambda manifest: manifest["methods"]["forward"]["inputs"]["x"].update(dtype="float7"),
        lambda manifest: manifest["methods"]["forward"]["inputs"]["x"].update(shape=["batch", -4]),
        lambda manifest: manifest["sizes"]["batch"].update(refused="0"),
        lambda manifest: manifest["cases"][0].update(carried=["w"]),
        lambda manifest: manifest["cases"][0].update(sizes={"batch": "8"}),
        lambda manifest: manifest["files"]["cases"].update(name="/etc/passwd"),
        lambda manifest: manifest["files"]["cases"].update(name=".."),
        lambda manifest: manifest["files"]["cases"].update(name="sub/f.pt"),
        lambda manifest: manifest["files"]["cases"].update(sha256=5),
        lambda manifest: manifest["files"]["cases"].update(bytes=-1),
        lambda manifest: manifest.update(self_check={}),
        lambda manifest: manifest["self_check"].update(threads=10**9),
        lambda manifest: manifest["self_check"].update(device="toaster"),
        lambda manifest: manifest.update(kind=3),
    ],
)
@pytest.mark.parametrize("read", [fr.export.verify_exported, lambda path: fr.export.load_exported(path, trusted=True)])
def test_a_manifest_with_holes_is_refused(copy, change, read):
    edit(copy, change)
    with pytest.raises(fr.export.IntegrityError, match="f.pt.json is damaged: .*; export the function again"):
        read(copy)


def test_a_manifest_that_is_no_text_is_refused(copy):
    beside = copy.with_name(copy.name + ".json")
    beside.write_bytes(beside.read_bytes().replace(b"schema", b"sch\xa0ma", 1))
    with pytest.raises(fr.export.IntegrityError, match="is not the manifest"):
        fr.export.load_exported(copy, trusted=True)


def test_a_manifest_that_never_ends_is_refused(copy):
    copy.with_name(copy.name + ".json").write_text("[" * 100_000)
    with pytest.raises(fr.export.IntegrityError, match="is not the manifest .*RecursionError"):
        fr.export.load_exported(copy, trusted=True)


@pytest.mark.usefixtures("fresh_process")
def test_programs_of_the_right_hash_that_are_not_ours(copy):
    class Other(torch.nn.Module):
        def forward(self, x):
            return x

    with _torchscript.quiet():
        other = _torchscript.to_bytes(torch.jit.script(Other()))
    for data in (b"junk", other):
        replace(copy, "torchscript", data)
        with pytest.raises(fr.export.IntegrityError, match="f.pt is no exported file, or not one for torch "):
            fr.export.load_exported(copy, trusted=True)
        with pytest.raises(fr.export.SelfCheckError, match="first torchscript: cannot be loaded, "):
            fr.export.verify_exported(copy)


@pytest.mark.usefixtures("fresh_process")
def test_verification_needs_all_that_the_manifest_names(copy):
    arrays = {name: x.clone() for name, x in load_file(copy.with_name("f.pt.safetensors")).items()}
    for name in ("1.out.output", "1.in.x"):
        save_file({key: x for key, x in arrays.items() if key != name}, copy.with_name("new"))
        replace(copy, "cases", copy.with_name("new").read_bytes())
        with pytest.raises(fr.export.SelfCheckError, match="case 1 .*: the array '.*' is not in the file of cases"):
            fr.export.verify_exported(copy)
    edit(copy, lambda manifest: manifest["methods"]["forward"]["outputs"]["output"].update(shape=[5]))
    with pytest.raises(fr.export.SelfCheckError, match="takes and returns something else than the manifest says"):
        fr.export.verify_exported(copy)
    edit(copy, lambda manifest: manifest["self_check"].update(device="cuda"))
    if not torch.cuda.is_available():
        with pytest.raises(fr.export.VersionError, match="was made for cuda, which this machine does not have"):
            fr.export.verify_exported(copy)
    copy.with_name("f.pt.safetensors").unlink()
    edit(copy, lambda manifest: manifest["self_check"].update(device="cpu"))
    with pytest.raises(FileNotFoundError, match=r"f.pt.safetensors is not there, but its manifest names it"):
        fr.export.verify_exported(copy)


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("name", ["with space.pt", "ünïcödé.pt", 'it\'s "f" {0} %s.pt', "..pt", "a.b.pt"])
def test_any_name_of_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(name, check_sizes=(1,))  # relative, too
    assert fr.export.verify_exported(tmp_path / name).bitwise
    assert fr.export.load_exported(name, trusted=True)({"w": torch.ones(4), "x": torch.ones(3, 4)})


def test_exports_in_several_threads(tmp_path, fresh_process):
    """Tracing replaces functions of PyTorch for the whole process, so that only one export traces at a time."""
    failed = []

    def work(i):
        try:
            export(tmp_path / f"{i}.pt", check_sizes=(2,))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed

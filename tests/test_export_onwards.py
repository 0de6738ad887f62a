"""The ExportedProgram beside the TorchScript file, what is made from it, and another instruction set."""

import importlib.util
import shutil
import tempfile

import pytest
import torch

import export_cases
import funcreg.torch as fr
from export_cases import same_bits
from funcreg.torch.export import _check
from funcreg.torch.export._inputs import take_apart

ASK = _check.ask  # before the shared process takes its place
# The exporters use functions that PyTorch itself has deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory, fresh_process):
    """A training step in both formats, and the tensors of its example."""
    case = export_cases.case("prox_adam")
    path = tmp_path_factory.mktemp("both") / "step.pt"
    formats = ("torchscript", "pt2")
    report = fr.export.export_step(
        case.function, case.example, path, dynamic=case.dynamic, outputs=case.outputs, formats=formats
    )
    return path, report, take_apart("test", case.example, case.dynamic)


def test_the_program_returns_the_same_bits_and_checks_its_inputs(written):
    path, report, inputs = written
    assert report.compared == 2 * 6 * 16  # both formats
    script = fr.export.load_exported(path, trusted=True)
    program = fr.export.load_exported(path.with_suffix(".pt2"), trusted=True)
    for size in (1, 7, 32):
        given = inputs.resized({"batch": size})
        expected = script(given)
        for order in (given, dict(reversed(given.items()))):
            got = program(order)
            assert got.keys() == expected.keys()
            assert all(same_bits(got[name], expected[name]) for name in expected)
    given = inputs.resized({"batch": 3})
    for wrong in ({"x": torch.ones(3, 5)}, {"x": torch.ones(4, 4)}):  # its own guards
        with pytest.raises(AssertionError, match=r"inputs\['x'\]"):
            program.module({**given, **wrong})
    with pytest.raises(ValueError, match="input x must be float32.batch, 4., got float64"):
        program({**given, "x": torch.ones(3, 4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="input x is missing"):
        program({name: x for name, x in given.items() if name != "x"})
    assert fr.export.verify_exported(path.with_suffix(".pt2")).bitwise


def test_the_program_alone(tmp_path, written):
    del written
    example = {"x": torch.ones(3, 2)}
    path = tmp_path / "f.pt2"
    fr.export.export_step(lambda x: x.sum(0), example, path, dynamic={"x": {0: "n"}}, formats=("pt2",))
    names = ["f.pt2", "f.pt2.json", "f.pt2.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    exported = fr.export.load_exported(path, trusted=True)
    assert exported({"x": torch.ones(5, 2)})["output"].tolist() == [5.0, 5.0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(fr.export.IntegrityError):
        fr.export.load_exported(path, trusted=True)


def _classifier(path):
    def loss(params, x, y):
        return torch.nn.functional.cross_entropy(x @ params["w"], y)

    init, step = fr.train_step(loss, lambda hyper: fr.prox_adam(hyper["lr"], fr.l1(1e-3)))
    hyper = {"lr": torch.tensor(0.1)}
    example = {"state": init({"w": torch.randn(4, 3)}, hyper), "hyper": hyper}
    example |= {"x": torch.randn(8, 4), "y": torch.arange(8) % 3}
    dynamic = {"x": {0: "batch"}, "y": {0: "batch"}}
    report = fr.export.export_step(step, example, path, dynamic=dynamic, formats=("torchscript", "pt2"))
    return report, take_apart("test", example, dynamic)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.parametrize("loss", ["square", "cross_entropy"])
def test_onnx_from_the_program(written, tmp_path, loss):
    import onnxruntime

    path, report, inputs = written
    if loss == "cross_entropy":  # of which onnxscript takes the gradient of the sum unless it is decomposed first
        path = tmp_path / "step.pt"
        report, inputs = _classifier(path)
    method = report.manifest.methods["forward"]
    program = torch.export.load(path.with_suffix(".pt2"))
    wrong_in_onnx = torch._decomp.get_decompositions([torch.ops.aten.nll_loss_forward])
    torch.onnx.export(
        program.run_decompositions(wrong_in_onnx),
        (),
        str(tmp_path / "step.onnx"),
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=list(method.inputs),
        output_names=[f"new.{name}" for name in method.outputs],
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"))
    given = inputs.resized({"batch": 13})
    expected = fr.export.load_exported(path, trusted=True)(given)
    got = session.run([f"new.{name}" for name in expected], {name: x.numpy() for name, x in given.items()})
    for name, x in zip(expected, got, strict=True):
        torch.testing.assert_close(torch.tensor(x), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_aotinductor_from_the_program(tmp_path, fresh_process):
    def step(w, x, lam):
        gradient = torch.func.grad(fr.penalize(lambda w, x: (x @ w).square().mean(), fr.l1(lam)))
        return w - 0.1 * gradient(w, x)

    example = {"w": torch.randn(3), "x": torch.randn(8, 3), "lam": torch.tensor(0.1)}
    fr.export.export_step(step, example, tmp_path / "s.pt2", dynamic={"x": {0: "batch"}}, formats=("pt2",))
    program = torch.export.load(tmp_path / "s.pt2")
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/s.aoti.pt2")
        compiled = torch._inductor.aoti_load_package(package)
        for size in (1, 13):
            given = {**example, "x": torch.randn(size, 3)}
            torch.testing.assert_close(compiled(given)["output"], step(**given))


def test_another_instruction_set_is_within_the_bound(written, monkeypatch):
    """The same file, checked by a process that may not use AVX: other bits, and the report says so."""
    path, *_ = written
    monkeypatch.setattr(_check, "ask", ASK)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    here = torch.backends.cpu.get_cpu_capability()
    report = fr.export.verify_exported(path)
    assert report.manifest.self_check["cpu_capability"] == here
    if here in ("AVX2", "AVX512"):
        assert not report.bitwise
    assert report.worst_abs < 1e-6

"""Exported functions return the bits of the Python ones, at sizes that were neither traced nor checked."""

import dataclasses
import doctest
import importlib

import pytest
import torch

import export_cases
import funcreg.torch as fr
from export_cases import same_bits
from funcreg.torch.export._inputs import flatten_outputs, take_apart

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every case is exported once."""
    folder = tmp_path_factory.mktemp("exports")
    done = {}

    def get(name):
        if name not in done:
            case = export_cases.case(name)
            path = folder / f"{name}.pt"
            report = fr.export.export_step(
                case.function, case.example, path, dynamic=case.dynamic, outputs=case.outputs
            )
            done[name] = case, report, fr.export.load_exported(path, trusted=True)
        return done[name]

    return get


@pytest.mark.parametrize("name", export_cases.CASES)
def test_case(exports, name):
    case, report, exported = exports(name)
    inputs = take_apart("test", case.example, case.dynamic)
    method = report.manifest.methods["forward"]
    dims = sorted(set(inputs.sizes))
    # the example's sizes, all others of every dimension, with two dimensions also in turn and 1 for either of them, and
    # for a state once more
    state = [name for name in method.inputs if name in method.outputs]
    cases = 1 + 4 * len(dims) + 2 * (len(dims) == 2) + bool(state)
    assert report.manifest.cases[1]["carried"] == state and report.manifest.cases[0]["carried"] == []
    assert report.bitwise and report.compared == cases * len(method.outputs)
    assert list(report.manifest.sizes) == dims
    for sizes in ({dim: 11 + 2 * k for k, dim in enumerate(dims)}, dict.fromkeys(dims, 1), dict.fromkeys(dims, 37)):
        given = inputs.resized(sizes)
        arguments = inputs.rebuild([x.clone() for x in given.values()])
        expected = flatten_outputs("test", case.function(*arguments.values()), case.outputs)
        got = exported(given)
        assert got.keys() == expected.keys() == method.outputs.keys()
        for key in expected:
            assert same_bits(got[key], expected[key]), (sizes, key)


def test_two_hundred_steps_with_changing_batch_sizes(exports):
    case, _, exported = exports("prox_adam")
    rows = {size: (torch.randn(size, 4), torch.randn(size, 3)) for size in (8, 13, 32, 1)}
    hyper = {**case.example["hyper"], "lam": torch.tensor(0.05)}
    state = case.example["state"]
    inputs = take_apart("test", {"state": state}, {}).tensors
    zeros = 0
    for i in range(200):
        x, y = rows[(8, 13, 32, 1)[i % 4]]
        state, metrics = case.function(state, hyper, x, y)
        outputs = exported({**inputs, "hyper": hyper, "x": x, "y": y})
        inputs = {name: value for name, value in outputs.items() if name.startswith("state.")}
        expected = flatten_outputs("test", (state, metrics), ("state", "metrics"))
        assert all(same_bits(outputs[name], expected[name]) for name in expected)
        zeros = sum(int((p == 0).sum()) for p in state.params.values())
    assert state.opt_state.count == 200
    assert 5 < zeros < 51  # the penalty did something, and not everything


def test_outputs_can_be_fed_back(exports):
    """The names of a state are the same on both sides, with the same dtypes and shapes."""
    _, report, _ = exports("convnet")
    method = report.manifest.methods["forward"]
    states = [name for name in method.inputs if name.startswith("state.")]
    assert "state.extra.norm.running_mean" in states
    for name in states:
        assert method.outputs[name] == method.inputs[name]


def test_inputs_are_not_changed(exports):
    case, _, exported = exports("convnet")
    inputs = take_apart("test", case.example, case.dynamic).tensors
    before = {name: x.clone() for name, x in inputs.items()}
    exported(inputs)
    assert all(same_bits(inputs[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["prox_adam", "cross_entropy", "private", "convnet", "attention"])
def test_no_device_is_in_the_file(exports, name):
    """A file made on the CPU computes where its inputs are; without an accelerator, on tensors without numbers."""
    case, _, exported = exports(name)
    inputs = take_apart("test", case.example, case.dynamic).tensors
    module = exported.module
    got = module({name: x.to("meta") for name, x in inputs.items()})
    for key, spec in exported.manifest.methods["forward"].outputs.items():
        assert got[key].device.type == "meta" and list(got[key].shape) == [{"batch": 8}.get(n, n) for n in spec.shape]


def test_arguments_go_to_parameters_of_their_names(tmp_path):
    """In any order; what has no parameter goes to `*args`, and `torch.func.grad` takes arguments by position only."""

    def fn(a, /, b, *rest, scale, shift=None):
        return (a - b) * scale + rest[0] / rest[1] + (0 if shift is None else shift)

    given = dict(zip("scale b x a y".split(), torch.arange(1.0, 6.0), strict=True))
    fr.export.export_step(fn, given, tmp_path / "a.pt", dynamic={})
    got = fr.export.load_exported(tmp_path / "a.pt", trusted=True)(given)
    assert got == {"output": torch.tensor((4 - 2) * 1 + 3 / 5)}
    gradient = torch.func.grad(lambda w, x: (w * x).sum())
    example = {"x": torch.tensor([1.0, 2.0]), "w": torch.tensor([3.0, 4.0])}
    fr.export.export_step(gradient, example, tmp_path / "b.pt", dynamic={})
    assert fr.export.load_exported(tmp_path / "b.pt", trusted=True)(example)["output"].tolist() == [1, 2]


def test_inputs_in_other_layouts(tmp_path):
    """A graph may hold the strides of its example; the file makes its inputs contiguous."""

    def fn(x):
        new = x * 2
        views = {"strided": x.as_strided((2, 2), (1, 2)), "same": x, "row": x[0], "turned": x.t()}
        return {**views, "new": new, "new_row": new[0]}

    fr.export.export_step(fn, {"x": torch.randn(3, 4)}, tmp_path / "s.pt", dynamic={"x": {0: "rows"}})
    exported = fr.export.load_exported(tmp_path / "s.pt", trusted=True)
    x = torch.randn(4, 6).t()[1:]
    got = exported({"x": x})
    assert {name: list(spec.shape) for name, spec in exported.manifest.methods["forward"].outputs.items()} == {
        "strided": [2, 2],
        "same": ["rows", 4],
        "row": [4],
        "turned": [4, "rows"],
        "new": ["rows", 4],
        "new_row": [4],
    }
    for name, expected in fn(x.contiguous()).items():
        assert same_bits(got[name], expected) and got[name].is_contiguous()
    x = x.contiguous()
    memory = [tensor.untyped_storage().data_ptr() for tensor in (x, *exported({"x": x}).values())]
    assert len(set(memory)) == 7  # nothing is a view of anything


def test_values_that_are_hard_to_write_down(tmp_path):
    """Constants, empty lists, infinities, and an input whose batch is empty if that was checked."""

    def fn(x, y):
        return {
            "constant": x * torch.tensor([0.1, float("inf"), -0.0]),
            "infinite": torch.where(y > 1, float("-inf"), x.sum(-1)),
            "nan": x.sum(-1) * float("nan"),
            "scalar": x.sum([]) if x.shape[1] == 0 else x.sum(),
            "full": torch.full([], 0.1) + torch.zeros(x.shape[0], dtype=torch.float64),
            "size": x.new_ones(()) * x.shape[0] ** 0.5 / (x.shape[0] // 2 + 1),
            "index": x[:, torch.tensor([2, 0])],
            "bool": y > 0,
            "half": x.bfloat16(),
        }

    example = {"x": torch.randn(5, 3), "y": torch.arange(5)}
    dynamic = {"x": {0: "n"}, "y": {-1: "n"}}
    report = fr.export.export_step(fn, example, tmp_path / "h.pt", dynamic=dynamic, check_sizes=(0, 1, 2, 9))
    assert report.bitwise and report.compared == 5 * 9
    assert report.manifest.sizes == {"n": {"refused": []}}


def test_powers_of_sizes(tmp_path):
    """In TorchScript a power of two integers is a float, and -2 ** n is negative."""

    def fn(x):
        n = x.shape[0]
        return {
            "sign": x * (-2) ** n,
            "whole": x.long() * n**2 + 3**n + (n - 5) ** 3,
            "shape": x.new_zeros(n**2).sum() + x,
            "float": x * n**1.5 + x * n**-1,
        }

    fr.export.export_step(
        fn, {"x": torch.randn(7, 4)}, tmp_path / "f.pt", dynamic={"x": {0: "n"}}, check_sizes=(1, 3, 5)
    )
    exported = fr.export.load_exported(tmp_path / "f.pt", trusted=True)
    for n in (2, 4, 9, 30):
        x = 10 * torch.randn(n, 4)
        got = exported({"x": x})
        for name, expected in fn(x).items():
            assert same_bits(got[name], expected), (n, name)


def test_the_default_dtype_of_the_host_does_not_matter(tmp_path):
    def fn(x):
        return {
            "new": torch.zeros(3) + torch.full((3,), 0.1),
            "range": torch.arange(x.shape[0]) * 0.1,
            "quotient": x.long() / 3,
            "root": (x > 0).sum().sqrt(),
            "mask": torch.where(x > 0, 0.1, 0.2),
        }

    x = torch.randn(5, 3)
    files = tmp_path / "f.pt", tmp_path / "f.pt2"
    fr.export.export_step(fn, {"x": x}, files[0], dynamic={"x": {0: "n"}}, formats=("torchscript", "pt2"))
    for file in files:
        exported = fr.export.load_exported(file, trusted=True)
        assert repr(exported).splitlines()[:3] == ["exported step fn", "forward:", "  in   x: float32[n, 3]"]
        expected = fn(x)
        torch.set_default_dtype(torch.float64)
        try:
            got = exported({"x": x})
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(same_bits(got[name], expected[name]) for name in expected)


def test_matrix_products_that_torchscript_would_reorder(tmp_path):
    """Of `addmm` it makes two operations, and sums of products it computes as one."""

    def fn(w, b, x):
        y = torch.addmm(b, x, w)
        return y, sum(x.mm(w * k).relu() for k in range(6)), sum(x.mm(w + k) for k in range(6))

    torch.manual_seed(0)
    example = {"w": torch.randn(4, 3), "b": torch.randn(3), "x": torch.randn(8, 4)}
    assert fr.export.export_step(fn, example, tmp_path / "f.pt", dynamic={"x": {0: "n"}}).bitwise


def test_complex_numbers_inside(tmp_path):
    """A file takes and returns none; that `abs` makes a float of one is no reason to make it a float first."""

    def fn(x):
        z = torch.fft.fft(x)
        return {"abs": z.abs(), "angle": z.angle(), "power": (z * z.conj()).real, "pair": torch.view_as_real(z)}

    fr.export.export_step(fn, {"x": torch.randn(5, 3)}, tmp_path / "f.pt", dynamic={"x": {0: "n"}}, check_sizes=(1,))
    exported = fr.export.load_exported(tmp_path / "f.pt", trusted=True)
    for n in (1, 4, 12):
        x = torch.randn(n, 3)
        assert all(same_bits(y, fn(x)[name]) for name, y in exported({"x": x}).items())


def test_constants_that_are_bools(tmp_path):
    """To TorchScript they are integers, and so were a sum, a product or an exclusive or with one."""

    def fn(x, y):
        chosen = torch.where(x, True, False), torch.where(x, y, True)
        return x ^ True, x & True, x | False, x + True, x * True, y + True, x.masked_fill(x, True), *chosen

    example = {"x": torch.tensor([True, False, True]), "y": torch.randn(3)}
    fr.export.export_step(fn, example, tmp_path / "f.pt", dynamic={})
    got = fr.export.load_exported(tmp_path / "f.pt", trusted=True)(example)
    for name, expected in enumerate(fn(**example)):
        assert got[str(name)].dtype == expected.dtype and torch.equal(got[str(name)], expected)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


def test_a_dataclass_is_a_tree_if_it_is_registered(tmp_path):
    example = {"pair": Pair(torch.ones(2), torch.ones(2))}
    with pytest.raises(TypeError, match=r"'pair' is Pair.*; make it a tree, torch.export.register_dataclass\(Pair\)"):
        fr.export.export_step(lambda pair: pair.first, example, tmp_path / "f.pt", dynamic={})
    torch.export.register_dataclass(Pair)
    report = fr.export.export_step(lambda pair: Pair(pair.second, pair.first), example, tmp_path / "f.pt", dynamic={})
    method = report.manifest.methods["forward"]
    assert list(method.inputs) == ["pair.first", "pair.second"] and list(method.outputs) == ["first", "second"]


def test_an_assertion_on_numbers_is_one_in_the_file(tmp_path):
    fr.export.export_step(
        lambda x: torch.nn.functional.one_hot(x, 3), {"x": torch.arange(3)}, tmp_path / "f.pt", dynamic={"x": {0: "n"}}
    )
    exported = fr.export.load_exported(tmp_path / "f.pt", trusted=True)
    with pytest.raises(Exception, match="Class values must be smaller than num_classes"):
        exported({"x": torch.arange(4)})


@pytest.mark.parametrize("module", ["_step", "_penalty", "_load"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"funcreg.torch.export.{module}"))
    assert result.failed == 0 and result.attempted > 3

"""What cannot be exported raises the error that says what to change, and leaves nothing behind."""

import functools
import math
import random
import re
import time

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.utils._sympy.functions import FloorDiv, Mod

import funcreg.torch as fr
from export_cases import BATCH, CLASSES, labels, logits, mlp
from funcreg.torch.export import _sizes

pytestmark = pytest.mark.usefixtures("fresh_process")
X = {"x": BATCH}
CAPTURED = torch.arange(4.0)
ANCHORED = fr.anchored(fr.l2(0.1), {"x": CAPTURED})
NET = torch.nn.Linear(4, CLASSES)


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.exp()


@torch.library.custom_op("funcreg_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


def export(function, tmp_path, dynamic=X, example=None, **options):
    example = {"x": torch.randn(8, 4)} if example is None else example
    path = tmp_path / options.pop("path", "f.pt")
    return fr.export.export_step(function, example, path, dynamic=dynamic, **options)


def count_calls(x, calls=[0]):  # noqa: B006
    calls[0] += 1
    return x * calls[0]


def double_all(tensors):
    torch._foreach_mul_(tensors, 2.0)
    return tensors


def halve_until_small(x):
    while x.norm() > 1:
        x = x / 2
    return x


def table_and_catch(x):
    try:
        return x * {777: 2.0}[x.shape[0]]
    except (KeyError, TypeError):
        return x


def branch_and_catch(x):
    try:
        return x * 2 if x.sum() > 1e9 else x
    except Exception:
        return x


# What must not go through, with the error and a part of its message.
SPECIALIZED = [
    ("int", lambda x: x * int(x.shape[0]), "dimension 0 ('batch') of the input 'x' becomes a fixed number, at"),
    ("len", lambda x: x.sum() / len(x), "becomes a fixed number, at"),
    ("math", lambda x: x / math.sqrt(x.shape[0]), "test_export_refusals.py:"),
    ("loop", lambda x: sum(x[i] for i in range(x.shape[0])), "becomes a fixed number"),
    ("rows", lambda x: sum(row for row in x), "becomes a fixed number in torch.Tensor.unbind"),
    ("list", lambda x: torch.tensor([1.0] * x.shape[0]) @ x, "becomes a fixed number"),
    ("branch", lambda x: x.sum(0) if x.shape[0] > 10 else x.mean(0), "branches on dimension 0 ('batch') of the input"),
    ("one size", lambda x: x.sum(0) if x.shape[0] == 777 else x.mean(0), "branches on dimension 0 ('batch')"),
    ("product", lambda x: x.sum(0) if x.shape[0] ** 2 == 777**2 else x.mean(0), "branches on dimension 0 ('batch')"),
    ("identity", lambda x: x.sum(0) if (x.shape[0] == 777) is True else x.mean(0), "branches on dimension 0 ('batch')"),
    (
        "kind",
        lambda x: x.sum(0) if isinstance(x.shape[0], int) and x.shape[0] == 777 else x.mean(0),
        "branches on dimension 0 ('batch')",
    ),
    ("text", lambda x: x * len(str(x.shape[0])), "asks for the text of a size that is dynamic, at"),
    ("format", lambda x: x * 2 if f"{x.shape}" == "(7, 4)" else x, "asks for the text of a size that is dynamic, at"),
    ("key", table_and_catch, "asks for the hash of a size that is dynamic, at"),
    ("even", lambda x: x.sum(0) if x.shape[0] % 2 == 0 else x.mean(0), "branches on dimension 0 ('batch')"),
    ("kernel", lambda x: torch.cdist(x, x), "is another one where dimension 0 ('batch') of the input 'x' is 3 in"),
    ("larger", lambda x: x * max(x.shape), "branches on dimension 0 ('batch')"),
    (
        "blocks",
        lambda x: x.split(300)[0],
        "is another one where dimension 0 ('batch') of the input 'x' is 301 in",
    ),
]
REFUSED = [
    ("item", lambda x: x * x[0, 0].item(), "ControlFlowError", "looks at the numbers in a tensor, at"),
    ("float", lambda x: x * float(x.sum()), "ControlFlowError", "aten._local_scalar_dense"),
    ("if", lambda x: x if x.sum() > 0 else -x, "ControlFlowError", "Write branches with torch.where"),
    ("while", halve_until_small, "ControlFlowError", "looks at the numbers"),
    ("caught", branch_and_catch, "ControlFlowError", "catches what torch.Tensor.__bool__ raises at"),
    ("index", lambda x: x[x[0, 0].long()], "ControlFlowError", "indexing with index_select or gather"),
    ("mask", lambda x: x[x > 0], "ControlFlowError", "the shape of a result depends on the numbers"),
    ("unique", lambda x: torch.unique(x), "ControlFlowError", "depends on the numbers"),
    ("captured", lambda x: x + CAPTURED, "CapturedTensorError", "size=(4,)"),
    ("captured number", lambda x: x * float(CAPTURED[1]), "CapturedTensorError", "none of its arguments, at"),
    ("captured module", lambda x: NET(x), "CapturedTensorError", "size=(3, 4)"),
    ("captured anchor", lambda x: ANCHORED.value({"x": x.sum(0)}), "CapturedTensorError", "size=(4,)"),
    ("dropout", lambda x: F.dropout(x), "RandomOpError", "(aten.native_dropout.default); draw them outside"),
    ("noise", lambda x: x + torch.randn_like(x), "RandomOpError", "aten.randn_like"),
    ("permutation", lambda x: x[torch.randperm(x.shape[0])], "RandomOpError", "aten.randperm"),
    ("write", lambda x: x.add_(1), "MutationError", "aten.add_.Tensor writes into the input 'x'"),
    ("write in a view", lambda x: (x[0].detach().mul_(2), x.sum())[1], "MutationError", "aten.mul_.Tensor writes"),
    ("write to out", lambda x: torch.add(x * 1, 1, out=x), "MutationError", "writes into the input 'x'"),
    ("custom operation", lambda x: double(x), "UnsupportedOpError", "funcreg_tests.double.default is not one of"),
    ("lists", lambda x: double_all([x * 1]), "UnsupportedOpError", "_foreach_mul_.Scalar returns nothing, and Torch"),
    ("cond", lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "UnsupportedOpError", "torch.cond"),
    ("sparse", lambda x: x.to_sparse().to_dense(), "UnsupportedOpError", "cannot be computed without numbers"),
    ("device", lambda x: x.to("meta"), "BakedDeviceError", "puts a tensor on meta, and the inputs are on cpu"),
    ("numpy", lambda x: torch.from_numpy(x.numpy() * 2), "ExportError", ".numpy() is not supported"),
    ("compiled", torch.compile(lambda x: x.tanh() * 2, backend="eager"), "UnsupportedOpError", "by torch.compile"),
    ("a number", lambda x: (x, 3.0), "ResultError", "returns 3.0 as '1', and a file can return tensors only"),
    ("a size", lambda x: {"n": x.shape[0]}, "ResultError", "returns 8 as 'n'"),
    ("text", lambda x: {"x": x, "note": "hi"}, "ResultError", "returns 'hi' as 'note'"),
    ("nothing", lambda x: None, "ResultError", "returns no tensor"),
    ("complex", lambda x: torch.fft.fft(x), "ResultError", "'output' is torch.complex64; files hold float32"),
    ("a counter", count_calls, "SelfCheckError", "keeps state of its own"),
    (
        "Python's random numbers",
        lambda x: x * random.random(),
        "SelfCheckError",
        "first torchscript forward case 0 batch=8",
    ),
    ("NumPy's random numbers", lambda x: x * float(np.random.rand()), "SelfCheckError", "5 of 5 outputs"),
    ("the clock", lambda x: x * (time.perf_counter_ns() % 10007), "SelfCheckError", "reads a clock"),
    ("another kernel", lambda x: torch.linalg.svdvals(x.t() @ x), "SelfCheckError", "numbers differ, by"),
]


@pytest.mark.parametrize("ones", [1, 2])
def test_size_one_is_checked_in_every_dimension(ones, tmp_path):
    """No trace knows of size 1: a branch on it, hidden in dimensions that are 1 while others are not, is run."""
    dims = {axis: f"n{axis}" for axis in range(ones + 1)}
    with pytest.raises(fr.export.SelfCheckError, match="n0=1"):
        export(
            lambda x: x if all(n == 1 for n in x.shape[:ones]) and x.shape[ones] > 1 else x * 2,
            tmp_path,
            {"x": dims},
            {"x": torch.randn([4] * len(dims))},
            check_sizes=(1,),
        )


@pytest.mark.parametrize(
    "branch",
    [
        lambda n, m: n == 1 and m == 777,
        lambda n, m: n == 1 and m > 100,
        lambda n, m: n == 1 and int(m) == 777,
        lambda n, m: m == 1 and n == 777,
    ],
)
def test_a_branch_on_size_one_and_another_size(branch, tmp_path):
    """A symbol is never 1: at that size of one dimension the others are symbols once more."""
    example = {"x": torch.randn(4, 3), "y": torch.randn(6, 3)}
    with pytest.raises(fr.export.SpecializationError, match="export_step, at [nm] = 1: .* of the input '[xy]'"):
        export(
            lambda x, y: x.sum() if branch(x.shape[0], y.shape[0]) else y.sum(),
            tmp_path,
            {"x": {0: "n"}, "y": {0: "m"}},
            example,
        )
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_trace_has_reached_are_refused_by_the_file(tmp_path, monkeypatch):
    """What a trace assumes, `n >= 16` in a convolution, is a condition of the file if no other trace has more."""

    def fn(w, x):
        return F.conv2d(x, w)

    example = {"w": torch.randn(2, 1, 3, 3), "x": torch.randn(8, 1, 5, 5)}
    monkeypatch.setattr(_sizes, "_telling_sizes", lambda assumptions: [])
    with pytest.raises(fr.export.UnsupportedOpError, match=r"right for some sizes only .*batch >= 16.*leave 'pt2' out"):
        export(fn, tmp_path, X, example, formats=("torchscript", "pt2"))
    export(fn, tmp_path, X, example, check_sizes=(1, 5))
    exported = fr.export.load_exported(tmp_path / "f.pt", trusted=True)
    for size in (1, 5, 8, 16, 40):  # run, or assumed
        given = {**example, "x": torch.randn(size, 1, 5, 5)}
        assert torch.equal(exported(given)["output"], fn(**given))
    for size in (2, 15):
        with pytest.raises(torch.jit.Error, match=rf"batch = {size}, for which this file is not known to be right"):
            exported({**example, "x": torch.randn(size, 1, 5, 5)})
    with pytest.raises(ValueError, match="batch = 0 was not checked"):
        exported({**example, "x": torch.randn(0, 1, 5, 5)})


N, M = sympy.symbols("n m", integer=True, positive=True)
CONDITIONS = [
    sympy.Eq(FloorDiv(N, 3) * M, 2),
    FloorDiv(N - 5, 3) < M - 4,
    Mod(N, 4) < M**2 - 3,
    sympy.Max(N, M, 7) <= sympy.Min(2 * M, 9),
    sympy.Ne(N, 3) & (N >= M) | sympy.Not(sympy.Eq(N, M) | (M > 5)),
]


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_conditions_on_sizes_in_torchscript(condition):
    """The notation of every kind of assumption, against what it says in Python."""
    text = _sizes.refusal("test", _sizes.Known(condition, {"n": [1], "m": []}), {"n": "a", "m": "b"})
    assert text is not None
    script = torch.jit.CompilationUnit(f"def f(a: int, b: int) -> bool:\n    return {text}\n")
    sizes = [(a, b) for a in range(1, 12) for b in range(1, 12)]
    answers = [script.f(a, b) for a, b in sizes]
    assert answers == [a != 1 and not condition.subs({N: a, M: b}) for a, b in sizes]
    assert 0 < sum(answers) < len(answers)


def test_conditions_that_have_no_notation():
    assert _sizes.refusal("test", _sizes.Known(sympy.true, {"n": [1]}), {"n": "a"}) is None
    with pytest.raises(fr.export.SpecializationError, match=r"^test: .*sin\(n\) has no notation"):
        _sizes.refusal("test", _sizes.Known(sympy.sin(N) > 0, {}), {"n": "a"})


def test_a_matrix_that_has_no_factor(tmp_path):
    """What PyTorch raises about numbers, the file raises."""
    eye = torch.eye(3)
    export(lambda x: torch.linalg.cholesky(x), tmp_path, {}, {"x": eye * 2})
    exported = fr.export.load_exported(tmp_path / "f.pt", trusted=True)
    assert torch.equal(exported({"x": eye * 9})["output"], eye * 3)
    with pytest.raises(torch.jit.Error, match="torch.linalg.cholesky: a matrix is singular, or not positive definite"):
        exported({"x": -eye})


@pytest.mark.parametrize("name, function, message", SPECIALIZED, ids=[row[0] for row in SPECIALIZED])
def test_a_fixed_size_is_refused(name, function, message, tmp_path):
    with pytest.raises(fr.export.SpecializationError, match=re.escape(message)) as caught:
        export(function, tmp_path)
    assert "Remedy: " in str(caught.value)
    assert not list(tmp_path.iterdir())


TYPED = """
def text(x):
    return x * len(str(x.shape[0]))
def caught(x):
    try:
        return x * 2 if x.sum() > 1e9 else x
    except Exception:
        return x
"""


@pytest.mark.parametrize("name, message", [("text", "the text of a size .* at <stdin>:3"), ("caught", "at <stdin>:6")])
def test_functions_that_are_typed_in_have_no_file(name, message, tmp_path):
    names: dict = {}
    exec(compile(TYPED, "<stdin>", "exec"), names)
    with pytest.raises(fr.export.ExportError, match=message):
        export(names[name], tmp_path)


@pytest.mark.parametrize("name, function, error, message", REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(name, function, error, message, tmp_path):
    with pytest.raises(fr.export.ExportError, match=re.escape(message)) as caught:
        export(function, tmp_path)
    assert type(caught.value).__name__ == error
    assert "export_step: " in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "loss, operation",
    [
        (labels, "torch.nn.functional.cross_entropy"),
        (lambda params, x, y: F.gelu(logits(params, x)).sum() * y, "the derivative GeluBackward0"),
    ],
    ids=["labels", "gelu"],
)
def test_an_operation_that_vmap_needs_a_number_for(loss, operation, tmp_path):
    """The operation and the line are named, also in a derivative."""
    function = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    example = {"params": mlp(), "x": torch.randn(8, 4), "y": torch.randint(0, CLASSES, (8,))}
    with pytest.raises(fr.export.SpecializationError, match=rf"fixed number in {re.escape(operation)}, at .*\.py:\d+"):
        export(function, tmp_path, {"x": BATCH, "y": BATCH}, example)


def test_what_the_function_itself_raises_is_passed_on(tmp_path):
    def fn(x):
        return x.reshape(-1, 2, 4)

    with pytest.raises(RuntimeError, match="shape '.*' is invalid") as caught:
        export(fn, tmp_path)
    assert "The function itself raises this at {'batch': 1}" in caught.value.__notes__[0]
    with pytest.raises(ZeroDivisionError):
        export(lambda x: x / 0 if isinstance(x, int) else 1 / 0, tmp_path)


def test_a_size_that_is_a_special_case_is_checked_or_refused(tmp_path):
    """0 and 1 are sizes that PyTorch treats apart; another one may be checked, since it is then run."""

    def fn(x):
        return x.mean(0) if x.shape[0] == 1 else x.sum(0) * 2

    with pytest.raises(fr.export.SelfCheckError, match="batch=1, output: 4 of 4 numbers differ"):
        export(fn, tmp_path)
    export(fn, tmp_path, check_sizes=(2, 5))
    exported = fr.export.load_exported(tmp_path / "f.pt", trusted=True)
    assert exported.manifest.sizes == {"batch": {"refused": [0, 1]}}
    for size in (0, 1):
        with pytest.raises(ValueError, match=f"batch = {size} was not checked when this file was made: input x"):
            exported({"x": torch.ones(size, 4)})
    assert exported({"x": torch.ones(2, 4)})["output"].tolist() == [4.0] * 4
    # a stride of two makes another graph of two rows only, which is the same function
    message = r"'x' is 2 in torch.Tensor.__getitem__, at .*\. Remedy: add 2 to check_sizes"
    with pytest.raises(fr.export.SpecializationError, match=message):
        export(lambda x: x.flip(0)[::2], tmp_path, check_sizes=(5,), path="g.pt")
    assert export(lambda x: x.flip(0)[::2], tmp_path, check_sizes=(2, 5), path="g.pt").bitwise


def test_branches_of_pytorch_that_change_nothing_are_no_reason(tmp_path):
    """A convolution assumes a batch of 16 or more (or less), and is the same operation; padding needs a rule for
    symbols that C++ does not have."""
    example = {"w": torch.randn(2, 1, 3, 3), "x": torch.randn(8, 1, 5, 5)}
    report = export(lambda w, x: F.pad(F.conv2d(x, w), (1, 2)), tmp_path, X, example, check_sizes=(1, 15, 16, 17))
    assert report.bitwise


@pytest.mark.parametrize(
    "given, exception, message",
    [
        ({"example": {}}, TypeError, "example must be a dict of the function's arguments by name"),
        ({"example": [1]}, TypeError, "example must be a dict"),
        ({"example": {"x": 0.1}}, TypeError, "'x' is 0.1, which would be frozen into the file; make it an input"),
        ({"example": {"x": "a"}}, TypeError, "'x' is 'a'"),
        ({"example": {"x": torch.ones(2, dtype=torch.complex64)}}, TypeError, "'x' is torch.complex64; files hold"),
        ({"example": {"x": torch.eye(2).to_sparse()}}, TypeError, "'x' must be a plain dense tensor"),
        ({"example": {"x": None}}, ValueError, "example has no tensors"),
        ({"example": {"x": {"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}}}, ValueError, "two leaves of the name"),
        ({"example": {"x": {'"': torch.ones(2)}}}, ValueError, "printable ASCII without quotes"),
        ({"example": {"x": torch.ones(2, device="meta"), "y": torch.ones(2)}}, ValueError, "'x' is on meta and 'y'"),
        ({"example": {"y": torch.ones(2)}, "dynamic": {}}, TypeError, "example has no 'x'; the function takes (x)"),
        ({"example": {"x": torch.ones(2, 4), "z": torch.ones(2)}}, TypeError, "example has 'z', which is no parameter"),
        ({"example": {"x": torch.ones(1, 4)}}, ValueError, "'batch' is 1 in 'x'; give an example of 2 or more"),
        ({"example": {"x": torch.ones(0, 4)}}, ValueError, "'batch' is 0 in 'x'"),
        ({"dynamic": {"z": BATCH}}, ValueError, "dynamic names 'z', which is not in the example; nearest names: x"),
        ({"dynamic": {"x": {2: "batch"}}}, ValueError, "'x' of shape (8, 4) has no axis 2"),
        ({"dynamic": {"x": {0: 3}}}, ValueError, "dynamic['x'][0] must be a name such as 'batch', got 3"),
        ({"dynamic": {"x": {0: "n", 1: "n"}}}, ValueError, "the dimension 'n' is 8 in 'x' and 4 in 'x'"),
        ({"dynamic": {"x": 0}}, TypeError, "dynamic['x'] must be a dict of axes"),
        ({"dynamic": "x"}, TypeError, "dynamic must be a dict such as {'x': {0: 'batch'}}"),
        ({"function": NET}, TypeError, "fn is an nn.Module, whose parameters would be frozen"),
        ({"function": 3}, TypeError, "fn must be a function"),
        ({"outputs": ("a", "b")}, fr.export.ResultError, "outputs names 2 components of a tuple"),
        ({"outputs": ("a", "a")}, ValueError, "outputs must be different names"),
        ({"formats": ("onnx",)}, ValueError, "formats must be some of ('torchscript', 'pt2'), got ('onnx',)"),
        ({"formats": ()}, ValueError, "formats must be some of"),
        ({"formats": ("pt2",)}, ValueError, "path must end in .pt2"),
        ({"check_sizes": (-1,)}, ValueError, "check_sizes must be integers >= 0"),
        ({"check_sizes": ()}, ValueError, "check_sizes must be integers >= 0, one at least, got ()"),
        ({"path": "f.onnx"}, ValueError, "path must end in .pt"),
        ({"path": "nowhere/f.pt"}, FileNotFoundError, "there is no folder"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_arguments_that_do_not_fit(given, exception, message, tmp_path):
    function = given.pop("function", lambda x: x)
    with pytest.raises(exception, match=re.escape(message)):
        export(function, tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_a_positional_gap(tmp_path):
    def fn(a, b=None, *rest):
        return a + rest[0]

    with pytest.raises(TypeError, match="example must have 'b' too, since 'c' comes after it"):
        export(fn, tmp_path, {}, {"a": torch.ones(2), "c": torch.ones(2)})
    with pytest.raises(TypeError, match="has 'lam', which is no parameter"):
        export(functools.partial(lambda x: x), tmp_path, {}, {"x": torch.ones(2), "lam": torch.ones(2)})


BAD_INPUTS = [
    ({"x": None}, "input x is missing; it must be float32[batch, 4]"),
    ({"z": torch.ones(2)}, "there is no input z; the inputs are w, x, y, n"),
    ({"x": torch.ones(2, 4, dtype=torch.float64)}, "input x must be float32[batch, 4], got float64[2, 4]"),
    ({"x": torch.ones(2, 5)}, "input x must be float32[batch, 4], got float32[2, 5]"),
    ({"x": torch.ones(4)}, "input x must be float32[batch, 4], got float32[4]"),
    ({"w": torch.ones(5)}, "input w must be float32[4], got float32[5]"),
    ({"w": torch.ones(3)}, "input w must be float32[4], got float32[3]"),
    ({"y": torch.ones(3)}, "batch must be the same in the inputs x and y"),
    ({"x": torch.ones(0, 4), "y": torch.ones(0)}, "batch = 0 was not checked when this file was made: input x"),
    ({"n": torch.tensor([1])}, "input n must be int64[], got int64[1]"),
    ({"y": torch.ones(2, device="meta")}, "input y is on meta, the first one on cpu"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, fresh_process):
    path = tmp_path_factory.mktemp("inputs") / "f.pt"
    given = {"w": torch.ones(4), "x": torch.ones(3, 4), "y": torch.ones(3), "n": torch.tensor(2)}
    fr.export.export_step(lambda w, x, y, n: x @ w * n + y, given, path, dynamic={"x": BATCH, "y": BATCH})
    return fr.export.load_exported(path, trusted=True)


@pytest.mark.parametrize("changes, message", BAD_INPUTS, ids=[message[:40] for _, message in BAD_INPUTS])
def test_a_file_checks_its_inputs(exported, changes, message):
    """In the file itself, so also in C++: the module is called without anything of this package in between."""
    inputs = {"w": torch.ones(4), "x": torch.ones(2, 4), "y": torch.ones(2), "n": torch.tensor(2)}
    assert exported.module(inputs)["output"].tolist() == [9.0, 9.0]
    inputs = {name: x for name, x in {**inputs, **changes}.items() if x is not None}
    with pytest.raises(torch.jit.Error, match=re.escape(message)):
        exported.module(inputs)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        exported(inputs)


def test_calls_that_do_not_fit(exported):
    with pytest.raises(ValueError, match="no method 'prox'; the file has forward"):
        exported({}, method="prox")
    with pytest.raises(TypeError, match=r"the input 'w' must be a tensor, got float"):
        exported({"w": 0.1})

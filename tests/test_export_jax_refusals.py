"""What the JAX wing does not export, and arguments that do not fit: each its own error, and nothing left behind."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

import funcreg.jax as fr
from export_jax_cases import BATCH, batch, exported

pytestmark = pytest.mark.usefixtures("fresh_jax_process")

ARRAY, KEY = jnp.arange(3.0), jax.random.key(0)
COUNTER = itertools.count()


def branch_on_numbers(x):
    return x if x.sum() > 0 else -x


def compare_and_catch(x):
    try:
        return 2 * x if x.shape[0] > 7 else x
    except jax.errors.InconclusiveDimensionOperation:
        return x


REFUSED = {
    "captured": (lambda x: x * ARRAY[None], "CapturedTensorError", r"none of its arguments: float32\[3\]; pass it as"),
    "captured in jit": (
        lambda x: jax.jit(lambda z: z * ARRAY[None])(x),
        "CapturedTensorError",
        "none of its arguments",
    ),
    "captured key": (lambda x: x * jax.random.uniform(KEY), "CapturedTensorError", "key<fry>"),
    "captured number": (lambda x: x * ARRAY[0], "CapturedTensorError", r"float32\[3\]"),
    "branch": (branch_on_numbers, "ControlFlowError", r"refusals.py:\d+ \(return x if x.sum"),
    "mask": (lambda x: x[x > 0], "ControlFlowError", "multiply by the mask"),
    "numpy": (lambda x: np.asarray(x), "ControlFlowError", "looks at the numbers"),
    "equal": (
        lambda x: 2 * x if x.shape[0] == 7 else x,
        "SpecializationError",
        r"asks for n == 7, at .*als.py:\d+",
    ),
    "unequal": (lambda x: 2 * x if x.shape[0] != 7 else x, "SpecializationError", "asks for n != 7"),
    "among": (lambda x: 2 * x if x.shape[0] in (4, 7) else x, "SpecializationError", "asks for n == 4"),
    "truth": (lambda x: 2 * x if x.shape[0] % 7 else x, "SpecializationError", "asks for mod.n, 7. == 0"),
    "key": (lambda x: {7: x}.get(x.shape[0], 2 * x), "SpecializationError", "asks for n among the keys of a dict"),
    "member": (lambda x: 2 * x if x.shape[0] in {7, 9} else x, "SpecializationError", "asks for n among the keys"),
    "text": (lambda x: x * len(str(x.shape[0])), "SpecializationError", r"asks for the text of n, at .*als.py:\d+"),
    "format": (lambda x: 2 * x if f"{x.shape}" == "(7, 3)" else x, "SpecializationError", "asks for the text of n, at"),
    "caught": (compare_and_catch, "SpecializationError", r"by an error that it catches .*als.py:\d+"),
    "shape": (lambda x: 2 * x if x.shape == (7, 3) else x, "SpecializationError", "asks for n == 7"),
    "greater": (
        lambda x: 2 * x if x.shape[0] > 7 else x,
        "SpecializationError",
        "has to be a number, at .*als.py",
    ),
    "float": (lambda x: x / float(x.shape[0]), "SpecializationError", r"\(n\) has to be a number"),
    "loop": (lambda x: sum(row for row in x), "SpecializationError", "jax.lax.map instead of a loop"),
    "broadcast": (
        lambda x: x + np.ones((8, 3), np.float32),
        "ExportError",
        "incompatible shapes.*must be named in all",
    ),
    "callback": (lambda x: jax.debug.print("{}", x.sum()) or x, "UnsupportedOpError", "calls back into Python"),
    "state": (lambda x: x + next(COUNTER), "SelfCheckError", "does not return what the function returns.*keeps state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_says_what_to_change(tmp_path, name):
    fn, error, message = REFUSED[name]
    with pytest.raises(fr.export.ExportError, match=rf"(?s)^export_step: .*{message}") as raised:
        fr.export.export_step(
            fn, {"x": np.ones((8, 3), np.float32)}, tmp_path / "f.jax", dynamic={"x": {0: "n"}}, check_sizes=(8,)
        )
    assert type(raised.value).__name__ == error
    assert list(tmp_path.iterdir()) == []


def test_functions_that_are_typed_in_have_no_file(tmp_path):
    names: dict = {}
    exec(compile("def fn(x):\n    return x * len(str(x.shape[0]))\n", "<stdin>", "exec"), names)
    with pytest.raises(fr.export.SpecializationError, match="the text of n, at <stdin>:2"):
        fr.export.export_step(names["fn"], {"x": ARRAY}, tmp_path / "f.jax", dynamic={"x": {0: "n"}}, check_sizes=(2,))


def test_comparisons_that_have_an_answer_are_allowed(tmp_path):
    """What is so at every size, or at none; and the classes of JAX are left as they were."""
    classes = type(jax_export.symbolic_shape("n")[0]), jax.errors.InconclusiveDimensionOperation
    before = [dict(vars(cls)) for cls in classes]

    def fn(x, y):
        n, m = x.shape[0], y.shape[0]
        assert n == m and n != 0 and n + 1 != m and n != "n" and x.shape != (*y.shape, 5)
        assert n and n + 1
        return x

    _, loaded = exported(tmp_path, fn, batch(), BATCH, check_sizes=(2,))
    assert [dict(vars(cls)) for cls in classes] == before
    np.testing.assert_array_equal(loaded(batch())["output"], batch()["x"])
    fr.export.export_step(
        lambda x: -x if x.shape[0] == 7 else x, {"x": np.ones(7, np.float32)}, tmp_path / "g.jax", dynamic={}
    )


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"example": {}}, TypeError, "example must be a dict of the function's arguments .* got an empty one"),
        ({"example": {"x": 1.0}}, TypeError, r"'x' is 1.0, which would be frozen into the file; make it an input, jnp"),
        ({"example": {"x": KEY}}, TypeError, r"'x' is a typed PRNG key, .* pass jax.random.key_data"),
        ({"example": {"x": np.ones(2, np.complex64)}}, TypeError, "'x' is complex64; files hold float32, "),
        ({"example": {"y": ARRAY}}, TypeError, r"example has no 'x'; the function takes \(x\)"),
        ({"example": {"x": ARRAY, "x'": ARRAY}, "fn": lambda *a: a}, ValueError, "printable ASCII without quotes"),
        ({"dynamic": {"z": {0: "n"}}}, ValueError, "dynamic names 'z', which is not in the example; nearest names: x"),
        ({"dynamic": {"x": {1: "n"}}}, ValueError, r"'x' of shape \(3,\) has no axis 1"),
        ({"dynamic": {"x": {0: "max"}}}, ValueError, "cannot call dimensions 'max'.*names of functions there"),
        ({"dynamic": {"x": {0: "n"}}, "example": {"x": ARRAY[:1]}}, ValueError, "give an example of 2 or more"),
        (
            {"outputs": ("a", "b")},
            fr.export.ResultError,
            "outputs names 2 components of a tuple, the function",
        ),
        ({"fn": lambda x: 1.0}, fr.export.ResultError, "returns 1.0 as 'output', and a file can return arrays only"),
        ({"fn": lambda x: ()}, fr.export.ResultError, "returns no array"),
        ({"check_sizes": (0,)}, ValueError, r"check_sizes must be integers >= 1, one at least, got \(0,\)"),
        ({"platforms": "cpu"}, ValueError, r"platforms must be some of \('cpu', 'cuda', 'rocm', 'tpu'\), got 'cpu'"),
        ({"platforms": ("tpu",)}, ValueError, "platforms must have 'cpu' or 'cpu', where the file can be checked"),
        ({"path": "f.pt"}, ValueError, "path must end in .jax"),
        ({"path": "none/f.jax"}, FileNotFoundError, "there is no folder"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, changes, error, message):
    given = {"fn": lambda x: x, "example": {"x": ARRAY}, "path": "f.jax", "dynamic": {}, **changes}
    with pytest.raises(error, match=f"export_step: .*{message}"):
        fr.export.export_step(**{**given, "path": tmp_path / given["path"]})
    assert list(tmp_path.iterdir()) == []


def test_without_flatbuffers_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("funcreg.jax.export._step.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"export_step: .* need flatbuffers: pip install 'funcreg\[jax\]'"):
        fr.export.export_step(lambda x: x, {"x": ARRAY}, tmp_path / "f.jax", dynamic={})


def test_what_the_function_raises_is_passed_on(tmp_path):
    def fn(x):
        if x.shape[0] == 3:
            raise KeyError("three")
        return x

    with pytest.raises(KeyError, match="three") as raised:
        fr.export.export_step(fn, {"x": jnp.ones(4)}, tmp_path / "f.jax", dynamic={"x": {0: "n"}}, check_sizes=(2, 3))
    assert "The function itself raises this at {'n': 3}, which check_sizes asks for; " in raised.value.__notes__[-1]

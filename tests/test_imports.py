"""Who imports what, in fresh interpreters; what the wheel contains; no package named functorch."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import funcreg

ROOT = Path(funcreg.__file__).parent.parent
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax", "optax"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def loaded(statements):
    """The top-level modules that a fresh interpreter has after some statements."""
    code = f"import sys\n{statements}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_funcreg_alone_imports_no_framework():
    assert not {*FRAMEWORKS, "numpy"} & loaded("import funcreg; funcreg.__version__")


def test_the_torch_wing_imports_no_jax():
    modules = loaded("import funcreg.torch as fr; fr.l1(0.1) + fr.group_lasso(0.1, axis=-1); fr.optax.adam(0.1)")
    assert "torch" in modules
    assert not {"jax", "jaxlib", "flax", "optax", "interop"} & modules


def test_the_jax_wing_imports_no_torch():
    modules = loaded("import funcreg.jax as fr; fr.l1(0.1) + fr.group_lasso(0.1, axis=-1)")
    assert {"jax", "optax"} <= modules
    assert not {"torch", "flax", "interop"} & modules


@pytest.mark.slow
def test_interop_is_an_alias_that_imports_both_frameworks_when_it_is_used():
    assert "interop" not in loaded("import funcreg")
    modules = loaded("import funcreg; from funcreg import interop; assert interop is funcreg.interop; interop.to_jax")
    assert {"torch", "jax", "interop"} <= modules
    assert not {"flax", "optax"} & modules
    loaded("from funcreg.interop import to_jax; import funcreg.interop, interop; assert funcreg.interop is interop")


def test_the_modules_under_the_alias_are_those_of_interop():
    """Second copies have classes of their own and a registry in which nobody looks."""
    loaded("""
from funcreg.interop.testing import assert_parity
from funcreg.interop.rules import register
import funcreg.interop.match, funcreg.interop.locate, funcreg.interop.optimizers.schedules
from funcreg import interop
import interop.rules, interop.testing
assert register is interop.rules.register and assert_parity is interop.testing.assert_parity
assert callable(interop.match) and callable(interop.locate)
twice = [name for name in sys.modules if name.startswith("interop.") and f"funcreg.{name}" in sys.modules]
assert len(twice) > 10 and all(sys.modules[name] is sys.modules[f"funcreg.{name}"] for name in twice)
try:
    import funcreg.interop.nothing
except ModuleNotFoundError as error:
    assert error.name == "interop.nothing"
""")


@pytest.mark.slow
def test_interop_testing_is_there_without_an_import_of_its_own():
    loaded("from funcreg import interop; assert 'interop.testing' not in sys.modules; interop.testing.assert_parity")
    loaded("import interop; assert interop.testing.assert_parity and not hasattr(interop, 'tests')")


@pytest.mark.parametrize("form", ["package", "module", "folder"])
def test_another_package_called_interop_is_told_from_ours(form, tmp_path):
    """One exists on the package index; a folder without `__init__.py` is a package as well."""
    place = tmp_path / ("interop.py" if form == "module" else "interop")
    if form != "module":
        place.mkdir()
    file = place / "__init__.py" if form == "package" else place
    if form != "folder":
        file.write_text("to_jax = None")
    # a folder shadows only where no package of that name is found: a copy of funcreg without its interop, and -S,
    # without site-packages
    roots = [tmp_path, ROOT]
    if form == "folder":
        roots = [tmp_path]
        (tmp_path / "funcreg").symlink_to(ROOT / "funcreg")
    code = f"import sys; sys.path[:0] = {list(map(str, roots))}; import funcreg; from funcreg import interop"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "ImportError: funcreg.interop: another installed package of the name interop shadows" in done.stderr
    assert f"{file};" in done.stderr


@pytest.mark.parametrize("missing", ["torch", "jax"])
def test_interop_without_a_framework_says_what_to_install(missing):
    loaded(f"""
import sys
sys.modules[{missing!r}] = None
import funcreg
try:
    funcreg.interop
except ImportError as error:
    assert "needs both frameworks, and {missing} is not installed: pip install 'funcreg[all]'" in str(error), error
else:
    raise AssertionError
""")


def test_funcreg_has_no_other_lazy_names():
    with pytest.raises(AttributeError, match="module 'funcreg' has no attribute 'jaxx'"):
        _ = funcreg.jaxx  # pyright: ignore[reportAttributeAccessIssue]


def imports_of(path):
    """The modules that a file imports, relative ones as dots and names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("wing, other", [("torch", "jax"), ("jax", "torch")])
def test_imports_run_one_way(wing, other):
    """Not even inside functions: wings import neither each other nor interop, the common files neither wing."""
    for path in (ROOT / "funcreg" / wing).rglob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in (other, "interop", "functorch"), f"{path.name} imports {name}"
            assert not re.search(rf"(^funcreg|^\.+)\.?{other}\b", name), f"{path.name} imports {name}"
    for path in (ROOT / "funcreg").glob("*.py"):
        for name in imports_of(path):
            assert name.split(".")[0] not in ("torch", "jax", "optax", "flax", "functorch"), (
                f"{path.name} imports {name}"
            )


def test_the_wheel_has_the_two_top_level_names(tmp_path):
    there = {"funcreg", "interop"}
    assert set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == there
    assert all((ROOT / name / "__init__.py").exists() for name in there)
    if importlib.util.find_spec("hatchling") is None:
        return  # the configuration above is all there is to see: hatchling is a requirement of the build, not of tests
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == there
    assert {"funcreg/py.typed", "interop/arrays.py"} <= set(files)


def test_functorch_is_what_torch_ships_and_no_requirement():
    """The package of that name is frozen and pins torch < 2.1; its functions live in torch.func."""
    project = PYPROJECT["project"]
    required = [project["dependencies"], *project["optional-dependencies"].values()]
    assert not [line for lines in required for line in lines if re.match(r"functorch\b", line)]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("functorch")
    import functorch

    assert Path(functorch.__file__).parent.parent == Path(torch.__file__).parent.parent
    x = torch.tensor([3.0, -4.0])
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda x: x**2))(x), 2 * x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "We've integrated functorch into PyTorch", FutureWarning)
        assert torch.equal(functorch.vmap(functorch.grad(lambda x: x**2))(x), 2 * x)

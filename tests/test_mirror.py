"""The two wings are written by hand and say the same: names, parameters, defaults and docstrings."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import funcreg
from cases import RECORDS
from wings import JAX, TORCH, each_wing

TORCH_ONLY = {"optax", "attach", "Handle"}
ROLES = {"weights", "biases", "norms"}  # given to `.on`, which calls them; users do not
# Docstrings of these are equal byte for byte, those of all others in their first paragraph.
SAME_TEXT = {record.factory for record in RECORDS} | ROLES | {"anchored", "layerwise", "Penalty"}
SECTIONS = ("Args", "Returns", "Raises", "Reference", "Example")


def public(wing):
    """The names that the contents page of a wing lists, with what they are."""
    return contents(wing.fr)


def contents(module):
    source = Path(inspect.getfile(module)).read_text()
    names = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                assert alias.asname == alias.name, f"{alias.name}: write `import {alias.name} as {alias.name}`"
                names.append(alias.name)
    return {name: getattr(module, name) for name in names}


def parameters(function):
    """Names, kinds and defaults; annotations are each framework's own."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def doc(thing):
    text = inspect.getdoc(thing)
    assert text, f"{thing} has no docstring"
    return text


def sections(text):
    """The docstring as {section: its text}; the part before the first section is ""."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def without_example(text):
    return {name: part for name, part in sections(text).items() if name != "Example"}


COMMON = sorted(set(public(JAX)) - {"functional", "export"})
LEAVES = sorted(JAX.fr.functional.__all__)
FUNCTIONS = [(name, thing) for name, thing in public(TORCH).items() if inspect.isfunction(thing) and name not in ROLES]
DOCUMENTED = [
    *((f"{wing}.{name}", thing) for wing in (TORCH, JAX) for name, thing in public(wing).items()),
    *((f"{wing}.functional.{name}", getattr(wing.fr.functional, name)) for wing in (TORCH, JAX) for name in LEAVES),
]


def test_both_wings_have_the_same_names():
    assert set(public(TORCH)) - set(public(JAX)) == TORCH_ONLY
    assert set(public(JAX)) - set(public(TORCH)) == set()
    assert TORCH.fr.functional.__all__ == JAX.fr.functional.__all__


@each_wing
def test_what_is_not_public_begins_with_an_underscore(wing):
    packages = {"penalties", "optax", "functional"}
    assert {name for name in vars(wing.fr) if not name.startswith("_")} - packages == set(public(wing)) - packages


@each_wing
def test_help_of_a_wing_names_all_that_is_public(wing):
    """`help` lists nothing that is defined in another file."""
    assert set(public(wing)) <= set(re.findall(r"\w+", doc(wing.fr)))


@pytest.mark.parametrize("name", COMMON)
def test_same_parameters_and_defaults(name):
    ours, theirs = public(TORCH)[name], public(JAX)[name]
    if ours is theirs:  # bookkeeping is shared
        return
    assert parameters(ours) == parameters(theirs)
    if inspect.isclass(ours):
        methods = {m for m in dir(ours) if not m.startswith("_")}
        assert methods == {m for m in dir(theirs) if not m.startswith("_")}
        for method in methods:
            f, g = getattr(ours, method), getattr(theirs, method)
            assert not inspect.isfunction(f) or (parameters(f), doc(f)) == (parameters(g), doc(g))


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_functions_are_the_same(name):
    ours, theirs = (getattr(wing.fr.functional, name) for wing in (TORCH, JAX))
    assert parameters(ours) == parameters(theirs)
    assert without_example(doc(ours)) == without_example(doc(theirs))
    assert ours is not theirs  # mathematics is written twice


@pytest.mark.parametrize("name", COMMON)
def test_same_docstrings(name):
    ours, theirs = doc(public(TORCH)[name]), doc(public(JAX)[name])
    if name in SAME_TEXT:
        assert without_example(ours) == without_example(theirs)
    else:
        assert ours.split("\n\n")[0] == theirs.split("\n\n")[0]


def test_exports_are_the_same_as_far_as_the_formats_go():
    """What JAX's programs cannot do, write into arguments or draw by themselves, needs no error there."""
    ours, theirs = (contents(wing.fr.export) for wing in (TORCH, JAX))
    assert ours.keys() - theirs.keys() == {"export_penalty", "MutationError", "RandomOpError", "BakedDeviceError"}
    assert theirs.keys() - ours.keys() == set()
    own = {"formats", "platforms"}
    for name, thing in theirs.items():
        if thing is ours[name]:
            continue
        both = [[p for p in parameters(side[name]) if p[0] not in own] for side in (ours, theirs)]
        assert both[0] == both[1]
        if name == "Exported":
            assert parameters(ours[name].__call__) == parameters(thing.__call__)
        for function in (ours[name], thing):
            if inspect.isfunction(function):
                said = re.findall(r"^    (\w+): ", sections(doc(function))["Args"], flags=re.MULTILINE)
                assert said == list(inspect.signature(function).parameters)


def test_penalties_have_files_of_the_same_names_that_begin_alike():
    home = Path(funcreg.__file__).parent
    ours, theirs = (
        {path.name: path.read_text() for path in (home / wing / "penalties").glob("*.py")} for wing in ("torch", "jax")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].split("\n")[0] == theirs[name].split("\n")[0]
        functions = [re.findall(r"^def ([a-z]\w*)", text[name], flags=re.MULTILINE) for text in (ours, theirs)]
        assert functions[0] == functions[1]


@pytest.mark.parametrize("where, thing", DOCUMENTED, ids=[where for where, _ in DOCUMENTED])
def test_every_public_function_explains_its_parameters_and_its_result(where, thing):
    text = doc(thing)
    assert re.match(r"[A-Z`].*[.,:;]$", text.split("\n")[0]) or "\n" in text.split("\n\n")[0]
    if not inspect.isfunction(thing):
        return
    if where.split(".")[-1] in ROLES:
        assert text.startswith("Role: ")
        return
    names = list(inspect.signature(thing).parameters)
    said = sections(text)
    assert "Returns" in said
    # Every parameter and nothing else, in the order of the signature.
    assert re.findall(r"^    (\w+): ", said.get("Args", ""), flags=re.MULTILINE) == names

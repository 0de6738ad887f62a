"""Leaf functions: public names, plain positional signatures, scriptable."""

import inspect
import warnings
from functools import cache

import jax
import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from cases import CASES, RECORDS, SHAPES, STEP
from funcreg.torch import functional
from wings import TORCH, each_wing

LEAVES = [record for record in RECORDS if record.has_leaf]
KINDS = ("", "grad_", "prox_")
leaf_cases = pytest.mark.parametrize("case", [c for c in CASES if c.record.has_leaf], ids=str)


def names_of(record):
    return [k + record.factory for k in KINDS if k != "grad_" or record.has_gradient]


@cache
def scripted(name):
    """`torch.jit.script` of a leaf function; torch calls it deprecated and the export of this library needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return torch.jit.script(getattr(functional, name))


@each_wing
def test_the_public_leaf_functions_are_those_of_the_table(wing):
    listed = wing.fr.functional.__all__
    assert listed == sorted(listed)
    assert set(listed) == {name for record in LEAVES for name in names_of(record)}
    public = {name for name in vars(wing.fr.functional) if not name.startswith("_")}
    assert public == set(listed)


@each_wing
@pytest.mark.parametrize("record", LEAVES, ids=lambda record: record.factory)
def test_leaf_functions_are_positional_and_named_as_the_strengths(wing, record):
    grouped = "group" in record.factory
    for name in names_of(record):
        parameters = inspect.signature(getattr(wing.fr.functional, name)).parameters
        want = ["x", *(["step_size"] if name.startswith("prox_") else []), *record.strengths]
        assert list(parameters) == want + (["axis", "group_scale"] if grouped else [])
        assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == (
            {"group_scale": "sqrt_size"} if grouped else {}
        )


@pytest.mark.parametrize("record", LEAVES, ids=lambda record: record.factory)
def test_torch_leaf_functions_are_annotated_with_what_torchscript_reads(record):
    plain = {"x": Tensor, "step_size": Tensor, "axis": list[int], "group_scale": str}
    for name in names_of(record):
        signature = inspect.signature(getattr(functional, name))
        assert signature.return_annotation is Tensor
        for argument, parameter in signature.parameters.items():
            assert parameter.annotation is plain.get(argument, float) or argument == "axis"
            assert argument != "axis" or parameter.annotation == list[int]


@leaf_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_scripted_leaf_functions_equal_eager_ones_bit_for_bit(case, dtype):
    params = case.params(TORCH, str(dtype).removeprefix("torch."))
    steps = case.steps(TORCH, params, "float32")
    for name in names_of(case.record):
        script, eager = scripted(name), getattr(functional, name)
        for leaf, x in params.items():
            x = torch.tensor(x, dtype=dtype)
            rest = (*case.strengths, *case.resolved(TORCH, tuple(x.shape)))
            step = torch.tensor(steps[leaf], dtype=dtype)
            for first in ((torch.tensor(STEP, dtype=dtype),), (step,)) if name.startswith("prox_") else ((),):
                want = eager(x, *first, *rest)
                assert want.dtype == dtype
                assert want.shape == (x.shape if name != case.record.factory else ())
                for _ in range(2):  # TorchScript looks at the types in the first call and specializes in the second
                    torch.testing.assert_close(script(x, *first, *rest), want, rtol=0, atol=0)


@each_wing
@leaf_cases
def test_leaf_functions_are_what_the_penalty_lifts_to_trees(wing, case):
    shape = SHAPES[case.shapes[-1]]
    with wing.precision("float64"):
        x = wing.array(case.params(wing, "float64")[case.shapes[-1]], "float64")
        penalty, resolved = case.make(wing.fr), case.resolved(wing, shape)

        def run(x):
            leaf, tree = [], {"w": x}
            for kind, lifted in (("", penalty.value), ("grad_", penalty.grad), ("prox_", penalty.prox)):
                if kind == "grad_" and not case.record.has_gradient:
                    continue
                f = getattr(wing.fr.functional, kind + case.record.factory)
                # the step as an array, as TorchScript takes it, and as the number it may be as well
                steps = (wing.array(STEP, "float64"), STEP) if kind == "prox_" else (None,)
                for step in steps:
                    first = () if step is None else (step,)
                    y = lifted(tree, *first)
                    leaf.append((f(x, *first, *case.strengths, *resolved), y if kind == "" else y["w"]))
            return leaf

        for got, want in wing.numpy(wing.quick(run)(x)):
            np.testing.assert_allclose(got, want, rtol=4 * oracles.ULP, atol=4 * oracles.ULP)


@each_wing
@pytest.mark.parametrize("name", ["l1", "l2", "elastic_net", "group_lasso"])
def test_a_step_must_broadcast_to_the_point(wing, name):
    rest = {"elastic_net": (0.1, 0.2), "group_lasso": (0.1, [-2, -1])}.get(name, (0.1,))
    prox = getattr(wing.fr.functional, f"prox_{name}")
    rng = np.random.default_rng(0)
    x, step = wing.array(rng.standard_normal((3, 2, 2))), rng.random((3, 2, 2))
    with jax.numpy_rank_promotion("allow"):
        for cut in (np.s_[:1], np.s_[0], np.s_[:, :1], np.s_[0, 0]):
            narrow = np.broadcast_to(step[cut], step.shape)
            got, want = prox(x, wing.array(step[cut]), *rest), prox(x, wing.array(narrow), *rest)
            np.testing.assert_allclose(wing.numpy(got), wing.numpy(want), rtol=1e-6)
    for shape in ((4, 3, 2, 2), (1, 4), (1, 3, 2, 2), (2,) * 2 + (3,), (5,)):
        message = rf"prox: step_size must have a shape that broadcasts to that of x, \[3, 2, 2\], got \[{shape[0]}"
        with pytest.raises(ValueError, match=message):
            prox(x, wing.array(np.ones(shape)), *rest)


@each_wing
def test_strengths_of_l1_and_l2_may_be_arrays_that_weigh_the_coordinates(wing):
    rng = np.random.default_rng(0)
    x, lam = rng.standard_normal((3, 4)), rng.uniform(0, 2, (3, 4))
    f = wing.fr.functional
    with wing.precision("float64"):
        x_, lam_, step = (wing.array(a, "float64") for a in (x, lam, 0.5))
        got = wing.numpy([f.l1(x_, lam_), f.l2(x_, lam_), f.grad_l1(x_, lam_), f.grad_l2(x_, lam_)])
        got += wing.numpy([f.prox_l1(x_, step, lam_), f.prox_l2(x_, step, lam_)])
    want = [np.sum(lam * np.abs(x)), np.sum(lam * x**2) / 2, lam * np.sign(x), lam * x]
    want += [oracles.prox_sum(x, 0.5, l1=lam), oracles.prox_sum(x, 0.5, quadratic=[(lam, 0)])]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-15)

"""Every penalty of the table as a file: value, gradient and prox, with strengths as inputs."""

import numpy as np
import pytest
import torch

import funcreg.torch as fr
from cases import CASES, STEP
from export_cases import same_bits
from wings import TORCH

pytestmark = pytest.mark.usefixtures("fresh_process")


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def methods_of(case):
    has = {"value": True, "grad": case.record.has_gradient, "prox": case.record.has_prox}
    return tuple(method for method, there in has.items() if there)


def results(penalty, params, methods, step):
    """What the penalty itself returns, by the names of the file."""
    found = {}
    for method in methods:
        tree = penalty.prox(params, step) if method == "prox" else getattr(penalty, method)(params)
        found[method] = {"value": tree} if method == "value" else {f"params.{name}": x for name, x in tree.items()}
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_penalty_of_the_table(case, tmp_path):
    """The strengths of the call are not those of the export, and the parameters are others too."""
    params = TORCH.array(case.params(TORCH, "float32"), "float32")
    exported_with = case.make(fr, *(2 * s + 0.25 for s in case.strengths))
    methods = methods_of(case)
    report = fr.export.export_penalty(exported_with, params, tmp_path / "p.pt", methods=methods)
    assert report.bitwise and report.compared == 1 + len(params) * (len(methods) - 1)
    exported = fr.export.load_exported(tmp_path / "p.pt", trusted=True)
    names = [name for name in report.manifest.methods["value"].inputs if not name.startswith("params.")]
    strengths = dict(zip(names, map(scalar, case.strengths), strict=True))
    shuffled = {name: x.flip(tuple(range(x.ndim))) * 1.5 for name, x in params.items()}
    for given in (params, shuffled):
        for method, expected in results(case.make(fr), given, methods, STEP).items():
            also = {"step_size": scalar(STEP)} if method == "prox" else {}
            got = exported({"params": given, **strengths, **also}, method=method)
            assert got.keys() == expected.keys()
            for name in expected:
                assert same_bits(got[name], expected[name]), (method, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, tmp_path):
    params = {"w": torch.randn(4, 3).to(dtype), "count": torch.tensor(3)}
    penalty = fr.sparse_group_lasso(0.1, 0.2, axis=-1)
    fr.export.export_penalty(penalty, params, tmp_path / "p.pt")
    exported = fr.export.load_exported(tmp_path / "p.pt", trusted=True)
    strengths = {"l1.lam": scalar(0.1), "group_lasso.lam": scalar(0.2)}
    expected = penalty.prox(params, 0.5)
    got = exported({"params": params, **strengths, "step_size": scalar(0.5)}, method="prox")
    assert same_bits(got["params.w"], expected["w"]) and got["params.w"].dtype == dtype
    assert same_bits(got["params.count"], params["count"])  # passed over


def test_the_names_of_strengths(tmp_path):
    """Of several parts of one kind, of a factor, of an anchor and an importance."""
    params = {"a": torch.randn(3), "b": torch.randn(2)}
    anchor, importance = {"a": torch.randn(3)}, {"a": torch.rand(3)}
    penalty = fr.l1(0.1).on("a") + 2.0 * fr.l1(0.2).on("b") + fr.anchored(fr.l2(0.3), anchor, importance).on("a")
    fr.export.export_penalty(penalty, params, tmp_path / "p.pt")
    exported = fr.export.load_exported(tmp_path / "p.pt", trusted=True)
    strengths = {
        "l1.lam": scalar(0.1),
        "l1_2": {"lam": scalar(0.2), "weight": scalar(2.0)},
        "l2": {"lam": scalar(0.3), "anchor": anchor, "importance": importance},
    }
    got = exported({"params": params, **strengths}, method="value")
    assert same_bits(got["value"], penalty.value(params))
    numbers = {name: np.asarray(x) for name, x in params.items()}
    by_hand = 0.1 * abs(numbers["a"]).sum() + 0.4 * abs(numbers["b"]).sum()
    by_hand += 0.15 * (importance["a"].numpy() * (numbers["a"] - anchor["a"].numpy()) ** 2).sum()
    assert float(got["value"]) == pytest.approx(by_hand, rel=1e-6)


def test_autograd_goes_through_a_file(tmp_path):
    """Also at the kink, where the derivative is the minimal-norm subgradient."""
    penalty = fr.l1(0.5) + fr.group_lasso(0.25, axis=-1)
    params = {"w": torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]])}
    fr.export.export_penalty(penalty, params, tmp_path / "p.pt", methods=("value",))
    module = fr.export.load_exported(tmp_path / "p.pt", trusted=True).module
    w = params["w"].clone().requires_grad_()
    module.value({"params.w": w, "l1.lam": scalar(0.5), "group_lasso.lam": scalar(0.25)})["value"].backward()
    assert torch.equal(w.grad, penalty.grad(params)["w"])


def test_what_a_penalty_lacks_is_told_by_its_own_error(tmp_path):
    params = {"w": torch.ones(2)}
    with pytest.raises(fr.NoGradError, match="non_negative is an indicator"):
        fr.export.export_penalty(fr.non_negative(), params, tmp_path / "p.pt")
    with pytest.raises(fr.NoProxError, match="mine has no proximal operator"):
        fr.export.export_penalty(fr.custom("mine", lambda x, lam: lam * x.sum(), lam=0.1), params, tmp_path / "p.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, exception, message",
    [
        ({"penalty": 0.1}, TypeError, "penalty must be a penalty such as fr.l1"),
        ({"params": {"n": torch.tensor(3)}}, ValueError, "params has no floating-point tensor"),
        ({"methods": ("value", "gradient")}, ValueError, "methods must be some of ('value', 'grad', 'prox')"),
        ({"methods": "value"}, ValueError, "methods must be some of"),
        ({"path": "p.pth"}, ValueError, "path must end in .pt"),
    ],
)
def test_wrong_arguments(given, exception, message, tmp_path):
    arguments = {"penalty": fr.l1(0.1), "params": {"w": torch.ones(2)}, "path": "p.pt", **given}
    path = tmp_path / arguments.pop("path")
    with pytest.raises(exception) as caught:
        fr.export.export_penalty(arguments.pop("penalty"), arguments.pop("params"), path, **arguments)
    assert message in str(caught.value)

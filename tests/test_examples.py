"""Every example runs as its reader would run it, without a warning, and prints the numbers its docstring promises."""

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from scripts import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = {"l1_l2_loss", "anchored"}
# What begins with an underscore is parts of examples.
HAVE_TESTS_OF_THEIR_OWN = {"sparse_digits", "regularization_path", "digits_parity", "ensemble"}
NAMES = sorted(p.stem for p in EXAMPLES.glob("[!_]*.py") if p.stem not in HAVE_TESTS_OF_THEIR_OWN)

Numbers = dict[str, float]


def l1_l2_loss(n: Numbers) -> None:
    bare = {name: n.pop(f"{name}: bare loss") for name in ("by hand", "penalize", "attach")}
    total = {name: n.pop(f"{name}: loss + penalty") for name in bare}
    hidden = {name: n.pop(f"{name}: exact zeros of 4096 in hidden.weight") for name in bare}
    output = {name: n.pop(f"{name}: exact zeros of 640 in output.weight") for name in bare}
    # Three digits. The same sums in another order, in float32, for 600 steps: seen 1e-5 to 2e-4, from seed to seed.
    assert total["by hand"] == pytest.approx(total["penalize"], rel=1e-3)
    assert bare["by hand"] == pytest.approx(bare["penalize"], rel=1e-3)
    assert all(0.05 < bare[name] < 0.2 and bare[name] + 0.1 < total[name] < 0.45 for name in bare)
    assert total["attach"] <= 1.02 * total["penalize"]
    assert hidden == {"by hand": 0, "penalize": 0, "attach": pytest.approx(3072, abs=1024)}
    assert output == {"by hand": 0, "penalize": 0, "attach": 0}


def weight_decay(n: Numbers) -> None:
    for name in (
        "SGD on loss + lam * sum(w**2)",
        "SGD on loss + l2(2 * lam)",
        "SGD(weight_decay=2 * lam)",
        "Adam on loss + l2(2 * lam)",
        "Adam(weight_decay=2 * lam)",
    ):
        assert n.pop(f"from ridge: {name}") < 1e-9
    assert n.pop("from ridge: SGD(weight_decay=lam)") == pytest.approx(0.052, abs=0.001)
    assert n.pop("from ridge: AdamW(weight_decay=2 * lam)") == pytest.approx(0.33, abs=0.05)
    assert n.pop("from no penalty: AdamW(weight_decay=2 * lam)") < 0.15
    for framework in ("PyTorch", "JAX"):
        # 1000 steps of weights up to 0.4, each rounded at 1e-16: seen 6e-16.
        assert n.pop(f"apart: Adam(weight_decay), l2 before Adam in {framework}") < 1e-12
        assert n.pop(f"apart: AdamW, l2 after Adam in {framework}") < 1e-12


def anchored(n: Numbers) -> None:
    old = {name: n.pop(f"{name}: accuracy on old") for name in ("before", "plain", "L2-SP", "EWC")}
    new = {name: n.pop(f"{name}: accuracy on new") for name in old}
    far = {name: n.pop(f"{name}: distance from the anchor") for name in ("plain", "L2-SP", "EWC")}
    assert old["before"] > 0.9 and new["before"] < 0.2
    assert min(new["plain"], new["L2-SP"], new["EWC"]) > 0.9
    assert old["plain"] < 0.5 and old["plain"] + 0.15 < old["L2-SP"] < old["EWC"] - 0.1
    assert old["EWC"] >= 0.8
    assert far["L2-SP"] < 0.7 * far["EWC"] and far["EWC"] < far["plain"]


def nnx_optax(n: Numbers) -> None:
    assert n.pop("adam: measurements dropped, of 30") == 0
    assert 15 < n.pop("prox_adam: measurements dropped, of 30") < 27
    adam, prox = n.pop("adam: loss + penalty"), n.pop("prox_adam: loss + penalty")
    assert 0.1 < adam < 0.25 and prox <= 1.05 * adam
    assert n.pop("adam: accuracy on samples not seen") > 0.9
    assert n.pop("prox_adam: accuracy on samples not seen") > 0.9


def linen_optax(n: Numbers) -> None:
    assert n.pop("adam: exact zeros of 4736 weights") == 0
    assert n.pop("adam: exact zeros of 192 weights on blank pixels") == 0
    assert 4736 / 2 < n.pop("prox_adam: exact zeros of 4736 weights") < 4000
    assert n.pop("prox_adam: exact zeros of 192 weights on blank pixels") == 192
    adam, prox = n.pop("adam: loss + penalty"), n.pop("prox_adam: loss + penalty")
    assert 0.3 < adam < 0.6 and prox <= 1.05 * adam
    assert n.pop("adam: accuracy on images not seen") > 0.9
    assert n.pop("prox_adam: accuracy on images not seen") > 0.9


def gradient_accumulation(n: Numbers) -> None:
    for name in ("PyTorch, MultiSteps", "PyTorch, attach", "JAX, big batches", "JAX, MultiSteps"):
        # 120 steps of weights up to 0.4, each rounded at 1e-16: seen 3e-16. Above 0: not the same run compared twice.
        assert 0 < n.pop(f"apart: {name}") < 1e-12
    zeros = {name: n.pop(name) for name in list(n) if name.startswith("exact zeros: ")}
    assert len(zeros) == 5 and set(zeros.values()) == {zeros["exact zeros: PyTorch, big batches"]}
    assert 2 <= zeros["exact zeros: PyTorch, big batches"] <= 8
    assert n.pop("strength: l1 in the loss of every part") == 4


def per_example(n: Numbers) -> None:
    quantiles = [n.pop(f"norm: quantile {q}%") for q in (10, 50, 90, 95, 99, 100)]
    assert sorted(quantiles) == quantiles and 2 < quantiles[1] < 4 and quantiles[-1] > 20 * quantiles[1]
    # 95% of the targets are right
    assert quantiles[2] < n.pop("norm: of patients with a slipped target, least") < quantiles[4]
    error = {name.removeprefix("test error: "): n.pop(name) for name in list(n) if name.startswith("test error: ")}
    assert error["plain"] > error["the median for everyone"] > 0.7
    assert error["right targets only"] < error["clipped"] < 1.05 * error["right targets only"]
    assert error["penalty clipped"] == pytest.approx(error["clipped"], rel=0.05)
    zeros = {name.removeprefix("exact zeros: "): n.pop(name) for name in list(n) if name.startswith("exact zeros: ")}
    assert zeros == {"plain": 3, "clipped": 7, "right targets only": 6, "penalty clipped": 0}
    assert n.pop("not at rest: clipped") < 1e-12
    assert n.pop("not at rest: penalty clipped") > 0.01
    assert 0.05 < n.pop("strength: penalty clipped") < 0.09
    assert n.pop("l2: prox - gradient") < 1e-9  # how far 1000 steps are from the solution
    assert 0 < n.pop("PyTorch - JAX") < 1e-12


def checkpoint_resume(n: Numbers) -> None:
    assert n.pop("unbroken: exit status") == 0
    assert n.pop("unbroken: steps in the file") == n.pop("resumed: steps in the file") == 2000
    assert n.pop("stopped: exit status") == 143
    assert 1000 < n.pop("stopped: steps in the file") < 2000
    assert n.pop("resumed: exit status") == 0
    # 8 members' weights with two moments each, the counts, lam, three metrics of every step
    assert n.pop("arrays compared") == 3 * 4 + 1 + 1 + 3
    assert n.pop("numbers compared") == 8 * (3 * (64 * 64 + 64 + 64 * 10 + 10) + 1 + 1 + 3 * 2000)
    assert n.pop("arrays whose bits differ") == 0


def port_mlp(n: Numbers) -> None:
    assert 0 < n.pop("logits apart") < 1e-14
    assert 0 < n.pop("weights apart") < 1e-13  # 200 steps of weights up to 1, each rounded at 1e-16: seen 3e-16
    assert n.pop("weights apart, fresh") > 0.05
    zeros = n.pop("exact zeros in PyTorch")
    assert n.pop("exact zeros in JAX") == zeros == pytest.approx(3070, abs=300)
    assert n.pop("zero in one only") == n.pop("reloaded") == 0


def port_convnet(n: Numbers) -> None:
    assert 0 < n.pop("eval apart") < 1e-13 and 0 < n.pop("train apart") < 1e-12 and 0 < n.pop("came back") < 1e-13
    assert 0 < n.pop("gradients apart") < 1e-11  # seen 6e-14: sums of 128 images, of either sign
    assert n.pop("accuracy: PyTorch") == n.pop("accuracy: ported") > 0.95
    assert n.pop("accuracy: as it lies") < 0.3


def port_transformer(n: Numbers) -> None:
    assert 0 < n.pop("apart after the second third") < 1e-13 and 0 < n.pop("apart after the last third") < 1e-13
    assert n.pop("keys' biases after the second third") < 1e-8
    assert n.pop("decay: AdamW's own") > 0.02
    assert n.pop("rate apart") < 1e-17
    assert n.pop("accuracy") > 0.8


def find_the_bug(n: Numbers) -> None:
    for fault, apart in (("gelu", 1e-5), ("relu", 1e-3), ("decay", 0.1)):
        assert n.pop(f"{fault}: apart") > apart
        assert n.pop(f"{fault}: apart after hint") < 1e-12
        assert n.pop(f"{fault}: named") == n.pop(f"{fault}: located") == 1


CHECKS: dict[str, Callable[[Numbers], None]] = {
    check.__name__: check
    for check in (
        l1_l2_loss,
        weight_decay,
        anchored,
        nnx_optax,
        linen_optax,
        gradient_accumulation,
        per_example,
        checkpoint_resume,
        port_mlp,
        port_convnet,
        port_transformer,
        find_the_bug,
    )
}


@pytest.mark.relaxed_promotion  # as it is for their reader
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_prints_the_numbers_its_docstring_promises(name: str, tmp_path: Path) -> None:
    assert name in CHECKS, f"examples/{name}.py: state bounds for the numbers it prints, in a function of this file"
    printed = run_script(EXAMPLES / f"{name}.py", tmp_path)
    numbers = {label: float(number) for label, number in re.findall(r"^(.+?)\.{2,} (\S+)$", printed, re.MULTILINE)}
    CHECKS[name](numbers)
    assert not numbers, "printed, but no bound is stated"


@pytest.mark.slow
@pytest.mark.relaxed_promotion  # as it is for their reader
def test_per_example_clips_each_example_and_says_why_not_the_penalty(
    x64: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against NumPy: where the clipped fit ends, and what both wings say to a penalized loss."""
    monkeypatch.syspath_prepend(EXAMPLES)
    e = __import__("per_example")
    data = e.load(0)
    with x64():
        end = e.fit_all(e.WINGS["JAX"], data, 2.0, 1000)["ends"]["clipped"]
        torch_says, jax_says = e.refusal(e.WINGS["PyTorch"]), e.refusal(e.WINGS["JAX"])
    w, b = end["weight"], end["bias"]
    total = np.zeros(11)
    for x, y in zip(data["x"], data["y"], strict=True):
        g = (x @ w + b - y) * np.append(x, 1.0)
        total += g * min(1.0, 2.0 / np.sqrt((g * g).sum()))
    g = total / len(data["y"])
    stationary = np.where(w != 0, np.abs(g[:10] + 0.1 * np.sign(w)), np.maximum(np.abs(g[:10]) - 0.1, 0))
    assert max(stationary.max(), abs(g[10])) < 1e-10
    assert torch_says == jax_says and "the loss is penalized; a penalty belongs to the parameters" in torch_says


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("per_example", ["--max-norm", "0"], "argument --max-norm: must be a number > 0, got '0'"),
        ("per_example", ["--max-norm", "inf"], "argument --max-norm: must be a number > 0, got 'inf'"),
        ("per_example", ["--steps", "0"], "argument --steps: must be an integer >= 1, got '0'"),
        ("ensemble", ["--members", "1"], "argument --members: must be an integer between 2 and 1000, got '1'"),
        ("ensemble", ["--wing", "both"], "argument --wing: invalid choice: 'both'"),
        ("checkpoint_resume", ["--steps", "1"], "argument --steps: must be an integer >= 2, got '1'"),
        ("checkpoint_resume", ["--run", "taken/file"], "cannot write to 'taken': File exists"),
    ],
)
def test_bad_options_are_named(
    name: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, name, raising=False)  # there is a benchmark of that name as well
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(SystemExit) as stop:
        __import__(name).main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_check_is_left_of_an_example_that_is_gone() -> None:
    assert sorted(CHECKS) == NAMES


@pytest.mark.parametrize("name", [*NAMES, *sorted(HAVE_TESTS_OF_THEIR_OWN)])
def test_is_listed_in_the_readme_of_the_examples(name: str) -> None:
    assert f"| `{name}.py` |" in (EXAMPLES / "README.md").read_text()

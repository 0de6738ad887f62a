"""The demo runs as its reader runs it, what it writes is what it trained, and both frameworks train the same."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "sparse_digits.py"
METHODS, PENALTIES, WINGS = ("autodiff", "soft", "prox_adam"), ("l1", "group_lasso"), ("torch", "jax")
PENALIZED = {"l1": ("hidden.weight", "output.weight"), "group_lasso": ("hidden.weight",)}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of the demo, or the benchmark that shares its text."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "examples")
    return lambda name: __import__(name)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def objective(weights: dict[str, np.ndarray], penalty: str, lam: float, x: np.ndarray, y: np.ndarray) -> float:
    """Loss + penalty in float64, by NumPy alone."""
    w = {name: v.astype(np.float64) for name, v in weights.items()}
    logits = np.maximum(x @ w["hidden.weight"].T + w["hidden.bias"], 0) @ w["output.weight"].T + w["output.bias"]
    loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]).mean()
    if penalty == "l1":
        return loss + lam * (np.abs(w["hidden.weight"]).sum() + np.abs(w["output.weight"]).sum())
    return loss + lam * 8 * np.linalg.norm(w["hidden.weight"], axis=1).sum()  # 8: the root of the group's size


@pytest.mark.slow
def test_runs_in_both_frameworks_and_writes_what_it_trained(tmp_path: Path, demo: Callable[[str], Any]) -> None:
    out = tmp_path / "new" / "folder"
    done = subprocess.run(
        [sys.executable, "-W", "error", DEMO, "--steps", "120", "--lam", "0.01", "--seed", "3", "--out", out],
        env=os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "COLUMNS": "80"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the progress is for terminals only
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout, "a table does not fit 80 columns"
    assert re.search(r"^What to see\. l1: .*\Z", done.stdout, re.MULTILINE | re.DOTALL)

    for name in ("objective.png", "first_layer.png", "histogram.png"):
        pixels = imread(out / name)
        assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
        assert pixels.std() > 0.05, "an empty picture"

    record = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    assert record["settings"] == {"wing": "both", "steps": 120, "batch": 64, "lam": 0.01, "seed": 3}
    runs = {(run["wing"], run["penalty"], run["method"]): run for run in record["runs"]}
    assert list(runs) == [(w, p, m) for w in WINGS for p in PENALTIES for m in METHODS]
    saved = np.load(out / "weights.npz")
    data = demo("_digits").load()
    for (wing, penalty, method), run in runs.items():
        weights = {name: saved[f"{wing}/{penalty}/{method}/{name}"] for name in demo("_digits").initial_values(0)}
        # float32 sums of 1347 losses and 4736 weights: a few 1e-6
        assert run["objective"] == pytest.approx(objective(weights, penalty, 0.01, *data[:2]), rel=1e-5)
        assert run["objective"] == run["curve"]["objective"][-1] < run["curve"]["objective"][0]
        assert (run["curve"]["step"][0], run["curve"]["step"][-1]) == (0, 120)
        penalized = np.concatenate([weights[name].ravel() for name in PENALIZED[penalty]])
        assert run["zeros"] == pytest.approx(np.count_nonzero(penalized == 0) / penalized.size, abs=1e-12)
        assert run["dead"] == np.count_nonzero(np.abs(weights["hidden.weight"]).max(1) == 0)
        assert 0.3 < run["accuracy"] <= 1
        if method == "prox_adam":
            assert run["zeros"] > 0 and run["dead"] > 0
            first = runs[wing, penalty, "autodiff"]["objective"]
            assert run["objective"] < 1.1 * first < runs[wing, penalty, "soft"]["objective"]
        if method == "autodiff":
            assert run["zeros"] == 0 and run["dead"] == 0
        assert re.search(rf" {run['objective']:.4f} .* {run['zeros']:.1%} +{run['dead']} ", done.stdout)
    for penalty, difference in record["torch_minus_jax"].items():
        ends = [
            {n: saved[f"{wing}/{penalty}/prox_adam/{n}"] for n in demo("_digits").initial_values(0)} for wing in WINGS
        ]
        apart = max(float(np.abs(w - ends[1][name]).max()) for name, w in ends[0].items())
        assert 0 < apart == difference["params"] < 1e-3  # float32; seen 1e-6
        assert 0 < difference["params_float64"] < 1e-9 and difference["objective_float64"] < 1e-9
        assert f" {apart:.0e} " in done.stdout
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["wing"], r["penalty"], r["method"], float(r["objective"])) for r in rows] == [
        (*key, run["objective"]) for key, run in runs.items()
    ]


def test_the_verdict_is_that_of_the_numbers(demo: Callable[[str], Any]) -> None:
    report = demo("_digits_report")
    apart = report.Difference(1e-4, 1e-6, 3, 840, 2e-15, 1e-16, 0, 200)
    assert report.verdict({"l1": apart}) == "Rounding: in float64 the two agree to 2e-15."
    worse = apart._replace(params_float64=1e-7)
    assert report.verdict({"l1": apart, "group_lasso": worse}).startswith("More than rounding: ")
    assert report.verdict({"l1": worse._replace(params_float64=float("nan"))}).startswith("More than rounding: ")


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize(("fault", "verdict", "code"), [(1.0, "rounding", 0), (1.001, "semantic", 1)])
def test_the_demo_ends_with_the_verdict_of_its_steps(
    fault: float,
    verdict: str,
    code: int,
    demo: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = demo("_digits_jax")
    loss = half.loss
    monkeypatch.setattr(half, "loss", lambda params, x, y: loss(params, x * fault, y))
    assert demo("digits_parity").main(["--steps", "2", "--out", str(tmp_path)]) == code
    said = capsys.readouterr().out
    assert said.startswith(f"verdict: {verdict}") and f"Parity: {verdict}. Over 2 steps" in said
    assert f"verdict: {verdict}" in (tmp_path / "parity.html").read_text()


def test_one_wing_has_no_parity_and_is_no_failure(
    demo: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo("digits_parity").main(["--wing", "torch", "--out", str(tmp_path)]) == 0
    assert "nothing to compare" in capsys.readouterr().out


def test_make_demo_ends_with_parity_and_hands_on_the_arguments() -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and recipe[1].splitlines()[-1] == "\t$(RUN) examples/digits_parity.py $(ARGS)"


def test_the_lines_that_regularize_and_optimize_are_the_same_text() -> None:
    halves = {wing: (DEMO.parent / f"_digits_{wing}.py").read_text() for wing in WINGS}
    shared = {
        wing: re.search(r"^# --- what regularizes.*?(?=^# --- the model)", text, re.MULTILINE | re.DOTALL)
        for wing, text in halves.items()
    }
    assert shared["torch"] and shared["jax"]
    assert shared["torch"].group() == shared["jax"].group()
    for needed in ("fr.l1(", "fr.group_lasso(", "fr.penalize(", "optax.adam(", "penalty.prox(", "fr.prox_adam("):
        assert needed in shared["torch"].group()
    outside = {wing: text.replace(shared["torch"].group(), "") for wing, text in halves.items()}
    # Nothing of the penalties hides in the framework's own half, but for the objective that is reported.
    assert all(re.findall(r"fr\.\w+", text) == ["fr.penalize"] for text in outside.values())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_both_frameworks_train_the_same_in_float64(
    penalty: str, demo: Callable[[str], Any], x64: Callable[[], AbstractContextManager[None]]
) -> None:
    digits = demo("_digits")
    data, init = digits.load(), digits.initial_values(0)
    batches = digits.draw_batches(0, 200, 64, len(data.y_train))
    ends = {}
    for wing in WINGS:
        half = demo(f"_digits_{wing}")
        with x64() if wing == "jax" else nullcontext():
            run = half.train(data, init, batches, half.penalties(1e-2)[penalty], "prox_adam", [0, 200], dtype="float64")
        assert all(w.dtype == np.float64 for w in run.params.values())
        ends[wing] = run
    assert ends["torch"].objective == pytest.approx(ends["jax"].objective, abs=1e-9)
    for name, w in ends["torch"].params.items():
        np.testing.assert_allclose(w, ends["jax"].params[name], rtol=0, atol=1e-9)
        assert np.abs(w - init[name]).max() > 1e-2, "not trained"
    assert (ends["torch"].params["hidden.weight"] == 0).all(1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: must be an integer >= 1, got '0'"),
        (["--steps", "many"], "argument --steps: must be an integer >= 1, got 'many'"),
        (["--seed", "-1"], "argument --seed: must be an integer >= 0, got '-1'"),
        (["--batch", "1348"], "argument --batch: must be an integer between 1 and 1347, got '1348'"),
        (["--lam", "0"], "argument --lam: must be a number > 0 and <= 1, got '0'"),
        (["--lam", "nan"], "argument --lam: must be a number > 0 and <= 1, got 'nan'"),
        (["--lam", "inf"], "argument --lam: must be a number > 0 and <= 1, got 'inf'"),
        (["--wing", "keras"], "argument --wing: invalid choice: 'keras'"),
        (["--lr", "1"], "unrecognized arguments: --lr 1"),
        (["--out", "taken"], "argument --out: cannot write to 'taken': File exists"),
        (["--out", "taken/below"], "argument --out: cannot write to 'taken/below': Not a directory"),
    ],
)
def test_bad_options_exit_with_2_and_say_what_is_allowed(
    options: list[str],
    message: str,
    demo: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(SystemExit) as stop:
        demo("sparse_digits").main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"], "wrote something before it refused"


def test_a_framework_that_is_not_installed_is_named(
    demo: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("JAX_PLATFORMS", "cpu"), ("OMP_NUM_THREADS", "1")):  # set by the demo where they are not
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "_digits_jax", raising=False)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(SystemExit) as stop:
        demo("sparse_digits").main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "argument --wing: jax needs the package 'flax', which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("wing", "other"), [WINGS, WINGS[::-1]])
def test_one_wing_needs_one_framework(wing: str, other: str, tmp_path: Path) -> None:
    imports = f"import sys; import sparse_digits as s; s.parse(['--wing', {wing!r}])"
    script = f"{imports}; assert {wing!r} in sys.modules and {other!r} not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(DEMO.parent), os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_an_epoch_shows_every_digit_once(demo: Callable[[str], Any]) -> None:
    batches = demo("_digits").draw_batches(0, 45, 30, 1347)
    assert batches.shape == (45, 30)
    assert np.array_equal(np.sort(batches.ravel()[:1347]), np.arange(1347))
    assert np.array_equal(batches[:7], demo("_digits").draw_batches(0, 7, 30, 1347))
    assert not np.array_equal(batches, demo("_digits").draw_batches(1, 45, 30, 1347))


def test_the_initial_values_are_those_the_frameworks_draw(demo: Callable[[str], Any]) -> None:
    import jax
    import torch
    from flax import linen as nn

    ours = {like: demo("_digits").initial_values(0, like)["hidden.weight"] for like in ("flax", "torch")}
    theirs = {
        "flax": np.asarray(nn.Dense(64).init(jax.random.key(0), np.zeros((1, 64), np.float32))["params"]["kernel"]),
        "torch": torch.nn.Linear(64, 64).weight.detach().numpy(),
    }
    for like, w in ours.items():
        # Of 4096 draws: the deviation to 2%, the largest to a cut-off that both reach.
        assert w.std() == pytest.approx(theirs[like].std(), rel=0.05)
        assert np.abs(w).max() == pytest.approx(np.abs(theirs[like]).max(), rel=0.01)


@pytest.mark.parametrize("wing", WINGS)
def test_the_benchmark_s_members_are_the_demo_s_runs(
    wing: str, demo: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quality, digits, half = demo("digits_quality"), demo("_digits"), demo(f"_digits_{wing}")
    monkeypatch.setattr(quality, "LAMS", np.array([1e-4, 1e-2], np.float32))
    data = digits.load()
    members = quality.make_members(2, 20, 64, "flax")
    looks = quality.TRAIN[wing](data, members, members.batches, "l1", "prox_adam", [1, 20])
    lams = [float(lam) for lam in quality.LAMS]
    assert list(zip(members.seeds, members.lams, strict=True)) == [(seed, lam) for seed in (0, 1) for lam in lams]
    m = 3
    penalty = half.penalties(float(members.lams[m]))["l1"]
    batches = digits.draw_batches(1, 20, 64, len(data.y_train))
    run = half.train(data, digits.initial_values(1), batches, penalty, "prox_adam", [1, 20])
    # Sums in another order, in float32, over 20 steps; seen 1e-7.
    assert [float(looks[s].objective[m]) for s in (1, 20)] == pytest.approx(run.objective, rel=1e-5)
    np.testing.assert_allclose(looks[20].params["hidden.weight"][m], run.params["hidden.weight"], rtol=0, atol=1e-5)


def test_a_missed_requirement_is_said_and_alone(demo: Callable[[str], Any]) -> None:
    quality = demo("digits_quality")

    def missed(early: float = 1.05, late: float = 1.03, worst: float = 1.1, **rows: float) -> list[str]:
        found = {
            "prox_adam": {quality.EARLY: quality.Ratio(early, 9.0, 21), quality.LATE: quality.Ratio(late, worst, 21)}
        }
        given = {
            "left after 1 step": [1.0] * 7 + [rows.get("left", 0.98)],
            f"zeros @{quality.LATE}": [0.0] * quality.MIDDLE + [rows.get("zeros", 0.2)] + [1.0] * 4,
            f"idle zeros @{quality.LAST}": [rows.get("idle", 1.0)] + [1.0] * 7,
        }
        return [text for text, _, holds in quality.requirements(found, given) if not holds]

    assert missed() == []
    for worse in (
        {"early": 1.051},
        {"late": 1.031},
        {"worst": 1.101},
        {"left": 0.979},
        {"zeros": 0.19},
        {"idle": 0.999},
    ):
        assert len(missed(**worse)) == 1, worse
    assert len(missed(late=float("nan"))) == 1

"""The ensemble example: its measures are the formulas it names, and its digits do what its docstring says."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from scripts import run_script

pytestmark = [
    pytest.mark.relaxed_promotion,  # as it is for their reader
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # of modules that inductor imports
]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "ensemble", raising=False)  # there is a benchmark of that name as well
    return lambda name: __import__(name)


@pytest.mark.parametrize("wing", ["jax", pytest.param("torch", marks=pytest.mark.slow)])
def test_the_numbers_are_what_its_docstring_promises(wing: str, tmp_path: Path) -> None:
    script = ROOT / "examples" / "ensemble.py"
    printed = run_script(script, tmp_path, "--wing", wing)
    assert "…" not in printed, "a table does not fit 80 columns"
    with open(tmp_path / "out" / "ensemble" / "ensemble.csv", newline="") as file:
        rows = {int(row["angle"]): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}
    upright, peak, last = rows[0], rows[30], rows[90]
    accuracy = [row["accuracy"] for row in rows.values()]
    assert sorted(accuracy, reverse=True) == accuracy
    assert upright["accuracy"] > 0.97 and 0.3 < peak["accuracy"] < 0.5 and last["accuracy"] < 0.15
    assert all(row["accuracy"] > row["accuracy_single"] for row in rows.values() if row["accuracy"] > 0.6)
    assert all(row["nll"] < row["nll_single"] for row in rows.values())
    assert all(row["calibration"] < row["calibration_single"] for row in rows.values() if row["accuracy"] < 0.8)
    assert upright["calibration"] > upright["calibration_single"]
    growing = [row["mutual_information"] for angle, row in rows.items() if angle <= 30]
    assert sorted(growing) == growing and 4 < growing[-1] / growing[0] < 10
    assert last["mutual_information"] < peak["mutual_information"] / 2
    assert peak["variance"] > 4 * upright["variance"] and last["variance"] < peak["variance"] / 2
    assert last["most_common"] == 4 and last["share"] > 0.9 and upright["share"] < 0.15
    said = f"falls from {upright['accuracy']:.1%} to {peak['accuracy']:.1%}, and the mutual information grows "
    assert f"{said}{growing[-1] / growing[0]:.1f} times. At 90° {last['share']:.0%} are taken for a 4" in printed
    for row in rows.values():
        measures = [row[name] for name in ("nll_single", "nll", "calibration_single", "calibration")]
        line = next(line for line in printed.splitlines() if line.split()[:1] == [f"{row['angle']:.0f}°"])
        assert line.split()[3:7] == [f"{x:.3f}" for x in measures]
        assert line.split()[1:3] == [f"{row['accuracy_single']:.1%}", f"{row['accuracy']:.1%}"]
    assert imread(tmp_path / "out" / "ensemble" / "ensemble.png").std() > 0.05, "an empty picture"


def test_the_measures_are_their_formulas(example: Callable[[str], Any]) -> None:
    script = example("ensemble")
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.35, 0.65], [0.95, 0.05]])
    y = np.array([0, 1, 1, 0])
    # confidences 0.9 and 0.95 share no fifteenth: 13 and 14
    gaps = [abs(0.9 - 1), abs(0.8 - 0), abs(0.65 - 1), abs(0.95 - 1)]
    assert script.calibration_error(p, y) == pytest.approx(sum(gaps) / 4)
    assert script.calibration_error(np.repeat(p[:2], 5, axis=0), np.repeat(y[:2], 5)) == pytest.approx(0.9 / 2)
    both = np.array([[0.8, 0.2], [0.8, 0.2], [0.81, 0.19]])  # one bin: two of three right
    assert script.calibration_error(both, np.array([0, 0, 1])) == pytest.approx(abs(2.41 - 2) / 3)
    assert script.calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0
    assert script.nll(np.log(p), y) == pytest.approx(-np.log([0.9, 0.2, 0.65, 0.95]).mean())
    assert script.disagreement(np.log(np.stack([p, p]))) == pytest.approx(np.zeros(4), abs=1e-15)
    sure = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    with np.errstate(divide="ignore"):
        assert script.disagreement(np.log(sure)) == pytest.approx(np.log(2))


def test_every_member_has_its_own_bootstrap_sample(example: Callable[[str], Any], tmp_path: Path) -> None:
    script = example("ensemble")
    options = script.parse(["--out", str(tmp_path), "--steps", "22"])  # 22 batches of 64: one epoch and a bit
    samples = [set(script.bootstrap(options, m, 1347)[:21].ravel().tolist()) for m in range(3)]
    # drawn with replacement, 1 - 1/e of the digits are in a sample; seen 0.63
    assert all(0.6 < len(sample) / 1347 < 0.66 for sample in samples)
    assert samples[0] != samples[1] != samples[2]


def test_turning_is_by_the_angle_it_says(example: Callable[[str], Any]) -> None:
    turned, x = example("ensemble").turned, np.random.default_rng(0).random((2, 64))
    np.testing.assert_allclose(turned(x, 0), x, atol=1e-12)
    counterclockwise = np.rot90(x.reshape(2, 8, 8), 1, axes=(1, 2)).reshape(2, 64)
    np.testing.assert_allclose(turned(x, 90), counterclockwise, atol=1e-9)

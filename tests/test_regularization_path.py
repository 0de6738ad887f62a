"""The path example: what it prints and writes is what it trained, and its picks are those of the rule it states."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file

from scripts import run_script

pytestmark = [
    pytest.mark.relaxed_promotion,  # as it is for their reader
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # of modules that inductor imports
]
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "regularization_path.py"


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of the example."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return lambda name: __import__(name)


def run(out: Path, *options: str) -> str:
    printed = run_script(SCRIPT, out.parent, *options, "--out", str(out))
    assert "…" not in printed, "a table does not fit 80 columns"
    return printed


def check(printed: str, out: Path, wings: list[str], lams: np.ndarray, penalty: str, path: Callable[[str], Any]) -> Any:
    """The files agree with each other, with the text and with the networks they hold; returns the record and rows."""
    digits = path("_digits")
    data = digits.load()
    record = json.loads((out / "path.json").read_text())
    with open(out / "path.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["wing"] for row in rows] == [wing for wing in wings for _ in lams]
    for wing in wings:
        own = [row for row in rows if row["wing"] == wing]
        np.testing.assert_allclose([float(row["lam"]) for row in own], lams, rtol=1e-6)
        accuracy = np.array([float(row["validation_accuracy"]) for row in own])
        picks = record["picks"][wing]
        best, chosen = picks["best"]["member"], picks["one standard error"]["member"]
        a = accuracy.max()
        assert accuracy[best] == a and (accuracy[best + 1 :] < a).all()
        least = a - np.sqrt(a * (1 - a) / 347)
        assert accuracy[chosen] >= least and (accuracy[chosen + 1 :] < least).all() and chosen >= best
        assert f"= {least:.2%} or more" in printed
        assert picks["reloaded"]["logits_differ_by"] == 0 and picks["reloaded"]["predictions_changed"] > 200
        # the file holds the picked member: its test accuracy, zeros and live units, computed again
        saved = load_file(out / f"picked_{wing}.safetensors")
        if wing == "jax":
            saved = {
                name.replace("kernel", "weight"): x.T if name.endswith("kernel") else x for name, x in saved.items()
            }
        assert picks["one standard error"]["test_accuracy"] == digits.accuracy(saved, data.x_test, data.y_test)
        assert picks["one standard error"]["live"] == np.count_nonzero(np.abs(saved["hidden.weight"]).max(1))
        assert float(own[chosen]["zeros"]) == digits.zeros(saved, penalty)
        for name in ("best", "one standard error"):
            said = rf"{name}: lam {lams[picks[name]['member']]:.1e}, test accuracy {picks[name]['test_accuracy']:.1%}, "
            assert re.search(said + rf"{picks[name]['live']} of 64 hidden units live", printed)
        for row in own:
            cells = rf"{float(row['validation_accuracy']):.1%} +{float(row['zeros']):.1%} +{row['live']} "
            assert re.search(cells, printed), cells
    for name in ("path.png", "path_first_layer.png"):
        assert imread(out / name).std() > 0.05, "an empty picture"
    return record, rows


@pytest.mark.slow
def test_trains_a_path_and_saves_its_pick(tmp_path: Path, path: Callable[[str], Any]) -> None:
    out = tmp_path / "new" / "folder"
    out.parent.mkdir()
    printed = run(out, "--wing", "jax", "--steps", "200", "--members", "5", "--penalty", "group_lasso", "--seed", "3")
    lams = np.geomspace(1e-5, 3e-2, 5)
    record, rows = check(printed, out, ["jax"], lams, "group_lasso", path)
    assert record["settings"]["seed"] == 3 and "torch_minus_jax" not in record
    live = [int(row["live"]) for row in rows]
    assert live[0] == 64 and sorted(live, reverse=True) == live and live[-1] < 32


@pytest.mark.slow
def test_both_wings_train_the_same_path(tmp_path: Path, path: Callable[[str], Any]) -> None:
    printed = run(tmp_path / "out", "--steps", "420", "--members", "16")
    record, rows = check(printed, tmp_path / "out", ["torch", "jax"], np.geomspace(1e-5, 3e-2, 16), "both", path)
    pairs = list(zip(rows[:16], rows[16:], strict=True))
    apart = max(abs(float(a["validation_accuracy"]) - float(b["validation_accuracy"])) for a, b in pairs)
    assert apart == pytest.approx(record["torch_minus_jax"]["validation_accuracy"], abs=1e-12)
    # float32: at most two of 347 digits change sides; seen none. Seen 15 of 4736 zeros.
    assert apart <= 2 / 347
    assert max(abs(float(a["zeros"]) - float(b["zeros"])) for a, b in pairs) < 0.01
    assert record["torch_minus_jax"]["weights_zero_in_one_only"] < 0.01 * 4736
    assert f"weights that are zero in one only {record['torch_minus_jax']['weights_zero_in_one_only']}" in printed
    zeros = [float(row["zeros"]) for row in rows[:16]]
    assert zeros[0] < 0.4 and zeros[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "live"), [(0, 30)])
def test_the_pick_of_a_seed_is_the_docstring_s(seed: int, live: int, tmp_path: Path) -> None:
    run(tmp_path / "out", "--wing", "jax", "--seed", str(seed))
    picks = json.loads((tmp_path / "out" / "path.json").read_text())["picks"]["jax"]
    # One digit of 347 may decide, and another machine rounds otherwise.
    assert picks["one standard error"]["live"] == pytest.approx(live, abs=8)
    assert picks["one standard error"]["live"] <= picks["best"]["live"]


def test_the_rule_takes_the_strongest_within_one_standard_error(path: Callable[[str], Any]) -> None:
    pick = path("regularization_path").pick
    # sqrt(0.9 * 0.1 / 100) = 0.03
    assert pick([0.8, 0.9, 0.88, 0.871, 0.5], 100) == (1, 3, pytest.approx(0.03))
    assert pick([0.8, 0.9, 0.88, 0.869, 0.5], 100) == (1, 2, pytest.approx(0.03))
    assert pick([0.9, 0.8, 0.9, 0.7], 100)[:2] == (2, 2), "of equal ones the strongest; a dip between them is chance"
    assert pick([0.5, 1.0, 0.99], 100) == (1, 1, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--members", "1"], "argument --members: must be an integer between 2 and 1000, got '1'"),
        (["--steps", "0"], "argument --steps: must be an integer >= 1, got '0'"),
        (["--batch", "1001"], "argument --batch: must be an integer between 1 and 1000, got '1001'"),
        (["--penalty", "l3"], "argument --penalty: invalid choice: 'l3'"),
        (["--out", "taken"], "argument --out: cannot write to 'taken': File exists"),
    ],
)
def test_bad_options_are_named(
    options: list[str],
    message: str,
    path: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(SystemExit) as stop:
        path("regularization_path").main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_pictures_hold_for_any_picks(path: Callable[[str], Any], tmp_path: Path) -> None:
    script, plots = path("regularization_path"), path("_path_plots")
    params = path("_digits").initial_values(0)
    for accuracy in ([0.5, 0.4], [0.1, 0.9, 0.2], [0.9] * 7):
        many = len(accuracy)
        members = script.Members([], [params] * many, accuracy, [0.0] * many, [64] * many, 0.0, 0.0)
        picks = {"jax": script.pick(accuracy, 347)}
        names = plots.draw(tmp_path, {"jax": members}, np.geomspace(1e-5, 1e-2, many), picks, 347, "l1")
        assert all((tmp_path / name).stat().st_size > 10_000 for name in names)

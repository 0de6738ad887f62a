"""What `sparse_digits.py` prints and saves as numbers."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

import _digits
from _digits import Measures, Run
from _options import WINGS

PENALTIES = {"l1": "l1, on all weights", "group_lasso": "group_lasso, hidden units"}
METHODS = {"autodiff": "autodiff, Adam", "soft": "soft-threshold after Adam", "prox_adam": "fr.prox_adam"}
ROUNDING = 1e-9  # of a parameter in float64, after DOUBLE_STEPS
DOUBLE_STEPS = 200


class Key(NamedTuple):
    wing: str
    penalty: str
    method: str


class Difference(NamedTuple):
    """The largest differences between the frameworks: as trained above in float32, and in float64."""

    params: float
    objective: float
    zeros: int  # weights that are exactly 0 in one framework only
    steps: int
    params_float64: float
    objective_float64: float
    zeros_float64: int
    steps_float64: int


def difference(single: list[Run], double: list[Run]) -> Difference:
    """Of the runs of two frameworks, in float32 and in float64."""

    def parts(a: Run, b: Run) -> tuple[float, float, int, int]:
        largest = max(float(np.abs(a.params[name] - b.params[name]).max()) for name in a.params)
        zeros = sum(int(((a.params[name] == 0) != (b.params[name] == 0)).sum()) for name in a.params)
        return largest, abs(a.objective[-1] - b.objective[-1]), zeros, a.steps[-1]

    return Difference(*parts(*single), *parts(*double))


def introduction(steps: int, batch: int, lam: float, seed: int) -> str:
    return (
        f"{steps} steps of Adam, learning rate {_digits.LEARNING_RATE:g}, batch {batch}, lam {lam:g}, seed {seed}. "
        f"objective = loss on the {_digits.TRAINING_EXAMPLES} training digits + penalty, ratio = to autodiff's; "
        "zeros = exact ones in the penalized weights; "
        f"dead = of {_digits.UNITS} hidden units, those with no incoming weight left; accuracy = on the "
        f"{_digits.TEST_EXAMPLES} test digits. A small loss in a large objective: the penalty hardly acted."
    )


def results_table(wing: str, rows: Mapping[Key, Measures]) -> Table:
    """Three rows per penalty."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(WINGS[wing], no_wrap=True)
    for name in ("objective", "ratio", "loss", "zeros", "dead", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for penalty, title in PENALTIES.items():
        table.add_row(title, style="italic")
        first = rows[Key(wing, penalty, "autodiff")].objective
        for method, label in METHODS.items():
            r = rows[Key(wing, penalty, method)]
            cells = [f"{r.objective:.4f}", f"{r.objective / first:.3f}", f"{r.loss:.4f}"]
            cells += [f"{r.zeros:.1%}", f"{r.dead}", f"{r.accuracy:.1%}"]
            table.add_row(f"  {label}", *cells, style="bold" if method == "prox_adam" else None)
    return table


def parity_table(parity: Mapping[str, Difference]) -> Table:
    """PyTorch against JAX."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("PyTorch - JAX, prox_adam, largest", no_wrap=True)
    for name in ("parameter", "objective", "zeros in one only"):
        table.add_column(name, justify="right", no_wrap=True)
    for penalty, d in parity.items():
        for dtype, steps, *cells in (
            ("float32", d.steps, d.params, d.objective, d.zeros),
            ("float64", d.steps_float64, d.params_float64, d.objective_float64, d.zeros_float64),
        ):
            table.add_row(
                f"{penalty}, {dtype}, {steps} steps", *(f"{c:.0e}" if isinstance(c, float) else f"{c}" for c in cells)
            )
    return table


def verdict(parity: Mapping[str, Difference]) -> str:
    """Whether what differs in float32 is rounding: then float64 makes it vanish."""
    worst = max(d.params_float64 for d in parity.values())
    if worst <= ROUNDING:
        return f"Rounding: in float64 the two agree to {worst:.0e}."
    return f"More than rounding: in float64 the two still differ by {worst:.0e}."


def what_to_see(wing: str, rows: Mapping[Key, Measures]) -> str:
    """The last line, from the numbers of this run."""
    said = []
    for penalty in PENALTIES:
        plain, soft, ours = (rows[Key(wing, penalty, method)] for method in METHODS)
        said.append(
            f"{penalty}: prox_adam ends at {ours.objective / plain.objective:.2f} times autodiff's objective with "
            f"{ours.zeros:.0%} exact zeros and {ours.dead} dead units (autodiff {plain.zeros:.0%} and {plain.dead}), "
            f"soft-thresholding after Adam at {soft.objective / plain.objective:.1f} times with {soft.zeros:.0%} and "
            f"{soft.dead}."
        )
    return "What to see. " + " ".join(said)


def save(
    out: Path,
    settings: Mapping[str, Any],
    rows: Mapping[Key, Measures],
    runs: Mapping[Key, Run],
    parity: Mapping[str, Difference],
) -> list[str]:
    """Settings, tables, curves and differences as JSON, the tables as CSV, the weights as npz; returns the names."""
    curves = {key: {"step": run.steps, "objective": run.objective} for key, run in runs.items()}
    record = {
        "settings": dict(settings),
        "runs": [key._asdict() | row._asdict() | {"curve": curves[key]} for key, row in rows.items()],
        "torch_minus_jax": {penalty: d._asdict() for penalty, d in parity.items()},
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Key._fields, *Measures._fields])
        writer.writerows([*key, *row] for key, row in rows.items())
    arrays = {f"{'/'.join(key)}/{name}": w for key, run in runs.items() for name, w in run.params.items()}
    np.savez(out / "weights.npz", **arrays)
    return ["results.json", "results.csv", "weights.npz"]

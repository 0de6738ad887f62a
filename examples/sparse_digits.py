"""Exact zeros on real digits, in PyTorch and in JAX: three ways to train one small network with a penalty.

    python examples/sparse_digits.py            both frameworks; about a minute on two cores
    python examples/sparse_digits.py --help     seed, steps, strength, batch, one framework only, where the files go

A 64-64-10 network learns scikit-learn's bundled handwritten digits (a fixed split: 1347 to train on, 450 to test) under
Adam, first with L1 on all weights, then with group lasso on the hidden units; each in three ways:

* autodiff: the penalty is part of the loss that is differentiated. The right objective, but no zeros.
* soft-thresholding by learning rate * lam after Adam's step: the tempting line. It solves another problem.
* `fr.prox_adam`: the objective as written, with exact zeros.

Both frameworks start from the same values and see the same batches. The lines that regularize and optimize are the same
text in `_digits_torch.py` and `_digits_jax.py`; two imports differ, besides that of `grad`.
"""

import argparse
import sys
from contextlib import nullcontext

import numpy as np
from rich.console import Console
from rich.progress import Progress

import _digits
import _digits_report as report
import _options
from _digits import Digits, Run
from _digits_report import METHODS, PENALTIES, Key
from _options import WINGS


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; `options.halves` holds the imported halves of the demo."""
    most = _digits.TRAINING_EXAMPLES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _options.add_out(parser, "out/sparse_digits")
    parser.add_argument(
        "--seed", type=_options.integer(0), default=0, help="of initial values and batches (%(default)s)"
    )
    parser.add_argument("--steps", type=_options.integer(1), default=840, help="per run (%(default)s: 40 epochs of 64)")
    parser.add_argument("--batch", type=_options.integer(1, most), default=64, help="digits per step (%(default)s)")
    _options.add_wing(parser, "both")
    parser.add_argument(
        "--lam",
        type=_options.positive(1),
        default=1e-3,
        help="strength of both penalties (%(default)s: from the middle of 1e-5 ... 3e-2; at the ends hardly a zero, "
        "hardly a weight)",
    )
    options = parser.parse_args(argv)
    _options.make_writable(parser, options.out)
    options.halves = _options.halves(parser, options.wing)
    return options


def train_all(options: argparse.Namespace, data: Digits, batches: np.ndarray, err: Console) -> dict[Key, Run]:
    """Every framework, penalty and method from the same initial values on the same batches."""
    init = _digits.initial_values(options.seed)
    look_at = sorted({round(s) for s in np.linspace(0, options.steps, 61)})
    keys = [Key(w, p, m) for w in options.halves for p in PENALTIES for m in METHODS]
    runs = {}
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=options.steps * len(keys))
        for key in keys:
            progress.update(task, description=f"{WINGS[key.wing]}, {key.penalty}, {METHODS[key.method]}")
            half = options.halves[key.wing]
            penalty = half.penalties(options.lam)[key.penalty]
            runs[key] = half.train(
                data, init, batches, penalty, key.method, look_at, tick=lambda steps: progress.advance(task, steps)
            )
    return runs


def compare(
    options: argparse.Namespace, data: Digits, batches: np.ndarray, runs: dict[Key, Run]
) -> dict[str, report.Difference]:
    """PyTorch against JAX for prox_adam, per penalty; the float64 runs are made here."""
    init = _digits.initial_values(options.seed)
    look_at = [min(options.steps, report.DOUBLE_STEPS)]
    found = {}
    for name in PENALTIES:
        double = []
        for wing, half in options.halves.items():
            with half.jax.enable_x64(True) if wing == "jax" else nullcontext():
                penalty = half.penalties(options.lam)[name]
                double.append(half.train(data, init, batches, penalty, "prox_adam", look_at, dtype="float64"))
        found[name] = report.difference([runs[Key(wing, name, "prox_adam")] for wing in options.halves], double)
    return found


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out, err = Console(highlight=False), Console(stderr=True)
    out.print(report.introduction(options.steps, options.batch, options.lam, options.seed))
    data = _digits.load()
    batches = _digits.draw_batches(options.seed, options.steps, options.batch, len(data.y_train))
    runs = train_all(options, data, batches, err)
    rows = {key: _digits.measure(run, key.penalty, data) for key, run in runs.items()}
    for wing in options.halves:
        out.print(report.results_table(wing, rows))
    parity = {}
    if len(options.halves) == 2:
        parity = compare(options, data, batches, runs)
        out.print(report.parity_table(parity))
        out.print(report.verdict(parity))
    settings = {name: getattr(options, name) for name in ("wing", "steps", "batch", "lam", "seed")}
    files = report.save(options.out, settings, rows, runs, parity)
    from _digits_plots import draw  # late: the numbers are saved before matplotlib is even imported

    files += draw(options.out, runs, METHODS)
    out.print(f"In {options.out}: {', '.join(files)}")
    out.print(report.what_to_see(next(iter(options.halves)), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

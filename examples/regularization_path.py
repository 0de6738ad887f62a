"""How strong should the penalty be? A whole regularization path as one training run, in PyTorch and in JAX.

    python examples/regularization_path.py            both frameworks; under a minute on two cores, mostly compiling
    python examples/regularization_path.py --help     seed, steps, members, penalty, one framework only, where files go

The network of `sparse_digits.py` is trained once per strength `lam`, log spaced from 1e-5 to 3e-2: all these members
are one vmapped, compiled run of `fr.prox_adam`. They share initial values and batches, so only `lam` tells them apart.
The penalty is L1 on all weights plus group lasso on the hidden units' incoming weights, or one of the two.

1000 digits are trained on and 347 validate. Two members are picked by their validation accuracy `a` alone: the best,
and by the one-standard-error rule the strongest `lam` whose accuracy is within sqrt(a (1 - a) / 347) of the best: so
small a difference may be chance, so take the smaller network. Only then are the 450 test digits looked at. With 347
digits that is a coarse rule: the seeds 0 to 3 pick networks of 30, 44, 35 and 58 live units. The second pick is saved
with safetensors, read back into a new network, and must predict the same, bit by bit.

The function that trains has one text for both frameworks; the model and the arrays are in `_digits_torch.py` and
`_digits_jax.py`.
"""

import argparse
import csv
import json
import sys
import time
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import _digits
import _options
from _digits import LEARNING_RATE, PENALIZED, UNITS, Arrays, Digits
from _options import WINGS

VALIDATION_EXAMPLES = 347
WEAKEST, STRONGEST = 1e-5, 3e-2  # hardly a zero that is not a blank pixel's; hardly a weight

WORDS = {"both": "l1 + group_lasso"}


class Members(NamedTuple):
    """The path of one framework, weakest penalty first."""

    trees: list[Any]  # the parameters, as the framework has them
    params: list[Arrays]  # in torch's names and layout
    accuracy: list[float]  # on the validation set
    zeros: list[float]  # fraction of the penalized weights that are exactly 0
    live: list[int]  # hidden units with an incoming weight that is not 0
    first_step: float  # seconds, most of them compiling
    all_steps: float  # seconds


class Picks(NamedTuple):
    """Two members, by their number, and what decided."""

    best: int
    one_standard_error: int
    standard_error: float


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; `options.halves` holds the imported halves of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integer, most = _options.integer, _digits.TRAINING_EXAMPLES - VALIDATION_EXAMPLES
    _options.add_out(parser, "out/regularization_path")
    parser.add_argument("--seed", type=integer(0), default=0, help="of initial values and batches (%(default)s)")
    parser.add_argument("--steps", type=integer(1), default=840, help="of training (%(default)s)")
    parser.add_argument("--batch", type=integer(1, most), default=64, help="digits per step (%(default)s)")
    parser.add_argument("--members", type=integer(2, 1000), default=24, help="strengths, log spaced (%(default)s)")
    _options.add_wing(parser, "both")
    parser.add_argument(
        "--penalty", choices=[*PENALIZED], default="both", help="l1, group_lasso or their sum (%(default)s)"
    )
    options = parser.parse_args(argv)
    _options.make_writable(parser, options.out)
    options.halves = _options.halves(parser, options.wing)
    return options


def train(half: ModuleType, data: Digits, lams: np.ndarray, options: argparse.Namespace, bar: bool) -> Any:
    """All members as one: the list of their parameters, and the seconds of the first step and of all."""
    fr = half.fr

    def make(hyper):
        return fr.prox_adam(LEARNING_RATE, half.penalties(hyper["lam"])[options.penalty])

    init, step = fr.ensemble(*fr.train_step(half.loss, make))
    hyper = {"lam": half.array(lams)}
    state = init(fr.stack([half.from_numpy(_digits.initial_values(options.seed))] * len(lams)), hyper)
    batches = _digits.draw_batches(options.seed, options.steps, options.batch, len(data.y_train))

    def batch(i):
        return half.array(data.x_train[batches[i]]), half.array(data.y_train[batches[i]])

    start = time.perf_counter()
    step(state, hyper, *batch(0))  # only for the clock: a step changes none of its arguments
    first_step = time.perf_counter() - start
    run = fr.run(step, state, hyper, batch, options.steps, progress=bar)
    return fr.unstack(run.state.params), first_step, time.perf_counter() - start


def measure(half: ModuleType, trained: Any, penalty: str, x: np.ndarray, y: np.ndarray) -> Members:
    """With NumPy alone, on the validation set."""
    trees, *seconds = trained
    params = [half.to_numpy(tree) for tree in trees]
    return Members(
        trees,
        params,
        [_digits.accuracy(p, x, y) for p in params],
        [_digits.zeros(p, penalty) for p in params],
        [UNITS - _digits.dead(p) for p in params],
        *seconds,
    )


def pick(accuracy: list[float], examples: int) -> Picks:
    """The best member, of equal ones the last; and the last whose accuracy is within one standard error of it."""
    a = max(accuracy)
    standard_error = float(np.sqrt(a * (1 - a) / examples))
    best, within = (np.flatnonzero(np.array(accuracy) >= least)[-1] for least in (a, a - standard_error))
    return Picks(int(best), int(within), standard_error)


def save_and_reload(half: ModuleType, tree: Any, file: Any, x: np.ndarray, seed: int) -> tuple[float, int]:
    """The largest difference of the logits before and after, and how many predictions the file changes in the new
    network: none would mean that nothing was read."""
    fr = half.fr
    half.save_file(fr.to_flat(tree), file)
    new = half.from_numpy(_digits.initial_values(seed + 1))
    read = fr.from_flat(new, half.load_file(file))
    was, of_new, of_read = (np.asarray(half.logits(p, half.array(x))) for p in (tree, new, read))
    return float(np.abs(was - of_read).max()), int((of_new.argmax(1) != of_read.argmax(1)).sum())


def path_table(paths: dict[str, Members], lams: np.ndarray, picks: dict[str, Picks]) -> Table:
    """One row per strength, with the columns of every framework."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("\nlam", justify="right", no_wrap=True)
    for wing in paths:
        for name in (f"{WINGS[wing]}\nvalid.", "\nzeros", "\nlive", "\npick"):
            table.add_column(name, justify="left" if "pick" in name else "right", no_wrap=True)
    for m, lam in enumerate(lams):
        cells = []
        for wing, path in paths.items():
            name = {picks[wing].one_standard_error: "1 s.e.", picks[wing].best: "best"}.get(m, "")
            cells += [f"{path.accuracy[m]:.1%}", f"{path.zeros[m]:.1%}", f"{path.live[m]}", name]
        chosen = any(m in picks[wing][:2] for wing in paths)
        table.add_row(f"{lam:.1e}", *cells, style="bold" if chosen else None)
    return table


def say_picks(out: Console, path: Members, lams: np.ndarray, picks: Picks, data: Digits) -> dict[str, dict[str, Any]]:
    """Why these two, and how they do on the test digits; returns the same for the file."""
    best, chosen, error = picks
    said = {}
    out.print(
        f"  within one standard error of the best: {path.accuracy[best]:.2%} - sqrt({path.accuracy[best]:.4f} * "
        f"{1 - path.accuracy[best]:.4f} / {VALIDATION_EXAMPLES}) = {path.accuracy[best] - error:.2%} or more; the "
        f"strongest lam with that has {path.accuracy[chosen]:.2%}"
    )
    for name, m in (("best", best), ("one standard error", chosen)):
        test = _digits.accuracy(path.params[m], data.x_test, data.y_test)
        said[name] = {"member": m, "lam": float(lams[m]), "test_accuracy": test, "live": path.live[m]}
        out.print(
            f"  {name}: lam {lams[m]:.1e}, test accuracy {test:.1%}, {path.live[m]} of {UNITS} hidden units live, "
            f"{path.zeros[m]:.1%} exact zeros"
        )
    return said


def apart(paths: dict[str, Members]) -> dict[str, float]:
    """The largest differences between the frameworks, over the members."""
    one, other = paths.values()
    zeros = [
        sum(int(((a[name] == 0) != (b[name] == 0)).sum()) for name in a)
        for a, b in zip(one.params, other.params, strict=True)
    ]
    return {
        "validation_accuracy": float(np.abs(np.subtract(one.accuracy, other.accuracy)).max()),
        "zeros": float(np.abs(np.subtract(one.zeros, other.zeros)).max()),
        "weights_zero_in_one_only": max(zeros),
    }


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    lams = np.geomspace(WEAKEST, STRONGEST, options.members).astype(np.float32)
    data, x, y = _digits.hold_out(_digits.load(), VALIDATION_EXAMPLES)
    words = WORDS.get(options.penalty, options.penalty)
    out.print(
        f"{len(lams)} members, penalty {words}, {options.steps} steps, batch {options.batch}, seed {options.seed}: "
        f"{len(data.y_train)} digits to train on, {len(y)} to validate, {len(data.y_test)} to test. "
        f"zeros = exact ones in the penalized weights; live = hidden units, of {UNITS}, with a weight that is not 0."
    )
    paths = {}
    for wing, half in options.halves.items():
        if err.is_terminal:
            err.print(f"{WINGS[wing]}: compiling, then {options.steps} steps of {len(lams)} members")
        trained = train(half, data, lams, options, bar=err.is_terminal)
        paths[wing] = measure(half, trained, options.penalty, x, y)
    picks = {wing: pick(path.accuracy, len(y)) for wing, path in paths.items()}
    out.print(path_table(paths, lams, picks))

    record: dict[str, Any] = {
        "settings": {name: getattr(options, name) for name in ("penalty", "members", "steps", "batch", "seed", "wing")},
        "picks": {},
    }
    for wing, half in options.halves.items():
        path = paths[wing]
        out.print(
            f"{WINGS[wing]}: {len(lams)} members in {path.all_steps:.1f} s, {path.first_step:.1f} s of them for the "
            "first step, which is compiled"
        )
        record["picks"][wing] = say_picks(out, path, lams, picks[wing], data)
        file = options.out / f"picked_{wing}.safetensors"
        tree = path.trees[picks[wing].one_standard_error]
        difference, changed = save_and_reload(half, tree, file, data.x_test, options.seed)
        out.print(
            f"  {file.name}, read into a new network: logits of the test digits differ by {difference:g}; {changed} of "
            f"{len(data.y_test)} predictions of the new network changed"
        )
        record["picks"][wing]["reloaded"] = {"logits_differ_by": difference, "predictions_changed": changed}
    if len(paths) == 2:
        record["torch_minus_jax"] = found = apart(paths)
        out.print(
            f"PyTorch - JAX, largest over the members: validation accuracy {found['validation_accuracy']:.2%}, exact "
            f"zeros {found['zeros']:.2%}, weights that are zero in one only {found['weights_zero_in_one_only']}"
        )

    with open(options.out / "path.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["wing", "lam", "validation_accuracy", "zeros", "live"])
        for wing, path in paths.items():
            rows = zip(lams, path.accuracy, path.zeros, path.live, strict=True)
            writer.writerows([wing, float(lam), *row] for lam, *row in rows)
    (options.out / "path.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    from _path_plots import draw  # late: the numbers are saved before matplotlib is even imported

    pictures = draw(options.out, paths, lams, picks, VALIDATION_EXAMPLES, words)
    networks = [f"picked_{wing}.safetensors" for wing in paths]
    out.print(f"In {options.out}: {', '.join(['path.csv', 'path.json', *networks, *pictures])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

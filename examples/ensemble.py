"""A deep ensemble with bagging, trained as one network: does it know when it does not know?

    python examples/ensemble.py            seconds; --wing torch first compiles for half a minute, and prints the same
    python examples/ensemble.py --help     seed, steps, members, strength, framework, where the files go

The 16 members of one vmapped, compiled `fr.prox_adam` run start from their own initial values, and each sees its own
bootstrap sample of the 1347 training digits (drawn with replacement, so that it misses a third of them): `batch_axes=0`
says that batches have a member axis. The penalty is L1. The test digits are then turned, which none was in training.

What to look at, single members (their mean) against the ensemble (the mean of their probabilities):

    accuracy              falls as the digits turn; the ensemble's is above that of its members as long as they are
                          mostly right
    nll                   negative log likelihood; the ensemble's is lower, always: that is Jensen's inequality
    calibration error     |confidence - accuracy|, averaged over 15 bins of confidence. From 15 degrees on all are too
                          sure of themselves, the ensemble less. Up to 10 it is the ensemble that is off: its members
                          doubt different digits, so that their mean is less sure than it could be
    mutual information    entropy of the mean - mean of the entropies, in nats: how much the members disagree. It grows
                          with the angle, several times over, up to 30 degrees: the ensemble's own sign of doubt
    most common           the class that the ensemble names most often, and how often: 10% would be right. Turned by 90
                          degrees nearly everything is a 4, to all members: they learned the same from the same digits,
                          so they disagree hardly more than on upright digits: what all get wrong, none sees
"""

import argparse
import csv
import sys
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.ndimage import rotate
from scipy.special import log_softmax, logsumexp

import _digits
import _options
from _digits import LEARNING_RATE, Arrays, Digits

ANGLES = [0, 5, 10, 15, 20, 30, 45, 90]
PEAK = 30
BINS = 15


class Row(NamedTuple):
    """Measures on the test digits turned by one angle; `single` is the mean over the members."""

    angle: int
    accuracy_single: float
    accuracy: float
    nll_single: float
    nll: float
    calibration_single: float
    calibration: float
    mutual_information: float
    variance: float  # of the members' probabilities, summed over the classes
    most_common: int  # the class that the ensemble predicts most often
    share: float  # of all its predictions; 10% of the digits are of each class


def train(half: ModuleType, data: Digits, options: argparse.Namespace, bar: bool) -> Arrays:
    """The members' parameters, stacked; torch's names and layout."""
    fr = half.fr
    init, step = fr.train_step(half.loss, lambda hyper: fr.prox_adam(LEARNING_RATE, half.penalties(hyper["lam"])["l1"]))
    init, step = fr.ensemble(init, step, batch_axes=0)
    members = range(options.members)
    starts = [half.from_numpy(_digits.initial_values(options.seed + 1000 * m)) for m in members]
    index = np.stack([bootstrap(options, m, len(data.y_train)) for m in members], axis=1)  # [step, member, batch]
    hyper = {"lam": options.lam}  # one number: the same for all members
    run = fr.run(
        step,
        init(fr.stack(starts), hyper),
        hyper,
        lambda i: (half.array(data.x_train[index[i]]), half.array(data.y_train[index[i]])),
        options.steps,
        progress=bar,
    )
    return half.to_numpy(run.state.params)


def bootstrap(options: argparse.Namespace, member: int, examples: int) -> np.ndarray:
    """The batches of one member: epochs of a sample, as large as the training set, drawn with replacement."""
    sample = np.random.default_rng([options.seed, 2, member]).integers(examples, size=examples)
    return sample[_digits.draw_batches(options.seed + 1000 * member, options.steps, 64, examples)]


def turned(x: np.ndarray, angle: int) -> np.ndarray:
    """8x8 images, counterclockwise; what comes in from outside is blank."""
    return rotate(x.reshape(-1, 8, 8), angle, axes=(2, 1), reshape=False, order=1).reshape(x.shape)


def nll(log_p: np.ndarray, y: np.ndarray) -> float:
    return float(-log_p[np.arange(len(y)), y].mean())


def calibration_error(p: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error: |mean confidence - accuracy| in bins of confidence, weighed by their examples."""
    confidence, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bins, confidence - right, BINS)  # count * (mean confidence - accuracy)
    return float(np.abs(gap).sum() / len(y))


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-38))).sum(-1)


def disagreement(log_p: np.ndarray) -> np.ndarray:
    """Mutual information of the label and the member, of every example, in nats; from [member, example, class]."""
    p = np.exp(log_p)
    return entropy(p.mean(0)) - entropy(p).mean(0)


def measure(params: Arrays, x: np.ndarray, y: np.ndarray, angle: int) -> Row:
    log_p = log_softmax(_digits.logits(params, turned(x, angle)).astype(float), axis=-1)  # [member, example, class]
    log_mean = logsumexp(log_p, axis=0) - np.log(len(log_p))
    p, mean = np.exp(log_p), np.exp(log_mean)
    predicted = np.bincount(mean.argmax(-1), minlength=10) / len(y)
    return Row(
        angle,
        accuracy_single=float((p.argmax(-1) == y).mean()),
        accuracy=float((mean.argmax(-1) == y).mean()),
        nll_single=float(np.mean([nll(member, y) for member in log_p])),
        nll=nll(log_mean, y),
        calibration_single=float(np.mean([calibration_error(member, y) for member in p])),
        calibration=calibration_error(mean, y),
        mutual_information=float(disagreement(log_p).mean()),
        variance=float(p.var(0).sum(-1).mean()),
        most_common=int(predicted.argmax()),
        share=float(predicted.max()),
    )


def results_table(rows: list[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 0))
    table.add_column("\nangle", justify="right", no_wrap=True)
    for name in ("accuracy", "nll", "calibr."):
        table.add_column(f"{name}\nsingle", justify="right", no_wrap=True)
        table.add_column("\nensemble", justify="right", no_wrap=True, style="bold")
    for name in ("mutual\ninf.", "var.\nof p", "most\ncommon"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        cells = [f"{r.accuracy_single:.1%}", f"{r.accuracy:.1%}", *(f"{value:.3f}" for value in r[3:9])]
        table.add_row(f"{r.angle}°", *cells, f"{r.most_common}: {r.share:.0%}")
    return table


def draw(rows: list[Row], params: Arrays, x: np.ndarray, y: np.ndarray) -> Any:
    """The table as curves, above one digit as it turns."""
    from matplotlib.figure import Figure

    r = Row(*(np.array(column) for column in zip(*rows, strict=True)))
    peak = ANGLES.index(PEAK)
    grown = r.mutual_information[peak] / r.mutual_information[0]
    figure = Figure(figsize=(12, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(7, 2))
    panels = top.subplots(2, 2)
    single, ensemble = {"color": "#D55E00", "marker": "o", "label": "single member (mean)"}, {"color": "black"}
    ensemble |= {"marker": "o", "label": "ensemble"}
    pairs = {
        "accuracy, %": (100 * r.accuracy_single, 100 * r.accuracy),
        "negative log likelihood": (r.nll_single, r.nll),
        "expected calibration error": (r.calibration_single, r.calibration),
    }
    for axes, (name, (of_single, of_ensemble)) in zip(panels.flat, pairs.items(), strict=False):
        axes.plot(r.angle, of_single, **single)
        axes.plot(r.angle, of_ensemble, **ensemble)
        axes.set_title(name)
        axes.legend(frameon=False)
    axes = panels[1, 1]
    axes.plot(r.angle, r.mutual_information, color="#0072B2", marker="o", label="mutual information, nats")
    axes.plot(r.angle, r.variance, color="#009E73", marker="o", label="variance of the probabilities")
    axes.set_title("how much the members disagree")
    axes.legend(frameon=False)
    for axes in panels.flat:
        axes.set_ylim(bottom=0)
        axes.set_xticks(r.angle, [f"{a}°" for a in r.angle])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("test digits turned by")
    log_p = log_softmax(_digits.logits(params, turned(x, PEAK)).astype(float), axis=-1)
    shown = int(disagreement(log_p).argmax())
    for axes, angle in zip(bottom.subplots(1, len(rows)), r.angle, strict=True):
        image = turned(x[shown : shown + 1], angle)
        p = np.exp(log_softmax(_digits.logits(params, image).astype(float), axis=-1))[:, 0]
        classes, votes = np.unique(p.argmax(1), return_counts=True)
        order = np.argsort(-votes)[:3]
        axes.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"{angle}°", fontsize=11)
        axes.set_xlabel(", ".join(f"{classes[i]}: {votes[i]}" for i in order), fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    bottom.suptitle(
        f"The {y[shown]} of most disagreement at {PEAK}°, and how many of the {len(p)} members take it for what",
        fontsize=12,
    )
    figure.suptitle(
        f"{len(p)} bagged members. Their disagreement grows {grown:.1f} times up to {PEAK}°, where accuracy is "
        f"{r.accuracy[peak]:.0%};\nat {r.angle[-1]}°, where {r.share[-1]:.0%} of the digits look like a "
        f"{r.most_common[-1]} to all of them, they agree again, and are wrong",
        fontsize=12.5,
    )
    return figure


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integer = _options.integer
    _options.add_out(parser, "out/ensemble")
    parser.add_argument("--seed", type=integer(0), default=0, help="of everything that is drawn (%(default)s)")
    parser.add_argument("--steps", type=integer(1), default=840, help="of training, 64 digits each (%(default)s)")
    parser.add_argument("--members", type=integer(2, 1000), default=16, help="(%(default)s)")
    parser.add_argument(
        "--lam", type=_options.positive(1), default=1e-4, help="strength of the L1 penalty (%(default)s)"
    )
    _options.add_wing(parser, "jax", both=False)
    options = parser.parse_args(argv)
    _options.make_writable(parser, options.out)
    options.half = _options.halves(parser, options.wing)[options.wing]
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True)
    data = _digits.load()
    params = train(options.half, data, options, bar=err.is_terminal)
    rows = [measure(params, data.x_test, data.y_test, angle) for angle in ANGLES]
    out.print(results_table(rows))
    first, peak, last = rows[0], rows[ANGLES.index(PEAK)], rows[-1]
    out.print(
        f"From upright to {peak.angle}°, accuracy falls from {first.accuracy:.1%} to {peak.accuracy:.1%}, and the "
        f"mutual information grows {peak.mutual_information / first.mutual_information:.1f} times. At {last.angle}° "
        f"{last.share:.0%} are taken for a {last.most_common} by common consent: "
        f"{last.mutual_information / first.mutual_information:.1f} times."
    )
    with open(options.out / "ensemble.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    draw(rows, params, data.x_test, data.y_test).savefig(options.out / "ensemble.png", dpi=130)
    out.print(f"In {options.out}: ensemble.csv, ensemble.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

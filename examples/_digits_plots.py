"""The three pictures of `sparse_digits.py`. Titles state what the numbers of this run say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Runs = Mapping[Any, Any]  # (wing, penalty, method) -> Run
Labels = Mapping[str, str]  # method -> words

# Okabe and Ito's colours, which colour-blind readers tell apart
COLORS = {"autodiff": "#56B4E9", "soft": "#D55E00", "prox_adam": "#000000"}
ZERO, GAP = (0.0, 0.0, 0.0, 1.0), (0.8, 0.8, 0.8, 1.0)  # colours that no weight has


def draw(out: Path, runs: Runs, labels: Labels) -> list[str]:
    """Write the pictures; return their names."""
    wings, penalties, _ = (list(dict.fromkeys(part)) for part in zip(*runs, strict=True))
    figures = {
        "objective.png": objective_curves(runs, labels, wings, penalties),
        "first_layer.png": first_layer(runs, labels, wings[0], penalties),
        "histogram.png": histograms(runs, labels, wings[0], penalties),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=130)
    return list(figures)


def objective_curves(runs: Runs, labels: Labels, wings: list[str], penalties: list[str]) -> Figure:
    """Objective over steps; the first framework as lines, the second as dots on them."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for axes, penalty in zip(figure.subplots(1, len(penalties)), penalties, strict=True):
        for method, label in labels.items():
            run, color = runs[wings[0], penalty, method], COLORS[method]
            # autodiff is wide and pale, so that prox_adam on top does not hide it
            width, alpha = (7, 0.55) if method == "autodiff" else (1.8, 1)
            axes.plot(run.steps, run.objective, color=color, linewidth=width, alpha=alpha, label=label)
        for wing in wings[1:]:
            for method in labels:
                run, color = runs[wing, penalty, method], COLORS[method]
                label = f"the same in {wing}" if method == "prox_adam" else None
                dots = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white", "linestyle": "none"}
                axes.plot(run.steps[::4], run.objective[::4], color=color, label=label, **dots)
        plain, soft, ours = (runs[wings[0], penalty, method].objective[-1] for method in labels)
        axes.set_title(
            f"{penalty}: prox_adam ends at {ours / plain:.2f} x autodiff's objective,\n"
            f"soft-thresholding after Adam at {soft / plain:.1f} x",
            fontsize=11.5,
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="best")
        _label(axes, "step", "training loss + penalty (log scale)")
    return figure


def first_layer(runs: Runs, labels: Labels, wing: str, penalties: list[str]) -> Figure:
    """The incoming weights of every hidden unit as an image."""
    figure = Figure(figsize=(12, 8.9), layout="constrained")
    for line, penalty in zip(figure.subplots(len(penalties), len(labels)), penalties, strict=True):
        shown = {method: runs[wing, penalty, method].params["hidden.weight"] for method in labels}
        most = float(np.quantile(np.abs(shown["autodiff"]), 0.995)) or 1.0
        colors = ScalarMappable(Normalize(-most, most), colormaps["PuOr"])
        for axes, (method, weights) in zip(line, shown.items(), strict=True):
            axes.imshow(mosaic(weights, colors), interpolation="nearest")
            zeros, dead = (weights == 0).mean(), int((weights == 0).all(1).sum())
            title = f"{penalty}, {labels[method]}:\n{zeros:.1%} exact zeros in this layer, {dead} dead units"
            axes.set_title(title, fontsize=11)
            axes.set_axis_off()
        figure.colorbar(colors, ax=line, shrink=0.75, extend="both").set_label("weight (never black)")
    figure.suptitle(
        f"Incoming weights of the {len(weights)} hidden units ({wing}), one 8x8 image each: "
        "black is exactly zero, white is only small\n"
        "(zeros of the first layer; the table counts those of all penalized weights)",
        fontsize=12.5,
    )
    return figure


def mosaic(weights: np.ndarray, colors: ScalarMappable) -> np.ndarray:
    """One tile per unit, as RGBA; exact zeros in a colour of their own."""
    units, pixels = weights.shape
    side, across = round(pixels**0.5), int(np.ceil(units**0.5))
    canvas = np.tile(np.array(GAP), (across * (side + 1) + 1, across * (side + 1) + 1, 1))
    for i, w in enumerate(weights.reshape(units, side, side)):
        top, left = (i // across) * (side + 1) + 1, (i % across) * (side + 1) + 1
        canvas[top : top + side, left : left + side] = np.where((w == 0)[..., None], ZERO, colors.to_rgba(w))
    return canvas


def histograms(runs: Runs, labels: Labels, wing: str, penalties: list[str]) -> Figure:
    """Sizes of the first layer's weights: a bar for exactly 0, and a histogram over powers of ten for the rest."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    bins = np.logspace(-7, 0.5, 61)
    for part, penalty in zip(figure.subfigures(1, len(penalties)), penalties, strict=True):
        zero, rest = part.subplots(1, 2, width_ratios=(1, 4))
        share = {}
        for i, method in enumerate(labels):
            size = np.abs(runs[wing, penalty, method].params["hidden.weight"]).ravel()
            share[method] = (size == 0).mean()
            zero.bar(i, 100 * share[method], color=COLORS[method])
            zero.text(i, 100 * share[method], f"{share[method]:.0%}", ha="center", va="bottom", fontsize=9)
            counts, _ = np.histogram(np.clip(size[size > 0], bins[0], bins[-1]), bins)
            rest.stairs(100 * counts / size.size, bins, color=COLORS[method], label=labels[method], linewidth=1.8)
        zero.set_xticks([])
        zero.set_ylim(0, 105)
        rest.set_xscale("log")
        rest.set_ylim(0, 1.3 * rest.get_ylim()[1])  # room for the legend
        rest.legend(frameon=False, loc="upper left")
        _label(zero, "exactly 0", "% of the hidden layer's weights")
        _label(rest, "|w| of the others (log scale; the first bin holds all below)", "% per bin")
        part.suptitle(
            f"{penalty} ({wing}), exact zeros: {share['prox_adam']:.0%} prox_adam, {share['autodiff']:.0%} autodiff\n"
            "(of the first layer; the table counts those of all penalized weights)",
            fontsize=11.5,
        )
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)

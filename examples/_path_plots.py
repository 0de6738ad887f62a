"""The two pictures of `regularization_path.py`. Titles state what the numbers of this run say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from _digits import UNITS
from _digits_plots import mosaic
from _options import WINGS

# Okabe and Ito's colours, which colour-blind readers tell apart
BEST, CHOSEN, BAND = "#0072B2", "#D55E00", "#56B4E9"


def draw(
    out: Path, paths: Mapping[str, Any], lams: np.ndarray, picks: Mapping[str, Any], examples: int, penalty: str
) -> list[str]:
    """Write the pictures; return their names."""
    wing = next(iter(paths))
    figures = {
        "path.png": path_curves(paths, lams, picks[wing], examples, penalty),
        "path_first_layer.png": first_layers(paths[wing], lams, picks[wing], wing, penalty),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=130)
    return list(figures)


def path_curves(paths: Mapping[str, Any], lams: np.ndarray, picks: Any, examples: int, penalty: str) -> Figure:
    """Accuracy, zeros and live units over strength: the first framework as lines, the second as rings on them."""
    first, *others = paths
    path = paths[first]
    best, chosen, error = picks
    figure = Figure(figsize=(10, 9), layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    curves = {
        "validation accuracy, %": [100 * np.array(p.accuracy) for p in paths.values()],
        "exact zeros, % of penalized weights": [100 * np.array(p.zeros) for p in paths.values()],
        f"live hidden units, of {UNITS}": [np.array(p.live) for p in paths.values()],
    }
    for axes, (label, values) in zip(rows, curves.items(), strict=True):
        axes.plot(lams, values[0], color="black", linewidth=1.8, label=WINGS[first])
        for wing, other in zip(others, values[1:], strict=True):
            rings = {"marker": "o", "markersize": 6, "markerfacecolor": "none", "linestyle": "none"}
            axes.plot(lams, other, color="black", label=f"{WINGS[wing]}, the same members", **rings)
        for m, color, name in ((best, BEST, "best"), (chosen, CHOSEN, "one standard error")):
            axes.axvline(lams[m], color=color, linewidth=1.5, label=f"pick: {name}, lam {lams[m]:.1e}")
            axes.plot(lams[m], values[0][m], "o", color=color, markersize=8)
            if m == chosen or best != chosen:
                right, above = m == chosen, m == chosen and values[0][-1] < values[0][0]  # clear of the curve
                axes.annotate(
                    f"{values[0][m]:.3g}",
                    (lams[m], values[0][m]),
                    (8 if right else -8, 5 if above else -14),
                    textcoords="offset points",
                    ha="left" if right else "right",
                    color=color,
                )
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    top, bottom = 100 * path.accuracy[best], max(100 * path.accuracy[best] - 12, 0)
    below = sum(100 * a < bottom for a in path.accuracy)
    rows[0].set_ylim(bottom, min(top + 1.5, 100.5))
    if below:
        rows[0].text(0.99, 0.03, f"{below} members below {bottom:.0f}%", transform=rows[0].transAxes, ha="right")
    rows[0].axhspan(
        top - 100 * error, top, color=BAND, alpha=0.35, linewidth=0, label="within one standard error of the best"
    )
    rows[0].legend(frameon=False, loc="lower left")
    for axes in rows[1:]:
        axes.set_ylim(bottom=0)
    rows[-1].set_xscale("log")
    rows[-1].set_xlabel(f"lam (log scale), penalty {penalty}")
    figure.suptitle(
        f"{len(lams)} strengths trained as one. The strongest within {error:.1%} (one standard error, {examples} "
        f"digits)\nof the best validation accuracy keeps {path.live[chosen]} hidden units; the best {path.live[best]}",
        fontsize=12.5,
    )
    return figure


def first_layers(path: Any, lams: np.ndarray, picks: Any, wing: str, penalty: str) -> Figure:
    """The incoming weights of every hidden unit, for six members along the path, the picks among them."""
    shown = _along(picks, len(lams))
    figure = Figure(figsize=(12, 9), layout="constrained")
    weights = {m: path.params[m]["hidden.weight"] for m in shown}
    most = float(np.quantile(np.abs(weights[shown[0]]), 0.995)) or 1.0
    colors = ScalarMappable(Normalize(-most, most), colormaps["PuOr"])
    grid = figure.subplots(2, -(-len(shown) // 2), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, m in zip(grid.flat, shown, strict=False):
        axes.imshow(mosaic(weights[m], colors), interpolation="nearest")
        name = {picks.one_standard_error: ", pick: one s.e.", picks.best: ", pick: best"}.get(m, "")
        color = {picks.one_standard_error: CHOSEN, picks.best: BEST}.get(m, "black")
        axes.set_title(
            f"lam {lams[m]:.1e}{name}\n{path.live[m]} live units, validation {path.accuracy[m]:.1%}",
            fontsize=11,
            color=color,
        )
    figure.colorbar(colors, ax=grid, shrink=0.6, extend="both").set_label("weight (never black)")
    figure.suptitle(
        f"The first layer along the path ({WINGS[wing]}, penalty {penalty}): one 8x8 image per "
        "hidden unit, black is exactly zero",
        fontsize=12.5,
    )
    return figure


def _along(picks: Any, members: int) -> list[int]:
    """Up to six members: both picks, the ends, and those that fill the widest gaps."""
    shown = {0, members - 1, *picks[:2]}
    while len(shown) < min(6, members):
        places = sorted(shown)
        left, right = max(zip(places, places[1:], strict=False), key=lambda pair: pair[1] - pair[0])
        shown.add((left + right) // 2)
    return sorted(shown)

"""How good prox_adam's end points are on real digits: its objective against autodiff's, exact zeros, the first step.

    python benchmarks/digits_quality.py                  JAX: three seeds, eight strengths; a minute on two cores
    python benchmarks/digits_quality.py --wing torch     the same on torch.func; two minutes

Network, data and methods are those of `examples/sparse_digits.py`; all members (seed x strength) are trained at once,
by vmap over their initial values, batches and strengths. A member counts if it learns: a test accuracy of at least 90%
with autodiff or with prox_adam, so that one on which only prox_adam fails counts against it. The row "autodiff, other
order" is autodiff again on batches in another order: what chance alone does to an objective. "Idle" are the weights of
pixels that are 0 in all training examples, on which the penalty acts alone; to see their end prox_adam trains longer.

A step moves a weight by the learning rate at most, so that the first one can only take weights that start within 0.003
of 0: with PyTorch's default initial values, uniform on +-0.125, 2.4% of them; with flax's, which are used here, 1.8%.

Requirements are checked for l1; exits with 1 if one is missed.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.status import Status
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import _digits  # noqa: E402  # the demo's own text
import _options  # noqa: E402

EARLY, LATE, LAST = 840, 2500, 5000
LAMS = np.geomspace(1e-5, 3e-2, 8).astype(np.float32)
MIDDLE = 3  # the lower one of the two in the middle: the one with fewer zeros
ROWS = {
    "autodiff": "autodiff, Adam",
    "order": "autodiff, other order",
    "soft": "soft-threshold after Adam",
    "prox_adam": "prox_adam",
}


class Look(NamedTuple):
    """All members of one method after some steps."""

    params: _digits.Arrays  # torch's names and layout; leading axis: member
    objective: np.ndarray  # shape=(members,)


class Members(NamedTuple):
    """What is trained side by side; the leading axis is the member."""

    seeds: np.ndarray  # shape=(members,)
    lams: np.ndarray  # shape=(members,)
    init: _digits.Arrays
    batches: np.ndarray  # shape=(members, steps, batch)
    other: np.ndarray  # the same, in another order


def train_torch(
    data: _digits.Digits, members: Members, batches: np.ndarray, penalty: str, method: str, stops: Iterable[int]
) -> dict[int, Look]:
    """All members by one method; a look at them at every stop."""
    import torch

    wing = importlib.import_module("_digits_torch")
    vmap = torch.func.vmap

    def make(lam: Any) -> Any:
        return wing.methods(wing.loss, wing.penalties(lam)[penalty], _digits.LEARNING_RATE)[method]

    def start(params: Any, lam: Any) -> Any:
        return make(lam)[1].init(params)

    def advance(params: Any, state: Any, lam: Any, batch: Any) -> Any:
        return wing.make_step(*make(lam))(params, state, x[batch], y[batch])

    def objective(params: Any, lam: Any) -> Any:
        return wing.fr.penalize(wing.loss, wing.penalties(lam)[penalty])(params, x, y)

    x, y = torch.tensor(data.x_train), torch.tensor(data.y_train)
    index, lams, params = torch.tensor(batches), torch.tensor(members.lams), wing.from_numpy(members.init)
    state = vmap(start)(params, lams)
    looks, done = {}, 0
    for stop in stops:
        for i in range(done, stop):
            params, state = vmap(advance)(params, state, lams, index[:, i])
        done = stop
        looks[stop] = Look(wing.to_numpy(params), vmap(objective)(params, lams).numpy())
    return looks


def train_jax(
    data: _digits.Digits, members: Members, batches: np.ndarray, penalty: str, method: str, stops: Iterable[int]
) -> dict[int, Look]:
    """All members by one method; a look at them at every stop."""
    import jax
    import jax.numpy as jnp

    wing = importlib.import_module("_digits_jax")
    vmap = jax.vmap

    def make(lam: Any) -> Any:
        return wing.methods(wing.loss, wing.penalties(lam)[penalty], _digits.LEARNING_RATE)[method]

    def start(params: Any, lam: Any) -> Any:
        return make(lam)[1].init(params)

    def advance(begin: Any, end: Any, carry: Any, lam: Any, batch: Any) -> Any:
        step = wing.make_step(*make(lam))
        return jax.lax.fori_loop(begin, end, lambda i, carry: step(*carry, x[batch[i]], y[batch[i]]), carry)

    def objective(params: Any, lam: Any) -> Any:
        return wing.fr.penalize(wing.loss, wing.penalties(lam)[penalty])(params, x, y)

    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train, jnp.int32)
    index, lams, params = jnp.asarray(batches, jnp.int32), jnp.asarray(members.lams), wing.from_numpy(members.init)
    carry = params, vmap(start)(params, lams)
    run = jax.jit(vmap(advance, in_axes=(None, None, 0, 0, 0)))
    value = jax.jit(vmap(objective))
    looks, done = {}, 0
    for stop in stops:
        carry = run(jnp.int32(done), jnp.int32(stop), carry, lams, index)
        done = stop
        looks[stop] = Look(wing.to_numpy(carry[0]), np.asarray(value(carry[0], lams)))
    return looks


TRAIN: dict[str, Callable[..., dict[int, Look]]] = {"torch": train_torch, "jax": train_jax}


def make_members(seeds: int, steps: int, batch: int, like: str) -> Members:
    """Every seed with every strength; members of one seed share initial values and batches."""
    seed = np.repeat(np.arange(seeds), len(LAMS))
    init = [_digits.initial_values(s, like) for s in seed]
    batches = {s: _digits.draw_batches(s, steps, batch, _digits.TRAINING_EXAMPLES) for s in range(2 * seeds)}
    return Members(
        seed,
        np.tile(LAMS, seeds),
        {name: np.stack([p[name] for p in init]) for name in init[0]},
        np.stack([batches[s] for s in seed]),
        np.stack([batches[s + seeds] for s in seed]),
    )


def accuracies(look: Look, data: _digits.Digits) -> np.ndarray:
    members = [{name: w[m] for name, w in look.params.items()} for m in range(len(look.objective))]
    return np.array([_digits.accuracy(p, data.x_test, data.y_test) for p in members])


def zero_share(look: Look, names: list[str]) -> np.ndarray:
    """Per member the fraction of exact zeros among these weights."""
    return np.concatenate([(look.params[n] == 0).reshape(len(look.objective), -1) for n in names], 1).mean(1)


def by_lam(x: np.ndarray) -> list[float]:
    """The mean over the seeds, per strength."""
    return [float(v) for v in x.reshape(-1, len(LAMS)).mean(0)]


class Ratio(NamedTuple):
    """Objectives relative to autodiff's, over the members that learn."""

    mean: float
    max: float
    members: int


def ratios(looks: dict[str, dict[int, Look]], data: _digits.Digits) -> dict[str, dict[int, Ratio]]:
    """Per method and number of steps."""
    found: dict[str, dict[int, Ratio]] = {method: {} for method in list(ROWS)[1:]}
    for steps in (EARLY, LATE):
        plain, ours = looks["autodiff"][steps], looks["prox_adam"][steps]
        learns = np.maximum(accuracies(plain, data), accuracies(ours, data)) >= 0.9
        for method in found:
            ratio = (looks[method][steps].objective / plain.objective)[learns]
            found[method][steps] = Ratio(float(ratio.mean()), float(ratio.max()), int(learns.sum()))
    return found


def per_strength(
    looks: dict[str, dict[int, Look]], data: _digits.Digits, names: list[str], other_init: Look
) -> dict[str, list[float]]:
    """What prox_adam does: row title -> one value per strength, the mean over the seeds."""
    ours = looks["prox_adam"]
    idle = (data.x_train == 0).all(0)
    rows = {"left after 1 step": by_lam(1 - zero_share(ours[1], names))}
    rows["same, torch's init"] = by_lam(1 - zero_share(other_init, names))
    for steps in (EARLY, LATE):
        rows[f"zeros @{steps}"] = by_lam(zero_share(ours[steps], names))
    for steps in (LATE, LAST):
        rows[f"idle zeros @{steps}"] = by_lam((ours[steps].params["hidden.weight"][:, :, idle] == 0).mean((1, 2)))
    rows[f"accuracy @{LATE}"] = by_lam(accuracies(ours[LATE], data))
    rows["  autodiff's"] = by_lam(accuracies(looks["autodiff"][LATE], data))
    rows[f"objective ratio @{LATE}"] = by_lam(ours[LATE].objective / looks["autodiff"][LATE].objective)
    return rows


def requirements(found: dict[str, dict[int, Ratio]], rows: dict[str, list[float]]) -> list[tuple[str, float, bool]]:
    """What was promised for l1, what was measured, and whether it holds."""
    ours = found["prox_adam"]
    zeros = rows[f"zeros @{LATE}"][MIDDLE]
    left, idle = min(rows["left after 1 step"]), min(rows[f"idle zeros @{LAST}"])
    return [
        (f"mean objective / autodiff's after {LATE} steps at most 1.03", ours[LATE].mean, ours[LATE].mean <= 1.03),
        (f"largest objective / autodiff's after {LATE} steps at most 1.10", ours[LATE].max, ours[LATE].max <= 1.10),
        (f"mean objective / autodiff's after {EARLY} steps at most 1.05", ours[EARLY].mean, ours[EARLY].mean <= 1.05),
        (f"exact zeros at lam {LAMS[MIDDLE]:.1e} after {LATE} steps at least 20%", zeros, zeros >= 0.2),
        ("weights left after one step, at every strength at least 98%", left, left >= 0.98),
        (f"idle weights exactly 0 after {LAST} steps, at every strength all", idle, idle == 1),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wing", choices=[*TRAIN], default="jax", help="which framework (jax)")
    parser.add_argument("--penalty", choices=[*_digits.PENALIZED], default="l1", help="which penalty (l1)")
    parser.add_argument("--seeds", type=_options.integer(1), default=3, help="how many (3)")
    parser.add_argument("--batch", type=_options.integer(1, _digits.TRAINING_EXAMPLES), default=64, help="(64)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # these two as in the demo
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out, err = Console(highlight=False), Console(stderr=True)
    data = _digits.load()
    train = TRAIN[options.wing]
    members = make_members(options.seeds, LAST, options.batch, "flax")
    looks, seconds = {}, {}
    for row, title in ROWS.items():
        begin = time.perf_counter()
        method, batches = ("autodiff", members.other) if row == "order" else (row, members.batches)
        stops = [1, EARLY, LATE, LAST] if row == "prox_adam" else [EARLY, LATE]
        with Status(f"{options.wing}: {title}, {stops[-1]} steps of {len(members.lams)} members", console=err):
            looks[row] = train(data, members, batches, options.penalty, method, stops)
        seconds[row] = time.perf_counter() - begin
    other = make_members(options.seeds, 1, options.batch, "torch")
    other_init = train(data, other, other.batches, options.penalty, "prox_adam", [1])[1]

    found = ratios(looks, data)
    rows = per_strength(looks, data, _digits.PENALIZED[options.penalty], other_init)
    out.print(f"{options.wing}, {options.penalty}; {options.seeds} seeds, {len(LAMS)} strengths, batch {options.batch}")
    table = Table("objective / autodiff's: mean (max)", box=SIMPLE_HEAD)
    for steps in (EARLY, LATE):
        table.add_column(f"after {steps} steps", justify="right")
    for method, by_steps in found.items():
        table.add_row(ROWS[method], *(f"{r.mean:.3f} ({r.max:.3f})" for r in by_steps.values()))
    table.add_row("members that learn", *(f"{r.members} of {len(members.lams)}" for r in found["prox_adam"].values()))
    out.print(table)
    table = Table("prox_adam; %, by lam", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for lam in LAMS:
        table.add_column(f"{lam:.0e}", justify="right", no_wrap=True)
    for title, values in rows.items():
        table.add_row(title, *(f"{100 * v:.1f}" for v in values))
    out.print(table)
    out.print("Seconds: " + ", ".join(f"{ROWS[row]} {s:.0f}" for row, s in seconds.items()))
    checks = requirements(found, rows) if options.penalty == "l1" else []
    for text, value, holds in checks:
        out.print(f"{'holds' if holds else 'MISSED'}: {text}: {value:.4f}", soft_wrap=True)
    if options.json:
        record = {
            "wing": options.wing,
            "penalty": options.penalty,
            "ratios": {method: {n: r._asdict() for n, r in by_steps.items()} for method, by_steps in found.items()},
            "lams": [float(lam) for lam in LAMS],
            "per_strength": rows,
            "requirements": [{"text": t, "measured": v, "holds": bool(h)} for t, v, h in checks],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(holds for _, _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

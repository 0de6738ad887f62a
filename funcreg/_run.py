"""A long training run: progress, and stopping and resuming without losing a step. No framework."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._flat import from_flat, to_flat
from ._penalty import Penalty


class Run(NamedTuple):
    """Where a training run is.

    Attributes:
        state: after the last step.
        metrics: name -> NumPy array `[steps, ...]`: what every step returned.
        steps: how many steps were done, from the first one on.
    """

    state: Any
    metrics: dict[str, np.ndarray]
    steps: int


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C or SIGTERM, after a whole step; nothing is lost.

    Attributes:
        run: the `Run` up to there.
        signal: `signal.SIGINT` or `signal.SIGTERM`.
    """

    def __init__(self, message: str, run: Run, signal: signal.Signals) -> None:
        super().__init__(message)
        self.run, self.signal = run, signal


def run(
    wing: Any,
    step: Callable[..., Any],
    state: Any,
    hyper: Any,
    batch: Callable[[int], Any],
    steps: int,
    progress: bool,
    path: Any,
    save_every: float,
) -> Run:
    if not callable(batch):
        raise TypeError(
            "run: batch must be a function i -> tuple of batch arguments, so that a run can go on from any step; got "
            f"{type(batch).__name__}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"run: steps must be an integer >= 0, got {steps!r}")
    if not save_every >= 0:
        raise ValueError(f"run: save_every must be >= 0 seconds, got {save_every!r}")
    file = None if path is None else Path(path)
    now = Run(state, {}, 0)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            now = _load(wing, file, state, hyper)
    if now.steps > steps:
        raise ValueError(
            f"run: {file} holds {now.steps} steps, but steps is {steps}; ask for more, or name another path"
        )
    if file is not None:
        _save(wing, file, now, hyper)  # what cannot be saved is found out before anything was computed
    state, metrics, done = now
    new: list[dict[str, Any]] = []  # on the device until they are asked for, so that no step waits for the host
    shapes = {name: x.shape[1:] for name, x in metrics.items()}
    saved = time.monotonic()

    def so_far() -> Run:
        nonlocal metrics
        metrics, new[:] = _append(wing, metrics, new), []
        return Run(state, metrics, done)

    with _stop_signals() as stop, _progress(steps, done, progress) as advance:
        try:
            while done < steps and not stop:
                arguments = batch(done)
                if not isinstance(arguments, tuple):
                    raise TypeError(f"run: batch(i) must return a tuple of arguments, got {type(arguments).__name__}")
                next_state, measured = step(state, hyper, *arguments)
                shapes = _shapes(measured, shapes)
                state, done = next_state, done + 1
                new.append(measured)
                advance()
                if len(new) >= 1000:
                    so_far()
                if file is not None and time.monotonic() - saved > save_every:
                    _save(wing, file, so_far(), hyper)
                    saved = time.monotonic()
        finally:  # also when the batch or the step fails
            now = so_far()
            if file is not None:
                try:
                    _save(wing, file, now, hyper)
                except Exception as error:
                    error.add_note(f"run: {file} was not written; the exception's `run` holds step {done} of {steps}.")
                    error.run = now  # pyright: ignore[reportAttributeAccessIssue]
                    raise
    if stop:  # also in the last step: whoever sent the signal wants the process to end
        kept = f"saved in {file}; the same call resumes it" if file is not None else "the exception's `run` holds it"
        raise Interrupted(f"stopped after step {done} of {steps}; {kept}", now, signal.Signals(stop[0]))
    return now


def _shapes(metrics: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The shapes of a step's metrics; refuses others than those of the steps before."""
    shapes = {name: tuple(x.shape) if hasattr(x, "shape") else type(x).__name__ for name, x in metrics.items()}
    for name in [*before, *shapes]:
        if isinstance(shapes.get(name), str) or (before and before.get(name) != shapes.get(name)):
            raise ValueError(
                f"run: every step must return the same metrics, arrays of the same shapes; {name!r} was "
                f"{before.get(name, 'not there')} and is {shapes.get(name, 'not there')}"
            )
    return shapes


def _append(wing: Any, metrics: dict[str, np.ndarray], new: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    if not new:
        return metrics
    added = {name: np.stack([wing.as_numpy(m[name]) for m in new]) for name in new[0]}
    return {name: np.concatenate([metrics[name], x]) if metrics else x for name, x in added.items()}


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the current step; a second one at once."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        del frame
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(steps: int, done: int, shown: bool) -> Iterator[Callable[[], Any]]:
    if not shown:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("run: the progress bar needs tqdm: pip install tqdm, or say progress=False") from error
    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) as bar:
        yield bar.update


def _save(wing: Any, file: Path, now: Run, hyper: Any) -> None:
    """Atomically: a kill while writing leaves the last file as it was."""
    flat = {f"state.{name}": x for name, x in to_flat(wing, now.state).items()}
    flat |= {f"hyper.{name}": x for name, x in _numbers(wing, hyper).items()}
    flat |= {f"metrics.{name}": x for name, x in now.metrics.items()}
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        wing.save_file(part, flat, {_STEPS: str(now.steps), _RULES: repr(_rules(hyper))})
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _load(wing: Any, file: Path, state: Any, hyper: Any) -> Run:
    try:
        flat, metadata = wing.load_file(file)
    except Exception as error:
        raise ValueError(
            f"run: {file} cannot be read ({error}); remove it to begin anew, or name another path"
        ) from error
    if _STEPS not in metadata:
        raise ValueError(f"run: {file} is no checkpoint of a run; name another path")
    parts: dict[str, dict[str, Any]] = {"state": {}, "hyper": {}, "metrics": {}}
    for name, x in flat.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = x
    before, given = ({k: wing.as_numpy(x) for k, x in parts["hyper"].items()}, _numbers(wing, hyper))
    for name in [*given, *before]:
        if name not in given or name not in before or not np.array_equal(given[name], before[name], equal_nan=True):
            raise ValueError(
                f"run: {file} was trained with {name!r} = {_short(before, name)} in hyper, now it is "
                f"{_short(given, name)}; remove the file to begin anew, or pass what it was trained with"
            )
    if metadata.get(_RULES) != repr(_rules(hyper)):
        raise ValueError(
            f"run: {file} was trained with the penalties {metadata.get(_RULES)} in hyper, now they are "
            f"{_rules(hyper)}; remove the file to begin anew"
        )
    metrics = {name: wing.as_numpy(x) for name, x in parts["metrics"].items()}
    try:
        return Run(from_flat(wing, state, parts["state"]), metrics, int(metadata[_STEPS]))
    except ValueError as error:
        error.add_note(f"run: {file} holds another training set-up; remove it to begin anew, or name another path.")
        raise


_STEPS, _RULES = "funcreg.run.steps", "funcreg.run.rules"


def _rules(hyper: Any) -> list[str]:
    """The penalties among the hyper-parameters, without their strengths, which are saved as arrays."""
    if isinstance(hyper, Penalty):
        return [
            f"{p.rule.name}{dict(p.rule.options) or ''}{[s.globs or s.rows for s in p.selectors]}" for p in hyper.parts
        ]
    values = hyper.values() if isinstance(hyper, dict) else hyper if isinstance(hyper, (list, tuple)) else ()
    return [rule for value in values for rule in _rules(value)]


def _short(numbers: dict[str, np.ndarray], name: str) -> str:
    return np.array2string(numbers[name], threshold=6, edgeitems=2) if name in numbers else "nothing"


def _numbers(wing: Any, hyper: Any) -> dict[str, np.ndarray]:
    paths, leaves, _ = wing.paths_and_leaves(hyper)
    for path, leaf in zip(paths, leaves, strict=True):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float))):
            raise TypeError(f"run: hyper {'.'.join(path)!r} must be an array or a number to be saved, got {leaf!r}")
    arrays = [wing.as_numpy(x) if wing.is_array(x) else np.asarray(x) for x in leaves]
    return {".".join(path): x for path, x in zip(paths, arrays, strict=True)}

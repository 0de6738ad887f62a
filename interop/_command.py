"""What the command does once its arguments are right: run the file, check what it defines, say and write it."""

import argparse
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _html
from ._environment import environment
from ._writing import written_whole
from .parity import check
from .report import Report
from .training import check_training
from .verdict import Verdict

FORMS = {
    "torch_fn and jax_fn": ("torch_fn", "jax_fn", "inputs"),
    "torch_side and jax_side": ("torch_side", "jax_side", "params", "hyper", "batches"),
}
CODES = {Verdict.ROUNDING: 0, Verdict.SEMANTIC: 1, Verdict.INCONCLUSIVE: 2}
MODULE = "__parity__"  # the name of the file as a module: what it guards by "__main__" does not run


@dataclass(frozen=True)
class Outcome:
    """Of one thing that the file defines: a report, or an error in words."""

    name: str
    report: Report | None = None
    error: str = ""

    @property
    def code(self) -> int:
        """The exit code of this one alone."""
        return 2 if self.report is None else CODES[self.report.verdict]


def outcomes_of(file: Path) -> list[Outcome]:
    """Everything that the file defines, run; what goes wrong is an outcome as well, never an exception."""
    try:
        module = _run(file)
        checks = dict(_checks(file, module))
    except (Exception, SystemExit) as error:
        return [Outcome(str(file), error=_described(error, file))]
    outcomes = []
    for name, call in checks.items():
        try:
            report = call()
            if not isinstance(report, Report):
                raise TypeError(f"{name} must return a Report of interop, got {type(report).__name__}")
            outcomes.append(Outcome(name, report))
        except (Exception, SystemExit) as error:
            outcomes.append(Outcome(name, error=_described(error, file)))
    return outcomes


def printed(outcomes: list[Outcome]) -> None:
    """Reports to the output, in colour on a terminal; errors to the error output."""
    for outcome in outcomes:
        if outcome.report is None:
            print(f"interop check: {outcome.name}: {outcome.error}", file=sys.stderr)
            continue
        if len(outcomes) > 1:
            print(f"== {outcome.name}")
        _show(outcome.report)


def written(outcomes: list[Outcome], options: argparse.Namespace) -> None:
    """The files that were asked for, each whole or as it was before."""
    if options.json is not None:
        record = {
            "schema": 1,
            "file": str(options.file),
            "reports": {o.name: o.report.to_dict() for o in outcomes if o.report is not None},
            "errors": {o.name: o.error for o in outcomes if o.report is None},
            "environment": environment(),
        }
        with written_whole("--json", options.json) as part:
            part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.html is not None:
        page = _html.pages({o.name: o.report if o.report is not None else o.error for o in outcomes})
        with written_whole("--html", options.html) as part:
            part.write_text(page, encoding="utf-8")


def _run(file: Path) -> ModuleType:
    """The file as a module; what lies beside it can be imported, as if it had been started by itself."""
    spec = importlib.util.spec_from_file_location(MODULE, file.resolve())
    if spec is None or spec.loader is None:
        raise ValueError("not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses and pickle look for it there
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _checks(file: Path, module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    found = False
    for name, needed in FORMS.items():
        missing = [key for key in needed if not hasattr(module, key)]
        if len(missing) == len(needed) or not (hasattr(module, needed[0]) or hasattr(module, needed[1])):
            continue
        if missing:
            raise ValueError(f"defines {needed[0]} or {needed[1]}, but not {', '.join(missing)}")
        found = True
        yield name, _call(*(getattr(module, key) for key in needed), pair=getattr(module, "pair", None))
    for name, value in vars(module).items():
        if name.startswith("parity_") and callable(value):
            found = True
            yield f"{name}()", value
    if not found:
        raise ValueError(
            "defines nothing to check: neither torch_fn, jax_fn and inputs, nor torch_side, jax_side, params, hyper "
            "and batches, nor a function parity_NAME(); see python -m interop check --help"
        )


def _call(first: Any, second: Any, *rest: Any, pair: Any) -> Callable[[], Report]:
    if len(rest) == 1:
        inputs = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        return lambda: check(first, second, *inputs, pair=pair)
    return lambda: check_training(first, second, *rest, pair=pair)


def _described(error: BaseException, file: Path) -> str:
    """The error with its traceback from the file on, without the frames of this package between."""
    if isinstance(error, SystemExit):
        return f"the file ended the program itself (exit code {error.code}); nothing was checked"
    trace = traceback.TracebackException.from_exception(error)
    places = [i for i, frame in enumerate(trace.stack) if Path(frame.filename) == file.resolve()]
    if not places:
        return "".join(trace.format_exception_only()).strip()
    between = (str(Path(__file__).parent), str(Path(torch.__file__).parent / "_dynamo"))
    kept = [frame for frame in trace.stack[places[0] :] if not frame.filename.startswith(between)]
    trace.stack = traceback.StackSummary.from_list(kept)
    return "".join(trace.format()).strip()


def _show(report: Report) -> None:
    """In colour on a terminal; else as plain text, whose lines are not bound to a width."""
    try:
        from rich.console import Console
    except ImportError:
        Console = None
    if Console is None or not sys.stdout.isatty():
        print(report)
    else:
        Console(highlight=False).print(report)

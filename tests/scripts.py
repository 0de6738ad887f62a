"""Runs a script for its reader's eyes: what it prints, and nothing of its settings is left behind."""

import contextlib
import io
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import torch

RUNS = count()


def run_script(path: Path, folder: Path, *options: str, silent: bool = True) -> str:
    """What `python path options` prints to the standard output, run in `folder`; if `silent`, it prints nothing else.

    In this process: to import both frameworks once more takes longer than most scripts run. What a script may set for
    the whole process (float64 in JAX, default dtypes, how arrays print, modules beside it) is put back. It runs as a
    module of its own name, and its `main` is called: torch.compile remembers the first `__main__` that it meets.
    """
    printed, errors = io.StringIO(), io.StringIO()
    dtype, options_of_numpy = torch.get_default_dtype(), np.get_printoptions()
    x64, modules = jax.config.jax_enable_x64, set(sys.modules)
    beside = {p.stem for p in path.parent.glob("*.py")}
    spec = spec_from_file_location(f"{path.stem}_{next(RUNS)}", path)
    assert spec is not None and spec.loader is not None
    script = module_from_spec(spec)
    torch._dynamo.reset()  # or a script that compiles meets the limits that earlier tests have reached
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
            mock.patch.dict(os.environ, COLUMNS="80"),
            mock.patch.object(sys, "argv", [str(path), *options]),
            mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        ):
            sys.modules[spec.name] = script
            spec.loader.exec_module(script)
            status = script.main() if hasattr(script, "main") else None
            assert not status, f"{path.name}: exit status {status}\n{errors.getvalue()}"
    except SystemExit as stop:
        assert not stop.code, f"{path.name}: exit status {stop.code}\n{errors.getvalue()}"
    finally:
        jax.config.update("jax_enable_x64", x64)
        torch.set_default_dtype(dtype)
        np.set_printoptions(**options_of_numpy)
        for name in (set(sys.modules) - modules) & (beside | {spec.name}):
            del sys.modules[name]
    assert not (silent and errors.getvalue()), errors.getvalue()  # progress is for terminals only
    return printed.getvalue()

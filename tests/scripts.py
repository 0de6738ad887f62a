"""Runs a script for its reader's eyes: what it prints, and nothing of its settings is left behind."""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import torch


def run_script(path: Path, folder: Path, *options: str, silent: bool = True) -> str:
    """What `python path options` prints to the standard output, run in `folder`; if `silent`, it prints nothing else.

    In this process: to import both frameworks once more takes longer than most scripts run. What a script may set for
    the whole process (float64 in JAX, default dtypes, how arrays print, modules beside it) is put back.
    """
    printed, errors = io.StringIO(), io.StringIO()
    dtype, options_of_numpy = torch.get_default_dtype(), np.get_printoptions()
    x64, modules = jax.config.jax_enable_x64, set(sys.modules)
    beside = {p.stem for p in path.parent.glob("*.py")}
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
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{path.name}: exit status {stop.code}\n{errors.getvalue()}"
    finally:
        jax.config.update("jax_enable_x64", x64)
        torch.set_default_dtype(dtype)
        np.set_printoptions(**options_of_numpy)
        for name in (set(sys.modules) - modules) & beside:
            del sys.modules[name]
    assert not (silent and errors.getvalue()), errors.getvalue()  # progress is for terminals only
    return printed.getvalue()

"""Recorded cases: what the function returns at some sizes, in a file, and what the exported program returns there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._export_compare import Difference
from ..._export_errors import IntegrityError, SelfCheckError
from ..._export_sizes import Sizes
from ..._manifest import Manifest, checked_bytes
from ._inputs import Arrays, Inputs
from ._trace import LOOKS_AT_NUMBERS, explained

PROGRAM = Path(__file__).with_name("_selfcheck.py")
PACKAGES = ("jax", "flatbuffers", "numpy", "safetensors")  # what it imports


@dataclass(frozen=True)
class Case:
    """What the function returned at some sizes."""

    sizes: Sizes
    inputs: Arrays
    carried: list[str]  # inputs that are outputs of the case before
    outputs: Arrays


def record(where: str, call: Callable[..., Any], inputs: Inputs, every: list[Sizes], platform: str) -> list[Case]:
    """What the function returns at these sizes, compiled for each, and at the first once more.

    A state is fed back, since the first one often is zero, which hides most of what a step computes.

    Raises:
        ControlFlowError: it looks at numbers. What else it raises is passed on.
    """
    compiled = jax.jit(lambda arrays: call(arrays))  # a new function, which shares no trace with another
    cases: list[Case] = []
    outputs: Arrays = {}
    with jax.default_device(jax.devices(platform)[0]):
        for sizes in [*every, every[0]]:
            given = inputs.resized(sizes)
            static = {name: x for name, x in given.items() if not inputs.dims[name]}
            state = {name: x for name, x in outputs.items() if name in static and _alike(x, static[name])}
            if len(cases) == len(every) and not state:
                break
            given |= state
            try:
                outputs = {name: np.asarray(x) for name, x in compiled(given).items()}
            except LOOKS_AT_NUMBERS as error:
                raise explained(where, error, inputs) from error
            except Exception as error:
                if sizes != inputs.sizes:
                    error.add_note(
                        f"The function itself raises this at {sizes}, which check_sizes asks for; inputs that are not "
                        "in dynamic keep the example's sizes."
                    )
                raise
            cases.append(Case(sizes, given, list(state), outputs))
    return cases


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape


def to_bytes(cases: list[Case], inputs: Inputs) -> bytes:
    """The arrays of all cases, by the names that `funcreg/_manifest.py` tells."""
    from safetensors.numpy import save

    arrays = {}
    for i, case in enumerate(cases):
        for name, x in case.inputs.items():
            if name not in case.carried:
                arrays[f"{i}.in.{name}" if inputs.dims[name] else f"in.{name}"] = x
        arrays |= {f"{i}.out.{name}": x for name, x in case.outputs.items()}
    return save({name: np.asarray(x, order="C") for name, x in arrays.items()})


def outputs_of(manifest: Manifest, data: bytes, key: str) -> list[Arrays]:
    """The outputs of every case, stored under `key.format(case)` and their names.

    Raises:
        IntegrityError: an output that is not there, or of another dtype or shape than the manifest says.
    """
    from safetensors import deserialize  # safetensors.numpy loads no bfloat16

    stored = dict(deserialize(data))
    cases = []
    for i, case in enumerate(manifest.cases):
        arrays = {}
        for name, spec in manifest.methods["forward"].outputs.items():
            found = stored.get(f"{key.format(i)}.{name}")
            dtype = jnp.dtype(spec.dtype)
            if found is None or len(found["data"]) != dtype.itemsize * int(np.prod(found["shape"])):
                raise IntegrityError(f"the output {name} of the case {case['sizes']} is not in the file of cases")
            arrays[name] = np.frombuffer(found["data"], dtype).reshape(found["shape"])
        cases.append(arrays)
    return cases


def run(where: str, path: Path, manifest: Manifest, platform: str) -> tuple[Difference, dict[str, Any]]:
    """Run the cases of the files that a manifest describes in a fresh process.

    Args:
        where: for errors.
        path: of the manifest.
        manifest: what stands in it.
        platform: "cpu", "cuda", ...: where the program is run.

    Returns:
        The differences from what was recorded, and the versions and the device of that process.

    Raises:
        SelfCheckError: it did not finish.
    """
    recorded = outputs_of(manifest, checked_bytes(path.parent, manifest.files["cases"]), "{}.out")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.safetensors"
        # isolated from PYTHONPATH, the current folder and the user's site-packages, but not from jax
        packages = sorted({str(Path(_origin(name)).parent.parent) for name in PACKAGES})
        job = {"manifest": str(path.resolve()), "results": str(results), "path": packages}
        said = _ask(where, json.dumps(job), {**os.environ, "JAX_PLATFORMS": platform})
        returned = outputs_of(manifest, results.read_bytes(), "{}")
    found = Difference()
    noise = said.pop("noise")
    for i, case in enumerate(manifest.cases):
        found.add(str(case["sizes"]), returned[i], recorded[i], noise[str(i)])
    return found, said


def _ask(where: str, job: str, environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-I", str(PROGRAM)]
    done = subprocess.run(command, input=job + "\n", capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SelfCheckError(
            f"{where}: the self-check in a fresh process did not finish: exit code {done.returncode}, {last}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _origin(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return spec.origin

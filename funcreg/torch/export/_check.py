"""The self-check: recorded cases, run from the files in a fresh process."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..._export_errors import SelfCheckError
from ._selfcheck import TOLERANCE as TOLERANCE

PROGRAM = Path(__file__).with_name("_selfcheck.py")


def run(where: str, manifests: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of `_selfcheck.py` on some manifests, in one fresh process.

    Raises:
        SelfCheckError: it did not finish, since a file could not be loaded or crashed the process.
    """
    # isolated from PYTHONPATH, the current folder and the user's site-packages, but not from torch
    packages = sorted({str(Path(_origin(name)).parent.parent) for name in ("torch", "safetensors")})
    job = json.dumps({"manifests": [str(path.resolve()) for path in manifests], "path": packages})
    try:
        return json.loads(ask(job))
    except ValueError as error:
        raise SelfCheckError(f"{where}: the self-check in a fresh process did not finish: {error}") from None


def ask(job: str) -> str:
    """The answer of a fresh process, a line of JSON."""
    command = [sys.executable, "-I", str(PROGRAM)]
    done = subprocess.run(command, input=job + "\n", capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    if not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"exit code {done.returncode}, {last}")
    return lines[-1]


def _origin(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return spec.origin


def require_equal(where: str, result: dict[str, Any]) -> None:
    """Refuse a file that returned other bits than the function.

    Raises:
        SelfCheckError: names the method, the sizes and the output that differ first, and by how much.
    """
    if result["different"]:
        raise SelfCheckError(
            f"{where}: the file does not return what the function returns, in {result['different']} of "
            f"{max(result['different'], result['compared'])} outputs; first {result['first']}. Leave a size "
            "out of check_sizes if the function is a special case there (0 and 1 are then refused by the file); a "
            "function that keeps state of its own, draws random numbers outside of PyTorch or reads a clock cannot be "
            "exported; and a few operations (torch.linalg.svdvals) take another kernel while they are traced"
        )
    assert result["compared"] > 0

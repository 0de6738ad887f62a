"""Command-line options that several examples share. No framework is imported before it is asked for."""

import argparse
import importlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

WINGS = {"torch": "PyTorch", "jax": "JAX"}


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in a range."""
    allowed = f"an integer >= {least}" if most is None else f"an integer between {least} and {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return convert


def positive(most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number > 0."""
    allowed = "a number > 0" if most == math.inf else f"a number > 0 and <= {most:g}"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= most or value == math.inf:  # NaN neither
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return convert


def add_wing(parser: argparse.ArgumentParser, default: str, both: bool = True) -> None:
    choices = [*WINGS, "both"] if both else [*WINGS]
    parser.add_argument("--wing", choices=choices, default=default, help="which framework (%(default)s)")


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--out", type=Path, default=Path(default), help="folder to write to (%(default)s)")


def make_writable(parser: argparse.ArgumentParser, out: Path) -> None:
    """Make the folder; refuse one that nothing can be written to before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {str(out)!r}: {error.strerror}")


def halves(parser: argparse.ArgumentParser, wing: str, prefix: str = "_digits_") -> dict[str, ModuleType]:
    """Framework -> its module, `_digits_torch` or `_digits_jax`; only what is asked for is imported."""
    # So small a network would only wait for a GPU, on which float32 products may also be rounded to fewer bits, and for
    # other threads: on a busy machine those of PyTorch make it many times slower.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = {}
    for name in WINGS if wing == "both" else [wing]:
        try:
            found[name] = importlib.import_module(f"{prefix}{name}")
        except ModuleNotFoundError as error:
            parser.error(
                f"argument --wing: {name} needs the package {error.name!r}, which is not installed: "
                "pip install 'funcreg[all]', or choose the other wing"
            )
    return found

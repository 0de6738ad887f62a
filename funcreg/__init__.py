"""Regularization as pure functions, in PyTorch (`funcreg.torch`) and in JAX (`funcreg.jax`).

Importing `funcreg` imports neither framework: import the wing you train with. What crosses between the two is in
`funcreg.interop`, which imports both when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import interop as interop

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "interop":  # imports both frameworks, and only when it is asked for
        return import_module("funcreg.interop")
    raise AttributeError(f"module 'funcreg' has no attribute {name!r}")

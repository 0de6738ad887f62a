"""Regularization as pure functions, in PyTorch (`funcreg.torch`) and in JAX (`funcreg.jax`).

Importing `funcreg` imports neither framework: import the wing you train with. What crosses between the two is in
`funcreg.interop`, which imports both when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import interop as interop

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`funcreg.interop`: the top-level package `interop` that is installed with this one, and no other."""
    if name != "interop":
        raise AttributeError(f"module 'funcreg' has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module("interop")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]  # of "jax.numpy", if that is what was imported first
        if missing not in ("torch", "jax"):
            raise
        raise ImportError(
            f"funcreg.interop needs both frameworks, and {missing} is not installed: pip install 'funcreg[all]'"
        ) from error
    if getattr(module, "PART_OF", None) != "funcreg":
        where = getattr(module, "__file__", None) or ", ".join(getattr(module, "__path__", ["?"]))
        raise ImportError(
            f"funcreg.interop: another installed package of the name interop shadows the one that comes with funcreg: "
            f"{where}; uninstall or rename it, or put funcreg before it on sys.path, and start Python again"
        )
    return module

"""`funcreg.interop`: the top-level package `interop` that is installed with this one, and no other.

Importing this module puts that package in its own place, so that `from funcreg import interop` and
`from funcreg.interop import match` both work.
"""

import sys
from importlib import import_module


def _import() -> object:
    try:
        module = import_module("interop")
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("torch", "jax", "flax", "optax"):
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


_module = _import()
if __name__ == "__main__":  # python -m funcreg.interop check FILE
    sys.exit(import_module("interop.__main__").main())
sys.modules[__name__] = _module  # pyright: ignore[reportArgumentType]

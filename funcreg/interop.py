"""`funcreg.interop`: the top-level package `interop` that is installed with this one, and no other.

Importing this module puts that package in its own place, so that `from funcreg import interop` and
`from funcreg.interop import match` both work; so does `from funcreg.interop.testing import assert_parity`, of the same
module as `interop.testing`. Without the alias Python would load a second copy of every file, whose `Pair` is another
class and in whose `rules` nobody looks.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Alias(MetaPathFinder, Loader):
    """`funcreg.interop.NAME` is `interop.NAME`, for what is not loaded yet."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.startswith("funcreg.interop.") else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(module.__name__.removeprefix("funcreg."))


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
for _name in [name for name in sys.modules if name.startswith("interop.")]:
    # an import would set the module as an attribute of the package, over the functions `match` and `locate`
    sys.modules[f"funcreg.{_name}"] = sys.modules[_name]
sys.meta_path.insert(0, _Alias())

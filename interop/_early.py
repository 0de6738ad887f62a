"""Imported before the frameworks, which takes seconds: a wrong command line of `python -m interop` ends here."""

import sys

from ._arguments import parse


def _is_the_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name == "funcreg.interop":
        return True
    # Python imports a package before it runs its `__main__`; until then sys.argv begins with "-m".
    after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return sys.argv[:1] == ["-m"] and after[:1] == ["interop"]


if _is_the_command():
    parse(sys.argv[1:])

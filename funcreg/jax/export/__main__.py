"""`python -m funcreg.jax.export verify PATH...`: 0 if all is as recorded, 1 if not, 2 for a file that cannot be
used."""

import argparse
import sys

from ..._export_errors import ExportError, SelfCheckError
from ._load import verify_exported


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m funcreg.jax.export")
    commands = parser.add_subparsers(required=True, metavar="verify")
    verify = commands.add_parser("verify", help="run the recorded cases of exported files in a fresh process")
    verify.add_argument("path", nargs="+", help="a .jax file; it is run as a program: only what you trust")
    try:
        for path in parser.parse_args(arguments).path:
            print(verify_exported(path))
    except SelfCheckError as error:
        print(error, file=sys.stderr)
        return 1
    except (ExportError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

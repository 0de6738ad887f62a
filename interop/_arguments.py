"""The command line of `python -m interop`: what is wrong in it is said before anything runs."""

import argparse
import tempfile
from pathlib import Path

EPILOG = """\
FILE is run as a Python program and defines one or more of these:

  torch_fn, jax_fn, inputs
      two functions and a tuple of NumPy inputs, or one array or tree; they go to interop.check
  torch_side, jax_side, params, hyper, batches
      two pairs (init, step) and what they start from; they go to interop.check_training
  parity_NAME()
      functions without arguments that return a Report

A `pair` of interop.match may stand beside the first two. Everything that is there is run.

exit code:
  0  all agree up to rounding
  1  at least one semantic difference
  2  none, but something is inconclusive, or an error: in the arguments, in FILE, or raised by what it defines

example:
  python -m interop check my_port.py --html my_port.html
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options `file`, `json` and `html`; files that cannot be read or written are refused."""
    parser = argparse.ArgumentParser(
        prog="python -m interop", description="Does a PyTorch program compute what its JAX twin computes?"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="check")
    check = commands.add_parser(
        "check",
        help="compare the two sides that a Python file defines",
        description="Compare the PyTorch and the JAX side that a Python file defines; a verdict, and what it rests on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", metavar="FILE", type=Path, help="a Python file; see below for what it defines")
    check.add_argument("--json", metavar="OUT", type=Path, help="write the reports to this file as JSON")
    check.add_argument(
        "--html", metavar="OUT", type=Path, help="write the reports to this file as a page for a browser"
    )
    options = parser.parse_args(argv)
    if not options.file.is_file():
        check.error(f"FILE: {'not a file' if options.file.exists() else 'no such file'}: {str(options.file)!r}")
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None:
            _refuse_unwritable(check, f"--{name}", path)
    if options.json is not None and options.html is not None and options.json.resolve() == options.html.resolve():
        check.error(f"--json and --html: both name {str(options.json)!r}; name two files")
    return options


def _refuse_unwritable(parser: argparse.ArgumentParser, option: str, path: Path) -> None:
    folder = path.resolve().parent
    if path.is_dir():
        parser.error(f"{option}: {str(path)!r} is a folder; name a file")
    if not folder.is_dir():
        parser.error(f"{option}: there is no folder {str(folder)!r}; make it first")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # a new file beside it is what takes its place
    except OSError as error:
        parser.error(f"{option}: cannot write to the folder {str(folder)!r}: {error.strerror}")

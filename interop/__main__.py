"""`python -m interop check FILE`: whether what a Python file defines agrees on both sides, as an exit code."""

import sys

from ._arguments import parse
from ._command import Outcome, outcomes_of, printed, written


def main(argv: list[str] | None = None) -> int:
    """The command.

    Args:
        argv: its arguments, those of the process without.

    Returns:
        0: all agree; 1: a semantic difference; 2: inconclusive, or an error.
    """
    options = parse(argv)
    outcomes = outcomes_of(options.file)
    printed(outcomes)
    try:
        written(outcomes, options)
    except OSError as error:
        outcomes.append(Outcome("files", error=f"cannot write {error.filename!r}: {error.strerror}"))
        print(f"interop check: {outcomes[-1].error}", file=sys.stderr)
    codes = [outcome.code for outcome in outcomes]
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())

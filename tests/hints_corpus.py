"""What hints must be right about. `python tests/hints_corpus.py [WORD]` prints every case with the hints it gets."""

import sys

import jax

import hints_functions
import hints_others
import hints_steps

CASES = hints_functions.CASES + hints_others.CASES + hints_steps.CASES


def main() -> None:
    for case in CASES:
        if not sys.argv[1:] or sys.argv[1] in str(case):
            with jax.numpy_dtype_promotion("standard"):
                report = case.check()
            right = {hint.kind for hint in report.hints} == case.kinds
            print(" " if right else "!", f"{report.verdict:12}", case)
            for hint in report.hints:
                print(f"      {hint.kind}: {hint.change} ({hint.difference:.0e})")


if __name__ == "__main__":
    main()

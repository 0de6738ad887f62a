"""Do the demo's two halves train the same? A verdict on the steps themselves, not on where they end.

    python examples/digits_parity.py            a few seconds; writes a page with the error at every step
    python examples/digits_parity.py --help     seed, steps, strength, batch, where the page goes

`interop.check_training` runs the steps of `_digits_torch.py` and of `_digits_jax.py`, `fr.prox_adam` with L1 on all
weights plus group lasso on the hidden units, from the same numbers on the same batches: in float64 and in float32, and
from numbers that are moved by an ulp. Two frameworks never agree to the last bit; the verdict says whether what differs
is rounding. `interop.match` tells which array of flax is which of PyTorch's. The exit code is 0 for rounding, else 1.
"""

import argparse
import sys
from typing import Any

from rich.console import Console

import _digits
import _options
from _digits import LEARNING_RATE

STEPS = 20  # at most: each is taken ten times, five times by each framework


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of `sparse_digits.py`; `options.halves` holds the imported halves of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integer, most = _options.integer, _digits.TRAINING_EXAMPLES
    _options.add_out(parser, "out/digits_parity")
    parser.add_argument("--seed", type=integer(0), default=0, help="of initial values and batches (%(default)s)")
    parser.add_argument("--steps", type=integer(1), default=STEPS, help=f"of training, {STEPS} at most (%(default)s)")
    parser.add_argument("--batch", type=integer(1, most), default=64, help="digits per step (%(default)s)")
    parser.add_argument("--lam", type=_options.positive(1), default=1e-3, help="strength (%(default)s)")
    _options.add_wing(parser, "both")
    options = parser.parse_args(argv)
    _options.make_writable(parser, options.out)
    options.halves = _options.halves(parser, options.wing)
    return options


def steps_of(half: Any, lam: float) -> tuple[Any, Any]:
    """`(init, step)` of one half, as `interop.check_training` calls them."""
    penalty = half.penalties(lam)["both"]
    loss, optimizer, after = half.methods(half.loss, penalty, LEARNING_RATE)["prox_adam"]
    one = half.make_step(loss, optimizer, after)

    def init(params: Any, hyper: None) -> dict[str, Any]:
        return {"params": params, "opt_state": optimizer.init(params)}

    def step(state: dict[str, Any], hyper: None, x: Any, y: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        before = half.loss(state["params"], x, y)
        params, opt_state = one(state["params"], state["opt_state"], x, y)
        return {"params": params, "opt_state": opt_state}, {"loss": before}

    return init, step


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out = Console(highlight=False)
    if len(options.halves) < 2:
        out.print("Parity: with one wing there is nothing to compare.")
        return 0
    from funcreg import interop

    torch_half, jax_half = options.halves["torch"], options.halves["jax"]
    data, init = _digits.load(), _digits.initial_values(options.seed)
    batches = _digits.draw_batches(options.seed, min(options.steps, STEPS), options.batch, len(data.y_train))
    pair = interop.match(torch_half.MODEL, jax_half.from_numpy(init))
    init_jax, step_jax = steps_of(jax_half, options.lam)
    report = interop.check_training(
        steps_of(torch_half, options.lam),
        (init_jax, jax_half.jax.jit(step_jax)),
        init,
        None,
        [(data.x_train[i], data.y_train[i]) for i in batches],
        pair=pair,
    )
    out.print(report)
    page = options.out / "parity.html"
    report.to_html(page)
    apart = max(leaf.float64.relative for leaf in report.leaves if leaf.float64)
    out.print(
        f"Parity: {report.verdict}. Over {len(batches)} steps of prox_adam the two frameworks differ by at most "
        f"{apart:.0e} in float64, relative to the largest entry of an array; step by step in {page}."
    )
    return 0 if report.verdict == "rounding" else 1


if __name__ == "__main__":
    sys.exit(main())

"""A long run that is stopped by a signal in the middle goes on where it was, and ends with the same bits.

    python examples/checkpoint_resume.py                    the proof, in seconds; --wing torch compiles first
    python examples/checkpoint_resume.py --run out/mine     only trains, with a progress bar: press Ctrl-C, and call it
                                                            again to go on

`fr.run` with a path is all it takes. On Ctrl-C (SIGINT) or SIGTERM, which is what schedulers and `kill` send, it ends
after the current step, saves state, hyper-parameters and metrics there, and raises `fr.Interrupted`, a
KeyboardInterrupt: a script that does not catch it ends, like any other. A second Ctrl-C ends it at once, in the middle
of a step. The same call goes on from the file. For this `batch` must be a function of the step's number alone: drawn
from a generator that is kept between steps, a resumed run would see other batches.

Eight members of the network of `sparse_digits.py`, each with its own strength, are trained by `fr.prox_adam`: once
unbroken; and once in a process of its own that gets SIGTERM half way, and in a third that resumes it. What is compared
is all that the files hold: parameters, Adam's moments, counts, hyper-parameters, and the metrics of every step.
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

import _digits
import _options
from _digits import LEARNING_RATE

MEMBERS = 8


def train(options: argparse.Namespace, path: Path) -> int:
    """Train, or go on; returns how many steps are done."""
    half = _options.halves(options.parser, options.wing)[options.wing]
    fr = half.fr
    data = _digits.load()
    batches = _digits.draw_batches(options.seed, options.steps, 64, len(data.y_train))
    hyper = {"lam": half.array(np.geomspace(1e-5, 1e-2, MEMBERS).astype(np.float32))}
    init, step = fr.ensemble(
        *fr.train_step(half.loss, lambda hyper: fr.prox_adam(LEARNING_RATE, half.penalties(hyper["lam"])["both"]))
    )
    state = init(fr.stack([half.from_numpy(_digits.initial_values(options.seed))] * MEMBERS), hyper)

    def batch(i):
        if i == options.say_when:
            print(f"step {i}", flush=True)
        return half.array(data.x_train[batches[i]]), half.array(data.y_train[batches[i]])

    try:
        fr.run(step, state, hyper, batch, options.steps, path=path, progress=sys.stderr.isatty())
    except fr.Interrupted as stopped:
        print(stopped, flush=True)
        return 128 + stopped.signal  # what a shell shows for a process that a signal ended
    return 0


def start(options: argparse.Namespace, path: Path, say_when: int) -> subprocess.Popen:
    """The same training in a process of its own, which says when it begins a certain step."""
    command = [sys.executable, __file__, "--run", path, "--wing", options.wing, "--say-when", say_when]
    command += ["--steps", options.steps, "--seed", options.seed]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)


def contents(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def prove(options: argparse.Namespace) -> dict[str, float]:
    files = {name: options.out / f"{name}.{options.wing}.safetensors" for name in ("unbroken", "stopped")}
    for file in files.values():
        file.unlink(missing_ok=True)
    results: dict[str, float] = {"unbroken: exit status": train(options, files["unbroken"])}
    results["unbroken: steps in the file"] = len(contents(files["unbroken"])["metrics.loss"])

    half_way = options.steps // 2
    process = start(options, files["stopped"], half_way)
    process.stdout.readline()  # "step ..."
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    print(f"the stopped run said: {said.strip()}")
    results["stopped: exit status"] = process.returncode
    results["stopped: steps in the file"] = len(contents(files["stopped"])["metrics.loss"])

    process = start(options, files["stopped"], -1)
    process.communicate()
    results["resumed: exit status"] = process.returncode
    ends = {name: contents(file) for name, file in files.items()}
    results["resumed: steps in the file"] = len(ends["stopped"]["metrics.loss"])
    if ends["stopped"].keys() != ends["unbroken"].keys():
        raise SystemExit("the two files hold arrays of different names")
    pairs = [(x, ends["stopped"][name]) for name, x in ends["unbroken"].items()]
    results["arrays compared"] = len(pairs)
    results["numbers compared"] = sum(x.size for x, _ in pairs)
    results["arrays whose bits differ"] = sum(x.tobytes() != y.tobytes() or x.dtype != y.dtype for x, y in pairs)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integer = _options.integer
    _options.add_out(parser, "out/checkpoint_resume")
    parser.add_argument("--seed", type=integer(0), default=0, help="of initial values and batches (%(default)s)")
    parser.add_argument("--steps", type=integer(2), default=2000, help="of training (%(default)s)")
    _options.add_wing(parser, "jax", both=False)
    parser.add_argument("--run", type=Path, metavar="FILE", help="only train, or go on from this file")
    parser.add_argument("--say-when", type=int, default=-1, metavar="STEP", help="print a line when this step begins")
    options = parser.parse_args(argv)
    options.parser = parser
    if options.run is not None:
        _options.make_writable(parser, options.run.parent)
        return train(options, options.run)
    _options.make_writable(parser, options.out)
    for name, value in prove(options).items():
        print(f"{name:.<60} {value:.12g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

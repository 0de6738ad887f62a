"""Whether the program in `host.cpp` trains as Python does, bit for bit, and how long a step takes in each.

    python examples/cpp_host/compare.py FOLDER [--host FOLDER/host] [--compile]

FOLDER is that of `export_digits.py`. The host trains from the files, Python with the function that was exported, 200
steps of 8, 13, 32 and 1 examples in turn. Compared are all parameters, the whole optimizer state and the metrics of
every step. `--compile` also times the function under `torch.compile`, which takes a minute.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import export_digits
import funcreg.torch as fr

STEPS, SIZES = 200, (8, 13, 32, 1)

Tensors = dict[str, Tensor]


def run_host(host: Path, folder: Path, environment: Mapping[str, str] | None = None) -> tuple[str, Tensors]:
    """What the host prints, and the state and metrics that it ends with."""
    final = folder / "final.pt"
    files = [folder / name for name in ("step.pt", "start.pt", "data.pt")]
    command = [host, "train", *files, STEPS, ",".join(map(str, SIZES)), final]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return done.stdout, dict(torch.load(final))


def batches(data: Tensors) -> Iterator[list[Tensor]]:
    """As the host makes them."""
    begin, rows = 0, len(data["x"])
    for i in range(STEPS):
        size = SIZES[i % len(SIZES)]
        if begin + size > rows:
            begin = 0
        yield [x[begin : begin + size] for x in data.values()]
        begin += size


def train(step: Callable[..., Any]) -> tuple[Tensors, float]:
    """State and metrics after the same steps in Python, and the median seconds of a step."""
    inputs = export_digits.start()
    state, hyper = inputs["state"], inputs["hyper"]
    history, seconds = [], []
    for batch in batches(export_digits.data()):
        begin = time.perf_counter()
        state, metrics = step(state, hyper, *batch)
        seconds.append(time.perf_counter() - begin)
        history.append(metrics)
    stacked = {name: torch.stack([metrics[name] for metrics in history]) for name in history[0]}
    return fr.to_flat({"state": state, "metrics": stacked}), statistics.median(seconds)


def different(ours: Tensors, theirs: Tensors) -> list[str]:
    """The names of the arrays whose bits are not the same; all of them must be on both sides."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one side has {sorted(ours.keys() ^ theirs.keys())}")
    return [name for name in ours if bits(ours[name]) != bits(theirs[name])]


def bits(x: Tensor) -> tuple[str, list[int], bytes]:
    return str(x.dtype), list(x.shape), x.contiguous().numpy().tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", type=Path, help="the compiled program; FOLDER/host if not given")
    parser.add_argument("--compile", action="store_true", help="also time the function under torch.compile")
    options = parser.parse_args()
    # as many threads as Python has: sums of threads are added in another order
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    printed, theirs = run_host(options.host or options.folder / "host", options.folder, environment)
    print(printed, end="")
    ours, eager = train(export_digits.step)
    times = {"C++": float(printed.split()[-1]) / 1e6, "Python, eager": eager}
    if options.compile:
        compiled = torch.compile(export_digits.step, dynamic=True)
        train(compiled)  # compiles
        times["Python, compiled"] = train(compiled)[1]
    for name, seconds in times.items():
        print(f"{name}: {1e6 * seconds:.0f} microseconds per step, {seconds / eager:.2f} of eager")
    wrong = different(ours, theirs)
    numbers = sum(x.numel() for x in ours.values())
    print(f"{len(wrong)} of {len(ours)} arrays ({numbers} numbers) differ between C++ and Python", *wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

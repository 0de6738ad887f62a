"""How long `interop.check` takes and how much memory: outputs and gradients of 10M parameters in 100 leaves.

Prints the seconds of one call and the largest growth of the resident memory while it runs, in copies of the parameters,
beside what the two functions need for themselves when they are called once in float64. Every figure is of a fresh
process. Nothing fails for being slow.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from _machine import machine
from _memory import peak_of
from funcreg import interop


class Net(torch.nn.Module):
    """Residual layers, each with a weight and a bias."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def shapes(layers: int, width: int) -> dict[str, Any]:
    """What flax has of it: the shapes of its parameters."""
    shape = lambda *n: jax.ShapeDtypeStruct(n, np.float32)  # noqa: E731
    return {f"Dense_{i}": {"kernel": shape(width, width), "bias": shape(width)} for i in range(layers)}


def sides(net: Net) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Outputs and gradients, as a user writes them in each framework."""

    def loss(params: Any, x: Any) -> Any:
        out = torch.func.functional_call(net, params, (x,))
        return out.square().mean(), out

    def jax_loss(params: Any, x: Any) -> Any:
        out = x
        for i in range(len(params)):
            layer = params[f"Dense_{i}"]
            out = out + jnp.tanh(out @ layer["kernel"] + layer["bias"][None])
        return jnp.mean(out**2), out

    return torch.func.grad(loss, has_aux=True), jax.jit(jax.grad(jax_loss, has_aux=True))


def once(which: str, layers: int, width: int) -> dict[str, float]:
    """Seconds and bytes of one call: of `check`, or of one side by itself."""

    def made(layers: int, width: int) -> Callable[[], Any]:
        net = Net(layers, width)
        params = {name: p.detach().numpy() for name, p in net.named_parameters()}
        x = np.random.default_rng(0).normal(size=(32, width))
        pair = interop.match(net, shapes(layers, width))
        ours, theirs = sides(net)

        def torch_alone() -> Any:
            return ours({name: torch.tensor(p, dtype=torch.float64) for name, p in params.items()}, torch.tensor(x))

        def jax_alone() -> Any:
            with jax.enable_x64(True):
                given = {
                    f"Dense_{i}": {
                        "kernel": jnp.array(params[f"layers.{i}.weight"].T, float),
                        "bias": jnp.array(params[f"layers.{i}.bias"], float),
                    }
                    for i in range(layers)
                }
                return jax.block_until_ready(theirs(given, jnp.array(x)))

        def check() -> Any:
            report = interop.check(ours, theirs, params, x, pair=pair)
            if report.verdict != "rounding":
                raise RuntimeError(f"the two sides should agree:\n{report}")

        return {"torch": torch_alone, "jax": jax_alone, "check": check}[which]

    made(2, 3)()  # what is imported and set up once
    function = made(layers, width)
    start, cpu = time.perf_counter(), time.process_time()
    peak = peak_of(function)
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "bytes": peak}


def in_a_process(which: str, layers: int, width: int) -> dict[str, float]:
    """`once`, in a fresh process."""
    command = [sys.executable, __file__, "--one", which, "--layers", str(layers), "--width", str(width)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=50, help="each of two leaves (%(default)s)")
    parser.add_argument("--width", type=int, default=447, help="of every layer: 50 of 447 have 10M parameters")
    parser.add_argument("--one", choices=["torch", "jax", "check"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(once(args.one, args.layers, args.width)))
        return
    console = Console()
    where = machine(["torch", "jax"], "cpu")
    console.print("\n".join(f"{key}: {value}" for key, value in where.items()), highlight=False)
    size = args.layers * (args.width + 1) * args.width
    table = Table(title=f"{size / 1e6:.1f}M parameters in {2 * args.layers} leaves", box=box.SIMPLE_HEAD)
    for column in ("call", "seconds", "CPU", "MB", "float64 copies", "float32 copies"):
        table.add_column(column, justify="left" if column == "call" else "right")
    titles = {"torch": "PyTorch alone, float64", "jax": "JAX alone, float64", "check": "check"}
    for which, title in titles.items():
        found = in_a_process(which, args.layers, args.width)
        copies = found["bytes"] / (8 * size)
        numbers = (found["seconds"], found["cpu"], found["bytes"] / 1e6, copies, 2 * copies)
        table.add_row(title, *(f"{x:.{digits}f}" for x, digits in zip(numbers, (1, 1, 0, 2, 1), strict=True)))
    console.print(table)


if __name__ == "__main__":
    main()

"""How long a port takes and how much memory: 10M parameters in 100 leaves, from PyTorch to flax and back.

Prints the median of some rounds for `match`, the values in both directions and Adam's state in both directions, and the
largest resident memory while the first port runs, beside the model's own, in units of the parameters' size. Nothing
fails for being slow.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from _machine import machine
from _memory import peak_of
from funcreg import interop


def model(leaves: int, width: int) -> tuple[torch.nn.Module, Any]:
    """Dense layers, each with a kernel and a bias, and what flax has of them: shapes only."""
    net = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(leaves // 2)))
    shape = lambda *n: jax.ShapeDtypeStruct(n, np.float32)  # noqa: E731
    return net, {f"Dense_{i}": {"kernel": shape(width, width), "bias": shape(width)} for i in range(leaves // 2)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=100)
    parser.add_argument("--width", type=int, default=447, help="of every layer: 50 of 447 have 10M parameters")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    console = Console()
    where = machine(["torch", "jax"], "cpu")
    console.print("\n".join(f"{key}: {value}" for key, value in where.items()), highlight=False)
    small, shapes = model(4, 3)
    interop.match(small, shapes).to_jax(small)  # what is imported and compiled once
    net, shapes = model(args.leaves, args.width)
    size = sum(p.numel() for p in net.parameters())
    optimizer = torch.optim.Adam(net.parameters())
    peak = peak_of(lambda: (pair := interop.match(net, shapes), pair.to_jax(net)))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(args.rounds):
        pair = timed("match", lambda: interop.match(net, shapes))
        values = timed("pair.to_jax", lambda p=pair: p.to_jax(net))
        timed("pair.to_torch", lambda p=pair, v=values: p.to_torch(v))
        _, state = timed("pair.optimizer_to_jax", lambda p=pair: p.optimizer_to_jax(optimizer))
        timed("pair.optimizer_to_torch", lambda p=pair, s=state: p.optimizer_to_torch(s, optimizer))
    table = Table(title=f"{size / 1e6:.1f}M float32 parameters in {args.leaves} leaves", box=box.SIMPLE_HEAD)
    for column in ("call", "median s", "slowest s"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for name, seconds in times.items():
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}")
    console.print(table)
    console.print(f"peak memory of match and to_jax, beside the model: {peak / (4 * size):.2f} times the parameters")


if __name__ == "__main__":
    main()

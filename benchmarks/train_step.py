"""Time of a training step with a penalty over the same step without one, both measured in this run.

Three families on one MLP (784-1024-640-64-10, 1.5M parameters, batch 128, Adam): the step compiled by torch.compile,
the step under jax.jit, and a plain PyTorch loop with `attach`. Nothing fails for being slow: the table says ok or over.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from _machine import machine

LAM = 1e-4
LEARNING_RATE = 1e-3


class Variant(NamedTuple):
    """One way to train, and what it is measured against."""

    name: str
    advance: Callable[[int], None]  # so many steps, then wait for the device
    zeros: Callable[[], float]  # share of parameters that are exactly 0
    against: str | None = None
    limit: float | None = None


class Result(NamedTuple):
    family: str
    case: str
    against: str
    milliseconds: float  # medians, of a step
    against_milliseconds: float
    ratio: float  # median over pairs of neighbours in time
    quartiles: tuple[float, float]
    ratio_of_fastest: float
    limit: float | None
    compile_seconds: float
    zeros: float

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "ok" if self.ratio <= self.limit else "over"


def measure(
    family: str,
    variants: Sequence[Variant],
    rounds: int,
    steps: int,
    tick: Callable[[str], None] = lambda case: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Ratios of neighbours in time: in every round each case runs next to its baseline, in alternating order.

    A machine that others use drifts by more than the differences in question; the ratio of two runs that follow each
    other does not.
    """
    by_name = {v.name: v for v in variants}
    pairs = [(v, by_name[v.against]) for v in variants if v.against]

    def timed(variant: Variant, steps: int) -> float:
        start = clock()
        variant.advance(steps)
        return (clock() - start) / steps

    first = {}
    for v in variants:
        tick(v.name)
        first[v.name] = timed(v, 1)
        v.advance(steps)
    seconds: dict[str, list[tuple[float, float]]] = {case.name: [] for case, _ in pairs}
    for i in range(rounds):
        for case, base in pairs:
            tick(case.name)
            taken = {}
            for v in (base, case) if i % 2 else (case, base):
                v.advance(1)  # the neighbour emptied the caches
                taken[v.name] = timed(v, steps)
            seconds[case.name].append((taken[case.name], taken[base.name]))
    results = []
    for case, base in pairs:
        own, other = zip(*seconds[case.name], strict=True)
        ratios = [a / b for a, b in seconds[case.name]]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
        median = statistics.median(own)
        results.append(
            Result(
                family,
                case.name,
                base.name,
                1e3 * median,
                1e3 * statistics.median(other),
                middle,
                (low, high),
                min(own) / min(other),
                case.limit,
                max(0.0, first[case.name] - median),
                case.zeros(),
            )
        )
    return results


def data(widths: Sequence[int], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight batches: a pool whose labels a linear teacher gives."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, batch, widths[0])).astype(np.float32)
    teacher = rng.normal(size=(widths[0], widths[-1])).astype(np.float32)
    return x, (x @ teacher).argmax(-1).astype(np.int64)


def torch_net(widths: Sequence[int], device: str) -> Any:
    import torch

    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for n, m in zip(widths, widths[1:], strict=False):
        layers += [torch.nn.Linear(n, m), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).to(device)


def torch_batches(widths: Sequence[int], batch: int, device: str) -> list[tuple[Any, Any]]:
    import torch

    x, y = (torch.from_numpy(a).to(device) for a in data(widths, batch))
    return list(zip(x, y, strict=True))


def torch_wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def torch_zeros(params: Sequence[Any]) -> float:
    return sum(int((p == 0).sum()) for p in params) / sum(p.numel() for p in params)


def torch_compiled(widths: Sequence[int], batch: int, device: str, backend: str) -> list[Variant]:
    """The whole step, from gradient to new parameters, as one compiled function."""
    import torch

    import funcreg.torch as fr
    from funcreg.torch import optax

    batches = torch_batches(widths, batch, device)
    net = torch_net(widths, device)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    def variant(name: str, loss: Any, tx: Any, against: str | None = None, limit: float | None = None) -> Variant:
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            grads, value = torch.func.grad_and_value(loss)(params, x, y)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        # torch.compile keeps what it compiled per code object: without one of its own, each variant would first try the
        # guards of the others, at every step.
        step.__code__ = step.__code__.replace()
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        params = {name: p.detach().clone() for name, p in fr.params(net).items()}
        at = {"params": params, "state": tx.init(params), "count": 0}

        def advance(steps: int) -> None:
            for _ in range(steps):
                x, y = batches[at["count"] % len(batches)]
                at["params"], at["state"], _ = compiled(at["params"], at["state"], x, y)
                at["count"] += 1
            torch_wait(device)

        return Variant(name, advance, lambda: torch_zeros(list(at["params"].values())), against, limit)

    l1, group = fr.l1(LAM), fr.group_lasso(LAM, per="output").on(fr.weights)  # a group: the weights that enter a unit
    adam, prox_adam = optax.adam(LEARNING_RATE), fr.prox_adam
    return [
        variant("adam", loss, adam),
        variant("penalize l1", fr.penalize(loss, l1), adam, "adam", 1.10),
        variant("penalize group_lasso", fr.penalize(loss, group), adam, "adam"),
        variant("prox_adam l1", loss, prox_adam(LEARNING_RATE, l1), "adam", 1.25),
        variant("prox_adam group_lasso", loss, prox_adam(LEARNING_RATE, group), "adam"),
    ]


def jax_jitted(widths: Sequence[int], batch: int) -> list[Variant]:
    """The same step under jax.jit, parameters and state donated."""
    import jax
    import jax.numpy as jnp
    import optax

    import funcreg.jax as fr

    batches = list(
        zip(*(jnp.asarray(a, dtype) for a, dtype in zip(data(widths, batch), "fi", strict=True)), strict=True)
    )

    def new_params() -> Any:
        rng = np.random.default_rng(0)
        layers = {}
        for i, (n, m) in enumerate(zip(widths, widths[1:], strict=False)):
            kernel = rng.uniform(-1, 1, (n, m)) / np.sqrt(n)
            layers[f"Dense_{i}"] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(m, jnp.float32)}
        return layers

    def loss(params: Any, x: Any, y: Any) -> Any:
        for i, layer in enumerate(params.values()):
            x = jnp.maximum(x, 0) if i else x
            x = x @ layer["kernel"] + layer["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def variant(name: str, loss: Any, tx: Any, against: str | None = None, limit: float | None = None) -> Variant:
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, x, y)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        jitted = jax.jit(step, donate_argnums=(0, 1))
        params = new_params()
        at = {"params": params, "state": tx.init(params), "count": 0}

        def advance(steps: int) -> None:
            for _ in range(steps):
                x, y = batches[at["count"] % len(batches)]
                at["params"], at["state"], _ = jitted(at["params"], at["state"], x, y)
                at["count"] += 1
            jax.block_until_ready((at["params"], at["state"]))

        def zeros() -> float:
            leaves = [np.asarray(p) for p in jax.tree.leaves(at["params"])]
            return sum(int((p == 0).sum()) for p in leaves) / sum(p.size for p in leaves)

        return Variant(name, advance, zeros, against, limit)

    l1, group = fr.l1(LAM), fr.group_lasso(LAM, per="output").on(fr.weights)  # a group: the weights that enter a unit
    adam, prox_adam = optax.adam(LEARNING_RATE), fr.prox_adam
    return [
        variant("adam", loss, adam),
        variant("penalize l1", fr.penalize(loss, l1), adam, "adam", 1.10),
        variant("penalize group_lasso", fr.penalize(loss, group), adam, "adam"),
        variant("prox_adam l1", loss, prox_adam(LEARNING_RATE, l1), "adam", 1.10),
        variant("prox_adam group_lasso", loss, prox_adam(LEARNING_RATE, group), "adam"),
    ]


def torch_attached(widths: Sequence[int], batch: int, device: str) -> list[Variant]:
    """The plain eager loop: zero_grad, backward, optimizer.step()."""
    import torch

    import funcreg.torch as fr

    batches = torch_batches(widths, batch, device)

    def variant(name: str, make: Any, penalty: Any = None, against: str | None = None, limit: Any = None) -> Variant:
        net = torch_net(widths, device)
        optimizer = make(net.parameters())
        if penalty is not None:
            fr.attach(optimizer, net, penalty)
        count = [0]

        def advance(steps: int) -> None:
            for _ in range(steps):
                x, y = batches[count[0] % len(batches)]
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                count[0] += 1
            torch_wait(device)

        return Variant(name, advance, lambda: torch_zeros(list(net.parameters())), against, limit)

    l1 = fr.l1(LAM)
    output, inputs = (fr.group_lasso(LAM, per=per).on(fr.weights) for per in ("output", "input"))
    makers = {
        "Adam": lambda p: torch.optim.Adam(p, lr=LEARNING_RATE),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE),
        "SGD momentum": lambda p: torch.optim.SGD(p, lr=10 * LEARNING_RATE, momentum=0.9),
    }
    variants = []
    for name, make in makers.items():
        # The limits are Adam's; beside the fewer operations of SGD's own step the same prox weighs more.
        adam = name.startswith("Adam")
        variants += [
            variant(name, make),
            variant(f"{name} + l1", make, l1, name, 2.0 if adam else None),
            variant(f"{name} + group_lasso per output", make, output, name, 5.0 if adam else None),
            variant(f"{name} + group_lasso per input", make, inputs, name, 5.0 if adam else None),
        ]
    return variants


def show(family: str, results: Sequence[Result], console: Console) -> None:
    """One family's table."""
    table = Table(title=f"{family}: a training step over the same step without the penalty", box=box.SIMPLE_HEAD)
    for column in ("case", "ms", "without", "ratio", "quartiles", "fastest", "required", "", "compile s", "zeros"):
        table.add_column(column, justify="left" if column in ("case", "") else "right", no_wrap=True)
    for r in results:
        table.add_row(
            r.case,
            f"{r.milliseconds:.2f}",
            f"{r.against_milliseconds:.2f}",
            f"{r.ratio:.2f}",
            f"{r.quartiles[0]:.2f}-{r.quartiles[1]:.2f}",
            f"{r.ratio_of_fastest:.2f}",
            "" if r.limit is None else f"<= {r.limit:.2f}",
            {"ok": "[green]ok[/]", "over": "[red]over[/]", "": ""}[r.verdict],
            "" if family == "attach" else f"{r.compile_seconds:.1f}",
            f"{r.zeros:.0%}",
        )
    console.print(table)


FAMILIES = ("torch", "jax", "attach")


def main(argv: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=FAMILIES, help="one family; may be repeated (default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="pairs measured per case (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps per measurement (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for torch; JAX takes what it sees")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 1024, 640, 64, 10], help="of the MLP's layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write machine and results to this file")
    args = parser.parse_args(argv)
    for name, least in (("rounds", 1), ("steps", 1), ("batch", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be >= {least}, got {getattr(args, name)}")
    if len(args.widths) < 2 or min(args.widths) < 1:
        parser.error(f"--widths must be two or more numbers >= 1, got {args.widths}")

    make = {
        "torch": lambda: torch_compiled(args.widths, args.batch, args.device, args.backend),
        "jax": lambda: jax_jitted(args.widths, args.batch),
        "attach": lambda: torch_attached(args.widths, args.batch, args.device),
    }
    families = [family for family in FAMILIES if family in (args.only or FAMILIES)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = machine(families, args.device)
    for key, value in where.items():
        console.print(f"{key + ':':14} {value}", highlight=False)
    console.print(
        "ratio: median over pairs measured next to each other; fastest: ratio of the two fastest times; compile s: the "
        "first step less a later one, caches as found; zeros: share of parameters exactly 0 when the run ended."
    )
    results: list[Result] = []
    for family in families:
        with Progress(console=console, transient=True) as progress:
            variants = make[family]()
            cases = sum(v.against is not None for v in variants)
            task = progress.add_task(family, total=len(variants) + args.rounds * cases)

            def tick(case: str, task: Any = task, family: str = family, progress: Progress = progress) -> None:
                progress.update(task, advance=1, description=f"{family}: {case}")

            found = measure(family, variants, args.rounds, args.steps, tick)
        show(family, found, console)
        results += found
    if args.json:
        rows = [{**r._asdict(), "verdict": r.verdict} for r in results]
        args.json.write_text(
            json.dumps({"machine": where, "arguments": vars(args) | {"json": None}, "results": rows}, indent=2)
        )
    return results


if __name__ == "__main__":
    main()
    sys.exit(0)

"""Many models trained as one, and gradients of single examples, against the Python loops they replace.

Ensembles: 32 MLPs 64-64-64-10, batch 64, each with its own strength and learning rate, by `ensemble(train_step)` with
`prox_adam`; against 32 `nn.Module`s with `torch.optim.Adam(foreach=True)` one after the other, and against 32 calls of
one compiled step. JAX is given one CPU device per core (`jax_num_cpu_devices`), over which `ensemble` spreads the
members; the case of a single device stands beside it. Gradients: 256 examples, small convnets of two convolutions, with
strides and with max-pooling. Nothing fails for being slow.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
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

WIDTHS, BATCH, EXAMPLES = (64, 64, 64, 10), 64, 256
FAMILIES = ("ensemble", "per_example")
WINGS = ("torch", "jax")


class Variant(NamedTuple):
    """One way to do it: `run(n)` takes n steps and waits for the device."""

    name: str
    run: Callable[[int], None]
    required: float | None = None  # how many times as fast as the loop it must be


class Result(NamedTuple):
    case: str
    milliseconds: float  # median over rounds, of one step
    faster: float  # median over rounds: time of the loop / own time in the same round
    quartiles: tuple[float, float]
    required: float | None
    first_seconds: float  # the first step, with compilation


def measure(variants: Sequence[Variant], rounds: int, steps: int, warm: int, tick: Callable[[], None]) -> list[Result]:
    """Rounds in which every variant runs; the first variant is the loop."""
    first, times = {}, {v.name: [] for v in variants}
    for v in variants:
        start = time.perf_counter()
        v.run(1)
        first[v.name] = time.perf_counter() - start
        v.run(warm)
    for i in range(rounds):
        for v in variants if i % 2 else reversed(variants):
            v.run(1)  # the neighbour emptied the caches
            start = time.perf_counter()
            v.run(steps)
            times[v.name].append((time.perf_counter() - start) / steps)
            tick()
    loop, results = times[variants[0].name], []
    for v in variants:
        faster = [a / b for a, b in zip(loop, times[v.name], strict=True)]
        low, middle, high = statistics.quantiles(faster, n=4, method="inclusive") if rounds > 1 else faster * 3
        median = 1e3 * statistics.median(times[v.name])
        results.append(Result(v.name, median, middle, (low, high), v.required, first[v.name]))
    return results


def members_data(members: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    params = {}
    for i, (inputs, outputs) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        params[f"{i}.weight"] = rng.uniform(-1, 1, (members, outputs, inputs)) * inputs**-0.5
        params[f"{i}.bias"] = np.zeros((members, outputs))
    hyper = {"lam": np.geomspace(1e-5, 1e-2, members), "lr": np.geomspace(3e-4, 3e-3, members)}
    as32 = lambda tree: {name: x.astype(np.float32) for name, x in tree.items()}  # noqa: E731
    x = rng.standard_normal((BATCH, WIDTHS[0])).astype(np.float32)
    return as32(params), as32(hyper), x, rng.integers(0, WIDTHS[-1], BATCH)


def torch_loop(members: int) -> Variant:
    """What a PyTorch user writes: modules and optimizers, one after the other; no penalty."""
    import torch

    params, hyper, x, y = members_data(members)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    pairs = []
    for i in range(members):
        a, b, c, d = WIDTHS
        net = torch.nn.Sequential(
            torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Linear(b, c), torch.nn.ReLU(), torch.nn.Linear(c, d)
        )
        with torch.no_grad():
            for p, name in zip(net.parameters(), params, strict=True):
                p.copy_(torch.from_numpy(params[name][i]))
        pairs.append((net, torch.optim.Adam(net.parameters(), lr=float(hyper["lr"][i]), foreach=True)))

    def run(steps: int) -> None:
        for _ in range(steps):
            for net, optimizer in pairs:
                optimizer.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()

    return Variant("torch: nn.Module and torch.optim.Adam, one by one", run)


def torch_members(members: int, compiled: bool) -> list[Variant]:
    import torch
    from torch.nn.functional import cross_entropy, linear

    import funcreg.torch as fr

    params, hyper, x, y = members_data(members)
    params, hyper = ({k: torch.from_numpy(v) for k, v in tree.items()} for tree in (params, hyper))
    batch = torch.from_numpy(x), torch.from_numpy(y)

    def loss(params: Any, x: Any, y: Any) -> Any:
        for i in range(len(WIDTHS) - 1):
            x = linear(x if i == 0 else x.relu(), params[f"{i}.weight"], params[f"{i}.bias"])
        return cross_entropy(x, y)

    pair = fr.train_step(loss, lambda h: fr.prox_adam(h["lr"], fr.l1(h["lam"])))
    one = torch.compile(pair[1], fullgraph=True) if compiled else pair[1]
    many = fr.ensemble(*pair, donate=True, compiled=compiled)
    return [
        looped("torch: compiled step, one by one", pair[0], one, fr.unstack(params), fr.unstack(hyper), batch),
        ensembled("torch: ensemble", *many, params, hyper, batch, 12.0),
    ]


def jax_members(members: int) -> list[Variant]:
    import jax
    import jax.numpy as jnp
    import optax

    import funcreg.jax as fr

    params, hyper, x, y = members_data(members)
    params, hyper, batch = jax.tree.map(jnp.asarray, (params, hyper, (x, y)))
    params = {name: jnp.array(jnp.swapaxes(x, 1, 2) if x.ndim > 2 else x) for name, x in params.items()}

    def loss(params: Any, x: Any, y: Any) -> Any:
        for i in range(len(WIDTHS) - 1):
            x = (x if i == 0 else jax.nn.relu(x)) @ params[f"{i}.weight"] + params[f"{i}.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    pair = fr.train_step(loss, lambda h: fr.prox_adam(h["lr"], fr.l1(h["lam"])))
    one = jax.jit(pair[1])
    wait = jax.block_until_ready
    loop = looped("jax: jitted step, one by one", pair[0], one, fr.unstack(params), fr.unstack(hyper), batch, wait)
    variants = [loop]
    for devices in [None, jax.local_devices()[0]] if jax.local_device_count() > 1 else [None]:
        count = 1 if devices is not None else jax.local_device_count()
        with jax.default_device(devices):
            many = fr.ensemble(*pair, donate=True)
            name = f"jax: ensemble, {count} device{'s' * (count > 1)}"
            own = ensembled(name, *many, params, hyper, batch, 10.0 if devices is None else None, wait)
        variants.append(own._replace(run=on_device(devices, own.run)))
    return variants


def on_device(device: Any, run: Callable[[int], None]) -> Callable[[int], None]:
    import jax

    def there(steps: int) -> None:
        with jax.default_device(device):
            run(steps)

    return there


def ensembled(
    name: str,
    init: Any,
    step: Any,
    params: Any,
    hyper: Any,
    batch: Any,
    required: float | None,
    wait: Any = lambda x: x,
) -> Variant:
    state = [init(params, hyper)]

    def run(steps: int) -> None:
        for _ in range(steps):
            state[0], _ = step(state[0], hyper, *batch)
        wait(state[0])

    return Variant(name, run, required)


def looped(name: str, init: Any, step: Any, members: Any, hyper: Any, batch: Any, wait: Any = lambda x: x) -> Variant:
    states = [init(member, own) for member, own in zip(members, hyper, strict=True)]

    def run(steps: int) -> None:
        for _ in range(steps):
            for i, own in enumerate(hyper):
                states[i], _ = step(states[i], own, *batch)
        wait(states)

    return Variant(name, run)


def torch_examples(count: int, compiled: bool, pooled: bool) -> list[Variant]:
    import torch

    import funcreg.torch as fr

    torch.manual_seed(0)
    stride = 1 if pooled else 2
    pool = torch.nn.MaxPool2d(2) if pooled else torch.nn.Identity()
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, stride=stride, padding=1),
        torch.nn.ReLU(),
        pool,
        torch.nn.Conv2d(8, 16, 3, stride=stride, padding=1),
        torch.nn.ReLU(),
        pool,
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    params = {name: p.detach() for name, p in net.named_parameters()}
    x, y = torch.randn(count, 1, 8, 8), torch.randint(10, (count,))

    def loss(params: Any, x: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    def loop(steps: int) -> None:
        for _ in range(steps):
            for i in range(count):
                net.zero_grad(set_to_none=True)
                torch.nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
                kept = [p.grad for p in net.parameters()]
        del kept

    def run_of(function: Any) -> Callable[[int], None]:
        def run(steps: int) -> None:
            for _ in range(steps):
                function(params, x, y)

        return run

    function = fr.per_example(loss)
    return [
        Variant("torch: backward, example by example", loop),
        Variant("torch: per_example", run_of(function), 5.0),
        *(
            [Variant("torch: per_example, compiled", run_of(torch.compile(function, fullgraph=True)))]
            if compiled
            else []
        ),
    ]


def jax_examples(count: int, pooled: bool) -> list[Variant]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    import funcreg.jax as fr

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for channels in (8, 16):
                x = nn.relu(nn.Conv(channels, (3, 3), strides=1 if pooled else 2, padding=1)(x))
                x = nn.max_pool(x, (2, 2), (2, 2)) if pooled else x
            return nn.Dense(10)(x.reshape(len(x), -1))

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((count, 8, 8, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, count))
    params = Net().init(jax.random.key(0), x[:1])

    def loss(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(Net().apply(params, x), y).mean()

    one = jax.jit(jax.value_and_grad(loss))
    rows = [(x[i : i + 1], y[i : i + 1]) for i in range(count)]
    function = jax.jit(fr.per_example(loss))

    def loop(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready([one(params, *row) for row in rows])

    def run(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(function(params, x, y))

    return [Variant("jax: jitted gradient, example by example", loop), Variant("jax: per_example, jitted", run, 5.0)]


def show(title: str, results: Sequence[Result], console: Console) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("case", "ms", "times as fast", "quartiles", "required", "", "first step s"):
        table.add_column(column, justify="left" if column in ("case", "") else "right", no_wrap=True)
    for r in results:
        verdict = "" if r.required is None else "[green]ok[/]" if r.faster >= r.required else "[red]below[/]"
        table.add_row(
            r.case,
            f"{r.milliseconds:.2f}",
            f"{r.faster:.1f}",
            f"{r.quartiles[0]:.1f}-{r.quartiles[1]:.1f}",
            "" if r.required is None else f">= {r.required:.0f}",
            verdict,
            f"{r.first_seconds:.1f}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Result]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=FAMILIES, help="one family; may be repeated (default: both)")
    parser.add_argument("--wing", action="append", choices=WINGS, help="one wing; may be repeated (default: both)")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--rounds", type=int, default=5, help="measurements per case (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps per measurement (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=20, help="steps before (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="torch.compile nothing, to try this script")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write machine and results to this file")
    args = parser.parse_args(argv)
    for name in ("members", "examples", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be >= 1, got {getattr(args, name)}")
    families, wings = args.only or FAMILIES, args.wing or WINGS
    if "jax" in wings and "ensemble" in families:
        import jax

        with contextlib.suppress(RuntimeError):  # JAX was used before, in this process: it keeps the devices it has
            jax.config.update("jax_num_cpu_devices", os.cpu_count())
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = machine(["torch", *wings], "cpu")
    console.print("\n".join(f"{key}: {value}" for key, value in where.items()), highlight=False)
    results: dict[str, list[Result]] = {}
    jobs = []
    if "ensemble" in families:

        def all_members() -> list[Variant]:
            of_wing = {
                "torch": lambda: torch_members(args.members, not args.eager),
                "jax": lambda: jax_members(args.members),
            }
            members = [v for wing in wings for v in of_wing[wing]()]
            return [torch_loop(args.members), *members]

        jobs.append((f"{args.members} MLPs, a training step of all", all_members, args.steps))
    if "per_example" in families:
        of_wing = {"torch": functools.partial(torch_examples, compiled=not args.eager), "jax": jax_examples}
        for wing, pooled in itertools.product(wings, (False, True)):
            title = f"{wing}: gradients of {args.examples} examples, {'max-pooled' if pooled else 'strided'} convnet"
            build = functools.partial(of_wing[wing], args.examples, pooled=pooled)
            jobs.append((title, build, max(1, args.steps // 40)))
    for title, build, steps in jobs:
        with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
            variants = build()
            task = progress.add_task(title, total=args.rounds * len(variants))
            results[title] = measure(variants, args.rounds, steps, args.warm, lambda t=task: progress.advance(t))
        show(title, results[title], console)
    if args.json:
        found = {title: [r._asdict() for r in family] for title, family in results.items()}
        args.json.write_text(json.dumps({"machine": where, "results": found}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()

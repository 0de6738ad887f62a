"""Every optimizer with an exact twin, every combination of its options: runs that change sides and come back.

Each combination is a group of one optimizer, with a leaf of its own, so that hundreds are compiled at once. `make test`
takes a few of each class, in which any two values of two options meet; the whole product is slow.
"""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

import interop

ULP = 16
BEFORE, STEPS, AFTER = 7, 20, 5
SHAPE = (7, 9)  # vectors, and elements that are left over
BOTH = {"weight_decay": (0.0, 0.1), "maximize": (False, True)}
MOMENTS = {**BOTH, "betas": ((0.9, 0.999), (0.5, 0.6), (0.0, 0.99)), "eps": (1e-8, 0.1)}
DECOUPLED = {**MOMENTS, "decoupled_weight_decay": (False, True)}
OPTIONS = {
    SGD: {**BOTH, "momentum": (0.0, 0.9), "dampening": (0.0, 0.3), "nesterov": (False, True)},
    Adam: {**DECOUPLED, "amsgrad": (False, True)},
    AdamW: {**MOMENTS, "amsgrad": (False, True)},
    RMSprop: {**BOTH, "alpha": (0.99, 0.5), "eps": (1e-8, 0.1), "centered": (False, True), "momentum": (0.0, 0.9)},
    Adagrad: {**BOTH, "lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 0.5), "eps": (1e-10, 0.1)},
    Adamax: MOMENTS,
    Adadelta: {**BOTH, "rho": (0.9, 0.5), "eps": (1e-6, 0.1)},
    NAdam: {**DECOUPLED, "momentum_decay": (0.0, 0.004)},
    RAdam: DECOUPLED,
}
RATES = {RMSprop: 0.001, Adadelta: 0.05}  # so that all parameters stay away from 0
IMPLEMENTATIONS = ("for loop", "foreach", "differentiable", "fused")
OF_ALL_GROUPS = ("differentiable", "initial_accumulator_value")  # PyTorch reads them from the defaults


def combinations(cls, implementations=IMPLEMENTATIONS):
    """All that the class takes."""
    space = {**OPTIONS[cls], "implementation": implementations, "tensor lr": (False, True)}
    for values in itertools.product(*space.values()):
        options = dict(zip(space, values, strict=True))
        try:
            cls([nn.Parameter(torch.zeros(1))], **arguments(cls, options))
        except (TypeError, ValueError, RuntimeError):  # such as Nesterov's momentum of 0, or a fused RMSprop
            continue
        yield options


def arguments(cls, options):
    rate = RATES.get(cls, 0.01)
    rest = {name: value for name, value in options.items() if name not in ("implementation", "tensor lr")}
    flag = {} if options["implementation"] == "for loop" else {options["implementation"]: True}
    return {**rest, **flag, "lr": torch.tensor(rate, dtype=torch.float64) if options["tensor lr"] else rate}


@cache
def covering(cls):
    """A few in which every pair of values of two options occurs that occurs in any; always the one with most new."""
    each = [(set(itertools.combinations(options.items(), 2)), options) for options in combinations(cls)]
    missing = set().union(*(pairs for pairs, _ in each))
    chosen = []
    while missing:
        pairs, options = max(each, key=lambda one: len(one[0] & missing))
        chosen.append(options)
        missing -= pairs
    return chosen


def distances(cls, combos, dtype):
    """How far a run of each is from the unbroken one after 20 steps in JAX, and after 5 more in PyTorch; in ulps."""
    worst = []
    for _, some in itertools.groupby(sorted(combos, key=common), key=common):
        worst += ported(cls, list(some), dtype)
    return worst


def common(options):
    return options["implementation"] == "differentiable", options.get("initial_accumulator_value", 0.0)


def ported(cls, combos, dtype):
    grads = np.random.default_rng(0).standard_normal((BEFORE + STEPS + AFTER, *SHAPE)).astype(dtype)
    net, optimizer = made(cls, combos, dtype)
    torch_steps(net, optimizer, grads[:BEFORE])
    with jax.enable_x64(dtype == "float64"):
        pair = interop.match(net, {name: {"kernel": np.zeros(SHAPE[::-1], dtype)} for name, _ in net.named_children()})
        tx, state = pair.optimizer_to_jax(optimizer)

        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda _: grad, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        rest = jnp.asarray(grads[BEFORE:-AFTER].swapaxes(1, 2))
        params, state = jax.jit(lambda start: jax.lax.scan(step, start, rest)[0])((pair.to_jax(net), state))
        torch_steps(net, optimizer, grads[BEFORE:-AFTER])
        values = pair.parameters_to_torch(params)
        there = ulps(values, net)
        back, fresh = made(cls, combos, dtype)
        back.load_state_dict(values)
        interop.match(back, params).optimizer_to_torch(state, fresh)
    torch_steps(net, optimizer, grads[-AFTER:])
    torch_steps(back, fresh, grads[-AFTER:])
    assert layout(fresh) == layout(optimizer)
    return zip(combos, there, ulps(back.state_dict(), net), strict=True)


def made(cls, combos, dtype):
    """A net with a layer, and an optimizer with a group, for each combination; entries between 1 and 2 in size."""
    rng = np.random.default_rng(1)
    first = torch.tensor(rng.uniform(1, 2, SHAPE) * rng.choice([-1, 1], SHAPE))
    net = nn.ModuleDict({f"layer{i}": nn.Linear(SHAPE[1], SHAPE[0], bias=False) for i in range(len(combos))})
    net.to(getattr(torch, dtype))
    each = [arguments(cls, options) for options in combos]
    shared = {name: each[0][name] for name in OF_ALL_GROUPS if name in each[0]}
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(first)
    groups = [{"params": [p], **given} for p, given in zip(net.parameters(), each, strict=True)]
    return net, cls([{k: v for k, v in group.items() if k not in shared} for group in groups], **shared)


def torch_steps(net, optimizer, grads):
    for grad in grads:
        for p in net.parameters():
            p.grad = torch.tensor(grad)
        net.requires_grad_(not optimizer.defaults["differentiable"])  # a differentiable step of leaves is refused
        optimizer.step()
        net.requires_grad_(True)


def ulps(values, net):
    wanted = {name: p.detach().numpy() for name, p in net.named_parameters()}
    return [float(np.max(np.abs(values[name].numpy() - x) / np.spacing(np.abs(x)))) for name, x in wanted.items()]


def layout(optimizer):
    """What `state_dict` says beside the values."""
    saved = optimizer.state_dict()
    state = {
        i: {k: (x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for k, x in each.items()}
        for i, each in saved["state"].items()
    }
    return state, saved["param_groups"]


def check(cls, combos, dtype="float64"):
    # not (<=): a distance may be NaN
    assert [far for far in distances(cls, combos, dtype) if not max(far[1:]) <= ULP] == []


@pytest.mark.parametrize("cls", OPTIONS)
def test_any_two_options_go_on_as_in_an_unbroken_run(cls):
    check(cls, covering(cls))


@pytest.mark.parametrize("cls", [cls if cls is RAdam else pytest.param(cls, marks=pytest.mark.slow) for cls in OPTIONS])
def test_the_same_in_float32(cls):
    check(cls, covering(cls), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", OPTIONS)
def test_all_options_together_go_on_as_in_an_unbroken_run(cls, implementation):
    combos = list(combinations(cls, (implementation,)))
    if not combos:
        pytest.skip(f"{cls.__name__} has no {implementation} implementation on the CPU")
    check(cls, combos)

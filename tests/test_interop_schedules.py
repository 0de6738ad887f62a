"""Schedulers of torch.optim on the JAX side: the same learning rates at every update, from wherever they stand."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import interop
import interop.optimizers
from interop.optimizers import schedules
from interop.optimizers.schedules import rates_of

HORIZON = 12
BASES = (0.1, 0.03)


def linear(optimizer):
    return schedulers.LinearLR(optimizer, 0.1, 1.0, 4)


KNOWN = {
    "constant": lambda o: schedulers.ConstantLR(o, 0.3, 6),
    "linear": lambda o: schedulers.LinearLR(o, 0.2, 0.9, 7),
    "linear to zero": lambda o: schedulers.LinearLR(o, 1.0, 0.0, 7),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.93),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 9, 2.0),
    "polynomial, root": lambda o: schedulers.PolynomialLR(o, 7, 0.5),
    "step": lambda o: schedulers.StepLR(o, 4, 0.5),
    "multi-step": lambda o: schedulers.MultiStepLR(o, [3, 3, 9], 0.5),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 9, 0.001),
    "cosine to zero": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 1, 0.001),
    "longer warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "warm-up, cosine": lambda o: schedulers.SequentialLR(o, [linear(o), schedulers.CosineAnnealingLR(o, 10)], [4]),
    "warm-up, restarts": lambda o: schedulers.SequentialLR(
        o, [linear(o), schedulers.CosineAnnealingWarmRestarts(o, 4, 2)], [5]
    ),
    "three in sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 2, 0.5)], [4, 9]
    ),
    # PyTorch starts the inner parts of these one step early; so does what is ported
    "a sequence in a sequence": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.SequentialLR(o, [linear(o), schedulers.ExponentialLR(o, 0.9)], [4]), schedulers.StepLR(o, 2, 0.5)],
        [9],
    ),
    "an exponential first in it": lambda o: schedulers.SequentialLR(
        o,
        [
            schedulers.SequentialLR(o, [schedulers.ExponentialLR(o, 0.8), schedulers.CosineAnnealingLR(o, 6)], [4]),
            schedulers.PolynomialLR(o, 5),
        ],
        [11],
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "three chained": lambda o: schedulers.ChainedScheduler(
        [
            schedulers.LinearLR(o, 0.1, 0.5, 4),
            schedulers.MultiStepLR(o, [3, 6], 0.5),
            schedulers.PolynomialLR(o, 8, 1.5),
        ]
    ),
}


def two_groups(make=lambda optimizer: None):
    net = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
    groups = [{"params": [net[0].weight], "lr": BASES[0]}, {"params": [net[0].bias], "lr": BASES[1]}]
    optimizer = torch.optim.SGD(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a sequence in a sequence is stepped when it is made
        return net, optimizer, make(optimizer)


def pair_of(net):
    dtype = str(net[0].weight.dtype).removeprefix("torch.")
    return interop.match(net, {"dense": {"kernel": np.zeros((2, 1), dtype), "bias": np.zeros(1, dtype)}})


def advance(optimizer, scheduler, count=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a nested sequence passes `epoch` on, which PyTorch deprecates
        for _ in range(count):
            optimizer.step()
            scheduler.step()


def now(optimizer):
    return np.array([float(group["lr"]) for group in optimizer.param_groups])


@pytest.mark.parametrize("name", KNOWN)
def test_rates_are_those_of_torch_from_any_step_on(name, x64, monkeypatch):
    """As long as the table lasts, all bits; behind it the closed forms, as long as they have been for PyTorch."""
    monkeypatch.setattr(schedules, "TABLE", HORIZON)
    for start in (0, 1, 4, 5, 9, 13, 25):
        net, optimizer, scheduler = two_groups(KNOWN[name])
        advance(optimizer, scheduler, start)
        with x64():
            rates = rates_of("", scheduler, optimizer, 1)
            got = np.stack(jax.vmap(rates)(jnp.arange(4 * HORIZON, dtype=jnp.int32)), axis=1)
        for i, rate in enumerate(got):
            far = 0.0 if i < HORIZON else 1e-12
            assert np.all(np.abs(rate - now(optimizer)) <= far * np.maximum(now(optimizer), 1e-4)), (start, i, rate)
            assert np.all(rate >= 0)
            advance(optimizer, scheduler)


def test_the_table_of_rates_is_long_and_leaves_the_scheduler_where_it_was(x64):
    """Thousands of steps, bit for bit, also of a rate that is a float32 tensor, which PyTorch rounds at every step."""
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1)):
        net = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        scheduler = schedulers.SequentialLR(
            optimizer, [linear(optimizer), schedulers.CosineAnnealingLR(optimizer, 3000)], [4]
        )
        advance(optimizer, scheduler, 3)
        before, rate = scheduler.state_dict(), float(now(optimizer)[0])
        with x64():
            got = jax.vmap(rates_of("", scheduler, optimizer, 1))(jnp.arange(schedules.TABLE, dtype=jnp.int32))[0]
        assert (scheduler.state_dict(), float(now(optimizer)[0])) == (before, rate)
        wanted = []
        for _ in range(2500):
            wanted.append(now(optimizer)[0])
            advance(optimizer, scheduler)
        np.testing.assert_array_equal(got[:2500], wanted)


def test_a_warm_up_and_a_cosine_take_parameters_where_they_take_them_in_torch(x64):
    """The rates of a recursion are many roundings off their closed form, and a parameter is the sum of its steps."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.001)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = KNOWN["warm-up, cosine"](optimizer)
    rng = np.random.default_rng(0)
    grads = [
        {name: torch.tensor(rng.uniform(-2, -1, p.shape)) for name, p in net.named_parameters()} for _ in range(27)
    ]

    def step(grad):
        for name, p in net.named_parameters():
            p.grad = grad[name]
        advance(optimizer, scheduler)

    for grad in grads[:7]:
        step(grad)
    with x64():
        pair = pair_of(net)
        tx, state = pair.optimizer_to_jax(optimizer, scheduler)
        params, update = pair.to_jax(net), jax.jit(tx.update)
        for grad in grads[7:]:
            updates, state = update(pair.parameters_to_jax(grad), state, params)
            params = optax.apply_updates(params, updates)
            step(grad)
        for name, got in pair.parameters_to_torch(params).items():
            want = net.get_parameter(name).detach()
            assert np.max(np.abs((got - want).numpy()) / np.spacing(want.abs().numpy())) <= 2, name


@pytest.mark.parametrize("name", ["polynomial", "cosine", "warm-up, restarts", "a sequence in a sequence", "chained"])
def test_a_compiled_run_takes_the_rates_of_its_scheduler(name, x64):
    """With momentum, so that the parameters remember every rate; `learning_rate` is that of the next update."""
    net, optimizer, scheduler = two_groups(KNOWN[name])
    optimizer.param_groups[0]["momentum"] = 0.9
    net.requires_grad_(True)

    def step():
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        advance(optimizer, scheduler)

    for _ in range(3):
        step()
    with x64():
        pair = pair_of(net)
        tx, state = pair.optimizer_to_jax(optimizer, scheduler)
        params = pair.to_jax(net)

        def update(carry, _):
            params, state = carry
            updates, after = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return (optax.apply_updates(params, updates), after), jnp.stack(state.learning_rate)

        (params, state), rates = jax.jit(lambda c: jax.lax.scan(update, c, length=20))((params, state))
        for rate in np.asarray(rates):
            assert np.allclose(rate, now(optimizer), rtol=1e-12, atol=1e-17)
            step()
        assert np.allclose(np.array(state.learning_rate), now(optimizer), rtol=1e-12, atol=1e-17)
        for got, want in zip(pair.parameters_to_torch(params).values(), net.parameters(), strict=True):
            assert np.allclose(got, want.detach(), rtol=1e-13)
        assert np.allclose(np.array(tx.init(params).learning_rate), np.array(rates[0]), rtol=1e-12)


@pytest.mark.parametrize("name", ["warm-up, cosine", "warm-up, restarts", "a sequence in a sequence", "three chained"])
def test_a_scheduler_goes_on_in_torch_when_it_has_been_stepped_as_far(name, x64):
    net, optimizer, scheduler = two_groups(KNOWN[name])
    advance(optimizer, scheduler, 3)
    with x64():
        pair = pair_of(net)
        tx, state = pair.optimizer_to_jax(optimizer, scheduler)
        params = pair.to_jax(net)
        for _ in range(4):
            _, state = tx.update(params, state, params)
        advance(optimizer, scheduler, 4)
        groups = [
            {"params": group["params"], "lr": lr} for group, lr in zip(optimizer.param_groups, BASES, strict=True)
        ]
        again = torch.optim.SGD(groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fresh = KNOWN[name](again)
        advance(again, fresh, 3 + int(state.count))
        pair.optimizer_to_torch(state, again)
    for _ in range(10):
        assert np.allclose(now(again), now(optimizer), rtol=1e-12, atol=1e-17)
        advance(again, fresh)
        advance(optimizer, scheduler)


@pytest.mark.parametrize("name", ["exponential", "cosine", "warm-up, cosine", "chained"])
def test_the_recipe_of_the_docstring_steps_a_scheduler_without_a_warning(name, x64):
    net, optimizer, scheduler = two_groups(KNOWN[name])
    advance(optimizer, scheduler, 3)
    with x64():
        pair = pair_of(net)
        tx, opt_state = pair.optimizer_to_jax(optimizer, scheduler)
        params = pair.to_jax(net)
        for p in net.parameters():
            p.grad = torch.ones_like(p)  # of an earlier use, which must move nothing
        before = [p.detach().clone() for p in net.parameters()]
        for _ in range(4):
            _, opt_state = tx.update(params, opt_state, params)
        groups = [{"params": g["params"], "lr": lr} for g, lr in zip(optimizer.param_groups, BASES, strict=True)]
        again = torch.optim.SGD(groups)
        names = {"optimizer": again, "scheduler": KNOWN[name](again), "pair": pair, "opt_state": opt_state}
        doc = inspect.getdoc(interop.Pair.optimizer_to_torch) or ""
        recipe = doc.partition("`int(opt_state.count)`:\n")[2].partition("A state of optax")[0]
        exec(inspect.cleandoc(recipe), {**names, "updates": 3 + int(opt_state.count)})
    advance(optimizer, scheduler, 4)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    for _ in range(10):
        assert np.allclose(now(again), now(optimizer), rtol=1e-12, atol=1e-17)
        again.step()
        names["scheduler"].step()
        advance(optimizer, scheduler)


def test_a_rate_changed_by_hand_goes_on_as_torch_continues_it(x64):
    for name in ("exponential", "step", "linear", "chained"):
        net, optimizer, scheduler = two_groups(KNOWN[name])
        advance(optimizer, scheduler, 3)
        optimizer.param_groups[0]["lr"] *= 0.7
        with x64():
            got = rates_of("", scheduler, optimizer, 1)
            for count in range(10):
                assert np.allclose(np.array(got(jnp.int32(count))), now(optimizer), rtol=1e-12), name
                advance(optimizer, scheduler)


def test_a_scheduler_stepped_once_an_epoch(x64):
    net, optimizer, scheduler = two_groups(KNOWN["multi-step"])
    advance(optimizer, scheduler, 2)
    with x64():
        rates = rates_of("", scheduler, optimizer, 5)
        for count in range(60):
            assert np.allclose(np.array(rates(jnp.int32(count))), now(optimizer), rtol=1e-12), count
            if count % 5 == 4:
                advance(optimizer, scheduler)


def test_float32_rates_do_not_drift():
    """After 100000 updates, to float32 rounding of the closed form."""
    for name, make in (("exponential", lambda o: schedulers.ExponentialLR(o, 0.99995)), ("cosine", KNOWN["cosine"])):
        net, optimizer, scheduler = two_groups(make)
        rates = rates_of("", scheduler, optimizer, 1)
        want = 0.99995**100000 if name == "exponential" else (1 + np.cos(np.pi * (100000 % 18) / 9)) / 2 * 0.99 + 0.01
        assert abs(float(rates(jnp.int32(100000))[0]) / BASES[0] - want) <= 2e-6 * want


def test_a_function_of_the_count_stands_in_for_what_jax_cannot_trace(x64):
    net, optimizer, scheduler = two_groups(lambda o: schedulers.LambdaLR(o, lambda k: 1 / (k + 1)))
    advance(optimizer, scheduler, 4)
    with x64():
        pair = pair_of(net)
        twin = lambda count: tuple(base / (count.astype(jnp.float64) + 5) for base in BASES)  # noqa: E731
        tx, state = pair.optimizer_to_jax(optimizer, twin)
        params = pair.to_jax(net)
        for _ in range(3):
            _, state = tx.update(params, state, params)
            advance(optimizer, scheduler)
            assert np.allclose(np.array(state.learning_rate), now(optimizer), rtol=1e-12)
        tx, state = pair.optimizer_to_jax(optimizer, lambda count: 0.5)
        assert [float(rate) for rate in state.learning_rate] == [0.5, 0.5]  # of the very first update
        _, state = tx.update(params, state, params)
        assert [float(rate) for rate in state.learning_rate] == [0.5, 0.5]
        for wrong in ((0.5,), jnp.ones(2), None):
            with pytest.raises(ValueError, match="one rate, or one for each of the 2 groups"):
                pair.optimizer_to_jax(optimizer, lambda count, wrong=wrong: wrong)


def moved(optimizer):
    scheduler = KNOWN["cosine"](optimizer)
    advance(optimizer, scheduler, 3)
    optimizer.param_groups[0]["lr"] = 0.5
    return scheduler


def fraction(optimizer):
    scheduler = KNOWN["warm restarts"](optimizer)
    optimizer.step()
    scheduler.step(2.5)
    return scheduler


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda o: schedulers.LambdaLR(o, lambda k: 0.5),
            "LambdaLR, whose function JAX may not be able to trace; pass",
        ),
        (lambda o: schedulers.MultiplicativeLR(o, lambda k: 0.5), "MultiplicativeLR, whose function"),
        (
            lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=9, cycle_momentum=False),
            "OneCycleLR, which is not known here; pass a twin that JAX can trace, a function count -> learning rate",
        ),
        (lambda o: schedulers.CyclicLR(o, 0.1, 0.2, cycle_momentum=False), "CyclicLR, which is not known here; pass"),
        (
            lambda o: schedulers.CyclicLR(o, 0.1, 0.2),
            "CyclicLR, which moves the momentum as well, and that is a constant here: it has no twin",
        ),
        (lambda o: schedulers.ReduceLROnPlateau(o), "ReduceLROnPlateau, which decides by the values of the loss"),
        (lambda o: schedulers.LinearLR(o, 0.5, 1.0, 0), "LinearLR, with total_iters=0"),
        (lambda o: schedulers.ConstantLR(o, 0.0, 5), "ConstantLR, which fails in PyTorch 5 steps from now: float div"),
        (
            lambda o: schedulers.ChainedScheduler([KNOWN["cosine"](o), linear(o)]),
            "CosineAnnealingLR, inside a ChainedScheduler",
        ),
        (
            lambda o: schedulers.SequentialLR(o, [linear(o), schedulers.SequentialLR(o, [linear(o)], [])], [3]),
            "SequentialLR, as a later part of a SequentialLR",
        ),
        (
            moved,
            "CosineAnnealingLR, whose rate for group 0 is 0.0.* at its step 3, but the optimizer's is 0.5: it was ch",
        ),
        (fraction, "CosineAnnealingWarmRestarts, that was stepped by fractions"),
        (type("Own", (schedulers.ExponentialLR,), {}), "Own, which is not known"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
def test_a_scheduler_without_an_exact_twin_is_refused(make, why):
    if isinstance(make, type):
        make, own = (lambda o: own(o, 0.9)), make
    net, optimizer, scheduler = two_groups(make)
    with pytest.raises(TypeError, match=f"optimizer_to_jax: the scheduler is a {why}"):
        pair_of(net.float()).optimizer_to_jax(optimizer, scheduler)


def counting(make, updates=0, every=1):
    """Adam, which counts its updates; the scheduler is stepped after every so many."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    scheduler = make(optimizer)
    train(net, optimizer, scheduler, updates, every)
    return net, optimizer, scheduler


def train(net, optimizer, scheduler, updates, every=1, start=0):
    for i in range(start, start + updates):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        if i % every == every - 1:
            scheduler.step()


def test_a_scheduler_that_was_forgotten_is_refused():
    net, optimizer, scheduler = counting(lambda o: schedulers.CosineAnnealingLR(o, 60), 3)
    pair, rate = pair_of(net), float(optimizer.param_groups[0]["lr"])
    with pytest.raises(ValueError, match="has had a scheduler, .*'initial_lr' .* pass it, scheduler=") as error:
        pair.optimizer_to_jax(optimizer)
    remedy = str(error.value).rpartition("scheduler=")[2]
    tx, state = pair.optimizer_to_jax(optimizer, eval(remedy))
    params = pair.to_jax(net)
    _, state = tx.update(params, state, params)
    assert np.allclose(state.learning_rate[0], rate, rtol=1e-7)
    net, optimizer, scheduler = two_groups(KNOWN["step"])
    with pytest.raises(ValueError, match=r"scheduler=lambda count: \(0\.1, 0\.03\)$"):
        pair_of(net.float()).optimizer_to_jax(optimizer)


@pytest.mark.parametrize(
    ("updates", "every", "given", "why"),
    [
        (40, 5, 1, "done 40 updates and the StepLR has last_epoch=8, .* 8 updates with .*=1: steps_per_epoch=5 would"),
        (12, 2, 4, "done 12 updates .* last_epoch=6, which are 24 .*=4: steps_per_epoch=2 would agree"),
        (
            43,
            5,
            5,
            "done 43 updates .* last_epoch=8, which are 40 .*=5: the epoch is not over; port after sch",
        ),
        (43, 5, 1, "done 43 updates .* last_epoch=8, .*=1: port right after scheduler.step"),
        (3, 5, 1, "done 3 updates .* last_epoch=0, which are 0 updates .*: port right after scheduler.step"),
    ],
)
def test_a_scheduler_at_another_step_than_the_optimizer_is_refused(updates, every, given, why):
    net, optimizer, scheduler = counting(lambda o: schedulers.StepLR(o, 3), updates, every)
    with pytest.raises(ValueError, match=f"optimizer_to_jax: the optimizer has {why}"):
        pair_of(net).optimizer_to_jax(optimizer, scheduler, steps_per_epoch=given)


def test_a_scheduler_without_a_twin_is_refused_for_that_first():
    net, optimizer, _ = counting(lambda o: schedulers.ConstantLR(o), 4)
    with pytest.raises(TypeError, match="ReduceLROnPlateau, which decides by the values of the loss"):
        pair_of(net).optimizer_to_jax(optimizer, schedulers.ReduceLROnPlateau(optimizer))


def test_steps_that_can_be_explained_or_not_be_judged_are_accepted():
    net, optimizer, scheduler = counting(lambda o: schedulers.StepLR(o, 2), 15, 5)
    pair = pair_of(net)
    pair.optimizer_to_jax(optimizer, scheduler, steps_per_epoch=5)
    del optimizer.state[net[0].bias]  # had no gradient so far
    pair.optimizer_to_jax(optimizer, scheduler, 5)
    resumed = torch.optim.Adam(net.parameters(), lr=0.1)
    again = schedulers.StepLR(resumed, 2)
    pair.optimizer_to_jax(resumed, scheduler=again)
    again.load_state_dict(scheduler.state_dict())
    pair.optimizer_to_jax(resumed, again)  # moments dropped, the schedule kept
    resumed.load_state_dict(optimizer.state_dict())
    pair.optimizer_to_jax(resumed, again, 5)
    net, optimizer, scheduler = counting(lambda o: schedulers.StepLR(o, 2), 5)
    scheduler.step()  # a GradScaler has skipped the update
    pair_of(net).optimizer_to_jax(optimizer, scheduler)


def test_a_scheduler_that_is_younger_than_the_state_crosses_as_a_schedule():
    net, optimizer, _ = counting(lambda o: schedulers.ConstantLR(o), 7)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.1
    scheduler = schedulers.CosineAnnealingLR(optimizer, 9)
    train(net, optimizer, scheduler, 2)
    pair = pair_of(net)
    with pytest.raises(ValueError, match=r"9 updates .* last_epoch=2, .*=interop.optimizers.schedule_of\(scheduler\)"):
        pair.optimizer_to_jax(optimizer, scheduler)
    tx, state = pair.optimizer_to_jax(optimizer, interop.optimizers.schedule_of(scheduler), steps_per_epoch=2)
    params = pair.to_jax(net)
    for every in range(6):
        _, state = tx.update(params, state, params)
        if every % 2:
            train(net, optimizer, scheduler, 1)
        assert np.allclose(state.learning_rate[0], now(optimizer)[0], rtol=1e-6)
    with pytest.raises(TypeError, match="schedule_of: scheduler must be a scheduler of torch.optim, got float"):
        interop.optimizers.schedule_of(0.1)


def test_wrong_arguments_are_refused():
    net, optimizer, scheduler = two_groups(KNOWN["step"])
    pair = pair_of(net.float())
    with pytest.raises(TypeError, match="scheduler must be a scheduler of torch.optim or a function .* got float"):
        pair.optimizer_to_jax(optimizer, 0.1)
    with pytest.raises(TypeError, match="scheduler must be .* got the class CosineAnnealingLR"):
        pair.optimizer_to_jax(optimizer, schedulers.CosineAnnealingLR)

    def warm_up(count):
        return 0.1 if count < 5 else 1.0

    with pytest.raises(TypeError, match="the scheduler '.*warm_up' must be .* JAX can trace; traced, it raised Tracer"):
        pair.optimizer_to_jax(optimizer, warm_up)
    with pytest.raises(TypeError, match=r"lambda.* traced, it raised TypeError: .*0 positional arg"):
        pair.optimizer_to_jax(optimizer, lambda: 0.1)
    with pytest.raises(ValueError, match="steps_per_epoch must be a whole number >= 1, got 0"):
        pair.optimizer_to_jax(optimizer, scheduler, steps_per_epoch=0)
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the scheduler belongs to another optimizer"):
        pair.optimizer_to_jax(other, scheduler)


@pytest.mark.parametrize("name", ["cosine", "warm restarts", "warm-up, cosine"])
def test_a_scheduler_that_does_not_know_a_group_is_refused(name):
    net = torch.nn.Sequential(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD([net[0].weight], lr=0.1)
    scheduler = KNOWN[name](optimizer)
    optimizer.add_param_group({"params": [net[0].bias], "lr": 0.2})
    with pytest.raises(TypeError, match=r"Cosine\w+, made before group 1 was added, which it cannot step; make it aft"):
        pair_of(net).optimizer_to_jax(optimizer, scheduler)
    pair_of(net).optimizer_to_jax(optimizer, KNOWN["exponential"](optimizer))


def stepped_by(make, epoch):
    def scheduler_of(optimizer):
        scheduler = make(optimizer)
        optimizer.step()
        scheduler.step(epoch)
        return scheduler

    return scheduler_of


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda o: schedulers.LinearLR(o, 0.1, 1.0, 4.5), "LinearLR, which has total_iters=4.5, no whole number"),
        (lambda o: schedulers.ConstantLR(o, 0.1, 4.5), "ConstantLR, which has total_iters=4.5"),
        (lambda o: schedulers.PolynomialLR(o, 9.5, 0.5), "PolynomialLR, which has total_iters=9.5"),
        (lambda o: schedulers.StepLR(o, 2.5, 0.5), "StepLR, which has step_size=2.5"),
        (lambda o: schedulers.StepLR(o, torch.tensor(3), 0.5), r"StepLR, which has step_size=3, no"),
        (lambda o: schedulers.StepLR(o, -3, 0.5), "StepLR, with step_size=-3; make it with one of 1 or more"),
        (lambda o: schedulers.MultiStepLR(o, [3, 5.5], 0.5), "MultiStepLR, which has milestones=5.5"),
        (
            lambda o: schedulers.SequentialLR(o, [linear(o), schedulers.ExponentialLR(o, 0.9)], [4.5]),
            "SequentialLR, which has milestones=4.5",
        ),
        (
            lambda o: schedulers.SequentialLR(o, [linear(o), schedulers.StepLR(o, 2.5)], [4]),
            "StepLR, which has step_size=2.5",
        ),
        (
            lambda o: schedulers.ChainedScheduler([linear(o), schedulers.ConstantLR(o, 0.1, 4.5)]),
            "ConstantLR, which has total_iters=4.5",
        ),
        (stepped_by(KNOWN["exponential"], 2.5), "ExponentialLR, which stands at last_epoch=2.5, no whole number"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
def test_fractions_of_steps_are_refused_where_torch_leaves_its_closed_form(make, why):
    net, optimizer, scheduler = two_groups(make)
    with pytest.raises(TypeError, match=f"optimizer_to_jax: the scheduler is a {why}"):
        pair_of(net.float()).optimizer_to_jax(optimizer, scheduler)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.LinearLR(o, 0.1, 1.0, 4.0),
        lambda o: schedulers.ConstantLR(o, 0.1, np.float64(4)),
        lambda o: schedulers.StepLR(o, 3.0, 0.5),
        lambda o: schedulers.MultiStepLR(o, [3.0, 5], 0.5),
        lambda o: schedulers.CosineAnnealingLR(o, 4.5, 0.001),
        lambda o: schedulers.SequentialLR(o, [linear(o), schedulers.ExponentialLR(o, 0.9)], [4.0]),
    ],
)
def test_whole_floats_and_a_cosine_of_any_length_follow_torch(make, x64):
    net, optimizer, scheduler = two_groups(make)
    with x64():
        rates = rates_of("", scheduler, optimizer, 1)
        for count in range(2 * HORIZON):
            assert np.allclose(np.array(rates(jnp.int32(count))), now(optimizer), rtol=1e-12, atol=1e-17)
            advance(optimizer, scheduler)

"""`attach`: a plain torch.optim loop equals the functional transformation, and everything that can happen to a loop."""

import copy
import importlib
import io
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import funcreg.torch as fr
import oracles_training as oracles
from funcreg.torch import optax
from oracles_training import Term
from wings import JAX

BLOCKS = importlib.import_module("funcreg.torch.attach")  # `fr.attach` is the function
ADAM, ADAMW, SGD, RMSPROP = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop


def _net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = OrderedDict(hidden=nn.Linear(6, 8), tanh=nn.Tanh(), head=nn.Linear(8, 3))
    return nn.Sequential(layers).to(dtype)


def _batch(step, dtype=torch.float64):
    """A new batch at every step; an input that is zero on all of them."""
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    x[:, 3] = 0
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), -x[:, 0]], 1)
    return x.to(dtype), y.to(dtype)


def _loss(net, step):
    x, y = _batch(step, next(net.parameters()).dtype)
    return ((net(x) - y) ** 2).mean()


def _values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def _path(net, optimizer, steps, after=None):
    """A plain loop over the steps of a range; returns the parameters after every one of them."""
    path = []
    for step in steps:
        optimizer.zero_grad()
        _loss(net, step).backward()
        optimizer.step()
        if after is not None:
            after(step)
        path.append(_values(net))
    return path


def _train(net, optimizer, steps):
    return _path(net, optimizer, steps)[-1]


def _functional_gradient(params, step):
    x, y = _batch(step)
    net = _net()
    return torch.func.grad(lambda p: ((torch.func.functional_call(net, p, (x,)) - y) ** 2).mean())(params)


def _functional_path(transformation, steps):
    path, params = [], _values(_net())
    state = transformation.init(params)
    for step in steps:
        updates, state = transformation.update(_functional_gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def _reference_path(references, steps):
    """The same with NumPy references, each with the beginning of the names of its leaves."""
    path, params = [], {name: p.numpy() for name, p in _values(_net()).items()}
    for step in steps:
        grads = _functional_gradient({name: torch.tensor(p) for name, p in params.items()}, step)
        for beginning, reference in references.items():
            own = {name: p for name, p in params.items() if name.startswith(beginning)}
            params = {**params, **reference.step(own, {name: grads[name].numpy() for name in own})}
        path.append({name: torch.tensor(p) for name, p in params.items()})
    return path


def _assert_close(got, expected, tolerance=1e-14):
    assert got.keys() == expected.keys()
    for name in got:
        difference = (got[name] - expected[name]).abs().max() if got[name].numel() else 0.0
        assert difference <= tolerance, f"{name}: {difference:g}"


def _assert_same_path(got, expected, tolerance=1e-14):
    """The parameters after every step."""
    for left, right in zip(got, expected, strict=True):
        _assert_close(left, right, tolerance)


def _assert_equal(got, expected):
    _assert_close(got, expected, 0)


def _assert_sparse(params, zeros=6):
    """The proximal steps did something, and did not do everything."""
    weights = torch.cat([p.flatten() for name, p in params.items() if name.endswith("weight")])
    assert zeros <= (weights == 0).sum() < len(weights) - 6


def _anchor():
    return {name: p / 2 for name, p in _values(_net(seed=1)).items()}


def _importance():
    return {name: p.abs() + 0.5 for name, p in _values(_net(seed=2)).items()}


# --- equal to the functional transformation, 300 steps ---

STEPS = range(300)
LR = 1e-2
# name -> (optimizer, transformation)
OPTIMIZERS = {
    "Adam": (lambda p: ADAM(p, lr=LR, foreach=False), lambda r: fr.prox_adam(LR, r)),
    "Adam foreach": (lambda p: ADAM(p, lr=LR, foreach=True), lambda r: fr.prox_adam(LR, r)),
    "Adam fused": (lambda p: ADAM(p, lr=LR, fused=True), lambda r: fr.prox_adam(LR, r)),
    "Adam options": (
        lambda p: ADAM(p, lr=LR, betas=(0.5, 0.9), eps=1e-4),
        lambda r: fr.prox_adam(LR, r, 0.5, 0.9, 1e-4),
    ),
    "Adam weight_decay": (
        lambda p: ADAM(p, lr=LR, weight_decay=0.1),
        lambda r: optax.chain(fr.add_penalty_gradient(fr.l2(0.1)), fr.prox_adam(LR, r)),
    ),
    "Adam decoupled": (
        lambda p: ADAM(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
        lambda r: fr.prox_adam(LR, r, weight_decay=0.1),
    ),
    "AdamW": (lambda p: ADAMW(p, lr=LR, weight_decay=0.1), lambda r: fr.prox_adam(LR, r, weight_decay=0.1)),
    "SGD": (lambda p: SGD(p, lr=0.1), lambda r: fr.prox_sgd(0.1, r)),
    "SGD momentum": (lambda p: SGD(p, lr=LR, momentum=0.9), lambda r: fr.prox_sgd(LR, r, momentum=0.9)),
    "SGD nesterov fused": (
        lambda p: SGD(p, lr=LR, momentum=0.9, nesterov=True, fused=True),
        lambda r: fr.prox_sgd(LR, r, momentum=0.9, nesterov=True),
    ),
    "SGD weight_decay": (
        lambda p: SGD(p, lr=LR, momentum=0.9, weight_decay=0.1),
        lambda r: optax.chain(fr.add_penalty_gradient(fr.l2(0.1)), fr.prox_sgd(LR, r, momentum=0.9)),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_functional_transformation(name):
    make_optimizer, make_transformation = OPTIMIZERS[name]
    penalty = fr.l1(3e-3) + fr.l2(1e-2).on("head")
    net = _net()
    optimizer = make_optimizer(net.parameters())
    fr.attach(optimizer, net, penalty)
    got = _path(net, optimizer, STEPS)
    _assert_same_path(got, _functional_path(make_transformation(penalty), STEPS))
    _assert_sparse(got[-1], 4)


# name -> (penalty, terms of every leaf)
PENALTIES = {
    "per output": (
        lambda: fr.group_lasso(4e-3, per="output"),
        lambda name: [Term("group", 4e-3, inside=(1,) if name.endswith("weight") else ())],
    ),
    "per input": (
        lambda: fr.group_lasso(4e-3, per="input").on("*.weight"),
        lambda name: [Term("group", 4e-3, inside=(0,))] if name.endswith("weight") else [],
    ),
    "l1 + anchored l2": (
        lambda: fr.l1(3e-3) + fr.anchored(fr.l2(2e-2), _anchor(), _importance()),
        lambda name: [Term("l1", 3e-3), Term("l2", 2e-2, _anchor()[name].numpy(), _importance()[name].numpy())],
    ),
    "layerwise": (
        lambda: fr.layerwise(
            {
                "hidden.weight": fr.sparse_group_lasso(2e-3, 2e-3, per="input"),
                "*.bias": None,
                "*": 0.5 * fr.elastic_net(6e-3, 1e-2),
            }
        ),
        lambda name: {
            "hidden.weight": [Term("l1", 2e-3), Term("group", 2e-3, inside=(0,))],
            "head.weight": [Term("l1", 3e-3), Term("l2", 5e-3)],
        }.get(name, []),
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_equals_the_functional_transformation_for_every_kind_of_penalty(name):
    penalty = PENALTIES[name][0]()
    net = _net()
    optimizer = ADAM(net.parameters(), lr=LR)
    fr.attach(optimizer, net, penalty)
    got = _path(net, optimizer, STEPS)
    # a group couples its coordinates: what is rounded in one of them moves all
    _assert_same_path(got, _functional_path(fr.prox_adam(LR, penalty), STEPS), 3e-14)
    _assert_sparse(got[-1])


# Optimizers without a functional twin, name -> (optimizer, NumPy reference). Dampening: torch takes the first gradient
# into the momentum whole and later ones with 1 - dampening, and the prox step is lr times the sum of those weights.
REFERENCES = {
    "amsgrad": (
        lambda p: ADAM(p, lr=LR, amsgrad=True),
        lambda terms: oracles.ProxAdam(terms, LR, kind="amsgrad"),
    ),
    "amsgrad foreach": (
        lambda p: ADAMW(p, lr=LR, amsgrad=True, foreach=True, weight_decay=0.1),
        lambda terms: oracles.ProxAdam(terms, LR, kind="amsgrad", weight_decay=0.1),
    ),
    "RMSprop": (
        lambda p: RMSPROP(p, lr=3e-3, alpha=0.9),
        lambda terms: oracles.ProxAdam(terms, 3e-3, b2=0.9, kind="rmsprop"),
    ),
    "RMSprop weight_decay": (
        lambda p: RMSPROP(p, lr=3e-3, weight_decay=0.1, eps=1e-4, foreach=True),
        lambda terms: oracles.ProxAdam(terms, 3e-3, b2=0.99, eps=1e-4, kind="rmsprop", coupled=0.1),
    ),
    "dampening": (
        lambda p: SGD(p, lr=LR, momentum=0.9, dampening=0.5),
        lambda terms: oracles.ProxSgd(terms, LR, 0.9, dampening=0.5),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_reference_where_there_is_no_functional_twin(name):
    make_optimizer, make_reference = REFERENCES[name]
    make_penalty, terms = PENALTIES["layerwise"]
    net = _net()
    optimizer = make_optimizer(net.parameters())
    fr.attach(optimizer, net, make_penalty())
    got = _path(net, optimizer, STEPS)
    reference = make_reference({name: terms(name) for name in got[-1]})
    # the reference computes its group prox and its sums in another order
    _assert_same_path(got, _reference_path({"": reference}, STEPS), 1e-13)
    _assert_sparse(got[-1], zeros=3)


def test_groups_have_rates_of_their_own():
    make_penalty, terms = PENALTIES["l1 + anchored l2"]
    net = _net()
    groups = [{"params": net.hidden.parameters(), "lr": 0.02}, {"params": net.head.parameters(), "betas": (0.8, 0.9)}]
    optimizer = ADAM(groups, lr=0.005)
    fr.attach(optimizer, net, make_penalty())
    got = _path(net, optimizer, range(100))
    all_terms = {name: terms(name) for name in got[-1]}
    hidden, head = oracles.ProxAdam(all_terms, 0.02), oracles.ProxAdam(all_terms, 0.005, b1=0.8, b2=0.9)
    _assert_same_path(got, _reference_path({"hidden": hidden, "head": head}, range(100)))
    _assert_sparse(got[-1], 2)


@pytest.mark.parametrize(
    "make, transformation",
    [
        (lambda p: ADAMW(p, lr=0.02, weight_decay=0.1), lambda rate, r: fr.prox_adam(rate, r, weight_decay=0.1)),
        (lambda p: SGD(p, lr=0.02, momentum=0.9), lambda rate, r: fr.prox_sgd(rate, r, momentum=0.9)),
    ],
    ids=["AdamW", "SGD"],
)
def test_a_scheduler_changes_the_rate(make, transformation):
    penalty, net = fr.l1(1e-2), _net()
    optimizer = make(net.parameters())
    fr.attach(optimizer, net, penalty)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count / 20))
    got = _path(net, optimizer, range(100), after=lambda _: scheduler.step())
    schedule = lambda count: 0.02 / (1 + count.double() / 20)  # noqa: E731
    _assert_same_path(got, _functional_path(transformation(schedule, penalty), range(100)))
    _assert_sparse(got[-1], 3)


@pytest.mark.parametrize(
    "dtype, tolerance",
    # narrower than the parameters, which are float64: 1 - lr * weight_decay is rounded to half an ulp of 6e-8, as torch
    # does itself, in each of 50 steps
    [(torch.float64, 1e-14), (torch.float32, 3e-6)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: ADAM(p, lr=lr),
        lambda p, lr: ADAMW(p, lr=lr, weight_decay=0.1),
        lambda p, lr: SGD(p, lr=lr, momentum=0.9),
        lambda p, lr: RMSPROP(p, lr=lr, weight_decay=0.1),
    ],
    ids=["Adam", "AdamW", "SGD", "RMSprop"],
)
def test_the_rate_may_be_a_tensor(make, dtype, tolerance):
    rate = torch.tensor(0.01, dtype=dtype)
    results = []
    for lr in (rate, float(rate)):
        net = _net()
        optimizer = make(net.parameters(), lr)
        fr.attach(optimizer, net, fr.l1(5e-3) + fr.group_lasso(1e-3, per="output"))
        results.append(_train(net, optimizer, range(50)))
    _assert_close(*results, tolerance)


def test_a_schedule_assigns_penalties_to_the_handle():
    net = _net()
    optimizer = ADAM(net.parameters(), lr=LR)
    handle = fr.attach(optimizer, net, fr.l1(0.0))

    def after(step):
        handle.penalty = fr.l1(1e-4 * (step + 1))

    got = _path(net, optimizer, range(60), after)
    assert repr(handle.penalty) == "l1(0.006)"
    schedule = lambda count: fr.l1(1e-4) * count.double()  # noqa: E731
    _assert_same_path(got, _functional_path(fr.prox_adam(LR, schedule), range(60)))
    _assert_sparse(got[-1], 1)
    with pytest.raises(TypeError, match="attach: penalty must be a penalty of funcreg.torch"):
        handle.penalty = lambda count: fr.l1(1e-4)


# --- where it ends ---


@pytest.mark.parametrize(
    "make, steps",
    [
        (lambda p: ADAM(p, lr=0.1), 1500),
        (lambda p: ADAMW(p, lr=0.1, weight_decay=0.0), 1500),
        (lambda p: ADAM(p, lr=0.1, amsgrad=True), 1500),
        # not normalised by a momentum: the rate has to fall below 2 * lam / 100, the largest curvature
        (lambda p: RMSPROP(p, lr=0.02), 8000),
    ],
    ids=["Adam", "AdamW", "amsgrad", "RMSprop"],
)
def test_it_ends_at_the_lasso_solution_of_a_badly_scaled_problem(make, steps):
    a, b = oracles.badly_scaled()
    solution = oracles.lasso(a, b, 0.3)
    objective = lambda w: np.mean((a @ w - b) ** 2) / 2 + 0.3 * np.abs(w).sum()  # noqa: E731
    gram, correlation = torch.tensor(a.T @ a / len(a)), torch.tensor(a.T @ b / len(a))
    net = nn.Linear(30, 1, bias=False, dtype=torch.float64)
    optimizer = make(net.parameters())
    fr.attach(optimizer, net, fr.l1(0.3))
    rate = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate / (1 + step / 2000)
        net.weight.grad = net.weight.detach() @ gram - correlation  # of mean((a w - b)^2) / 2
        optimizer.step()
    w = net.weight.detach().numpy()[0]
    assert objective(w) - objective(solution) <= 1e-9
    np.testing.assert_array_equal(w != 0, solution != 0)


def test_it_ends_at_the_group_lasso_solution_of_a_badly_scaled_problem():
    a, b = oracles.badly_scaled(outputs=4)
    solution = oracles.group_lasso(a, b, 0.5)
    gram, correlation = torch.tensor(a.T @ a / len(a)), torch.tensor(b.T @ a / len(a))
    net = nn.Linear(30, 4, bias=False, dtype=torch.float64)
    optimizer = ADAM(net.parameters(), lr=0.1)
    fr.attach(optimizer, net, fr.group_lasso(0.5, per="input"))
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step / 2000)
        net.weight.grad = net.weight.detach() @ gram - correlation
        optimizer.step()
    w = net.weight.detach().numpy().T
    np.testing.assert_array_equal(w != 0, solution != 0)
    np.testing.assert_allclose(w, solution, rtol=0, atol=1e-9)


# --- what happens to a loop ---

MAKERS = {
    "Adam": lambda p: ADAM(p, lr=LR),
    "Adam fused": lambda p: ADAM(p, lr=LR, fused=True),
    "AdamW amsgrad": lambda p: ADAMW(p, lr=LR, amsgrad=True),
    "SGD": lambda p: SGD(p, lr=LR),
    "SGD nesterov": lambda p: SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: RMSPROP(p, lr=LR),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _attached(make, penalty=None):
    net = _net()
    optimizer = make(net.parameters())
    return net, optimizer, fr.attach(optimizer, net, penalty or fr.l1(5e-3))


def _assert_same_state(left, right):
    """Two state_dicts: the same keys, and the same values to the bit."""
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for index, state in left["state"].items():
        assert state.keys() == right["state"][index].keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][index][key])), f"{index}, {key}"


@pytest.mark.parametrize(
    "make",
    [
        lambda p: ADAM(p, lr=LR),
        lambda p: ADAM(p, lr=LR, fused=True),
        lambda p: SGD(p, lr=LR, momentum=0.9),
        lambda p: SGD(p, lr=LR, momentum=0.9, fused=True),
        lambda p: RMSPROP(p, lr=LR),
    ],
    ids=["Adam", "Adam fused", "SGD", "SGD fused", "RMSprop"],
)
def test_a_step_that_a_grad_scaler_skips_changes_nothing(make):
    net, optimizer, _ = _attached(make)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(30):
        optimizer.zero_grad()
        scaler.scale(_loss(net, step)).backward()
        overflows = step in (5, 6, 20)
        if overflows:
            net.hidden.weight.grad[0, 0] = torch.inf
            before, state = _values(net), copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            _assert_equal(_values(net), before)
            _assert_same_state(optimizer.state_dict(), state)
    # as if those batches had never been seen: scales are powers of two
    other, plain, _ = _attached(make)
    expected = _train(other, plain, [step for step in range(30) if step not in (5, 6, 20)])
    _assert_equal(_values(net), expected)
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("order", ["load, then attach", "attach, then load"])
@pytest.mark.parametrize("via", ["file", "copy"])
@each_maker
def test_a_checkpoint_continues_to_the_bit(make, via, order):
    net, optimizer, _ = _attached(make)
    _train(net, optimizer, range(20))
    checkpoint = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    if via == "file":
        file = io.BytesIO()
        torch.save(checkpoint, file)
        checkpoint = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    else:
        checkpoint = copy.deepcopy(checkpoint)
    expected = _train(net, optimizer, range(20, 40))

    resumed = _net(seed=5)
    again = make(resumed.parameters())
    if order == "attach, then load":
        fr.attach(again, resumed, fr.l1(5e-3))
    resumed.load_state_dict(checkpoint["net"])
    again.load_state_dict(checkpoint["optimizer"])
    if order == "load, then attach":
        fr.attach(again, resumed, fr.l1(5e-3))
    _assert_equal(_train(resumed, again, range(20, 40)), expected)
    _assert_same_state(again.state_dict(), optimizer.state_dict())


@each_maker
def test_remove_leaves_the_optimizer_as_if_never_attached(make):
    net, optimizer, handle = _attached(make)
    _train(net, optimizer, range(5))
    handle.remove()
    never = _net()
    plain = make(never.parameters())
    _train(never, plain, range(5))
    mine, its = copy.deepcopy(optimizer.state_dict()), plain.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert {i: s.keys() for i, s in mine["state"].items()} == {i: s.keys() for i, s in its["state"].items()}
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks

    never.load_state_dict(net.state_dict())
    plain.load_state_dict(mine)
    _assert_equal(_train(net, optimizer, range(5, 15)), _train(never, plain, range(5, 15)))
    handle.remove()  # twice does no harm
    fr.attach(optimizer, net, fr.l1(0.1))  # and there is room for another penalty
    assert (_train(net, optimizer, range(15, 60))["hidden.weight"] == 0).any()


@each_maker
def test_attaching_without_a_step_changes_nothing(make):
    net, optimizer, handle = _attached(make)
    never = make(_net().parameters())
    _assert_same_state(optimizer.state_dict(), never.state_dict())
    handle.remove()
    _assert_same_state(optimizer.state_dict(), never.state_dict())


def test_a_closure_is_called_once_and_its_loss_returned():
    net, optimizer, _ = _attached(MAKERS["Adam"])
    calls = []
    for step in range(10):

        def closure(step=step):
            optimizer.zero_grad()
            loss = _loss(net, step)
            loss.backward()
            calls.append(loss)
            return loss

        assert optimizer.step(closure) is calls[-1]
    assert len(calls) == 10
    other, plain, _ = _attached(MAKERS["Adam"])
    _assert_equal(_values(net), _train(other, plain, range(10)))


def test_parameters_without_a_gradient_or_without_a_part_are_left_alone():
    net = _net()
    net.head.weight.requires_grad_(False)
    optimizer = ADAM(net.parameters(), lr=LR)
    fr.attach(optimizer, net, fr.l1(0.1).on(["*.weight", "head.bias"]))
    start = _values(net)
    for step in range(40):
        optimizer.zero_grad()
        _loss(net, step).backward()
        net.head.bias.grad = None
        optimizer.step()
    after = _values(net)
    for frozen in ("head.weight", "head.bias"):
        assert torch.equal(after[frozen], start[frozen])
        assert (after[frozen] != 0).all()
    assert (after["hidden.weight"] == 0).any()

    # a leaf without a part has the optimizer's own numbers, to the bit
    plain = _net()
    optimizer = ADAM(plain.parameters(), lr=LR)
    bare = _train(plain, optimizer, range(1))
    net, optimizer, _ = _attached(MAKERS["Adam"], fr.l1(0.1).on("*.weight"))
    ours = _train(net, optimizer, range(1))
    assert torch.equal(ours["hidden.bias"], bare["hidden.bias"])
    assert not torch.equal(ours["hidden.weight"], bare["hidden.weight"])


def test_a_gradient_that_comes_and_goes_is_followed():
    # every leaf has a count of its own: one that sat out some steps equals the transformation on the others
    net, optimizer, _ = _attached(lambda p: SGD(p, lr=LR, momentum=0.9))
    seen = {name: [] for name in _values(net)}
    start = _values(net)
    for step in range(20):
        optimizer.zero_grad()
        _loss(net, step).backward()
        if 5 <= step < 12:
            net.head.weight.grad = None
        for name, p in net.named_parameters():
            if p.grad is not None:
                seen[name].append(p.grad.numpy().copy())
        optimizer.step()
    for name, gradients in seen.items():
        assert len(gradients) == (13 if name == "head.weight" else 20)
        reference, expected = oracles.ProxSgd({name: [Term("l1", 5e-3)]}, LR, 0.9), {name: start[name].numpy()}
        for g in gradients:
            expected = reference.step(expected, {name: g})
        np.testing.assert_allclose(_values(net)[name].numpy(), expected[name], rtol=0, atol=1e-14)


def test_a_group_that_is_added_later_is_penalized_too():
    net = _net()
    optimizer = ADAM(net.hidden.parameters(), lr=LR)
    fr.attach(optimizer, net, fr.l1(2e-2))
    start = _values(net)
    half = _train(net, optimizer, range(30))
    assert torch.equal(half["head.weight"], start["head.weight"])
    optimizer.add_param_group({"params": net.head.parameters(), "lr": 2 * LR})
    after = _train(net, optimizer, range(30, 90))
    assert (after["head.weight"] == 0).any()
    with pytest.raises(ValueError, match="attach: Adam with maximize=True has no proximal step"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "maximize": True})
        optimizer.step()


def test_a_layer_that_is_added_later_is_penalized_too():
    net, optimizer, _ = _attached(MAKERS["Adam"], fr.l1(0.3))
    _train(net, optimizer, range(3))
    net.append(nn.Linear(3, 3, dtype=torch.float64))
    optimizer.add_param_group({"params": net[-1].parameters()})
    after = _train(net, optimizer, range(3, 60))
    assert set(after) > set(_values(_net()))
    assert all((after[name] == 0).any() for name in ("hidden.weight", "3.weight"))


def test_a_step_under_inference_mode_may_be_followed_by_others():
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        net, optimizer, _ = _attached(lambda p: SGD(p, lr=0.1), fr.l1(0.05))
        _loss(net, 0).backward()
        with mode():
            optimizer.step()
        results.append(_train(net, optimizer, range(1, 10)))
    _assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strengths_are_copied(dtype):
    lam = torch.tensor(5e-3, dtype=dtype)
    net = _net(dtype=dtype)
    optimizer = SGD(net.parameters(), lr=LR)
    fr.attach(optimizer, net, fr.l1(lam))
    lam.fill_(1e9)
    assert all((p != 0).any() for p in _train(net, optimizer, range(3)).values())


def test_rates_and_betas_may_be_tensors_with_one_entry():
    penalty = fr.l1(5e-3) + fr.group_lasso(1e-2, per="input").on("*.weight")
    for make in (
        lambda p, number: SGD(p, lr=number(0.1), momentum=0.9),
        lambda p, number: ADAM(p, lr=number(0.01), betas=(number(0.8), number(0.9))),
        lambda p, number: RMSPROP(p, lr=number(0.01)),
    ):
        results = []
        for number in (float, lambda x: torch.tensor([x], dtype=torch.float64)):
            net = _net()
            optimizer = make(net.parameters(), number)
            fr.attach(optimizer, net, penalty)
            results.append(_train(net, optimizer, range(20)))
        _assert_close(*results)


@pytest.mark.parametrize("how", ["attach later", "load a plain run"])
def test_the_momentum_of_a_plain_run_has_weights_of_its_own(how):
    # torch takes the first gradient of a run into the buffer whole, and all others with 1 - dampening
    make = lambda p: SGD(p, lr=LR, momentum=0.9, dampening=0.5)  # noqa: E731
    net = _net()
    optimizer = make(net.parameters())
    _train(net, optimizer, range(2))
    if how == "load a plain run":
        plain, optimizer = optimizer.state_dict(), make(net.parameters())
        fr.attach(optimizer, net, fr.l1(5e-3))
        optimizer.load_state_dict(plain)
    else:
        fr.attach(optimizer, net, fr.l1(5e-3))
    for scale in (0.5, 0.95):
        _train(net, optimizer, range(1))
        assert {state["prox_scale"] for state in optimizer.state.values()} == {scale}
    for state in optimizer.state.values():  # a restart
        state["momentum_buffer"] = None
    _train(net, optimizer, range(1))
    assert {state["prox_scale"] for state in optimizer.state.values()} == {1}


def test_a_second_remove_does_nothing():
    net, optimizer, first = _attached(lambda p: SGD(p, lr=LR, momentum=0.9))
    first.remove()
    fr.attach(optimizer, net, fr.l1(5e-3))
    _train(net, optimizer, range(3))
    first.remove()
    assert all(state["prox_scale"] == pytest.approx(2.71) for state in optimizer.state.values())


@each_maker
def test_a_copy_is_attached_again(make):
    net, optimizer, _ = _attached(make)
    _train(net, optimizer, range(3))
    twin, copied = copy.deepcopy((net, optimizer))
    fr.attach(copied, twin, fr.l1(5e-3))
    _assert_equal(_train(twin, copied, range(3, 20)), _train(net, optimizer, range(3, 20)))


# --- refusals ---


def test_optimizers_without_a_metric_are_refused_by_name():
    net = _net()
    for optimizer in (torch.optim.Adagrad(net.parameters()), torch.optim.NAdam(net.parameters())):
        name = type(optimizer).__name__
        with pytest.raises(TypeError, match=f"attach: {name} has no proximal step here; use one of .*AdamW.* penalize"):
            fr.attach(optimizer, net, fr.l1(0.1))

    class Mine(ADAM):  # a subclass may do anything in its step
        pass

    with pytest.raises(TypeError, match="attach: Mine has no proximal step here"):
        fr.attach(Mine(net.parameters()), net, fr.l1(0.1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: ADAM(p, maximize=True), "Adam with maximize=True .* minimise the negative"),
        (lambda p: SGD(p, lr=0.1, maximize=True), "SGD with maximize=True"),
        (lambda p: RMSPROP(p, maximize=True), "RMSprop with maximize=True"),
        (lambda p: RMSPROP(p, centered=True), "RMSprop with centered=True .* variance"),
        (lambda p: RMSPROP(p, momentum=0.5), "RMSprop with momentum=0.5 .* buffer"),
        (lambda p: ADAM(p, differentiable=True), "Adam with differentiable=True .* prox_adam"),
    ],
    ids=["Adam maximize", "SGD maximize", "RMSprop maximize", "centered", "RMSprop momentum", "differentiable"],
)
def test_options_without_a_proximal_step_are_refused_with_the_reason(make, message):
    net = _net()
    with pytest.raises(ValueError, match=f"attach: {message}"):
        fr.attach(make(net.parameters()), net, fr.l1(0.1))


@each_maker
def test_an_option_that_is_switched_on_later_is_refused_at_the_step(make):
    net, optimizer, _ = _attached(make)
    _train(net, optimizer, range(2))
    before = _values(net)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="with maximize=True has no proximal step"):
        optimizer.step()
    _assert_equal(_values(net), before)


def test_half_precision_parameters_are_refused_with_the_remedy():
    for dtype in (torch.bfloat16, torch.float16):
        net = _net(dtype=dtype)
        with pytest.raises(ValueError, match=f"attach: the leaf 'hidden.weight' is {dtype}, .* half an ulp .*autocast"):
            fr.attach(ADAM(net.parameters()), net, fr.l1(0.1))
        net.head.float()  # leaves without a part may have any dtype
        fr.attach(ADAM(net.parameters()), net, fr.l1(0.1).on("head"))


@each_maker
def test_parameters_cast_to_half_precision_later_are_refused_before_anything_moves(make):
    for steps in (0, 2):
        net, optimizer, _ = _attached(make)
        if steps:
            _train(net, optimizer, range(steps))
        net.half()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        before = _values(net)
        with pytest.raises(ValueError, match="attach: the leaf 'hidden.weight' is torch.float16, in which"):
            optimizer.step()
        _assert_equal(_values(net), before)


def test_a_penalty_assigned_later_is_refused_as_the_first_one_is():
    net = _net()
    handle = fr.attach(ADAM(net.head.parameters()), net, fr.l1(0.1).on("head"))
    two = fr.group_lasso(0.1, per="input") + fr.group_lasso(0.1, per="output")
    for wrong, error in ((fr.l1(0.1).on("hidden"), ValueError), (two, fr.NoProxError), (0.1, TypeError)):
        with pytest.raises(error):
            handle.penalty = wrong
        assert repr(handle.penalty) == "l1(0.1) on 'head'"


def test_what_else_is_refused():
    net = _net()
    optimizer = ADAM(net.parameters())
    with pytest.raises(TypeError, match="attach: penalty must be a penalty of funcreg.torch .* got one of funcreg.jax"):
        fr.attach(optimizer, net, JAX.fr.l1(0.1))
    with pytest.raises(TypeError, match="attach: penalty must be a penalty of funcreg.torch .* got 0.1"):
        fr.attach(optimizer, net, 0.1)
    with pytest.raises(TypeError, match="attach: net must be an nn.Module, got dict"):
        fr.attach(optimizer, _values(net), fr.l1(0.1))
    with pytest.raises(ValueError, match="the glob 'hiden' matches no leaf; nearest names: hidden"):
        fr.attach(optimizer, net, fr.l1(0.1).on("hiden"))
    with pytest.raises(fr.NoProxError, match="group_lasso and group_lasso .* 'hidden.weight'"):
        two = fr.group_lasso(0.1, per="input") + fr.group_lasso(0.1, per="output")
        fr.attach(optimizer, net, two.on("hidden.weight"))
    elsewhere = ADAM(_net(1).parameters())
    with pytest.raises(ValueError, match=r"attach: the optimizer holds no parameter that l1\(0.1\) on 'head' selects"):
        fr.attach(elsewhere, net, fr.l1(0.1).on("head"))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks

    fr.attach(optimizer, net, fr.l1(0.1))
    with pytest.raises(ValueError, match="attach: the optimizer has a penalty already; attach their sum"):
        fr.attach(optimizer, net, fr.l2(0.1))
    assert len(optimizer._optimizer_step_post_hooks) == 1


# --- leaves larger than a block ---


class _Odd(nn.Module):
    """Leaves of many shapes, most of them larger than the blocks of the test."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"dense": (12, 7), "conv": (5, 4, 3, 3), "bias": (50,), "row": (1, 40), "one": (), "empty": (0, 4)}
        for name, shape in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 4)
            )


def _odd_anchor(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator, dtype=torch.float64) / 4 for name, p in _Odd().named_parameters()
    }


BLOCK_PENALTIES = {
    "l1": lambda: fr.l1(0.05),
    "per output": lambda: fr.group_lasso(0.03, per="output"),
    "per input": lambda: fr.group_lasso(0.03, per="input").on(["dense", "conv", "row"]) + fr.l1(0.02),
    "within kernels": lambda: fr.group_lasso(0.05, axis=(-2, -1)).on(["conv", "dense"]),
    "importance": lambda: fr.l1(0.05) + fr.anchored(fr.l2(0.5), _odd_anchor(1), _odd_anchor(2)),
    "scalar importance": lambda: fr.anchored(fr.l2(0.5), _odd_anchor(1), dict.fromkeys(_odd_anchor(1), 2.0)),
    "anchored l1": lambda: fr.anchored(fr.l1(0.05), _odd_anchor(1), _odd_anchor(2)),
    "anchored groups": lambda: fr.anchored(fr.group_lasso(0.05, per="output"), _odd_anchor(1)),
    "not separable": lambda: fr.custom(
        "ball", lambda x, lam: lam * x.norm(), prox=lambda x, step_size, lam: x / (1 + lam * x.norm()), lam=0.01
    ),
}


@pytest.mark.parametrize(
    "make", [MAKERS["Adam"], MAKERS["SGD nesterov"], MAKERS["RMSprop"]], ids=["Adam", "SGD", "RMSprop"]
)
@pytest.mark.parametrize("name", BLOCK_PENALTIES)
def test_blocks_give_the_numbers_of_the_whole_leaf(monkeypatch, name, make):
    results = []
    for size in (1 << 17, 16):
        monkeypatch.setattr(BLOCKS, "_BLOCK", size)
        net = _Odd()
        optimizer = make(net.parameters())
        fr.attach(optimizer, net, BLOCK_PENALTIES[name]())
        generator = torch.Generator().manual_seed(3)
        for _ in range(12):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4
            optimizer.step()
        results.append(_values(net))
    _assert_close(*results, 1e-15)
    changed = _Odd()
    assert not torch.equal(results[0]["dense"], changed.dense)


def test_blocks_are_cut_along_an_axis_that_no_group_contains(monkeypatch):
    # The test above proves nothing if nothing is cut.
    monkeypatch.setattr(BLOCKS, "_BLOCK", 16)
    shapes = {}
    for name in ("l1", "per output", "per input", "not separable"):
        flat, bound = BLOCK_PENALTIES[name]().bind(_values(_Odd()))
        shapes[name] = {
            leaf: [tuple(block[0].shape) for block, _ in BLOCKS._blocks([x], parts)]
            for leaf, x, parts in zip(flat.names, flat.leaves, bound, strict=True)
        }
    assert shapes["l1"]["dense"] == [(2, 7)] * 6
    assert shapes["per output"]["dense"] == [(2, 7)] * 6
    assert shapes["per input"]["dense"] == [(12, 1)] * 7
    assert shapes["per input"]["conv"] == [(5, 1, 3, 3)] * 4
    assert shapes["per output"]["bias"] == [(16,)] * 3 + [(2,)]
    assert shapes["not separable"]["dense"] == [(12, 7)]
    assert shapes["l1"]["one"] == [()]

"""`pair.optimizer_to_jax` and `optimizer_to_torch`: a run that changes sides goes on as if it had not.

Units in the last place are counted per parameter, as multiples of the spacing of floats at the value that PyTorch
reaches. Parameters begin between 1 and 2 and stay away from 0 in these runs. What passes through 0 is counted in units
of what it was: optax adds an update, which is a float64 number, where PyTorch adds a product before it is rounded.
"""

import copy
import inspect
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx, serialization
from flax.training.train_state import TrainState

import funcreg.jax as fr_jax
import funcreg.torch as fr
import interop
from funcreg.torch import optax as fr_optax
from interop.links import Link
from interop.optimizers import TorchOptimizerState

ULP = 16
BEFORE, STEPS = 7, 20


class Dense(torch.nn.Module):
    """The least net whose layout differs."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.hidden(x)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.hidden = torch.nn.Linear(4, 3)
        self.out = torch.nn.Linear(3, 2)

    def forward(self, words):
        return self.out(torch.tanh(self.hidden(self.embed(words))))


class Flax(nn.Module):
    @nn.compact
    def __call__(self, words):
        x = nn.Embed(5, 4, name="embed")(words)
        return nn.Dense(2, name="out")(jnp.tanh(nn.Dense(3, name="hidden")(x)))


class Nnx(nnx.Module):
    def __init__(self, **options):
        self.embed = nnx.Embed(5, 4, **options)
        self.hidden = nnx.Linear(4, 3, **options)
        self.out = nnx.Linear(3, 2, **options)

    def __call__(self, words):
        return self.out(jnp.tanh(self.hidden(self.embed(words))))


def away_from_zero(net, dtype=torch.float64):
    """Entries between 1 and 2 in size."""
    net.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            size = 1 + torch.rand(p.shape, generator=generator, dtype=dtype)
            p.copy_(torch.where(torch.rand(p.shape, generator=generator) < 0.5, size, -size))
    return net


def dense_pair(net):
    shapes = {"hidden": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}
    return interop.match(net, jax.tree.map(lambda x: x.astype(_dtype(net)), shapes))


def net_pair(net):
    shapes = jax.eval_shape(Flax().init, jax.random.key(0), jnp.zeros(1, jnp.int32))
    return interop.match(net, jax.tree.map(lambda x: np.zeros(x.shape, _dtype(net)), shapes)["params"])


def _dtype(net):
    return str(next(net.parameters()).dtype).removeprefix("torch.")


def draw(net, count, seed=2):
    """Gradients as recorded in a run, None where there is none."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in net.named_parameters()}
        for _ in range(count)
    ]


def torch_steps(net, optimizer, grads, scheduler=None):
    for grad in grads:
        for name, p in net.named_parameters():
            p.grad = None if grad[name] is None else grad[name].clone()
        net.requires_grad_(not optimizer.defaults["differentiable"])  # a differentiable step of leaves is refused
        optimizer.step()
        net.requires_grad_(True)
        if scheduler is not None:
            scheduler.step()


def jax_grads(pair, grad):
    """The same gradients on the JAX side; None where there is none."""
    if all(g is not None for g in grad.values()):
        return pair.parameters_to_jax(grad)
    blank = {name: torch.zeros_like(p) for name, p in pair.net.named_parameters()}
    tree = pair.parameters_to_jax({name: blank[name] if g is None else g for name, g in grad.items()})
    absent = pair.spread({name: g is None for name, g in grad.items()})
    return jax.tree.map(lambda x, none: None if none else x, tree, absent)


def jax_steps(pair, tx, state, params, grads, jit=False):
    update = jax.jit(tx.update) if jit else tx.update
    for grad in grads:
        updates, state = update(jax_grads(pair, grad), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def own(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def load(net, pair, params):
    with torch.no_grad():
        for name, value in pair.parameters_to_torch(params).items():
            net.get_parameter(name).copy_(value)


def ulps(pair, params, net):
    """The largest distance from the net's parameters, in units in the last place of theirs."""
    got = pair.parameters_to_torch(params) if not isinstance(params, torch.nn.Module) else own(params)
    return max(
        float(np.max(np.abs(got[name].numpy() - p.numpy()) / np.spacing(np.abs(p.numpy()))))
        for name, p in own(net).items()
    )


CLASSES = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad),
    *(torch.optim.Adamax, torch.optim.Adadelta, torch.optim.NAdam, torch.optim.RAdam),
)


def label(value):
    if isinstance(value, type):
        return value.__name__
    return "-".join(k if v is True else f"{k}={v}" for k, v in value.items() if v) or "plain"


def shape_of(optimizer):
    """What `state_dict` says beside the values."""
    saved = optimizer.state_dict()
    state = {
        i: {k: (v.dtype, v.shape) if isinstance(v, torch.Tensor) else v for k, v in each.items()}
        for i, each in saved["state"].items()
    }
    return state, saved["param_groups"]


@pytest.mark.parametrize("flags", ["foreach", "fused", "tensor_lr", "fused tensor_lr", "differentiable tensor_lr"])
def test_a_state_goes_back_into_the_optimizer_whose_flags_it_followed(flags, x64):
    flags = flags.split()
    lr = torch.tensor(0.01, dtype=torch.float64) if "tensor_lr" in flags else 0.01
    options = {"lr": lr, "weight_decay": 0.1} | {name: True for name in flags if name != "tensor_lr"}
    net = away_from_zero(Dense())
    optimizer = torch.optim.Adam(net.parameters(), **options)
    grads = draw(net, 12)
    torch_steps(net, optimizer, grads[:4])
    with x64():
        pair = dense_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[4:])
        torch_steps(net, optimizer, grads[4:])
        assert ulps(pair, params, net) <= ULP
        kept = optimizer.param_groups[0]["lr"]
        pair.optimizer_to_torch(state, optimizer)
    assert optimizer.param_groups[0]["lr"] is kept and float(kept) == 0.01
    torch_steps(net, optimizer, grads[:1])  # the flag's implementation takes the state that was written


EXACT = {torch.optim.RMSprop: ULP, torch.optim.Adadelta: ULP}  # nothing is corrected
CANCELS = {torch.optim.RAdam: 1e-4 / np.finfo(np.float64).eps}  # its length of the average
CAPTURABLE = [cls for cls in CLASSES if "capturable" in inspect.signature(cls).parameters]


@pytest.mark.parametrize("cls", CAPTURABLE)
def test_a_capturable_run_differs_by_the_float32_of_its_corrections(cls, x64, monkeypatch):
    """PyTorch takes it on accelerators only, whose roundings are their own; here its steps are let onto the CPU."""
    net = away_from_zero(Dense())
    optimizer = cls(net.parameters(), lr=0.01, weight_decay=0.1, capturable=True)
    grads = draw(net, 12)
    with pytest.raises(AssertionError, match="supported devices"):
        torch_steps(net, optimizer, grads[:1])
    for name in ("adam", "rmsprop", "adamax", "adadelta", "nadam", "radam"):
        module = sys.modules[f"torch.optim.{name}"]
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])
    net = away_from_zero(Dense())
    optimizer = cls(net.parameters(), lr=0.01, weight_decay=0.1, capturable=True)
    torch_steps(net, optimizer, grads[:4])
    with x64():
        pair = dense_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[4:])
        torch_steps(net, optimizer, grads[4:])
        assert ulps(pair, params, net) <= {**EXACT, **CANCELS}.get(cls, 1e-6 / np.finfo(np.float64).eps)
        pair.optimizer_to_torch(state, optimizer)
    torch_steps(net, optimizer, grads[:1])


# --- groups, leaves without gradients, jit ---

GROUPED = [
    (torch.optim.SGD, [{"momentum": 0.9}, {"momentum": 0.0, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True}]),
    (torch.optim.Adam, [{"betas": (0.8, 0.99)}, {"amsgrad": True}, {"weight_decay": 0.1, "eps": 0.1}]),
    (torch.optim.AdamW, [{"betas": (0.0, 0.9999)}, {"amsgrad": True}, {"weight_decay": 0.3, "maximize": True}]),
    (torch.optim.RMSprop, [{"alpha": 0.9}, {"centered": True, "lr": 0.001}, {"momentum": 0.9, "lr": 0.001}]),
    (torch.optim.Adagrad, [{"lr_decay": 0.5}, {"eps": 0.1}, {"weight_decay": 0.1}]),
    (torch.optim.Adamax, [{"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.1}]),
    (torch.optim.Adadelta, [{"rho": 0.5}, {"eps": 0.1}, {"weight_decay": 0.1}]),
    (torch.optim.NAdam, [{"momentum_decay": 0.4}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.1}]),
    (torch.optim.RAdam, [{"betas": (0.9, 0.99)}, {"betas": (0.6, 0.6)}, {"weight_decay": 0.1, "eps": 0.1}]),
]


def grouped(net, cls, options):
    """Three groups in another order than the parameters; the bias of the hidden layer is in none."""
    members = [[net.out.weight], [net.embed.weight], [net.hidden.weight, net.out.bias]]
    rates = (0.02, 0.01, 0.005)
    return cls([{"params": p, "lr": lr, **o} for p, lr, o in zip(members, rates, options, strict=True)], lr=0.1)


@pytest.mark.parametrize(("cls", "options"), GROUPED[:4], ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_groups_in_a_compiled_loop_that_computes_its_own_gradients(cls, options, x64):
    """Each side takes the gradients of its own model; the loop is one jitted scan."""
    net = away_from_zero(Net())
    optimizer = grouped(net, cls, options)
    words = torch.randint(0, 5, (BEFORE + STEPS, 8))
    wanted = torch.randn(BEFORE + STEPS, 8, 2, dtype=torch.float64)

    def loop(start, stop):
        for i in range(start, stop):
            optimizer.zero_grad()
            torch.mean((net(words[i]) - wanted[i]) ** 2).backward()
            optimizer.step()

    loop(0, BEFORE)
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)

        def loss(params, words, wanted):
            return jnp.mean((Flax().apply({"params": params}, words) - wanted) ** 2)

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = interop.to_jax((words[BEFORE:], wanted[BEFORE:]))
        before = pair.to_jax(net)
        (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, batches))((before, state))
        loop(BEFORE, BEFORE + STEPS)
        assert ulps(pair, params, net) <= ULP
        assert np.array_equal(params["hidden"]["bias"], before["hidden"]["bias"])
        again = grouped(net, cls, options)
        pair.optimizer_to_torch(state, again)
    assert shape_of(again) == shape_of(optimizer)


COUNTING = (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RAdam)


@pytest.mark.parametrize("cls", COUNTING)
def test_a_leaf_without_gradient_stays_and_does_not_count(cls, x64):
    """PyTorch's None is None here. The embedding starts after the port, the bias pauses, the kernel skips one step."""
    options = {"lr": 0.01, "weight_decay": 0.1} | (
        {"momentum": 0.9, "dampening": 0.5} if cls is torch.optim.SGD else {}
    )
    net = away_from_zero(Net())
    optimizer = cls(net.parameters(), **options)
    grads = draw(net, 16)
    for i, grad in enumerate(grads):
        grad["embed.weight"] = grad["embed.weight"] if i > 9 else None
        grad["hidden.bias"] = grad["hidden.bias"] if i < 3 or i > 12 else None
        grad["out.weight"] = grad["out.weight"] if i != 7 else None
        grad["out.bias"] = None
    torch_steps(net, optimizer, grads[:5])
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[5:])
        torch_steps(net, optimizer, grads[5:])
        assert ulps(pair, params, net) <= ULP
        if cls is not torch.optim.SGD:
            steps = {
                name: int(optimizer.state[p]["step"]) for name, p in net.named_parameters() if optimizer.state.get(p)
            }
            assert steps == {"embed.weight": 6, "hidden.bias": 6, "hidden.weight": 16, "out.weight": 15} | (
                {"out.bias": 0} if cls is torch.optim.Adagrad else {}
            )
            assert int(state.state["step"]["embed"]["embedding"]) == 6 and int(state.state["step"]["out"]["bias"]) == 0
        again = cls(net.parameters(), **options)
        pair.optimizer_to_torch(state, again)
    assert shape_of(again) == shape_of(optimizer)


def test_a_masked_node_is_no_gradient_and_a_zero_is_one(x64):
    net = away_from_zero(Dense())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    with x64():
        pair = dense_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params = pair.to_jax(net)
        grads = {"hidden": {"kernel": jnp.zeros((2, 3)), "bias": optax.MaskedNode()}}
        updates, state = tx.update(grads, state, params)
        assert not np.any(updates["hidden"]["bias"]) and int(state.state["step"]["hidden"]["bias"]) == 0
        assert np.allclose(updates["hidden"]["kernel"], -0.05 * params["hidden"]["kernel"], rtol=1e-12)
        assert int(state.state["step"]["hidden"]["kernel"]) == 1


def test_frozen_parameters_are_never_moved(x64):
    """In no group, or in one with `requires_grad=False`: the update is 0 whatever the gradient, also its decay."""
    net = away_from_zero(Net())
    net.out.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([net.hidden.weight, net.out.weight, net.embed.weight], lr=0.1, weight_decay=0.5)
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params = pair.to_jax(net)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        moved = {name: bool(np.any(x)) for name, x in fr_jax.to_flat(updates).items()}
    frozen = {"hidden.bias", "out.bias", "out.kernel"}
    assert moved == {name: name not in frozen for name in moved} and len(moved) == 5
    assert state.state["exp_avg"]["out"]["bias"] == optax.MaskedNode()
    assert not np.any(state.state["exp_avg"]["out"]["kernel"])


def in_groups(cls, net, options):
    first = {"params": [net.embed.weight, net.hidden.weight]}
    return cls([first, {"params": [net.hidden.bias, *net.out.parameters()], "weight_decay": 0.1}], lr=0.01, **options)


def unstepped(cls, net, options, grads):
    return in_groups(cls, net, options)


def frozen_from_the_start(cls, net, options, grads):
    net.hidden.weight.requires_grad_(False)
    net.embed.weight.requires_grad_(False)
    return stepped(cls, net, options, grads)


def stepped(cls, net, options, grads):
    optimizer = in_groups(cls, net, options)
    torch_steps_of_trained(net, optimizer, grads)
    return optimizer


def frozen_on_the_way(cls, net, options, grads):
    optimizer = stepped(cls, net, options, grads)
    net.hidden.weight.requires_grad_(False)
    net.embed.weight.requires_grad_(False)
    return optimizer


def with_a_group_added(cls, net, options, grads):
    optimizer = cls(net.out.parameters(), lr=0.01, **options)
    torch_steps_of_trained(net, optimizer, grads)
    optimizer.add_param_group({"params": [net.embed.weight, net.hidden.bias], "lr": 0.02})
    return optimizer


def loaded(cls, net, options, grads):
    before = with_a_group_added(cls, net, options, grads)
    optimizer = cls(net.out.parameters(), lr=0.5)  # other hyper-parameters, which the loaded ones replace
    optimizer.add_param_group({"params": [net.embed.weight, net.hidden.bias]})
    optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    return optimizer


def torch_steps_of_trained(net, optimizer, grads):
    for grad in grads:
        for name, p in net.named_parameters():
            p.grad = grad[name].clone() if p.requires_grad else None
        optimizer.step()


HISTORIES = [unstepped, frozen_from_the_start, frozen_on_the_way, with_a_group_added, loaded]


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.NAdam, {}),
    ],
    ids=label,
)
def test_whatever_came_before_the_port_goes_on(cls, options, history, x64):
    net = away_from_zero(Net())
    grads = draw(net, 5 + 10)
    optimizer = history(cls, net, options, grads[:5])
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[5:], jit=True)
        torch_steps_of_trained(net, optimizer, grads[5:])
        assert ulps(pair, params, net) <= ULP
        kept = shape_of(optimizer)
        pair.optimizer_to_torch(state, optimizer)
    assert shape_of(optimizer) == kept


@pytest.mark.relaxed_promotion  # flax's batch norm
def test_a_batch_norm_is_trained_on_with_its_statistics(x64):
    """Its running variance is brought to PyTorch's as the note says; the rest agrees as it is."""

    class Model(nnx.Module):
        def __init__(self, **options):
            self.hidden = nnx.Linear(4, 6, use_bias=False, **options)  # a bias would be all rounding, times Adam
            self.norm = nnx.BatchNorm(6, momentum=0.9, epsilon=1e-5, use_fast_variance=False, **options)
            self.out = nnx.Linear(6, 2, **options)

        def __call__(self, x):
            return self.out(jnp.tanh(self.norm(self.hidden(x))))

    hidden, norm = torch.nn.Linear(4, 6, bias=False), torch.nn.BatchNorm1d(6)
    net = torch.nn.ModuleDict({"hidden": hidden, "norm": norm, "out": torch.nn.Linear(6, 2)}).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    n = 8
    x = torch.randn(BEFORE + STEPS, n, 4, generator=generator, dtype=torch.float64) * 3 + 1

    def forward(x):
        return net["out"](torch.tanh(net["norm"](net["hidden"](x))))

    def step(x):
        optimizer.zero_grad()
        torch.mean(forward(x) ** 2).backward()
        optimizer.step()

    for batch in x[:BEFORE]:
        step(batch)
    with x64():
        model = Model(rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)
        pair = interop.match(net, model)
        note = next(note for note in pair.notes if "running variance" in note)
        rule = note.rpartition("After a step of flax, ")[2].partition(" is PyTorch's")[0]
        tx, opt_state = pair.optimizer_to_jax(optimizer)
        nnx.update(model, pair.to_jax(net))
        ours = nnx.Optimizer(model, optax.GradientTransformation(lambda _: opt_state, tx.update), wrt=nnx.Param)

        @nnx.jit
        def train(model, ours, x):
            old = model.norm.var[...]
            ours.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))
            model.norm.var[...] = eval(rule, {"var": model.norm.var[...], "old": old, "m": 0.9, "n": n})

        for batch in x[BEFORE:]:
            train(model, ours, jnp.asarray(batch.numpy()))
            step(batch)
        for name, got in pair.to_torch(nnx.state(model)).items():
            want = net.state_dict()[name]
            assert bool(((got - want).abs() <= 1e-12 * want.abs().max()).all()), name
        model.eval()
        net.eval()
        np.testing.assert_allclose(model(jnp.asarray(x[0].numpy())), forward(x[0]).detach(), rtol=0, atol=1e-12)


def test_rates_are_in_the_state_and_can_be_changed(x64):
    net = away_from_zero(Dense())
    optimizer = torch.optim.Adam(
        [{"params": net.hidden.weight, "lr": 0.01}, {"params": net.hidden.bias, "lr": 0.02}], lr=1.0
    )
    grads = draw(net, 8)
    with x64():
        pair = dense_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[:4])
        assert [float(lr) for lr in state.learning_rate] == [0.01, 0.02] and int(state.count) == 4
        state = state._replace(learning_rate=(jnp.asarray(0.003), state.learning_rate[1]))
        params, state = jax_steps(pair, tx, state, params, grads[4:])
        torch_steps(net, optimizer, grads[:4])
        optimizer.param_groups[0]["lr"] = 0.003
        torch_steps(net, optimizer, grads[4:])
        assert ulps(pair, params, net) <= ULP
        fresh = torch.optim.Adam([{"params": net.hidden.weight}, {"params": net.hidden.bias}], lr=1.0)
        pair.optimizer_to_torch(state, fresh)
    assert [group["lr"] for group in fresh.param_groups] == [0.003, 0.02]


@pytest.mark.parametrize(("cls", "options"), GROUPED, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_init_starts_afresh_as_torch_does(cls, options, x64):
    net = away_from_zero(Net())
    optimizer = grouped(net, cls, options)
    grads = draw(net, 5)
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params = pair.to_jax(net)
        fresh = tx.init(params)
        assert jax.tree.structure(fresh) == jax.tree.structure(state)
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)) and a.dtype == b.dtype, fresh, state)
        assert all(jax.tree.leaves(same))
        params, _ = jax_steps(pair, tx, fresh, params, grads)
        torch_steps(net, optimizer, grads)
        assert ulps(pair, params, net) <= ULP


def test_near_zero_units_in_the_last_place_are_those_of_the_leaf(x64):
    """Where steps take a parameter to a small part of itself, it keeps the rounding of what it was, on both sides."""
    net = away_from_zero(Net())
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.01, momentum=0.9)
    grads = draw(net, STEPS)
    before = own(copy.deepcopy(net))
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads, jit=True)
        torch_steps(net, optimizer, grads)
        got = pair.parameters_to_torch(params)
    for name, p in own(net).items():
        assert np.max(np.abs((got[name] - p).numpy())) <= ULP * np.spacing(float(p.abs().max()))
    assert any(bool((p.abs() < before[name].abs() / 16).any()) for name, p in own(net).items())


# --- float32 ---


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.Adam, {"betas": (0.9, 0.9999)}),
        (torch.optim.Adagrad, {"lr_decay": 0.1}),
        (torch.optim.Adamax, {"betas": (0.999, 0.999)}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {"betas": (0.9, 0.9999)}),
    ],
    ids=label,
)
def test_float32_without_x64_agrees_to_float32_rounding(cls, options):
    """PyTorch computes corrections in float64; in float32 `1 - beta**t` would be off by 1e-5 and more."""
    net = away_from_zero(Dense(), torch.float32)
    optimizer = cls(net.parameters(), lr=0.01, **options)
    pair = dense_pair(net)
    tx, state = pair.optimizer_to_jax(optimizer)
    params = pair.to_jax(net)
    for grad in draw(net, 12):
        before = own(copy.deepcopy(net))
        updates, state = tx.update(jax_grads(pair, grad), state, params)
        torch_steps(net, optimizer, [grad])
        got = pair.parameters_to_torch(updates)
        for name, p in own(net).items():
            want = (p.double() - before[name].double()).numpy()
            # the step is the difference of two rounded parameters on both sides
            assert np.max(np.abs(got[name].numpy() - want)) <= 4 * np.spacing(np.float32(2.0))
        params = pair.to_jax(net)  # from PyTorch's: the errors of single steps
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


NARROW_RUNS = [  # the share of parameters and moments with all bits equal; add(alpha=) rounds otherwise in vectors
    (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}, 0.8),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}, 0.8),
    (torch.optim.AdamW, {"lr": 0.1}, 1.0),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}, 0.97),
    (torch.optim.Adagrad, {"lr": 0.1}, 1.0),
    (torch.optim.Adamax, {"lr": 0.1}, 1.0),
    (torch.optim.Adadelta, {"lr": 1.0}, 1.0),
    (torch.optim.NAdam, {"lr": 0.1}, 1.0),
    (torch.optim.RAdam, {"lr": 0.1}, 1.0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options", "share"), NARROW_RUNS, ids=lambda x: getattr(x, "__name__", ""))
def test_half_precision_rounds_where_pytorchs_loops_do(cls, options, share, dtype):
    """A compiled run of 20 steps from a port at the seventh; the moments, too, are narrow."""
    net = torch.nn.Linear(17, 9).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(8 + torch.rand(p.shape))
    optimizer = cls(net.parameters(), foreach=False, **options)
    grads = draw(net, BEFORE + STEPS)
    torch_steps(net, optimizer, grads[:BEFORE])
    pair = interop.match(net, {"kernel": np.zeros((17, 9), _dtype(net)), "bias": np.zeros(9, _dtype(net))})
    tx, state = pair.optimizer_to_jax(optimizer)
    params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[BEFORE:], jit=True)
    torch_steps(net, optimizer, grads[BEFORE:])
    _, wanted = pair.optimizer_to_jax(optimizer)
    same = []
    for got, want in zip(*map(jax.tree.leaves, ((params, state), (pair.to_jax(net), wanted))), strict=True):
        assert got.dtype == want.dtype
        if got.shape == (17, 9):
            same.append(float(jnp.mean(got == want)))
    assert min(same) >= share
    for name, got in pair.parameters_to_torch(params).items():
        want = net.get_parameter(name).detach()
        assert bool(((got - want).abs() <= 4 * torch.finfo(dtype).eps * want.abs()).all()), name


def test_float32_corrections_are_those_of_float64():
    """At the first steps, in single coefficients, where the parameters' rounding hides nothing."""
    from interop.optimizers._rules import _average_length, _one_minus_power

    for beta in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999):
        longest = 2 / (1 - beta) - 1
        for t in (*range(1, 40), 100, 1000, 9999, 10001, 100000, 2000000):
            power = -np.expm1(t * np.log(beta))
            got = float(_one_minus_power(beta, jnp.float32(t)))
            assert abs(got - power) <= 4e-7 * power, (beta, t)
            length = longest - 2 * t * float(np.exp(t * np.log(beta))) / power
            if length > 1e-6 * longest and length > 1:
                got = float(_average_length(beta, jnp.float32(t)))
                assert abs(got - length) <= 2e-6 * length + 1e-9 * longest, (beta, t)


# --- where the state lives ---


def test_nnx_optimizer_takes_the_state_and_gives_it_back(x64):
    net = away_from_zero(Net())
    groups = [{"params": [net.embed.weight], "lr": 0.02}, {"params": [net.hidden.weight, net.out.bias]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    grads = draw(net, 10)
    torch_steps(net, optimizer, grads[:4])
    with x64():
        model = Nnx(rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)
        pair = interop.match(net, model)
        nnx.update(model, pair.to_jax(net))
        tx, state = pair.optimizer_to_jax(optimizer)
        taken = nnx.Optimizer(model, optax.GradientTransformation(lambda _: state, tx.update), wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads) and None)
        for grad in grads[4:]:
            step(model, taken, pair.parameters_to_jax(grad))
        torch_steps(net, optimizer, grads[4:])
        assert ulps(pair, nnx.state(model, nnx.Param), net) <= ULP
        again = torch.optim.AdamW(groups, lr=0.5)
        pair.optimizer_to_torch(taken.opt_state, again)
    assert shape_of(again) == shape_of(optimizer)
    assert torch.allclose(again.state[net.embed.weight]["exp_avg"], optimizer.state[net.embed.weight]["exp_avg"])


def test_linens_train_state_and_its_files_keep_it(x64):
    net = away_from_zero(Net())
    optimizer = torch.optim.NAdam([net.embed.weight, net.hidden.bias], lr=0.01)
    grads = draw(net, 6)
    torch_steps(net, optimizer, grads[:2])
    with x64():
        pair = net_pair(net)
        tx, opt_state = pair.optimizer_to_jax(optimizer)
        fresh = TrainState.create(apply_fn=None, params=pair.to_jax(net), tx=tx)
        state = fresh.replace(opt_state=opt_state)
        state = serialization.from_bytes(fresh, serialization.to_bytes(state))
        state = jax.tree.map(jnp.asarray, state)
        for grad in grads[2:]:
            state = state.apply_gradients(grads=jax_grads(pair, grad))
        torch_steps(net, optimizer, grads[2:])
        assert ulps(pair, state.params, net) <= ULP
        assert state.opt_state.settings == opt_state.settings


def test_help_of_the_pair_says_what_crosses_and_where_the_state_goes():
    for name in ("optimizer_to_jax", "optimizer_to_torch", "opt_state_to_jax", "opt_state_to_torch"):
        doc = inspect.getdoc(getattr(interop.Pair, name)) or ""
        assert "Args:\n" in doc and "Raises:\n" in doc and doc.count("\n") > 6, name
    doc = inspect.getdoc(interop.Pair.optimizer_to_jax) or ""
    recipes = doc.partition("goes into it by\n")[2].partition("`fr.to_flat")[0]
    net = away_from_zero(Net(), torch.float32)
    optimizer = torch.optim.Adam(net.parameters())
    torch_steps(net, optimizer, draw(net, 2))
    model = Nnx(rngs=nnx.Rngs(0))
    tx, opt_state = interop.match(net, model).optimizer_to_jax(optimizer)
    names = {"nnx": nnx, "optax": optax, "TrainState": TrainState, "model": model, "tx": tx, "opt_state": opt_state}
    nnx_lines, linen_line = inspect.cleandoc(recipes).rsplit("\n", 1)
    exec(nnx_lines, names)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    names["optimizer"].update(model, grads)
    pair, words = net_pair(net), jnp.zeros(1, jnp.int32)
    tx, opt_state = pair.optimizer_to_jax(optimizer)
    params = pair.to_jax(net)
    names |= {"model": Flax(), "params": params, "tx": tx, "opt_state": opt_state}
    exec(linen_line, names)
    state = names["state"].apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    assert state.apply_fn({"params": state.params}, words).shape == (1, 2)
    for after in (names["optimizer"].opt_state.state, state.opt_state.state):
        assert all(float(x) == 3 for x in jax.tree.leaves(after["step"]))


@pytest.mark.parametrize("variables", [True, False])
def test_a_state_is_saved_and_restored_into_a_fresh_one(variables, x64):
    """With linen's variables as with their parameters."""
    net = away_from_zero(Dense())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    torch_steps(net, optimizer, draw(net, 3))
    with x64():
        leaves = {"hidden": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}
        pair = interop.match(net, {"params": leaves} if variables else leaves)
        tx, opt_state = pair.optimizer_to_jax(optimizer)
        params = pair.to_jax(net)
        assert ("params" in params) == variables
        fresh = tx.init(params)
        assert jax.tree.structure(fresh) == jax.tree.structure(opt_state)
        flat = fr_jax.to_flat(opt_state)
        assert "state.exp_avg.hidden.kernel" in flat
        from_bytes = serialization.from_bytes(fresh, serialization.to_bytes(opt_state))
        for again in (fr_jax.from_flat(fresh, flat), from_bytes):
            assert again.settings == opt_state.settings
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, opt_state)))
        grads = jax.tree.map(jnp.ones_like, params)
        updates, after = jax.jit(tx.update)(grads, opt_state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(after) == jax.tree.structure(opt_state)


def test_what_holds_a_state_is_refused_with_the_way_to_it():
    net = away_from_zero(Net(), torch.float32)
    optimizer = torch.optim.Adam(net.parameters())
    pair = net_pair(net)
    ported = tx, opt_state = pair.optimizer_to_jax(optimizer)
    params = pair.to_jax(net)
    taken = nnx.Optimizer(Nnx(rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)
    for given, why in (
        (taken, "Optimizer; pass its opt_state"),
        (nnx.state(taken), "nnx.State; pass the opt_state of the nnx.Optimizer itself, optimizer.opt_state"),
        (TrainState.create(apply_fn=None, params=params, tx=tx), "TrainState; pass its opt_state"),
        (fr_jax.TrainState(params, opt_state, ()), "TrainState; pass its opt_state"),
        (ported, "tuple with a transformation in it; pass the second one"),
        (tx, "GradientTransformation; pass the state"),
        (optax.adam(0.1), "GradientTransformationExtraArgs; pass the state"),
    ):
        with pytest.raises(TypeError, match=f"optimizer_to_torch: opt_state must be .*, got {why}"):
            pair.optimizer_to_torch(given, optimizer)
    pair.optimizer_to_torch(taken.opt_state, optimizer)


def test_it_is_a_transformation_like_others(x64):
    """In a chain, under jit with the state donated, under vmap over members, and pickled."""
    net = away_from_zero(Dense())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    (grad,) = draw(net, 1)
    with x64():
        pair = dense_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, grads = pair.to_jax(net), jax_grads(pair, grad)
        want, _ = tx.update(grads, state, params)
        chain = optax.chain(optax.scale(2.0), tx, optax.scale(0.5))
        got, _ = chain.update(grads, chain.init(params), params)
        halves = jax.tree.map(lambda a, b: bool(np.allclose(a, b / 2, rtol=1e-6)), got, want)
        assert all(jax.tree.leaves(halves))
        clipped = optax.chain(optax.clip_by_global_norm(1.0), tx)
        _, after = clipped.update(grads, clipped.init(params), params)
        pair.optimizer_to_torch(after, optimizer)
        assert float(optimizer.state[net.hidden.bias]["step"]) == 1
        members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (params, grads))
        states = jax.vmap(tx.init)(members[0])
        updates, _ = jax.vmap(lambda g, s, p: tx.update(g, s, p))(members[1], states, members[0])
        assert np.allclose(updates["hidden"]["kernel"][0], want["hidden"]["kernel"], rtol=1e-12)
        updates, after = jax.jit(tx.update, donate_argnums=1)(grads, tx.init(params), params)
        assert isinstance(after, TorchOptimizerState) and int(after.count) == 1


# --- a state of optax itself ---

OPTAX = [
    (torch.optim.SGD, {"lr": 0.01}, optax.sgd(0.01)),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, optax.sgd(0.01, 0.9)),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}, optax.sgd(0.01, 0.9, nesterov=True)),
    (
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.01, 0.9)),
    ),
    (torch.optim.Adam, {"lr": 0.01}, optax.adam(0.01)),
    (torch.optim.Adam, {"lr": 0.01}, optax.inject_hyperparams(optax.adam)(learning_rate=0.01)),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, optax.adamw(0.01, weight_decay=0.1)),
    (torch.optim.Adamax, {"lr": 0.01}, optax.adamax(0.01)),
    (torch.optim.Adadelta, {"lr": 1.0}, optax.adadelta(1.0)),
    (torch.optim.RMSprop, {"lr": 0.01}, optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False)),
    (
        torch.optim.RMSprop,
        {"lr": 0.001, "momentum": 0.9, "centered": True},
        optax.rmsprop(0.001, decay=0.99, eps_in_sqrt=False, momentum=0.9, centered=True),
    ),
]


@pytest.mark.relaxed_promotion  # optax's bias corrections mix dtypes
@pytest.mark.parametrize(("cls", "options", "tx"), OPTAX, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_a_state_of_optax_goes_on_in_torch(cls, options, tx, x64):
    """Against optax's own run: 6 steps there and 6 in PyTorch are 12 there, to 1e-12."""
    net = away_from_zero(Dense())
    grads = draw(net, 12)
    optimizer = cls(net.parameters(), **options)
    with x64():
        pair = dense_pair(net)
        params = pair.to_jax(net)
        params, state = jax_steps(pair, tx, tx.init(params), params, grads[:6])
        load(net, pair, params)
        pair.optimizer_to_torch(state, optimizer)
        torch_steps(net, optimizer, grads[6:])
        params, _ = jax_steps(pair, tx, state, params, grads[6:])
        got = pair.parameters_to_torch(params)
    for name, p in own(net).items():
        assert np.allclose(got[name], p, rtol=1e-12, atol=0), name


@pytest.mark.parametrize(
    ("cls", "options", "tx", "why"),
    [
        (torch.optim.Adagrad, {}, optax.adagrad(0.01), "adds eps inside the root"),
        (torch.optim.NAdam, {}, optax.nadam(0.01), "no momentum_decay"),
        (torch.optim.RAdam, {}, optax.radam(0.01), "scales eps"),
        (torch.optim.Adam, {"amsgrad": True}, optax.amsgrad(0.01), "maximum of the uncorrected"),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, optax.sgd(0.01, 0.9), "dampening=0.5"),
        (torch.optim.SGD, {"momentum": 0.9}, optax.sgd(0.01), "SGD with its present options .* holds nothing"),
        (torch.optim.SGD, {}, optax.sgd(0.01, 0.9), "holds TraceState"),
        (torch.optim.Adam, {}, optax.sgd(0.01, 0.9), "holds TraceState"),
        (torch.optim.Adam, {}, optax.masked(optax.adam(0.01), {"hidden": True}), "holds MaskedState"),
        (torch.optim.Adam, {}, fr_jax.prox_adam(0.01, fr_jax.l1(0.1)), r"ProxAdamState, .* pair.opt_state_to_torch\("),
        (torch.optim.SGD, {}, fr_jax.prox_sgd(0.01, fr_jax.l1(0.1)), r"ProxSgdState, .* pair.opt_state_to_torch\("),
        (torch.optim.Adam, {}, optax.MultiSteps(optax.adam(0.01), 2), "MultiStepsState, .*pass opt_state.inner_opt_st"),
        (torch.optim.RMSprop, {}, optax.rmsprop(0.01, momentum=0.9), "momentum=0 cannot go on"),
        (torch.optim.RMSprop, {"centered": True}, optax.rmsprop(0.01), "centered=True"),
        (torch.optim.RMSprop, {"momentum": 0.9}, optax.rmsprop(lambda count: 0.01, momentum=0.9), "under a schedule"),
    ],
)
def test_a_state_of_optax_that_means_something_else_is_refused(cls, options, tx, why):
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    with pytest.raises(TypeError, match=why):
        pair.optimizer_to_torch(tx.init(pair.to_jax(net)), cls(net.parameters(), **{"lr": 0.01, **options}))


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("injected", [False, True])
def test_a_scheduled_state_of_optax_goes_on_under_a_scheduler(injected, x64):
    """Without one the rate would be lost. The recipe of the docstring steps it, and PyTorch does not warn."""
    net = away_from_zero(Dense())
    grads = draw(net, 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    schedule = optax.exponential_decay(0.02, 1, 0.75)
    tx = optax.inject_hyperparams(optax.adam)(schedule) if injected else optax.adam(schedule)
    with x64():
        pair = dense_pair(net)
        params, opt_state = jax_steps(pair, tx, tx.init(pair.to_jax(net)), pair.to_jax(net), grads[:6])
        load(net, pair, params)
        with pytest.raises(ValueError, match=r"comes from a schedule, .*ConstantLR\(optimizer, 1.0\) where"):
            pair.optimizer_to_torch(opt_state, optimizer)
        other = torch.optim.Adam(net.parameters(), lr=0.5)
        torch.optim.lr_scheduler.ConstantLR(other, 1.0)
        pair.optimizer_to_torch(opt_state, other)
        assert other.param_groups[0]["lr"] == 0.5
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.75)
        run_recipe(pair, optimizer, scheduler, opt_state, 6)
        torch_steps(net, optimizer, grads[6:], scheduler)
        params, _ = jax_steps(pair, tx, opt_state, params, grads[6:])
        got = pair.parameters_to_torch(params)
    # optax holds an injected rate in float32
    assert all(np.allclose(got[name], p, rtol=1e-7 if injected else 1e-12) for name, p in own(net).items())


def run_recipe(pair, optimizer, scheduler, opt_state, updates):
    doc = inspect.getdoc(interop.Pair.optimizer_to_torch) or ""
    lines = doc.partition("`int(opt_state.count)`:\n")[2].partition("A state of optax")[0]
    exec(inspect.cleandoc(lines), dict(locals()))


def test_a_schedule_around_a_ported_optimizer_is_refused():
    net = away_from_zero(Dense(), torch.float32)
    optimizer, pair = torch.optim.Adam(net.parameters()), dense_pair(net)
    tx, _ = pair.optimizer_to_jax(optimizer)
    state = optax.chain(tx, optax.scale_by_schedule(lambda count: 0.5)).init(pair.to_jax(net))
    with pytest.raises(TypeError, match="in a chain with a schedule, .* optimizer_to_jax, scheduler="):
        pair.optimizer_to_torch(state, optimizer)


def test_defaults_that_differ_are_those_of_the_docstring():
    theirs = {name: inspect.signature(getattr(optax, name)).parameters for name in ("adamw", "rmsprop", "adagrad")}
    ours = {cls: inspect.signature(getattr(torch.optim, cls)).parameters for cls in ("AdamW", "RMSprop", "Adagrad")}
    doc = " ".join((inspect.getdoc(interop.Pair.optimizer_to_torch) or "").split())
    assert (theirs["adamw"]["weight_decay"].default, ours["AdamW"]["weight_decay"].default) == (1e-4, 0.01)
    assert "1e-4 in `optax.adamw` and 0.01 in `AdamW`" in doc
    assert [theirs["rmsprop"][name].default for name in ("decay", "eps_in_sqrt", "initial_scale")] == [0.9, True, 0.0]
    assert ours["RMSprop"]["alpha"].default == 0.99
    assert "`decay=0.9` and `eps_in_sqrt=True`, `RMSprop` has `alpha=0.99`" in doc
    assert theirs["adagrad"]["initial_accumulator_value"].default == 0.1
    assert ours["Adagrad"]["initial_accumulator_value"].default == 0


def decayed_kernels(tree):
    return jax.tree.map(lambda x: x.ndim > 1, tree)


MASKED = {
    "alone": optax.adamw(0.01, weight_decay=0.1, mask=decayed_kernels),
    "in a chain": optax.chain(
        optax.masked(optax.scale(1.0), decayed_kernels), optax.adamw(0.01, weight_decay=0.1, mask=decayed_kernels)
    ),
    "with rates in the state": optax.inject_hyperparams(optax.adamw, static_args="mask")(
        0.01, weight_decay=0.1, mask=decayed_kernels
    ),
}


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize("name", MASKED)
def test_a_masked_decay_goes_on_in_two_groups(name, x64):
    net = away_from_zero(Dense())
    grads = draw(net, 12)
    groups = [{"params": [net.hidden.weight]}, {"params": [net.hidden.bias], "weight_decay": 0.0}]
    optimizer, tx = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1), MASKED[name]
    with x64():
        pair = dense_pair(net)
        params = pair.to_jax(net)
        params, state = jax_steps(pair, tx, tx.init(params), params, grads[:6])
        load(net, pair, params)
        pair.optimizer_to_torch(state, optimizer)
        torch_steps(net, optimizer, grads[6:])
        params, _ = jax_steps(pair, tx, state, params, grads[6:])
        got = pair.parameters_to_torch(params)
    assert all(np.allclose(got[name], p, rtol=1e-12, atol=0) for name, p in own(net).items())


@pytest.mark.relaxed_promotion
def test_states_around_others_go_on_as_their_refusals_say(x64):
    """Each label of a partition in an optimizer of its own; what MultiSteps holds, between two of its updates."""
    net = away_from_zero(Dense())
    grads = draw(net, 12)
    kernel, bias = torch.optim.Adam([net.hidden.weight], lr=0.01), torch.optim.SGD([net.hidden.bias], 0.01, 0.9)
    labels = {"hidden": {"kernel": "a", "bias": "b"}}
    tx = optax.partition({"a": optax.adam(0.01), "b": optax.sgd(0.01, 0.9)}, labels)
    with x64():
        pair = dense_pair(net)
        params, state = jax_steps(pair, tx, tx.init(pair.to_jax(net)), pair.to_jax(net), grads[:6])
        load(net, pair, params)
        with pytest.raises(TypeError, match=r"PartitionState, .* opt_state.inner_states\[label\].inner_state"):
            pair.optimizer_to_torch(state, kernel)
        pair.optimizer_to_torch(state.inner_states["a"].inner_state, kernel)
        pair.optimizer_to_torch(state.inner_states["b"].inner_state, bias)
        torch_steps(net, kernel, grads[6:])
        torch_steps(net, bias, grads[6:])
        params, _ = jax_steps(pair, tx, state, params, grads[6:])
        assert ulps(pair, params, net) <= 4 * ULP

        multi = optax.MultiSteps(optax.adam(0.01), 2)
        params, state = jax_steps(pair, multi, multi.init(params), params, grads[:6])
        assert int(state.mini_step) == 0
        load(net, pair, params)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        pair.optimizer_to_torch(state.inner_opt_state, optimizer)
        halves = [{k: (a[k] + b[k]) / 2 for k in a} for a, b in zip(grads[6::2], grads[7::2], strict=True)]
        torch_steps(net, optimizer, halves)
        params, _ = jax_steps(pair, multi, state, params, grads[6:])
        got = pair.parameters_to_torch(params)  # optax corrects in float32 inside of its lax.cond
    assert all(np.allclose(got[name], p, rtol=1e-8, atol=0) for name, p in own(net).items())


# --- an attached penalty ---

ATTACHED = [
    (torch.optim.SGD, {}, 6),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}, 6),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3}, 0),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, 6),
    (torch.optim.Adam, {}, 0),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, 6),
    (torch.optim.AdamW, {"weight_decay": 0.5}, 6),
    (torch.optim.RMSprop, {"weight_decay": 0.1}, 6),
]


def attached(net, cls, options):
    """Two groups; the last bias has no part of the penalty."""
    groups = [{"params": [net.hidden.weight], "lr": 0.02}, {"params": [net.embed.weight, net.out.bias]}]
    optimizer = cls(groups, lr=0.01, **options)
    # a group in a diagonal metric takes long to compile
    rows = fr.group_lasso(0.3, axis=-1) if cls is torch.optim.SGD else fr.l1(0.05)
    penalty = fr.l1(0.5).on("hidden.weight") + fr.l2(0.1).on("hidden") + rows.on("embed.weight")
    fr.attach(optimizer, net, penalty)
    return optimizer


def close(got, net, units):
    return all(
        np.max(np.abs((got[name] - p).numpy())) <= units * np.spacing(float(p.abs().max()))
        for name, p in own(net).items()
    )


@pytest.mark.parametrize(("cls", "options", "start"), ATTACHED)
def test_an_attached_penalty_crosses_with_the_optimizer(cls, options, start, x64):
    """The same zeros, and the rest to units of the leaf; two rows of the embedding never have a gradient."""
    net = away_from_zero(Net())
    optimizer = attached(net, cls, options)
    grads = draw(net, 30)
    for grad in grads:
        grad["embed.weight"][2:4] = 0
    torch_steps(net, optimizer, grads[:start])
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[start:26], jit=True)
        torch_steps(net, optimizer, grads[start:26])
        got = pair.parameters_to_torch(params)
        assert close(got, net, 4 * ULP)
        assert all(torch.equal(got[name] == 0, p == 0) for name, p in own(net).items())
        back = away_from_zero(Net())
        again = attached(back, cls, options)
        pair = net_pair(back)
        load(back, pair, params)
        pair.optimizer_to_torch(state, again)
    torch_steps(net, optimizer, grads[26:])
    torch_steps(back, again, grads[26:])
    assert close(own(back), net, 8 * ULP)
    kept, written = ({i: s.keys() for i, s in o.state_dict()["state"].items()} for o in (optimizer, again))
    assert kept == written


def test_the_penalty_must_be_that_of_the_run():
    """Rule, options and strength on every leaf; the order of a sum and the values of arrays are not compared."""
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)

    def adam(penalty):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        return optimizer, fr.attach(optimizer, net, penalty)

    kernel = fr.l1(0.5).on("hidden.weight")
    cases = [
        (
            kernel,
            fr.l1(0.25).on("hidden.weight"),
            "'hidden.kernel' is l1 of strength 0.5 in the state and l1 of .* 0.25",
        ),
        (
            kernel,
            fr.l2(0.5).on("hidden.weight"),
            "is l1 of strength 0.5 in the state and l2 of strength 0.5 in the opt",
        ),
        (kernel, fr.l1(0.5), "'hidden.bias' is none in the state and l1 of strength 0.5 in the optimizer"),
        (
            fr.group_lasso(1.0, axis=-1).on("hidden.weight"),
            fr.group_lasso(1.0, axis=-2).on("hidden.weight"),
            "axis=.-1,.*axis=.-2,",
        ),
        (kernel, fr.anchored(kernel, own(net)), "is l1 of .* and anchored l1 of"),
        (fr.non_negative(), 0.5 * kernel, "is non_negative in the state"),
    ]
    for here, there, why in cases:
        _, state = pair.optimizer_to_jax(adam(here)[0])
        optimizer, handle = adam(there)
        with pytest.raises(ValueError, match=f"optimizer_to_torch: the penalty on .*{why}"):
            pair.optimizer_to_torch(state, optimizer)
        handle.penalty = here
        pair.optimizer_to_torch(state, optimizer)
    _, state = pair.optimizer_to_jax(adam(kernel + fr.l2(0.1))[0])
    pair.optimizer_to_torch(state, adam(fr.l2(0.1) + 0.5 * fr.l1(torch.tensor(1.0)).on("hidden.weight"))[0])
    importance = {name: 2 * torch.ones_like(p) for name, p in own(net).items()}
    _, state = pair.optimizer_to_jax(adam(fr.anchored(fr.l2(0.1), own(net), importance))[0])
    pair.optimizer_to_torch(state, adam(fr.anchored(fr.l2(0.2), own(net), importance))[0])


def test_an_attached_penalty_gives_zeros_in_the_run_above(x64):
    net = away_from_zero(Net())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    fr.attach(optimizer, net, fr.l1(3.0).on("hidden.weight"))
    with x64():
        pair = net_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        ours = fr_jax.prox_adam(0.02, fr_jax.l1(3.0).on("hidden.kernel"))
        params = theirs = pair.to_jax(net)
        their_state = ours.init(theirs)
        grads = draw(net, 60)
        params, state = jax_steps(pair, tx, state, params, grads, jit=True)
        theirs, their_state = jax_steps(pair, ours, their_state, theirs, grads, jit=True)
        assert np.array_equal(params["hidden"]["kernel"] == 0, theirs["hidden"]["kernel"] == 0)
        assert np.any(params["hidden"]["kernel"] == 0) and np.any(params["hidden"]["kernel"] != 0)
        for name, x in fr_jax.to_flat(params).items():
            assert np.allclose(x, fr_jax.to_flat(theirs)[name], rtol=1e-11, atol=1e-13), name


def packed(net):
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    model = nnx.MultiHeadAttention(num_heads=2, in_features=4, decode=False, **options)
    return interop.match(net, {"attention": nnx.to_pure_dict(nnx.state(model, nnx.Param))})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.RMSprop], ids=label)
def test_a_penalty_on_a_packed_parameter_has_one_metric_over_its_pieces(cls, x64):
    """Entries that have had no gradient are moved by the mean over the whole parameter, also in a piece without any."""
    net = away_from_zero(torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(4, 2, batch_first=True)}))
    optimizer = cls(net.parameters(), lr=0.01)
    fr.attach(optimizer, net, fr.l1(0.01))
    grads = draw(net, 12)
    for grad in grads:
        grad["attention.in_proj_weight"][6:] = 0  # half of the keys, all of the values
    torch_steps(net, optimizer, grads[:3])
    with x64():
        pair = packed(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[3:], jit=True)
        torch_steps(net, optimizer, grads[3:])
        assert close(pair.parameters_to_torch(params), net, ULP)
        pair.optimizer_to_torch(state, optimizer)


def test_a_packed_parameter_crosses_in_pieces_and_must_come_back_whole(x64):
    """One step count in PyTorch, three on the JAX side."""
    net = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(4, 2, batch_first=True)}).double()
    away_from_zero(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    grads = draw(net, 8)
    torch_steps(net, optimizer, grads[:3])
    with x64():
        pair = packed(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads[3:6])
        torch_steps(net, optimizer, grads[3:6])
        assert ulps(pair, params, net) <= ULP
        again = torch.optim.Adam(net.parameters(), lr=0.01)
        pair.optimizer_to_torch(state, again)
        assert shape_of(again) == shape_of(optimizer)
        state.state["step"]["attention"]["query"]["kernel"] += 1
        with pytest.raises(ValueError, match="leaves of the parameter 'attention.in_proj_weight' differ in 'step'"):
            pair.optimizer_to_torch(state, again)


# --- the functional optimizers ---

OURS = {
    "prox_sgd": lambda fr, o, p: fr.prox_sgd(0.02, p),
    "prox_sgd with momentum": lambda fr, o, p: fr.prox_sgd(0.02, p, momentum=0.9, nesterov=True),
    "prox_adam": lambda fr, o, p: fr.prox_adam(0.02, p, weight_decay=0.1),
    "prox_adam with a copy": lambda fr, o, p: fr.prox_adam(0.02, p, master_dtype=float64_of(fr)),
    "gradient of the penalty": lambda fr, o, p: o.chain(
        o.scale_by_adam(), fr.add_penalty_gradient(p), o.scale_by_learning_rate(0.02)
    ),
    "adamw": lambda fr, o, p: o.chain(o.clip_by_global_norm(1.0), o.adamw(0.02, mask=lambda tree: tree_of(tree, True))),
    "sgd": lambda fr, o, p: o.sgd(lambda count: 0.0625 * (1 + (count < 7)), momentum=0.9),
    "rmsprop": lambda fr, o, p: o.rmsprop(0.01, bias_correction=True, momentum=0.9),
    "centered rmsprop": lambda fr, o, p: o.rmsprop(0.01, centered=True, bias_correction=True),
    "accumulated": lambda fr, o, p: o.MultiSteps(o.adam(0.02), 3),
    "scheduled decay": lambda fr, o, p: o.chain(o.add_decayed_weights(lambda count: 0.1), o.sgd(0.02)),
}


def float64_of(wing):
    return torch.float64 if wing is fr else jnp.float64


def tree_of(tree, value):
    if isinstance(tree, dict):
        return {name: tree_of(child, value) for name, child in tree.items()}
    return value


@pytest.mark.relaxed_promotion  # optax's
@pytest.mark.parametrize("name", OURS)
def test_states_of_the_functional_optimizers_cross(name, x64):
    """5 steps in PyTorch, 5 in JAX, 5 in PyTorch, against 15 in PyTorch."""
    net = away_from_zero(Net())
    penalty = fr.l1(0.5).on("hidden.weight") + fr.l2(0.1)
    tx = OURS[name](fr, fr_optax, penalty)
    params = own(net)
    grads = draw(net, 15)
    state = tx.init(params)

    def steps(params, state, grads):
        for grad in grads:
            updates, state = tx.update(grad, state, params)
            params = fr_optax.apply_updates(params, updates)
        return params, state

    params, state = steps(params, state, grads[:5])
    with x64():
        pair = net_pair(net)
        twin = OURS[name](fr_jax, optax, pair.penalty_to_jax(penalty))
        there, state_there = pair.parameters_to_jax(params), pair.opt_state_to_jax(state)
        assert jax.tree.structure(state_there) == jax.tree.structure(twin.init(there))
        there, state_there = jax_steps(pair, twin, state_there, there, grads[5:10], jit=True)
        back, state_back = pair.parameters_to_torch(there), pair.opt_state_to_torch(state_there)
    params, state = steps(params, state, grads[5:10])
    assert fr.to_flat(state_back).keys() == fr.to_flat(state).keys()
    assert type(state_back) is type(state)
    back, _ = steps(back, state_back, grads[10:])
    params, _ = steps(params, state, grads[10:])
    for leaf, x in params.items():
        assert torch.allclose(back[leaf], x, rtol=1e-11, atol=1e-13), leaf
        assert torch.equal(back[leaf] == 0, x == 0)


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)


class FlaxNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="norm")(nn.Dense(2, name="dense")(x))


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.9, epsilon=1e-5, rngs=rngs)


@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_a_train_state_crosses_with_its_statistics(flax):
    net = Normed()
    net.norm.running_mean.uniform_()
    model = FlaxNormed().init(jax.random.key(0), jnp.zeros((1, 3))) if flax == "linen" else NnxNormed(nnx.Rngs(0))
    pair = interop.match(net, model, strict=False)
    params, extra = own(net), dict(net.named_buffers())
    tx = fr.prox_adam(0.1, fr.l1(0.1))
    state = fr.TrainState(params, tx.init(params), extra)
    there = pair.opt_state_to_jax(state)
    assert isinstance(there, fr_jax.TrainState) and there.opt_state.count.dtype == jnp.int32
    whole = pair.to_jax(net)
    if flax == "linen":
        assert there.extra.keys() == {"batch_stats"}
        assert np.array_equal(there.extra["batch_stats"]["norm"]["mean"], whole["batch_stats"]["norm"]["mean"])
    else:
        assert np.array_equal(there.extra["norm"]["mean"].get_value(), whole["norm"]["mean"].get_value())
    back = pair.opt_state_to_torch(there)
    assert back.extra.keys() == extra.keys() and back.params.keys() == params.keys()
    for name, x in {**params, **extra}.items():
        assert torch.equal({**back.params, **back.extra}[name], x), name
    bare = pair.opt_state_to_torch(pair.opt_state_to_jax(state._replace(extra=())))
    assert bare.extra == ()
    with pytest.raises(TypeError, match="extra must be a dict of collections or an nnx.State .* got list"):
        pair.opt_state_to_torch(there._replace(extra=[1]))


def test_states_without_a_twin_are_refused():
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    with pytest.raises(TypeError, match="opt_state_to_jax: a TorchOptimizerState .* has no twin"):
        pair.opt_state_to_jax(TorchOptimizerState(None, (), {}, None))
    with pytest.raises(TypeError, match="opt_state_to_torch: a ScaleByLionState of optax.* has no twin"):
        pair.opt_state_to_torch(optax.scale_by_lion().init(pair.to_jax(net)))
    with pytest.raises(TypeError, match="a dict of builtins has no twin"):
        pair.opt_state_to_jax(({},))


# --- what is refused ---


class Subclass(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda net: Subclass(net.parameters()),
            "Subclass is a subclass of Adam, which may step differently; known are",
        ),
        (lambda net: torch.optim.LBFGS(net.parameters()), "LBFGS has no exact twin: it calls the loss several times"),
        (
            lambda net: torch.optim.Adafactor(net.parameters()),
            "Adafactor has no exact twin: its factored second moment",
        ),
        (lambda net: torch.optim.Muon([net.hidden.weight]), "Muon has no exact twin: .* bfloat16"),
        (lambda net: torch.optim.Rprop(net.parameters()), "Rprop has no exact twin: it moves in its first step"),
        (lambda net: torch.optim.SparseAdam(net.parameters()), "SparseAdam has no exact twin"),
        (lambda net: torch.optim.ASGD(net.parameters()), "ASGD has no exact twin"),
        (lambda net: net, "optimizer must be a torch.optim.Optimizer, got Dense"),
    ],
    ids=lambda x: "",
)
def test_an_optimizer_without_an_exact_twin_is_refused(make, why):
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    with pytest.raises(TypeError, match=f"optimizer_to_jax: {why}"):
        pair.optimizer_to_jax(make(net))
    with pytest.raises(TypeError, match=f"optimizer_to_torch: {why}"):
        pair.optimizer_to_torch((), make(net))


def port_refusals(net):
    """Optimizers that cannot be ported as they are: how they came to it, the error."""
    adam = torch.optim.Adam

    def trained(**options):
        optimizer = adam(net.parameters(), **options)
        torch_steps(net, optimizer, draw(net, 1))
        return optimizer

    partly = trained()
    del partly.state[net.hidden.bias]["exp_avg_sq"]
    yield partly, ValueError, "the state of 'hidden.bias' lacks 'exp_avg_sq', which Adam needs with its present options"
    switched = trained()
    switched.param_groups[0]["amsgrad"] = True
    yield switched, ValueError, "the state of 'hidden.weight' lacks 'max_exp_avg_sq'"
    foreign = trained()
    foreign.state[net.hidden.bias]["ema"] = torch.zeros(3)
    yield foreign, ValueError, "the state of 'hidden.bias' has 'ema', which Adam does not keep"
    shaped = trained()
    shaped.state[net.hidden.weight]["exp_avg"] = torch.zeros(2, 3)
    yield shaped, ValueError, r"'exp_avg' in the state of 'hidden.weight' is torch.float32 of shape \[2, 3\], the param"
    narrow = trained()
    narrow.state[net.hidden.weight]["exp_avg"] = torch.zeros(3, 2, dtype=torch.bfloat16)
    yield narrow, ValueError, "'exp_avg' in the state of 'hidden.weight' is torch.bfloat16"
    other = torch.nn.Linear(2, 3)
    yield adam(other.parameters()), ValueError, r"parameter 0 of group 0 \(\[3, 2\]\) of the optimizer is no parameter"
    wrapped = adam(net.parameters())
    fr.attach(wrapped, torch.nn.Sequential(net), fr.l1(0.1))
    yield wrapped, ValueError, "the penalty is attached for another module than the net of this pair"
    hooked = trained()
    hooked.register_step_pre_hook(my_hook)
    yield hooked, ValueError, "the optimizer has a step hook 'my_hook'"


def my_hook(optimizer, args, kwargs):
    del optimizer, args, kwargs


def test_a_state_that_is_not_whole_is_refused():
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    for optimizer, error, why in port_refusals(net):
        with pytest.raises(error, match=f"optimizer_to_jax: {why}"):
            pair.optimizer_to_jax(optimizer)


def test_complex_and_replaced_parameters_are_refused():
    net = Dense()
    pair = dense_pair(net)
    optimizer = torch.optim.Adam(net.parameters())
    net.hidden.weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    with pytest.raises(
        TypeError, match="the parameter 'hidden.weight' is complex: PyTorch optimizes real and imaginary"
    ):
        pair.optimizer_to_jax(torch.optim.Adam(net.parameters()))
    with pytest.raises(ValueError, match="is no parameter of the net of this pair"):
        pair.optimizer_to_jax(optimizer)


def test_an_optimizer_of_a_lazy_net_is_refused():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    pair = interop.match(net, {"kernel": np.zeros((2, 3), "f"), "bias": np.zeros(3, "f")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lazy modules are new, PyTorch says once
        lazy = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(uninitialized, of a lazy module\) .* of net.param"):
        pair.optimizer_to_jax(torch.optim.SGD(lazy.parameters(), lr=0.1))


def test_traces_are_refused():
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    optimizer = torch.optim.Adam(net.parameters())
    tx, state = pair.optimizer_to_jax(optimizer)
    with pytest.raises(TypeError, match="optimizer_to_torch: opt_state holds traced arrays"):
        jax.jit(lambda state: pair.optimizer_to_torch(state, optimizer))(state)
    with pytest.raises(RuntimeError, match="while JAX traces a function"):
        jax.jit(lambda: pair.optimizer_to_jax(optimizer)[1].count)()


def test_float64_is_for_the_whole_run(x64):
    """Nothing is narrowed, neither at the port nor in the first update after a block with x64."""
    net = away_from_zero(Dense())
    pair = dense_pair(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    torch_steps(net, optimizer, draw(net, 2))
    whole = (
        r'is .*float64, .* whole run, jax.config.update\("jax_enable_x64", True\), or port in float32: net.float\(\);'
    )
    with pytest.raises(ValueError, match=f"optimizer_to_jax: 'hidden.weight' {whole}"):
        pair.optimizer_to_jax(optimizer)
    with pytest.raises(ValueError, match=r"opt_state_to_jax: 'hidden.weight' .*jax.config.update"):
        pair.opt_state_to_jax(fr.prox_adam(0.1, fr.l1(0.1)).init(own(net)))
    with pytest.raises(ValueError, match=r"opt_state_to_jax: 'hidden.weight' .*jax.config.update"):
        pair.opt_state_to_jax(fr.TrainState(own(net), (), ()))
    with x64():
        tx, state = pair.optimizer_to_jax(optimizer)
        params = pair.to_jax(net)
        grads = jax.tree.map(jnp.zeros_like, params)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    for update in (tx.update, jax.jit(tx.update)):
        for these in (params, narrow):
            with pytest.raises(ValueError, match=f"'hidden.(bias|kernel)' {whole}"):
                update(grads, state, these)
    with pytest.raises(ValueError, match=whole):
        tx.init(params)

    net.float()
    with pytest.raises(
        ValueError, match=r"net.to\(...\) came after it: optimizer.load_state_dict\(optimizer.state_dict\("
    ):
        pair.optimizer_to_jax(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    tx, state = pair.optimizer_to_jax(optimizer)
    grads = draw(net, 3)
    params, state = jax_steps(pair, tx, state, pair.to_jax(net), grads)
    torch_steps(net, optimizer, grads)
    assert all(np.allclose(x, net.get_parameter(n).detach()) for n, x in pair.parameters_to_torch(params).items())


def test_only_what_crosses_must_be_held_by_jax():
    """float64 parameters that `rename` leaves out are none of its concern."""
    net = away_from_zero(Net(), torch.float32)
    net.out.double()
    leaves = {"embed": {"embedding": np.zeros((5, 4))}, "hidden": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}}
    pair = interop.match(net, jax.tree.map(np.float32, leaves), {"out": None})
    _, state = pair.optimizer_to_jax(torch.optim.Adam(net.parameters()))
    assert fr_jax.to_flat(state)["state.exp_avg.embed.embedding"].dtype == jnp.float32


def test_an_update_that_does_not_fit_is_refused():
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    tx, state = pair.optimizer_to_jax(torch.optim.Adam(net.parameters()))
    params = pair.to_jax(net)
    with pytest.raises(ValueError, match="Adam .from PyTorch.: update needs the parameters"):
        tx.update(params, state)
    with pytest.raises(TypeError, match="state must be a TorchOptimizerState, got tuple"):
        tx.update(params, (), params)
    with pytest.raises(ValueError, match="the leaf 'hidden.bias' is in the parameters only"):
        tx.update({"hidden": {"kernel": params["hidden"]["kernel"]}}, state, params)
    with pytest.raises(ValueError, match="have a leaf 'hidden.scale', which the pair has not"):
        tx.update(params, state, {"hidden": {**params["hidden"], "scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match="have no leaf 'hidden.bias', which the pair has matched"):
        tx.init({"hidden": {"kernel": params["hidden"]["kernel"]}})
    with pytest.raises(ValueError, match="two leaves that are called 'hidden.bias'"):
        tx.init({**params, "hidden.bias": jnp.zeros(3)})
    turned = {"hidden": {**params["hidden"], "kernel": params["hidden"]["kernel"].T}}
    with pytest.raises(ValueError, match=r"update of 'hidden.kernel' must have the shape \(2, 3\), got \(3, 2\)"):
        tx.update(turned, state, params)
    wrong = state._replace(state={**state.state, "exp_avg": turned})
    with pytest.raises(ValueError, match=r"'exp_avg' of 'hidden.kernel' must have the shape \(2, 3\), got \(3, 2\)"):
        tx.update(params, wrong, params)


def test_nothing_is_written_unless_all_of_it_can_be():
    """Every refusal of optimizer_to_torch leaves the optimizer as it was."""
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)

    def adam(**options):
        optimizer = torch.optim.Adam(net.parameters(), **{"lr": 0.1, **options})
        torch_steps(net, optimizer, draw(net, 2))
        return optimizer

    _, state = pair.optimizer_to_jax(adam())
    trees = state.state
    kernel, bias = trees["exp_avg"]["hidden"]["kernel"], trees["exp_avg"]["hidden"]["bias"]

    def with_average(**leaves):
        return state._replace(state={**trees, "exp_avg": {"hidden": {"kernel": kernel, "bias": bias, **leaves}}})

    one, two = [net.hidden.weight], [net.hidden.bias]
    split = torch.optim.Adam([{"params": one}, {"params": two}], lr=0.1)
    other = torch.optim.Adam([{"params": one}], lr=0.1)
    penalized = torch.optim.Adam(net.parameters(), lr=0.1)
    fr.attach(penalized, net, fr.l1(0.1))
    cases = [
        (
            state,
            adam(betas=(0.8, 0.999)),
            r"betas of group 0 is \(0.9, 0.999\) in the state and \(0.8, 0.999\) in the opt",
        ),
        (state, adam(weight_decay=0.1), "weight_decay of group 0 is 0.0 in the state and 0.1 in the optimizer"),
        (state, adam(amsgrad=True), "amsgrad of group 0 is False in the state and True"),
        (state, torch.optim.AdamW(net.parameters()), "the state is one of Adam, the optimizer is AdamW"),
        (state, split, "the state has 1 parameter groups, the optimizer 2"),
        (state, other, "the leaf 'hidden.bias' is in group 0 of the state and in no group of the optimizer"),
        (state, penalized, "a penalty was attached to the optimizer of the other side only"),
        (
            with_average(kernel=kernel.T),
            adam(),
            r"'exp_avg' of 'hidden.kernel' must have the shape \(2, 3\), got \(3, 2\)",
        ),
        (
            with_average(bias=bias.astype(jnp.bfloat16)),
            adam(),
            "'exp_avg' of 'hidden.bias' is torch.bfloat16, the param",
        ),
        (with_average(bias=optax.MaskedNode()), adam(), "the state has no 'exp_avg' of the leaf 'hidden.bias'"),
        (state._replace(state={}), adam(), "the state has no"),
        (
            state._replace(learning_rate=()),
            adam(),
            "learning_rate in the state must be a tuple of 1 numbers, .* got 0; ",
        ),
    ]
    for given, optimizer, why in cases:
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=f"optimizer_to_torch: .*{why}"):
            pair.optimizer_to_torch(given, optimizer)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(x, after["state"][i][k]) for i, s in before["state"].items() for k, x in s.items())


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.LSTM(2, 3)
        self.out = torch.nn.Linear(3, 2)


def recurrent_pair(net):
    cell = nnx.OptimizedLSTMCell(2, 3, rngs=nnx.Rngs(0))
    leaves = {"rnn": nnx.to_pure_dict(nnx.state(cell, nnx.Param))}
    leaves["out"] = {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
    return interop.match(net, leaves)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
def test_biases_that_are_one_in_flax_are_refused(options):
    """Each of the two has a step of its own, so that their sum moves twice as far: no state is needed for that."""
    net = Recurrent()
    pair = recurrent_pair(net)
    lstm = dict(net.rnn.named_parameters())
    one = [lstm.pop("bias_hh_l0")]
    both = "'rnn.bias_ih_l0', 'rnn.bias_hh_l0' of the optimizer are added up on the JAX side .*bias_ih_l0 "
    for groups, why in (
        ([{"params": net.parameters()}], both),
        ([{"params": lstm.values()}, {"params": one, "lr": 0.2}], both),
        ([{"params": one}], "'rnn.bias_hh_l0' of the optimizer is added up on the JAX side"),
    ):
        optimizer = torch.optim.SGD(groups, lr=0.1, **options)
        whole = f"{why}.* Leave the layer out of the optimizer, or make it with one bias"
        with pytest.raises(ValueError, match=f"optimizer_to_jax: {whole}"):
            pair.optimizer_to_jax(optimizer)
        with pytest.raises(ValueError, match=f"optimizer_to_torch: {whole}"):
            pair.optimizer_to_torch((), optimizer)


def test_a_layer_whose_biases_are_one_may_be_left_out_of_the_optimizer():
    net = away_from_zero(Recurrent(), torch.float32)
    pair = recurrent_pair(net)
    optimizer = torch.optim.Adam([net.rnn.weight_ih_l0, *net.out.parameters()], lr=0.01)
    grads = draw(net, 6)
    torch_steps(net, optimizer, grads[:3])
    tx, state = pair.optimizer_to_jax(optimizer)
    before = params = pair.to_jax(net)
    there = jax.tree.map(jnp.ones_like, params)
    for grad in grads[3:]:
        there["out"] = interop.to_jax({"kernel": grad["out.weight"].T, "bias": grad["out.bias"]})
        updates, state = tx.update(there, state, params)
        params = optax.apply_updates(params, updates)
    torch_steps(net, optimizer, grads[3:])
    assert np.allclose(params["out"]["kernel"].T, net.out.weight.detach(), rtol=1e-6)
    moved = {name for name, x in fr_jax.to_flat(updates).items() if np.any(x)}
    assert moved == {"rnn.dense_i.kernel", "out.kernel", "out.bias"}
    assert np.array_equal(params["rnn"]["dense_h"]["bias"], before["rnn"]["dense_h"]["bias"])
    again = torch.optim.Adam([net.rnn.weight_ih_l0, *net.out.parameters()], lr=0.01)
    pair.optimizer_to_torch(state, again)
    assert shape_of(again) == shape_of(optimizer)


class Halves(torch.nn.Module):
    """Two parameters that are one leaf on the JAX side."""

    def __init__(self):
        super().__init__()
        self.upper, self.lower = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))


def test_parameters_of_one_leaf_must_be_treated_alike(monkeypatch):
    monkeypatch.setattr(interop.rules, "RULES", dict(interop.rules.RULES))
    joined = Link(("upper", "lower"), ("kernel",), lambda *x: (np.concatenate(x),), lambda x: tuple(np.split(x, 2)))
    interop.rules.register(Halves, lambda module: [joined])
    net = torch.nn.ModuleDict({"halves": Halves()})
    pair = interop.match(net, {"halves": {"kernel": np.zeros((4, 3), np.float32)}})
    upper, lower = net["halves"].upper, net["halves"].lower
    pair.optimizer_to_jax(torch.optim.Adam(net.parameters()))
    why = (
        "'halves.upper' and 'halves.lower' are one leaf on the JAX side, 'halves.kernel', but differ in their group of"
    )
    for groups in ([{"params": [upper]}, {"params": [lower]}], [{"params": [upper]}]):
        with pytest.raises(ValueError, match=f"optimizer_to_jax: {why}"):
            pair.optimizer_to_jax(torch.optim.Adam(groups))
    penalized = torch.optim.SGD(net.parameters(), lr=0.1)
    fr.attach(penalized, net, fr.l1(0.1).on("*upper"))
    with pytest.raises(ValueError, match=f"optimizer_to_jax: {why}"):
        pair.optimizer_to_jax(penalized)
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    handle = fr.attach(adam, net, fr.l1(0.1))
    says = (
        "acts on 'halves.upper', 'halves.lower', and the JAX side holds 'halves.upper', 'halves.lower' as halves.kernel"
    )
    with pytest.raises(ValueError, match=says) as error:
        pair.optimizer_to_jax(adam)
    assert str(error.value).endswith("handle.penalty = handle.penalty.on(['!halves.upper', '!halves.lower'])")
    handle.remove()
    lower.requires_grad_(False)
    with pytest.raises(ValueError, match="in requires_grad or in their penalty; treat them alike"):
        pair.optimizer_to_jax(torch.optim.Adam(net.parameters()))


def test_a_parameter_that_is_tied_in_torch_only_is_refused():
    net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5, bias=False)})
    net["head"].weight = net["embed"].weight
    leaves = {"embed": {"embedding": np.zeros((5, 4))}, "head": {"kernel": np.zeros((4, 5))}}
    pair = interop.match(net, jax.tree.map(np.float32, leaves))
    with pytest.raises(ValueError, match="optimizer_to_jax: 'embed.weight' is tied .*'embed.embedding', 'head.kernel'"):
        pair.optimizer_to_jax(torch.optim.SGD(net.parameters(), lr=0.1))


def test_what_rename_leaves_out_does_not_cross(x64):
    """The other parameters do, and the state of those in PyTorch stays as it is."""
    net = away_from_zero(Net())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    grads = draw(net, 6)
    torch_steps(net, optimizer, grads[:2])
    with x64():
        leaves = {"embed": {"embedding": np.zeros((5, 4))}, "hidden": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}}
        pair = interop.match(net, leaves, {"out": None})
        tx, state = pair.optimizer_to_jax(optimizer)
        params = pair.to_jax(net)
        for grad in grads[2:]:
            there = pair.parameters_to_jax({k: g for k, g in grad.items() if "out" not in k})
            updates, state = tx.update(there, state, params)
            params = optax.apply_updates(params, updates)
        torch_steps(net, optimizer, grads[2:])
        got = pair.parameters_to_torch(params)
        assert all(np.allclose(x, net.get_parameter(name).detach(), rtol=1e-14) for name, x in got.items())
        left = {k: v.clone() for k, v in optimizer.state[net.out.weight].items()}
        pair.optimizer_to_torch(state, optimizer)
        assert all(torch.equal(optimizer.state[net.out.weight][k], v) for k, v in left.items())


# --- inject_hyperparams ---


def injected(make, **options):
    """A tree of parameters, and the state of an injected optimizer of optax after one update."""
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    params = pair.to_jax(net)
    tx = optax.inject_hyperparams(make)(**options)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return net, pair, state


RMSPROP = {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-8, "eps_in_sqrt": False, "momentum": 0.9}


@pytest.mark.relaxed_promotion
def test_a_momentum_after_the_rate_is_taken_by_the_injected_rate():
    """optax's trace is minus the rate times PyTorch's buffer, whatever the rate of the optimizer was before."""
    net, pair, state = injected(optax.rmsprop, **RMSPROP)
    optimizer = torch.optim.RMSprop(net.parameters(), 0.1, alpha=0.9, momentum=0.9)
    pair.optimizer_to_torch(state, optimizer)
    want = 1 / np.sqrt(0.1)  # the first step of RMSprop for gradients of 1
    for p in net.parameters():
        assert np.allclose(optimizer.state[p]["momentum_buffer"], want, rtol=1e-5)
    assert np.isclose(optimizer.param_groups[0]["lr"], 0.01)
    nothing = state._replace(hyperparams={**state.hyperparams, "learning_rate": jnp.float32(0)})
    with pytest.raises(ValueError, match="at a rate of 0 the one cannot be had from the other"):
        pair.optimizer_to_torch(nothing, optimizer)


@pytest.mark.relaxed_promotion
@pytest.mark.parametrize(
    ("make", "given", "cls", "options", "why"),
    [
        (
            optax.adam,
            {},
            torch.optim.Adam,
            {"betas": (0.8, 0.999)},
            r"b1 of group 0 is 0\.9 .* and 0\.8 in the optimizer",
        ),
        (optax.adam, {"b2": 0.99}, torch.optim.Adam, {}, r"b2 of group 0 is 0\.99 .* and 0\.999 in the optimizer"),
        (optax.adam, {"eps_root": 0.5}, torch.optim.Adam, {}, r"eps_root of group 0 is 0\.5 .* and 0\.0 in the opt"),
        (optax.yogi, {}, torch.optim.Adam, {}, r"eps of group 0 is 0\.001 .* and 1e-08 in the optimizer"),
        (optax.adamw, {}, torch.optim.AdamW, {}, r"weight_decay of group 0 is 1e-04 .* and 0\.01 in the optimizer"),
        (
            optax.sgd,
            {"momentum": 0.8},
            torch.optim.SGD,
            {"momentum": 0.9},
            r"momentum of group 0 is 0\.8 .* and 0\.9 in",
        ),
        (
            optax.adadelta,
            {"rho": 0.8},
            torch.optim.Adadelta,
            {},
            r"rho of group 0 is 0\.8 .* and 0\.9 in the optimizer",
        ),
        (
            optax.rmsprop,
            {"eps_in_sqrt": False, "decay": 0.9},
            torch.optim.RMSprop,
            {},
            r"decay of group 0 is 0\.9 .* and 0\.99 in the optimizer",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_injected_values_that_are_not_the_optimizers_are_refused(make, given, cls, options, why):
    net, pair, state = injected(make, learning_rate=0.01, **given)
    with pytest.raises(ValueError, match=f"optimizer_to_torch: {why}"):
        pair.optimizer_to_torch(state, cls(net.parameters(), lr=0.01, **options))


@pytest.mark.relaxed_promotion
def test_an_injected_schedule_is_no_rate_of_the_next_update():
    """As with `optax.adam(schedule)`: the rate is that of the optimizer, whose own scheduler stands there."""
    net, pair, state = injected(optax.adam, learning_rate=lambda count: 0.5 / (count + 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.25)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    pair.optimizer_to_torch(state, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25
    net, pair, state = injected(optax.rmsprop, **{**RMSPROP, "learning_rate": lambda count: 0.01})
    with pytest.raises(TypeError, match="under a schedule"):
        pair.optimizer_to_torch(state, torch.optim.RMSprop(net.parameters(), 0.01, alpha=0.9, momentum=0.9))
    net, pair, state = injected(optax.adam, learning_rate=0.01, b1=lambda count: 0.9)
    with pytest.raises(TypeError, match="b1 of the state follows a schedule .* PyTorch keeps it constant"):
        pair.optimizer_to_torch(state, torch.optim.Adam(net.parameters(), lr=0.01))


# --- tensors as hyper-parameters ---


def dense_run(cls, options, x64):
    """The distance of two runs of a float64 net, in units in the last place."""
    net = away_from_zero(Dense())
    optimizer = cls(net.parameters(), **options)
    grads = draw(net, BEFORE + STEPS)
    torch_steps(net, optimizer, grads[:BEFORE])
    with x64():
        pair = dense_pair(net)
        tx, state = pair.optimizer_to_jax(optimizer)
        params, _ = jax_steps(pair, tx, state, pair.to_jax(net), grads[BEFORE:])
        torch_steps(net, optimizer, grads[BEFORE:])
        return ulps(pair, params, net), optimizer


NARROW = [
    (torch.optim.Adam, {"foreach": False}),
    (torch.optim.AdamW, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.Adagrad, {"lr_decay": 0.1}),
]


@pytest.mark.parametrize(("cls", "options"), NARROW, ids=label)
def test_a_narrow_tensor_rate_of_wide_parameters_is_refused(cls, options, x64):
    """PyTorch computes with it in float32; as the float that the message names, the runs agree."""
    with pytest.raises(
        ValueError, match="lr of group 0 is a torch.float32 tensor and its parameters are torch.float64"
    ):
        dense_run(cls, {"lr": torch.tensor(0.01), **options}, x64)
    net = away_from_zero(Dense())
    optimizer = cls(net.parameters(), lr=torch.tensor(0.01), **options)
    with x64():
        pair = dense_pair(net)
        with pytest.raises(ValueError, match="optimizer_to_jax: lr of group 0 .*: optimizer.param_gr") as error:
            pair.optimizer_to_jax(optimizer)
        exec(str(error.value).rsplit(": ", 1)[1])
        _, state = pair.optimizer_to_jax(optimizer)
        narrow = cls(net.parameters(), lr=torch.tensor(0.01), **options)
        with pytest.raises(ValueError, match="optimizer_to_torch: lr of group 0"):
            pair.optimizer_to_torch(state, narrow)
    got, _ = dense_run(cls, {"lr": torch.tensor(0.01, dtype=torch.float64), **options}, x64)
    assert got <= ULP


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adadelta], ids=label)
def test_a_tensor_rate_that_only_multiplies_is_exact(cls, x64):
    got, _ = dense_run(cls, {"lr": torch.tensor(0.01)}, x64)
    assert got <= ULP


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.NAdam], ids=label)
def test_narrow_tensor_betas_of_wide_parameters_are_refused(cls, x64):
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    with pytest.raises(
        ValueError, match="betas of group 0 are torch.float32 tensors and its parameters are torch.float64"
    ):
        dense_run(cls, {"lr": 0.01, "betas": betas, "foreach": False}, x64)
    wide = tuple(beta.double() for beta in betas)
    if cls is torch.optim.NAdam:  # its float32 product of them is rounded otherwise
        with pytest.raises(ValueError, match="betas of group 0 are torch.float64 tensors"):
            dense_run(cls, {"lr": 0.01, "betas": wide, "foreach": False}, x64)
    else:
        got, _ = dense_run(cls, {"lr": 0.01, "betas": wide, "foreach": False}, x64)
        assert got <= ULP


# --- learning rates in the state ---


@pytest.mark.parametrize(
    ("rates", "got"),
    [
        (0.01, "float"),
        (jnp.float32(0.01), "ArrayImpl"),
        ((0.01,), "1"),
        ((0.01, jnp.ones(2)), r"one of shape \(2,\)"),
        ((0.01, "0.1"), "'0.1'"),
        ((0.01, None), "None"),
    ],
    ids=str,
)
def test_rates_that_are_not_one_for_each_group_are_refused_before_anything_is_written(rates, got):
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    groups = [{"params": [net.hidden.weight]}, {"params": [net.hidden.bias]}]
    tx, state = pair.optimizer_to_jax(torch.optim.Adam(groups, lr=0.1))
    params = pair.to_jax(net)
    _, state = tx.update(params, state, params)
    optimizer = torch.optim.Adam(groups, lr=0.1)
    wrong = state._replace(learning_rate=rates)
    why = f"learning_rate in the state must be a tuple of 2 numbers, one for each parameter group, got {got}; write"
    with pytest.raises(ValueError, match=f"optimizer_to_torch: {why}"):
        pair.optimizer_to_torch(wrong, optimizer)
    assert not optimizer.state
    with pytest.raises(ValueError, match=f"from PyTorch.: {why}") as error:
        tx.update(params, wrong, params)
    right = eval(str(error.value).rsplit("; write ", 1)[1], {"state": state})
    tx.update(params, right, params)
    pair.optimizer_to_torch(right, optimizer)
    assert np.allclose([group["lr"] for group in optimizer.param_groups], 0.1)


@pytest.mark.relaxed_promotion
def test_an_injected_rate_of_several_members_is_refused_before_anything_is_written():
    net, pair, state = injected(optax.adam, learning_rate=0.01)
    optimizer = torch.optim.Adam(net.parameters())
    members = state._replace(hyperparams={**state.hyperparams, "learning_rate": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"learning_rate of the state .* must be a number, got one of shape \(2,\)"):
        pair.optimizer_to_torch(members, optimizer)
    assert not optimizer.state


def test_tensor_rates_are_set_whole():
    """Also one that requires a gradient, and one that is the default of two groups."""
    net = away_from_zero(Dense(), torch.float32)
    pair = dense_pair(net)
    groups = [{"params": [net.hidden.weight], "lr": 0.25}, {"params": [net.hidden.bias], "lr": 0.5}]
    tx, state = pair.optimizer_to_jax(torch.optim.Adam(groups))
    params = pair.to_jax(net)
    _, state = tx.update(params, state, params)
    for lr in (torch.tensor(0.125), torch.tensor(0.25), torch.tensor(0.5, requires_grad=True)):
        optimizer = torch.optim.Adam([{"params": [net.hidden.weight]}, {"params": [net.hidden.bias]}], lr=lr)
        pair.optimizer_to_torch(state, optimizer)
        assert [group["lr"].item() for group in optimizer.param_groups] == [0.25, 0.5]
        assert len(optimizer.state) == 2
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    _, one = pair.optimizer_to_jax(optimizer)
    pair.optimizer_to_torch(one._replace(learning_rate=(0.25,)), optimizer)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == 0.25


def test_trees_are_taken_apart_as_often_for_many_parameters_as_for_few(monkeypatch):
    """Once for each array of the state: by every parameter, the time would be quadratic in their number."""
    calls = []
    for side in ("to_jax", "to_torch"):
        module = sys.modules[f"interop.optimizers.{side}"]
        take_apart = module.named
        monkeypatch.setattr(module, "named", lambda tree, f=take_apart: (calls.append(tree), f(tree))[1])
    counts = []
    for layers in (2, 9):
        net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers)))
        leaves = {"kernel": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
        pair = interop.match(net, {f"Dense_{i}": leaves for i in range(layers)})
        optimizer = torch.optim.Adam(net.parameters())
        torch_steps(net, optimizer, draw(net, 1))
        calls.clear()
        _, state = pair.optimizer_to_jax(optimizer)
        counts.append([len(calls)])
        pair.optimizer_to_torch(state, optimizer)
        counts[-1].append(len(calls))
    assert counts[0] == counts[1]
    assert counts[0][0] and counts[0][1] > counts[0][0]


@pytest.mark.relaxed_promotion
def test_an_injected_decay_that_no_group_has_is_refused():
    """A mask leaves groups without it, but not all of them."""
    net, pair, state = injected(optax.adamw, learning_rate=0.01, weight_decay=0.1)
    groups = [{"params": [net.hidden.weight]}, {"params": [net.hidden.bias]}]
    with pytest.raises(ValueError, match=r"weight_decay of group 0 is 0\.1 .* and 0\.0 in the optimizer"):
        pair.optimizer_to_torch(state, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0))
    groups[0]["weight_decay"] = 0.1
    pair.optimizer_to_torch(state, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0))

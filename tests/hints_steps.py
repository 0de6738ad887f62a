"""Training steps with a fault that ports have, by the kind of hint that is right; and with faults of no such kind."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import funcreg.jax as frj
import funcreg.torch as frt
from hints_case import Case
from parity_corpus import loss, normal

CASES: list[Case] = []
PARAMS = {"hidden": normal(6, 5), "out": normal(5, 2, seed=1)}
HYPER = {"lr": 0.05, "wd": 0.1}
BATCHES = [(normal(12, 6, seed=i), normal(12, 2, seed=100 + i)) for i in range(3)]
OPTAX = frt.optax


def train(
    kind: str,
    name: str,
    ours: Any,
    theirs: Any,
    ours_loss: Any = None,
    theirs_loss: Any = None,
    params: Any = PARAMS,
    batches: Any = None,
) -> None:
    """`ours`: hyper -> transformation, or (init, step); `theirs`: hyper -> transformation."""
    steps = ours if isinstance(ours, tuple) else frt.train_step(ours_loss or loss(torch), ours)
    inputs = (params, HYPER, batches or BATCHES)
    CASES.append(Case(kind, name, steps, frj.train_step(theirs_loss or loss(jnp), theirs), inputs, training=True))


def by_torch_optim(make: Callable[..., torch.optim.Optimizer], schedule: Any = None, early: bool = False) -> Any:
    """A step with an optimizer of PyTorch, `make(params, hyper)`, that lives in the state.

    `early`: the scheduler steps before the optimizer.
    """

    def init(params: Any, hyper: Any) -> Any:
        params = {name: p.clone().requires_grad_() for name, p in params.items()}
        optimizer = make(list(params.values()), hyper)
        return {"params": params, "optimizer": optimizer, "schedule": schedule and schedule(optimizer)}

    def step(state: Any, hyper: Any, *batch: Any) -> Any:
        del hyper
        value = loss(torch)(state["params"], *batch)
        state["optimizer"].zero_grad()
        value.backward()
        if early:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # by which PyTorch says that this is a fault
                state["schedule"].step()
        state["optimizer"].step()
        if state["schedule"] and not early:
            state["schedule"].step()
        return state, {"loss": value.detach()}

    return init, step


def by_hand(decay: Callable[..., tuple[Any, Any]], momentum: float = 0.9) -> Any:
    """A pure step: `decay(grad, p, hyper)` is the new gradient, and what is taken from `p` beside its step."""

    def init(params: Any, hyper: Any) -> Any:
        del hyper
        return {"params": params, "moments": {name: torch.zeros_like(p) for name, p in params.items()}, "count": 0}

    def step(state: Any, hyper: Any, *batch: Any) -> Any:
        grads, value = torch.func.grad_and_value(loss(torch))(state["params"], *batch)
        rate = hyper["lr"] / (1 + state["count"])
        params, moments = {}, {}
        for name, p in state["params"].items():
            grad, taken = decay(grads[name], p, hyper)
            moments[name] = momentum * state["moments"][name] + grad
            params[name] = p - rate * moments[name] - taken
        return {"params": params, "moments": moments, "count": state["count"] + 1}, {"loss": value}

    return init, step


def inverse_time(h: Any) -> Any:
    return lambda count: h["lr"] / (1 + count)


def taken(size: Any) -> Any:
    """Decay that no learning rate scales."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params: (jax.tree.map(lambda u, p: u - size * p, updates, params), state),
    )


def coupled(h: Any) -> Any:
    return optax.chain(optax.add_decayed_weights(h["wd"]), optax.adam(h["lr"]))


def decoupled(h: Any) -> Any:
    return optax.adamw(h["lr"], weight_decay=h["wd"])


train(
    "decoupled_decay",
    "a transformation, of constants",
    lambda h: OPTAX.chain(OPTAX.add_decayed_weights(0.1), OPTAX.adam(0.05)),
    decoupled,
)
train("decoupled_decay", "a transformation, of hyper", lambda h: OPTAX.adamw(h["lr"], weight_decay=h["wd"]), coupled)
train(
    "decoupled_decay",
    "torch.optim",
    by_torch_optim(lambda p, h: torch.optim.Adam(p, 0.05, weight_decay=0.1)),
    decoupled,
)
train(
    "decoupled_decay",
    "torch.optim, the other way",
    by_torch_optim(lambda p, h: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    coupled,
)
train(
    "decoupled_decay",
    "beside momentum, which hides it in the first step",
    lambda h: OPTAX.chain(OPTAX.add_decayed_weights(0.1), OPTAX.sgd(0.05, 0.9)),
    lambda h: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.05)),
)
train(
    "decoupled_decay",
    "in the loss",
    lambda h: OPTAX.adam(h["lr"]),
    decoupled,
    ours_loss=lambda params, x, y, *, hyper: loss(torch)(params, x, y) + frt.l2(hyper["wd"]).value(params),
)
train(
    "decay_not_scaled",
    "a transformation",
    lambda h: OPTAX.adamw(0.05, weight_decay=0.1),
    lambda h: optax.chain(optax.adam(h["lr"]), taken(h["wd"])),
)
train(
    "decay_not_scaled",
    "torch.optim",
    by_torch_optim(lambda p, h: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    lambda h: optax.chain(optax.adam(h["lr"]), taken(h["wd"])),
)
train(
    "decay_not_scaled",
    "by hand, on this side",
    by_hand(lambda g, p, h: (g, h["wd"] * p)),
    lambda h: optax.chain(optax.sgd(inverse_time(h), 0.9), taken(h["wd"] * h["lr"])),
)
train(
    "dampening",
    "torch.optim",
    by_torch_optim(lambda p, h: torch.optim.SGD(p, 0.05, 0.9, 0.9)),
    lambda h: optax.sgd(0.05, 0.9),
)
train(
    "dampening",
    "a transformation, and ema",
    lambda h: OPTAX.sgd(h["lr"], 0.9),
    lambda h: optax.chain(optax.ema(0.9, debias=False), optax.scale(-h["lr"])),
)
train(
    "dampening",
    "torch.optim, all but the first",
    by_torch_optim(lambda p, h: torch.optim.SGD(p, 0.05, 0.8, 0.8)),
    lambda h: optax.chain(optax.ema(0.8, debias=False), optax.scale(-h["lr"])),
)
train(
    "off_by_one",
    "a schedule",
    lambda h: OPTAX.sgd(OPTAX.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: optax.linear_schedule(0.1, 0.0, 8)(count + 1)),
)
train(
    "off_by_one",
    "a count by hand, on this side",
    by_hand(lambda g, p, h: (g, 0.0)),
    lambda h: optax.sgd(lambda count: inverse_time(h)(count + 1), 0.9),
)
train(
    "off_by_one",
    "a scheduler",
    by_torch_optim(
        lambda p, h: torch.optim.Adam(p, 0.05), lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.3)
    ),
    lambda h: optax.adam(lambda count: 0.05 * 0.3 ** ((count + 1) // 2)),
)
train(
    "mean_or_sum and factor",
    "of two outputs, in training",
    lambda h: OPTAX.adam(h["lr"], eps=0.1),
    lambda h: optax.adam(h["lr"], eps=0.1),
    theirs_loss=lambda params, x, y: jnp.mean(jnp.sum((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2, -1)),
)
train(
    "off_by_one",
    "a scheduler, the other way",
    by_torch_optim(
        lambda p, h: torch.optim.SGD(p, 0.05), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: (k + 1) / 4)
    ),
    lambda h: optax.sgd(optax.linear_schedule(0.0, 0.05, 4)),
)
train(
    "off_by_one and factor",
    "a scheduler whose learning rates are powers",
    by_torch_optim(
        lambda p, h: torch.optim.Adam(p, 0.05), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5)
    ),
    lambda h: optax.adam(lambda count: 0.05 * 0.5 ** (count + 1)),
)
train(
    "off_by_one",
    "a scheduler that steps too early",
    by_torch_optim(
        lambda p, h: torch.optim.SGD(p, 0.05),
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.3),
        early=True,
    ),
    lambda h: optax.sgd(lambda count: 0.05 * 0.3 ** (count // 2)),
    batches=[*BATCHES, *BATCHES[:2]],
)
train(
    "factor",
    "of a decay that is a penalty's",
    lambda h: OPTAX.chain(frt.add_penalty_gradient(frt.l2(h["wd"])), OPTAX.adam(h["lr"])),
    lambda h: optax.chain(optax.add_decayed_weights(2 * h["wd"]), optax.adam(h["lr"])),
)
train("eps", "of Adam", lambda h: OPTAX.adam(h["lr"]), lambda h: optax.adam(h["lr"], eps=1e-7))
train(
    "eps",
    "of torch.optim",
    by_torch_optim(lambda p, h: torch.optim.Adam(p, 0.05)),
    lambda h: optax.adam(0.05, eps=1e-6),
)
train(
    "subgradient",
    "in training",
    lambda h: OPTAX.sgd(h["lr"]),
    lambda h: optax.sgd(h["lr"]),
    ours_loss=lambda params, x, y: loss(torch)(params, x, y) + 0.1 * params["hidden"].abs().sum(),
    theirs_loss=lambda params, x, y: loss(jnp)(params, x, y) + 0.1 * jnp.sum(jnp.abs(params["hidden"])),
    params={**PARAMS, "hidden": np.where(np.abs(PARAMS["hidden"]) < 0.5, 0.0, PARAMS["hidden"])},
)
train("factor", "of the learning rate", lambda h: OPTAX.adam(h["lr"]), lambda h: optax.adam(2 * h["lr"]))


def defaults(name: str, ours: Any, theirs: Any, kind: str = "hyper_parameter") -> None:
    train(kind, name, by_torch_optim(lambda p, h: ours(p, 0.05)), lambda h: theirs(0.05))


def by_closure(transformation: Any) -> Any:
    """A step whose transformation nothing but its closure knows."""

    def init(params: Any, hyper: Any) -> Any:
        return {"params": params, "moments": transformation.init(params)}

    def step(state: Any, hyper: Any, *batch: Any) -> Any:
        grads, value = torch.func.grad_and_value(loss(torch))(state["params"], *batch)
        updates, moments = transformation.update(grads, state["moments"], state["params"])
        return {"params": OPTAX.apply_updates(state["params"], updates), "moments": moments}, {"loss": value}

    return init, step


defaults("AdamW of torch.optim and of optax", torch.optim.AdamW, optax.adamw)
defaults("RMSprop of torch.optim and of optax", torch.optim.RMSprop, optax.rmsprop)
defaults("Adagrad of torch.optim and of optax", torch.optim.Adagrad, optax.adagrad)
defaults("learning rate of Adam", torch.optim.Adam, lambda lr: optax.adam(0.3 * lr))
train("hyper_parameter", "learning rate", lambda h: OPTAX.adam(0.05), lambda h: optax.adam(0.02))
defaults("no decay, and optax's", torch.optim.Adam, optax.adamw)
defaults("no momentum", torch.optim.SGD, lambda lr: optax.sgd(lr, 0.9))
defaults("b2", torch.optim.Adam, lambda lr: optax.adam(lr, b2=0.98))
defaults("centered", torch.optim.RMSprop, lambda lr: optax.rmsprop(lr, 0.99, eps_in_sqrt=False, centered=True))
defaults("Adam, eps under the root", torch.optim.Adam, lambda lr: optax.adam(lr, eps=0.0, eps_root=1e-8), kind="eps")
defaults("Adam, eps under the root as well", torch.optim.Adam, lambda lr: optax.adam(lr, eps_root=1e-8), kind="eps")
train(
    "hyper_parameter",
    "another decay",
    lambda h: OPTAX.adamw(h["lr"], weight_decay=0.1),
    lambda h: optax.adamw(h["lr"], weight_decay=0.13),
)
train(
    "hyper_parameter",
    "of a step by hand",
    by_hand(lambda g, p, h: (g + h["wd"] * p, 0.0)),
    lambda h: optax.chain(optax.add_decayed_weights(0.03), optax.sgd(inverse_time(h), 0.9)),
)
train(
    "hyper_parameter",
    "decay, coupled and none",
    lambda h: OPTAX.sgd(h["lr"], 0.9),
    lambda h: optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(h["lr"], 0.9)),
)
train(
    "hyper_parameter",
    "of a proximal step",
    lambda h: frt.prox_adam(h["lr"], frt.l1(1e-3)),
    lambda h: frj.prox_adam(h["lr"], frj.l1(1e-3), b1=0.8),
)
train(
    "hyper_parameter",
    "strength of a penalty, in a proximal step",
    lambda h: frt.prox_adam(h["lr"], frt.l1(1e-3) + frt.l2(1e-3)),
    lambda h: frj.prox_adam(h["lr"], frj.l1(4e-3) + frj.l2(1e-3)),
)
train(
    "hyper_parameter",
    "one strength for two penalties",
    lambda h: frt.prox_adam(h["lr"], frt.l1(1e-3) + frt.l2(1e-3)),
    lambda h: frj.prox_adam(h["lr"], frj.l1(4e-3) + frj.l2(4e-3)),
)
train(
    "hyper_parameter",
    "strength of a penalty, in the loss",
    lambda h: OPTAX.adam(h["lr"]),
    lambda h: optax.adam(h["lr"]),
    ours_loss=frt.penalize(loss(torch), frt.l2(0.1)),
    theirs_loss=frj.penalize(loss(jnp), frj.l2(0.17)),
)
train("hyper_parameter", "in a closure", by_closure(OPTAX.adam(0.05)), lambda h: optax.adam(0.05, b1=0.8))
train("hyper_parameter", "momentum", lambda h: OPTAX.sgd(h["lr"], 0.9), lambda h: optax.sgd(h["lr"], 0.9001))
train(
    "hyper_parameter", "nesterov", lambda h: OPTAX.sgd(h["lr"], 0.9), lambda h: optax.sgd(h["lr"], 0.9, nesterov=True)
)
train("hyper_parameter", "adam, another b1", lambda h: OPTAX.adam(h["lr"]), lambda h: optax.adam(h["lr"], b1=0.95))
train(
    "eps",
    "rmsprop, under the root and beside it",
    lambda h: OPTAX.rmsprop(h["lr"], eps_in_sqrt=False),
    lambda h: optax.rmsprop(h["lr"]),
)


# --- differences of no such kind, and mixtures of two ---

train(
    "",
    "a scheduler that goes down half as often",
    by_torch_optim(lambda p, h: torch.optim.SGD(p, 0.05), lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.9)),
    lambda h: optax.sgd(lambda count: 0.05 * 0.9 ** (count // 2)),
)
defaults("NAdam, another algorithm", torch.optim.NAdam, optax.nadam, kind="")
defaults("AMSGrad, of other moments", lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True), optax.amsgrad, kind="")
defaults("Adam and SGD", torch.optim.Adam, optax.sgd, kind="")
defaults("another learning rate, or gradients of another size", torch.optim.SGD, lambda lr: optax.sgd(1.4 * lr), "")
train("", "the same", lambda h: OPTAX.sgd(0.05, 0.9), lambda h: optax.sgd(0.07, 0.9))
defaults("two: b1 and b2", torch.optim.Adam, lambda lr: optax.adam(lr, 0.8, 0.99), kind="")
train(
    "",
    "1.3 times a decay that both are given",  # no number of this side is right for all that may be given
    lambda h: OPTAX.adamw(h["lr"], weight_decay=h["wd"]),
    lambda h: optax.adamw(h["lr"], weight_decay=1.3 * h["wd"]),
)
train(
    "",
    "two: a decay and b1",
    lambda h: OPTAX.adamw(h["lr"]),
    lambda h: optax.adamw(h["lr"], b1=0.8, weight_decay=0.01),
)
train("", "l1, and decay of that strength", lambda h: frt.prox_adam(h["lr"], frt.l1(h["wd"])), decoupled)
train(
    "",
    "gradients clipped",
    lambda h: OPTAX.sgd(h["lr"]),
    lambda h: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(h["lr"])),
)
train(
    "",
    "another schedule",
    lambda h: OPTAX.sgd(OPTAX.linear_schedule(0.1, 0, 8)),
    lambda h: optax.sgd(optax.cosine_decay_schedule(0.1, 8)),
)
train(
    "",
    "two steps off",
    lambda h: OPTAX.sgd(OPTAX.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: optax.linear_schedule(0.1, 0.0, 8)(count + 2)),
)
train(
    "",
    "dampening 0.5 at momentum 0.9",
    lambda h: OPTAX.sgd(h["lr"], 0.9),
    lambda h: optax.chain(optax.scale(0.5), optax.trace(0.9), optax.scale(-0.9 * h["lr"])),
)
train(
    "",
    "two: decoupled decay and eps",
    lambda h: OPTAX.chain(OPTAX.add_decayed_weights(h["wd"]), OPTAX.adam(h["lr"])),
    lambda h: optax.adamw(h["lr"], eps=1e-3, weight_decay=h["wd"]),
)
train(
    "",
    "two: off by one and a factor",
    lambda h: OPTAX.sgd(OPTAX.linear_schedule(0.1, 0.0, 8)),
    lambda h: optax.sgd(lambda count: 2 * optax.linear_schedule(0.1, 0.0, 8)(count + 1)),
)
train(
    "",
    "two: a sum, and a decay that is decoupled",
    lambda h: OPTAX.chain(OPTAX.add_decayed_weights(h["wd"]), OPTAX.adam(h["lr"])),
    decoupled,
    theirs_loss=lambda params, x, y: jnp.sum((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2),
)
train(
    "",
    "decay of one leaf only",
    lambda h: OPTAX.adamw(h["lr"], weight_decay=h["wd"]),
    lambda h: optax.adamw(h["lr"], weight_decay=h["wd"], mask={"hidden": True, "out": False}),
)

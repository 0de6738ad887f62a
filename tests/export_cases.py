"""The table of functions that can be exported: gradients, training steps, ensembles, models of several kinds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import funcreg.torch as fr
from funcreg.torch import optax

BATCH = {0: "batch"}
CLASSES = 3


@dataclass(frozen=True)
class Case:
    """One function with its example arguments, as `export_step` takes them."""

    name: str
    function: Callable[..., Any]
    example: dict[str, Any]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return self.name


def case(name: str) -> Case:
    torch.manual_seed(0)
    return Case(name, *CASES[name]())


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal in dtype and bits: zeros of the same sign, and NaN where NaN is."""
    nan = torch.equal(x.isnan(), y.isnan()) and torch.equal(x.signbit() & ~x.isnan(), y.signbit() & ~y.isnan())
    return x.dtype == y.dtype and nan and torch.equal(x.nan_to_num(), y.nan_to_num())


# --- models and data ---


def mlp(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"hidden.weight": (6, 4), "hidden.bias": (6,), "head.weight": (CLASSES, 6), "head.bias": (CLASSES,)}
    return {name: torch.randn(shape, dtype=dtype) / 2 for name, shape in shapes.items()}


def logits(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(x, params["hidden.weight"], params["hidden.bias"]))
    return F.linear(hidden, params["head.weight"], params["head.bias"])


def squares(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(logits(params, x), y)


def labels(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits(params, x), y)


def regression(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(8, 4, dtype=dtype), "y": torch.randn(8, CLASSES, dtype=dtype)}


def classification() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 4), "y": torch.randint(0, CLASSES, (8,))}


def hyper(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"lr": torch.tensor(0.05, dtype=dtype), "lam": torch.tensor(0.02, dtype=dtype)}


def step_of(loss: Callable[..., Any], make: Callable[[Any], Any], params: Any, batch: dict[str, Tensor]) -> tuple:
    """A training step: function, example, dynamic dimensions, names of the outputs."""
    given = hyper(next(iter(params.values())).dtype)
    init, step = fr.train_step(loss, make)
    example = {"state": init(params, given), "hyper": given, **batch}
    return step, example, {"x": BATCH, "y": BATCH}, ("state", "metrics")


# --- the cases ---


def gradient() -> tuple:
    def gradient(params: Any, penalty: Any, x: Tensor, y: Tensor) -> Any:
        return torch.func.grad(fr.penalize(squares, penalty))(params, x, y)

    penalty = fr.l1(0.01).on("*.weight") + fr.group_lasso(0.1, per="output").on("hidden.weight")
    return gradient, {"params": mlp(), "penalty": penalty, **regression()}, {"x": BATCH, "y": BATCH}


def prox_sgd() -> tuple:
    return step_of(squares, lambda h: fr.prox_sgd(h["lr"], fr.l1(h["lam"]), momentum=0.9), mlp(), regression())


def prox_adam() -> tuple:
    return step_of(squares, lambda h: fr.prox_adam(h["lr"], fr.l1(h["lam"])), mlp(), regression())


def prox_adam_float64() -> tuple:
    dtype = torch.float64
    return step_of(squares, lambda h: fr.prox_adam(h["lr"], fr.l1(h["lam"])), mlp(dtype), regression(dtype))


def group_lasso() -> tuple:
    penalty = lambda h: fr.group_lasso(h["lam"], per="output").on("*.weight")  # noqa: E731
    return step_of(squares, lambda h: fr.prox_adam(h["lr"], penalty(h)), mlp(), regression())


def cross_entropy() -> tuple:
    return step_of(labels, lambda h: fr.prox_adam(h["lr"], fr.elastic_net(h["lam"], 0.1)), mlp(), classification())


def adamw_chain() -> tuple:
    def make(h: Any) -> Any:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            fr.add_penalty_gradient(fr.l2(h["lam"]).on(fr.weights)),
            optax.scale_by_learning_rate(h["lr"]),
        )

    return step_of(labels, make, mlp(), classification())


def schedule() -> tuple:
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)
    step, example, *rest = step_of(
        squares, lambda h: fr.prox_adam(rate, lambda count: fr.l1(1e-3 * count)), mlp(), regression()
    )
    return step, {**example, "hyper": {}}, *rest


def accumulated() -> tuple:
    return step_of(squares, lambda h: optax.MultiSteps(optax.adam(h["lr"]), 2), mlp(), regression())


def fine_tuning() -> tuple:
    """EWC: the anchor and the importance are inputs."""

    def gradient(params: Any, anchor: Any, importance: Any, x: Tensor, y: Tensor) -> Any:
        penalty = fr.anchored(fr.l2(0.1), anchor, importance=importance)
        gradients, parts = torch.func.grad(fr.penalize(labels, penalty, parts=True), has_aux=True)(params, x, y)
        return {"gradients": gradients, "loss": parts.loss}

    importance = {name: p.square() for name, p in mlp().items()}
    example = {"params": mlp(), "anchor": mlp(), "importance": importance, **classification()}
    return gradient, example, {"x": BATCH, "y": BATCH}


def ensemble() -> tuple:
    step, _, _, outputs = prox_adam()
    members = fr.stack([mlp() for _ in range(3)])
    rates = {"lr": torch.tensor([0.01, 0.03, 0.1]), "lam": torch.tensor([0.1, 0.01, 0.0])}
    init, _ = fr.train_step(squares, lambda h: fr.prox_adam(h["lr"], fr.l1(h["lam"])))
    state = torch.func.vmap(init)(members, rates)
    example = {"state": state, "hyper": rates, **regression()}
    return torch.func.vmap(step, in_dims=(0, 0, None, None)), example, {"x": BATCH, "y": BATCH}, outputs


def path() -> tuple:
    """A sparse group lasso at many strengths, each with a batch of its own (bagging)."""
    init, step = fr.train_step(
        squares, lambda h: fr.prox_sgd(h["lr"], fr.sparse_group_lasso(h["lam"], h["lam"], per="output"))
    )
    rates = {"lr": torch.full((3,), 0.1), "lam": torch.tensor([0.3, 0.1, 0.03])}
    state = torch.func.vmap(init)(fr.stack([mlp()] * 3), rates)
    example = {"state": state, "hyper": rates, "x": torch.randn(3, 8, 4), "y": torch.randn(3, 8, CLASSES)}
    return torch.func.vmap(step), example, {"x": {1: "batch"}, "y": {1: "batch"}}, ("state", "metrics")


def per_example() -> tuple:
    def gradients(params: Any, x: Tensor, y: Tensor) -> Any:
        return fr.per_example(squares)(params, x, y)

    return gradients, {"params": mlp(), **regression()}, {"x": BATCH, "y": BATCH}, ("values", "gradients")


def private() -> tuple:
    """Clipped per-example gradients of a classifier: labels as a mask, since vmap fixes the batch in an indexing."""

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        mask = (y.unsqueeze(-1) == torch.arange(CLASSES)).to(x.dtype)
        return -(F.log_softmax(logits(params, x), -1) * mask).sum(-1).mean()

    def gradient(params: Any, bound: Tensor, x: Tensor, y: Tensor) -> Any:
        _, gradients = fr.per_example(loss)(params, x, y)
        return fr.clip_per_example(gradients, bound)

    example = {"params": mlp(), "bound": torch.tensor(0.5), **classification()}
    return gradient, example, {"x": BATCH, "y": BATCH}


class Convnet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


def convnet() -> tuple:
    """The statistics of a batch norm go through the step as `extra`."""
    net = Convnet()

    def loss(params: Any, extra: Any, x: Tensor, y: Tensor) -> Any:
        return F.cross_entropy(torch.func.functional_call(net, (params, extra), (x,)), y), extra

    penalty = lambda h: fr.group_lasso(h["lam"], per="output").on("conv.weight")  # noqa: E731
    init, step = fr.train_step(loss, lambda h: fr.prox_sgd(h["lr"], penalty(h), momentum=0.9), has_extra=True)
    params = {name: p.detach() for name, p in fr.params(net).items()}
    example = {"state": init(params, hyper(), dict(net.named_buffers())), "hyper": hyper()}
    example |= {"x": torch.randn(8, 2, 4, 4), "y": torch.randint(0, CLASSES, (8,))}
    return step, example, {"x": BATCH, "y": BATCH}, ("state", "metrics")


def attention() -> tuple:
    """A transformer layer: two dynamic dimensions, attention, layer norms, gelu."""
    net = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, params, (x,)).mean(1), y)

    params = {name: p.detach() for name, p in fr.params(net).items()}
    batch = {"x": torch.randn(8, 5, 4), "y": torch.randn(8, 4)}
    step, example, _, outputs = step_of(loss, lambda h: fr.prox_sgd(h["lr"], fr.l1(h["lam"])), params, batch)
    return step, example, {"x": {0: "batch", 1: "time"}, "y": BATCH}, outputs


CASES: dict[str, Callable[[], tuple]] = {
    function.__name__: function
    for function in (
        gradient,
        prox_sgd,
        prox_adam,
        prox_adam_float64,
        group_lasso,
        cross_entropy,
        adamw_chain,
        schedule,
        accumulated,
        fine_tuning,
        ensemble,
        path,
        per_example,
        private,
        convnet,
        attention,
    )
}

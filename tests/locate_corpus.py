"""Models with one fault planted on one side, and the place where `interop.locate` has to find it.

Every entry makes its pair of models twice: with the fault, and without, where nothing may be found. The models are as
small as the fault allows and share their shapes, so that what JAX compiles for one serves the others.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import linen, nnx
from jax import lax
from torch import nn

from funcreg import interop
from interop import Location


class Models(NamedTuple):
    """Two models and what they are called with; `options` are those of `locate`, `spoil` changes flax's leaves."""

    net: nn.Module
    flax: Any
    inputs: tuple[Any, ...]
    example: tuple[Any, ...] = ()  # linen's, for `init`
    options: dict[str, Any] = {}
    spoil: Callable[[dict[str, Any]], dict[str, Any]] = lambda leaves: leaves
    flatten: dict[str, Any] = {}


class Fault(NamedTuple):
    """A fault, where it is, and whether values or only gradients show it."""

    name: str
    make: Callable[[bool], Models]
    where: str
    direction: str = "forward"

    def __str__(self) -> str:
        return self.name

    def locate(self, planted: bool) -> Location:
        torch.manual_seed(0)
        models = self.make(planted)
        net, flax = models.net, models.flax
        if isinstance(flax, linen.Module):
            variables = dict(flax.init(jax.random.key(0), *models.example))
            pair = interop.match(net, variables, strict=False)
            flax = flax.bind(models.spoil(pair.to_jax(net)) if planted else pair.to_jax(net))
        else:
            pair = interop.match(net, flax, strict=False)
            state = pair.to_jax(net)
            nnx.update(flax, models.spoil(state) if planted else state)
        return interop.locate(net, flax, pair, *models.inputs, **models.options)


FAULTS: list[Fault] = []


def fault(name: str, make: Callable[[bool], Models], where: str, direction: str = "forward") -> None:
    FAULTS.append(Fault(name, make, where, direction))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- a perceptron, in linen and in nnx: what is between its layers ---

WIDTH = 6
X = normal(5, WIDTH)
ZEROED = np.where(np.abs(X) < 0.7, 0.0, X)


class Perceptron(nn.Module):
    def __init__(self, first: Any = torch.tanh, second: Any = torch.tanh, last: Any = lambda x: x) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.first, self.second, self.last = first, second, last

    def forward(self, x):
        return self.last(self.head(self.second(self.fc2(self.first(self.fc1(x))))))


class PerceptronLinen(linen.Module):
    first: Any = jnp.tanh
    second: Any = jnp.tanh
    last: Any = lambda x: x

    @linen.compact
    def __call__(self, x):
        x = self.first(linen.Dense(WIDTH, name="fc1")(x))
        return self.last(linen.Dense(3, name="head")(self.second(linen.Dense(WIDTH, name="fc2")(x))))


class PerceptronNNX(nnx.Module):
    def __init__(self, first: Any = jnp.tanh, second: Any = jnp.tanh, last: Any = lambda x: x) -> None:
        rngs = nnx.Rngs(0)
        self.fc1, self.fc2 = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.first, self.second, self.last = first, second, last

    def __call__(self, x):
        return self.last(self.head(self.second(self.fc2(self.first(self.fc1(x))))))


def perceptron(kind: Any, part: str, ours: Any, wrong: Any, right: Any, x: np.ndarray = X) -> Callable[..., Models]:
    def make(planted: bool) -> Models:
        flax = kind(**{part: wrong if planted else right})
        return Models(Perceptron(**{part: ours}), flax, (x,), (jnp.ones(x.shape),))

    return make


LINEN, NNX = PerceptronLinen, PerceptronNNX


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


fault("gelu by tanh", perceptron(LINEN, "first", F.gelu, jax.nn.gelu, exact_gelu), "between `fc1` and `fc2`")
fault(
    "another slope of a leaky relu",
    perceptron(NNX, "second", F.leaky_relu, lambda x: jax.nn.leaky_relu(x, 0.011), jax.nn.leaky_relu),
    "between `fc2` and `head`",
)
fault(
    "an activation forgotten",
    perceptron(NNX, "first", torch.relu, lambda x: x, jax.nn.relu),
    "between `fc1` and `fc2`",
)
fault(
    "softmax over the batch",
    perceptron(LINEN, "last", lambda x: x.softmax(-1), lambda x: jax.nn.softmax(x, 0), lambda x: jax.nn.softmax(x, -1)),
    "after `head`",
)
fault(
    "a layer's input in float16",
    perceptron(
        NNX,
        "second",
        torch.tanh,
        lambda x: jnp.round(jnp.tanh(x) * 256) / 256,
        jnp.tanh,
    ),
    "between `fc2` and `head`",
)


# --- the same, and only gradients differ ---


@jax.custom_vjp
def doubled(x):
    return jnp.tanh(x)


doubled.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (2 * g * (1 - jnp.tanh(x) ** 2),))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


class SignThrough(torch.autograd.Function):
    """sign(x), whose gradient passes where |x| < 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)


def sign_through(x, surrogate):
    soft = surrogate(x)
    return soft + lax.stop_gradient(jnp.sign(x) - soft)


def sqrt_norm_torch(x):
    return x * (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def norm_with_gradient_zero(x):
    squares = jnp.sum(x * x, -1, keepdims=True)
    some = squares > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, squares, jnp.ones_like(squares))), jnp.zeros_like(squares))


def abs_with_gradient_zero(x):
    return x * lax.stop_gradient(jnp.sign(x))


HALF = np.concatenate([np.zeros((2, WIDTH)), X[:3]])

backward = [
    (
        "a branch that stops the gradient",
        perceptron(
            LINEN,
            "first",
            lambda x: torch.tanh(x) + x,
            lambda x: jnp.tanh(x) + lax.stop_gradient(x),
            lambda x: jnp.tanh(x) + x,
        ),
        "between `fc1` and `fc2`",
    ),
    (
        "a branch that stops the gradient in PyTorch",
        lambda planted: Models(
            Perceptron(second=lambda x: torch.tanh(x) + (x.detach() if planted else x)),
            PerceptronNNX(second=lambda x: jnp.tanh(x) + x),
            (X,),
        ),
        "between `fc2` and `head`",
    ),
    (
        "everything detached in PyTorch",
        lambda planted: Models(
            Perceptron(second=lambda x: torch.tanh(x.detach() if planted else x)), PerceptronNNX(), (X,)
        ),
        "between `fc2` and `head`",
    ),
    (
        "a derivative of one's own with a factor",
        perceptron(NNX, "second", torch.tanh, doubled, jnp.tanh),
        "between `fc2` and `head`",
    ),
    (
        "straight through another surrogate",
        perceptron(
            LINEN,
            "first",
            SignThrough.apply,
            lambda x: sign_through(x, jnp.tanh),
            lambda x: sign_through(x, lambda x: jnp.clip(x, -1, 1)),
        ),
        "between `fc1` and `fc2`",
    ),
    (
        "a gradient that is clipped",
        perceptron(LINEN, "last", lambda x: 10 * x, lambda x: 10 * clipped(x), lambda x: 10 * x),
        "after `head`",
    ),
]
for name, make, where in backward:
    fault(name, make, where, "gradient")


def at_input(ours: Any, wrong: Any, right: Any, x: np.ndarray) -> Callable[..., Models]:
    """Steps in front of the first layer, where the numbers are known."""

    def make(planted: bool) -> Models:
        theirs = wrong if planted else right
        options = {
            "torch_call": lambda net, x: net(ours(x)),
            "flax_call": lambda model, x: model(theirs(x)),
        }
        return Models(Perceptron(), PerceptronNNX(), (x,), options=options)

    return make


for name, make in [
    (
        "relu with another derivative at 0",
        at_input(torch.relu, lambda x: jnp.maximum(x, 0.0), jax.nn.relu, ZEROED),
    ),
    ("abs with another derivative at 0", at_input(torch.abs, jnp.abs, abs_with_gradient_zero, ZEROED)),
    (
        "the derivative of a norm at 0",
        at_input(
            sqrt_norm_torch,
            lambda x: x + x * jnp.linalg.norm(x, axis=-1, keepdims=True),
            lambda x: x + x * norm_with_gradient_zero(x),
            HALF,
        ),
    ),
]:
    fault(name, make, "before `fc1`", "gradient")


class FrozenDense(linen.Module):
    frozen: bool

    @linen.compact
    def __call__(self, x):
        kernel = self.param("kernel", linen.initializers.lecun_normal(), (WIDTH, WIDTH))
        bias = self.param("bias", linen.initializers.zeros, (WIDTH,))
        return x @ (lax.stop_gradient(kernel) if self.frozen else kernel) + jnp.broadcast_to(bias, x.shape)


class WithFrozen(linen.Module):
    frozen: bool

    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(WIDTH, name="fc1")(x))
        return linen.Dense(3, name="head")(jnp.tanh(FrozenDense(self.frozen, name="fc2")(x)))


fault(
    "a kernel without gradient",
    lambda planted: Models(Perceptron(), WithFrozen(planted), (X,), (jnp.ones(X.shape),)),
    "inside `fc2`",
    "gradient",
)


# --- values of arrays ---


def in_leaf(change: Callable[[Any], Any], *path: str) -> Callable[[Any], Any]:
    def spoil(tree: Any) -> Any:
        node = tree
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = jax.tree.map(change, node[path[-1]])
        return tree

    return spoil


fault(
    "a square kernel not transposed, linen",
    lambda planted: Models(
        Perceptron(),
        PerceptronLinen(),
        (X,),
        (jnp.ones(X.shape),),
        spoil=in_leaf(lambda w: w.T, "params", "fc2", "kernel"),
    ),
    "inside `fc2`",
)
fault(
    "a square kernel not transposed, nnx",
    lambda planted: Models(Perceptron(), PerceptronNNX(), (X,), spoil=in_leaf(lambda w: w.T, "fc1", "kernel")),
    "inside `fc1`",
)

# --- images ---

IMAGES = normal(2, 3, 8, 8)


class Convnet(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(16, 3)
        self.bn.running_var.uniform_(0.5, 2.0)
        self.scale = scale

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x / self.scale)))
        return self.fc(F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1))


class ConvnetLinen(linen.Module):
    padding: Any = ((1, 1), (1, 1))
    epsilon: float = 1e-5
    flatten: str = "last"
    pool: Any = linen.max_pool
    scale: float = 1.0
    train: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), (2, 2), self.padding, name="conv1")(x / self.scale)
        norm = linen.BatchNorm(not self.train, momentum=0.9, epsilon=self.epsilon, name="bn")
        x = linen.Conv(4, (3, 3), padding=1, name="conv2")(linen.relu(norm(x)))
        x = self.pool(linen.relu(x), (2, 2), (2, 2))
        x = x.transpose(0, 3, 1, 2) if self.flatten == "first" else x
        return linen.Dense(3, name="fc")(x.reshape(len(x), -1))


class ConvnetNNX(nnx.Module):
    def __init__(self, epsilon: float = 1e-5, swapped: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 4, (3, 3), 2, padding=1, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, momentum=0.9, epsilon=epsilon, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), padding=1, rngs=rngs)
        self.fc = nnx.Linear(16, 3, rngs=rngs)
        self.swapped = swapped

    def __call__(self, x):
        x = nnx.relu(self.conv1(x) if self.swapped else self.bn(self.conv1(x)))
        x = nnx.relu(self.conv2(self.bn(x) if self.swapped else x))
        return self.fc(nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


def convnet(**wrong: Any) -> Callable[..., Models]:
    """In training mode if the fault is that flax's is not."""

    def make(planted: bool) -> Models:
        train = "train" in wrong
        flax = ConvnetLinen(**({"train": train} | (wrong if planted else {})))
        return Models(Convnet().train(train), flax, (IMAGES,), (jnp.ones((2, 8, 8, 3)),))

    return make


fault("stride 2 with SAME padding", convnet(padding="SAME"), "inside `conv1`")
fault("another epsilon of a batch norm", convnet(epsilon=1e-3), "inside `bn`")
fault("a flatten with channels first", convnet(flatten="first"), "between `conv2` and `fc`")
fault("another pooling", convnet(pool=linen.avg_pool), "between `conv2` and `fc`")
fault("images of 0 to 255", convnet(scale=255.0), "before `conv1`")
fault("running averages in training mode", convnet(train=False), "inside `bn`")
fault(
    "the norm behind the activation",
    lambda planted: Models(Convnet().eval(), ConvnetNNX(swapped=planted), (IMAGES,)),
    "between `conv1` and `bn`",
)


class Deconv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class DeconvLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Conv(4, (3, 3), (2, 2), padding=1, name="down")(x))
        return linen.ConvTranspose(3, (4, 4), (2, 2), padding=((2, 2), (2, 2)), name="up")(x)


fault(
    "a transposed convolution whose kernel is not flipped",
    lambda planted: Models(
        Deconv(),
        DeconvLinen(),
        (IMAGES,),
        (jnp.ones((2, 8, 8, 3)),),
        spoil=in_leaf(lambda w: w[::-1, ::-1], "params", "up", "kernel"),
    ),
    "inside `up`",
)

# --- a transformer ---

WORDS, HEADS = 11, 2
TOKENS = np.array([[1, 4, 2, 9], [0, 3, 3, 10]])
CAUSAL = np.tril(np.ones((4, 4), bool))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.bias)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=~torch.from_numpy(CAUSAL), need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(WORDS, WIDTH), Block(), nn.Linear(WIDTH, 3)
        self.places = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, tokens):
        return self.head(self.block(0.1 * self.embed(tokens) + self.places))


class BlockLinen(linen.Module):
    epsilon: float = 1e-5
    opposite: bool = False
    residual: bool = True
    stop: bool = False

    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(self.epsilon, name="norm1")(x)
        mask = jnp.asarray(~CAUSAL | np.eye(4, dtype=bool) if self.opposite else CAUSAL)
        y = linen.MultiHeadDotProductAttention(HEADS, name="attn")(y, mask=mask[None, None])
        x = x + y if self.residual else y
        y = linen.Dense(12, name="fc1")(linen.LayerNorm(1e-5, name="norm2")(x))
        y = linen.Dense(WIDTH, name="fc2")(exact_gelu(y))
        return (lax.stop_gradient(x) if self.stop else x) + y


class TransformerLinen(linen.Module):
    scale: float = 0.1
    block: dict[str, Any] | None = None
    stop: bool = False

    @linen.compact
    def __call__(self, tokens):
        places = self.param("places", linen.initializers.normal(), (4, WIDTH))
        places = jnp.broadcast_to(lax.stop_gradient(places) if self.stop else places, (2, 4, WIDTH))
        x = self.scale * linen.Embed(WORDS, WIDTH, name="embed")(tokens) + places
        return linen.Dense(3, name="head")(BlockLinen(**(self.block or {}), name="block")(x))


def transformer(spoil: Any = None, **wrong: Any) -> Callable[..., Models]:
    def make(planted: bool) -> Models:
        flax = TransformerLinen(**(wrong if planted else {}))
        return Models(Transformer(), flax, (TOKENS,), (TOKENS,), spoil=spoil or (lambda leaves: leaves))

    return make


fault("another epsilon of a layer norm", transformer(block={"epsilon": 1e-6}), "inside `block.norm1`")
fault(
    "the polarity of a mask",
    transformer(block={"opposite": True}),
    "between `block.norm1` and `block.attn`",
)
fault("a residual forgotten", transformer(block={"residual": False}), "between `block.attn` and `block.norm2`")
fault("embeddings that are scaled", transformer(scale=0.2), "between `embed` and `block.norm1`")
fault(
    "heads and their features swapped",
    transformer(in_leaf(lambda w: w.reshape(6, 3, 2).swapaxes(1, 2), "params", "block", "attn", "query", "kernel")),
    "inside `block.attn`",
)
fault(
    "a residual without gradient",
    transformer(block={"stop": True}),
    "between `block.attn` and `head`",
    "gradient",
)
fault("places without gradient", transformer(stop=True), "in the use of `places`", "gradient")

# --- recurrent layers ---

SERIES = normal(5, 4, WIDTH)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(WIDTH, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class RecurrentLinen(linen.Module):
    step: int = -1
    reverse: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.RNN(linen.OptimizedLSTMCell(4), name="lstm", reverse=self.reverse)(x)
        return linen.Dense(3, name="head")(x[:, self.step])


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class LoopedLinen(linen.Module):
    start: float = 0.0

    @linen.compact
    def __call__(self, x):
        cell = linen.GRUCell(4, name="cell")
        h = jnp.full((len(x), 4), self.start, x.dtype)
        for t in range(x.shape[1]):
            h, _ = cell(h, x[:, t])
        return linen.Dense(3, name="head")(h)


def recurrent(net: Any, flax: Any, **wrong: Any) -> Callable[..., Models]:
    return lambda planted: Models(net(), flax(**(wrong if planted else {})), (SERIES,), (jnp.ones(SERIES.shape),))


fault("the first step instead of the last", recurrent(Recurrent, RecurrentLinen, step=0), "between `lstm` and `head`")
fault("time reversed", recurrent(Recurrent, RecurrentLinen, reverse=True), "inside `lstm`")
fault("another first state", recurrent(Looped, LoopedLinen, start=0.1), "before `cell (call 1)`")

# --- layers that are called twice ---


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x, y):
        return self.head(torch.tanh(self.tower(x)) * torch.tanh(self.tower(y)))


class SiameseNNX(nnx.Module):
    def __init__(self, scale: float = 1.0, stop: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.tower, self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)
        self.scale, self.stop = scale, stop

    @nnx.jit
    def __call__(self, x, y):
        first, second = self.tower(x), self.tower(self.scale * y)
        return self.head(jnp.tanh(first) * jnp.tanh(lax.stop_gradient(second) if self.stop else second))


def siamese(**wrong: Any) -> Callable[..., Models]:
    def make(planted: bool) -> Models:
        return Models(Siamese(), SiameseNNX(**(wrong if planted else {})), (X, X[::-1].copy()))

    return make


fault("the second input scaled", siamese(scale=1.1), "before `tower (call 2)`")
fault("the second tower without gradient", siamese(stop=True), "between `tower (call 2)` and `head`", "gradient")

# --- what is not finite ---

fault(
    "the logarithm of zero",
    perceptron(
        LINEN,
        "first",
        lambda x: torch.log(torch.relu(x) + 1e-3),
        lambda x: jnp.log(jax.nn.relu(x)),
        lambda x: jnp.log(jax.nn.relu(x) + 1e-3),
    ),
    "between `fc1` and `fc2`",
)


def main() -> None:
    for one in FAULTS:
        if not all(word in one.name for word in sys.argv[1:]):
            continue
        for planted in (True, False):
            found = one.locate(planted)
            wanted = (one.where, one.direction, "semantic") if planted else ("", "", "rounding")
            right = (found.where, found.direction, found.verdict) == wanted
            print(f"{'  ' if right else '! '}{one.name} ({planted}): {found.direction} {found.where}", flush=True)
            if not right:
                print(found)


if __name__ == "__main__":
    main()

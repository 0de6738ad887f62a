"""What both halves of `sparse_digits.py` start from and are measured with. No framework."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAINING_EXAMPLES, TEST_EXAMPLES = 1347, 450
UNITS = 64  # of the one hidden layer
LEARNING_RATE = 3e-3
PENALIZED = {
    "l1": ["hidden.weight", "output.weight"],
    "group_lasso": ["hidden.weight"],
    "both": ["hidden.weight", "output.weight"],
}

Arrays = dict[str, np.ndarray]


class Digits(NamedTuple):
    """scikit-learn's bundled handwritten digits: 8x8 pixels between 0 and 1; a fixed, stratified split."""

    x_train: np.ndarray  # shape=(1347, 64), dtype=float32
    y_train: np.ndarray  # shape=(1347,), dtype=int64
    x_test: np.ndarray  # shape=(450, 64)
    y_test: np.ndarray  # shape=(450,)


class Run(NamedTuple):
    """How one training run went and where it ended."""

    params: Arrays  # torch's names and layout, on both wings
    steps: list[int]  # where the objective was computed
    objective: list[float]  # loss on the whole training set + penalty
    loss: float  # of the end point, without the penalty


class Measures(NamedTuple):
    """A row of the table."""

    objective: float
    loss: float
    zeros: float  # fraction of the penalized weights that are exactly 0
    dead: int  # hidden units whose incoming weights are all exactly 0
    accuracy: float  # on the test set


def load() -> Digits:
    """The data, split once and for all."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_EXAMPLES, random_state=0, stratify=y)
    return Digits(x_train, y_train, x_test, y_test)


def hold_out(data: Digits, examples: int) -> tuple[Digits, np.ndarray, np.ndarray]:
    """The last of the (shuffled) training digits are for validation: what is left, and their images and labels."""
    left = data._replace(x_train=data.x_train[:-examples], y_train=data.y_train[:-examples])
    return left, data.x_train[-examples:], data.y_train[-examples:]


def initial_values(seed: int, like: str = "flax") -> Arrays:
    """Initial values drawn with NumPy; torch's names and layout.

    `"flax"`: the default of `nn.Dense`, weights normal with standard deviation 1/sqrt(inputs), cut off at two (somewhat
    larger) deviations; biases 0. `"torch"`: that of `nn.Linear`, uniform between -1/sqrt(inputs) and 1/sqrt(inputs).
    """
    rng = np.random.default_rng([seed, 0])
    params = {}
    for layer, inputs, outputs in (("hidden", 64, UNITS), ("output", UNITS, 10)):
        bound = inputs**-0.5
        if like == "flax":
            w = rng.normal(size=(outputs, inputs))
            while (far := np.abs(w) > 2).any():
                w[far] = rng.normal(size=far.sum())
            w *= bound / 0.87962566  # the standard deviation after the cut
            b = np.zeros(outputs)
        else:
            w, b = rng.uniform(-bound, bound, (outputs, inputs)), rng.uniform(-bound, bound, outputs)
        params[f"{layer}.weight"], params[f"{layer}.bias"] = w.astype(np.float32), b.astype(np.float32)
    return params


def draw_batches(seed: int, steps: int, batch: int, examples: int) -> np.ndarray:
    """Indices of shape (steps, batch): the training set in a new random order in every epoch."""
    rng = np.random.default_rng([seed, 1])
    epochs = -(-steps * batch // examples)
    order = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
    return order[: steps * batch].reshape(steps, batch)


def logits(params: Arrays, x: np.ndarray) -> np.ndarray:
    """Of one network, (examples, 10), or of a stack of them, (member, examples, 10)."""
    w = {name: a[..., None, :] if name.endswith("bias") else np.swapaxes(a, -1, -2) for name, a in params.items()}
    hidden = np.maximum(x @ w["hidden.weight"] + w["hidden.bias"], 0)
    return hidden @ w["output.weight"] + w["output.bias"]


def accuracy(params: Arrays, x: np.ndarray, y: np.ndarray) -> float:
    """Fraction of the examples whose largest logit is that of their label."""
    return float((logits(params, x).argmax(-1) == y).mean())


def zeros(params: Arrays, penalty: str) -> float:
    """Fraction of the penalized weights that are exactly 0."""
    weights = np.concatenate([params[name].ravel() for name in PENALIZED[penalty]])
    return float((weights == 0).mean())


def dead(params: Arrays) -> int:
    """Hidden units whose incoming weights are all exactly 0."""
    return int((params["hidden.weight"] == 0).all(1).sum())


def measure(run: Run, penalty: str, data: Digits) -> Measures:
    """The row of a run."""
    return Measures(
        objective=run.objective[-1],
        loss=run.loss,
        zeros=zeros(run.params, penalty),
        dead=dead(run.params),
        accuracy=accuracy(run.params, data.x_test, data.y_test),
    )

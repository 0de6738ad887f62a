"""What both halves of `sparse_digits.py` start from and are measured with. No framework."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAINING_EXAMPLES, TEST_EXAMPLES = 1347, 450
UNITS = 64  # of the one hidden layer
LEARNING_RATE = 3e-3
PENALIZED = {"l1": ["hidden.weight", "output.weight"], "group_lasso": ["hidden.weight"]}

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


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in a range."""
    allowed = f"an integer >= {least}" if most is None else f"an integer between {least} and {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return convert


def load() -> Digits:
    """The data, split once and for all."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=TEST_EXAMPLES, random_state=0, stratify=y)
    return Digits(x_train, y_train, x_test, y_test)


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


def accuracy(params: Arrays, x: np.ndarray, y: np.ndarray) -> float:
    """Fraction of the examples whose largest logit is that of their label."""
    hidden = np.maximum(x @ params["hidden.weight"].T + params["hidden.bias"], 0)
    logits = hidden @ params["output.weight"].T + params["output.bias"]
    return float((logits.argmax(-1) == y).mean())


def measure(run: Run, penalty: str, data: Digits) -> Measures:
    """The row of a run."""
    weights = np.concatenate([run.params[name].ravel() for name in PENALIZED[penalty]])
    return Measures(
        objective=run.objective[-1],
        loss=run.loss,
        zeros=float((weights == 0).mean()),
        dead=int((run.params["hidden.weight"] == 0).all(1).sum()),
        accuracy=accuracy(run.params, data.x_test, data.y_test),
    )

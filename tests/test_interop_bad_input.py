"""What cannot be compared is named, with what can still be said: one table for functions and one for training."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcreg import interop
from interop import Verdict

ROUNDING, SEMANTIC, INCONCLUSIVE = Verdict
X = np.random.default_rng(0).normal(size=(4, 3))
MASK = np.random.default_rng(1).random((4, 3)) < 0.5


def only_narrow(x):
    """A kernel that knows no float64."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise NotImplementedError("no kernel for Double")
    return 3 * x


def in_bfloat16(x):
    return (x.to(torch.bfloat16) / 3).to(x.dtype) if isinstance(x, torch.Tensor) else x


def noise(x):
    """Random on the JAX side as well, drawn by NumPy when it is called."""
    return x + jnp.asarray(np.random.default_rng().normal(size=x.shape), x.dtype)


def of_shape_by_chance(x):
    return x[: int(torch.randint(1, 5, ()))]


class Dropping(nn.Module):
    """A model in training mode."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x) + 0 * x


def put(x, value):
    x = x.copy()
    x[0, 0] = value
    return x


CASES = {  # the two functions, inputs, a verdict or an error, what is said
    "more leaves on one side": (
        lambda x: {"a": x, "b": x},
        lambda x: {"a": x},
        (X,),
        ValueError,
        "the result of the PyTorch side has 'b', which that of the JAX side lacks; nearest names there: a",
    ),
    "other names": (
        lambda x: {"kernel": x},
        lambda x: {"weight": x},
        (X,),
        ValueError,
        "has 'kernel', which that of the JAX side lacks.*pass pair= for trees of parameters",
    ),
    "other shapes": (
        lambda x: x.T,
        lambda x: x,
        (X,),
        ValueError,
        r"has the shape \(3, 4\) on the PyTorch side and \(4, 3\) on the JAX side; bring both to one layout",
    ),
    "other shapes of scalars": (
        torch.sum,
        lambda x: x.sum()[None],
        (X,),
        ValueError,
        r"the shape \(\) on .* \(1,\) on",
    ),
    "a tuple and an array": (lambda x: (x,), lambda x: x, (X,), ValueError, "has '0', which .* JAX side lacks"),
    "nothing": (lambda x: None, lambda x: {}, (X,), ValueError, "the results hold no arrays"),
    "strings": (lambda x: "yes", lambda x: "yes", (X,), ValueError, "the results hold no arrays"),
    "a whole model": (
        lambda x: Dropping(),
        lambda x: x,
        (X,),
        TypeError,
        "PyTorch side: got a Dropping; pass fr.params",
    ),
    "a generator": (lambda x: iter([x]), lambda x: x, (X,), TypeError, "got a list_iterator; pass a dict or a list"),
    "NaN in the input": (
        torch.sin,
        jnp.sin,
        (put(X, np.nan),),
        ROUNDING,
        "1 of 12 entries are the same infinity or NaN on both sides; the verdict is on the others",
    ),
    "NaN in the input hides no fault": (torch.sin, jnp.cos, (put(X, np.nan),), SEMANTIC, "1 of 12 entries"),
    "NaN everywhere": (
        lambda x: x * torch.nan,
        lambda x: x * jnp.nan,
        (X,),
        INCONCLUSIVE,
        "there is nothing to compare",
    ),
    "NaN on one side": (
        torch.log,
        lambda x: jnp.log(jnp.abs(x)),
        (X,),
        SEMANTIC,
        r"there PyTorch has \d NaN, 0 infinite",
    ),
    "infinities of two signs": (
        lambda x: x / 0,
        lambda x: -x / 0,
        (np.ones(3),),
        SEMANTIC,
        "3 of 3 entries are not finite on both sides in the same way",
    ),
    "infinity on one side, NaN on the other": (
        lambda x: x / 0,
        lambda x: 0 * x / 0,
        (np.ones(3),),
        SEMANTIC,
        "PyTorch has 0 NaN, 3 infinite and JAX has 3 NaN, 0 infinite",
    ),
    "overflow of float32 on one side": (
        lambda x: x * 1e30 * 1e30 / 1e30,
        lambda x: x * 1e30,
        (X,),
        INCONCLUSIVE,
        "float64 agrees, but in float32 12 of 12 entries are not finite",
    ),
    "dropout in training mode": (
        Dropping(),
        lambda x: x,
        (X,),
        INCONCLUSIVE,
        "the PyTorch side is random.*draw masks and noise once, outside, and pass them to both sides as inputs, or put "
        "the model into evaluation mode",
    ),
    "dropout in evaluation mode": (Dropping().eval(), lambda x: x, (X,), ROUNDING, "^$"),
    "dropout with its mask as an input": (
        lambda x, keep: x * keep / 0.5,
        lambda x, keep: jnp.where(keep, x / 0.5, jnp.zeros_like(x)),
        (X, MASK),
        ROUNDING,
        "^$",
    ),
    "randomness of JAX's side": (lambda x: x, noise, (X,), INCONCLUSIVE, "the JAX side is random"),
    "randomness of both": (F.dropout, noise, (X,), INCONCLUSIVE, "PyTorch side is random.*JAX side is random"),
    "randomness of one leaf": (
        lambda x: {"a": F.dropout(x), "b": x},
        lambda x: {"a": x, "b": 2 * x},
        (X,),
        SEMANTIC,
        "a: two calls of the PyTorch side with the same inputs differ",
    ),
    "a shape by chance": (of_shape_by_chance, lambda x: x, (X,), (ValueError, INCONCLUSIVE), "has the shape|is random"),
    "a kernel without float64": (
        only_narrow,
        lambda x: 3 * x,
        (X,),
        INCONCLUSIVE,
        "the PyTorch side fails in float64: NotImplementedError: no kernel for Double",
    ),
    "a kernel without float32": (
        lambda x: x * (1 if x.dtype == torch.float64 else 1 / 0),
        lambda x: x,
        (X,),
        INCONCLUSIVE,
        "the PyTorch side fails in float32: ZeroDivisionError.*in float64 they agree",
    ),
    "kernels without a common precision": (
        only_narrow,
        lambda x: x if x.dtype == jnp.float64 else 1 / 0,
        (X,),
        INCONCLUSIVE,
        "PyTorch side fails in float64.*JAX side fails in float32",
    ),
    "bfloat16 inside": (
        in_bfloat16,
        lambda x: x / 3,
        (X,),
        INCONCLUSIVE,
        r"PyTorch computes in bfloat16 \(_to_copy\) also in the float64 run, which accounts for a difference of",
    ),
    "bfloat16 inside hides no large fault": (in_bfloat16, lambda x: x / 2, (X,), SEMANTIC, "^$"),
    "bfloat16 as the result": (
        lambda x: x.bfloat16(),
        lambda x: x.astype(jnp.bfloat16),
        (X,),
        INCONCLUSIVE,
        r"the result of PyTorch \(bfloat16\) and of JAX \(bfloat16\) is of a lower precision.*they differ by 0",
    ),
    "float32 as the result": (
        lambda x: x / 3,
        lambda x: x.astype(jnp.float32) / 3,
        (X,),
        INCONCLUSIVE,
        r"the result of JAX \(float32\) is of a lower precision: a dtype is hard-coded there",
    ),
    "it raises": (lambda x: x.nothing, lambda x: x, (X,), AttributeError, "has no attribute 'nothing'"),
    "no function": (Dropping, None, (X,), TypeError, "jax_fn must be a function, got NoneType"),
    "arrays of objects": (torch.sin, jnp.sin, (np.array([None]),), TypeError, "is an array of object"),
    "numbers that JAX cannot hold": (
        torch.sin,
        jnp.sin,
        (np.array([2**40]),),
        ValueError,
        "cannot hold in the float32 run",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_functions(name):
    ours, theirs, inputs, expected, said = CASES[name]
    expected = expected if isinstance(expected, tuple) else (expected,)
    try:
        with np.errstate(all="ignore"):
            report = interop.check(ours, theirs, *inputs, hints=False)
    except tuple(kind for kind in expected if isinstance(kind, type)) as error:
        found = "\n".join([str(error), *getattr(error, "__notes__", [])])
    else:
        assert report.verdict in expected, report
        found = "\n".join(report.reasons)
        assert str(report) and report.to_json() and report.to_html()  # whatever it holds
    assert re.search(said, found, re.DOTALL), found


@pytest.mark.parametrize(
    "name, relative",
    [("dropout in training mode", 0.1), ("a kernel without float64", 0.0), ("bfloat16 inside", 1e-3)],
)
def test_what_can_still_be_said_is_measured(name, relative):
    ours, theirs, inputs, *_ = CASES[name]
    (leaf,) = interop.check(ours, theirs, *inputs, hints=False).leaves
    errors = leaf.float64 or leaf.float32
    assert errors.relative >= relative and (leaf.float64 is None) == ("without float64" in name)


# --- training ---


def side(update, library):
    def init(params, hyper):
        return {"params": params}

    def step(state, hyper, x):
        return {"params": {"w": update(state["params"]["w"], x, library)}}, {"size": (state["params"]["w"] ** 2).sum()}

    return init, step


def plain(w, x, library):
    return w - 0.1 * (w - x.mean())


def dropping(w, x, library):
    return w - 0.1 * (F.dropout(w) if library is torch else w)


def diverging(w, x, library):
    return library.exp(100 * w * w)


def nan_from_the_second_step(w, x, library):
    return w * library.log(x.mean())


def other_shape(w, x, library):
    return w if library is torch else w[None]


def coarse(w, x, library):
    return (w.to(torch.bfloat16) * 0.9).to(w.dtype) if library is torch else w * 0.9


TRAINING = {
    "sound": (plain, plain, ROUNDING, "^$"),
    "dropout": (dropping, dropping, INCONCLUSIVE, "the PyTorch side is random.*draw masks and noise once, outside"),
    "both diverge": (diverging, diverging, INCONCLUSIVE, "cannot be judged from step 2 on.*nothing to compare"),
    "one diverges": (plain, diverging, SEMANTIC, "params.w differs from step 1 on"),
    "NaN on both sides": (
        nan_from_the_second_step,
        nan_from_the_second_step,
        INCONCLUSIVE,
        "cannot be judged from step 2 on; before, all is rounding, up to step 1 of 3",
    ),
    "other shapes": (other_shape, other_shape, ValueError, r"check_training, step 1: 'params.w' has the shape \(5,\)"),
    "bfloat16 inside": (coarse, coarse, INCONCLUSIVE, "PyTorch computes in bfloat16"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training(name):
    ours, theirs, expected, said = TRAINING[name]
    batches = [np.full(5, value) for value in (2.0, -2.0, 2.0)]
    init, step = side(theirs, jnp)
    call = lambda: interop.check_training(  # noqa: E731
        side(ours, torch), (init, jax.jit(step)), {"w": np.linspace(1, 2, 5)}, None, batches, hints=False
    )
    if isinstance(expected, Verdict):
        report = call()
        assert report.verdict is expected, report
        assert re.search(said, "\n".join(report.reasons), re.DOTALL), report.reasons
        assert report.to_json() and report.to_html()
    else:
        with pytest.raises(expected, match=said):
            call()

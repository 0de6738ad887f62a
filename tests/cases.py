"""The table: every penalty with its arguments, shapes, kinks, traits, oracles and wrong inputs. Tests run over it.

A factory of either wing that is not in it fails `test_oracles.py`. A new penalty needs a Record, one Case at least, and
oracles of its name in `oracles.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

import oracles
from funcreg._rule import NoGradError, NoProxError
from wings import Wing

STEP = 0.5  # with the strengths below, thresholds are exact in every dtype, half precision included
SHAPES: Mapping[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0,),
    "no_rows": (0, 3),
    "no_columns": (3, 0),
    "vector": (5,),
    "matrix": (3, 4),
    "kernel": (2, 3, 2, 4),
}


@dataclass(frozen=True)
class Error:
    """A call that must be refused: what it raises, and a part of the message that helps the one who made it."""

    name: str
    call: Callable[[Wing], Any]
    exception: type[Exception]
    message: str


@dataclass(frozen=True)
class Record:
    """One factory."""

    factory: str
    strengths: tuple[str, ...] = ("lam",)
    convex: bool = True
    separable: bool = False  # a sum over coordinates
    quadratic: bool = False  # the gradient is affine
    has_gradient: bool = True
    has_prox: bool = True
    has_leaf: bool = True  # leaf functions of its name under `functional`
    oracle: str = ""  # the name in oracles.py, if not that of the factory
    errors: tuple[Error, ...] = ()

    def oracle_of(self, kind: str) -> Callable[..., Any]:
        """`kind` is "", "grad_" or "prox_"."""
        return getattr(oracles, kind + (self.oracle or self.factory))


@dataclass(frozen=True)
class Case:
    """One call of a factory."""

    name: str
    record: Record
    strengths: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[str, ...] = tuple(SHAPES)

    def __str__(self) -> str:
        return self.name

    def make(self, fr: ModuleType, *strengths: Any) -> Any:
        """The penalty, with other strengths than the case's own if they are given."""
        strengths = strengths or self.strengths
        if self.record.factory == "custom":
            functions = {key: self.options.get(key) for key in ("value", "grad", "prox")}
            by_name = dict(zip(self.record.strengths, strengths, strict=True))
            return fr.custom(self.name, **functions, **by_name)
        return getattr(fr, self.record.factory)(*strengths, **self.options)

    def resolved(self, wing: Wing, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """What leaf functions and oracles take after the strengths: the axes inside a group, and the group scale."""
        if "axis" not in self.options and "per" not in self.options:
            return ()
        if "axis" in self.options:
            given = self.options["axis"]
            axis = [given] if isinstance(given, int) else list(given)
        elif len(shape) < 2:  # one group per entry
            axis = []
        else:
            counted = wing.layout[self.options["per"]] % len(shape)
            axis = [a - len(shape) for a in range(len(shape)) if a != counted]
        return axis, self.options.get("group_scale", "sqrt_size")

    def oracle(self, kind: str, wing: Wing, x: np.ndarray, *step_size: Any) -> Any:
        """The NumPy value (kind ""), gradient ("grad_") or prox ("prox_") on one leaf."""
        return self.record.oracle_of(kind)(x, *step_size, *self.strengths, *self.resolved(wing, x.shape))

    def params(self, wing: Wing, dtype: str) -> dict[str, np.ndarray]:
        """A leaf of every shape, its first half full of kinks and the rest random, rounded to `dtype`."""
        rng = np.random.default_rng(sum(map(ord, self.name)))
        tree = {name: self._leaf(rng, SHAPES[name]) for name in self.shapes}
        tree["zeros"] = np.zeros(SHAPES[self.shapes[-1]])
        return {name: rounded(wing, x, dtype) for name, x in tree.items()}

    def _leaf(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros of both signs, entries exactly on the threshold and next to it, a first row and column of zeros."""
        x = rng.standard_normal(shape)
        half = (x.size + 1) // 2
        x.flat[0:half:5] = 0.0
        x.flat[1:half:5] = -0.0
        threshold = STEP * self.strengths[0] if self.strengths else 0.0
        x.flat[2:half:5] = threshold
        x.flat[3:half:5] = -threshold
        x.flat[4:half:5] = 1.25 * threshold
        if x.ndim >= 2:
            x[:1], x[..., :1] = 0.0, 0.0
        return x

    def steps(self, wing: Wing, params: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
        """A diagonal metric: steps over two decades, some of them 0; one leaf has a scalar of its own."""
        rng = np.random.default_rng(1)
        tree = {}
        for name, x in params.items():
            step = STEP * 10 ** rng.uniform(-1, 1, x.shape) * (rng.random(x.shape) > 0.1)
            tree[name] = rounded(wing, 0.75 if name == "matrix" else step, dtype)
        return tree


def rounded(wing: Wing, x: Any, dtype: str) -> np.ndarray:
    """The float64 values that `x` has in `dtype`."""
    with wing.precision(dtype):
        return np.asarray(wing.numpy(wing.array(np.asarray(x), dtype)), np.float64)


# --- wrong inputs ---


def _ones(wing: Wing, dtype: str = "float32") -> dict[str, Any]:
    return {"w": wing.array(np.ones((2, 3)), dtype)}


def _strength(where: str, name: str, make: Callable[[ModuleType, Any], Any]) -> tuple[Error, ...]:
    """What every strength refuses; `make(fr, value)` builds the penalty."""
    must = f"{where}: {name} must be"
    return (
        Error(f"{name} negative", lambda w: make(w.fr, -0.1), ValueError, f"{must} >= 0, got -0.1"),
        Error(f"{name} negative array", lambda w: make(w.fr, w.array(-0.5)), ValueError, f"{must} >= 0, got -0.5"),
        Error(f"{name} nan", lambda w: make(w.fr, float("nan")), ValueError, f"{must} >= 0, got nan"),
        Error(f"{name} infinite", lambda w: make(w.fr, float("inf")), ValueError, f"{must} finite, got inf"),
        Error(f"{name} text", lambda w: make(w.fr, "0.1"), TypeError, f"{must} a number or an array, got '0.1'"),
        Error(f"{name} bool", lambda w: make(w.fr, True), TypeError, f"{must} a number or an array, got True"),
        Error(f"{name} None", lambda w: make(w.fr, None), TypeError, f"{must} a number or an array, got None"),
        Error(f"{name} list", lambda w: make(w.fr, [0.1]), TypeError, f"{must} a number or an array, got [0.1]"),
        Error(
            f"{name} schedule",
            lambda w: make(w.fr, lambda count: 0.1),
            TypeError,
            f"{must} a number or an array, got a function; for a schedule give the transformation a function",
        ),
        Error(
            f"{name} several",
            lambda w: make(w.fr, w.array([0.1, 0.2])).value(_ones(w)),
            ValueError,
            "must be a scalar, got an array of shape (2,); for several strengths vmap over the penalty",
        ),
    )


def _use(make: Callable[[ModuleType], Any]) -> tuple[Error, ...]:
    """What every penalty refuses when it is used."""

    def prox(w: Wing, step_size: Any) -> Any:
        return make(w.fr).prox(_ones(w), step_size)

    missing, shape, low = {"v": np.ones((2, 3))}, {"w": np.ones((3, 2))}, {"w": np.array([[1.0, -0.5, 0]] * 2)}
    return (
        Error("complex leaf", lambda w: make(w.fr).value(_ones(w, "complex64")), TypeError, "the leaf 'w' is complex"),
        Error("step negative", lambda w: prox(w, -0.5), ValueError, "prox: step_size must be >= 0, got -0.5"),
        Error("step nan", lambda w: prox(w, float("nan")), ValueError, "prox: step_size must be >= 0, got nan"),
        Error("steps negative", lambda w: prox(w, w.array(low)), ValueError, "step_size of the leaf 'w' must be >= 0"),
        Error("step lacks a leaf", lambda w: prox(w, w.array(missing)), ValueError, "step_size: the leaf 'w'"),
        Error("step shape", lambda w: prox(w, w.array(shape)), ValueError, "step_size: the leaf 'w' must have"),
    )


def _groups(factory: str, *strengths: float) -> tuple[Error, ...]:
    """What the options of a group lasso refuse."""

    def make(w: Wing, **options: Any) -> Any:
        return getattr(w.fr, factory)(*strengths, **options)

    one, end = f"{factory}: give one of axis", f"{factory}: axis is counted from the end, -1 is the last one, got"
    scales, pers = "group_scale must be one of 'sqrt_size', 'one', got 'sqrt'", "per must be one of 'output', 'input'"
    absent = "the leaf 'w' of shape (2, 3) has no axis -3"
    return (
        Error("neither axis nor per", lambda w: make(w), TypeError, f"{one} (the axes inside one group, such as"),
        Error("axis and per", lambda w: make(w, axis=-1, per="output"), TypeError, "got both"),
        Error("per unknown", lambda w: make(w, per="row"), ValueError, f"{factory}: {pers}, got 'row'"),
        Error("scale unknown", lambda w: make(w, axis=-1, group_scale="sqrt"), ValueError, f"{factory}: {scales}"),
        Error("axis from the front", lambda w: make(w, axis=0), ValueError, f"{end} 0"),
        Error("axes from the front", lambda w: make(w, axis=(-1, 1)), ValueError, f"{end} 1"),
        Error("axis no int", lambda w: make(w, axis=(-1.0,)), ValueError, f"{end} -1.0"),
        Error(
            "axis twice", lambda w: make(w, axis=(-1, -1)), ValueError, f"{factory}: axis must not name an axis twice"
        ),
        Error("axis absent", lambda w: make(w, axis=-3).value(_ones(w)), ValueError, absent),
    )


def _custom(fr: ModuleType, **given: Any) -> Any:
    return fr.custom("mine", **{"value": _pull, "grad": _grad_pull, "prox": _prox_pull, "lam": 0.5, "at": 1.0, **given})


# --- custom penalties, in arithmetic that both frameworks know ---


def _pull(x: Any, lam: Any, at: Any) -> Any:
    return lam / 2 * ((x - at) ** 2).sum()


def _grad_pull(x: Any, lam: Any, at: Any) -> Any:
    return lam * (x - at)


def _prox_pull(x: Any, step_size: Any, lam: Any, at: Any) -> Any:
    return x + (at - x) * (step_size * lam / (1 + step_size * lam))


def _saturating(x: Any, lam: Any) -> Any:
    return lam * (x**2 / (1 + x**2)).sum()


# --- the records ---

L1 = Record("l1", separable=True, errors=_strength("l1", "lam", lambda fr, v: fr.l1(v)) + _use(lambda fr: fr.l1(0.1)))
L2 = Record(
    "l2",
    separable=True,
    quadratic=True,
    errors=_strength("l2", "lam", lambda fr, v: fr.l2(v)) + _use(lambda fr: fr.l2(0.1)),
)
ELASTIC_NET = Record(
    "elastic_net",
    ("l1", "l2"),
    separable=True,
    errors=(
        *_strength("elastic_net", "l1", lambda fr, v: fr.elastic_net(v, 0.1)),
        *_strength("elastic_net", "l2", lambda fr, v: fr.elastic_net(0.1, v)),
        *_use(lambda fr: fr.elastic_net(0.1, 0.1)),
    ),
)
GROUP_LASSO = Record(
    "group_lasso",
    errors=(
        *_strength("group_lasso", "lam", lambda fr, v: fr.group_lasso(v, axis=-1)),
        *_use(lambda fr: fr.group_lasso(0.1, axis=-1)),
        *_groups("group_lasso", 0.1),
    ),
)
SPARSE_GROUP_LASSO = Record(
    "sparse_group_lasso",
    ("l1", "group"),
    has_leaf=False,
    errors=(
        *_strength("sparse_group_lasso", "l1", lambda fr, v: fr.sparse_group_lasso(v, 0.1, axis=-1)),
        *_strength("sparse_group_lasso", "group", lambda fr, v: fr.sparse_group_lasso(0.1, v, axis=-1)),
        *_use(lambda fr: fr.sparse_group_lasso(0.1, 0.1, axis=-1)),
        *_groups("sparse_group_lasso", 0.1, 0.1),
    ),
)
_NO_GRADIENT = "non_negative is an indicator or a count and has no gradient"
NON_NEGATIVE = Record(
    "non_negative",
    (),
    separable=True,
    has_gradient=False,
    errors=(
        *_use(lambda fr: fr.non_negative()),
        Error("grad", lambda w: w.fr.non_negative().grad(_ones(w)), NoGradError, _NO_GRADIENT),
        Error(
            "penalize",
            lambda w: w.fr.penalize(lambda p: p["w"].sum(), w.fr.l2(0.1) + w.fr.non_negative()),
            NoGradError,
            f"penalize: {_NO_GRADIENT}",
        ),
        Error(
            "add_penalty_gradient",
            lambda w: w.fr.add_penalty_gradient(w.fr.non_negative()),
            NoGradError,
            f"add_penalty_gradient: {_NO_GRADIENT}",
        ),
        Error("an argument", lambda w: w.fr.non_negative(0.1), TypeError, "non_negative() takes 0 positional"),
    ),
)
PULL = Record(
    "custom",
    ("lam", "at"),
    separable=True,
    quadratic=True,
    has_leaf=False,
    oracle="pull",
    errors=(
        *_strength("mine", "lam", lambda fr, v: _custom(fr, lam=v)),
        *_strength("mine", "at", lambda fr, v: _custom(fr, at=v)),
        *_use(_custom),
        Error("value no function", lambda w: w.fr.custom("mine", 0.1), TypeError, "custom: value must be a function"),
        Error("value None", lambda w: w.fr.custom("mine", None), TypeError, "custom: value must be a function"),
        Error("grad no function", lambda w: _custom(w.fr, grad=0.1), TypeError, "custom: grad must be a function"),
        Error("prox no function", lambda w: _custom(w.fr, prox=0.1), TypeError, "custom: prox must be a function"),
        Error(
            "no prox",
            lambda w: _custom(w.fr, prox=None).prox(_ones(w), 0.5),
            NoProxError,
            "mine has no proximal operator, on the leaf 'w'",
        ),
    ),
)
SATURATING = Record(
    "custom", convex=False, separable=True, has_prox=False, has_leaf=False, oracle="saturating", errors=()
)

# --- the cases ---

_WITH_AXIS = tuple(name for name in SHAPES if SHAPES[name] != ())
_WITH_AXES = tuple(name for name in SHAPES if len(SHAPES[name]) >= 2)
_group = partial(Case, record=GROUP_LASSO, strengths=(0.25,))
_sparse = partial(Case, record=SPARSE_GROUP_LASSO, strengths=(0.125, 0.25))

CASES: list[Case] = [
    Case("l1", L1, (0.25,)),
    Case("l1, strength not exact in binary", L1, (0.3,)),
    Case("l2", L2, (0.5,)),
    Case("elastic_net", ELASTIC_NET, (0.25, 0.5)),
    _group("group_lasso rows", options={"axis": -1}, shapes=_WITH_AXIS),
    _group("group_lasso two axes", options={"axis": (-2, -1), "group_scale": "one"}, shapes=_WITH_AXES),
    _group("group_lasso middle axes", options={"axis": (-2, -3)}, shapes=("kernel",)),
    _group("group_lasso per output", options={"per": "output"}),
    _group("group_lasso per input", options={"per": "input", "group_scale": "one"}),
    _group("group_lasso entries", options={"axis": ()}, shapes=("scalar", "empty", "vector")),
    _sparse("sparse_group_lasso rows", options={"axis": -1, "group_scale": "one"}, shapes=_WITH_AXIS),
    _sparse("sparse_group_lasso per output", options={"per": "output"}, shapes=("vector", "matrix", "kernel")),
    Case("non_negative", NON_NEGATIVE, ()),
    Case("pull", PULL, (0.5, 1.0), {"value": _pull, "grad": _grad_pull, "prox": _prox_pull}),
    Case("saturating", SATURATING, (0.5,), {"value": _saturating}),
]
RECORDS: list[Record] = list(dict.fromkeys(case.record for case in CASES))
ERRORS = [(record, error) for record in RECORDS for error in record.errors]

"""The proximal optimizers once more: float64 NumPy, one leaf at a time, from the design's text, with other algorithms.

A step minimises `R(y) + sum (y_i - point_i)^2 / (2 step_i)`. Whatever the penalty is a sum of, the stationarity
condition of that problem is written down once and solved by bisection; nothing is merged, shrunk or cut in turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Term:
    """A summand of the penalty of one leaf: `l1` or `l2` (with the 1/2), times `importance`, or `group`."""

    kind: str
    lam: float
    anchor: Any = 0.0
    importance: Any = 1.0
    inside: tuple[int, ...] = ()  # axes inside one group
    scale: str = "sqrt_size"

    @property
    def weight(self) -> Any:
        return self.lam * np.asarray(self.importance, np.float64)

    def omega(self, x: Array) -> float:
        size = np.prod([x.shape[axis] for axis in self.inside]) if self.inside else 1
        return self.lam * (np.sqrt(size) if self.scale == "sqrt_size" else 1.0)


Terms = Mapping[str, Sequence[Term]]  # by leaf name


def value(terms: Sequence[Term], w: Array) -> float:
    """The penalty of one leaf."""
    total = 0.0
    for term in terms:
        z = w - term.anchor
        if term.kind == "l1":
            total += np.sum(term.weight * np.abs(z))
        elif term.kind == "l2":
            total += np.sum(term.weight * z**2) / 2
        else:
            total += term.omega(w) * np.sum(np.sqrt(np.sum(z**2, axis=term.inside)))
    return float(total)


def gradient(terms: Sequence[Term], w: Array) -> Array:
    """The minimal-norm subgradient, term by term."""
    total = np.zeros_like(w)
    for term in terms:
        z = w - term.anchor
        if term.kind == "l1":
            total = total + term.weight * np.sign(z)
        elif term.kind == "l2":
            total = total + term.weight * z
        else:
            length = np.sqrt(np.sum(z**2, axis=term.inside, keepdims=True))
            total = total + np.where(length > 0, term.omega(w) * z / np.where(length > 0, length, 1), 0)
    return total


def prox(terms: Sequence[Term], point: Array, step: Array) -> Array:
    r"""The minimiser, from its stationarity condition.

    With `z = y - a` for the anchor `a` of the kinked terms, `k_i = 1 / step_i + sum mu_i` and `b_i` the constant of the
    quadratic terms and the point, it reads `k_i z_i + l1_i sign(z_i) + omega z_i / |z_g| = b_i`: for a given length
    `r = |z_g|` a soft-threshold, and `r` is where the length of the answer is `r`.
    """
    kinked = [term for term in terms if term.kind != "l2"]
    anchors = [term.anchor for term in kinked if np.any(term.anchor != 0.0)]
    assert len(anchors) <= 1 and (not anchors or len(kinked) == 1)
    a = anchors[0] if anchors else 0.0
    curvature = 1 / step
    constant = (point - a) / step
    for term in terms:
        if term.kind == "l2":
            curvature = curvature + term.weight
            constant = constant + term.weight * (term.anchor - a)
    threshold = sum(term.weight for term in kinked if term.kind == "l1")
    pull = np.sign(constant) * np.maximum(np.abs(constant) - threshold, 0)
    groups = [term for term in kinked if term.kind == "group"]
    if not groups:
        return a + pull / curvature
    omega, inside = sum(term.omega(point) for term in groups), groups[0].inside

    def excess(r: Array) -> Array:
        """> 0 while r is shorter than the answer for it."""
        return np.sum((pull / (omega + r * curvature)) ** 2, axis=inside, keepdims=True) - 1

    low = np.zeros_like(np.sum(pull, axis=inside, keepdims=True))
    alive = np.sum(pull**2, axis=inside, keepdims=True) > omega**2
    high = np.sqrt(np.sum((pull / curvature) ** 2, axis=inside, keepdims=True))
    for _ in range(120):
        middle = (low + high) / 2
        longer = excess(middle) > 0
        low, high = np.where(longer, middle, low), np.where(longer, high, middle)
    r = np.where(alive, (low + high) / 2, 1)
    return a + np.where(alive, r * pull / (omega + r * curvature), 0)


@dataclass
class ProxAdam:
    """Adam, its variants and RMSprop with the prox in their own metric: `step(params, grads) -> params`.

    `kind`: `adam`, `amsgrad` (the largest second moment so far) or `rmsprop` (one moment, not corrected, decay `b2`).
    """

    terms: Terms
    lr: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled, as in AdamW
    coupled: float = 0.0  # the weight decay of Adam and RMSprop
    kind: str = "adam"
    count: int = 0
    m: dict[str, Array] = field(default_factory=dict)
    v: dict[str, Array] = field(default_factory=dict)
    largest: dict[str, Array] = field(default_factory=dict)

    def step(self, params: Mapping[str, Array], grads: Mapping[str, Array]) -> dict[str, Array]:
        self.count += 1
        return {name: self._leaf(name, w, grads[name]) for name, w in params.items()}

    def _leaf(self, name: str, w: Array, g: Array) -> Array:
        terms = self.terms.get(name, ())
        g = g + self.coupled * w
        zero = np.zeros_like(w)
        m = self.m[name] = self.b1 * self.m.get(name, zero) + (1 - self.b1) * g
        v = self.v[name] = self.b2 * self.v.get(name, zero) + (1 - self.b2) * g**2
        if self.kind == "amsgrad":
            v = self.largest[name] = np.maximum(self.largest.get(name, zero), v)
        if self.kind == "rmsprop":
            mean, second = g, v
        else:
            mean, second = m / (1 - self.b1**self.count), v / (1 - self.b2**self.count)
        s = np.sqrt(second)
        s = np.where(v == 0, 0.3 * np.sqrt(np.sum(s**2) / max(s.size, 1)), s)
        s = np.maximum(s, np.abs(gradient(terms, w)))
        step = self.lr / (s + self.eps)
        return prox(terms, (1 - self.lr * self.weight_decay) * w - step * mean, step)


@dataclass
class ProxSgd:
    """SGD as torch.optim does it, and a prox step of `lr` times the sum of the weights of the gradients in the step."""

    terms: Terms
    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    coupled: float = 0.0
    m: dict[str, Array] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)  # of the gradients in the momentum, oldest first

    def step(self, params: Mapping[str, Array], grads: Mapping[str, Array]) -> dict[str, Array]:
        self.weights = [self.momentum * weight for weight in self.weights] + [1 - self.dampening if self.m else 1.0]
        total = sum(self.weights) if self.momentum else 1.0
        if self.nesterov:
            total = 1 + self.momentum * total
        new = {}
        for name, w in params.items():
            direction = g = grads[name] + self.coupled * w
            if self.momentum:
                first = name not in self.m
                m = self.m[name] = g if first else self.momentum * self.m[name] + (1 - self.dampening) * g
                direction = g + self.momentum * m if self.nesterov else m
            step = np.full_like(w, self.lr * total)
            new[name] = prox(self.terms.get(name, ()), w - self.lr * direction, step)
        return new


def lasso(a: Array, b: Array, lam: float) -> Array:
    """The minimiser of `mean((a w - b)^2) / 2 + lam |w|_1` by coordinate descent, to 1e-15 in every coordinate."""
    n, p = a.shape
    gram, correlation, w = a.T @ a / n, a.T @ b / n, np.zeros(p)
    for _ in range(10_000):
        before = w.copy()
        for j in range(p):
            rest = correlation[j] - gram[j] @ w + gram[j, j] * w[j]
            w[j] = np.sign(rest) * max(abs(rest) - lam, 0) / gram[j, j]
        if np.max(np.abs(w - before)) <= 1e-15:
            return w
    raise AssertionError("coordinate descent did not converge")


def group_lasso(a: Array, b: Array, lam: float) -> Array:
    """The minimiser of `mean((a w - b)^2) / 2 + lam sqrt(size) sum |w_row|` over matrices, by block coordinate descent.

    The block problem has the curvature `gram_jj` in every coordinate, so that its prox is the Euclidean one.
    """
    n, p = a.shape
    gram, correlation, w = a.T @ a / n, a.T @ b / n, np.zeros((p, b.shape[1]))
    omega = lam * np.sqrt(b.shape[1])
    for _ in range(10_000):
        before = w.copy()
        for j in range(p):
            rest = correlation[j] - gram[j] @ w + gram[j, j] * w[j]
            length = np.sqrt(np.sum(rest**2))
            w[j] = rest * max(1 - omega / length, 0) / gram[j, j]
        if np.max(np.abs(w - before)) <= 1e-15:
            return w
    raise AssertionError("block coordinate descent did not converge")


def badly_scaled(seed: int = 0, outputs: int = 0, n: int = 200, p: int = 30) -> tuple[Array, Array]:
    """A regression whose columns have scales from 1e-1 to 1e1, and nine of whose weights (or rows) are not zero."""
    rng = np.random.default_rng(seed)
    shape = (p, outputs) if outputs else (p,)
    a = rng.normal(size=(n, p)) * np.logspace(-1, 1, p)
    w = np.zeros(shape)
    w[rng.permutation(p)[:9]] = 2 * rng.normal(size=(9, *shape[1:]))
    return a, a @ w + 0.5 * rng.normal(size=(n, *shape[1:]))


# --- fifty steps of everything that a penalty can be ---

# name of a leaf -> (shape, penalty of the leaf, the same as terms). Builders take the module that makes penalties, the
# leaf's anchor and its importance, both as trees; terms take the arrays, and the axes that count outputs and inputs.
LEAVES: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "l1": ((4, 3), lambda fr, a, f: fr.l1(0.05), lambda a, f, io: [Term("l1", 0.05)]),
    "l1_of_one": ((), lambda fr, a, f: fr.l1(0.05), lambda a, f, io: [Term("l1", 0.05)]),
    "l2": ((5,), lambda fr, a, f: fr.l2(0.3), lambda a, f, io: [Term("l2", 0.3)]),
    "bare": ((2, 2), lambda fr, a, f: None, lambda a, f, io: []),
    "rows": (
        (4, 3),
        lambda fr, a, f: fr.group_lasso(0.04, axis=-1),
        lambda a, f, io: [Term("group", 0.04, inside=(1,))],
    ),
    "output": (
        (4, 3),
        lambda fr, a, f: fr.group_lasso(0.04, per="output"),
        lambda a, f, io: [Term("group", 0.04, inside=(1 - io["output"] % 2,))],
    ),
    "input": (
        (4, 3),
        lambda fr, a, f: fr.group_lasso(0.05, per="input", group_scale="one"),
        lambda a, f, io: [Term("group", 0.05, inside=(1 - io["input"] % 2,), scale="one")],
    ),
    "matrix": (
        (2, 4, 3),
        lambda fr, a, f: fr.group_lasso(0.03, axis=(-3, -1)),
        lambda a, f, io: [Term("group", 0.03, inside=(0, 2))],
    ),
    "bias_per_output": (
        (4,),
        lambda fr, a, f: fr.group_lasso(0.05, per="output"),
        lambda a, f, io: [Term("group", 0.05)],
    ),
    "elastic": (
        (4, 3),
        lambda fr, a, f: fr.elastic_net(0.04, 0.2),
        lambda a, f, io: [Term("l1", 0.04), Term("l2", 0.2)],
    ),
    "twice": (
        (6,),
        lambda fr, a, f: fr.l1(0.02) + 0.5 * fr.l1(0.06),
        lambda a, f, io: [Term("l1", 0.02), Term("l1", 0.03)],
    ),
    "sparse_group": (
        (4, 3),
        lambda fr, a, f: fr.l1(0.02) + fr.group_lasso(0.03, axis=-2) + fr.l2(0.1),
        lambda a, f, io: [Term("group", 0.03, inside=(0,)), Term("l1", 0.02), Term("l2", 0.1)],
    ),
    "anchored_l1": (
        (4, 3),
        lambda fr, a, f: fr.anchored(fr.l1(0.03), a, f),
        lambda a, f, io: [Term("l1", 0.03, a, f)],
    ),
    "anchored_rows": (
        (4, 3),
        lambda fr, a, f: fr.anchored(fr.group_lasso(0.03, axis=-1), a) + fr.l2(0.2),
        lambda a, f, io: [Term("group", 0.03, a, inside=(1,)), Term("l2", 0.2)],
    ),
    "ewc": (
        (4, 3),
        lambda fr, a, f: fr.l1(0.03) + 2 * fr.anchored(fr.l2(0.2), a, f) + fr.l2(0.1),
        lambda a, f, io: [Term("l2", 0.4, a, f), Term("l1", 0.03), Term("l2", 0.1)],
    ),
}


def all_leaves(
    seed: int = 0, steps: int = 50
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], list[Any]]:
    """Parameters, anchors, importances and gradients for LEAVES.

    Some parameters start at zero. Gradients have scales from 1e-4 to 1, so that both guards of the metric bind; some
    are always zero, and a whole leaf has none in the first steps.
    """
    rng = np.random.default_rng(seed)
    params, anchors, importances, scales = {}, {}, {}, {}
    for name, (shape, *_) in LEAVES.items():
        params[name] = np.asarray(np.where(rng.random(shape) < 0.2, 0, rng.normal(size=shape) / 4))
        anchors[name] = np.asarray(rng.normal(size=shape) / 4)
        importances[name] = np.asarray(rng.random(shape) + 0.5)
        scales[name] = np.asarray(10 ** rng.uniform(-4, 0, shape) * (rng.random(shape) > 0.15))
    gradients = []
    for count in range(steps):
        g = {name: np.asarray(scale * rng.normal(size=scale.shape)) for name, scale in scales.items()}
        gradients.append({name: g[name] * (count >= 3 or name not in ("l1", "rows")) for name in g})
    return params, anchors, importances, gradients


def all_terms(anchors: Mapping[str, Array], importances: Mapping[str, Array], layout: Mapping[str, int]) -> Terms:
    return {name: terms(anchors[name], importances[name], layout) for name, (_, _, terms) in LEAVES.items()}


def all_penalties(fr: Any, anchors: Mapping[str, Any], importances: Mapping[str, Any]) -> Any:
    """The sum of the penalties of LEAVES, each on its leaf, by the module `fr`."""
    parts = []
    for name, (_, build, _) in LEAVES.items():
        penalty = build(fr, {name: anchors[name]}, {name: importances[name]})
        parts += [] if penalty is None else [penalty.on(name)]
    return sum(parts)

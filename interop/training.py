"""`check_training`: do two training steps take the same way?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ._called import RANDOMNESS
from ._carry import Carrier
from ._coarse import Seen
from ._compare import Results
from ._judged import leaf_of
from ._leaves import Leaves, same_names
from ._nudge import DRAWS
from ._sides import JaxSide, Side, TorchSide
from .arrays import outside_compilation
from .hints import TrainingTrial, hints_of
from .pair import Pair
from .report import Leaf, Report, summed_up
from .verdict import Verdict

OVERFLOW = "both sides have infinities or NaN by this step, and what becomes of these is up to each framework"

Tree = Any
Steps = tuple[Callable[..., Any], Callable[..., Any]]


@outside_compilation
def check_training(
    torch_steps: Steps,
    jax_steps: Steps,
    params: Tree,
    hyper: Tree,
    batches: Iterable[Any],
    pair: Pair | None = None,
    hints: bool = True,
) -> Report:
    """Whether two training steps take the same way up to rounding, step by step.

    Both sides start from the same NumPy parameters and see the same batches, in float64 and in float32 as in `check`.
    After every step the parameters are compared, and the metrics that both sides have. Training may be chaotic:
    rounding errors then grow from step to step as fast as a fault would. Each side therefore also runs from parameters
    and batches that are moved by an ulp, and the difference of the sides is held against how far that run has gone by
    the same step. Where float64 itself has lost its digits the steps are inconclusive, and the report says from which
    step. So they are where the sides have infinities or NaN at different entries after both had some at the same one.

    Args:
        torch_steps: `(init, step)` as of `funcreg.torch.train_step`: `init(params, hyper) -> state`,
            `step(state, hyper, *batch) -> (state, metrics)`, and `state.params`, the tree that is compared. Or a plain
            loop: `init` makes a net and an optimizer of torch.optim with these parameters, `step` trains it in place,
            and both return them in a NamedTuple with `params`, a copy of the net's.
        jax_steps: the same of `funcreg.jax`; faster as `(init, jax.jit(step))`.
        params: NumPy arrays. With a pair, a dict by the names of PyTorch's parameters.
        hyper: hyper-parameters for both sides, or None. Python numbers stay what they are; arrays are given in the
            precision of the run.
        batches: of each step, a tuple of arrays, or one array. What is drawn at random, such as dropout masks, is
            in them.
        pair: as in `check`.
        hints: as in `check`. The batches are kept for it, also those of a generator.

    Returns:
        The report, with leaves `params.*` and `metrics.*` of every step; printed, it shows of each leaf the first step
        that is not rounding.

    Raises:
        ValueError: no batches; parameters of different trees or shapes.
        TypeError: no pairs of functions; a state without `params`; what is no tree of arrays.
        Exception: what a step raises, with a note that says which side, run and step.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, optax, torch
        >>> import funcreg.jax as frj, funcreg.torch as frt
        >>> from funcreg import interop
        >>> ours = frt.train_step(
        ...     lambda params, x, y: ((x @ params["w"] - y) ** 2).mean(),
        ...     lambda hyper: frt.prox_adam(hyper["lr"], frt.l1(0.01)),
        ... )
        >>> theirs = frj.train_step(
        ...     lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2), lambda hyper: optax.adam(hyper["lr"])
        ... )
        >>> rng = np.random.default_rng(0)
        >>> batches = [(rng.normal(size=(8, 3)), rng.normal(size=8)) for _ in range(5)]
        >>> report = interop.check_training(ours, theirs, {"w": np.ones(3)}, {"lr": 0.1}, batches)
        >>> print(report.verdict, report.reasons[0], sep="; ")
        semantic; params.w differs from step 1 on
    """
    where = "check_training"
    for name, steps in (("torch_steps", torch_steps), ("jax_steps", jax_steps)):
        if not (isinstance(steps, tuple) and len(steps) == 2 and all(map(callable, steps))):
            raise TypeError(f"{where}: {name} must be (init, step), two functions, got {type(steps).__name__}")
    carrier = None if pair is None else Carrier(pair)
    sides = TorchSide(where, carrier), JaxSide(where, carrier)
    ours = _Trajectories(sides[0], torch_steps, params, hyper)
    theirs = _Trajectories(sides[1], jax_steps, params, hyper)
    kept: list[tuple[Any, ...]] = []
    leaves: list[Leaf] = []
    one_sided: dict[str, None] = {}
    step, overflow = 0, False
    for step, batch in enumerate(batches, start=1):
        batch = batch if isinstance(batch, (tuple, list)) else (batch,)
        kept += [tuple(batch)] * hints
        a, b = ours.advance(tuple(batch), step), theirs.advance(tuple(batch), step)
        one_sided |= dict.fromkeys(_own_metrics(a, b))
        same_names(
            f"{where}, step {step}", *({k: x for k, x in _of(side).items() if k not in one_sided} for side in (a, b))
        )
        overflow = overflow or _overflows(a, b)
        here = [leaf_of(name, a, b, step) for name in _of(b) if name not in one_sided]
        leaves += map(_left_open, here) if overflow else here
    if not step:
        raise ValueError(f"{where}: batches is empty; pass one tuple of arrays per step")
    random = [side for side in (ours, theirs) if side.random]
    reasons = [RANDOMNESS.format(side=side.side.name) for side in random] + _onset(leaves, step)
    if one_sided:
        reasons.append(f"not compared, since only one side has them: {', '.join(one_sided)}")
    report = summed_up(leaves, reasons, Verdict.INCONCLUSIVE if random else Verdict.ROUNDING)
    if not hints or report.verdict is not Verdict.SEMANTIC:
        return report
    del ours, theirs
    trial = TrainingTrial(_started, *sides, torch_steps, jax_steps, (params, hyper, kept))
    return replace(report, hints=hints_of(trial, report))


class _Run:
    """One trajectory: a precision, and whether what goes in is moved by an ulp."""

    def __init__(self, side: Side, steps: Steps, hyper: Tree, params: Tree, bits: int, draw: int | None) -> None:
        self.side, self.step, self.hyper, self.bits, self.draw = side, steps[1], hyper, bits, draw
        with side.precision(bits):
            self.state = steps[0](self._given(params, draw), self._given(hyper))

    def advance(self, batch: tuple[Tree, ...], watched: bool = False) -> Leaves:
        with self.side.precision(self.bits):
            given = (self.state, self._given(self.hyper), *self._given(batch, self.draw))
            out, self.seen = self.side.watched(self.step, given) if watched else (self.step(*given), {})
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(f"{self.side.where}: step must return (state, metrics), got {type(out).__name__}")
            self.state, metrics = out
            params = _params_of(self.side.where, self.state)
            return {
                **_under("params", self.side.results(params)),
                **_under("metrics", self.side.results(metrics) if metrics is not None else {}),
            }

    def _given(self, tree: Tree, draw: int | None = None) -> Tree:
        return self.side.given(tree, self.bits, draw)


def _started(side: Side, steps: Steps, params: Tree, hyper: Tree) -> _Run:
    return _Run(side, steps, hyper, params, 64, None)


class _Trajectories:
    """The runs of one side, kept in step, so that no more than one state of each is held."""

    def __init__(self, side: Side, steps: Steps, params: Tree, hyper: Tree) -> None:
        self.side, self.random, self.coarse = side, set[str](), Seen()
        self.still = side.is_still(params)

        def run(bits: int, draw: int | None = None) -> _Run:
            return _Run(side, steps, hyper, params, bits, draw)

        self.wide, self.narrow = run(64), run(32)
        self.moved = [run(64, draw) for draw in range(DRAWS)]
        self.again: _Run | None = run(64)

    def advance(self, batch: tuple[Tree, ...], step: int) -> Results:
        def of(run: _Run, what: str, watched: bool = False) -> Leaves:
            try:
                return run.advance(batch, watched)
            except Exception as error:
                error.add_note(f"{self.side.where}: raised in step {step} of the {what} run")
                raise

        self.still = self.still and self.side.is_still(batch)
        results = Results(self.side.name, random=self.random, still=self.still)
        results.keep(of(self.wide, "float64"))
        if self.again is not None:  # one step shows whether it draws anything
            results.repeated(of(self.again, "second float64", watched=True))
            self.coarse, self.again = self.again.seen, None
        results.coarse = self.coarse
        if self.random and results.float64:  # and from then on nothing can be compared
            self.random.update(results.float64)
        else:
            for run in self.moved:
                results.moved(of(run, "moved float64"))
        results.float32 = of(self.narrow, "float32")
        results.drifted()
        return results


def _params_of(where: str, state: Any) -> Any:
    if isinstance(state, Mapping) and "params" in state:
        return state["params"]
    params = getattr(state, "params", None)
    if params is None:
        raise TypeError(
            f"{where}: the state, a {type(state).__name__}, has no params, which is what is compared; return a record "
            "or dict that has, such as TrainState"
        )
    return params


def _of(results: Results) -> Leaves:
    return results.float64 or {}


def _overflows(ours: Results, theirs: Results) -> bool:
    """Whether an entry of a leaf is infinite or NaN on both sides."""
    a, b = _of(ours), _of(theirs)
    return any(not (np.isfinite(a[name]) | np.isfinite(b[name])).all() for name in a if name in b)


def _left_open(leaf: Leaf) -> Leaf:
    """Infinities and NaN of one side only are no fault after those of both: at NaN, relu's derivative is 1 or 0."""
    if leaf.verdict is not Verdict.SEMANTIC or leaf.judgement is not None:
        return leaf
    return replace(leaf, verdict=Verdict.INCONCLUSIVE, reason=f"{leaf.reason}; {OVERFLOW}")


def _own_metrics(ours: Results, theirs: Results) -> list[str]:
    """Metrics of one side only, such as the penalty that a proximal transformation reports."""
    names = [*_of(ours), *_of(theirs)]
    return [name for name in names if name.startswith("metrics.") and not (name in _of(ours) and name in _of(theirs))]


def _under(prefix: str, leaves: Leaves) -> Leaves:
    return {f"{prefix}.{name}": x for name, x in leaves.items()}


def _onset(leaves: list[Leaf], steps: int) -> list[str]:
    """From which step on which leaf differs, or nothing can be said."""
    for verdict, text in ((Verdict.SEMANTIC, "differs"), (Verdict.INCONCLUSIVE, "cannot be judged")):
        first = next((leaf for leaf in leaves if leaf.verdict is verdict), None)
        if first is not None:
            before = f"; before, all is rounding, up to step {first.step - 1} of {steps}" if first.step > 1 else ""
            return [f"{first.name} {text} from step {first.step} on{before}"]
    return []

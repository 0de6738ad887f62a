"""Named explanations of a semantic difference, each of which was tried.

A hint says: PyTorch does this; with that change both sides agree. It is never a guess from numbers: the change was made
to the PyTorch side, that side was run again in float64, and what had differed from JAX fell below 1e-12 of each leaf
(`_search`), on these inputs and on others like them. Which side is wrong is not for a hint to say: the change may as
well be undone on the other one.

Two faults at once, and one that is in no row of `KINDS`, get no hint. The files are by what the rows are about:
layouts, norms, activations, losses, optimizers. To add one is to write a `Rule`: of a call, how it could be made. The
values of hyper-parameters are looked for (`_knobs`), last of all and only where nothing else explains the difference.

Example:
    >>> import jax.numpy as jnp, numpy as np, torch
    >>> from funcreg import interop
    >>> x = np.arange(12.0).reshape(4, 3) ** 2
    >>> report = interop.check(lambda x: x.var(0), lambda x: jnp.var(x, 0), x)
    >>> for hint in report.hints:
    ...     print(interop.hints.KINDS[hint.kind])
    a variance by n or by n - 1; that of batch norm's running statistics
"""

from collections.abc import Iterator

from ..report import Hint, Report
from . import _activations, _knobs, _layouts, _losses, _norms, _optimizers
from ._calls import Recorder
from ._changes import Change, of_calls, of_results
from ._search import Goal, explain, residual, still_differs
from ._threads import as_suits
from ._trials import CheckTrial as CheckTrial
from ._trials import Kept, Trial
from ._trials import ProbesTrial as ProbesTrial
from ._trials import TrainingTrial as TrainingTrial

KINDS = {
    "transposed_kernel": "a square kernel that is transposed on one side",
    "flipped_kernel": "a convolution whose kernel is mirrored on one side",
    "flatten_order": "axes that are flattened, or split, in another order: channels first or last, heads or width",
    "eps": "the small number in a denominator: 1e-5 or 1e-6, one that one side lacks, or beside a root and under it",
    "biased_variance": "a variance by n or by n - 1; that of batch norm's running statistics",
    "gelu": "gelu by erf or by its approximation with tanh",
    "mask_polarity": "a mask whose true entries one side keeps and the other leaves out",
    "subgradient": "the derivative of abs, norm, relu, clamp, max ... where they have none",
    "mean_or_sum": "a mean on one side, a sum on the other, over all axes or some",
    "label_smoothing": "cross entropy with label smoothing, and without or with another one",
    "ignore_index": "entries of a label that one side leaves out; whether they count in the mean",
    "factor": "twice or half of a result, or of one term in it",
    "decoupled_decay": "weight decay added to the gradient, or taken from the parameters themselves",
    "decay_not_scaled": "decay of the parameters that is multiplied by the learning rate on one side only",
    "dampening": "gradients multiplied by 1 - dampening before they are added to the momentum; all, none, all but one",
    "off_by_one": "a count that is one ahead: of steps, and with it a schedule or a bias correction; of a division",
    "hyper_parameter": "another decay, momentum, rate, strength of a penalty ..., or the other library's defaults",
}
RULES = (*_layouts.RULES, *_norms.RULES, *_activations.RULES, *_losses.RULES)


def hints_of(trial: Trial, report: Report, progress: bool = True) -> tuple[Hint, ...]:
    """The known changes that explain the semantic difference of a report.

    Args:
        trial: how both sides are run again.
        report: with a semantic verdict.
        progress: show a bar where it takes longer than a few seconds.
    """
    goal, trial = Goal(report), Kept(trial)
    recorder, optimizers = Recorder(RULES), _optimizers.Optimizers()
    watched = Change("", "", called=lambda function: recorder.watching(optimizers.watching(function)))
    if not still_differs(trial, goal, watched):  # where watching alone changes the result, nothing can be tried
        return ()
    with as_suits(lambda: still_differs(trial, goal, Change("", ""))):
        changes = _changes_to(trial, goal, recorder, optimizers)
        order = [*KINDS]
        found = explain(trial, goal, sorted(changes, key=lambda change: order.index(change.kind)), progress)
        # Other values last, and only where nothing else explains it: a factor of a gradient may look like one of them.
        return found or explain(trial, goal, _other_values(trial, goal, optimizers), progress)


def _changes_to(trial: Trial, goal: Goal, recorder: Recorder, optimizers: _optimizers.Optimizers) -> Iterator[Change]:
    yield from of_results(trial.scalable(goal.differing))
    for seen in recorder.seen.values():
        yield from of_calls(seen)
    yield from trial.of_inputs()
    yield from _optimizers.changes(optimizers)
    yield from trial.of_steps()


def _other_values(trial: Trial, goal: Goal, optimizers: _optimizers.Optimizers) -> Iterator[Change]:
    yield from _optimizers.defaults(optimizers)
    knobs = (*_optimizers.knobs(optimizers), *trial.knobs())
    yield from _knobs.changes(knobs, lambda change: residual(trial, goal, change))

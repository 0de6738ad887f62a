"""One pure training step, and ensembles of it under one vmap."""

import functools
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _axes, _members, _run, _step
from .._run import Interrupted as Interrupted
from .._run import Run as Run
from .._step import TrainState as TrainState
from . import _wing, optax
from ._wing import Params, Penalty

Init = Callable[..., TrainState]
Step = Callable[..., tuple[TrainState, dict[str, Tensor]]]


def train_step(loss: Callable[..., Any], make: Callable[[Any], Any], has_extra: bool = False) -> tuple[Init, Step]:
    """One pure training step, with everything that changes as an argument.

    `init(params, hyper)` copies the parameters and makes the first state; `step(state, hyper, *batch)` returns the next
    state and metrics, and changes none of its arguments. Randomness (dropout masks, noise) comes in as data, in the
    batch.

    Metrics: `"loss"`, the bare loss; and where a penalty is known, from a penalized loss or a proximal transformation,
    `"penalty"` and `"objective"`, their sum. All are taken at the parameters before the step. Inside
    `chain(...)` a proximal transformation does not show its penalty.

    Args:
        loss: `loss(params, *batch) -> scalar`, a penalized loss, or one that returns `(total, Parts(loss, penalty))`. A
            parameter named `hyper` gets the hyper-parameters: strengths in the loss.
        make: `make(hyper) -> transformation`, such as `lambda hyper: prox_adam(hyper["lr"], l1(hyper["lam"]))`.
        has_extra: the loss is `loss(params, extra, *batch) -> (scalar, new_extra)`, and
            `init(params, hyper, extra)` takes the first `extra`: batch-norm statistics, spectral vectors. The new one
            has the names, shapes and dtypes of the old one. The loss may write into the `extra` it gets, which is a
            copy: `torch.func.functional_call(net, (params, extra), x)` updates it, and it can be returned.

    Returns:
        `(init, step)`.

    Raises:
        TypeError: `make` makes no transformation, or the loss returns no scalar or no new `extra`.
        ValueError: the new `extra` has another form than the old one.
    """
    return _step.train_step(Penalty, optax.apply_updates, loss, make, has_extra)


def ensemble(
    init: Init,
    step: Step,
    batch_axes: Any = None,
    chunk: int | None = None,
    compiled: bool = True,
    donate: bool = False,
) -> tuple[Init, Step]:
    """Many members trained as one, under vmap: per-member strengths, learning rates and any other hyper-parameter.

    Parameters, states, hyper-parameters and metrics have a leading axis `member`, which `stack` makes; a single tree
    whose leaves begin with axes of one length cannot be told from an ensemble. A hyper-parameter may also be one number
    for all members. New values of hyper-parameters, of the same dtype, never recompile.

    Args:
        init: from `train_step`, or any `init(params, hyper) -> state`. The new `init` calls it member by member, so
            that a wrong hyper-parameter is refused here.
        step: from `train_step`, or any pure `step(state, hyper, *batch) -> (state, metrics)`.
        batch_axes: None: all members see the same batch. A number: the member axis of every batch array (bagging). A
            tuple: one of these per batch argument.
        chunk: how many members are trained at a time, one chunk after another: memory for activations and gradients is
            that of one chunk. None: all at once.
        compiled: compile the step with `torch.compile(fullgraph=True)`; False: run it as it is, for debugging.
        donate: write the new state into the memory of the one that is passed in, which must not be used afterwards:
            less memory, and less time where a step is small. A step that fails may leave no state.

    Returns:
        `(init, step)`, with the arguments of those given.

    Raises:
        ValueError: leading axes that differ (names both leaves and lengths), no members, or a batch of another shape
            than the first one.
        TypeError: a leaf that is no array; options of a wrong type.
    """
    plan = _members.Plan(_wing, batch_axes, chunk, donate)

    def init_members(params: Params, hyper: Any, *extra: Any) -> TrainState:
        params, hyper, extra = _wing.detached((params, hyper, extra))
        count, given = plan.start(params, hyper, extra)
        return stack([_members.naming_member(i, init, *(_take(tree, i) for tree in given)) for i in range(count)])

    @functools.cache
    def program(count: int, axes: tuple[int | None, ...], in_place: bool, on_cpu: bool) -> Step:
        del count  # a program of its own for every number of members
        vmapped = torch.func.vmap(step, in_dims=(0, 0, *axes))

        def run(state: TrainState, hyper: Any, *batch: Any) -> tuple[TrainState, dict[str, Tensor]]:
            new, metrics = vmapped(state, hyper, *batch)
            if in_place:
                # cloned first: a new leaf may be an old one of another name, which is written over
                return pytree.tree_map(Tensor.copy_, state, pytree.tree_map(torch.clone, new)), metrics
            # a state whose strides differ from the last one's would compile a second program
            return pytree.tree_map(Tensor.contiguous, new), metrics

        if not compiled:
            return run
        run.__code__ = run.__code__.replace()  # torch.compile allows eight programs for one code object
        # On a CPU a small step takes less time than Python needs to launch its kernels: launch them from C++.
        options: dict[str, Any] | None = {"cpp_wrapper": True} if on_cpu else None
        return torch.compile(run, fullgraph=True, dynamic=False, options=options)

    def step_members(state: TrainState, hyper: Any, *batch: Any) -> tuple[TrainState, dict[str, Tensor]]:
        count, hyper, axes, checked = plan.prepare(state, hyper, batch)
        if compiled and checked is not plan.checked:
            _try_one(step, state, hyper, batch, axes)
        on_cpu = pytree.tree_leaves(state)[0].device.type == "cpu"
        if chunk is None or chunk >= count:
            results = program(count, axes, donate, on_cpu)(state, hyper, *batch)
            plan.done(checked)
            return results
        target = state if donate else pytree.tree_map(torch.empty_like, state)
        # All chunks have one size, and so one program: the last one begins early, and what it repeats is not kept.
        starts = [*range(0, count - chunk, chunk), count - chunk]
        measured = []
        for start, end in zip(starts, [*starts[1:], count], strict=True):
            of_chunk = functools.partial(_narrow, start=start, length=chunk)
            own = [x if axis is None else of_chunk(x, axis) for x, axis in zip(batch, axes, strict=True)]
            results = program(chunk, axes, False, on_cpu)(of_chunk(state, 0), of_chunk(hyper, 0), *own)
            new, metrics = _narrow(results, 0, 0, end - start)
            new = pytree.tree_map(torch.clone, new) if donate else new  # as above
            pytree.tree_map(Tensor.copy_, _narrow(target, 0, start, end - start), new)
            measured.append(metrics)
        plan.done(checked)
        return target, pytree.tree_map(lambda *parts: torch.cat(parts), *measured)

    return init_members, step_members


def _try_one(step: Step, state: TrainState, hyper: Any, batch: Sequence[Any], axes: Sequence[int | None]) -> None:
    """The step of the first member as it is, since the compiler would bury what is wrong with the loss."""
    own = [x if axis is None else _narrow(x, axis, 0, 1) for x, axis in zip(batch, axes, strict=True)]
    try:
        torch.func.vmap(step, in_dims=(0, 0, *axes))(_narrow(state, 0, 0, 1), _narrow(hyper, 0, 0, 1), *own)
    except RuntimeError as error:
        if "in-place" in str(error):
            error.add_note(
                "ensemble: what a module writes into (batch norm's statistics) goes into extra: has_extra=True."
            )
        if "random" in str(error):
            error.add_note("ensemble: randomness comes in as data: draw dropout's masks or noise outside, as batch.")
        raise


def _take(tree: Any, i: int) -> Any:
    return pytree.tree_map(lambda x: x[i], tree)


def _narrow(tree: Any, axis: int, start: int, length: int) -> Any:
    return pytree.tree_map(lambda x: x.narrow(axis, start, length), tree)


def stack(members: Sequence[Any]) -> Any:
    """One tree with a leading axis `member` from a list of trees of one form.

    Args:
        members: trees with the same names, shapes and dtypes.

    Returns:
        A tree of contiguous arrays, `[member, ...]`. On torch the parameters of modules come detached.

    Raises:
        ValueError: an empty list, or trees that differ; names the leaf and the member.
        TypeError: a leaf that is no array.
    """
    _axes.check_alike(_wing, "stack", members)
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *_wing.detached(members))


def unstack(members: Any) -> list[Any]:
    """The list of the members' trees: the inverse of `stack`.

    Args:
        members: a tree of arrays `[member, ...]`, such as the parameters of an ensemble's state.

    Returns:
        One tree per member. On torch their tensors are views into that of the ensemble.

    Raises:
        ValueError: leading axes that differ, or no members.
        TypeError: a leaf that is no array.
    """
    count = _axes.count_members(_wing, "unstack", members=members)
    return [_take(members, i) for i in range(count)]


def run(
    step: Step,
    state: TrainState,
    hyper: Any,
    batch: Callable[[int], tuple[Any, ...]],
    steps: int,
    progress: bool = True,
    path: str | PathLike[str] | None = None,
    save_every: float = 60.0,
) -> Run:
    """Take many steps, with a progress bar, and so that the run can be stopped and resumed without losing a step.

    Ctrl-C and SIGTERM end it after the current step, a second Ctrl-C in the middle of it. With a path, the run is saved
    there then, when the step or the batch fails, at the end and every `save_every` seconds; the same call with the same
    path goes on from there, and ends with the same bits as an unbroken run. The file is written by safetensors,
    atomically.

    Args:
        step: `step(state, hyper, *batch) -> (state, metrics)`, of one member or of an ensemble.
        state: from `init`. A step with `donate` uses it up.
        hyper: the hyper-parameters; those in the file must be the same.
        batch: `batch(i)`: the tuple of batch arguments of step `i`, counted from 0; a function of `i` alone, or a
            resumed run sees other batches.
        steps: how many steps in all.
        progress: show a bar.
        path: the file; None: keep nothing on disk.
        save_every: seconds between savings.

    Returns:
        `Run(state, metrics, steps)`: the last state, and every metric as a NumPy array `[steps, ...]`.

    Raises:
        Interrupted: a KeyboardInterrupt, after Ctrl-C or SIGTERM; its `run` is the run up to there.
        ValueError: the file holds another set-up; names the leaf or the hyper-parameter.
        TypeError: `batch` is no function, or does not return a tuple.
    """
    return _run.run(_wing, step, state, hyper, batch, steps, progress, path, save_every)

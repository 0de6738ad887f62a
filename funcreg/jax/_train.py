"""One pure training step, and ensembles of it under one vmap."""

import functools
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import _axes, _members, _run, _step
from .._run import Interrupted as Interrupted
from .._run import Run as Run
from .._step import TrainState as TrainState
from . import _wing
from ._wing import Params, Penalty

Init = Callable[..., TrainState]
Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def train_step(loss: Callable[..., Any], make: Callable[[Any], Any], has_extra: bool = False) -> tuple[Init, Step]:
    """One pure training step, with everything that changes as an argument.

    `init(params, hyper)` copies the parameters and makes the first state; `step(state, hyper, *batch)` returns the next
    state and metrics, and changes none of its arguments. Randomness (dropout masks, keys) comes in as data, in the
    batch.

    Metrics: `"loss"`, the bare loss; and where a penalty is known, from a penalized loss or a proximal transformation,
    `"penalty"` and `"objective"`, their sum. All are taken at the parameters before the step. Inside
    `optax.chain(...)` a proximal transformation does not show its penalty.

    Args:
        loss: `loss(params, *batch) -> scalar`, a penalized loss, or one that returns `(total, Parts(loss, penalty))`. A
            parameter named `hyper` gets the hyper-parameters: strengths in the loss.
        make: `make(hyper) -> transformation`, such as `lambda hyper: prox_adam(hyper["lr"], l1(hyper["lam"]))`.
        has_extra: the loss is `loss(params, extra, *batch) -> (scalar, new_extra)`, and
            `init(params, hyper, extra)` takes the first `extra`: batch-norm statistics, spectral vectors. The new one
            has the names, shapes and dtypes of the old one.

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
    for all members. New values of hyper-parameters, of the same dtype, never recompile. Where this process has several
    devices, the members are spread over as many of them as divide the number of members.

    Args:
        init: from `train_step`, or any `init(params, hyper) -> state`. The new `init` calls it member by member, so
            that a wrong hyper-parameter is refused here.
        step: from `train_step`, or any pure `step(state, hyper, *batch) -> (state, metrics)`.
        batch_axes: None: all members see the same batch. A number: the member axis of every batch array (bagging). A
            tuple: one of these per batch argument.
        chunk: how many members are trained at a time, one chunk after another: memory for activations and gradients is
            that of one chunk (on each device). None: all at once.
        compiled: compile the step with `jax.jit`; False: run it as it is, for debugging.
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
        count, given = plan.start(params, hyper, extra)
        _check_each(init, count, *given)
        return jax.device_put(jax.vmap(init)(*given), NamedSharding(_mesh(count), PartitionSpec("member")))

    @functools.cache
    def program(count: int, axes: tuple[int | None, ...]) -> Callable[..., Any]:
        def one(member: tuple[Any, ...], shared: list[Any]) -> Any:
            state, hyper, own = member
            both = {True: iter(shared), False: iter(own)}
            return step(state, hyper, *(next(both[axis is None]) for axis in axes))

        def members(state: TrainState, hyper: Any, own: list[Any], shared: list[Any]) -> Any:
            given = (state, hyper, own)
            if chunk is None:
                return jax.vmap(one, in_axes=(0, None))(given, shared)
            return jax.lax.map(lambda member: one(member, shared), given, batch_size=chunk)

        mesh = _mesh(count)
        if mesh.size > 1:
            own, everywhere = PartitionSpec("member"), PartitionSpec()
            members = jax.shard_map(members, mesh=mesh, in_specs=(own, own, own, everywhere), out_specs=own)
        return jax.jit(members, donate_argnums=(0,) if donate else ()) if compiled else members

    def step_members(state: TrainState, hyper: Any, *batch: Any) -> tuple[TrainState, dict[str, Array]]:
        count, hyper, axes, checked = plan.prepare(state, hyper, batch)
        pairs = list(zip(batch, axes, strict=True))
        own = [jax.tree.map(lambda x, a=axis: jnp.moveaxis(x, a, 0), x) for x, axis in pairs if axis is not None]
        results = program(count, axes)(state, hyper, own, [x for x, axis in pairs if axis is None])
        plan.done(checked)
        return results

    return init_members, step_members


def _mesh(count: int) -> Mesh:
    """The devices of an ensemble: as many as divide the number of members."""
    chosen = jax.config.values["jax_default_device"]
    devices = jax.local_devices() if chosen is None else [chosen]
    size = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    return Mesh(np.array(devices[:size]), ("member",))


def _check_each(init: Init, count: int, params: Params, hyper: Any, *extra: Any) -> None:
    """Call `init` for every member with its own hyper-parameters but no data, so that wrong ones are refused."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, hyper, extra))):
        return
    hyper = jax.tree.map(np.asarray, hyper)
    one = jax.eval_shape(lambda trees: _take(trees, 0), (params, *extra))
    for i in range(count):
        own = jax.tree.map(np.asarray, _take(hyper, i))  # a scalar of bfloat16 is no NumPy number, a 0-d array is
        _members.naming_member(i, jax.eval_shape, lambda params, *extra, own=own: init(params, own, *extra), *one)


def _take(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


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
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


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

"""A torch.optim optimizer as an optax transformation: the rules of `_rules.py`, leaf by leaf, over any tree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from funcreg._rule import Bound
from funcreg.jax._wing import Penalty

from ._proximal import Stepped, proximal_step
from ._settings import Settings, named

Tree = Any
Rates = Callable[[Array], tuple[Array, ...]]  # how many updates were done -> the learning rate of each group


class TorchOptimizerState(NamedTuple):
    """Where an optimizer stands, under PyTorch's own names.

    Attributes:
        count: how many updates were done here, shape=(), dtype=int32.
        learning_rate: of every parameter group the rate of the next update, shape=(): what `group["lr"]` is in
            PyTorch. Put another one in its place (`state._replace(learning_rate=...)`) to change it; a scheduler sets
            it anew after an update, as in PyTorch.
        state: by PyTorch's names (`"exp_avg"`, `"step"`), each a tree like the parameters, with `optax.MaskedNode` for
            a leaf that has no such array. `"step"` counts the updates of its own leaf.
        settings: hyper-parameters and groups; constants, no arrays.
    """

    count: Array
    learning_rate: tuple[Array, ...]
    state: dict[str, Tree]
    settings: Settings


def torch_optimizer(
    settings: Settings,
    rates: tuple[float, ...] | Rates,
    penalty: Penalty | None,
    pieces: Mapping[str, Sequence[str]] | None = None,
) -> optax.GradientTransformation:
    """The transformation with these settings.

    Args:
        settings: hyper-parameters, and the group of every leaf.
        rates: the learning rate of each group, with which `init` starts; or a function that gives them at every count.
        penalty: what was attached to the optimizer, or None.
        pieces: leaf -> all leaves of its parameter, where PyTorch has one and JAX several.
    """
    schedule = rates if callable(rates) else None
    groups = dict(settings.group_of)

    def init(params: Tree) -> Any:
        if isinstance(params, Mapping) and not isinstance(params, nnx.State) and set(params) == {"params"}:
            params = params["params"]  # linen's variables: the state is that of their parameters, as optimizer_to_jax's
        leaves = _leaves("init", settings, params)
        count = jnp.zeros((), jnp.int32)
        state: dict[str, dict[str, Array]] = {}
        for name, group in settings.group_of:
            for what, x in _first_state(settings, group, leaves[name]).items():
                state.setdefault(what, {})[name] = x
        return TorchOptimizerState(
            count,
            rates(count) if callable(rates) else tuple(jnp.asarray(lr, scalar_dtype()) for lr in rates),
            {what: rebuild(params, by_name) for what, by_name in state.items()},
            settings,
        )

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        where = f"{settings.optimizer} (from PyTorch)"
        if not isinstance(state, TorchOptimizerState):
            raise TypeError(f"{where}: state must be a TorchOptimizerState, got {type(state).__name__}")
        if params is None:
            raise ValueError(f"{where}: update needs the parameters: call update(updates, state, params)")
        check_rates(where, state.learning_rate, len(settings.groups))
        leaves = _leaves(where, settings, params)
        grads = _grads(where, leaves, updates)
        old = {what: named(tree) for what, tree in state.state.items()}
        for by_name in old.values():
            refuse_wide(where, by_name)
        new = {what: dict(by_name) for what, by_name in old.items()}
        parts = _parts(penalty, params)
        steps: dict[str, Stepped] = {}
        for name, group in settings.group_of:
            p, g = leaves[name], grads[name]
            if g is not None and name not in settings.frozen:
                before = {what: by_name[name] for what, by_name in old.items() if name in by_name}
                _check_state(where, settings, group, name, p, before)
                lr = jnp.asarray(state.learning_rate[group]).astype(scalar_dtype())
                steps[name] = _step(settings, group, p, g, before, lr)
        moves = {name: jnp.zeros_like(p) for name, p in leaves.items()}
        for name, leaf in steps.items():
            moved, after = leaf.moved, leaf.after
            if bound := parts.get(name):
                whole = (pieces or {}).get(name, (name,))
                leaf = leaf._replace(pieces=[steps[one].after for one in whole if one in steps])
                hyper = settings.hyper(groups[name])
                moved, kept = proximal_step(settings.optimizer, name, bound, leaf, hyper)
                after = {**after, **kept}
            for what, x in after.items():
                new[what][name] = x
            moves[name] = moved - leaf.old  # with which p + (moved - p) is moved, wherever a number leads there
        count = state.count + 1
        trees = {what: rebuild(tree, new[what]) for what, tree in state.state.items()}
        following = state.learning_rate if schedule is None else schedule(count)
        return rebuild(params, moves), TorchOptimizerState(count, following, trees, settings)

    return optax.GradientTransformation(init, update)


def _step(settings: Settings, group: int, p: Array, g: Array, before: dict[str, Array], lr: Array) -> Stepped:
    """The optimizer's own step of one leaf."""
    g = g.astype(p.dtype)
    counted = {"step": before["step"] + 1} if "step" in before else {}
    step = {what: t.astype(lr.dtype) for what, t in counted.items()}
    kept = {"counted": counted["step"]} if counted else {}
    moved, after = settings.rule.formula(p, g, {**before, **step, **kept}, settings.hyper(group), lr)
    return Stepped(p, g, moved, before, {**after, **counted}, step.get("step"), lr, ())


def _first_state(settings: Settings, group: int, p: Array) -> dict[str, Array]:
    """The state of a leaf that has had no gradient yet."""
    moments = {what: jnp.full_like(p, settings.first_value(group)) for what in settings.moments(group)}
    dtypes = {"has_buffer": jnp.bool_, "prox_scale": scalar_dtype()}
    scalars = {what: jnp.asarray(x, dtypes.get(what, jnp.float32)) for what, x in settings.scalars(group).items()}
    return {**scalars, **moments}


def scalar_dtype() -> Any:
    """Of learning rates and of what is computed from a step: float64 in PyTorch, here where JAX has it."""
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def check_rates(where: str, rates: Any, groups: int) -> None:
    """Refuse what is not one number for each group, before anything is computed with it or written."""
    numbers = (int, float, np.number, np.ndarray, jax.Array)
    if not isinstance(rates, tuple | list):
        got = type(rates).__name__
    elif len(rates) != groups:
        got = f"{len(rates)}"
    else:
        wrong = [x for x in rates if not isinstance(x, numbers) or jnp.shape(x) != ()]
        if not wrong:
            return
        got = f"one of shape {jnp.shape(wrong[0])}" if isinstance(wrong[0], numbers) else f"{wrong[0]!r}"
    raise ValueError(
        f"{where}: learning_rate in the state must be a tuple of {groups} numbers, one for each parameter group, got "
        f"{got}; write state._replace(learning_rate=({'0.1, ' * groups}))"
    )


def rebuild(like: Tree, by_name: Mapping[str, Any]) -> Tree:
    """A tree of these leaves; `optax.MaskedNode` for those of `like` that have none."""
    leaves = [by_name.get(name, optax.MaskedNode()) for name in named(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _leaves(where: str, settings: Settings, params: Tree) -> dict[str, Array]:
    given = named(params)
    refuse_wide(where, given)
    leaves = {name: jnp.asarray(x) for name, x in given.items()}
    known = dict(settings.group_of)
    for name in leaves.keys() ^ known.keys():
        raise ValueError(
            f"{where}: the parameters have {'a leaf' if name in leaves else 'no leaf'} {name!r}, which the pair has "
            f"{'not' if name in leaves else 'matched'}; pass the tree of pair.to_jax(net), of its parameters alone"
        )
    return leaves


_IN_FLOAT32 = "port in float32: net.float(); optimizer.load_state_dict(optimizer.state_dict())"


def refuse_wide(where: str, by_name: Mapping[str, Any], remedy: str = _IN_FLOAT32) -> None:
    """Refuse float64 where JAX has x64 disabled, also after a block with it: it would go on narrowed."""
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return
    for name, x in by_name.items():
        if str(getattr(x, "dtype", "")).removeprefix("torch.") in ("float64", "complex128"):
            raise ValueError(
                f"{where}: {name!r} is {x.dtype}, which JAX without x64 narrows at its first operation; enable it for "
                f'the whole run, jax.config.update("jax_enable_x64", True), or {remedy}'
            )


def _grads(where: str, leaves: Mapping[str, Array], updates: Tree) -> dict[str, Array | None]:
    """The gradients by name; None for a leaf without one, which is None or `optax.MaskedNode` in the tree."""

    def absent(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    marked = jax.tree.map(lambda x: _ABSENT if absent(x) else x, updates, is_leaf=absent)
    grads = named(marked)
    for name in leaves.keys() ^ grads.keys():
        raise ValueError(
            f"{where}: the leaf {name!r} is in the {'parameters' if name in leaves else 'updates'} only; a parameter "
            "without a gradient is None in the updates"
        )
    for name, p in leaves.items():
        if grads[name] is not _ABSENT and jnp.shape(grads[name]) != p.shape:
            raise ValueError(
                f"{where}: the update of {name!r} must have the shape {p.shape}, got {jnp.shape(grads[name])}"
            )
    return {name: None if g is _ABSENT else jnp.asarray(g) for name, g in grads.items()}


_ABSENT = object()


def _check_state(where: str, settings: Settings, group: int, name: str, p: Array, state: Mapping[str, Array]) -> None:
    for what in settings.moments(group):
        shape = state[what].shape if what in state else None
        if shape != p.shape:
            raise ValueError(
                f"{where}: the state's {what!r} of {name!r} must have the shape {p.shape}, got {shape or 'none'}; "
                "was the state made by optimizer_to_jax of this pair, or by init?"
            )


def _parts(penalty: Penalty | None, params: Tree) -> dict[str, list[Bound]]:
    if penalty is None:
        return {}
    flat, bound = penalty.bind(params)
    return dict(zip(flat.names, bound, strict=True))

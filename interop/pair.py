"""Pair: which arrays of a PyTorch model are which of a flax one, and everything that crosses by it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor, nn

from funcreg._selectors import nearest

from . import _flax, _table, arrays
from ._layouts import Mismatch
from ._refusals import TO_NUMPY, checked, refuse_narrowing
from .arrays import outside_compilation
from .links import Link

if TYPE_CHECKING:
    import optax
    from torch.optim import Optimizer

    import funcreg.jax
    import funcreg.torch

    from .optimizers import TorchOptimizerState

Tree = Any


class Form(NamedTuple):
    """What an array of a side must look like."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class TorchSide(NamedTuple):
    """What a pair knows of its PyTorch model.

    Attributes:
        forms: of every array of the state dict, in its order.
        first: for every name of it the first name of the same array: tied arrays have several.
        trained: the first names of the parameters.
    """

    forms: Mapping[str, Form]
    first: Mapping[str, str]
    trained: frozenset[str]


class FlaxSide(NamedTuple):
    """What a pair knows of the flax side: the form of every leaf, and the ways back to its structure."""

    forms: Mapping[str, Form]
    trained: frozenset[str]
    build: Any
    build_params: Any


@dataclass(frozen=True, eq=False, repr=False)
class Pair:
    """A PyTorch model and a flax one, array by array; `print(pair)` shows the table. `interop.match` makes it.

    Attributes:
        links: which arrays are which, and how they are laid out. Names are those of the state dict on the PyTorch side
            and dotted paths on the flax side, where a collection other than `params` is in front
            (`batch_stats.BatchNorm_0.mean`).
        parameters: the names of the PyTorch parameters, as in `named_parameters()`: tied ones once.
        notes: what is not said by the table: tied weights, dtypes that differ, what was left out, and what differs
            between the layers but cannot be set on the flax side.
        net: the PyTorch model.
        layers: which layers are twins, by name: those with a rule, a recurrent one once for each of its cells.
    """

    links: tuple[Link, ...]
    parameters: tuple[str, ...]
    notes: tuple[str, ...]
    net: nn.Module = field(repr=False)
    torch: TorchSide = field(repr=False)
    flax: FlaxSide = field(repr=False)
    rows: tuple[_table.Row, ...] = field(repr=False)
    layers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return _table.table(self.rows, self.notes)

    __repr__ = __str__

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a Pair cannot be pickled: its links and its flax structure are functions; save the values "
            "(interop.save(path, net.state_dict())) and call interop.match(net, flax) again where they are needed"
        )

    def __copy__(self) -> Pair:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pair:
        return Pair(**{one.name: deepcopy(getattr(self, one.name), memo) for one in fields(self)})

    # --- values ---

    @outside_compilation
    def to_jax(self, source: nn.Module | Mapping[str, Any]) -> Tree:
        """The values of the PyTorch model as the flax side holds them.

        Args:
            source: the model, its state dict, or the dict of its parameters if flax holds nothing else.

        Returns:
            What `match` was given as, with the values of the source, in their dtypes: linen variables, the tree of
            parameters, or an `nnx.State` of the parameters and batch statistics, for `nnx.update(model, state)`.
            Copies; nothing is shared, and nothing is converted.

        Raises:
            ValueError: a missing or additional array; another shape; a dtype that neither the model nor the flax side
                has for it; values that the flax layer cannot hold (the bias that nnx's GRUCell has not).
            TypeError: a leaf that holds no values, or a traced one, or no array.
            RuntimeError: inside `torch.func` transformations, `torch.compile` or `jax.jit`.
        """
        where = "pair.to_jax"
        values = self._state(where, source)
        dtypes = {name: checked(where, _leaf(name), x) for name, x in values.items()}
        now = self._dtypes()
        for link in self.links:
            for name in link.torch:
                _check_shape(where, name, values[name], self.torch.forms[name].shape)
                wanted = [now[name], *(self.flax.forms[theirs].dtype for theirs in link.jax)]
                if dtypes[name] not in wanted or _category(dtypes[name]) != _category(wanted[-1]):
                    raise ValueError(
                        f"{where}: {_leaf(name)} is {dtypes[name]}, but {now[name]} in the PyTorch model and "
                        f"{wanted[-1]} on the flax side ({link.jax[-1]!r}); convert it explicitly, "
                        f"x.to(torch.{now[name]})"
                    )
                refuse_narrowing(where, _leaf(name), dtypes[name])
        new: dict[str, Any] = {}
        for link in self.links:
            sources = [arrays.to_host(values[name]) for name in link.torch]
            try:
                made = link.to_jax(*map(np.asarray, sources))
            except Mismatch as error:
                raise ValueError(f"{where}: {', '.join(map(repr, link.torch))}: {error}") from error
            new |= arrays.to_jax(dict(zip(link.jax, made, strict=True)))
        return self.flax.build(new)

    @outside_compilation
    def to_torch(self, source: Any) -> dict[str, Any]:
        """The values of the flax side as a state dict.

        Args:
            source: linen variables, a tree of parameters, an nnx module or an `nnx.State`: the leaves that `match` saw;
                or what `interop.load` read of them, by dotted names as well.

        Returns:
            A dict for `net.load_state_dict(...)`, with every name: tied arrays under all of theirs, and what flax does
            not hold (`num_batches_tracked`, arrays that `rename` left out) as it is in the model now.

        Raises:
            ValueError: a missing or additional leaf; another shape; a dtype other than the model's, into which
                `load_state_dict` would round it (flax's float32 statistics may go to a float64 model); leaves that are
                one tied array in PyTorch and have different values.
            TypeError: a leaf that holds no values, or a traced one, or no array.
            RuntimeError: inside `torch.func` transformations or `torch.compile`.
        """
        where = "pair.to_torch"
        values = self._leaves(where, source, self.flax.forms)
        now = self._dtypes()
        for link in self.links:
            for name in link.jax:
                for ours in link.torch:
                    have, wanted = form_of(values[name]).dtype, now[ours]
                    widened = have == self.flax.forms[name].dtype and np.can_cast(have, wanted, "safe")
                    if have != wanted and not (widened and _category(have) == _category(wanted)):
                        raise ValueError(
                            f"{where}: {_leaf(name)} is {have}, but {ours!r} of the PyTorch model is {wanted}; convert "
                            f"it explicitly, jax.tree.map(lambda x: x.astype(jnp.{wanted}), tree), or the model, "
                            f"net.to(torch.{have})"
                        )
        new: dict[str, Tensor] = {}
        for link in self.links:
            for name, x in self._to_torch(link, values).items():
                if name in new and not _same(new[name], x):
                    raise ValueError(
                        f"{where}: {name!r} is one tied array in PyTorch, but its leaves on the flax side "
                        f"({', '.join(map(repr, self._leaves_of(name)))}) have different values; make them equal first"
                    )
                new.setdefault(name, x)
        kept = self.net.state_dict()
        return {name: new[first] if first in new else deepcopy(kept[name]) for name, first in self.torch.first.items()}

    # --- what the optimizer has for each parameter ---

    @outside_compilation
    def parameters_to_jax(self, values: Mapping[str, Any]) -> Tree:
        """Arrays by the names of PyTorch's parameters, such as gradients, moments or masks, as flax's tree.

        Args:
            values: an array of the parameter's shape for each of `parameters` that has a twin; of any dtype.

        Returns:
            What an optimizer sees on the JAX side: like `variables["params"]`, or like `nnx.state(model, nnx.Param)`.

        Raises:
            ValueError: a missing or additional name; another shape; parameters that PyTorch has two of where flax has
                their sum, or one of where flax has two: they have gradients and moments of their own.
            TypeError: a leaf that holds no values, or a traced one, or no array.
        """
        where = "pair.parameters_to_jax"
        links = self._parameter_links(where)
        self._check_parameter_names(where, values, links)
        for link in links:
            for name in link.torch:
                _refuse_object(where, name, values[name])
                refuse_narrowing(where, _leaf(name), checked(where, _leaf(name), values[name]))
                _check_shape(where, name, values[name], self.torch.forms[name].shape)
        new: dict[str, Any] = {}
        for link in links:
            sources = [np.asarray(arrays.to_host(values[name])) for name in link.torch]
            new |= arrays.to_jax(dict(zip(link.jax, link.to_jax(*sources), strict=True)))
        return self.flax.build_params(new)

    @outside_compilation
    def parameters_to_torch(self, tree: Tree) -> dict[str, Tensor]:
        """The way back of `parameters_to_jax`.

        Args:
            tree: like `variables["params"]` or `nnx.state(model, nnx.Param)`; of any dtype.

        Returns:
            A tensor for each of `parameters` that has a twin, in their order.

        Raises:
            ValueError, TypeError: as in `parameters_to_jax`.
        """
        where = "pair.parameters_to_torch"
        links = self._parameter_links(where)
        forms = {name: form for name, form in self.flax.forms.items() if name in self.flax.trained}
        values = self._leaves(where, tree, forms)
        new = {name: x for link in links for name, x in self._to_torch(link, values).items()}
        return {name: new[name] for name in self.parameters if name in new}

    def spread(self, values: Mapping[str, Any]) -> Tree:
        """One object per PyTorch parameter, such as the name of its group, put on each of its leaves.

        Args:
            values: an object for each of `parameters` that has a twin.

        Returns:
            A tree as of `parameters_to_jax`, of these objects.

        Raises:
            ValueError: a missing or additional name; a leaf that is made of several parameters with different objects.
        """
        where = "pair.spread"
        links = [link for link in self.links if set(link.torch) <= self.torch.trained]
        self._check_parameter_names(where, values, links)
        new: dict[str, Any] = {}
        for link in links:
            for name in link.jax:
                given = {ours: values[ours] for ours in link.torch}
                first, *others = given.values()
                if name in new:
                    others.append(new[name])
                if any(other is not first and other != first for other in others):
                    text = ", ".join(f"{ours!r}: {value!r}" for ours, value in given.items())
                    raise ValueError(
                        f"{where}: the leaf {name!r} of the flax side is made of several parameters, which must agree; "
                        f"got {text}"
                    )
                new[name] = first
        self._check_trained(where, links)
        return self.flax.build_params(new)

    # --- penalties ---

    @outside_compilation
    def penalty_to_jax(self, penalty: funcreg.torch.Penalty) -> funcreg.jax.Penalty:
        """The penalty of the JAX wing that is to the flax parameters what this one is to PyTorch's.

        Strengths stay, selectors become the names of the twins (roles stay roles where they select the same), anchors
        and importances cross with their parameters, and groups keep their entries: `per` stays where it means the same,
        and is the `axis` that does elsewhere. Leaves that need different axes are parts of their own.

        Args:
            penalty: of `funcreg.torch`.

        Returns:
            A penalty of `funcreg.jax`, for the parameters of the flax side as linen, nnx or `to_jax` hold them.

        Raises:
            ValueError: a custom penalty; a selected parameter without a twin, or tied with two; a part of parameters
                that are one leaf there, or whose sum is; groups that no axes make there.
            TypeError: not a penalty of that wing; strengths or anchors that are traced; a selector function that reads
                more of a leaf than its name, shape and dtype.
        """
        from .penalties import penalty_to_jax

        return penalty_to_jax(self, penalty)

    @outside_compilation
    def penalty_to_torch(self, penalty: funcreg.jax.Penalty) -> funcreg.torch.Penalty:
        """The way back of `penalty_to_jax`, with the same conditions."""
        from .penalties import penalty_to_torch

        return penalty_to_torch(self, penalty)

    # --- optimizers ---

    @outside_compilation
    def optimizer_to_jax(
        self, optimizer: Optimizer, scheduler: Any = None, steps_per_epoch: int = 1
    ) -> tuple[optax.GradientTransformation, TorchOptimizerState]:
        """The same optimizer on the JAX side, mid-run: what it does next is what PyTorch would have done next.

        The transformation follows PyTorch's formulas, not those of optax's optimizer of the same name, which differ for
        most (eps, AMSGrad, dampening, NAdam, RAdam, Adagrad). Every parameter keeps its own step count, its group's
        hyper-parameters and its group's learning rate, which is in the state: `state._replace(learning_rate=...)`
        changes it.

        In float64, and with the same gradients, a parameter is within 16 units in the last place of the unbroken run
        after 20 steps; one that passes through 0 is so in units of the largest size that it had. In float32 it is
        within 16 units too. Most bits are equal; the square roots of PyTorch's library are not. There is one exception,
        `RMSprop(centered=True)`: the variance of a gradient that hardly changes is a small difference of two averages,
        and the step is divided by its root. A last place of a parameter becomes hundreds in 20 steps there, in PyTorch
        itself.

        What calls `tx.init` itself would start afresh, without the moments and counts. The state goes into it by

            optimizer = nnx.Optimizer(
                model, optax.GradientTransformation(lambda _: opt_state, tx.update), wrt=nnx.Param
            )
            state = TrainState.create(apply_fn=model.apply, params=params, tx=tx).replace(opt_state=opt_state)

        `fr.to_flat(opt_state)` and `fr.from_flat(tx.init(params), flat)` of `funcreg.jax` save and restore it by name,
        flax's `serialization.to_bytes(opt_state)` and `from_bytes(tx.init(params), data)` as msgpack; a new
        process makes its `tx` as the old one did, with the scheduler at the same step.

        A gradient of zero is a gradient: it decays the moments and counts. What `p.grad is None` is in PyTorch is None
        (or `optax.MaskedNode()`) in `updates` here: the leaf and its state stay as they are. Parameters in no group,
        and those with `requires_grad=False`, are never moved.

        A penalty that `fr.attach` has put on the optimizer crosses with it: every update ends with the same proximal
        step of the penalty that it has now.

        `foreach` and `fused` change nothing but the order of rounding. `differentiable` takes the powers of its float32
        step counts in float32, which is followed; `capturable` does so on accelerators, which is not. Half precision
        rounds where PyTorch's loops over single tensors do, which is not where `foreach` does.

        Args:
            optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adamax, Adadelta, NAdam or RAdam, over parameters of the
                pair's net.
            scheduler: of the learning rate: ConstantLR, LinearLR, ExponentialLR, PolynomialLR, StepLR, MultiStepLR,
                CosineAnnealingLR, CosineAnnealingWarmRestarts, SequentialLR, a ChainedScheduler of the first six; or a
                function `count -> learning rate`, or one rate for each group, that JAX can trace, `count` being the
                updates (epochs, with `steps_per_epoch`) from now on. A scheduler goes on from its own last step, with
                one `scheduler.step()` after every update. An optimizer that has had one (`'initial_lr'` in its groups)
                needs one here: `lambda count: 0.001` where the rate shall stay.
            steps_per_epoch: the scheduler is stepped after as many updates instead, an epoch; the optimizer must then
                stand at the end of one. The updates that the optimizer has counted must be as many epochs as the
                scheduler has (SGD counts none: there it is the caller's promise); for a scheduler that was made later
                than the state, pass `interop.optimizers.schedule_of(scheduler)` in its place.

        Returns:
            `(tx, opt_state)`. `tx.update` needs the parameters; `tx.init(params)` is a fresh state of the same
            structure, at the rates that the groups have now.

        Raises:
            TypeError: an optimizer or a scheduler without an exact twin, with the difference; complex parameters.
            ValueError: no scheduler where the optimizer has had one, or one at another step than the optimizer;
                parameters that are not the net's, or of which the JAX side has the sum (the two biases of an LSTM:
                leave the layer out of the optimizer); a state that is not whole, hooks around the step; a penalty on
                parameters of which the JAX side makes one array; float64 where JAX has x64 disabled; tensors as `lr`
                or `betas` that are narrower than the parameters, with which PyTorch computes in their dtype.
        """
        from .optimizers import optimizer_to_jax

        return optimizer_to_jax(self, optimizer, scheduler, steps_per_epoch)

    @outside_compilation
    def optimizer_to_torch(self, opt_state: Any, optimizer: Optimizer) -> None:
        """Write the state that a JAX run has reached into an optimizer of torch.optim, which goes on from there.

        The optimizer is made as for a new run, with the hyper-parameters of the JAX run, over the parameters of the
        pair's net; these are moved on their own (`net.load_state_dict(pair.to_torch(params))`). Nothing is written
        until everything has been checked. As `load_state_dict` does, it replaces the state of every parameter and the
        learning rate of every group (of a state of ours, and of `optax.inject_hyperparams` unless that rate is a
        schedule; others hold no rate).

        An attached penalty must be that of the run: its rules, options and strengths are compared, anchors and
        importances are not.

        A scheduler is made for the fresh optimizer and stepped as often as in the whole run so far, before this call,
        which writes the rate anew; for a state of ours `updates` is what the scheduler had done at the port, and
        `int(opt_state.count)`:

            optimizer.zero_grad()
            optimizer.step()  # does nothing without gradients, but PyTorch wants one before the scheduler's
            for _ in range(updates):
                scheduler.step()
            pair.optimizer_to_torch(opt_state, optimizer)

        A state of optax tells neither its hyper-parameters nor its schedule. The defaults differ: `weight_decay` is
        1e-4 in `optax.adamw` and 0.01 in `AdamW`; `optax.rmsprop` has `decay=0.9` and `eps_in_sqrt=True`, `RMSprop` has
        `alpha=0.99` and eps outside the root, so that it needs `eps_in_sqrt=False` there; `optax.adagrad` starts at 0.1
        with eps inside the root, `Adagrad` at 0 with eps outside, so that neither goes on as the other. An `eps_root`
        other than 0 and the `nesterov` of `optax.adam` have no counterpart in PyTorch. The states of `yogi`, `lamb` and
        `nadam` look like that of `adam`, that of `sign_sgd` like that of `sgd`. What `inject_hyperparams` holds is
        compared; that a rate was changed on the way, which `rmsprop` with momentum remembers, nothing tells.

        Args:
            opt_state: of `optimizer_to_jax`, also as `nnx.Optimizer` holds it, or in `optax.chain` with clipping and
                the like; or of optax where it means the same: `sgd`, `adam`, `adamw`, `adamax`, `adadelta`, and
                `rmsprop(..., eps_in_sqrt=False)`, with momentum at a constant learning rate. What is masked and
                remembers nothing, such as the decay of `adamw(mask=...)`, is a matter of the optimizer's groups.
            optimizer: made with the same hyper-parameters, which an optax state does not tell.

        Raises:
            TypeError: an optimizer without an exact twin, or an optax state that it cannot continue, with the
                difference.
            ValueError: hyper-parameters, groups, shapes or dtypes that differ; leaves of one parameter at different
                steps; a state of optax with a schedule, and no scheduler.
        """
        from .optimizers import optimizer_to_torch

        optimizer_to_torch(self, opt_state, optimizer)

    @outside_compilation
    def opt_state_to_jax(self, state: Any) -> Any:
        """A state of the functional optimizers of `funcreg.torch` as that of `funcreg.jax` and optax, in the same run.

        `prox_sgd`, `prox_adam`, `add_penalty_gradient`, everything of `funcreg.torch.optax`, in chains as well, and the
        `TrainState` of `train_step` with parameters, state and extra. Trees like the parameters are carried across by
        the pair, counts as they are. The transformation on the other side is made with the same arguments, and with
        `pair.penalty_to_jax(penalty)`.

        Args:
            state: the state; the keys of its trees are the names of the net's parameters (`fr.params(net)`). The
                `extra` of a `TrainState` is empty, or the dict of the net's buffers; it becomes the collections beside
                `params`, or the part of the `nnx.State` that is no Param.

        Raises:
            TypeError: a state without a twin.
            ValueError: trees that are not like the parameters of the pair; float64 where JAX has x64 disabled.
        """
        from .optimizers import opt_state_to_jax

        return opt_state_to_jax(self, state)

    @outside_compilation
    def opt_state_to_torch(self, state: Any) -> Any:
        """The way back of `opt_state_to_jax`; trees like the parameters become dicts by PyTorch's names.

        Args:
            state: the state; the `extra` of a `TrainState` is empty, or what `opt_state_to_jax` makes of buffers.

        Raises:
            TypeError: a state without a twin.
            ValueError: trees that are not like the parameters of the pair.
        """
        from .optimizers import opt_state_to_torch

        return opt_state_to_torch(self, state)

    # --- plumbing ---

    def _dtypes(self) -> dict[str, np.dtype[Any]]:
        """Of the PyTorch model's arrays as they are now: it may have been converted since it was matched."""
        state = self.net.state_dict()
        return {
            name: form_of(state[name]).dtype if name in state else form.dtype for name, form in self.torch.forms.items()
        }

    def _leaves_of(self, name: str) -> list[str]:
        """The leaves of the flax side that a PyTorch array goes to."""
        return [leaf for link in self.links if name in link.torch for leaf in link.jax]

    def _state(self, where: str, source: Any) -> dict[str, Any]:
        """The arrays that the links need, by first name; every other name must be known."""
        if isinstance(source, nn.Module):
            source = source.state_dict()
        if not isinstance(source, Mapping):
            raise TypeError(
                f"{where}: source must be the nn.Module, its state dict or a dict of parameters, got "
                f"{type(source).__name__}"
            )
        values: dict[str, Any] = {}
        for name, x in source.items():
            first = self.torch.first.get(name)
            if first is None:
                raise ValueError(
                    f"{where}: the source has {name!r}, which the model that was matched has not; nearest names: "
                    f"{nearest(str(name), list(self.torch.first))}"
                )
            if first in values and values[first] is not x and not _same(values[first], x):
                raise ValueError(
                    f"{where}: {name!r} and {first!r} are one tied array, but have different values in the source"
                )
            values[first] = x
        needed = [name for link in self.links for name in link.torch]
        missing = [name for name in dict.fromkeys(needed) if name not in values]
        if missing:
            raise ValueError(
                f"{where}: the source lacks {_some(missing)}; pass the model or its whole state dict (for gradients "
                "and the like: pair.parameters_to_jax)"
            )
        for name in needed:
            _refuse_object(where, name, values[name])
        return {name: values[name] for name in needed}

    def _leaves(self, where: str, source: Any, forms: Mapping[str, Form]) -> dict[str, Any]:
        """The leaves of a tree of the flax side, which must be those of `forms`."""
        leaves = _flax.read(where, _nested(source)).leaves
        missing = [name for name in forms if name not in leaves]
        more = [name for name in leaves if name not in forms]
        if missing:
            raise ValueError(
                f"{where}: the source lacks {_some(missing)}; nearest names: {nearest(missing[0], list(leaves))}"
            )
        if more:
            raise ValueError(
                f"{where}: the source has {_some(more)}, which the flax side that was matched has not; nearest names: "
                f"{nearest(more[0], list(forms))}"
            )
        values = {name: leaves[name].value for name in forms}
        for name, x in values.items():
            if isinstance(x, jax.ShapeDtypeStruct):
                raise TypeError(f"{where}: {_leaf(name)} is a ShapeDtypeStruct, which has a shape but no values")
            checked(where, _leaf(name), x)
            _check_shape(where, name, x, forms[name].shape)
        return values

    def _to_torch(self, link: Link, values: Mapping[str, Any]) -> dict[str, Tensor]:
        sources = [np.asarray(jax.device_get(values[name])) for name in link.jax]
        return arrays.to_torch(dict(zip(link.torch, link.to_torch(*sources), strict=True)))

    def _parameter_links(self, where: str) -> list[Link]:
        """The links of parameters, refused where a parameter has no place of its own on the other side."""
        links = [link for link in self.links if set(link.torch) & self.torch.trained]
        seen: set[str] = set()
        for link in links:
            if link.sums:
                raise ValueError(
                    f"{where}: {link.sums}: parameters that are added up have gradients and moments of their own, "
                    "which one leaf cannot hold; only values cross (pair.to_jax)"
                )
            for name in link.torch:
                if name in seen:
                    raise ValueError(
                        f"{where}: {name!r} is tied in PyTorch and has two leaves on the flax side "
                        f"({', '.join(map(repr, self._leaves_of(name)))}), with gradients and moments of their own; "
                        "only values cross (pair.to_jax), unless the flax model ties them too"
                    )
            seen.update(link.torch)
        self._check_trained(where, links)
        return links

    def _check_trained(self, where: str, links: list[Link]) -> None:
        """Refuse what one side trains and the other does not."""
        for link in links:
            for name in link.torch:
                if name not in self.torch.trained or not self.flax.trained.issuperset(link.jax):
                    raise ValueError(
                        f"{where}: {name!r} and {', '.join(map(repr, link.jax))} are linked, but only one side trains "
                        "them (a parameter here, a buffer or another collection there)"
                    )
        fed = {name for link in links for name in link.jax}
        for name in self.flax.forms:
            if name in self.flax.trained and name not in fed:
                raise ValueError(f"{where}: the leaf {name!r} is a parameter of the flax side, but a buffer in PyTorch")

    def _check_parameter_names(self, where: str, values: Mapping[str, Any], links: list[Link]) -> None:
        if not isinstance(values, Mapping):
            raise TypeError(f"{where}: values must be a dict by parameter name, got {type(values).__name__}")
        missing = [name for link in links for name in link.torch if name not in values]
        more = [name for name in values if name not in self.parameters]
        if missing:
            raise ValueError(f"{where}: values lack {_some(missing)}, which every parameter with a twin must have")
        if more:
            raise ValueError(
                f"{where}: values have {_some(more)}, which is no parameter (tied ones have their first name); nearest "
                f"names: {nearest(str(more[0]), self.parameters)}"
            )


def _nested(source: Any) -> Any:
    """Nested dicts of a flat one with dotted names, as safetensors holds it; anything else as it is."""
    names = source if type(source) is dict and all(isinstance(name, str) for name in source) else ()
    if not any("." in name for name in names):
        return source
    nested: dict[str, Any] = {}
    for name, x in source.items():
        *above, own = name.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"pair: the source has {name!r} and, as an array, what its name begins with")
        if own in node:
            raise ValueError(f"pair: the source has {name!r} and names that begin with it; an array holds no others")
        node[own] = x
    return nested


def _leaf(name: str) -> str:
    return f"the leaf {name!r}"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _refuse_object(where: str, name: str, x: Any) -> None:
    if not isinstance(x, (Tensor, jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"{where}: {_leaf(name)} is a {type(x).__module__}.{type(x).__name__}, not an array")


def _category(dtype: np.dtype[Any]) -> str:
    """Bool, integers, floats or complex numbers; ml_dtypes' floats are of NumPy's kind V."""
    return {"b": "bool", "i": "integer", "u": "integer", "c": "complex"}.get(dtype.kind, "float")


def _check_shape(where: str, name: str, x: Any, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        more = len(x.shape) > len(shape) and tuple(x.shape[len(x.shape) - len(shape) :]) == shape
        remedy = "; leading axes do not cross: take the members apart first (fr.unstack)" if more else ""
        raise ValueError(f"{where}: {_leaf(name)} has the shape {tuple(x.shape)}, must be {shape}{remedy}")


def _same(a: Any, b: Any) -> bool:
    """Equal values, NaN being equal to itself."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        a, b = np.asarray(arrays.to_host(a)), np.asarray(arrays.to_host(b))
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def form_of(x: Any) -> Form:
    """Shape and NumPy dtype of an array of either side, in native byte order."""
    if isinstance(x, torch.Tensor):
        dtype = TO_NUMPY.get(x.dtype, np.dtype(object))
    else:
        dtype = np.dtype(x.dtype).newbyteorder("=")
    return Form(tuple(x.shape), dtype)

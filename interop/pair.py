"""Pair: which arrays of a PyTorch model are which of a flax one, and everything that crosses by it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import torch
from torch import Tensor, nn

from funcreg._selectors import nearest

from . import _flax, _table, arrays
from ._layouts import Mismatch
from ._refusals import TO_NUMPY, checked, refuse_narrowing
from .links import Link

if TYPE_CHECKING:
    import optax
    from torch.optim import Optimizer

    import funcreg.jax
    import funcreg.torch

    from .optimizers import TorchOptimizerState

Tree = Any


def outside_compilation(method: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(fullgraph=True)` gets an error; without fullgraph it leaves the graph here, and all is well."""

    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{method.__name__}: called inside torch.compile, which cannot follow values out; call it outside"
            )
        if "torch._dynamo" in sys.modules:  # else nobody compiles, and importing it takes seconds
            return torch.compiler.disable(method)(*args, **options)
        return method(*args, **options)

    return call


class Form(NamedTuple):
    """What an array of a side must look like."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class TorchSide(NamedTuple):
    """What a pair knows of its PyTorch model.

    Attributes:
        forms: of every array of the state dict, in its order.
        first: for every name of it the first name of the same array: tied arrays have several.
        kept: what has no twin in flax, by name, as it was when the pair was made.
        trained: the first names of the parameters.
    """

    forms: Mapping[str, Form]
    first: Mapping[str, str]
    kept: Mapping[str, Any]
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
    """

    links: tuple[Link, ...]
    parameters: tuple[str, ...]
    notes: tuple[str, ...]
    net: nn.Module = field(repr=False)
    torch: TorchSide = field(repr=False)
    flax: FlaxSide = field(repr=False)
    rows: tuple[_table.Row, ...] = field(repr=False)

    def __str__(self) -> str:
        return _table.table(self.rows, self.notes)

    __repr__ = __str__

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
            not hold (`num_batches_tracked`, arrays that `rename` left out) as it was when the pair was made.

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
                    have, wanted = values[name].dtype, now[ours]
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
        state = {}
        for name, first in self.torch.first.items():
            kept = self.torch.kept.get(first)
            state[name] = new[first] if first in new else kept.clone() if isinstance(kept, Tensor) else kept
        return state

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
            TypeError: not a penalty of that wing; strengths or anchors that are traced.
        """
        from .penalties import penalty_to_jax

        return penalty_to_jax(self, penalty)

    def penalty_to_torch(self, penalty: funcreg.jax.Penalty) -> funcreg.torch.Penalty:
        """The way back of `penalty_to_jax`, with the same conditions."""
        from .penalties import penalty_to_torch

        return penalty_to_torch(self, penalty)

    # --- optimizers ---

    def optimizer_to_jax(
        self, optimizer: Optimizer, scheduler: Any = None, steps_per_epoch: int = 1
    ) -> tuple[optax.GradientTransformation, TorchOptimizerState]:
        """`optimizers.optimizer_to_jax` of this pair: the transformation and its state, mid-run."""
        from .optimizers import optimizer_to_jax

        return optimizer_to_jax(self, optimizer, scheduler, steps_per_epoch)

    def optimizer_to_torch(self, opt_state: Any, optimizer: Optimizer) -> None:
        """`optimizers.optimizer_to_torch` of this pair: a state is written into an optimizer of torch.optim."""
        from .optimizers import optimizer_to_torch

        optimizer_to_torch(self, opt_state, optimizer)

    def opt_state_to_jax(self, state: Any) -> Any:
        """`optimizers.opt_state_to_jax` of this pair: states of `funcreg.torch`, a `TrainState` as well."""
        from .optimizers import opt_state_to_jax

        return opt_state_to_jax(self, state)

    def opt_state_to_torch(self, state: Any) -> Any:
        """`optimizers.opt_state_to_torch` of this pair: states of `funcreg.jax` and optax, a `TrainState` as well."""
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
    if type(source) is not dict or not any("." in name for name in source if isinstance(name, str)):
        return source
    nested: dict[str, Any] = {}
    for name, x in source.items():
        *above, own = name.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
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
    """Shape and NumPy dtype of an array of either side."""
    dtype = TO_NUMPY.get(x.dtype, np.dtype(object)) if isinstance(x, torch.Tensor) else np.dtype(x.dtype)
    return Form(tuple(x.shape), dtype)

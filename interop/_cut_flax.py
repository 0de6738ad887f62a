"""The flax side of `locate`: linen and nnx models called as functions of their arrays, cut at their layers.

A layer is recognized by its path: linen tells it to `intercept_methods`; of nnx modules it is written on each of them,
in a copy of the model, so that it survives what `nnx.jit` does to their identity, and `__call__` of their classes is
replaced for as long as the model runs.

NOTE [hidden layers]: the models run operation by operation, as they are written: what JAX compiles for one operation
serves all layers of these shapes, and the next call of `locate`. A layer that is called inside `jax.jit`, `vmap`,
`scan` or `checkpoint` of the model's own is hidden. A model of which too few calls are seen runs under
`jax.disable_jit`, which opens all of these but `vmap` and `checkpoint`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import DenyList
from jax.core import Tracer

from ._cuts import Arrays, Hook, named_outputs
from ._sides import JaxSide
from ._twins import Group

Function = Callable[..., Any]
SIDE = JaxSide("locate", None)
_PATH = "_interop_path"
_RECURRENT = ("RNN", "Bidirectional")


class Model:
    """A flax model as a function of its arrays.

    Args:
        module: a linen or an nnx module.
        call: (module, *inputs) -> the result.
        build: leaves by name -> linen variables.

    Attributes:
        opened: whether it runs under `jax.disable_jit`; NOTE [hidden layers].
    """

    def __init__(self, module: Any, call: Function, build: Function) -> None:
        self.module, self.call, self.build = module, call, build
        self.opened = False
        if isinstance(module, nnx.Module):
            copied = nnx.clone(module)
            for path, child in _modules(copied):
                setattr(child, _PATH, path)
                _release(child)
            self.graph, self.state = nnx.split(copied)
            self.classes = {type(child) for _, child in _modules(copied)}

    def run(
        self, leaves: Arrays, inputs: Sequence[Any], groups: Sequence[Group], hook: Hook, given: Arrays | None = None
    ) -> tuple[Arrays, Arrays]:
        """The arrays of the result, and the leaves afterwards, which batch statistics have changed.

        Args:
            leaves: by name.
            inputs: of the model.
            groups: the layers.
            hook: what their calls go through.
            given: all arrays that the function which is being traced was called with.
        """
        layers = _Layers(groups, hook, {id(x._trace) for x in (given or {}).values() if isinstance(x, Tracer)})
        if isinstance(self.module, linen.Module):
            collections = DenyList("params")
            with linen.intercept_methods(layers.of_linen):
                out, after = linen.apply(self.call, self.module, mutable=collections)(self.build(leaves), *inputs)
            state = _flat(after)
        else:
            new = [
                (path, x.replace(leaves.get(".".join(map(str, path)), x.get_value())))
                for path, x in nnx.to_flat_state(self.state)
            ]
            module = nnx.merge(self.graph, nnx.from_flat_state(new))
            with layers.patched(self.classes):
                out = self.call(module, *inputs)
            state = {
                ".".join(map(str, path)): x.get_value()
                for path, x in nnx.to_flat_state(nnx.state(module))
                if not isinstance(x, nnx.RngState)
            }
        return named_outputs(SIDE.where, out), state

    @contextmanager
    def precision(self, bits: int) -> Iterator[None]:
        with SIDE.precision(bits), jax.disable_jit(self.opened):
            yield


def _release(module: nnx.Module) -> None:
    """Lets a layer compute in float64 that flax keeps from it whatever its parameters are.

    `nnx.Embed` keeps the precision its parameters had when it was made; attention without dropout is JAX's own, whose
    softmax is always in float32.
    """
    if isinstance(module, nnx.Embed) and module.dtype == module.param_dtype == jnp.float32:
        module.dtype = None
    if isinstance(module, nnx.MultiHeadAttention) and module.attention_fn is nnx.dot_product_attention:
        module.attention_fn = _attention


def _attention(*args: Any, **options: Any) -> Any:
    """`nnx.dot_product_attention` written out, as flax does it where there is a rate of dropout; it drops nothing."""
    if options.get("dropout_rate", 0.0) == 0.0:
        options |= {"dropout_rate": 0.5, "deterministic": True}
    return nnx.dot_product_attention(*args, **options)


class _Layers:
    """Sends calls of layers through a hook.

    Args:
        groups: the layers.
        hook: what they go through.
        traces: those that the run belongs to; arrays of others are of a program of their own, such as the body of a
            loop. NOTE [hidden layers].
    """

    def __init__(self, groups: Sequence[Group], hook: Hook, traces: set[int]) -> None:
        self.hook, self.traces = hook, traces
        self.layers = {path: group for group in groups for path in group.flax}
        self.inside = False
        self.calls: dict[Group, int] = {}
        self.tokens: dict[Group, Any] = {}

    def of_linen(self, next_fun: Function, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        return self.called(context.module, lambda x: ".".join(x.path), next_fun, args, kwargs)

    @contextmanager
    def patched(self, classes: set[type]) -> Iterator[None]:
        """`__call__` of these classes goes through the hook."""

        def wrapped(original: Function) -> Function:
            def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    return original(module, *args, **kwargs)

                return self.called(module, lambda x: getattr(x, _PATH, None), call, args, kwargs)

            __call__.__wrapped__ = original  # its signature is looked at
            return __call__

        originals = {
            kind: next(vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base))
            for kind in classes
            if any("__call__" in vars(base) for base in kind.__mro__)
        }
        inherited = {kind for kind in originals if "__call__" not in vars(kind)}
        try:
            for kind, original in originals.items():
                kind.__call__ = wrapped(original)
            yield
        finally:
            for kind, original in originals.items():
                if kind in inherited:
                    del kind.__call__
                else:
                    kind.__call__ = original

    def called(self, module: Any, path_of: Function, call: Function, args: Any, kwargs: Any) -> Any:
        group, path = self._group(module, path_of)
        if group is None or self.inside or self._elsewhere((args, kwargs)):
            return call(*args, **kwargs)
        n = self.calls[group] = self.calls.get(group, -1) + 1
        convention = group.theirs
        if n % group.span == 0:
            given = convention.given(module, args, kwargs)
            self.tokens[group], new = self.hook.enter(group, path, given)
            args, kwargs = convention.replaced(module, args, kwargs, new)
        self.inside = True
        try:
            out = call(*args, **kwargs)
        finally:
            self.inside = False
        if n % group.span == group.span - 1:
            out = convention.with_result(out, self.hook.leave(self.tokens[group], convention.result(out)))
        return out

    def _group(self, module: Any, path_of: Function) -> tuple[Group | None, str]:
        path = path_of(module)
        kinds = [kind.__name__ for kind in type(module).__mro__]
        recurrent = any(kind in kinds for kind in _RECURRENT)
        found = self.layers.get(path)
        if found is not None:
            return (found, path) if recurrent or not found.recurrent else (None, "")
        if recurrent:
            halves = [module] if hasattr(module, "cell") else [module.forward_rnn, module.backward_rnn]
            cells = [path_of(half.cell) for half in halves]
            group = self.layers.get(cells[0])
            if group is not None and group.recurrent:
                return group, path
        return None, ""

    def _elsewhere(self, arguments: Any) -> bool:
        return any(id(x._trace) not in self.traces for x in jax.tree.leaves(arguments) if isinstance(x, Tracer))


def _modules(module: Any) -> Iterator[tuple[str, Any]]:
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            yield ".".join(map(str, path)), node


def _flat(collections: Mapping[str, Any]) -> Arrays:
    found: Arrays = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, Mapping):
            for part, child in node.items():
                walk(child, f"{name}.{part}" if name else str(part))
        else:
            found[name] = node

    walk(collections, "")
    return found


def given(tree: Any, bits: int, draw: int | None = None) -> Any:
    """NumPy arrays as JAX's in this precision."""
    return SIDE.given(tree, bits, draw)


def with_gradients(
    function: Callable[[Arrays], Arrays], arguments: Arrays, cotangents: Arrays
) -> tuple[Arrays, Arrays]:
    """The results of a function of named arrays, and the gradients of all real arguments; 0 without a cotangent."""
    floats = {name: x for name, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def of_floats(values: Arrays) -> tuple[Arrays, Arrays]:
        results = {name: jnp.asarray(x) for name, x in function({**arguments, **values}).items()}
        real = {name: x for name, x in results.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        return real, {name: x for name, x in results.items() if name not in real}

    real, pull, rest = jax.vjp(of_floats, floats, has_aux=True)
    seeds = {
        name: cotangents[name].astype(x.dtype) if _fits(cotangents.get(name), x) else jnp.zeros_like(x)
        for name, x in real.items()
    }
    return _numpy({**real, **rest}), _numpy(pull(seeds)[0])


def _fits(cotangent: Any, x: Any) -> bool:
    return cotangent is not None and cotangent.shape == x.shape


def _numpy(tree: Arrays) -> Arrays:
    return {name: np.array(x) for name, x in tree.items()}

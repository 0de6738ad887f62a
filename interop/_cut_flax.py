"""The flax side of `locate`: linen and nnx models called as functions of their arrays, cut at their layers.

Everything runs without `jax.jit` (`jax.disable_jit`), inside which values cannot be seen. A layer is recognized by its
path: linen tells it to `intercept_methods`; of nnx modules it is written on each of them, in a copy of the model, so
that it survives what `nnx.jit` does to their identity, and `__call__` of their classes is replaced for as long as the
model runs.
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

from ._coarse import Seen as Coarse
from ._coarse import of_jax
from ._cuts import INPUT, PARAM, Arrays, Hook, key, named_outputs
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
    """

    def __init__(self, module: Any, call: Function, build: Function) -> None:
        self.module, self.call, self.build = module, call, build
        if isinstance(module, nnx.Module):
            copied = nnx.clone(module)
            for path, child in _modules(copied):
                setattr(child, _PATH, path)
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
            given: if it is being differentiated, with respect to which arrays.
        """
        traced = (type(x) for x in (given or {}).values() if isinstance(x, Tracer))
        layers = _Layers(groups, hook, next(traced, None))
        if isinstance(self.module, linen.Module):
            collections = DenyList("params")
            with linen.intercept_methods(layers.of_linen):
                out, after = linen.apply(self.call, self.module, mutable=collections)(self.build(leaves), *inputs)
            state = _flat(after)
        else:
            new = [
                (path, x.replace(leaves[name]) if (name := ".".join(map(str, path))) in leaves else x)
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


class _Layers:
    """Sends calls of layers through a hook.

    Args:
        groups: the layers.
        hook: what they go through.
        traced: the class of arrays that are being differentiated; other tracers are of a program of their own, such as
            the body of a loop, which is only looked at.
    """

    def __init__(self, groups: Sequence[Group], hook: Hook, traced: Any) -> None:
        self.hook, self.traced = hook, traced
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
        own = {kind: vars(kind).get("__call__") for kind in classes if callable(getattr(kind, "__call__", None))}

        def wrapper(original: Function) -> Function:
            def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    return original(module, *args, **kwargs)

                return self.called(module, lambda x: getattr(x, _PATH, None), call, args, kwargs)

            __call__.__wrapped__ = original  # its signature is looked at
            return __call__

        for kind in own:
            own[kind] = (own[kind], wrapper(getattr(kind, "__call__")))  # noqa: B004
        try:
            for kind, (_, new) in own.items():
                kind.__call__ = new
            yield
        finally:
            for kind, (old, _) in own.items():
                if old is None:
                    del kind.__call__
                else:
                    kind.__call__ = old

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
        tracers = [x for x in jax.tree.leaves(arguments) if isinstance(x, Tracer)]
        return any(type(x) is not self.traced for x in tracers)


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


@contextmanager
def in_precision(bits: int) -> Iterator[None]:
    with SIDE.precision(bits), jax.disable_jit():
        yield


def differentiated(
    function: Callable[[Arrays], Arrays], arguments: Arrays, cotangents: Arrays, watched: bool = False
) -> tuple[Arrays, Arrays, Coarse]:
    """The results of a function of named arrays and their gradients, zero where no cotangent is given."""
    floats = {name: x for name, x in arguments.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    others = {name: x for name, x in arguments.items() if name not in floats}

    def of_floats(values: Arrays) -> tuple[Arrays, Arrays]:
        results = {name: jnp.asarray(x) for name, x in function({**others, **values}).items()}
        real = {name: x for name, x in results.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        return real, {name: x for name, x in results.items() if name not in real}

    real, pull, rest = jax.vjp(of_floats, floats, has_aux=True)
    seeds = {
        name: cotangents[name].astype(x.dtype) if _fits(cotangents.get(name), x) else jnp.zeros_like(x)
        for name, x in real.items()
    }
    (pulled,) = pull(seeds)
    coarse = of_jax(lambda values: of_floats(values)[0], (floats,)) if watched else {}
    return _numpy({**real, **rest}), _numpy(pulled), coarse


def _fits(cotangent: Any, x: Any) -> bool:
    return cotangent is not None and cotangent.shape == x.shape


def _numpy(tree: Arrays) -> Arrays:
    return {name: np.array(x) for name, x in tree.items()}


def arguments(leaves: Arrays, inputs: Sequence[Any], values: Arrays) -> Arrays:
    """All arrays of a cut model in one dict; inputs that are no arrays stay out."""
    named = {key(PARAM, name): x for name, x in leaves.items()}
    return named | {key(INPUT, i): x for i, x in enumerate(inputs) if isinstance(x, jax.Array)} | values

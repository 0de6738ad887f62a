"""How twin layers are called: which of their arguments and results hold the same thing.

A `Convention` names the arrays of a call ("input", "query", "mask", ...) and puts others in their place. The two sides
of a layer have a convention each, with the same names.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
MASK = "mask"


def is_array(x: Any) -> bool:
    return isinstance(x, (Tensor, jax.Array, np.ndarray))


class Convention:
    """Of a layer that is called with arrays and returns one, perhaps beside others.

    The arguments are "input", "input 2" and so on, in their order; of the result the first array counts.
    """

    def given(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrays:
        """The arrays that the layer is called with."""
        return {name: holder[key] for name, (holder, key) in _named(args, kwargs)}

    def replaced(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: Arrays) -> Arguments:
        """The same arguments with these arrays instead."""
        changed_args, changed_kwargs = list(args), dict(kwargs)
        for name, (holder, key) in _named(args, kwargs):
            if name in new and holder is args:
                changed_args[key] = new[name]
            elif name in new:
                changed_kwargs[key] = new[name]
        return tuple(changed_args), changed_kwargs

    def result(self, out: Any) -> Any:
        """The array that the layer is there for, or None."""
        if is_array(out):
            return out
        children = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
        return next((x for child in children if (x := self.result(child)) is not None), None)

    def with_result(self, out: Any, new: Any) -> Any:
        """What the layer returned with another such array."""
        old = self.result(out)

        def swapped(node: Any) -> Any:
            if node is old:
                return new
            if isinstance(node, dict):
                return {key: swapped(child) for key, child in node.items()}
            if type(node) in (list, tuple):
                return type(node)(map(swapped, node))
            return node

        return swapped(out)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    spots = [(args, i) for i, x in enumerate(args) if is_array(x)]
    spots += [(kwargs, key) for key, x in kwargs.items() if is_array(x)]
    for n, spot in enumerate(spots, start=1):
        yield "input" if n == 1 else f"input {n}", spot


class Single(Convention):
    """Of a layer that reads one array; what else flax's is given (`use_running_average`) is no array to compare."""

    def given(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrays:
        return dict(list(super().given(module, args, kwargs).items())[:1])


class RecurrentInFlax(Single):
    """Of `RNN` and `Bidirectional`: with `return_carry` the outputs are the second part of the result."""

    def result(self, out: Any) -> Any:
        return super().result(out[1] if type(out) is tuple else out)

    def with_result(self, out: Any, new: Any) -> Any:
        return (out[0], new) if type(out) is tuple else super().with_result(out, new)


class CellInTorch(Convention):
    """`cell(x, h) -> h` and `cell(x, (h, c)) -> (h, c)`; a state that is left out is zero."""

    def given(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrays:
        x, state = _bound(module.forward, args, kwargs, "input", "hx")
        return {"input": x, **dict(zip(("state", "memory"), _parts(state), strict=False))}

    def replaced(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: Arrays) -> Arguments:
        x, state = _bound(module.forward, args, kwargs, "input", "hx")
        parts = [new.get(name, x) for name, x in zip(("state", "memory"), _parts(state), strict=False)]
        state = tuple(parts) if isinstance(state, (tuple, list)) else parts[0] if parts else None
        return (new.get("input", x), state), {}


class CellInFlax(Convention):
    """`cell(h, x) -> (h, h)` and `cell((c, h), x) -> ((c, h), h)`."""

    def given(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrays:
        state, x = args
        return {"input": x, **dict(zip(("state", "memory"), _parts(state)[::-1], strict=False))}

    def replaced(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: Arrays) -> Arguments:
        state, x = args
        parts = [new.get(name, x) for name, x in zip(("state", "memory"), _parts(state)[::-1], strict=False)]
        return (tuple(parts[::-1]) if isinstance(state, tuple) else parts[0], new.get("input", x)), kwargs

    def result(self, out: Any) -> Any:
        return out[1]

    def with_result(self, out: Any, new: Any) -> Any:
        state, _ = out
        return ((state[0], new) if isinstance(state, tuple) else new), new


class AttentionInTorch(Convention):
    """`nn.MultiheadAttention`; its masks of bools, in which True hides, become one in which True keeps."""

    def given(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrays:
        q, k, v, attn, padding = _bound(
            module.forward, args, kwargs, "query", "key", "value", "attn_mask", "key_padding_mask"
        )
        arrays = {"query": q, "key": k, "value": v}
        return arrays | _keep(module, q, k, attn, padding)

    def replaced(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: Arrays) -> Arguments:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.arguments |= {name: new[name] for name in ("query", "key", "value") if name in new}
        return bound.args, bound.kwargs


def _keep(module: Any, q: Tensor, k: Tensor, attn: Tensor | None, padding: Tensor | None) -> Arrays:
    """The mask (batch, heads, queries, keys); none where numbers are added to the scores, or nothing is batched."""
    if q.ndim != 3:
        return {}
    batch_first, heads = module.batch_first, module.num_heads
    n = q.shape[0 if batch_first else 1]
    rows, columns = (x.shape[1 if batch_first else 0] for x in (q, k))
    keep = torch.ones(n, heads, rows, columns, dtype=torch.bool, device=q.device)
    for mask, shape in ((attn, (-1, heads, rows, columns)), (padding, (n, 1, 1, columns))):
        if mask is None:
            continue
        hidden = mask if mask.dtype == torch.bool else torch.isneginf(mask)
        if mask.dtype != torch.bool and bool((mask[~hidden] != 0).any()):
            return {}
        keep = keep & ~(hidden if mask.ndim == 2 and mask is attn else hidden.reshape(shape))
    return {MASK: keep}


class AttentionInFlax(Convention):
    """flax's multi-head attention; in its mask, which is broadcast, True keeps."""

    def given(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrays:
        q, k, v, mask = self._arguments(module, args, kwargs)
        arrays = {"query": q, "key": k, "value": v}
        if q.ndim == 3:
            shape = (q.shape[0], module.num_heads, q.shape[1], k.shape[1])
            arrays[MASK] = jnp.broadcast_to(True if mask is None else jnp.asarray(mask).astype(bool), shape)
        return arrays

    def replaced(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], new: Arrays) -> Arguments:
        q, k, v, mask = self._arguments(module, args, kwargs)
        others = {
            name: x
            for name, x in inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments.items()
            if name not in ("self", "inputs_q", "inputs_k", "inputs_v", "inputs_kv", MASK)
        }
        arrays = [new.get(name, x) for name, x in (("query", q), ("key", k), ("value", v))]
        return tuple(arrays), {**others, MASK: new.get(MASK, mask)}

    @staticmethod
    def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        bound = inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments
        q, both = bound["inputs_q"], bound.get("inputs_kv")
        k = next((x for x in (bound.get("inputs_k"), both) if x is not None), q)
        v = next((x for x in (bound.get("inputs_v"), both) if x is not None), k)
        return [q, k, v, bound.get(MASK)]


def conventions(module: nn.Module) -> tuple[Convention, Convention]:
    """That of a PyTorch layer and that of its flax twin."""
    if isinstance(module, nn.MultiheadAttention):
        return AttentionInTorch(), AttentionInFlax()
    if isinstance(module, nn.RNNCellBase):
        return CellInTorch(), CellInFlax()
    if isinstance(module, nn.RNNBase):
        return Single(), RecurrentInFlax()
    if type(module).__module__.startswith("torch.nn.modules"):
        return Single(), Single()
    return Convention(), Convention()


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    return [arguments.get(name) for name in names]


def _parts(state: Any) -> list[Any]:
    return list(state) if isinstance(state, (tuple, list)) else [] if state is None else [state]

"""Trees of parameters inside inputs and results, carried across by a pair."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from funcreg._selectors import nearest

from . import arrays
from .links import Link
from .pair import Pair

Arrays = dict[str, np.ndarray]


class Carrier:
    """Finds the dicts that hold what a pair pairs, by their keys, and carries them to the JAX side.

    Two kinds: a dict of all parameters that have a twin (parameters, gradients, moments), which becomes the bare tree
    that an optimizer sees; and a dict of the whole state (buffers and tied names as well), which becomes what `match`
    was given. Where a model has nothing but parameters, it is the first.
    """

    def __init__(self, pair: Pair) -> None:
        if not isinstance(pair, Pair):
            raise TypeError(f"pair must be what interop.match returns, got {type(pair).__name__}")
        self.pair = pair
        linked = {name for link in pair.links for name in link.torch}
        self.parameters = [name for name in pair.parameters if name in linked]
        self.known = {*pair.torch.first, *pair.parameters}

    def is_known(self, where: str, node: Any) -> bool:
        """Whether it is such a dict; one with only some of the names is refused."""
        if not isinstance(node, Mapping) or not any(name in self.known for name in node):
            return False
        if self._is_parameters(node) or set(node) == set(self.pair.torch.first):
            return True
        missing = [name for name in self.parameters if name not in node]
        more = [name for name in node if name not in self.known]
        what = f"lacks {missing[0]!r}" if missing else f"has {more[0]!r}" if more else "lacks some of the buffers"
        near = f"; nearest names: {nearest(str(more[0]), self.parameters)}" if more and not missing else ""
        raise ValueError(
            f"{where}: a dict has names of the pair's PyTorch model, but {what}{near}; it must hold either all "
            "parameters (dict(net.named_parameters())) or the whole state (net.state_dict())"
        )

    def leaves(self, where: str, values: Mapping[str, np.ndarray]) -> Arrays:
        """The arrays of the JAX side by their names there; axes in front, as of per-example gradients, stay there."""
        first = {self.pair.torch.first.get(name, name): x for name, x in values.items()}
        new: Arrays = {}
        for link in self._links(where, values):
            sources = [first[name] for name in link.torch]
            if link.sums:  # in the precision of the reference, whatever is computed with them
                sources = [x.astype(np.float64) for x in sources]
            new |= zip(link.jax, _map(where, link, sources, self.pair), strict=True)
        return new

    def tree(self, where: str, values: Mapping[str, np.ndarray]) -> Any:
        """The tree of the JAX side, of NumPy arrays, most of them over the same memory."""
        build = self.pair.flax.build_params if self._is_parameters(values) else self.pair.flax.build
        return build(self.leaves(where, values))

    def inputs(self, where: str, node: Any) -> Any:
        """An input with every such dict in it replaced; they are looked for in dicts, lists and tuples."""
        if self.is_known(where, node):
            return self.tree(where, {name: np.asarray(arrays.to_host(x)) for name, x in node.items()})
        if type(node) is dict:
            return {key: self.inputs(where, child) for key, child in node.items()}
        if type(node) in (list, tuple):
            return type(node)(self.inputs(where, child) for child in node)
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*(self.inputs(where, child) for child in node))
        return node

    def _is_parameters(self, values: Mapping[str, Any]) -> bool:
        return set(self.parameters) <= set(values) <= set(self.pair.parameters)

    def _links(self, where: str, values: Mapping[str, Any]) -> list[Link]:
        if not self._is_parameters(values):
            return list(self.pair.links)
        links = [link for link in self.pair.links if set(link.torch) <= self.pair.torch.trained]
        for link in links:
            if link.sums:
                raise ValueError(
                    f"{where}: {link.sums}: parameters that are added up have gradients of their own, which one leaf "
                    "cannot hold; pass the whole state (net.state_dict()), whose values cross, and compare outputs"
                )
        return links


def _map(where: str, link: Link, sources: list[np.ndarray], pair: Pair) -> tuple[np.ndarray, ...]:
    shapes = [pair.torch.forms[name].shape for name in link.torch]
    more = {x.shape[: max(x.ndim - len(shape), 0)] for x, shape in zip(sources, shapes, strict=True)}
    if len(more) != 1 or any(x.shape != (*next(iter(more)), *s) for x, s in zip(sources, shapes, strict=True)):
        got = ", ".join(f"{name!r} {x.shape}" for name, x in zip(link.torch, sources, strict=True))
        raise ValueError(
            f"{where}: got {got}; the pair has {', '.join(map(str, shapes))}, perhaps with axes in front, such as of "
            "per-example gradients"
        )
    front = more.pop()
    if not front:
        return link.to_jax(*sources)
    members = np.ndindex(*front)
    each = [link.to_jax(*(x[i] for x in sources)) for i in members]
    forms = [pair.flax.forms[name].shape for name in link.jax]
    return tuple(
        np.stack([one[k] for one in each]).reshape(*front, *form) if each else np.zeros((*front, *form))
        for k, form in enumerate(forms)
    )

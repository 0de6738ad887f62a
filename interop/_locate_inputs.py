"""What `locate` is given: models it can compare, and the arrays of the flax side."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from . import _flax, arrays
from ._layouts import Mismatch
from .pair import Pair

WHERE = "locate"


class FlaxArrays(NamedTuple):
    """The arrays of a flax model in float64.

    Attributes:
        module: the model without arrays of its own that count.
        build: leaves by name -> linen variables.
        leaves: by name. Where the model holds PyTorch's values in its own precision, they are PyTorch's.
        trained: the names of the parameters.
        differing: names of leaves that hold other values than the twin in PyTorch, and by how much of the largest.
    """

    module: Any
    build: Callable[[Mapping[str, Any]], Any]
    leaves: dict[str, np.ndarray]
    trained: set[str]
    differing: dict[str, float]


def check_arguments(net: Any, flax_model: Any, pair: Any) -> None:
    """Refuse what is no pair of models, and dropout that is switched on."""
    if not isinstance(net, nn.Module):
        swapped = "; are the arguments swapped? The PyTorch model is the first" if _is_flax(net) else ""
        raise TypeError(f"{WHERE}: net must be an nn.Module, got {type(net).__name__}{swapped}")
    if not _is_flax(flax_model):
        hint = "; of linen variables pass the model as well: module.bind(variables)"
        raise TypeError(
            f"{WHERE}: flax_model must be an nnx module or a linen module, got {type(flax_model).__name__}"
            f"{hint if isinstance(flax_model, Mapping) else ''}"
        )
    if not isinstance(pair, Pair):
        raise TypeError(f"{WHERE}: pair must be what interop.match returns, got {type(pair).__name__}")
    names = list(net.state_dict())
    other = [name for name in names if name not in pair.torch.first] + [n for n in pair.torch.first if n not in names]
    if other:
        raise ValueError(
            f"{WHERE}: {other[0]!r} is only in one of net and the model that the pair was made of; make the pair of "
            "this model: interop.match(net, flax_model)"
        )
    complex_ones = [name for name, x in net.named_parameters() if x.is_complex()]
    if complex_ones:
        raise ValueError(
            f"{WHERE}: the parameter {complex_ones[0]!r} is complex; only models of real parameters are run in "
            "float64, compare its parts with interop.check"
        )
    for name, module in net.named_modules():
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
        if module.training and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"{WHERE}: {name or 'net'} ({type(module).__name__}) drops with a rate of {rate} and is in training "
                "mode, so that no two runs agree; call net.eval(), or set its rate to 0 on both sides, or draw masks "
                "once, pass them to both models as inputs and multiply by them"
            )


def _is_flax(x: Any) -> bool:
    return isinstance(x, (linen.Module, nnx.Module))


def flax_arrays(net: nn.Module, flax_model: Any, pair: Pair) -> FlaxArrays:
    """The arrays of the flax model; of a linen module that is not bound those that PyTorch's parameters give."""
    state = {name: _wide(x) for name, x in net.state_dict().items()}
    carried: dict[str, np.ndarray] = {}
    for link in pair.links:
        try:
            carried |= zip(link.jax, link.to_jax(*(state[name] for name in link.torch)), strict=True)
        except Mismatch as error:
            raise ValueError(f"{WHERE}: {', '.join(map(repr, link.torch))}: {error}") from error
    if isinstance(flax_model, linen.Module) and flax_model.scope is None:
        return FlaxArrays(flax_model, _variables(pair.flax.build), carried, set(pair.flax.trained), {})
    side = _flax.read(WHERE, flax_model)
    other = [name for name in side.leaves if name not in pair.flax.forms]
    missing = [name for name in pair.flax.forms if name not in side.leaves]
    if other or missing:
        raise ValueError(
            f"{WHERE}: {(other or missing)[0]!r} is only in one of flax_model and the flax side that the pair was made "
            "of; make the pair of this model: interop.match(net, flax_model)"
        )
    leaves, differing = {}, {}
    for name, leaf in side.leaves.items():
        own = np.asarray(arrays.to_host(leaf.value))
        ours = carried.get(name)
        if ours is not None and np.array_equal(ours.astype(own.dtype), own, equal_nan=True):
            leaves[name] = ours
        else:
            leaves[name] = _wide(own)
            if ours is not None:
                with np.errstate(invalid="ignore"):
                    differing[name] = float(np.abs(leaves[name] - ours).max() / (np.abs(ours).max() or 1.0))
    module = flax_model.unbind()[0] if isinstance(flax_model, linen.Module) else flax_model
    trained = {name for name, leaf in side.leaves.items() if leaf.trained}
    return FlaxArrays(module, _variables(side.build), leaves, trained, differing)


def _variables(build: Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Linen variables, also where the pair was made of the parameters alone."""

    def whole(leaves: Mapping[str, Any]) -> Any:
        tree = build(leaves)
        return tree if isinstance(tree.get("params"), Mapping) else {"params": tree}

    return whole


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(arrays.to_host(x))
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.array(x)

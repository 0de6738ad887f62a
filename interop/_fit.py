"""Whether the arrays of a PyTorch layer are those of a flax layer, and in which sentence to say that they are not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from ._layouts import Layout, Layouts, Mismatch, Shapes
from ._recurrent import Cell, cells

_LAYER_FILES = ("linear", "normalization", "attention", "recurrent", "activation", "activations")  # of flax


def told(module: Any) -> str:
    """A layer in one line."""
    return repr(module) if isinstance(module, Cell) else f"{type(module).__name__}({module.extra_repr()})"


def arrays_of(module: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all arrays of a PyTorch layer, by their names in its state_dict."""
    whole, suffix = (module.module, module.suffix) if isinstance(module, Cell) else (module, "")
    arrays = {}
    for name, x in whole.state_dict(keep_vars=True).items():
        if isinstance(x, UninitializedTensorMixin):
            raise Mismatch(f"{told(module)}: {name} belongs to a lazy module and has no shape yet; run the model once")
        if name.endswith(suffix) and isinstance(x, Tensor):
            arrays[name] = tuple(x.shape)
    return arrays


def ways(
    module: Any, layouts: Layouts, without_twin: Mapping[str, str], shapes: Shapes | None
) -> list[tuple[Layout, dict[str, tuple[int, ...]]]]:
    """Every layout and the arrays that it has in flax: the links are tried on arrays that take no memory."""
    arrays = arrays_of(module)
    found = []
    for layout in layouts(module, shapes):
        linked = {name for one in layout.links for name in one.torch} | without_twin.keys()
        for name in sorted(arrays.keys() - linked):
            raise Mismatch(
                f"{told(module)}: its array {name} {arrays[name]} is in no link of its rule, which has {sorted(linked)}"
                "; undo what put it there (torch.nn.utils.parametrize.remove_parametrizations, "
                "torch.nn.utils.prune.remove), or register() a rule that has it"
            )
        held = {}
        for one in layout.links:
            for name in one.torch:
                if name not in arrays:
                    raise Mismatch(f"{told(module)}: the rule links an array {name}, it has {sorted(arrays)}")
            made = one.to_jax(*(np.broadcast_to(np.False_, arrays[name]) for name in one.torch))
            held.update({name: x.shape for name, x in zip(one.jax, made, strict=True)})
        found.append((layout, held))
    return found


def misfit(module: Any, held: list[dict[str, tuple[int, ...]]], shapes: Shapes) -> str:
    """A sentence on the alternative that comes nearest."""
    if not held:
        ours, theirs = len(cells(module)), ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        return (
            f"{told(module)}: its {ours} cells are not the cells of the flax layer, which has {theirs or 'no arrays'}"
        )
    nearest = max(held, key=lambda one: (len(one.items() & shapes.items()), len(one.keys() & shapes.keys())))
    said = []
    for name in sorted(nearest.keys() | shapes.keys()):
        needed, seen = nearest.get(name), shapes.get(name)
        if seen is None:
            said.append(f"{name} {needed} is missing in the flax layer")
        elif needed is None:
            said.append(f"{name} {seen} of the flax layer has no counterpart")
        elif needed != seen:
            said.append(f"{name} should be {needed} in the flax layer and is {seen}")
    return f"{told(module)}: " + "; ".join(said[:4] + ([f"and {len(said) - 4} more"] if len(said) > 4 else []))


def is_twin(names: str, twin: Any) -> bool:
    """Whether a flax layer is of a class of one of these names, or of a subclass that leaves its computation alone."""
    for base in type(twin).__mro__:
        if base.__module__.startswith("flax."):
            bases = [cls.__name__ for cls in type(twin).__mro__ if cls.__module__.startswith("flax.")]
            return any(name in bases for name in names.split())
        if "__call__" in vars(base):
            return False
    return False


def flax_layer(twin: Any) -> str:
    """The name of the layer of flax's that this is or derives from; nothing for models and containers."""
    for base in type(twin).__mro__:
        package, _, file = base.__module__.rpartition(".")
        if package.startswith("flax.") and file in _LAYER_FILES:
            return base.__name__
    return ""

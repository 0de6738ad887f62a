"""What the bookkeeping needs from PyTorch, and Penalty as a torch pytree. The only file that knows pytrees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .. import _penalty
from .._selectors import leaf_name
from .._trees import Flat

Params = Any  # a tree of tensors: a dict[str, Tensor] as torch.func uses, or any pytree
Strength = float | Tensor


def flatten(tree: Params, scalars: bool = False) -> Flat:
    """Take a tree apart; what is no floating-point tensor is passed over.

    Args:
        tree: any pytree.
        scalars: also keep Python numbers and bools (trees of step sizes, importances, selectors).

    Raises:
        TypeError: a container that PyTorch's pytrees do not know, or an array of another library.
    """
    if isinstance(tree, torch.nn.Module):
        raise TypeError("params: got an nn.Module; pass fr.params(model), the dict of its named parameters")
    if isinstance(tree, Iterator):
        raise TypeError(
            f"params: got a {type(tree).__name__}, such as net.parameters() is; pass fr.params(net), the dict of the "
            "named parameters"
        )
    paths, leaves, unflatten = paths_and_leaves(tree)
    collection = any(len(path) > 1 and path[0] == "params" for path in paths) or (
        isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping)  # also an empty one
    )
    chosen = []
    passed_over = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        kept = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        kept = kept or (scalars and isinstance(leaf, (bool, int, float, Tensor)))
        if not kept:
            _refuse_opaque(".".join(path), leaf)
        if kept and (not collection or (len(path) > 1 and path[0] == "params")):
            chosen.append(i)
        else:
            passed_over.append((leaf_name(path), leaf))

    def rebuild(new: list[Any], others: Callable[[Any], Any] = lambda leaf: leaf) -> Params:
        by_index = dict(zip(chosen, new, strict=True))
        return unflatten([by_index[i] if i in by_index else others(leaf) for i, leaf in enumerate(leaves)])

    return Flat(
        [leaf_name(paths[i]) for i in chosen],
        [leaves[i] for i in chosen],
        rebuild,
        lambda new: rebuild(new, _zero),
        passed_over,
    )


def paths_and_leaves(tree: Any) -> tuple[list[list[str]], list[Any], Callable[[list[Any]], Any]]:
    """Every leaf with the components of its path, and the way back to the tree."""
    keyed, treedef = pytree.tree_flatten_with_path(tree)
    paths = [[_component(key) for key in path] for path, _ in keyed]
    return paths, [leaf for _, leaf in keyed], lambda leaves: pytree.tree_unflatten(leaves, treedef)


def _component(key: Any) -> str:
    if isinstance(key, pytree.GetAttrKey):
        return str(key.name)
    return str(key.idx if isinstance(key, pytree.SequenceKey) else getattr(key, "key", key))


def _refuse_opaque(name: str, leaf: Any) -> None:
    if isinstance(leaf, (str, bytes, np.generic, Tensor)) or leaf is None:
        return
    module = any(cls.__name__ == "Module" for cls in type(leaf).__mro__)  # torch's, flax's, equinox's
    if module or isinstance(leaf, Iterable) or (is_dataclass(leaf) and not isinstance(leaf, type)):
        raise TypeError(
            f"params: the leaf {name!r} is a {type(leaf).__module__}.{type(leaf).__name__}, which PyTorch's pytrees do "
            "not look into: use dicts, lists, tuples and tensors, or register the class"
        )


def _zero(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return torch.zeros_like(leaf)
    return type(leaf)(0) if isinstance(leaf, (bool, int, float, np.number, np.bool_)) else leaf


def zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def is_complex(x: Tensor) -> bool:
    return x.is_complex()


def is_scalar(x: Any) -> bool:
    """Numbers and 0-d arrays."""
    return isinstance(x, (int, float, np.number)) or (isinstance(x, (Tensor, np.ndarray)) and x.ndim == 0)


def upcast(x: Tensor) -> Tensor:
    """Half precision (and float8) to float32."""
    return x.float() if x.dtype.itemsize < 4 else x


def downcast(y: Tensor, x: Tensor) -> Tensor:
    return y.to(x.dtype)


def cast(value: Any, x: Tensor) -> Any:
    """A strength, step or anchor in the dtype and on the device of `x`; Python numbers stay numbers."""
    if isinstance(value, (int, float, np.number)):
        return float(value)
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def is_real(x: Any) -> bool:
    """Real numbers and arrays of them; bools are neither."""
    if isinstance(x, Tensor):
        return not x.is_complex() and x.dtype != torch.bool
    if isinstance(x, (np.ndarray, np.generic)):
        return bool(np.isrealobj(x)) and x.dtype != np.bool_
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def concrete(value: Any) -> float | None:
    """The most suspicious entry (NaN, else negative, else the largest) of a value that can be looked at now.

    None for a traced or batched value, or one on an accelerator, which would have to be waited for.
    """
    if isinstance(value, Tensor):
        hidden = torch.compiler.is_compiling() or isinstance(value, FakeTensor) or value.device.type != "cpu"
        if hidden or is_functorch_wrapped_tensor(value) or value.numel() == 0:
            return None
        if value.ndim == 0:
            return float(value.detach())
        smallest, largest = (float(bound) for bound in value.detach().aminmax())
        return largest if smallest >= 0 else smallest
    if isinstance(value, np.ndarray):
        return float(value.min() if not value.min() >= 0 else value.max())
    return float(value)


def check_step(x: Tensor, step_size: Tensor) -> None:
    """Refuse a step whose shape does not broadcast to that of `x`. TorchScript reads this."""
    if isinstance(step_size, Tensor):  # it may be a number as well
        fits = step_size.dim() <= x.dim()
        for i in range(min(step_size.dim(), x.dim())):
            fits = fits and (step_size.size(-1 - i) == 1 or step_size.size(-1 - i) == x.size(-1 - i))
        if not fits:
            raise ValueError(
                f"prox: step_size must have a shape that broadcasts to that of x, {list(x.shape)}, got "
                f"{list(step_size.shape)}"
            )


def settled(new: Tensor, last: Tensor) -> bool:
    """Whether an iteration has come to rest, where that can be looked at: further steps would return the same bits."""
    traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    traced = traced or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if traced or new.device.type != "cpu" or is_functorch_wrapped_tensor(new):
        return False
    return torch.equal(new, last)


def total(values: list[Tensor], leaves: list[Tensor]) -> Tensor:
    """The sum of scalars in the widest dtype of the leaves, float32 at least, on the first leaf's device."""
    dtype = torch.float32
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype) if not leaf.is_complex() else dtype
    device = leaves[0].device if leaves else None
    if not values:
        return torch.zeros((), dtype=dtype, device=device)
    return torch.stack([v.to(dtype=dtype, device=device) for v in values]).sum()


def own(tree: Params) -> Params:
    """A copy that training in place does not change; what is trained itself comes without its gradient history."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, detached(tree))


def detached(tree: Params) -> Params:
    """Parameters of a module, which autograd would follow through a whole run, as plain tensors."""

    def detach(leaf: Any) -> Any:
        trained = isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_leaf
        return leaf.detach() if trained and not is_functorch_wrapped_tensor(leaf) else leaf

    return pytree.tree_map(detach, tree)


def as_numpy(x: Tensor) -> np.ndarray:
    return upcast(x.detach()).cpu().numpy()


def zero_count(params: Params) -> Tensor:
    """A step count, on the device of the parameters: no update has to wait for the host."""
    leaves = flatten(params).leaves
    return torch.zeros((), dtype=torch.int32, device=leaves[0].device if leaves else None)


def increment(count: Tensor) -> Tensor:
    return count + 1


def master_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the wider of two dtypes."""
    return x.detach().to(torch.promote_types(x.dtype, dtype), copy=True)


def value_and_grad(function: Callable[..., Any], *args: Any) -> tuple[tuple[Any, Any], Any]:
    """((value, auxiliary output), gradient in the first argument)."""
    gradient, value = torch.func.grad_and_value(function, has_aux=True)(*args)
    return value, gradient


def member_array(value: Any, count: int, like: Params) -> Tensor:
    """A hyper-parameter as a contiguous tensor with a member axis, on the device of the parameters."""
    leaves = flatten(like).leaves
    device = leaves[0].device if leaves else None
    if isinstance(value, (bool, int, float)):
        # float64 promotes nothing, as 0-d tensor of a member: whoever uses it casts it to the dtype of the leaf
        return torch.full((count,), value, dtype=torch.float64 if isinstance(value, float) else None, device=device)
    tensor = torch.as_tensor(value, device=device)
    return tensor.repeat(count) if tensor.ndim == 0 else tensor.contiguous()


def tree_form(tree: Any) -> Any:
    """Structure, and kinds, shapes, strides and devices of the leaves, to be compared by `==`."""
    leaves, treedef = pytree.tree_flatten(tree)
    return treedef, [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in leaves]


def is_array(x: Any) -> bool:
    return isinstance(x, Tensor)


def stored(x: Tensor) -> Tensor:
    """As safetensors takes it: contiguous, without gradient history."""
    return x.detach().contiguous().clone()


def like_array(name: str, value: Any, x: Tensor) -> Tensor:
    """A copy of an array from a file on the device of the leaf it is for."""
    del name
    return torch.as_tensor(value).to(x.device, copy=True)


def save_file(path: Path, flat: Mapping[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.as_tensor(x).contiguous() for name, x in flat.items()}, path, metadata)


def load_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@dataclass(frozen=True, eq=False, repr=False)
class Penalty(_penalty.Penalty):
    __doc__ = _penalty.Penalty.__doc__
    wing = sys.modules[__name__]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`tensor * penalty`: the tensor asks the penalty; without this torch.compile cannot trace the product."""
        del types, kwargs
        if func not in (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul):
            return NotImplemented
        factor, penalty = args if isinstance(args[1], cls) else (args[1], args[0])
        return penalty.__mul__(factor)


def _flatten(penalty: Penalty) -> tuple[list[Any], tuple[Any, ...]]:
    children, static = _penalty.flatten_penalty(penalty)
    return [pytree.tree_map(_as_tensor, child) for child in children], static


def _as_tensor(leaf: Any) -> Any:
    """Numbers as 0-d tensors, since vmap returns tensors only; float64, which promotes nothing."""
    if not isinstance(leaf, (int, float, np.number, np.ndarray)):
        return leaf
    if torch.compiler.is_compiling():
        return torch.tensor(float(leaf), dtype=torch.float64)
    # Inside of grad a new tensor belongs to that level, and grad, which wraps its arguments itself, refuses it.
    with temporarily_clear_interpreter_stack():
        return torch.tensor(leaf, dtype=torch.float64)


def _unflatten(children: Iterable[Any], static: tuple[Any, ...]) -> Penalty:
    return _penalty.unflatten_penalty(Penalty, static, list(children))


def _flatten_with_keys(penalty: Penalty) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    children, static = _flatten(penalty)
    return [(pytree.SequenceKey(i), child) for i, child in enumerate(children)], static


pytree.register_pytree_node(
    Penalty,
    _flatten,
    _unflatten,
    serialized_type_name="funcreg.torch.Penalty",
    flatten_with_keys_fn=_flatten_with_keys,
)


def params(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of a model as one tree.

    By name; a tied tensor once.

    Not `model.state_dict()`: that holds buffers too, and a penalty without `.on` acts on every floating-point leaf, on
    the `running_var` of a batch normalization as well. After `torch.compile(model)` take the parameters of the original
    module: the names of the compiled one begin with `_orig_mod.`, and a glob such as `"hidden"` matches none of them.

    Args:
        model: an `nn.Module`.

    Returns:
        `dict(model.named_parameters())`: the parameters themselves. For a loop on torch.func detach them first,
        `{name: p.detach() for name, p in fr.params(model).items()}`, or autograd records the whole run.

    Raises:
        TypeError: not an `nn.Module`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"params: model must be an nn.Module, got {type(model).__name__}")
    return dict(model.named_parameters())

"""What a graph must not contain: randomness, writes into inputs, foreign operations, devices of its own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..._export_errors import BakedDeviceError, MutationError, RandomOpError, UnsupportedOpError
from ._inputs import Inputs
from ._trace import Trace


def check(where: str, trace: Trace, inputs: Inputs) -> None:
    """Refuse what the file could not do, or would do differently.

    Raises:
        RandomOpError: an operation draws random numbers.
        MutationError: an operation writes into an input.
        UnsupportedOpError: an operation that is not PyTorch's own (ATen), or a subgraph.
        BakedDeviceError: a tensor is put on another device than that of the inputs.
    """
    storages = {
        _storage(node): name for node, name in zip(trace.placeholders, inputs.tensors, strict=True) if _storage(node)
    }
    for node in trace.module.graph.nodes:
        if node.op == "get_attr" and not isinstance(getattr(trace.module, str(node.target), None), Tensor):
            raise UnsupportedOpError(
                f"{where}: the function contains {node.target}, a function as data (torch.cond, map, scan, while_loop "
                "or a custom autograd.Function); write it with plain operations and torch.where"
            )
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OperatorBase):
            continue
        operation = str(node.target)
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            raise UnsupportedOpError(
                f"{where}: the operation {operation} is not one of PyTorch's own (aten), and the host of the file "
                "would have to know it; write it with plain PyTorch operations"
            )
        if torch.Tag.nondeterministic_seeded in node.target.tags and _argument(node, "dropout_p") != 0:
            raise RandomOpError(
                f"{where}: the function draws random numbers ({operation}); draw them outside and pass them as an "
                "input (a dropout mask, noise), or call the module in eval mode"
            )
        for written in _written(node):
            if _storage(written) in storages:
                raise MutationError(
                    f"{where}: {operation} writes into the input {storages[_storage(written)]!r}; write into a copy, "
                    "x = x.clone(), and return it (statistics of a batch norm: train_step(..., has_extra=True))"
                )
        device = node.kwargs.get("device")
        if device is not None and torch.device(device) != inputs.device:  # pyright: ignore[reportArgumentType]
            raise BakedDeviceError(
                f"{where}: {operation} puts a tensor on {device}, and the inputs are on {inputs.device}; take the "
                "device of an input, device=x.device"
            )


def _written(node: Node) -> Iterator[Node]:
    """The arguments that an operation changes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for argument in node.target._schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = _argument(node, argument.name)
        for one in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(one, Node):
                yield one


def _argument(node: Node, name: str) -> Any:
    """What an operation is given for an argument, or its default; None if it has none of that name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            default = argument.default_value if argument.has_default_value() else None
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
    return None


def _storage(node: Node) -> int | None:
    """The memory that a node's tensor lies in, which its views share."""
    x = node.meta.get("val")
    return x.untyped_storage()._cdata if isinstance(x, Tensor) else None


def shares_memory(node: Node, others: list[Node]) -> bool:
    """Whether a result lies in the memory of an input, or of a result before it."""
    return _storage(node) in {_storage(other) for other in others}

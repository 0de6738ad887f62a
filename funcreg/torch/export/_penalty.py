"""A penalty as a file: value, gradient and prox, with its strengths as inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..._export_report import ExportReport
from ..._penalty import flatten_penalty, unflatten_penalty
from .._wing import Params, Penalty, flatten
from ._inputs import Method, flatten_outputs, take_apart

METHODS = ("value", "grad", "prox")


def export_penalty(
    penalty: Penalty,
    params: Params,
    path: str | PathLike[str],
    *,
    methods: Sequence[str] = METHODS,
    overwrite: bool = False,
) -> ExportReport:
    """Write value, gradient and prox of a penalty to one file, with its strengths as inputs.

    Every strength is an input of the file, a float64 scalar called by the name of its penalty: `l1.lam`,
    `group_lasso.lam`; of a second l1 in a sum `l1_2.lam`; the factor of `2 * penalty` is `l1.weight`; an anchor
    `l2.anchor.NAME`. Parameters are `params.NAME`, the prox takes `step_size`, a float64 scalar. Results are called
    `value`, or `params.NAME` like what they belong to. Strengths and steps below 0 are not refused by the file. Its
    bits are those of the penalty with such tensors as strengths; Python's numbers are multiplied with each other before
    they become float32, which may change the last one.

    Args:
        penalty: a penalty of this wing; selectors and options are constants of the file.
        params: parameters of the names, shapes and dtypes that the file is for.
        path: ends in `.pt`.
        methods: which of `"value"`, `"grad"` and `"prox"` the file has.
        overwrite: replace the files that are there.

    Returns:
        What was written and compared.

    Raises:
        NoGradError, NoProxError: a method that the penalty does not have.
        ExportError: a custom penalty that cannot be exported; the subclass and the message say what to change.
        SelfCheckError: the file did not return the penalty's bits.
        FileExistsError: without `overwrite`.
        ValueError, TypeError: an unknown method, parameters without a floating-point tensor, no penalty.

    Example:
        >>> import tempfile, torch
        >>> import funcreg.torch as fr
        >>> folder = tempfile.TemporaryDirectory()
        >>> params = {"w": torch.tensor([3.0, -0.25])}
        >>> report = fr.export.export_penalty(fr.l1(0.1), params, f"{folder.name}/l1.pt")
        >>> exported = fr.export.load_exported(f"{folder.name}/l1.pt", trusted=True)
        >>> scalars = {name: torch.tensor(1.0, dtype=torch.float64) for name in ("l1.lam", "step_size")}
        >>> exported({"params": params, **scalars}, method="prox")
        {'params.w': tensor([2., 0.])}
        >>> folder.cleanup()
    """
    from ._write import write  # tracing needs modules that take half a second to import

    where = "export_penalty"
    if not isinstance(penalty, Penalty):
        raise TypeError(f"{where}: penalty must be a penalty such as fr.l1(1e-3), got {type(penalty).__name__}")
    if isinstance(methods, str) or not methods or set(methods) - set(METHODS):
        raise ValueError(f"{where}: methods must be some of {METHODS}, got {methods!r}")
    leaves = flatten(params).leaves
    if not leaves:
        raise ValueError(f"{where}: params has no floating-point tensor, and so nothing to penalize")
    strengths, rebuild = _as_arguments(penalty)
    example = {"params": params, **strengths}
    functions: dict[str, Callable[..., Any]] = {
        "value": lambda given: rebuild(given).value(given["params"]),
        "grad": lambda given: rebuild(given).grad(given["params"]),
        "prox": lambda given: rebuild(given).prox(given["params"], given["step_size"]),
    }
    exported = {}
    for name in methods:
        also = {"step_size": torch.tensor(0.5, dtype=torch.float64, device=leaves[0].device)} if name == "prox" else {}
        inputs = take_apart(where, {**example, **also}, {})

        def run(tensors: Mapping[str, Tensor], name: str = name, inputs: Any = inputs) -> dict[str, Any]:
            result = functions[name](inputs.rebuild(list(tensors.values())))
            return flatten_outputs(where, {"value" if name == "value" else "params": result}, None)

        exported[name] = Method(run, inputs)
    return write(where, "penalty", repr(penalty), exported, path, ("torchscript",), (1,), overwrite)


def _as_arguments(penalty: Penalty) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Penalty]]:
    """The strengths of every part by name, `{"l1": {"lam": ...}}`, and the way back to a penalty."""
    children, static = flatten_penalty(penalty)
    children = pytree.tree_map(_as_tensor, children)
    names = []
    for part in penalty.parts:
        optional = {"weight": part.weight, "anchor": part.anchor, "importance": part.importance}
        keys = [*part.rule.strengths, *(key for key, value in optional.items() if value is not None)]
        seen = [group for group, _ in names]
        count = 2
        group = part.rule.name
        while group in seen:
            group, count = f"{part.rule.name}_{count}", count + 1
        names += [(group, key) for key in keys]
    given = iter(children)
    tree: dict[str, Any] = {}
    for group, key in names:
        tree.setdefault(group, {})[key] = next(given)

    def rebuild(arguments: Mapping[str, Any]) -> Penalty:
        return unflatten_penalty(Penalty, static, [arguments[group][key] for group, key in names])

    return tree, rebuild


def _as_tensor(leaf: Any) -> Tensor:
    """A number as float64, which keeps all its digits; it is cast to the dtype of the leaf it acts on."""
    return leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64)

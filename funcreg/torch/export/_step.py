"""A pure function of tensors, such as a whole training step, as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor

from ._inputs import Method, caller, flatten_outputs, take_apart
from ._report import ExportReport


def export_step(
    fn: Callable[..., Any],
    example: Mapping[str, Any],
    path: str | PathLike[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str] | None = None,
    formats: Sequence[str] = ("torchscript",),
    check_sizes: Sequence[int] = (1, 2, 5, 16),
    overwrite: bool = False,
) -> ExportReport:
    from ._write import write  # tracing needs modules that take half a second to import

    where = "export_step"
    inputs = take_apart(where, example, dynamic)
    call = caller(where, fn, list(example))

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return flatten_outputs(where, call(inputs.rebuild(list(tensors.values()))), outputs)

    name = getattr(fn, "__name__", type(fn).__name__)
    return write(where, "step", name, {"forward": Method(run, inputs)}, path, formats, check_sizes, overwrite)

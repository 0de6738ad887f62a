"""The same graph as an ExportedProgram, the format that torch.onnx and AOTInductor read."""

import io
from typing import Any

import torch

from ..._export_errors import UnsupportedOpError
from ._inputs import Inputs, Tensors
from ._sizes import Known
from ._trace import Trace


class _Program(torch.nn.Module):
    """A traced graph as a module from named tensors to named tensors."""

    def __init__(self, trace: Trace, names: list[str]) -> None:
        super().__init__()
        self.graph, self.names, self.outputs = trace.module, names, trace.outputs

    def forward(self, inputs: Tensors) -> Tensors:
        results = self.graph(*(inputs[name] for name in self.names))
        # clones: an output may be an input
        return {name: x.clone() for name, x in zip(self.outputs, results, strict=True)}


def pt2_bytes(where: str, trace: Trace, known: Known, inputs: Inputs) -> bytes:
    """An ExportedProgram whose `module()(inputs)` takes and returns dicts of tensors by name.

    Raises:
        UnsupportedOpError: torch.export, which looks at the sizes once more, does not take the graph; or a file would
            have to refuse sizes, which only that of TorchScript can do.
    """
    if known.condition != True:  # noqa: E712  sympy's own True
        raise UnsupportedOpError(
            f"{where}: the file is right for some sizes only ({known.condition}), and a pt2 file cannot refuse the "
            "others; leave 'pt2' out of formats"
        )
    primes = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    example = inputs.resized(dict(zip(inputs.sizes, primes, strict=False)))
    shapes: dict[str, Any] = {
        name: {axis: torch.export.Dim.DYNAMIC for axis in inputs.dims[name]} or None for name in inputs.tensors
    }
    try:
        program = torch.export.export(_Program(trace, list(inputs.tensors)), (example,), dynamic_shapes=(shapes,))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedOpError(
            f"{where}: torch.export refuses the graph of the function, {type(error).__name__}: {first}; leave 'pt2' "
            "out of formats"
        ) from error
    return buffer.getvalue()

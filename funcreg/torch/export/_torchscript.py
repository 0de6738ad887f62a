"""TorchScript modules from source, to and from bytes, without its deprecation warnings."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._export_errors import UnsupportedOpError

_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No deprecation warning of torch.jit inside; every other warning as before.

    Filters belong to the process, so only one thread at a time is in here, and only for one call.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=r"`torch\.jit\.\w+` is (deprecated|not supported)",
            category=DeprecationWarning,
            module=r"torch\.jit\.",
        )
        yield


def compiled(where: str, source: str, constants: Mapping[str, Tensor]) -> Any:
    """A TorchScript module with the methods of a source text, and tensors as its buffers.

    Raises:
        UnsupportedOpError: TorchScript does not know an operation, or not with these arguments.
    """

    class Exported(torch.nn.Module):
        """A type of its own for each file: methods are defined on the type."""

    shell = Exported()
    for name, x in constants.items():
        shell.register_buffer(name, x)
    with quiet():
        module = torch.jit.script(shell)
    try:
        module.define(source)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        operation = next((line for line in lines if "torch.ops.aten." in line), "")
        raise UnsupportedOpError(
            f"{where}: TorchScript does not take the operation {operation!r}: {lines[0]} Write it with other "
            "operations; a Python number where PyTorch takes a tensor can be made one, x.new_tensor(2.0)"
        ) from error
    return module


def to_bytes(module: Any) -> bytes:
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(module, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes, device: str | torch.device | None = None) -> Any:
    with quiet():
        return torch.jit.load(io.BytesIO(data), map_location=device)

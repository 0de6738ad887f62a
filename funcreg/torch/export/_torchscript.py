"""TorchScript modules from source, to and from bytes, without its deprecation warnings."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

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


def compiled(source: str, constants: Mapping[str, Tensor]) -> Any:
    """A TorchScript module with the methods of a source text, and tensors as its buffers."""

    class Exported(torch.nn.Module):
        """A type of its own for each file: methods are defined on the type."""

    shell = Exported()
    for name, x in constants.items():
        shell.register_buffer(name, x)
    with quiet():
        module = torch.jit.script(shell)
    module.define(source)
    return module


def to_bytes(module: Any) -> bytes:
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(module, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes, device: str | torch.device | None = None) -> Any:
    with quiet():
        return torch.jit.load(io.BytesIO(data), map_location=device)

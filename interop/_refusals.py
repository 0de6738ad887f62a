"""The leaves that both frameworks can hold, and what to do about every other one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

_NAMES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 complex128 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
TO_NUMPY = {
    getattr(torch, name): np.dtype(getattr(jnp, name) if name != "bool" else np.bool_)
    for name in _NAMES.split()
    if hasattr(torch, name) and (hasattr(jnp, name) or name == "bool")
}
TO_TORCH = {numpy: ours for ours, numpy in TO_NUMPY.items()}
_WRAPPERS = (
    (_functorch.is_batchedtensor, "BatchedTensor", "vmap"),
    (_functorch.is_gradtrackingtensor, "GradTrackingTensor", "grad, vjp or jvp"),
    (lambda _: True, "FunctionalTensor", "functionalize"),
)
_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
_NO_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)  # of tensors that leave all operations to PyTorch


def checked(where: str, name: str, leaf: Any) -> np.dtype[Any]:
    """The NumPy dtype of a leaf that both frameworks can hold; every other leaf is refused."""
    if isinstance(leaf, Tensor):
        _refuse_tensor(where, name, leaf)
    elif isinstance(leaf, jax.Array):
        _refuse_jax(where, name, leaf)
    elif isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{where}: {name} is a NumPy masked array, whose mask would be lost; pass x.filled(value)")
    level = _functorch.peek_interpreter_stack()
    if level is not None:
        raise RuntimeError(
            f"{where}: called inside torch.func.{level.key().name.lower()}, which cannot follow values into the other "
            "framework; call it outside"
        )
    dtype: Any = TO_NUMPY.get(leaf.dtype) if isinstance(leaf, Tensor) else leaf.dtype.newbyteorder("=")
    if dtype not in TO_TORCH:
        raise TypeError(f"{where}: {name} is {leaf.dtype}, {_dtype_remedy(str(leaf.dtype))}")
    return dtype


def _dtype_remedy(dtype: str) -> str:
    if dtype == "torch.complex32":
        return "which JAX has not; x.to(torch.complex64) holds it exactly"
    if dtype in ("int4", "uint4", "int2", "uint2", "int1", "uint1"):
        return "of which PyTorch has no arrays; x.astype(jnp.int8) (jnp.uint8) holds it exactly"
    if "float0" in dtype:
        return "JAX's derivative of an integer, which holds no values; leave it out of the tree"
    return "which is not among the dtypes that both frameworks have; convert it explicitly"


def _refuse_tensor(where: str, name: str, x: Tensor) -> None:
    kind = type(x).__name__
    if _functorch.is_functorch_wrapped_tensor(x):
        kind, by = next((kind, by) for is_this, kind, by in _WRAPPERS if is_this(x))
        why = f"a traced tensor of torch.func.{by}; call {where} outside the transformed function"
    elif x.is_nested or x.layout != torch.strided:
        kind = "nested tensor" if x.is_nested else f"tensor of layout {x.layout}"
        remedy = "pass x.unbind(), a list" if x.is_nested else "x.to_dense() is a plain one"
        why = f"of which JAX has no twin; {remedy}"
    elif getattr(type(x), "__torch_dispatch__", None) is not _NO_DISPATCH:
        why = "a subclass with operations of its own; "
        why += {
            "DTensor": "x.full_tensor() gathers it",
            "FakeTensor": "it has a shape but no values (FakeTensorMode, torch.export, torch.compile)",
        }.get(kind, "pass a plain tensor")
    elif isinstance(x, UninitializedTensorMixin):
        why = "a lazy module's parameter, which has no values yet; run the model once"
    elif x.is_quantized:
        kind, why = f"quantized tensor ({x.dtype})", "of which JAX has no twin; x.dequantize() is a plain one"
    elif x.is_meta:
        kind = "tensor on the meta device"
        why = "which has no values; net.to_empty(device='cpu') makes room for them, net.load_state_dict fills it"
    elif torch.jit.is_tracing() or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS):  # pyright: ignore[reportPrivateImportUsage]
        raise RuntimeError(
            f"{where}: called while PyTorch traces a function (seen at {name}: make_fx, torch.export, torch.jit.trace "
            "or FakeTensorMode), which cannot follow values into the other framework; call it outside"
        )
    elif x.numel() and not x._is_zerotensor() and x.untyped_storage().nbytes() == 0:
        why = "whose memory has been freed (FSDP between steps?); gather it first"
    else:
        return
    raise TypeError(f"{where}: {name} is a {kind}, {why}")


def _refuse_jax(where: str, name: str, x: jax.Array) -> None:
    if isinstance(x, Tracer):
        raise TypeError(
            f"{where}: {name} is a {type(x).__name__}, a traced array of jax.jit, grad, vmap or another "
            f"transformation; call {where} outside the transformed function"
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{where}: {name} is a typed PRNG key ({x.dtype}), which PyTorch has not; jax.random.key_data(key) is its "
            "array, jax.random.wrap_key_data the way back"
        )
    if x.is_deleted():
        raise ValueError(f"{where}: {name} has been deleted or donated (donate_argnums); convert it before that")
    if not x.is_fully_addressable:
        raise ValueError(
            f"{where}: {name} is partly on other hosts; gather it first "
            "(jax.experimental.multihost_utils.process_allgather)"
        )


def refuse_narrowing(where: str, name: str, dtype: np.dtype[Any]) -> None:
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    if narrow != dtype:
        raise ValueError(
            f"{where}: {name} is {dtype}, which JAX without x64 would narrow to {narrow}; call it inside `with "
            f"jax.enable_x64(True):`, or convert the leaf explicitly"
        )

"""Trees of arrays from PyTorch to JAX and back, bit for bit.

NOTE [copies]: a JAX array never changes, and JAX relies on it; the tensor or NumPy array that it was made from may be
written to. `jax.dlpack.from_dlpack(t, copy=True)` and `jax.device_put(x, may_alias=False)` share memory all the same
(jax 0.10.2), and `device_put` may read a NumPy array after it has returned. `jnp.array` of a NumPy array copies, into
memory of JAX's own, which a training step can take over (`donate_argnums`).
"""

import math
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from torch import Tensor

from ._refusals import TO_NUMPY, TO_TORCH, checked, refuse_narrowing
from ._trees import Tree, rebuild

_BITS = {  # what NumPy knows only from ml_dtypes, and PyTorch's .numpy() refuses: copied as integers, NaNs keep theirs
    numpy: (torch.uint8, np.uint8) if numpy.itemsize == 1 else (torch.int16, np.int16)
    for numpy in TO_TORCH
    if numpy.name.startswith(("bfloat", "float8"))
}
Function = TypeVar("Function", bound=Callable[..., Any])
_ALIGNMENT = 64  # bytes: JAX shares no memory that begins elsewhere


def outside_compilation(method: Function) -> Function:
    """`torch.compile(fullgraph=True)` gets an error; without fullgraph it leaves the graph here, and all is well."""

    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{method.__name__}: called inside torch.compile, which cannot follow values out; call it outside"
            )
        if "torch._dynamo" in sys.modules:  # else nobody compiles, and importing it takes seconds
            return torch.compiler.disable(method)(*args, **options)
        return method(*args, **options)

    return call  # pyright: ignore[reportReturnType]


@outside_compilation
def to_jax(tree: Tree, copy: bool = True) -> Tree:
    """A tree of PyTorch or NumPy arrays as the same tree of JAX arrays, bit for bit.

    Shapes, axes and dtypes stay as they are: a Linear's weight is still `(out, in)`. Every container stays what it is,
    in its order; None, Python numbers and strings pass through; an array of NumPy, a NumPy scalar included, becomes a
    JAX array; a tensor that requires a gradient is detached; one that occurs twice becomes two arrays. The arrays are
    in C order, on JAX's default device (a JAX array among the leaves stays on its own), and finished.

    `copy=False` shares the memory of every leaf, on the device where it is, or refuses. A JAX array must never change:
    until every computation that reads it, or anything computed from it, has been waited for (`jax.block_until_ready`),
    the tensor must not be written to; an optimizer's step on it writes. JAX returns before it has computed, so that a
    write straight after a call of a jitted function falsifies its result.

    Args:
        tree: dicts, lists, tuples, named tuples, classes that JAX or PyTorch knows as pytrees (registered dataclasses,
            flax's FrozenDict and nnx State); `fr.params(net)` or `net.state_dict()`.
        copy: whether the result has memory of its own.

    Returns:
        The tree, of `jax.Array`s of the dtypes and shapes of its leaves.

    Raises:
        TypeError: a leaf that has no twin in JAX (sparse, quantized, nested, meta, a subclass such as DTensor, a dtype
            that JAX has not), or a traced one, or an object that is neither array nor container.
        ValueError: 64-bit leaves without x64, which would narrow them; `copy=False` where only a copy is possible.
        RuntimeError: inside `torch.func` transformations, `torch.compile` or `jax.jit`.

    Example:
        >>> import torch
        >>> from funcreg import interop
        >>> interop.to_jax({"w": torch.tensor([1.0, 2.0], requires_grad=True), "steps": 3})
        {'w': Array([1., 2.], dtype=float32), 'steps': 3}
    """
    where = "to_jax"
    made: list[jax.Array] = []

    def convert(name: str, leaf: Any) -> jax.Array:
        dtype = checked(where, name, leaf)
        refuse_narrowing(where, name, dtype)
        if not made and isinstance(jnp.array(np.False_), Tracer):  # tells what no argument does: constants are traced
            raise RuntimeError(
                f"{where}: called while JAX traces a function (seen at {name}), which would bake the values into the "
                "compiled function; call it outside and pass the result as an argument"
            )
        made.append(jnp.array(to_host(leaf)) if copy else _shared_jax(where, name, leaf))
        return made[-1]

    result = rebuild(where, tree, convert)
    jax.block_until_ready(made)  # before anyone can write to the memory that is read
    return result


@outside_compilation
def to_torch(tree: Tree, copy: bool = True) -> Tree:
    """A tree of JAX or NumPy arrays as the same tree of PyTorch tensors, bit for bit.

    Shapes, axes and dtypes stay as they are: a Dense's kernel is still `(in, out)`. Every container stays what it is,
    in its order, but flax's FrozenDict and nnx State become dicts and an nnx Variable its value, since PyTorch's
    pytrees know none of them; None, Python numbers and strings pass through; a NumPy scalar becomes a 0-d tensor. The
    tensors are contiguous, require no gradient and lie on PyTorch's default device (a tensor among the leaves stays on
    its own); an array that is spread over devices is gathered.

    `copy=False` shares the memory of every leaf, on the device where it is, or refuses. PyTorch has no read-only
    tensors: writing to the result (`fill_`, an optimizer's step) changes the JAX array, which must never change. Read
    it only.

    Args:
        tree: as for `to_jax`; linen variables, `nnx.state(model)`, optax's states.
        copy: whether the result has memory of its own.

    Returns:
        The tree, of `torch.Tensor`s of the dtypes and shapes of its leaves.

    Raises:
        TypeError: a leaf that has no twin in PyTorch (typed PRNG keys, int4, a dtype that PyTorch has not), or a traced
            one, or an object that is neither array nor container.
        ValueError: a donated array, or one that is partly on other hosts; `copy=False` where only a copy is possible.
        RuntimeError: inside `torch.func` transformations or `torch.compile`.

    Example:
        >>> import jax.numpy as jnp
        >>> from funcreg import interop
        >>> interop.to_torch({"w": jnp.array([1.0, 2.0]), "steps": 3})
        {'w': tensor([1., 2.]), 'steps': 3}
    """
    where = "to_torch"

    def convert(name: str, leaf: Any) -> Tensor:
        dtype = checked(where, name, leaf)
        return _to_tensor(leaf, TO_TORCH[dtype]) if copy else _shared_torch(where, name, leaf)

    if copy and torch.get_default_device().type == "meta":
        raise RuntimeError(f"{where}: PyTorch's default device is meta, which holds no values; call it outside")
    return rebuild(where, tree, convert, flax_as_dicts=True)


def _plain(x: Tensor) -> Tensor:
    """The tensor without its gradient history and its class: Parameter, Buffer, subclasses in name only."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.detach().as_subclass(Tensor)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(_BITS[x.dtype][1]) if x.dtype in _BITS else x


def numpy_view(x: Tensor) -> np.ndarray:
    """A CPU tensor as a NumPy array over the same memory."""
    dtype = TO_NUMPY[x.dtype]
    return x.view(_BITS[dtype][0]).numpy().view(dtype) if dtype in _BITS else x.numpy()


def to_host(leaf: Any) -> Any:
    """What `jnp.array` copies rightly: a NumPy array in C order, perhaps over the same memory; a JAX array itself."""
    if isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, Tensor):
        x = _plain(leaf)
        x = x.clone() if x._is_zerotensor() else x
        return numpy_view(x.cpu().resolve_conj().resolve_neg().contiguous())
    return np.asarray(leaf, leaf.dtype.newbyteorder("="), order="C")


def _to_tensor(leaf: Any, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor with memory of its own."""
    if isinstance(leaf, Tensor):
        return torch.empty(leaf.shape, dtype=dtype, device=leaf.device).copy_(_plain(leaf))
    # not NumPy's memory, which is rarely aligned as JAX wants it on the way back
    tensor = torch.empty(leaf.shape, dtype=dtype, device="cpu")
    view = _bits(numpy_view(tensor))
    if isinstance(leaf, jax.Array):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                view[shard.index] = _bits(np.asarray(jax.device_get(shard.data)))
    else:
        view[...] = _bits(np.asarray(leaf))
    return tensor.to(torch.get_default_device())


def _refuse_sharing(where: str, name: str, why: str) -> None:
    raise ValueError(f"{where}: {name} cannot be shared (copy=False): {why}; use copy=True")


def _shared_jax(where: str, name: str, leaf: Any) -> jax.Array:
    """A JAX array over the memory of a leaf, checked to be so."""
    if isinstance(leaf, jax.Array):
        if not _in_c_order(leaf):
            _refuse_sharing(where, name, "its memory is not in C order, and safetensors would write it wrongly")
        return leaf
    if isinstance(leaf, Tensor):
        x = _plain(leaf)
        if x.is_conj() or x.is_neg() or x._is_zerotensor():
            _refuse_sharing(where, name, "its values are not in its memory (a conjugate, negative or zero view)")
        if not x.is_contiguous():
            _refuse_sharing(where, name, f"it is not contiguous (shape {list(x.shape)}, strides {list(x.stride())})")
        pointer, size, on_cpu = x.data_ptr(), x.numel(), x.device.type == "cpu"
    else:
        x = np.asarray(leaf)
        if not x.dtype.isnative or not x.flags.c_contiguous or isinstance(leaf, np.generic):
            _refuse_sharing(where, name, "it is not a contiguous array of native byte order")
        pointer, size, on_cpu = x.ctypes.data, x.size, True
    if size and on_cpu and pointer % _ALIGNMENT:
        _refuse_sharing(where, name, f"its memory begins at no multiple of {_ALIGNMENT} bytes, which JAX needs")
    if isinstance(x, Tensor):
        if not on_cpu:
            torch.accelerator.synchronize(x.device)
        strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]  # axes of size 1 may have others, and JAX minds
        try:
            array = jax.dlpack.from_dlpack(x.as_strided(x.shape, strides), copy=False)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:  # a device or dtype that JAX lacks
            raise ValueError(f"{where}: {name} cannot be shared (copy=False): {error}; use copy=True") from error
    else:
        array = jax.device_put(x)
    if size and on_cpu and array.unsafe_buffer_pointer() != pointer:
        _refuse_sharing(where, name, "JAX made a copy of its own, perhaps for another device")
    return array


def _shared_torch(where: str, name: str, leaf: Any) -> Tensor:
    """A tensor over the memory of a leaf, checked to be so."""
    if isinstance(leaf, Tensor):
        return _plain(leaf)
    if isinstance(leaf, jax.Array):
        if len(leaf.sharding.device_set) > 1:
            _refuse_sharing(where, name, f"it is spread over {len(leaf.sharding.device_set)} devices")
        if not _in_c_order(leaf):
            _refuse_sharing(where, name, "its memory is not in C order")
        jax.block_until_ready(leaf)  # before anyone reads memory that is still being written
        try:
            tensor = torch.from_dlpack(leaf)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:  # a device or a dtype that torch lacks
            raise ValueError(f"{where}: {name} cannot be shared (copy=False): {error}; use copy=True") from error
        if leaf.size and leaf.unsafe_buffer_pointer() != tensor.data_ptr():
            _refuse_sharing(where, name, "PyTorch made a copy of its own")
        return tensor
    if isinstance(leaf, np.generic) or not leaf.dtype.isnative or not leaf.flags.writeable:
        _refuse_sharing(where, name, "it is a scalar, read-only or not of native byte order")
    if any(stride < 0 or stride % leaf.itemsize for stride in leaf.strides):
        _refuse_sharing(where, name, f"PyTorch has no strides of {list(leaf.strides)} bytes")
    x = np.asarray(leaf)
    dtype: Any = x.dtype
    return torch.from_numpy(_bits(x)).view(TO_TORCH[dtype])


def _in_c_order(x: jax.Array) -> bool:
    """Whether the memory is in C order; looked at on the CPU, where `from_dlpack` of a transposed tensor is not."""
    shards = [shard.data for shard in x.addressable_shards if shard.device.platform == "cpu"]
    return all(np.asarray(shard).flags.c_contiguous for shard in shards)

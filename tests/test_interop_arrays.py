"""`interop.to_jax` and `interop.to_torch`: the same bits, the same tree, memory of their own, and refusals by name."""

import collections
import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.torch
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

import funcreg.jax
import funcreg.torch
from funcreg import interop

to_jax, to_torch = interop.to_jax, interop.to_torch
ROOT = Path(funcreg.__file__).parent.parent
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", *FLOAT8)
DTYPES = ("bool", *INTEGERS, *FLOATS)
WIDE = {"float64": "float32", "int64": "int32", "uint64": "uint32", "complex128": "complex64"}


def numpy_dtype(dtype):
    return np.dtype(dtype if hasattr(np, dtype) else getattr(ml_dtypes, dtype))


def patterns(dtype):
    """What a dtype can hold: every 8- or 16-bit pattern; payloads of NaN, infinities, -0, subnormals, random bits."""
    if dtype == "bool":
        return np.array([True, False, True])
    size = numpy_dtype(dtype).itemsize
    if size <= 2:
        return np.arange(2 ** (8 * size), dtype=f"uint{8 * size}").view(numpy_dtype(dtype))
    random = np.random.default_rng(0).integers(0, 256, 1000 * size, np.uint8).view(numpy_dtype(dtype))
    if dtype not in FLOATS:
        return random
    part = np.dtype(f"float{4 * size}" if dtype.startswith("complex") else dtype)
    bits = f"uint{8 * part.itemsize}"
    infinity = int(np.array(np.inf, part).view(bits))
    sign = 1 << (8 * part.itemsize - 1)
    special = [0, sign, 1, sign + 1, infinity, sign + infinity, infinity + 1, sign + infinity + 12345, infinity - 1]
    special = np.array([*special, infinity + (infinity & -infinity) // 2, 0], bits)  # quiet NaN, and an even number
    return np.concatenate([special[: len(special) // 2 * 2].view(numpy_dtype(dtype)), random])


def raw(x):
    """The bytes of any array in C order, with its dtype and shape."""
    if isinstance(x, torch.Tensor):
        flat = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().reshape(-1))
        return str(x.dtype).removeprefix("torch."), tuple(x.shape), flat.view(torch.uint8).numpy().tobytes()
    return str(x.dtype), x.shape, np.asarray(x).tobytes()


def tensor_of(array):
    """A tensor with the bits of a NumPy array, made without the code under test."""
    dtype = getattr(torch, str(array.dtype))
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape).clone()


# ---------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_crosses_and_comes_back(dtype, copy):
    array = patterns(dtype)
    tensor = tensor_of(array)
    assert raw(tensor) == raw(array)
    with jax.enable_x64(dtype in WIDE):
        there = to_jax(tensor, copy)
        assert isinstance(there, jax.Array) and not there.weak_type
        assert raw(there) == raw(array)
    back = to_torch(there, copy)
    assert type(back) is torch.Tensor and raw(back) == raw(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_cross_to_either_side(dtype):
    array = patterns(dtype)
    spread = np.stack([array, array], axis=1)[::-1, 0]
    for source in (array, spread, array[:2].reshape(2, 1).T, array[0]):
        assert raw(to_torch(source)) == raw(np.asarray(source))
        with jax.enable_x64(dtype in WIDE):
            assert raw(to_jax(source)) == raw(np.asarray(source))


def test_numpy_arrays_of_the_other_byte_order_keep_their_values():
    array = np.array([1.5, -2.0], ">f4")
    assert to_torch(array).tolist() == to_jax(array).tolist() == [1.5, -2.0]


# ------------------------------------------------------------------------------------------------------------- layouts

GRID = torch.arange(24, dtype=torch.float32)
LAYOUTS = {
    "0-d": lambda: torch.tensor(3.0),
    "empty": lambda: torch.ones(3, 0, 2),
    "transposed empty": lambda: torch.ones(3, 0).t(),
    "transposed": lambda: GRID.reshape(4, 6).t(),
    "permuted": lambda: GRID.reshape(2, 3, 4).permute(1, 2, 0),
    "channels_last": lambda: GRID.reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: GRID.reshape(1, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d),
    "slice": lambda: GRID.reshape(4, 6)[1::2, ::3],
    "column": lambda: GRID.reshape(4, 6)[:, 1],
    "expanded": lambda: GRID[:3].unsqueeze(1).expand(3, 4),
    "offset": lambda: GRID[1:],
    "axis of size one": lambda: GRID[:3].reshape(1, 3).t(),
    "odd stride of an axis of size one": lambda: GRID.as_strided((3, 1), (1, 7)),
    "negative bit": lambda: torch._neg_view(GRID),
    "conjugate bit": lambda: torch.complex(GRID, GRID + 1).conj(),
    "imaginary part of a conjugate": lambda: torch.complex(GRID, GRID + 1).conj().imag,
    "zero tensor": lambda: torch._efficientzerotensor(3),
    "requires_grad": lambda: (GRID.clone().requires_grad_() * 2).reshape(4, 6),
    "parameter": lambda: torch.nn.Parameter(GRID.reshape(4, 6).t()),
    "buffer": lambda: torch.nn.Buffer(GRID.clone()),
    "inference": lambda: torch.inference_mode()(lambda: GRID * 2)(),
    "plain subclass": lambda: GRID.as_subclass(type("Named", (torch.Tensor,), {})),
}


def in_c_order(array):
    """Of the memory itself: what a NumPy array made from it says about axes of size one means nothing."""
    return tuple(array.format.layout.major_to_minor) == tuple(range(array.ndim))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_arrives_in_c_order(layout):
    tensor = LAYOUTS[layout]()
    array = to_jax({"w": tensor})["w"]
    expected = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).numpy()
    assert in_c_order(array) and raw(array) == raw(expected)
    for back in (
        to_torch(array),
        to_torch(tensor),
        to_torch(expected.T).permute(list(range(expected.ndim))[::-1]),
    ):
        assert not back.requires_grad and type(back) is torch.Tensor and raw(back) == raw(expected)
    assert to_torch(tensor).is_contiguous() and to_torch(expected.T).is_contiguous()


SHAREABLE = ("0-d", "empty", "transposed empty", "axis of size one", "odd stride of an axis of size one")
SHAREABLE += ("requires_grad", "buffer", "inference", "plain subclass")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharing_shares_or_refuses(layout):
    tensor = LAYOUTS[layout]()
    if layout not in SHAREABLE:
        with pytest.raises(
            ValueError, match=r"to_jax: the leaf 'a\.w' cannot be shared \(copy=False\): .*; use copy=True"
        ):
            to_jax({"a": {"w": tensor}}, copy=False)
        return
    array = to_jax(tensor, copy=False)
    assert in_c_order(array) and raw(array) == raw(tensor)
    assert tensor.numel() == 0 or array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert raw(to_torch(array, copy=False)) == raw(tensor)


@given(st.data())
def test_any_view_crosses(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.tuples(*[st.integers(0, 9)] * len(shape)))
    offset = data.draw(st.integers(0, 20))
    dtype = data.draw(st.sampled_from(["bool", "uint8", "int32", "bfloat16", "float32", "complex64", *FLOAT8]))
    base = tensor_of(np.resize(patterns(dtype), 200))
    tensor = base.as_strided(shape, strides, offset)
    array = to_jax(tensor)
    assert in_c_order(array) and raw(array) == raw(tensor)
    back = to_torch(array)
    assert back.is_contiguous() and raw(back) == raw(tensor)
    flip = tuple(slice(None, None, data.draw(st.sampled_from([-2, -1, 1, 2]))) for _ in shape)
    view = np.asarray(array)[flip].T
    assert in_c_order(to_jax(view)) and raw(to_jax(view)) == raw(to_torch(view)) == raw(view)
    try:
        shared = to_jax(tensor, copy=False)
    except ValueError:
        return
    assert in_c_order(shared) and raw(shared) == raw(tensor)


def test_a_jax_array_in_f_order_leaves_in_c_order():
    """`jnp.from_dlpack` of a transposed tensor makes one."""
    array = jax.dlpack.from_dlpack(GRID.reshape(4, 6).t())
    assert not in_c_order(array)
    assert in_c_order(to_jax(array)) and raw(to_jax(array)) == raw(array)
    assert to_torch(array).is_contiguous() and raw(to_torch(array)) == raw(array)
    for function in (to_jax, to_torch):
        with pytest.raises(ValueError, match="cannot be shared .* not in C order"):
            function({"w": array}, copy=False)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "negative bit", "axis of size one", "0-d", "empty"])
def test_safetensors_writes_what_arrives(layout, tmp_path):
    tensor = LAYOUTS[layout]()
    safetensors.flax.save_file(to_jax({"w": tensor}), tmp_path / "jax.safetensors")
    assert raw(safetensors.torch.load_file(tmp_path / "jax.safetensors")["w"]) == raw(tensor)
    safetensors.torch.save_file(to_torch(to_jax({"w": tensor})), tmp_path / "torch.safetensors")
    assert raw(safetensors.flax.load_file(tmp_path / "torch.safetensors")["w"]) == raw(tensor)


# --------------------------------------------------------------------------------------------------------------- trees


class Moments(NamedTuple):
    mu: Any
    nu: Any


@jax.tree_util.register_dataclass
@dataclass
class OfJax:
    w: Any
    rest: Any


@dataclass
class OfTorch:
    w: Any
    rest: Any


_pytree.register_dataclass(OfTorch)


@dataclass
class Unregistered:
    w: Any


def leaves():
    return {"z": torch.tensor([1.0, 2.0]), "a": torch.tensor(True), 3: [torch.zeros(2, 0)]}


TREES = {
    "a dict in its order": leaves,
    "OrderedDict": lambda: collections.OrderedDict(leaves()),
    "defaultdict": lambda: collections.defaultdict(list, leaves()),
    "list": lambda: [leaves(), torch.ones(2)],
    "tuple": lambda: (leaves(), (), torch.ones(2)),
    "named tuple": lambda: Moments(leaves(), torch.ones(2)),
    "a class of JAX's": lambda: OfJax(leaves(), [None, 2]),
    "a class of PyTorch's": lambda: OfTorch(leaves(), [None, 2]),
    "return type": lambda: torch.ones(2, 3).max(0),
    "what is no array": lambda: {"none": None, "numbers": (True, 3, 0.1, 1j, float("nan")), "text": ["a", b"b"]},
    "empty": lambda: {"a": {}, "b": [], "c": ()},
    "an array": lambda: torch.ones(2),
    "None": lambda: None,
}


def same(a, b):
    """Equal classes, keys in equal order, and leaves equal to the bit."""
    assert type(a) is type(b) or isinstance(a, torch.Tensor | jax.Array)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert all(same(a[key], b[key]) for key in a)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b) and all(map(same, a, b))
    elif isinstance(a, OfJax | OfTorch):
        assert same(a.w, b.w) and same(a.rest, b.rest)
    elif isinstance(a, torch.Tensor | jax.Array):
        assert raw(a) == raw(b)
    else:
        assert a is b
    return True


def kinds(tree):
    found = set()
    same_tree = lambda leaf: found.add(type(leaf)) or leaf  # noqa: E731
    _pytree.tree_map(same_tree, tree.__dict__ if isinstance(tree, OfJax) else tree)
    return found


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize("tree", TREES)
def test_trees_keep_their_form(tree, copy):
    tree = TREES[tree]()
    with jax.enable_x64(isinstance(tree, torch.return_types.max)):
        there = to_jax(tree, copy)
    assert torch.Tensor not in kinds(there)
    assert same(tree, there)
    back = to_torch(there, copy)
    assert not any(issubclass(kind, jax.Array) for kind in kinds(back))
    assert same(tree, back)


def test_a_tree_is_not_changed():
    tree = collections.OrderedDict(a=[torch.ones(2)], b=None)
    inner, tensor = tree["a"], tree["a"][0]
    to_jax(tree)
    assert tree["a"] is inner and inner[0] is tensor


def test_a_state_dict_keeps_its_metadata():
    state = torch.nn.Linear(2, 3).state_dict()
    assert to_torch(to_jax(state))._metadata == state._metadata


@pytest.mark.relaxed_promotion
def test_optax_states_cross_and_continue():
    params = {"w": jnp.ones((2, 3))}
    state = optax.adam(0.1).init(params)
    back = to_jax(to_torch(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    optax.adam(0.1).update(params, back)


def test_flax_containers_become_dicts_on_torch():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    tensors = to_torch(state)
    assert raw(tensors["layers"][0]["kernel"]) == raw(model.layers[0].kernel[...])
    assert isinstance(tensors, dict) and isinstance(tensors["layers"][1]["mean"], torch.Tensor)
    nnx.update(model, to_jax(tensors))
    assert type(to_jax(state)) is nnx.State and isinstance(to_jax(state)["layers"][0]["kernel"], nnx.Param)
    frozen = flax.core.freeze({"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}}})
    assert type(to_torch(frozen)["params"]) is dict
    assert type(to_jax(frozen)) is flax.core.FrozenDict
    assert isinstance(to_torch(model.layers[0].kernel), torch.Tensor)


def test_a_class_registered_without_names_is_walked():
    class Pair:
        def __init__(self, a, b):
            self.a, self.b = a, b

    _pytree.register_pytree_node(Pair, lambda pair: ([pair.a, pair.b], None), lambda new, _: Pair(*new))
    pair = to_jax({"p": Pair(torch.ones(2), None)})["p"]
    assert isinstance(pair, Pair) and isinstance(pair.a, jax.Array) and pair.b is None
    with pytest.raises(TypeError, match=r"the leaf 'p\.1' is torch\.int4"):
        to_jax({"p": Pair(None, torch.empty(2, dtype=torch.int4))})


# -------------------------------------------------------------------------------------------------- memory of their own


def late_sum(x):
    """Still being computed when JAX returns."""
    for _ in range(40):
        x = jnp.sin(x) * 0 + x
    return x


@pytest.mark.parametrize("layout", ["C", "offset", "transposed", "numpy", "unaligned numpy"])
@pytest.mark.parametrize("size", [16, 1_000_000])
def test_a_write_after_the_copy_to_jax_changes_nothing(layout, size):
    base = torch.ones(size + 16).clone()
    make = {
        "C": lambda: base[:size],
        "offset": lambda: base[1 : size + 1],
        "transposed": lambda: base[:size].reshape(2, -1).t(),
        "numpy": lambda: base[:size].numpy(),
        "unaligned numpy": lambda: base[1 : size + 1].numpy(),
    }
    run = jax.jit(late_sum)
    for _ in range(5):
        base.fill_(1)
        array = to_jax(make[layout]())
        base.fill_(0)
        result = run(array)
        base.fill_(7)
        assert (np.asarray(array) == 1).all() and (np.asarray(result) == 1).all()


def test_a_write_after_the_copy_to_torch_changes_nothing():
    source = jnp.ones(1000)
    pending = jax.jit(late_sum)(jnp.ones(1_000_000))  # converted before it has been computed
    array = np.ones(1000, np.float32)
    for x in (source, pending, array):
        tensor = to_torch(x)
        assert (tensor == 1).all()
        tensor.fill_(5)
        assert (np.asarray(x) == 1).all()
    array_tensor = to_torch(array)
    array[:] = 7
    assert (array_tensor == 1).all()


def test_what_is_already_there_is_copied_too():
    tensor, array = torch.ones(3), jnp.ones(3)
    to_torch(tensor).fill_(2)
    assert (tensor == 1).all()
    donate = jax.jit(lambda x: x + 1, donate_argnums=0)
    donate(to_jax(array))
    assert not array.is_deleted() and (array == 1).all()
    assert to_jax(array, copy=False) is array and to_torch(tensor, copy=False).data_ptr() == tensor.data_ptr()


def test_the_copy_is_memory_that_jax_may_take_over():
    """A donated array over memory of PyTorch's could not be reused: the first training step would hold it twice."""
    tensor = torch.ones(1000)
    array = to_jax(tensor)
    pointer = array.unsafe_buffer_pointer()
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted() and result.unsafe_buffer_pointer() == pointer
    assert (tensor == 1).all()


def test_sharing_shows_writes_on_the_other_side():
    tensor = torch.ones(16)
    array = to_jax({"w": tensor}, copy=False)["w"]
    tensor.fill_(3)
    assert (np.asarray(array) == 3).all()
    array = jnp.ones(16)
    to_torch(array, copy=False).fill_(3)
    assert (np.asarray(array) == 3).all()
    ours = torch.ones(16).numpy()  # aligned
    array, tensor = to_jax(ours, copy=False), to_torch(ours[::-1][::-1], copy=False)
    ours[:] = 3
    assert (np.asarray(array) == 3).all() and (tensor == 3).all()


def test_sharing_waits_for_what_is_being_computed():
    pending = jax.jit(late_sum)(jnp.ones(1_000_000))
    assert (to_torch(pending, copy=False) == 1).all()


def test_shared_memory_outlives_its_owner():
    array, tensor = to_jax(torch.full((100_000,), 2.0), copy=False), to_torch(jnp.full((100_000,), 2.0), copy=False)
    more = [torch.zeros(100_000) for _ in range(20)]
    assert (np.asarray(array) == 2).all() and (tensor == 2).all() and len(more) == 20


@pytest.mark.parametrize(
    "function, make",
    [
        (to_jax, lambda: torch.ones(20).numpy()[1:]),
        (to_jax, lambda: np.ones((3, 4), np.float32).T),
        (to_jax, lambda: np.ones(3, ">f4")),
        (to_jax, lambda: np.float32(3)),
        (to_torch, lambda: np.float32(3)),
        (to_torch, lambda: np.ones(3, ">f4")),
        (to_torch, lambda: np.ones(3)[::-1]),
        (to_torch, lambda: np.asarray(jnp.ones(3))),  # read-only
        (to_torch, lambda: np.ones(3, [("a", "i1"), ("b", "f4")])["b"]),  # strides of five bytes
    ],
)
def test_sharing_numpy_refuses_where_it_would_copy(function, make):
    with pytest.raises(ValueError, match=r"the leaf 'w' cannot be shared \(copy=False\): .*; use copy=True"):
        function({"w": make()}, copy=False)
    function({"w": make()})


def test_arrays_spread_over_devices_are_gathered():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from funcreg import interop
to_jax, to_torch = interop.to_jax, interop.to_torch
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
for dtype in (jnp.float32, jnp.bfloat16):
    x = jnp.arange(32.0).reshape(4, 8).astype(dtype)
    for spec in (P("a", "b"), P("b"), P(None, "a"), P(("a", "b")), P()):
        spread = jax.device_put(x, NamedSharding(mesh, spec))
        assert len(spread.devices()) == 4
        assert to_torch(spread).tolist() == x.tolist()
        assert to_jax(spread).sharding == spread.sharding and to_jax(spread).tolist() == x.tolist()
        try:
            to_torch({"w": spread}, copy=False)
        except ValueError as error:
            assert "the leaf 'w' cannot be shared (copy=False): it is spread over 4 devices" in str(error)
        else:
            raise AssertionError
with jax.default_device(jax.devices()[2]):
    import torch
    assert to_jax(torch.ones(2)).devices() == {jax.devices()[2]}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize("dtype", WIDE)
def test_64_bits_are_never_narrowed(dtype, copy):
    tensor = torch.ones(8, dtype=getattr(torch, dtype))
    words = rf"to_jax: the leaf 'bn\.0' is {dtype}, .* narrow to {WIDE[dtype]}; .*`with jax\.enable_x64\(True\):`"
    for leaf in (tensor, tensor.numpy(), tensor.numpy()[0]):
        with pytest.raises(ValueError, match=words):
            to_jax({"bn": [leaf]}, copy)
    with jax.enable_x64(True):
        array = to_jax(tensor, copy)
        assert str(array.dtype) == dtype
    assert str(to_torch(array, copy).dtype) == f"torch.{dtype}"  # on the way out x64 does not matter
    with pytest.raises(ValueError, match=words):
        to_jax({"bn": [array]}, copy)


def fake():
    with FakeTensorMode():
        return torch.ones(2)


def freed():
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def donated():
    array = jnp.ones(4)
    array.delete()
    return array


REFUSED = {
    "sparse_coo": (to_jax, lambda: torch.ones(2).to_sparse(), TypeError, "layout torch.sparse_coo.*to_dense"),
    "sparse_csr": (to_jax, lambda: torch.ones(2, 2).to_sparse_csr(), TypeError, "layout torch.sparse_csr.*to_dense"),
    "quantized": (
        to_jax,
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        TypeError,
        r"quantized tensor \(torch.qint8\).*dequantize",
    ),
    "nested": (to_jax, lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), TypeError, "nested.*unbind"),
    "jagged": (
        to_jax,
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        TypeError,
        "nested.*unbind",
    ),
    "meta": (to_jax, lambda: torch.ones(2, device="meta"), TypeError, "meta device.*no values.*load_state_dict"),
    "fake": (to_jax, fake, TypeError, "FakeTensor.*no values"),
    "lazy": (to_jax, lambda: torch.nn.LazyLinear(3).weight, TypeError, "lazy module.*run the model once"),
    "freed": (to_jax, freed, TypeError, "memory has been freed"),
    "complex32": (to_jax, lambda: torch.ones(2, dtype=torch.complex32), TypeError, r"complex32.*to\(torch.complex64\)"),
    "torch int4": (to_jax, lambda: torch.empty(2, dtype=torch.int4), TypeError, "torch.int4"),
    "int4": (to_torch, lambda: jnp.ones(2, jnp.int4), TypeError, r"int4.*astype\(jnp.int8\)"),
    "float8_e3m4": (to_torch, lambda: jnp.ones(2, jnp.float8_e3m4), TypeError, "float8_e3m4.*convert it explicitly"),
    "key": (to_torch, lambda: jax.random.key(0), TypeError, r"typed PRNG key.*jax\.random\.key_data\(key\)"),
    "float0": (to_torch, lambda: np.zeros(2, jax.dtypes.float0), TypeError, "float0.*derivative of an integer"),
    "deleted": (to_torch, donated, ValueError, "deleted or donated"),
    "text": (to_jax, lambda: np.array(["a"]), TypeError, "<U1"),
    "object": (to_torch, lambda: np.array([None]), TypeError, "object"),
    "long double": (to_torch, lambda: np.ones(2, np.longdouble), TypeError, "longdouble|float128|float96"),
    "masked": (to_torch, lambda: np.ma.ones(3), TypeError, "masked array"),
    "another library": (to_jax, lambda: memoryview_like(), TypeError, "array of another library.*np.asarray"),
    "set": (to_jax, lambda: {1, 2}, TypeError, "builtins.set, a container"),
    "dataclass": (to_torch, lambda: Unregistered(jnp.ones(2)), TypeError, "Unregistered, a container.*register"),
    "object()": (to_torch, object, TypeError, "neither an array nor a container"),
    "iterator": (to_jax, lambda: torch.nn.Linear(2, 2).parameters(), TypeError, "named_parameters"),
    "module": (to_jax, lambda: torch.nn.Linear(2, 2), TypeError, r"got a Linear.*; pass fr.params\(net\)"),
    "optimizer": (to_jax, lambda: torch.optim.SGD([torch.ones(1)]), TypeError, r"optimizer.state_dict\(\)"),
    "nnx": (to_torch, lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TypeError, "nnx.state"),
    "linen": (to_torch, lambda: nn.Dense(2), TypeError, "pass its variables"),
    "penalty": (to_jax, lambda: funcreg.torch.l1(0.1), TypeError, "got a Penalty.*factories of the other"),
    "jax penalty": (to_torch, lambda: funcreg.jax.l1(0.1), TypeError, "got a Penalty.*factories of the other"),
}


def memoryview_like():
    return type("Foreign", (), {"__array__": lambda self: np.ones(2)})()


@pytest.mark.filterwarnings(
    "ignore:.*(quantiz|nested tensors|Sparse CSR|lazy|Lazy|complex32|ComplexHalf).*:UserWarning"
)
@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_cross_is_refused_by_name(case, copy):
    function, make, error, words = REFUSED[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor|torch.ao", DeprecationWarning)
        leaf = make()
    with pytest.raises(error, match=rf"^{function.__name__}: .*'a\.w'.*") as raised:
        function({"params": {"a": {"w": leaf}}}, copy)
    assert re.search(words, str(raised.value), re.DOTALL)
    with pytest.raises(error, match=words):
        function(leaf, copy)


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize(
    "transform, words",
    [
        (torch.func.grad, "GradTrackingTensor, a traced tensor of torch.func.grad"),
        (torch.func.vmap, "BatchedTensor, a traced tensor of torch.func.vmap"),
        (torch.func.functionalize, "FunctionalTensor, a traced tensor of torch.func.functionalize"),
        (lambda f: torch.func.vmap(torch.func.grad(f)), "GradTrackingTensor"),
    ],
)
def test_traced_tensors_are_refused_by_name(transform, words, copy):
    for function in (to_jax, to_torch):
        with pytest.raises(TypeError, match=rf"the leaf 'a\.w' is a {words}"):
            transform(lambda x, function=function: function({"a": {"w": x.sum()}}, copy))(torch.ones(2))


def test_plain_tensors_inside_a_torch_transformation_are_refused():
    constant = torch.ones(2)
    for transform, name in ((torch.func.grad, "grad"), (torch.func.vmap, "vmap")):
        with pytest.raises(RuntimeError, match=rf"to_jax: called inside torch\.func\.{name}"):
            transform(lambda x: to_jax({"w": constant}))(torch.ones(2).sum() if name == "grad" else constant)
        with pytest.raises(RuntimeError, match=rf"to_torch: called inside torch\.func\.{name}"):
            transform(lambda x: to_torch({"w": jnp.ones(2)}))(torch.ones(2).sum() if name == "grad" else constant)


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.make_jaxpr, jax.linearize])
def test_traced_arrays_are_refused_by_name(transform, copy):
    for function in (to_jax, to_torch):
        inside = lambda x, function=function: function({"a": {"w": x}}, copy)  # noqa: E731
        with pytest.raises(TypeError, match=r"the leaf 'a\.w' is a \w+Tracer, a traced array"):
            jax.linearize(inside, 1.0) if transform is jax.linearize else transform(inside)(
                jnp.ones(2) if transform is jax.vmap else 1.0
            )


@pytest.mark.parametrize("copy", [True, False], ids=["copy", "shared"])
def test_constants_are_not_baked_into_a_jitted_function(copy):
    for leaf in (torch.ones(2), torch.ones(2).numpy()):
        with pytest.raises(RuntimeError, match=r"to_jax: called while JAX traces a function \(seen at the leaf 'w'\)"):
            jax.jit(lambda x, leaf=leaf: to_jax({"w": leaf}, copy)["w"] * x)(1.0)
    assert jax.grad(lambda x: (to_jax(torch.ones(2), copy) * x).sum())(1.0) == 2  # there they are not traced


def test_make_fx_and_jit_trace_are_refused():
    words = r"to_jax: called while PyTorch traces a function \(seen at the leaf 'w'"
    with pytest.raises(RuntimeError, match=words):
        make_fx(lambda x: to_jax({"w": x}))(torch.ones(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        with pytest.raises(RuntimeError, match=words):
            torch.jit.trace(lambda x: (to_jax({"w": x}), x)[1], torch.ones(2))


@pytest.mark.parametrize("function", [to_jax, to_torch])
def test_torch_compile_leaves_its_graph_here_or_says_why_not(function):
    def doubled(x):
        return function({"w": x * 2})["w"]

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"{function.__name__}: called inside torch\.compile"):
        torch.compile(doubled, fullgraph=True, backend="eager")(torch.ones(2))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo tells what it cannot trace in what comes after
        assert raw(torch.compile(doubled, backend="eager")(torch.ones(2))) == raw(torch.full((2,), 2.0))


def test_no_values_are_lost_on_a_meta_default_device():
    with torch.device("meta"), pytest.raises(RuntimeError, match="to_torch: PyTorch's default device is meta"):
        to_torch(jnp.ones(2))

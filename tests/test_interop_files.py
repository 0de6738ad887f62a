"""`interop.save` and `interop.load`: the same bits, the formats' own readers and writers, and hostile files refused."""

import concurrent.futures
import functools
import json
import os
import struct

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import optax
import pytest
import safetensors.torch
import torch
from flax import nnx

from funcreg import interop

ENDINGS = (".safetensors", ".msgpack")
DTYPES = ("bool", "int8", "int64", "uint32", "float16", "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn")


def array(dtype, shape=(2, 3)):
    x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return x.astype(getattr(ml_dtypes, dtype) if not hasattr(np, dtype) else dtype)


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(tmp_path, dtype, ending):
    tree = {"a": array(dtype), "empty": array(dtype, (0, 2)), "zero": array(dtype, ())}
    interop.save(tmp_path / f"x{ending}", tree)
    back = interop.load(tmp_path / f"x{ending}")
    assert back.keys() == tree.keys() and all(same(back[name], tree[name]) for name in tree)


@pytest.mark.parametrize("ending", ENDINGS)
def test_layouts_are_written_in_c_order(tmp_path, ending):
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    transposed = torch.arange(6.0).reshape(2, 3).t()
    tree = {
        "transposed": transposed,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 1).expand(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "shared": jax.dlpack.from_dlpack(transposed),  # of this, safetensors.flax writes other numbers
        "tied": transposed,
    }
    interop.save(tmp_path / f"x{ending}", tree)
    back = interop.load(tmp_path / f"x{ending}")
    for name, leaf in tree.items():
        np.testing.assert_array_equal(back[name], np.asarray(leaf), strict=True)


def test_safetensors_is_that_of_pytorch(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    interop.save(tmp_path / "ours.safetensors", net.state_dict())
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert net.state_dict().keys() == theirs.keys()
    assert all(torch.equal(theirs[name], x) for name, x in net.state_dict().items())
    safetensors.torch.save_file(net.state_dict(), tmp_path / "theirs.safetensors")
    back = interop.load(tmp_path / "theirs.safetensors")
    assert all(same(back[name], x.numpy()) for name, x in net.state_dict().items())


def test_msgpack_is_that_of_flax(tmp_path):
    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((2, 3)))
    state = optax.adam(1e-3).init(variables["params"])
    tree = {"variables": variables, "opt_state": state, "step": 3, "nothing": None, "list": [jnp.ones(2)]}
    interop.save(tmp_path / "ours.msgpack", tree)
    restored = flax.serialization.from_bytes(tree, (tmp_path / "ours.msgpack").read_bytes())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), restored, tree)
    (tmp_path / "theirs.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    assert str(interop.load(tmp_path / "theirs.msgpack")) == str(interop.load(tmp_path / "ours.msgpack"))


def test_flax_cuts_large_arrays_into_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.to_bytes({"a": {"b": np.arange(12.0).reshape(3, 4)}}))
    assert b"__msgpack_chunked_array__" in (tmp_path / "x.msgpack").read_bytes()
    assert same(interop.load(tmp_path / "x.msgpack")["a"]["b"], np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("ending", ENDINGS)
def test_nnx_states_are_saved_by_their_names(tmp_path, ending):
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    interop.save(tmp_path / f"x{ending}", state)
    back = interop.load(tmp_path / f"x{ending}")
    kernel = back["layers.0.kernel"] if ending == ".safetensors" else back["layers"]["0"]["kernel"]
    assert same(kernel, state["layers"][0]["kernel"].get_value())


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_state_of_an_optimizer_is_saved_without_its_constants(tmp_path, ending):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    pair = interop.match(net, {"kernel": np.ones((3, 2), "f"), "bias": np.ones(2, "f")})
    _, state = pair.optimizer_to_jax(optimizer)
    interop.save(tmp_path / f"x{ending}", (state, optax.EmptyState()))
    back = interop.load(tmp_path / f"x{ending}")
    if ending == ".safetensors":
        assert same(back["0.state.exp_avg.kernel"], state.state["exp_avg"]["kernel"]) and len(back) == 8
    else:
        restored = flax.serialization.from_state_dict(state, back["0"])
        assert restored.settings is state.settings
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), restored, state)


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    interop.save(file, {"a": np.ones(2)})
    with pytest.raises(TypeError, match="'b' is 3, and safetensors holds arrays only"):
        interop.save(file, {"a": np.zeros(2), "b": 3})

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        interop.save(file, {"a": np.zeros(2)})
    assert os.listdir(tmp_path) == ["x.safetensors"] and interop.load(file)["a"].tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, "save: two leaves have the name 'a.b'"),
        ({1: np.ones(1), "1": np.ones(1)}, ValueError, "two keys are the same as strings"),
        ({"../a": np.ones(1)}, ValueError, r"the key '\.\./a' is unsafe"),
        (functools.reduce(lambda tree, _: {"a": tree}, range(70), np.ones(1)), ValueError, "nested deeper than 64"),
        ({"a": {"__class__": np.ones(1)}}, ValueError, "the key '__class__' is unsafe"),
        ({"a": jnp.ones(2, jnp.int4)}, TypeError, "the leaf 'a' is int4"),
        ({"a": torch.ones(2, device="meta")}, TypeError, "the leaf 'a' is a tensor on the meta device"),
        ({"a": object()}, TypeError, "the leaf 'a' is a builtins.object"),
        ({"a": "text"}, TypeError, "save: 'a' is 'text', and files hold arrays and numbers"),
        ({"a": 2**70}, TypeError, "save: 'a' is 1180591620717411303424, and files hold"),
        ({"\ud800": np.ones(1)}, ValueError, "is unsafe as the name"),
        (torch.nn.Linear(1, 1), TypeError, "save: got a Linear; pass fr.params"),
        (np.ones(2), TypeError, "the tree must be a dict or another container with names, got ndarray"),
    ],
)
@pytest.mark.parametrize("ending", ENDINGS)
def test_trees_that_cannot_be_saved(tmp_path, ending, tree, error, message):
    with pytest.raises(error, match=message):
        interop.save(tmp_path / f"x{ending}", tree)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", ["complex128", "float8_e8m0fnu"])
def test_dtypes_that_safetensors_lacks(tmp_path, dtype):
    ones = {"a": np.ones(2).astype(array(dtype).dtype)}
    with pytest.raises(TypeError, match=f"save: 'a' is {dtype}, which safetensors does not hold; save as .msgpack"):
        interop.save(tmp_path / "x.safetensors", ones)
    interop.save(tmp_path / "x.msgpack", ones)
    assert same(interop.load(tmp_path / "x.msgpack")["a"], ones["a"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_writers_do_not_disturb_each_other(tmp_path, ending):
    file = tmp_path / f"x{ending}"
    interop.save(file, {"a": np.zeros(1000)})

    def work(i):
        for _ in range(10):
            interop.save(file, {"a": np.full(1000, float(i))})
            assert len(set(interop.load(file)["a"].tolist())) == 1  # one writer's, whole

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_is_written_as_others_are(tmp_path, ending):
    (tmp_path / "folder").mkdir()
    link = tmp_path / f"link{ending}"
    link.symlink_to(tmp_path / "folder" / f"x{ending}")
    interop.save(link, {"a": np.ones(2)})
    assert link.is_symlink() and interop.load(link)["a"].tolist() == [1, 1]
    (tmp_path / "plain").touch()
    assert (tmp_path / "folder" / f"x{ending}").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="save: there is no folder '.*nowhere'; make it first"):
        interop.save(tmp_path / "nowhere" / f"x{ending}", {"a": np.ones(2)})
    with pytest.raises(OSError, match=r"save: cannot write into '.*' \(File name too long\)"):
        interop.save(tmp_path / f"{'x' * 240}{ending}", {"a": np.ones(2)})
    (tmp_path / f"d{ending}").mkdir()
    with pytest.raises(IsADirectoryError, match="load: .* is a folder; name the file"):
        interop.load(tmp_path / f"d{ending}")


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.npz", "x.pkl"])
def test_formats_that_can_run_code_are_not_opened(tmp_path, name):
    with pytest.raises(ValueError, match="can run code or hold pickles"):
        interop.load(tmp_path / name)  # there is no such file: nobody looked
    with pytest.raises(ValueError, match="hold pickles; save them as .safetensors or .msgpack"):
        interop.save(tmp_path / name, {"a": np.ones(2)})


def test_other_endings_and_missing_files(tmp_path):
    with pytest.raises(TypeError, match="save: path must be a string or a Path, and come first; got dict"):
        interop.save({}, tmp_path / "x.msgpack")
    with pytest.raises(ValueError, match=r"save: path must end in \.safetensors or \.msgpack, got '.*x.h5'"):
        interop.save(tmp_path / "x.h5", {})
    for ending in ENDINGS:
        with pytest.raises(FileNotFoundError):
            interop.load(tmp_path / f"x{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float8_e5m2"])
def test_numbers_that_are_not_finite(tmp_path, dtype, value, ending):
    tree = {"a": {"b": np.array([1, value]).astype(array(dtype).dtype)}}
    interop.save(tmp_path / f"x{ending}", tree)
    with pytest.raises(ValueError, match="'a.b' has numbers that are not finite .*allow_nonfinite=True"):
        interop.load(tmp_path / f"x{ending}")
    back = interop.load(tmp_path / f"x{ending}", allow_nonfinite=True)
    assert same(back["a.b"] if ending == ".safetensors" else back["a"]["b"], tree["a"]["b"])


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def header(text, data=b"\0" * 8, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def entry(**new):
    return json.dumps({"a": GOOD["a"] | new})


SAFETENSORS = {
    "nothing": b"",
    "half a length": b"\1\2\3",
    "length beyond the file": header(entry(), length=1 << 20),
    "length of the universe": header(entry(), length=2**64 - 1),
    "no json": header("{]"),
    "truncated": header(entry(), b"\0" * 7),
    "trailing": header(entry(), b"\0" * 9),
    "overlap": header(json.dumps(GOOD | {"b": GOOD["a"]})),
    "hole": header(json.dumps(GOOD | {"b": GOOD["a"] | {"data_offsets": [12, 20]}}), b"\0" * 20),
    "overflow": header(entry(shape=[2**40, 2**40])),
    "negative": header(entry(shape=[-2])),
    "unknown dtype": header(entry(dtype="F31")),
    "wrong dtype": header(entry(dtype="F64")),
    "dtype of half bytes": header(entry(dtype="F4", shape=[16])),
    "empty but huge": header(entry(shape=[2**63, 0], data_offsets=[0, 0]), b""),
    "escapes": header(entry().replace('"a"', '"../../a"')),
    "absolute": header(entry().replace('"a"', '"/etc/a"')),
    "dunder": header(entry().replace('"a"', '"__class__.__init__"')),
    "key twice": header(entry()[:-1] + ", " + entry()[1:]),
}


def packed(shape=(2,), dtype="float32", data=b"\0" * 8, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def nested(depth):
    tree = b"\x81\xa1a" * depth + b"\x01"
    return tree


PIECES = {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": packed((2,))}}
MSGPACK = {
    "nothing": b"",
    "truncated": msgpack.packb({"a": packed()})[:-1],
    "trailing": msgpack.packb({"a": packed()}) + b"\0",
    "no dict": msgpack.packb([packed()]),
    "unknown kind": msgpack.packb({"a": msgpack.ExtType(7, b"x")}),
    "a timestamp": msgpack.packb({"a": msgpack.Timestamp(0)}),
    "complex of texts": msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb(("1", "2")))}),
    "no complex": msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb("x"))}),
    "no array": msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb("x"))}),
    "not even msgpack": msgpack.packb({"a": msgpack.ExtType(1, b"\xc1")}),
    "wrong dtype": msgpack.packb({"a": packed(dtype="float64")}),
    "wrong shape": msgpack.packb({"a": packed((3,))}),
    "negative": msgpack.packb({"a": packed((-1,))}),
    "twice negative": msgpack.packb({"a": packed((-1, -2))}),
    "huge": msgpack.packb({"a": packed((2**40, 2**40))}),
    "object": msgpack.packb({"a": packed(dtype="object")}),
    "structured": msgpack.packb({"a": packed(dtype="f4,f4")}),
    "text": msgpack.packb({"a": "import os"}),
    "bytes": msgpack.packb({"a": b"import os"}),
    "a list": msgpack.packb({"a": [packed()]}),
    "number key": msgpack.packb({1: packed()}),
    "bytes key": msgpack.packb({b"a": packed()}),
    "key twice": b"\x82" + (msgpack.packb("a") + msgpack.packb(packed())) * 2,
    "escapes": msgpack.packb({"..": packed()}),
    "dunder": msgpack.packb({"__class__": {"a": packed()}}),
    "two of one name": msgpack.packb({"a.b": packed(), "a": {"b": packed()}}),
    "deep": nested(100),
    "deeper": nested(3000),
    "missing piece": msgpack.packb({"a": PIECES}),
    "piece of another dtype": msgpack.packb(
        {"a": PIECES | {"chunks": {"0": packed((2,)), "1": packed((1,), "float64")}}}
    ),
    "no pieces": msgpack.packb({"a": PIECES | {"chunks": {}}}),
    "pieces of no array": msgpack.packb({"a": PIECES | {"chunks": {"0": 1}}}),
    "not finite": msgpack.packb({"a": float("nan")}),
}
HOSTILE = [
    (f"x{e}", name, data) for e, all in zip(ENDINGS, (SAFETENSORS, MSGPACK), strict=True) for name, data in all.items()
]


@pytest.mark.parametrize(("file", "name", "data"), HOSTILE, ids=[f"{f[2:]}: {name}" for f, name, _ in HOSTILE])
def test_hostile_files_are_refused(tmp_path, file, name, data):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match="^load: ") as refused:
        interop.load(tmp_path / file)
    assert str(tmp_path / file) in str(refused.value)


def test_the_files_above_are_refused_for_what_they_are(tmp_path):
    """Each is one step from a good one."""
    (tmp_path / "x.safetensors").write_bytes(header(entry()))
    (tmp_path / "x.msgpack").write_bytes(
        msgpack.packb({"a": packed(), "b": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))})
    )
    assert interop.load(tmp_path / "x.safetensors")["a"].tolist() == [0, 0]
    assert interop.load(tmp_path / "x.msgpack")["a"].tolist() == [0, 0]
    assert interop.load(tmp_path / "x.msgpack")["b"] == 1 + 2j
    (tmp_path / "x.msgpack").write_bytes(nested(60))
    interop.load(tmp_path / "x.msgpack")
    whole = PIECES | {"chunks": {"0": packed((2,)), "1": packed((1,), data=b"\0" * 4)}}
    (tmp_path / "x.msgpack").write_bytes(msgpack.packb({"a": whole}))
    assert interop.load(tmp_path / "x.msgpack")["a"].shape == (3,)

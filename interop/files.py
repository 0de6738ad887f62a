"""Trees of arrays in files that run no code: safetensors and flax's msgpack, read with suspicion.

Both formats are read by their own libraries, which check lengths; what they let pass is refused here: a key twice, keys
that would escape a folder or reach an object's insides, an array whose bytes do not fill its shape, unknown kinds of
values, numbers that are not finite.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._refusals import TO_TORCH, checked
from ._trees import Tree, rebuild
from ._writing import written_whole
from .arrays import numpy_view, to_host, to_torch

_DTYPES: dict[str, Any] = {dtype.name: dtype for dtype in TO_TORCH}
_CHUNKED = "__msgpack_chunked_array__"  # flax cuts arrays of a gigabyte and more into pieces
_DEPTH = 64
_RUN_CODE = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")


def save(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a tree of arrays to a file, atomically: what was there before stays until the new file is whole.

    `.safetensors` holds arrays by dotted names: a PyTorch `state_dict`, or `params.Dense_0.kernel` of linen variables;
    `.msgpack` is what `flax.serialization.from_bytes` reads: nested dicts, lists and tuples as dicts of `"0"`, `"1"`,
    and also None and Python numbers. Arrays are written in C order, tied ones each by itself.

    Args:
        path: ends in `.safetensors` or `.msgpack`.
        tree: arrays of PyTorch, JAX or NumPy: `net.state_dict()`, linen variables, the state of an optimizer, or
            `nnx.state(model, (nnx.Param, nnx.BatchStat))`, which leaves out the PRNG keys of a dropout.

    Raises:
        ValueError: another ending, a name that `load` would refuse, or two leaves of one name.
        TypeError: a leaf that the format cannot hold.
        OSError: no such folder, or none that can be written to.

    Example:
        >>> import tempfile, torch
        >>> from funcreg import interop
        >>> folder = tempfile.TemporaryDirectory()
        >>> interop.save(f"{folder.name}/net.safetensors", torch.nn.Linear(2, 1).state_dict())
        >>> sorted(interop.load(f"{folder.name}/net.safetensors"))
        ['bias', 'weight']
    """
    file = _file("save", path)
    nested = _state_dict(rebuild("save", tree, _checked, flax_as_dicts=True))
    if not isinstance(nested, dict):
        raise TypeError(f"save: the tree must be a dict or another container with names, got {type(tree).__name__}")
    leaves = dict(_named("save", nested))
    for name, leaf in leaves.items():
        whole = not isinstance(leaf, int) or -(2**63) <= leaf < 2**64
        if isinstance(leaf, str | bytes) or not whole:
            raise TypeError(
                f"save: {name!r} is {leaf!r:.60}, and files hold arrays and numbers of 64 bits; leave it out"
            )
    with written_whole("save", file) as part:
        if file.suffix == ".safetensors":
            _write_safetensors(part, leaves)
        else:
            _write_msgpack(part, nested)


def load(path: str | os.PathLike[str], allow_nonfinite: bool = False) -> dict[str, Any]:
    """Read the arrays of a file that `save`, PyTorch's or flax's own tools have written; no code in it runs.

    Pass the result to `pair.to_jax` or `pair.to_torch`, which check names, shapes and dtypes against the models.

    Args:
        path: ends in `.safetensors` or `.msgpack`; files that are pickles (`.pt`, `.bin`, `.npz` ...) are refused.
        allow_nonfinite: whether NaN and infinities are let in.

    Returns:
        NumPy arrays: of safetensors a dict by names as they stand in the file, of msgpack nested dicts.

    Raises:
        ValueError: another ending, a truncated or malformed file, a key twice, a key with `..`, a leading `/` or double
            underscores, an unknown kind of value, nesting deeper than 64, numbers that are not finite.
        FileNotFoundError: no such file.
    """
    file = _file("load", path)
    if file.is_dir():
        raise IsADirectoryError(f"load: {str(file)!r} is a folder; name the file")
    read = _read_safetensors if file.suffix == ".safetensors" else _read_msgpack
    tree = read(file)
    for name, leaf in _named("load", tree, f" ({file})"):
        if not allow_nonfinite and not _finite(leaf):
            raise ValueError(
                f"load: {name!r} has numbers that are not finite ({file}); say allow_nonfinite=True if that is meant"
            )
    return tree


def _file(where: str, path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{where}: path must be a string or a Path, and come first; got {type(path).__name__}")
    file = Path(path)
    if file.suffix in (".safetensors", ".msgpack"):
        return file
    if file.suffix in _RUN_CODE:
        remedy = "load it where you trust it (torch.load(path, weights_only=True), np.load) and pass the arrays on, or "
        raise ValueError(
            f"{where}: {file} has the ending of formats that can run code or hold pickles; "
            f"{remedy if where == 'load' else ''}save them as .safetensors or .msgpack"
        )
    raise ValueError(f"{where}: path must end in .safetensors or .msgpack, got {str(file)!r}")


def _checked(name: str, leaf: Any) -> Any:
    checked("save", name, leaf)
    return leaf


def _state_dict(node: Any) -> Any:
    """Nested dicts, as `flax.serialization.to_state_dict` makes them."""
    if isinstance(node, Mapping):
        new = {str(key): _state_dict(child) for key, child in node.items()}
        if len(new) < len(node):
            raise ValueError(f"save: two keys are the same as strings, among {list(node)[:8]}; rename one of them")
        return new
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return {field: _state_dict(getattr(node, field)) for field in node._fields}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(node, (list, tuple)):
        return {str(i): _state_dict(child) for i, child in enumerate(node)}
    if node is not None and not jax.tree.leaves(node):  # constants that JAX carries in a tree
        return {}
    return node


def _named(where: str, tree: dict[str, Any], note: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts with their dotted names, each name checked."""
    seen: set[str] = set()

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        name = ".".join(map(str, path))
        if len(path) > _DEPTH:
            raise ValueError(f"{where}: the tree is nested deeper than {_DEPTH}, at {name[:80]!r}{note}")
        if path:
            _check_key(where, path[-1], name, note)
        if isinstance(node, dict):
            for key, child in node.items():
                yield from walk(child, (*path, key))
            return
        if name in seen:
            raise ValueError(f"{where}: two leaves have the name {name!r}{note}; rename one of them")
        seen.add(name)
        yield name, node

    yield from walk(tree, ())


def _check_key(where: str, key: Any, name: str, note: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{where}: keys must be strings, got {key!r} at {name!r}{note}")
    parts = key.replace("\\", "/").replace("/", ".").split(".")
    dunder = any(part.startswith("__") and part.endswith("__") and len(part) > 3 for part in parts)
    broken = any(0xD800 <= ord(char) < 0xE000 for char in key)  # half a character, which no file can hold
    if ".." in key or key.startswith(("/", "\\")) or dunder or broken or "\0" in key or not key:
        raise ValueError(
            f"{where}: the key {key!r} is unsafe as the name of a file or of an attribute{note}; rename it where the "
            "file is made"
        )


def _finite(leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray | np.generic):
        return not isinstance(leaf, float) or math.isfinite(leaf)
    return leaf.dtype.kind in "biu" or bool(np.isfinite(leaf).all())


def _write_safetensors(part: Path, leaves: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    for name, leaf in leaves.items():
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"save: {name!r} is {leaf!r}, and safetensors holds arrays only; leave it out, or .msgpack")
        if str(leaf.dtype).removeprefix("torch.") in ("complex128", "float8_e8m0fnu"):
            raise TypeError(f"save: {name!r} is {leaf.dtype}, which safetensors does not hold; save as .msgpack")
    save_file(to_torch(leaves), part)


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            _refuse_twins(file)
            return {name: numpy_view(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, OverflowError) as error:
        # the last three: dtypes and sizes that the library lets pass and PyTorch has not
        raise ValueError(
            f"load: {file} is no safetensors file that PyTorch can hold ({type(error).__name__}: {error}); fetch or "
            "write it again"
        ) from error


def _refuse_twins(file: Path) -> None:
    """The header that the library has accepted, once more: of two equal keys it keeps one without a word."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(file, [key for key, _ in items])
        return dict(items)

    with open(file, "rb") as stream:
        json.loads(stream.read(int.from_bytes(stream.read(8), "little")), object_pairs_hook=pairs)


def _refuse_twice(file: Path, keys: list[Any]) -> None:
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"load: the key {twice!r} stands twice in {file}, and one of the two would be lost")


def _write_msgpack(part: Path, nested: dict[str, Any]) -> None:
    from flax.serialization import msgpack_serialize

    arrays = rebuild("save", nested, lambda name, leaf: np.asarray(to_host(leaf)))
    part.write_bytes(msgpack_serialize(arrays, in_place=True))


def _read_msgpack(file: Path) -> dict[str, Any]:
    import msgpack

    def pairs(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
        _refuse_twice(file, [key for key, _ in items])
        return dict(items)

    def extension(code: int, data: bytes) -> Any:
        if code in (1, 3):
            array = _array(file, data)
            return array if code == 1 else array[()]
        if code == 2:
            parts = msgpack.unpackb(data)
            if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, float) for part in parts):
                return complex(*parts)
        raise ValueError(f"load: {file} holds a value of the unknown kind {code} (msgpack's extension type)")

    data = file.read_bytes()
    try:
        tree = msgpack.unpackb(data, ext_hook=extension, object_pairs_hook=pairs)
    except ValueError as error:
        if str(error).startswith("load: "):
            raise
        text = str(error) or type(error).__name__
        raise ValueError(f"load: {file} is no whole msgpack file of flax ({text}); fetch or write it again") from error
    if not isinstance(tree, dict):
        raise ValueError(f"load: {file} must hold a dict at its top, got {type(tree).__name__}")
    return _joined(file, tree, ())


def _array(file: Path, data: bytes) -> np.ndarray:
    import msgpack

    parts = msgpack.unpackb(data, raw=True)
    if isinstance(parts, list) and len(parts) == 3:
        shape, name, buffer = parts
        dtype = _DTYPES.get(name.decode(errors="replace")) if isinstance(name, bytes) else None
        if dtype is None:
            raise ValueError(f"load: {file} holds an array of dtype {name!r}, which is not among {', '.join(_DTYPES)}")
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if sizes and isinstance(buffer, bytes) and math.prod(shape) * dtype.itemsize == len(buffer):
            return np.frombuffer(buffer, dtype).reshape(shape)
        have = f"{len(buffer)} bytes" if isinstance(buffer, bytes) else type(buffer).__name__
        raise ValueError(f"load: {file} holds an array of shape {shape} and {dtype} in {have}; fetch or write it again")
    raise ValueError(f"load: {file} holds an array that is not (shape, dtype, bytes); fetch or write it again")


def _joined(file: Path, node: Any, path: tuple[str, ...]) -> Any:
    """The tree with flax's pieces of large arrays put together, and with nothing in it but arrays and numbers."""
    name = ".".join(map(str, path))
    if len(path) > _DEPTH:
        raise ValueError(f"load: {file} is nested deeper than {_DEPTH}, at {name[:80]!r}")
    if isinstance(node, dict):
        if _CHUNKED not in node:
            return {key: _joined(file, child, (*path, key)) for key, child in node.items()}
        return _unchunked(file, name, node)
    if isinstance(node, np.ndarray | np.generic | bool | int | float | complex) or node is None:
        return node
    raise ValueError(f"load: {name!r} in {file} is a {type(node).__name__}, neither an array nor a number")


def _unchunked(file: Path, name: str, node: dict[str, Any]) -> np.ndarray:
    try:
        shape = [node["shape"][str(i)] for i in range(len(node["shape"]))]
        pieces = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
        array = np.concatenate(pieces)
        whole = len({piece.dtype for piece in pieces}) == 1 and all(type(n) is int and n >= 0 for n in shape)
        if whole and array.size == math.prod(shape):
            return array.reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"load: the pieces of {name!r} in {file} do not make up one array; fetch or write it again")

"""`exported`: a file of each precision as one function, which `check` can call."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from funcreg._manifest import Manifest
from funcreg._selectors import leaf_name

from . import arrays

# How far the float32 file may be from the float64 one, relative to the largest number of an output. Rounding of float32
# is a thousandth of that where a function is well conditioned.
DRIFT = 1e-4

_LOSSLESS = {("float32", "float64"), ("int32", "int64"), ("int16", "int64"), ("int8", "int64"), ("uint8", "int64")}


def exported(float64: Any, float32: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """One function from two exported files, for `check`: a file has one dtype, and a verdict needs runs in two.

    Export the same function twice, with a float64 and with a float32 example (on the JAX side the former inside
    `jax.enable_x64(True)`), on one wing or on both. Then

        check(exported(torch64, torch32), exported(jax64, jax32), inputs)

    compares the files of the two wings, and `check(exported(torch64, torch32), live, inputs)` those of PyTorch with a
    JAX function `live(inputs) -> results by name`. What the float32 file computes is held against the float64 file in
    every call, since a fault that only one of them has would otherwise pass for rounding: without float32 results
    `check` is inconclusive. A single file is inconclusive for the same reason; that it is its function, bit for bit on
    the torch wing, is what the export has checked and `verify_exported` checks again.

    Args:
        float64, float32: what `load_exported` of one wing returned, for the function in each precision.

    Returns:
        A function of a dict of inputs by name, or of trees as the example was, to a dict of outputs by name. It takes
        inputs of a smaller dtype than the file's where nothing is lost: labels in int32 for a file that has int64. Not
        for `jax.jit`.

    Raises:
        TypeError: no loaded files.
        ValueError: files of different wings, names or shapes, or not of these two precisions. In a call: outputs of the
            float32 file that are more than 1e-4 of their largest number away from those of the float64 file.

    Example:
        >>> import tempfile, numpy as np, torch
        >>> import funcreg.torch as fr
        >>> from funcreg import interop
        >>> def prox(x, lam):
        ...     return fr.l1(lam).prox({"x": x}, 1.0)
        >>> folder = tempfile.TemporaryDirectory()
        >>> loaded = {}
        >>> for dtype in (torch.float64, torch.float32):
        ...     example = {"x": torch.ones(3, dtype=dtype), "lam": torch.tensor(0.5, dtype=dtype)}
        ...     path = f"{folder.name}/prox_{example['x'].dtype.itemsize}.pt"
        ...     report = fr.export.export_step(prox, example, path, dynamic={})
        ...     loaded[dtype] = fr.export.load_exported(path, trusted=True)
        >>> import jax.numpy as jnp
        >>> def by_hand(inputs):
        ...     x = inputs["x"]
        ...     return {"x": jnp.sign(x) * jnp.maximum(jnp.abs(x) - inputs["lam"], 0)}
        >>> inputs = {"x": np.array([-2.0, 0.3, 0.7]), "lam": np.array(0.1)}
        >>> ours = interop.exported(loaded[torch.float64], loaded[torch.float32])
        >>> print(interop.check(ours, by_hand, inputs).verdict)
        rounding
        >>> folder.cleanup()
    """
    for name, file in (("float64", float64), ("float32", float32)):
        if not isinstance(getattr(file, "manifest", None), Manifest):
            raise TypeError(
                f"exported: {name} must be what load_exported of one of the wings returned, got {type(file).__name__}"
            )
    _check_pair(float64.manifest, float32.manifest)
    wing = importlib.import_module(f"funcreg.{float64.manifest.framework}._wing")  # the JAX wing needs optax

    def call(inputs: Mapping[str, Any]) -> dict[str, Any]:
        paths, leaves, _ = wing.paths_and_leaves(dict(inputs))
        given = {".".join(path): x for path, x in zip(paths, leaves, strict=True)}
        wide = any(_dtype(x) == "float64" for x in given.values())
        file = float64 if wide else float32
        results = file(_as_in(file, given))
        if not wide:
            with jax.enable_x64(True):
                reference = float64(_as_in(float64, given))
            _hold_against(results, reference)
        # the names that the live function's tree would have
        return {leaf_name(name.split(".")): x for name, x in results.items()}

    return call


def _check_pair(wide: Manifest, narrow: Manifest) -> None:
    if wide.framework != narrow.framework:
        raise ValueError(f"exported: float64 is a file of {wide.framework} and float32 of {narrow.framework}")
    ours, theirs = wide.methods.get("forward"), narrow.methods.get("forward")
    if ours is None or theirs is None:
        raise ValueError("exported: a file of a penalty has several functions; export_step the one that is compared")
    seen = set()
    for which in ("inputs", "outputs"):
        of64, of32 = getattr(ours, which), getattr(theirs, which)
        if {name: x.shape for name, x in of64.items()} != {name: x.shape for name, x in of32.items()}:
            raise ValueError(f"exported: the two files have {which} of different names or shapes: {of64}, {of32}")
        pairs = {(of64[name].dtype, of32[name].dtype) for name in of64}
        wrong = [pair for pair in pairs if pair[0] != pair[1] and pair != ("float64", "float32")]
        if wrong:
            raise ValueError(f"exported: the two files have {which} in {wrong[0][0]} and {wrong[0][1]}, in this order")
        seen |= pairs
    if ("float64", "float32") not in seen:
        raise ValueError("exported: both files are of one precision; export the function with float64 inputs as well")


def _as_in(file: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs in the dtypes of a file, where that loses nothing; the file refuses the others."""
    new = {}
    for name, x in given.items():
        spec = file.manifest.methods["forward"].inputs.get(name)
        if spec is not None and (_dtype(x), spec.dtype) in _LOSSLESS:
            x = x.to(getattr(torch, spec.dtype)) if isinstance(x, torch.Tensor) else x.astype(spec.dtype)
        new[name] = x
    return new


def _dtype(x: Any) -> str:
    return str(getattr(x, "dtype", "")).removeprefix("torch.")


def _hold_against(results: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    for name, x in results.items():
        narrow, wide = (np.asarray(arrays.to_host(side)).astype(np.float64) for side in (x, reference[name]))
        finite = np.isfinite(narrow) & np.isfinite(wide)
        apart = np.abs(narrow - wide)[finite].max(initial=0.0)
        largest = np.abs(wide[finite]).max(initial=0.0)
        if apart > DRIFT * largest:
            raise ValueError(
                f"exported: {name!r} of the float32 file is {apart:.1e} away from that of the float64 file, whose "
                f"largest number is {largest:.1e}: they are files of two functions, or float32 has no digits left here"
            )

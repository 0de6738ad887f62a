"""Exported files: loaded after a look at their bytes, and verified against their recorded cases."""

from __future__ import annotations

import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array, export

from ..._export_compare import TOLERANCE
from ..._export_errors import IntegrityError, SelfCheckError, VersionError
from ..._export_report import ExportReport
from ..._export_sizes import check_given
from ..._manifest import Manifest, checked_bytes, manifest_path, path_of, read
from .. import _wing
from . import _cases
from ._inputs import spec_of
from ._report import report
from ._step import SUFFIX, require_flatbuffers


class Exported:
    """A loaded file: `exported(inputs) -> outputs`, dicts of arrays by name.

    Attributes:
        manifest: names, dtypes and shapes of all inputs and outputs.
        module: what `jax.export` made of the file.
    """

    def __init__(self, manifest: Manifest, module: export.Exported) -> None:
        self.manifest, self.module = manifest, module
        self._run = jax.jit(module.call)

    def __repr__(self) -> str:
        return f"exported {self.manifest.kind} {self.manifest.function}\n{self.manifest}"

    def __call__(self, inputs: Mapping[str, Any], method: str = "forward") -> dict[str, Array]:
        """Run the file; under `jax.jit` as well.

        Args:
            inputs: arrays by name, or trees of arrays, as the example was: what is nested gets dotted names.
            method: `"forward"`.

        Returns:
            The outputs by dotted name.

        Raises:
            ValueError: an input that is missing, unknown, or of another dtype or shape; an unknown method; a file of 64
                bits outside `jax.enable_x64(True)`.
            TypeError: an input that is no array.
        """
        if method not in self.manifest.methods:
            raise ValueError(
                f"exported: there is no method {method!r}; the file has {', '.join(self.manifest.methods)}"
            )
        paths, leaves, _ = _wing.paths_and_leaves(dict(inputs))
        flat = {".".join(path): leaf for path, leaf in zip(paths, leaves, strict=True)}
        for name, x in flat.items():
            if not isinstance(x, jax.Array | np.ndarray):
                raise TypeError(f"exported: the input {name!r} must be an array, got {type(x).__name__}")
        given = {name: (x.dtype.name, x.shape) for name, x in flat.items()}
        check_given(self.manifest, method, given)
        described = self.manifest.methods[method]
        for name, spec in (described.inputs | described.outputs).items():
            if jax.dtypes.canonicalize_dtype(spec.dtype).name != spec.dtype:
                raise ValueError(
                    f"exported: {name} is {spec}, which JAX without x64 narrows; call the file inside "
                    "jax.enable_x64(True)"
                )
        return self._run(flat)


def load_exported(path: str | PathLike[str], *, trusted: bool) -> Exported:
    """Load a file that `export_step` has written, after its bytes were compared with the manifest.

    Args:
        path: the `.jax` file; its manifest lies beside it.
        trusted: must be True, in writing. A file is a program, compiled and run with all that XLA's custom calls can
            do; the sha256 in its manifest tells damage, not intent.

    Returns:
        A function of arrays by name, with the manifest.

    Raises:
        TypeError: without `trusted=True`.
        IntegrityError: the file is not the one that its manifest describes.
        VersionError: it was written by a newer funcreg, a newer version of JAX, or another framework.
        FileNotFoundError: the file or its manifest is not there.
        ImportError: flatbuffers is not installed.

    Example:
        See `export_step`.
    """
    where = "load_exported"
    file = path_of(where, path)
    if trusted is not True:
        raise TypeError(
            f"{where}: a {SUFFIX} file is a program that is compiled and run on this machine; say trusted=True if you "
            "know where it comes from"
        )
    require_flatbuffers(where)
    manifest = _manifest(where, file)
    data = checked_bytes(file.parent, manifest.files["stablehlo"])
    try:
        module = export.deserialize(bytearray(data))
    except Exception as error:  # of the right hash: never a file of ours
        raise IntegrityError(
            f"{where}: {file} is no exported file, or not one for jax {jax.__version__}: {type(error).__name__}: "
            f"{error!s:.200}; export the function again"
        ) from error
    described = [spec for _, spec in sorted(manifest.methods["forward"].inputs.items())]
    if described != list(map(spec_of, module.in_avals)):
        raise IntegrityError(f"{where}: {file.name} takes something else than its manifest says; export it again")
    return Exported(manifest, module)


def verify_exported(path: str | PathLike[str]) -> ExportReport:
    """Run the recorded cases of an exported file in a fresh process, which loads the file as a program.

    Every output may differ from the recorded one by 32 times rounding, which is eps of its largest number, or what an
    ulp in the inputs does to it: the program is compiled anew, for this machine.

    Args:
        path: the file; manifest and recorded cases lie beside it.

    Returns:
        What was compared, and the largest difference.

    Raises:
        SelfCheckError: an output differs by more.
        IntegrityError, VersionError, FileNotFoundError, ImportError: as `load_exported`.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> import funcreg.jax as fr
        >>> folder = tempfile.TemporaryDirectory()
        >>> prox = lambda x, lam: fr.l1(lam).prox({"w": x}, 1.0)
        >>> example = {"x": jnp.arange(4.0), "lam": jnp.asarray(0.5)}
        >>> report = fr.export.export_step(prox, example, f"{folder.name}/prox.jax", dynamic={})
        >>> fr.export.verify_exported(f"{folder.name}/prox.jax").compared
        1
        >>> folder.cleanup()
    """
    started, where = time.perf_counter(), "verify_exported"
    file = path_of(where, path)
    require_flatbuffers(where)
    manifest = _manifest(where, file)
    for spec in manifest.files.values():
        checked_bytes(file.parent, spec)
    platforms = manifest.self_check["platforms"]
    here = export.default_export_platform()
    if here not in platforms and "cpu" not in platforms:
        raise VersionError(f"{where}: {file} was made for {', '.join(platforms)}, and this machine has {here}")
    found, said = _cases.run(where, manifest_path(file), manifest, here if here in platforms else "cpu")
    if found.outside:
        raise SelfCheckError(
            f"{where}: {file} does not return what was recorded, in {found.outside} of {found.compared} outputs; first "
            f"at {found.first}, which is more than {TOLERANCE} times rounding. Recorded with jax "
            f"{manifest.framework_version}, run with jax {said['jax']}"
        )
    return report(file, manifest, found, started)


def _manifest(where: str, file: Path) -> Manifest:
    manifest = read(file, manifest_path(file))
    if manifest.framework != "jax":
        raise VersionError(f"{where}: {file} was made by {manifest.framework}; load it there")
    if "stablehlo" not in manifest.files or manifest.files["stablehlo"].name != file.name:
        names = ", ".join(spec.name for spec in manifest.files.values())
        raise IntegrityError(f"{where}: the manifest does not describe {file.name}, but {names}; copy both again")
    if not isinstance(manifest.self_check.get("platforms"), list):
        raise IntegrityError(f"{where}: the manifest of {file.name} names no platforms; export the function again")
    if _numbers(manifest.framework_version) > _numbers(jax.__version__):
        raise VersionError(
            f"{where}: {file} was made by jax {manifest.framework_version}, and this is {jax.__version__}: newer files "
            "are read by older versions for some weeks only; update jax, or export again with this one"
        )
    return manifest


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version 0.10.2 what decides: files made by another patch release are read."""
    return tuple(int(part) for part in version.split(".")[:2])

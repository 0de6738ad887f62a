"""Exported files: loaded after a look at their bytes, and verified against their recorded cases."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._export_errors import IntegrityError, SelfCheckError, VersionError
from ..._export_report import ExportReport
from ..._export_sizes import check_given
from ..._manifest import Manifest, checked_bytes, manifest_path, path_of, read
from .. import _wing
from . import _check, _torchscript
from ._inputs import dtype_name
from ._report import report

_FORMATS = {".pt": "torchscript", ".pt2": "pt2"}
_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Exported:
    """A loaded file: `exported(inputs) -> outputs`, dicts of tensors by name.

    Attributes:
        manifest: names, dtypes and shapes of all inputs and outputs.
        module: the TorchScript module, or the module of the exported program.
    """

    def __init__(self, manifest: Manifest, module: Any) -> None:
        self.manifest, self.module = manifest, module

    def __repr__(self) -> str:
        return f"exported {self.manifest.kind} {self.manifest.function}\n{self.manifest}"

    def __call__(self, inputs: Mapping[str, Any], method: str = "forward") -> dict[str, Tensor]:
        """Run a method of the file.

        Args:
            inputs: tensors by name, or trees of tensors, as the example was: what is nested gets dotted names.
            method: `"forward"` of a step; `"value"`, `"grad"` or `"prox"` of a penalty.

        Returns:
            The outputs by dotted name.

        Raises:
            ValueError: an input that is missing, unknown, or of another dtype or shape; an unknown method.
            TypeError: an input that is no tensor.
        """
        if method not in self.manifest.methods:
            raise ValueError(f"exported: no method {method!r}; the file has {', '.join(self.manifest.methods)}")
        paths, leaves, _ = _wing.paths_and_leaves(dict(inputs))
        flat = {".".join(path): leaf for path, leaf in zip(paths, leaves, strict=True) if leaf is not None}
        for name, x in flat.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"exported: the input {name!r} must be a tensor, got {type(x).__name__}")
        # what a TorchScript file checks itself; an exported program takes other dtypes in silence
        check_given(self.manifest, method, {name: (dtype_name(x.dtype), x.shape) for name, x in flat.items()})
        _check_devices(flat)
        return getattr(self.module, method)(flat)


def _check_devices(tensors: Mapping[str, Tensor]) -> None:
    first = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x.device != first:
            raise ValueError(f"input {name} is on {x.device}, the first one on {first}")


def load_exported(path: str | PathLike[str], *, trusted: bool) -> Exported:
    """Load a file that `export_step` or `export_penalty` has written, after its bytes were compared with the manifest.

    Args:
        path: the `.pt` or `.pt2` file; its manifest lies beside it.
        trusted: must be True, in writing. A file is a program, which can read and write other files while it is loaded;
            the sha256 in its manifest tells damage, not intent.

    Returns:
        A function of tensors by name, with the manifest.

    Raises:
        TypeError: without `trusted=True`.
        IntegrityError: the file is not the one that its manifest describes.
        VersionError: it was written by a newer funcreg, a newer major version of PyTorch, or another framework.
        FileNotFoundError: the file or its manifest is not there.

    Example:
        See `export_step`.
    """
    file = path_of("load_exported", path)
    if trusted is not True:
        raise TypeError(
            f"load_exported: a {file.suffix} file is a program that can read and write files while it is loaded; say "
            "trusted=True if you know where it comes from"
        )
    manifest = _manifest("load_exported", file)
    data = checked_bytes(file.parent, manifest.files[_FORMATS[file.suffix]])
    try:
        if _FORMATS[file.suffix] == "pt2":
            return Exported(manifest, torch.export.load(io.BytesIO(data)).module())
        module = _torchscript.from_bytes(data)
        signature = module.signature()
    except (RuntimeError, AttributeError, ValueError) as error:  # of the right hash: never a file of ours
        first = next(iter(str(error).strip().splitlines()), "")
        raise IntegrityError(
            f"load_exported: {file} is no exported file, or not one for torch {torch.__version__}: "
            f"{type(error).__name__}: {first:.200}; export the function again"
        ) from error
    if signature != manifest.signature():
        raise IntegrityError(
            f"load_exported: {file.name} takes and returns something else than its manifest says; export it again"
        )
    return Exported(manifest, module)


def verify_exported(path: str | PathLike[str]) -> ExportReport:
    """Run the recorded cases of an exported file in a fresh process, which loads the file as a program.

    With the build of PyTorch, the instruction set and the number of threads that the file was made with every output
    must be equal bit for bit. With others it may differ by 32 eps of the largest number of that output.

    Args:
        path: the file; manifest and recorded cases lie beside it.

    Returns:
        What was compared, and the largest difference.

    Raises:
        SelfCheckError: an output differs by more.
        IntegrityError, VersionError, FileNotFoundError: as `load_exported`.

    Example:
        >>> import tempfile, torch
        >>> import funcreg.torch as fr
        >>> folder = tempfile.TemporaryDirectory()
        >>> report = fr.export.export_penalty(fr.l2(0.1), {"w": torch.ones(3)}, f"{folder.name}/l2.pt")
        >>> fr.export.verify_exported(f"{folder.name}/l2.pt").bitwise
        True
        >>> folder.cleanup()
    """
    return verify_all([path])[0]


def verify_all(paths: Sequence[str | PathLike[str]]) -> list[ExportReport]:
    """Several files, verified in one process."""
    started = time.perf_counter()
    where = "verify_exported"
    files = [path_of(where, path) for path in paths]
    manifests = [_manifest(where, file) for file in files]
    for file, manifest in zip(files, manifests, strict=True):
        device = manifest.self_check["device"]
        if device != "cpu" and not getattr(torch, device).is_available():
            raise VersionError(f"{where}: {file} was made for {device}, which this machine does not have")
        for spec in manifest.files.values():
            checked_bytes(file.parent, spec)
    results = _check.run(where, [_manifest_path(file) for file in files])
    reports = []
    for file, manifest, result in zip(files, manifests, results, strict=True):
        here = (result["torch_version"], result["cpu_capability"])
        there = (manifest.framework_version, manifest.self_check.get("cpu_capability"))
        wrong = result["different"] if here == there else result["outside"]
        if wrong:
            allowed = "nothing" if here == there else f"{_check.TOLERANCE} eps of the largest number"
            raise SelfCheckError(
                f"{where}: {file} does not return what was recorded, in {wrong} of {max(wrong, result['compared'])} "
                f"outputs; first {result['first']}. Recorded with {' '.join(map(str, there))}, run with "
                f"{' '.join(here)}, between which {allowed} may differ"
            )
        reports.append(report(file, manifest, result, started))
    return reports


def _manifest_path(file: Path) -> Path:
    """A second format has the manifest of the first one."""
    own = manifest_path(file)
    others = [manifest_path(file.with_suffix(suffix)) for suffix in _FORMATS]
    return next((path for path in (own, *others) if path.is_file()), own)


def _manifest(where: str, file: Path) -> Manifest:
    beside = _manifest_path(file)
    manifest = read(file, beside)
    if manifest.framework != "torch":
        raise VersionError(f"{where}: {file} was made by {manifest.framework}; load it there")
    threads, device = manifest.self_check.get("threads"), manifest.self_check.get("device")
    if type(threads) is not int or not 1 <= threads <= 4096 or device not in _DEVICES:
        raise IntegrityError(
            f"{beside} is damaged: self_check with threads {threads!r} and device {device!r:.60}; export the "
            "function again"
        )
    kind = _FORMATS.get(file.suffix)
    if kind not in manifest.files or manifest.files[kind].name != file.name:
        names = ", ".join(spec.name for spec in manifest.files.values())
        raise IntegrityError(f"{where}: the manifest does not describe {file.name}, but {names}; copy both again")
    major = int(torch.__version__.split(".")[0])
    if int(manifest.framework_version.split(".")[0]) > major:
        raise VersionError(
            f"{where}: {file} was made by torch {manifest.framework_version}, and this is {torch.__version__}: newer "
            "files are not read by older versions; update torch, or export again with this one"
        )
    return manifest

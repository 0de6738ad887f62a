"""The manifest of an exported function: what is in its files, as JSON that any host can read. No framework.

A manifest lies beside the file it describes, under the name of that file plus `.json`:

    {
      "schema": 1,
      "kind": "step",                              or "penalty"
      "function": "step",                          its name, for people
      "framework": "torch", "framework_version": "2.13.0",
      "methods": {
        "forward": {
          "inputs": {"x": {"dtype": "float32", "shape": ["batch", 4]}, ...},
          "outputs": {"loss": {"dtype": "float32", "shape": []}, ...}
        }
      },
      "sizes": {"batch": {"refused": [0]}},        dynamic dimensions, and the sizes the file refuses
      "files": {
        "torchscript": {"name": "step.pt", "sha256": "...", "bytes": 7600},
        "cases": {"name": "step.pt.safetensors", "sha256": "...", "bytes": 12000}
      },
      "cases": [{"method": "forward", "sizes": {"batch": 1}, "carried": ["state.params.w"]}, ...],
      "self_check": {"compared": 96, "bitwise": true, "threads": 2, "cpu_capability": "AVX512", ...}
    }

An entry of a shape is a number, the name of a dynamic dimension, or for outputs an expression in such names
(`"2*batch"`). The arrays of case `i` stand in the file of cases as `i.in.NAME` and `i.out.NAME`; an input without a
dynamic dimension is the same in all cases and stands there once, as `in.NAME`. But a training step begins where the
one before ended: an input of case `i` that is `carried` is `(i-1).out.NAME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ._export_errors import IntegrityError, VersionError

SCHEMA = 1
SUFFIX = ".json"
# What safetensors and hosts know; complex numbers, 8-bit floats and 4-bit integers are not among them.
DTYPES = (
    "float32", "float64", "float16", "bfloat16",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip


@dataclass(frozen=True)
class ArraySpec:
    """An input or output: its dtype and shape."""

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class MethodSpec:
    """A function in the file, from named arrays to named arrays."""

    inputs: dict[str, ArraySpec]
    outputs: dict[str, ArraySpec]


@dataclass(frozen=True)
class FileSpec:
    """A file beside the manifest, by its bytes."""

    name: str
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> Self:
        data = path.read_bytes()
        return cls(path.name, hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True)
class Manifest:
    """What the files of an exported function hold; see the head of this file for the JSON form."""

    kind: str
    function: str
    framework: str
    framework_version: str
    methods: dict[str, MethodSpec]
    sizes: dict[str, dict[str, list[int]]]
    files: dict[str, FileSpec]
    cases: list[dict[str, Any]]
    self_check: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __str__(self) -> str:
        """Names, dtypes and shapes, method by method."""
        lines = []
        for name, method in self.methods.items():
            lines.append(f"{name}:")
            lines += [f"  in   {key}: {spec}" for key, spec in method.inputs.items()]
            lines += [f"  out  {key}: {spec}" for key, spec in method.outputs.items()]
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Read what `to_json` has written.

        Raises:
            VersionError: a newer schema.
            IntegrityError: not a manifest, or a field that is missing or unknown.
        """
        try:
            given = json.loads(text)
            schema = given["schema"]
            if type(schema) is not int or schema < 1:
                raise ValueError(f"schema {schema!r:.60}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise IntegrityError(
                f"{where} is not the manifest of an exported function ({problem:.200}); copy it again, or export the "
                "function again"
            ) from None
        if schema > SCHEMA:
            raise VersionError(
                f"{where} has schema {schema}, and this version of funcreg reads up to {SCHEMA}; update funcreg, or "
                "export the function again with the version that is installed"
            )
        try:
            given["methods"] = {name: _method(method) for name, method in given["methods"].items()}
            given["files"] = {kind: FileSpec(**file) for kind, file in given["files"].items()}
            manifest = cls(**given)
            manifest._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise IntegrityError(f"{where} is damaged: {problem:.300}; export the function again") from None
        return manifest

    def _check(self) -> None:
        """Raise any error if an entry is missing or of another kind: what is read later is then there."""
        for what in ("kind", "function", "framework"):
            _require(isinstance(getattr(self, what), str), what, getattr(self, what))
        [int(part) for part in self.framework_version.split(".")[:2]]
        _require(isinstance(self.self_check, dict), "self_check", self.self_check)
        for spec in self.files.values():
            inside = isinstance(spec.name, str) and re.fullmatch(r"(?!\.{1,2}$)[^/\\\0]+", spec.name)
            _require(inside, "a file that is not in the folder of its manifest", spec.name)
            _require(isinstance(spec.sha256, str) and len(spec.sha256) == 64, "sha256", spec.sha256)
            _require(_is_size(spec.bytes), "bytes", spec.bytes)
        for name, method in self.methods.items():
            _require(method.inputs and method.outputs, f"inputs and outputs of {name}", method)
            for key, spec in (method.inputs | method.outputs).items():
                _require(spec.dtype in DTYPES, f"dtype of {key}", spec.dtype)
                _require(all(_is_size(n) or isinstance(n, str) for n in spec.shape), f"shape of {key}", spec.shape)
            for dim in (n for spec in method.inputs.values() for n in spec.shape if isinstance(n, str)):
                refused = self.sizes[dim]["refused"]
                _require(isinstance(refused, list) and all(map(_is_size, refused)), f"sizes of {dim}", refused)
        _require(self.cases and "cases" in self.files, "recorded cases", self.cases)
        for i, case in enumerate(self.cases):
            inputs = self.methods[case["method"]].inputs
            dims = {dim for spec in inputs.values() for dim in spec.shape if isinstance(dim, str)}
            _require(case["sizes"].keys() == dims and all(map(_is_size, case["sizes"].values())), "sizes", case)
            carried = case["carried"]
            _require(isinstance(carried, list) and set(carried) <= set(inputs if i else ()), "carried", case)

    def signature(self) -> str:
        """The part of the manifest that is also stored inside the file: what it takes and returns."""
        return json.dumps({"schema": self.schema, "methods": asdict(self)["methods"], "sizes": self.sizes})


def _require(holds: Any, what: str, seen: Any) -> None:
    if not holds:
        raise ValueError(f"{what}: {seen!r:.100}")


def _is_size(x: Any) -> bool:
    return type(x) is int and x >= 0


def _method(given: Mapping[str, Any]) -> MethodSpec:
    inputs, outputs = (
        {name: ArraySpec(x["dtype"], tuple(x["shape"])) for name, x in given[key].items()}
        for key in ("inputs", "outputs")
    )
    return MethodSpec(inputs, outputs)


def manifest_path(path: Path) -> Path:
    """Where the manifest of an exported file lies."""
    return path.with_name(path.name + SUFFIX)


def path_of(where: str, path: Any) -> Path:
    """The path of an exported file that is to be read.

    Raises:
        TypeError: no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{where}: path must be a string or a Path, got {type(path).__name__}")
    return Path(path)


def read(path: Path, beside: Path) -> Manifest:
    """The manifest of an exported file, from the path of the manifest.

    Raises:
        FileNotFoundError: the file or its manifest is not there.
        VersionError, IntegrityError: as `Manifest.from_json`.
    """
    for needed in (path, beside):
        if not needed.is_file():
            problem = "is a folder; name the file in it" if needed.is_dir() else "is not there"
            raise FileNotFoundError(f"{needed} {problem}; an exported file and its {path.name}{SUFFIX} belong together")
    return Manifest.from_json(beside.read_text(encoding="utf-8", errors="replace"), str(beside))


def checked_bytes(folder: Path, spec: FileSpec) -> bytes:
    """The bytes of a file, read once and compared with the manifest before any loader sees them.

    Raises:
        IntegrityError: they are others. This tells damage from a whole file, not a friend from a foe: who can write the
            file can write its manifest too.
    """
    path = folder / spec.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, but its manifest names it")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != spec.sha256:
        raise IntegrityError(
            f"{path} is not the file that its manifest describes: sha256 {found[:16]}... of {len(data)} bytes, "
            f"{spec.sha256[:16]}... of {spec.bytes} expected; copy it again together with its manifest, or export again"
        )
    return data

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ._export_errors import IntegrityError, VersionError

SCHEMA = 1
SUFFIX = ".json"


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
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{where} is not the manifest of an exported function ({error!r})") from None
        if not isinstance(schema, int) or schema > SCHEMA:
            raise VersionError(
                f"{where} has schema {schema!r}, and this version of funcreg reads up to {SCHEMA}; update funcreg, or "
                "export the function again with the version that is installed"
            )
        try:
            given["methods"] = {name: _method(method) for name, method in given["methods"].items()}
            given["files"] = {kind: FileSpec(**file) for kind, file in given["files"].items()}
            manifest = cls(**given)
            manifest._check()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise IntegrityError(f"{where} is damaged: {error!r}; export the function again") from None
        return manifest

    def _check(self) -> None:
        """Raise any error if an entry that is read later is missing or of another kind."""
        [int(part) for part in self.framework_version.split(".")[:2]]
        if not self.cases or "cases" not in self.files:
            raise ValueError("no recorded cases")
        for case in self.cases:
            inputs = self.methods[case["method"]].inputs
            dims = {dim for spec in inputs.values() for dim in spec.shape if isinstance(dim, str)}
            if case["sizes"].keys() != dims or set(case["carried"]) - set(inputs):
                raise ValueError(f"the case {case} does not fit the inputs of {case['method']}")
        for dim in {dim for m in self.methods.values() for x in m.inputs.values() for dim in x.shape}:
            if isinstance(dim, str):
                list(self.sizes[dim]["refused"])

    def signature(self) -> str:
        """The part of the manifest that is also stored inside the file: what it takes and returns."""
        return json.dumps({"schema": self.schema, "methods": asdict(self)["methods"], "sizes": self.sizes})


def _method(given: Mapping[str, Any]) -> MethodSpec:
    inputs, outputs = (
        {name: ArraySpec(x["dtype"], tuple(x["shape"])) for name, x in given[key].items()}
        for key in ("inputs", "outputs")
    )
    return MethodSpec(inputs, outputs)


def manifest_path(path: Path) -> Path:
    """Where the manifest of an exported file lies."""
    return path.with_name(path.name + SUFFIX)


def read(path: Path, beside: Path) -> Manifest:
    """The manifest of an exported file, from the path of the manifest.

    Raises:
        FileNotFoundError: the file or its manifest is not there.
        VersionError, IntegrityError: as `Manifest.from_json`.
    """
    for needed in (path, beside):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is not there; an exported file and its {SUFFIX} belong together")
    return Manifest.from_json(beside.read_text(encoding="utf-8", errors="replace"), str(beside))


def checked_bytes(folder: Path, spec: FileSpec) -> bytes:
    """The bytes of a file, read once and compared with the manifest before any loader sees them.

    Raises:
        IntegrityError: they are others. This tells damage from a whole file, not a friend from a foe: who can write the
            file can write its manifest too.
    """
    if Path(spec.name).name != spec.name:
        raise IntegrityError(f"the manifest names the file {spec.name!r}, which is not in its own folder")
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

"""What an export or a verification found. No framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ._manifest import Manifest


@dataclass(frozen=True)
class ExportReport:
    """What was written or verified: `print(report)` shows it.

    Attributes:
        path: the file.
        manifest: its manifest, with names, dtypes and shapes of all inputs and outputs.
        compared: how many outputs were compared with recorded ones.
        bitwise: whether all of them were equal, bit for bit.
        worst_abs: the largest difference.
        worst_ulp: the same, counted in representable numbers.
        seconds: how long it took.
    """

    path: Path
    manifest: Manifest
    compared: int
    bitwise: bool
    worst_abs: float
    worst_ulp: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.manifest.kind} {self.manifest.function}, {', '.join(self.manifest.files)}"]
        lines.append(str(self.manifest))
        verdict = "equal bit for bit" if self.bitwise else f"within {self.worst_abs:.3g} ({self.worst_ulp} ulp)"
        said = {key: x for key, x in self.manifest.self_check.items() if key not in ("compared", "bitwise")}
        lines.append(
            f"{self.compared} outputs in a fresh process are {verdict}; {self.manifest.framework} "
            f"{self.manifest.framework_version}, {', '.join(f'{key} {x}' for key, x in said.items())}, "
            f"{self.seconds:.1f} s"
        )
        return "\n".join(lines)

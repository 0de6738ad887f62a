"""What the self-check found, as a report."""

import time
from pathlib import Path

from ..._export_compare import Difference
from ..._export_report import ExportReport
from ..._manifest import Manifest


def report(path: Path, manifest: Manifest, found: Difference, started: float) -> ExportReport:
    return ExportReport(
        path,
        manifest,
        found.compared,
        not found.different,
        found.worst_abs,
        found.worst_ulp,
        time.perf_counter() - started,
    )

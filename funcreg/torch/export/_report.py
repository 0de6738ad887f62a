"""What the self-check found, as a report."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._export_report import ExportReport
from ..._manifest import Manifest


def report(path: Path, manifest: Manifest, result: Mapping[str, Any], started: float) -> ExportReport:
    return ExportReport(
        path,
        manifest,
        result["compared"],
        result["different"] == 0,
        result["worst_abs"],
        result["worst_ulp"],
        time.perf_counter() - started,
    )

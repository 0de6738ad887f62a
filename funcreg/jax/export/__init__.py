"""Whole training steps as files that `jax.export` can read anywhere, and that cannot go wrong silently."""

from ..._export_errors import CapturedTensorError as CapturedTensorError
from ..._export_errors import ControlFlowError as ControlFlowError
from ..._export_errors import ExportError as ExportError
from ..._export_errors import IntegrityError as IntegrityError
from ..._export_errors import ResultError as ResultError
from ..._export_errors import SelfCheckError as SelfCheckError
from ..._export_errors import SpecializationError as SpecializationError
from ..._export_errors import UnsupportedOpError as UnsupportedOpError
from ..._export_errors import VersionError as VersionError
from ..._export_report import ExportReport as ExportReport
from ..._manifest import ArraySpec as ArraySpec
from ..._manifest import Manifest as Manifest
from ..._manifest import MethodSpec as MethodSpec
from ._load import Exported as Exported
from ._load import load_exported as load_exported
from ._load import verify_exported as verify_exported
from ._step import export_step as export_step

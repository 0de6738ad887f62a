"""What can go wrong when a function is exported, or an exported one is loaded: one class for each remedy. No
framework."""


class ExportError(RuntimeError):
    """A function cannot be exported, or an exported file cannot be used; subclasses say what to change."""


class SpecializationError(ExportError):
    """A dimension that was to be dynamic has been fixed: the file would be right at one size, or at some, only."""


class ControlFlowError(ExportError):
    """The function looks at the numbers in a tensor: `if`, `.item()`, boolean masks, shapes that depend on data."""


class CapturedTensorError(ExportError):
    """The function uses a tensor that is none of its arguments: it would be frozen into the file."""


class MutationError(ExportError):
    """The function writes into one of its arguments."""


class RandomOpError(ExportError):
    """The function draws random numbers: the file would not give the same result twice."""


class UnsupportedOpError(ExportError):
    """The function uses an operation or a constant that the format of the file cannot hold."""


class BakedDeviceError(ExportError):
    """The function moves data to a device of its own choice."""


class ResultError(ExportError, TypeError):
    """The function returns something that a file cannot return."""


class SelfCheckError(ExportError):
    """A file, loaded in a fresh process, did not return what the function had returned."""


class IntegrityError(ExportError, ValueError):
    """A file is not the one that its manifest describes."""


class VersionError(ExportError, ValueError):
    """A file was written by a newer version than the one that is to read it."""

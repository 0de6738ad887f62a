"""A pure function of tensors, such as a whole training step, as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor

from ..._export_report import ExportReport
from ._inputs import Method, caller, flatten_outputs, take_apart


def export_step(
    fn: Callable[..., Any],
    example: Mapping[str, Any],
    path: str | PathLike[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str] | None = None,
    formats: Sequence[str] = ("torchscript",),
    check_sizes: Sequence[int] = (1, 2, 5, 16),
    overwrite: bool = False,
) -> ExportReport:
    """Write a pure function of tensors, such as a training step, to a file that checks its inputs and itself.

    Args:
        fn: a function of tensors and of trees of tensors (dicts, a TrainState, states of optax), which changes none of
            them, returns tensors or trees of them, and works at every size of the dynamic dimensions. Numbers and
            penalties that it closes over become constants of the file.
        example: its arguments by name; entries that are no parameter go to its `*args`, in this order. All numbers are
            tensors: `{"lr": torch.tensor(0.1)}`.
        path: ends in `.pt` (in `.pt2` if that is the first of the formats); manifest and recorded cases are written
            beside it.
        dynamic: which dimensions may have any size, and how they are called: `{"x": {0: "batch"}, "y": {0: "batch"}}`,
            by name of an input or of an argument that is a tree. Equal names are equal sizes, which the file checks.
            `{}`: none. In the example they are 2 or more.
        outputs: names for the components of a returned tuple, `("state", "metrics")`, so that a host can feed a state
            back under the name it came out with. None: `"0"`, `"1"`, ...; a single tensor is called `"output"`.
        formats: `"torchscript"`, and `"pt2"`, an ExportedProgram of the same graph.
        check_sizes: the sizes of the dynamic dimensions at which the file is run and compared with the function,
            besides the example's. The file refuses the sizes 0 and 1 unless they are among these.
        overwrite: replace the files that are there.

    Returns:
        What was written and compared; `print` it for the names, dtypes and shapes of all inputs and outputs.

    Raises:
        ExportError: the function cannot be exported; the subclass and the message say what to change.
        SelfCheckError: the file did not return the function's bits. Nothing is left behind, as after every error.
        FileExistsError: without `overwrite`.
        ValueError, TypeError: arguments that do not fit together. What the function itself raises is passed on.

    Example:
        >>> import tempfile, torch
        >>> import funcreg.torch as fr
        >>> folder = tempfile.TemporaryDirectory()
        >>> def loss(params, x, y):
        ...     return ((x @ params["w"] - y) ** 2).mean()
        >>> init, step = fr.train_step(loss, lambda hyper: fr.prox_sgd(hyper["lr"], fr.l1(hyper["lam"])))
        >>> hyper = {"lr": torch.tensor(0.1), "lam": torch.tensor(0.5)}
        >>> example = {"state": init({"w": torch.ones(3)}, hyper), "hyper": hyper}
        >>> example |= {"x": torch.randn(8, 3), "y": torch.randn(8)}
        >>> report = fr.export.export_step(
        ...     step,
        ...     example,
        ...     f"{folder.name}/step.pt",
        ...     dynamic={"x": {0: "batch"}, "y": {0: "batch"}},
        ...     outputs=("state", "metrics"),
        ... )
        >>> report.bitwise, report.manifest.methods["forward"].inputs["x"].shape
        (True, ('batch', 3))
        >>> exported = fr.export.load_exported(f"{folder.name}/step.pt", trusted=True)
        >>> batch = {"x": torch.ones(2, 3), "y": torch.full((2,), 3.0)}
        >>> exported(example | batch)["state.params.w"]
        tensor([0.9500, 0.9500, 0.9500])
        >>> folder.cleanup()
    """
    from ._write import write  # tracing needs modules that take half a second to import

    where = "export_step"
    inputs = take_apart(where, example, dynamic)
    call = caller(where, fn, list(example))

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return flatten_outputs(where, call(inputs.rebuild(list(tensors.values()))), outputs)

    name = getattr(fn, "__name__", type(fn).__name__)
    return write(where, "step", name, {"forward": Method(run, inputs)}, path, formats, check_sizes, overwrite)

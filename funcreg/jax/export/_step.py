"""A pure function of arrays, such as a whole training step, as a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from os import PathLike
from typing import Any

import jax
from jax import Array, export

from ..._artifact import staged, target
from ..._export_errors import SelfCheckError
from ..._export_names import caller
from ..._export_report import ExportReport
from ..._export_sizes import combinations, to_check
from ..._manifest import FileSpec, Manifest, MethodSpec, manifest_path
from . import _cases
from ._inputs import flatten_outputs, spec_of, take_apart
from ._report import report
from ._trace import trace

SUFFIX = ".jax"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_step(
    fn: Callable[..., Any],
    example: Mapping[str, Any],
    path: str | PathLike[str],
    *,
    dynamic: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str] | None = None,
    platforms: Sequence[str] = ("cpu",),
    check_sizes: Sequence[int] = (1, 2, 5, 16),
    overwrite: bool = False,
) -> ExportReport:
    """Write a pure function of arrays, such as a training step, to a file, and check the file.

    Args:
        fn: a function of arrays and of trees of arrays (dicts, a TrainState, states of optax), which returns arrays or
            trees of them, and works at every size of the dynamic dimensions. Numbers, penalties and NumPy arrays that
            it closes over become constants of the file.
        example: its arguments by name; entries that are no parameter go to its `*args`, in this order. All numbers are
            arrays: `{"lr": jnp.asarray(0.1)}`.
        path: ends in `.jax`; manifest and recorded cases are written beside it.
        dynamic: which dimensions may have any size, and how they are called: `{"x": {0: "batch"}, "y": {0: "batch"}}`,
            by name of an input or of an argument that is a tree. Equal names are equal sizes, which is checked. `{}`:
            none. In the example they are 2 or more. Size 0 is refused, as by every symbolic dimension of JAX.
        outputs: names for the components of a returned tuple, `("state", "metrics")`, so that a host can feed a state
            back under the name it came out with. None: `"0"`, `"1"`, ...; a single array is called `"output"`.
        platforms: where the file is to run, some of `"cpu"`, `"cuda"`, `"rocm"` and `"tpu"`. It is checked on one of
            them, that of this machine or the CPU.
        check_sizes: the sizes of the dynamic dimensions at which the file is run and compared with the function,
            besides the example's; both are compiled for each. Size 1 is refused later unless it is among these.
        overwrite: replace the files that are there.

    Returns:
        What was written and compared; `print` it for the names, dtypes and shapes of all inputs and outputs.

    Raises:
        ExportError: the function cannot be exported; the subclass and the message say what to change.
        SelfCheckError: an output of the file is further from the function's than 32 times rounding: eps of its largest
            number, or what an ulp in the inputs does to it. Nothing is left behind, as after every error.
        FileExistsError: without `overwrite`.
        ImportError: flatbuffers is not installed.
        ValueError, TypeError: arguments that do not fit together. What the function itself raises is passed on.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> import funcreg.jax as fr
        >>> folder = tempfile.TemporaryDirectory()
        >>> def loss(params, x, y):
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> init, step = fr.train_step(loss, lambda hyper: fr.prox_sgd(hyper["lr"], fr.l1(hyper["lam"])))
        >>> hyper = {"lr": jnp.asarray(0.1), "lam": jnp.asarray(0.5)}
        >>> example = {"state": init({"w": jnp.ones(3)}, hyper), "hyper": hyper}
        >>> example |= {"x": jnp.ones((8, 3)), "y": jnp.ones(8)}
        >>> report = fr.export.export_step(
        ...     step,
        ...     example,
        ...     f"{folder.name}/step.jax",
        ...     dynamic={"x": {0: "batch"}, "y": {0: "batch"}},
        ...     outputs=("state", "metrics"),
        ...     check_sizes=(1, 5),
        ... )
        >>> report.compared, report.manifest.methods["forward"].inputs["x"].shape
        (20, ('batch', 3))
        >>> exported = fr.export.load_exported(f"{folder.name}/step.jax", trusted=True)
        >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.full((2,), 3.0)}
        >>> print(exported(example | batch)["state.params.w"])
        [0.95 0.95 0.95]
        >>> folder.cleanup()
    """
    started, where = time.perf_counter(), "export_step"
    require_flatbuffers(where)
    sizes_to_check = to_check(where, check_sizes, least=1)
    platform = _platform(where, platforms)
    file = target(where, path, SUFFIX, overwrite)
    inputs = take_apart(where, example, dynamic)
    call = caller(where, fn, list(example))

    def run(arrays: Mapping[str, Array]) -> dict[str, Any]:
        return flatten_outputs(where, call(inputs.rebuild(arrays)), outputs)

    # first: what is wrong with the function itself is told by its own error
    cases = _cases.record(where, run, inputs, combinations(inputs.sizes, sizes_to_check), platform)
    exported = trace(where, run, inputs, platforms)
    results = dict(zip(sorted(cases[0].outputs), exported.out_avals, strict=True))
    draft = Manifest(
        kind="step",
        function=getattr(fn, "__name__", type(fn).__name__),
        framework="jax",
        framework_version=jax.__version__,
        methods={"forward": MethodSpec(inputs.specs(), {name: spec_of(results[name]) for name in cases[0].outputs})},
        sizes={dim: {"refused": [n for n in (0, 1) if n not in sizes_to_check]} for dim in inputs.sizes},
        files={},
        cases=[{"method": "forward", "sizes": case.sizes, "carried": case.carried} for case in cases],
    )
    with staged(where, file, overwrite) as folder:
        (folder / file.name).write_bytes(exported.serialize())
        (folder / f"{file.name}.safetensors").write_bytes(_cases.to_bytes(cases, inputs))
        names = {"stablehlo": file.name, "cases": f"{file.name}.safetensors"}
        draft = replace(draft, files={key: FileSpec.of(folder / name) for key, name in names.items()})
        described = manifest_path(folder / file.name)
        described.write_text(draft.to_json(), encoding="utf-8")
        found, said = _cases.run(where, described, draft, platform)
        if found.outside:
            raise SelfCheckError(
                f"{where}: the file does not return what the function returns, in {found.outside} of {found.compared} "
                f"outputs; first at {found.first}. A function that keeps state of its own, draws NumPy's random "
                "numbers or reads a clock cannot be exported: what it takes from there is an input"
            )
        checked = {"compared": found.compared, "bitwise": not found.different, "platforms": list(platforms), **said}
        manifest = replace(draft, self_check=checked)
        described.write_text(manifest.to_json(), encoding="utf-8")
    return report(file, manifest, found, started)


def require_flatbuffers(where: str) -> None:
    if find_spec("flatbuffers") is None:
        raise ImportError(f"{where}: files of jax.export need flatbuffers: pip install 'funcreg[jax]'")


def _platform(where: str, platforms: Sequence[str]) -> str:
    """Where the file is checked."""
    chosen = list(platforms)
    if isinstance(platforms, str) or not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(PLATFORMS):
        raise ValueError(f"{where}: platforms must be some of {PLATFORMS}, got {platforms!r}")
    here = export.default_export_platform()
    if here not in chosen and "cpu" not in chosen:
        raise ValueError(
            f"{where}: platforms must have {here!r} or 'cpu', where the file can be checked, got {platforms!r}"
        )
    return here if here in chosen else "cpu"

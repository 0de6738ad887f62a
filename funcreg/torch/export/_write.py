"""From functions of named tensors to files: trace, source, recorded cases, self-check, manifest."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._artifact import staged, target
from ..._manifest import ArraySpec, FileSpec, Manifest, MethodSpec, manifest_path
from . import _check, _refusals, _source, _torchscript, _trace
from ._inputs import DTYPES, Method, Tensors, dtype_name
from ._report import ExportReport, report

SUFFIXES = {"torchscript": ".pt", "pt2": ".pt2"}


def write(
    where: str,
    kind: str,
    name: str,
    methods: Mapping[str, Method],
    path: Any,
    formats: Sequence[str],
    check_sizes: Sequence[int],
    overwrite: bool,
) -> ExportReport:
    """Write the files of some functions; nothing is left behind if anything goes wrong."""
    started = time.perf_counter()
    formats = _formats(where, formats)
    sizes_to_check = _sizes(where, check_sizes)
    file = target(where, path, SUFFIXES[formats[0]], overwrite)
    cases = _record(methods, sizes_to_check)  # first: what is wrong with the function itself is told by its own error
    traces = {key: _traced(where, method, sizes_to_check) for key, method in methods.items()}
    dims = dict.fromkeys(dim for method in methods.values() for dim in method.inputs.sizes)
    sizes = {dim: {"refused": [n for n in (0, 1) if n not in sizes_to_check]} for dim in dims}
    specs = {key: _spec(methods[key], traces[key]) for key in methods}
    described = [{"method": case.method, "sizes": case.sizes} for case in cases]
    environment = {"threads": torch.get_num_threads(), "device": next(iter(methods.values())).inputs.device.type}
    draft = Manifest(kind, name, "torch", torch.__version__, specs, sizes, {}, described, environment)
    with staged(where, file, overwrite) as folder:
        if "torchscript" in formats:
            data = _torchscript_bytes(where, draft, traces)
            (folder / file.with_suffix(SUFFIXES["torchscript"]).name).write_bytes(data)
        if "pt2" in formats:
            from ._pt2 import save_pt2

            save_pt2(traces["forward"], methods["forward"].inputs, folder / file.with_suffix(".pt2").name)
        _save_cases(cases, methods, folder / f"{file.name}.safetensors")
        names = {key: file.with_suffix(SUFFIXES[key]).name for key in formats} | {"cases": f"{file.name}.safetensors"}
        files = {key: FileSpec.of(folder / name) for key, name in names.items()}
        temporary = manifest_path(folder / file.name)
        temporary.write_text(_with(draft, files=files).to_json(), encoding="utf-8")
        (result,) = _check.run(where, [temporary])
        _check.require_equal(where, result)
        checked = {**environment, **{key: result[key] for key in ("compared", "cpu_capability")}, "bitwise": True}
        manifest = _with(draft, files=files, self_check=checked)
        temporary.write_text(manifest.to_json(), encoding="utf-8")
    return report(file, manifest, result, started)


def _with(manifest: Manifest, **changes: Any) -> Manifest:
    return Manifest(**{**{key: getattr(manifest, key) for key in manifest.__dataclass_fields__}, **changes})


# --- tracing ---


def _traced(where: str, method: Method, check_sizes: Sequence[int]) -> _trace.Trace:
    inputs = method.inputs
    names = list(inputs.tensors)

    def call(*tensors: Tensor) -> tuple[list[str], list[Tensor]]:
        flat = method.run(dict(zip(names, tensors, strict=True)))
        return list(flat), list(flat.values())

    def again(sizes: Mapping[str, int]) -> _trace.Trace:
        return _trace.trace(where, call, inputs, sizes)

    first = again(_trace.stand_ins(inputs))
    _refusals.check(where, first, inputs)
    _trace.check_all_sizes(where, first, again, inputs, check_sizes)
    return first


def _spec(method: Method, trace: _trace.Trace) -> MethodSpec:
    outputs = {}
    for name, node in zip(trace.outputs, trace.results, strict=True):
        x = node.meta["val"]
        outputs[name] = ArraySpec(dtype_name(x.dtype), tuple(_entry(trace, size) for size in x.shape))
    return MethodSpec(method.inputs.specs(), outputs)


def _entry(trace: _trace.Trace, size: Any) -> int | str:
    """A size of an output: a number, or an expression in the names of the dimensions."""
    if isinstance(size, int):
        return size
    import sympy

    names = {symbol: sympy.Symbol(dim, integer=True, positive=True) for dim, symbol in trace.symbols.items()}
    expression = trace.env.replace(size.node.expr).xreplace(names)
    return int(expression) if expression.is_number else str(expression)


def _torchscript_bytes(where: str, draft: Manifest, traces: Mapping[str, _trace.Trace]) -> bytes:
    constants: Tensors = {}
    source = _source.prelude(DTYPES)
    refused = {dim: entry["refused"] for dim, entry in draft.sizes.items()}
    for key, trace in traces.items():
        names = {}
        for node in trace.module.graph.nodes:
            if node.op == "get_attr":
                names[str(node.target)] = f"constant_{len(constants)}"
                constants[names[str(node.target)]] = getattr(trace.module, str(node.target))
        source += "\n" + _source.method(where, key, trace, draft.methods[key].inputs, refused, names)
    source += f"\ndef signature(self) -> str:\n    return {json.dumps(draft.signature())}\n"
    return _torchscript.to_bytes(_torchscript.compiled(where, source, constants))


# --- recorded cases ---


@dataclass(frozen=True)
class Case:
    method: str
    sizes: dict[str, int]
    inputs: Tensors
    outputs: Tensors


def _record(methods: Mapping[str, Method], check_sizes: Sequence[int]) -> list[Case]:
    """What the functions return at the sizes of their examples and at those to be checked."""
    cases = []
    for key, method in methods.items():
        for sizes in _combinations(method.inputs.sizes, check_sizes):
            given = method.inputs.resized(sizes)
            try:
                outputs = method.run({name: x.clone() for name, x in given.items()})
            except Exception as error:
                if sizes != method.inputs.sizes:
                    error.add_note(f"The function itself raises this at {sizes}, which check_sizes={check_sizes} asks.")
                raise
            cases.append(Case(key, sizes, given, outputs))
    return cases


def _combinations(example: Mapping[str, int], check_sizes: Sequence[int]) -> list[dict[str, int]]:
    """Sizes of all dimensions: those of the example; every size for all; and different ones, in turn."""
    dims, n = list(example), len(check_sizes)
    cases = [dict(example)]
    if dims:
        cases += [dict.fromkeys(dims, size) for size in check_sizes]
        cases += [{dim: check_sizes[(i + k) % n] for k, dim in enumerate(dims)} for i in range(n)]
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def _save_cases(cases: Sequence[Case], methods: Mapping[str, Method], path: Path) -> None:
    from safetensors.torch import save  # not save_file, which makes files that only their owner can read

    arrays = {}
    for i, case in enumerate(cases):
        dims = methods[case.method].inputs.dims
        # parameters are the same in all cases, and may be large
        named = {f"{i}.in.{name}" if dims[name] else f"in.{name}": x for name, x in case.inputs.items()}
        for name, x in {**named, **{f"{i}.out.{name}": x for name, x in case.outputs.items()}}.items():
            # results may share memory, which safetensors refuses
            arrays[name] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
    path.write_bytes(save(arrays))


# --- options ---


def _formats(where: str, formats: Sequence[str]) -> list[str]:
    chosen = list(formats)
    if isinstance(formats, str) or not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(SUFFIXES):
        raise ValueError(f"{where}: formats must be some of {tuple(SUFFIXES)}, got {formats!r}")
    return chosen


def _sizes(where: str, check_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(check_sizes)
    wrong = [n for n in sizes if isinstance(n, bool) or not isinstance(n, int) or n < 0]
    if wrong or not sizes:
        raise ValueError(f"{where}: check_sizes must be integers >= 0, one at least, got {check_sizes!r}")
    return sizes

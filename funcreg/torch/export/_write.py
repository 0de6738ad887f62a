"""From functions of named tensors to files: trace, source, recorded cases, self-check, manifest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._artifact import staged, target
from ..._export_report import ExportReport
from ..._export_sizes import Sizes, to_check
from ..._manifest import ArraySpec, FileSpec, Manifest, MethodSpec, manifest_path
from . import _cases, _check, _refusals, _sizes, _source, _torchscript, _trace
from ._inputs import DTYPES, Method, Tensors, dtype_name
from ._report import report

SUFFIXES = {"torchscript": ".pt", "pt2": ".pt2"}
_TRACING = threading.Lock()  # a trace replaces functions of torch for the whole process


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
    checked = to_check(where, check_sizes)
    file = target(where, path, SUFFIXES[formats[0]], overwrite)
    # first of all: what is wrong with a function itself is told by its own error
    with _TRACING:
        cases = _cases.record(methods, checked, feed_back=kind == "step")
        found = {key: _traced(where, method, checked, cases) for key, method in methods.items()}
    traces = {key: trace for key, (trace, _) in found.items()}
    known = {key: known for key, (_, known) in found.items()}
    specs = {key: _spec(methods[key], traces[key]) for key in methods}
    dims = dict.fromkeys(dim for method in methods.values() for dim in method.inputs.sizes)
    sizes = {dim: {"refused": [n for n in (0, 1) if n not in checked]} for dim in dims}
    described = [{"method": case.method, "sizes": case.sizes, "carried": case.carried} for case in cases]
    check = {"threads": torch.get_num_threads(), "device": next(iter(methods.values())).inputs.device.type}
    manifest = Manifest(kind, name, "torch", torch.__version__, specs, sizes, {}, described, check)
    with staged(where, file, overwrite) as folder:
        names = {key: file.with_suffix(SUFFIXES[key]).name for key in formats} | {"cases": f"{file.name}.safetensors"}
        if "torchscript" in names:
            (folder / names["torchscript"]).write_bytes(_torchscript_bytes(where, manifest, traces, known))
        if "pt2" in names:
            from ._pt2 import pt2_bytes

            with _TRACING:
                data = pt2_bytes(where, traces["forward"], known["forward"], methods["forward"].inputs)
            (folder / names["pt2"]).write_bytes(data)
        (folder / names["cases"]).write_bytes(_cases.to_bytes(cases))
        manifest = replace(manifest, files={key: FileSpec.of(folder / name) for key, name in names.items()})
        beside = manifest_path(folder / file.name)
        beside.write_text(manifest.to_json(), encoding="utf-8")
        (result,) = _check.run(where, [beside])
        _check.require_equal(where, result)
        check |= {key: result[key] for key in ("compared", "cpu_capability")}
        manifest = replace(manifest, self_check={**check, "bitwise": True})
        beside.write_text(manifest.to_json(), encoding="utf-8")
    return report(file, manifest, result, started)


# --- tracing ---


def _traced(
    where: str, method: Method, check_sizes: Sequence[int], cases: Sequence[_cases.Case]
) -> tuple[_trace.Trace, _sizes.Known]:
    """The graph of a function, and for which sizes it is."""
    inputs = method.inputs
    names = list(inputs.tensors)

    def call(*tensors: Tensor) -> tuple[list[str], list[Tensor]]:
        flat = method.run(dict(zip(names, tensors, strict=True)))
        return list(flat), list(flat.values())

    def again(where: str, sizes: Sizes, fixed: Sizes) -> _trace.Trace:
        traced = _trace.trace(where, call, inputs, sizes, fixed)
        _refusals.check(where, traced, inputs)
        return traced

    first = again(where, _sizes.stand_ins(inputs), {})
    run = [case.sizes for case in cases]
    return first, _sizes.known(where, first, again, inputs, check_sizes, run)


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


def _torchscript_bytes(
    where: str,
    draft: Manifest,
    traces: Mapping[str, _trace.Trace],
    known: Mapping[str, _sizes.Known],
) -> bytes:
    constants: Tensors = {}
    source = _source.prelude(DTYPES)
    refused = {dim: entry["refused"] for dim, entry in draft.sizes.items()}
    for key, trace in traces.items():
        names = {}
        for node in trace.module.graph.nodes:
            if node.op == "get_attr":
                names[str(node.target)] = f"constant_{len(constants)}"
                constants[names[str(node.target)]] = getattr(trace.module, str(node.target))
        source += "\n" + _source.method(where, key, trace, draft.methods[key].inputs, refused, known[key], names)
    source += f"\ndef signature(self) -> str:\n    return {json.dumps(draft.signature())}\n"
    return _torchscript.to_bytes(_torchscript.compiled(where, source, constants))


# --- options ---


def _formats(where: str, formats: Sequence[str]) -> list[str]:
    chosen = list(formats)
    if isinstance(formats, str) or not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(SUFFIXES):
        raise ValueError(f"{where}: formats must be some of {tuple(SUFFIXES)}, got {formats!r}")
    return chosen

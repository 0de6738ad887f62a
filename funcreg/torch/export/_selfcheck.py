"""Run the recorded cases of exported files and compare every output with what was recorded.

A program of its own, `python -I _selfcheck.py`, which imports torch and safetensors and nothing of this package: it
sees what any other process sees. It reads a line of JSON, `{"manifests": [path, ...], "path": [folder, ...]}`, where
`path` is where those two packages are, and prints a line with the results; and so for every line.
"""

import hashlib
import io
import json
import sys
import warnings
from pathlib import Path


def main(job):
    sys.path += job["path"]
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit\.")
    return [check(Path(manifest)) for manifest in job["manifests"]]


def check(path):
    """The worst difference of every file that a manifest names."""
    import torch

    manifest = json.loads(path.read_text())
    torch.set_num_threads(manifest["self_check"]["threads"])
    arrays = _load_arrays(_bytes(path, manifest["files"]["cases"]))
    found = _Found()
    for kind in ("torchscript", "pt2"):
        if kind in manifest["files"]:
            _check_file(kind, _bytes(path, manifest["files"][kind]), manifest, arrays, found)
    return {
        "compared": len(found.compared),
        "different": len(found.different),
        "outside": len(found.outside),
        "worst_abs": found.worst_abs,
        "worst_ulp": found.worst_ulp,
        "first": found.first,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


class _Found:
    """What the comparisons have found; outputs by format, method, sizes and name."""

    def __init__(self):
        self.compared, self.different, self.outside = set(), set(), set()
        self.worst_abs, self.worst_ulp, self.first = 0.0, 0, None

    def differs(self, where, what, outside):
        self.different.add(where)
        if outside:
            self.outside.add(where)
        self.first = self.first or f"{where}: {what}"


ROUNDS = 3  # TorchScript profiles in its first calls, and runs an optimized graph in later ones
TOLERANCE = 32  # of another build or instruction set: in eps of the largest number of an output


def _check_file(kind, data, manifest, arrays, found):
    import torch

    device = manifest["self_check"]["device"]
    try:
        if kind == "torchscript":
            loaded = torch.jit.load(io.BytesIO(data), map_location=device)
            said = json.loads(loaded.signature())
        else:
            loaded, said = torch.export.load(io.BytesIO(data)).module(), {}
    except Exception as error:
        found.differs(kind, f"cannot be loaded, {type(error).__name__}: {error}", outside=True)
        return
    if said != {key: manifest[key] for key in said}:
        found.differs(kind, "takes and returns something else than the manifest says", outside=True)
        return
    for _ in range(ROUNDS):
        for i, case in enumerate(manifest["cases"]):
            method, spec = case["method"], manifest["methods"][case["method"]]
            where = " ".join([kind, method, f"case {i}", *(f"{dim}={size}" for dim, size in case["sizes"].items())])
            try:
                given = {name: _input(arrays, manifest["cases"], i, name) for name in spec["inputs"]}
                expected = {name: arrays[f"{i}.out.{name}"] for name in spec["outputs"]}
            except KeyError as missing:
                found.differs(where, f"the array {missing} is not in the file of cases", outside=True)
                continue
            inputs = {name: x.to(device, copy=True) for name, x in given.items()}
            try:
                outputs = getattr(loaded, method)(inputs)
            except Exception as error:
                found.differs(where, f"{type(error).__name__}: {error}", outside=True)
                continue
            for name, x in expected.items():
                found.compared.add(f"{where}, {name}")
                _compare(f"{where}, {name}", outputs[name], x, found)
            for name, x in inputs.items():
                _compare(f"{where}, the input {name} afterwards", x, given[name], found)


def _input(arrays, cases, i, name):
    """An input of a case: the output of the case before, or its own, or that of all cases."""
    if name in cases[i]["carried"]:
        return arrays[f"{i - 1}.out.{name}"]
    return arrays[f"{i}.in.{name}" if f"{i}.in.{name}" in arrays else f"in.{name}"]


def _compare(where, got, expected, found):
    import torch

    if got.dtype != expected.dtype or got.shape != expected.shape:
        text = f"{got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
        found.differs(where, text, outside=True)
        return
    got, expected = got.detach().cpu().contiguous(), expected.contiguous()
    if not expected.is_floating_point():
        if not torch.equal(got, expected):
            found.differs(where, "other numbers", outside=True)
        return
    both_nan = got.isnan() & expected.isnan()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    # NaN is NaN whatever its payload; -0.0 is not 0.0
    wrong = (got.view(integer) != expected.view(integer)) & ~both_nan
    if not wrong.any():
        return
    distance = (got.double() - expected.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))[wrong]
    worst, ulp = float(distance.max()), _ulps(got[wrong].view(integer), expected[wrong].view(integer))
    finite = expected.double().abs()[expected.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    text = f"{int(wrong.sum())} of {wrong.numel()} numbers differ, by {worst:.3g} or {ulp} ulp at most"
    limits = torch.finfo(got.dtype)  # below the smallest normal number some machines take everything for 0
    found.differs(where, text, outside=not worst <= max(TOLERANCE * limits.eps * scale, limits.tiny))
    found.worst_abs = max(found.worst_abs, worst)
    found.worst_ulp = max(found.worst_ulp, ulp)


def _ulps(got, expected):
    """The largest number of representable numbers between two, from their bits; of different signs, through 0."""

    def ordered(bits):  # Python's integers do not overflow
        low = -(2 ** (8 * bits.itemsize - 1))
        return [low - b if b < 0 else b for b in bits.flatten().tolist()]

    return max(abs(a - b) for a, b in zip(ordered(got), ordered(expected), strict=True))


def _load_arrays(data):
    from safetensors.torch import load

    return load(data)


def _bytes(manifest, spec):
    data = (manifest.parent / spec["name"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != spec["sha256"]:
        raise ValueError(f"{spec['name']} is not the file that {manifest.name} describes")
    return data


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(main(json.loads(line))), flush=True)

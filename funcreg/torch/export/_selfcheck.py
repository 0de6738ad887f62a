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
    result = {
        "compared": 0,
        "different": 0,
        "worst_abs": 0.0,
        "worst_ulp": 0,
        "outside": 0,
        "first": None,
        "torch_version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    for kind in ("torchscript", "pt2"):
        if kind in manifest["files"]:
            _check_file(kind, _bytes(path, manifest["files"][kind]), manifest, arrays, result)
    return result


ROUNDS = 3  # TorchScript profiles in its first calls, and runs an optimized graph in later ones


def _check_file(kind, data, manifest, arrays, result):
    import torch

    device = manifest["self_check"]["device"]
    if kind == "torchscript":
        loaded = torch.jit.load(io.BytesIO(data), map_location=device)
    else:
        loaded = torch.export.load(io.BytesIO(data)).module()
    for turn in range(ROUNDS):
        for i, case in enumerate(manifest["cases"]):
            method = case["method"]
            run = getattr(loaded, method)
            inputs = {name: arrays[f"{i}.in.{name}"] for name in manifest["methods"][method]["inputs"]}
            inputs = {name: x.to(device, copy=True) for name, x in inputs.items()}
            where = f"{kind} {method} {case['sizes']}"
            try:
                outputs = run(inputs)
            except Exception as error:
                result["different"] += 1
                result["outside"] += 1
                result["first"] = result["first"] or f"{where}: {type(error).__name__}: {error}"
                continue
            for name in manifest["methods"][method]["outputs"]:
                result["compared"] += turn == 0
                _compare(f"{where} {name}", outputs[name], arrays[f"{i}.out.{name}"], result)
            for name, x in inputs.items():
                _compare(f"{where} input {name} afterwards", x, arrays[f"{i}.in.{name}"], result)


def _compare(where, got, expected, result):
    import torch

    if got.dtype != expected.dtype or got.shape != expected.shape:
        text = f"{where}: {got.dtype}{list(got.shape)} instead of {expected.dtype}{list(expected.shape)}"
        result["different"] += 1
        result["outside"] += 1
        result["first"] = result["first"] or text
        return
    got, expected = got.detach().cpu().contiguous(), expected.contiguous()
    if not expected.is_floating_point():
        same = torch.equal(got, expected)
        result["different"] += not same
        result["outside"] += not same
        result["first"] = result["first"] or (None if same else f"{where}: other numbers")
        return
    both_nan = got.isnan() & expected.isnan()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    # NaN is NaN whatever its payload; -0.0 is not 0.0
    wrong = (got.view(integer) != expected.view(integer)) & ~both_nan
    if not wrong.any():
        return
    distance = (got.double() - expected.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))[wrong]
    worst, ulp = float(distance.max()), _ulps(got, expected, wrong)
    result["different"] += 1
    result["worst_abs"] = max(result["worst_abs"], worst)
    result["worst_ulp"] = max(result["worst_ulp"], ulp)
    finite = expected.double().abs()[expected.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    result["outside"] += not worst <= TOLERANCE * torch.finfo(got.dtype).eps * scale
    text = f"{where}: {int(wrong.sum())} of {wrong.numel()} numbers differ, by {worst:.3g} or {ulp} ulp at most"
    result["first"] = result["first"] or text


TOLERANCE = 32  # of another build or instruction set: in eps of the largest number of an output


def _ulps(got, expected, wrong):
    """The largest number of representable numbers between two; of different signs, through 0."""
    import torch

    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]

    def ordered(x):
        bits = x[wrong].view(integer).to(torch.int64)
        low = -(2 ** (8 * got.dtype.itemsize - 1))
        return torch.where(bits < 0, low - bits, bits)

    difference = ordered(got).double() - ordered(expected).double()
    return int(difference.abs().max())


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

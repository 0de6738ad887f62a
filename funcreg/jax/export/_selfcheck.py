"""Run the recorded cases of an exported file, and write down what it returns.

A program of its own, `python -I _selfcheck.py`, which imports jax, numpy and safetensors and nothing of this package:
it sees what any other process sees. It reads a line of JSON, `{"manifest": path, "results": path, "path": [folder,
...]}`, where `path` is where those packages are, and writes the outputs as the arrays `CASE.NAME` of a safetensors
file. It prints a line about itself and about the noise of the outputs: how far each moves when the floating-point
inputs move by an ulp. And so for every line.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

DRAWS = 2


def main(job):
    sys.path += job["path"]
    import jax
    import numpy as np
    from jax import export
    from safetensors import deserialize
    from safetensors.numpy import save

    jax.config.update("jax_enable_x64", True)  # float64 stays what it is; a file without it is not changed by this
    path = Path(job["manifest"])
    manifest = json.loads(path.read_text(encoding="utf-8"))
    files = {key: (path.parent / spec["name"]).read_bytes() for key, spec in manifest["files"].items()}
    stored = {name: x["data"] for name, x in deserialize(files["cases"])}
    call = jax.jit(export.deserialize(bytearray(files["stablehlo"])).call)
    specs = manifest["methods"]["forward"]["inputs"]
    results, noise = {}, {}
    for i, case in enumerate(manifest["cases"]):
        inputs = {}
        for name, spec in specs.items():
            places = [f"in.{name}", f"{i}.in.{name}"] if name not in case["carried"] else [f"{i - 1}.out.{name}"]
            data = next(stored[place] for place in places if place in stored)
            shape = [n if isinstance(n, int) else case["sizes"][n] for n in spec["shape"]]
            inputs[name] = np.frombuffer(data, jax.numpy.dtype(spec["dtype"])).reshape(shape)
        outputs = {name: np.asarray(x, order="C") for name, x in dict(call(inputs)).items()}
        results |= {f"{i}.{name}": x for name, x in outputs.items()}
        noise[i] = dict.fromkeys(outputs, 0.0)
        for draw in range(DRAWS):
            moved = call({name: nudged(x, draw) for name, x in inputs.items()})
            for name, x in outputs.items():
                apart = np.abs(x.astype(np.float64) - np.asarray(moved[name]).astype(np.float64))
                noise[i][name] = max(noise[i][name], float(apart[np.isfinite(apart)].max(initial=0.0)))
    Path(job["results"]).write_bytes(save(results))
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": version("jaxlib")}
    return {**versions, "device": device.device_kind, "noise": noise}


def nudged(x, draw):
    """Every number an ulp up or down, at random."""
    import jax
    import numpy as np

    if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        return x
    signs = np.random.default_rng(draw).choice([-1.0, 1.0], size=x.shape)
    return (x + x * (signs * float(jax.numpy.finfo(x.dtype).eps)).astype(x.dtype)).astype(x.dtype)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(main(json.loads(line))), flush=True)

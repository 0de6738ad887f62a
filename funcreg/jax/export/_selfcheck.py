"""Run the recorded cases of an exported file, and write down what it returns.

A program of its own, `python -I _selfcheck.py`, which imports jax, numpy and safetensors and nothing of this package:
it sees what any other process sees. It reads a line of JSON, `{"manifest": path, "results": path, "path": [folder,
...]}`, where `path` is where those packages are, and writes the outputs as the arrays `CASE.NAME` of a safetensors
file. It prints a line about itself; and so for every line.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path


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
    exported = export.deserialize(bytearray(files["stablehlo"]))
    specs = manifest["methods"]["forward"]["inputs"]
    results = {}
    for i, case in enumerate(manifest["cases"]):
        inputs = {}
        for name, spec in specs.items():
            data = stored.get(f"in.{name}", stored.get(f"{i}.in.{name}"))
            shape = [n if isinstance(n, int) else case["sizes"][n] for n in spec["shape"]]
            inputs[name] = np.frombuffer(data, jax.numpy.dtype(spec["dtype"])).reshape(shape)
        for name, x in dict(exported.call(inputs)).items():
            results[f"{i}.{name}"] = np.asarray(x, order="C")
    Path(job["results"]).write_bytes(save(results))
    device = jax.devices()[0]
    return {"jax": jax.__version__, "jaxlib": version("jaxlib"), "device": device.device_kind}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(main(json.loads(line))), flush=True)

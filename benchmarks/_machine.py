"""What the numbers of a benchmark hold for."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def machine(families: Sequence[str], device: str) -> dict[str, str]:
    """Processor, load, versions; `families` are torch, jax and attach."""
    names = ["funcreg", "numpy", *(["torch"] if {"torch", "attach"} & {*families} else [])]
    names += ["jax", "jaxlib", "optax"] if "jax" in families else []
    found = {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
    }
    if "torch" in names:
        import torch

        seen = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        found["torch device"] = seen
    if "jax" in families:
        import jax

        found["jax device"] = jax.devices()[0].device_kind
    return found


def version(name: str) -> str:
    if name == "funcreg":
        import funcreg

        return funcreg.__version__  # that of the code measured, installed or not
    return importlib.metadata.version(name)

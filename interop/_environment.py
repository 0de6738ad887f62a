"""What a report holds for: versions and machine."""

import functools
import importlib.metadata
import os
import platform

import jax

import funcreg

LIBRARIES = ("numpy", "torch", "jax", "jaxlib", "flax", "optax")


def environment() -> dict[str, str]:
    """Versions of the libraries, Python, system and devices, by name; plain strings."""
    return dict(_found())


@functools.cache
def _found() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "funcreg": funcreg.__version__,
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "jax devices": ", ".join(sorted({device.device_kind for device in jax.devices()})),
    }

"""What holds for every test: strict JAX, the same seed, one thread per worker, no GPU test without a GPU."""

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import torch

from funcreg.jax.export import _cases
from funcreg.torch.export import _check

# The same examples in every run; no deadline, since a first call compiles.
hypothesis.settings.register_profile("funcreg", deadline=None, derandomize=True)
hypothesis.settings.load_profile("funcreg")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def sees_accelerator(framework: str) -> bool:
    """Whether `framework` ("torch" or "jax") sees more than the CPU."""
    if framework == "torch":
        return torch.accelerator.is_available()
    if framework == "jax":
        return jax.default_backend() != "cpu"
    raise ValueError(f"gpu: a framework must be 'torch' or 'jax', got {framework!r}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("gpu"):
        for framework in marker.args or ("torch", "jax"):
            if not sees_accelerator(framework):
                pytest.skip(f"{framework} sees no accelerator")


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """JAX mixes neither dtypes nor ranks by itself, unless the test is marked `relaxed_promotion`."""
    if request.node.get_closest_marker("relaxed_promotion"):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            yield


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def x64() -> Callable[[], AbstractContextManager[None]]:
    """`with x64():` float64 in JAX, inside this block of this thread only. Off elsewhere: it hides float32 faults."""
    return lambda: jax.enable_x64(True)


@pytest.fixture(scope="session")
def self_check() -> Iterator[Callable[[str], str]]:
    """A process that checks exported files, one after another."""
    command = [sys.executable, "-I", str(_check.PROGRAM)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(job: str) -> str:
        stdin.write(job + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, f"the self-check's process ended with {process.wait()}"
        return answer

    yield ask
    with process:
        stdin.close()


@pytest.fixture(scope="module")
def fresh_process(self_check: Callable[[str], str]) -> Iterator[None]:
    """One isolated process for the self-checks of all exports, instead of one each that takes three seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_check, "ask", self_check)
        # PyTorch writes thousands of empty records here while it traces, all of which pytest keeps
        patch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
        yield


@pytest.fixture(scope="session")
def fresh_jax_process() -> Iterator[None]:
    """The same for the exports of the JAX wing, for as long as the tests run: what takes the time is the import."""
    command = [sys.executable, "-I", str(_cases.PROGRAM)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin and process.stdout
    stdin, stdout = process.stdin, process.stdout

    def ask(where: str, job: str, environment: dict[str, str]) -> dict[str, Any]:
        assert environment["JAX_PLATFORMS"] == "cpu"
        stdin.write(job + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, f"{where}: the self-check's process ended with {process.wait()}"
        return json.loads(answer)

    with process, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cases, "_ask", ask)
        yield
        stdin.close()

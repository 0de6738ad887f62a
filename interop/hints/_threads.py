"""How many threads PyTorch computes with while changes are tried: of small arrays most of the time goes into threads.

A step of a small network takes a few milliseconds in one thread, and ten times that in as many threads as there are
cores where something else is on these cores as well, JAX's own threads to begin with.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_suits(run: Callable[[], object]) -> Iterator[None]:
    """PyTorch with one thread, or with those that it has, as `run` is quicker; afterwards as it was."""
    several = torch.get_num_threads()
    try:
        if several > 1:
            with_several = _seconds(run)
            torch.set_num_threads(1)
            if _seconds(run) > with_several:
                torch.set_num_threads(several)
        yield
    finally:
        torch.set_num_threads(several)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

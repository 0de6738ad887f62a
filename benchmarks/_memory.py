"""How much memory a call takes."""

import os
import threading
from collections.abc import Callable
from typing import Any


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(function: Callable[[], Any]) -> int:
    """The largest growth of the resident memory while the function runs, and with its result."""
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(2e-4):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        done.set()
        thread.join()
    peak = max(peak, resident())
    del result
    return peak - before

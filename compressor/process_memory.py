"""How much memory this process has used."""

from __future__ import annotations

import os

import psutil
import torch  # noqa: F401  its libraries are what IMPORTED_BYTES measures


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        with open("/proc/self/status") as status:
            lines = [line for line in status if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    except (OSError, IndexError):
        return rss()


def rss() -> int:
    """Resident size of this process now, in bytes."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


IMPORTED_BYTES = rss()
"""Resident size with PyTorch imported and nothing done.

Measured, since PyTorch's build decides it: 250 MB for a CPU alone, 550 MB with CUDA, whose
libraries are loaded and relocated where there is no GPU too. And measured here, while modules are
being imported, since `plan` and `run` do nearly the same until then: it repeats to a few
hundredths, with files in the page cache or not, and nothing of what a run does later is in it.
"""

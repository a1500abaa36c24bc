"""How much memory this process has used."""

import os

import psutil


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
